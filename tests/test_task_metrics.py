"""Metrics of the tasks on hand-worked cases, and the formats that their readers take."""

import json
import os
from pathlib import Path

import pytest

from qmedtune.errors import DataError, RecipeError
from qmedtune.evaluation import summary
from qmedtune.recipe import TaskSection
from qmedtune.tasks import FILE_TASKS, findings, free_text, load_task
from qmedtune.tasks import items as task_items
from qmedtune.tasks.definitions import definition
from qmedtune.tasks.free_text import normalised
from qmedtune.tasks.items import Item

REAL = Path(os.environ.get("QMEDTUNE_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))


def load(name: str, path: Path, content: str | list | None = None):
    if content is not None:
        text = content if isinstance(content, str) else "".join(json.dumps(line) + "\n" for line in content)
        path.write_text(text, encoding="utf-8")
    return load_task(TaskSection(task=name, path=str(path)), seed=0)


def judged(task, answers: list[str]) -> dict[str, float]:
    pairs = zip(task.items, answers, strict=True)
    return task.aggregate([task.judge(item, task.parse(answer, item)) for item, answer in pairs])


def nli(label: str, number: int = 0) -> dict:
    return {"pairID": str(number), "sentence1": "He is ill.", "sentence2": "He is well.", "gold_label": label}


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_macro_f1_hand_worked(tmp_path):
    """Gold e e c n, said e c c (nothing).

    entailment: 1 hit of 1 said, of 2 gold: F1 2/3; contradiction: 1 of 2 said, of 1 gold: 2/3; neutral 0. Mean 4/9.
    """
    gold = ["entailment", "entailment", "contradiction", "neutral"]
    task = load("mednli", tmp_path / "q.jsonl", [nli(label, n) for n, label in enumerate(gold)])
    scores = judged(task, ["Entailment.", "contradiction", "contradiction", "I cannot say"])
    assert scores == pytest.approx({"accuracy": 0.5, "macro_f1": 4 / 9})
    assert task.items[0].options == ("entailment", "contradiction", "neutral")


def test_macro_f1_of_a_drawn_part_counts_the_labels_in_it(tmp_path):
    """Of four specialties two are drawn: all right is 1, and a wrong one that no drawn note has lowers only recall."""
    rows = "".join(f"{label},note of {label}\n" for label in "abcd")
    (tmp_path / "m.csv").write_text("label,text\n" + rows)
    task = load_task(TaskSection(task="mtsamples", path=str(tmp_path / "m.csv"), limit=2), seed=0)
    gold = [item.options[item.gold] for item in task.items]
    assert len(set(gold)) == 2 and task.items[0].options == ("a", "b", "c", "d")
    assert judged(task, gold)["macro_f1"] == 1
    [absent, *_] = sorted(set("abcd") - set(gold))
    assert judged(task, [gold[0], absent])["macro_f1"] == 0.5


def test_pubmedqa_has_both_published_metrics(tmp_path):
    """Gold yes yes no maybe, said yes yes yes yes: yes 2 of 4 said, 2 of 2 gold: F1 2/3; no and maybe 0. Mean 2/9."""
    fields = {"QUESTION": "Q?", "CONTEXTS": ["c"]}
    records = {str(n): {**fields, "final_decision": d} for n, d in enumerate(("yes", "yes", "no", "maybe"))}
    task = load("pubmedqa", tmp_path / "q.json", json.dumps(records))
    assert judged(task, ["Yes."] * 4) == pytest.approx({"accuracy": 0.5, "macro_f1": 2 / 9})


def test_ddi_by_all_labels_and_by_interactions_only(tmp_path):
    """Gold false false effect int, said false effect effect false.

    false: 1 hit of 2 said, of 2 gold: 1/2; effect: 1 of 2 said, of 1: 2/3; int: 0; mean 7/18. The shared task's micro
    F1 over interactions: 1 hit, 1 said without reason (false as effect), 1 missed (int): 2 / 4.
    """
    kinds = ("false", "false", "effect", "int")
    records = [{"id": str(n), "sentence": "@DRUG$ @DRUG$", "label": f"DDI-{k}"} for n, k in enumerate(kinds)]
    task = load("ddi2013", tmp_path / "d.jsonl", records)
    scores = judged(task, ["DDI-false", "DDI-effect", "DDI-effect", "DDI-false"])
    assert scores == pytest.approx({"accuracy": 0.5, "macro_f1": 7 / 18, "positive_f1": 0.5})


def test_bionli_has_two_labels(tmp_path):
    records = [{"premise": "P", "hypothesis": "H", "label": label} for label in ("entailment", "contradiction")]
    task = load("bionli", tmp_path / "q.jsonl", records)
    assert task.metric == "macro_f1" and task.items[1].options == ("entailment", "contradiction")
    assert task.items[1].gold == 1


DDI_XML = """<document id="d"><sentence id="d.s0" text="Aspirin may increase the effect of warfarin.">
<entity id="d.s0.e0" charOffset="0-6" type="drug" text="Aspirin"/>
<entity id="d.s0.e1" charOffset="35-42" type="drug" text="warfarin"/>
<pair id="d.s0.p0" e1="d.s0.e0" e2="d.s0.e1" ddi="true" type="effect"/></sentence>
<sentence id="d.s1" text="Oral nitrates, tablets">
<entity id="d.s1.e0" charOffset="0-12" type="group" text="Oral nitrates"/>
<entity id="d.s1.e1" charOffset="5-12" type="group" text="nitrates"/>
<pair id="d.s1.p0" e1="d.s1.e0" e2="d.s1.e1" ddi="false"/></sentence></document>"""


def test_ddi_xml_masks_the_pair(tmp_path):
    first, second = load("ddi2013", tmp_path / "d.xml", DDI_XML).items
    assert first.messages[0]["input"] == "@DRUG$ may increase the effect of @DRUG$."
    assert (first.id, first.options[first.gold]) == ("d.s0.p0", "DDI-effect")
    assert second.messages[0]["input"] == "@DRUG$, tablets"
    assert second.options[second.gold] == "DDI-false"
    with pytest.raises(DataError, match="unknown drug or type"):
        load("ddi2013", tmp_path / "d.xml", DDI_XML.replace('type="effect"/>', 'type="affect"/>'))


def test_ddi_table(tmp_path):
    table = "id\tsentence\tlabel\n7\t@DRUG$ with @DRUG$\tDDI-int\n"
    [item] = load("ddi2013", tmp_path / "d.tsv", table).items
    assert (item.id, item.options[item.gold]) == ("7", "DDI-int")


def test_mtsamples_labels_come_from_the_file_and_empty_notes_are_said(tmp_path, capfd):
    table = ",description,medical_specialty,sample_name,transcription,keywords\n"
    table += '0,d, Surgery,s,"A note,\nof two lines",k\n1,d, Neurology,s,note,k\n2,d, Surgery,s,,k\n'
    task = load("mtsamples", tmp_path / "m.csv", table)
    assert [item.options[item.gold] for item in task.items] == ["Surgery", "Neurology"]
    assert "1 notes without text" in capfd.readouterr().err


@pytest.mark.skipif(not REAL.is_dir(), reason="real data absent")
def test_real_mtsamples():
    task = load("mtsamples", REAL / "clinical" / "mtsamples.csv")
    assert len(task.items) > 380 and task.items[0].options == ("1", "2", "3", "4")


def test_auroc_ranks_by_log_odds_and_by_answers(tmp_path):
    """Log odds .9 .4 (yes) and .6 .1 (no): 3 of 4 pairs in order. Answers no, ? and no, no: 2 + 2 ties = 3 of 4."""
    records = [{"text": "t", "label": label} for label in ("yes", 1, "0", "no")]
    task = load("outcome", tmp_path / "q.jsonl", records)
    rows = [
        {**task.judge(item, 0), "logprobs": [0.0, odds]}
        for item, odds in zip(task.items, (0.9, 0.4, 0.6, 0.1), strict=True)
    ]
    assert task.aggregate(rows)["auroc"] == pytest.approx(0.75)
    assert judged(task, ["Yes", "perhaps", "no", "no"])["auroc"] == pytest.approx(1.0)
    assert judged(task, ["no", "perhaps", "no", "no"])["auroc"] == pytest.approx(0.75)
    assert task.aggregate(rows[:2])["auroc"] != task.aggregate(rows[:2])["auroc"]  # nan: one outcome only
    with pytest.raises(DataError, match="same outcome"):
        load("outcome", tmp_path / "q.jsonl", records[:2])


def test_a_part_of_one_outcome_has_no_auroc(tmp_path, capfd):
    """Items 0 and 1 (yes, no) were seen in training, 2 and 3 (no, no) were not: only the first part has a curve."""
    records = [{"id": str(n), "text": "t", "label": n == 0, "patient": f"p{n}"} for n in range(4)]
    task = load("outcome", tmp_path / "q.jsonl", records)
    rows = [
        {**task.judge(item, 0), "logprobs": [0.0, odds], "truncated": False, "confidence": 0.5}
        for item, odds in zip(task.items, (0.9, 0.4, 0.6, 0.1), strict=True)
    ]
    parts = summary.overlap_result(task, {"model": rows}, 0, {"0", "1"})
    assert parts.keys() == {"overlapping"} and parts["overlapping"].as_json()["model"]["auroc"] == 1
    assert "no auroc of the 2 clean items" in capfd.readouterr().err
    whole = summary.task_result(task, {"model": rows}, 0).as_json()["model"]
    assert whole["auroc"] == 1 and "per_character" not in whole and "groups" not in whole


# ---- lists -----------------------------------------------------------------------------------------------------------


def test_hallmarks(tmp_path):
    records = [
        {"text": "a", "labels": "inducing angiogenesis; resisting cell death"},
        {"text": "b", "labels": []},
        {"text": "c", "labels": ["inducing angiogenesis"]},
    ]
    task = load("hoc", tmp_path / "q.jsonl", records)
    answers = ["Inducing angiogenesis and tumour promoting inflammation", "None.", "it is about cells"]
    assert task.parse(answers[1], task.items[1]) == frozenset() and task.parse(answers[2], task.items[2]) is None
    scores = judged(task, answers)
    # angiogenesis: 1 hit, 1 missed: F1 2/3; cell death: missed: 0; their mean. inflammation: said, in no abstract
    assert scores["f1 inducing angiogenesis"] == pytest.approx(2 / 3)
    assert scores["macro_f1"] == pytest.approx(2 / 3 / 2)
    assert scores["micro_f1"] == pytest.approx(2 * 1 / (2 * 1 + 1 + 2))
    assert "f1 tumor promoting inflammation" not in scores
    right = judged(task, [task.write(item) for item in task.items])
    assert (right["macro_f1"], right["exact_match"]) == (1, 1)
    with pytest.raises(DataError, match="no item has a hallmark"):
        load("hoc", tmp_path / "q.jsonl", [{"text": "b", "labels": []}])
    with pytest.raises(DataError, match="no hallmark"):
        load("hoc", tmp_path / "q.jsonl", [{"text": "a", "labels": "inducing sleep"}])


I2B2 = """<?xml version="1.0" encoding="UTF-8" ?>
<ClinicalNarrativeTemporalAnnotation>
<TEXT><![CDATA[
Admission Date :
The patient had fever & was given aspirin .
]]></TEXT>
<TAGS>
<EVENT id="E0" start="1" end="10" text="Admission" modality="FACTUAL" polarity="POS" type="OCCURRENCE" />
<EVENT id="E1" start="34" end="39" text="fever" modality="FACTUAL" polarity="POS" type="PROBLEM" />
<EVENT id="E2" start="52" end="59" text="aspirin" modality="FACTUAL" polarity="POS" type="TREATMENT" />
<SECTIME id="S0" start="1" end="2" text="R&D" type="ADMISSION" dvalue="2000-01-01" />
</TAGS>
</ClinicalNarrativeTemporalAnnotation>
"""


def test_i2b2_entities_by_line(tmp_path):
    task = load("i2b2_2012", tmp_path / "1.xml", I2B2)
    assert [item.gold for item in task.items] == [(), (("problem", "fever"), ("treatment", "aspirin"))]
    assert task.items[1].messages[0]["input"].startswith("The patient had fever &")
    # 1 hit, 1 made up, 1 missed
    scores = judged(task, ["none", "problem: Fever\n- treatment: ibuprofen."])
    assert scores == pytest.approx({"entity_f1": 0.5, "precision": 0.5, "recall": 0.5})
    assert task.parse("The patient is ill", task.items[1]) is None
    with pytest.raises(DataError, match=r"1.xml:\d+: .*do not lead to its text"):
        load("i2b2_2012", tmp_path / "1.xml", I2B2.replace('start="34"', 'start="3"'))


# ---- free text -------------------------------------------------------------------------------------------------------


def test_squad_normalisation_and_token_f1(tmp_path):
    assert normalised("The  patient's (Aspirin), a dose") == ["patients", "aspirin", "dose"]
    note = {"note_id": "n1", "context": ["Given aspirin 81 mg\n", "daily.\n"]}
    note["qas"] = [{"question": ["What dose?"], "answers": [{"text": "aspirin 81 mg"}]}]
    task = load("emrqa", tmp_path / "data.json", json.dumps({"data": [{"title": "t", "paragraphs": [note]}]}))
    squad = ("exact_match", "token_f1")
    said = {answer: judged(task, [answer]) for answer in ("The aspirin 81 mg", "81 mg daily", "")}
    assert [said["The aspirin 81 mg"][name] for name in squad] == [1.0, 1.0]
    assert [said["81 mg daily"][name] for name in squad] == pytest.approx([0.0, 2 * 2 / 6])
    assert [said[""][name] for name in squad] == [0.0, 0.0]


def test_emrqa_as_me_llama_counts_is_another_number(tmp_path):
    """Their tokens are characters, their overlap a set, articles stay. "aspirin" against "The aspirin.": 6 distinct
    characters in common, 10 and 7 long; spaces and case do not count."""
    note = {"note_id": "n1", "context": ["Given aspirin.\n"]}
    note["qas"] = [{"question": ["Which?"], "answers": [{"text": "aspirin"}, {"text": "ASA"}]}]
    content = json.dumps({"data": [{"title": "t", "paragraphs": [note]}]})
    task = load("emrqa", tmp_path / "data.json", content)
    precision, recall = 6 / 10, 6 / 7
    assert len(set("aspirin")) == 6
    found = task.judge(task.items[0], "The aspirin.")
    assert found["token_f1"] == 1.0
    assert found["me_llama"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["me_llama_exact"] == 0.0
    assert task.judge(task.items[0], "As pirin")["me_llama_exact"] == 1.0
    assert task.judge(task.items[0], "asa")["token_f1"] == 1.0 > task.judge(task.items[0], "asa")["me_llama"]
    path = tmp_path / "data.json"
    assert load_task(TaskSection(task="emrqa", path=str(path), metric="me_llama"), seed=0).metric == "me_llama"


def test_macro_f1_over_all_hallmarks_is_another_number(tmp_path):
    """One hallmark there and found: 1 over those that occur, .1 over all ten."""
    records = [{"text": "T.", "labels": ["inducing angiogenesis"]}, {"text": "U.", "labels": []}]
    scores = judged(load("hoc", tmp_path / "q.jsonl", records), ["inducing angiogenesis", "none"])
    assert (scores["macro_f1"], scores["macro_f1_all"]) == (1.0, pytest.approx(0.1))


@pytest.mark.parametrize("name", FILE_TASKS)
def test_every_metric_has_its_definition(name):
    make = FILE_TASKS[name][1]
    free = (findings.hoc_task, findings.entity_task, free_text.question_task, free_text.summary_task)
    if make in free:
        items = (Item("1", (), "gold"),)
    else:
        items = tuple(Item(str(gold), (), gold, ("no", "yes")) for gold in (0, 1))
    for metric in make(name, items).metrics:
        assert len(definition(metric, name)) > 20


def test_emrqa_counts_the_best_of_its_answers(tmp_path):
    """Answers "aspirin" and "daily aspirin dose"; said "the daily dose": F1 0 and 2 * 2 / (3 + 2)."""
    answers = [{"text": "aspirin"}, {"text": ""}, {"text": ["daily", "aspirin dose"]}]
    asked = [{"question": [name, "again?"], "answers": answers} for name in "ab"]
    notes = [{"note_id": f"n{n}", "context": [f"Text {n}"], "qas": asked} for n in range(2)]
    task = load("emrqa", tmp_path / "data.json", json.dumps({"data": [{"title": "t", "paragraphs": notes}]}))
    assert [item.group for item in task.items] == ["n0", "n0", "n1", "n1"]
    assert task.items[0].gold == ("aspirin", "daily, aspirin dose") and task.write(task.items[0]) == "aspirin"
    said = [task.judge(task.items[0], answer) for answer in ("the daily dose", "Daily aspirin dose.")]
    assert [found["exact_match"] for found in said] == [0.0, 1.0]
    assert [found["token_f1"] for found in said] == [pytest.approx(4 / 5), 1.0]
    shots = TaskSection(task="emrqa", path=str(tmp_path / "data.json"), shots=2)
    for item in load_task(shots, seed=0).asked:
        other = {"question-2", "question-3"} if item.group == "n0" else {"question-0", "question-1"}
        assert set(item.shots) == other
    with pytest.raises(DataError, match="`paragraphs` is missing"):
        load("emrqa", tmp_path / "data.json", [{"text": "t"}])


def test_rouge_hand_worked(tmp_path):
    """4 words against 3, 2 in common and in order: ROUGE-1 and -L 4/7; one bigram in common of 3 and 2: 2/5."""
    records = [{"findings": "Long text of findings.", "impression": "no acute pulmonary embolism"}]
    task = load("summarization", tmp_path / "q.jsonl", records)
    scores = judged(task, ["acute pulmonary oedema"])
    expected = {"rouge1": 4 / 7, "rouge2": 2 / 5, "rougeL": 4 / 7}
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    stems = judged(task, ["acute pulmonary embolisms"])
    assert (stems["rougeL"], stems["rouge_unstemmed"]) == pytest.approx((6 / 7, 4 / 7), abs=1e-5)
    assert (stems["rouge1_unstemmed"], stems["rouge2_unstemmed"]) == pytest.approx((4 / 7, 2 / 5), abs=1e-5)
    assert "impression" in task.items[0].messages[0]["content"]
    with pytest.raises(DataError, match="no known pair"):
        load("summarization", tmp_path / "q.jsonl", [{"article": "a"}])


REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 FINDINGS: The lungs are clear.
 No effusion.

 IMPRESSION:

 No acute process.
"""


def test_radiology_reports_as_published(tmp_path):
    """A tree of text files; a report without both sections has no item and is counted on screen."""
    folder = tmp_path / "files" / "p10" / "p10000032"
    folder.mkdir(parents=True)
    (folder / "s1.txt").write_text(REPORT)
    (folder / "s2.txt").write_text(REPORT.replace("FINDINGS", "HISTORY"))
    [item] = load("mimic_cxr_summary", tmp_path / "files").items
    assert item.id == "s1/s1" and item.gold == "No acute process."
    assert item.messages[0]["input"] == "The lungs are clear.\n No effusion."
    with pytest.raises(DataError, match="no item for task"):
        load("mimic_cxr_summary", folder / "s2.txt")


def test_pubmed_articles_as_published(tmp_path):
    record = {"article_id": "PMC1", "article_text": ["one .", "two ."], "abstract_text": ["<S> short . </S>"]}
    [item] = load("pubmed_summary", tmp_path / "test.txt", [record]).items
    assert (item.id, item.gold, item.messages[0]["input"]) == ("PMC1", "short .", "one . two .")
    [item] = load("pubmed_summary", tmp_path / "t.jsonl", [{"article": "one . two .", "abstract": "short ."}]).items
    assert item.gold == "short ."


def test_mmlu_divides_into_medical_and_general(tmp_path):
    for subject in ("anatomy", "astronomy"):
        (tmp_path / f"{subject}_test.csv").write_text(f"{subject}?,a1,b1,c1,d1,B\n")
    assert [item.facet for item in load("mmlu_medical", tmp_path).items] == ["anatomy"]
    assert [item.facet for item in load("mmlu_general", tmp_path).items] == ["astronomy"]


def test_arc_of_the_authors_and_of_the_hub(tmp_path):
    labels, texts = ["1", "2", "3"], ["sun", "moon", "sea"]
    choices = [{"label": a, "text": b} for a, b in zip(labels, texts, strict=True)]
    authors = {"id": "x", "question": {"stem": "Which?", "choices": choices}, "answerKey": "3"}
    hub = {"id": "x", "question": "Which?", "choices": {"label": labels, "text": texts}, "answerKey": "3"}
    for record in (authors, hub):
        [item] = load("arc", tmp_path / "q.jsonl", [record]).items
        assert (item.gold, item.options, item.texts) == (2, ("1", "2", "3"), ("sun", "moon", "sea"))
    with pytest.raises(DataError, match="`choices` has no labels"):
        load("arc", tmp_path / "q.jsonl", [{**hub, "choices": ["sun"]}])


def test_entities_equal_seqeval_where_an_answer_can_be_tagged(tmp_path):
    """i2b2 line: gold fever and aspirin; said fever as treatment, aspirin as treatment: 1 hit, 1 extra, 1 missed."""
    scheme = pytest.importorskip("seqeval.metrics")
    task = load("i2b2_2012", tmp_path / "1.xml", I2B2)
    ours = judged(task, ["none", "treatment: fever\ntreatment: aspirin"])
    gold = [["O"] * 3, ["O", "O", "O", "B-problem", "O", "O", "O", "B-treatment", "O"]]
    said = [["O"] * 3, ["O", "O", "O", "B-treatment", "O", "O", "O", "B-treatment", "O"]]
    assert ours["entity_f1"] == pytest.approx(scheme.f1_score(gold, said)) == 0.5
    assert ours["precision"] == pytest.approx(scheme.precision_score(gold, said))


def encoder(folder: Path) -> Path:
    """A random BERT of three layers that knows six words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(
        ["no acute pulmonary embolism oedema seen"], trainers.WordLevelTrainer(special_tokens=special)
    )
    pairs = [("[CLS]", 2), ("[SEP]", 3)]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pairs)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names).save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=16, **shape)).save_pretrained(folder)
    return folder


