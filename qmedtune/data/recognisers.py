r"""Patterns of identifiers: the classes of the Safe Harbor list (45 CFR 164.514(b)(2)) that text can express.

One entry per class, several patterns each; a pattern with a group `value` marks that group alone, so labels stay
readable. The order is precedence: what an earlier class has claimed, a later one does not see. Full-face images and
biometric prints have no textual form; "any other unique number" is covered as far as a label announces it.
"""

from __future__ import annotations

import re

MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
    r"sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"
)
DAY = r"(?:0?[1-9]|[12]\d|3[01])"
YEAR = r"(?:1[89]|2[01])\d\d"
STATE = (
    r"(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|P[AR]|RI|S[CD]|"
    r"T[NX]|UT|V[AIT]|W[AIVY])"
)
STREET = (
    r"(?i:street|st|avenue|ave|road|rd|boulevard|blvd|lane|ln|drive|dr|court|ct|way|place|pl|terrace|parkway|pkwy|"
    r"circle|highway|hwy|square)"
)
# What may stand between a label and its value: "number", "no.", "#", ":", "is", in any sensible order.
LINK = r"(?:[ \t]*(?:\b(?:numbers?|num|no|nr|id|code|is|was)\b\.?|[#:=(]))*[ \t]*"
# At least two digits; letters, dots, dashes and slashes in between.
CODE = r"(?P<value>(?=[A-Za-z0-9./-]*\d[A-Za-z0-9./-]*\d)[A-Za-z0-9][A-Za-z0-9./-]{2,28}[A-Za-z0-9])"
NUMBER = r"(?:\+?1[ .-]?)?(?:\(\d{3}\)[ ]?|\d{3}[ .-])\d{3}[ .-]\d{4}(?:[ ]?(?:x|ext\.?)[ ]?\d{1,6})?"
OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
HEX = r"[0-9a-f]{1,4}"
MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
# A pronoun or article after an initial starts the next sentence: "seen by Dr. Y. He was ...".
NEXT_SENTENCE = r"(?!(?:He|She|It|The|This|That|They|We|On|In|At|A|An|Patient|Pt|No|I)\b)"
NAME = rf"(?:{NEXT_SENTENCE}(?:O['’]|D['’]|Mc|Mac)?[A-Z][a-z]+(?:[-'’][A-Z][a-z]+)*|[A-Z]\.)"
PERSON = rf"(?P<value>(?:{NAME}|[A-Z][A-Z'-]+)(?:,?[ ](?:(?:van|von|de|la|del|di|bin|al)[ ])?{NAME}){{0,3}})"
PLATE = r"(?P<value>(?=[A-Z0-9 -]*\d)[A-Z0-9]{1,4}[ -]?[A-Z0-9]{2,17})\b"
ROLES = (
    r"patient(?:'s)? name|name|pt name|attending(?: physician)?|referring physician|dictated by|"
    r"electronically signed by|signed by|seen by|next of kin|emergency contact|surgeon|patient"
)


def _labelled(labels: str) -> str:
    return rf"(?i:\b(?:{labels}){LINK}{CODE})"


