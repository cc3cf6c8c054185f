"""Me-LLaMA's prompts and its way of reading answers, by name, so that its published scores can be set beside ours.

The texts are those of src/preprocess_instruct.py of BIDS-Xu-Lab/Me-LLaMA (MIT, commit 08c893f), the reading that of
src/tasks/vital_measure.py there. Two of the twelve are not in that repository: BioNLI is asked as MedNLI with its two
labels, and entities with the prompt that the lab published before (ChatGPT_MTSamples.ipynb of
BIDS-Xu-Lab/Clinical_Entity_Recognition_Using_GPT_models, commit fc374c5): likely, not proven.
Deliberately absent: white space around a prompt (a turn never has any: data/packing/templates.py), BARTScore.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from qmedtune.errors import RecipeError
from qmedtune.recipe import TaskSection
from qmedtune.tasks.findings import ENTITY_TYPES, HALLMARKS, marks_drugs, plain_words, with_drugs_asked
from qmedtune.tasks.items import Item, Task

MAX_NEW_TOKENS = 256  # max_gen_toks of its fork of the harness
MULTIPLE_CHOICE = "Question: {question}\n\nOptions:\n{options}\n\nThe answer is"
KNOWLEDGE = (
    "Base your answer on the current and standard practices referenced in medical guidelines.\n" + MULTIPLE_CHOICE
)
# Its list and order: the first that an answer contains is taken.
SPECIALTIES = (
    "Surgery", "Allergy / Immunology", "Sleep Medicine", "Pediatrics - Neonatal", "SOAP / Chart / Progress Notes",
    "Bariatrics", "Pain Management", "Lab Medicine - Pathology", "Dermatology", "Orthopedic", "Dentistry",
    "Psychiatry / Psychology", "General Medicine", "Office Notes", "Letters", "Neurosurgery", "Radiology",
    "Cosmetic / Plastic Surgery", "Nephrology", "Diets and Nutritions", "Chiropractic", "Gastroenterology",
    "Cardiovascular / Pulmonary", "Speech - Language", "Hospice - Palliative Care", "Autopsy", "Endocrinology",
    "Emergency Room Reports", "Discharge Summary", "ENT - Otolaryngology", "Urology", "Physical Medicine - Rehab",
    "Neurology", "Podiatry", "Ophthalmology", "Rheumatology", "IME-QME-Work Comp etc.", "Hematology - Oncology",
    "Consult - History and Phy.", "Obstetrics / Gynecology",
)  # fmt: skip
QUOTED_SPECIALTIES = ", ".join(f"'{name}'" for name in SPECIALTIES)

TEST_LINE = 'Use <span class="test"> to denote a test.\n'
DRUG_LINE = 'Use <span class="drug"> to denote a drug.\n'

# By task: the text, and the line of preprocess_instruct.py at which it begins (None: see above).
PROMPTS: dict[str, tuple[str, int | None]] = {
    "pubmedqa": (
        "As an expert doctor in clinical science and medical knowledge, can you tell me if the following statement is "
        "correct? Answer yes, no, or maybe.\n{context}\n{question}\nThe answer is:",
        186,
    ),
    "medqa": (
        "You are a medical doctor taking the US Medical Licensing Examination. You need to demonstrate your "
        "understanding of basic and clinical science, medical knowledge, and mechanisms underlying health, disease, "
        "patient care, and modes of therapy. Show your ability to apply the knowledge essential for medical practice. "
        "For the following multiple-choice question, select one correct answer from A to E. " + KNOWLEDGE,
        203,
    ),
    "medmcqa": (
        "You are a medical doctor answering realworld medical entrance exam questions. Based on your understanding of "
        "basic and clinical science, medical knowledge, and mechanisms underlying health, disease, patient care, and "
        "modes of therapy, answer the following multiple-choice question. Select one correct answer from A to D. "
        + KNOWLEDGE,
        226,
    ),
    "emrqa": (
        "TASK: Given a medical context and an open-ended question related to it, extract the relevant text segment "
        "from the context as an answer. Expected output: Only extract and return the text segment from the provided "
        "context that directly answers the question. Do not add any new words.\n###\nContext: {text}\n"
        "Question {question}\nAnswer:",
        143,
    ),
    "i2b2_2012": (
        "### Task\nYour task is to generate an HTML version of an input text, marking up specific entities related to "
        "healthcare. The entities to be identified are: 'medical problems', 'treatments', and 'tests'. Use HTML <span> "
        "tags to highlight these entities. Each <span> should have a class attribute indicating the type of the "
        'entity.\n\n### Entity Markup Guide\nUse <span class="problem"> to denote a medical problem.\n'
        f'Use <span class="treatment"> to denote a treatment.\n{TEST_LINE}'
        "Leave the text as it is if no such entities are found.\n\n### Input Text: {text}\n### Output Text:",
        None,
    ),
    "ddi2013": (
        "TASK: The input is a sentence where the drug is labeled as @DRUG$. Extract the relationship between 2 @DRUG$ "
        "from the input sentence by selecting only one of the following options: 'DDI-effect', 'DDI-mechanism', "
        "'DDI-advise', 'DDI-false', and 'DDI-int'.\n"
        "DDI-effect, this type is used to annotate DDIs describing an effect or a pharmacodynamic mechanism\n"
        "DDI-mechanism, this type is used to annotate DDIs that are described by their pharmacokinetic mechanism\n"
        "DDI-advise, this type is used when a recommendation or advice regarding a drug interaction is given\n"
        "DDI-false, this type is used when no DDI relation appears\n"
        "DDI-int, this type is used when a DDI appears in the text without providing any additional information\n"
        "###\nINPUT: {text}\nOUTPUT:",
        267,
    ),
    "hoc": (
        "The task is to decide the Hallmarks of Cancer (HOC) taxonomy of the article based on its abstract. The input "
        "is an abstract text. There are 10 topics you will need to decide whether the article is related to. Topics: "
        f"{', '.join(HALLMARKS)}. The output should be topics from the above 10 topics, that are related to the input "
        "article. Please note one article can be related to multiple topics. Output format: provide a "
        "semicolon-separated list of relevant topics.\n    ###\n    INPUT: {text}\n    OUTPUT:",
        300,
    ),
    "mtsamples": (
        "TASK: The task is to determine the medical specialty or domain that a medical transcription belongs to. The "
        "input is a medical transcription. There are 40 medical specialties or domains and you need to decide which "
        "one is the transcription related to. The medical specialties or domains are: "
        f"{QUOTED_SPECIALTIES}. The output should be only one medical specialty or domain from the above 40 "
        "specialties or domains, that is most relevant to the medical transcription. Please note that each medical "
        "transcript can only be related to one medical specialty or domain. Output format: provide the name of the "
        "medical specialty or domain.\n###\nINPUT: {text}\nOUTPUT:",
        165,
    ),
    "pubmed_summary": (
        "***TASK***\nthe task is to summarize an input biomedical literature in six sentences\n\n***INPUT***\n"
        "the input is a biomedical literature\n\n***OUTPUT***\nthe output is the summary of an input biomedical "
        "literature in six sentences\n\n***DOCUMENTATION***\n\n***EXAMPLES***\n\nInput: {text}\nOutput:",
        399,
    ),
    "mimic_cxr_summary": (
        "Derive the impression from findings in the radiology report.\n    INPUT: {text}\n    OUTPUT:",
        689,
    ),
    "mednli": (
        "TASK: Please classify the relationship between the given premise and hypothesis into one of the following "
        "labels: entailment, contradiction, or neutral. Return only the label.\n###\n"
        "INPUT: [PRE] {premise} [HYP] {hypothesis}\nOUTPUT:",
        125,
    ),
    "bionli": (
        "TASK: Please classify the relationship between the given premise and hypothesis into one of the following "
        "labels: entailment or contradiction. Return only the label.\n###\n"
        "INPUT: [PRE] {premise} [HYP] {hypothesis}\nOUTPUT:",
        None,
    ),
}
SPAN = re.compile(r"<span\s+class\s*=\s*[\"']?(\w+)[\"']?\s*>(.*?)</span>", re.IGNORECASE | re.DOTALL)


def ask(section: TaskSection, items: list[Item]) -> list[Item]:
    """The items in the words that `prompts` names. RecipeError for a task that has none of its own."""
    if section.prompts == "own":
        return with_drugs_asked(items) if section.task == "i2b2_2012" else items
    _check(section, "prompts")
    prompt, _ = PROMPTS[section.task]
    if section.task == "i2b2_2012" and marks_drugs(items):
        prompt = prompt.replace(TEST_LINE, TEST_LINE + DRUG_LINE)
    asked = []
    for item in items:
        message = {"role": "user", "content": prompt.format(**_parts(section.task, item))}
        asked.append(replace(item, messages=(message,)))
    return asked


def read(section: TaskSection, task: Task) -> Task:
    """The task with answers written as `prompts` asks for them, and read as `extraction` says."""
    if section.prompts != "own":
        task = replace(task, write=_write, prompts=section.prompts)
        if section.task == "i2b2_2012":
            task = replace(task, parse=spans, write=marked_up, max_new_tokens=MAX_NEW_TOKENS)
    if section.extraction == "stated":
        return task
    _check(section, "extraction")
    return replace(
        task, parse=READERS.get(section.task, task.parse), max_new_tokens=MAX_NEW_TOKENS, extraction=section.extraction
    )


def _check(section: TaskSection, key: str) -> None:
    if section.task not in PROMPTS:
        raise RecipeError(
            f"evaluate.tasks: {section.task}: {key}: me_llama is for Me-LLaMA's twelve tasks\n"
            f"allowed: {', '.join(PROMPTS)}"
        )


def _parts(task: str, item: Item) -> dict[str, str]:
    """What a task's prompt is filled with."""
    if task == "pubmedqa":
        question, *context = item.stated
        return {"question": question, "context": "\n".join(context)}
    if task in ("mednli", "bionli"):
        premise, hypothesis = item.stated
        return {"premise": premise, "hypothesis": hypothesis}
    if item.texts:
        [question] = item.stated
        question = question if question.endswith(("?", ".")) else f"{question}?"
        listed = [f"{letter}. {text}" for letter, text in zip(item.options, item.texts, strict=True)]
        return {"question": question, "options": "\n".join(listed)}
    message = item.messages[-1]
    return {"text": message["input"], "question": message["content"]}


