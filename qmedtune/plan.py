"""The plan of a run, made without loading weights or torch.

`resolve` and `base_facts` are what the rest of the package takes from here.
"""

from __future__ import annotations

from qmedtune.resolve import resolve
from qmedtune.shapes import BaseFacts, base_facts

__all__ = ["BaseFacts", "base_facts", "resolve"]
