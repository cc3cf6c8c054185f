"""A GGUF file as a model folder: unpacked once, checked, sealed in the cache under the hash of the file.

transformers reads the weights and the tokenizer. What it leaves out is added here: rope factors of LLaMA 3.1 (a tensor
of the file, a setting of config.json), and how text is split before it is tokenised. Values are kept as they are
unpacked (`Header.stored_dtype`). Deliberately not here: downloads (fetch.py), reading the header (gguf_header.py).
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmedtune import gguf_header, store, ui, units
from qmedtune.errors import DoesNotFit, QmedtuneError, RecipeError
from qmedtune.gguf_header import Header, refuse
from qmedtune.llama_shape import BYTES_OF
from qmedtune.model_files import JsonObject
from qmedtune.peak import host_memory_bytes

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Raise when the same file would become another folder.
CONVERSION = 1
MODEL = "model"
# LLaMA 3.1 and 3.2 were stretched from 8,192 positions with these (their config.json); only `factor` differs (8, 32).
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Origin:
    """What the model card says of where a file is from."""

    title: str
    source: str
    license: str


def is_gguf(base: str) -> bool:
    """Whether `model.base` names a GGUF file; a folder of that ending is a folder."""
    return base.lower().endswith(gguf_header.SUFFIX) and not Path(os.path.expanduser(base)).is_dir()


def find(base: str) -> Path:
    """The file that `model.base` names."""
    path = Path(os.path.expanduser(base))
    if not path.is_file():
        raise RecipeError(f"model.base: no file {base!r} here\ncheck the path; allowed: a local *.gguf of a LLaMA")
    return path


def digest(sha256: str) -> str:
    """Identity of the base that a file of this hash becomes."""
    return store.sha256_json({"gguf": sha256, "conversion": CONVERSION})


def place(sha256: str) -> Path:
    """The sealed folder of a file of this hash; the model is in `MODEL` below it."""
    return store.cache_root() / "bases" / f"gguf-{digest(sha256)[:16]}"


def ready(sha256: str, *, full: bool = False) -> Path | None:
    """The model folder, where it was made and is as it was sealed."""
    return place(sha256) / MODEL if store.intact(place(sha256), digest(sha256), full=full) else None


def converted(path: Path, sha256: str, origin: Origin | None = None) -> Path:
    """The model folder of the file `path`, whose sha256 is given; made now if it is not in the cache.

    Raises RecipeError for a file that cannot become a LLaMA, DoesNotFit where memory is short, RunError where the disk
    is full. Nothing half-made is left behind under the folder's name.
    """
    folder = place(sha256)
    with store.lock(folder.with_name(f".{folder.name}.making"), wait=True):  # another run may be making it right now
        if found := ready(sha256, full=True):
            return found
        if folder.exists():
            ui.warn(f"{folder} was damaged; it is made again")
            store.discard(folder)
        header = gguf_header.read_header(path)
        _check_room(header, folder)
        building = folder.with_name(f".{folder.name}.building")
        shutil.rmtree(building, ignore_errors=True)  # of a killed attempt
        try:
            _convert(header, building / MODEL, origin or Origin(path.stem, path.name, _license(header)))
            store.seal(building, digest(sha256), {"gguf_sha256": sha256, "types": header.types})
            store.rename(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder / MODEL


def _license(header: Header) -> str:
    return str(header.metadata.get("general.license", "not stated in the file"))


def _check_room(header: Header, folder: Path) -> None:
    """transformers holds the unpacked tensors twice for a moment: as read, and in the model."""
    elements = sum(prod(tensor.shape) for tensor in header.tensors.values())
    needed = elements * BYTES_OF[header.stored_dtype]
    there = host_memory_bytes()
    if 2 * needed > there:
        raise DoesNotFit(
            f"{header.path}: unpacking takes {units.size(2 * needed)} of memory, there are {units.size(there)}\n"
            "convert it on a larger machine and copy the folder, or give the original 16-bit folder"
        )
    store.check_room(folder.parent, needed * 1.05, "the unpacked model")


# ---- conversion ------------------------------------------------------------------------------------------------------


def _convert(header: Header, out: Path, origin: Origin) -> None:
    ui.note(f"{header.path.name} ({header.types}) is unpacked once and kept in {out.parent.parent}")
    try:
        tokenizer = _tokenizer(header)
        _write_weights(header, tokenizer, out)
    except QmedtuneError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        refuse(header.path, f"cannot be read by transformers ({type(error).__name__}: {str(error)[:200]})")
    tokenizer.save_pretrained(str(out))
    store.write_atomic(out / "README.md", card(header, origin))


def _write_weights(header: Header, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with redirect_stderr(StringIO()):  # a second progress bar, which that setting does not reach
        found: Any = AutoModelForCausalLM.from_pretrained(
            str(header.path.parent),
            gguf_file=header.path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=getattr(torch, header.stored_dtype),
            output_loading_info=True,
        )
    model, loaded = found
    if lost := sorted(loaded["missing_keys"]):
        refuse(header.path, f"tensor {lost[0]} was not found by transformers (of {len(lost)})")
    _check(header, model, tokenizer)
    _set_rope(header, model.config)
    model.config.architectures = ["LlamaForCausalLM"]
    for said in ("_name_or_path", "_model_name_or_path"):  # the file's title: no place that a base could lie in
        model.config.__dict__.pop(said, None)
    model.save_pretrained(str(out), max_shard_size="5GB")


def _check(header: Header, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """What transformers made is the LLaMA that the header says, and every value is a number."""
    config = model.config
    if config.model_type != "llama":
        refuse(header.path, f"is read as a {config.model_type!r} model", "allowed: LLaMA-family models")
    expected = config_of(header)
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        if getattr(config, key) != expected[key]:
            refuse(header.path, f"says {key} {getattr(config, key)}, its tensors {expected[key]}")
    if len(tokenizer) > expected["vocab_size"]:
        what = f"the tokenizer has {len(tokenizer)} tokens, the model only {expected['vocab_size']} embeddings"
        refuse(header.path, what, "convert the model again with its embeddings resized to its tokenizer")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            refuse(header.path, f"tensor {name} has values that are no numbers")


def config_of(header: Header) -> JsonObject:
    """The shape in the spelling of config.json, from the header alone."""
    heads = header.number("attention.head_count")
    embedding = header.tensors["token_embd.weight"]
    rope_type = "llama3" if "rope_freqs.weight" in header.tensors else "default"
    return {
        "model_type": "llama",
        "hidden_size": header.number("embedding_length"),
        "num_hidden_layers": header.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.number("attention.head_count_kv", heads),
        "head_dim": header.tensors["blk.0.attn_q.weight"].shape[0] // heads,
        "intermediate_size": header.number("feed_forward_length"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "max_position_embeddings": header.number("context_length"),
        "rope_parameters": {"rope_type": rope_type, "rope_theta": _theta(header)},
        "dtype": header.stored_dtype,
    }


def _theta(header: Header) -> float:
    return float(header.metadata.get("llama.rope.freq_base", 10000.0))


# ---- rotary positions ------------------------------------------------------------------------------------------------


def _set_rope(header: Header, config: PretrainedConfig) -> None:
    """The stretching of positions, which transformers 5.23 does not take over from a GGUF file."""
    settings: JsonObject = {"rope_type": "default", "rope_theta": _theta(header)}
    if header.metadata.get("llama.rope.scaling.type") == "linear":
        settings |= {"rope_type": "linear", "factor": float(header.metadata.get("llama.rope.scaling.factor", 1.0))}
    if tensor := header.tensors.get("rope_freqs.weight"):
        settings |= _llama3(header, tensor, config)
    config.rope_parameters = settings


def _llama3(header: Header, tensor: gguf_header.Tensor, config: PretrainedConfig) -> JsonObject:
    """LLaMA 3.1's setting that gives the file's factors (one per rotated pair, fp32). RecipeError for other factors."""
    import numpy as np

    factors = np.fromfile(header.path, np.float32, tensor.shape[0], offset=tensor.begin)
    if np.allclose(factors, 1.0):
        return {}
    settings = {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3_ROPE}
    if not np.allclose(factors, _factors(config, {**settings, "rope_theta": _theta(header)}), rtol=1e-3):
        refuse(header.path, "stretches its positions by factors that are not LLaMA 3.1's", "give the original folder")
    return settings


def _factors(config: PretrainedConfig, settings: JsonObject) -> np.ndarray:
    """By how much transformers divides each frequency under `settings`."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = config.to_dict() | {"rope_parameters": settings}
    stretched = LlamaConfig.from_dict(plain)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](stretched, device=None)  # pyright: ignore[reportArgumentType]
    width = 2 * len(frequencies)
    positions = 2 * frequencies.new_tensor(range(len(frequencies))) / width
    return (settings["rope_theta"] ** -positions / frequencies).numpy()


