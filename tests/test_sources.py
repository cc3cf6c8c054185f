"""Every reader on a tiny file in its true format, and twenty kinds of damage."""

import csv
import gzip
import io
import json
import os
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from qmedtune.data.prepare import prepare_source
from qmedtune.data.reading.files import MAX_RECORD_BYTES
from qmedtune.data.reading.pubmed import LatestFirst
from qmedtune.data.reading.rejects import Rejects
from qmedtune.data.reading.sources import format_of, read_items, read_records, source_files
from qmedtune.errors import DataError
from qmedtune.recipe import Recipe, SourceSection

REAL = Path(os.environ.get("QMEDTUNE_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
real = pytest.mark.skipif(not REAL.is_dir(), reason="real text is not part of the repository")


def read(path, kind="literature", rejects=None, **section):
    source = SourceSection(path=str(path), kind=kind, **section)
    return list(read_records("source", source, rejects or Rejects("source")))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(path: Path, rows: list) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


# ---- text formats ----------------------------------------------------------------------------------------------------


def test_json_lines_keep_id_pmid_and_text(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"pmid": 7, "text": "One."}, {"id": "x", "text": "Two."}])
    assert read(path) == [{"id": "7", "text": "One.", "pmid": "7"}, {"id": "x", "text": "Two."}]


def test_records_without_id_are_named_by_content(tmp_path):
    one, two = (read(jsonl(tmp_path / f"{n}.jsonl", [{"text": "same"}]))[0]["id"] for n in "ab")
    assert one == two


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read_in_place(tmp_path, suffix):
    data = b'{"text": "packed"}\n'
    packed = gzip.compress(data) if suffix == ".gz" else zstandard.compress(data)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed)
    assert read(path)[0]["text"] == "packed"


def test_text_files_of_a_folder_are_documents_in_order_of_name(tmp_path):
    write(tmp_path / "notes/b.txt", "second\n\nline")
    write(tmp_path / "notes/a.txt", "first")
    assert [r["text"] for r in read(tmp_path / "notes", "clinical")] == ["first", "second\n\nline"]


def test_globs_variables_and_lists(tmp_path, monkeypatch):
    monkeypatch.setenv("CORPUS", str(tmp_path))
    jsonl(tmp_path / "x/1.jsonl", [{"text": "1"}])
    jsonl(tmp_path / "y/2.jsonl", [{"text": "2"}])
    source = SourceSection(path=["${CORPUS}/x/*.jsonl", "${CORPUS}/**/2.jsonl"], kind="general")
    assert [r["text"] for r in read_records("s", source, Rejects("s"))] == ["1", "2"]


def test_columns_name_what_is_unknown(tmp_path):
    path = write(tmp_path / "a.tsv", "who\twhat\nP9\tCough.\n")
    assert read(path, "clinical", columns={"text": "what", "patient": "who"})[0] | {"id": ""} == {
        "id": "", "text": "Cough.", "patient": "P9",
    }  # fmt: skip


def test_json_array_streams_elements_with_their_line(tmp_path):
    path = write(tmp_path / "a.json", '[\n {"text": "one"},\n {"text": 2},\n {"text": "three"}\n]\n')
    rejects = Rejects("s", tmp_path / "rejects.jsonl")
    assert [r["text"] for r in read(path, rejects=rejects)] == ["one", "three"]
    rejects.close()
    row = json.loads((tmp_path / "rejects.jsonl").read_text())
    assert row == {"source": "s", "file": str(path), "line": 3, "reason": "text is not a string"}


def test_json_array_longer_than_a_chunk_loses_nothing(tmp_path):
    rows = [{"text": f"{i} " + "word " * 100} for i in range(5000)]
    assert len(read(write(tmp_path / "a.json", json.dumps(rows, indent=1)))) == 5000


def test_json_lines_under_the_wrong_name(tmp_path):
    assert len(read(jsonl(tmp_path / "a.json", [{"text": "1"}, {"text": "2"}]))) == 2


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["a", None, "c"], "subject_id": [1.0, 2.0, 3.0]})
    parquet.write_table(table, tmp_path / "a.parquet")
    rejects = Rejects("s")
    found = read(tmp_path / "a.parquet", "clinical", rejects)
    assert [(r["text"], r["patient"]) for r in found] == [("a", "1"), ("c", "3")]
    assert rejects.reasons == {"text is null": 1}


