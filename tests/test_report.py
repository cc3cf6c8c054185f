"""The report on a synthetic run: figures reach the page, gaps are said, nothing is fetched or left unescaped.

`python tests/test_report.py DIR` writes that synthetic run and its report to DIR, to be looked at in a browser.
"""

import math
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from builders import make_evaluation, make_metrics, make_run, make_score, make_scores, make_task, write_run

from qmedtune.errors import RunError
from qmedtune.report import markdown, model_card, weakest_phi, write_report
from qmedtune.reporting import page as report_html
from qmedtune.reporting import score_tables
from qmedtune.reporting.charts import MAX_POINTS, Series, line_chart, nice_ticks
from qmedtune.reporting.facts import Metrics, comparisons, outcome, precision_of, read_metrics
from qmedtune.reporting.headline import result
from qmedtune.reporting.style import CSS
from qmedtune.results import (
    BaseAndFinal,
    Bin,
    Difference,
    Evaluation,
    Run,
    Score,
    Scores,
    Stage,
    StepEntry,
    TaskScores,
    Validation,
)


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


def rendered(tmp_path: Path, run: Run, lines: list[dict] | None = None) -> Page:
    write_report(write_run(tmp_path, run, make_metrics() if lines is None else lines))
    return Page((tmp_path / "report.html").read_text())


def test_page_tells_the_figures(tmp_path):
    page = rendered(tmp_path, make_run())
    for figure in ("0.06 (0.03–0.09)", "0.81 (0.76–0.86)", "+0.76 (+0.69 to +0.81)", "p < 0.001; 185 gained, 3 lost",
                   "facts: generated answers", "unreadable answers 9 → 2", "chance 0.33", "61.4", "−87.1%", "600,000",
                   "211,380", "3.02×", "550 kept of 600", "16-bit base", "1.4e-05", "0.00087", "1,184",
                   "site agreement",
                   "2.13.0+cpu", "9f9f9f9f9f9f", "2 warnings",
                   "record left out: no text", "identifier: date (report)41", "items of facts found, of 2402",
                    "95% of the records fit", "mix:"):  # fmt: skip
        assert figure in page.text, figure


def test_page_needs_nothing_else(tmp_path):
    page = rendered(tmp_path, make_run())
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    links = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    anchors = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert "#warnings-and-choices" in links and {link.removeprefix("#") for link in links} <= anchors
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

    raw = poison(make_run().as_json())
    raw["recipe_sha256"] = "1d" * 32  # stands in code, where nothing but hexadecimal digits occurs
    raw["data"] = {evil: raw["data"]["notes"]}
    raw["evaluation"]["tasks"] = {evil: raw["evaluation"]["tasks"]["facts"]}
    run = Run.model_validate(raw)
    page = rendered(tmp_path, run)
    assert evil in page.text and "script" not in {tag for tag, _ in page.tags}
    assert all("onload" not in attrs for _, attrs in page.tags)
    assert "<script" not in (tmp_path / "report.md").read_text().split("## Recipe")[0]
    assert "<script" not in model_card(run).split("---\n")[2]


def test_gain_within_noise_is_called_so(tmp_path):
    run = make_run()
    facts, *_, pubmedqa = comparisons(run)
    assert (facts.verdict, pubmedqa.verdict) == ("better", "noise")
    assert "rose from 0.06 to 0.81 (240 items)" in outcome(run)
    assert "pubmedqa did not change beyond noise: 0.53 → 0.56" in outcome(run)
    assert "within noise (p = 0.511; 21 gained, 16 lost)" in rendered(tmp_path, run).text


def test_a_metric_without_a_paired_test_goes_by_the_interval_of_its_change():
    def verdict(value, interval):
        scores = make_scores(make_score(0.5, 100), make_score(0.6, 100), 20, 10)
        change = Difference(value=value, ci95=interval)
        task = TaskScores(base=scores.base, final=scores.final, difference=change)
        return comparisons(make_run(evaluation=Evaluation(tasks={"t": task})))[0].verdict

    assert verdict(0.1, (0.01, 0.2)) == "better" and verdict(-0.1, (-0.2, -0.01)) == "worse"
    assert verdict(0.1, (-0.01, 0.2)) == "noise" and verdict(0.1, None) == ""


def test_outcome_of_worse_run_is_not_sold():
    evaluation = make_evaluation()
    facts = make_task(make_score(0.8125, 240), make_score(0.055, 240), 3, 185)
    run = make_run(evaluation=evaluation.model_copy(update={"tasks": {"facts": facts}}))
    assert "fell from 0.81 to 0.06" in outcome(run)
    assert "rose on general (5.31 → 5.44)" in outcome(run)


