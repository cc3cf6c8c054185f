"""`qmedtune export`: a trained model in the form that another program reads, with its proof beside it.

GGUF files and adapters for llama.cpp, a Modelfile for Ollama, checked folders for vLLM and transformers, a private
repository of the Hub. Tensors are streamed: an 8B model takes under 1 GB of memory. What is published was read back and
compared with what was trained. Deliberately not here: merging (merge.py), servers, builds of llama.cpp.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from qmedtune import record, store
from qmedtune.allowed import ExportForm
from qmedtune.errors import RecipeError, RunError
from qmedtune.evaluation.open_model import Location, check_template, fingerprint, locate
from qmedtune.results import Exported, ExportProof

if TYPE_CHECKING:
    from qmedtune.exporting.logit_proof import LogitProof
    from qmedtune.merging.disk_llama import DiskLlama

FORMS: tuple[str, ...] = get_args(ExportForm)
VERSION = 1  # raise when the same model would become other files
NO_NAME = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class ExportJob:
    """Arguments of an export.

    What becomes what. model: as `locate` finds it; out: a folder that is not there yet. quant: None is f16, of an
    adapter f32. base: of an adapter folder. pre: llama.cpp's name of how the tokenizer splits text, where it is none
    that is known. repository, endpoint, publish_clinical: of `hub` (exporting/push.py)."""

    model: str
    out: Path
    form: ExportForm
    quant: str | None = None
    base: str | None = None
    pre: str | None = None
    repository: str | None = None
    endpoint: str | None = None
    publish_clinical: bool = False
    offline: bool = False

    @property
    def type(self) -> str:
        return self.quant or ("f32" if self.form == "gguf-adapter" else "f16")


def export(job: ExportJob) -> Exported:
    """Make the folder `job.out`.

    Raises RecipeError for what cannot be expressed or is there already, RunError where the proof fails or the disk is
    full: then nothing stands under the name. The same export again changes nothing.
    """
    from qmedtune.exporting.place import publish

    if job.form == "hub":
        from qmedtune.exporting.push import push

        return push(job)
    _check_usage(job)
    location = find(job)
    check_template(location)
    makers: dict[str, Callable[[ExportJob, Location, Path], Exported]] = {
        "gguf": _gguf, "ollama": _ollama, "gguf-adapter": _gguf_adapter, "vllm": _vllm, "transformers": _transformers,
    }  # fmt: skip

    def make(folder: Path) -> Exported:
        try:
            made = makers[job.form](job, location, folder)
        except (RecipeError, RunError) as error:
            if job.model in str(error):
                raise
            raise type(error)(f"{job.model}: {error}") from error
        store.write_json(folder / "proof.json", made.as_json())
        return made

    read = [fingerprint(folder) for folder in (location.base, *location.adapters)]
    key = store.sha256_json([VERSION, job.form, job.type, job.pre, read])
    made = publish(job.out, key, make)
    return made.model_copy(update={"path": str(job.out), "form": job.form, "files": _files(job.out)})


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != store.SEAL)


def _check_usage(job: ExportJob) -> None:
    from qmedtune.exporting.gguf_adapter import ALLOWED
    from qmedtune.exporting.k_quants import check_quant

    if job.form in ("vllm", "transformers") and job.quant:
        raise RecipeError(f"--quant: {job.quant}, but --as {job.form} keeps the folder's own numbers\nleave it out")
    if job.form == "gguf-adapter" and job.type not in ALLOWED:
        raise RecipeError(f"--quant: got {job.type!r} for an adapter\nallowed: {', '.join(ALLOWED)}")
    check_quant(job.type)


def find(job: ExportJob) -> Location:
    """The model, or base and adapters, that the form is made of. RecipeError where it is another kind of thing."""
    path = Path(job.model).expanduser()
    marks = ("run.json", "config.json", "adapter_config.json")
    if path.is_dir() and not any((path / mark).is_file() for mark in marks):
        raise RecipeError(
            f"{job.model}: no run, model or adapter is there (no {', '.join(marks)})\ngive a run folder, or its merged/"
        )
    if job.form == "gguf-adapter" and (path / "run.json").is_file():
        return _adapters_of_run(job, path)
    location = locate(job.model, base=job.base, offline=job.offline)
    if location.adapters and job.form not in ("gguf-adapter", "vllm"):
        raise RecipeError(
            f"{job.model}: an adapter, and --as {job.form} takes a whole model\n"
            f"merge it first: qmedtune merge {job.model} --out MERGED; or export it: --as gguf-adapter, --as vllm"
        )
    if job.form == "gguf-adapter" and not location.adapters:
        raise RecipeError(f"{job.model}: no adapter is there\ngive a run, or an adapter folder; a model: --as gguf")
    return location


def _adapters_of_run(job: ExportJob, folder: Path) -> Location:
    """All adapters that the run's merge folds."""
    from qmedtune.data.packing import templates
    from qmedtune.merge_folder import adapters_of_run

    found = adapters_of_run(folder, job.offline)
    if found.shares:
        raise RecipeError(f"{job.model}: its merge weighs the stages (merge.weights), adapters do not\n--as gguf")
    if found.mixed:
        raise RecipeError(f"{job.model}: its merge mixes another model in (merge.with), adapters do not\n--as gguf")
    stack = found.stack
    if not stack.adapters:
        raise RecipeError(f"{job.model}: this run trained no adapter\nexport its model: --as gguf")
    if stack.template:
        template = templates.load(stack.template)
    else:
        template = templates.default(None, stack.base)
    return Location(job.model, "run", stack.base, stack.adapters, template)


