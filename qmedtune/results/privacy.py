"""What a run holds and has done of its sources' text: `privacy` of run.json."""

from __future__ import annotations

from qmedtune.results.typed import Facts

HELD, ERASED, NONE = "held", "erased", "none"


class TextFolder(Facts):
    """Files of one sealed folder that hold text, or tokens that a tokenizer turns back. sources: whose; none: of the
    tasks."""

    folder: str
    files: int
    bytes: int
    sources: list[str] = []


class Scan(Facts):
    """What was looked for in a source. mode: report, redact or refuse; None: nothing was."""

    source: str
    kind: str | None = None
    mode: str | None = None
    records: int = 0
    identifiers: int = 0
    classes: dict[str, int] = {}


class Remembered(Facts):
    """What the adapter or head of a stage may have memorised. canaries, extracted: of the audit; None: not audited."""

    stage: str
    clinical: list[str] = []
    canaries: int | None = None
    extracted: int | None = None
    exposure: int | float | None = None


class Terms(Facts):
    """What applies to a source, as the recipe states it, or to the base."""

    of: str
    license: str | None = None
    terms: str | None = None


class Privacy(Facts):
    """The privacy section of run.json.

    text: held, erased (by `qmedtune erase`), or none. erased: so many files, at that time.
    """

    text: str
    files: list[TextFolder] = []
    scanned: list[Scan] = []
    memorised: list[Remembered] = []
    terms: list[Terms] = []
    erased: int | None = None
    erased_at: str | None = None
