"""Bases, tokenizers and adapters: the only file that knows how bitsandbytes and peft are used.

On a GPU the linears stay bitsandbytes' NF4. On the CPU each becomes a plain linear holding the exact dequantised NF4
values: bitsandbytes 0.50 repacks its CPU linears at the first eval-mode forward and then trains on wrong gradients
(cosine .33 to the right ones), and is about 3x slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qmedtune.errors import RecipeError
from qmedtune.llama_shape import facts_from_config
from qmedtune.model_settings import check_tokenizer_file, judged, read_settings
from qmedtune.model_stack import ModelStack, parameters, read_adapter, read_model
from qmedtune.recipe import AdapterSection, ModelSection
from qmedtune.results import Attention, Kernels

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDINGS = ("embed_tokens", "lm_head")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def device() -> torch.device:
    """The one device of this run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with a pad token. Padding never enters a loss (labels say what is trained), so the choice of pad
    token cannot mask an end token even where a tokenizer has only its eos to offer."""
    tokenizer = open_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"{folder}: the tokenizer names no eos token\nset it in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        spare = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|reserved_special_token_0|>", "<unk>")
        tokenizer.pad_token = next((t for t in spare if t in vocabulary), tokenizer.eos_token)
    tokenizer.padding_side = "right"
    return tokenizer


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder as transformers reads it.

    RecipeError for what the library raises of a hostile file: of any kind, and a panic is not even an Exception.
    """
    from transformers import AutoTokenizer

    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        read_settings(settings)
    if (folder / "tokenizer.json").is_file():
        check_tokenizer_file(folder / "tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        what = f"tokenizer.json or its settings cannot be read ({type(error).__name__})"
        raise RecipeError(f"{folder}: {what}\nfetch or copy the model folder again") from error


def llama_config(folder: Path) -> LlamaConfig:
    """config.json as transformers' configuration: the settings that are judged, and no others (model_settings.py)."""
    from transformers import LlamaConfig

    path = folder / "config.json"
    said = judged(path, read_settings(path))
    try:
        return LlamaConfig.from_dict(said)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecipeError(f"{path}: transformers cannot use it ({error!s:.160})\nfetch the model again") from error


def check_finite(model: nn.Module, folder: Path, part: str = "") -> None:
    """RecipeError where a weight is no number: of a damaged file, or of a training that diverged."""
    for name, parameter in model.named_parameters():
        if part in name and parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise RecipeError(f"{folder}: {name} has values that are no numbers\ntake an earlier checkpoint of it")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: Any, folder: Path) -> None:
    """A tokenizer that yields ids beyond the embedding belongs to another model."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise RecipeError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {rows} embeddings\n"
            "use the tokenizer that came with the base"
        )


def _quantization(section: ModelSection, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=section.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def attention_facts(model: Any) -> Attention:
    """Which attention a model trains with and why, for the report."""
    name = str(model.config._attn_implementation)
    why = {
        "varlen": "kernels for variable lengths keep documents apart, without a mask",
        "flash_attention_2": "as stated; documents are kept apart by their lengths",
        "flex_attention": "as stated; a block mask keeps documents apart",
        "sdpa": "a mask keeps documents apart",
        "eager": "plain products and a mask: rows are short, or it was stated",
    }[name]
    if name == "sdpa" and device().type == "cuda":
        why += "; the kernels for variable lengths need compute capability 8.0 and 16 bit, or sdpa was stated"
    return Attention(name=name, why=why)


def fallbacks(kernels: Kernels | None, attention: Attention) -> list[str]:
    """What a stage did on a GPU in a slower way than the GPU could, and was not asked to: for the report."""
    if device().type == "cpu" or kernels is None:
        return []
    told: list[str] = []
    for path in sorted(set(kernels.paths.values())):
        if path.startswith("reference") and not path.endswith("asked for"):
            told.append(f"kernels: {path}")
    if attention.name == "sdpa":
        told.append(f"attention: sdpa ({attention.why})")
    return told


SCORING_ATTENTION = "sdpa"  # scoring and generation bring masks and caches


def load_base(
    folder: Path,
    section: ModelSection,
    *,
    quantize: bool | None = None,
    attention: str = SCORING_ATTENTION,
    place: torch.device | None = None,
) -> PreTrainedModel:
    """Load a base for training or scoring, on this machine's device, or on `place` until it is sharded.

    `section.compute_dtype` must be resolved (not `auto`). `quantize` overrides `section.quantization`: False gives the
    16-bit (or fp32) weights themselves. `attention`: transformers' name, for training what planning/numerics.py says.
    Raises RecipeError for folders that read_model refuses.
    """
    from transformers import AutoModelForCausalLM

    import qmedtune.modeling.attention  # noqa: F401 - registers `varlen` with transformers

    stored = read_model(folder).quantised
    dtype = DTYPES[section.compute_dtype]
    four_bit = section.quantization == "nf4" if quantize is None else quantize
    # Given as None, transformers 5.23 would not read the configuration that a quantised checkpoint brings.
    quantize_now: Any = {"quantization_config": _quantization(section, dtype)} if four_bit and not stored else {}
    found: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=llama_config(folder),
        dtype=dtype,
        **quantize_now,
        device_map={"": place or device()},
        attn_implementation=attention,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, loaded = found
    if lost := sorted(loaded["missing_keys"]):  # transformers has filled them with random numbers
        raise RecipeError(f"{folder}: tensor {lost[0]} is missing (of {len(lost)})\nfetch the model again")
    model.config.use_cache = False
    if device().type == "cpu" and (four_bit or stored):
        dequantize_linears(model, dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    check_finite(model, folder)
    return model


def load_stack(
    stack: ModelStack, section: ModelSection, *, quantize: bool | None = None, computed_in: str | None = None
) -> Any:
    """A base with its adapters and our kernels in eval mode, all frozen: what is scored, asked and audited.

    Weights are held in `section.compute_dtype`, or in NF4 as `load_base` decides, and multiplied in `computed_in`
    (default: the same), for machines that have no instructions for what the weights are stored in. Raises RecipeError
    for folders that read_model and read_adapter refuse.
    """
    model: Any = load_base(stack.base, section, quantize=quantize)
    if computed_in is not None and computed_in != section.compute_dtype:
        cast_weights(model, DTYPES[computed_in])
    if stack.adapters:
        model = load_adapters(model, stack.adapters)
    install_kernels(model, section.kernels)
    return model.eval()


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters alone: rotary frequencies are buffers, and stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def load_full(folder: Path, section: ModelSection, *, attention: str = SCORING_ATTENTION) -> PreTrainedModel:
    """The folder's weights as fp32 master weights, everything trainable: for stages without an adapter."""
    if read_model(folder).quantised:
        raise RecipeError(
            f"{folder}: quantised weights cannot be trained themselves\ngive its 16-bit original, or LoRA"
        )
    fp32 = section.model_copy(update={"compute_dtype": "float32"})
    model = load_base(folder, fp32, quantize=False, attention=attention)
    return model.requires_grad_(True)


