"""The tiny base models (`builtin:tiny`, `builtin:micro`): shape, tokenizer and the training constants tuned for them.

They are pretrained from scratch on first use, on the general corpus of the built-in world, so that the whole
pipeline can be shown and measured in minutes on two CPU cores. The values in DEFAULTS replace `auto` for these
bases only; real models get theirs from plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmedtune.data.synthetic import world as worlds
from qmedtune.model_files import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
MAX_POSITIONS = 512

# Words of the prompt templates: without them every preamble would be spelled out byte by byte (3x the tokens).
TEMPLATE_TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "### Instruction:\n### Input:\n### Response:\n",
    "user assistant system",
)


@dataclass(frozen=True)
class Pretraining:
    """How a tiny base is made: all parameters, AdamW, cosine to `min_lr_ratio`, rows of packed documents."""

    tokens: int
    lr: float
    batch_rows: int
    seq_len: int
    warmup_ratio: float
    min_lr_ratio: float = 0.05
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class CptDefaults:
    """What `auto` means in a `cpt` stage on a tiny base. `batch_rows` rows of `seq_len` tokens make a step."""

    tokens: int
    lr: float
    embedding_lr: float
    seq_len: int
    batch_rows: int
    warmup_ratio: float


@dataclass(frozen=True)
class SftDefaults:
    """What `auto` means in an `sft` stage on a tiny base. 88 tokens hold two instructions of 43."""

    epochs: int
    lr: float
    embedding_lr: float
    seq_len: int
    batch_rows: int
    warmup_ratio: float


@dataclass(frozen=True)
class Defaults:
    """All constants of one tiny base."""

    pretraining: Pretraining
    cpt: CptDefaults
    sft: SftDefaults


# How they were found. What decides is whether the base recalls facts in forms that it has not met: the perplexity of
# held-out general text. At 3e-3 for 1,000,000 tokens it was 1.86 with two threads and 2.27 with one (the same seed,
# sums in another order), and on the second base one facet stayed at chance. 1.5e-3 for as long learns the text by
# heart (2.22). Half of it (1.86, 1.82) does not, nor does weight decay (1.83 at 3e-3; 1.80 at 2e-3 for 700,000).
# SFT: 3 epochs at 5e-4 missed a facet on one base in three; a higher rate or more epochs forget more of the notes.
# micro is not tuned for quality: it is there to run every stage within seconds.
DEFAULTS = {
    "builtin:tiny": Defaults(
        Pretraining(700_000, lr=2e-3, batch_rows=32, seq_len=64, warmup_ratio=0.05, weight_decay=0.1),
        CptDefaults(300_000, lr=4e-3, embedding_lr=4e-3, seq_len=64, batch_rows=32, warmup_ratio=0.05),
        SftDefaults(epochs=6, lr=8e-4, embedding_lr=8e-4, seq_len=88, batch_rows=12, warmup_ratio=0.05),
    ),
    "builtin:micro": Defaults(
        Pretraining(tokens=16_000, lr=3e-3, batch_rows=32, seq_len=64, warmup_ratio=0.1),
        CptDefaults(8_000, lr=4e-3, embedding_lr=4e-3, seq_len=64, batch_rows=16, warmup_ratio=0.1),
        SftDefaults(epochs=1, lr=5e-4, embedding_lr=5e-4, seq_len=88, batch_rows=16, warmup_ratio=0.1),
    ),
}


def world_of(base: str) -> worlds.World:
    """`builtin:tiny` -> the tiny world, `builtin:micro` -> the micro world. KeyError for any other base."""
    assert base in DEFAULTS, base
    return worlds.make_world(base.removeprefix("builtin:"))


def config_dict(vocab_size: int) -> JsonObject:
    """A LLaMA config: 3 layers, width 256, 2.8 M parameters with a vocabulary of 1,536.

    All widths are multiples of 64, NF4's block size. Two heads of 64 share each of two key/value heads.
    """
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "tie_word_embeddings": False,
    }


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of the embedding: the tokenizer's length rounded up to a multiple of 64."""
    return -(-len(tokenizer) // 64) * 64


def build_tokenizer(world: worlds.World) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the world until every word of it, each drug's name too, is one token.

    Any text can be encoded and decoded back. `save_pretrained(folder)` writes it. Encoding adds bos, as LLaMA does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,  # never reached: merging ends when every word is whole (about 1,500)
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS.values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(world), trainer)
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def _texts(world: worlds.World) -> list[str]:
    text = [r["text"] for name in ("literature", "notes", "general") for r in worlds.records(name, world)]
    asked = [f"{r['instruction']}\n{r['output']}" for r in worlds.records("instructions", world)]
    questions = [item["question"] for item in worlds.facts_items(world)]
    return [*text, *asked, *questions, *TEMPLATE_TEXT]
