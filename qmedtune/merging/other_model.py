"""The other model of a merge, read twice: by the merge, and by transformers for the proof. What is written is held
against the second reading, mixed anew.

Deliberately not here: whether it fits (sibling.py), the formulas (methods.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qmedtune import base as bases
from qmedtune.merging.disk_llama import DiskLlama, open_llama
from qmedtune.merging.lora_files import Updates
from qmedtune.merging.methods import MixedModels, Mixture, check_cosines, cosines_of
from qmedtune.merging.parallel import Apply
from qmedtune.merging.proof import Reference
from qmedtune.merging.reference import ReadModel, read_base
from qmedtune.merging.sibling import Mixing, clinical_sources
from qmedtune.results import Merge, MixedWith


@dataclass(frozen=True)
class OtherModel:
    """The second model of a merge, in both readings.

    opened: as the merge reads it; read: as transformers does.
    """

    mixing: Mixing
    opened: DiskLlama
    read: ReadModel

    def mixture(self, base: DiskLlama, updates: Updates, apply: Apply) -> Mixture:
        """What is written."""
        return self._mixture(MixedModels(base.source, self.opened.source, updates), list(base.shapes), apply)

    def reference(self, written: Mixture, plain: Reference, apply: Apply) -> Reference:
        """What it is held against: `plain`, base + adapters as transformers and PEFT read them, mixed. MergeRefused
        where the angles of the two readings differ."""
        names = list(written.cosines)
        base, other = plain.base.parameters.__getitem__, self.read.parameters.__getitem__
        again = self._mixture(MixedModels(base, other, plain.updates), names, apply)
        check_cosines(written.cosines, again.cosines)
        again = replace(again, cosines=written.cosines)  # or the last bits of sums in another order would differ
        return replace(plain, updates=again.scaled(), mixture=again)

    def _mixture(self, models: MixedModels, names: Sequence[str], apply: Apply) -> Mixture:
        method, share = self.mixing.method, self.mixing.share
        cosines: dict[str, float] = {}
        if method == "slerp" and 0 < share < 1:
            cosines = cosines_of(names, models, apply)
        return Mixture(method, share, models.base, models.other, models.updates, cosines)

    def told(self, merged: Merge, written: Mixture) -> Merge:
        """The result with what was mixed in."""
        sibling = self.mixing.sibling
        sha256 = bases.weights_sha256(sibling.folder)
        other = MixedWith(name=sibling.name, sha256=sha256, cosine=self.mixing.cosine)
        if clinical := clinical_sources(sibling):
            other = other.model_copy(update={"clinical": clinical})
        found: dict[str, object] = {
            "mixed_with": other,
            "method": self.mixing.method,
            "share": self.mixing.share,
        }
        if self.mixing.method == "slerp":
            found["on_sphere"] = written.on_sphere()
        return merged.model_copy(update=found)


def open_other(mixing: Mixing | None) -> OtherModel | None:
    if mixing is None:
        return None
    opened = open_llama(mixing.sibling.folder)
    return OtherModel(mixing, opened, read_base(opened.folder, opened.weights))
