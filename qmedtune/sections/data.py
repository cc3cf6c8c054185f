"""`data:` and `hygiene:`: named corpora, and what happens to each of their records before training."""

from __future__ import annotations

import codecs
from typing import Annotated, Literal

from pydantic import Field, field_validator

from qmedtune.fields import CLINICAL_FORMATS, Fraction, Language, Positive, Section, SourceFormat, SourceKind

# Keys of a source that packing reads, and reading does not.
PACKED_AS = {"template", "chunking", "overlap", "max_tokens"}


class SourceSection(Section):
    """One named corpus."""

    path: str | list[str]
    """Where the corpus lies: files, folders, patterns, `builtin:...`, one or a list; `${VARIABLE}`s are filled in from
    the environment."""
    kind: SourceKind
    """What the text is: `literature`, `clinical` (searched for identifiers), `general` (replayed against forgetting)
    or `instructions` (what sft learns from)."""
    format: SourceFormat = "auto"
    """How files are read; `auto`: each is recognised by name and content, and told. Name it where that is wrong."""
    columns: dict[str, str] = {}
    """Your names for a table's columns: `{text: note_text, patient: subject_id}`. Give it where names are not the
    usual ones."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """The character between the columns of a table; without it found and told. Give it where that is wrong."""
    encoding: str | None = None
    """Encoding of a table or text file by Python's name, such as `cp1252`; without it found and told."""
    template: str | None = None
    """How conversations are written for the model: `alpaca`, `chatml`, `chat` ... or a template.json; without it the
    base's own, else `plain`."""
    split_by: Literal["record", "patient"] = "record"
    """What is held out whole. Take `patient` for notes, so that no patient stands on both sides."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of records that are never trained on, for validation and perplexity. Raise it for small corpora."""
    max_records: Positive | None = None
    """Only the first so many documents are read. Give it to try a recipe on a part."""
    max_tokens: Positive | None = None
    """At most so many tokens are trained on, a seeded choice of whole documents. Give it to compare corpora of one
    size."""
    chunking: Literal["pack", "truncate", "window", "overlap"] = "pack"
    """What becomes of documents longer than a row: all pieces, the beginning, a random window each time, or pieces
    that share tokens. `pack` loses nothing."""
    overlap: Annotated[float, Field(gt=0, le=0.5)] = 0.125
    """Share of a row that neighbouring pieces have in common, with `chunking: overlap`."""
    phi: Literal["off", "report", "redact", "refuse"] | None = None
    """What is done about identifiers of patients in this source; without it `hygiene.phi` for clinical text, and
    nothing elsewhere."""
    license: str | None = None
    """Licence of the corpus, as it shall stand in report and model card."""
    terms: str | None = None
    """Terms of use, such as a data use agreement, as they shall stand in report and model card."""

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def is_builtin(self) -> bool:
        """All of it is text of the built-in world."""
        return all(path.startswith("builtin:") for path in self.paths)

    @property
    def is_clinical(self) -> bool:
        """Whether its text is of patients, by its kind or by a format that nothing else has."""
        return self.kind == "clinical" or self.format in CLINICAL_FORMATS

    @property
    def may_identify(self) -> bool:
        """Whether its text can name patients: it is clinical, or the recipe has identifiers looked for in it."""
        return self.is_clinical or self.phi not in (None, "off")

    @field_validator("delimiter")
    @classmethod
    def _usable_delimiter(cls, value: str | None) -> str | None:
        if value is not None and value in '"\r\n':
            raise ValueError("neither a quote nor a line end separates columns")
        return value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        try:
            codecs.lookup(value or "utf-8")
        except LookupError as error:
            raise ValueError("no encoding that Python knows, such as utf-8, utf-16, cp1252, latin-1") from error
        return value


class DedupSection(Section):
    """Duplicates within and between sources."""

    exact: bool = True
    """Drop records whose normalised text another record has. Turn it off only to repeat a published run that kept
    them."""
    near: Annotated[float, Field(ge=0.5, le=1)] | Literal[False] = 0.8
    """Drop records that share this much of their wording with another one (Jaccard similarity), or `false` for none.
    Raise it for notes full of forms."""


class HygieneSection(Section):
    """What happens to every record before it is trained on."""

    clean: bool = True
    """Bring text to one Unicode form and drop control characters and runs of blanks (notes keep their blanks). Turn it
    off for text that is clean by construction."""
    languages: Literal["any"] | Annotated[list[Language], Field(min_length=1)] = "any"
    """Languages that are kept, by their two letters: `[en]`. Name them for text out of the web."""
    min_characters: Annotated[int, Field(ge=0)] = 0
    """Records shorter than this are refused, in characters. Raise it (200) against stubs and empty abstracts."""
    max_characters: Positive | None = None
    """Records longer than this are refused, in characters; without it none is. `chunking` deals with long ones."""
    dedup: DedupSection = DedupSection()
    """Which duplicates are dropped."""
    decontaminate: Literal["off", "evaluation"] | list[str] = "evaluation"
    """Whose questions training text must not hold: those of `evaluate.tasks`, none, or a list of benchmark files."""
    contaminated: Literal["drop", "report", "split"] = "drop"
    """What becomes of a record that holds a benchmark's question: dropped, only counted, or kept with the benchmark
    scored in two parts."""
    phi: Literal["off", "report", "redact", "refuse"] = "report"
    """What is done about identifiers in clinical sources: nothing, counted, replaced by stand-ins, or the record
    refused. It is no de-identification."""
    presidio: str | None = None
    """A spaCy model, package or folder, that looks for names in running text (`pip install 'qmedtune[presidio]'`)."""
    shift_dates: bool = False
    """With `phi: redact` dates move by a number of days per patient instead of becoming `[date]`. Turn it on where
    durations matter."""
    max_bad_fraction: Fraction = 0.01
    """Share of a source's records that may be damaged before the run stops. Raise it only after reading
    rejects.jsonl."""
