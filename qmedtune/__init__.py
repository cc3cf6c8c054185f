"""qmedtune: an open LLaMA becomes a medical one on a single GPU, in one recipe.

The Python interface is what `__all__` lists (see api.py); each name is imported when it is first used. Importing the
package changes nothing in the process; process.py does, when the command line or one of these functions starts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmedtune.api import evaluate_model, merge_adapters, plan_recipe, run_recipe
    from qmedtune.errors import QmedtuneError
    from qmedtune.parsing.loader import load_recipe

__all__ = ["QmedtuneError", "evaluate_model", "load_recipe", "merge_adapters", "plan_recipe", "run_recipe"]
__version__ = "0.2.0"
_HOMES = {
    "QmedtuneError": "errors",
    "evaluate_model": "api",
    "load_recipe": "parsing.loader",
    "merge_adapters": "api",
    "plan_recipe": "api",
    "run_recipe": "api",
}


def __getattr__(name: str) -> Any:
    """The public names, which would cost seconds if they were imported here."""
    if name in _HOMES:
        return getattr(import_module(f"qmedtune.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qmedtune' has no attribute {name!r}")