def test_dataset_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "from disk"}]).save_to_disk(str(tmp_path / "d"))
    assert read(tmp_path / "d", format="huggingface")[0]["text"] == "from disk"
    assert source_files(SourceSection(path=str(tmp_path / "d"), kind="general", format="huggingface"))


# ---- clinical formats ------------------------------------------------------------------------------------------------


def test_mimic_iii_noteevents(tmp_path):
    header = ["ROW_ID", "SUBJECT_ID", "HADM_ID", "CHARTDATE", "CHARTTIME", "STORETIME", "CATEGORY", "DESCRIPTION"]
    header += ["CGID", "ISERROR", "TEXT"]
    note = 'Admission Date:  [**2151-7-16**]\n\nHISTORY: said "no pain",\nthen left.\n'
    rows = [
        [1, 22532, 167853, "2151-08-04", "", "", "Discharge summary", "Report", "", "", note],
        [2, 22532, "", "2151-08-04", "", "", "Nursing", "Report", "", "1", "entered by mistake"],
    ]
    with gzip.open(tmp_path / "NOTEEVENTS.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    rejects = Rejects("s", tmp_path / "rejects.jsonl")
    found = read(tmp_path / "NOTEEVENTS.csv.gz", "clinical", rejects)
    rejects.close()
    assert found == [{"id": "1", "text": note, "patient": "22532"}]
    assert rejects.counts["refused"] == 1
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["line"] == 7  # the first note takes lines 2 to 6


def test_mimic_iv_note(tmp_path):
    header = "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n"
    times = "2180-05-07 00:00:00,2180-05-09 15:26:00"
    body = f'10000032-DS-21,10000032,22595853,DS,21,{times}," \nName:  ___\nUnit No:   ___\n"\n'
    with gzip.open(tmp_path / "discharge.csv.gz", "wt") as file:
        file.write(header + body)
    (note,) = read(tmp_path / "discharge.csv.gz", "clinical")
    assert (note["id"], note["patient"]) == ("10000032-DS-21", "10000032")
    assert "Name:  ___\nUnit No:   ___" in note["text"]


def test_mimic_cxr_tree(tmp_path):
    report = " " * 33 + "FINAL REPORT\n EXAMINATION:  CHEST\n\n FINDINGS: \n\n Clear.\n"
    write(tmp_path / "files/p10/p10000032/s50414267.txt", report)
    (note,) = read(tmp_path / "files", "clinical", format="mimic_cxr")
    assert note == {"id": "s50414267", "patient": "p10000032",
                    "text": "FINAL REPORT\nEXAMINATION:  CHEST\n\nFINDINGS:\n\nClear."}  # fmt: skip


def test_mtsamples(tmp_path):
    header = ",description,medical_specialty,sample_name,transcription,keywords\n"
    text = header + '0,d, Surgery,n,"A, B",k\n1,d, Surgery,n,,k\n'
    rejects = Rejects("s")
    assert [r["text"] for r in read(write(tmp_path / "mtsamples.csv", text), "clinical", rejects)] == ["A, B"]
    assert rejects.reasons == {"text is empty": 1}


EMRQA = {
    "data": [
        {
            "title": "medication",
            "paragraphs": [
                {
                    "note_id": "105_a",
                    "context": ["line one\n", "line two\n"],
                    "qas": [
                        {"question": ["what dose?", "dose?"], "answers": [{"text": "5 mg", "evidence_start": 2}]},
                        {"question": ["why?"], "answers": [{"text": ""}]},
                    ],
                }
            ],
        }
    ]
}


def test_emrqa_as_notes_and_as_questions(tmp_path):
    path = write(tmp_path / "data.json", json.dumps(EMRQA))
    assert read(path, "clinical", format="emrqa") == [{"id": "105_a", "text": "line one\nline two", "patient": "105"}]
    (asked,) = read(path, "instructions")
    assert asked["messages"][0] == {"role": "user", "content": "what dose?", "input": "line one\nline two"}
    assert asked["messages"][1]["content"] == "5 mg"


# ---- literature ------------------------------------------------------------------------------------------------------

JATS = """<?xml version="1.0"?>
<!DOCTYPE article PUBLIC "-//NLM//DTD JATS v1.0//EN" "JATS-archivearticle1.dtd">
<article xmlns:xlink="x" article-type="research-article"><front><article-meta>
<article-id pub-id-type="pmid">11</article-id><article-id pub-id-type="pmc">22</article-id>
<title-group><article-title>Effect of <italic>E. coli</italic></article-title></title-group>
<abstract><sec><title>Aim</title><p>To test.</p></sec></abstract></article-meta></front>
<body><sec><title>Methods</title><p>We used 5&#160;mg<sup><xref ref-type="bibr">1</xref></sup> &alpha; daily
<xref ref-type="fig">Fig. 1</xref>.<list><list-item><p>item one</p></list-item></list> After the list.</p>
<sec><title>Deep</title><p>H<sub>2</sub>O</p></sec>
<fig><label>Figure 1</label><caption><title>Curve.</title><p>It rises.</p></caption></fig>
<table-wrap><caption><p>Doses.</p></caption><table><tr><td>17</td></tr></table></table-wrap></sec></body>
<back><ack><p>Thanks.</p></ack>
<ref-list><ref><mixed-citation>Smith 1999</mixed-citation></ref></ref-list></back></article>
"""


def test_jats_order_headings_and_policy(tmp_path):
    (article,) = read(write(tmp_path / "a.nxml", JATS))
    assert (article["id"], article["pmid"]) == ("PMC22", "11")
    assert article["text"].split("\n\n") == [
        "# Effect of E. coli", "## Abstract", "### Aim", "To test.", "## Methods",
        "We used 5 mg \u03b1 daily Fig. 1. After the list.", "item one", "### Deep", "H2O",
        "Curve.", "It rises.", "Doses.",
    ]  # fmt: skip


def test_bulk_archive_is_read_without_unpacking(tmp_path):
    with tarfile.open(tmp_path / "oa.tar.gz", "w:gz") as archive:
        for name, data in (
            ("PMC1/a.nxml", JATS),
            ("PMC1/fig.jpg", "binary"),
            ("PMC2/b.nxml", JATS.replace("22<", "33<")),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data.encode())
            archive.addfile(info, io.BytesIO(data.encode()))
    assert [r["id"] for r in read(tmp_path / "oa.tar.gz")] == ["PMC22", "PMC33"]
    assert [p.name for p in tmp_path.iterdir()] == ["oa.tar.gz"]


def test_retracted_articles_are_refused(tmp_path):
    rejects = Rejects("s")
    path = write(tmp_path / "a.nxml", JATS.replace('"research-article"', '"retraction"'))
    assert read(path, rejects=rejects) == []
    assert rejects.counts["refused"] == 1


def pubmed(*records: str) -> str:
    return f'<?xml version="1.0"?>\n<PubmedArticleSet>{"".join(records)}</PubmedArticleSet>'


def citation(pmid: int, abstract: str, kind: str = "Journal Article") -> str:
    return (
        f'<PubmedArticle><MedlineCitation><PMID Version="1">{pmid}</PMID><Article><ArticleTitle>Title {pmid}.'
        f"</ArticleTitle><Abstract>{abstract}</Abstract><Language>eng</Language><PublicationTypeList>"
        f"<PublicationType>{kind}</PublicationType></PublicationTypeList></Article></MedlineCitation></PubmedArticle>"
    )


def test_pubmed_labels_and_inline_tags(tmp_path):
    abstract = (
        '<AbstractText Label="AIM">CO<sub>2</sub> in <i>vivo</i>.</AbstractText>'
        '<AbstractText Label="RESULT">Up.</AbstractText>'
    )
    (record,) = read(write(tmp_path / "pubmed.xml", pubmed(citation(5, abstract))))
    assert record == {"id": "5", "pmid": "5", "language": "eng", "text": "Title 5.\nAIM: CO2 in vivo.\nRESULT: Up."}


def test_pubmed_updates_replace_delete_and_refuse(tmp_path):
    text = "<AbstractText>{}</AbstractText>"
    baseline = pubmed(*(citation(n, text.format(f"old {n}")) for n in (1, 2, 3)))
    update = pubmed(
        citation(2, text.format("new 2")),
        citation(4, text.format("withdrawn"), "Retracted Publication"),
        "<DeleteCitation><PMID>3</PMID></DeleteCitation>",
    )
    for name, data in (("pubmed25n0001.xml.gz", baseline), ("pubmed25n0002.xml.gz", update)):
        (tmp_path / name).write_bytes(gzip.compress(data.encode()))
    rejects = Rejects("s")
    found = {r["id"]: r["text"] for r in read(tmp_path, rejects=rejects)}
    assert found == {"1": "Title 1.\nold 1", "2": "Title 2.\nnew 2"}
    assert rejects.counts == {"rejected": 0, "refused": 1, "duplicates": 2}  # 2 replaced, 3 deleted


def test_a_pubmed_file_larger_than_is_held_in_memory_reads_the_same(tmp_path, monkeypatch):
    """What does not fit lies on disk without a name: nothing is left behind, whatever ends the reading."""
    records = [citation(n % 900, f"<AbstractText>version {n}</AbstractText>") for n in range(2000)]
    source = SourceSection(path=str(write(tmp_path / "pubmed.xml", pubmed(*records))), kind="literature")
    (tmp_path / "spill").mkdir()

    def found() -> list:
        return list(read_items(source, spill=tmp_path / "spill"))

    whole = found()
    monkeypatch.setattr(LatestFirst, "HELD_BYTES", 100)
    assert found() == whole and not list((tmp_path / "spill").iterdir())
    newest = [record["text"] for record in read_records("s", source, Rejects("s"))]
    assert newest == [f"Title {n % 900}.\nversion {n}" for n in range(1999, 1099, -1)]
    first = next(iter(read_items(source, spill=tmp_path / "spill")))
    assert first == whole[0] and not list((tmp_path / "spill").iterdir())


def test_s2orc_headers_kept_bibliography_cut(tmp_path):
    text = "A. Author Intro We saw it. Refs 1. Smith"
    spans = {
        "author": json.dumps([{"start": 0, "end": 9}]),
        "sectionheader": json.dumps([{"start": 10, "end": 15}]),
        "bibentry": json.dumps([{"start": 27, "end": len(text)}]),
        "figure": None,
    }
    row = {"corpusid": 99, "externalids": {"pubmed": "12"}, "content": {"text": text, "annotations": spans}}
    (paper,) = read(jsonl(tmp_path / "s2orc.jsonl", [row]), format="s2orc")
    assert (paper["id"], paper["pmid"]) == ("99", "12")
    assert paper["text"].split() == ["##", "Intro", "We", "saw", "it."]


def test_bioc(tmp_path):
    passages = [
        {"infons": {"section_type": "TITLE", "type": "front", "article-id_pmid": "3"}, "text": "Title"},
        {"infons": {"section_type": "INTRO", "type": "title_1"}, "text": "Intro"},
        {"infons": {"section_type": "INTRO", "type": "paragraph"}, "text": "Words."},
        {"infons": {"section_type": "REF", "type": "ref"}, "text": "Smith"},
    ]
    path = write(
        tmp_path / "PMC5.json", json.dumps({"source": "PMC", "documents": [{"id": "5", "passages": passages}]})
    )
    assert read(path, format="bioc") == [{"id": "5", "pmid": "3", "text": "# Title\n\n## Intro\n\nWords."}]


# ---- instructions ----------------------------------------------------------------------------------------------------

INSTRUCTIONS = {
    "alpaca": ({"instruction": "I", "input": "", "output": "A"}, "I", "A"),
    "completion": ({"prompt": "I", "completion": "A"}, "I", "A"),
    "me_llama": ({"query": "I", "choices": ["A", "B"], "gold": 0, "answer": "A"}, "I", "A"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "I"}, {"from": "gpt", "value": "A"}]}, "I", "A"),
    "messages": ({"messages": [{"role": "user", "content": "I"}, {"role": "assistant", "content": "A"}]}, "I", "A"),
    "medqa": (
        {"question": "Q?", "options": {"A": "x", "B": "y"}, "answer_idx": "B", "answer": "y"}, "Q?\nA. x\nB. y", "B. y",
    ),
    "medqa_list": (
        {"question": "Q?", "options": [{"key": "A", "value": "x"}, {"key": "B", "value": "y"}], "answer_idx": "A"},
        "Q?\nA. x\nB. y", "A. x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("schema", INSTRUCTIONS)
def test_instruction_schemas(tmp_path, schema):
    row, question, answer = INSTRUCTIONS[schema]
    (record,) = read(write(tmp_path / "a.json", json.dumps([row])), "instructions")
    assert record["messages"] == [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_alpaca_input_stays_apart_and_noinput_is_none(tmp_path):
    rows = [
        {"instruction": "I", "input": "X", "output": "A"},
        {"instruction": "I", "input": "<noinput>", "output": "A"},
    ]
    first, second = read(jsonl(tmp_path / "a.jsonl", rows), "instructions")
    assert first["messages"][0]["input"] == "X"
    assert "input" not in second["messages"][0]


def test_instruction_columns(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"ask": "I", "gpt-4-answer": "A"}])
    (record,) = read(path, "instructions", columns={"instruction": "ask", "output": "gpt-4-answer"})
    assert [m["content"] for m in record["messages"]] == ["I", "A"]


