"""Three records of each system of the field: our tokens against those that the original's own rule gives.

The rules are read from the originals' code at the commits that the research used; each names file and lines. They are
applied here by hand, with LLaMA-2's tokenizer alone and none of our modules. What a recipe adds on purpose is taken off
in front and behind (`RULES`): docs/prompts.md tells why.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from real_tokenizers import tokenizer
from tokenizers import AddedToken, Tokenizer

from qmedtune.data.packing import framing, templates
from qmedtune.data.packing.tokens import encode_texts, load_codec
from qmedtune.data.reading.instructions import instruction_record
from qmedtune.parsing.loader import load_recipe

BOS, EOS = 1, 2  # of LLaMA 1 and 2
Record = dict[str, str]
RECORDS: list[Record] = [
    {"instruction": "Which drug?", "input": "Fever for 3 days.", "output": "Paracetamol 500 mg."},
    {"instruction": "Is it malignant", "input": "", "output": "B"},
    {"instruction": "Name two signs:\n- one\n- two", "input": "Text, 2 lines\nlong", "output": "Cough\nand 39.5 °C"},
]
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
WITHOUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@pytest.fixture(scope="module")
def llama2() -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer("llama2") / "tokenizer.json"))


def ids(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def stanford(backend: Tokenizer, record: Record) -> tuple[list[int], int]:
    """Prompt and answer as one string with eos, behind bos; what the prompt alone has is masked.

    Kent0n-Li/ChatDoctor e77bd7e train.py:33-42 (text), 128 (s + t), 133 (mask), 151 (eos); the same in
    XZhang97666/AlpaCare b469c41 training/train_alpaca.py:33-42, 119, 124, 142 and chaoyi-wu/PMC-LLaMA 54fc0d4
    SFT/train.py:25-34, 111, 116, 134. `tokenizer(text)` of a LlamaTokenizer begins with bos.
    """
    given = f"\n\n### Input:\n{record['input']}" if record["input"] else ""
    head = WITH_INPUT if given else WITHOUT
    source = f"{head}\n\n### Instruction:\n{record['instruction']}{given}\n\n### Response:"
    return [BOS, *ids(backend, source + record["output"]), EOS], 1 + len(ids(backend, source))


def medalpaca(backend: Tokenizer, record: Record) -> tuple[list[int], int]:
    """One string, no bos (add_special_tokens=False), eos behind; the input's heading also where it is empty.

    kbressem/medAlpaca 63448c5 medalpaca/handler.py:81 (no bos), 84-88 (eos), 197-200 (text);
    prompt_templates/medalpaca.json. train.py:31 train_on_inputs: nothing is masked (the recipe's `loss_on: all`).
    """
    source = (
        f"{WITH_INPUT}\n\n### Instruction:\n{record['instruction']}\n\n### Input:\n{record['input']}\n\n### Response:\n"
    )
    return [*ids(backend, source + record["output"]), EOS], len(ids(backend, source))


def meditron(backend: Tokenizer, record: Record) -> tuple[list[int], int]:
    """Every message by itself, without bos and eos; those of the answer's message carry the loss.

    epfLLM/Megatron-LLM 02bb7f4 tools/preprocess_instruct_data.py, Encoder.encode (by message) and format_message
    (text). The recipe's base has no tokens for the marks: megatron/tokenizer/tokenizer.py then leaves them text
    (new_tokens=False).
    """
    question = f"{record['instruction']}\n\n{record['input']}" if record["input"] else record["instruction"]
    asked = ids(backend, f"<|im_start|>question\n{question}<|im_end|>\n")
    header = "<|im_start|>answer\n"
    answer = ids(backend, f"{header}{record['output']}<|im_end|>\n")
    return [*asked, *answer], len(asked) + len(ids(backend, header))


def me_llama(backend: Tokenizer, record: Record) -> tuple[list[int], int]:
    """Prompt and answer each by itself, no bos, eos behind the answer.

    The lab's trainer, BIDS-Xu-Lab/LLMindcraft 26581f0 src/ft/sample_generator.py:15-18 (text), 21-23 (apart, no bos),
    32-34 (eos); the wrap is that of BIDS-Xu-Lab/Me-LLaMA src/model_prompt.py:5-6.
    """
    question = f"{record['instruction']}\n\n{record['input']}" if record["input"] else record["instruction"]
    asked = ids(backend, f"Human: \n{question}\n\nAssistant: \n")
    return [*asked, *ids(backend, record["output"]), EOS], len(asked)


# system: (rule, what we put in front, what we put behind)
RULES: dict[str, tuple[Callable[[Tokenizer, Record], tuple[list[int], int]], list[int], list[int]]] = {
    "chatdoctor": (stanford, [], []),
    "alpacare": (stanford, [], []),
    "pmc_llama": (stanford, [], []),
    "medalpaca": (medalpaca, [BOS], []),
    "meditron": (meditron, [BOS], [EOS]),
    "me_llama": (me_llama, [BOS], []),
}


def template_of(system: str) -> templates.Template:
    """The template of a system's instruction sources, all of which have the same."""
    data = load_recipe(ROOT / "recipes" / "systems" / f"{system}.yaml").recipe.data
    [name] = {source.template for source in data.values() if source.kind == "instructions"}
    return templates.load(str(name))


@pytest.mark.parametrize("system", RULES)
@pytest.mark.parametrize("number", range(3))
def test_three_records_of_each_system(llama2, system: str, number: int):
    rule, front, behind = RULES[system]
    record = RECORDS[number]
    expected, prompt = rule(llama2, record)
    messages = instruction_record(record, {})["messages"]
    frame = framing.frame_in(template_of(system), tokenizer("llama2"))
    [trained] = frame.train([messages])
    [asked] = frame.ask([messages[:-1]])
    assert trained.ids == [*front, *expected, *behind]
    assert trained.ids[: len(asked.ids)] == asked.ids == trained.ids[: len(front) + prompt]
    assert trained.supervised == [0] * len(asked.ids) + [1] * (len(trained.ids) - len(asked.ids))


def test_the_border_of_the_alpaca_family_and_of_me_llama(llama2):
    """`:` and `B` behind `### Response:` (joint), `▁B` behind a line end (apart)."""
    messages = instruction_record(RECORDS[1], {})["messages"]
    for system, ending in (("alpacare", [":", "B", "</s>"]), ("me_llama", ["<0x0A>", "▁B", "</s>"])):
        [trained] = framing.frame_in(template_of(system), tokenizer("llama2")).train([messages])
        assert [llama2.id_to_token(token) for token in trained.ids[-3:]] == ending


def test_meditron_with_the_marks_of_its_own_vocabulary(llama2, tmp_path: Path):
    """Megatron-LLM splits a message at its special tokens and gives each stretch of text to SentencePiece.

    epfLLM/Megatron-LLM 080904c megatron/tokenizer/tokenizer.py, _SentencePieceTokenizer.tokenize.
    """
    marks = ("<|im_start|>", "<|im_end|>")
    own = Tokenizer.from_str(llama2.to_str())
    own.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    own.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    start, end = (own.token_to_id(mark) for mark in marks)

    def message(role: str, text: str) -> list[int]:
        return [start, *ids(llama2, f"{role}\n{text}"), end, *ids(llama2, "\n")]

    frame = framing.frame_in(template_of("meditron"), tmp_path)
    for record in RECORDS:
        messages = instruction_record(record, {})["messages"]
        question = f"{record['instruction']}\n\n{record['input']}" if record["input"] else record["instruction"]
        [trained] = frame.train([messages])
        assert trained.ids == [BOS, *message("question", question), *message("answer", record["output"]), EOS]


NOTES = ("Pt. is a 63 y/o man.\nBP 120/80.", "</s> is spelled here", "Schmerz, 39.5 °C")


def test_documents_of_clinical_llama(llama2):
    """bos and the text: aryopg/clinical_peft f9d3ba8 clinical_peft/utils/dataset_utils.py:35-39 (`tokenizer(text)`).

    Ours closes a document with eos, which the original leaves to truncation: texts follow each other in a row here.
    """
    codec = load_codec(tokenizer("llama2"))
    found = encode_texts(codec, [{"text": text} for text in NOTES], None)
    plain = Tokenizer.from_str(llama2.to_str())
    plain.encode_special_tokens = True
    assert [each.ids for each in found] == [[BOS, *ids(plain, text), EOS] for text in NOTES]


def test_documents_of_gatortrongpt():
    """The text and an end-of-document mark, no bos.

    uf-hobi-informatics-lab/GatorTronGPT 3156a48 preprocessing/json2data.sh:89 (GPT-2's BPE), 95 (--append-eod).
    """
    folder = tokenizer("no_bos")
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    codec = load_codec(folder)
    found = encode_texts(codec, [{"text": text} for text in NOTES], None)
    assert [each.ids for each in found] == [[*ids(plain, text), codec.eos_id] for text in NOTES]
