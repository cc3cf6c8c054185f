"""What markup means, as plain text: raised and lowered numbers, fractions, citations.

`10<sup>9</sup>` is no 109: a raised or lowered number that would touch another is written in Unicode's digits, or with
`^`; all others read as they are printed (m2, CO2, 131I). Citations are what the markup says they are: no pattern
guesses at `[8-15]`, which may be an interval. Author-year citations are words of their sentence and stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

RAISED = str.maketrans("0123456789+-−–=()ni", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁻⁼⁽⁾ⁿⁱ")
LOWERED = str.maketrans("0123456789+-−–=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₋₌₍₎")
SIGNS = "+-−–"
CITED = "\x7f"  # stands for a citation until its brackets are gone with it: in ASCII, so that ASCII text stays so
# A number, or several as a list or range; of four digits it is a year, which belongs to an author's name.
NUMBER = re.compile(
    r"[\s\[(]*+[A-Za-z]?\d{1,3}[a-z]?(?:[\s,;–—‐−-]++(?:and\s++)?\[?[A-Za-z]?\d{1,3}(?!\d)[a-z]?\]?)*+[\s\])]*+[,;.]?\s*+"
)
BETWEEN = re.compile(r"\s*+(?:[,;–—‐−-]|and|&)?\s*+")  # what separates the citations of one place
IN_BRACKETS = re.compile(
    rf" \[{CITED}(?:[,;–-] ?{CITED})*+\]"
)  # nine of ten; its three first characters are searched fast
USUAL = frozenset((",", ", ", "–", "-", ";", "; "))
BRACKETS = {"[": "]", "(": ")"}
CLOSING = ".,;:)]"
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
    """The text without the marks of citations, nor the brackets that hold nothing else, nor a blank before them."""
    if CITED not in text:
        return text
    text = IN_BRACKETS.sub("", text)
    if CITED not in text:
        return text
    first, *rest = text.split(CITED)
    kept = [first]
    for number, piece in enumerate(rest):
        if number < len(rest) - 1 and (piece in USUAL or BETWEEN.fullmatch(piece)):
            continue
        kept[-1], piece = _joined(kept[-1], piece)
        kept.append(piece)
    return "".join(kept)


def lines_and_cells(text: str) -> str:
    """The lines that are not empty, with the spaces in them collapsed; tabs part the cells of a table's row."""
    lines = []
    for line in text.split("\n"):
        lines.append(_cells(line))
    return "\n".join(line for line in lines if line)


def _cells(line: str) -> str:
    return "\t".join(" ".join(cell.split()) for cell in line.split("\t")).strip()


def _joined(before: str, after: str) -> tuple[str, str]:
    """What stands before and after citations that are taken out."""
    opened, closed = before.rstrip(), after.lstrip()
    if opened and closed and BRACKETS.get(opened[-1]) == closed[0]:
        before, after = opened[:-1], closed[1:]
    elif closed == after and after and after[0] not in CLOSING:
        return before, after
    return before[:-1] if before[-1:].isspace() else before, after


def without_citations(text: str, places: Iterable[tuple[int, int]]) -> str:
    """The text without those of the places that are numbers."""
    parts, at = [], 0
    for start, end in sorted(places):
        if start >= at and is_number(text[start:end]):
            parts += [text[at:start], CITED]
            at = end
    return without_marks("".join([*parts, text[at:]]))


def resolve(root: Any, citation: tuple[str, str] | None = None) -> None:
    """Put into the elements below `root`, as text, what their markup means. Marks of citations stay for
    `without_marks`, which is asked of each whole paragraph.

    citation: attribute and value of an `xref` or `ref` that is one; None where there are none.
    """
    if citation is not None:
        attribute, value = citation
        for cited in root.iter("xref", "ref"):
            if cited.get(attribute) != value:
                continue
            text = cited.text
            if text and len(text) <= 3 and text.isdecimal() and not len(cited):
                cited.text = CITED  # three of four
            elif is_number(_words(cited)):
                _become(cited, CITED)
    for formula in list(root.iter("{http://www.w3.org/1998/Math/MathML}math", "math")):
        _become(formula, _math(formula))
    for element in root.iter("sup", "sub"):
        _script(element, element.tag == "sup")


def _words(element: Any) -> str:
    """All text of an element; most have no children, and then it is one attribute."""
    if len(element):
        return "".join(element.itertext())
    return element.text or ""


def _become(element: Any, text: str) -> None:
    """Replace what an element holds by a text; what follows it stays."""
    if len(element):
        element.clear(keep_tail=True)
    element.text = text


def _script(element: Any, is_raised: bool) -> None:
    earlier, parent, after = element.getprevious(), element.getparent(), element.tail
    if earlier is None:
        before = parent.text
    else:
        before = earlier.tail
    if before and after and not len(element) and not _touches(before[-1]) and not after[0].isdecimal():
        return  # CO2 and m2: two thirds of all, told without looking further
    said = _words(element).strip()
    mark = ""
    if CITED in said:
        mark, said = CITED, RANGE_ENDS.sub("", said).replace(CITED, "").strip(" \t\n,;[]()–—-")
    is_number = said[:1].isdecimal() or (said[:1] in SIGNS and said[1:2].isdecimal())
    if is_number and (_touches(_before(element)) or _after(element).isdecimal()):
        _become(element, written(said, is_raised) + mark)
    elif mark and not said:
        _become(element, mark)
    elif said[-1:].isdecimal() and _after(element).isdecimal():
        element.tail = f" {element.tail or ''}"  # H-1 as an index, and 2.56 behind it


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
            if not earlier.tail and isinstance(earlier.tag, str):
                text = "".join(earlier.itertext())
            else:
                text = earlier.tail
            if text:
                return text[-1]
            earlier = earlier.getprevious()
        parent = element.getparent()
        if parent is None or parent.text:
            if parent is not None:
                return parent.text[-1]
            return ""
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
            if later.tag in INLINE:
                text = "".join(later.itertext())
            else:
                text = ""
            return text[:1]
        if parent is None or parent.tag not in INLINE:
            return ""
        element = parent


# ---- MathML ----------------------------------------------------------------------------------------------------------


def _math(element: Any) -> str:
    """A formula in one line: `10^9`, `x_1^2`, `(a + b)/2`, `sqrt(2)`."""
    if isinstance(element.tag, str):
        name = element.tag.rpartition("}")[2]
    else:
        name = ""
    if name == "semantics" and len(element):
        return _math(element[0])
    if name in ("annotation", "annotation-xml", ""):
        return ""
    parts = []
    for child in element:
        if isinstance(child.tag, str):
            parts.append(_math(child))
    if not parts:
        return " ".join((element.text or "").split())
    form = FORMS.get(name)
    if form and len(parts) >= form.count("{"):
        if name != "msqrt":
            held = []
            for part in parts:
                held.append(_grouped(part))
        else:
            held = [" ".join(parts)]
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
    if re.fullmatch(r"[^\W_]+(?:\.\d+)?|[-−+]?\d+(?:[.,]\d+)?|\(.*\)|.", part):
        return part
    return f"({part})"
