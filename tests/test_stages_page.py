"""docs/stages.md: its examples load and plan, and the keys it names exist."""

import json
import re

import pytest
from conftest import MICRO, ROOT

from qmedtune.parsing import strict_yaml
from qmedtune.parsing.grammar import homes_of
from qmedtune.parsing.loader import load_recipe
from qmedtune.plan import make_plan

PAGE = (ROOT / "docs" / "stages.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_examples_are_recipes(block, tmp_path):
    """Each is laid over the micro recipe, which brings what it leaves out."""
    whole = strict_yaml.parse(MICRO.read_text(encoding="utf-8")).data
    for section, given in strict_yaml.parse(block).data.items():
        whole[section] = given if section == "stages" else {**whole.get(section, {}), **given}
    path = tmp_path / "micro.yaml"
    path.write_text(json.dumps(whole))
    assert make_plan(load_recipe(path).recipe)["stages"]


def test_keys_exist():
    keys = set(re.findall(r"`(\w+_\w+)[`:]", PAGE)) - {"beyond_cap", "merge_then_new"}
    assert len(keys) >= 8 and {key for key in keys if not homes_of(key)} == set()
