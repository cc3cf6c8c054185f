"""Identifiers as other countries write them: national numbers, dates, addresses, and labels in other scripts.

Two kinds. ABROAD holds more patterns of the classes in recognisers.py, matched on the plain copy like those. `labelled`
finds names behind labels that are not in Latin letters (`患者姓名：`), which the plain copy no longer tells apart.
"""

# ruff: noqa: E501 (a pattern reads better in one piece)

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# Three letters that are no English month: Spanish, Italian, French, Portuguese, German.
_SHORT_MONTHS = "ene|abr|ago|dic|gen|mag|giu|lug|set|ott|fev|avr|mai|out|dez|okt|mrz|janv|juil|sept"
_NUMBER_LABELS = (
    r"nino|national[ ]insurance|ahv|avs|nir|securite[ ]sociale|pesel|bsn|burgerservicenummer|dni|nie|nif|cpf|codice[ ]fiscale|"
    r"personnummer|fodselsnummer|cpr|aadhaar|sozialversicherung|svnr|rvnr|rodne[ ]cislo|henkilotunnus|curp|rut|cedula"
)
_ANCHORS = (
    "nino|national ins|ahv|avs|nir|securite|pesel|bsn|burgers|dni|nie|nif|cpf|codice|personn|fodsel|cpr|aadha|sozialv|svnr|rvnr|"
    "rodne|henkilo|curp|rut|cedula"
)
# What follows such a label: groups with a digit in each, or a letter alone, six digits at least.
_NUMBER = r"(?P<value>(?=(?:[A-Za-z ./-]{0,8}\d){6})[A-Z0-9]{1,18}(?:[ ./-]{1,2}(?:[A-Z]{0,3}\d{1,11}[A-Z]{0,2}|[A-Z](?![A-Za-z]))){0,7})"

ABROAD: dict[str, tuple[tuple[Any, ...], ...]] = {
    "ssn": (
        ("000.0000.0000.00", r"(?<![\w.])756\.\d{4}\.\d{4}\.\d{2}(?![\w]|\.\d)"),
        ("0 00 00 00 000 000", r"(?<![\w.])[12][ ]\d{2}[ ](?:0[1-9]|1[0-2]|[2-9]\d)[ ](?:\d{2}|2[AB])[ ]\d{3}[ ]\d{3}(?:[ ]\d{2})?(?![\w])"),
        ("000.000.000-00", r"(?<![\w.])\d{3}\.\d{3}\.\d{3}-\d{2}(?!\w)"),
        ("00a00a000|00b00|00c00|00d00|00e00|00h00|00l00|00m00|00p00|00r00|00s00|00t00", r"\b[A-Z]{6}\d{2}[ABCDEHLMPRST]\d{2}[A-Z]\d{3}[A-Z]\b"),
        (_ANCHORS, rf"(?i:\b(?:{_NUMBER_LABELS})(?:-?(?:nr|nummer|no|number|num))?)(?:[ ]{{0,4}}(?:no|nr|number)?[.:#=-]{{0,3}}){{1,2}}[ ]{{0,10}}{_NUMBER}(?![A-Za-z0-9])", 0),
    ),
    "date": (
        (
            "|".join(f"-{month}" for month in _SHORT_MONTHS.split("|")),
            rf"(?i:(?<![\w./])(?:0?[1-9]|[12]\d|3[01])-(?:{_SHORT_MONTHS})\.?-(?:(?:1[89]|2[01])\d\d|\d\d)(?!\w))",
            2,
        ),
    ),
    "phone": (
        ("tel|tfno|tlf|phone|movil|mobile|cell|handy|gsm|natel|fax", r"(?i:\b(?:telephone|telefono|telefon|tel|tfno|tlf|phone|movil|mobile|cell|handy|gsm|natel|fax)\.?)(?:[ ]{0,4}(?:no|nr)?[.:#]{0,2}){1,2}[ ]{0,10}(?P<value>\(?\+?\d{2,5}\)?(?:[ ./-]{1,2}\d{2,4}){2,4}|0\d{1,5}[ ]?/[ ]?\d{2,8}(?:-\d{1,5})?)(?!\w|[ ]?[./-][ ]?\d)", 0),
        ("pager|pgr|bpr|beeper", r"(?i:\b(?:pager|pgr|bpr|beeper)[ ]{0,3}:?[ ]{0,3}\#[ ]?)(?P<value>\d{3,7})\b", 0),
    ),
    "mrn": (
        (
            "dossier|ipp|nhc|historia|cartella|journalnr|aufnahmenummer",
            r"(?i:\b(?:dossier|ipp|nhc|historia[ ]clinica|cartella[ ]clinica|journalnr|aufnahmenummer))(?:[ ]?n[o.]{0,2})?[ ]{0,3}[:#.][ ]{0,10}(?P<value>(?=[A-Za-z./-]{0,10}\d[A-Za-z./-]{0,10}\d)[A-Za-z0-9][A-Za-z0-9./-]{2,24}[A-Za-z0-9])(?![A-Za-z0-9])",
            0,
        ),
    ),
    "health_plan": (
        (
            "versicherten|kvnr|mutuelle",
            r"(?i:\b(?:(?:kranken)?versicherten-?(?:nr|nummer)|kvnr|mutuelle))\.?[ ]{0,3}[:#]?[ ]{0,10}(?P<value>(?=[A-Za-z./-]{0,4}\d)[A-Z0-9][A-Z0-9./-]{4,18}[A-Z0-9])(?![A-Za-z0-9])",
            0,
        ),
    ),
    "device": (
        ("(00)", r"\(01\)\d{14}(?:\((?:1[0-7]|21)\)[A-Za-z0-9]{1,20}){0,4}(?![A-Za-z0-9])"),
    ),
    "age_over_89": (
        ("00 j|00 a|00-j|00j", r"(?i:(?<![\d.])(?P<value>9\d|1[0-2]\d)(?=[ -]?(?:jahren?|jahrig\w{0,2}|ans|anos|anni|jaar)\b))", 1),
        ("age|alter|edad|eta", r"(?i:\b(?:age|alter|edad|eta)[: ]{1,5})(?P<value>9\d|1[0-2]\d)(?=(?i:[ ]?(?:y|yrs?|yo|j|a)?\b))(?!\.\d|[%\d]|/\d)", 0),
    ),
    "address": (
        (
            "00000 |00000, ",
            r"\b(?:(?:Am|Im|An[ ]der|Zum|Zur|In[ ]der|Auf[ ]dem)[ ])?(?P<street>(?!(?:Hospital|Hospitalario|Universitari[oa]|Servicio|Complejo|Clinica|Centro|Departamento|Universidad|General)[ ])[A-Z][A-Za-z'.-]{1,20}(?:[ ](?:(?:de|del|la|las|los|el|y)[ ]){0,2}[A-Z][A-Za-z'.-]{1,20}){0,3}),?[ ](?:\d{1,4}[a-z]?|s[ ]?/[ ]?n)"
            r"(?:,?[ ]\d{1,2}[.]?[A-Za-z]{0,2})?[ .,-]{1,4}(?:[A-Z]{1,2}-)?\d{5},?[ ]{1,2}(?!Units|Int|IU)[A-Z][a-z]{2,20}(?:[ ](?:(?:de|del|la|las|los)[ ]){0,2}[A-Z][a-z]{1,20}){0,2}(?:[ ]\([A-Z][A-Za-z ]{2,25}\))?(?![A-Za-z0-9])",
        ),
    ),
}  # fmt: skip

