"""The words of a person's name, taken one by one, and the names that are joined to one: `Smith/Jones`, `Smith and Jones`.

Where a name begins, something else has said (persons.py, headers.py). Matched is the plain copy (plain.py).
"""

# ruff: noqa: E501 (a pattern reads better in one piece)

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from qmedtune.data.hygiene.header_labels import ENDS
from qmedtune.data.hygiene.words import ACRONYMS, EPONYMS, NEVER, SURNAMES

MAX_WORDS = 6
WORD = re.compile(
    r"(?:(?:al|el|as|ad|an|ar|ash|ben|d|l)[-'])?[A-Z][A-Za-z]{0,30}(?:['-][A-Za-z]{1,30}){0,3}(?![A-Za-z0-9_])", re.A
)
SHORTENED = re.compile(r"[A-Z][a-z]{0,3}\.[ao](?=[ ][A-Z])", re.A)  # `M.a Jose`
SMALL = re.compile(r"[a-z]{2,30}(?:['-][a-z]{1,30}){0,2}(?![A-Za-z0-9_'-])", re.A)
PARTICLE = re.compile(
    r"(?:van|von|vom|zu|der|den|de|la|le|los|las|del|della|di|da|dos|das|do|du|bin|ibn|bint|al|el|ten|ter|ap|y|e|S[tT]\.)"
    r"(?:[ ](?:der|den|la|las|los|de))?[ ](?=[A-Z])",
    re.A,
)
SUFFIX = re.compile(r",?[ ](?:Jr|JR|Sr|SR)\.?(?![A-Za-z])|,?[ ](?:II|III|IV)(?![A-Za-z])", re.A)
POSSESSIVE = re.compile(r"'[sS]$")
DEGREE_INSIDE = re.compile(r"[ ](?:MD|DO|RN|NP|PA|PA-C|PhD|FNP|LPN|MBBS),[ ](?=[A-Z])", re.A)  # `Smith MD, Jane`
EPONYM = re.compile(
    r"(?:'?s)?[ ](?:disease|syndrome|sign|test|palsy|thyroiditis|lymphoma|esophagus|contracture|fracture|catheter|tube|"
    r"dementia|chorea|maneuver|score|scale|phenomenon|ulcer|criteria)",
    re.I | re.A,
)
# Between a label and a name; a letter or two, so only there: `Patient: mw. J. de Wit`.
TITLE_BEHIND = re.compile(
    r"(?i:mw|mevr|mevrouw|dhr|herrn?|frau|hr|fr|mme|mlle|monsieur|madame|sig|sigra|signora?|sra?|dra|don|dona|pan|pani|mrs?|ms|"
    r"miss|dr|drs|prof|pr|dott(?:\.ssa)?|lek|mudr|mgr|med|smt|shri|sh|late|sir|nurse|sister|rev|capt|sgt|uzm|op|doc)"
    r"(?:\.[ ]{0,2}|[ ])(?=[A-Za-z])",
    re.A,
)
FIELD_END = re.compile(r"[ ]{0,3}(?:$|[\n;,.|(\"<\]]|[ ]{2})")
# Generic names of drugs end so (INN stems); one of them alone is nobody's name.
DRUG = re.compile(
    r"[a-z]{2}(?:olol|pril|sartan|statin|azole|cillin|mycin|oxacin|gliptin|gliflozin|tidine|dipine|parin|zumab|"
    r"ximab|tinib|azepam|azolam|caine|semide|thiazide|codone|formin)$",
    re.I,
)
CREDENTIAL = re.compile(
    r"(?<=[A-Za-z.])(?:,[ ]{0,2}|[ ]{1,2}(?=M\.D|MD|RN|PhD|Ph\.D|D\.O|NP|PA-C|LCSW|PharmD|DNP|CRNA|FNP|MBBS))"
    r"(?:M\.D\.?|MD|D\.O\.|DO(?=[,.;)\n]|$)|RN|R\.N\.|BSN|PhD|Ph\.D\.?|N\.?P|NP-C|PA-C|P\.A\.|LCSW|MSW|Pharm\.?D|DNP|CRNA|"
    r"FNP|APRN|ARNP|MBBS|MBChB|FACC|FACS|FACP|FRCP|FRCS|DDS|DMD|DPM|LPN|CNM|MPH|RPh|RRT|OTR|DPT|PsyD|CCRN)(?![A-Za-z0-9_])",
    re.A,
)


