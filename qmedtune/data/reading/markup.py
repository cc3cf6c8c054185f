"""What markup means, as plain text: raised and lowered numbers, fractions, citations.

`10<sup>9</sup>` is no 109: a raised or lowered number that would touch another is written in Unicode's digits, or with
`^`; all others read as they are printed (m2, CO2, 131I). Citations are what the markup says they are: no pattern
guesses at `[8-15]`, which may be an interval. Author-year citations are words of their sentence and stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

RAISED = str.maketrans("0123456789+-−–=()ni", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁻⁼⁽⁾ⁿⁱ")
LOWERED = str.maketrans("0123456789+-−–=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₋₌₍₎")
SIGNS = "+-−–"
CITED = "\ufdd0"  # a noncharacter of Unicode stands for a citation until its brackets are gone with it
# A number, or several as a list or range; of four digits it is a year, which belongs to an author's name.
NUMBER = re.compile(
    r"[\s\[(]*+[A-Za-z]?\d{1,3}[a-z]?(?:[\s,;–—‐−-]++(?:and\s++)?\[?[A-Za-z]?\d{1,3}(?!\d)[a-z]?\]?)*+[\s\])]*+[,;.]?\s*+"
)
# Citations with what separates them, and the brackets (and one blank before) that hold nothing else.
MORE = rf"(?:\s*+(?:[,;–—‐−-]|and|&)?\s*+{CITED})*+"
BRACKETED = re.compile(
    rf"\s?\[\s*+{CITED}{MORE}\s*+\]|\s?\(\s*+{CITED}{MORE}\s*+\)|\s?{CITED}{MORE}(?=[\s.,;:)\]]|$)|{CITED}{MORE}"
)
# `1-` before and `-3` after a citation inside one `sup`: a range of which one end is a link.
RANGE_ENDS = re.compile(rf"^\s*\d+\s*[,;–—-]\s*(?={CITED})|(?<={CITED})\s*[,;–—-]\s*\d+\s*$")
INLINE = frozenset(
    (
        "italic",
        "bold",
        "sc",
        "underline",
        "styled-content",
        "named-content",
        "xref",
        "ext-link",
        "monospace",
        "b",
        "i",
        "u",
    )
    + ("sup", "sub", "overline", "roman", "sans-serif", "abbrev", "email", "uri")
)


def is_number(text: str) -> bool:
    """Whether the text of a citation is a number or a list or range of numbers, and no name."""
    return NUMBER.fullmatch(text) is not None


def without_marks(text: str) -> str:
    """The text without the marks of citations, nor the brackets that hold nothing else."""
    return BRACKETED.sub("", text) if CITED in text else text


def without_citations(text: str, places: Iterable[tuple[int, int]]) -> str:
    """The text without those of the places that are numbers."""
    parts, at = [], 0
    for start, end in sorted(places):
        if start >= at and is_number(text[start:end]):
            parts += [text[at:start], CITED]
            at = end
    return without_marks("".join([*parts, text[at:]]))


def resolve(root: Any, is_citation: Any, raised: str = "sup", lowered: str = "sub") -> None:
    """Put into the elements below `root`, as text, what their markup means. Marks of citations stay for
    `without_marks`, which is asked of each whole paragraph."""
    for cited in list(root.iter("xref", "ref")):
        if is_citation(cited) and is_number("".join(cited.itertext())):
            _become(cited, CITED)
    for formula in list(root.iter("{http://www.w3.org/1998/Math/MathML}math", "math")):
        _become(formula, _math(formula))
    for element in list(root.iter(raised, lowered)):
        _script(element, element.tag == raised)


def _become(element: Any, text: str) -> None:
    """Replace what an element holds by a text; what follows it stays."""
    element.clear(keep_tail=True)
    element.text = text


def _script(element: Any, is_raised: bool) -> None:
    said = "".join(element.itertext()).strip()
    mark = ""
    if CITED in said:
        mark, said = CITED, without_marks(RANGE_ENDS.sub("", said)).strip(" \t\n,;[]()–—-")
    is_number = said[:1].isdecimal() or (said[:1] in SIGNS and said[1:2].isdecimal())
    if is_number and (_touches(_before(element)) or _after(element).isdecimal()):
        _become(element, written(said, is_raised) + mark)
    elif mark and not said:
        _become(element, mark)


def _touches(before: str) -> bool:
    """Whether a number behind this character would be read together with it."""
    return before.isdecimal() or (before != "" and before in ")]")


def written(text: str, is_raised: bool) -> str:
    """A raised or lowered number in Unicode's digits; with `^` or `_` where those do not do."""
    digits = text.translate(RAISED if is_raised else LOWERED)
    if all(not char.isascii() for char in digits):
        return digits
    return f"{'^' if is_raised else '_'}{text}"


def _before(element: Any) -> str:
    """The character before an element in its paragraph; "" at its start."""
    while True:
        earlier = element.getprevious()
        while earlier is not None:
            text = "".join(earlier.itertext()) if not earlier.tail and isinstance(earlier.tag, str) else earlier.tail
            if text:
                return text[-1]
            earlier = earlier.getprevious()
        parent = element.getparent()
        if parent is None or parent.text:
            return parent.text[-1] if parent is not None else ""
        if parent.tag not in INLINE:
            return ""
        element = parent


def _after(element: Any) -> str:
    """The character after an element in its paragraph; "" at its end."""
    while True:
        if element.tail:
            return element.tail[0]
        later, parent = element.getnext(), element.getparent()
        if later is not None:
            text = "".join(later.itertext()) if later.tag in INLINE else ""
            return text[:1]
        if parent is None or parent.tag not in INLINE:
            return ""
        element = parent


# ---- MathML ----------------------------------------------------------------------------------------------------------


def _math(element: Any) -> str:
    """A formula in one line: `10^9`, `x_1^2`, `(a + b)/2`, `sqrt(2)`."""
    name = etree.QName(element).localname if isinstance(element.tag, str) else ""
    if name == "semantics" and len(element):
        return _math(element[0])
    if name in ("annotation", "annotation-xml", ""):
        return ""
    parts = [_math(child) for child in element if isinstance(child.tag, str)]
    if not parts:
        return " ".join((element.text or "").split())
    form = FORMS.get(name)
    if form and len(parts) >= form.count("{"):
        held = [_grouped(part) for part in parts] if name != "msqrt" else [" ".join(parts)]
        return form.format(*held)
    if name == "mtr":
        return ", ".join(parts)
    if name == "mtable":
        return "; ".join(parts)
    if name == "mfenced":
        return f"{element.get('open', '(')}{', '.join(parts)}{element.get('close', ')')}"
    return _row(parts)


FORMS = {
    "msup": "{}^{}", "msub": "{}_{}", "msubsup": "{}_{}^{}", "mfrac": "{}/{}", "msqrt": "sqrt({})",
    "mroot": "root({}, {})", "munder": "{}_{}", "munderover": "{}_{}^{}",
}  # fmt: skip


def _row(parts: list[str]) -> str:
    """Neighbours in a row; a blank between two numbers, which would read as one."""
    joined = ""
    for part in parts:
        apart = joined[-1:].isdecimal() and part[:1].isdecimal()
        joined += f" {part}" if apart else part
    return joined


def _grouped(part: str) -> str:
    """Brackets around what is more than one sign or number."""
    return part if re.fullmatch(r"[^\W_]+(?:\.\d+)?|[-−+]?\d+(?:[.,]\d+)?|\(.*\)|.", part) else f"({part})"
