"""Every parser of untrusted bytes as a fuzz target: bytes in, and nothing but the project's own errors out.

A target writes the bytes where its parser expects them and calls it as the commands do. Whatever else than a
`QmedtuneError` escapes (and, in fuzz.py, a minute or two gigabytes for one input) is a finding; it becomes a seed here.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import shutil
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow
from pyarrow import parquet

from qmedtune.errors import QmedtuneError

TEXT = "The owl was seen in clinic on 3 May and is well. "
WORK = Path(tempfile.mkdtemp(prefix="fuzz-"))


@dataclass(frozen=True)
class Target:
    """`parse`: the parser, given bytes; `seeds`: sound inputs of its format, and what has once been found."""

    parse: Callable[[bytes], object]
    seeds: tuple[bytes, ...]


def run(target: Target, data: bytes) -> None:
    """The only errors that may come out are those that a user is shown."""
    try:
        target.parse(data)
    except QmedtuneError as error:
        assert 1 <= len(str(error).splitlines()) <= 6, error


# ---- recipes and data ------------------------------------------------------------------------------------------------


def recipe(data: bytes) -> None:
    from qmedtune.parsing.loader import load_recipe

    path = WORK / "r.yaml"
    path.write_bytes(data)
    load_recipe(path)


def reader(name: str, kind: str = "literature") -> Callable[[bytes], object]:
    def parse(data: bytes) -> int:
        from qmedtune.data.reading.sources import read_items
        from qmedtune.recipe import SourceSection

        path = WORK / name
        path.write_bytes(data)
        count = 0
        for _ in read_items(SourceSection(path=str(path), kind=kind)):  # type: ignore[arg-type]
            count += 1
        return count

    return parse


def identifiers(data: bytes) -> None:
    from qmedtune.data.hygiene import phi

    text = data.decode("utf-8", "replace")
    for span in phi.find(text):
        for edge in (span.start, span.end):
            inside = 0 < edge < len(text) and text[edge - 1].isalnum() and text[edge].isalnum()
            assert not inside, "a span begins or ends inside a word"


def table() -> bytes:
    held = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": [TEXT, TEXT]}), held)
    return held.getvalue()


def tarred() -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        member = tarfile.TarInfo("a.nxml")
        member.size = len(ARTICLE)
        archive.addfile(member, io.BytesIO(ARTICLE))
    return held.getvalue()


def zipped() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("a.jsonl", LINES)
    return held.getvalue()


LINES = json.dumps({"id": "1", "text": TEXT}).encode() + b"\n" + b'{"text": "x"}\n'
ARTICLE = (
    b"<article><front><article-meta><article-id pub-id-type='pmc'>1</article-id><title-group><article-title>Owls"
    b"</article-title></title-group></article-meta></front><body><sec><title>A</title><p>Owls 10<sup>9</sup>.</p></sec>"
    b"</body></article>"
)
PUBMED = (
    b"<PubmedArticleSet><PubmedArticle><MedlineCitation><PMID>1</PMID><Article><ArticleTitle>Owls</ArticleTitle><Abstract>"
    b"<AbstractText>They see.</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle></PubmedArticleSet>"
)
RECIPE = (Path(__file__).parents[2] / "recipes" / "micro.yaml").read_bytes()
NOTE = (
    b"PATIENT NAME: DOE, JANE M\nDOB 03/04/1951 MRN: 0048291\n"
    b"Dr. Garc\xc3\xada, call (617) 555-0142, St. Mary's Hospital\n"
)

# ---- models and adapters ---------------------------------------------------------------------------------------------


@cache
def base() -> Path:
    """A tiny LLaMA with its tokenizer."""
    from llama_folders import llama3_folder

    return llama3_folder(WORK / "base")


@cache
def adapter() -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base()), config).save_pretrained(WORK / "adapter")
    return WORK / "adapter"


@cache
def copied(name: str) -> Path:
    """A copy of the base for one target, whose other files stay as they are."""
    return Path(shutil.copytree(base(), WORK / f"base-{name}"))


def model_file(name: str) -> Callable[[bytes], object]:
    def parse(data: bytes) -> None:
        from qmedtune.model_stack import read_model

        folder = copied(name)
        (folder / name).write_bytes(data)
        read_model(folder)

    return parse


def adapter_file(name: str) -> Callable[[bytes], object]:
    def parse(data: bytes) -> None:
        from qmedtune.model_stack import read_adapter, read_model

        folder = WORK / f"adapter-{name}"
        if not folder.exists():
            shutil.copytree(adapter(), folder)
        (folder / name).write_bytes(data)
        read_adapter(folder, read_model(base()).shapes)

    return parse


def header(data: bytes) -> None:
    """A safetensors file of which the input is the header, its length written before it."""
    from qmedtune.model_stack import headers

    path = WORK / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(64))
    headers(path)


def tokenizer(data: bytes) -> None:
    from qmedtune.data.packing.tokens import load_codec

    folder = copied("tokenizer.json")
    (folder / "tokenizer.json").write_bytes(data)
    load_codec.__globals__["_load_codec"].cache_clear()
    load_codec(folder).encode([TEXT], markers=True)


def template(data: bytes) -> None:
    from qmedtune.data.packing import templates

    path = WORK / "template.json"
    path.write_bytes(data)
    found = templates.load(path)
    if not found.source:
        found.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])


def chat(data: bytes) -> None:
    """In this process, where coverage is seen; the product renders in another one, with bounds."""
    from datetime import date

    from jinja2 import TemplateError

    from qmedtune.data.packing.chat_renderer import TemplateRaised, environment

    expected = (TemplateError, TemplateRaised, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)
    if any(word in data for word in (b"range", b"*", b"for", b"macro", b"center", b"format", b"%", b"indent", b"pad")):
        return  # what the other process' bounds are for
    messages = [{"role": "user", "content": "?"}]
    try:
        made = environment(date(2024, 7, 26)).from_string(data.decode("utf-8", "replace"))
        made.render(messages=messages, add_generation_prompt=True)
    except (*expected, RecursionError):
        return  # told by its kind


def run_json(data: bytes) -> None:
    """What a run folder says about itself, after a bad disk or another tool."""
    from qmedtune import claims, store
    from qmedtune.hashes import HashCache

    folder = WORK / "run"
    folder.mkdir(exist_ok=True)
    for name in ("run.json", ".hashes.json", "seal.json", ".qmedtune"):
        (folder / name).write_bytes(data)
    claims.check(folder)
    store.read_seal(folder)
    HashCache(folder / ".hashes.json").seen(folder / "run.json")


def made(path: Callable[[], Path]) -> Callable[[], bytes]:
    return lambda: path().read_bytes()


# Found: a member of a zip archive without a name, on which zipfile's own `is_dir` raises.
NO_NAME = base64.b64decode(
    "UEsDBBQAAAAAAFcPfl3umE3aVwB3YXMgc2VlbiBpbiBjbGluaWMgb24gIn0KUEsBAhQDFAAAAAAAVw9+Xe6YTdpXAAAAVwAAAAcA"
    "AAAAAAAAAAAAAIABAABdAAAuanNvbmxQSwUGAAAAAAEAAQA1AAAAbGxsbGxsbGxsbGyUjGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxs"
    "bGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbHwAFIABAA=="
)
TARGETS: dict[str, Target] = {
    "recipe": Target(recipe, (RECIPE, b"name: x\nmodel: {base: builtin:micro}\n", b"a: &a [*a]\n")),
    "jsonl": Target(reader("a.jsonl"), (LINES, b'{"text": "\\ud800"}\n', b"\xef\xbb\xbf" + LINES)),
    "json": Target(reader("a.json"), (b"[" + LINES.splitlines()[0] + b"]", b'{"data": [{"text": "owl"}]}', b"[]")),
    "csv": Target(reader("a.csv"), (b'id,text\n1,"Owl, seen"\n', b"id;text\n1;Owl\n",
                                       "id\ttext\n1\tOwl\n".encode("utf-16"))),
    "xml": Target(reader("a.nxml"), (ARTICLE, b"<!DOCTYPE article>" + ARTICLE)),
    "pubmed": Target(reader("pubmed.xml"), (PUBMED,)),
    "text": Target(reader("a.txt", "clinical"), (NOTE, b"PMID- 1\nTI  - Owls\nAB  - See.\n", b"7|t|Owls\n7|a|See.\n")),
    "hl7": Target(reader("a.hl7", "clinical"), (b"MSH|^~\\&|A|B|C|D|2020||ORU^R01|1|P|2.3\rOBX|1|TX|N||Owl||||||F\r",)),
    "parquet": Target(reader("a.parquet"), (table(),)),
    "tar": Target(reader("a.tar"), (tarred(),)),
    "tar.gz": Target(reader("a.tar.gz"), (gzip.compress(tarred()),)),
    "zip": Target(reader("a.zip"), (zipped(), NO_NAME)),
    "identifiers": Target(identifiers, (NOTE, TEXT.encode())),
    "safetensors": Target(header, (b'{"a":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}}', b"{}")),
    "config": Target(model_file("config.json"), (b"",)),
    "index": Target(model_file("model.safetensors.index.json"), (b"",)),
    "generation": Target(model_file("generation_config.json"), (b'{"eos_token_id": [1, 2]}',)),
    "tokenizer settings": Target(model_file("tokenizer_config.json"), (b"",)),
    "tokenizer": Target(tokenizer, (b"",)),
    "template": Target(template, (b'{"name": "x", "user": "{content}"}', b'{"version": 2, "name": "x"}')),
    "chat template": Target(chat, (b"{{ messages[0]['content'] }}", b"{% if messages %}{{ bos_token }}{% endif %}")),
    "adapter": Target(adapter_file("adapter_config.json"), (b"",)),
    "run folder": Target(run_json, (b'{"id": 1}', b'{"files": {"a": "b"}, "sha256": "x"}', b"[]", b"[" * 2000)),
}  # fmt: skip
# Seeds that have to be made first: sound files of the folders above.
FILES: dict[str, Callable[[], bytes]] = {
    "config": lambda: (base() / "config.json").read_bytes(),
    "index": lambda: (base() / "model.safetensors.index.json").read_bytes(),
    "tokenizer settings": lambda: (base() / "tokenizer_config.json").read_bytes(),
    "tokenizer": lambda: (base() / "tokenizer.json").read_bytes(),
    "adapter": lambda: (adapter() / "adapter_config.json").read_bytes(),
}


def seeds(name: str) -> list[bytes]:
    found = [seed for seed in TARGETS[name].seeds if seed]
    return [*found, FILES[name]()] if name in FILES else found
