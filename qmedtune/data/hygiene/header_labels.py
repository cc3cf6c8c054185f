"""What the words of a header's label say of the value behind it: its class, in the languages of Europe and a few more.

A label is read as a noun phrase: its head decides (`Primary Care Physician`, `Hosp Acct`), or its first word where a
preposition follows (`Date of birth`, `Nom de naissance`), or the word before a counting word (`Patient No`, `Fall-Nr`).
Words are plain ASCII letters in lower case, as the plain copy (plain.py) has them.
"""

# ruff: noqa: SIM905 (a list of words reads better as words)

from __future__ import annotations

import re
from functools import lru_cache

NAME, PERSON, DATE, PHONE, ADDRESS, CITY, ZIP, PLACE, AGE = (
    "name", "person", "date", "phone", "address", "city", "zip", "hospital", "age_over_89",
)  # fmt: skip
# Of numbers: the class, as recognisers.py names it.
MRN, ACCOUNT, PLAN, LICENSE, SSN, DEVICE, VEHICLE, OTHER = (
    "mrn", "account", "health_plan", "license", "ssn", "device", "vehicle", "other_number",
)  # fmt: skip
NUMBERS = frozenset((MRN, ACCOUNT, PLAN, LICENSE, SSN, DEVICE, VEHICLE, OTHER))

