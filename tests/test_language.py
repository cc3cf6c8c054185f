"""Languages are told apart where there is prose to tell by, and left unknown where there is none."""
# ruff: noqa: E501 - prose

import json
import os
from pathlib import Path

import pytest

from qmedtune.data.hygiene.language import detect

REAL = Path(os.environ.get("QMEDTUNE_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
# One paragraph about the same study, written for this test.
PROSE = {
    "en": "The study was done in two hospitals between spring and autumn. We found that patients who were treated with "
    "the new drug had fewer attacks than those in the other group, and that none of them had to be admitted again.",
    "de": "Die Studie wurde in zwei Kliniken zwischen Frühjahr und Herbst durchgeführt. Wir fanden, dass die Patienten "
    "mit dem neuen Mittel weniger Anfälle hatten als die andere Gruppe und nicht wieder aufgenommen wurden.",
    "fr": "L'étude a été menée dans deux hôpitaux entre le printemps et l'automne. Les patients qui ont reçu le nouveau "
    "médicament avaient moins de crises que ceux de l'autre groupe et aucun n'a été admis une seconde fois dans le "
    "service pour cette maladie.",
    "es": "El estudio se hizo en dos hospitales entre la primavera y el otoño. Los pacientes que fueron tratados con el "
    "nuevo fármaco tuvieron menos crisis que los del otro grupo y ninguno fue ingresado más de una vez por esta causa.",
    "it": "Lo studio è stato condotto in due ospedali tra la primavera e l'autunno. I pazienti che sono stati trattati "
    "con il nuovo farmaco hanno avuto meno crisi di quelli dell'altro gruppo e nessuno di loro è stato ricoverato di "
    "nuovo per la stessa malattia.",
    "pt": "O estudo foi feito em dois hospitais entre a primavera e o outono. Os pacientes que foram tratados com o novo "
    "medicamento tiveram menos crises do que os do outro grupo, e não houve mais internações por esta causa no período.",
    "nl": "Het onderzoek werd in twee ziekenhuizen gedaan tussen het voorjaar en de herfst. De patiënten die met het "
    "nieuwe middel werden behandeld hadden minder aanvallen dan die van de andere groep en zijn niet weer opgenomen.",
    "sv": "Studien gjordes på två sjukhus mellan våren och hösten. Vi fann att de patienter som fick det nya läkemedlet "
    "hade färre anfall än den andra gruppen och att ingen av dem har lagts in igen efter det att studien var slut.",
    "da": "Undersøgelsen blev gjort på to hospitaler mellem forår og efterår. Vi fandt at de patienter som fik det nye "
    "middel havde færre anfald end den anden gruppe, og at ingen af dem er blevet indlagt igen efter det.",
    "pl": "Badanie było prowadzone w dwóch szpitalach od wiosny do jesieni. Pacjenci leczeni nowym lekiem mieli mniej "
    "napadów niż ci w drugiej grupie i nikt z nich nie był przyjęty ponownie do szpitala przez cały czas na obserwacji.",
    "zh": "这项研究于春季至秋季在两家医院进行。接受新药治疗的患者发作次数较少，且无人再次入院。",
    "ja": "この研究は春から秋にかけて二つの病院で行われた。新薬の投与を受けた患者は発作が少なかった。",
    "ru": "Исследование проводилось в двух больницах с весны до осени. У пациентов, получавших новый препарат, было "
    "меньше приступов.",
    "ar": "أجريت الدراسة في مستشفيين بين الربيع والخريف. وكان عدد النوبات أقل لدى المرضى الذين تلقوا الدواء الجديد.",
}


@pytest.mark.parametrize("code", PROSE)
def test_prose_of_each_language(code):
    assert detect(PROSE[code]) == code
    assert detect(PROSE[code].upper()) == code


def test_what_cannot_be_told_is_unknown():
    assert detect("BP 120/80 HR 72 RR 14 afebrile. Lungs clear. CT head neg. Plan: ASA 81 mg, f/u 2 wk. " * 3) is None
    assert detect("A short note.") is None
    assert detect("") is None


def test_greek_letters_make_no_greek():
    assert detect(PROSE["en"] + " The dose of TNF-α, IL-1β and IFN-γ was 5 µg.") == "en"


@pytest.mark.skipif(not REAL.is_dir(), reason="real text is not part of the repository")
def test_english_abstracts_are_english():
    lines = (REAL / "literature/hoc_abstracts.jsonl").read_text().splitlines()
    found = [detect(json.loads(line)["text"]) for line in lines]
    assert set(found) <= {"en", None} and found.count("en") >= 0.99 * len(found)
