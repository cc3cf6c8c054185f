"""`qmedtune watch`: find the folder, take a port, say the address, serve until Ctrl-C."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qmedtune.errors import RecipeError
from qmedtune.watching.access import LOOPBACK, Guard, needs_token
from qmedtune.watching.server import Server, Site

PORT = 8642
NEXT_PORTS = 20  # of which a free one is taken where none was asked for


@dataclass(frozen=True)
class Watching:
    """Arguments of `qmedtune watch`.

    port: None for the first free one from 8642 on, 0 for any.
    """

    folder: Path
    host: str = "127.0.0.1"
    port: int | None = None
    clinical_text: bool = False


def open_server(asked: Watching) -> Server:
    """A server that listens, with its site. RecipeError where the folder or the port cannot be had."""
    if not asked.folder.is_dir():
        what = "is a file" if asked.folder.is_file() else "no such folder"
        raise RecipeError(f"{asked.folder}: {what}\ngive a run, or the folder that holds the runs; default: runs")
    server = _bound(asked)
    port = server.server_address[1]
    token = secrets.token_urlsafe(24) if needs_token(asked.host, clinical_text=asked.clinical_text) else None
    server.site = Site(asked.folder, Guard(port, token), clinical_text=asked.clinical_text)
    return server


def _bound(asked: Watching) -> Server:
    ports = [asked.port] if asked.port is not None else range(PORT, PORT + NEXT_PORTS)
    for port in ports:
        try:
            return Server(asked.host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise RecipeError(
                    f"--host {asked.host} --port {port}: {error.strerror}\nallowed: an address of this machine"
                ) from error
    raise RecipeError(f"--port: {ports[0]} is taken\ngive another, or --port 0 for any that is free")


def address_of(server: Server) -> str:
    host, port = server.server_address[0], server.server_address[1]
    token = server.site.guard.token
    return f"http://{host}:{port}/" + (f"?token={token}" if token else "")


def watch(asked: Watching, say: Callable[[str], None]) -> None:
    """Serve until the process is stopped."""
    server = open_server(asked)
    port = server.server_address[1]
    say(f"{asked.folder}: {address_of(server)}")
    if asked.host in LOOPBACK:
        say(f"Ctrl-C ends it. From another machine: ssh -L {port}:127.0.0.1:{port} THIS_MACHINE")
    with server:
        server.serve_forever(poll_interval=0.5)