def test_pubmedqa_is_keyed_by_pmid(tmp_path):
    row = {"12": {"QUESTION": "Does it?", "CONTEXTS": ["One.", "Two."], "final_decision": "yes", "LONG_ANSWER": "x"}}
    (record,) = read(write(tmp_path / "ori.json", json.dumps(row)), "instructions")
    assert record["pmid"] == record["id"] == "12"
    assert record["messages"][1]["content"] == "yes"


@pytest.mark.parametrize(("cops", "answers"), [((0, 3), "AD"), ((1, 4), "AD")])
def test_medmcqa_counts_from_zero_or_one(tmp_path, cops, answers):
    rows = [{"question": "Q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": cop} for cop in cops]
    found = read(jsonl(tmp_path / "medmcqa.jsonl", rows), "instructions")
    assert "".join(r["messages"][1]["content"][0] for r in found) == answers


def test_medmcqa_that_counts_from_neither_is_refused_as_in_evaluation(tmp_path):
    rows = [{"question": "Q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": cop} for cop in (1, 3)]
    with pytest.raises(DataError, match="cannot tell whether `cop` counts from 0 or from 1"):
        read(jsonl(tmp_path / "medmcqa.jsonl", rows), "instructions")


def test_unanswered_conversation_is_damaged(tmp_path):
    rejects = Rejects("s")
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "I"}]}])
    assert read(path, "instructions", rejects) == []
    assert rejects.reasons == {"no assistant message": 1}


