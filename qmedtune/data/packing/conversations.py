"""Conversations as token ids with their loss masks: framed by a template, cut where a row ends.

Deliberately not here: texts (tokens.py), and what a frame is (framing.py).
"""

from __future__ import annotations

from qmedtune.data.packing.framing import frame_of
from qmedtune.data.packing.templates import Template
from qmedtune.data.packing.tokens import FULL_WEIGHT, PROMPT_MARK, Codec, Encoded
from qmedtune.data.reading.document import Record


def encode_conversations(
    codec: Codec, records: list[Record], *, template: Template, prompt_weight: float, limit: int
) -> list[Encoded]:
    """Conversations, right-truncated to `limit` tokens; `kept` is 0 where no response token would be left."""
    framed = frame_of(template, codec).train([record["messages"] for record in records])
    quiet = {0.0: 0, 1.0: FULL_WEIGHT}.get(prompt_weight, PROMPT_MARK)
    found: list[Encoded] = []
    for each in framed:
        found.append(_weighted(each.ids, each.supervised, quiet, limit))
    return found


def _weighted(ids: list[int], supervised: list[int], quiet: int, limit: int) -> Encoded:
    mask = []
    for loud in supervised:
        mask.append(FULL_WEIGHT if loud else quiet)
    mask[0] = 0  # nothing predicts it
    kept = min(len(ids), limit)
    return Encoded(ids, mask, kept if FULL_WEIGHT in mask[1:kept] else 0)
