"""Identifiers in headers, read as a grammar: a label, a separator, a value of the form that the label's class has.

Labels (header_labels.py) are noun phrases, of any wording; separators are those of forms, tables, Markdown, JSON, XML and
dotted lines; values end where their field does. A value that has not the form of its class is none: `Date: pending`. What
stands in sentences is no business of this module (persons.py, recognisers.py). Matched is the plain copy (plain.py).
"""

# ruff: noqa: E501, SIM905 (a pattern reads better in one piece, a list of words as words)

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qmedtune.data.hygiene import header_labels as labels
from qmedtune.data.hygiene.anchors import places
from qmedtune.data.hygiene.name_words import TITLE_BEHIND
from qmedtune.data.hygiene.persons import named_field
from qmedtune.data.hygiene.recognisers import ANY_MONTH, MEASURED
from qmedtune.data.hygiene.words import EPONYMS, NEVER, any_never
from qmedtune.data.hygiene.xml_elements import find_elements

Found = tuple[str, int, int]

BACK = 64  # characters before a separator that a label may have
# The label before a colon: words, apart by one space or a mark; what may stand between its end and the colon.
_LABEL = re.compile(
    r"(?<![A-Za-z0-9])(?P<label>(?:[A-Za-z]{1,4}\.[ ]?-?|[A-Za-z#][A-Za-z'#]{0,24}(?:\([es]\))?(?:[ ]?[/&][ ]?|[ ]-[ ]|-|_|[ ])){0,6}[A-Za-z#]+)"
    r"(?:[ ]?\([A-Za-z0-9, /]{1,24}\)|[ ]?[1-9])?[ ]{0,12}[.*_\"'\])]{0,3}[ .]{0,40}$",
    re.A,
)
_LAST_WORD = re.compile(
    r"([A-Za-z]+|#)(?:[ ]?\([A-Za-z0-9, /]{1,24}\)|[ ]?[1-9])?[ ]{0,12}[.*_\"'\])]{0,3}[ .]{0,40}$", re.A
)
# `Name of patient:`, `Date de l'examen :` - the head stands in front.
_HEAD_FIRST = re.compile(r"[ ](?:of|de|du|des|di|del|della|da|do|van|i)[ ]|[ ]d'", re.A)
_CAMEL = re.compile(r"[A-Z]?[a-z]+$|[A-Z]+$", re.A)
# Between a separator and its value: blanks, one line end, marks that open.
_OPEN = re.compile(r"[ *_]{0,40}(?:\n[ ]{0,40})?(?:[\[{]{1,2}[ \n]{0,20})?[\"'*<]{0,3}", re.A)
# Where a field ends at the latest.
_FIELD_END = re.compile(r"\n|[ ]{2}|[|;<>\"\]{}~\t]|[.,]?[ ][A-Z][A-Za-z]{1,15}(?:[ /][A-Za-z]{1,15}){0,2}:|$", re.A)
_DOTS = re.compile(r"\.{3,60}[ ]{0,20}:?[ ]{0,20}")
_BRACKETED = re.compile(r"\[(?P<label>[A-Za-z][A-Za-z.' ]{1,24})\][ ]{0,3}(?=[A-Za-z0-9(+])", re.A)
_CELLS = re.compile(r">(?P<label>[^<>|\n]{2,40})</t[dh]>\s{0,20}<t[dh][^<>]{0,120}>", re.A | re.I)
_MORE = re.compile(r"[ ]?\"[ ]?,[ \n]{0,20}\"")  # to the next of a list in JSON
_JSON_VALUE = re.compile(
    r"\"(?P<label>[A-Za-z][A-Za-z ]{1,40})\"[ \n]{0,20}[}\]]{1,2}[ \n]{0,20},[ \n]{0,20}\"value\"[ ]?:[ ]?\"", re.A
)


@dataclass(frozen=True)
class Field:
    """Where the value of a label begins."""

    label: str
    kinds: frozenset[str]
    start: int
    before: int  # where the label begins
    listed: bool = False  # in a list of JSON: more values may follow