# Labels of a person's name in other scripts, and a colon. Chinese, Japanese, Korean, Cyrillic, Greek, Arabic, Hebrew.
_LABEL = re.compile(
    r"(?:患者姓名|病人姓名|患者|病人|姓名|医生|医師|主治医|氏名|患者名|환자명|환자|성명|이름|"
    r"[Пп]ациент(?:ка)?|ПАЦИЕНТ(?:КА)?|ФИО|Ф\.[ ]?И\.[ ]?О\.|[Фф]амилия|[Ии]мя|[Вв]рач|[Пп]ац[іи]єнт(?:ка)?|"
    r"[Όό]νομα(?:[ ]ασθενούς)?|ΟΝΟΜΑ(?:[ ]ΑΣΘΕΝΟΥΣ)?|[Οο]νοματεπώνυμο|[Εε]πώνυμο|[Αα]σθεν(?:ής|ούς)|[Ιι]ατρός|"
    r"اسم[ ]المريضة?|المريضة?|الاسم|الطبيبة?|שם[ ](?:המטופל|החולה|מטופל)|שם|המטופל(?:ת)?)"
    r"[ \u00a0\t]{0,4}[:：][ \u00a0\t]{0,10}"
)
# Up to six words, each of letters alone, one space or a middle dot apart.
_VALUE = re.compile(
    r"[^\W\d_]{1,30}(?:['’-][^\W\d_]{1,30})?(?:\.?[ \u00a0·・,]{1,2}[^\W\d_]{1,30}(?:['’-][^\W\d_]{1,30})?){0,5}"
)


def labelled(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of names behind labels in other scripts, in the text itself, as far as their line or field goes."""
    if text.isascii():
        return
    for label in _LABEL.finditer(text):
        value = _VALUE.match(text, label.end())
        if value:
            yield value.span()