def _write(item: Item) -> str:
    """An example's answer: the letter or the label alone, labels with semicolons between."""
    if item.options:
        return item.options[item.gold]
    if isinstance(item.gold, frozenset):
        return ";".join(label for label in HALLMARKS if label in item.gold)
    return item.gold if isinstance(item.gold, str) else item.gold[0]


# ---- how answers are read --------------------------------------------------------------------------------------------


def first_contained(answer: str, item: Item) -> int | None:
    """The first option that the answer contains anywhere; letters by case, words without (`Classification`)."""
    said = answer if item.texts else answer.lower()
    for index in _in_its_order(item.options):
        option = item.options[index]
        if (option if item.texts else option.lower()) in said:
            return index
    return None


def _in_its_order(options: tuple[str, ...]) -> list[int]:
    known = {name: place for place, name in enumerate(SPECIALTIES)}
    if known.keys() >= set(options):
        return sorted(range(len(options)), key=lambda index: known[options[index]])
    return list(range(len(options)))


def only_contained(answer: str, item: Item) -> int | None:
    """The one option that the answer contains; none where there are several (`DDI2013`)."""
    found = [index for index, option in enumerate(item.options) if option in answer]
    return found[0] if len(found) == 1 else None


def labels_contained(answer: str, item: Item) -> frozenset[str]:
    """Every hallmark that the answer contains, by case (`HoC`). None is an answer too."""
    return frozenset(label for label in HALLMARKS if label in answer)


