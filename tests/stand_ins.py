"""Stand-ins for what the examples download: small files in the true formats, with text of the built-in world.

As a program it is `wget`, `curl` or `hf` of a machine without network: `fake_downloaders` puts commands of these names
into a folder for PATH, and each writes where the real one would have. What it does not know it refuses.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
from pathlib import Path
from xml.sax.saxutils import escape

from qmedtune.data.synthetic import world

ARTICLES = 12
REVISION = "0" * 40
WORLD = world.make_world("tiny")


def fake_downloaders(folder: Path) -> Path:
    folder.mkdir()
    for name in ("wget", "curl", "hf"):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" {name} "$@"\n')
        command.chmod(0o755)
    return folder


# ---- formats ---------------------------------------------------------------------------------------------------------


def texts(corpus: str) -> list[dict]:
    return list(world.records(corpus, WORLD))


def jats(pmcid: int) -> str:
    """One article of PubMed Central: the abstracts of the drugs whose turn it is, as its paragraphs."""
    mine = [row["text"] for number, row in enumerate(texts("literature")) if number % ARTICLES == pmcid % ARTICLES]
    paragraphs = "".join(f"<p>{escape(text)}</p>" for text in mine[:40])
    return (
        '<?xml version="1.0"?>\n<!DOCTYPE article PUBLIC "-//NLM//DTD JATS v1.3//EN" "JATS-archivearticle1.dtd">\n'
        f'<article article-type="research-article"><front><article-meta><article-id pub-id-type="pmcid">PMC{pmcid}'
        f"</article-id><title-group><article-title>Article {pmcid}</article-title></title-group></article-meta></front>"
        f"<body><sec><title>Results</title>{paragraphs}</sec></body></article>\n"
    )


def discharge_csv() -> bytes:
    """MIMIC-IV-Note's discharge.csv.gz: its eight columns, quoted notes over several lines, de-identified by `___`."""
    header = ["note_id", "subject_id", "hadm_id", "note_type", "note_seq", "charttime", "storetime", "text"]
    patients: dict[str, int] = {}
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write(header)
    for number, row in enumerate(texts("notes")[:300]):
        subject = 10_000_032 + patients.setdefault(row["patient"], len(patients))
        body = f" \nName:  ___                     Unit No:   ___\n \n{row['text']}\n"
        times = ["2180-05-07 00:00:00", "2180-05-09 15:26:00"]
        write([f"{subject}-DS-{number}", subject, 22_595_853 + number, "DS", number, *times, body])
    return gzip.compress(out.getvalue().encode())


def c4_shard() -> bytes:
    rows = [{"text": r["text"], "timestamp": "2019-04-25T12:57:54Z", "url": "https://x.org"} for r in texts("general")]
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows[:400]).encode())


def pubmed_baseline() -> bytes:
    """A file of the PubMed baseline: citations with structured abstracts."""
    citations = (
        f'<PubmedArticle><MedlineCitation><PMID Version="1">{100 + number}</PMID><Article><ArticleTitle>On {number}.'
        f'</ArticleTitle><Abstract><AbstractText Label="RESULTS">{escape(row["text"])}</AbstractText></Abstract>'
        "<Language>eng</Language></Article></MedlineCitation></PubmedArticle>"
        for number, row in enumerate(texts("literature")[:200])
    )
    return gzip.compress(f'<?xml version="1.0"?>\n<PubmedArticleSet>{"".join(citations)}</PubmedArticleSet>'.encode())


def flashcards() -> bytes:
    """Medical Meadow's: one JSON array, Alpaca keys."""
    rows = [{key: row[key] for key in ("input", "output", "instruction")} for row in texts("instructions")[:120]]
    return json.dumps(rows, indent=1).encode()


def med_instruct(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{key: row[key] for key in ("output", "input", "instruction")} for row in texts("instructions")[:120]]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def pubmedqa() -> bytes:
    """ori_pqal.json: one object, keyed by PMID."""
    items = {}
    for number, item in enumerate(world.facts_items(WORLD)[:12]):
        decision = ("yes", "no", "maybe")[number % 3]
        items[str(21645374 + number)] = {
            "QUESTION": item["question"], "CONTEXTS": ["A trial.", "It ended."], "LABELS": ["METHODS", "RESULTS"],
            "MESHES": ["Humans"], "YEAR": "2011", "reasoning_required_pred": decision,
            "reasoning_free_pred": decision, "final_decision": decision, "LONG_ANSWER": "It depends.",
        }  # fmt: skip
    return json.dumps(items).encode()


# ---- commands --------------------------------------------------------------------------------------------------------


def get(url: str) -> bytes:
    """What an address answers."""
    if url.startswith("https://eutils.ncbi.nlm.nih.gov/entrez/eutils/esearch.fcgi?db=pmc"):
        return "".join(f"<Id>{1000 + number}</Id>\n" for number in range(ARTICLES)).encode()
    if url.startswith("https://pmc-oa-opendata.s3.amazonaws.com/PMC"):
        folder, name = url.split("/")[-2:]
        assert name == f"{folder}.xml", url
        return jats(int(folder.removeprefix("PMC").split(".")[0])).encode()
    if url.startswith("https://physionet.org/files/mimic-iv-note/") and url.endswith("/note/discharge.csv.gz"):
        return discharge_csv()
    if url == "https://raw.githubusercontent.com/pubmedqa/pubmedqa/master/data/ori_pqal.json":
        return pubmedqa()
    raise SystemExit(f"no stand-in for {url}")


def wget(words: list[str]) -> None:
    folder = Path(words[words.index("-P") + 1]) if "-P" in words else Path()
    url = words[-1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / url.rsplit("/", 1)[1]).write_bytes(get(url))


def curl(words: list[str]) -> None:
    sys.stdout.buffer.write(get(words[-1]))


def hf(words: list[str]) -> None:
    if words[:2] == ["auth", "login"]:
        return
    assert words[0] == "download", words
    place = Path(words[words.index("--local-dir") + 1]) if "--local-dir" in words else Path()
    if words[1] == "meta-llama/Llama-3.1-8B":
        from llama_folders import llama3_folder

        # As the Hub's cache keeps it: `--offline` has to find it there.
        cached = Path(os.environ["HF_HOME"], "hub", "models--meta-llama--Llama-3.1-8B")
        llama3_folder(cached / "snapshots" / REVISION)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(REVISION)
    elif words[1] == "allenai/c4":
        (place / words[2]).parent.mkdir(parents=True)
        (place / words[2]).write_bytes(c4_shard())
    elif words[1] == "lavita/AlpaCare-MedInstruct-52k":
        (place / "data").mkdir(parents=True)
        med_instruct(place / "data" / "train-00000-of-00001.parquet")
    else:
        raise SystemExit(f"no stand-in for hf {words}")


if __name__ == "__main__":
    {"wget": wget, "curl": curl, "hf": hf}[sys.argv[1]](sys.argv[2:])
