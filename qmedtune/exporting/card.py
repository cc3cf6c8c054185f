"""The card of an export: what it is, its proof in words, how to serve it, and the card of the model it was made from.

The model's card brings the terms of its data and the audit along: they hold for every form of it. Deliberately not
here: figures that were not measured.
"""

from __future__ import annotations

import re
from pathlib import Path

from qmedtune import store, units
from qmedtune.exporting.gguf_adapter import AdapterProof
from qmedtune.exporting.logit_proof import GREEDY_TOKENS, LogitProof

README = "README.md"
MAX_CARD_BYTES = 1 << 20
PROOF = "proof.json"


def write_card(folder: Path, title: str, lines: list[str], model: Path) -> None:
    """README.md of an export: title, lines, and the card of the model folder below them."""
    text = f"# {title}\n\n" + "\n".join(lines) + "\n"
    if (model / README).is_file():
        with (model / README).open("rb") as file:  # it may be anybody's, and of any length
            below = file.read(MAX_CARD_BYTES).decode("utf-8", "replace")
        text += f"\n---\n\n{below}"
    store.write_atomic(folder / README, text)


def code(text: str) -> str:
    """A code span of Markdown that nothing in it can close."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    ticks = "`" * (longest + 1)
    if longest:
        return f"{ticks} {text} {ticks}"
    return f"{ticks}{text}{ticks}"


def file_lines(file: Path, quant: str, proof: LogitProof) -> list[str]:
    lines = [
        f"`{file.name}` ({quant}, {units.size(file.stat().st_size)}), made by `qmedtune export` and read back:",
        "",
        _logits_line(proof),
    ]
    if proof.greedy is not None:
        lines.append(f"- written greedily, the first {proof.greedy} of {GREEDY_TOKENS} tokens are the same")
    told = f"equal on {proof.texts} texts" if proof.texts is not None else "not compared (unknown way to split text)"
    lines.append(f"- token ids against tokenizer.json: {told}")
    return lines


def _logits_line(proof: LogitProof) -> str:
    if proof.tensors is not None:
        return f"- every number of its {proof.tensors:,} tensors is that of the model folder, and so are its logits"
    return (
        f"- logits against the model folder, on {proof.probe_tokens} tokens: KL {proof.kl:.2e} nats per token, "
        f"the same most likely token at {proof.top1:.1%} of the positions"
    )


def adapter_lines(file: Path, proof: AdapterProof) -> list[str]:
    return [
        f"`{file.name}`: {proof.modules} updates, alpha {proof.alpha:g}, made by `qmedtune export` and read back:",
        "",
        f"- logits against base + adapter, on {proof.probe_tokens} tokens: KL {proof.kl:.2e} nats per token",
        "",
        "Serve it over the base's GGUF file: `llama-server -m BASE.gguf --lora ADAPTER.gguf --jinja`",
    ]
