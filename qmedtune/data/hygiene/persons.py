"""Names of people and of the places that treat them, where something announces them.

A title (`Dr.`), a label (`PATIENT NAME:`), a relation (`husband`), a credential behind (`, MD`) or the word `Hospital`
announces; the words that follow (or go before) are then taken one by one until one is no part of a name (words.py). So a
name is found whole or not at all: a half of it left readable would look redacted. Matched is the plain copy (plain.py).
"""

# ruff: noqa: E501 (a pattern reads better in one piece)

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from qmedtune.data.hygiene.anchors import places
from qmedtune.data.hygiene.name_words import (
    CREDENTIAL,
    DRUG,
    EPONYM,
    FIELD_END,
    MAX_WORDS,
    PARTICLE,
    NameRules,
    before_next_label,
    behind_titles,
    beside_capitals,
    is_never,
    joined,
    take,
)
from qmedtune.data.hygiene.words import INSIDE, OF_HOSPITALS

CARETS = re.compile(r"[A-Z][A-Za-z' -]{0,40}(?:\^[A-Za-z' .-]{0,40}){1,4}", re.A)  # as HL7 and DICOM write a name
Place = tuple[int, int]
_SIGN = re.compile(r"[ ]?[/&]", re.A)  # between two names

TITLE = re.compile(
    r"(?<![A-Za-z0-9_])(?:(?P<title>Drs?|DRS?|Mrs?|MRS?|Ms|MS|Miss|MISS|Prof|PROF|Professor|Doctor|DOCTOR|Rev|Herrn?|HERRN?|Frau|FRAU|Mme|Mlle|"
    r"Monsieur|Madame|Mademoiselle|MME|MLLE|Mevrouw|Dhr|Signora?|Smt|Shri|Pr|Sra?|Dra|Do[nc]a?|Dott|Capt|Captain|Sgt|Lt|Judge|Father|Pastor|Rabbi|Sister|Nurse|Dear)|"
    r"(?P<small>drs?|mrs?|ms|miss|prof|professor))(?:\.[ ]{0,3}\n?[ ]{0,3}|[ ]{1,3}\n?[ ]{0,3}|\n)"
    r"(?:(?:med|dent|phil|rer|nat|habil|univ|vet|h\.[ ]?c|sc)\.[ ]{0,2}){0,4}(?=[A-Za-z])",
    re.A,
)
# Titles that are also words, or initials: their name must begin with a capital and be no other word.
WEAK = frozenset(("MS", "Ms", "Pr", "SR", "Sr", "Sra", "Dona", "Don", "Doc", "Lt", "Father", "Sister", "Nurse", "Dear"))
_DONE_BY = (
    "signed", "dictated", "transcribed", "reviewed", "verified", "authored", "entered", "prepared", "seen", "referred",
    "performed", "attested", "evaluated", "examined", "requested", "ordered", "written", "assisted", "accompanied", "read",
    "interpreted", "administered", "collected", "completed", "authenticated", "approved", "cosigned", "co-signed",
    "sign", "perform", "verify", "supervised", "edited", "recorded", "documented", "typed", "dispensed", "obtained", "witnessed", "scribed",
)  # fmt: skip
_ROLES = (
    r"patient(?:'s)?[ ]name|pt\.?[ ]name|full[ ]name|first[ ]name|last[ ]name|given[ ]name|family[ ]name|maiden[ ]name|surname|"
    r"name[ ]of[ ]patient|attending[ ]physician|attending[ ](?:md|provider|surgeon|of[ ]record)|"
    r"(?:referring|primary[ ]care|ordering|admitting|supervising|consulting|treating)[ ](?:physician|provider|md|surgeon)|"
    rf"(?:{'|'.join(_DONE_BY)})[ ]by|next[ ]of[ ]kin|emergency[ ]contact|health[ ]care[ ]proxy|nok|"
    r"responsible[ ]party|guarantor|legal[ ]guardian|power[ ]of[ ]attorney|health[ ]care[ ]agent|middle[ ]name|preferred[ ]name|"
    r"family[ ]doctor|general[ ]practitioner|account[ ]holder|policy[ ]?holder|(?:1st|2nd|first|second)[ ]assistant|"
    r"(?:scrub|circulating)[ ]nurse|familienname|nachname|vorname"
)
_SHORT_ROLES = (
    r"name|patient|pt|attending|surgeon|assistant|anesthesiologist|resident|fellow|intern|physician|provider|author|nurse|"
    r"rn|md|np|pa|pcp|lpn|cna|pharmacist|therapist|consultant|clinician|radiologist|pathologist|cardiologist|interpreter|"
    r"proxy|hcp|contact|guardian|mother|father|husband|wife|son|daughter|brother|sister|spouse|partner|from|to|cc|re|client|"
    r"signature|signed|dictator|nombre|paciente|nom|patientin|arzt|hausarzt|medecin|subscriber|insured|employee|donor|"
    r"recipient|claimant|witness|reviewer|doctor|scribe|oncologist|hospitalist|dentist|technologist|technician|operator|"
    r"circulator|scrub|caregiver|poa|dpoa|friend|midwife|coordinator|student|sincerely|regards|veteran|alias|aka|nickname|pat|"
    r"paziente|pacjent|pacjentka|pacient|pasient|patsient|potilas|utente|medico|lekarz|arts|huisarts|lege|lakare|naam|nome|"
    r"cognome|navn|namn|apellidos?|prenom|imie|nazwisko"
)
# A label and its colon; a long one may do without, or have a dash, a line end or several spaces instead.
LABEL = re.compile(
    rf"(?<![A-Za-z0-9_])(?:(?P<long>(?i:{_ROLES}))|(?P<short>(?i:{_SHORT_ROLES})))(?:[ ]?\([A-Za-z, /]{1, 24}\))?"
    r"(?P<link>\.{3,40}[ ]{0,20}|[ .]{0,12}(?:(?:(?<=incerely)|(?<=egards)),[ ]{0,3}\n?[ ]{0,3}|[:=#][ ]{0,40}\n?[ ]{0,40}|-[ ]{1,3}|\n[ ]{0,40}|[ ]{1,3}))(?=[A-Za-z(\"'])",
    re.A,
)
# Where a long label may begin, and the last word before the colon of a short one.
LONG_STARTS = (
    "patient name", "patient's name", "pt name", "pt. name", "full name", "first name", "last name", "given name", "family name", "maiden name", "surname",
    "name of patient", "attending", "referring", "primary care", "ordering", "admitting", "supervising", "consulting",
    "treating", "next of kin", "emergency contact", "health care proxy", "nok", "responsible party", "guarantor",
    "legal guardian", "power of attorney", "health care agent", "middle name", "preferred name", "family doctor",
    "general practitioner", "account holder", "policy holder", "policyholder", "1st assistant", "2nd assistant",
    "first assistant", "second assistant", "scrub nurse", "circulating nurse", "familienname", "nachname", "vorname",
    *(f"{done} by" for done in _DONE_BY), "sincerely,", "regards,",
)  # fmt: skip
SHORT_WORDS = frozenset(_SHORT_ROLES.split("|"))
RELATIONS = (
    "husband", "wife", "spouse", "son", "daughter", "mother", "father", "brother", "sister", "friend", "partner", "neighb",
    "caregiver", "fianc", "girlfriend", "boyfriend", "aunt", "uncle", "niece", "nephew", "cousin", "grand", "roommate", "step",
    "mom", "dad", "name is", "manager", "worker", "therapist", "pharmacist", "attending", "resident", "surgeon", "physician",
    "chaplain", "interpreter", "coordinator", "midwife", "hospitalist", "intern", "fellow", "aide", "sitter", "nurse",
    "named", "called", "known as", "accompanied by", "spoke with", "speaking with", "discussed with", "call",
    "contact", "cardiologist", "oncologist", "neurologist", "urologist", "nephrologist", "radiologist", "anesthesiologist",
)  # fmt: skip
_LAST_WORD = re.compile(r"([a-z]{2,20})(?:[ ]?\([a-z, /]{1,24}\))?[ .]{0,12}$", re.A)
NAME_LABELS = re.compile(
    r"name|nombre|nom$|nome$|naam|navn|namn|apellido|prenom|imie|nazwisko|alias|aka|signed|dictated|kin|contact|transcribed|proxy",
    re.I | re.A,
)
OF_THINGS = re.compile(
    r"(?:drug|generic|brand|trade|product|study|test|file|device|procedure|medication|medicine|trial|gene|protein|assay|"
    r"compound|chemical|common|scientific|species)[ ]$",
    re.I | re.A,
)
# A table's row without a colon (a tab, which the plain copy has as a blank): the name must say itself that it is one.
ROW = re.compile(r"(?:^|(?<=\n))[ ]{0,8}(?:NAME|Name)[ ]{1,40}(?=[A-Z][A-Za-z'-]{1,30},[ ]?[A-Z])", re.A)
# A chart's `Pt. DOE, JANE seen`: in capitals and with a comma, before small letters.
CHARTED = re.compile(
    r"(?<![A-Za-z0-9_])(?:Pt|Patient|Veteran|Resident|Client)\.?[ ](?P<value>[A-Z][A-Z'-]{1,30},[ ][A-Z][A-Z'-]{1,30}(?:[ ][A-Z]\.?)?)(?=[ ][a-z])",
    re.A,
)
NEWBORN = re.compile(
    r"(?<![A-Za-z0-9_])(?:(?i:baby)[ ](?i:boy|girl)|(?i:infant|baby|newborn)[ ]of)[ ](?=[A-Z][A-Za-z])"
    r"|(?<![A-Za-z0-9_])B[BG][ ](?=[A-Z]{3,30}[ ]\((?:mother|mom|mum|maternal))",
    re.A,
)
# Behind a first name in the same line: alone, MI is a myocardial infarction.
MIDDLE = re.compile(r"(?i:name)[^\n]{1,60}[ ]MI:[ ]{1,3}(?P<value>[A-Z])(?![A-Za-z0-9])", re.A)
RELATION = re.compile(
    r"(?<![A-Za-z0-9_])(?i:husband|wife|spouse|son|daughter|mother|father|brother|sister|friend|partner|neighbou?r|caregiver|"
    r"fianc[e]{1,2}|girlfriend|boyfriend|aunt|uncle|niece|nephew|cousin|grandson|granddaughter|grandmother|grandfather|"
    r"(?:daughter|son|brother|sister|mother|father)-in-law|roommate|manager|worker|therapist|pharmacist|attending|resident|"
    r"surgeon|physician|chaplain|interpreter|coordinator|midwife|hospitalist|intern|fellow|aide|sitter|nurse|"
    r"cardiologist|oncologist|neurologist|urologist|nephrologist|radiologist|anesthesiologist|stepson|stepdaughter|mom|dad)(?:,[ ]|[ ]\(|[ ])(?=[A-Z][a-z])"
    r"|(?<![A-Za-z0-9_])(?:named|name is|called|known as|accompanied by|spoke with|speaking with|discussed with|call|contact)[ ]"
    r"(?=[A-Z][a-z])",
    re.A,
)
PATIENT = re.compile(
    r"(?<![A-Za-z0-9_])(?:[Pp]atient|[Pp]t|PATIENT)[ ](?P<value>[A-Z][a-z]{1,20}[ ](?:[A-Z]\.?[ ])?[A-Z][A-Za-z'-]{1,30})"
    r"(?=,?[ ](?:is|was|has|had|presents|presented|came|arrived|an?)(?![A-Za-z0-9_]))",
    re.A,
)
# Under an electronic signature's mark; behind whose child or wife somebody is; from whom something came.
SIGNED = re.compile(r"/e?s/[ ]{1,4}(?=[A-Z])", re.A)
OF_FAMILY = re.compile(r"(?<![A-Za-z0-9_/])[SDWC]/[oO]\.?[ ]{1,3}(?=[A-Z][A-Za-z])", re.A)
FROM = re.compile(
    r"(?<![A-Za-z0-9_])(?:message|letter|call|notes?|email|e-mail|referral|fax|report|consult)[ ](?:from|by|to)[ ](?=[A-Z][a-z])",
    re.A,
)
# Under a letter: `Yours sincerely`, blank lines, a name.
SIGN_OFF = re.compile(
    r"(?i:yours[ ](?:sincerely|faithfully|truly)|(?:kind|best|warm)(?:est)?[ ]regards|sincerely|regards|mit freundlichen gru[a-z]{2,4}|"
    r"cordialement|confraternellement|atentamente|met vriendelijke groet|cordiali saluti),?[ ]{0,3}\n{1,4}[ ]{0,8}(?=[A-Z])",
    re.A,
)
# Made-up people of Synthea: `Noel608 Reynolds644`.
SYNTHETIC = re.compile(
    r"(?<![A-Za-z0-9_])[A-Z][a-z'-]{1,24}\d{2,3}(?:[ ][A-Z][a-z'-]{1,24}\d{2,3}){1,3}(?![A-Za-z0-9_])", re.A
)
BEFORE = re.compile(r"(?:[A-Z][A-Za-z]{0,30}(?:['-][A-Za-z]{1,30}){0,3}\.?|[a-z]{2,6}|&)[ ]?$", re.A)


