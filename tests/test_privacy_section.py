"""`privacy` of run.json and the reports: which files hold text, what was searched, what may be memorised, what was
erased."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from builders import make_run
from conftest import MicroRun

from qmedtune import cli, record, store
from qmedtune.errors import RunError
from qmedtune.privacy import holds_text
from qmedtune.report import markdown
from qmedtune.reporting.facts import Metrics
from qmedtune.reporting.page import page
from qmedtune.results import Audit, Exposure, Identifiers, Privacy, Remembered, Run, Scan, Source, Terms, TextFolder
from qmedtune.verify import verify


@pytest.fixture
def copy(micro_run: MicroRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro_run.folder, tmp_path / "run"))


def told(run: Path) -> Privacy:
    found = record.read(run)
    assert found is not None and found.privacy is not None and record.is_whole(found)
    return found.privacy


def reports(run: Path) -> tuple[str, str]:
    return (run / "report.md").read_text(), (run / "report.html").read_text()


def on_disk(run: Path) -> dict[str, tuple[int, int]]:
    """Files and bytes below data/, by step: counted without any seal."""
    found: dict[str, tuple[int, int]] = {}
    for path in (run / "data").rglob("*"):
        if path.is_file() and path.name != store.SEAL:
            step = "/".join(path.relative_to(run).parts[:2])
            files, size = found.get(step, (0, 0))
            found[step] = (files + 1, size + path.stat().st_size)
    return found


def test_files_with_text_are_those_on_the_disk(copy: Path):
    found = told(copy)
    counted = {each.folder: (each.files, each.bytes) for each in found.files}
    assert found.text == "held" and counted == on_disk(copy) and len(counted) >= 4
    sources = {each.folder: each.sources for each in found.files}
    assert sources["data/notes"] == ["notes"]
    assert sorted(sources["data/01-cpt"]) == ["general", "literature", "notes"]
    modes = {each.source: each.mode for each in found.scanned}
    assert modes["notes"] == "report" and modes["literature"] is None
    for text in reports(copy):
        for said in ("Files with text", "data/notes", "looked for and counted, left in place", "not looked for",
                     "no de-identification under HIPAA", "erase RUN", "Licences and terms"):  # fmt: skip
            assert said in text, said


def test_after_erase_all_of_them_say_so(copy: Path, capsys: pytest.CaptureFixture[str]):
    before = on_disk(copy)
    assert cli.invoke(["erase", str(copy), "--text"]) == 0
    found = told(copy)
    assert found.text == "erased" and found.files == []
    assert found.erased == sum(files for files, _ in before.values()) and found.erased_at is not None
    for text in reports(copy):
        assert f"Erased: {found.erased} files with text were removed" in text
    assert {each.source: each.mode for each in found.scanned}["notes"] == "report"
    capsys.readouterr()
    assert cli.invoke(["report", str(copy), "--verify"]) == 0
    assert f"erased: {found.erased} files" in capsys.readouterr().out


def test_text_put_back_into_an_erased_run_is_found(copy: Path):
    kept = (copy / "data" / "notes" / "train.jsonl").read_bytes()
    stat = (copy / "data" / "notes" / "train.jsonl").stat()
    assert cli.invoke(["erase", str(copy), "--text"]) == 0
    (copy / "data" / "notes" / "train.jsonl").write_bytes(kept)
    os.utime(copy / "data" / "notes" / "train.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(RunError, match=r"data/notes: holds text, and run\.json says that none is there"):
        verify(copy)


def test_a_file_that_another_folder_holds_too_is_told(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    os.link(copy / "data" / "notes" / "train.jsonl", tmp_path / "elsewhere.jsonl")
    (copy / ".history").mkdir()  # a second name within the run goes with it
    os.link(copy / "data" / "notes" / "heldout.jsonl", copy / ".history" / "heldout.jsonl")
    assert cli.invoke(["erase", str(copy), "--text", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["elsewhere"] == 1
    assert "1 of these files have another name outside of" in said.err


def test_all_runs_of_an_ablation_are_erased_at_once(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ablation = tmp_path / "ablation"
    for arm in ("base", "cpt"):
        shutil.copytree(copy, ablation / "arms" / arm / "seed-17", copy_function=os.link)
        (ablation / "arms" / arm / "seed-17" / ".lock").unlink()
    shutil.rmtree(copy)
    assert cli.invoke(["erase", str(ablation), "--text", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["elsewhere"] == 0
    for path in ablation.rglob("*"):
        run = ablation / Path(*path.relative_to(ablation).parts[:3])
        assert not path.is_file() or not holds_text(path.relative_to(run).as_posix()), path


def audited() -> Run:
    """Two stages; the canaries of the first were looked for."""
    rows = [
        Exposure(source="notes", repeats=0, canaries=8, exposure=1.3, highest=3, extracted=0, passes=3, masked=False),
        Exposure(source="notes", repeats=4, canaries=8, exposure=5.2, highest=7, extracted=3, passes=3, masked=False),
    ]
    return make_run(audit=Audit(stages={"01-cpt": rows}, references=127))


def test_what_weights_may_have_memorised_is_measured_or_said_not_to_be(tmp_path: Path):
    from qmedtune import privacy

    run = audited()
    found = privacy.of(tmp_path, run)
    assert found.memorised == [
        Remembered(stage="01-cpt", clinical=["notes"], canaries=8, extracted=3, exposure=5.2),
        Remembered(stage="02-sft", clinical=["notes"]),  # builds on what the first has learnt
    ]
    run = run.model_copy(update={"privacy": found})
    for text in (markdown(run, Metrics()), page(run, Metrics())):
        assert "3 of 8 planted secrets extracted, exposure up to 5.2 bits" in text
        assert "not audited: ask with" in text and "patient data, site agreement" in text


def test_a_run_of_an_earlier_version_has_no_such_section():
    run = make_run()
    assert run.privacy is None
    assert "## Privacy" not in markdown(run, Metrics()) and 'id="privacy"' not in page(run, Metrics())
    assert "Licences and terms" in page(run, Metrics())


def test_nothing_in_the_section_is_markup():
    evil = "<script>x</script>`|\n## y"
    run = make_run(
        data={evil: Source(kind=evil, phi=Identifiers(mode="report", classes={evil: 1}))},
        privacy=Privacy(
            text="held",
            files=[TextFolder(folder=evil, files=1, bytes=1, sources=[evil])],
            scanned=[Scan(source=evil, kind=evil, mode=evil, classes={evil: 1})],
            memorised=[Remembered(stage=evil, clinical=[evil])],
            terms=[Terms(of=evil, license=evil, terms=evil)],
            erased=1,
            erased_at=evil,
        ),
    )
    assert "<script" not in page(run, Metrics())
    text = markdown(run, Metrics()).partition("## Recipe")[0]
    assert "<script" not in text and "\n## y" not in text
