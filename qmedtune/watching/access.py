"""Who may look. By default this machine alone; from elsewhere whoever knows the token.

A page on the internet can make a browser send requests to 127.0.0.1, and can name itself 127.0.0.1 (DNS rebinding). So
the Host header must name this machine, whatever is asked for; what does something must come from our own page. With a
token neither helps: it stands in the address that `qmedtune watch` prints, and then in a cookie of this site.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Protocol

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HOST = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:]+)\]|(?P<name>[A-Za-z0-9.-]+))(?::\d{1,5})?")


class Headers(Protocol):
    """Those of a request, by name in any case."""

    def get(self, name: str, /) -> str | None: ...


@dataclass(frozen=True)
class Guard:
    """Access control of the live page.

    token: None where this machine alone can connect, and anyone on it may look.
    """

    port: int
    token: str | None

    @property
    def cookie(self) -> str:
        """Its name carries the port: cookies of one machine are shared by all ports."""
        return f"qmedtune-{self.port}"

    def knows_host(self, header: str | None) -> bool:
        """Over `ssh -L` the port may be another, so the name alone counts."""
        match = HOST.fullmatch(header or "")
        if match is None:
            return False
        return self.token is not None or (match["six"] or match["name"]).lower() in LOOPBACK

    def knows_token(self, given: str | None) -> bool:
        return self.token is None or secrets.compare_digest((given or "").encode(), self.token.encode())

    def token_in(self, cookies: str | None) -> str | None:
        try:
            morsel = SimpleCookie(cookies or "").get(self.cookie)
        except CookieError:
            return None
        return morsel.value if morsel else None

    def set_cookie(self) -> str:
        return f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"


def needs_token(host: str, *, clinical_text: bool) -> bool:
    """Other users of a shared machine reach 127.0.0.1 too: clinical text is never without a token."""
    return host not in LOOPBACK or clinical_text


def is_own_page(headers: Headers) -> bool:
    """Whether a request that does something comes from a page that we served."""
    host, origin = headers.get("Host"), headers.get("Origin")
    if host is None or origin not in (f"http://{host}", f"https://{host}"):
        return False
    return headers.get("Sec-Fetch-Site") in (None, "same-origin")


SECURITY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address may hold a token
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Sent with every answer. `unsafe-inline` for styles alone: marks of charts are placed by style attributes."""
