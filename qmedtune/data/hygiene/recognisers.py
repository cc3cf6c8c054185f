r"""Patterns of identifiers: the classes of the Safe Harbor list (45 CFR 164.514(b)(2)) that text can express.

One entry per class, several patterns each; a pattern with a group `value` marks that group alone, so labels stay
readable. The order is precedence: what an earlier class has claimed, a later one does not see. Full-face images and
biometric prints have no textual form; "any other unique number" is covered as far as a label announces it.
"""

# ruff: noqa: E501 (a pattern reads better in one piece)

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qmedtune.data.hygiene.abroad import ABROAD
from qmedtune.data.hygiene.anchors import places
from qmedtune.data.hygiene.header_labels import QUANTITIES, THINGS
from qmedtune.data.hygiene.words import NEVER

_EN = (
    r"jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
    r"sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?"
)
# German, French, Spanish, Italian, Portuguese, without their accents; taken with a year or a German day (`3. Marz`) only.
_OTHER = (
    r"januar|februar|marz|maerz|mai|juni|juli|oktober|dezember|janvier|fevrier|mars|avril|juin|juillet|aout|septembre|"
    r"octobre|novembre|decembre|enero|febrero|marzo|abril|mayo|junio|julio|agosto|septiembre|octubre|noviembre|diciembre|"
    r"gennaio|febbraio|aprile|maggio|giugno|luglio|settembre|ottobre|dicembre|janeiro|fevereiro|marco|maio|junho|julho|"
    r"setembro|outubro|novembro|dezembro"
)
MONTH = rf"(?:{_EN})"
ANY_MONTH = rf"(?:{_OTHER}|{_EN})"
DAY = r"(?:0?[1-9]|[12]\d|3[01])"
YEAR = r"(?:1[89]|2[01])\d\d"
CLOCK = r"(?:T\d{2}(?::?\d{2}){0,2}(?:\.\d{1,9})?(?:Z|[+-]\d{2}:?\d{2})?)?"
# A number behind a month is a dose or a count where one of these follows: "May 5 mg be enough?".
NO_DOSE = (
    r"(?![ ]?(?:mg|mcg|ug|g|kg|ml|cc|l|meq|units?|tabs?|tablets?|caps?|capsules?|doses?|puffs?|drops?|mm|cm|%|x|times|days?|"
    r"hours?|hrs?|weeks?|wks?|months?|years?|yrs?|points?|percent|more|or)\b)(?![./%]\d)"
)
# What is measured, given or counted, behind a number that a weak label (`unit 4200 mL`) would make an identifier.
MEASURED = re.compile(
    r"[ ]?(?:%|mg|mcg|ug|g|gm|kg|ml|cc|l|dl|meq|mmol|units?|u|iu|cells?|mm|cm|mmhg|bpm|days?|hours?|hrs?|h|weeks?|months?|"
    r"years?|yrs?|ml/h|x|times|doses?|kcal|calories)"
    r"(?![A-Za-z0-9_])",
    re.I | re.A,
)
_STATES = (
    "Alabama|Alaska|Arizona|Arkansas|California|Colorado|Connecticut|Delaware|Florida|Georgia|Hawaii|Idaho|Illinois|Indiana|"
    "Iowa|Kansas|Kentucky|Louisiana|Maine|Maryland|Massachusetts|Michigan|Minnesota|Mississippi|Missouri|Montana|Nebraska|"
    "Nevada|New Hampshire|New Jersey|New Mexico|New York|North Carolina|North Dakota|Ohio|Oklahoma|Oregon|Pennsylvania|"
    "Rhode Island|South Carolina|South Dakota|Tennessee|Texas|Utah|Vermont|Virginia|Washington|West Virginia|Wisconsin|Wyoming"
)
STATE = (
    r"(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|P[AR]|RI|S[CD]|"
    r"T[NX]|UT|V[AIT]|W[AIVY])"
)
# Abbreviations of states that are nothing else in a note: a city before them is one without a ZIP code too.
CLEAR_STATE = r"(?:AK|AZ|CA|FL|GA|IA|IL|KS|KY|MI|MN|MO|MT|N[CDEHJMVY]|OH|RI|SC|SD|TN|TX|UT|VA|VT|WA|WI|WV|WY)"
CITY = r"[A-Z][A-Za-z'-]{2,20}(?:[ ][A-Z][A-Za-z'-]{1,20}){0,2}"
# Behind a street of the Continent: 10115 Berlin.
TOWN = r"(?:,?[ \n]{1,2}(?:[A-Z]{1,2}-)?\d{4,5}[ ][A-Z][A-Za-z'-]{1,20}(?:[ ][A-Z][A-Za-z'-]{1,20}){0,2})?"
SUFFIXES = (
    r"(?:Street|STREET|St|ST|Avenue|AVENUE|Ave|AVE|Road|ROAD|Rd|RD|Boulevard|BOULEVARD|Blvd|BLVD|Lane|LANE|Ln|LN|Drive|DRIVE|"
    r"Dr|DR|Court|COURT|Ct|Way|WAY|Place|PLACE|Pl|Terrace|TERRACE|Parkway|PARKWAY|Pkwy|PKWY|Circle|CIRCLE|Cir|Highway|HIGHWAY|"
    r"Hwy|HWY|Square|SQUARE|Sq|Crescent|Close|Grove|Croft|Wharf|Quay|Rise|Chase|Row|Gardens|Mews|Trail|Loop|Alley|Turnpike|Pike)"
)
UK_POSTCODE = r"[A-PR-UWYZ](?:\d{1,2}|[A-HK-Y]\d[0-9A-Z]?|\d[A-HJKSTUW])[ ]\d[ABD-HJLNP-UW-Z]{2}"
SMALL_SUFFIXES = r"(?:street|st|avenue|ave|road|rd|boulevard|blvd|lane|ln|drive|parkway|pkwy|hwy|highway)"
FLAT = r"(?:[,.]?[ ]{1,2}(?i:apt|apartment|suite|ste|unit|flat|room|rm|floor|\#)\.?[ ]?\#?[ ]?[A-Za-z0-9]{1,6}(?![A-Za-z0-9]))?"
# What may stand between a label and its value: "number", "no.", "#", ":", "is", in any sensible order; also a line end.
LINK = r"(?:[ ]?\([A-Za-z][A-Za-z0-9 ,/]{0,20}\))?(?:[ ]{0,10}(?:\b(?:numbers?|num|no|nr|id|ident(?:ifier)?|code|is|was)\b\.?|[#:=(])){0,5}[ ]{0,20}(?:(?<=[:#])\n[ ]{0,20})?"
# The same where a plain space would be too little: after `unit`, `plan`, `group` stands mostly something else.
STRONG_LINK = r"(?:[ ]{0,10}(?:\b(?:numbers?|num|no|nr|id|ident(?:ifier)?|code)\b\.?|[#:=])){1,5}[ ]{0,20}(?:(?<=[:#])\n[ ]{0,20})?"
# At least two digits; letters, dots, dashes and slashes in between.
CODE = (
    r"(?P<value>(?:[A-Z]{1,2}[ ](?=\d{4}))?(?=[A-Za-z./-]{0,29}\d[A-Za-z./-]{0,28}\d)[A-Za-z0-9][A-Za-z0-9./-]{2,28}[A-Za-z0-9]"
    r"|(?:[A-Z][ ])?\d{3}[ ]\d{3}(?:[ ]\d{3,4})?(?!\d)|\d{2}[ ]\d{2}[ ]\d{2,4}(?!\d))"
)
LONG_CODE = r"(?P<value>(?=[A-Za-z./-]{0,12}(?:\d[A-Za-z./-]{0,3}){6})[A-Za-z0-9][A-Za-z0-9./-]{4,28}[A-Za-z0-9])"
EXTENSION = r"(?:,?[ ]?(?:x|ext\.?|extension)[ ]?\#?\d{1,6})?"
NUMBER = rf"(?:\+?1[ .-]?)?(?:\(\d{{3}}\)[ -]?|\d{{3}}[ ./-])\d{{3}}[ .-]\d{{4}}{EXTENSION}"
FOREIGN = r"(?:\+[ ]?|(?<!\))\b00)[1-9]\d{0,2}(?:[ ./-]{0,2}\(?\d{1,5}\)?){2,6}"
# Of a country that writes a leading zero: 020 7946 0991, 0161 496 0000, 01632 960001, 06 12 34 56 78.
NATIONAL = r"\(?0\d{1,4}\)?(?:[ ./-]\d{2,5}){2,4}|\(?0\d{2,5}\)?[ /-]\d{5,8}"
CALLED = (
    r"phone|telephone|tel|ph|cell(?:[ ]?phone)?|mobile|pager|pgr|bpr|callback|beeper|call|contact|reach(?:ed)?(?:[ ]at)?|home|work|office|fax|"
    r"voicemail|text|telefon|handy|telefono"
)
OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
HEX = r"[0-9a-f]{1,4}"
MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
OTHERS = (
    "novi|janu|octu|febr|marz|maer|mai|juni|juli|okto|deze|janv|fevr|mars|avri|juin|juil|aout|sept|octo|nove|dece|ener|abri|mayo|agos|"
    "dici|genn|maggi|giug|lugl|otto|feve|marco|maio|junh|julh|sete|outu"
)
PLATE = r"(?P<value>(?=[A-Z -]{0,19}\d)[A-Z0-9]{1,4}[ -]?[A-Z0-9]{2,17})\b"
# Medicare Beneficiary Identifier (CMS, since 2018): C A AN N A AN N A A N N, without S, L, O, I, B, Z.
_A, _AN = "[AC-HJKMNP-RT-Y]", "[AC-HJKMNP-RT-Y0-9]"
MBI = rf"[1-9]{_A}{_AN}\d-?{_A}{_AN}\d-?{_A}{_A}\d\d"
# What is done on a day that is written as month and day (or year): "Last colonoscopy 3/19".
DONE = (
    r"colonoscopy|mammogram|echo(?:cardiogram)?|mri|ct|cxr|ekg|ecg|eeg|emg|egd|pap|dexa|labs?|pet|biopsy|surgery|cath|stress|"
    r"visit|appt|appointment|admi(?:ssion|tted)|discharged?|clinic|scan|x-?ray|ultrasound|endoscopy|vaccine|vaccination|shot|"
    r"booster|a1c|procedure|transfusion|dialysis|chemo|cycle|lmp|edd|last|seen|until|through|thru|due|scheduled|"
    r"doa|dod|doi|adm|mon(?:day)?|tues?(?:day)?|wed(?:nesday)?|thu(?:rs?)?(?:day)?|fri(?:day)?|saturday|sunday|"
    r"follow-?up|f/u|returned?|started|stopped|begun|since|on|dated|dob|born|date|d/c|dc'd"
)