def find_names(text: str, lowered: str) -> Iterator[Place]:
    """(start, end) of announced names in a plain copy, `lowered` its lower case; they may overlap."""
    for match in TITLE.finditer(text):
        yield from _titled(text, match)
    labels = sorted({*places(LONG_STARTS, lowered), *_short_labels(lowered)})
    for match in _matches(LABEL, text, labels):
        yield from _labelled(text, match)
    for match in ROW.finditer(text) if "name " in lowered else ():
        if end := take(text, match.end(), NameRules(comma=True)):
            yield match.end(), end
    for match in _matches(RELATION, text, places(RELATIONS, lowered)):
        start = match.end()
        end = take(text, start, NameRules(eponyms=False))
        if end and not text[start:end].islower() and not _is_capitals(text[start:end]):
            yield start, end
    for match in SIGN_OFF.finditer(text) if "\n" in text else ():
        start = behind_titles(text, match.end())
        end = take(text, start, NameRules(comma=True))
        if end and " " in text[start:end]:
            yield start, end
    if "s/ " in text:
        for match in SIGNED.finditer(text):
            if end := take(text, match.end(), NameRules(comma=True)):
                yield match.end(), end
    for match in _matches(OF_FAMILY, text, places(("s/o", "d/o", "w/o", "c/o"), lowered)):
        start = behind_titles(text, match.end())
        end = take(text, start, NameRules(eponyms=False))
        if end and " " in text[start:end] and not _is_capitals(text[start:end]):
            yield start, end
    for match in _matches(
        FROM,
        text,
        places(("message ", "letter ", "call ", "note", "email ", "referral ", "fax ", "report ", "consult "), lowered),
    ):
        start = match.end()
        for _ in range(2):  # from one to another
            end = take(text, start, NameRules(eponyms=False))
            if not end or " " not in text[start:end]:
                break
            yield start, end
            if text[end : end + 4] != " to ":
                break
            start = end + 4
    for match in SYNTHETIC.finditer(text):
        yield match.span()
    for match in CREDENTIAL.finditer(text):
        start = take_back(text, match.start())
        words = text[start : match.start()].split()
        if words and (match[0].startswith(",") or len(words) > 1):
            yield start, match.start()
    for match in (*CHARTED.finditer(text), *(MIDDLE.finditer(text) if " MI:" in text else ())):
        if not any(is_never(word) for word in re.split(r"[, ]+", match["value"])):
            yield match.span("value")
    for match in _matches(NEWBORN, text, places(("baby ", "infant of", "newborn of", "bb ", "bg "), lowered)):
        if end := take(text, match.end(), NameRules(eponyms=False)):
            yield match.end(), end
    for match in _matches(PATIENT, text, places(("patient ", "pt "), lowered)):
        if not any(is_never(word) for word in match["value"].split()):
            yield match.span("value")


