"""The report on a synthetic run: figures reach the page, gaps are said, nothing is fetched or left unescaped.

`python tests/test_report.py DIR` writes that synthetic run and its report to DIR, to be looked at in a browser.
"""

import json
import math
import random
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from qmedtune.evaluation.statistics import wilson
from qmedtune.report import markdown, model_card, write_report
from qmedtune.reporting import page as report_html
from qmedtune.reporting import tables
from qmedtune.reporting.charts import MAX_POINTS, Series, line_chart, nice_ticks
from qmedtune.reporting.facts import Metrics, comparisons, outcome, precision_of, read_metrics, read_score

SOURCES = {"literature": "literature", "notes": "clinical", "general": "general", "instructions": "instructions"}


def scored(accuracy: float, n: int, chance: float = 0.05, unparsed: int | None = None) -> dict:
    low, high = wilson(round(accuracy * n), n)
    score = {"metric": "accuracy", "accuracy": accuracy, "ci95": [low, high], "n": n, "chance": chance, "truncated": 0}
    if unparsed is not None:
        said = round(accuracy * n) - unparsed
        score["generation"] = {"metric": "accuracy", "accuracy": said / n, "ci95": list(wilson(said, n)), "n": n,
                               "unparsed": unparsed, "cut": 0}  # fmt: skip
    return score


def compared(base: dict, final: dict, p: float, gained: int, lost: int) -> dict:
    change = final["accuracy"] - base["accuracy"]
    return {"base": base, "final": final, "difference": {"value": change, "ci95": [change - 0.06, change + 0.06]},
            "paired": {"test": "McNemar exact", "gained": gained, "lost": lost, "p": p}}  # fmt: skip