def test_bertscore_hand_worked(tmp_path):
    """F1 of the greedy cosine matches of the layer's states, [CLS] and [SEP] not counted."""
    pytest.importorskip("bert_score")
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = encoder(tmp_path / "bert")
    record = {"text": "Long text.", "summary": "no acute pulmonary embolism"}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(record) + "\n")
    section = TaskSection(task="summarization", path=str(path), bertscore=f"{folder}:2", metric="bertscore")
    task = load_task(section, seed=0)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def states(text: str) -> torch.Tensor:
        with torch.no_grad():
            found = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0, 1:-1]
        return torch.nn.functional.normalize(found, dim=-1)

    similarity = states("acute oedema seen") @ states(record["summary"]).T
    precision, recall = similarity.max(1).values.mean(), similarity.max(0).values.mean()
    expected = float(2 * precision * recall / (precision + recall))
    assert judged(task, ["acute oedema seen"])["bertscore"] == pytest.approx(expected, abs=1e-5)
    assert judged(task, [record["summary"]])["bertscore"] == pytest.approx(1, abs=1e-5)
    assert judged(task, [""])["bertscore"] == 0
    for wrong, message in (("roberta-large", "no local folder"), (str(folder), "no layer is known")):
        with pytest.raises(RecipeError, match=message):
            load_task(section.model_copy(update={"bertscore": wrong}), seed=0)


def test_missing_metric_library_is_said_before_scoring(tmp_path, monkeypatch):
    monkeypatch.setattr(task_items, "find_spec", lambda module: None)
    with pytest.raises(RecipeError, match=r"pip install 'qmedtune\[metrics\]'"):
        load("summarization", tmp_path / "q.jsonl", [{"article": "a b c", "abstract": "a"}])
