"""The systems of the field as recipes: they load, plan and run, with the originals' prompts and sourced figures.

pytest -m slow tests/test_systems.py        # every smoke run, on the tiny base: about ten minutes
"""

from __future__ import annotations

import gzip
import json
import re
import runpy
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from qmedtune import recipe as schema
from qmedtune.data.packing import templates
from qmedtune.data.reading.instructions import instruction_record
from qmedtune.data.reading.rejects import Rejects
from qmedtune.data.reading.sources import read_records
from qmedtune.parsing.loader import load_recipe
from qmedtune.plan import make_plan
from qmedtune.run import run
from qmedtune.smoke import smoke

FOLDER = ROOT / "recipes" / "systems"
SYSTEMS = ("alpacare", "chatdoctor", "clinical_llama", "gatortrongpt", "me_llama", "medalpaca", "meditron", "pmc_llama")
SOURCED = re.compile(r"\[(ours|QLoRA|fixed)\]|\b[\w-]+/[\w.-]+ (\w+/)*[\w-]+|\b[\w-]+/[\w-]+, abstract")
STANFORD_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nQ\n\n### Input:\nI\n\n### Response:A"
)
STANFORD = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nQ\n\n### Response:A"
)
MEDALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\nQ\n\n### Input:\nI\n\n### Response:\nA"
)
# The text of one record in training, before the end-of-sequence token: (with input, without).
TEXTS = {
    "chatdoctor": (STANFORD_INPUT, STANFORD),  # chaoyi-wu/PMC-LLaMA SFT/train.py has the same two
    "alpacare": (STANFORD_INPUT, STANFORD),
    "pmc_llama": (STANFORD_INPUT, STANFORD),  # SFT/train.py
    "medalpaca": (MEDALPACA, MEDALPACA.replace("\nI\n", "\n\n")),  # handler.py with prompt_templates/medalpaca.json
    "meditron": (  # epfLLM/Megatron-LLM tools/preprocess_instruct_data.py: format_message
        "<|im_start|>question\nQ\n\nI<|im_end|>\n<|im_start|>answer\nA<|im_end|>\n",
        "<|im_start|>question\nQ<|im_end|>\n<|im_start|>answer\nA<|im_end|>\n",
    ),
    "me_llama": ("Human: \nQ\n\nI\n\nAssistant: \nA", "Human: \nQ\n\nAssistant: \nA"),  # src/model_prompt.py
}


def recipe(name: str):
    return load_recipe(FOLDER / f"{name}.yaml").recipe


def test_all_eight_are_there():
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.yaml"))) == SYSTEMS


@pytest.mark.parametrize("name", SYSTEMS)
def test_each_plans_without_data_base_or_card(name: str):
    """What cannot be known here is said to be missing; lengths, batches, memory and time of each stage are told."""
    plan = make_plan(recipe(name))
    assert [stage["kind"] for stage in plan["stages"]] == [stage.kind for stage in recipe(name).stages]
    assert all(stage["peak_bytes"] <= stage["budget_bytes"] for stage in plan["stages"])


@pytest.mark.parametrize("name", SYSTEMS)
def test_texts_are_the_users_own(name: str):
    for source in recipe(name).data.values():
        for path in source.paths:
            assert path.startswith("${")


JATS = (
    "<article><front><article-meta><title-group><article-title>T</article-title></title-group></article-meta></front>"
)
JATS += "<body><sec><title>S</title><p>Some text of an article.</p></sec></body></article>"
PUBMED = (
    "<PubmedArticleSet><PubmedArticle><MedlineCitation><PMID Version='1'>1</PMID><Article>"
    "<ArticleTitle>T</ArticleTitle>"
    "<Abstract><AbstractText>Some text.</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle>"
    "</PubmedArticleSet>"
)
PAIR = {"instruction": "Q", "input": "<noinput>", "output": "A"}
# What a file of the user's holds, by the end of its path: one record in the form in which it is published.
RECORDS = {
    "NOTEEVENTS.csv.gz": 'ROW_ID,SUBJECT_ID,HADM_ID,CATEGORY,ISERROR,TEXT\n1,7,2,Nursing,,"a note\nof two lines"\n',
    "mortality.csv": 'id,subject_id,text,hospital_expire_flag\n1,7,"a note",0\n',
    "mimic-iv-note/x.csv.gz": 'note_id,subject_id,hadm_id,text\n7-DS-1,7,2,"a note"\n',
    "mimic-cxr/files": "FINDINGS: clear lungs.",
    ".nxml": JATS,
    ".xml.gz": PUBMED,
    "s2orc/x.jsonl.gz": json.dumps({"corpusid": 1, "content": {"text": "Some text.", "annotations": {}}}),
    "guidelines/x.jsonl": json.dumps({"clean_text": "Some text.", "title": "T"}),
    "benchmark/train.jsonl": json.dumps({"prompt": "Q", "gold": "A"}),
    "medical/x.json": json.dumps(
        [{"id": 1, "conversations": [{"from": "human", "value": "Q"}, {"from": "agent", "value": "A"}]}]
    ),
    ".json": json.dumps([PAIR]),
    ".jsonl": json.dumps({"text": "Some text.", "patient": "7"}),
    ".jsonl.gz": json.dumps({"text": "Some text."}),
}


