"""What the configuration files of a model folder may say: each setting that is used has a kind and bounds.

transformers takes a configuration as it comes: it makes ten million layers, fills a table of 10^9 labels, loads weights
from a file that `transformers_weights` names, lets `_attn_implementation` overrule its caller. Here a setting is
judged, refused, or not handed on: `judged` gives transformers those that make a LLaMA, and no others. Deliberately not
here: whether the tensors are what the widths say (model_stack.py).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from re import _parser  # type: ignore[attr-defined]  # the tree of a pattern; there is no public way to it
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qmedtune.errors import RecipeError
from qmedtune.model_files import JsonObject, read_json

MOST_LAYERS = 1000  # the deepest LLaMA has 126
# Settings that name code to import. PEFT imports the module `megatron_core` where `megatron_config` is given.
CODE = ("auto_map", "trust_remote_code", "custom_generate", "custom_pipelines", "megatron_config")
ATTENTION = ("attn_implementation", "_attn_implementation")
MOST_PATTERN = 2000  # characters of a pattern over names of modules
MOST_REPEATS = 4  # in one: 60 characters have 500,000 ways to be cut in so many places
SHORT_REPEAT = 4
CHARACTERS = b"precompiled_charsmap"
SHOWN = 40  # characters of a refused value
KINDS_OF_VALUES = ("int", "str", "constrained-int", "constrained-str")  # pydantic puts them into the place of an error

Width = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=-1, lt=2**31)]  # -1: none, as LLaMA 1 was converted
TokenIds = TokenId | Annotated[list[TokenId], Field(max_length=1024)]
Dtype = Literal["float32", "float16", "bfloat16", "torch.float32", "torch.float16", "torch.bfloat16"]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,64}$")]
RopeType = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
Activation = Literal["silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2"]
Factors = Annotated[list[Positive], Field(max_length=4096)]


class CheckedSettings(BaseModel):
    """Base of the models that check a folder's JSON files.

    Strict: '64' is no number. What it does not know it leaves out.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class Rope(CheckedSettings):
    rope_type: RopeType | None = None
    type: RopeType | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Width | None = None
    attention_factor: Positive | None = None
    partial_rotary_factor: Fraction | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    truncate: bool | None = None
    short_factor: Factors | None = None
    long_factor: Factors | None = None


class Quantized(CheckedSettings):
    """Quantisation config of a model folder.

    bitsandbytes' own; other methods are refused by name (model_stack.py).
    """

    quant_method: Word | None = None
    load_in_4bit: bool | None = None
    load_in_8bit: bool | None = None
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None
    bnb_4bit_compute_dtype: Dtype | None = None
    bnb_4bit_quant_storage: Word | None = None
    bnb_4bit_use_double_quant: bool | None = None
    llm_int8_threshold: Annotated[float, Field(ge=0, le=1e6)] | None = None
    llm_int8_skip_modules: Annotated[list[str], Field(max_length=4096)] | None = None
    llm_int8_enable_fp32_cpu_offload: bool | None = None
    llm_int8_has_fp16_weight: bool | None = None


class Llama(CheckedSettings):
    """The settings of config.json that make a LLaMA. All may be absent here: which must not be is llama_shape.py's."""

    model_type: Word | None = None
    architectures: Annotated[list[Word], Field(max_length=16)] | None = None
    vocab_size: Width = 1
    hidden_size: Width = 1
    intermediate_size: Width = 1
    num_hidden_layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)] = 1
    num_attention_heads: Width = 1
    num_key_value_heads: Width | None = None
    head_dim: Width | None = None
    hidden_act: Activation = "silu"
    max_position_embeddings: Width | None = None
    initializer_range: Fraction = 0.02
    rms_norm_eps: Fraction = 1e-6
    use_cache: bool | None = None
    pad_token_id: TokenIds | None = None
    bos_token_id: TokenIds | None = None
    eos_token_id: TokenIds | None = None
    pretraining_tp: Count | None = None
    tie_word_embeddings: bool | None = None
    rope_theta: Positive | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    attention_bias: bool | None = None
    attention_dropout: Fraction | None = None
    mlp_bias: bool | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None
    dtype: Dtype | None = None
    torch_dtype: Dtype | None = None
    num_labels: Annotated[int, Field(ge=0, le=100_000)] | None = None  # a table of names is made of it


class GenerationSettings(CheckedSettings):
    """generation_config.json: answers are greedy here, and only the tokens that frame them are taken from it."""

    pad_token_id: TokenIds | None = None
    bos_token_id: TokenIds | None = None
    eos_token_id: TokenIds | None = None


class TokenObject(CheckedSettings):
    content: str


Token = str | TokenObject


class Tokenizer(CheckedSettings):
    """tokenizer_config.json."""

    bos_token: Token | None = None
    eos_token: Token | None = None
    unk_token: Token | None = None
    sep_token: Token | None = None
    pad_token: Token | None = None
    cls_token: Token | None = None
    mask_token: Token | None = None
    tokenizer_class: Word | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None


# What transformers and PEFT may read of a folder. Files without a kind of their own are searched for code alone.
FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "processor_config.json", "preprocessor_config.json", "adapter_config.json",
)  # fmt: skip
KINDS: Mapping[str, type[CheckedSettings]] = {
    "config.json": Llama,
    "generation_config.json": GenerationSettings,
    "tokenizer_config.json": Tokenizer,
}


def check_all(folder: Path) -> None:
    """Judge every configuration file of a model or adapter folder."""
    for name in FILES:
        if (folder / name).exists():
            read_settings(folder / name)