_WORDS = {
    # What is a person's name and nothing else: the value may be in small letters, and what is known as a disease.
    NAME: """name names namen surname forename firstname lastname fullname middlename maidenname nickname alias aka
        nombre nombres apellido apellidos nom noms prenom prenoms nome nomes cognome sobrenome navn fornavn etternavn
        efternavn namn fornamn efternamn nimi etunimi sukunimi naam voornaam achternaam vorname nachname familienname
        geburtsname rufname imie imiona nazwisko jmeno prijmeni priezvisko neve vezeteknev keresztnev nume prenume ime
        prezime adi soyadi kin""",
    # Who has a name: people of a header by their part in it.
    PERSON: """patient patients pt paciente patientin pasient pacjent pacjentka pacient pacientka potilas paziente
        utente beteg pacijent hasta veteran client resident insured guarantor donor recipient claimant employee member
        subscriber holder physician physicians phys phy provider prov doctor attending attg consultant surgeon fellow
        intern hospitalist nurse rn md np pa pcp gp fp mrp lpn cna crna assistant anesthesiologist anaesthetist
        anesthetist radiologist pathologist cardiologist neurologist oncologist dentist pharmacist therapist
        technologist technician tech phlebotomist operator perfusionist scrub circulator scribe transcriptionist
        author editor dictator signer signatory cosigner attestor prescriber referrer requester dr dra drs prof
        requestor reviewer
        interpreter witness clinician practitioner specialist dietitian midwife paramedic crew driver coordinator
        manager counselor psychologist psychiatrist zuweiser einweiser medecin docteur medico medica arzt arztin
        hausarzt hausarztin oberarzt oberarztin chefarzt chefarztin assistenzarzt facharzt stationsarzt behandler
        huisarts arts specialist behandelaar verwijzer lakare lege laege fastlege laakari lekarz lekarka lekar orvos
        haziorvos doktor hekim medic chirurg chirurgien chirurgo cirujano cirurgiao infirmier infirmiere enfermera
        enfermero enfermeiro infermiere pfleger interne externe praticien operateur expediteur destinataire
        facultativo responsable correspondencia
        betreft betreff betr objet asunto oggetto concerne spouse wife husband mother father son daughter brother
        sister guardian parent caregiver proxy poa dpoa hcp nok
        partner ehemann ehefrau conjoint madre padre mere pere mutter vater hijo hija figlio figlia angehorige
        signature signed attn cc submitting ordering authorizing referring admitting supervising requesting treating
        dispensing user""",
    DATE: """date dates dated dt dob dod doa dos doi dov birthdate birthday born geboren geb birth datum geburtsdatum
        aufnahmedatum entlassdatum entlassungsdatum befunddatum untersuchungsdatum op-datum fecha fec nacimiento data
        nascimento nascita nasc ne nee nato nata naissance fodselsdato fodt fodelsedatum syntymaaika dato admitted
        admission admit adm discharged discharge disch collected received reported dictated dict typed transcribed
        trans verified performed taken drawn filled dispensed examined dd td dv tt reg registered dis died death
        deceased deathdate expires expiry effective edd edc seen entered printed created filed updated signed issued dv
        service birthtime aufnahme entlassung entree sortie ingreso alta ricovero dimissione opname ontslag
        geboortedatum przyjecia wypisu urodzenia narozeni szuletesi dogum tarihi exam visit lmp""",
    PHONE: """phone phones tel telf telephone ph telefon telefono telefone telefoon tfno tlf tlfn puhelin puh mob
    mobile
        mobil movil celular cell cellular cellphone homephone workphone handy natel gsm fax faks pager pgr beeper bleep
        bpr ext extension dect whatsapp hotline callback voicemail""",
    ADDRESS: """address addr addresses street streetaddress anschrift adresse adres adresa indirizzo residenza
        domicilio direccion endereco morada osoite bostad bopal lakcim residence wohnhaft wohnadresse pickup""",
    CITY: """city town ort wohnort stadt ville localidad provincia ciudad cidade citta comune woonplaats plaats miasto
        obec kaupunki bydliste municipio birthplace""",
    ZIP: """zip zipcode postal postalcode postcode postleitzahl plz cp cep postnummer postinumero psc""",
    PLACE: """hospital facility clinic klinik krankenhaus clinique hopital etablissement ospedale institution practice
        dest destination pharmacy nursinghome""",
    AGE: "age edad alter eta idade leeftijd alder wiek vek kor yas ika",
    MRN: """mrn mr emrn umrn empi mpi urn uhid crn fin csn chart record recordnumber dossier ipp nip iep nda nhc cipa
        historia expediente prontuario atendimento matricula cartella nosologico journalnr fallnummer fallzahl fallnr
        patnr unit rec patientennummer patientennr patientnummer aufnahmenummer krankenblattnummer pid chi nhs hosp
        hospital
        visit encounter enc episode episodio episodes sejour case accession requisition req specimen control pcr
        incident rx prescription
        document doc barcode registration admission patient pt pat fall ip uid patientid""",
    ACCOUNT: "acct acc account har invoice bill billing konto client order run",
    PLAN: """policy subscriber member beneficiary insurance insured medicare medicaid mbi hicn group dva ihi ohip phn
        hcn hc ramq cns versichertennummer versichertennr versnr vers kvnr mutuelle tessera polizza poliza apolice""",
    LICENSE: """license licence lic npi dea upin gmc nmc ahpra crm col colegiado rpps adeli finess big agb lanr bsnr
        passport physician provider prov driver physicianid""",
    SSN: """ssn ss sin nino itin nir ins nss nass nuss dni nie nif cip curp rfc rut cedula cpf rg fiscale bsn
        personnummer personnr fodselsnummer cpr henkilotunnus hetu pesel cislo oib jmbg emso cnp egn taj kimlik tckn
        tc aadhaar aadhar abha ahv sozialversicherungsnummer svnr rvnr rijksregisternummer""",
    DEVICE: "serial udi imei lot device",
    VEHICLE: "vin plate",
}
# Counts what the word before it names: `Patient No`, `NHS number`, `Fall-Nr`.
COUNTING = frozenset(
    """no nr number numbers num nummer nummero numero numer cislo szam nro nrs id ids ident identifier identification
    identificacion identificativo nbr ndeg ref reference""".split()
)
# Behind these a number is no identifier, whatever counts it, and a name none of a person.
THINGS = frozenset(
    """drug generic brand trade product study test file device procedure medication medicine trial gene protein assay
    compound chemical common scientific species room rm bed page icd cpt loinc snomed rxnorm ndc version protocol dose
    model part item step question class template display system panel analyte component substance event medicament
    medicamento farmaco prodotto producto produit variable column field host""".split()
)
# How many there are of these, a number says (`Sample number: 10000`); only an `id` or a `ref` names one of them.
QUANTITIES = frozenset(
    """total sample samples cells platelet platelets sequence sequences slide slides count counts n patients
    participants subjects""".split()
)
# Of what counts, what names one thing and never says how many.
NAMING = frozenset("""id ids ident identifier identification identificacion identificativo ref reference""".split())
PREPOSITIONS = frozenset("of de d di da do del della des du dell des dos i la l for van van pour den der".split())
# Say whose or which, behind the head: `Medecin traitant`, `PCP - General`, `Phone (home)`.
BEHIND = frozenset(
    """traitant traitante responsable responsible responsabile responsavel curante tratante referent referente
    prowadzacy kierujacy adresseur principal general primary secondary home work mobile office main daytime evening
    complet completo completa complete full s legal only time hora heure uhrzeit m f sex sx gender sexo sexe
    medico clinico referring henvisende info information le il el am on at em den e""".split()
)
BY = frozenset("by por par von door av af przez per".split())
# Written too often before a number that is none of a person: more of it must be there, or a word that counts.
WEAK = frozenset(
    """case visit record order run group client specimen control document doc incident req service member insurance
    hosp hospital patient pt pat fall admission policy subscriber insured physician provider prov driver ip
    registration bill billing lot device serial col ins ss hc tc mr chart chi nhs ref reference rg big rut cip
    prescription rx vers""".split()
)
# Alone they are mostly something else: total cholesterol, an address of the internet, a column.
# Alone before a short number of digits they may count, or give a place in a row: it must be long, or have a letter.
SHORT_ALONE = frozenset("order run".split())
ONLY_COUNTED = frozenset("unit rec ip tc hc rg big col ss hosp control incident service".split())
# What a letter is about: a person only where a title says so.
SUBJECTS = frozenset("betreft betreff betr objet asunto oggetto concerne".split())
# Keys of FHIR that are no labels elsewhere.
QUOTED = {"family": frozenset((NAME,)), "given": frozenset((NAME,)), "line": frozenset((ADDRESS,))}
# In a phone's place three digits are enough.
SHORT_NUMBERS = frozenset("pager pgr beeper bleep bpr ext extension dect".split())