# ---- files that cannot be data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("empty.jsonl", "", "file is empty"),
        ("lfs.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_unusable_files_stop_at_once(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_unset_variable_unknown_extension_and_empty_folder(tmp_path):
    with pytest.raises(DataError, match="NOT_SET_ANYWHERE is not set"):
        read("${NOT_SET_ANYWHERE}/a.jsonl")
    with pytest.raises(DataError, match="unknown extension .rtf"):
        format_of(Path("a.rtf"), "auto")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no readable file"):
        read(tmp_path / "nothing")


# ---- damage ----------------------------------------------------------------------------------------------------------

SECRET = "Zebedee Quill"


def with_doctype(declared: str) -> str:
    """The article with entities declared in an internal subset instead of the external DTD."""
    start, end = JATS.index("<!DOCTYPE"), JATS.index("<article ")
    return f"{JATS[:start]}<!DOCTYPE article [{declared}]>{JATS[end:]}".replace("&alpha;", "a")


# A line of a .jsonl file, and the reason it must get.
BAD_LINES = {
    "broken": (b'{"text": "Zebedee Quill', "broken JSON"),
    "trailing": (b'{"text": "a"} Zebedee Quill', "broken JSON"),
    "utf8": (b'{"text": "Zebedee Quill \xff\xfe"}', "not UTF-8"),
    "nul": (b'{"text": "Zebedee \\u0000 Quill"}', "text holds NUL bytes"),
    "surrogate": (b'{"text": "Zebedee Quill \\ud800"}', "text holds a lone surrogate"),
    "null": (b'{"text": null}', "text is null"),
    "missing": (b'{"body_text": "Zebedee Quill"}', "no text column among body_text"),
    "number": (b'{"text": 5}', "text is not a string"),
    "list": (b'{"text": [1, "Zebedee Quill"]}', "text is not a string"),
    "nan": (b'{"text": "a", "x": NaN}', "NaN or Infinity in JSON"),
    "empty": (b'{"text": ""}', "text is empty"),
    "blank": (b'{"text": " \\n\\t "}', "text is empty"),
    "array": (b'["Zebedee Quill"]', "not a JSON object"),
    "scalar": (b'"Zebedee Quill"', "not a JSON object"),
    "twice": (b'{"text": "a", "text": "Zebedee Quill"}', "duplicate key in JSON"),
    "nested": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON nested too deeply"),
    "binary": (b"\x89PNG\r\x00\x1a\x0b\xff", "not UTF-8"),
}


def test_ten_thousand_damaged_lines_are_each_named_and_quoted_nowhere(tmp_path):
    rng = random.Random(0)
    names = [rng.choice([n for n in BAD_LINES if n != "nested"]) for _ in range(10_000)] + ["nested"] * 20
    with (tmp_path / "a.jsonl").open("wb") as file:
        for number, name in enumerate(names):
            file.write(BAD_LINES[name][0] + (b"\r\n" if number % 2 else b"\n"))
            file.write(b'{"text": "sound"}\n' if number % 100 == 0 else b"")
        file.write(b'\xef\xbb\xbf{"text": "after a byte order mark"}')
    rejects = Rejects("s", tmp_path / "rejects.jsonl")
    tracemalloc.start()
    found = read(tmp_path / "a.jsonl", rejects=rejects)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rejects.close()
    assert len(found) == len(range(0, len(names), 100)) + 1
    rows = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in rows] == [BAD_LINES[name][1] for name in names]
    lines = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
    assert all(lines[row["line"] - 1].rstrip(b"\r") == BAD_LINES[n][0] for row, n in zip(rows, names, strict=True))
    assert not any(word in (tmp_path / "rejects.jsonl").read_text() for word in SECRET.split())
    assert peak < 40 << 20