def test_stopped_run_says_what_is_missing(tmp_path):
    stages = [make_run().stages[0], Stage(name="02-sft", kind="sft", status="to do")]
    run = make_run(stages=stages, warnings=[], resolved=[], merge=None, evaluation=None)
    lines = [line for line in make_metrics() if line["stage"] == "01-cpt"]
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
    steps = [StepEntry(name="data", status="sealed", seconds=1.0, key="a"), StepEntry(name="01-cpt", status="to do")]
    run = Run(name="r", status="failed", steps=steps, error="RunError")
    page = rendered(tmp_path, run, [])
    assert "failed in 01-cpt (RunError)" in page.text
    assert "No stage was trained" in page.text and "No data was read" in page.text
    assert model_card(run).count("No task was scored") == 1


def test_a_run_json_that_is_none_is_said_to_be(tmp_path):
    (tmp_path / "run.json").write_text('{"name": "r", "status": "finished", "seed": "Dr. Bell"}')
    with pytest.raises(RunError, match=r"seed: .*integer") as caught:
        write_report(tmp_path)
    assert "Bell" not in str(caught.value)


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
    cpt, sft = make_run().stages
    losses = [{"step": 50, "literature": 3.0}, {"step": 100, "literature": 2.0}]
    cpt = cpt.model_copy(update={"validation": [Validation.model_validate(each) for each in losses]})
    run = make_run(stages=[cpt, sft])
    page = rendered(tmp_path, run, [])
    assert "held-out literature" in page.text and "No loss was logged for 02-sft" in page.text


def test_model_card_is_valid_and_keeps_paths_to_itself():
    def on(base):
        return make_run(recipe={"model": {"base": base, "quantization": "nf4"}, "hygiene": {"phi": "report"}})

    card = model_card(on("/srv/secret/models/Llama-3.2-1B/"))
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.8125}]
    assert "base_model" not in front and "secret" not in card and "Llama-3.2-1B" in card
    for said in ("Not a medical device", "no de-identification", "can repeat text", "patient data, site agreement",
                 "left in place", "continual pretraining, then supervised fine-tuning as LoRA"):  # fmt: skip
        assert said in card, said
    assert (
        yaml.safe_load(model_card(on("meta-llama/Llama-3.1-8B")).split("---\n")[1])["base_model"]
        == "meta-llama/Llama-3.1-8B"
    )


def test_markdown_tables_are_rectangular():
    text = markdown(make_run(), Metrics())
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_rendering_again_gives_the_same_bytes_in_a_second(tmp_path):
    write_run(tmp_path, make_run(), make_metrics() * 20)
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


def test_the_card_tells_the_weakest_treatment_of_identifiers():
    sources = {"a": {"phi": None}, "b": {"phi": "off"}, "c": {"phi": "redact"}}
    run = make_run(recipe={"hygiene": {"phi": "refuse"}, "data": sources})
    assert weakest_phi(run, ["a"]) == "refuse" and weakest_phi(run, ["a", "c"]) == "redact"
    assert weakest_phi(run, ["a", "b", "c"]) == "off"


def in_precision(**facts) -> Run:
    evaluation = make_evaluation(**facts)
    notes = evaluation.perplexity["notes"].model_copy(
        update={"base": 20.0, "final": 15.2, "nf4": BaseAndFinal(base=26.0, final=15.34)}
    )
    texts = {**evaluation.perplexity, "notes": notes}
    return make_run(evaluation=evaluation.model_copy(update={"perplexity": texts}))


def test_the_precision_of_scores_stands_in_headline_tables_figures_and_card(tmp_path):
    run = in_precision(precision="delivered", weights="bfloat16", computed_in="bfloat16", window_tokens=8192)
    said = "bfloat16, as delivered"
    assert f"Scored in {said}." in outcome(run) and result(run).endswith(f"; in {said}")
    html = report_html.page(run, read_metrics(tmp_path / "none"))
    for place in (f"<h3>Scores, {said}</h3>", f"<h3>Perplexity, {said}</h3>", f"<br>{said}<br>", f"In {said}."):
        assert place in html, place
    card = model_card(run)
    assert yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["metrics"][0]["name"].endswith(said)
    assert f"In {said}." in card
    scored_in = {"nf4": "NF4, as trained, not as delivered", "float16": "float16, as trained"}
    for weights, words in scored_in.items():
        assert precision_of(Evaluation(precision="nf4", weights=weights)) == words
    assert precision_of(Evaluation(precision="nf4")) == "NF4, as trained" and precision_of(Evaluation()) == ""


def test_what_quantisation_cost_and_training_repaired_is_a_line_of_its_own():
    [row] = score_tables.quantisation(in_precision(precision="delivered", weights="bfloat16")).rows
    assert row[:4] == ("notes", "+30.0%", "−41.0%", "−24.0%")
    assert float(row[4]) == pytest.approx(math.log(26 / 15.34) - math.log(20 / 15.2), abs=6e-4)
    assert score_tables.quantisation(make_run()).rows == []