CLASSES: dict[str, set[str]] = {}
for _kind, _words in _WORDS.items():
    for _word in _words.split():
        CLASSES.setdefault(_word, set()).add(_kind)
ENDS = frozenset(CLASSES) | COUNTING | BEHIND | BY | frozenset(("a", "birth", "#", "code"))  # with what a label may end
_TOKEN = re.compile(r"[A-Z]{2,}(?![a-z])|[A-Z]?[a-z]+|[A-Z]|#", re.A)
PHONES = frozenset(_WORDS[PHONE].split())
MAX_TOKENS = 7


@lru_cache(maxsize=8192)
def classes(label: str) -> frozenset[str]:
    """Of which classes the value behind a label may be; empty where the label is none that announces an identifier.

    label: as the text has it; `patientLastName`, `patient_last_name` and `Patient Last Name` are read alike.
    """
    tokens = _tokens(label)
    if not 1 <= len(tokens) <= MAX_TOKENS:
        return frozenset()
    found = _classes(tokens)
    if THINGS.intersection(tokens):
        return found - {NAME, PERSON}
    return found


def _tokens(label: str) -> list[str]:
    tokens = []
    for token in _TOKEN.findall(label):
        tokens.append(token.lower())
    return tokens


def _classes(tokens: list[str]) -> frozenset[str]:
    if tokens[-1] in BY or tokens[-2:] in (["copie", "a"], ["copia", "a"]):
        return frozenset((PERSON,)) if len(tokens) > 1 else frozenset()
    if len(tokens) > 2 and tokens[1] in PREPOSITIONS and (tokens[0] in CLASSES or tokens[0] in COUNTING):
        return frozenset(CLASSES.get(tokens[0], ())) | _counted(tokens) | _counted(tokens[2:] + tokens[:1])
    while len(tokens) > 1 and tokens[-1] in BEHIND:
        tokens = tokens[:-1]
    if tokens[-1] == "code":
        return frozenset((ZIP,)) if len(tokens) > 1 and tokens[-2] in ("postal", "zip", "post") else frozenset()
    if tokens[-1] == "name" and len(tokens) > 1 and PLACE in CLASSES.get(tokens[-2], ()):
        return frozenset((PLACE,))
    if len(tokens) > 1 and tokens[-2] in COUNTING and tokens[-1] in CLASSES and tokens[-1] not in COUNTING:
        return _counted([tokens[-1], tokens[-2]])  # `No Historia`, `NoCol`
    if tokens[-1] in COUNTING or tokens[-1] == "#":
        return _counted(tokens)
    found = frozenset(CLASSES.get(tokens[-1], ()))
    if tokens[-1] in ONLY_COUNTED:
        return found - NUMBERS
    return found


def _counted(tokens: list[str]) -> frozenset[str]:
    """`Patient No`, `Fall Nr`, `Phone number`, `ID`: the class of what is counted, or of any other number.

    `number` of a sample says how many there are; only `id` and `ref` make it an identifier.
    """
    counted = named = False
    for token in reversed(tokens):
        if token in COUNTING or token == "#":
            counted = True
            named = named or token in NAMING
            continue
        if not counted:
            return frozenset()
        if token in THINGS:
            return frozenset()
        known = CLASSES.get(token, set())
        if PHONE in known:
            return frozenset((PHONE,))
        if not named and token in QUANTITIES:
            return frozenset()
        return frozenset(known & NUMBERS) or frozenset((OTHER,))
    return frozenset((OTHER,)) if counted else frozenset()


def needs_long(label: str) -> bool:
    """Whether a short number behind the label may be a count or a place in a row: `Number`, `Order`, `Visits no`."""
    tokens = _tokens(label)
    if tokens and tokens[-1] in SHORT_ALONE:
        return True
    counted = False
    for token in reversed(tokens):
        if token in NAMING:
            return False
        if token not in COUNTING and token != "#":
            return token not in CLASSES
        counted = True
    return counted


def may_be_cells(label: str) -> bool:
    """Whether the label may be that of a count of cells: `Cell`, not `Cell phone`."""
    tokens = _tokens(label)
    return "cell" in tokens and len(PHONES.intersection(tokens)) == 1


def is_weak(label: str) -> bool:
    """Whether the label stands before other numbers as well: `Case`, `Visit`, `Ref`."""
    tokens = _tokens(label)
    return bool(tokens) and tokens[-1] in WEAK