def find(text: str, lowered: str) -> Iterator[Found]:
    """(class, start, end) of labelled values in a plain copy; `lowered`: its lower case with every digit written 0."""
    for field in _fields(text, lowered):
        yield from _values(text, field)
    if "</" in text or "/>" in text:
        yield from find_elements(text)
    yield from _tables(text, lowered)
    yield from _headed(text)


# ---- where labels stand ----------------------------------------------------------------------------------------------


def _fields(text: str, lowered: str) -> Iterator[Field]:
    for place in places((":", "="), lowered):
        if field := _before(text, place, place + 1):
            yield field
    if "..." in text:
        for dots in _DOTS.finditer(text):
            if field := _before(text, dots.start(), dots.end()):
                yield field
    if "|" in text:
        yield from _piped(text)
    if "] " in text:
        for match in _BRACKETED.finditer(text):
            yield from _field(match["label"], match.end(), match.start())
    if "</t" in lowered:
        for match in _CELLS.finditer(text):
            yield from _field(match["label"].strip(), match.end(), match.start())
    if '"value"' in text:
        for match in _JSON_VALUE.finditer(text):
            yield from _field(match["label"], match.end(), match.start())


def _field(label: str, start: int, before: int) -> Iterator[Field]:
    if kinds := labels.classes(label):
        yield Field(label, kinds, start, before)


def _before(text: str, place: int, behind: int) -> Field | None:
    """The field whose separator stands at text[place:behind]; None where no label of an identifier stands before it."""
    back = max(0, place - BACK)
    last = _LAST_WORD.search(text, max(0, place - 24), place)
    if last is None:
        return None
    word = last[1].lower()
    headed = word in labels.ENDS or (word in labels.QUOTED and text[place - 1] == '"') or _ends_known(last[1])
    if not headed and not _HEAD_FIRST.search(text, back, place):
        return None
    match = _LABEL.search(text, back, place)
    if match is None:
        return None
    kinds = labels.classes(match["label"])
    if text[place - 1] == '"':
        kinds = labels.QUOTED.get(match["label"].lower(), kinds)
    if not kinds:
        return None
    opened = _OPEN.match(text, behind)
    start = opened.end() if opened else behind
    return Field(match["label"], kinds, start, match.start(), listed="[" in text[behind:start])


def _ends_known(word: str) -> bool:
    """Of `patientLastName` the last word."""
    match = _CAMEL.search(word)
    return bool(match) and match[0].lower() in labels.ENDS


def _piped(text: str) -> Iterator[Field]:
    """Cells of rows between pipes: each that is a label, with the cell behind it."""
    at = text.find("|")
    line = -1  # where the line of `at` ends: looked for once a line, not once a pipe (quadratic in one long line)
    while at >= 0:
        stop = text.find("|", at + 1)
        if stop < 0:
            return
        if line <= at:
            line = text.find("\n", at + 1)
            if line < 0:
                line = len(text)
        if stop < line:
            cell = text[at + 1 : stop].strip(" *")
            if 1 < len(cell) <= 40 and cell[0].isalpha() and (kinds := labels.classes(cell)):
                start = stop + 1
                while start < len(text) and text[start] in " *":
                    start += 1
                yield Field(cell, kinds, start, at)
        at = stop


# ---- values by class ---------------------------------------------------------------------------------------------------

