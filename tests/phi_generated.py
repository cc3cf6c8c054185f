"""Invented identifiers, drawn: structured ones in a sentence between sentences without any, and names in notes."""

# ruff: noqa: E501, SIM905 (lists of forms)

from __future__ import annotations

import random
import string

CONTEXT = ("Patient seen in clinic. ", "Assessment: stable, BP 120/80, HR 72. ", "Given 2 x 500 mg daily for 10 days. ")


def digits(rng, count):
    return "".join(rng.choices(string.digits, k=count))


def number(rng):
    area, middle, last = (str(rng.randint(200, 999)), str(rng.randint(200, 999)), digits(rng, 4))
    return rng.choice(
        [
            f"({area}) {middle}-{last}",
            f"{area}-{middle}-{last}",
            f"{area}.{middle}.{last}",
            f"+1 {area} {middle} {last}",
        ]
    )


def day(rng):
    months = ["January", "Feb", "March", "Apr", "May", "June", "Jul", "August", "Sept", "October", "Nov", "December"]
    y, m, d = rng.randint(1930, 2025), rng.randint(1, 12), rng.randint(1, 28)
    name = months[m - 1]
    return rng.choice(
        [f"{m:02d}/{d:02d}/{y}", f"{m}/{d}/{y % 100:02d}", f"{y}-{m:02d}-{d:02d}", f"{name} {d}, {y}",
         f"{d} {name} {y}", f"{d:02d}-{name[:3]}-{y}", f"{name} {d}th", f"{d:02d}.{m:02d}.{y}"]
    )  # fmt: skip


def code(rng, low=6, high=10):
    letters = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(0, 2)))
    return letters + digits(rng, rng.randint(low, high))


def vin(rng):
    allowed = "ABCDEFGHJKLMNPRSTUVWXYZ0123456789"
    return "1H" + "".join(rng.choices(allowed, k=13)) + digits(rng, 2)


# class -> (sentence with {}, maker)
MADE = {
    "phone": (["Phone: {}", "call him at {} today", "tel {}", "contact {}."], number),
    "fax": (["Fax: {}", "fax number {}", "Fax {}"], number),
    "email": (["write to {}", "e-mail: {}"], lambda r: f"{code(r).lower()}.x@mail{r.randint(1, 9)}.example.org"),
    "ssn": (
        ["SSN {}", "social security number {}", "({})"],
        lambda r: f"{r.randint(100, 899)}-{r.randint(10, 99)}-{digits(r, 4)}",
    ),
    "mrn": (["MRN: {}", "MRN {}", "medical record number {}", "Med rec no. {}", "Unit No: {}", "MRN# {}"], code),
    "url": (["see {}", "portal ({})"], lambda r: f"https://{code(r).lower()}.example.com/p/{digits(r, 4)}"),
    "ip": (["from {}", "host {}"], lambda r: ".".join(str(r.randint(1, 254)) for _ in range(4))),
    "date": (["on {}", "Admitted {}.", "DOB: {}", "seen {}"], day),
    "age_over_89": (
        ["a {}-year-old woman", "{} y/o male", "{} year old", "aged {}"],
        lambda r: str(r.randint(90, 109)),
    ),
    "zip": (
        ["Boston, MA {}", "ZIP {}", "zip code: {}"],
        lambda r: r.choice([digits(r, 5), f"{digits(r, 5)}-{digits(r, 4)}"]),
    ),
    "account": (["Account number: {}", "acct# {}", "Account {}"], code),
    "license": (["License no. {}", "driver's license {}", "DEA number {}", "NPI: {}"], code),
    "vehicle": (["VIN {}", "his car ({})"], vin),
    "device": (["serial number {}", "device ID: {}", "S/N {}", "pacemaker serial no. {}"], code),
    "health_plan": (["Member ID: {}", "policy number {}", "Medicare no. {}", "subscriber # {}"], code),
}


def planted(count, seed):
    """(text, start, end, class): one identifier in a sentence between sentences without any."""
    rng = random.Random(seed)
    for _ in range(count):
        kind = rng.choice(list(MADE))
        forms, make = MADE[kind]
        value = make(rng)
        before, after = rng.choice(forms).split("{}")
        text = rng.choice(CONTEXT) + before + value + after
        start = len(text) - len(after) - len(value)
        yield text + " " + rng.choice(CONTEXT), start, start + len(value), kind


FIRST = (
    """Jane Maria José Chukwuemeka Siobhán Wei-Ling Anneke Nguyễn Łukasz Ruth Olga Иван Ξένια Sam J. Mary-Ann""".split()
)
LAST = (
    "Doe|García|O'Leary-Jones|Okafor|van der Berg|Müller|Żółkowski|Bell|White|Graves|Parkinson|Smith|Al-Rashid|Petrov|"
    "Иванова|Παππάς|de la Cruz|McDonald|St. John|Ng|Young|Achterberg|Björnsdóttir|Nakamura"
).split("|")
FORMS = (
    "Dr. {name} notified of results|seen by Dr. {name}, cardiology|Mrs. {last} denies pain|PATIENT NAME: {caps}|"
    "Patient Name: {comma}|PATIENT NAME: {caps_comma}|Patient Name:\t{name}|Patient Name:\n{name}\nAge: 44|ATTENDING: {caps}|"
    "Attending Physician: {name}, MD|DICTATED BY: {caps}|Electronically signed by {name}, RN|Next of kin: {name}|"
    "DR. {caps_last} WAS PAGED|Mr.\u00a0{last} is stable|Surgeon: {name}\nAnesthesia: general|{name}, MD"
).split("|")


