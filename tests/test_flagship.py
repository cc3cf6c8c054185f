"""The README's first command: from nothing, without network, to a model that knows what it was never asked in SFT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("flagship.py")
CHANCE = {"treats": 1 / 20, "adverse": 1 / 20}  # options per question of the built-in task


@pytest.mark.slow
def test_the_flagship_learns_both_facets():
    done = subprocess.run([sys.executable, str(SCRIPT)], stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["peak_memory_bytes"] < 3 * 2**30
    for facet, chance in CHANCE.items():
        assert result["medians"][facet]["final"] >= 0.60
        assert abs(result["medians"][facet]["base"] - chance) <= 0.10  # 60 items: three standard errors are 0.084
