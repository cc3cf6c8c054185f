"""The base of all results: a frozen model that is written as it was read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, JsonValue, PlainSerializer

Number = int | float
"""As it was written: a float field would turn 1 into 1.0, and the bytes of run.json with it."""
Interval = Annotated[tuple[Number, Number], PlainSerializer(list)]  # JSON has no tuples
Json = dict[str, JsonValue]


class Facts(BaseModel):
    """Base of all of them. Keys that this version does not know (of a later one) are kept and written again."""

    model_config = ConfigDict(frozen=True, extra="allow", validate_by_name=True, validate_by_alias=True)

    def as_json(self) -> dict[str, Any]:
        """As run.json and seals hold it: only what was given, under the names of the file."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class Told(Facts):
    """Of any step: what it warns of, and how long it took."""

    warnings: list[str] = []
    seconds: Number | None = None