def read_settings(path: Path) -> JsonObject:
    """A configuration file, judged. RecipeError where it is missing, no object, or says what is refused."""
    said = read_json(path)
    check_settings(path, said)
    return said


def check_settings(path: Path, said: Mapping[str, Any]) -> None:
    """Judge one configuration file by its name. RecipeError names the file, the setting and what is allowed."""
    for key in CODE:
        if _names(said, key):
            what = f"`{key}` asks for remote code, which is never run"
            raise RecipeError(f"{path}: {what}\nuse a LLaMA-family model")
    library = _inside(said.get("auto_mapping"), "parent_library")
    if library and not str(library).startswith("transformers."):  # PEFT writes it where it was given no task
        raise RecipeError(f"{path}: `auto_mapping` asks for the library {str(library)[:SHOWN]!r}\nremove the setting")
    for key in ATTENTION:
        if "/" in str(said.get(key, "")):  # transformers takes it for a Hub repository with code
            raise RecipeError(f"{path}: {key} names code to fetch, which is never run\nremove the setting")
    if said.get("transformers_weights"):
        raise RecipeError(f"{path}: `transformers_weights` names other weights than the folder's\nremove the setting")
    if (kind := KINDS.get(path.name)) is not None:
        _validated(path, kind, said)


def judged(path: Path, said: Mapping[str, Any]) -> JsonObject:
    """The settings of a config.json that are handed to transformers, as they stand there."""
    _validated(path, Llama, said)
    kept = {key: said[key] for key in Llama.model_fields if key in said and key != "num_labels"}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := said.get(key), dict):
            kept[key] = {name: rope[name] for name in Rope.model_fields if name in rope}
    if isinstance(said.get("quantization_config"), dict):
        kept["quantization_config"] = said["quantization_config"]
    return kept


def check_tokenizer_file(path: Path) -> None:
    """RecipeError for a tokenizer.json whose reader would not raise but end the process: a table of characters
    (SentencePiece's) whose stated length is not its own is asked for as memory, however much that is."""
    if CHARACTERS not in path.read_bytes():
        return
    waiting: list[Any] = [read_json(path).get("normalizer")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            waiting += part.values()
            table = part.get(CHARACTERS.decode())
            if table is not None and not _is_table(table):
                raise RecipeError(f"{path}: its table of characters is damaged\nfetch or copy the model folder again")


def _is_table(table: Any) -> bool:
    """Four bytes that say how long the trie is, in bytes; the trie, in units of four; the characters."""
    try:
        raw = base64.b64decode(table, validate=True)
    except (ValueError, TypeError):
        return False
    length = int.from_bytes(raw[:4], "little")
    return len(raw) >= 4 and length % 4 == 0 and length <= len(raw) - 4


def check_pattern(path: Path, pattern: Any) -> None:
    """RecipeError for a regular expression over names of modules that is none, or could take for ever: one that repeats
    anything but single characters, or that has many places to try. PEFT gives it every module's name."""
    if not isinstance(pattern, str) or len(pattern) > MOST_PATTERN:
        raise RecipeError(f"{path}: {str(pattern)[:SHOWN]!r} is no pattern of names\nallowed: a list of names")
    try:
        repeats = list(_repeats(_parser.parse(pattern)))
    except (re.error, RecursionError, OverflowError) as error:
        raise RecipeError(f"{path}: {pattern[:SHOWN]!r} is no pattern ({error})\nallowed: a list of names") from error
    if len(repeats) > MOST_REPEATS or not all(repeats):
        what = f"{pattern[:SHOWN]!r} is a pattern that could take for ever"
        raise RecipeError(f"{path}: {what}\nallowed: a list of names, or a pattern like .*\\.(q_proj|v_proj)")


def _repeats(parsed: Any) -> Iterator[bool]:
    """Of each repetition that is not short: whether single characters alone are repeated."""
    for operation, given in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, inside = given
            if most > SHORT_REPEAT:
                yield len(inside) == 1 and str(inside[0][0]) in ("LITERAL", "NOT_LITERAL", "ANY", "IN")
            yield from _repeats(inside)
        elif name == "SUBPATTERN":
            yield from _repeats(given[-1])
        elif name == "BRANCH":
            for branch in given[1]:
                yield from _repeats(branch)
        elif name in ("ASSERT", "ASSERT_NOT"):
            yield from _repeats(given[1])
        elif name in ("ATOMIC_GROUP", "GROUPREF_EXISTS"):
            yield False


def _validated(path: Path, kind: type[CheckedSettings], said: Mapping[str, Any]) -> None:
    _one(path, kind, said)
    if kind is Llama and isinstance(inside := said.get("quantization_config"), dict):
        _one(path, Quantized, inside)


def _one(path: Path, kind: type[CheckedSettings], said: Mapping[str, Any]) -> None:
    try:
        kind.model_validate(dict(said))
    except ValidationError as error:
        _refuse(path, error)


def _refuse(path: Path, error: ValidationError) -> NoReturn:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"] if str(part).islower() and str(part) not in KINDS_OF_VALUES)
    value = str(first["input"])[:SHOWN]
    what = first["msg"].removeprefix("Input should be ")
    raise RecipeError(f"{path}: {place} is {value!r}\nallowed: {what}") from None


def _inside(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else value


def _names(value: Any, key: str) -> bool:
    """Whether `key` is set anywhere in a configuration: those of parts lie in it (`text_config`)."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if part.get(key):
                return True
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return False
