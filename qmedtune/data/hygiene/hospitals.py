"""Hospitals, clinics, practices and nursing homes by their names: what a word like `Hospital` stands behind or before."""

# ruff: noqa: E501 (a pattern reads better in one piece)

from __future__ import annotations

import re
from collections.abc import Iterator

from qmedtune.data.hygiene.name_words import is_never
from qmedtune.data.hygiene.persons import Place, take_back
from qmedtune.data.hygiene.words import INSIDE, OF_HOSPITALS

HOSPITAL = re.compile(
    r"(?<=[A-Za-z.'&])[ ](?:(?:Memorial|MEMORIAL|General|GENERAL|Regional|Community|University|Children's|Medical)[ ]){0,2}"
    r"(?:Hospitals?|HOSPITAL|Medical[ ]Cent(?:er|re)|MEDICAL[ ]CENTER|Clinics?|CLINIC|Nursing[ ]Home|NURSING[ ]HOME|"
    r"Nursing[ ](?:Center|Facility|and[ ]Rehab(?:ilitation)?(?:[ ]Center)?)|Rehab(?:ilitation)?(?:[ ](?:Center|Hospital))?|"
    r"Hospice|Infirmary|Sanatorium|Assisted[ ]Living|Care[ ](?:Center|Centre|Home)|Senior[ ](?:Living|Care|Center)|Group[ ]Home|Retirement[ ]Village|Health[ ](?:System|Center|Centre|Care)|"
    r"Healthcare|HEALTHCARE|Surgery[ ]Center|Cancer[ ](?:Center|Institute)|Heart[ ](?:Center|Institute)|Manor|"
    r"HEALTH[ ](?:SYSTEM|CENTER|CENTRE|NETWORK)|NHS[ ](?:Foundation[ ])?Trust|HCS|VAMC|CBOC|"
    r"Retirement[ ](?:Home|Community)|Skilled[ ]Nursing(?:[ ]Facility)?|Klinikum|Krankenhaus)(?![A-Za-z0-9_])"
    r"(?:[ ]of[ ](?:the[ ])?[A-Z][A-Za-z'-]{1,30}(?:[ ][A-Z][A-Za-z'-]{1,30}){0,2})?",
    re.A,
)
# In capitals `HOSPITAL COURSE` is a heading: only what a hospital is named after counts.
SAINT_HOSPITAL = re.compile(
    r"(?<![A-Za-z0-9_])(?:HOSPITAL|CLINICA|HOPITAL|OSPEDALE)[ ](?:SAO|SAN|SANTA|SANTO|SAINT|SAINTE|ST\.?|DE|DEL|DA|DO|DI)[ ]"
    r"(?:(?:LA|LOS|LAS)[ ])?[A-Z][A-Z'-]{1,30}(?:[ ][A-Z][A-Z'-]{1,30}){0,2}(?![A-Za-z0-9_])",
    re.A,
)
FRONT_HOSPITAL = re.compile(
    r"(?<![A-Za-z0-9_])(?:Hospital|Clinica|Klinikum|Krankenhaus|Hopital|Ospedale|Policlinico|Policlinica|Clinique|Polyclinique|"
    r"Centre[ ]Hospitalier|Complejo[ ]Hospitalario|Centro[ ](?:de[ ]Salud|Medico|Hospitalar(?:io)?)|Hospice|University|"
    r"Universitatsklinikum|Ziekenhuis|Sykehus|Szpital|CHU|CHRU)"
    r"(?P<value>(?:(?:[ ](?:of|de|del|di|la|las|los|the|am|St\.|der|du|des|da|do|dos|y|i|Dr\.|Dra\.)){0,3}[ ](?:[dl]')?(?!(?:Calle|Avda?|Av|Plaza|Pza?|Ctra|Paseo|Camino|Servicio|Apartado)(?![A-Za-z]))(?:\"?[A-Z][A-Za-z'-]{1,30}\"?|[A-Z]\.)){1,7})",
    re.A,
)
# `The Elms Surgery`, `Riverside Medical Practice`: where general practitioners work.
PRACTICE = re.compile(
    r"(?<![A-Za-z0-9_])(?:The[ ](?:[A-Z][a-z'-]{2,20}[ ]){1,2}(?:Surgery|Practice)|(?:[A-Z][A-Za-z'-]{2,20}[ ]){1,3}"
    r"(?:Medical|Family|Health|Dental|Group)[ ](?:Practice|Clinic))(?![A-Za-z0-9_])",
    re.A,
)
LABELLED_HOSPITAL = re.compile(
    r"(?<![A-Za-z0-9_])(?:(?:OSH|Hospital|HOSPITAL|Facility|FACILITY|SNF|Rehab)[ ]?(?:\(|:[ ]{1,8})|"
    r"(?i:accepting|receiving|transferring|sending|referring|admitting)[ ](?i:facility|hospital)[ ]{0,2}[:-][ ]{1,8})"
    r"(?P<value>[A-Z][A-Za-z.'-]{2,30}(?:[ ][A-Z][A-Za-z'-]{1,30}){0,3})(?![A-Za-z0-9_:])",
    re.A,
)


def find_hospitals(text: str) -> Iterator[Place]:
    """(start, end) of named hospitals, clinics and homes in a plain copy."""
    for match in HOSPITAL.finditer(text):
        start = take_back(text, match.start(), inside=True)
        words = []
        for word in text[start : match.start()].split():
            words.append(word.lower().strip(".,"))
        named = [word for word in words if word not in OF_HOSPITALS and word not in INSIDE]
        if named or " of " in match[0]:
            yield start if words else match.start() + 1, match.end()
    for match in LABELLED_HOSPITAL.finditer(text):
        named = [word for word in match["value"].split() if word.lower() not in OF_HOSPITALS]
        if named and not any(is_never(word) for word in named):
            yield match.span("value")
    for match in SAINT_HOSPITAL.finditer(text):
        yield match.span()
    for match in FRONT_HOSPITAL.finditer(text):
        named = []
        for word in match["value"].split():
            bare = word.strip('."')
            if bare[:1].isupper() and bare.lower() not in OF_HOSPITALS and bare not in ("Dr", "Dra"):
                named.append(bare)
        if named and not is_never(named[0]):
            yield match.start(), match.end()
    for match in PRACTICE.finditer(text):
        yield match.span()