def put(path: str) -> None:
    """A file where a recipe's path finds it."""
    text = next(text for end, text in RECORDS.items() if path.endswith(end))
    where = Path(path)
    if path.endswith("mimic-cxr/files"):
        where = where / "p10" / "p10000001" / "s50000001.txt"
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_bytes(gzip.compress(text.encode()) if path.endswith(".gz") else text.encode())


@pytest.mark.parametrize("name", SYSTEMS)
def test_each_reads_records_in_the_form_in_which_they_are_published(name: str, tmp_path, monkeypatch):
    for variable in ("DATA", "MEADOW"):
        monkeypatch.setenv(variable, str(tmp_path))
    for source_name, source in recipe(name).data.items():
        for path in source.paths:
            put(re.sub(r"\$\{\w+\}", str(tmp_path), path).replace("/**/", "/").replace("*", "x"))
            rejects = Rejects(source_name)
            found = list(read_records(source_name, source.model_copy(update={"path": path}), rejects))
            assert len(found) == 1 and not any(rejects.counts.values()), (source_name, path)
            assert ("messages" if source.kind == "instructions" else "text") in found[0]
            assert source.split_by != "patient" or found[0]["patient"]
            assert "label" not in source.columns or found[0]["label"] == "0"


def numbers(text: str) -> list[int]:
    """Lines (from 1) of a recipe that hold a number as a value."""
    nodes = [yaml.compose(text, Loader=yaml.SafeLoader)]
    found = []
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif re.fullmatch(r"-?[\d.]+(e-?\d+)?", node.value):
            found.append(node.start_mark.line + 1)
    return sorted(set(found))


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_number_names_its_source(name: str):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    unsourced = [line for line in numbers(text) if not SOURCED.search(lines[line - 1].partition("#")[2])]
    assert unsourced == [] and len(numbers(text)) >= 8


def test_a_number_without_source_is_noticed():
    assert numbers("a: 1  # as in the paper\nb: [x, 2e-4]\nc: two\n") == [1, 2]
    assert not SOURCED.search(" as in the paper") and SOURCED.search(" owner/name train.py: 2e-5")


@pytest.mark.parametrize("name", TEXTS)
def test_prompts_are_the_originals_to_the_byte(name: str):
    used = {source.template for source in recipe(name).data.values() if source.kind == "instructions"}
    assert len(used) == 1
    template = templates.load(used.pop() or "")
    for given, text in zip(("I", ""), TEXTS[name], strict=True):
        messages = instruction_record({"instruction": "Q", "input": given, "output": "A"}, {})["messages"]
        assert "".join(part for part, _ in template.render(messages)) == text
        assert text.startswith(template.prompt(messages[:-1]))


def test_me_llamas_records_are_read():
    turns = [{"from": "human", "value": "Q"}, {"from": "agent", "value": "A"}]
    assert [m["role"] for m in instruction_record({"conversations": turns}, {})["messages"]] == ["user", "assistant"]


def test_what_makes_a_system_is_in_its_recipe():
    """The one thing that each is known for."""
    assert [stage.kind for stage in recipe("chatdoctor").stages] == ["sft", "sft"]
    assert recipe("medalpaca").stages[0].sft.loss_on == "all"
    assert recipe("medalpaca").data["cord19"].max_records == 50_000
    assert recipe("pmc_llama").data["papers"].chunking == "window"
    assert len(recipe("pmc_llama").stages[1].sft.sources) == 7
    assert recipe("gatortrongpt").stages[0].full and recipe("gatortrongpt").model.shape is not None
    assert recipe("meditron").stages[0].cpt.horizon_ratio == 2.0
    mix = recipe("me_llama").stages[0].cpt.mix
    assert (mix["literature"], mix["notes"] + mix["radiology"], mix["general"]) == (15, 1, 4)
    assert recipe("clinical_llama").stages[1].classify.train_earlier