def test_damage_of_every_kind_in_one_corpus_adds_up(tmp_path):
    """All kinds of bad lines, and files that are bad as a whole, through the whole step: counted, named, not quoted."""
    folder, out = tmp_path / "corpus", tmp_path / "out"
    folder.mkdir(), out.mkdir()
    bad = [line for line, _ in BAD_LINES.values()] * 10
    (folder / "lines.jsonl").write_bytes(b"\r\n".join([b'\xef\xbb\xbf{"text": "sound one"}', *bad]))
    (folder / "endless.jsonl").write_bytes(b'{"text": "' + b"Quill " * (MAX_RECORD_BYTES // 5) + b'"}\n')
    (folder / "nested.jsonl").write_bytes(b'{"text": ' + b'{"Quill": ' * 50_000 + b"1" + b"}" * 50_001)
    (folder / "open.csv").write_text('id,text\n1,"sound two"\n2,"Zebedee left open\n')
    (folder / "short.csv").write_text("id,text\n1\n1,2,3\n")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Zebedee Quill"}\n' * 9)[:-12])
    (folder / "bomb.nxml").write_text(with_doctype('<!ENTITY a "Quill"><!ENTITY b "&a;&a;&a;&a;&a;&a;">'))
    (folder / "cut.nxml").write_text(JATS[:700])
    (folder / "latin.txt").write_bytes("Zebedee Quill, caf\u00e9".encode("latin-1"))
    (folder / "array.json").write_text('[{"text": "sound three"}, {"text": "Zebedee')
    made = Recipe.model_validate({
        "name": "t", "model": {"base": "builtin:tiny"}, "stages": [{"cpt": {"mix": {"notes": 1}}}],
        "data": {"notes": {"path": str(folder), "kind": "clinical"}}, "hygiene": {"max_bad_fraction": 1.0},
    })  # fmt: skip
    tracemalloc.start()
    facts = prepare_source(made, "notes", {}, out).as_json()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    records, text = facts["records"], (out / "rejects.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert records["read"] == sum(n for name, n in records.items() if name != "read")
    assert len(rows) == records["rejected"] == sum(facts["reasons"].values()) and len(facts["reasons"]) >= 18
    assert {Path(row["file"]).name for row in rows} == {path.name for path in folder.iterdir()}
    assert all(row["line"] >= 1 and row["reason"] for row in rows)
    kept = (out / "train.jsonl").read_text() + (out / "heldout.jsonl").read_text()
    assert all(f"sound {n}" in kept for n in ("one", "two", "three"))
    assert not any(word in text + json.dumps(facts) for word in SECRET.split())
    assert peak < 120 << 20  # 2^24 counters of boilerplate are 64 MB of it


def test_a_line_without_end_is_skipped_in_bounded_memory(tmp_path):
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "' + b"x" * (MAX_RECORD_BYTES + 10) + b'"}\n{"text": "next"}\n')
    rejects = Rejects("s")
    assert [r["text"] for r in read(tmp_path / "a.jsonl", rejects=rejects)] == ["next"]
    assert rejects.reasons == {"line longer than 8 MiB": 1}


def test_truncated_gzip_keeps_what_came_before(tmp_path):
    rng = random.Random(1)
    rows = b"".join(json.dumps({"text": f"{rng.random()}"}).encode() + b"\n" for _ in range(2000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows)[:-3000])
    rejects = Rejects("s")
    found = read(tmp_path / "a.jsonl.gz", rejects=rejects)
    assert 500 < len(found) < 2000
    assert "archive is truncated or corrupt from here on" in rejects.reasons


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (with_doctype('<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;">'), "XML declares entities"),
        (JATS[:700], "broken XML"),
        ('<?xml version="1.0" encoding="klingon"?><article/>', "XML is not in the encoding that it declares (line 1)"),
        ("<article><front/></article>", "JATS without article-meta"),
        ("<html><body/></html>", "XML is not a JATS article"),
    ],
)
def test_damaged_articles(tmp_path, text, reason):
    rejects = Rejects("s")
    assert read(write(tmp_path / "a.nxml", text), rejects=rejects) == []
    assert next(iter(rejects.reasons)).startswith(reason)