@dataclass(frozen=True)
class NameRules:
    """What may be part of a person's name at one place of a text.

    titled: the first word may be a surname that is also a word. comma: `Last, First` is one name. small: words in small
    letters may be names. eponyms: so may what is known as a disease or a drug. wide: two spaces may stand inside."""

    titled: bool = False
    comma: bool = False
    small: bool = False
    eponyms: bool = True
    wide: bool = False


def take(text: str, at: int, rules: NameRules) -> int | None:
    """Where the name that begins at `at` ends; None where none begins there."""
    end, words = None, 0
    while words < MAX_WORDS:
        here = at
        while particle := PARTICLE.match(text, here):
            here = particle.end()
        match = (
            WORD.match(text, here) or SHORTENED.match(text, here) or (SMALL.match(text, here) if rules.small else None)
        )
        if match is None:
            break
        word = POSSESSIVE.sub("", match[0])
        first = end is None
        behind_comma = rules.comma and text[max(0, match.start() - 3) : match.start()].rstrip()[-1:] == ","
        never = is_never(word, titled=(rules.titled and first) or (behind_comma and words == 1))
        known = first and word.lower() in EPONYMS and not rules.eponyms and not text.startswith(", ", match.end())
        if never or known:
            break
        stop = match.start() + len(word)
        if len(word) == 1 and text[stop : stop + 1] == ".":
            stop += 1
        end, words = stop, words + 1
        if len(word) < len(match[0]):
            return end  # a possessive ends a name
        following = _next_word(text, end, rules.comma and words <= 4)
        if rules.wide and re.match(r"[ ]{2}[A-Z][a-z]", text[end : end + 4], re.A):
            following = end + 2
        if following is None:
            break
        at = following
    if end is not None and (suffix := SUFFIX.match(text, end)):
        end = suffix.end()
    return end


def _next_word(text: str, end: int, comma: bool) -> int | None:
    """Where the next word of a name may begin: one space on, or behind the comma of `Last, First`, or an initial's dot."""
    if comma and text[end : end + 3] == " , ":
        return end + 3
    if comma and (degree := DEGREE_INSIDE.match(text, end)):
        return degree.end()
    if comma and text[end : end + 1] == "," and text[end + 1 : end + 2] not in (",", "\n", ""):
        at = end + 1 + (text[end + 1] == " ")
        if at < len(text) and text[at].isalpha():
            return at
        return None
    if text[end : end + 2] == '" ':
        return end + 2  # "Bunny" Hargreaves
    if text[end : end + 1] == " ":
        return end + 1
    if text[end - 1] == "." and text[end : end + 1].isalpha():
        return end  # J.K. Rowling
    if text[end : end + 2] == "-\n":
        return end + 1
    return None


def is_never(word: str, *, titled: bool = False) -> bool:
    """Whether a word is no part of a name. titled: it stands right behind a title."""
    bare = POSSESSIVE.sub("", word).strip(".,").lower()
    if len(bare) == 1:
        return False
    if titled:
        return bare in NEVER and bare not in SURNAMES
    if bare in ACRONYMS and not word.istitle():
        return True
    return bare in NEVER or ("-" in bare and bare.partition("-")[0] in NEVER)


def behind_titles(text: str, start: int) -> int:
    """Behind `mw. dr.`, `Prof. Dr. med.`, where a name begins after them."""
    at = start
    for _ in range(4):
        title = TITLE_BEHIND.match(text, at)
        if title is None:
            break
        at = title.end()
    return at if text[at : at + 1].isupper() else start


def before_next_label(text: str, start: int, end: int) -> int | None:
    """Where the name ends that runs into the label of the next field: `Smith, John Birth Date:` -> `Smith, John`."""
    if not re.match(r"[ ]{0,3}[:=#]", text[end : end + 5]):
        return end
    if re.search(r"[a-z][A-Z][A-Za-z]*$", text[start:end], re.A):
        return end  # `MartinezNoCol:` cannot be cut: no span ends between two letters
    at = end
    while at > start:
        first = max(text.rfind(" ", start, at), text.rfind(",", start, at)) + 1
        word = text[max(first, start) : at]
        if word.lower() not in ENDS and not is_never(word):
            return at if at < end or at > start + len(word) else None  # a name of one word before a colon is a label
        at = first
        while at > start and text[at - 1] in " ,":
            at -= 1
    return None