# class: (what the text must hold for the pattern to be tried, pattern) ...; the former in lower case with every digit
# written 0, alternatives separated by |. The plain search for it halves the time on clinical notes (1.1 MB/s per core).
SOURCES: dict[str, tuple[tuple[str, str], ...]] = {
    "url": (("://|www.", r"(?i:\b(?:https?://|ftp://|www\.)[^\s<>\"')\]]+[^\s<>\"').,;\]])"),),
    "email": (("@", r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b"),),
    "ssn": (
        ("000-00-0000", r"\b\d{3}-\d{2}-\d{4}\b"),
        ("ssn|social sec", rf"(?i:\b(?:ssn|social security){LINK})(?P<value>\d{{3}}[ .-]?\d{{2}}[ .-]?\d{{4}})\b"),
    ),
    "fax": (("fax", rf"(?i:\bfax{LINK})(?P<value>{NUMBER}|\d{{3}}[.-]\d{{4}}|\d{{10}})\b"),),
    "phone": (
        ("000-0000|000.0000|000 0000", rf"(?<![\w-]){NUMBER}\b"),
        (
            "phone|tel|cell|mobile|pager|beeper|call",
            rf"(?i:\b(?:phone|telephone|tel|cell|mobile|pager|beeper|call){LINK})"
            r"(?P<value>\d{3}[ .-]\d{4}|\d{10})\b",
        ),
    ),
    "ip": (
        ("0.0.0|0.00.0|0.000.0", rf"(?<![\w.]){OCTET}(?:\.{OCTET}){{3}}(?![\w]|\.\d)"),
        (":", rf"(?i:(?<![\w:])(?:{HEX}:){{7}}{HEX}(?![\w:]))"),
        ("::", rf"(?i:(?<![\w:])(?:{HEX}:){{1,6}}(?::{HEX}){{1,6}}(?![\w:]))"),
    ),
    "vehicle": (
        ("vin|vehicle|chassis|0", r"\b(?=[A-HJ-NPR-Z]{0,16}\d)(?=\d{0,16}[A-HJ-NPR-Z])[A-HJ-NPR-Z0-9]{17}\b"),
        ("vin|plate|registration", rf"(?i:\b(?:vin|licen[sc]e plate|plate|registration){LINK}){PLATE}"),
    ),
    "mrn": (
        (
            "mrn|mr#|rec|unit|chart|patient id|hospital id|pt id",
            _labelled(r"mrn|mr#|med(?:ical)?\.? rec(?:ord)?s?|unit|chart|patient id|hospital id|pt id"),
        ),
    ),
    "health_plan": (
        (
            "polic|member|subscriber|beneficiary|insurance|medica|plan|group",
            _labelled(
                r"polic(?:y|ies)|member|subscriber|beneficiary|insurance|medicare|medicaid|(?:health )?plan|group"
            ),
        ),
    ),
    "account": (
        (
            "acc|encounter|visit id|invoice|case|claim",
            _labelled(r"account|acct\.?|encounter|visit id|invoice|accession|case|claim"),
        ),
    ),
    "license": (
        (
            "lic|dl|dea|npi|cert|passport",
            _labelled(r"licen[sc]e|lic\.?|driver'?s licen[sc]e|dl|dea|npi|certificate|cert\.?|passport"),
        ),
    ),
    "device": (
        (
            "serial|s/n|sn|device|udi|imei|implant|lot",
            _labelled(r"serial|s/n|sn|device|udi|imei|implant id|lot"),
        ),
    ),
    "date": (
        ("0000-|0000/|0000.", rf"\b{YEAR}([-/.]){DAY}\1{DAY}(?:\b|(?=T\d))"),
        ("/0|-0|.0", rf"(?<![\d./-]){DAY}([-/.]){DAY}\1(?:{YEAR}|\d\d)\b(?![./-]\d)"),
        (MONTHS, rf"(?i:\b{MONTH}\.?[ -]{DAY}(?:st|nd|rd|th)?(?:,?[ -]+(?:{YEAR}|'?\d\d\b))?\b)"),
        (MONTHS, rf"(?i:\b{DAY}(?:st|nd|rd|th)?[ -](?:of[ ])?{MONTH}\.?(?:,?[ -](?:{YEAR}|\d\d\b))?\b)"),
        (MONTHS, rf"(?i:\b{MONTH}\.?,?[ ]{YEAR}\b)"),
        ("0/0", rf"(?i:\b(?:on|dated|since|dob|born|date)[: ]+)(?P<value>(?:0?[1-9]|1[0-2])/{DAY})(?![/\d])"),
    ),
    "age_over_89": (
        ("00 y|000 y|00-y|000-y|00y", r"(?i:\b(?P<value>9\d|1[0-2]\d)(?=[ -]?(?:years?|yrs?|y\.?/?o\.?|yo)\b))"),
        ("age", r"(?i:\b(?:aged?|age of|age is)[: ]+)(?P<value>9\d|1[0-2]\d)\b(?![./%\d])"),
    ),
    "address": (
        (
            "0 ",
            rf"\b\d{{1,6}}[ ](?:[NSEW]\.?[ ])?(?:[A-Z][A-Za-z]+[ ]){{1,4}}{STREET}\b\.?"
            r"(?:,?[ ](?i:apt|apartment|suite|unit|\#)\.?[ ]?\w+)?",
        ),
        ("box 0", r"\bP\.?O\.?[ ]Box[ ]\d+"),
    ),
    "zip": (
        (" 00000", rf"\b{STATE},?[ ](?P<value>\d{{5}}(?:-\d{{4}})?)\b"),
        ("zip|postal", rf"(?i:\b(?:zip(?: ?code)?|postal code){LINK})(?P<value>\d{{5}}(?:-\d{{4}})?)\b"),
        ("00000-0000", r"\b\d{5}-\d{4}\b"),
    ),
    "name": (
        ("dr|mr|ms|miss|prof", rf"\b(?:Dr|Mr|Mrs|Ms|Miss|Prof|Drs)\b\.?[ ]+{PERSON}"),
        (":", rf"(?i:\b(?:{ROLES}))[ ]*:[ ]*{PERSON}"),
    ),
}
PATTERNS = [
    (kind, needs.split("|"), re.compile(source)) for kind, sources in SOURCES.items() for needs, source in sources
]
DIGITS = str.maketrans("123456789", "0" * 9)
LABELLED_CODES = frozenset({"mrn", "account", "health_plan", "device", "license"})

# After "Patient:" or a title these are an eponym, a drug or the start of a sentence, not a person.
NOT_NAMES = frozenset(
    """alzheimer apgar babinski barrett bell cushing crohn down foley graves guillain hashimoto hodgkin huntington
    kaposi marfan meniere paget parkinson raynaud reiter romberg sjogren tourette turner whipple wilson
    warfarin metformin lisinopril aspirin heparin insulin coumadin lasix plavix lipitor medicine
    the a an this no not none unknown is was has well alert stable female male white black she he normal denies see
    same yes""".split()  # noqa: SIM905 (a list of words reads better as words)
)
EPONYM = re.compile(r"['’]?s?[ ](?:disease|syndrome|sign|test|palsy|thyroiditis|lymphoma|esophagus)", re.I)
# Marks that earlier de-identification has left: MIMIC-III and MIMIC-IV.
MARKED = re.compile(r"\[\*\*.*?\*\*\]|_{3,}", re.S)