def _matches(pattern: re.Pattern[str], text: str, starts: Iterable[int]) -> Iterator[re.Match[str]]:
    for start in starts:
        if match := pattern.match(text, start):
            yield match


def _short_labels(lowered: str) -> Iterator[int]:
    """Where the words before a colon begin that are labels."""
    for place in places((":", "=", "...", "name\n", "name#", "nombre\n"), lowered):
        if lowered[place] in ":=.":
            end = place
        else:
            end = lowered.find("e", place) + 1
        word = _LAST_WORD.search(lowered, max(0, end - 50), end)
        if word and word[1] in SHORT_WORDS:
            yield word.start(1)


def _titled(text: str, match: re.Match[str]) -> Iterator[Place]:
    start = match.end()
    if match["small"]:
        end = take(text, start, NameRules(small=True))
        if end and (text[start].isupper() or match["small"] != "ms"):
            yield start, end
        return
    if (
        match["title"] in WEAK
        and "." not in match[0]
        and not re.match(r"[A-Z](?:[a-z]|\.[ ]?[A-Z])", text[start : start + 4], re.A)
    ):
        return
    several = match["title"] in ("Drs", "DRS")
    rules = NameRules(titled=True, comma=several)
    end = take(text, start, rules)
    if end:
        first = start, before_next_label(text, start, end) or end
        # One doctor `and` somebody is a sentence that goes on; with a slash they are two.
        yield from joined(text, first, rules) if several or _SIGN.match(text, end) else [first]