# ShapeSection's names in config.json.
CONFIG_KEYS = {
    "hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "intermediate": "intermediate_size", "max_positions": "max_position_embeddings",
}  # fmt: skip


def from_scratch(folder: Path, section: ModelSection, *, attention: str = SCORING_ATTENTION) -> PreTrainedModel:
    """A randomly initialised model of the folder's config.json, with the recipe's own widths where it gives them; fp32
    master weights, everything trainable."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    import qmedtune.modeling.attention  # noqa: F401 - registers `varlen` with transformers

    config = llama_config(folder)
    if (shape := section.shape) is not None:
        given = {**shape.model_dump(exclude_none=True), "kv_heads": shape.kv_heads or shape.heads}
        widths = {CONFIG_KEYS[name]: value for name, value in given.items()}
        written = {name: value for name, value in config.to_dict().items() if name != "head_dim"}
        config = LlamaConfig.from_dict({**written, **widths})
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    return model.to(device())


def install_kernels(model: PeftModel, mode: str, place: torch.device | None = None) -> Kernels:
    """Let qmedtune's own operations run the linears, LoRA and norms; says which path each takes and why."""
    from qmedtune.modeling import fused

    return fused.install(model, mode, place)


def recheck_kernels(model: PeftModel, kernels: Kernels) -> Kernels:
    """What `install_kernels` told, of a model that has been sharded since."""
    from qmedtune.modeling import fused

    return fused.recheck(model, kernels)


