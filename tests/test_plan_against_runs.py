"""Plans against runs: every figure within 15 %, or the reason is said. The table is in docs/plan.md."""

import pytest
from plan_against_runs import CASES, measured_rows


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_is_as_planned(case):
    off = [row for row in measured_rows([case.name]) if not row.fine]
    assert not off, [(row.figure, row.predicted, row.measured) for row in off]