def _labelled(labels: str, link: str = LINK, code: str = CODE) -> str:
    return rf"(?i:\b(?:{labels}){link}{code})(?![A-Za-z0-9])"


# class: (what the text must hold for the pattern to be tried, pattern) ...; the former in lower case with every digit
# written 0, alternatives separated by |. With a number behind, the pattern is tried only where one of them stands, and up
# to so many characters before: plain search is 50 times faster than a pattern, and this doubles the speed on notes.
# Repeats are bounded: an unbounded one before what may be missing is quadratic in one long record.
SOURCES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "email": (
        ("@", r"(?<![\w.+-])[\w.+-][\w.+'&%~!-]{0,63}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,6}\b"),
        ("[at]|(at)| dot ", r"(?<![\w.+-])[\w.+-]{1,64}[ ]?(?:\[at\]|\(at\)|(?<= )at(?= [A-Za-z0-9-]{1,40} dot ))[ ]?[\w-]{1,63}(?:[ ]?(?:\.|\[dot\]|\(dot\)|(?<= )dot(?= ))[ ]?[\w-]{2,63}){1,4}\b"),
    ),
    "url": (
        ("://|www.", r"(?i:\b(?:https?://|ftp://|www\.)(?!(?:www\.)?(?:loinc\.org|snomed\.info|unitsofmeasure\.org|(?:[a-z]{2,20}\.)?hl7\.org|www\.w3\.org|w3\.org))[^\s<>\"')\]]{1,2000}(?<![.,;]))"),
        (
            ".com|.org|.net|.edu|.gov|.io",
            r"\b(?<![@.-])[A-Za-z0-9-]{2,40}(?:\.[A-Za-z0-9-]{1,40}){0,3}\.(?:com|org|net|edu|gov|io)\b(?:/[^\s<>\"')\]]{0,500}(?<![.,;]))?",
        ),
    ),
    "mac": (("00:|00-|a:|b:|c:|d:|e:|f:|a-|b-|c-|d-|e-|f-", r"(?i:\b[0-9a-f]{2}([:-])(?:[0-9a-f]{2}\1){4}[0-9a-f]{2}\b)"),),
    "iban": (("00", r"\b[A-Z]{2}\d{2}(?:[ ]?[A-Z0-9]{4}){2,7}(?:[ ]?[A-Z0-9]{1,4})?(?![A-Za-z0-9])"),),
    "card": (("0000-0000|0000 0000|0000000000000|0000-000000|0000 000000", r"(?<![\w.-])(?:\d{4}[ -]?){3}\d{1,7}\b|(?<![\w.-])\d{4}[ -]?\d{6}[ -]?\d{5}\b"),),
    "ssn": (
        ("000-00-0000|x-0000|*-0000|000 00 0000", r"\b\d{3}-\d{2}-\d{4}P?\b|(?<![A-Za-z0-9])[xX*]{3}-[xX*]{2}-\d{4}\b"),
        (
            "ssn|ss#|ss #|ss no|social sec|soc sec|soc. sec|sin|nino|national ins",
            r"(?i:\b(?:ssn|ss(?=[ ]?(?:\#|no\b))|social security|soc\.? sec\.?|social insurance|SIN(?=[ ]?[:#]))"
            rf"{LINK})(?P<value>\d{{3}}[ .-]?\d{{2,3}}[ .-]?\d{{3,4}}|\d{{4}})\b",
        ),
        ("nino|national ins|ni ", r"\b[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z](?:[ ]?\d{2}){3}[ ]?[A-D]\b"),
    ),
    "fax": (("fax", rf"(?i:\bfax{LINK})(?P<value>{NUMBER}|{FOREIGN}|{NATIONAL}|\d{{3}}[.-]\d{{4}}|\d{{10}})\b"),),
    "date": (
        ("0000-|0000/|0000.", rf"(?<![\w.])(?<!\w-){YEAR}([-/.]){DAY}\1{DAY}(?:{CLOCK}(?![A-Za-z0-9])|(?=T\d))"),
        ("/0|-0|.0", rf"(?<![\w./])(?<!\d-){DAY}([-/.]){DAY}\1(?:{YEAR}|'?\d\d)(?![A-Za-z0-9])(?!\1\d)(?!\.\d)"),
        ("/0|-0", rf"(?<=\d-){DAY}([/.]){DAY}\1(?:{YEAR}|\d\d)(?![A-Za-z0-9])(?!\1\d)"),
        ("/0", rf"(?<![\w./-])(?:0?[1-9]|1[0-2])/{YEAR}(?![A-Za-z0-9/])"),
        (MONTHS, rf"(?i:\b{MONTH}\.?[ -]{{1,2}}{DAY}(?:st|nd|rd|th)?\b(?:(?:,[ -]{{0,3}}|[ -]{{1,3}})(?:{YEAR}|'\d\d|\d\d(?![\d:/.%]|[ ]?[a-z]))\b)?{NO_DOSE})", 0),
        (MONTHS, rf"(?i:(?<![\w./]){DAY}(?:st|nd|rd|th|\.)?(?:[ /.-]{{0,2}}|[ ]of[ ]){MONTH}\.?(?:,?[ /.-]?(?:{YEAR}|'?\d\d(?![\d:])))?(?![A-Za-z0-9]))", 8),
        (MONTHS, rf"(?i:\b{MONTH}\.?,?[ -]?(?:of[ ])?{YEAR}\b)", 0),
        (MONTHS, rf"(?i:\b{MONTH}\.?,?[ ]?'\d\d\b)", 0),
        (
            "00000000",
            r"(?<![\w./-])(?<!PMID )(?<!PMID: )(?P<value>(?:19[3-9]|20[0-3])\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))(?![\w./-])",
            0,
        ),
        (
            OTHERS,
            rf"(?i:(?<![\w./]){DAY}(?:\.|er|ero)?[ ]{{1,2}}(?:de[ ])?{ANY_MONTH}\.?[ ]{{1,2}}(?:de[l]?[ ])?{YEAR}\b"
            rf"|(?<![\w./]){DAY}\.[ ]{{1,2}}(?:{_OTHER})\b|\b(?:{_OTHER})[ ](?:de[l]?[ ])?{YEAR}\b)",
            10,
        ),
        ("0/0", r"(?<![\w./-])(?P<value>(?:0?[1-9]|1[0-2])/(?:\d\d|[1-9]))(?![/\w])(?!\.\d)", 1),
        ("0/0-0/0|0/00-0", r"(?<![\w./-])(?:0?[1-9]|1[0-2])/(?:0?[1-9]|[12]\d|3[01])-(?:0?[1-9]|1[0-2])/(?:[12]\d|3[01])(?![\w/])"),
        ("dob|birth|born|date|d.o.b", rf"(?i:\b(?:dob|d\.o\.b\.?|birth[ ]?date|date of birth|born|dod|date)[ ]{{0,3}}[:#]?[ ]{{0,10}}\n?[ ]{{0,10}})(?P<value>{YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])|(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]){YEAR})\b"),
    ),
    "phone": (
        ("000-0000|000.0000|000 0000", rf"(?<![\w-])(?<!\d\.){NUMBER}\b"),
        ("000-0000000", r"(?<![\w.-])\d{3}-\d{7}(?![\w-])", 0),
        ("x0000", r"(?<=[ ])x\d{4,5}(?![\w.%])", 0),
        ("+0|000", rf"(?<![\w+-]){FOREIGN}\b", 0),
        ("0 0|0-0|0/0|0.0", rf"(?<![\w./+-])(?:{NATIONAL})\b(?![./-]\d)"),
        (
            "phone|tel|ph|cell|mobile|pager|pgr|bpr|callback|beeper|call|contact|reach|home|work|office|voicemail|text|handy",
            rf"(?i:\b(?:{CALLED})\.?(?:[ ](?:me|him|her|them|us|back|wife|husband|son|daughter|home|phone))?(?:[ ](?:at|on))?{LINK})"
            rf"(?P<value>\d{{3}}[ .-]\d{{4}}{EXTENSION}|\d{{10,11}}|\d{{1,2}}-\d{{4}}|{NATIONAL}|\d{{3}}[ .-]\d{{3}}[ .-]\d{{3,4}})\b",
            0,
        ),
        ("pager|pgr|bpr|beeper|bleep|ext", r"(?i:\b(?:pager|pgr|bpr|beeper|bleep|ext(?:ension)?\.?)[ ]{0,3}[#:]?[ ]{0,3})(?P<value>\d{3,6})\b(?!(?i:[ ]?(?:deg|to[ ]\d|-[ ]?\d)))", 0),
    ),
    "ip": (
        ("0.0.0|0.00.0|0.000.0", rf"(?<![\w.]){OCTET}(?:\.{OCTET}){{3}}(?![\w]|\.\d)"),
        (":", rf"(?i:(?<![\w:])(?:{HEX}:){{7}}{HEX}(?![\w:]))"),
        ("::", rf"(?i:(?<![\w:])(?:{HEX}:){{1,6}}(?::{HEX}){{1,6}}(?![\w:]))"),
    ),
    "vehicle": (
        ("vin|vehicle|chassis|0", r"\b(?=[A-HJ-NPR-Z]{0,16}\d)(?=\d{0,16}[A-HJ-NPR-Z])[A-HJ-NPR-Z0-9]{17}\b"),
        ("vin|plate|registration|tag", rf"(?i:\b(?:vin|licen[sc]e plate|licen[sc]e tag|number plate|plate|registration){LINK}){PLATE}"),
    ),
    "mrn": (
        (
            "mrn|emrn|m.r.n|mr#|mr #|mr no|medical rec|med rec|med. rec|medical. rec|umrn|urn|csn|nhs|chi |empi|patient|pt|hosp|pid|fin|"
            "record|kis|fall",
            _labelled(
                r"e?mrn|m\.r\.n\.?|mr[ ]?\#|mr[ ]no\.?|med(?:ical)?\.? rec(?:ord)?s?|umrn|urn|csn|nhs|chi(?=[ ](?:no|number))|empi|"
                r"patient(?=[ ](?:id|no|number|\#)|\#)|pt(?=[ ]?(?:\#|id|no\b))|hosp(?:ital)?\.?(?=[ ](?:id|no|number|\#))|"
                r"pid|fin(?=[ ]?[:#])|record(?=[ ](?:no|number|\#|id))|kis-?nr|fallnummer|patientennummer"
            ),
            0,
        ),
        (
            "patient/|practitioner/|encounter/",
            r"(?i:(?:patient|practitioner|encounter)/)(?P<value>(?=[A-Za-z-]{0,12}\d)[A-Za-z0-9][A-Za-z0-9.-]{2,62}[A-Za-z0-9])(?![A-Za-z0-9])",
            0,
        ),
        ("unit|chart", _labelled(r"unit|chart", STRONG_LINK), 0),
        ("unit|chart", _labelled(r"unit|chart", r"[ ]", LONG_CODE), 0),
    ),
    "health_plan": (
        ("0", rf"\b{MBI}\b"),
        ("polic|member|subscriber|beneficiary|medica|plan|group|insur|hic", _labelled(
            r"polic(?:y|ies)|member|subscriber|beneficiary|insurance|medicare|medicaid|plan|group|hicn?", STRONG_LINK), 0),
        ("polic|member|subscriber|beneficiary|medica|plan|group|insur|payer|payor", _labelled(
            r"policy|member|subscriber|beneficiary|insurance|insured|medicare|medicaid|plan|group|payer|payor",
            r"[ ]{0,3}:?[ ]{1,3}(?:[A-Za-z]{2,15}[ ]){0,3}", LONG_CODE), 0),
    ),
    "account": (
        ("-0000", r"(?<![A-Za-z0-9-])[A-Z]{1,3}-?\d{2}-\d{4,7}(?![A-Za-z0-9-])", 6),
        (
            "acc|har|episode|encounter|visit|invoice|specimen|order|requisition|confirmation",
            _labelled(
                r"account|acct\.?|(?:har|episode)(?=[ ](?:no|number|\#|id)|[ ]?[#:])|encounter(?=[ ](?:no|number|\#|id)|[ ]?[#:])|visit(?=[ ](?:id|no|number|\#))|invoice|accession|"
                r"specimen(?=[ ](?:id|no|number|\#))|order(?=[ ](?:id|no|number|\#))|requisition|confirmation"
            ),
            0,
        ),
        ("case|claim", _labelled(r"case|claim", STRONG_LINK), 0),
        ("case|claim", _labelled(r"case|claim", r"[ ]", LONG_CODE), 0),
    ),
    "license": (
        (
            "lic|driver|dl|dea|npi|gmc|nmc|ahpra|crm|cert|passport",
            _labelled(r"licen[sc]e|lic\.?|driver'?s licen[sc]e|(?<!/)dl(?=[ ]?(?:\#|:|no\b|number))|dea|npi|gmc|nmc|ahpra|crm|certificate|cert\.?|passport"),
            0,
        ),
    ),
    "device": (
        (
            "serial|s/n|sn|device|udi|imei|implant id",
            _labelled(r"serial|s/n|sn|device|udi|imei|implant id"),
            0,
        ),
        ("lot|model|ref|batch", _labelled(r"lot|model|ref|batch", STRONG_LINK), 0),
    ),
    "age_over_89": (
        (
            "00 y|00  y|00-y|00y|00 m|00 f|00 w|00 l|00 g|00 - y|00--y|00- y|00 -y",
            r"(?i:(?<![\d.])(?P<value>9\d|1[0-2]\d)(?=[ -]{0,2}(?:years?|yrs?|y-o|y\.?[ ]?/?o\.?|yo[mf]?|y/o|year-old)\b|[ ](?:male|female|man|woman|gentleman|lady)\b))",
            1,
        ),
        ("age", r"(?i:\b(?:aged?(?:/sex)?|age of|age is|age was)[: ]{1,5}\n?)(?P<value>9\d|1[0-2]\d)\b(?!\.\d|[%\d]|/\d)", 0),
        ("00m|00f|00 m|00 f", r"(?:(?<![A-Za-z0-9.,/°] )(?<![\w./°-])|(?<=\ba )|(?<=\bis )|(?<=\bpt )|(?<=\bPt )|(?<=[a-z][.,:] ))(?P<value>9\d|1[0-2]\d)(?=[ ]?[MF]\b)(?![ ][MF][.:])", 1),
        ("is 00|is 000", r"(?i:\b(?:pt|patient|she|he|mother|father|wife|husband)[ ]is[ ](?:now[ ])?)(?P<value>9\d|1[01]\d)(?=[.,;]?(?:[ \n]|$))(?![.,;]?[ ](?:%|percent|kg|lb|mg|bpm|on|over))"),
        ("ninety", r"(?i:\b(?P<value>ninety(?:[ -](?:one|two|three|four|five|six|seven|eight|nine))?)(?=[ -](?:years?|yrs?|y\.?/?o\.?)\b))"),
    ),
    "address": (
        (
            "0 |0a |0b |0c ",
            rf"(?<![\w./-])\d{{1,6}}[A-Za-z]?,?[ ](?:[NSEW]\.?[ ]|North[ ]|South[ ]|East[ ]|West[ ])?(?P<street>(?:[A-Z0-9][A-Za-z0-9'.-]{{0,20}}[ ]){{1,4}}){SUFFIXES}(?![A-Za-z0-9]){FLAT}",
        ),
        ("0 |0a |0b ", rf"(?<![\w./-])\d{{1,5}}[a-z]?[ ](?:[nsew]\.?[ ])?(?P<street>(?:[a-z][a-z'-]{{2,20}}[ ]){{1,2}}){SMALL_SUFFIXES}(?![A-Za-z0-9])(?![ ](?:elev|seg|dep|change|wave)){FLAT}"),
        ("0", rf"(?<![\w./-])\d{{1,4}}[A-Za-z]?,?[ ](?P<street>[A-Z][A-Za-z']{{1,20}}(?:[ ][A-Z][A-Za-z']{{1,20}}){{0,3}}),[ ](?:[A-Z][A-Za-z' -]{{2,30}},[ ])?[A-Z][A-Za-z' -]{{2,30}},?[ ]{UK_POSTCODE}\b"),
        (
            "calle|c/|av|plaza|pza|pz|paseo|pso|ctra|carretera|camino|ronda|apartado|travesia|via|rua|piazza|corso|prolong",
            r"\b(?:Calle|C/|Avda?\.?|Avenida|Av\.|Plaza|Pza\.?|Pz\.?|Paseo|Ctra\.?|Carretera|Camino|Ronda|Apartado[ ]de[ ]Correos|Travesia|Via|Rua|Piazza|Corso)"
            r"[ ]{0,2}[A-Z0-9a-z][^\n;|:]{2,70}?[ .,-]{1,4}(?:[A-Z]{1,2}-)?\d{4,5}(?:-\d{3})?[ .,]{1,3}[A-Z][A-Za-z'-]{1,25}(?:[ ](?:(?:de|del|la|las|los)[ ]){0,2}[A-Z][A-Za-z'-]{1,25}){0,2}(?:[ ]\([A-Z][A-Za-z ]{2,25}\))?(?![A-Za-z0-9])",
            0,
        ),
        (
            "00000 ",
            r"(?<![\w.,-])(?:[A-Z]{1,2}-)?\d{5},?[ ][A-Z][A-Za-z'-]{1,25}(?:[ ](?:(?:de|del|la|las|los)[ ]){0,2}[A-Z][A-Za-z'-]{1,25}){0,2}(?:[ ]\([A-Z][A-Za-z ]{2,25}\))?"
            r"(?=[ .,]{0,3}\(?(?:Espana|Spain|Deutschland|Germany|France|Italia|Italy|Mexico|Portugal|Schweiz|Osterreich|Belgique|Nederland|Brasil|Argentina|Chile|Colombia|Peru)(?![A-Za-z]))",
            0,
        ),
        ("box 0|box #", r"(?i:\bp\.?[ ]?o\.?[ ]box[ ]\#?\d{1,8}\b)"),
        ("str", r"\b[A-Z][a-z]{1,20}(?:-[A-Z][a-z]{1,20}){0,3}(?:strass?e|str\.|weg|platz|allee|gasse)[ ]\d{1,4}[a-z]?\b" + TOWN),
        ("rue|avenue|boulevard|chemin|allee", r"(?i:\b\d{1,4},?[ ](?:bis[ ]|ter[ ])?(?:rue|avenue|boulevard|chemin|place|allee|quai)[ ](?:de[ ](?:la[ ])?|des[ ]|du[ ]|d')?)[A-Z][A-Za-z'-]{1,20}(?:[ -][A-Z][A-Za-z'-]{1,20}){0,3}" + TOWN),
        ("calle|c/|av|via|rua|piazza|plaza|paseo|pso|carrera|corso", r"\b(?:Calle|[Cc]/\.?|Avenida|Avinguda|Avda?\.?|Via|Rua|Piazza|Plaza|Paseo|Pso\.?|Carrera|Corso)[ ]?(?:Dr\.[ ])?(?:de[ ](?:la[ ])?|della[ ]|do[ ]|da[ ])?[A-Z][A-Za-z'-]{1,20}(?:[ ][A-Z][A-Za-z'-]{1,20}){0,2},?[ ]\d{1,5}\b" + TOWN),
        (
            "lives|living|lived|resid|grew up|raised|born|native|homeless|moved|relocated|emigrated|visiting|flew|transferred|travel|trip",
            rf"(?i:\b(?:lives|living|lived|resides|residing|reside|grew up|raised|born|resident|native|homeless)[ ](?:in|of|near)[ ]|\b(?:moved|relocated|emigrated|visiting|flew in|transferred)[ ](?:(?:here|back|away|over)[ ])?(?:from|to)[ ]|\b(?:travel|trip)(?:ed|led|s|ing|ling)?[ ](?:from|to)[ ])(?P<value>(?:St\.[ ])?{CITY}(?:,[ ](?:{STATE}|{_STATES})\b)?)",
            0,
        ),
        ("r/o ", r"[Rr]/[oO][ ](?P<value>(?:H\.?[ ]?[Nn]o|House|Flat|Plot|Vill(?:age)?|Door|D\.?[ ]?No)[^\n|;]{3,80})", 0),
        ("\n", r"\n(?P<value>[A-Z][A-Za-z' -]{2,30})(?=\n(?:[A-PR-UWYZ](?:\d{1,2}|[A-HK-Y]\d[0-9A-Z]?|\d[A-HJKSTUW])[ ]\d[ABD-HJLNP-UW-Z]{2})\b)", 0),
        (", ", rf"(?P<city>\b(?:St\.[ ])?{CITY}),[ ](?:{CLEAR_STATE}|{_STATES})(?![A-Za-z])(?!,?[ ]{{1,2}}\d{{5}})"),
    ),
    "zip": (
        (" 00000", rf"(?P<city>\b(?:St\.[ ])?{CITY}),?[ ]{{1,2}}{STATE},?[ ]{{1,2}}\d{{5}}(?:-\d{{4}})?(?![\w-])"),
        (" 00000", rf"\b{STATE},?[ ]{{1,2}}(?P<value>\d{{5}}(?:-\d{{4}})?)\b"),
        ("zip|post|plz", rf"(?i:\b(?:zip(?: ?code)?|postal code|post ?code|plz){LINK})(?P<value>\d{{4,6}}(?:-\d{{4}})?|[A-Z0-9]{{2,4}}[ ]?[A-Z0-9]{{3}})\b"),
        ("00000-0000", r"(?<![\w-])\d{5}-\d{4}(?![\w-])"),
        ("0", rf"(?P<city>\b{CITY}),?[ ]{{1,2}}(?:[A-PR-UWYZ](?:\d{{1,2}}|[A-HK-Y]\d[0-9A-Z]?|\d[A-HJKSTUW])[ ]\d[ABD-HJLNP-UW-Z]{{2}})\b"),
        ("0", r"\b(?:GIR[ ]0AA|[A-PR-UWYZ](?:\d{1,2}|[A-HK-Y]\d[0-9A-Z]?|\d[A-HJKSTUW])[ ]\d[ABD-HJLNP-UW-Z]{2})\b"),
        ("0", r"\b[ABCEGHJ-NPRSTVXY]\d[ABCEGHJ-NPRSTV-Z][ -]\d[ABCEGHJ-NPRSTV-Z]\d\b"),
        ("d-0|a-0|ch-0|f-0", r"\b(?:D|A|CH|F|I)-\d{4,5}(?=[ ][A-Z])"),
    ),
    "other_number": (
        ("-0", r"(?i:(?<![A-Za-z0-9-])[0-9a-f]{8}-[0-9a-f]{4}-[1-8][0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}(?![A-Za-z0-9-]))", 13),
        (
            "id|number|no.|no:|har ",
            rf"(?i:\b(?:id|identifier|number|no|har)\b)[ ]?[.:#]?[ ]?(?!NCT|PMC|GSE|ISRCTN){LONG_CODE}(?![A-Za-z0-9])",
            0,
        ),
        ("#0|# 0|#a", rf"(?<![A-Za-z0-9&])\#[ ]?{LONG_CODE}(?![A-Za-z0-9])", 0),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Recogniser:
    """A pattern of a class; `anchors`: what it needs. `back`: it begins at most so far before an anchor (None: anywhere)."""

    kind: str
    anchors: tuple[str, ...]
    pattern: re.Pattern[str]
    back: int | None

    def matches(self, text: str, lowered: str) -> Iterator[re.Match[str]]:
        """In a plain copy; `lowered`: the same in lower case with every digit written 0."""
        if self.back is None:
            if any(anchor in lowered for anchor in self.anchors):
                yield from self.pattern.finditer(text)
            return
        done = 0
        for place in places(self.anchors, lowered):
            for start in range(max(done, place - self.back), place + 1):
                if match := self.pattern.match(text, start):
                    yield match
                    done = max(match.end(), start + 1)
                    break


def _recogniser(kind: str, needs: str, source: str, back: int | None = None) -> Recogniser:
    return Recogniser(kind, tuple(needs.split("|")), re.compile(source, re.A), back)


def _all() -> Iterator[Recogniser]:
    """In the order of precedence: what only other countries write goes before its class."""
    for kind, entries in SOURCES.items():
        for entry in (*ABROAD.get(kind, ()), *entries):
            yield _recogniser(kind, *entry)


RECOGNISERS = list(_all())
DIGITS = str.maketrans("123456789", "0" * 9)
LABELLED_CODES = frozenset({"mrn", "account", "health_plan", "device", "license", "other_number"})
UNIT_LIKE = re.compile(r"[a-z.-]+\d\d", re.I)


def plausible(kind: str, match: re.Match[str], value: str, after: str) -> bool:
    """What a pattern alone cannot say: check digits, doses behind weak labels, words that are no streets."""
    if kind in LABELLED_CODES:
        if _is_count(kind, match, value) or (kind == "device" and _REFERENCE_RANGE.match(match[0])):
            return False
        digits = sum(c.isdigit() for c in value)
        enough = digits >= 4 or (digits >= 2 and len(value) >= 6 and not UNIT_LIKE.fullmatch(value))
        return enough and not (len(value) < 6 and value.isdigit() and MEASURED.match(after))
    if kind == "card":
        return is_card(value)
    if kind == "iban":
        return is_iban(value)
    if kind == "age_over_89":
        hot = value.isdigit() and int(value) >= 95 and _FAHRENHEIT.match(after) and not _WOMAN.match(after)
        hot = hot or bool(_DEGREES.match(after))
        return not hot and not _HOT.search(match.string[max(0, match.start() - 24) : match.start()])
    if kind in ("address", "zip"):
        groups = match.groupdict()
        if groups.get("street") and value[:1].isdigit() and _CLEAR_STREET.search(value):
            return True
        words = (groups.get("street") or groups.get("city") or groups.get("value") or "").lower().split()
        return not any(word.strip(".,") in NEVER for word in words)
    if kind == "ip":
        return not _RELEASE.search(match.string[max(0, match.start() - 12) : match.start()])
    if kind == "phone":
        return sum(c.isdigit() for c in value) >= (8 if value.startswith(("+", "00")) else 3)
    if kind == "date" and _DASHED.fullmatch(value):
        return min(map(int, value.split("-")[:2])) <= 12 and not MEASURED.match(after)
    if kind == "date" and value.count("/") == 1 and "-" not in value and len(value) < 6:
        return (
            _is_dated(match, value)
            and not _SCORED.match(after)
            and not _SCORE.search(match.string[max(0, match.start() - 24) : match.start()])
        )
    return True


def _is_count(kind: str, match: re.Match[str], value: str) -> bool:
    """Whether `number` says how many: `Total number: 125000`, or nothing is named and the number is short."""
    if kind != "other_number" or not _COUNTS.match(match[0]) or not value.isdigit():
        return False
    before = _WORD_BEFORE.search(match.string, max(0, match.start() - 24), match.start())
    if before is None:
        return len(value) < 7
    return before[1].lower() in QUANTITIES or before[1].lower() in THINGS


_COUNTS = re.compile(r"(?:number|no)\b", re.I | re.A)
_WORD_BEFORE = re.compile(r"(?<![A-Za-z])([A-Za-z]{1,20})[ ]$", re.A)
_REFERENCE_RANGE = re.compile(r"ref[ ]{0,10}\#?[:=]?[ ]{0,20}\d{1,5}(?:\.\d+)?-\d{1,5}(?:\.\d+)?$", re.I | re.A)
# Between a number and F stands a temperature, not a woman; between a scale and a fraction no date.
_HOT = re.compile(r"(?:temp|tmax|fever|febrile|\bt|degrees|sat|spo2|hr|bp|pulse)\b[^.\n]{0,12}$", re.I | re.A)
_DEGREES = re.compile(r"[ ]?F[ ](?:deg|temp)", re.I | re.A)
_FAHRENHEIT = re.compile(r"[ ]?F\b")
_WOMAN = re.compile(
    r"[ ]?F[,]?[ ](?:with|w/|who|presents?|presented|presenting|here|admitted|c/o|s/p|hx|found|from|brought|seen)",
    re.I | re.A,
)
_SCORED = re.compile(
    r"[ ](?:pain|strength|murmur|systolic|power|reflex|score|points|on (?:the )?(?:scale|pain))", re.I | re.A
)
_SCORE = re.compile(
    r"(?:pain|strength|murmur|apgar|score|scale|motor|power|grade|ratio|reflex|bp|vision|acuity)\w*[^.\n]{0,10}$",
    re.I | re.A,
)


_CLEAR_STREET = re.compile(r"[A-Z][A-Za-z'.-]*[ ](?:Street|Avenue|Road|Boulevard|Lane|Parkway|Highway|Terrace)\b", re.A)
_RELEASE = re.compile(r"(?:version|release|build|section|chapter|\bv|\bver)[ .:]{0,2}$", re.I | re.A)
_DASHED = re.compile(r"\d{1,2}-\d{1,2}-\d\d", re.A)
# Before "3/19" these make it a date; one written as month and day after `on` and `since`, whatever the numbers.
_DATED = re.compile(r"\b(?:on|dated|since|dob|born|date|doa|dod)[: ]{1,3}$", re.I | re.A)
_DONE = re.compile(
    rf"\b(?:(?:{DONE})(?:[ ](?:on|in|of|from|was|done))?|last[ ][a-z0-9]{{2,20}}(?:[ ]on)?)[: (]{{1,3}}$", re.I | re.A
)


def _is_dated(match: re.Match[str], value: str) -> bool:
    """Whether `3/19` is a month with its day or year, by what stands before; a denominator up to 10 may be a score."""
    before = match.string[max(0, match.start() - 40) : match.start()]
    month, day = map(int, value.split("/"))
    if _DATED.search(before) and 1 <= day <= 31:
        return True
    return (day > 10 or value.split("/")[1].startswith("0")) and bool(_DONE.search(before))


def is_card(value: str) -> bool:
    """13 to 19 digits that begin as a payment card's do and pass Luhn's check (ISO/IEC 7812-1)."""
    digits = []
    for c in value:
        if c.isdigit():
            digits.append(int(c))
    if not 13 <= len(digits) <= 19 or digits[0] not in (2, 3, 4, 5, 6) or len(set(digits)) < 2:
        return False
    doubled = []
    for digit in digits[-2::-2]:
        doubled.append(digit * 2 - 9 * (digit > 4))
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(value: str) -> bool:
    """ISO 13616: the rearranged number is 1 modulo 97."""
    code = value.replace(" ", "")
    if not 15 <= len(code) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1


# Marks that earlier de-identification has left: MIMIC-III and MIMIC-IV.
MARKED = re.compile(r"\[\*\*[^*\n]{0,200}(?:\*(?!\*\])[^*\n]{0,200}){0,8}\*\*\]|_{3,}")
