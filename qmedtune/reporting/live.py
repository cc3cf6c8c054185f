"""A run that is not over: its true status, and the curves of the stage under way.

run.json and metrics.jsonl at the root are composed whenever a step ends: a stage of twelve hours would have no curve
until then. What it logs meanwhile lies where it is built. Deliberately not here: writing them (`record.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qmedtune import heartbeat
from qmedtune.reporting.facts import Metrics, parse_metrics
from qmedtune.store import building_of

METRICS, RUN = "metrics.jsonl", "run.json"


def read_run(folder: Path) -> dict[str, Any]:
    """run.json as it stands, with the status that holds: a run whose process is gone does not go on as `running`."""
    run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    return run | {"status": heartbeat.life(folder, run["status"]).status}


def metrics_files(folder: Path, run: dict[str, Any]) -> list[Path]:
    """The metrics of the run in order: of the whole where it has ended, else of each stage where it lies."""
    if run["status"] == "finished":
        return [folder / METRICS]
    found = []
    for stage in run.get("stages", []):
        place = folder / stage["name"]
        if stage["status"] != "sealed":
            place = building_of(place, folder)
        if (place / METRICS).is_file():
            found.append(place / METRICS)
    return found or [folder / METRICS]


def read_metrics(folder: Path, run: dict[str, Any]) -> Metrics:
    """Curves of all stages, the one under way included."""
    lines: list[str] = []
    for path in metrics_files(folder, run):
        if path.is_file():
            lines += path.read_text(encoding="utf-8").splitlines()
    return parse_metrics(lines)
