"""Identifiers in messages between hospitals that stand in text: HL7 version 2, ANSI X12, listings of DICOM headers.

There a value's place says what it is. Sources: HL7 2.5.1 chapters 2.A (types), 3 (PID, NK1, PV1, MRG), 4 (ORC, OBR), 6
(GT1, IN1, IN2); X12 005010X222 (NM1, N3, N4, DMG, REF, CLM, DTP, PER); DICOM PS3.6 and PS3.15 annex E (which attributes
identify). A segment that is cut or has other separators is left to the patterns of its parts.
"""

# ruff: noqa: E501 (a row of a table reads better in one piece)

from __future__ import annotations

import re
from collections.abc import Iterator

Found = tuple[str, int, int]

# ---- HL7 version 2 -------------------------------------------------------------------------------------------------
# Types of fields: XPN a person's name, XCN an identifier and a name, XAD an address, XTN a phone number, CX an identifier,
# TS a time. By segment: number of the field, its type, the class of its number.
_STAFF = ("XCN", "license")
_TIME = ("TS", "date")
_HL7: dict[str, dict[int, tuple[str, str]]] = {
    "MSH": {7: _TIME},
    "EVN": {2: _TIME, 3: _TIME, 5: _STAFF, 6: _TIME},
    "PID": {
        2: ("CX", "mrn"), 3: ("CX", "mrn"), 4: ("CX", "mrn"), 5: ("XPN", "name"), 6: ("XPN", "name"), 7: _TIME,
        9: ("XPN", "name"), 11: ("XAD", "address"), 12: ("XAD", "address"), 13: ("XTN", "phone"), 14: ("XTN", "phone"),
        18: ("CX", "account"), 19: ("CX", "ssn"), 20: ("CX", "license"), 21: ("CX", "mrn"), 23: ("XAD", "address"),
        29: _TIME,
    },
    "PD1": {3: ("XON", "hospital"), 4: _STAFF},
    "NK1": {
        2: ("XPN", "name"), 4: ("XAD", "address"), 5: ("XTN", "phone"), 6: ("XTN", "phone"), 12: ("CX", "mrn"), 16: _TIME,
        30: ("XPN", "name"), 31: ("XTN", "phone"), 32: ("XAD", "address"), 37: ("CX", "ssn"),
    },
    "PV1": {
        5: ("CX", "account"), 7: _STAFF, 8: _STAFF, 9: _STAFF, 17: _STAFF, 19: ("CX", "mrn"), 44: _TIME, 45: _TIME,
        50: ("CX", "mrn"), 52: _STAFF,
    },
    "MRG": {1: ("CX", "mrn"), 3: ("CX", "account"), 4: ("CX", "mrn"), 7: ("XPN", "name")},
    "GT1": {
        2: ("CX", "account"), 3: ("XPN", "name"), 4: ("XPN", "name"), 5: ("XAD", "address"), 6: ("XTN", "phone"),
        7: ("XTN", "phone"), 8: _TIME, 12: ("CX", "ssn"), 19: ("CX", "mrn"),
    },
    "IN1": {
        6: ("XPN", "name"), 7: ("XTN", "phone"), 8: ("CX", "health_plan"), 16: ("XPN", "name"), 18: _TIME,
        19: ("XAD", "address"), 36: ("CX", "health_plan"), 49: ("CX", "health_plan"),
    },
    "IN2": {1: ("CX", "mrn"), 2: ("CX", "ssn"), 6: ("CX", "health_plan"), 8: ("CX", "health_plan"), 61: ("CX", "health_plan")},
    "ORC": {2: ("CX", "account"), 3: ("CX", "account"), 9: _TIME, 10: _STAFF, 11: _STAFF, 12: _STAFF, 14: ("XTN", "phone"), 15: _TIME},
    "OBR": {
        2: ("CX", "account"), 3: ("CX", "account"), 6: _TIME, 7: _TIME, 8: _TIME, 10: _STAFF, 14: _TIME, 16: _STAFF,
        17: ("XTN", "phone"), 22: _TIME, 28: _STAFF, 32: _STAFF, 34: _STAFF,
    },
    "OBX": {14: _TIME, 16: _STAFF, 19: _TIME},
    "TXA": {4: _TIME, 5: _STAFF, 6: _TIME, 9: _STAFF, 10: _STAFF, 11: _STAFF, 12: ("CX", "account")},
    "SCH": {1: ("CX", "account"), 2: ("CX", "account"), 12: _STAFF, 16: _STAFF},
    "AIP": {3: _STAFF},
    "ROL": {4: _STAFF},
    "ACC": {1: _TIME},
    "DG1": {5: _TIME, 16: _STAFF},
    "PR1": {5: _TIME, 8: _STAFF, 11: _STAFF, 12: _STAFF},
    "AL1": {6: _TIME},
    "RXA": {3: _TIME, 4: _TIME, 10: _STAFF, 15: ("CX", "device")},
}  # fmt: skip
# At the start of a line, or behind a blank: mail programs and manuals put a message into one line.
SEGMENT = re.compile(
    rf"(?:^|(?<=[\n ]))({'|'.join(_HL7)})\|(?=[^\n]{{0,400}}\|)[^\n]{{0,8000}}?(?=$|\n|[ ](?:{'|'.join(_HL7)})\|)", re.A
)
_SEGMENTS = tuple(f"{segment}|" for segment in _HL7)


