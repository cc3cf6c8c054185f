"""The page of items: what it counts, whose text it shows, that text cannot become anything else, and how it looks."""

from __future__ import annotations

import json
import math
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, tab
from builders import make_run
from conftest import MICRO

from qmedtune import cli, store
from qmedtune.erase import erase
from qmedtune.errors import RunError
from qmedtune.evaluation.summary import task_result, write_items
from qmedtune.item_page.make import PAGE, write_items_page
from qmedtune.item_page.question_texts import RequestedItems
from qmedtune.parsing.loader import load_recipe
from qmedtune.report import write_report
from qmedtune.results import Evaluation, Run
from qmedtune.tasks import Task, load_task

HOSTILE = "Is </script><script>document.title='owned'</script><img src=x onerror=alert(1)> \u2028 safe?"
SHOWN = RequestedItems()


def pubmedqa_file(folder: Path, count: int, passage: str = "Events fell from 9 to 4 of 50.") -> Path:
    records = {}
    for number in range(count):
        asked = HOSTILE if number == 0 else f"Does treatment {number} lower the rate of events?"
        decision = ("yes", "no", "maybe")[number % 3]
        records[str(20_000 + number)] = {"QUESTION": asked, "CONTEXTS": [passage], "final_decision": decision}
    path = folder / "pubmedqa.json"
    path.write_text(json.dumps(records))
    return path


def choice_file(folder: Path, count: int) -> Path:
    """A site's own questions about its own notes."""
    lines = []
    for number in range(count):
        question = f"Mrs Secretname, bed {number}, was admitted with chest pain. What is next?"
        options = ["ECG", "Troponin", "Discharge"]
        lines.append(
            json.dumps({"id": f"note-{number}", "question": question, "options": options, "answer": number % 3})
        )
    path = folder / "own.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def answer(task: Task, place: int, chosen: int, sure: float, written: int | None) -> dict[str, Any]:
    """A row as an evaluation makes it: `sure` is the share of the chosen option."""
    item, logs = task.items[place], []
    for option in range(len(task.items[place].options)):
        share = sure if option == chosen else (1 - sure) / (len(task.items[place].options) - 1)
        logs.append(math.log(share))
    said = task.judge(item, written)
    return {
        **task.judge(item, chosen),
        "normalised": task.judge(item, chosen),
        "logprobs": logs,
        "confidence": sure,
        "tie": sure < 0.4,
        "truncated": False,
        "generation": {**said, "parsed": written is not None, "ended": "eos"},
    }


def rows_of(task: Task) -> dict[str, list[dict[str, Any]]]:
    """Base is right on every third item, final on every second; sureness and unread answers vary."""
    found: dict[str, list[dict[str, Any]]] = {"base": [], "final": []}
    for number, item in enumerate(task.asked):
        place = number % len(task.items)
        options = len(item.options)
        wrong = (item.gold + 1) % options
        before = item.gold if place % 3 == 0 else wrong
        after = item.gold if place % 2 == 0 else wrong
        unread = place % 7 == 0
        found["base"].append(answer(task, place, before, 0.36 if options > 2 else 0.6, None if unread else wrong))
        found["final"].append(answer(task, place, after, 0.5 + 0.1 * (place % 5), after))
    return found


def written_rows(task: Task) -> dict[str, list[dict[str, Any]]]:
    """Of a task without options: base writes one right answer of three, final all but one, which cannot be read."""
    found: dict[str, list[dict[str, Any]]] = {"base": [], "final": []}
    for place, item in enumerate(task.items):
        for label, said in (("base", item.gold if place % 3 == 0 else frozenset()), ("final", item.gold)):
            read = None if label == "final" and place == 1 else said
            judged = {**task.judge(item, read), "parsed": read is not None, "ended": "eos"}
            found[label].append({"truncated": False, "generation": judged})
    return found


