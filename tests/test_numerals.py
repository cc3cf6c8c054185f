"""Over whole public files: every numeral of the source markup stands in the text, none is changed, none is new.

The files are no part of the repository: give a folder of them (JATS, PubMed, BioC, PubTator, FHIR, C-CDA, HL7) as
`$QMEDTUNE_PUBLIC_FILES`. What a file says is taken from it here in another way than by the readers: a walk over all
elements that the policy reads, where raised, lowered and mathematical parts stand apart from their neighbours.
"""

import base64
import json
import os
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qmedtune.data.reading.formats import format_of
from qmedtune.data.reading.rejects import Damaged, RefusedRecord
from qmedtune.data.reading.sources import read_items
from qmedtune.recipe import SourceSection

REAL = Path(os.environ.get("QMEDTUNE_REAL_DATA", Path(__file__).parents[2] / "shared" / "data")) / "literature"
PUBLIC = os.environ.get("QMEDTUNE_PUBLIC_FILES")
FILES = [file for folder in (REAL, PUBLIC) if folder for file in sorted(Path(folder).rglob("*")) if file.is_file()]
FILES = [file for file in FILES if file.suffix in (".nxml", ".xml", ".json", ".txt", ".hl7", ".ccda")]
pytestmark = pytest.mark.slow

PACKED = "H4sI"  # gzip in Base64, which some bundles carry as text/plain: damaged, and named
LEFT_OUT = {"table", "label", "tex-math", "graphic", "fn-group", "ref-list", "object-id", "alt-text", "long-desc"}
LEFT_OUT |= {"permissions", "attrib"}
APART = {"sup", "sub", "mn", "mi", "mo", "mtext", "break"}
LINES = {"p", "title", "td", "th", "item", "list-item", "paragraph", "caption", "tr", "content", "br", "AbstractText"}
SUPERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉", "0123456789" * 2)
CITED = re.compile(
    r"[\s\[(]*[A-Za-z]?\d{1,3}[a-z]?(?:[\s,;–—‐−-]+(?:and\s+)?\[?[A-Za-z]?\d{1,3}[a-z]?\]?)*[\s\])]*[,;.]?\s*"
)


def numerals(text: str) -> Counter:
    apart = re.sub(r"([⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉]+)", r" \1 ", text)
    return Counter(re.findall(r"[0-9]+", apart.translate(SUPERS)))