def test_an_article_in_another_encoding_than_it_declares_is_named(tmp_path):
    (tmp_path / "a.nxml").write_bytes("<article>\n<front>é</front></article>".encode("latin-1"))
    rejects = Rejects("s")
    assert read(tmp_path / "a.nxml", rejects=rejects) == []
    assert rejects.reasons == {"XML is not in the encoding that it declares (line 2)": 1}


def test_external_entities_are_never_read(tmp_path):
    secret = write(tmp_path / "secret.txt", SECRET)
    text = with_doctype(f'<!ENTITY x SYSTEM "file://{secret}">').replace("To test.", "&x;")
    rejects = Rejects("s")
    assert read(write(tmp_path / "a.nxml", text), rejects=rejects) == []
    assert rejects.reasons == {"XML declares entities": 1}


def test_csv_resumes_after_an_open_quote(tmp_path):
    good = "".join(f'{i},"text, {i}"\n' for i in range(10))
    path = write(tmp_path / "a.csv", f'id,text\n{good}98,"left open\n{good}99,one,too many\n')
    rejects = Rejects("s")
    assert len(read(path, rejects=rejects)) == 20
    assert rejects.reasons == {"quote left open or misplaced": 1, "wrong number of columns": 1}


def test_broken_element_of_a_json_array_costs_one_record(tmp_path):
    path = write(tmp_path / "a.json", '[\n{"text": "one"},\n{"text": oops},\n{"text": "three"}\n]')
    rejects = Rejects("s")
    assert [r["text"] for r in read(path, rejects=rejects)] == ["one", "three"]
    assert rejects.reasons == {"broken JSON": 1}