def title_of(location: Location) -> str:
    """A name for files and cards: the run's, or the folder's."""
    path = Path(location.name).expanduser()
    if (path / record.RUN).is_file():
        return _plain_name(record.load(path).name)
    if path.exists():
        return _plain_name(path.resolve().name)
    return _plain_name(location.name.rpartition(":")[2].rpartition("/")[2])


def _plain_name(name: str) -> str:
    """As it may stand in file names, commands and headings: run.json or a folder may say anything."""
    return NO_NAME.sub("-", name)[:80].strip("-.") or "model"


# ---- the forms -------------------------------------------------------------------------------------------------------


def _opened(location: Location) -> DiskLlama:
    from qmedtune.merging.disk_llama import open_llama

    return open_llama(location.base)


def _gguf(job: ExportJob, location: Location, folder: Path) -> Exported:
    from qmedtune.exporting.card import file_lines, write_card

    file = _write_file(job, location, folder)
    lines = file_lines(file.path, job.type, file.proof)
    lines += ["", f"Serve it with its template: `llama-server -m {file.path.name} --jinja --host 127.0.0.1`"]
    write_card(folder, title_of(location), lines, location.base)
    return file.exported(job)


@dataclass(frozen=True)
class File:
    """A GGUF file. pre: llama.cpp's name of how it splits text; sha256: taken as it was written here, or else
    quantised_by: what of llama.cpp wrote it."""

    path: Path
    pre: str
    proof: LogitProof
    sha256: str | None = None
    quantised_by: str | None = None

    def exported(self, job: ExportJob) -> Exported:
        proof = ExportProof(**asdict(self.proof))
        size = self.path.stat().st_size
        return Exported(
            quant=job.type,
            quantised_by=self.quantised_by,
            bytes=size,
            pre=self.pre,
            proof=proof,
            sha256=self.sha256,
        )


def _write_file(job: ExportJob, location: Location, folder: Path) -> File:
    from qmedtune.exporting.gguf_model import exact_quant, write_model
    from qmedtune.exporting.hash_behind import HashBehind
    from qmedtune.exporting.k_quants import quantise
    from qmedtune.exporting.logit_proof import prove
    from qmedtune.exporting.types import QUANTS
    from qmedtune.exporting.vocabulary import read_vocabulary

    model, title = _opened(location), title_of(location)
    vocabulary = read_vocabulary(location.base, model.model.config.vocab_size, job.pre)
    path = folder / f"{title}-{job.type}.gguf"
    behind = by = None
    if job.type in QUANTS:
        with HashBehind(path) as behind:
            write_model(path, model, vocabulary, QUANTS[job.type], title=title)
    else:
        whole = folder / "whole.gguf"
        write_model(whole, model, vocabulary, exact_quant(model), title=title)
        by = quantise(whole, path, job.type)
        whole.unlink()
    with ThreadPoolExecutor(1) as disk:  # it writes while the file is proven, out of memory
        settled = disk.submit(store.fsync_path, path)
        proof = prove(path, model, job.type, vocabulary.doubtful)
        settled.result()
    sha256 = None if behind is None else behind.hexdigest()
    return File(path, vocabulary.pre, proof, sha256, by)


def _ollama(job: ExportJob, location: Location, folder: Path) -> Exported:
    from qmedtune.data.packing.framing import frame_in
    from qmedtune.exporting.card import file_lines, write_card
    from qmedtune.exporting.ollama import modelfile

    file = _write_file(job, location, folder)
    text = modelfile(frame_in(location.template, location.base), f"./{file.path.name}")
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    lines = file_lines(file.path, job.type, file.proof)
    lines += ["", "Import it, in this folder: `ollama create NAME -f Modelfile`; then `ollama run NAME`"]
    write_card(folder, title_of(location), lines, location.base)
    return file.exported(job)


def _gguf_adapter(job: ExportJob, location: Location, folder: Path) -> Exported:
    from qmedtune.exporting.card import adapter_lines, write_card
    from qmedtune.exporting.folders import check_numbers
    from qmedtune.exporting.gguf_adapter import write_adapter
    from qmedtune.model_stack import read_adapter, read_model

    shapes = read_model(location.base).shapes
    for adapter in location.adapters:
        read_adapter(adapter, shapes)
        check_numbers(adapter)
    file = folder / f"{title_of(location)}-lora-{job.type}.gguf"
    proof = write_adapter(file, _opened(location), location.adapters, job.type, title=title_of(location))
    write_card(folder, title_of(location), adapter_lines(file, proof), location.adapters[-1])
    return Exported(quant=job.type, bytes=file.stat().st_size, proof=ExportProof(**asdict(proof)))


def _vllm(job: ExportJob, location: Location, folder: Path) -> Exported:
    from qmedtune.exporting.card import code
    from qmedtune.exporting.folders import copy_adapter, copy_model

    if location.adapters:
        return Exported(proof=copy_adapter(location, folder, title_of(location)))
    serve = f"vllm serve {shlex.quote(str(job.out))} --served-model-name {title_of(location)} --host 127.0.0.1"
    return Exported(proof=copy_model(location, folder, title_of(location), f"Serve it: {code(serve)}"))


def _transformers(job: ExportJob, location: Location, folder: Path) -> Exported:
    from qmedtune.exporting.folders import copy_model

    load = "AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)"
    return Exported(proof=copy_model(location, folder, title_of(location), f"Load it: `{load}`"))
