"""What a run of recipes/real_micro.yaml left: both stages trained, a proven merge that plain transformers loads, eight
scored questions. `.ci/run` calls it: python tests/check_real.py RUN
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def check(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert facts["status"] == "finished", facts["status"]
    assert facts["recipe"]["model"]["base"] == "builtin:smollm2"
    for stage in facts["stages"]:
        assert stage["status"] == "sealed" and stage["tokens"]["trained"] > 1000, stage["name"]
    assert facts["merge"]["modules"] == 210 and facts["merge"]["sha256"], "30 layers of seven linears"
    scored = facts["evaluation"]["tasks"]["facts"]
    assert scored["base"]["n"] == scored["final"]["n"] == 8
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    model = AutoModelForCausalLM.from_pretrained(run / "merged")
    asked = tokenizer("The patient was given", return_tensors="pt")
    assert model(**asked).logits.isfinite().all()
    assert model.num_parameters() == 134_515_008, "SmolLM2-135M with tied embeddings"
    print(f"{run}: trained, merged, proven, scored; loads in transformers")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
