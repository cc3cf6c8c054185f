"""Options, perplexity and answers against the naive one-by-one computation on a small random LLaMA."""

import copy

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qmedtune.data.packing.conversations import encode_conversations
from qmedtune.data.packing.templates import TEMPLATES
from qmedtune.data.packing.tokens import load_codec
from qmedtune.errors import DataError, RunError
from qmedtune.evaluation import generation, measure, scoring
from qmedtune.modeling import forward

TEXT = [
    "What does bacedax treat? It treats asthma. It causes nausea and dry mouth.",
    "### Instruction: Answer the question about the patient. ### Response: yes no maybe gout migraine psoriasis",
]
PROMPTS = ["What does bacedax treat?", "Question: does it? Answer:", "Q", "What does the patient have? " * 5]
OPTIONS = [
    [" It treats asthma.", " It treats gout.", " It causes nausea and dry mouth.", " yes"],
    [" yes", " no", " maybe"],
    ["a", "bb", "treats it"],
    [" gout", " migraine and gout and psoriasis"],
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    core.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def model(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def naive_logprob(model, tokenizer, prompt: str, option: str, boundary: str) -> float:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    start = [1, *ids(prompt if boundary == "segment" else prompt.rstrip())]
    row = start + ids(option) if boundary == "segment" else start + [1, *ids(prompt + option)][len(start) :]
    with torch.no_grad():
        logprobs = model(torch.tensor([row])).logits.log_softmax(-1)[0]
    return sum(float(logprobs[i - 1, row[i]]) for i in range(len(start), len(row)))


@pytest.mark.parametrize(
    ("batch_tokens", "boundary"), [(1, "segment"), (60, "joint"), (8192, "segment"), (8192, "joint")]
)
def test_options_equal_one_by_one(model, tokenizer, batch_tokens, boundary):
    scores = scoring.choice_logprobs(model, tokenizer, PROMPTS, OPTIONS, batch_tokens=batch_tokens, boundary=boundary)
    for prompt, options, score in zip(PROMPTS, OPTIONS, scores, strict=True):
        expected = [naive_logprob(model, tokenizer, prompt, option, boundary) for option in options]
        assert score.sums == pytest.approx(expected, rel=1e-6, abs=1e-5)
        assert score.per_character == pytest.approx([e / len(o) for e, o in zip(expected, options, strict=True)])
        assert not score.truncated


def test_joint_boundary_moves_the_space_to_the_option(model, tokenizer):
    """A prompt that ends in a space then scores the same tokens as one whose options begin with it."""
    [spaced] = scoring.choice_logprobs(model, tokenizer, ["Answer: "], [["yes", "no"]], boundary="joint")
    [plain] = scoring.choice_logprobs(model, tokenizer, ["Answer:"], [[" yes", " no"]], boundary="joint")
    assert spaced.sums == pytest.approx(plain.sums, abs=1e-6)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_options_are_scored_behind_the_tokens_of_training(tokenizer, tmp_path, name):
    """Prompt and option are token for token what packing makes of the same conversation, special tokens defused."""
    tokenizer.save_pretrained(tmp_path)
    codec, template = load_codec(tmp_path), TEMPLATES[name]
    question = {"role": "user", "content": "What does it treat?</s>", "input": "The patient"}
    record = {"messages": [question, {"role": "assistant", "content": "It treats gout."}]}
    [trained] = encode_conversations(codec, [record], template=template, prompt_weight=0.0, limit=256)
    [prompt] = scoring.prompt_texts(tokenizer, template, [[question]])
    choice = scoring.encode_choice(tokenizer, prompt, ["It treats gout."], 256)
    answer = choice.options[0]
    assert trained.ids[: len(choice.prompt) + len(answer)] == choice.prompt + answer
    assert trained.mask[: len(choice.prompt)] == [0] * len(choice.prompt)


def test_shared_beginnings_are_read_once():
    tree = scoring.option_tree([[5, 6, 7, 9], [5, 6, 8, 9], [4]])
    assert tree.tokens == [5, 6, 7, 8]
    assert tree.depths == [0, 1, 2, 2]
    assert tree.ancestors == [[0], [0, 1], [0, 1, 2], [0, 1, 3]]
    assert tree.edges == [(0, 6, 0), (1, 7, 0), (2, 9, 0), (0, 6, 1), (1, 8, 1), (3, 9, 1)]


def test_one_prompt_pass_for_all_options(model, tokenizer):
    """20 options of 4 or more tokens cost at most two passes and less than twice the tokens of the prompt pass."""
    read = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    options = [f" It treats {word}." for word in ["asthma", "gout", "migraine", "psoriasis"]]
    scoring.choice_logprobs(model, tokenizer, [PROMPTS[3]], [options])
    handle.remove()
    assert len(read) == 2
    assert read[1][1] < read[0][1]


HEADER = "### Instruction: Answer the question about the patient, yes or no or maybe. "


def tokens_read(model, work) -> list[torch.Size]:
    read = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    work()
    handle.remove()
    return read


@pytest.mark.parametrize("batch_tokens", [1, 200, 8192])
def test_a_common_beginning_changes_no_score_and_no_answer(model, tokenizer, batch_tokens):
    prompts = [HEADER + prompt for prompt in PROMPTS] + [HEADER + "What"]  # the last is a beginning of the first
    options = [*OPTIONS, OPTIONS[1]]
    scores = scoring.choice_logprobs(model, tokenizer, prompts, options, batch_tokens=batch_tokens)
    answers = generation.generate(model, tokenizer, prompts, 6, batch_tokens=batch_tokens)
    for prompt, texts, score, answer in zip(prompts, options, scores, answers, strict=True):
        expected = [naive_logprob(model, tokenizer, prompt, option, "segment") for option in texts]
        assert score.sums == pytest.approx(expected, rel=1e-6, abs=2e-5)
        greedy = naive_greedy(model, tokenizer, prompt, 6)
        assert answer.text == tokenizer.decode([t for t in greedy if t != 2]).strip()


@pytest.mark.parametrize("header", ["", HEADER])
def test_passes_of_a_cpu_joined_to_one_batch_change_nothing(model, tokenizer, monkeypatch, header):
    """Long prompts are read one by one, their options and answers together."""
    prompts = [header + prompt for prompt in PROMPTS]
    monkeypatch.setattr(forward, "CPU_PASS_TOKENS", 30)
    read = tokens_read(model, lambda: scoring.choice_logprobs(model, tokenizer, prompts, OPTIONS))
    rows = [shape[0] for shape in read]
    assert rows[-1] == len(prompts) and max(rows[:-1]) < len(prompts) and len(rows) > 3
    scores = scoring.choice_logprobs(model, tokenizer, prompts, OPTIONS)
    answers = generation.generate(model, tokenizer, prompts, 6)
    for prompt, texts, score, answer in zip(prompts, OPTIONS, scores, answers, strict=True):
        expected = [naive_logprob(model, tokenizer, prompt, option, "segment") for option in texts]
        assert score.sums == pytest.approx(expected, rel=1e-6, abs=2e-5)
        greedy = naive_greedy(model, tokenizer, prompt, 6)
        assert answer.text == tokenizer.decode([t for t in greedy if t != 2]).strip()


def test_a_common_beginning_is_read_once(model, tokenizer):
    prompts = [HEADER + prompt for prompt in PROMPTS[:3]]
    shared = forward.common_tokens(scoring.encode(tokenizer, prompts))
    assert shared > forward.MIN_SHARED_TOKENS
    one_token = [["a", "b"]] * 3
    read = tokens_read(model, lambda: scoring.choice_logprobs(model, tokenizer, prompts, one_token))
    longest = max(map(len, scoring.encode(tokenizer, prompts)))
    assert read == [(1, shared), (3, longest - shared)]


def test_the_common_beginning_leaves_every_prompt_a_token():
    assert forward.common_tokens([[1, 2, 3], [1, 2, 3]]) == 2
    assert forward.common_tokens([[1, 2, 3, 4], [1, 2], [1, 2, 9]]) == 1
    assert forward.common_tokens([[1, 2, 3, 4], [1, 2, 4, 4], [1, 2, 3, 5]]) == 2
    assert forward.common_tokens([[7], [1, 2]]) == 0


def test_long_prompts_lose_their_beginning_and_say_so(model, tokenizer):
    prompt = "zz " * 300 + "Answer:"
    [score] = scoring.choice_logprobs(model, tokenizer, [prompt], [[" yes", " no"]])
    assert score.truncated
    choice = scoring.encode_choice(tokenizer, prompt, [" yes"], 256)
    assert choice.prompt[0] == 1 and len(choice.prompt) + len(choice.options[0]) == 256


def test_empty_option_is_an_error(model, tokenizer):
    with pytest.raises(DataError, match="adds no token"):
        scoring.choice_logprobs(model, tokenizer, ["Answer:"], [[" yes", ""]])


def test_a_model_of_nan_is_refused_not_scored_as_always_a(model, tokenizer):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    rows = [packed([[1, 5, 6, 2]])]
    for work in (
        lambda: scoring.choice_logprobs(broken, tokenizer, ["Answer:"], [[" yes", " no"]]),
        lambda: generation.generate(broken, tokenizer, ["Answer:"], 4),
        lambda: scoring.perplexity(broken, rows),
    ):
        with pytest.raises(RunError, match="not numbers"):
            work()


def test_bos_is_added_once(tokenizer):
    assert scoring.encode(tokenizer, ["yes", "<s>yes"])[0] == scoring.encode(tokenizer, ["<s>yes"])[0]


def packed(documents: list[list[int]]) -> dict[str, np.ndarray]:
    labels = [[-100, *document[1:]] for document in documents]
    positions = [range(len(document)) for document in documents]
    return {
        "input_ids": np.array(sum(documents, []), dtype=np.int64),
        "labels": np.array(sum(labels, []), dtype=np.int64),
        "position_ids": np.array([p for row in positions for p in row], dtype=np.int64),
    }


def test_perplexity_isolates_documents_and_weighs_tokens(model):
    generator = np.random.default_rng(0)
    documents = [[1, *generator.integers(3, 300, size).tolist(), 2] for size in (30, 7, 18, 3)]
    nll, tokens = 0.0, 0
    for document in documents:
        with torch.no_grad():
            logprobs = model(torch.tensor([document])).logits.log_softmax(-1)[0]
        nll -= sum(float(logprobs[i - 1, document[i]]) for i in range(1, len(document)))
        tokens += len(document) - 1
    rows = [packed(documents[:2]), packed(documents[2:])]
    for batch_tokens in (1, 1000):
        found = scoring.perplexity(model, rows, batch_tokens=batch_tokens)
        assert found.tokens == tokens
        assert found.nll == pytest.approx(nll, abs=1e-3)
        assert found.perplexity == pytest.approx(np.exp(nll / tokens), rel=1e-5)


def test_perplexity_of_nothing_is_an_error(model):
    with pytest.raises(DataError, match="no token to predict"):
        scoring.perplexity(model, [])


def naive_greedy(model, tokenizer, prompt: str, count: int) -> list[int]:
    row = [1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    new = []
    for _ in range(count):
        with torch.no_grad():
            new.append(int(model(torch.tensor([row + new])).logits[0, -1].argmax()))
        if new[-1] == 2:
            break
    return new


@pytest.mark.parametrize("batch_tokens", [1, 8192])
def test_batched_answers_equal_one_by_one(model, tokenizer, batch_tokens):
    answers = generation.generate(model, tokenizer, PROMPTS, 12, batch_tokens=batch_tokens)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = naive_greedy(model, tokenizer, prompt, 12)
        assert answer.tokens == len(expected)
        assert answer.text == tokenizer.decode([t for t in expected if t != 2]).strip()
        assert answer.ended == ("eos" if expected[-1] == 2 else "length")


def test_stop_strings_and_end_tokens_end_an_answer(model, tokenizer):
    [free] = generation.generate(model, tokenizer, PROMPTS[:1], 12)
    middle = free.text[len(free.text) // 2 :][:3]
    first = free.text.index(middle)
    [stopped] = generation.generate(model, tokenizer, PROMPTS[:1], 12, stop=[middle])
    assert stopped.ended == "stop" and stopped.text == free.text[:first].strip() and stopped.tokens < free.tokens

    second = naive_greedy(model, tokenizer, PROMPTS[0], 2)[1]
    model.generation_config.eos_token_id = [2, second]
    try:
        [ended] = generation.generate(model, tokenizer, PROMPTS[:1], 12)
    finally:
        model.generation_config.eos_token_id = 2
    assert (ended.ended, ended.tokens) == ("eos", 2)


def test_ended_rows_leave_the_others_unchanged(model, tokenizer):
    """One answer of the batch ends early; the rest must be what they are alone."""
    second = naive_greedy(model, tokenizer, PROMPTS[1], 2)[1]
    model.generation_config.eos_token_id = [second]
    try:
        together = generation.generate(model, tokenizer, PROMPTS, 12)
        alone = [generation.generate(model, tokenizer, [prompt], 12)[0] for prompt in PROMPTS]
    finally:
        model.generation_config.eos_token_id = 2
    assert together == alone
    assert {answer.tokens for answer in together} != {12}


@pytest.mark.parametrize("stop", [(), ("e",), ("qz",)])
def test_streamed_pieces_add_up_to_the_answer(model, tokenizer, stop):
    for prompt in PROMPTS:
        [answer] = generation.generate(model, tokenizer, [prompt], 12, stop=stop)
        assert "".join(generation.stream(model, tokenizer, prompt, 12, stop=stop)) == answer.text


def test_what_may_become_a_stop_string_is_held_back():
    assert generation.settled("Yes.\n\n##", ("###",)) == "Yes."
    assert generation.settled("Yes.\n\n##", ()) == "Yes.\n\n##"
    assert generation.settled("caf\ufffd", ()) == "caf"


# ---- 16 bit and ties -------------------------------------------------------------------------------------------------


def test_options_of_a_16_bit_model_are_told_apart_in_fp32(model):
    """The body works in bfloat16, the head's products do not: logits around 20 are off by 1e-4, not by 1/16."""
    small = copy.deepcopy(model).to(torch.bfloat16)
    hidden = 12 * torch.randn(40, model.config.hidden_size).to(torch.bfloat16)
    exact = hidden.double() @ small.lm_head.weight.double().T
    assert float(exact.abs().max()) > 16
    torch.testing.assert_close(forward.exact_logits(small, hidden).double(), exact, rtol=1e-5, atol=1e-4)
    assert float((forward.next_logits(small, hidden).double() - exact).abs().max()) > 0.03
    assert forward.compute_dtype(small) == torch.bfloat16


def test_the_head_in_slices_is_the_head(monkeypatch, model):
    hidden = torch.randn(5, model.config.hidden_size)
    whole = forward.exact_logits(model, hidden)
    monkeypatch.setattr(forward, "HEAD_ELEMENTS", 7 * model.config.hidden_size)
    torch.testing.assert_close(forward.exact_logits(model, hidden), whole)
    torch.testing.assert_close(whole, hidden @ model.lm_head.weight.T)


def test_equal_options_are_drawn_without_favour_and_alike_for_every_model():
    drawn = [measure.best_option([-2.0, -1.0, -1.0, -1.0], f"item {n}") for n in range(900)]
    shares = np.bincount(drawn, minlength=4) / 900
    assert shares[0] == 0 and abs(shares[1:] - 1 / 3).max() < 0.06  # 4 standard errors
    assert drawn == [measure.best_option([-7.0, -4.0, -4.0, -4.0], f"item {n}") for n in range(900)]
    assert measure.best_option([-3.0, -1.0, -2.0], "x") == 1
    assert measure.gap([-3.0, -1.0, -1.5]) == 0.5
