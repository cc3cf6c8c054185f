"""What the values of a recipe's keys may be: the types that its sections are made of, and the base of all sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]
SourceKind = Literal["literature", "clinical", "general", "instructions"]
SourceFormat = Literal[
    "auto", "jsonl", "json", "csv", "tsv", "parquet", "text", "jats", "pubmed", "medline", "s2orc", "cord19", "tei",
    "bioc", "pubtator", "mimic_cxr", "n2c2", "ccda", "fhir", "hl7", "emrqa", "pubmedqa", "medqa", "medmcqa", "bioasq",
    "medquad", "liveqa", "docx", "xlsx", "pdf", "huggingface",
]  # fmt: skip

# Formats in which nothing but text of patients is written.
CLINICAL_FORMATS = ("mimic_cxr", "n2c2", "ccda", "fhir", "hl7", "emrqa")

# What data/hygiene/language.py tells apart.
Language = Literal[
    "en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "pl", "zh", "ja", "ko", "ru", "ar", "el", "he", "th", "hi",
]  # fmt: skip


def later(default: Any, *, alias: str | None = None) -> Any:
    """The field of a key that came after 0.2: at its default it stands in no key and no record, so that what was made
    before it stays finished. alias: its name in recipes, where that is a word of Python."""
    return Field(default, alias=alias, exclude_if=lambda value: value == default)


class Section(BaseModel):
    """Strict, and the text below a field is its description in the JSON Schema."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