def name(element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def is_cited(element) -> bool:
    text = "".join(element.itertext())
    return name(element) == "xref" and element.get("ref-type") == "bibr" and CITED.fullmatch(text) is not None


def said(element, left_out=frozenset()) -> str:
    """All text below an element in order, what is apart set off by blanks."""
    if name(element) in left_out or is_cited(element):
        return " "
    if name(element) == "sup" and any(is_cited(child) for child in element):
        return " "
    parts = [element.text or ""]
    for child in element:
        parts += [said(child, left_out), child.tail or ""]
    around = " " if name(element) in APART | LINES else ""
    return f"{around}{''.join(parts)}{around}"


def of_jats(root) -> str:
    parts = []
    for article in root.iter() if name(root) != "article" else [root]:
        if name(article) == "article":
            wanted = {"article-meta": ("article-title", "abstract"), "body": None, "floats-group": None}
            meta = next((e for e in article.iter() if name(e) == "article-meta"), None)
            title = [c for e in meta if name(e) == "title-group" for c in e if name(c) == "article-title"]
            parts += [said(e, LEFT_OUT) for e in [*title, *(e for e in meta if name(e) == "abstract")]]
            parts += [said(e, LEFT_OUT) for e in article if name(e) in wanted]
    return " ".join(parts)


def of_pubmed(root) -> str:
    parts = []
    for article in root.iter("Article"):
        if article.find("Abstract") is not None:
            parts += [said(e) for e in (article.find("ArticleTitle"), *article.iterfind("Abstract/AbstractText"))]
            parts += [e.get("Label", "") for e in article.iterfind("Abstract/AbstractText")]
    return " ".join(parts)


def of_bioc(passages) -> str:
    skipped = ("ref", "table", "front_matter", "footnote", "table_footnote", "reference")
    return " ".join(text for kind, text in passages if kind.lower() not in skipped)


def bioc_passages(root):
    for passage in root.iter("passage"):
        infons = {infon.get("key"): infon.text or "" for infon in passage.findall("infon")}
        texts = [passage.findtext("text")] if passage.find("text") is not None else []
        texts = texts or [sentence.findtext("text") or "" for sentence in passage.findall("sentence")]
        yield infons.get("type", ""), " ".join(texts)


def of_fhir(value) -> str:
    """All Base64 of text in the notes of a bundle, and the conclusions of reports."""
    resources = [entry["resource"] for entry in value.get("entry", [])] if value.get("entry") else [value]
    parts = []
    for resource in resources:
        attachments = [c.get("attachment", {}) for c in resource.get("content", []) if isinstance(c, dict)]
        attachments += resource.get("presentedForm", []) + ([resource] if resource["resourceType"] == "Binary" else [])
        for attachment in attachments:
            is_text = str(attachment.get("contentType", "text/plain")).startswith("text/plain")
            if is_text and not str(attachment.get("data", PACKED)).startswith(PACKED):
                parts.append(base64.b64decode(attachment["data"]).decode())
        if resource["resourceType"] == "DiagnosticReport":
            parts.append(resource.get("conclusion", ""))
        if resource["resourceType"] == "Composition":
            held = [section for section in resource.get("section", []) if section.get("text", {}).get("div")]
            divs = [re.sub("<[^>]*>", " ", section["text"]["div"]) for section in held]
            parts += [*divs, *(section.get("title", "") for section in held)]
            parts += [resource.get("title", "")] if held else []
    return " ".join(parts)


def of_ccda(root) -> str:
    parts = [e.text or "" for e in root if name(e) == "title"]
    for section in (e for e in root.iter() if name(e) == "section"):
        texts = [said(e) for e in section if name(e) == "text"]
        if "".join(texts).strip():
            parts += [*texts, *((e.text or "") for e in section if name(e) == "title")]
    return " ".join(parts)


def of_hl7(text: str) -> str:
    parts = []
    for segment in re.split(r"[\r\n]+", text):
        fields = segment.split("|")
        if fields[0] == "OBX" and len(fields) > 5 and fields[2] in ("TX", "FT", "ST"):
            parts.append(fields[5] if len(fields) <= 11 or fields[11] not in ("D", "W") else "")
        if fields[0] == "NTE" and len(fields) > 3:
            parts.append(fields[3])
    return " ".join(re.sub(r"\\\.br\\|\\X0[AD]\\", " ", part) for part in parts)


def source_of(file: Path, format: str) -> str | None:
    if format in ("jats", "pubmed", "bioc_xml", "ccda"):
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError:  # entities of a DTD
            return None
        if format == "bioc_xml":
            return of_bioc(bioc_passages(root))
        return {"jats": of_jats, "pubmed": of_pubmed, "ccda": of_ccda}[format](root)
    if format == "json":
        value = json.loads(file.read_text("utf-8-sig"))
        if isinstance(value, dict) and "resourceType" in value:
            return of_fhir(value)
        documents = value.get("documents", []) if isinstance(value, dict) else []
        passages = [passage for document in documents for passage in document["passages"]]
        return of_bioc((p["infons"].get("type", ""), p.get("text", "")) for p in passages) if passages else None
    if format == "hl7":
        return of_hl7(file.read_bytes().decode("utf-8-sig"))
    if format == "pubtator":
        return " ".join(re.findall(r"^\d+\|[ta]\|(.*)$", file.read_text(), re.MULTILINE))
    return None


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_numeral_is_changed(file):
    format = format_of(file, "auto")
    source = source_of(file, format)
    if source is None:
        pytest.skip("not of these formats, or with entities of a DTD")
    items = [item for _, _, item in read_items(SourceSection(path=str(file), kind="literature"))]
    damaged = {item.reason for item in items if isinstance(item, Damaged)}
    assert damaged <= {"FHIR attachment is not in its encoding (none said: UTF-8)"}
    if not any(isinstance(item, dict) for item in items):
        assert all(isinstance(item, Damaged | RefusedRecord) for item in items)
        pytest.skip("holds no text: refused by name")
    text = " ".join(item["text"] for item in items if isinstance(item, dict))
    wanted, found = numerals(source), numerals(text)
    assert found - wanted == Counter() and wanted - found == Counter()
    assert found.total() or format in ("hl7", "json", "ccda")