def synthetic_run() -> dict:
    """A made-up run.json with every part that the report knows. No figure in it was measured."""
    mixture = {
        "literature": {"share": 0.401, "asked_share": 0.4, "tokens": 240_600, "repeats": 3.02},
        "notes": {"share": 0.399, "tokens": 239_400, "repeats": 2.97},
        "general": {"share": 0.2, "tokens": 120_000, "repeats": 1.0},
    }
    cpt = {
        "name": "01-cpt", "kind": "cpt", "status": "sealed", "seconds": 71.4, "key": "c1" * 32,
        "tokens": {"read": 212_044, "kept": 211_380, "split": 10_020, "dropped": 664, "supervised": 598_212,
                   "trained": 600_000},
        "mixture": mixture, "adapter": {"path": "01-cpt/adapter", "sha256": "9f" * 32},
        "loss": {"first": 4.812, "last": 1.377}, "steps": 600, "kept_step": 550,
        "tokens_per_s": 8630.0, "peak_memory_bytes": 1_240_000_000,
    }  # fmt: skip
    sft = {
        "name": "02-sft", "kind": "sft", "status": "sealed", "seconds": 24.9, "key": "5f" * 32,
        "tokens": {"read": 88_310, "kept": 88_310, "split": 4_410, "dropped": 0, "supervised": 19_208,
                   "trained": 264_930},
        "mixture": {"instructions": {"share": 1.0, "tokens": 264_930, "repeats": 3.0}},
        "adapter": {"path": "02-sft/adapter", "sha256": "ab" * 32},
        "loss": {"first": 2.204, "last": 0.613}, "tokens_per_s": 7120.0, "peak_memory_bytes": 1_310_000_000,
    }  # fmt: skip
    facts = compared(scored(0.055, 240, unparsed=9), scored(0.8125, 240, unparsed=2), 3e-41, 185, 3)
    facts["generation"] = {"paired": {"test": "McNemar exact", "gained": 170, "lost": 4, "p": 1e-39}}
    facts["facets"] = {
        "treats": compared(scored(0.05, 120), scored(0.825, 120), 1e-20, 94, 1),
        "adverse effect": compared(scored(0.06, 120), scored(0.80, 120), 1e-20, 91, 2),
    }
    pubmedqa = compared(scored(0.53, 200, 1 / 3), scored(0.555, 200, 1 / 3), 0.43, 21, 16)
    records = {"read": 1200, "kept": 1184, "rejected": 3, "duplicates": 9, "contaminated": 4, "refused": 0}
    return {
        "name": "cpt_then_sft", "status": "finished", "recipe_sha256": "1d" * 32, "seed": 17, "offline": True,
        "stages": [cpt, sft],
        "data": {name: {"records": records, "sha256": "77" * 32, "kind": kind, "held_out": 58,
                        "reasons": {"no text": 3},
                        "near_duplicates": 5, "contamination": {"facts": {"items": 240, "found": ["a", "b"]}},
                        "phi": {"mode": "report", "classes": {"date": 41}} if kind == "clinical" else {},
                         "license": "Apache-2.0",
                        "terms": "patient data, site agreement" if kind == "clinical" else None}
                 for name, kind in SOURCES.items()},
        "merge": {"path": "merged", "base": "full16", "modules": 21, "kl": 1.43e-5, "top1": 0.9993, "dtype": "bfloat16",
                  "max_abs_logit_diff": 0.078, "sha256": "e0" * 32, "shift_from_nf4": {"kl": 8.7e-4, "top1": 0.987}},
        "evaluation": {
            "tasks": {"facts": facts, "pubmedqa": pubmedqa},
            "perplexity": {"literature": {"base": 61.4, "final": 7.92}, "notes": {"base": 118.2, "final": 6.05},
                           "general": {"base": 5.31, "final": 5.44}},
        },
        "steps": [{"name": name, "status": "sealed", "seconds": seconds, "key": "aa"} for name, seconds in
                  [("base", 148.2), ("data", 3.1), ("01-cpt", 71.4), ("02-sft", 24.9), ("merge", 2.6),
                   ("evaluate", 18.8), ("report", 0.2)]],
        "warnings": ["triton is not used on a CPU: the reference kernels ran",
                     "stages[1].sft.lr 2e-5 is a full-parameter value; LoRA usually needs 1e-4 to 4e-4"],
        "resolved": [{"key": "stages[0].cpt.seq_len", "value": 256, "why": "95% of the records fit"},
                     {"key": "stages[0].cpt.lr", "value": 0.002, "why": "builtin:tiny, LoRA r=32"},
                     {"key": "model.compute_dtype", "value": "float32", "why": "no GPU"}],
        "recipe": {"model": {"base": "builtin:tiny", "quantization": "nf4"}, "hygiene": {"phi": "report"}},
        "recipe_text": "name: cpt_then_sft\nseed: 17\nstages:\n  - cpt: {mix: {literature: 8, notes: 8, general: 4}}\n"
                       "  - sft: {data: instructions, epochs: 3}\n",
        "provenance": {"versions": {"qmedtune": "0.1.0", "python": "3.11.9", "torch": "2.13.0+cpu",
                                    "transformers": "5.23.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"},
                       "device": "cpu, 2 cores", "base_revision": None, "base_sha256": "b4" * 32,
                       "git": "d611782"},
    }  # fmt: skip


def synthetic_metrics() -> list[dict]:
    """Log lines of two stages with a validation every 50 steps: exponential decay with noise."""
    dice, lines = random.Random(0), []
    for stage, steps, start, end in (("01-cpt", 600, 4.8, 1.35), ("02-sft", 150, 2.2, 0.6)):
        for step in range(1, steps + 1):
            mean = end + (start - end) * math.exp(-5 * step / steps)
            lines.append({"stage": stage, "step": step, "loss": mean + dice.gauss(0, 0.12), "grad_norm": 0.8,
                          "lr": 2e-3, "tokens": step * 1000, "tokens_per_s": 8600.0, "memory": 10**9})  # fmt: skip
            if step % 50 == 0:
                lines.append({"stage": stage, "step": step, "validation": {
                    "literature": mean + 0.12 + dice.gauss(0, 0.02),
                    "notes": mean - 0.18 + dice.gauss(0, 0.02)}})  # fmt: skip
    return lines