def hl7(text: str) -> Iterator[Found]:
    """(class, start, end) in the segments of HL7 version 2 messages. MSH counts its separator as field 1."""
    for segment in SEGMENT.finditer(text):
        typed = _HL7[segment[1]]
        at, number = segment.start() + len(segment[1]) + 1, 2 if segment[1] == "MSH" else 1
        for field in text[at : segment.end()].split("|"):
            if number in typed and field:
                kind, numbered = typed[number]
                yield from _repeated(text, at, field, (kind, numbered))
            at += len(field) + 1
            number += 1


def _repeated(text: str, at: int, field: str, typed: tuple[str, str]) -> Iterator[Found]:
    for repeat in field.split("~"):
        yield from _field(at, repeat, typed)
        at += len(repeat) + 1


def _field(at: int, value: str, typed: tuple[str, str]) -> Iterator[Found]:
    kind, numbered = typed
    parts = value.split("^")
    if kind == "XPN":
        yield from _run("name", at, parts, (0, 3))
    elif kind == "XAD":
        yield from _run("address", at, parts, (0, 5))
    elif kind == "XON":
        yield from _run("hospital", at, parts, (0, 1))
    elif kind == "XCN":
        if re.search(r"\d", parts[0]):
            yield from _run(numbered, at, parts, (0, 1))
            yield from _run("name", at, parts, (1, 4))
        else:  # a name in an older version, or where the identifier is left out
            yield from _run("name", at, parts, (0, 4))
    elif kind == "TS":
        if re.match(r"\d{6}", parts[0]):
            yield from _run("date", at, parts, (0, 1))
    elif kind == "XTN":
        for number in (0, 3, 6, 11):
            if number < len(parts) and re.search(r"\d{4}|@", parts[number]):
                called = "email" if "@" in parts[number] else "phone"
                last = 8 if number == 6 else number + 1
                yield from _run(called, at, parts, (number, last))
    elif len(re.sub(r"[^A-Za-z0-9]", "", parts[0])) > 2 and re.search(r"\d", parts[0]):
        yield from _run(numbered, at, parts, (0, 1))


def _run(kind: str, at: int, parts: list[str], which: tuple[int, int]) -> Iterator[Found]:
    """One span from the first of some components that holds a letter or digit to the last one."""
    first, last = which
    start = at + sum(len(part) + 1 for part in parts[:first])
    value = "^".join(parts[first:last])
    bare = value.strip("^ \"'-")
    if re.search(r"[A-Za-z0-9]{2}", bare, re.A):
        start += value.index(bare)
        yield kind, start, start + len(bare)


