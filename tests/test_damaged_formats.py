"""Ten thousand damaged files of the newer formats: each told by a fixed reason, none escapes, memory is bounded."""

import io
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qmedtune.data.reading.rejects import Damaged, RefusedRecord
from qmedtune.data.reading.sources import read_items
from qmedtune.errors import DataError
from qmedtune.recipe import SourceSection

PASSAGES = "".join(f'<passage><infon key="type">paragraph</infon><text>Owl {n}.</text></passage>' for n in range(4))
TEI = '<TEI xmlns="http://www.tei-c.org/ns/1.0"><text><body>{}</body></text></TEI>'
MSH = "MSH|^~\\&|A|B|C|D|2020||ORU^R01|{}|P|2.3\rPID|1||7\rOBR|1\rOBX|1|TX|N||Owl {}||||||F\r"
NOTE = {"resourceType": "DocumentReference", "id": "d", "content": [{"attachment": {"data": "T3dscyBhcmUgd2VsbC4="}}]}
CDA = '<ClinicalDocument xmlns="urn:hl7-org:v3"><section><title>A</title><text>Owl.</text></section></ClinicalDocument>'
QA = '<Document id="1"><QAPairs><QAPair pid="1"><Question qid="q">Who?</Question><Answer>Owl.</Answer></QAPair>'
QA += "</QAPairs>"
ARTICLE = "<article><front><article-meta/></front><body><p>Owl 10<sup>9</sup>.</p></body></article>"


def zipped() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", "id,text\n1,Owl\n")
        archive.writestr("b.nxml", ARTICLE)
    return held.getvalue()


SOUND = {
    "bioc.xml": f"<collection><document><id>1</id>{PASSAGES}</document></collection>".encode(),
    "tei.xml": TEI.format("<div><head>A</head><p>Owl 10<hi rend='superscript'>9</hi>.</p></div>").encode(),
    "set.xml": f"<pmc-articleset>{ARTICLE * 3}</pmc-articleset>".encode(),
    "cda.xml": CDA.encode(),
    "n2c2.xml": b"<n2c2><TEXT><![CDATA[\nOwl & mouse.\n]]></TEXT><TAGS/></n2c2>",
    "medquad.xml": f"{QA}</Document>".encode(),
    "pubtator.txt": b"7|t|Owls\n7|a|They see.\n7\t0\t4\tOwls\tSpecies\t1\n\n8|t|Mice\n8|a|Run.\n",
    "medline.txt": b"PMID- 1\nTI  - Owls\nAB  - They\n      see.\n\nPMID- 2\nTI  - Mice\nAB  - Run.\n",
    "a.hl7": "".join(MSH.format(n, n) for n in range(3)).encode(),
    "fhir.ndjson": "".join(json.dumps(NOTE) + "\n" for _ in range(4)).encode(),
    "fhir.json": json.dumps({"resourceType": "Bundle", "entry": [{"resource": NOTE}] * 3}).encode(),
    "cord19.json": json.dumps({"paper_id": "p", "body_text": [{"text": "Owl.", "section": "A"}] * 3}).encode(),
    "bioc.json": json.dumps({"documents": [{"id": "1", "passages": [{"infons": {}, "text": "Owl"}] * 3}]}).encode(),
    "a.zip": zipped(),
    "semi.csv": b'id;text\n1;"Owl; mouse"\n2;Owl\n',
    "utf16.csv": "id\ttext\n1\tOwl\n".encode("utf-16"),
}
NOISE = [
    b'"',
    b"{",
    b"[",
    b"\0",
    b"\xff",
    b"]",
    b"<",
    b"&x;",
    b"\\ud800",
    b"\r",
    b"|",
    b"<!--",
    b"]]>",
    b"null",
    b"\xfe",
]


