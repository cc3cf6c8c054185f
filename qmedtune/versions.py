"""What of this program a step's result depends on, as it stands in every key.

Raise FORMAT when a step would write something else from the same inputs; the release alone does not invalidate a run.
Deliberately not here: the versions of installed packages (record.py).
"""

from qmedtune import __version__

FORMAT = 3  # 3: conversations are framed as one text, documents by the marks of documents
CODE = f"qmedtune-{__version__.rpartition('.')[0]}-format-{FORMAT}"