def _labelled(text: str, match: re.Match[str]) -> Iterator[Place]:
    """What follows a label. Behind a long label a dash, a line end or a space is enough; a short one needs its colon."""
    link, start = match["link"], match.end()
    strong = ":" in link or "=" in link or "#" in link or "..." in link
    label = match["long"] or match["short"]
    if label.lower() == "name" and OF_THINGS.search(text[max(0, match.start() - 20) : match.start()]):
        return
    if not strong and not (match["long"] or (NAME_LABELS.search(label) and "\n" in link)):
        return
    while start < len(text) and text[start] in "(\"'":
        start += 1
    start = behind_titles(text, start)
    named = bool(NAME_LABELS.search(label)) or bool(match["long"])
    end = take(text, start, NameRules(comma=True, small=strong and named, eponyms=named))
    if not end or re.match(r"[ ]{0,3}:|\d" if named else r"[ ]{0,3}:|[ ]?\d", text[end : end + 6], re.A):
        return
    if beside_capitals(text, start, end):
        return
    value = text[start:end]
    if " " not in value and "," not in value and DRUG.search(value):
        return
    if not named and EPONYM.match(text[end : end + 16]):
        return
    if label.lower() in ("re", "to", "from", "friend", "student") and " " not in value:
        return  # a subject or a place more often than a name
    # In small letters or on the next line, a name is all that its field holds; else it is a word or a sentence.
    if (value.islower() or "\n" in link) and not FIELD_END.match(text[end : end + 6] or "\n"):
        return
    yield from joined(text, (start, end), NameRules(comma=True, eponyms=named))


