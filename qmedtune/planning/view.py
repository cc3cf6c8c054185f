"""The plan as tables and sentences for a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from qmedtune.planning import exchange
from qmedtune.planning.plan_facts import Plan, PlannedEvaluation, PlannedStage
from qmedtune.units import count, duration, size

MORE_GPUS = ((2, "PCIe 4"), (2, "NVLink"), (4, "PCIe 4"), (4, "10 GbE"))


@dataclass(frozen=True)
class PlanTable:
    title: str
    columns: Sequence[str]
    rows: list[list[str]]


def render_plan(plan: Plan) -> tuple[list[PlanTable], list[str]]:
    """(tables for ui.table, closing lines) of what plan.make_plan returned."""
    tables = [_steps(plan), _data(plan), _stages(plan)]
    for stage in _distinct(plan["stages"]):
        tables.append(_memory(stage))
    tables += [_evaluation(plan["evaluation"]), _times(plan), _more_gpus(plan), _room(plan), _decisions(plan)]
    return [table for table in tables if table.rows], _closing(plan)


def _about(number: int, spread: float) -> str:
    if not spread:
        return count(number)
    return f"{count(number)} ±{spread:.0%}"


def _steps(plan: Plan) -> PlanTable:
    rows = [[step["name"], step["status"], step["why"]] for step in plan["steps"]]
    return PlanTable(f"Plan of {plan['recipe']}", ["step", "status", "why"], rows)


def _data(plan: Plan) -> PlanTable:
    rows: list[list[str]] = []
    for source in plan["data"]:
        if source["missing"]:
            rows.append([source["source"], "not found here", "", "", ""])
            continue
        rows.append(
            [
                source["source"],
                count(source["records"]),
                count(source["sampled"]),
                _about(source["tokens"], source["spread"]),
                size(source["read_bytes"]),
            ]
        )
    return PlanTable("Data for training (sampled)", ["source", "records", "looked at", "tokens", "files"], rows)


def _stages(plan: Plan) -> PlanTable:
    rows = [_stage_row(stage) for stage in plan["stages"]]
    columns = ["stage", "tokens", "steps", "batch", "micro-batch", "lr", "trained", "peak memory", "tokens/s", "time"]
    return PlanTable("Training", columns, rows)


def _stage_row(stage: PlannedStage) -> list[str]:
    tokens = steps = time = "?"
    if stage["trained"]:
        tokens, steps = _about(stage["trained"], stage["spread"]), count(stage["steps"])
    if stage["seconds"] is not None:
        time = duration(stage["seconds"])
    speed = count(stage["tokens_per_s"])
    if not stage["measured"]:
        speed += " (assumed)"
    return [
        stage["name"],
        tokens,
        steps,
        f"{stage['batch']} x {stage['seq_len']}",
        str(stage["micro_batch"]),
        f"{stage['lr']:g}",
        count(stage["trained_parameters"]),
        f"{size(stage['peak_bytes'])} of {size(stage['budget_bytes'])}",
        speed,
        time,
    ]


def _distinct(stages: list[PlannedStage]) -> list[PlannedStage]:
    """Stages whose memory differs by more than a tenth from one already shown."""
    shown: list[PlannedStage] = []
    for stage in stages:
        if all(abs(stage["peak_bytes"] - other["peak_bytes"]) > 0.1 * other["peak_bytes"] for other in shown):
            shown.append(stage)
    return shown


def _memory(stage: PlannedStage) -> PlanTable:
    rows = [[name, size(part), ""] for name, part in stage["memory"].items()]
    rows.append(["sum (predicted)", size(stage["peak_bytes"]), f"of {size(stage['budget_bytes'])}"])
    if stage["peak_bytes"] > 0.5 * stage["budget_bytes"]:
        for text, freed in stage["frees"]:
            rows.append([f"  {text}", "", f"frees {size(freed)}"])
    return PlanTable(f"Memory of {stage['name']}", ["part", "bytes", ""], rows)


def _evaluation(planned: PlannedEvaluation | None) -> PlanTable:
    rows: list[list[str]] = []
    title = "Evaluation"
    if planned is not None:
        title += f" ({planned['precision']}, weights in {planned['weights']}; base and result)"
        for task in planned["tasks"]:
            read, written = count(task["read"]), count(task["written"])
            rows.append([task["name"], count(task["questions"]), read, written, duration(task["seconds"])])
        for name in planned["unknown"]:
            rows.append([name, "?", "?", "?", "?"])
        if planned["text_tokens"]:
            read = count(planned["text_tokens"])
            rows.append(["held-out text", "", read, "", duration(planned["text_seconds"])])
        rows.append(["loading", f"{planned['models_loaded']} models", "", "", duration(planned["load_seconds"])])
    return PlanTable(title, ["what", "questions", "tokens read", "written at most", "time (assumed)"], rows)


def _times(plan: Plan) -> PlanTable:
    rows: list[list[str]] = []
    for name, seconds in plan["times"].items():
        rows.append([name, duration(seconds)])
    rows.append(["in all", duration(plan["seconds"])])
    return PlanTable("Time that is left (predicted)", ["what", "time"], rows)


def _more_gpus(plan: Plan) -> PlanTable:
    """Each stage with 2 and 4 GPUs; nothing for a CPU."""
    rows: list[list[str]] = []
    for stage in plan["stages"]:
        if plan["machine"]["kind"] != "cuda" or not stage["seconds"] or not stage["steps"]:
            continue
        if plan["machine"]["cards"] > 1:  # then the plan's times are those of so many
            continue
        step = exchange.StepTime(stage["seconds"] / stage["steps"], stage["exchange_bytes"])
        row = [stage["name"], size(stage["exchange_bytes"])]
        for gpus, link in MORE_GPUS:
            row.append(f"{exchange.times_as_fast(step, gpus, link):.2f}")
        rows.append(row)
    columns = ["stage", "gradients a step"]
    for gpus, link in MORE_GPUS:
        columns.append(f"{gpus}, {link}")
    return PlanTable("Times as fast with --gpus (computed, not measured)", columns, rows)


def _room(plan: Plan) -> PlanTable:
    host, disk = plan["host"], plan["disk"]
    rows: list[list[str]] = []
    for phase, part in host["parts"].items():
        rows.append([f"host memory, {phase}", size(part)])
    rows.append(["host memory here", size(host["there_bytes"])])
    for name, part in disk["parts"].items():
        rows.append([f"disk, {name}", size(part)])
    rows.append(["disk in all / free here", f"{size(disk['needed_bytes'])} / {size(disk['free_bytes'])}"])
    return PlanTable("Host memory and disk (predicted)", ["what", "bytes"], rows)


def _decisions(plan: Plan) -> PlanTable:
    rows = [[decision["key"], _value(decision["value"]), decision["why"]] for decision in plan["decisions"]]
    return PlanTable("What `auto` became", ["key", "value", "why"], rows)


def _value(value: JsonValue) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(inner)}" for key, inner in value.items())
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _closing(plan: Plan) -> list[str]:
    base, machine = plan["base"], plan["machine"]
    about, assumed = "about", ""
    if plan["evaluation"] and plan["evaluation"]["unknown"]:
        about = "at least"
    for stage in plan["stages"]:
        if stage["seconds"] is None:
            about = "at least"
        if not stage["measured"]:
            assumed = ", mostly assumed"
    return [
        f"{base['name']}: {count(base['parameters'])} parameters, shape from the {base['source']}",
        f"for {machine['name']}: {about} {duration(plan['seconds'])} of loading, training, merging, scoring{assumed}",
        *plan["notes"],
    ]
