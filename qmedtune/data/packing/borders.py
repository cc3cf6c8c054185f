"""Which marks stand at a document's borders in continual pretraining, and why: per kind of tokenizer.

A document is text, not a turn. Instruct models keep `<|im_start|>`, `<|im_end|>` and `<|eot_id|>` for turns and name
them bos and eos all the same; in front of and behind a document they were never seen: SmolLM2-135M-Instruct gives a
document's end log p -25.6 as `<|im_end|>` and -14.3 as `<|endoftext|>`, which its pretraining closed documents with
(mean of 40 clinical notes, fp32). So a document ends with the mark that ends documents, and begins with bos, or with
that same mark where bos opens turns: documents follow each other as they did in pretraining.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmedtune.data.packing.tokens import Codec

# What chat formats of LLaMA-shaped models open and close turns with, and never documents.
TURN_MARKS = frozenset({
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|end_of_turn|>", "<start_of_turn>", "<end_of_turn>",
    "[INST]", "[/INST]",
})  # fmt: skip
# What their pretraining closed documents with: LLaMA 3; GPT-2's heirs, SmolLM2 among them; LLaMA 1 and 2.
DOCUMENT_ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")


@dataclass(frozen=True)
class Borders:
    """Ids around a document: `start` None where the tokenizer has no mark for it. `why` is a sentence for people."""

    start: int | None
    end: int
    why: str


def document_borders(codec: Codec) -> Borders:
    """The marks of documents for a tokenizer."""
    if codec.bos_id is not None:
        bos = codec.backend.id_to_token(codec.bos_id)
    else:
        bos = None
    end = codec.eos_token
    if end in TURN_MARKS:
        end = next((mark for mark in DOCUMENT_ENDS if _is_special(codec, mark)), end)
    end_id = codec.backend.token_to_id(end)
    assert end_id is not None
    if bos is None:
        return Borders(None, end_id, f"no bos; {_of_end(codec, end)}")
    if bos in TURN_MARKS and end not in TURN_MARKS:
        return Borders(end_id, end_id, f"bos {bos} opens turns, so {end} opens documents; {_of_end(codec, end)}")
    return Borders(codec.bos_id, end_id, f"bos {bos} opens documents; {_of_end(codec, end)}")


def _of_end(codec: Codec, end: str) -> str:
    if end == codec.eos_token:
        if end in TURN_MARKS:
            closes = "closes turns, and no other mark is known"
        else:
            closes = "closes them"
        return f"eos {end} {closes}"
    return f"eos {codec.eos_token} closes turns, so {end} closes documents"


def _is_special(codec: Codec, mark: str) -> bool:
    return codec.backend.token_to_id(mark) in codec.special_ids


def described(codec: Codec) -> dict[str, str | None]:
    """{"start", "end", "why"} with the marks as text, for `plan`, `data show` and run.json."""
    borders = document_borders(codec)
    if borders.start is not None:
        start = codec.backend.id_to_token(borders.start)
    else:
        start = None
    return {"start": start, "end": codec.backend.id_to_token(borders.end), "why": borders.why}
