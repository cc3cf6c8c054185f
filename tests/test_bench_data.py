"""The benchmark of the data steps runs, compares in one run, and finds what it planted."""

import pytest

from qmedtune.bench import data as bench_data
from qmedtune.bench.data_peers import installed
from qmedtune.errors import RecipeError


def test_every_case_has_ours_and_its_reference():
    result = bench_data.bench_data(cases=["near", "decontaminate", "jats", "pubmed"], rounds=1, num_texts=200)
    assert result["bench"] == "data"
    found = {(row["case"], row["contender"]): row for row in result["rows"]}
    assert {("near", "qmedtune"), ("decontaminate", "qmedtune"), ("jats", "lxml"), ("jats", "qmedtune")} <= set(found)
    assert found["near", "qmedtune"]["recall"] >= 0.99
    assert found["decontaminate", "qmedtune"]["recall"] == 1
    assert found["jats", "lxml"]["ratio"] == found["pubmed", "lxml"]["ratio"] == 1
    assert ("pubmed", "qmedtune") in found
    assert all(row["value"] > 0 for row in result["rows"])
    assert ("near", "datasketch") in found or not installed("datasketch")
    columns, rows = bench_data.render(result)
    assert all(len(row) == len(columns) for row in rows)


def test_unknown_cases_are_named():
    with pytest.raises(RecipeError, match="no case 'speed'"):
        bench_data.bench_data(cases=["speed"])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus():
    """Two small sizes: what 8 MB more of text costs is far below 8 MB, and the whole far below 1 GB."""
    result = bench_data.bench_data(cases=["memory"], sizes_mb=[4, 12])
    small, large = result["rows"]
    assert small["records"]["duplicates"] > 50 and large["tokens"] > 2 * small["tokens"]
    assert large["value"] < 600 and large["prepare_bytes"] - small["prepare_bytes"] < 30e6
    columns, rows = bench_data.render(result)
    assert all(len(row) == len(columns) for row in rows)