@pytest.mark.parametrize("name", SYSTEMS)
def test_smoke_keeps_what_can_be_wrong_in_a_recipe(name: str):
    written, made = recipe(name), smoke(recipe(name))
    assert made.model.base == "builtin:tiny" and made.model.shape is None
    assert all(source.path.startswith("builtin:") for source in made.data.values())
    for name, source in written.data.items():
        assert (made.data[name].template, made.data[name].chunking) == (source.template, source.chunking)
    kept = ("schedule", "horizon_ratio", "min_lr_ratio", "adapter", "weight_decay", "betas")
    for before, after in zip(written.stages, made.stages, strict=True):
        assert [getattr(before.section, key) for key in kept] == [getattr(after.section, key) for key in kept]


def test_the_cheapest_runs_through_on_the_micro_world(tmp_path: Path):
    made = smoke(recipe("alpacare"), "builtin:micro")
    result = run(made, "", tmp_path / "run", offline=True).as_json()
    assert result["status"] == "finished" and result["merge"]["kl"] < 1e-4
    assert result["evaluation"]["tasks"]["facts"]["final"]["n"] > 0
    assert result["evaluation"]["template"] == "stanford_alpaca"


@pytest.fixture(scope="session")
def tiny_base():
    from qmedtune import base
    from qmedtune.recipe import ModelSection

    return base.identify(ModelSection(base="builtin:tiny"), offline=True).make()


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_each_smoke_run_ends_within_90_seconds(name: str, tiny_base: Path, tmp_path: Path):
    loaded = load_recipe(FOLDER / f"{name}.yaml")
    started = time.monotonic()
    result = run(loaded.recipe, loaded.text, tmp_path / "run", offline=True, smoke=True).as_json()
    seconds = time.monotonic() - started
    print(f"{name}: {seconds:.0f} s")
    assert result["status"] == "finished" and seconds < 90
    assert (result["merge"] is None) == (name == "gatortrongpt")
    if name == "clinical_llama":
        assert 0 <= result["stages"][1]["classification"]["auroc"] <= 1


def test_the_comparison_is_the_generated_one():
    page = runpy.run_path(str(FOLDER / "table.py"))["page"]()
    assert page == (FOLDER / "README.md").read_text(encoding="utf-8"), "run: python recipes/systems/table.py --write"
    assert all(f"[{name}.yaml]({name}.yaml)" in page for name in SYSTEMS) and "ChatGPT" in page and "| LLaMA |" in page


# ---- departures from the originals -----------------------------------------------------------------------------------

