"""What `qmedtune export` leaves: its seal, proof.json and `--json` tell the same."""

from __future__ import annotations

from qmedtune.results.typed import Facts, Number


class ExportProof(Facts):
    """What was compared with what was trained, as far as the form has it.

    kl ... max_abs_logit_diff: logits over probe_tokens, as of `Merge`. greedy: tokens in a row that both write alike.
    texts: whose token ids are equal; None: not known how the file splits text. modules, rank, alpha: of an adapter.
    tensors: equal bit by bit; template: whether a chat template was compared; tokenizer_class: that had to be named.
    """

    kl: Number | None = None
    kl_max: Number | None = None
    top1: Number | None = None
    max_abs_logit_diff: Number | None = None
    greedy: int | None = None
    alpha: Number | None = None
    modules: int | None = None
    rank: int | None = None
    max_lora_rank: int | None = None
    tensors: int | None = None
    template: bool | None = None
    tokenizer_class: str | None = None
    texts: int | None = None
    probe_tokens: int | None = None


class Exported(Facts):
    """An export. quant, bytes, pre, sha256: of a GGUF file, and quantised_by: the program or library of llama.cpp that
    made it one of K-quants; repository, commit: of a push to the Hub."""

    path: str | None = None
    form: str | None = None
    repository: str | None = None
    commit: str | None = None
    files: list[str] = []
    quant: str | None = None
    quantised_by: str | None = None
    bytes: int | None = None
    pre: str | None = None
    sha256: str | None = None
    proof: ExportProof | None = None