def dequantize_linears(model: Any, dtype: torch.dtype) -> int:
    """Replace every bitsandbytes NF4 linear by a plain one with the same values in `dtype`; returns how many."""
    from bitsandbytes.nn import Linear4bit
    from qmedtune_kernels import nf4

    from qmedtune.modeling.fused import nf4_weight

    found: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if isinstance(m, Linear4bit)]
    for name, module in found:
        # Not bitsandbytes' own: its CPU dequantise takes wrong scales where a width is no multiple of the block size.
        values = nf4.dequantize(nf4_weight(module), dtype, path="reference")
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        plain.weight = nn.Parameter(values.contiguous(), requires_grad=False)
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.data.to(dtype), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    if found:
        # The trainers must not take this for a quantised model: its linears are ordinary ones now.
        for flag in ("is_loaded_in_4bit", "is_quantized"):
            setattr(model, flag, False)
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return len(found)


def lora_config(section: AdapterSection, *, embeddings: bool) -> Any:
    """PEFT's configuration of one adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType]  (PEFT divides by it; floats are fine)
        lora_dropout=section.dropout,
        use_rslora=section.rslora,
        target_modules=section.targets if isinstance(section.targets, str) else list(section.targets),
        modules_to_save=list(EMBEDDINGS) if embeddings else None,
        task_type="CAUSAL_LM",
    )


def attach_adapter(
    model: PreTrainedModel, section: AdapterSection, earlier: Sequence[Path], *, continued: bool
) -> PeftModel:
    """The base with its adapters, the last of them trainable (all are frozen by load_adapters alone).

    `earlier` are the folders of the stages before, in order. `continued`: train the last of them on; otherwise a new
    adapter is put on top and the earlier ones are frozen. Trainable weights are fp32 whatever the compute dtype.
    """
    from peft import get_peft_model

    if continued and earlier:
        peft_model = load_adapters(model, earlier)
    elif earlier:
        peft_model = load_adapters(model, earlier)
        peft_model.add_adapter(adapter_name(len(earlier) + 1), lora_config(section, embeddings=False))
    else:
        config = lora_config(section, embeddings=section.train_embeddings is True)
        peft_model = get_peft_model(model, config, adapter_name=adapter_name(1))
    activate(peft_model)
    return peft_model


def adapter_name(number: int) -> str:
    return f"stage{number}"


def load_adapters(model: PreTrainedModel, folders: Sequence[Path]) -> PeftModel:
    """The base with the adapters of `folders` applied in order, all frozen."""
    from peft import PeftModel

    config = model.config.to_dict()
    shapes = parameters(facts_from_config("the base", config, "config"), config)
    for folder in folders:
        read_adapter(folder, shapes)  # PEFT would leave out what is missing, and take a pickle for safetensors
    first, *rest = folders
    peft_model: Any = PeftModel.from_pretrained(model, str(first), adapter_name=adapter_name(1))
    for number, folder in enumerate(rest, start=2):
        peft_model.load_adapter(str(folder), adapter_name=adapter_name(number))
    for number, folder in enumerate(folders, start=1):
        check_finite(peft_model, folder, f".{adapter_name(number)}.")
    peft_model.base_model.set_adapter(list(peft_model.peft_config))
    for parameter in peft_model.parameters():
        parameter.requires_grad_(False)
    _match_dtype(peft_model)
    return peft_model


def activate(model: Any) -> None:
    """All adapters take part, only the last is trained, and what is trained is fp32."""
    names = list(model.peft_config)
    model.base_model.set_adapter(names)
    for name, parameter in model.named_parameters():
        trained = f".{names[-1]}." in name or name.endswith(f".{names[-1]}")
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()
    _match_dtype(model)


def _match_dtype(model: Any) -> None:
    """Trained embeddings are fp32 copies; the layers behind them work in the compute dtype."""
    embedding = model.get_input_embeddings()
    if not hasattr(embedding, "modules_to_save"):
        return
    dtype = model.get_base_model().model.layers[0].input_layernorm.weight.dtype
    embedding.register_forward_hook(lambda module, args, output: output.to(dtype))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter, for everything that is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model: PeftModel, folder: Path, base_name: str, name: str | None = None) -> None:
    """Write one adapter, by default the last, as PEFT files (fp32 safetensors). `base_name` replaces local paths in its
    config."""
    name = name or list(model.peft_config)[-1]
    config = model.peft_config[name]
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    nested = folder / name  # PEFT puts an adapter that is not called "default" into a folder of its name
    for path in sorted(nested.iterdir()):
        path.rename(folder / path.name)
    nested.rmdir()
