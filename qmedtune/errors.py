"""Errors that a user can act on: one to six lines saying where, what was given, what is allowed, what to do.

Each class carries the process exit code of the command line. Programmer errors stay `AssertionError`s.
"""

from collections.abc import Mapping

Counted = Mapping[str, float | str | None]


class QmedtuneError(ValueError):
    """Base of every error that is shown without a traceback. The message holds one to six lines."""

    exit_code = 1


class RunError(QmedtuneError):
    """A stage failed while running (diverged, disk full, interrupted in an unexpected way)."""

    exit_code = 1


class MergeRefused(RunError):
    """The proof of a merge has failed. `facts`: what was counted by then, for run.json. Whoever catches it knows where
    the candidate is kept and which command goes on, and adds both."""

    def __init__(self, message: str, facts: Counted) -> None:
        super().__init__(message)
        self.facts = facts


class RecipeError(QmedtuneError):
    """Bad usage or a bad recipe: nothing was run, nothing was written."""

    exit_code = 2


class DataError(QmedtuneError):
    """Input data is missing, unreadable or more damaged than `hygiene.max_bad_fraction` allows."""

    exit_code = 3


class DoesNotFit(QmedtuneError):
    """The plan needs more GPU memory, host memory or disk than there is."""

    exit_code = 4
