"""Recipes and runs for tests, built once for all of them."""

from __future__ import annotations

from qmedtune.results import Facts


def unknown_keys(value: object, place: str = "") -> list[str]:
    """Keys that no model names: what a step writes and nothing reads by name."""
    found: list[str] = []
    if isinstance(value, Facts):
        if "__pydantic_extra__" not in type(value).__annotations__:  # metrics, losses by source
            found += [f"{place}.{key}" for key in value.model_extra or ()]
        for name in type(value).model_fields:
            found += unknown_keys(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, dict):
        for key, part in value.items():
            found += unknown_keys(part, f"{place}.{key}")
    elif isinstance(value, list):
        for part in value:
            found += unknown_keys(part, place)
    return found
