"""Runs to be watched, and a server that watches them in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from builders import make_metrics, make_run, write_run

from qmedtune.watching.watch import Watching, address_of, open_server


def a_run(folder: Path, status: str = "finished", **more) -> Path:
    return write_run(folder, make_run(status=status, **more), make_metrics())


@contextmanager
def serving(folder: Path, **options) -> Iterator[str]:
    """The address of a server of this process."""
    server = open_server(Watching(folder, port=0, **options))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield address_of(server)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
