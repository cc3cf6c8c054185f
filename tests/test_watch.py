"""How a run stands, told truly from outside; the list; what the watcher's server gives out, and to whom."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import make_evaluation, make_metrics, make_run, make_score, make_task, write_run
from conftest import ROOT, MicroRun
from watched import a_run, serving

from qmedtune import cli, heartbeat, store, ui
from qmedtune.errors import RecipeError
from qmedtune.results import Evaluation, Stage, StepEntry
from qmedtune.watching.access import Guard
from qmedtune.watching.runs import Shelf, lines
from qmedtune.watching.watch import Watching, open_server

EVIL = "<script>alert('x')</script>"


def test_a_run_that_says_it_runs_is_believed_as_long_as_its_lock_is_held(tmp_path: Path):
    run = a_run(tmp_path / "run", "running")
    with store.lock(run), ui.run_progress(["01-cpt"]) as shown, heartbeat.beating(run), shown.step("01-cpt"):
        deadline = time.monotonic() + 5
        while (beat := heartbeat.read(run)) is None or beat.progress.step is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            (run / heartbeat.FILE).unlink(missing_ok=True) if beat else None
        assert heartbeat.life(run, "running").status == "running"
        assert (beat.pid, beat.host, beat.progress.step) == (os.getpid(), os.uname().nodename, "01-cpt")
    assert not (run / heartbeat.FILE).exists()
    stands = heartbeat.life(run, "running")
    assert (stands.status, stands.killed) == ("stopped", True)


def beat_of(run: Path, host: str, at: float) -> None:
    beat = heartbeat.Beat(pid=1, host=host, at=at, started_at=at, progress=ui.Progress(step="02-sft"))
    (run / heartbeat.FILE).write_text(beat.model_dump_json())


def test_from_another_machine_the_beat_tells(tmp_path: Path):
    run = a_run(tmp_path / "run", "running")
    beat_of(run, "elsewhere", time.time() - 4)
    assert heartbeat.life(run, "running").status == "running"
    beat_of(run, "elsewhere", time.time() - 60)
    assert heartbeat.life(run, "running").killed
    beat_of(run, os.uname().nodename, time.time())  # here the lock is the truth, and nobody holds it
    assert heartbeat.life(run, "running").killed
    nobody = 2**22 + 1  # above Linux's highest process id
    with store.lock(run):  # as a worker holds it that a killed run has forked
        assert not heartbeat.life(run, "running").killed
        beat = heartbeat.Beat(
            pid=nobody, host=os.uname().nodename, at=time.time() - 60, started_at=0, progress=ui.Progress()
        )
        (run / heartbeat.FILE).write_text(beat.model_dump_json())
        assert heartbeat.life(run, "running").killed
    (run / heartbeat.FILE).write_text('{"pid": "half')
    assert heartbeat.life(run, "running").killed


def test_looking_at_a_lock_keeps_no_run_from_starting(tmp_path: Path):
    looking = threading.Event()

    def look() -> None:
        while not looking.is_set():
            heartbeat.is_held(tmp_path)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(50):
            with store.lock(tmp_path):
                pass
    finally:
        looking.set()
        thread.join()


def test_runs_are_listed_with_status_age_and_headline(tmp_path: Path, capsys: pytest.CaptureFixture):
    a_run(tmp_path / "good")
    a_run(tmp_path / "bad", "failed", error="RunError: no room\nmore", evaluation=None)
    a_run(tmp_path / "off", "stopped", evaluation=None)
    a_run(tmp_path / "gone", "running", evaluation=None)
    a_run(tmp_path / "sweep" / "arms" / "sft" / "seed-1")
    shutil.copytree(tmp_path / "good", tmp_path / "good" / "data" / "nested")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text('{"name": ')
    found = {line.name: line for line in lines(tmp_path)}
    assert set(found) == {"good", "bad", "off", "gone", "sweep/arms/sft/seed-1", "broken"}
    assert "run.json cannot be read" in found["broken"].headline
    assert found["good"].headline.startswith(
        "facts 0.06 → 0.81, pubmedqa 0.53 → 0.56 (within noise); perplexity fell on 2"
    )
    assert found["bad"].headline == "RunError: no room"
    assert (found["gone"].status, found["gone"].killed) == ("stopped", True)
    assert "killed" in found["gone"].headline and "the same command goes on" in found["off"].headline
    assert all(line.age_s < 60 for line in found.values())
    assert cli.invoke(["runs", str(tmp_path), "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == set(found)
    assert cli.invoke(["runs", str(tmp_path)]) == 0
    assert "stopped (killed)" in capsys.readouterr().out
    assert cli.invoke(["runs", str(tmp_path / "none")]) == 2


def test_many_tasks_are_counted(tmp_path: Path):
    known = make_evaluation().tasks
    tasks = {f"task{n}": known["facts"] for n in range(18)}
    tasks |= {"worse": make_task(make_score(0.8, 240), make_score(0.1, 240), 3, 171), "same": known["pubmedqa"]}
    a_run(tmp_path / "run", evaluation=Evaluation(tasks=tasks))
    assert lines(tmp_path)[0].headline == "18 better, 1 worse, 1 within noise"


def test_the_report_of_a_run_under_way_has_the_curve_of_its_stage(tmp_path: Path):
    stages = [make_run().stages[0], Stage(name="02-sft", kind="sft", status="to do")]
    steps = [step for step in make_run().steps if step.name in ("data/notes", "01-cpt")]
    steps.append(StepEntry(name="02-sft", kind="sft", status="to do"))
    run = make_run(status="running", stages=stages, steps=steps, evaluation=None, merge=None)
    metrics = make_metrics()
    write_run(tmp_path, run, [line for line in metrics if line["stage"] == "01-cpt"])
    building = tmp_path / ".building" / "02-sft"
    building.mkdir(parents=True)
    (tmp_path / "01-cpt").mkdir()
    for folder, stage in ((tmp_path / "01-cpt", "01-cpt"), (building, "02-sft")):
        logged = [json.dumps(line) + "\n" for line in metrics if line["stage"] == stage]
        (folder / "metrics.jsonl").write_text("".join(logged))
    with store.lock(tmp_path):
        assert cli.invoke(["report", str(tmp_path)]) == 0
        html = (tmp_path / "report.html").read_text()
    assert "No loss was logged" not in html and "under way in 02-sft" in html
    assert cli.invoke(["report", str(tmp_path)]) == 0
    assert "The run was stopped in 02-sft" in (tmp_path / "report.html").read_text()


# ---- the server ------------------------------------------------------------------------------------------------------


def get(address: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str):
    """(status, headers, text) of one request, whose target is sent as it is given."""
    host = address.split("/")[2]
    connection = http.client.HTTPConnection(host, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), text


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, micro_run: MicroRun) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("watched")
    a_run(folder / "good")
    notes = make_run().data["notes"]
    evil = make_run(name=EVIL, warnings=[EVIL], status="failed", error=EVIL, data={EVIL: notes})
    lines = [{"stage": EVIL, "step": 1, "loss": 1.0}, {"stage": EVIL, "step": 1, "validation": {EVIL: 2.0}}]
    write_run(folder / f"r{EVIL.replace('/', '-')}", evil, lines)
    (folder / "micro").symlink_to(micro_run.folder)  # a link is not followed
    shutil.copytree(micro_run.folder, folder / "packed")
    write_run(folder.parent, make_run(), [])  # outside of what is watched
    with serving(folder) as address:
        yield address


def test_pages_are_served_with_their_policy(site: str):
    for path in ("/", "/run/good/", "/run/good/parts", "/run/good/report", "/run/good/ask", "/run/packed/rows"):
        status, headers, text = get(site, path)
        assert status == 200 and text, path
        assert "script-src 'self'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
        assert len(text) < 300_000 and not re.search(r"(src|href)=\"https?:", text), path
    assert get(site, "/run/good/parts", If_None_Match=get(site, "/run/good/parts")[1]["ETag"])[0] == 304


@pytest.mark.parametrize(
    "path",
    ["/run/../run.json/", "/run/..%2F../parts", "/run/%2e%2e/", "/run/%2Fetc/", "/../../etc/passwd", "/run/micro/",
     "/run/good/..%2f..%2fetc", "/watch.js/../../runs.py", "/run/good", "/run/", "/.lock", "//etc/passwd"],
)  # fmt: skip
def test_nothing_outside_is_reached(site: str, path: str):
    status, _, text = get(site, path)
    assert status == 404 and "root:" not in text and "recipe_sha256" not in text


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example", "0.0.0.0"])
def test_a_host_that_is_not_this_machine_is_refused(site: str, host: str):
    assert get(site, "/", Host=host)[0] == 403
    assert get(site, "/run/good/parts", Host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1", "[::1]:8642"])
def test_a_forwarded_port_is_this_machine(site: str, host: str):
    assert get(site, "/", Host=host)[0] == 200


def test_only_its_own_page_may_ask(site: str):
    question, kind = json.dumps({"question": "?"}).encode(), "application/json"
    own = site.rstrip("/")
    for origin in (None, "http://evil.example", "null", "http://127.0.0.1:1"):
        headers = {"Origin": origin} if origin else {}
        assert get(site, "/run/good/ask", "POST", question, Content_Type=kind, **headers)[0] == 403
    assert get(site, "/run/good/ask", "POST", question, Content_Type="text/plain", Origin=own)[0] == 415
    assert get(site, "/run/good/ask", "POST", b"[]", Content_Type=kind, Origin=own)[0] == 400
    assert get(site, "/run/good/ask", "POST", b"x" * 200_000, Content_Type=kind, Origin=own)[0] == 413
    assert get(site, "/run/good/", "POST", question, Content_Type=kind, Origin=own)[0] == 405
    status, _, text = get(site, "/run/packed/ask", "POST", question, Content_Type=kind, Origin=own)
    assert status == 200 and json.loads(text)["side"] == "error" and "not finished" in text


def test_names_and_messages_are_text_never_markup(site: str):
    name = f"r{EVIL.replace('/', '-')}"
    from urllib.parse import quote

    for path in ("/", f"/run/{quote(name, safe='')}/", f"/run/{quote(name, safe='')}/report"):
        status, _, text = get(site, path)
        assert status == 200 and "<script>alert" not in text and "&lt;script&gt;alert" in text, path
    assert "<script>alert" not in get(site, "/run/" + quote(EVIL) + "/")[2]


def test_text_of_rows_only_where_asked_for_and_clinical_text_only_with_its_token(site: str, micro_run: MicroRun):
    note = json.loads((micro_run.folder / "data" / "notes" / "train.jsonl").open().readline())["text"].split()[0]
    bare = get(site, "/run/packed/rows?stage=01-cpt")[2]
    asked = get(site, "/run/packed/rows?stage=01-cpt&text=yes")[2]
    assert "<pre>" not in bare and 'class="strip"' in bare
    assert "<pre>" in asked and "Clinical text: not shown" in asked
    for wrong in ("row=-1", "row=9999999999999999", "row=%00", "stage=../../x", "row=10000"):
        assert get(site, f"/run/packed/rows?{wrong}")[0] == 200
    with serving(micro_run.folder, clinical_text=True) as address:
        token = address.partition("token=")[2]
        name = Shelf(micro_run.folder).all()[0].name
        assert get(address, "/")[0] == 403 and get(address, "/watch.js")[0] == 403
        assert get(address, "/?token=wrong")[0] == 403
        status, headers, _ = get(address, f"/run/{name}/rows?stage=01-cpt&text=yes&token={token}")
        assert (
            status == 303 and token not in headers["Location"] and "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
        )
        cookie = headers["Set-Cookie"].partition(";")[0]
        text = get(address, headers["Location"], Cookie=cookie)[2]
        assert "Clinical text: not shown" not in text and note in text


def test_the_token_guards_what_others_can_reach(tmp_path: Path):
    with serving(a_run(tmp_path / "run"), host="0.0.0.0") as address:
        assert "token=" in address
        local = address.replace("0.0.0.0", "127.0.0.1")
        assert get(local, "/")[0] == 403 and get(local, "/", Host="lab.example:1")[0] == 403
        assert get(local, "/?" + local.partition("?")[2])[0] == 303
    assert not Guard(1, "secret").knows_token(None) and Guard(1, "secret").knows_token("secret")


def test_a_taken_port_and_a_missing_folder_are_told(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RecipeError, match="is taken"):
            open_server(Watching(tmp_path, port=taken.getsockname()[1]))
    with pytest.raises(RecipeError, match="no such folder"):
        open_server(Watching(tmp_path / "none"))
    assert cli.invoke(["watch", str(tmp_path / "none")]) == 2


def test_the_script_names_no_other_host():
    folder = ROOT / "qmedtune" / "watching"
    for name in ("watch.js", "watch.css"):
        assert not re.search(r"https?://|//[a-z]+\.", (folder / name).read_text(encoding="utf-8")), name


# ---- runs beside each other ------------------------------------------------------------------------------------------


def answered(run: Path, right: list[bool], gold: str = "yes") -> None:
    folder = run / "evaluation"
    folder.mkdir()
    lines = []
    for number, correct in enumerate(right):
        row = {"id": f"q{number}", "gold": gold, "base": {"correct": False}, "final": {"correct": correct}}
        lines.append(json.dumps(row) + "\n")
    (folder / "facts.items.jsonl").write_text("".join(lines))


def test_runs_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture):
    recipe = make_run().recipe | {"stages": [{"cpt": {"lr": 2e-4}}, {"sft": {"epochs": 3}}]}
    other = json.loads(json.dumps(recipe))
    other["stages"][0]["cpt"]["lr"] = 1e-3
    first, second = a_run(tmp_path / "first", recipe=recipe), a_run(tmp_path / "second", recipe=other, seed=18)
    answered(first, [True] * 10 + [False] * 30)
    answered(second, [True] * 30)  # ten items fewer
    words = ["compare", str(first), str(second)]
    assert cli.invoke([*words, "--out", str(tmp_path / "both"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == [{"key": "stages[0].cpt.lr", "values": [2e-4, 1e-3]}]
    assert found["made_with"] == [{"key": "seed", "values": [17, 18]}]
    [duel] = found["duels"]
    assert (duel["n"], duel["gained"], duel["lost"], duel["verdict"]) == (30, 20, 0, "win")
    assert duel["p_value"] == pytest.approx(2 * 0.5**20)
    assert json.loads((tmp_path / "both" / "compare.json").read_text()) == found
    html = (tmp_path / "both" / "compare.html").read_text()
    assert "second against first: better on facts." in html and "01-cpt: held-out literature" in html
    assert cli.invoke(words) == 0
    assert "stages[0].cpt.lr" in capsys.readouterr().out
    assert cli.invoke([words[0], words[1]]) == 2 and cli.invoke([words[0], words[1], words[1]]) == 2
    assert cli.invoke([words[0], words[1], str(tmp_path / "none")]) == 2


def test_runs_of_several_precisions_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A difference may be one of the precision: each run's stands in its headline, in the tables and in the page."""
    evaluation = make_run().scored
    folders: list[str] = []
    for name, weights in (("first", "bfloat16"), ("second", "nf4")):
        taken = {"precision": "nf4" if weights == "nf4" else "delivered", "weights": weights}
        run = a_run(tmp_path / name, evaluation=evaluation.model_copy(update=taken))
        answered(run, [True] * 20)
        folders.append(str(run))
    assert cli.invoke(["compare", *folders, "--out", str(tmp_path / "both"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    said = ["bfloat16, as delivered", "NF4, as trained, not as delivered"]
    assert [run["scored_in"] for run in found["runs"]] == said
    assert all(run["headline"].endswith(f"; in {words}") for run, words in zip(found["runs"], said, strict=True))
    html = (tmp_path / "both" / "compare.html").read_text()
    assert f"scored in several precisions, which moves scores too (first in {said[0]}; second in {said[1]})" in html


def test_items_of_one_note_are_tested_together(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Ten notes of three questions each, of which a model gains seven whole and loses one: p is that of 8 notes."""
    first, second = a_run(tmp_path / "first"), a_run(tmp_path / "second")
    answered(first, [number // 3 == 9 for number in range(30)])
    answered(second, [number // 3 < 7 for number in range(30)])
    for run in (first, second):
        path = run / "evaluation" / "facts.items.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "group": n // 3}) + "\n" for n, row in enumerate(rows)))
    assert cli.invoke(["compare", str(first), str(second), "--json"]) == 0
    [duel] = json.loads(capsys.readouterr().out)["duels"]
    assert (duel["gained"], duel["lost"], duel["groups"]) == (21, 3, 10)
    assert duel["p_value"] == pytest.approx(2 * (1 + 8) / 2**8) and "sign flips" in duel["test"]


def test_items_of_one_number_but_another_answer_are_not_shared(tmp_path: Path, capsys: pytest.CaptureFixture):
    first, second = a_run(tmp_path / "first"), a_run(tmp_path / "second")
    answered(first, [True] * 4)
    answered(second, [True] * 4, gold="no")
    assert cli.invoke(["compare", str(first), str(second), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["duels"] == [] and [task["items"] for task in found["scores"]] == [None, None]
