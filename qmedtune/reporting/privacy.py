"""The privacy section of the reports: which files hold text, what was looked for, what weights may have memorised.

Deliberately does not: read the run folder (privacy.py does), show text of any record, or promise de-identification.
"""

from __future__ import annotations

from qmedtune.reporting.cells import UNKNOWN, Row, Table, exact, shown, size_cell
from qmedtune.reporting.facts import base_name
from qmedtune.results import Privacy, Remembered, Run, Scan
from qmedtune.results.privacy import ERASED, HELD

SCANNED = {
    "report": "looked for and counted, left in place",
    "redact": "looked for and replaced",
    "refuse": "looked for, records that hold them left out",
}
NOT_AUDITED = "not audited: ask with `audit:` in the recipe (docs/audit.md)"


def summary(found: Privacy) -> list[str]:
    """In sentences: whether text is there, and how to be rid of it."""
    told: list[str] = []
    if found.text == ERASED:
        told.append(f"Erased: {exact(found.erased)} files with text were removed ({found.erased_at}).")
        told.append("Weights, figures and seals are as they were: `qmedtune report RUN --verify`.")
    elif found.text == HELD:
        files = sum(each.files for each in found.files)
        told.append(f"{exact(files)} files of this folder hold text of the sources or of the tasks, unencrypted.")
        if found.erased:
            told.append(f"Others were erased before: {exact(found.erased)} files ({found.erased_at}).")
        told.append("To remove them and what lies in .history/ and .building/: `qmedtune erase RUN --text`.")
    else:
        told.append("No sealed step of this folder holds text so far.")
    told.append("Not counted: a page that `qmedtune items` has made since, and what was written elsewhere.")
    return told


def tables(run: Run, found: Privacy) -> list[Table]:
    return [files(found), scanned(found), memorised(found), terms(run, found)]


def files(found: Privacy) -> Table:
    rows: list[Row] = []
    for each in found.files:
        whose = ", ".join(each.sources) or "the tasks"
        rows.append((each.folder, exact(each.files), size_cell(each.bytes), whose))
    return Table("Files with text", ("Folder", "Files", "Size", "Text of"), rows).or_say("None.")


def scanned(found: Privacy) -> Table:
    rows: list[Row] = []
    for each in found.scanned:
        rows.append((each.source, each.kind or UNKNOWN, _looked_for(each), *_counts(each)))
    note = "A program misses some of them: this is no de-identification under HIPAA, Safe Harbor or otherwise."
    columns = ("Source", "Kind", "Identifiers", "Records with some", "Found", "By class")
    return Table("Searched for identifiers", columns, rows, note).or_say("No data was read.")


def _looked_for(scan: Scan) -> str:
    if scan.mode is None:
        return "not looked for"
    return SCANNED.get(scan.mode, scan.mode)


def _counts(scan: Scan) -> Row:
    if scan.mode is None:
        return UNKNOWN, UNKNOWN, UNKNOWN
    classes = ", ".join(f"{kind} {number:,}" for kind, number in scan.classes.items())
    return exact(scan.records), exact(scan.identifiers), classes or UNKNOWN


def memorised(found: Privacy) -> Table:
    rows: list[Row] = []
    for each in found.memorised:
        rows.append((each.stage, ", ".join(each.clinical) or "none", _audited(each)))
    note = "Weights can repeat the text they were trained on; erasing text from this folder removes nothing from them."
    columns = ("After", "Clinical sources learnt from", "Audit")
    return Table("What weights may have memorised", columns, rows, note).or_say("Nothing was trained.")


def _audited(each: Remembered) -> str:
    if each.canaries is None:
        return NOT_AUDITED
    bits = shown(each.exposure, ".1f")
    return f"{exact(each.extracted)} of {exact(each.canaries)} planted secrets extracted, exposure up to {bits} bits"


def terms(run: Run, found: Privacy) -> Table:
    rows: list[Row] = [(f"base: {base_name(run)}", "its own", "its licence applies to what is made from it")]
    for each in found.terms:
        rows.append((each.of, each.license or "not stated", each.terms or UNKNOWN))
    return Table("Licences and terms", ("Of", "Licence", "Terms"), rows)
