"""`qmedtune bench data`: each data stage beside its limit and beside what is installed of its peers, in one run.

Contenders of a case take turns, so that a busy machine slows all alike; what is told is the median over rounds of the
ratio within a round. Peers that are not installed are left out and named. The corpus is made from the built-in world
(or read from a jsonl file): texts of about 1,500 characters.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmedtune import ui
from qmedtune.bench import data_memory
from qmedtune.bench import data_peers as peers
from qmedtune.bench.result import BenchResult, Row
from qmedtune.data.hygiene import decontaminate, dedup
from qmedtune.data.packing import mix
from qmedtune.data.packing.tokens import BATCH_BYTES, Encoder, encode_texts, shard_array, write_shards
from qmedtune.data.reading import jats, pubmed, xml_files
from qmedtune.data.synthetic import world
from qmedtune.errors import RecipeError
from qmedtune.record import device_name, versions

CONTENDERS = {
    "tokenise": "text to packed rows: tokenizers alone (the limit), ours, datasets + TRL",
    "jats": "articles to text: lxml parsing alone (the limit), ours, pubmed_parser",
    "pubmed": "records to text: lxml's stream of records alone (the limit), ours",
    "near": "near duplicates at Jaccard 0.8 with recall: ours, datasketch",
    "decontaminate": "13-gram search with recall: ours, lm-eval's Janitor",
}
ON_REQUEST = {"memory": "peak memory of reading to packing over the size of the corpus: ours (minutes)"}
SEQ_LEN = 1024
TEXT_CHARACTERS = 1500
SEED = 5


@dataclass(frozen=True)
class TimedCall:
    """One timed call: `work` returns what `quality` (a recall) is computed from."""

    name: str
    work: Callable[[], Any]
    quality: Callable[[Any], float] | None = None


def bench_data(
    *, cases: list[str] | None = None, rounds: int = 3, corpus: Path | None = None, num_texts: int = 4000,
    sizes_mb: list[int] | None = None,
) -> BenchResult:  # fmt: skip
    """{"bench", "device", "versions", "rows"}; rows: case, contender, value (s), unit, ratio (seconds of the case's
    first contender over this one's: above 1 is faster than it), mb_per_s, recall where there is one.

    sizes_mb: of the corpora of the case `memory`, which runs on request only. Raises RecipeError for an unknown case.
    """
    chosen = cases or list(CONTENDERS)
    for case in chosen:
        if case not in CONTENDERS | ON_REQUEST:
            raise RecipeError(f"bench data: no case {case!r}\nallowed: {', '.join(CONTENDERS | ON_REQUEST)}")
    texts = _corpus(corpus, num_texts)
    makers = {"tokenise": _tokenise, "jats": _jats, "pubmed": _pubmed, "near": _near, "decontaminate": _decontaminate}
    rows = []
    with tempfile.TemporaryDirectory() as folder, ui.progress_bar("bench data", None, "cases") as bar:
        for number, case in enumerate(chosen, start=1):
            if case == "memory":
                rows += data_memory.memory_rows(sizes_mb or list(data_memory.SIZES_MB), Path(folder) / case)
            else:
                size, runs = makers[case](texts, Path(folder) / case)
                rows += _measure(case, size, runs, rounds)
            bar.update(number)
    missing = [name for name in peers.NEEDED if not peers.installed(name)]
    return {"bench": "data", "device": device_name(), "versions": versions(), "not_installed": missing, "rows": rows}


def render(result: BenchResult) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for a table."""
    rows = []
    for found in result["rows"]:
        ratio, recall = "", ""
        if found["ratio"] is not None:
            ratio = f"{found['ratio']:.2f}"
        if found["recall"] is not None:
            recall = f"{found['recall']:.3f}"
        value, speed = f"{found['value']:.2f} {found['unit']}", f"{found['mb_per_s']:.1f}"
        rows.append([found["case"], found["contender"], value, speed, ratio, recall])
    return ["case", "contender", "median or peak", "MB/s", "ratio to first", "recall"], rows


def _measure(case: str, size_bytes: int, runs: list[TimedCall], rounds: int) -> list[Row]:
    seconds: dict[str, list[float]] = {run.name: [] for run in runs}
    recall: dict[str, float] = {}
    for _ in range(rounds):
        for run in runs:
            gc.collect()
            started = time.perf_counter()
            result = run.work()
            seconds[run.name].append(time.perf_counter() - started)
            if run.quality:
                recall[run.name] = run.quality(result)
    first = seconds[runs[0].name]
    rows = []
    for run in runs:
        taken = seconds[run.name]
        ratios = [a / b for a, b in zip(first, taken, strict=True)]
        rows.append({
            "case": case, "contender": run.name, "value": statistics.median(taken), "unit": "s",
            "ratio": statistics.median(ratios),
            "mb_per_s": size_bytes / 1e6 / statistics.median(taken), "recall": recall.get(run.name),
        })  # fmt: skip
    return rows


def _corpus(path: Path | None, num_texts: int) -> list[str]:
    if path is not None:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in itertools.islice(file, num_texts)]
    rng = random.Random(SEED)
    syllables = itertools.product("bdfgklmnprstvz", ("a", "ero", "ino", "uli"), ("n", "st", "mab", "ic"))
    invented = ["".join(parts) for parts in syllables]
    sentences = []
    for name in ("literature", "general"):
        for record in world.records(name, world.make_world()):
            sentences.append(record["text"])
    return [_text(rng, sentences, invented) for _ in range(num_texts)]


