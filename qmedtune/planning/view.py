"""The plan as tables and sentences for a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from qmedtune.units import count, duration, size


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: list[list[str]]


def render_plan(plan: dict[str, Any]) -> tuple[list[Table], list[str]]:
    """(tables for ui.table, closing lines) of what plan.make_plan returned."""
    tables = [_steps(plan), _data(plan), _stages(plan), *map(_memory, _distinct(plan["stages"])), _room(plan)]
    tables.append(_decisions(plan))
    return [table for table in tables if table.rows], _closing(plan)


def _about(number: int, spread: float) -> str:
    return count(number) if not spread else f"{count(number)} ±{spread:.0%}"


def _steps(plan: dict[str, Any]) -> Table:
    rows = [[step["name"], step["status"], step["why"]] for step in plan["steps"]]
    return Table(f"Plan of {plan['recipe']}", ["step", "status", "why"], rows)


def _data(plan: dict[str, Any]) -> Table:
    rows = [
        [d["source"], "not found here", "", "", ""]
        if d["missing"]
        else [
            d["source"],
            count(d["records"]),
            count(d["sampled"]),
            _about(d["tokens"], d["spread"]),
            size(d["read_bytes"]),
        ]
        for d in plan["data"]
    ]
    return Table("Data for training (sampled)", ["source", "records", "looked at", "tokens", "files"], rows)


def _stages(plan: dict[str, Any]) -> Table:
    rows: list[list[str]] = []
    for s in plan["stages"]:
        rows.append(
            [
                s["name"],
                _about(s["trained"], s["spread"]) if s["trained"] else "?",
                count(s["steps"]) if s["trained"] else "?",
                f"{s['batch']} x {s['seq_len']}",
                str(s["micro_batch"]),
                f"{s['lr']:g}",
                count(s["trained_parameters"]),
                f"{size(s['peak_bytes'])} of {size(s['budget_bytes'])}",
                f"{count(s['tokens_per_s'])}{'' if s['measured'] else ' (assumed)'}",
                "?" if s["seconds"] is None else duration(s["seconds"]),
            ]
        )
    columns = ["stage", "tokens", "steps", "batch", "micro-batch", "lr", "trained", "peak memory", "tokens/s", "time"]
    return Table("Training", columns, rows)


def _distinct(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stages whose memory differs by more than a tenth from one already shown."""
    shown: list[dict[str, Any]] = []
    for stage in stages:
        if all(abs(stage["peak_bytes"] - other["peak_bytes"]) > 0.1 * other["peak_bytes"] for other in shown):
            shown.append(stage)
    return shown


def _memory(stage: dict[str, Any]) -> Table:
    rows = [[name, size(part), ""] for name, part in stage["memory"].items()]
    rows.append(["sum (predicted)", size(stage["peak_bytes"]), f"of {size(stage['budget_bytes'])}"])
    if stage["peak_bytes"] > 0.5 * stage["budget_bytes"]:
        rows += [[f"  {text}", "", f"frees {size(freed)}"] for text, freed in stage["frees"]]
    return Table(f"Memory of {stage['name']}", ["part", "bytes", ""], rows)


def _room(plan: dict[str, Any]) -> Table:
    host, disk = plan["host"], plan["disk"]
    rows = [[f"host memory, {phase}", size(part)] for phase, part in host["parts"].items()]
    rows.append(["host memory here", size(host["there_bytes"])])
    rows += [[f"disk, {name}", size(part)] for name, part in disk["parts"].items()]
    rows.append(["disk in all / free here", f"{size(disk['needed_bytes'])} / {size(disk['free_bytes'])}"])
    return Table("Host memory and disk (predicted)", ["what", "bytes"], rows)


def _decisions(plan: dict[str, Any]) -> Table:
    rows = [[d["key"], _value(d["value"]), d["why"]] for d in plan["decisions"]]
    return Table("What `auto` became", ["key", "value", "why"], rows)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        named = cast(dict[str, Any], value)
        return ", ".join(f"{key} {_value(inner)}" for key, inner in named.items())
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _closing(plan: dict[str, Any]) -> list[str]:
    base, machine = plan["base"], plan["machine"]
    unknown = any(stage["seconds"] is None for stage in plan["stages"])
    assumed = "" if all(stage["measured"] for stage in plan["stages"]) else ", mostly assumed"
    return [
        f"{base['name']}: {count(base['parameters'])} parameters, shape from the {base['source']}",
        f"for {machine['name']}: {'at least' if unknown else 'about'} {duration(plan['seconds'])} of training and "
        f"merging{assumed}",
        *plan["notes"],
    ]
