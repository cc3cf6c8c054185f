"""`qmedtune export`: the result in the form that another program reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmedtune.allowed import ExportForm
from qmedtune.commands.common import JsonOption, OfflineOption, emit, say

if TYPE_CHECKING:
    from qmedtune.results import Exported


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, or a merged model or adapter folder.")],
    form: Annotated[ExportForm, typer.Option("--as", help="What it becomes.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="A new folder; hub needs none.")] = None,
    quant: Annotated[
        str | None, typer.Option(metavar="TYPE", help="f32, f16 (default), bf16, q8_0, q5_1 ... q4_0; q4_k_m ...")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Base of an adapter folder.")] = None,
    pre: Annotated[
        str | None, typer.Option(metavar="NAME", help="llama.cpp's name of an unknown way to split text.")
    ] = None,
    repo: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="hub: the private repository.")] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="hub: another server.")] = None,
    publish_clinical: Annotated[
        bool, typer.Option("--publish-clinical", help="hub: the terms of the clinical sources were checked.")
    ] = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Other forms of the result, read back and proven: GGUF, Ollama, vLLM, transformers, the Hub."""
    from qmedtune.export import ExportJob
    from qmedtune.export import export as run_export

    if out is None and form != "hub":
        raise typer.BadParameter("--out: name the folder that is made")
    job = ExportJob(
        model, out or Path(), form, quant, base, pre, repo, endpoint, publish_clinical, offline
    )  # fmt: skip
    made = run_export(job)
    emit(made.as_json()) if as_json else _show(made)


def _show(made: Exported) -> None:
    say(str(made.path))
    for name in made.files:
        say(f"  {name}")
    proof = made.proof
    if proof is None:
        return
    if proof.kl is not None:
        print(f"proof: KL {proof.kl:.2e} nats per token, same most likely token {proof.top1:.1%}")
    if proof.texts is not None:
        print(f"proof: token ids equal on {proof.texts} texts")
