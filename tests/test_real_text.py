"""Real articles, abstracts, notes and questions through the whole recipe; skipped where the text is absent."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from conftest import ROOT

TEXT = Path(os.environ.get("QMEDTUNE_REAL_DATA", ROOT.parent / "shared" / "data"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (TEXT / "literature").is_dir(), reason="no real text on this machine"),
]


def test_cpt_then_sft_on_real_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from qmedtune.parsing.loader import load_recipe
    from qmedtune.run import run

    monkeypatch.setenv("TEXT", str(TEXT))
    loaded = load_recipe(ROOT / "recipes" / "real_text_small.yaml")
    result = run(loaded.recipe, loaded.text, tmp_path / "run", offline=True)
    assert result.finished
    perplexity = result.scored.perplexity
    for source in ("abstracts", "articles", "notes"):
        assert perplexity[source].final < perplexity[source].base, source
    cpt, sft = (stage.validation for stage in result.stages)
    for source in ("abstracts", "articles", "notes"):
        assert cpt[-1].losses[source] < cpt[0].losses[source], source
    # The response loss before SFT is the one at the end of CPT, on the same held-out questions.
    assert sft[-1].losses["questions"] < cpt[-1].losses["questions"]
    assert result.merge.kl <= 1e-4 and math.isfinite(result.merge.max_abs_logit_diff)
    for source, facts in result.data.items():
        records = facts.records.as_json()
        parts = ("kept", "rejected", "duplicates", "contaminated", "refused")
        assert records["read"] == sum(records[part] for part in parts), source
