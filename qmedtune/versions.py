"""What of this program a step's result depends on, as it stands in every key; and what packages are installed.

Raise FORMAT when a step would write something else from the same inputs; the release alone does not invalidate a run.
Deliberately not here: which packages matter to whom (record.py, data/shards/job.py).
"""

from collections.abc import Iterable
from importlib import metadata

from qmedtune import __version__

FORMAT = 3  # 3: conversations are framed as one text, documents by the marks of documents
CODE = f"qmedtune-{__version__.rpartition('.')[0]}-format-{FORMAT}"


def installed(packages: Iterable[str]) -> dict[str, str | None]:
    """The version of each package; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