@pytest.mark.parametrize("text", ['[{"text": "one"},', '{"data": [', "[" * 50_000])
def test_unclosed_json_never_escapes(tmp_path, text):
    rejects = Rejects("s")
    read(write(tmp_path / "a.json", text), rejects=rejects)
    assert rejects.counts["rejected"] >= 1


def sound_files() -> dict[str, bytes]:
    """One small file per format."""
    rows = [{"id": str(i), "text": f'note "{i}", line\nnext é {i}'} for i in range(40)]
    table = io.StringIO()
    writer = csv.DictWriter(table, ["id", "text"])
    writer.writeheader()
    writer.writerows(rows)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        info = tarfile.TarInfo("a.nxml")
        info.size = len(JATS.encode())
        tar.addfile(info, io.BytesIO(JATS.encode()))
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    records = pubmed(*(citation(n, "<AbstractText>x &lt; y</AbstractText>") for n in range(5))).encode()
    files = {
        "a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines), "a.jsonl.zst": zstandard.compress(lines),
        "a.json": json.dumps(rows, indent=1).encode(), "b.json": json.dumps({r["id"]: r for r in rows}).encode(),
        "a.csv": table.getvalue().encode(), "a.nxml": JATS.encode(), "a.xml": records,
        "a.xml.gz": gzip.compress(records), "a.tar.gz": archive.getvalue(),
    }  # fmt: skip
    return files


