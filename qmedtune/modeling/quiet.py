"""The libraries' own progress bars and warnings, turned off wherever a model is loaded."""

from __future__ import annotations

import warnings

from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Our progress display replaces theirs; their warnings about what we set on purpose would only confuse."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # transformers 5.23 renames `gradient_checkpointing`; 5.17, which we also support, has only the old name.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\..*")