def write_run(folder: Path, run: dict, lines: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Page(HTMLParser):
    """Collects tags and visible text; checks that every tag that opens also closes."""

    VOID = {"meta", "br", "path"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def rendered(tmp_path: Path, run: dict, lines: list[dict] | None = None) -> Page:
    write_report(write_run(tmp_path, run, synthetic_metrics() if lines is None else lines))
    return Page((tmp_path / "report.html").read_text())


def test_page_tells_the_figures(tmp_path):
    page = rendered(tmp_path, synthetic_run())
    for figure in ("0.06 (0.03–0.09)", "0.81 (0.76–0.86)", "+0.76 (+0.70 to +0.82)", "p < 0.001; 185 gained, 3 lost",
                   "facts: generated answers", "unreadable answers 9 → 2", "chance 0.33", "61.4", "−87.1%", "600,000",
                   "211,380", "3.02×", "550 kept of 600", "16-bit base", "1.4e-05", "0.00087", "1,184",
                   "site agreement",
                   "2.13.0+cpu", "9f9f9f9f9f9f", "2 warnings",
                   "record left out: no text", "identifier: date (report)41", "items of facts found, of 2402",
                    "95% of the records fit", "mix:"):  # fmt: skip
        assert figure in page.text, figure


def test_page_needs_nothing_else(tmp_path):
    page = rendered(tmp_path, synthetic_run())
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    links = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    assert links == ["#warnings-and-choices"]
    assert "warnings-and-choices" in [attrs.get("id") for _, attrs in page.tags]
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"url\(|@import|https?://", html) and "default-src 'none'" in html


def test_every_value_is_escaped(tmp_path):
    """Each string of run.json is replaced by markup: none of it becomes a tag."""
    evil = "<script>alert('x')</script>\"onload=\"y"

    def poison(value, key=""):
        if isinstance(value, dict):
            return {name: poison(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [poison(inner, key) for inner in value]
        return value + evil if isinstance(value, str) and key not in ("phi", "status", "metric") else value

    run = poison(synthetic_run())
    run["recipe_sha256"] = "1d" * 32  # stands in code, where nothing but hexadecimal digits occurs
    run["data"] = {evil: run["data"]["notes"]}
    run["evaluation"]["tasks"] = {evil: run["evaluation"]["tasks"]["facts"]}
    page = rendered(tmp_path, run)
    assert evil in page.text and "script" not in {tag for tag, _ in page.tags}
    assert all("onload" not in attrs for _, attrs in page.tags)
    assert "<script" not in (tmp_path / "report.md").read_text().split("## Recipe")[0]
    assert "<script" not in model_card(run).split("---\n")[2]


def test_gain_within_noise_is_called_so(tmp_path):
    run = synthetic_run()
    facts, *_, pubmedqa = comparisons(run)
    assert (facts.verdict, pubmedqa.verdict) == ("better", "noise")
    assert "rose from 0.06 to 0.81 (240 items)" in outcome(run)
    assert "pubmedqa did not change beyond noise: 0.53 → 0.56" in outcome(run)
    assert "within noise (p = 0.430; 21 gained, 16 lost)" in rendered(tmp_path, run).text


def test_verdict_without_paired_test_goes_by_intervals():
    def verdict(base, final, **more):
        task = {"base": {"accuracy": 0.5, "ci95": base}, "final": {"accuracy": 0.6, "ci95": final}, **more}
        return comparisons({"evaluation": {"tasks": {"t": task}}})[0].verdict

    assert verdict([0.4, 0.55], [0.56, 0.7]) == "better"
    assert verdict([0.4, 0.57], [0.56, 0.7]) == "noise"
    assert verdict([0.4, 0.55], None) == ""
    assert verdict([0.4, 0.55], [0.56, 0.7], difference={"value": 0.1, "ci95": [-0.01, 0.2]}) == "noise"
    assert verdict([0.4, 0.57], [0.56, 0.7], difference={"value": 0.1, "ci95": [0.01, 0.2]}) == "better"


def test_outcome_of_worse_run_is_not_sold():
    run = synthetic_run()
    facts = run["evaluation"]["tasks"]["facts"]
    facts["base"], facts["final"] = facts["final"], facts["base"]
    assert "fell from 0.81 to 0.06" in outcome(run)
    assert "rose on general (5.31 → 5.44)" in outcome(run)


def test_stopped_run_says_what_is_missing(tmp_path):
    run = synthetic_run()
    for part in ("warnings", "resolved"):
        del run[part]
    run["merge"] = run["evaluation"] = None
    run["stages"][1] = {"name": "02-sft", "kind": "sft", "status": "to do"}
    lines = [line for line in synthetic_metrics() if line["stage"] == "01-cpt"]
    page = rendered(tmp_path, run, lines)
    for said in (
        "No loss was logged for 02-sft",
        "without an evaluation",
        "Nothing was merged",
        "No task was scored",
        "No perplexity",
        "No warnings.",
    ):
        assert said in page.text


def test_failed_run_before_any_stage(tmp_path):
    run = {"name": "r", "status": "failed", "stages": [], "error": "RunError",
           "steps": [{"name": "data", "status": "sealed", "seconds": 1.0, "key": "a"},
                     {"name": "01-cpt", "status": "to do"}]}  # fmt: skip
    page = rendered(tmp_path, run, [])
    assert "failed in 01-cpt (RunError)" in page.text
    assert "No stage was trained" in page.text and "No data was read" in page.text
    assert model_card(run).count("No task was scored") == 1


def test_metrics_of_killed_and_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"stage": "a", "step": 1, "loss": 3.0}\n{"stage": "a", "step": 2, "loss": 9.0}\n{"stage": "a", "st'
        '\n{"stage": "a", "step": 2, "loss": 2.0}\n{"stage": "a", "step": 3, "loss": NaN}\n'
        '{"stage": "a", "step": 3, "validation": {"notes": 1.5}}\n'
    )
    metrics = read_metrics(path)
    assert metrics.curves["a"].train == [(1, 3.0), (2, 2.0)]
    assert metrics.curves["a"].validation == {"notes": [(3, 1.5)]}
    assert metrics.left_out == 2
    assert read_metrics(tmp_path / "absent") == Metrics()


def test_sealed_validation_is_drawn_without_metrics(tmp_path):
    run = synthetic_run()
    run["stages"][0]["validation"] = [{"step": 50, "literature": 3.0}, {"step": 100, "literature": 2.0}]
    page = rendered(tmp_path, run, [])
    assert "held-out literature" in page.text and "No loss was logged for 02-sft" in page.text


def test_model_card_is_valid_and_keeps_paths_to_itself():
    run = synthetic_run()
    run["recipe"]["model"]["base"] = "/srv/secret/models/Llama-3.2-1B/"
    card = model_card(run)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.8125}]
    assert "base_model" not in front and "secret" not in card and "Llama-3.2-1B" in card
    for said in ("Not a medical device", "no de-identification", "can repeat text", "patient data, site agreement",
                 "left in place", "continual pretraining, then supervised fine-tuning as LoRA"):  # fmt: skip
        assert said in card, said
    run["recipe"]["model"]["base"] = "meta-llama/Llama-3.1-8B"
    assert yaml.safe_load(model_card(run).split("---\n")[1])["base_model"] == "meta-llama/Llama-3.1-8B"


