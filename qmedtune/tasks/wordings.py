"""How answers in English are worded: what marks an answer up, opens it, states an option, denies it or calls it right.

Patterns alone, for extract.py, which says what they mean together.
"""

from __future__ import annotations

import re

# ---- the text, without what is no answer ----------------------------------------------------------------------------

# How answers are marked up, as words that the patterns below know. First: an opened tag, key or box names an answer.
TAG = r"(?:final_?|my_?)?(?:answer|choice|option|decision|label|prediction|final)"
MARKED = (
    (re.compile(rf"\\boxed\s*\{{|<\s*\|?\s*{TAG}\s*\|?\s*>|\[\s*{TAG}\s*\]", re.I), " answer: "),
    (re.compile(rf"<\s*\|?\s*/\s*{TAG}\s*\|?\s*>", re.I), " \n"),
    (re.compile(r"</?\s*(?:b|strong|i|em|u|p|br|span|code|pre)\s*/?>", re.I), " "),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{|\\[()\[\]]"), " "),
    (re.compile(r"[*`$\"\u201c\u201d{}#>]|_|(?<!\w)'+|'+(?!\w)"), " "),
)
HEADING = r"(?:next\s+|new\s+)?(?:question|instruction|input|human|user|patient|abstract|context|passage|example|"
HEADING += r"problem|case)"
NEXT_QUESTION = re.compile(rf"^\W*(?:{HEADING}\b(?:\s*(?:no\.?|number)?\s*\d+)?\s*[:.)]|Q\s*\d*\s*[:.)])", re.I | re.M)
BULLET = r"^[ \t]*(?:[-\u2022+][ \t]+|\d{1,2}[.)][ \t]+)?"
LIST_LETTER = re.compile(BULLET + r"[(\[]?(?:option[ \t]+)?(?P<letter>[A-Za-z])[)\].:][)\].:]*(?=\s|$)", re.I)
BETWEEN = r"[ \t]*(?:(?:[,/;|&-]|\b(?:(?:and|or|nor)\b|vs\b\.?))[ \t]*)+"
MENU = "\x00"  # stands where a menu was

# ---- how an option is stated ----------------------------------------------------------------------------------------

NOUN = r"(?:answer|option|choice|decision|diagnosis|response|conclusion|verdict|label|prediction)"
COPULA = r"(?:is|was|are|would[ ]+be|should[ ]+be|must[ ]+be|will[ ]+be|be|:|=|-|\u2013)"
FILLER = (
    r"(?:likely|probably|most[ ]+likely|therefore|thus|clearly|definitely|indeed|simply|option|choice|letter|answer|"
)
FILLER += r"either|both|neither|(?-i:an?)(?=\s+\w)|the|that|:|-)"
CUE = re.compile(
    rf"\b{NOUN}\b(?:\s+(?:idx|index|key|letter))?(?:\s+(?:to|for|of|here|in|among|from|given|based)\b[^.:\n]{{0,90}}?|\s*\([^)\n]{{0,20}}\))?"
    rf"\s*(?:\b{COPULA}(?!\w)|[:=\u2013\u2014-]|'s\b)[ \t\n]*(?P<denied>not\b|n't\b)?"
    rf"(?:[ \t\n]*\b{FILLER}(?!\w)|[ \t\n]*[:(\[]+)*[ \t\n(\[]*",
    re.I,
)
CHOSEN = re.compile(
    r"\b(?:I|we)\b[^.\n]{0,20}?\b(?:choose|select|pick|chose|selected|picked|say|vote\s+for|go\s+with|opt\s+for|answer)\s+"
    r"(?:(?:the|option|answer|choice|letter|with|for)\s+)*[(\[]?"
    r"|\b(?:I|we)\s+(?:think|believe|guess)\s+(?:that\s+)?(?:it(?:'s|\s+is)\s+)?[(\[]?"
    r"|^\W*(?:most\s+likely|probably|likely|definitely|clearly)[:,]?\s+[(\[]?"
    r"|^\W*(?:(?:correct|final|solution|result|ans)\s*[:=]|ans\.)\s*[(\[]?"
    r"|^\W*(?:it|this|that)(?:'s|\s+is)\s+(?:an?\s+)?"
    r"|\b(?:most|best|primary|underlying|correct|right|first|next|initial|preferred)\b[^.\n:]{0,90}?\b(?:is|be|was|are)\s+"
    r"(?:(?:likely|probably|a|an|the|to|option|called|most\s+likely)\s+)*[(\[]?",
    re.I | re.M,
)
OPENING = r"so|thus|therefore|hence|ok|okay|sure|well|probably|(?:un)?fortunately|overall|finally|to\s+conclude|"
OPENING += r"in\s+(?:short|summary|conclusion)"
OPENED = re.compile(rf"(?:(?:{OPENING})\b)?[,:]?\s*(?:(?:{NOUN})\s*[:(]*\s*)?", re.I)
SENTENCE_END_LETTER = re.compile(
    r"(?:\b(?:is|be|are|was|[Tt]herefore|[Tt]hus|[Hh]ence|[Ss]o)|'s)\s+"
    r"(?:option\s+)?[(\[]?(?P<letter>[A-Z])[)\]]?\s*(?=[.!]?\s*(?:$|\n)|\. )"
)
LETTER_TEXT = re.compile(
    r"[)\].:]\s*[^.\n]{1,60}?(?=\s+(?:is|was|would\s+be)\s+the\s+)"
)  # "D. postnatal apnea is the ..."
INSTEAD = re.compile(r"[^.\n]{0,60}?\bbut\s+(?:rather\s+|is\s+)?[(\[]?", re.I)
IS_RIGHT = re.compile(
    r"[)\].:,]*\s*(?:is|was|are|would\s+be|seems|appears(?:\s+to\s+be)?|looks|must\s+be)\s+"
    r"(?:(?:therefore|thus|clearly|indeed|probably|likely|definitely|also|both)\s+)*(?:the\s+)?(?:only\s+|single\s+|one\s+)?"
    r"(?:correct|right|best|true|accurate|answer\b|most\s+(?:likely|appropriate|accurate|suitable|probable|correct)|my\s+(?:answer|choice))",
    re.I,
)
IS_WRONG = re.compile(
    r"[ \"')\].,:]*\s*(?:this|that|which|it|(?:this|that)\s+(?:answer|option|choice))?\s*"
    r"(?:is|was|can|could|would|does|do)"
    r"(?:\s+(?:therefore|thus|clearly|be|been))*(?:\s+not\b|n['\u2019]t\b|\s+(?:wrong|incorrect|false|unlikely|ruled\s+out|"
    r"contraindicated|inappropriate|harmful|inferior|to\s+be\s+avoided)\b)",
    re.I,
)
DENIED_IN_SENTENCE = re.compile(r"(?:\b(?:not|never|neither|nor|cannot|avoid\w*)\b|n['\u2019]t\b)[^.;\n]*$", re.I)
# "Aspirin is given with ...": an option as what a sentence is about, and no answer where the sentence names another.
SUBJECT = re.compile(r"\s+(?:is|are|was|were|can|could|may|might|should|will|would|and|with|plus)\b", re.I)
REASON = re.compile(r"\b(?:because|since|as|whereas|while|unlike|rather\s+than|instead\s+of|but|not)\b", re.I)
REVISED = re.compile(r"\b(no|wait|actually|correction|sorry|rather|hmm)\b\s*[,:.!-]\s*[^.\n]{0,40}$", re.I)
DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|no|nor|never|neither|without|lack\s+of|absence\s+of|rather\s+than|instead\s+of|rul\w+\s+out|exclud\w+|"
    r"against)|n['\u2019]t)(?:\s+(?:be|is|a|an|the|to|due|of|caused|by))*[ \"'(]*$",
    re.I,
)
# What may follow an option of an everyday word without a sign between: "no it does not", but never "no evidence".
AFTER_WORD = r"(?=\s*(?:$|\.(?!\s*of\b)|[\n,;:!?)\]|\u2013\u2014]|-(?:\s|$)|"
AFTER_WORD += r"\((?:very|high|low|moderate|medium|confiden\w+|p\s*[<=]))|"
AFTER_WORD += r"\s+(?:because|since|as|it|they|this|these|that|there|he|she|we|you|i|the|for|in|to|is|was)\b)"
AFTER_LETTER = r"(?=\s*[)\].:;!|,]|\s*$|[ \t]*\n|\s+[-\u2013\u2014]\s|"
AFTER_LETTER += r"\s+(?:because|since|(?:and|but)\s+not|not|rather)\b)"
# Species of medicine whose genus is written as the letter of an option: "C. difficile" is not option C.
SPECIES = re.compile(
    r"\.\s+(?:actinomycetemcomitans|baumannii|fumigatus|flavus|israelii|lumbricoides|phagocytophilum|anthracis|burgdorferi|"
    r"canis|cepacia|cereus|fragilis|henselae|hominis|microti|pertussis|pseudomallei|quintana|albicans|auris|botulinum|"
    r"burnetii|coli|diff(?:icile)?|diphtheriae|freundii|glabrata|immitis|jejuni|neoformans|parvum|perfringens|psittaci|tetani|"
    r"trachomatis|latum|medinensis|chaffeensis|cloacae|faecalis|faecium|granulosus|histolytica|vermicularis)\b"
)
EVERYDAY_CHARS = 5
SHORT_ANSWER_WORDS = 15
MENTION_CHARS = 6