def damaged(data: bytes, rng: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(result) + 1)
        match rng.randrange(4):
            case 0:
                result[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del result[at : at + rng.randrange(1, 30)]
            case 2:
                result[at:at] = rng.choice(NOISE)
            case 3:
                del result[at:]
        result = result or bytearray(b"x")
    return bytes(result)


def read(path: Path, data: bytes) -> list:
    path.write_bytes(data)
    kind = "instructions" if path.name.startswith("medquad") else "clinical"
    try:
        return [item for _, _, item in read_items(SourceSection(path=str(path), kind=kind))]
    except DataError:  # of files that are empty, or of no extension's kind
        return []


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_are_sound(tmp_path, name):
    found = read(tmp_path / name, SOUND[name])
    assert found and all(isinstance(item, dict) for item in found)


@pytest.mark.parametrize("count", [40, pytest.param(700, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SOUND)
def test_damage_of_any_kind_is_named_and_never_escapes(tmp_path, name, count):
    """700 of each of 16 formats are 11,200 files."""
    rng = random.Random(name)
    for _ in range(count):
        for item in read(tmp_path / name, damaged(SOUND[name], rng)):
            assert isinstance(item, dict) or (isinstance(item, Damaged | RefusedRecord) and item.reason)
            assert not isinstance(item, Damaged | RefusedRecord) or "Owl" not in item.reason


# ---- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from qmedtune.data.reading.sources import read_items
from qmedtune.recipe import SourceSection
source = SourceSection(path=sys.argv[1], kind=sys.argv[2])
count = sum(isinstance(item, dict) for _, _, item in read_items(source))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
TEXT = "Owls were seen at night, 12 [8-15] of them. " * 30
ABSTRACT = (
    f"<Article><ArticleTitle>Owls</ArticleTitle><Abstract><AbstractText>{TEXT}</AbstractText></Abstract></Article>"
)
# name -> (head, one record, between, tail, kind)
GROWING = {
    "a.json": ("[", json.dumps({"text": TEXT}), ",", "]", "literature"),
    "o.json": ('{"data": [', json.dumps({"text": TEXT}), ",", "]}", "literature"),
    "a.ndjson": ("", json.dumps({**NOTE, "note": TEXT}), "\n", "\n", "clinical"),
    "b.json": ('{"resourceType": "Bundle", "entry": [', json.dumps({"resource": {**NOTE, "x": TEXT}}), ",", "]}",
               "clinical"),
    "a.csv": ("id;text\n", f'1;"{TEXT}"', "\n", "\n", "clinical"),
    "a.hl7": ("", MSH.format("1", TEXT), "", "", "clinical"),
    "set.xml": ("<pmc-articleset>", ARTICLE.replace("Owl", TEXT), "", "</pmc-articleset>", "literature"),
    "bioc.xml": ("<collection>", f"<document><passage><text>{TEXT}</text></passage></document>", "", "</collection>",
                 "literature"),
    "pubmed.xml": ("<PubmedArticleSet>", f"<PubmedArticle><MedlineCitation><PMID>1</PMID>{ABSTRACT}</MedlineCitation>"
                   "</PubmedArticle>", "", "</PubmedArticleSet>", "literature"),
    "medline.txt": ("", f"PMID- 1\nTI  - Owls\nAB  - {TEXT}\n", "\n", "", "literature"),
}  # fmt: skip


def written(path: Path, name: str, size: int) -> int:
    """A file of `size` bytes; each record has other letters in the middle, so that no compression makes it small."""
    head, record, between, tail, _ = GROWING[name]
    count, rng = size // len(record + between), random.Random(name)
    with path.open("w") as file:
        file.write(head)
        for number in range(count):
            said = record.replace(TEXT, TEXT[:320] + rng.randbytes(500).hex())
            file.write(f"{between if number else ''}{said}")
        file.write(tail)
    return count


def peak(path: Path, name: str, size: int) -> int:
    count = written(path, name, size)
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), GROWING[name][4]], capture_output=True, text=True, check=True
    )
    path.unlink()
    found, size = map(int, answer.stdout.split())
    assert found == count
    return size


@pytest.mark.slow
@pytest.mark.parametrize("name", GROWING)
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    """From 256 MB to 1 GB of one file: less than 100 MB more."""
    small, large = (peak(tmp_path / name, name, size) for size in (256_000_000, 1_000_000_000))
    assert large - small < 100_000_000, (name, small, large)
