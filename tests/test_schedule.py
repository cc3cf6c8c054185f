"""The learning rate of every step: typed warm-up, the floor, and a schedule that ends elsewhere than the stage."""

import pytest

from qmedtune.errors import RecipeError
from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import CptSection
from qmedtune.training.trainer import learning_rate_factor


def factors(steps, **settings):
    section = CptSection.model_validate({"mix": {"x": 1}, "warmup": {"steps": 0}, "min_lr_ratio": 0.1, **settings})
    factor = learning_rate_factor(section, steps)
    return [factor(step) for step in range(steps)]


def test_a_warm_up_counts_steps_or_is_a_share_of_the_horizon():
    assert factors(100, warmup={"steps": 3})[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors(100, warmup={"ratio": 0.03}) == factors(100, warmup={"steps": 3})
    assert factors(100, warmup={"ratio": 0.03}, horizon_ratio=2.0) == factors(
        100, warmup={"steps": 6}, horizon_ratio=2.0
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_run_stopped_half_way_of_its_schedule_ends_in_the_middle(schedule):
    """Meditron's cosine was made for two epochs and stopped after one: the last rate is about half the peak's."""
    rates = factors(1000, schedule=schedule, horizon_ratio=2.0)
    assert rates[0] == 1.0 and rates[-1] == pytest.approx(0.1 + 0.9 / 2, abs=0.002)
    assert rates == factors(1000, schedule=schedule, horizon_steps=2000)


def test_a_schedule_that_ends_before_the_run_stays_at_its_floor():
    """GatorTronGPT: linear to a tenth over 87 % of the samples."""
    rates = factors(1000, schedule="linear", horizon_ratio=0.87)
    assert rates[869] > 0.1 and rates[870:] == pytest.approx([0.1] * 130)


def test_two_horizons_contradict_each_other(tmp_path):
    overrides = ["stages[0].cpt.horizon_steps=10", "stages[0].cpt.horizon_ratio=2.0"]
    with pytest.raises(RecipeError, match="horizon_ratio=2.0.*keep one of the two"):
        load_recipe("recipes/micro.yaml", overrides)
    with pytest.raises(RecipeError, match=r"horizon_ratio.*\(0, 100\]"):
        load_recipe("recipes/micro.yaml", ["stages[0].cpt.horizon_ratio=0"])
