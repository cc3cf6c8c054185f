"""What `data show` prints, and the fertility report."""

import re

import pytest
from builders import folders, pack_recipe, packed
from real_tokenizers import tokenizer
from toy_tokenizers import byte_level, save

from qmedtune.data.packing import tokens
from qmedtune.data.packing.fertility import fertility
from qmedtune.data.packing.show import show

CHAT = {"messages": [{"role": "user", "content": "why?\x1b[31m"}, {"role": "assistant", "content": "rest."}]}


@pytest.fixture
def tokenizer_dir(tmp_path):
    return save(byte_level(), tmp_path / "tokenizer")


def test_responses_are_marked_and_borders_named(tmp_path, tokenizer_dir):
    stage = {"sft": {"data": "chats", "epochs": 1, "seq_len": 256}}
    made = pack_recipe([stage], chats={"template": "question_answer"})
    _, rows = packed(tmp_path, made, tokenizer_dir, folders(tmp_path, chats=[CHAT, CHAT]))
    tokenizer = tokens.load_codec(tokenizer_dir).backend
    plain = show(rows, tokenizer, 5, color=False)
    assert plain.count("« rest.</s>»") == 2
    assert re.findall(r"── chats #(\d)", plain) in (["0", "1"], ["1", "0"])
    assert "\x1b" not in plain  # escape sequences of the data are not obeyed
    colored = show(rows, tokenizer, 1)
    assert "\033[32m rest.</s>\033[0m" in colored


def test_cuts_are_told(tmp_path, tokenizer_dir):
    stage = {"cpt": {"mix": {"notes": 1}, "epochs": 1, "seq_len": 16}}
    _, rows = packed(
        tmp_path, pack_recipe([stage], notes={}), tokenizer_dir, folders(tmp_path, notes=["aspirin " * 20])
    )
    text = show(rows, tokens.load_codec(tokenizer_dir).backend, 9, color=False)
    assert "goes on" in text.splitlines()[1]
    assert "from token 16" in text


def test_fertility_gives_figures_and_no_clinical_words(tmp_path, tokenizer_dir):
    inputs = folders(tmp_path, notes=["headache pyelonephritis"] * 9, literature=["headache pyelonephritis"] * 9)
    report = fertility(tokens.load_codec(tokenizer_dir), inputs, ["notes"])
    assert report["notes"].most_split == []
    assert report["literature"].most_split[0][0] == "pyelonephritis"
    assert report["notes"].words == 18
    assert report["notes"].tokens_per_word > 1.5
    assert 0 < report["notes"].characters_per_token < 12


NOTE = "Patient with acute pyelonephritis; she took ciprofloxacin and the headache went away. " * 3


@pytest.mark.parametrize("kind", ["llama2", "llama3_1", "smollm2"])
def test_fertility_counts_the_tokens_that_words_have_in_running_text(tmp_path, kind):
    """Against the tokens of the whole text that lie on each word, by the tokenizer's own offsets."""
    codec = tokens.load_codec(tokenizer(kind))
    inputs = folders(tmp_path, literature=[NOTE])
    report = fertility(codec, inputs)["literature"]
    ends = [end for start, end in codec.backend.encode(f"x {NOTE}", add_special_tokens=False).offsets if end > start]
    words = [match.span() for match in re.finditer(r"[^\W\d_]+", f"x {NOTE}")][1:]
    held = [sum(start < end <= stop for end in set(ends)) for start, stop in words]
    assert report.words == len(words)
    assert report.tokens_per_word == pytest.approx(sum(held) / len(words), abs=0.002)
    assert report.share_of_words_whole == pytest.approx(held.count(1) / len(words), abs=0.0001)
    assert report.share_of_words_whole > 0.5  # 0, if each word were counted with the space in front of a text
