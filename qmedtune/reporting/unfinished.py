"""A run that is not over: its true status, and the curves of the stage under way.

run.json and metrics.jsonl at the root are composed whenever a step ends: a stage of twelve hours would have no curve
until then. What it logs meanwhile lies where it is built. Deliberately not here: writing them (`record.py`).
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from qmedtune import heartbeat
from qmedtune.disk import read_plain
from qmedtune.errors import RunError
from qmedtune.reporting.facts import Metrics, parse_metrics
from qmedtune.results import Run
from qmedtune.store import building_of

METRICS, RUN = "metrics.jsonl", "run.json"


def read_run(folder: Path) -> Run:
    """run.json as it stands, with the status that holds: a run whose process is gone does not go on as `running`.
    RunError where it is damaged."""
    try:
        run = Run.model_validate_json(read_plain(folder / RUN))
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise RunError(
            f"{folder / RUN}: {place}: {fault['msg']}\nthe `qmedtune run` that made it composes it again from its steps"
        ) from None
    except ValueError as error:
        raise RunError(f"{folder / RUN}: is no text\nthe `qmedtune run` that made it composes it again") from error
    return run.model_copy(update={"status": heartbeat.life(folder, run.status).status})


def metrics_files(folder: Path, run: Run) -> list[Path]:
    """The metrics of the run in order: of the whole where it has ended, else of each stage where it lies."""
    if run.finished:
        return [folder / METRICS]
    found: list[Path] = []
    for stage in run.stages:
        place = folder / stage.name
        if stage.status != "sealed":
            place = building_of(place, folder)
        if (place / METRICS).is_file():
            found.append(place / METRICS)
    return found or [folder / METRICS]


def read_metrics(folder: Path, run: Run) -> Metrics:
    """Curves of all stages, the one under way included."""
    lines: list[str] = []
    for path in metrics_files(folder, run):
        if path.is_file():
            lines += path.read_text(encoding="utf-8", errors="replace").splitlines()
    return parse_metrics(lines)