TABLE = runpy.run_path(str(FOLDER / "table.py"))
PLACE = re.compile(r"(likely, )?[\w-]+/[\w.-]+ [\w./-]+:\d+|not in the repository")
# Of a stage: compared in other words (`mix` with its `unit`, `max_truncated_fraction` as what becomes of cut records),
# or left to the machine, without an influence on what is learnt.
SAID_OTHERWISE = {"adapter", "lora", "mix", "unit", "max_truncated_fraction", "embedding_lr", "optimizer", "min_steps"}
BY_MACHINE = {"micro_batch", "gradient_checkpointing", "data"}
# Of the other sections: where text lies and how it is read, what a run refuses, and what computes.
SOURCE_KEYS = {"split_by", "holdout", "max_records", "max_tokens", "chunking", "overlap", "phi", "template"}
SOURCE_ELSEWHERE = {"path", "kind", "format", "columns", "delimiter", "encoding", "license", "terms"}
HYGIENE_ELSEWHERE = {"dedup", "phi", "max_bad_fraction"}
MODEL_KEYS = {"base", "shape", "quantization", "double_quantization", "compute_dtype"}
MODEL_ELSEWHERE = {"revision", "kernels", "attention"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_key_is_compared_and_every_row_says_where_it_stands(name: str):
    facts = TABLE["originals"]()[name]
    known, made = set(facts) - {"repository"}, set(TABLE["effective"](recipe(name)))
    common = TABLE["originals"]()["all"]
    assert known <= made
    assert {key for key in made - known if key not in common and key.partition(".")[2] not in common} == set()
    rows = TABLE["departs"](name, recipe(name))
    assert len(rows) >= 5 and all(PLACE.fullmatch(row[-1]) for row in rows), [
        row for row in rows if not PLACE.fullmatch(row[-1])
    ]


def test_no_key_of_training_is_left_out():
    sections = ("CptSection", "SftSection", "PretrainSection", "ClassifySection")
    known = {key for section in sections for key in getattr(schema, section).model_fields}
    assert known == set(TABLE["STAGE_KEYS"]) | SAID_OTHERWISE | BY_MACHINE
    assert set(schema.AdapterSection.model_fields) == set(TABLE["ADAPTER_KEYS"])
    assert set(schema.HygieneSection.model_fields) == set(TABLE["HYGIENE_KEYS"]) | HYGIENE_ELSEWHERE
    assert set(schema.SourceSection.model_fields) == SOURCE_KEYS | SOURCE_ELSEWHERE
    assert set(schema.ModelSection.model_fields) == MODEL_KEYS | MODEL_ELSEWHERE


@pytest.mark.parametrize(
    ("name", "change", "key"),
    [
        ("alpacare", "stages[0].sft.seq_len=2048", "01-sft.seq_len"),
        ("meditron", "stages[1].sft.betas=[0.9, 0.999]", "02-sft.betas"),
        ("meditron", "stages[0].cpt.adam_eps=1e-8", "01-cpt.adam_eps"),
        ("medalpaca", "adapter.r=16", "adapter.r"),
        ("clinical_llama", "stages[1].classify.class_weights=none", "02-classify.class_weights"),
        ("clinical_llama", "stages[1].classify.validation=0", "02-classify.keeps"),
        ("gatortrongpt", "stages[0].pretrain.max_grad_norm=0.5", "01-pretrain.max_grad_norm"),
        ("me_llama", "stages[0].cpt.weight_decay=0", "01-cpt.weight_decay"),
        ("pmc_llama", "stages[0].cpt.weight_decay=0.1", "01-cpt.weight_decay"),
        ("chatdoctor", "stages[1].sft.min_lr_ratio=0.05", "02-sft.min_lr_ratio"),
        ("alpacare", "hygiene.min_characters=100", "hygiene.min_characters"),
        ("alpacare", "adapter.rslora=true", "adapter.rslora"),
        ("medalpaca", "hygiene.languages=[en]", "hygiene.languages"),
        ("pmc_llama", "data.papers.chunking=pack", "data.chunking"),
        ("clinical_llama", "stages[1].classify.batch=16", "02-classify.batch"),
        ("me_llama", "stages[1].sft.warmup={ratio: 0.01}", "02-sft.warmup"),
        ("meditron", "evaluate.tasks[3].task=mmlu_medical", "evaluate.mmlu"),
        ("medalpaca", "stages[0].sft.loss_on=response", "data.answer_header"),
        ("alpacare", "model.base=meta-llama/Llama-2-7b-hf", "model.base"),
        ("meditron", "model.compute_dtype=float16", "model.compute_dtype"),
        ("medalpaca", "adapter.train_embeddings=true", "adapter.train_embeddings"),
        ("medalpaca", "data.cord19.max_records=1000", "data.read"),
        ("meditron", "data.papers.split_by=patient", "data.split_by"),
        ("pmc_llama", "data.papers.max_tokens=1000", "data.read"),
        ("clinical_llama", "data.notes.phi=redact", "data.phi"),
        ("chatdoctor", "data.alpaca.template=alpaca", "data.template"),
        ("meditron", "stages[0].cpt.mix={guidelines: 1, papers: 1}", "01-cpt.mix"),
        ("pmc_llama", "stages[0].cpt.unit=documents", "01-cpt.mix"),
        ("meditron", "stages[0].cpt.max_repeats=4", "01-cpt.max_repeats"),
        ("gatortrongpt", "stages[0].pretrain.embedding_lr=1e-5", "01-pretrain.embedding_lr"),
        ("clinical_llama", "stages[1].classify.train_earlier=false", "02-classify.train_earlier"),
        ("clinical_llama", "stages[1].classify.lora.targets=all-linear", "02-classify.lora.targets"),
        ("clinical_llama", "stages[1].classify.multi_label=true", "02-classify.multi_label"),
        ("chatdoctor", "stages[1].sft.adapter=merge_then_new", "02-sft.adapter"),
        ("meditron", "hygiene.contaminated=report", "hygiene.contaminated"),
        ("alpacare", "stages[0].sft.horizon_steps=10", "01-sft.horizon_steps"),
    ],
)
def test_a_changed_value_appears_in_the_table(name: str, change: str, key: str):
    """Also a default that is changed: the table is made from what the recipe trains with, not from marked lines."""
    changed = load_recipe(FOLDER / f"{name}.yaml", [change]).recipe
    assert f"`{key}`" not in [row[1] for row in TABLE["departs"](name, recipe(name))]
    [row] = [row for row in TABLE["departs"](name, changed) if row[1] == f"`{key}`"]
    assert row[2] == TABLE["said"](TABLE["effective"](changed)[key])
    assert row[2] != row[3]