def named_field(text: str, label: str, place: Place, *, named: bool) -> list[Place]:
    """The name or the joined names in a header's field, whose label begins at place[0] and whose value at place[1].

    named: the label says that it is a name (`Surname`), not only who (`Physician`), so that small letters may be one.
    """
    start = place[1]
    while start < len(text) and text[start] in "(\"'":
        start += 1
    start = behind_titles(text, start)
    if caret := CARETS.match(text, start):
        return [caret.span()]
    end = take(text, start, NameRules(comma=True, small=named, eponyms=named, wide=True))
    if end:
        end = before_next_label(text, start, end)
    if not end:
        return []
    value, behind = text[start:end], text[end : end + 16]
    if (not named and re.match(r"[ ]?\d", behind)) or beside_capitals(text, start, end):
        return []
    if not named and EPONYM.match(behind):
        return []
    if not re.search("[ ,]", value):
        following = re.match(r",?[ ]([a-z]+)", behind)
        if DRUG.search(value) or (not named and following and not is_never(following[1])):
            return []  # `Patient: Paciente de 62`: a sentence begins
    if value.islower() and not FIELD_END.match(text[end : end + 6] or "\n"):
        return []
    return joined(text, (start, end), NameRules(comma=True, eponyms=named, wide=True))


def take_back(text: str, end: int, *, inside: bool = False) -> int:
    """Where the name that ends at `end` begins (`end` itself where there is none). inside: `of` and `the` are parts."""
    start, words = end, 0
    while words < MAX_WORDS:
        window = text[max(0, start - 70) : start]
        match = BEFORE.search(window)
        if match is None:
            break
        at = start - len(match[0])
        word = match[0].strip()
        before = text[at - 1 : at]
        if before.isalnum() or before in ("'", "-", "_", "."):
            break
        bare = word.strip(".")
        small = word.islower() or word == "&"
        known = inside and (bare in INSIDE or word == "&")
        ends_sentence = word.endswith(".") and len(bare) > 1 and bare.lower() not in ("st", "mt", "jr", "sr")
        if small and not known and PARTICLE.match(text, at) is None:
            break
        if not small and (ends_sentence or (is_never(bare) and not (inside and bare.lower() in OF_HOSPITALS))):
            break
        start, words = at, words + 1
    # What a name cannot begin with: small words, and blanks.
    while start < end and (text[start] == " " or text[start].islower() or text[start] == "&"):
        cut = text.find(" ", start, end)
        if cut < 0:
            start = end
        else:
            start = cut + 1
    return start


def _is_capitals(value: str) -> bool:
    return value.isupper() and len(value) > 2