# Between two names of one field; behind the first may stand degrees. A semicolon may also end the field.
_LINK = re.compile(
    r"(?:[ ]{0,2}(?P<sign>[/&+;])[ ]{0,2}|[ ]{0,2},?[ ]{1,2}(?:and|und|et|y|e|or|oder|ou|AND|&)[ ]{1,2})"
    rf"(?=[A-Z]|{PARTICLE.pattern})",
    re.A,
)
_CAPITALS = re.compile(r"[A-Z]{2,}(?![A-Za-z])", re.A)
_COMMA = re.compile(r",[ ](?P<sign>)(?=[A-Z])", re.A)
MAX_JOINED = 20


def joined(text: str, first: tuple[int, int], rules: NameRules) -> list[tuple[int, int]]:
    """The name text[first[0]:first[1]] and those that are joined to it, each whole; empty where one of them begins like
    a name and has not its form: a list of which a part stays readable would look redacted."""
    found, end = [first], first[1]
    for _ in range(MAX_JOINED):
        at = _behind_degrees(text, end)
        link = _LINK.match(text, at)
        if link is None and text.count(",", found[-1][0], end) >= 3:  # so many surnames that `take` has stopped
            link = _COMMA.match(text, at)
        if link is None:
            return found
        start = behind_titles(text, link.end())
        stop = take(text, start, replace(rules, titled=start > link.end(), eponyms=True))
        if stop:
            stop = before_next_label(text, start, stop)
            if not stop:
                break
        elif _is_other_word(text, start):
            break
        else:
            return []
        if _is_street(text, link, stop):  # `Moreno C/ Pablo Laloux, 13`
            break
        if not _goes_on(text, (start, stop), link["sign"]) or _is_abbreviation(text, first, (start, stop)):
            break
        found.append((start, stop))
        end = stop
    else:
        return []
    return found


def _behind_degrees(text: str, at: int) -> int:
    for _ in range(3):
        degree = CREDENTIAL.match(text, at)
        if degree is None:
            break
        at = degree.end()
    return at


def _is_other_word(text: str, start: int) -> bool:
    """Whether a word that is no part of a name stands there: `Smith/Cardiology`."""
    match = WORD.match(text, start)
    return match is not None and (is_never(match[0]) or bool(re.match(r"[ ]?:", text[match.end() : match.end() + 2])))


def _goes_on(text: str, place: tuple[int, int], sign: str | None) -> bool:
    """Whether what stands behind a link is a person, and no disease, no drug and no other field."""
    start, end = place
    value = text[start:end]
    if EPONYM.match(text[end : end + 16]):
        return False
    if re.search("[ ,]", value):
        return True
    if DRUG.search(value):
        return False
    return sign != ";" or (value.lower() not in EPONYMS and FIELD_END.match(text[end : end + 6] or "\n") is not None)


def _is_street(text: str, link: re.Match[str], stop: int) -> bool:
    """Whether `C/` is a street of Spain: a house number stands in the same line, or none does (`s/n`)."""
    if text[max(0, link.start() - 2) : link.end()].strip() != "C/":
        return False
    return re.match(r"[^\n:]{0,40}?(?:\d|[sS]/[nN])", text[stop : stop + 48], re.A) is not None


def _is_abbreviation(text: str, first: tuple[int, int], place: tuple[int, int]) -> bool:
    """`Smith/CTS`; in a text of capitals it may be a surname."""
    value = text[place[0] : place[1]]
    return len(value) <= 3 and value.isupper() and not text[first[0] : first[1]].isupper()


def beside_capitals(text: str, start: int, end: int) -> bool:
    """Whether a slash joins one word to an abbreviation, so that it is no name itself: `Droplet/MRSA`, `OOB/BRP`."""
    if re.search("[ ,]", text[start:end]):
        return False
    slash = re.match(r"[ ]?/[ ]?(?=[A-Z]{2})", text[end : end + 5], re.A)
    if slash is None:
        return False
    behind = _CAPITALS.match(text, end + slash.end())
    if behind is None or re.match(r"[ ]?[:#]", text[behind.end() : behind.end() + 2]):
        return False  # no capitals, or the label of the next field
    return min(len(behind[0]), end - start) <= 3 or is_never(behind[0])