def test_a_score_no_better_than_the_commonest_answer_is_said_to_be_no_knowledge():
    def compared_with_commonest(final: float) -> Run:
        scores: Scores = make_scores(make_score(0.40, 500), make_score(final, 500), 130, 40)
        models = {}
        for label in ("base", "final"):
            score = scores.of(label)
            assert score is not None
            models[label] = score.model_copy(update={"majority": 0.56})
        task = TaskScores(**models, difference=scores.difference, paired=scores.paired)
        return make_run(evaluation=Evaluation(tasks={"pubmedqa": task}))

    run = compared_with_commonest(0.58)
    [whole] = comparisons(run)
    assert whole.verdict == "better" and "not beyond always the commonest answer (0.56)" in whole.reading
    assert "not beyond always the commonest answer" in outcome(run)
    assert score_tables.evaluation(run).rows[0][4] == "0.56"
    assert "commonest" not in comparisons(compared_with_commonest(0.7))[0].reading


# ---- calibration -----------------------------------------------------------------------------------------------------


def calibrated(accuracy: float, bins: list[Bin]) -> Score:
    ece = sum(each.n * abs(each.accuracy - each.confidence) for each in bins) / sum(each.n for each in bins)
    return make_score(accuracy, 100).model_copy(update={"ece": ece, "calibration": bins})


def test_the_calibration_curve_stands_in_the_report_with_its_definition(tmp_path):
    base = calibrated(0.4, [Bin(low=0.3, high=0.4, n=60, confidence=0.36, accuracy=0.4), _sure(40, 0.4)])
    final = calibrated(0.7, [_sure(95, 0.7), Bin(low=0.9, high=1, n=5, confidence=0.97, accuracy=0.6)])
    facts = TaskScores(base=base, final=final)
    seen = rendered(tmp_path, make_run(evaluation=make_evaluation(tasks={"facts": facts})))
    assert "Guo et al. 2017" in seen.text and "Ten bins of equal width" in seen.text
    bubbles = [given for tag, given in seen.tags if tag == "i" and "bubble" in (given.get("class") or "")]
    assert len(bubbles) == 4 and "few" in bubbles[3]["class"] and "left:97.0%;top:40.0%" in bubbles[3]["style"]
    text = (tmp_path / "report.md").read_text()
    assert f"| facts | base | {base.ece:.3f} | 0.496 | 0.400 | +0.096 | 100 |" in text
    assert f"| facts | final | {final.ece:.3f} |" in text


def _sure(n: int, accuracy: float) -> Bin:
    return Bin(low=0.7, high=0.8, n=n, confidence=0.7, accuracy=accuracy)


def test_a_run_without_bins_has_no_curve(tmp_path):
    seen = rendered(tmp_path, make_run())
    assert "Calibration" not in seen.text and "Calibration" not in (tmp_path / "report.md").read_text()


if __name__ == "__main__":
    print(write_report(write_run(Path(sys.argv[1]), make_run(), make_metrics())))


def luminance(color: str) -> float:
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_mark_stands_out_from_its_ground():
    """WCAG 2.2, 1.4.11: 3 to 1 for what is needed to read a figure; 4.5 to 1 for text."""
    light, dark = CSS.split("prefers-color-scheme: dark")[:2]
    for sheet in (light, dark.partition("}\n}")[0]):
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", sheet))
        for ground in ("card", "page"):
            below = luminance(colors[ground])
            for name, least in [*((f"c{n}", 3.0) for n in range(9)), ("soft", 4.5), ("ink", 4.5), ("bad", 4.5)]:
                pair = sorted((luminance(colors[name]), below))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= least, (name, ground)


def test_tables_and_charts_can_be_read_without_looking(tmp_path):
    page = rendered(tmp_path, make_run())
    tables = sum(tag == "table" for tag, _ in page.tags)
    assert tables == sum(tag == "caption" for tag, _ in page.tags)
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    assert "Lowest" in page.text and any(attrs.get("aria-label") == "On this page" for _, attrs in page.tags)


def test_a_large_run_is_counted_and_folded_and_its_losses_are_told(tmp_path):
    facts = make_run().as_json()
    facts["evaluation"]["tasks"] = {f"task{n}": facts["evaluation"]["tasks"]["facts"] for n in range(20)}
    facts["warnings"] = [f"warning {n}" for n in range(60)]
    facts["stages"][1]["tokens"] |= {"dropped": 19_428}
    page = rendered(tmp_path, Run.model_validate(facts))
    assert "Of 20 tasks: 20 better" in page.text and "All 23 figures" in page.text
    assert "49 more" in page.text and "02-sft: 22% of the tokens read were dropped (19,428 of 88,310)" in page.text
    assert "22.0%" in page.text and "61 warnings" in page.text
