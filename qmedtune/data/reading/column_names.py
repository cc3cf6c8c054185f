"""Names of columns and keys that public medical files use, so that they may be shown.

The first line of a table without a header is data, names and diagnoses among it: what is not on these lists, nor made
of their words, is counted and never printed.
"""

from __future__ import annotations

import re
from functools import lru_cache

# Words that names of columns are made of: `note_text`, `SUBJECT_ID`, `sectionHeader`, `medical specialty`.
LISTED = """
binary hypothesis mortality nli premise readmission stay
a abs abstract abstracts accession ack activity actual added adm admission admit age all allergies annotation
annotations answer answerkey answers arch archive article articles arxiv assay assessment assigned assistant audio
author authors b back based bib bibliography bio birth body bot by c caption captions care case cat category cgid
chapter chart chartdate charttime chatdoctor chatgpt chief choice choices chosen chq citation citations cite class
classification clean clinical cls cmd code coded codes collection column comment comments comp company complaint
complete completion complex concept conclusion conclusions condition conditions config consult contact content
contents context contexts conversation conversations cop copyright cord corpus corpusid cot count country course
created current d data database dataset date datetime datum day days db decision defined desc description details
diagnoses diagnosis dialog dialogue dicom dict difficulty dim direction discharge disease diseases doc docs document
documents doi dose draft drug drugs duration e edit ehr eid embedding encounter end entities entity entries entry
episode error evidence exact exam example examples exp explanation ext external externalids f facet facility family
fax feature features field fields figure figures file filename files final finding findings first flag focus
followup form format free from full fulltext function g gender general generated gold gpt grade grobid group groups
h hadm half harmful has hash head header headers heading headline health held hf history hit hospital hpi html
human icliniq
id ideal ident identifier ids idx image images impression in inc index indexed indication info infons information
input inputs institution instruction instructions int intent interaction is iserror issue item items journal json k
key keyphrases keys keyword keywords kind kto label labeled labels lang language last latex law level license line
lines link links list llm location long longer m mag main major manual markdown married match material max meas med
medical medication medications medline mention mentions mesh meshes message messages meta metadata metamap method
methods metrics mimic min modality model month mrn must my n name names narrative nct new no node note notes num
number nvidia o obs observation of offset og on op opa opb opc opd ope open option options order org origin original
other out outbound outcome output outputs p page pages pair pairs paper paragraph paragraphs parent parse parses
part passage passages path patient patientid patients pdf performed person phone phrases physician plain plan pmc
pmcid pmid pmids pos position post pref prefix present presentation problem problems procedure procedures prompt
prompts provider pub pubid publication publish published publisher pubmed pubmedid purpose q qa qas qid qtype qtypes
quality query question questions race radiology rank rate rating rationale raw ref reference references refs
rejected related relation relations report reports request res response responses result results retracted
review reviews
revision role route row rows s safe sample sampled score scores section sections segment select sent sentence
sentences
seq sequence service set severity sex sha sha256 short shot side snippet snippets social solution source sources
span spans speaker spec specialty split src stage stamp start state status stem step steps storetime study style sub
subject subjectid subjects subset subtitle suggestion sum summaries summary supp surgery surgical symptoms system
table tables tag tags target task tasks term terms test text texts tgt that the thoughts time timestamp title titles
to token tokens tool tools topic topics total train transcript transcription transcriptions treatment true tui turn
turns type types uid umls unique unit unnamed update updated updates url urls us used user usmle utterance value
values vector version video videos view visit visits vital vitals volume warning web weight who with word words work
x xml y year years yes zip
"""
WORDS = frozenset(LISTED.split())
SPLIT = re.compile(r"[\s_.:/()-]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=\d)|(?<=\d)(?=[A-Za-z])")


@lru_cache(maxsize=4096)
def is_known(name: str) -> bool:
    """Whether a name is made of known words only (numbers between them allowed), so that it is a name and not data."""
    parts = []
    for part in SPLIT.split(name.strip()):
        if part:
            parts.append(part.lower())
    words = []
    for part in parts:
        if not part.isdecimal():
            words.append(part)
    return bool(words) and len(name) <= 40 and len(parts) <= 5 and all(part in WORDS for part in words)
