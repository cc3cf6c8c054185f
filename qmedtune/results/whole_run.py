"""The content of run.json."""

from __future__ import annotations

from pydantic import JsonValue

from qmedtune.fields import CLINICAL_FORMATS
from qmedtune.results.duels import HeadToHead
from qmedtune.results.ledgers import Source
from qmedtune.results.privacy import Privacy
from qmedtune.results.proofs import Audit, Merge
from qmedtune.results.scores import Evaluation
from qmedtune.results.stages import Stage
from qmedtune.results.typed import Facts, Json, Number


class StepEntry(Facts):
    """One step of a run in run.json.

    status: sealed or `to do`. seconds: of the work alone.
    """

    name: str
    kind: str | None = None
    status: str
    seconds: Number | None = None
    key: str | None = None

    @property
    def is_sealed(self) -> bool:
        return self.status == "sealed"


class AutoChoice(Facts):
    """What an `auto` of the recipe became, and why."""

    key: str
    value: JsonValue
    why: str


class Provenance(Facts):
    """With what the run was made. git: commit of the source tree, None of an installed package."""

    qmedtune: str | None = None
    versions: dict[str, str | None] = {}
    python: str | None = None
    platform: str | None = None
    device: str | None = None
    base: str | None = None
    base_revision: str | None = None
    base_sha256: str | None = None
    git: str | None = None


class Run(Facts):
    """run.json. `error`: why a run failed, without text of any record; `sha256`: of all that stands before it."""

    name: str
    status: str
    recipe_sha256: str | None = None
    seed: int | None = None
    offline: bool | None = None
    stages: list[Stage] = []
    data: dict[str, Source] = {}
    merge: Merge | None = None
    audit: Audit | None = None
    evaluation: Evaluation | None = None
    against: HeadToHead | None = None
    steps: list[StepEntry] = []
    warnings: list[str] = []
    privacy: Privacy | None = None
    resolved: list[AutoChoice] = []
    recipe: Json = {}
    recipe_text: str = ""
    provenance: Provenance = Provenance()
    error: str | None = None
    sha256: str | None = None

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def sealed_steps(self) -> list[StepEntry]:
        return [step for step in self.steps if step.is_sealed]

    @property
    def scored(self) -> Evaluation:
        """The evaluation, an empty one where nothing was scored."""
        return self.evaluation or Evaluation()

    @property
    def base(self) -> str | None:
        """`model.base` of the recipe."""
        base = self._asked("model", "base")
        return base if isinstance(base, str) else None

    @property
    def quantised(self) -> bool:
        """Whether training ran over an NF4 base."""
        return self._asked("model", "quantization") == "nf4"

    def phi_of(self, source: str) -> str:
        """What the recipe has done about identifiers in a source, which may say so itself."""
        return str(self._asked("data", source, "phi") or self._asked("hygiene", "phi") or "off")

    def may_identify(self, source: str) -> bool:
        """Whether a source's text can name patients: by its kind or format, or because that was looked for."""
        found = self.data.get(source, Source())
        known = found.kind == "clinical" or found.phi.mode not in (None, "off")
        return known or self._asked("data", source, "format") in CLINICAL_FORMATS

    def _asked(self, *path: str) -> JsonValue:
        """A key of the recipe; None where it is not there."""
        found: JsonValue = self.recipe
        for key in path:
            if not isinstance(found, dict):
                return None
            found = found.get(key)
        return found