# ---- ANSI X12 ------------------------------------------------------------------------------------------------------
_X12 = re.compile(
    r"(?:^|(?<=[\n~ ]))(?:"
    r"NM1\*[A-Z0-9]{2,3}\*1\*(?P<name>[A-Za-z][^~*\n|]{0,60}(?:\*[A-Za-z][^~*\n|]{0,35}){0,2})(?:\*{1,5}(?:[A-Z]{2,4}\*{1,2})?(?:MI|SY|XX|II|EI|24|34)\*(?P<id>[A-Za-z0-9-]{4,30}))?"
    r"|NM1\*[A-Z0-9]{2,3}\*2\*[^~*\n]{1,80}\*{4,5}(?:SY|XX|EI|FI|24)\*(?P<entity>[A-Za-z0-9-]{4,30})"
    r"|N3\*(?P<street>[^~\n]{3,100})|N4\*(?P<city>[^~\n]{3,80})"
    r"|DMG\*D8\*(?P<born>\d{8})|DTP\*\d{3}\*D8\*(?P<day>\d{8})|DTP\*\d{3}\*RD8\*(?P<days>\d{8}-\d{8})"
    r"|REF\*(?:SY|1W|EJ|Y4|1L|IL|F6|D9|EA|G1|9F|6P|EI|0B|1G|G2|F8)\*(?P<ref>[A-Za-z0-9-]{4,40})"
    r"|CLM\*(?P<claim>[A-Za-z0-9-]{3,38})\*"
    r"|PER\*[A-Z]{2}\*(?P<contact>[A-Za-z][^*~\n]{1,60})?(?:\*TE\*(?P<called>[0-9-]{7,15}))?)",
    re.A,
)
_X12_CLASSES = {
    "name": "name", "id": "health_plan", "entity": "license", "street": "address", "city": "address", "born": "date",
    "day": "date", "days": "date", "ref": "other_number", "claim": "account", "contact": "name", "called": "phone",
}  # fmt: skip


def x12(text: str) -> Iterator[Found]:
    """(class, start, end) in segments of ANSI X12 claims and enrolments."""
    for match in _X12.finditer(text):
        for group, kind in _X12_CLASSES.items():
            start, end = match.span(group)
            if end > start:
                bare = text[start:end].rstrip("* ")
                yield kind, start, start + len(bare)


# ---- DICOM ---------------------------------------------------------------------------------------------------------
# By tag; what else has a type of names (PN), dates (DA, DT) counts by its type.
_DICOM = {
    "0008,0050": "account", "0008,0080": "hospital", "0008,0081": "address", "0010,0020": "mrn", "0010,0021": "hospital",
    "0010,1000": "mrn", "0010,1040": "address", "0010,2154": "phone", "0018,1000": "device", "0020,0010": "account",
    "0038,0010": "mrn", "0040,1001": "account", "0008,1010": "device", "0040,2016": "account", "0040,2017": "account",
    "0010,2180": "", "0038,0300": "",
}  # fmt: skip
_ELEMENT = re.compile(
    r"\((?P<tag>[0-9a-fA-F]{4},[ ]?[0-9a-fA-F]{4})\)[ ]+(?P<said>[A-Za-z'() /]{0,60}?)[ ]*(?P<type>[A-Z]{2}):?[ ]+"
    r"(?:\[(?P<dumped>[^\]\n]{1,200})\]|'(?P<printed>[^'\n]{1,200})')",
    re.A,
)


def dicom(text: str) -> Iterator[Found]:
    """(class, start, end) in listings of DICOM headers as dcmdump and pydicom print them."""
    for match in _ELEMENT.finditer(text):
        tag = match["tag"].replace(" ", "").lower()
        kind = _DICOM.get(tag)
        if kind is None:
            kind = {"PN": "name", "DA": "date", "DT": "date"}.get(match["type"], "")
        group = "dumped" if match["dumped"] else "printed"
        value = match[group]
        bare = value.strip(" ^=")
        if kind and re.search(r"[A-Za-z0-9]{2}", bare, re.A):
            start = match.start(group) + value.index(bare)
            yield kind, start, start + len(bare)


def find(text: str) -> Iterator[Found]:
    """(class, start, end) of identifiers whose place in a message says what they are, in a plain copy."""
    if any(segment in text for segment in _SEGMENTS):
        yield from hl7(text)
    if "NM1*" in text or "N3*" in text or "N4*" in text or "REF*" in text or "CLM*" in text or "DMG*" in text:
        yield from x12(text)
    if "(00" in text:
        yield from dicom(text)
