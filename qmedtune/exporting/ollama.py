"""An Ollama Modelfile: the trained template in Ollama's own language, and the marks that end its answers.

Ollama cannot run Jinja. Whatever the template is, one question (with or without a system message) is written as it is
asked in training, Ollama's variables standing for the words. Deliberately not here: several turns, which Ollama puts
together from one of these after the other.
"""

from __future__ import annotations

import json

from qmedtune.data.packing.framing import Frame
from qmedtune.errors import DataError

PROMPT, SYSTEM = "{{ .Prompt }}", "{{ .System }}"


def modelfile(frame: Frame, model: str) -> str:
    """The prompt in the template, greedy, ended as the template ends. model: what stands behind FROM."""
    asked = _asked(frame, [{"role": "user", "content": PROMPT}])
    with_system = _asked(frame, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}])
    text = asked
    if with_system is not None and SYSTEM in with_system:
        text = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{asked}{{{{ end }}}}"
    lines = [f"FROM {model}", f'TEMPLATE """{text}"""']
    marks = [str(frame.codec.backend.id_to_token(token)) for token in sorted(frame.ends)]
    for mark in dict.fromkeys([*marks, *frame.template.stop]):
        lines.append(f"PARAMETER stop {json.dumps(mark)}")
    return "\n".join([*lines, "PARAMETER temperature 0", ""])


def _asked(frame: Frame, messages: list[dict[str, str]]) -> str | None:
    """None where the template has no place for such a message."""
    try:
        [asked] = frame.ask([messages])
    except DataError:
        return None
    codec = frame.codec
    alone = codec.backend.encode("a", add_special_tokens=True).ids
    if codec.bos_id is None or alone[0] != codec.bos_id:
        return asked.text
    bos = codec.backend.id_to_token(codec.bos_id) or ""
    return asked.text.removeprefix(bos)  # Ollama puts it there, as the file asks
