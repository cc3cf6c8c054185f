"""Names in running text by Presidio and a spaCy model (extra `presidio`), where the recipe asks for them.

Our own recognisers find names only where a title or a label announces them; a language model finds more, slower, and
takes an eponym or a drug for a person now and then. Nothing is downloaded: a missing model is an error.
"""

# An extra that need not be there:
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from qmedtune.errors import RecipeError

Finder = Callable[[str], list[tuple[int, int]]]
LEAST_SCORE = 0.5


def check(model: str) -> None:
    """RecipeError where the extra or the spaCy model (a package or a folder) is absent. Loads no model."""
    if find_spec("presidio_analyzer") is None:
        raise RecipeError(
            f"hygiene.presidio: {model} needs the presidio extra, which is not installed\n"
            "pip install 'qmedtune[presidio]', or leave the key out: names are then found by titles and labels alone"
        )
    from spacy.util import is_package

    if not Path(model).is_dir() and not is_package(model):
        raise RecipeError(
            f"hygiene.presidio: no spaCy model {model!r} here, and a run downloads none\n"
            f"fetch it once where there is a network: python -m spacy download {model}\nor give the folder of a model"
        )


def person_finder(model: str) -> Finder:
    """text -> [(start, end)] of persons. Loads the model (seconds)."""
    check(model)
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import NlpEngineProvider

    names = {"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": model}]}
    analyzer = AnalyzerEngine(nlp_engine=NlpEngineProvider(nlp_configuration=names).create_engine())

    def persons(text: str) -> list[tuple[int, int]]:
        found = analyzer.analyze(text, language="en", entities=["PERSON"], score_threshold=LEAST_SCORE)
        return sorted((entity.start, entity.end) for entity in found)

    return persons
