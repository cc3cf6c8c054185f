"""Me-LLaMA's prompts word for word, and its readings of answers, on hand-made items.

`git show 08c893f:src/preprocess_instruct.py` of BIDS-Xu-Lab/Me-LLaMA has the texts; where $QMEDTUNE_ME_LLAMA names a
clone, the test compares all that are there.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from qmedtune.errors import RecipeError
from qmedtune.evaluation import summary
from qmedtune.recipe import TaskSection
from qmedtune.tasks import load_task, me_llama
from qmedtune.tasks.items import Item

MEDQA = {"question": "What next", "options": {"A": "Aspirin", "B": "Ramipril", "C": "Rest"}, "answer_idx": "B"}
PUBMEDQA = {"1": {"QUESTION": "Does it work?", "CONTEXTS": ["Some did.", "Few died."], "final_decision": "yes"}}
NLI = {"pairID": "1", "sentence1": "He is ill.", "sentence2": "He is well.", "gold_label": "contradiction"}
DDI = {"sentence": "@DRUG$ raises @DRUG$.", "label": "DDI-effect"}
NOTE = """<ClinicalNarrativeTemporalAnnotation><TEXT><![CDATA[
He denied fever and took aspirin .
]]></TEXT><TAGS>
<EVENT id="E0" start="11" end="16" text="fever" type="PROBLEM"/>
<EVENT id="E1" start="26" end="33" text="aspirin" type="{kind}"/>
</TAGS></ClinicalNarrativeTemporalAnnotation>"""


def load(tmp_path: Path, task: str, content: object, **keys):
    path = tmp_path / ("q.json" if isinstance(content, dict) and task == "pubmedqa" else "q.jsonl")
    path.write_text(json.dumps(content) + "\n")
    return load_task(TaskSection(task=task, path=str(path), **keys), seed=0)


def asked(task) -> str:
    [message] = task.items[0].messages
    assert message.keys() == {"role", "content"}
    return message["content"]


def note(tmp_path: Path, kind: str = "TREATMENT", **keys):
    (tmp_path / "1.xml").write_text(NOTE.format(kind=kind))
    return load_task(TaskSection(task="i2b2_2012", path=str(tmp_path / "1.xml"), **keys), seed=0)


def test_questions_are_worded_as_theirs(tmp_path):
    pubmedqa = asked(load(tmp_path, "pubmedqa", PUBMEDQA, prompts="me_llama"))
    assert pubmedqa.endswith("yes, no, or maybe.\nSome did.\nFew died.\nDoes it work?\nThe answer is:")
    medqa = asked(load(tmp_path, "medqa", MEDQA, prompts="me_llama"))
    listed = "Question: What next?\n\nOptions:\nA. Aspirin\nB. Ramipril\nC. Rest\n\nThe answer is"
    assert medqa.startswith("You are a medical doctor taking") and medqa.endswith(f"guidelines.\n{listed}")
    nli = asked(load(tmp_path, "mednli", NLI, prompts="me_llama"))
    assert nli.endswith("only the label.\n###\nINPUT: [PRE] He is ill. [HYP] He is well.\nOUTPUT:")
    assert asked(load(tmp_path, "ddi2013", DDI, prompts="me_llama")).endswith("INPUT: @DRUG$ raises @DRUG$.\nOUTPUT:")


@pytest.mark.parametrize(
    ("answer", "own", "theirs"),
    [
        ("B", 1, 1),
        ("The answer is B. Ramipril", 1, 1),
        ("Although it is C", 2, 0),  # the A of Although
        ("A. Aspirin\nB. Ramipril\nC. Rest", None, 0),  # a menu
        ("none of them", None, None),
    ],
)
def test_the_first_letter_that_stands_anywhere(tmp_path, answer: str, own: int | None, theirs: int | None):
    ours = load(tmp_path, "medqa", MEDQA)
    task = load(tmp_path, "medqa", MEDQA, extraction="me_llama")
    assert ours.parse(answer, ours.items[0]) == own
    assert task.parse(answer, task.items[0]) == theirs
    assert (task.name, task.max_new_tokens) == ("medqa-me_llama_reading", 256)


def test_labels_of_words_without_case_but_of_interactions_only_one(tmp_path):
    pubmedqa = load(tmp_path, "pubmedqa", PUBMEDQA, extraction="me_llama")
    assert pubmedqa.parse("MAYBE, I do not know", pubmedqa.items[0]) == 1  # `no` is in `know`, and stands before maybe
    ddi = load(tmp_path, "ddi2013", DDI, extraction="me_llama")
    assert ddi.items[0].options[ddi.parse("It is DDI-int", ddi.items[0])] == "DDI-int"
    assert ddi.parse("DDI-int or DDI-effect", ddi.items[0]) is None
    assert ddi.parse("ddi-int", ddi.items[0]) is None


def test_specialties_in_the_order_of_their_list():
    options = ("Neurology", "Radiology", "Surgery")
    item = Item("1", ({"role": "user", "content": "q"},), 0, options)
    assert me_llama.first_contained("neurology, radiology or surgery", item) == 2
    assert me_llama.first_contained("neurology or radiology", item) == 1
    assert len(set(me_llama.SPECIALTIES)) == 40


def test_entities_in_spans(tmp_path):
    task = note(tmp_path, prompts="me_llama")
    [item] = task.items
    assert 'Use <span class="problem">' in asked(task) and "drug" not in asked(task)
    assert asked(task).endswith("### Input Text: He denied fever and took aspirin .\n### Output Text:")
    marked = 'He denied <span class="problem">fever</span> and took <span class="treatment">aspirin</span> .'
    assert task.write(item) == marked
    assert task.parse(marked, item) == item.gold == (("problem", "fever"), ("treatment", "aspirin"))
    judged = task.judge(item, task.parse("He <span class='problem'>Fever</span> <span class=test>x</span>", item))
    assert judged == {"true_positives": 1, "false_positives": 1, "misses": 1}
    assert task.parse("He denied fever .", item) == () and task.parse(" ", item) is None


@pytest.mark.parametrize("prompts", ["own", "me_llama"])
def test_drugs_are_asked_for_where_the_files_mark_them(tmp_path, prompts: str):
    task = note(tmp_path, kind="DRUG", prompts=prompts)
    [item] = task.items
    assert ("drug", "aspirin") in item.gold and "drug" in asked_of(item)
    assert ("drug", "aspirin") in task.parse(task.write(item), item)
    assert "drug" not in asked_of(note(tmp_path, prompts=prompts).items[0])


def asked_of(item: Item) -> str:
    return item.messages[0]["content"]


def test_examples_show_the_answer_alone(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({**MEDQA, "question": f"What {n}"}) + "\n" for n in range(4)))
    task = load_task(TaskSection(task="medqa", path=str(path), prompts="me_llama", shots=1), seed=0)
    question, answer, _ = task.asked[0].messages
    assert question["content"].startswith("You are a medical doctor") and answer["content"] == "B"
    assert task.name == "medqa-me_llama-1shot"


def test_scores_say_how_they_were_made(tmp_path):
    task = load(tmp_path, "medqa", MEDQA, prompts="me_llama", extraction="me_llama")
    row = {**task.judge(task.items[0], 1), "normalised": task.judge(task.items[0], 1), "confidence": 0.9}
    row |= {"truncated": False, "generation": {**task.judge(task.items[0], 1), "parsed": True, "ended": "eos"}}
    scores = summary.summarise(task, task.items, [[row]], seed=0)
    assert scores.prompts == "me_llama" and scores.generation and scores.generation.extraction == "me_llama"
    assert "anywhere in the answer" in str(scores.generation.definition)
    assert "anywhere in the answer" not in str(scores.definition)


def test_other_tasks_have_no_such_prompts():
    for section in (TaskSection(task="facts", prompts="me_llama"), TaskSection(task="facts", extraction="me_llama")):
        with pytest.raises(RecipeError, match="facts: (prompts|extraction): me_llama is for Me-LLaMA's twelve tasks"):
            load_task(section, seed=0)


CLONE = os.environ.get("QMEDTUNE_ME_LLAMA")
CLASSES = {
    "PubmedQA": "pubmedqa", "MedQA": "medqa", "MedMCQA": "medmcqa", "EmrQA": "emrqa", "DDI2013": "ddi2013",
    "HoC": "hoc", "MTSample": "mtsamples", "PubmedSumm": "pubmed_summary", "MIMIC_SUM": "mimic_cxr_summary",
    "MedNLI": "mednli",
}  # fmt: skip


@pytest.mark.skipif(not CLONE, reason="QMEDTUNE_ME_LLAMA names no clone of BIDS-Xu-Lab/Me-LLaMA")
def test_every_text_of_the_repository_word_for_word():
    text = (Path(str(CLONE)) / "src" / "preprocess_instruct.py").read_text()
    for name, task in CLASSES.items():
        ours, line = me_llama.PROMPTS[task]
        start = re.search(rf"^class {name}\(.*?^ +prompt = \"\"\"", text, re.M | re.S)
        assert start and line == text.count("\n", 0, start.end()) + 1, name
        theirs = text[start.end() : text.index('"""', start.end())].strip()
        theirs = theirs.replace("{text}\n\nOptions", "{question}\n\nOptions")
        theirs = theirs.replace("{context}\n{text}", "{context}\n{question}")
        if name == "MedNLI":  # its fetch_data writes [PRE] and [HYP] into {text}
            theirs = theirs.replace("INPUT: {text}\n", "INPUT: [PRE] {premise} [HYP] {hypothesis}\n")
        assert ours == theirs, name