# ---- tokenizer -------------------------------------------------------------------------------------------------------


# Special tokens of a tokenizer, by the key of the file that holds their id.
SPECIAL = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}  # fmt: skip


def _tokenizer(header: Header) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of the file, which splits text as llama.cpp and the original tokenizers do, and has the
    file's tokens alone: transformers 5.23 adds an `<|endoftext|>` where a file names no unknown token (LLaMA 3)."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read: Any = AutoTokenizer.from_pretrained(str(header.path.parent), gguf_file=header.path.name)
    said = {key.removeprefix("tokenizer."): value for key, value in header.metadata.items()}
    state = json.loads(read.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < said["ggml.tokens"]]
    backend = Tokenizer.from_str(json.dumps(state))
    if said["ggml.model"] == "llama":
        _split_as_sentencepiece(backend, prefix=said.get("ggml.add_space_prefix", True))
    elif said.get("ggml.pre") in gguf_header.DIGITS_SPLIT:
        _split_digits(backend)
    ids = {name: said.get(f"ggml.{key}") for name, key in SPECIAL.items()}
    special = {name: backend.id_to_token(id) for name, id in ids.items() if id is not None}
    if special.get("eos_token") is None:
        refuse(header.path, "the tokenizer names no end token", "set tokenizer.ggml.eos_token_id in the file")
    special.setdefault("bos_token", special["eos_token"])  # GPT-2's kin begin and end documents with the same token
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = said.get("chat_template")
    return tokenizer


