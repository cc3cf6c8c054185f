"""Texts, notes and papers in the forms in which they are published: nothing changed or guessed, the rest named."""

import base64
import gzip
import io
import json
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from qmedtune.data.prepare import prepare_source
from qmedtune.data.reading import markup, xml_files
from qmedtune.data.reading.document import Document
from qmedtune.data.reading.medmcqa import with_answer_base
from qmedtune.data.reading.rejects import Damaged, RefusedRecord, Unread
from qmedtune.data.reading.sources import read_items
from qmedtune.errors import DataError
from qmedtune.recipe import Recipe, SourceSection


def read(path, data, kind="literature", **section):
    """(records, what stands for the others, tally) of one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_path(path, kind, **section)


def read_path(path, kind="literature", **section):
    items = read_items(SourceSection(path=str(path), kind=kind, **section))
    found = [item for _, _, item in items]
    others = [item for item in found if isinstance(item, Damaged | RefusedRecord)]
    return [item for item in found if isinstance(item, dict)], others, items.tally.as_dict()


def text_of(path, data, kind="literature", **section):
    records, others, _ = read(path, data, kind, **section)
    assert not others
    (record,) = records
    return record["text"]


# ---- markup ----------------------------------------------------------------------------------------------------------


def jats(body: str, meta: str = "", namespace: str = "") -> str:
    return (
        f'<article {namespace} article-type="research-article"><front><article-meta>'
        f'<article-id pub-id-type="pmc">4</article-id><title-group><article-title>Barn owls</article-title>'
        f"</title-group>{meta}</article-meta></front><body>{body}</body></article>"
    )


MATHML = "xmlns:m='http://www.w3.org/1998/Math/MathML'"
BIBR = '<xref ref-type="bibr" rid="b{0}">{0}</xref>'
PARAGRAPHS = {
    "4 × 10<sup>12</sup>/L": "4 × 10¹²/L",
    "p &lt; 10<sup>-5</sup>, q = 10<sup>−7</sup>": "p < 10⁻⁵, q = 10⁻⁷",
    "10<sup>9.5</sup> and 10<sup>5x</sup>": "10^9.5 and 10^5x",
    "(a + b)<sup>2</sup>": "(a + b)²",
    "30 kg/m<sup>2</sup> of CO<sub>2</sub> and <sup>131</sup>I, Ca<sup>2+</sup>": "30 kg/m2 of CO2 and 131I, Ca2+",
    "log<sub>10</sub>2": "log₁₀2",
    "d<sub>H-1</sub>2.56": "dH-1 2.56",
    "the 5<sup>th</sup>, 12.5<sup>a</sup>": "the 5th, 12.5a",
    "<italic>10</italic><sup>6</sup>": "10⁶",
    "10<italic><sup>6</sup></italic>": "10⁶",
    f"seen<sup>{BIBR.format(1)}</sup>, and": "seen, and",
    'seen<xref ref-type="bibr"><sup>1</sup></xref>.': "seen.",
    f"problems{BIBR.format(6)} of": "problems of",
    f"seen [{BIBR.format(12)}, {BIBR.format(14)}–{BIBR.format(19)}] before": "seen before",
    f"seen ({BIBR.format(2)}).": "seen.",
    f"seen <sup>{BIBR.format(1)},{BIBR.format(2)}</sup> twice": "seen twice",
    f"at 10<sup>9{BIBR.format(3)}</sup>/L": "at 10⁹/L",
    f"as Strix {BIBR.format('et al., 1999')} says": "as Strix et al., 1999 says",
    "of 12 [8-15] days, 45 [38, 52], F [1,306] = .56": "of 12 [8-15] days, 45 [38, 52], F [1,306] = .56",
    'in <xref ref-type="table">Table 2</xref>': "in Table 2",
    f"<m:math {MATHML}><m:msup><m:mn>10</m:mn><m:mn>9</m:mn></m:msup></m:math>": "10^9",
    f"<m:math {MATHML}><m:mfrac><m:mn>1</m:mn><m:mn>2</m:mn></m:mfrac></m:math>": "1/2",
    "one<break/>two": "one two",
}


@pytest.mark.parametrize("source", PARAGRAPHS)
def test_what_markup_means_survives(tmp_path, source):
    text = text_of(tmp_path / "a.nxml", jats(f"<p>{source}</p>"))
    assert text == f"# Barn owls\n\n{PARAGRAPHS[source]}"


@pytest.mark.parametrize("source", [*PARAGRAPHS, "as <![CDATA[" + BIBR.format(7) + "]]> is", f"a[{BIBR.format(8)}]"])
def test_citations_marked_before_parsing_change_nothing(tmp_path, source):
    """An article that holds CDATA is parsed as it stands: every citation is then found in the tree."""
    marked = text_of(tmp_path / "a.nxml", jats(f"<p>{source}</p>"))
    assert marked == text_of(tmp_path / "b.nxml", jats(f"<p>{source}</p><p><![CDATA[]]></p>"))
    assert "as <![CDATA[" not in source or "<xref" in marked


def test_captions_of_media_and_supplements_are_read(tmp_path):
    body = (
        "<p>Before.</p><media><caption><title>Film.</title><p>A hunt.</p></caption></media>"
        "<supplementary-material><caption><p>Pellets.</p></caption><media><caption><p>Bones.</p></caption></media>"
        "</supplementary-material>"
    )
    text = text_of(tmp_path / "a.nxml", jats(body))
    assert text.split("\n\n")[1:] == ["Before.", "Film.", "A hunt.", "Pellets.", "Bones."]


def test_what_jats_leaves_out_is_named(tmp_path):
    body = "<p>Text.</p><table-wrap><caption><p>Doses.</p></caption><table><tr><td>17</td></tr></table></table-wrap>"
    (record,), _, tally = read(tmp_path / "a.nxml", jats(body).replace("</body>", "</body><back><p>x</p></back>"))
    assert "Doses." in record["text"] and "17" not in record["text"]
    assert tally["columns_unread"] == {"back": 1, "table": 1} and tally["recognised"] == {"jats": 1}


NAMESPACE = 'xmlns="https://jats.nlm.nih.gov/ns/archiving/1.3/"'
SETS = {
    "efetch": "<pmc-articleset>{0}{1}</pmc-articleset>",
    "epmc": "<articles>{0}{1}</articles>",
    "oai": '<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/"><ListRecords><record><metadata>{0}</metadata></record>'
    "<record><metadata>{1}</metadata></record></ListRecords></OAI-PMH>",
}


@pytest.mark.parametrize("kind", SETS)
def test_sets_of_articles(tmp_path, kind):
    namespace = NAMESPACE if kind == "oai" else ""
    articles = [jats(f"<p>Owl {n}.</p>", namespace=namespace) for n in "ab"]
    records, others, _ = read(tmp_path / "a.xml", SETS[kind].format(*articles))
    assert [r["text"] for r in records] == ["# Barn owls\n\nOwl a.", "# Barn owls\n\nOwl b."] and not others


def test_a_namespace_changes_nothing(tmp_path):
    body = f"<sec><title>Aim</title><p>10<sup>9</sup>{BIBR.format(1)}.</p></sec>"
    assert text_of(tmp_path / "a.xml", jats(body, namespace=NAMESPACE)) == text_of(tmp_path / "b.xml", jats(body))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("<art><fm/></art>", "its root is `art`"),
        ("<full-text-retrieval-response/>", "its root is `full-text-retrieval-response`"),
        ("<article><fm><title>x</title></fm></article>", "no `front`"),
    ],
)
def test_publishers_own_formats_are_named_as_such(tmp_path, data, reason):
    _, (other,), tally = read(tmp_path / "a.xml", data)
    assert reason in other.reason
    if "front" not in reason:
        assert tally["recognised"] == {"XML of no known format (not read)": 1}


def questions_about_birds() -> str:
    """As MedMCQA counts answers: from 1, as its last row shows."""
    lines = ""
    for answer in (1, 2, 4):
        row = {"question": "Which bird?", "opa": "owl", "opb": "tit", "opc": "jay", "opd": "gull", "cop": answer}
        lines += json.dumps(row) + "\n"
    return lines


def test_answers_of_an_archive_count_from_where_its_rows_do(tmp_path):
    text = questions_about_birds()
    plain, _, _ = read(tmp_path / "dev.jsonl", text, kind="instructions")
    packed, _, _ = read(
        tmp_path / "dev.zip", zipped({"LICENSE": b"All.", "dev.jsonl": text.encode()}), kind="instructions"
    )
    assert len(packed) == 3 and "owl" in str(plain[0])
    without_id = [{**row, "id": ""} for row in packed]
    assert without_id == [{**row, "id": ""} for row in plain]


# ---- PubMed ----------------------------------------------------------------------------------------------------------


def citation(inside: str) -> str:
    return (
        f"<PubmedArticle><MedlineCitation><PMID>8</PMID><Article>{inside}</Article></MedlineCitation></PubmedArticle>"
    )


ABSTRACT = "<Abstract><AbstractText>{}</AbstractText></Abstract>"
PUBMED = {
    "<ArticleTitle>Stay.</ArticleTitle>" + ABSTRACT.format("12 [8-15] days, 5 × 10<sup>9</sup>/L"): "Stay.\n"
    "12 [8-15] days, 5 × 10⁹/L",
    ABSTRACT.format("No title at all."): "No title at all.",
    "<ArticleTitle>[Not Available].</ArticleTitle>" + ABSTRACT.format("Text."): "Text.",
    "<ArticleTitle>C.</ArticleTitle>" + ABSTRACT.format("<b>Age: 16</b><b>Symptoms: None</b>"): "C.\nAge: 16\n"
    "Symptoms: None",
    "<ArticleTitle>C.</ArticleTitle>" + ABSTRACT.format("in <b>E.</b> <b>coli</b> x"): "C.\nin E. coli x",
}


@pytest.mark.parametrize("inside", PUBMED)
def test_pubmed_records(tmp_path, inside):
    assert text_of(tmp_path / "a.xml", f"<PubmedArticleSet>{citation(inside)}</PubmedArticleSet>") == PUBMED[inside]


def test_books_and_citation_sets(tmp_path):
    book = (
        f"<BookDocument><PMID>5</PMID><Book><BookTitle>Of owls</BookTitle></Book>{ABSTRACT.format('A.')}</BookDocument>"
    )
    books = f"<PubmedBookArticleSet><PubmedBookArticle>{book}</PubmedBookArticle></PubmedBookArticleSet>"
    assert text_of(tmp_path / "b.xml", books) == "Of owls\nA."
    inner = f"<PMID>6</PMID><Article><ArticleTitle>T</ArticleTitle>{ABSTRACT.format('A.')}</Article>"
    cited = f"<MedlineCitationSet><MedlineCitation>{inner}</MedlineCitation></MedlineCitationSet>"
    assert text_of(tmp_path / "c.xml", cited) == "T\nA."


def test_medline_text(tmp_path):
    text = "PMID- 1\nTI  - Owls at\n      night\nAB  - They were\n      seen.\nMH  - Animals\n\nPMID- 2\nTI  - T\n"
    (record,), (other,), tally = read(tmp_path / "a.txt", text)
    assert (record["id"], record["text"]) == ("1", "Owls at night\nThey were seen.")
    assert other == RefusedRecord("no abstract") and tally["columns_unread"] == {"MH": 1}


# ---- papers in JSON, TEI, BioC ---------------------------------------------------------------------------------------

SECTIONS = [
    {
        "text": "Owls hunt [1] at 12 [8-15] m.",
        "section": "Aim",
        "cite_spans": [{"start": 10, "end": 13, "text": "[1]"}],
    },
    {"text": "And sleep.", "section": "Aim"},
]
PAPER = "# Owls\n\n## Abstract\n\nShort.\n\n## Aim\n\nOwls hunt at 12 [8-15] m.\n\nAnd sleep."
PAPERS = {
    "cord19": {"paper_id": "p", "metadata": {"title": "Owls"}, "abstract": [{"text": "Short."}], "body_text": SECTIONS},
    "doc2json": {"paper_id": "p", "title": "Owls", "abstract": "Short.", "pdf_parse": {"body_text": SECTIONS}},
    "s2orc 2019": {
        "paper_id": "p", "title": "Owls", "abstract": "Short.", "grobid_parse": {"abstract": [], "body_text": SECTIONS},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_full_text_in_json_is_read_whole(tmp_path, name, suffix):
    data = json.dumps({**PAPERS[name], "bib_entries": {}}) + "\n"
    (record,), _, tally = read(tmp_path / f"a.{suffix}", data)
    assert (record["id"], record["text"]) == ("p", PAPER)
    assert tally["columns_unread"] == {"bib_entries": 1}


def test_marked_citations_of_s2orc_are_left_out(tmp_path):
    text = "Owls [3] see 4 [2, 6] mice."
    row = {"corpusid": 1, "content": {"text": text, "annotations": {"bibref": json.dumps([{"start": 5, "end": 8}])}}}
    assert text_of(tmp_path / "a.jsonl", json.dumps(row)) == "Owls see 4 [2, 6] mice."


def test_tei_of_grobid(tmp_path):
    header = "<fileDesc><titleStmt><title>Owls</title></titleStmt></fileDesc>"
    header += "<profileDesc><abstract><div><p>Short.</p></div></abstract></profileDesc>"
    body = (
        '<div><head>Aim</head><p>Seen <ref type="bibr">[1]</ref>, at 10<hi rend="superscript">9</hi> [8-15].</p></div>'
    )
    body += "<figure><head>Fig</head><figDesc>A curve.</figDesc><table><row><cell>1</cell></row></table></figure>"
    data = f'<TEI xmlns="http://www.tei-c.org/ns/1.0"><teiHeader>{header}</teiHeader><text><body>{body}</body></text></TEI>'
    (record,), _, tally = read(tmp_path / "a.xml", data)
    assert record["text"].split("\n\n") == [
        "# Owls", "## Abstract", "Short.", "## Aim", "Seen, at 10⁹ [8-15].", "Fig", "A curve.",
    ]  # fmt: skip
    assert tally["recognised"] == {"tei": 1} and tally["columns_unread"] == {"table": 1}


def passages(form):
    found = [("front", "TITLE", "Owls"), ("abstract", "ABSTRACT", "Short."), ("title_1", "INTRO", "Aim")]
    found += [("paragraph", "INTRO", "Text."), ("table_caption", "TABLE", "Doses."), ("ref", "REF", "Strix")]
    if form == "json":
        return [{"infons": {"type": k, "section_type": s}, "text": t} for k, s, t in found]
    infon = '<infon key="{}">{}</infon>'
    parts = (infon.format("type", k) + infon.format("section_type", s) + f"<text>{t}</text>" for k, s, t in found)
    return "".join(f"<passage>{part}</passage>" for part in parts)


@pytest.mark.parametrize("form", ["json", "xml"])
def test_bioc_keeps_captions_and_leaves_references(tmp_path, form):
    data = f"<collection><document><id>1</id>{passages('xml')}</document></collection>"
    if form == "json":
        data = json.dumps([{"source": "PMC", "documents": [{"id": "1", "passages": passages("json")}]}])
    (record,), _, tally = read(tmp_path / f"a.{form}", data)
    assert record["text"].split("\n\n") == ["# Owls", "Short.", "## Aim", "Text.", "Doses."]
    assert tally["columns_unread"] == {"ref": 1}


def test_pubtator(tmp_path):
    text = "7|t|Owls\n7|a|They see.\n7\t0\t4\tOwls\tSpecies\t1\n\n8|t|Mice\n8|a|They run.\n"
    records, _, _ = read(tmp_path / "a.txt", text)
    assert [(r["pmid"], r["text"]) for r in records] == [("7", "Owls\nThey see."), ("8", "Mice\nThey run.")]
    document = {"id": "7", "passages": [{"infons": {"type": "title"}, "text": "Owls"}]}
    assert text_of(tmp_path / "a.json", json.dumps({"PubTator3": [document]})) == "# Owls"


# ---- clinical formats ------------------------------------------------------------------------------------------------


def encoded(text):
    return base64.b64encode(text.encode()).decode()


def test_fhir_resources(tmp_path):
    attachment = {"contentType": "text/html", "data": encoded("<p>No <b>fever</b>.</p><p>5 &lt; 6</p>")}
    rows = [
        {"resourceType": "DocumentReference", "id": "d", "subject": {"reference": "Patient/7"},
         "content": [{"attachment": {"data": encoded("Line 1\nLine 2")}}]},
        {"resourceType": "DiagnosticReport", "id": "r", "presentedForm": [attachment], "conclusion": "All well."},
        {"resourceType": "Observation", "id": "o"},
        {"resourceType": "DocumentReference", "id": "e", "status": "entered-in-error", "content": []},
        {"resourceType": "DocumentReference", "id": "x", "content": [{"attachment": {"data": "%%"}}]},
    ]  # fmt: skip
    records, others, _ = read(tmp_path / "a.ndjson", "".join(json.dumps(row) + "\n" for row in rows), "clinical")
    assert [r["text"] for r in records] == ["Line 1\nLine 2", "No fever.\n5 < 6\n\nAll well."]
    assert records[0]["patient"] == "7"
    assert [type(o) for o in others] == [RefusedRecord, RefusedRecord, Damaged]
    bundle = {"resourceType": "Bundle", "entry": [{"resource": row} for row in rows]}
    assert read(tmp_path / "b.json", json.dumps(bundle), "clinical")[0] == records


def test_hl7_messages(tmp_path):
    head = "MSH|^~\\&|A|B|C|D|2020||{}|m{}|P|2.3"
    oru = [head.format("ORU^R01", 1), "PID|1||77^^^H", "OBR|1", "OBX|1|TX|N||No fever~at all||||||F"]
    oru += ["OBX|2|NM|T||38.5||||||F", "OBX|3|FT|N||A \\T\\ B\\.br\\next||||||F"]
    mdm = [head.format("MDM^T02", 2), "PID|1||78", "TXA|1", "OBX|1|TX|||Well||||||F"]
    for end in ("\r", "\n", "\r\n"):
        records, others, tally = read(tmp_path / "a.hl7", end.join([*oru, *mdm]), "clinical")
        assert [(r["id"], r["patient"], r["text"]) for r in records] == [
            ("m1", "77", "No fever\nat all\nA & B\nnext"), ("m2", "78", "Well"),
        ]  # fmt: skip
        assert not others and tally["columns_unread"] == {"OBX": 1}
    assert read(tmp_path / "a.txt", "\r".join(mdm), "clinical")[0][0]["text"] == "Well"


def test_n2c2_and_ccda(tmp_path):
    note = "<n2c2><TEXT><![CDATA[\nRecord date: 2067\n\nHgb 9 & rising\n]]></TEXT><TAGS><DATE/></TAGS></n2c2>"
    (record,), _, tally = read(tmp_path / "110-02.xml", note, "clinical")
    assert record == {"id": "110-02", "patient": "110", "text": "Record date: 2067\n\nHgb 9 & rising"}
    assert tally["columns_unread"] == {"TAGS": 1}
    two = '<ROOT><RECORD ID="1"><TEXT>One</TEXT></RECORD><RECORD ID="2"><TEXT>Two & a half</TEXT></RECORD></ROOT>'
    records, _, _ = read(tmp_path / "all.xml", two, "clinical")
    assert [(r["id"], r["text"]) for r in records] == [("all-1", "One"), ("all-2", "Two & a half")]
    cda = (
        '<ClinicalDocument xmlns="urn:hl7-org:v3"><id extension="d"/><title>Visit</title><recordTarget><patientRole>'
        '<id extension="9"/></patientRole></recordTarget><component><structuredBody><component><section><title>Drugs'
        "</title><text><table><tbody><tr><td>ASA</td><td>81 mg</td></tr></tbody></table><paragraph>None <content>else"
        "</content>.</paragraph></text><entry/></section></component></structuredBody></component></ClinicalDocument>"
    )
    (record,), _, _ = read(tmp_path / "c.xml", cda, "clinical")
    assert (record["id"], record["patient"]) == ("d", "9")
    assert record["text"] == "# Visit\n\n## Drugs\n\nASA\t81 mg\nNone else."


# ---- office, archives ------------------------------------------------------------------------------------------------


def test_word_excel_and_pdf(tmp_path):
    docx, openpyxl = pytest.importorskip("docx"), pytest.importorskip("openpyxl")
    word = docx.Document()
    word.add_heading("Letter", 1)
    word.add_paragraph("The owl is well.")
    table = word.add_table(1, 2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "Hgb", "9.5"
    word.add_paragraph("Yours")
    word.save(str(tmp_path / "a.docx"))
    (record,), _, tally = read_path(tmp_path / "a.docx", "clinical")
    assert record["text"] == "# Letter\n\nThe owl is well.\n\nHgb\t9.5\n\nYours"
    assert any("Word" in name for name in tally["columns_unread"]) or "(no known name)" in tally["columns_unread"]
    book = openpyxl.Workbook()
    for row in (["Question", "Answer"], ["What?", "That."], [None, None], ["Who?", "Owls."]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    records, _, _ = read_path(tmp_path / "a.xlsx", "instructions")
    assert [[m["content"] for m in r["messages"]] for r in records] == [["What?", "That."], ["Who?", "Owls."]]
    for suffix in ("docx", "xlsx", "pdf"):
        _, (other,), _ = read(tmp_path / f"broken.{suffix}", b"PK\x03\x04 no such file", "clinical")
        assert isinstance(other, Damaged)


def zipped(members: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return held.getvalue()


def test_zip_archives_are_read_in_place(tmp_path):
    members = {
        "in/a.csv": b"id,text\n1,one\n", "in/b.jsonl.gz": gzip.compress(b'{"text": "two"}\n'), "in/LICENSE": b"All.",
        "c.nxml": jats("<p>Three.</p>").encode(), "in/photo.jpg": b"x", "README.txt": b"How to.",
    }  # fmt: skip
    records, others, tally = read(tmp_path / "a.zip", zipped(members))
    assert [r["text"] for r in records] == ["# Barn owls\n\nThree.", "one", "two"] and not others
    assert tally["files_unread"] == {".jpg": 1, ".txt": 1, "no extension": 1}
    assert tally["recognised"] == {
        "zip": 1, "in a zip: csv (separator ,, utf-8, line ends LF)": 1, "in a zip: jsonl": 1, "in a zip: jats": 1,
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
    _, (other,), _ = read(tmp_path / "b.zip", zipped(members)[:-40])
    assert isinstance(other, Unread)


# ---- what is data and what is not ------------------------------------------------------------------------------------


def prepared(tmp_path, folder, kind="general", **section):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    made = {
        "name": "t", "model": {"base": "builtin:tiny"}, "stages": [{"cpt": {"mix": {"a": 1}}}],
        "data": {"a": {"path": str(folder), "kind": kind, **section}},
    }  # fmt: skip
    return prepare_source(Recipe.model_validate(made), "a", {}, out).as_json()


def test_files_read_and_files_unread_add_up(tmp_path):
    folder = tmp_path / "corpus"
    names = ["README.md", "LICENSE", "LICENSE.txt", "SHA256SUMS.txt", "dataset_infos.json", ".gitattributes", "x.jpg"]
    names += ["data/a.jsonl", "data/b.jsonl", "data/deep/notes.txt", "paper.pdf"]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": f"owl {number}", "source": "x", "odd": 1}) + "\n")
    facts = prepared(tmp_path, folder)
    assert facts["files"] == 3 and facts["files"] + sum(facts["files_unread"].values()) == len(names)
    assert facts["files_unread"] == {".jpg": 1, ".json": 1, ".md": 1, ".pdf": 1, ".txt": 2, "no extension": 2}
    assert facts["columns_unread"] == {"source": 2, "odd": 2} and facts["columns_read"] == {"text": 2}
    assert facts["recognised"] == {"jsonl": 2, "text": 1}


def test_a_mimic_cxr_tree_gives_reports_only(tmp_path):
    for name in ("LICENSE.txt", "p10/p7/s1.txt", "p10/p7/index.txt", "p10/p7/s2.txt", "README", "cxr-record-list.csv"):
        (tmp_path / "cxr" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cxr" / name).write_text(f"FINDINGS: of {name}\n")
    records, _, _ = read_path(tmp_path / "cxr", "clinical", format="mimic_cxr")
    assert [(r["id"], r["patient"]) for r in records] == [("s1", "p7"), ("s2", "p7")]
    facts = prepared(tmp_path, tmp_path / "cxr", "clinical", format="mimic_cxr")
    assert facts["files"] == 2 and sum(facts["files_unread"].values()) == 4


def test_a_file_name_that_is_not_utf8_is_named(tmp_path):
    import os

    os.makedirs(tmp_path / "in")
    with open(os.fsencode(tmp_path / "in") + b"/n\xf6te.txt", "w") as file:
        file.write("x")
    with pytest.raises(DataError, match=r"n\\xf6te.txt: the name of this file is not UTF-8"):
        read_path(tmp_path / "in")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"article": "Full.", "abstract": "Short.", "section_names": "i"}, "Short.\n\nFull."),
        ({"title": "T", "abstract": "Short."}, "T\nShort."),
        ({"title": "T", "abstract": "Short.", "body": "Short. Long."}, "T\n\nShort. Long."),
        ({"title": "T", "text": "Long."}, "Long."),
    ],
)
def test_known_schemas_are_read_whole(tmp_path, row, text):
    (record,), _, tally = read(tmp_path / "a.jsonl", json.dumps(row))
    assert record["text"] == text
    unread = {name for name in row if name in ("section_names",) or (name == "title" and "abstract" not in row)}
    assert tally["columns_unread"].keys() == unread


def test_several_labelled_sources_over_the_same_notes_keep_all_records():
    labelled = {"path": "x.csv", "kind": "clinical", "columns": {"label": "y"}}
    names = ("stay", "death", "icd")
    made = Recipe.model_validate({
        "name": "t", "model": {"base": "builtin:tiny"},
        "data": {"notes": {"path": "n.csv", "kind": "clinical"}, **dict.fromkeys(names, labelled)},
        "stages": [{"cpt": {"mix": {"notes": 1}}}, *({"classify": {"data": name}} for name in names)],
    })  # fmt: skip
    assert [made.compared_with(name) for name in names] == [[], [], []]


# ---- time ------------------------------------------------------------------------------------------------------------

HOSTILE = {
    "citations": lambda n: markup.CITED * n,
    "citations apart": lambda n: (markup.CITED + " " * 50) * (n // 51),
    "open brackets": lambda n: "[" * n + markup.CITED,
    "brackets and blanks": lambda n: "[ " * (n // 2) + markup.CITED + " " * n,
    "commas": lambda n: markup.CITED + ", " * (n // 2),
    "blanks": lambda n: markup.CITED + " " * n + "x",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_time_grows_with_the_text(name):
    """40 kB take less than half a second: quadratic time would take minutes."""
    import time

    make = HOSTILE[name]
    for work in (markup.without_marks, xml_files.tidy, markup.is_number):
        started = time.process_time()
        for size in (10_000, 20_000, 40_000):
            work(make(size))
        assert time.process_time() - started < 0.5, (name, work)


@pytest.mark.parametrize("text", ["1 " * 20_000, "1," * 20_000, " " * 40_000, "[" * 40_000, "1" + " " * 40_000 + "x"])
def test_numbers_are_told_in_linear_time(text):
    import time

    started = time.process_time()
    markup.is_number(text)
    assert time.process_time() - started < 0.2


# ---- in a stream -----------------------------------------------------------------------------------------------------


def tar_of(articles: int) -> bytes:
    """Incompressible padding between the articles, so that a cut in the middle leaves whole ones before it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for number in range(articles):
            words = " ".join(random.Random(number).choices(["owl", "tit", "jay", "gull"], k=9_000))
            data = jats(f"<p>Article {number}. {words}</p>").encode()
            member = tarfile.TarInfo(f"{number}.nxml")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def test_a_cut_archive_keeps_the_articles_before_the_cut(tmp_path):
    whole = tar_of(20)
    records, others, _ = read(tmp_path / "a.tar.gz", whole[: len(whole) * 2 // 3])
    assert 8 < len(records) < 20 and "Article 0." in records[0]["text"]
    assert [type(other) for other in others] == [Unread]


def test_documents_are_passed_on_one_by_one():
    asked = []

    def read_documents():
        for number in range(3):
            asked.append(number)
            yield number, Document(str(number), "text")

    stream = with_answer_base(Path("a.tar"), read_documents)
    assert next(stream)[0] == 0 and asked == [0]
    assert len(list(stream)) == 2


def test_answers_count_from_where_they_do_behind_a_damaged_line(tmp_path):
    text = questions_about_birds()
    plain, _, _ = read(tmp_path / "dev.jsonl", text, kind="instructions")
    behind, others, _ = read(tmp_path / "cut.jsonl", '{"question": "Wh\n' + text, kind="instructions")
    assert len(others) == 1
    assert [{**row, "id": ""} for row in behind] == [{**row, "id": ""} for row in plain]
