"""What steps find and run.json tells, as frozen models: the names and the types of every figure, once.

The names are the contract of run.json (README, docs/): models say them so that readers do not. A key is written if,
and only if, it was given (`exclude_unset`), so what is read is written again byte for byte, and the run of an earlier
version keeps what it lacks. Everything that an earlier version did not write is optional; `None` is "not known".
Deliberately absent: composing (record.py), rendering (reporting/), computing anything but sums and look-ups.
"""

from qmedtune.results.ledgers import (
    Classes,
    Cleaned,
    Fertility,
    Identifiers,
    NearDuplicates,
    Overlap,
    PackedRecords,
    Packing,
    Part,
    Records,
    Source,
    Tokens,
)
from qmedtune.results.proofs import (
    Audit,
    Exposure,
    Merge,
    Probe,
    Shift,
)
from qmedtune.results.scores import (
    Change,
    Difference,
    Evaluation,
    Pair,
    Paired,
    Score,
    Scores,
    Task,
    Text,
)
from qmedtune.results.stages import (
    Adapter,
    Attention,
    Classification,
    Kernels,
    Loss,
    Memory,
    Model,
    Stage,
    Trained,
    Validation,
)
from qmedtune.results.typed import (
    Facts,
    Interval,
    Json,
    Number,
)
from qmedtune.results.whole_run import (
    Choice,
    Provenance,
    Run,
    StepEntry,
)

__all__ = [
    "Adapter",
    "Attention",
    "Audit",
    "Change",
    "Choice",
    "Classes",
    "Classification",
    "Cleaned",
    "Difference",
    "Evaluation",
    "Exposure",
    "Facts",
    "Fertility",
    "Identifiers",
    "Interval",
    "Json",
    "Kernels",
    "Loss",
    "Memory",
    "Merge",
    "Model",
    "NearDuplicates",
    "Number",
    "Overlap",
    "PackedRecords",
    "Packing",
    "Pair",
    "Paired",
    "Part",
    "Probe",
    "Provenance",
    "Records",
    "Run",
    "Score",
    "Scores",
    "Shift",
    "Source",
    "Stage",
    "StepEntry",
    "Task",
    "Text",
    "Tokens",
    "Trained",
    "Validation",
]