def named(rng: random.Random) -> tuple[str, str]:
    first, last = rng.choice(FIRST), rng.choice(LAST)
    form = rng.choice(FORMS)
    key = form[form.index("{") + 1 : form.index("}")]
    whole = f"{first} {last}"
    values = {"name": whole, "last": last, "caps": whole.upper(), "comma": f"{last}, {first}"}
    values |= {"caps_comma": f"{last}, {first}".upper(), "caps_last": last.upper()}
    return form.format(**values), values[key]


# ---- headers: a label, a separator, a value, several of them in a line ------------------------------------------------

NAME_LABELS = (
    "Patient Name", "PATIENT", "Pt. Name", "Name", "Attending Physician", "Referring Provider", "Ordering MD", "PCP",
    "Consultant", "Dictated by", "Performed by", "Next of Kin", "Author", "Family Physician", "Nombre", "Apellidos",
    "Médico", "Nom de naissance", "Prénom", "Médecin traitant", "Patientin", "Hausarzt", "Nachname", "Cognome",
    "Medico curante", "Paciente", "Huisarts", "Navn", "patient_name", "patientLastName",
)  # fmt: skip
NUMBER_LABELS = (
    "MRN", "Med Rec No", "Patient ID", "Acct #", "Account Number", "Hosp No", "Unit No", "Encounter #", "CSN", "FIN", "NHC",
    "IPP", "Fall-Nr.", "Pat.-Nr.", "UHID", "NHS No", "Accession Number", "Episode No", "N° dossier", "Prontuario", "URN",
)  # fmt: skip
DATE_LABELS = (
    "DOB", "Date of Birth", "Admission Date", "Discharge Date", "Collected", "Date of Service", "Fecha de nacimiento",
    "Fecha de Ingreso", "Né le", "geb.", "Aufnahmedatum", "Geburtsdatum", "Data di nascita", "birthDate", "D.O.B.",
)  # fmt: skip
PHONE_LABELS = ("Phone", "Tel.", "Telefon", "Home Phone", "Mobile", "Fax", "Teléfono", "Cell", "Tél", "homePhone")
GIVEN = ("Jane", "Miguel", "Chidinma", "Søren", "Zoë", "Jean-Luc", "Aoife", "Priya", "Łukasz", "Wei")
FAMILY = (
    "Doe",
    "García López",
    "Okonkwo",
    "O'Brien",
    "Müller",
    "van der Berg",
    "Nguyen",
    "Kowalska",
    "Smith-Jones",
    "Ito",
)
SEPARATORS = (": ", ":", " : ", ":  ", "= ", ".......: ", "......... ")
BETWEEN = ("   ", "\n", "  ", "; ", " | ")


def header(rng: random.Random) -> tuple[str, list[tuple[str, int, int]]]:
    """A header of two to five fields, and (class, start, end) of their values."""
    text, marks = "", []
    between = rng.choice(BETWEEN)
    for _ in range(rng.randint(2, 5)):
        kind = rng.choice(("name", "name", "number", "date", "phone"))
        label, value = _field_of(kind, rng)
        if rng.random() < 0.3:
            label, value = label.upper(), value.upper() if kind == "name" else value
        text += label + rng.choice(SEPARATORS)
        marks.append((kind, len(text), len(text) + len(value)))
        text += value + between
    return text, marks


def _field_of(kind: str, rng: random.Random) -> tuple[str, str]:
    if kind == "name":
        given, family = rng.choice(GIVEN), rng.choice(FAMILY)
        forms = (
            f"{given} {family}",
            f"{family}, {given}",
            f"{family},{given}",
            f"{given} {rng.choice('ABR')}. {family}",
        )
        return rng.choice(NAME_LABELS), rng.choice(forms)
    if kind == "number":
        digits = f"{rng.randrange(10**7):07d}"
        forms = (
            digits,
            f"{rng.choice('ABHM')}{digits}",
            f"{digits[:3]}-{digits[3:]}",
            f"{digits[:3]} {digits[3:6]} {digits[:4]}",
        )
        return rng.choice(NUMBER_LABELS), rng.choice(forms)
    if kind == "date":
        year, month, day = rng.randint(1930, 2024), rng.randint(1, 12), rng.randint(1, 28)
        name = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")[month - 1]
        forms = (
            f"{month:02d}/{day:02d}/{year}", f"{day:02d}.{month:02d}.{year}", f"{year}-{month:02d}-{day:02d}",
            f"{year}{month:02d}{day:02d}", f"{day}-{name}-{year}", f"{name} {day}, {year}", f"{name.upper()} {day},{year}",
            f"{day}/{month}/{year % 100:02d}",
        )  # fmt: skip
        return rng.choice(DATE_LABELS), rng.choice(forms)
    digits = f"{rng.randrange(10**9):09d}"
    forms = (
        f"(617) 555-{digits[:4]}", f"617-555-{digits[:4]}", f"+44 20 {digits[:4]} {digits[4:8]}",
        f"0{digits[:2]} {digits[2:5]} {digits[5:]}", f"981 {digits[:2]} {digits[2:4]} {digits[4:6]}",
    )  # fmt: skip
    return rng.choice(PHONE_LABELS), rng.choice(forms)
