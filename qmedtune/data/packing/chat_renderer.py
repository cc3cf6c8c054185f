"""The process that renders chat templates (chat_template.py starts it): a sandbox with bounds, and nothing of qmedtune.

Reads lines of JSON from stdin: first the template with its bounds, then requests {"calls": [[messages, ask], ...]}.
Writes a line per request: {"texts": [...]}, {"refused": why} where the template itself refuses a conversation, or
{"broken": why}. What a template refuses with is quoted where the words are the template's own; all else may quote the
conversation and is told by its kind.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from datetime import date
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateRaised(Exception):
    """`raise_exception` was called."""


class GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`, which transformers knows: here its content alone."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def environment(day: date) -> ImmutableSandboxedEnvironment:
    """As transformers sets it up, but for the date."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _refuse, "strftime_now": day.strftime}
    return made


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators)


def _refuse(message: str) -> None:
    raise TemplateRaised(message)


def serve() -> None:
    first = json.loads(sys.stdin.readline())
    limit = first["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.setrecursionlimit(500)
    try:
        render = environment(date.fromisoformat(first["date"])).from_string(first["source"]).render
    except (TemplateError, MemoryError, RecursionError, ValueError, OverflowError) as error:
        render = _broken(f"{type(error).__name__} at line {getattr(error, 'lineno', '?')}")
    for line in sys.stdin:
        print(json.dumps(_reply(render, json.loads(line)["calls"], first)), flush=True)


def _broken(why: str) -> Callable[..., str]:
    def render(**_: Any) -> str:
        raise SyntaxError(why)

    return render


def _reply(render: Callable[..., str], calls: list[Any], first: dict[str, Any]) -> dict[str, Any]:
    try:
        texts = []
        for m, ask in calls:
            texts.append(render(messages=m, add_generation_prompt=ask, **first["tokens"]))
    except TemplateRaised as error:
        words = str(error)
        own = words in first["source"]
        return {"refused": words[:200] if own else "(in words that are not all its own, and are not repeated here)"}
    except SyntaxError as error:
        return {"broken": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever another's program raises is told by its kind
        return {"broken": type(error).__name__}
    if any(len(text) > first["max_text"] for text in texts):
        return {"broken": f"a text of more than {first['max_text']:,} characters"}
    return {"texts": texts}


if __name__ == "__main__":
    serve()