_MON = rf"(?:{ANY_MONTH}|ene|abr|ago|dic|gen|mag|giu|lug|set|ott|fev|avr|mai|out|dez|okt|mrz|janv|juil)"
_DATE = re.compile(
    r"(?i:(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|satur|sat|sun)(?:day)?\.?,?[ ]{1,3}|den[ ]|le[ ]|el[ ]|il[ ])?"
    r"(?P<value>(?:1[89]|2[01])\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:\d{4}(?:\d{2})?)?(?:[+-]\d{4})?"
    r"|(?:0[1-9]|[12]\d|3[01])(?:0[1-9]|[12]\d|3[01])(?:1[89]|2[01])\d\d"
    r"|\d{1,2}[ ]?[./-][ ]?\d{1,2}[ ]?[./-][ ]?(?:\d{4}|\d{2})"
    r"|\d{4}[ ]?[./-][ ]?\d{1,2}[ ]?[./-][ ]?\d{1,2}(?:T\d{2}:?\d{2}(?::?\d{2})?(?:\.\d{1,6})?(?:Z|[+-]\d{2}:?\d{2})?)?"
    rf"|\d{{1,2}}(?:st|nd|rd|th|er|\.)?[ ]?[ ./-]?[ ]?(?:de[ ]|of[ ])?{_MON}\.?[ ]?[ ,./-]?[ ]?(?:del?[ ])?(?:\d{{4}}|'?\d{{2}})"
    rf"|{_MON}\.?[ ]{{0,2}}\d{{1,2}}(?:st|nd|rd|th)?,?[ ]{{0,2}}(?:\d{{4}}|'?\d{{2}}(?!:))"
    rf"|{_MON}\.?,?[ /-]?\d{{4}}"
    r"|(?:0?[1-9]|1[0-2])/\d{4}))(?![A-Za-z0-9]|/\d|[.]\d)",
    re.A,
)
_SHORT_DATE = re.compile(r"(?P<value>\d{6}|\d{1,2}/\d{1,2})(?![A-Za-z0-9/.-])", re.A)
_DATED = re.compile(r"(?i:date|dob|doa|dod|dos|birth|fecha|datum|geb|dt)", re.A)
_DECIMAL = re.compile(r"\d{1,4}\.\d{1,2}(?:[ ]?[/-][ ]?\d{1,4}(?:\.\d{1,2})?)*$|\d\.\d\d?[/ ,]", re.A)
_PHONE = re.compile(
    r"(?P<value>[+(]{0,2}[ ]?\d(?:[ ()./-]{0,3}\d){5,15}(?:[ ,]{0,2}(?i:x|ext\.?|poste|durchwahl|int\.?)[ ]?\d{1,6})?)(?![A-Za-z0-9]|[./-]\d)",
    re.A,
)
_SHORT_PHONE = re.compile(r"\#?(?P<value>\d(?:-?\d){2,6})(?![A-Za-z0-9]|[./]\d)", re.A)
# One token of letters and digits; or groups, the first of which is short, with a digit in each later one.
_SINGLE = re.compile(r"\#?[ ]?(?P<value>[A-Za-z0-9](?:[A-Za-z0-9]|[./\\_-](?=[A-Za-z0-9])){0,38})(?![A-Za-z0-9])", re.A)
_GROUPED = re.compile(
    r"(?P<value>[A-Z0-9]{1,5}(?:[ .-][A-Z]{0,3}\d{1,12}[A-Z]?){1,7}(?:[ ][A-Z]{1,2}(?=[ ]{2}|$|[\n.,;|]))?)(?![A-Za-z0-9/]|[.,]\d)",
    re.A,
)
_CHECK_DIGIT = re.compile(r"[ ]\d(?=[ ]?(?:[.;|]?\n|[ ]{2}|[.;|]?$))", re.A)
_RANGE = re.compile(r"\d{1,5}(?:\.\d+)?[ ]?-[ ]?\d{1,5}(?:\.\d+)?$", re.A)
_DATE_LIKE = re.compile(r"\d{1,2}[/.-]\d{1,2}[/.-]\d{2,4}$|\d{4}-\d{2}-\d{2}$", re.A)
_POSTCODE = re.compile(
    r"(?P<value>(?:[A-Z]{1,2}-)?\d{4,6}(?:-\d{3,4})?|\d{3}[ ]\d{2}|[A-Z]{1,2}\d[A-Z0-9]?[ ]?\d[A-Z]{2}|[A-Z]\d[A-Z][ -]?\d[A-Z]\d|\d{4}[ ][A-Z]{2})(?![A-Za-z0-9]|[.,/]\d)",
    re.A,
)
_STREET = re.compile(r"(?:calle|c/|av|plaza|paseo|rue|via|rua|ul|str)", re.A)
_TOWN = re.compile(
    r"(?P<value>[A-Z][A-Za-z'.-]{0,24}(?:[ ](?:[a-z]{1,3}[ ])?[A-Z][A-Za-z'.-]{1,24}){0,3})(?![A-Za-z0-9])", re.A
)
_TOWN_FIELD = re.compile(r"(?P<value>[A-Z][A-Za-z' -]{1,40}[A-Za-z])(?=[ ]?(?:[.,;|\n(/]|[ ]{2}|$))", re.A)
_AND = re.compile(r"(?:[ ]{0,2}[/&][ ]{0,2}|[ ]{0,2}(?:;|and|und|et|y|e|or)[ ]{1,2})(?=[A-Z0-9+(])", re.A)
_OLD = re.compile(r"(?P<value>9\d|1[0-2]\d)(?!\d|[.,]\d|/\d|%|[ ]?(?:kg|lb|bpm|mg))", re.A)
_HAS_LETTER = re.compile(r"[A-Za-z]", re.A)
STREET_LENGTH = 100


