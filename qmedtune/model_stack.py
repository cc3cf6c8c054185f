"""The one reader and judge of model folders and adapter folders: configuration and headers, never a weight's values.

`plan`, `run`, `merge`, `predict`, `chat` and `eval` all ask here first, so that what one of them refuses the others do
not load. A folder passes when transformers and PEFT would read from it what its configuration says, each tensor once
and in a floating-point type: they themselves fill what is missing with random numbers and skip what they do not know.
Deliberately not here: links and code in folders (model_files.py), which base an adapter was trained on (base.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from safetensors import SafetensorError, safe_open

from qmedtune.adapter_settings import read_lora
from qmedtune.errors import RecipeError
from qmedtune.llama_shape import BaseFacts, facts_from_config
from qmedtune.model_files import as_object, check_folder, read_json, refuse
from qmedtune.model_settings import check_all, read_settings

if TYPE_CHECKING:
    from peft import LoraConfig


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ENDS = (EMBEDDING, HEAD)
FLOATS = ("F32", "F16", "BF16")
# Buffers of old checkpoints that transformers computes itself and skips.
SPARE = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
MOST_PATH = 4096  # characters of a path on Linux
FITS = "use it with the base that it was trained on"


@dataclass(frozen=True)
class ModelStack:
    """A model as it lies on the disk: a base, the adapters that are applied to it in this order, and the folder with
    template.json that it was trained to speak with, if there is one."""

    base: Path
    adapters: tuple[Path, ...] = ()
    template: Path | None = None


@dataclass(frozen=True)
class Stored:
    """One tensor as a file's header describes it. `dtype` in safetensors' spelling."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFolder:
    """A judged LLaMA. `shapes`: every parameter by name; `linears`: names of its linear layers, the head among them."""

    folder: Path
    config: Mapping[str, Any]
    stored: Mapping[str, Stored]
    shapes: Mapping[str, tuple[int, ...]]
    quantised: bool
    notes: Sequence[str]

    @property
    def linears(self) -> list[str]:
        return linears_of(self.shapes)


@dataclass(frozen=True)
class LowRankFacts:
    """W += scale * B @ A, with A [rank, in] and B [out, rank]."""

    rank: int
    scale: float


@dataclass(frozen=True)
class AdapterFolder:
    """A judged adapter. `low_rank`: by module of the base; `full`: parameters that it replaces by a trained copy;
    `copies`: parameters of which it holds the base's own values, and the tensor's name (PEFT stores embeddings so where
    the head has a low-rank update or the vocabulary was resized)."""

    folder: Path
    config: LoraConfig
    low_rank: Mapping[str, LowRankFacts]
    full: Sequence[str]
    copies: Mapping[str, str]