def scored_run(folder: Path, tasks: list[dict[str, Any]]) -> Path:
    """A finished run of the micro recipe with these tasks, scored by invented models."""
    settings = [f"evaluate.tasks={json.dumps(tasks)}"]
    recipe = load_recipe(MICRO, settings).recipe
    evaluation = folder / "evaluation"
    evaluation.mkdir(parents=True)
    found = {}
    for section in recipe.evaluate.tasks:
        task = load_task(section, recipe.items_seed, "micro")
        rows = rows_of(task) if task.items[0].options else written_rows(task)
        write_items(evaluation / f"{task.name}.items.jsonl", task, rows)
        found[task.name] = task_result(task, rows, seed=1)
    scored = Evaluation(tasks=found, precision="delivered", weights="bfloat16")
    store.seal(evaluation, "key", scored.as_json())
    run: Run = make_run(name="items", recipe=recipe.model_dump(mode="json", by_alias=True), evaluation=scored)
    store.write_json(folder / "run.json", run.as_json())
    (folder / "metrics.jsonl").write_text("")
    return folder


def data_of(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    tasks = [
        {"task": "pubmedqa", "path": str(pubmedqa_file(tmp_path, 60))},
        {"task": "choice", "path": str(choice_file(tmp_path, 24))},
        {"task": "facts"},
    ]
    return scored_run(tmp_path / "run", tasks)


def test_what_is_counted_is_what_was_tested(run_dir: Path):
    written = write_items_page(run_dir, SHOWN)
    text = (run_dir / PAGE).read_text()
    assert written.bytes == len(text.encode()) and written.items == {"pubmedqa": 60, "choice": 24, "facts": 20}
    run = Run.model_validate_json((run_dir / "run.json").read_text())
    for task in data_of(text):
        paired = run.scored.tasks[task["name"]].paired
        before = [row[5][0][0] for row in task["rows"]]
        after = [row[5][1][0] for row in task["rows"]]
        gained = sum(b < a for b, a in zip(before, after, strict=True))
        lost = sum(b > a for b, a in zip(before, after, strict=True))
        if paired is not None:
            assert (gained, lost) == (paired.gained, paired.lost)
        assert f'data-column="Gained">{gained}</td>' in text and f'data-column="Lost">{lost}</td>' in text
    assert "scored in bfloat16, as delivered" in text
    first = data_of(text)[0]["rows"][0]
    assert first[0] == "20000" and first[5][0][2] == [360, 320, 320] and first[5][0][3] == 1 and first[5][0][4] == ""


def test_text_of_notes_is_shown_only_where_it_is_asked_for_and_never_in_the_report(run_dir: Path):
    written = write_items_page(run_dir, SHOWN)
    page = (run_dir / PAGE).read_text()
    assert "Does treatment 7 lower" in page and "Secretname" not in page
    assert any(note.startswith("choice: Without text") and "--clinical-text" in note for note in written.left_out)
    write_items_page(run_dir, RequestedItems(clinical=True))
    assert "Secretname" in (run_dir / PAGE).read_text()
    write_items_page(run_dir, RequestedItems(text=False, clinical=True))
    page = (run_dir / PAGE).read_text()
    assert "Secretname" not in page and "Does treatment" not in page and "20007" in page
    write_report(run_dir)
    for name in ("report.html", "report.md"):
        told = (run_dir / name).read_text()
        assert "Secretname" not in told and "Does treatment" not in told


def test_it_is_its_owners_alone_and_goes_with_the_text(run_dir: Path):
    (run_dir / PAGE).write_text("an earlier one")
    (run_dir / PAGE).chmod(0o644)
    write_items_page(run_dir, SHOWN)
    assert stat.S_IMODE((run_dir / PAGE).stat().st_mode) == 0o600
    store.write_json(run_dir / ".qmedtune", {"made_by": "qmedtune", "folder": "run", "format": 1})
    erase(run_dir)
    assert not (run_dir / PAGE).exists() and (run_dir / "run.json").is_file()
    with pytest.raises(RunError, match="erased"):
        write_items_page(run_dir, SHOWN)


def test_a_file_that_has_changed_gives_no_text(run_dir: Path, tmp_path: Path):
    path = tmp_path / "pubmedqa.json"
    records = json.loads(path.read_text())
    records["20003"]["final_decision"] = "maybe"
    path.write_text(json.dumps(records))
    assert any("not the one that was asked" in note for note in write_items_page(run_dir, SHOWN).left_out)
    path.unlink()
    assert any("cannot be read here" in note for note in write_items_page(run_dir, SHOWN).left_out)
    task = data_of((run_dir / PAGE).read_text())[0]
    assert task["texts"] == {} and task["rows"][3][0] == "20003"
    place = task["rows"][3][5][1][1]  # what final preferred keeps its name, which its row tells
    assert task["rows"][3][4][place] == "no"


def test_a_large_benchmark_stays_a_small_page_and_can_be_had_whole(tmp_path: Path):
    passage = "Of the patients in both arms the rate of events was followed. " * 25
    path = pubmedqa_file(tmp_path, 500, passage)
    run_dir = scored_run(tmp_path / "run", [{"task": "pubmedqa", "path": str(path)}])
    written = write_items_page(run_dir, SHOWN)
    assert written.bytes < 300_000 and any("--whole" in note for note in written.left_out)
    assert len(data_of((run_dir / PAGE).read_text())[0]["texts"]) == 500
    whole = write_items_page(run_dir, RequestedItems(whole=True))
    assert whole.bytes > 700_000 and whole.left_out == []


def test_of_thousands_of_items_what_changed_is_listed_and_all_are_counted(tmp_path: Path):
    run_dir = scored_run(tmp_path / "run", [{"task": "pubmedqa", "path": str(pubmedqa_file(tmp_path, 4000))}])
    written = write_items_page(run_dir, SHOWN)
    assert written.bytes < 300_000 and any("800 of 4,000 items are listed" in note for note in written.left_out)
    text = (run_dir / PAGE).read_text()
    [task] = data_of(text)
    changed = [row for row in task["rows"] if row[5][0][0] != row[5][1][0]]
    assert len(task["rows"]) == len(changed) == 800 and 'data-column="Items">4,000</td>' in text
    whole = write_items_page(run_dir, RequestedItems(whole=True))
    assert len(data_of((run_dir / PAGE).read_text())[0]["rows"]) == 4000 and whole.bytes > 700_000


def test_draws_of_examples_are_told_apart(tmp_path: Path):
    asked = {"task": "pubmedqa", "path": str(pubmedqa_file(tmp_path, 12)), "shots": 2, "shot_seeds": 3}
    run_dir = scored_run(tmp_path / "run", [asked])
    assert write_items_page(run_dir, SHOWN).items == {"pubmedqa-2shot": 36}
    [task] = data_of((run_dir / PAGE).read_text())
    assert [row[2] for row in task["rows"]] == [0] * 12 + [1] * 12 + [2] * 12 and len(task["texts"]) == 12


def test_answers_in_words_alone_are_held_against_each_other(tmp_path: Path):
    path = tmp_path / "hoc.jsonl"
    labels = ("evading growth suppressors", "inducing angiogenesis")
    lines = [{"pmid": f"{n}", "text": f"Abstract {n} of cells.", "labels": [labels[n % 2]]} for n in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_dir = scored_run(tmp_path / "run", [{"task": "hoc", "path": str(path)}])
    write_items_page(run_dir, SHOWN)
    [task] = data_of((run_dir / PAGE).read_text())
    assert task["measure"] == "right" and task["texts"]["3"][0][-1] == "Abstract 3 of cells."
    assert [[answer[0] for answer in row[5]] for row in task["rows"]] == [
        [1, 1],
        [0, 0],
        [0, 1],
        [1, 1],
        [0, 1],
        [0, 1],
    ]
    assert task["rows"][1][5][1][4] == "" and task["rows"][2][5][1][4] == labels[0]


def test_a_run_without_items_and_a_damaged_line_are_told(run_dir: Path, tmp_path: Path):
    path = run_dir / "evaluation" / "facts.items.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"id": "x", "base": {}}']) + "\n")
    store.seal(run_dir / "evaluation", "key", {})
    with pytest.raises(RunError, match=r"facts.items.jsonl:2: no answer of an evaluation"):
        write_items_page(run_dir, SHOWN)
    bare = tmp_path / "bare"
    bare.mkdir()
    recipe = load_recipe(MICRO, ["evaluate={}"]).recipe.model_dump(mode="json", by_alias=True)
    store.write_json(bare / "run.json", make_run(recipe=recipe, evaluation=Evaluation()).as_json())
    (bare / "evaluation").mkdir()
    store.seal(bare / "evaluation", "key", {})
    with pytest.raises(RunError, match="no items were scored"):
        write_items_page(bare, SHOWN)


def test_the_command_prints_where_it_is(run_dir: Path, capsys):
    assert cli.invoke(["items", str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run_dir / PAGE)
    assert cli.invoke(["items", str(run_dir), "--clinical-text", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["items"]["facts"] == 20 and told["left_out"] == []
    assert cli.invoke(["items", str(run_dir.parent)]) == 2


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def test_the_page_lists_filters_and_orders(browser, run_dir: Path):
    write_items_page(run_dir, SHOWN)
    with tab(browser, viewport={"width": 1280, "height": 900}) as seen:
        seen.page.goto((run_dir / PAGE).as_uri())
        page = seen.page
        assert page.locator("article").count() == 20 and page.locator("#told").inner_text() == "60 items"
        first = page.locator("article").first
        assert HOSTILE.split("\u2028")[0].strip() in first.inner_text() and page.title() == "items: items – qmedtune"
        page.locator("label.pick", has_text="gained").click()
        assert page.locator("#told").inner_text() == "20 of 60 items"
        assert set(page.locator("article .badge").all_inner_texts()) == {"gained"}
        page.select_option("#by", "written")
        page.check("#unread")
        assert "unread" in page.locator("article").first.inner_text()
        page.uncheck("#unread")
        page.fill("#search", "treatment 14 ")
        assert page.locator("article").count() <= 1
        page.select_option("#task", label="facts")
        assert page.locator("#search").input_value() == "" and page.locator("article").count() == 20
        assert "options that both find less likely" in page.locator("article").first.inner_text()
        assert page.locator("#pager").is_hidden()
        page.select_option("#task", label="pubmedqa")
        page.select_option("#order", "sure")
        page.click("#after")
        page.click("#after")
        assert page.locator("#where").inner_text() == "41 to 60 of 60" and page.locator("#after").is_disabled()
        page.select_option("#task", label="choice")
        assert page.locator(".question").count() == 0 and page.locator("article").count() == 20
        assert page.locator("#told").inner_text() == "24 items"
        assert seen.said == [] and seen.strangers("file:") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible_and_fits_every_width(browser, run_dir: Path, scheme: str):
    write_items_page(run_dir, SHOWN)
    write_report(run_dir)
    for name in (PAGE, "report.html"):  # whose calibration curve is new too
        for width in (390, 800, 1280):
            with tab(browser, viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True) as seen:
                seen.page.goto((run_dir / name).as_uri())
                assert seen.overflow() <= 0, (name, width)
                if width != 800:
                    assert seen.serious() == [], (name, width)
                assert seen.said == [] and seen.strangers("file:") == []


def test_without_scripts_the_figures_stand(browser, run_dir: Path):
    write_items_page(run_dir, SHOWN)
    with tab(browser, java_script_enabled=False) as seen:
        seen.page.goto((run_dir / PAGE).as_uri())
        assert "does not run" in seen.page.locator("noscript").inner_text()
        assert not seen.page.locator("#controls").is_visible()
        assert seen.page.locator("table").first.is_visible()