def _values(text: str, field: Field) -> Iterator[Found]:
    """The identifiers that begin at the value's place. Of several classes the first whose form the value has."""
    found = list(_of_first(text, field))
    yield from found
    if not found:
        return
    if found[0][0] in (labels.PHONE, "fax"):
        yield from _further(text, field, found[0])
    end = found[-1][2]
    while field.listed and (more := _MORE.match(text, end)):  # "given": ["Jane", "Ann"]
        following = list(_of_first(text, replace(field, start=more.end())))
        if not following:
            return
        yield from following
        end = following[-1][2]


def _further(text: str, field: Field, place: Found) -> Iterator[Found]:
    """More numbers in one field: `Tel. 956 013 059 y 956 013 060`."""
    kind, _, end = place
    for _ in range(6):
        link = _AND.match(text, end)
        if link is None:
            return
        following = next(_of_first(text, replace(field, start=link.end())), None)
        if following is None or following[0] != kind or following[1] != link.end():
            return
        yield following
        end = following[2]


def _of_first(text: str, field: Field) -> Iterator[Found]:
    kinds, start = field.kinds, field.start
    if labels.DATE in kinds:
        match = _DATE.match(text, start)
        if match is None and _DATED.search(field.label):
            match = _SHORT_DATE.match(text, start)
        if match:
            yield labels.DATE, *match.span("value")
            return
    if labels.AGE in kinds and (match := _OLD.match(text, start)):
        yield labels.AGE, *match.span("value")
        return
    if labels.PHONE in kinds:
        match = _PHONE.match(text, start)
        if match is None and labels.SHORT_NUMBERS.intersection(field.label.lower().split()):
            match = _SHORT_PHONE.match(text, start)
        if match and _is_phone(field.label, match["value"]):
            yield "fax" if "fax" in field.label.lower() else labels.PHONE, *match.span("value")
            return
    if labels.ZIP in kinds and (match := _POSTCODE.match(text, start)):
        yield labels.ZIP, *match.span("value")
        return
    for kind in sorted(kinds & labels.NUMBERS):
        if end := _number_end(text, field, start):
            begin = start + (text[start] == "#")
            yield kind, begin, end
            return
    about = field.label.lower().split()[-1:]
    if about and about[0] in labels.SUBJECTS and not TITLE_BEHIND.match(text, start):
        return
    if labels.NAME in kinds or labels.PERSON in kinds:
        names = named_field(text, field.label, (field.before, start), named=labels.NAME in kinds)
        for place in names:
            yield labels.NAME, *place
        if names:
            return
    if labels.ADDRESS in kinds and (end := _street_end(text, start)):
        yield labels.ADDRESS, start, end
        return
    if (
        labels.CITY in kinds
        and (match := _TOWN_FIELD.match(text, start) or _TOWN.match(text, start))
        and not any_never(match["value"])
    ):
        yield labels.ADDRESS, *match.span("value")
        return
    if labels.PLACE in kinds and (end := _place_end(text, start)):
        yield labels.PLACE, start, end


def _is_phone(label: str, value: str) -> bool:
    if _DATE_LIKE.match(value) or _DECIMAL.match(value):
        return False
    # `Cell: 1000000` counts cells; a number without its area code has a mark inside, `555-0143`.
    return not (labels.may_be_cells(label) and value.isdigit() and len(value) < 10)