def _split_as_sentencepiece(backend: Tokenizer, *, prefix: bool) -> None:
    """LLaMA-2's way: a space before the text and after every special token. transformers 5.23 puts one before the text
    alone, so that the "[INST]" after "<s>" begins with another token than the model was trained on."""
    from tokenizers import normalizers

    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces] if prefix else [spaces])
    backend.pre_tokenizer = None  # pyright: ignore[reportAttributeAccessIssue]


def _split_digits(backend: Tokenizer) -> None:
    """Each digit by itself, before all else. Without it, transformers takes the two line ends before a number as two
    tokens, where the model met one."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])  # pyright: ignore[reportAttributeAccessIssue]


def card(header: Header, origin: Origin) -> str:
    """The model card: what this folder is and is not."""
    kept = "exactly as they were unpacked" if header.quantised else "as in the file"
    told = (
        f"Its matrices were quantised to {header.types} and are dequantised here: they hold what the quantisation left "
        "of the original weights. Scores are those of the quantised model."
        if header.quantised
        else f"Its matrices are stored as {header.types}."
    )
    return (
        f"# {origin.title}\n\nUnpacked from the GGUF file `{header.path.name}`. {told}\n\n"
        f"- source: {origin.source}\n- licence: {origin.license}\n- values: {header.stored_dtype}, {kept}\n"
    )
