"""The watcher's server: a few addresses, read-only but for questions, with Python's own HTTP server.

`Site.answer` turns a request into a response and knows no socket. What is in an address is looked up by comparing,
never joined to a path. Deliberately absent: TLS (it is for this machine, or for an `ssh -L`), logs, any other host.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from qmedtune.compare_runs import compare, sides
from qmedtune.errors import QmedtuneError
from qmedtune.reporting.page import page as report_page
from qmedtune.reporting.style import CSS
from qmedtune.watching.access import SECURITY, Guard, Headers, is_own_page
from qmedtune.watching.asking import ModelPair
from qmedtune.watching.compare_page import page as compare_page
from qmedtune.watching.curves import Follower
from qmedtune.watching.live import Live
from qmedtune.watching.packed_rows import RequestedRows, packed_stages, rows_html
from qmedtune.watching.pages import ask_page, list_page, message_page, rows_page, run_page
from qmedtune.watching.parts import address, run_parts, runs_parts
from qmedtune.watching.runs import Seen, Shelf

MAX_BODY = 100_000  # bytes: a question
IDLE_S = 30  # a connection that says nothing for so long is closed
HTML, JSON, TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"
LINES = "application/x-ndjson"
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="4" fill="#00705a"/>'
    '<path d="M3 4c3 0 3 7 10 7" fill="none" stroke="#fff" stroke-width="2" stroke-linecap="round"/></svg>'
)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Headers
    body: bytes = b""

    def first(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[0]


@dataclass(frozen=True)
class Response:
    """An HTTP response.

    body: bytes, or lines that are sent as they come.
    """

    status: int
    body: bytes | Iterator[bytes] = b""
    kind: str = HTML
    headers: dict[str, str] = field(default_factory=dict)


def page(text: str, status: int = 200) -> Response:
    return Response(status, text.encode(errors="replace"))


def refused(status: int, why: str) -> Response:
    return Response(status, f"{why}\n".encode(), TEXT)


class Site:
    """What is served of one folder. clinical_text: packed rows of clinical sources may be shown with their text."""

    def __init__(self, root: Path, guard: Guard, *, clinical_text: bool = False) -> None:
        self.shelf, self.guard, self.clinical_text = Shelf(root), guard, clinical_text
        self.pair = ModelPair(self.shelf)
        self._list = Live(lambda: runs_parts(self.shelf.all()))
        self._lives: dict[Path, Live] = {}
        self._lock = threading.Lock()

    def answer(self, request: Request) -> Response:
        """Refuses first, then finds the page."""
        if not self.guard.knows_host(request.headers.get("Host")):
            return refused(403, "this address is not of this machine")
        if self.guard.token is not None and (turned := self._with_token(request)):
            return turned
        if request.method == "POST" and not is_own_page(request.headers):
            return refused(403, "only its own page may ask")
        return self._page(request)

    def _with_token(self, request: Request) -> Response | None:
        """None where the request may pass. A token in the address becomes a cookie, and goes from the address."""
        given = request.first("token")
        if given and self.guard.knows_token(given):
            rest = {name: values for name, values in request.query.items() if name != "token"}
            address = f"{request.path}?{urlencode(rest, doseq=True)}" if rest else request.path
            headers = {"Location": "/" + address.lstrip("/\\"), "Set-Cookie": self.guard.set_cookie()}
            return Response(303, b"", TEXT, headers)
        if self.guard.knows_token(self.guard.token_in(request.headers.get("Cookie"))):
            return None
        return refused(403, "a token is needed: open the address that `qmedtune watch` printed")

    def _page(self, request: Request) -> Response:
        parts = [unquote(part) for part in request.path.split("/")[1:]]
        if parts[0] == "run" and len(parts) == 3:
            return self._of_run(request, parts[1], parts[2])
        if request.method != "GET":
            return refused(405, "only questions are posted")
        if parts == [""]:
            return self._first_page()
        if parts == ["parts"]:
            return _live(self._list, request)
        if parts == ["compare"]:
            return self._compare(request)
        return _asset(parts) or page(message_page("Not here", "There is no such page."), 404)

    def _first_page(self) -> Response:
        """The list; of a folder that is a run, that run."""
        if (alone := self.shelf.look(self.shelf.root)) is not None:
            return Response(303, b"", TEXT, {"Location": address(alone)})
        return page(list_page(str(self.shelf.root), json.loads(self._list.parts().body)))

    def _of_run(self, request: Request, name: str, what: str) -> Response:
        seen = self.shelf.named(name)
        if seen is None:
            return page(message_page("Not here", "There is no such run in this folder (any more)."), 404)
        if request.method == "POST":
            return self._asked(request, seen) if what == "ask" else refused(405, "only questions are posted")
        if what == "":
            return page(run_page(seen, json.loads(self._live_of(seen).parts().body)))
        if what == "parts":
            return _live(self._live_of(seen), request)
        if what == "rows":
            return self._rows(request, seen)
        if what == "ask":
            return page(ask_page(seen, self.pair.why_not(seen)))
        if what == "report":
            return page(_report(seen))
        return page(message_page("Not here", "There is no such page of a run."), 404)

    def _live_of(self, seen: Seen) -> Live:
        with self._lock:
            if seen.folder not in self._lives:
                self._lives[seen.folder] = Live(_Watched(self.shelf, seen))
            return self._lives[seen.folder]

    def _rows(self, request: Request, seen: Seen) -> Response:
        stages = packed_stages(seen)
        stage, row = request.first("stage"), request.first("row", "1")
        if stage not in stages:
            stage = stages[0] if stages else ""
        first = min(max(int(row), 1) - 1, 10**12) if row.isdecimal() and len(row) < 13 else 0
        requested = RequestedRows(stage, first, request.first("text") == "yes", self.clinical_text)
        try:
            drawn = rows_html(seen, requested) if stage else message("No stage is packed yet.")
        except (QmedtuneError, OSError, ValueError) as error:
            drawn = message(str(error) if isinstance(error, QmedtuneError) else "The rows cannot be read now.")
        return page(rows_page(seen, stages, requested, drawn))

    def _asked(self, request: Request, seen: Seen) -> Response:
        if request.headers.get("Content-Type") != JSON:
            return refused(415, "a question is JSON")
        try:
            question = json.loads(request.body)["question"]
        except (ValueError, KeyError, TypeError):
            return refused(400, 'a question is {"question": TEXT}')
        if not isinstance(question, str) or not question.strip():
            return refused(400, "the question is empty")
        pieces = self.pair.ask(seen, question)
        return Response(200, (json.dumps(piece._asdict()).encode() + b"\n" for piece in pieces), LINES)

    def _compare(self, request: Request) -> Response:
        folders = []
        for name in request.query.get("run", []):
            if seen := self.shelf.named(name):
                folders.append(seen.folder)
        try:
            runs = sides(folders)
            return page(compare_page(compare(runs), runs))
        except QmedtuneError:
            return page(message_page("Compare", "Tick two runs or more in the list."))


class _Watched:
    """Renders the parts of one run, following its curves."""

    def __init__(self, shelf: Shelf, seen: Seen) -> None:
        self._shelf, self._last, self._follower = shelf, seen, Follower()

    def __call__(self) -> dict[str, str]:
        self._last = self._shelf.look(self._last.folder) or self._last
        return run_parts(self._last, self._follower.stages(self._last))


def message(text: str) -> Any:
    from qmedtune.reporting.charts import Html, esc

    return Html(f'<p class="note">{esc(text)}</p>')


def _report(seen: Seen) -> str:
    from qmedtune.reporting import unfinished

    run = unfinished.read_run(seen.folder)
    return report_page(run, unfinished.read_metrics(seen.folder, run))


def _live(live: Live, request: Request) -> Response:
    rendered = live.parts()
    tag = {"ETag": f'"{rendered.tag}"'}
    if request.headers.get("If-None-Match") == tag["ETag"]:
        return Response(304, b"", JSON, tag)
    return Response(200, rendered.body, JSON, tag)


def _asset(parts: list[str]) -> Response | None:
    here = files("qmedtune.watching")
    if parts == ["watch.js"]:
        return Response(200, (here / "watch.js").read_bytes(), "text/javascript; charset=utf-8")
    if parts == ["watch.css"]:
        return Response(200, CSS.encode() + (here / "watch.css").read_bytes(), "text/css; charset=utf-8")
    if parts == ["icon.svg"]:
        return Response(200, ICON.encode(), "image/svg+xml")
    return None


class Handler(BaseHTTPRequestHandler):
    """HTTP around a Site."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "qmedtune", ""
    timeout = IDLE_S

    def do_GET(self) -> None:
        self._handle("GET", b"")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            self.close_connection = True
            return self._send(refused(413, f"a question has at most {MAX_BODY:,} bytes"))
        self._handle("POST", self.rfile.read(int(length)))

    def _handle(self, method: str, body: bytes) -> None:
        split = urlsplit(self.path)
        request = Request(method, split.path, parse_qs(split.query), self.headers, body)
        try:
            response = self.server.site.answer(request)
        except Exception as error:  # noqa: BLE001 - a page that fails must not end the others; no text of it is told
            response = refused(500, f"this page failed ({type(error).__name__})")
        self._send(response)

    def _send(self, response: Response) -> None:
        try:
            self.send_response(response.status)
            for name, value in {**SECURITY, "Content-Type": response.kind, **response.headers}.items():
                self.send_header(name, value)
            if isinstance(response.body, bytes):
                if response.status != 304:
                    self.send_header("Content-Length", str(len(response.body)))
                self.end_headers()
                self.wfile.write(response.body)
            else:
                self.send_header("Connection", "close")  # the end of the connection is the end of the answer
                self.end_headers()
                self.close_connection = True
                for line in response.body:
                    self.wfile.write(line)
                    self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError, TimeoutError):  # the reader went away
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Logs no request.

        Nothing: addresses can hold a token, and nobody reads it.
        """


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__((host, port), Handler)
        self.site: Site

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores errors of a connection.

        Nothing: a reader that went away in the middle is no news, and a traceback could quote what was asked.
        """