def _number_end(text: str, field: Field, start: int) -> int | None:
    """Where a number of record, account, insurance begins at `start`: its end, or None."""
    match = _GROUPED.match(text, start) or _SINGLE.match(text, start)
    if match is None or _DATE_LIKE.match(match["value"]):
        return None
    value = match["value"]
    digits = sum(c.isdigit() for c in value)
    mixed = bool(_HAS_LETTER.search(value))
    weak = labels.is_weak(field.label) or labels.OTHER in field.kinds
    enough = digits >= (5 if weak else 4) or (mixed and digits >= 3 and len(value) >= 5 and not weak)
    if labels.needs_long(field.label) and not mixed and value[0] != "0":  # no count begins with a zero
        enough = digits >= 7
    measured = _DECIMAL.match(value) or MEASURED.match(text[match.end() : match.end() + 16])
    if not enough or measured or (weak and _RANGE.match(value)):  # `Ref: 135-145`
        return None
    if value.isdigit() and (check := _CHECK_DIGIT.match(text, match.end())):
        return check.end()
    return match.end()


def _street_end(text: str, start: int) -> int | None:
    """Where an address of one line ends, None where what stands there is none: it has a number, or begins with capitals."""
    end = _FIELD_END.search(text, start, min(len(text), start + STREET_LENGTH))
    stop = end.start() if end else min(len(text), start + STREET_LENGTH)
    value = text[start:stop].rstrip(" .,")
    if len(value) < 4 or not _HAS_LETTER.search(value) or not any(c.isdigit() for c in value):
        return None
    if not (value[0].isdigit() or value[0].isupper() or _STREET.match(value)) or MEASURED.match(
        value.lstrip("0123456789.")
    ):
        return None
    return start + len(value)


# What is told of a stay, behind `Hospital:`, and stands in no place's name.
_OF_A_STAY = frozenset(
    """course stay complicated uneventful unremarkable acquired guidelines problem problems discharged admitted transferred
    required""".split()
)


def _place_end(text: str, start: int) -> int | None:
    end = _FIELD_END.search(text, start, min(len(text), start + 60))
    value = text[start : end.start() if end else start + 60].rstrip(" .,")
    words = value.split()
    if not 2 <= len(words) <= 7 or not value[:1].isupper() or any(c.isdigit() for c in value):
        return None
    if any(word.lower().strip(".,'") in _OF_A_STAY for word in words):
        return None
    named = [word for word in words if word[:1].isupper() and word.lower().strip(".,'") not in NEVER]
    if not named or sum(word[:1].islower() for word in words) > 2:
        return None
    return start + len(value)


# ---- lines that begin with a name ----------------------------------------------------------------------------------

_NAMED = (
    r"[A-Z][A-Za-z'-]{1,30}(?:[ -][A-Z][A-Za-z'-]{1,30})?,[ ]?[A-Z][A-Za-z'-]{0,30}(?:[ ][A-Z][A-Za-z'-]{0,30}\.?){0,2}"
)
# Behind it stands what only a person has: a record number, a birthday, age and sex.
_HEADED = re.compile(
    rf"[ ]{{0,8}}(?P<value>{_NAMED}"
    r"|[A-Z][A-Za-z'-]{1,30}(?:[ ][A-Z]\.?)?[ ][A-Z][A-Za-z'-]{1,30}(?:[ ][A-Z][A-Za-z'-]{1,30})?)"
    r"(?=[ ]{0,20}[;,|-]?[ ]{0,20}\(?[ ]?(?:(?i:mr[ ]?\#|mrn|dob|d\.o\.b|medical record|nhs|ssn|hosp|date of birth|born[ ]|geb)"
    r"|(?P<number>\#[ ]?\d{4,12}|\d{3}-\d{2}-\d{4}|\d{3,}-\d{2,}-\d[\d-]{0,8}|\d{6,10}(?![\d.%]))"
    r"|(?:1[01]\d|\d{1,2})[ ]?(?:y/?o|yo|yrs?|year|Y|M|F)[ ,/)]|(?:1[01]\d|\d{1,2})[MF](?![A-Za-z0-9])))",
    re.A,
)
# A cell in capitals between columns, before the next label.
_CELL_NAME = re.compile(
    r"(?P<value>[A-Z][A-Z'-]{1,30},[ ]?[A-Z][A-Z'-]{1,30}(?:[ ][A-Z]\.?)?)(?=[ ]{2,40}[A-Z][A-Za-z. ]{1,20}[:#])",
    re.A,
)
_GAP = re.compile(r"[ ]{2,60}|\n", re.A)


