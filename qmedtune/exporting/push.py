"""A merged model into a private repository of the Hub: with its card, and only where its data allow it.

What a model was trained on stands in its run. A model that has seen clinical text can give it away; so it leaves this
machine only where the recipe says of each clinical source that its terms allow it, and whoever pushes it says so too.
Deliberately not here: public repositories, adapters, models without a record of their training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qmedtune import record
from qmedtune.errors import RecipeError, RunError
from qmedtune.evaluation.open_model import Location, locate
from qmedtune.exporting.card import README
from qmedtune.results import Exported, Run

if TYPE_CHECKING:
    from qmedtune.export import ExportJob

# The words in `data.<source>.terms` that say so.
MAY = "models may be published"
KEPT_HERE = ("seal.json", ".*")


def push(job: ExportJob) -> Exported:
    """Upload `merged/` of a run.

    Raises RecipeError where the terms do not allow it or the repository is public, RunError where it is not reached.
    """
    if job.offline:
        raise RecipeError("--as hub: opens a connection, and --offline forbids it\nleave one of them out")
    if job.repository is None or job.repository.count("/") != 1:
        raise RecipeError(f"--repo: got {job.repository!r}\nallowed: OWNER/NAME of the Hub")
    check_terms(Path(job.model).expanduser(), job.publish_clinical)
    location = locate(job.model)
    if not (location.base / README).is_file():
        raise RecipeError(f"{location.base}: has no card ({README})\nrender it: qmedtune report {job.model}")
    return _upload(job, location)


def check_terms(folder: Path, said: bool) -> None:
    """RecipeError unless the run's data allow a model of theirs to be given away."""
    run = record.read(folder) if (folder / record.RUN).is_file() else None
    if run is None:
        raise RecipeError(
            f"{folder}: --as hub takes a run: what a model was trained on stands in its run.json\n"
            "give the run folder, not merged/ alone"
        )
    recipe = record.recipe_of(run, folder)
    terms: dict[str, str | None] = {}
    for name, source in recipe.data.items():
        if source.may_identify:
            terms[name] = source.terms
    clinical = list(terms)
    closed = _closed(terms)
    _check_other(folder, run, said)
    if closed:
        raise RecipeError(
            f"{folder}: was trained on clinical text ({', '.join(closed)}), which a model can give away\n"
            f"it is pushed only if the recipe's terms say so: data.{closed[0]}.terms: '...; {MAY}'\n"
            "and --publish-clinical is given; keep it here otherwise: --as vllm, --as gguf"
        )
    if clinical and not said:
        raise RecipeError(
            f"{folder}: was trained on clinical text ({', '.join(clinical)}); its terms allow a model to be published\n"
            "if you have checked that they do, and the audit: --publish-clinical"
        )


def _closed(terms: Mapping[str, str | None]) -> list[str]:
    """Sources whose terms do not say that a model may be published."""
    return [name for name, words in terms.items() if MAY not in (words or "").lower()]


def _check_other(folder: Path, run: Run, said: bool) -> None:
    """RecipeError where the model that was mixed in has seen clinical text in its own run."""
    other = run.merge.mixed_with if run.merge is not None else None
    if other is None or not other.clinical:
        return
    if _closed(other.clinical) or not said:
        raise RecipeError(
            f"{folder}: is mixed with {Path(other.name).name}, which was trained on clinical text "
            f"({', '.join(other.clinical)})\n"
            f"it is pushed only if the terms in that model's recipe say so ('...; {MAY}') and with --publish-clinical"
        )


def _upload(job: ExportJob, location: Location) -> Exported:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    api, name = HfApi(endpoint=job.endpoint), str(job.repository)
    try:
        api.create_repo(name, private=True, exist_ok=True)
        if not api.model_info(name).private:
            raise RecipeError(f"--repo: {name} is public\nname a new one: it is made private")
        done = api.upload_folder(
            repo_id=name,
            folder_path=location.base,
            ignore_patterns=list(KEPT_HERE),
            commit_message="Upload a model merged by qmedtune",
        )
    except LocalTokenNotFoundError as error:
        raise RunError("--as hub: no login here\nlog in: hf auth login") from error
    except (HTTPError, OSError) as error:
        answer = getattr(error, "response", None)
        why = f"answered {answer.status_code}" if answer is not None else "was not reached"
        raise RunError(
            f"--as hub: {api.endpoint} {why} for {name}\ncheck the name and the login (hf auth whoami), then again"
        ) from error
    sent = [path.name for path in location.base.iterdir() if path.is_file() and path.name not in KEPT_HERE]
    files = sorted(name for name in sent if not name.startswith("."))
    return Exported(path=str(done), form="hub", repository=name, commit=done.oid, files=files)