def _text(rng: random.Random, sentences: list[str], invented: list[str]) -> str:
    parts, size = [], 0
    while size < TEXT_CHARACTERS:
        if rng.random() < 0.2:
            sentence = rng.choice(sentences)
        else:
            sentence = " ".join(rng.choices(invented, k=12)) + "."
        parts.append(sentence)
        size += len(sentence)
    return " ".join(parts)


def _bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


# ---- cases: (bytes of input, contenders; the first is what the others are compared with) --------------------------


def _tokenise(texts: list[str], folder: Path) -> tuple[int, list[TimedCall]]:
    folder.mkdir()
    codec = data_memory.train_tokenizer(texts, folder / "tokenizer")
    source = folder / "train.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")

    def alone() -> None:
        for batch in _batches(texts, max(1, BATCH_BYTES // TEXT_CHARACTERS)):
            codec.backend.encode_batch_fast(batch, add_special_tokens=False)

    def ours() -> None:
        out = Path(tempfile.mkdtemp(dir=folder))
        encoder = Encoder(lambda records: encode_texts(codec, records, None))
        shards = write_shards(source, out / "a", encoder, lambda _: None)
        for shard in shards:
            documents = shard_array(shard, "documents")
            mix.fill_rows(documents[:, 0], SEQ_LEN, split=True)

    runs = [TimedCall("tokenizers", alone), TimedCall("qmedtune", ours)]
    if peers.installed("trl"):
        runs.append(TimedCall("datasets + trl", peers.tokenise_with_trl(texts, codec.backend, SEQ_LEN)))
    return _bytes(texts), runs


def _batches(texts: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def _jats(texts: list[str], folder: Path) -> tuple[int, list[TimedCall]]:
    folder.mkdir()
    paths = []
    for number, paragraphs in enumerate(_batches(texts[:2000], 20)):
        paths.append(_write_article(paragraphs, folder / f"{number}.nxml"))

    def alone() -> None:
        from lxml import etree  # type: ignore[attr-defined]

        for path in paths:
            etree.parse(str(path), etree.XMLParser(**xml_files.SAFE))

    def ours() -> None:
        for path in paths:
            list(jats.read_jats(path))

    runs = [TimedCall("lxml", alone), TimedCall("qmedtune", ours)]
    if peers.installed("pubmed_parser"):
        runs.append(TimedCall("pubmed_parser", peers.parse_with_pubmed_parser(paths)))
    return sum(path.stat().st_size for path in paths), runs


# Markup as dense as in six real articles: 47 characters per element, a third in references (here 48, 30 %).
REFERENCE = (
    '<ref id="B1"><label>1</label><citation citation-type="journal"><person-group person-group-type="author"><name>'
    "<surname>Doe</surname><given-names>J</given-names></name><name><surname>Roe</surname><given-names>R</given-names>"
    "</name></person-group><article-title>On an invented drug</article-title><source>J Inv</source><year>1999</year>"
    "<volume>1</volume><fpage>2</fpage><lpage>9</lpage></citation></ref>"
)
MARKS = (
    "<italic>in vivo</italic> H<sub>2</sub>O "
    '[<xref ref-type="bibr" rid="B1">1</xref>,<xref ref-type="bibr" rid="B2">2</xref>]'
)
META = (
    '<article-id pub-id-type="pmid">1</article-id><title-group><article-title>T</article-title></title-group>'
    '<pub-date pub-type="ppub"><year>1999</year></pub-date><abstract><p>Aim.</p></abstract>'
)


def _write_article(paragraphs: list[str], path: Path) -> Path:
    pieces = []
    for text in paragraphs:
        for start in range(0, len(text), 300):
            pieces.append(f"{text[start : start + 300]} {MARKS}")
    body = ""
    for three in _batches(pieces, 3):
        body += f"<sec><title>Part</title><p>{''.join(three)}</p></sec>"
    path.write_text(
        f'<article xmlns:xlink="x"><front><article-meta>{META}</article-meta></front><body>{body}</body>'
        f"<back><ref-list>{REFERENCE * 50}</ref-list></back></article>"
    )
    return path


# What a record of PubMed holds beside its abstract: about two thirds of its bytes, as in the files of 2023.
RECORD = (
    '<PubmedArticle><MedlineCitation Status="MEDLINE" Owner="NLM"><PMID Version="1">{pmid}</PMID>'
    '<DateCompleted><Year>1999</Year><Month>01</Month><Day>02</Day></DateCompleted><Article PubModel="Print">'
    "<Journal><ISSN>0000-0000</ISSN><JournalIssue><Volume>1</Volume><PubDate><Year>1999</Year></PubDate>"
    "</JournalIssue><Title>An invented journal</Title></Journal><ArticleTitle>On an invented drug.</ArticleTitle>"
    '<Abstract><AbstractText Label="AIM">{aim}</AbstractText><AbstractText Label="RESULTS">{results} 10<sup>9</sup>/L'
    "</AbstractText></Abstract><AuthorList>{authors}</AuthorList><Language>eng</Language><PublicationTypeList>"
    '<PublicationType UI="D016428">Journal Article</PublicationType></PublicationTypeList></Article>'
    "<MeshHeadingList>{headings}</MeshHeadingList></MedlineCitation></PubmedArticle>"
)
AUTHOR = '<Author ValidYN="Y"><LastName>Doe</LastName><ForeName>J</ForeName><Initials>J</Initials></Author>'
HEADING = '<MeshHeading><DescriptorName UI="D000001" MajorTopicYN="N">Owls</DescriptorName></MeshHeading>'


def _pubmed(texts: list[str], folder: Path) -> tuple[int, list[TimedCall]]:
    folder.mkdir()
    path = folder / "records.xml"
    with path.open("w", encoding="utf-8") as file:
        file.write("<PubmedArticleSet>")
        for number, text in enumerate(texts, start=1):
            said = {"aim": text[:300], "results": text[300:], "authors": AUTHOR * 5, "headings": HEADING * 10}
            file.write(RECORD.format(pmid=number, **said))
        file.write("</PubmedArticleSet>")

    def alone() -> None:
        from lxml import etree  # type: ignore[attr-defined]

        for _, element in etree.iterparse(str(path), ("end",), tag=pubmed.RECORDS, **xml_files.SAFE):
            element.clear()

    def ours() -> None:
        for _ in pubmed.read_pubmed(path):
            pass

    return path.stat().st_size, [TimedCall("lxml", alone), TimedCall("qmedtune", ours)]


def _near(texts: list[str], folder: Path) -> tuple[int, list[TimedCall]]:
    folder.mkdir()
    rng = random.Random(SEED)
    copies = [_edited(text, rng) for text in texts[: len(texts) // 10]]
    both = [*texts, *copies]

    def ours() -> list[bool]:
        place = Path(tempfile.mkdtemp(dir=folder)) / "bands"
        batches = (dedup.windows_of(texts) for texts in _batches(both, dedup.BATCH_TEXTS))
        return (dedup.near_duplicates(batches, both.__getitem__, 0.8, place) >= 0).tolist()

    def recall(found: list[bool]) -> float:
        return sum(found[len(texts) :]) / len(copies)

    runs = [TimedCall("qmedtune", ours, recall)]
    if peers.installed("datasketch"):
        runs.append(TimedCall("datasketch", peers.near_with_datasketch(both, 0.8), recall))
    return _bytes(both), runs


def _edited(text: str, rng: random.Random) -> str:
    """Two words changed in about 200: Jaccard similarity about 0.93 over windows of five words."""
    words = text.split()
    for _ in range(2):
        words[rng.randrange(len(words))] = f"edit{rng.randrange(10**6)}"
    return " ".join(words)


def _invented_question(rng: random.Random) -> str:
    return " ".join(f"q{rng.randrange(10**5)}" for _ in range(rng.randint(15, 60)))


def _decontaminate(texts: list[str], folder: Path) -> tuple[int, list[TimedCall]]:
    rng = random.Random(SEED)
    items = [_invented_question(rng) for _ in range(400)]
    both, indexed = list(texts), []
    num_planted = min(len(texts), len(items))
    for place, item in enumerate(items):
        indexed.append(decontaminate.BenchmarkItem("t", str(place), (item,)))
        if place < num_planted:
            both[place] = f"{texts[place][:500]} {item} {texts[place][500:]}"
    index = decontaminate.build(indexed)

    def ours() -> set[int]:
        found = set()
        for number, batch in enumerate(_batches(both, 256)):
            for hit in decontaminate.search(index, batch, [None] * len(batch)):
                found.add(256 * number + hit.record)
        return found

    def recall(found: set[int]) -> float:
        return len(found & set(range(num_planted))) / num_planted

    runs = [TimedCall("qmedtune", ours, recall)]
    if peers.installed("lm_eval"):
        runs.append(TimedCall("lm-eval Janitor", peers.search_with_janitor(both, items), recall))
    return _bytes(both), runs
