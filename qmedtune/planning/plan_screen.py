"""The plan on one screen: the verdict, the steps with their times, what is missing here. Fits 80 columns by 24 lines.

Deliberately not here: every figure and every reason (view.py, `plan --full`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qmedtune.planning.plan_facts import Missing, Plan, PlannedStage
from qmedtune.planning.view import PlanTable
from qmedtune.terminal import wrapped
from qmedtune.units import count, duration, roughly, size

ABSENT = "(not on this machine)"  # ends the name of a card that is only planned for
UNTIMED = ("audit", "against", "sweep")  # steps whose time nobody predicts
MOST_STAGES = 5  # rows of stages; what are more is one row
SCREEN_LINES = 16  # of 24: without the table's frame (4), the way on (1), its prompt and the next (2), and a spare one


def verdict(plan: Plan) -> str:
    """One line that says whether the run fits and how long it takes.

    `fits: 21.5 of 24.0 GiB; about 12 h; 32.9 GiB of disk; missing: DATA`. A plan that does not fit is an error.
    """
    stage = _tightest(plan["stages"])
    parts = [
        f"fits: {_of(stage['peak_bytes'], stage['budget_bytes'])}",
        f"{_about(plan)} {roughly(plan['seconds'])}",
        f"{size(plan['disk']['needed_bytes'])} of disk",
    ]
    if all(step["status"] == "cached" for step in plan["steps"]):
        parts[1] = "all steps are done"
    elif not plan["seconds"]:
        parts[1] = "what is left is not timed"
    elif making := plan["base"]["making_s"]:
        parts[1] += f", and {roughly(making)} once for the base"
    if names := _missing_names(plan["missing"]):
        parts.append(f"missing: {', '.join(names)}")
    return "; ".join(parts)


def screen(plan: Plan) -> tuple[PlanTable, list[str]]:
    """The steps with their times, and lines about what to know before the run: as many as a screen has room for."""
    steps = _steps(plan)
    room = SCREEN_LINES - len(steps.rows) - len(wrapped(f"{plan['recipe']} {verdict(plan)}"))
    told = {missing["name"] for missing in plan["missing"] if missing["what"] != "the base"}
    sentences = [*_missing_lines(plan["missing"]), *_machine(plan)]
    for note in plan["notes"]:
        if not _is_about(note, told):
            sentences.append(note)
    lines: list[str] = []
    for position, sentence in enumerate(sentences):
        parts = wrapped(sentence)
        if len(lines) + len(parts) > room:
            lines.append(f"{len(sentences) - position} more notes with --full")
            break
        lines += parts
    return steps, lines


def _tightest(stages: Sequence[PlannedStage]) -> PlannedStage:
    return max(stages, key=_share)


def _share(stage: PlannedStage) -> float:
    return stage["peak_bytes"] / stage["budget_bytes"]


def _of(part: int, whole: int) -> str:
    """`21.5 of 24.0 GiB`; with both units where they differ."""
    first, last = size(part), size(whole)
    number, _, unit = first.rpartition(" ")
    return f"{number if last.endswith(unit) else first} of {last}"


def _about(plan: Plan) -> str:
    if plan["evaluation"] and plan["evaluation"]["unknown"]:
        return "at least"
    for step in plan["steps"]:
        if step["name"] in UNTIMED and step["status"] != "cached":
            return "at least"
    for stage in plan["stages"]:
        if stage["seconds"] is None:
            return "at least"
    return "about"


def _missing_names(missing: Iterable[Missing]) -> list[str]:
    """Each once: a variable that is not set stands for all that is behind it."""
    names: dict[str, None] = {}
    for entry in missing:
        if entry["what"] == "the base":
            names["the base"] = None
        elif entry["variables"]:
            names |= dict.fromkeys(entry["variables"])
        else:
            names[entry["name"]] = None
    return list(names)


def _missing_lines(missing: Iterable[Missing]) -> list[str]:
    """What to do about each."""
    behind: dict[str, list[str]] = {}
    absent: list[str] = []
    for entry in missing:
        for variable in entry["variables"]:
            behind.setdefault(variable, []).append(entry["name"])
        if not entry["variables"] and entry["what"] != "the base":
            absent.append(entry["name"])
    lines: list[str] = []
    for variable, names in behind.items():
        lines.append(f"{variable} is not set ({', '.join(names)}): export {variable}=FOLDER")
    if absent:
        lines.append(f"not found here: {', '.join(absent)} (where each was looked for: --full)")
    return lines


def _machine(plan: Plan) -> list[str]:
    """What is done already, for which machine this is, and how sure the times are; of a GPU a note says more."""
    lines: list[str] = []
    if done := sum(step["status"] == "cached" for step in plan["steps"]):
        lines.append(f"{done} of {len(plan['steps'])} steps are done already")
    name = plan["machine"]["name"]
    if plan["machine"]["kind"] == "cuda":
        if not name.endswith(ABSENT):
            lines.append(f"planned for {name}")
    elif all(stage["measured"] for stage in plan["stages"]):
        lines.append(f"planned for {name}, at the speed that this run has measured")
    else:
        lines.append(f"planned for {name}; speeds are assumed until the run has measured them")
    return lines


def _is_about(note: str, names: Iterable[str]) -> bool:
    """Whether a note tells more of what the lines about missing things have told."""
    return any(note.startswith((f"{name}:", f"{name} ")) for name in names)


def _steps(plan: Plan) -> PlanTable:
    rows: list[list[str]] = []
    if plan["times"]["data"]:
        rows.append(["data", "", "", "", duration(plan["times"]["data"])])
    shown = plan["stages"]
    if len(shown) > MOST_STAGES:
        shown = shown[: MOST_STAGES - 1]
    for stage in shown:
        rows.append(_stage_row(stage))
    if rest := plan["stages"][len(shown) :]:
        seconds = sum(stage["seconds"] or 0.0 for stage in rest)
        rows.append([f"{len(rest)} more stages", "", "", "", duration(seconds)])
    for name in ("loading", "merging", "evaluation"):
        if not plan["times"][name]:
            continue
        time = duration(plan["times"][name])
        if name == "evaluation" and plan["evaluation"] and plan["evaluation"]["unknown"]:
            time = f"at least {time}"
        rows.append([name, "", "", "", time])
    return PlanTable("", ["step", "tokens", "steps", "peak memory", "time"], rows)


def _stage_row(stage: PlannedStage) -> list[str]:
    tokens = steps = time = "?"
    if stage["trained"]:
        tokens, steps = count(stage["trained"]), count(stage["steps"])
    if stage["seconds"] is not None:
        time = duration(stage["seconds"]) if stage["seconds"] else "done"
    return [stage["name"], tokens, steps, size(stage["peak_bytes"]), time]