def _headed(text: str) -> Iterator[Found]:
    """Names that begin a line of a label, a wristband or a list, and the number behind them."""
    for place in (0, *(at + 1 for at in places(("\n",), text))):
        if match := _HEADED.match(text, place):
            yield from _person(match)
    for gap in _GAP.finditer(text):
        if match := _CELL_NAME.match(text, gap.end()):
            yield from _person(match)


def _person(match: re.Match[str]) -> Iterator[Found]:
    words = re.split(r"[, ]+", match["value"])
    if any(word.lower().strip(".") in NEVER or word.lower() in EPONYMS for word in words):
        return
    yield labels.NAME, *match.span("value")
    if match.groupdict().get("number"):
        yield labels.MRN, *match.span("number")


# ---- tables with a row of labels ---------------------------------------------------------------------------------------

_HEADINGS = ("dob", "mrn", "name", "birth", "nombre", "ssn", "geburt")
_SEPARATORS = (re.compile(r"[ ]*\|[ ]*"), re.compile(r"[ ]*,[ ]*"), re.compile(r"[ ]{2,}"))
MAX_ROWS = 200


def _tables(text: str, lowered: str) -> Iterator[Found]:
    """Cells below a row of at least two labels, which are apart by commas, pipes or several spaces."""
    done = 0
    for place in places(_HEADINGS, lowered):
        if place < done:
            continue
        start = text.rfind("\n", 0, place) + 1
        end = text.find("\n", place)
        if end < 0:
            return
        done = end
        heading = text[start:end]
        if ":" in heading or len(heading) > 300:
            continue
        for separator in _SEPARATORS:
            columns = _columns(heading, separator)
            if columns:
                rows = list(_row_places(text, end + 1, columns, separator))
                for at, stop in rows:
                    yield from _row(text, (at, stop), columns, separator)
                    done = stop  # a row of labels below is a row of this table
                break


def _columns(heading: str, separator: re.Pattern[str]) -> list[frozenset[str]]:
    """The classes of the cells of a row of labels; none where it is no such row."""
    cells = separator.split(heading.strip(" |"))
    if len(cells) < 2:
        return []
    found, known = [], 0
    for cell in cells:
        if any(c.isdigit() for c in cell) or len(cell) > 40:
            return []
        kinds = labels.classes(cell) if cell else frozenset()
        known += bool(kinds)
        found.append(kinds)
    return found if known >= 2 else []


def _row_places(
    text: str, at: int, columns: list[frozenset[str]], separator: re.Pattern[str]
) -> Iterator[tuple[int, int]]:
    """The lines of a table, to an empty one, or to one that has not its commas."""
    for _ in range(MAX_ROWS):
        end = text.find("\n", at)
        if end < 0:
            end = len(text)
        row = text[at:end]
        if not row.strip() or ("," in row and len(separator.split(row.strip(" |"))) < len(columns)):
            return
        yield at, end
        if end == len(text):
            return
        at = end + 1


def _row(
    text: str, place: tuple[int, int], columns: list[frozenset[str]], separator: re.Pattern[str]
) -> Iterator[Found]:
    at, end = place
    cells = list(_cells(text[at:end], separator))
    if len(cells) != len(columns):
        return
    for (start, stop), kinds in zip(cells, columns, strict=True):
        if kinds and stop > start:
            yield from _cell(text, (at + start, at + stop), kinds)


def _cells(row: str, separator: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    start = len(row) - len(row.lstrip(" |"))
    stop = len(row.rstrip(" |"))
    for match in separator.finditer(row, start, stop):
        yield start, match.start()
        start = match.end()
    yield start, stop


def _cell(text: str, place: tuple[int, int], kinds: frozenset[str]) -> Iterator[Found]:
    start, stop = place
    value = text[start:stop]
    found = list(_of_first(value, Field("", kinds, 0, 0)))
    for kind, begin, end in found:
        yield kind, start + begin, start + end
    if found:
        return
    if kinds & {labels.NAME} and value[:1].isupper() and not any_never(value):
        yield labels.NAME, start, stop