def headers(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file. RecipeError where there is no file, or a damaged one."""
    if not path.is_file():  # a folder or a pipe of that name is none
        refuse(path, "no such file", "it is missing from its folder; fetch or copy that again")
    try:
        opened: Any = safe_open(path, framework="numpy")
        with opened as file:
            found: dict[str, Stored] = {}
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                found[name] = Stored(path.name, part.get_dtype(), tuple(part.get_shape()))
            return found
    except (SafetensorError, OSError) as error:
        raise RecipeError(
            f"{path}: a damaged safetensors file ({error})\n"
            "it is truncated or its header was changed; fetch or copy it again (a Git LFS pointer: git lfs pull)"
        ) from error


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """What transformers reads of a model folder: one file, else the shards that an index names. Of shards the tensors
    that are in them count; where the index leads for each of them transformers does not ask.

    Raises RecipeError where files are missing or damaged, or the index is wrong.
    """
    single, index = folder / SINGLE, folder / INDEX
    if not single.is_file() and index.is_file():
        return _shards(folder, index)
    if not single.exists() and (others := sorted(path.name for path in folder.glob("*.safetensors"))):
        refuse(folder, f"has {others[0]}, but neither {SINGLE} nor {INDEX}", "fetch the model again, with its index")
    return headers(single)


def _stored_twice(folder: Path) -> list[str]:
    """What to say of a folder that could be read in two ways."""
    if not (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return []
    return [f"{folder}: has {SINGLE} and {INDEX}; transformers reads the first, and so does this"]


def _shards(folder: Path, index: Path) -> dict[str, Stored]:
    weight_map = as_object(read_json(index).get("weight_map"))
    if not weight_map:
        refuse(index, "not an index of shards (no readable `weight_map`)")
    named: dict[str, str] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            refuse(index, f"names the shard {file!r} outside its folder", "use a model folder without that")
        named[name] = file
    found: dict[str, Stored] = {}
    for file in sorted(set(named.values())):
        inside = headers(folder / file)
        if twice := sorted(inside.keys() & found.keys()):
            refuse(folder, f"tensor {twice[0]} is in {found[twice[0]].file} and in {file}")
        found |= inside
    if lost := sorted(named.keys() - found.keys()):
        refuse(folder / named[lost[0]], f"tensor {lost[0]} is missing, though {INDEX} names it")
    return found


def read_model(folder: Path) -> ModelFolder:
    """Read and judge a model folder. RecipeError for what is no whole LLaMA."""
    if (folder / ADAPTER_CONFIG).is_file():  # transformers would go on with the base that this file names
        refuse(folder, "holds an adapter, not a model", f"merge it: qmedtune merge {folder}")
    check_folder(folder)
    check_all(folder)
    config = read_settings(folder / "config.json")
    shapes = parameters(facts_from_config(str(folder), config, "config.json"), config)
    stored = stored_tensors(folder)
    quantised = _is_quantised(folder, config)
    model = ModelFolder(folder, config, stored, shapes, quantised, _stored_twice(folder))
    if quantised:
        _check_packed(model)
    else:
        _check_tensors(model)
    return model


def _is_quantised(folder: Path, config: Mapping[str, Any]) -> bool:
    if config.get("quantization_config") is None:
        return False
    stored = as_object(config["quantization_config"]) or {}
    method = stored.get("quant_method")
    if method != "bitsandbytes":
        what = f"its weights are quantised by {method or 'an unknown method'}"
        refuse(folder, what, "allowed: bitsandbytes, or better the 16-bit original (training quantises it itself)")
    return True


def parameters(facts: BaseFacts, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of a LLaMA and its shape, in the names of LlamaForCausalLM; the head also where it is tied."""
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (facts.vocab, facts.hidden)}
    biased = {"self_attn": bool(config.get("attention_bias")), "mlp": bool(config.get("mlp_bias"))}
    for layer in range(facts.layers):
        place = f"model.layers.{layer}"
        for name, (inputs, outputs) in facts.linear_shapes.items():
            block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            found[f"{place}.{block}.{name}.weight"] = (outputs, inputs)
            if biased[block]:
                found[f"{place}.{block}.{name}.bias"] = (outputs,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{place}.{norm}.weight"] = (facts.hidden,)
    return {**found, "model.norm.weight": (facts.hidden,), HEAD: (facts.vocab, facts.hidden)}


def linears_of(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of the linear layers, among them the head: what has two dimensions and is no embedding."""
    return [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2 and name != EMBEDDING]


def _check_tensors(model: ModelFolder) -> None:
    _check_complete(model)
    for name, tensor in model.stored.items():
        if SPARE.fullmatch(name):
            continue
        if name not in model.shapes:
            _refuse_foreign(model, name)
        _check_one(model, name, tensor)


def _refuse_foreign(model: ModelFolder, name: str) -> NoReturn:
    refuse(model.folder, f"tensor {name[:80]!r} is none of a LLaMA's", "give the folder of a LLaMA causal model")


def _check_one(model: ModelFolder, name: str, tensor: Stored) -> None:
    """In the shape that config.json asks for, in a floating-point type."""
    place, expected = model.folder / tensor.file, model.shapes[name]
    if tensor.shape != expected:
        what = f"{name} has the shape {list(tensor.shape)}, config.json asks for {list(expected)}"
        refuse(place, what, "fetch the model again")
    if tensor.dtype not in FLOATS:
        what = f"{name} is stored as {tensor.dtype}"
        refuse(place, what, "allowed: F32, F16, BF16; convert the model, or fetch its 16-bit original")


# What bitsandbytes stores beside a packed tensor, and whose name that begins with.
BESIDE = re.compile(r"(?P<owner>.+\.weight)\.(absmax|quant_map|nested_\w+|quant_state\.bitsandbytes__\w+)")
BESIDE_8_BIT = re.compile(r"(?P<owner>.+)\.(SCB|weight_format)")


def _check_packed(model: ModelFolder) -> None:
    """A file of bitsandbytes holds packed bytes and, under names of their own, what unpacks them."""
    packed: set[str] = set()
    for name in model.stored:
        if beside := BESIDE.fullmatch(name):
            packed.add(beside["owner"])
        elif beside := BESIDE_8_BIT.fullmatch(name):
            packed.add(f"{beside['owner']}.weight")
    if not packed:
        what = "config.json says that bitsandbytes has quantised it, and no tensor is"
        refuse(model.folder, what, "fetch the folder again, or remove `quantization_config`")
    known = model.shapes.keys()
    for name in model.stored:
        belongs = name in known or BESIDE.fullmatch(name) or BESIDE_8_BIT.fullmatch(name) or SPARE.fullmatch(name)
        if not belongs:
            _refuse_foreign(model, name)
    if foreign := sorted(packed - known):
        _refuse_foreign(model, foreign[0])
    _check_complete(model)
    for name, tensor in model.stored.items():
        if name in known and name not in packed:
            _check_one(model, name, tensor)


def _check_complete(model: ModelFolder) -> None:
    """All parameters are there; of tied ends one is enough, under either name."""
    other_end: dict[str, str] = {}
    if model.config.get("tie_word_embeddings", False):
        other_end = {EMBEDDING: HEAD, HEAD: EMBEDDING}
    lost: list[str] = []
    for name in model.shapes:
        if name not in model.stored and other_end.get(name) not in model.stored:
            lost.append(name)
    if lost:
        refuse(model.folder, f"tensor {lost[0]} is missing (of {len(lost)})", "fetch the model again")


def named_base(folder: Path) -> str:
    """The base that an adapter names. RecipeError where it names none."""
    named = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named or len(named) > MOST_PATH or not named.isprintable():
        refuse(folder, "does not say which base it was trained on", "give it: --base FOLDER_OR_HUB_ID")
    return named


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> AdapterFolder:
    """Read and judge an adapter for a base with these parameters.

    Raises RecipeError naming the file, setting, tensor or module that does not fit.
    """

    if not (folder / ADAPTER_CONFIG).is_file() and (folder / "config.json").is_file():
        refuse(folder, "holds a whole model, not an adapter", "give the folder with adapter_config.json")
    if not (folder / ADAPTER_CONFIG).is_file() and not any(folder.glob("adapter_model.*")):
        refuse(folder, "holds no adapter", "give the folder with adapter_config.json")
    check_folder(folder)
    check_all(folder)
    config = read_lora(folder / ADAPTER_CONFIG)
    reading = _Reading(folder, config, headers(folder / ADAPTER_TENSORS), shapes)
    low_rank: dict[str, LowRankFacts] = {}
    for module in reading.targeted():
        low_rank[module] = reading.low_rank(module)
    copies = reading.copies(low_rank)
    full = reading.full(low_rank, copies)
    for module in sorted(low_rank):
        if f"{module}.weight" in full:
            refuse(folder, f"{module}.weight has a low-rank update and a full copy", "train it with one of them")
    return AdapterFolder(folder, config, low_rank, full, copies)


@dataclass(frozen=True)
class _Reading:
    """An adapter's configuration and headers against the parameters of a base."""

    folder: Path
    config: LoraConfig
    stored: Mapping[str, Stored]
    shapes: Mapping[str, tuple[int, ...]]

    def targeted(self) -> list[str]:
        """The linear layers that the configuration targets; each of its targets must be one of them."""
        from peft.tuners.tuners_utils import (
            check_target_module_exists as is_target,  # pyright: ignore[reportUnknownVariableType] - not annotated
        )

        targets, linears = self.config.target_modules, linears_of(self.shapes)
        found: list[str] = []
        for module in linears:
            if targets and is_target(self.config, module):
                found.append(module)
        if isinstance(targets, set):
            for target in sorted(targets):
                if not any(f".{module}".endswith(f".{target}") for module in linears):
                    refuse(self.folder, f"its target {target} is no linear layer of the base", FITS)
        if not found and not self.config.modules_to_save:
            refuse(self.folder, f"its target_modules ({targets}) hit no module of the base", FITS)
        return found

    def low_rank(self, module: str) -> LowRankFacts:
        from peft.utils.other import get_pattern_key

        # PEFT says `dict` alone; adapter_settings.py has seen that they are numbers by module.
        ranks = cast(dict[str, int], self.config.rank_pattern or {})  # pyright: ignore[reportUnknownMemberType]
        alphas = cast(dict[str, float], self.config.alpha_pattern or {})  # pyright: ignore[reportUnknownMemberType]
        rank = ranks.get(get_pattern_key(list(ranks), module), self.config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), module), self.config.lora_alpha)
        rows, columns = self.shapes[f"{module}.weight"]
        self.check(f"{module}.lora_A.weight", (rank, columns))
        self.check(f"{module}.lora_B.weight", (rows, rank))
        return LowRankFacts(rank, alpha / (math.sqrt(rank) if self.config.use_rslora else rank))

    def copies(self, low_rank: Mapping[str, LowRankFacts]) -> dict[str, str]:
        """Embeddings that are stored and were not trained; with a low-rank update they lie one level deeper."""
        found: dict[str, str] = {}
        for name in ENDS:
            module = name.removesuffix(".weight")
            stored = f"{module}.base_layer.weight" if module in low_rank else name
            trained = any(self.listed(name)) or bool(self.config.ensure_weight_tying)
            if PREFIX + stored in self.stored and (module in low_rank or not trained):
                self.check(stored, self.shapes[name])
                found[name] = PREFIX + stored
        return found

    def doubles(self) -> set[str]:
        """The insides of PEFT's wrapper around trained embeddings, which it stores once more where the vocabulary was
        resized, and does not read."""
        found: set[str] = set()
        for name in ENDS:
            if not any(self.listed(name)):
                continue
            for part in ("original_module", "modules_to_save"):
                double = name.replace(".weight", f".{part}.weight")
                if PREFIX + double in self.stored:
                    self.check(double, self.shapes[name])
                    found.add(PREFIX + double)
        return found

    def full(self, low_rank: Mapping[str, LowRankFacts], copies: Mapping[str, str]) -> list[str]:
        """Parameters with a trained copy: each tensor that is left must be one, each listed module must have its own.

        A head tied to a trained embedding goes unlisted.
        """
        left = self.stored.keys() - set(copies.values()) - self.doubles()
        for module in low_rank:
            left -= {f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"}
        names: list[str] = []
        for stored in sorted(left):
            name = stored.removeprefix(PREFIX)
            if name not in self.shapes or not (name in ENDS or any(self.listed(name))):
                refuse(self.folder, f"tensor {PREFIX + name[:80]!r} belongs to no module of the base", FITS)
            self.check(name, self.shapes[name])
            names.append(name)
        either = bool(self.config.ensure_weight_tying) and bool(set(ENDS) & set(names))
        for name in self.shapes:
            if any(self.listed(name)) and name not in names and not (either and name in ENDS):
                refuse(self.folder, f"the trained copy of {name} is missing", "the adapter is incomplete")
        for module in self.config.modules_to_save or ():
            if not any(module in self.listed(name) for name in self.shapes):
                refuse(self.folder, f"modules_to_save: the base has no module {module}", FITS)
        return names

    def listed(self, name: str) -> list[str]:
        """The entries of `modules_to_save` that mean the module of this parameter, or one around it. PEFT compares the
        ends of names: `norm` is also every `input_layernorm`."""
        parts = name.split(".")[:-1]
        places = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        meant: list[str] = []
        for module in self.config.modules_to_save or ():
            if any(place.endswith(module) for place in places):
                meant.append(module)
        return meant

    def check(self, name: str, expected: tuple[int, ...]) -> None:
        """The tensor is there, in this shape, in a floating-point type."""
        tensor = self.stored.get(PREFIX + name)
        if tensor is None:
            remedy = "the adapter is incomplete; train or fetch it again"
            refuse(self.folder, f"tensor {PREFIX}{name} is missing", remedy)
        if tensor.dtype not in FLOATS:
            refuse(self.folder, f"{PREFIX}{name} is stored as {tensor.dtype}", "allowed: F32, F16, BF16")
        if tensor.shape != expected:
            self.refuse_shape(name, tensor.shape, expected)

    def refuse_shape(self, name: str, given: tuple[int, ...], expected: tuple[int, ...]) -> NoReturn:
        counts_tokens = name.startswith(("model.embed_tokens.", "lm_head.")) and not name.endswith("lora_A.weight")
        if counts_tokens and len(given) == 2 and given[1] == expected[1] and given[0] > expected[0]:
            what = f"{given[0] - expected[0]} tokens were added in training: {name} has {given[0]} rows, the base "
            then = "give the base that was resized to that with --base (transformers: resize_token_embeddings)"
            refuse(self.folder, f"{what}{expected[0]}", then)
        refuse(self.folder, f"{PREFIX}{name} has the shape {list(given)}, the base asks for {list(expected)}", FITS)
