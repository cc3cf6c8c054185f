"""Hostile data files and recipes: bombs, paths that leave, names that are no text, values that mean something else.

`Input.make` writes files below a folder and may return what `data.notes` says; `recipe` is a whole recipe in its place.
`read` marks what may be read, or passed over and counted, in bounded time and memory; all else must be refused.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from pyarrow import parquet

NOTE = {"text": "The owl was seen in clinic and is well. " * 20}
LINE = json.dumps(NOTE).encode() + b"\n"
MEBI = 1 << 20
RECIPE = """\
name: attacked
model: {{base: builtin:micro}}
data: {{notes: {{path: {path}, kind: literature{more}}}}}
stages: [{{cpt: {{mix: {{notes: 1}}, tokens: 2000}}}}]
evaluate: {{tasks: []}}
"""


@dataclass(frozen=True)
class Input:
    group: str
    name: str
    make: Callable[[Path], object]
    path: str = "notes.jsonl"
    more: str = ""
    recipe: str | None = None
    read: bool = False

    @property
    def folder(self) -> str:
        return f"{self.group}-{self.name}".replace(" ", "_")

    def text(self) -> str:
        return self.recipe if self.recipe is not None else RECIPE.format(path=json.dumps(self.path), more=self.more)


def file(name: str, content: bytes) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        path = os.fsencode(folder) + b"/" + os.fsencode(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as out:
            out.write(content)

    return make


def nothing(folder: Path) -> None:
    pass


def packed(size: int) -> bytes:
    """A gzip of so many MiB of one letter, without holding them."""
    held = io.BytesIO()
    with gzip.open(held, "wb", compresslevel=1) as out:
        for _ in range(size):
            out.write(b"a" * MEBI)
    return held.getvalue()


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as archive:
        for member, content in members:
            member.size = max(member.size, len(content))
            archive.addfile(member, io.BytesIO(content + bytes(member.size - len(content))))
    return held.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.size = kind, target, size
    return found


def zipped(name: str, content: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return held.getvalue()


def repeated(folder: Path) -> None:
    """One long text, 500 times: a Parquet file of some kB that is 4 GB unpacked."""
    texts = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 500, pyarrow.int32()), pyarrow.array(["a" * (9 * MEBI)])
    )
    parquet.write_table(pyarrow.table({"text": texts}), folder / "notes.parquet", compression="zstd")


def as_parquet(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        path = folder / "notes.parquet"
        parquet.write_table(pyarrow.table({"text": [NOTE["text"]] * 50}), path)
        path.write_bytes(change(path.read_bytes()))

    return make


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "notes.jsonl")


def circle(folder: Path) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "again").symlink_to("..")
    (folder / "notes" / "a.jsonl").write_bytes(LINE * 50)


def entities() -> str:
    """Each is ten of the one before it."""
    made = ['<!ENTITY e0 "owl">']
    for number in range(1, 12):
        made.append(f'<!ENTITY e{number} "{f"&e{number - 1};" * 10}">')
    return "".join(made)


def article(declared: str, text: str) -> str:
    head = f'<?xml version="1.0"?><!DOCTYPE article [{declared}]>'
    return f"{head}<article><front><article-meta/></front><body><p>{text}</p></body></article>"


LAUGHS = article(entities(), "&e11;")
OUTSIDE = article('<!ENTITY x SYSTEM "file:///etc/passwd">', "&x;")
REMOTE = OUTSIDE.replace("file:///etc/passwd", "http://evil.example/x")
ARTICLE = b"<article><front><article-meta/></front><body><p>" + NOTE["text"].encode() + b"</p></body></article>"


def recipe(name: str, text: str) -> Input:
    return Input("recipe", name, file("notes.jsonl", LINE * 50), recipe=text)


def with_value(name: str, key: str, value: str) -> Input:
    """The recipe with one more line."""
    return recipe(name, RECIPE.format(path='"notes.jsonl"', more="") + f"{key}: {value}\n")


GOOD = RECIPE.format(path='"notes.jsonl"', more="")
COLOURED = json.dumps({"text": "\x1b[31m owl " * 50}).encode() + b"\n"
SHEET = zipped("xl/worksheets/sheet1.xml", b"a" * (300 * MEBI))
INPUTS: tuple[Input, ...] = (
    # JSON and JSON lines
    Input("json", "deep", file("notes.jsonl", b"[" * 10**6 + b"\n" + LINE)),
    Input("json", "deep and whole", file("notes.jsonl", b"[" * 10**5 + b"]" * 10**5 + b"\n")),
    Input("json", "deep in an object", file("notes.json", b'{"a":' * 10**6), path="notes.json"),
    Input("json", "a number of a million digits", file("notes.jsonl", b'{"text": ' + b"9" * 10**6 + b"}\n")),
    Input("json", "a number beyond all", file("notes.jsonl", b'{"text": 1e99999999}\n')),
    Input("json", "one endless line", file("notes.jsonl", b'{"text": "' + b"a" * (20 * MEBI))),
    Input("json", "zero bytes", file("notes.jsonl", bytes(MEBI))),
    Input("json", "half a surrogate", file("notes.jsonl", b'{"text": "\\ud800 owl"}\n' * 50), read=True),
    Input("json", "no UTF-8", file("notes.jsonl", b"\xff\xfe\xff" * 100)),
    Input("json", "controls in the text", file("notes.jsonl", COLOURED),
          read=True),
    Input("json", "keys of a class", file("notes.jsonl", b'{"__class__": "os.system", "text": ["touch OWNED"]}\n'),
          read=True),
    # tables
    Input("table", "a field without end", file("notes.csv", b'text\n"' + b"a" * (20 * MEBI)), path="notes.csv"),
    Input("table", "a million columns", file("notes.csv", b"a," * 10**6 + b"text\n"), path="notes.csv"),
    Input("table", "one name for all columns", file("notes.csv", b"text,text\n1,2\n"), path="notes.csv"),
    Input("table", "no text in it", file("notes.csv", bytes(range(256)) * 64), path="notes.csv"),
    Input("table", "a formula", file("notes.csv", b"text\n=cmd|'/c calc'!A0 and the owl is well\n" * 50),
          path="notes.csv", read=True),
    Input("table", "a sheet that is none", file("notes.xlsx", b"PK\x03\x04" + bytes(100)), path="notes.xlsx"),
    Input("table", "a sheet that is a bomb", file("notes.xlsx", SHEET),
          path="notes.xlsx"),
    # XML
    Input("xml", "a billion laughs", file("notes.nxml", LAUGHS.encode()), path="notes.nxml"),
    Input("xml", "a file of the machine", file("notes.nxml", OUTSIDE.encode()), path="notes.nxml", read=True),
    Input("xml", "a file of the web", file("notes.nxml", REMOTE.encode()), path="notes.nxml", read=True),
    Input("xml", "deep", file("notes.nxml", b"<article>" + b"<sec>" * 10**5), path="notes.nxml"),
    Input("xml", "no root", file("notes.nxml", b"<?xml version='1.0'?>"), path="notes.nxml"),
    Input("xml", "an attribute of 20 MB", file("notes.nxml", b'<article a="' + b"x" * (20 * MEBI) + b'"/>'),
          path="notes.nxml"),
    # archives
    Input("archive", "a gzip of a gigabyte", file("notes.jsonl.gz", packed(1024)), path="notes.jsonl.gz"),
    Input("archive", "a gzip that is none", file("notes.jsonl.gz", b"\x1f\x8b" + bytes(50)), path="notes.jsonl.gz"),
    Input("archive", "a gzip that is cut", file("notes.jsonl.gz", gzip.compress(LINE * 50)[:-9]), path="notes.jsonl.gz",
          read=True),
    Input("archive", "a member of 300 MiB", file("notes.tar.gz", tar((member("a.nxml", size=300 * MEBI), b"<a"))),
          path="notes.tar.gz"),
    Input("archive", "members that leave", file("notes.tar.gz", tar((member("../../a.nxml"), ARTICLE),
          (member("/etc/a.nxml"), ARTICLE))), path="notes.tar.gz", read=True),
    Input("archive", "links and devices", file("notes.tar.gz", tar(
          (member("a.nxml", tarfile.SYMTYPE, "/etc/passwd"), b""),
          (member("b.nxml", tarfile.LNKTYPE, "/etc/passwd"), b""), (member("c.nxml", tarfile.CHRTYPE), b""),
          (member("d.nxml", tarfile.FIFOTYPE), b""))), path="notes.tar.gz"),
    Input("archive", "a tar that is none", file("notes.tar.gz", gzip.compress(b"owl" * 1000)), path="notes.tar.gz"),
    Input("archive", "a zip of 300 MiB", file("notes.zip", zipped("a.jsonl", b"a" * (300 * MEBI))), path="notes.zip"),
    Input("archive", "a zip that leaves", file("notes.zip", zipped("../../a.jsonl", LINE * 50)), path="notes.zip",
          read=True),
    Input("archive", "a zip in a zip", file("notes.zip", zipped("a.zip", zipped("a.jsonl", LINE * 50))),
          path="notes.zip"),
    Input("archive", "a zip that is none", file("notes.zip", b"PK\x05\x06" + b"\xff" * 18), path="notes.zip"),
    # Parquet
    Input("parquet", "one text without end", repeated, path="notes.parquet", more=", max_records: 100"),
    Input("parquet", "no footer", as_parquet(lambda raw: raw[:-20]), path="notes.parquet"),
    Input("parquet", "a giant footer", as_parquet(lambda raw: raw[:-8] + b"\xff\xff\xff\x7f" + raw[-4:]),
          path="notes.parquet"),
    Input("parquet", "noise for pages", as_parquet(lambda raw: raw[:4] + b"\xaa" * 200 + raw[204:]),
          path="notes.parquet"),
    Input("parquet", "a pickle", file("notes.parquet", b"\x80\x04cposix\nsystem\n."), path="notes.parquet"),
    # documents
    Input("document", "a PDF that is none", file("notes.pdf", b"%PDF-1.7\n" + b"\xff" * 1000), path="notes.pdf"),
    Input("document", "a PDF that leads to itself", file("notes.pdf",
          b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 1 0 R/Kids[1 0 R]/Count 9>>endobj\ntrailer<</Root 1 0 R>>\n"),
          path="notes.pdf"),
    Input("document", "a letter that is a bomb", file("notes.docx", zipped("word/document.xml", b"a" * (300 * MEBI))),
          path="notes.docx"),
    # places
    Input("place", "a pipe", pipe),
    Input("place", "a device", nothing, path="/dev/zero", more=", format: text"),
    Input("place", "random bytes without end", nothing, path="/dev/urandom", more=", format: jsonl"),
    Input("place", "the terminal", nothing, path="/dev/stdin", more=", format: jsonl"),
    Input("place", "the process", nothing, path="/proc/self/environ", more=", format: text"),
    Input("place", "a circle of folders", circle, path="notes/**/*.jsonl", read=True),
    Input("place", "a folder", lambda folder: (folder / "notes.jsonl").mkdir()),
    Input("place", "a link to nothing", lambda folder: (folder / "notes.jsonl").symlink_to("/nowhere")),
    Input("place", "a name that is no text", file("n\udcff.jsonl", LINE * 50), path="*.jsonl", read=True),
    Input("place", "a name in colours", file("\x1b[31mred.jsonl", LINE * 50), path="*.jsonl", read=True),
    Input("place", "a name of two lines", file("a\nb.jsonl", LINE * 50), path="*.jsonl", read=True),
    Input("place", "a name too long", nothing, path="a" * 5000),
    Input("place", "a zero byte", nothing, path="a\0b.jsonl"),
    Input("place", "a home of nobody", nothing, path="~nobody-at-all/notes.jsonl"),
    # recipes
    recipe("a call", GOOD.replace("attacked", "!!python/object/apply:os.system ['touch OWNED']")),
    recipe("a tag of its own", GOOD.replace("attacked", "!evil x")),
    recipe("anchors that double", "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(30)) + GOOD),
    recipe("merged keys", GOOD + "<<: {name: other}\n"),
    recipe("twice the same key", GOOD + "name: other\n"),
    recipe("two documents", GOOD + "---\n" + GOOD),
    recipe("deep", "a: " + "[" * 10**5),
    recipe("twenty thousand unknown keys", GOOD + "".join(f"key{n}: {n}\n" for n in range(10_000))),
    recipe("a key of 200 kB", GOOD + f"{'a' * 200_000}: 1\n"),
    recipe("a megabyte", GOOD + "# " + "a" * MEBI + "\n"),
    recipe("a number without end", GOOD.replace("2000", "9" * 5000)),
    recipe("not a number", GOOD.replace("2000", ".nan")),
    recipe("colours in a key", GOOD + '"\\e[31mred": 1\n'),
    recipe("a secret in a path", GOOD.replace("notes.jsonl", "${AWS_SECRET_ACCESS_KEY}/x.jsonl")),
    recipe("a name that leaves", GOOD.replace("attacked", "../../etc/x")),
    recipe("a source that leaves", GOOD.replace("notes: {path", '"../x": {path')),
    recipe("a template that is a path", GOOD.replace("kind: literature", "kind: instructions, template: /etc/passwd")),
    recipe("a tracker that is a module", GOOD + "track: os.system\n"),
    with_value("a seed in words", "seed", "__import__('os')"),
    with_value("a list for a model", "adapter", "[1, 2]"),
    with_value("an unknown stage", "validate", "{on: [stranger]}"),
    recipe("no text", "\ufffe\x00"),
    recipe("nothing", ""),
    recipe("a list", "- a\n- b\n"),
)  # fmt: skip