def test_markdown_tables_are_rectangular():
    text = markdown(synthetic_run(), Metrics())
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_rendering_again_gives_the_same_bytes_in_a_second(tmp_path):
    write_run(tmp_path, synthetic_run(), synthetic_metrics() * 20)
    start = time.process_time()
    sizes = write_report(tmp_path)
    assert time.process_time() - start < 1.0
    first = (tmp_path / "report.html").read_bytes()
    assert sizes["report.html"] == len(first) < 200_000
    assert write_report(tmp_path) == sizes and (tmp_path / "report.html").read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "metrics.jsonl", *sizes}


@pytest.mark.parametrize("low, high", [(0.31, 4.81), (2.0, 2.0), (0.0, 0.0), (1e-4, 3e-4), (3, 61_000)])
def test_ticks_are_round_and_cover(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
    assert len({round(b - a, 9) for a, b in zip(ticks, ticks[1:], strict=False)}) == 1


def test_chart_keeps_ends_and_drops_excess_points():
    chart = line_chart([Series("train", [(step, 5.0 - step / 5000) for step in range(20_001)], 0)], "x", "y")
    raw = re.search(r'class="raw s0" d="M([^"]+)"', chart)
    assert raw is not None
    places = raw.group(1).split("L")
    assert len(places) <= MAX_POINTS + 1 and places[-1] == "1000.0 1000.0"


def test_score_forms():
    assert str(read_score({"mean": 0.5, "ci95": [0.4, 0.6]})) == "0.50 (0.40–0.60)"
    assert str(read_score(0.25)) == "0.25" and read_score(None) is None


if __name__ == "__main__":
    print(write_report(write_run(Path(sys.argv[1]), synthetic_run(), synthetic_metrics())))


def test_the_card_tells_the_weakest_treatment_of_identifiers():
    from qmedtune.report import _weakest_phi

    recipe = {"hygiene": {"phi": "refuse"}, "data": {"a": {"phi": None}, "b": {"phi": "off"}, "c": {"phi": "redact"}}}
    assert _weakest_phi(recipe, ["a"]) == "refuse" and _weakest_phi(recipe, ["a", "c"]) == "redact"
    assert _weakest_phi(recipe, ["a", "b", "c"]) == "off"


def in_precision(**facts) -> dict:
    run = synthetic_run()
    run["evaluation"] |= facts
    run["evaluation"]["perplexity"]["notes"] |= {"base": 20.0, "final": 15.2, "nf4": {"base": 26.0, "final": 15.34}}
    return run


def test_the_precision_of_scores_stands_in_headline_tables_figures_and_card(tmp_path):
    run = in_precision(precision="delivered", weights="bfloat16", computed_in="bfloat16", window_tokens=8192)
    said = "bfloat16, as delivered"
    assert f"Scored in {said}." in outcome(run)
    html = report_html.page(run, read_metrics(tmp_path / "none"))
    for place in (f"<h3>Scores, {said}</h3>", f"<h3>Perplexity, {said}</h3>", f"<br>{said}<br>", f"In {said}."):
        assert place in html, place
    card = model_card(run)
    assert yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["metrics"][0]["name"].endswith(said)
    assert f"In {said}." in card
    scored_in = {"nf4": "NF4, as trained, not as delivered", "float16": "float16, as trained"}
    for weights, words in scored_in.items():
        assert precision_of({"precision": "nf4", "weights": weights}) == words
    assert precision_of({"precision": "nf4"}) == "NF4, as trained" and precision_of({}) == ""


def test_what_quantisation_cost_and_training_repaired_is_a_line_of_its_own():
    [row] = tables.quantisation(in_precision(precision="delivered", weights="bfloat16")).rows
    assert row[:4] == ("notes", "+30.0%", "−41.0%", "−24.0%")
    assert float(row[4]) == pytest.approx(math.log(26 / 15.34) - math.log(20 / 15.2), abs=6e-4)
    assert tables.quantisation(synthetic_run()).rows == []


def test_a_score_no_better_than_the_commonest_answer_is_said_to_be_no_knowledge():
    pubmedqa = compared(scored(0.40, 500), scored(0.58, 500), 1e-9, 130, 40)
    for model in ("base", "final"):
        pubmedqa[model]["majority"] = 0.56
    run = {"status": "finished", "evaluation": {"tasks": {"pubmedqa": pubmedqa}}}
    [whole] = comparisons(run)
    assert whole.verdict == "better" and "not beyond always the commonest answer (0.56)" in whole.reading
    assert "not beyond always the commonest answer" in outcome(run)
    assert tables.evaluation(run).rows[0][4] == "0.56"
    pubmedqa["final"] |= {"accuracy": 0.7, "ci95": [0.66, 0.74]}
    assert "commonest" not in comparisons(run)[0].reading
