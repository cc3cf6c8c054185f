"""The flagship from Python: a recipe, its plan, the run, scores of the result, and a second merge in fp16.

python examples/python_api.py [RECIPE] [RUN]
"""

import sys
from pathlib import Path

import qmedtune


def main(recipe_path: str = "recipes/cpt_then_sft.yaml", run_folder: str = "runs/cpt_then_sft") -> None:
    recipe = qmedtune.load_recipe(recipe_path)
    plan = qmedtune.plan_recipe(recipe)
    print(f"about {plan['seconds']:.0f} s for {sum(stage['trained'] for stage in plan['stages']):,} tokens")
    facts = qmedtune.run_recipe(recipe, run_folder)
    print(f"{facts['status']}; merged: KL {facts['merge']['kl']:.1e} to base + adapters")
    scores = qmedtune.evaluate_model(f"{run_folder}/merged", ["facts"], limit=20)
    print(f"facts: {scores['tasks']['facts']['model']['accuracy']:.2f}")
    half = Path(run_folder, "merged-float16")
    if not half.exists():
        print(qmedtune.merge_adapters(run_folder, half, dtype="float16")["path"])


if __name__ == "__main__":
    main(*sys.argv[1:])