def spans(answer: str, item: Item) -> tuple[tuple[str, str], ...] | None:
    """Entities that the answer marks up; none where it repeats the sentence without marks."""
    if not answer.strip():
        return None
    found = []
    for kind, words in SPAN.findall(answer):
        if kind.lower() in ENTITY_TYPES:
            found.append((kind.lower(), plain_words(words)))
    return tuple(found)


def marked_up(item: Item) -> str:
    """The sentence with its entities in spans, as an example shows it."""
    sentence = item.messages[-1]["content"].rpartition("### Input Text: ")[2].removesuffix("\n### Output Text:")
    places: list[tuple[int, int, str]] = []
    for kind, words in item.gold:
        pattern = r"\s+".join(map(re.escape, words.split()))
        for match in re.finditer(pattern, sentence, re.IGNORECASE):
            if all(match.end() <= start or end <= match.start() for start, end, _ in places):
                places.append((match.start(), match.end(), kind))
                break
    for start, end, kind in sorted(places, reverse=True):
        sentence = f'{sentence[:start]}<span class="{kind}">{sentence[start:end]}</span>{sentence[end:]}'
    return sentence


READERS: dict[str, Callable[[str, Item], object]] = {
    "pubmedqa": first_contained, "medqa": first_contained, "medmcqa": first_contained, "mtsamples": first_contained,
    "mednli": first_contained, "bionli": first_contained, "ddi2013": only_contained, "hoc": labels_contained,
}  # fmt: skip