def damaged(data: bytes, rng: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(len(result))
        match rng.randrange(4):
            case 0:
                result[at] = rng.randrange(256)
            case 1:
                del result[at : at + rng.randrange(1, 30)]
            case 2:
                result[at:at] = rng.choice([b'"', b"{", b"[", b"\0", b"\xff", b"]", b"<", b"&x;", b"\\ud800", b"\r"])
            case 3:
                result = result[: max(1, at)]
        result = result or bytearray(b"x")
    return bytes(result)


@pytest.mark.parametrize("name", sound_files())
def test_damaged_bytes_of_any_format_never_escape(tmp_path, name):
    rng = random.Random(name)
    data = sound_files()[name]
    sound = len(list(read(_bytes(tmp_path / name, data), "clinical")))
    for _ in range(100):
        rejects = Rejects("s")
        found = read(_bytes(tmp_path / name, damaged(data, rng)), "clinical", rejects)
        assert len(found) <= sound + 5
        assert all(isinstance(r["text"], str) and r["text"] for r in found)


def _bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# ---- real text -------------------------------------------------------------------------------------------------------


@real
@pytest.mark.parametrize(
    ("path", "kind", "count", "columns"),
    [
        ("literature/pmc_oa", "literature", 6, {}),
        ("literature/pubmed", "literature", 1, {}),
        ("literature/hoc_abstracts.jsonl", "literature", 1453, {}),
        ("clinical/mtsamples.csv", "clinical", 396, {}),
        ("instructions/chatdoctor5k.json", "instructions", 2500, {}),
        ("instructions/medical_meadow_small.json", "instructions", 4749, {}),
        ("instructions/medinstruct_test.jsonl", "instructions", 216, {"output": "gpt-4-answer"}),
        ("eval/pubmedqa_train.json", "instructions", 500, {}),
    ],
)
def test_real_files_are_read_whole(path, kind, count, columns):
    rejects = Rejects("s")
    assert len(read(REAL / path, kind, rejects, columns=columns)) == count
    assert not any(rejects.counts.values())


@real
def test_real_articles_give_every_body_paragraph_once_and_in_order():
    """Paragraphs as lxml sees them: each text node below body//p that the policy keeps, in document order."""
    from lxml import etree

    for path in sorted((REAL / "literature/pmc_oa").glob("*.nxml")):
        text = " ".join(read(path)[0]["text"].split())
        tree = etree.parse(str(path), etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False))
        paragraphs = [
            p for p in tree.iterfind(".//body//p") if next(p.iterancestors("table", "fn-group"), None) is None
        ]
        assert len(paragraphs) > 10
        at = 0
        for paragraph in paragraphs:
            words = " ".join((paragraph.text or "").split()).rstrip(" [(")  # of a citation
            if len(words) < 40:
                continue
            found = text.find(words, at)
            assert found >= 0, "a paragraph is lost or out of order"
            assert text.count(words) == 1, "a paragraph is doubled"
            at = found
