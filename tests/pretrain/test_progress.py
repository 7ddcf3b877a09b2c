"""Progress that is kept in a file, for whoever asks how a job fares."""

import json
import time
from pathlib import Path

import pytest

import pretrain.progress
from pretrain.progress import progress


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "41_progress.json"
    monkeypatch.setenv("WORDLESS_PROGRESS", str(path))
    return path


def test_progress_is_kept_in_the_file_that_the_environment_names(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain.progress, "FILE_SECONDS", 0.0)
    with progress("train hubert1", total=400, unit="step", done=100) as advance:
        assert json.loads(file.read_text()) == {
            "what": "train hubert1",
            "done": 100.0,
            "total": 400.0,
            "unit": "step",
            "rate": None,
            "seconds_left": None,
            "note": "",
            "time": pytest.approx(time.time(), abs=60),
        }
        time.sleep(0.1)
        advance(10, note="loss 3.1")
        advance(10)
        state = json.loads(file.read_text())
    assert (state["done"], state["note"]) == (120.0, "loss 3.1")
    assert 0 < state["rate"] <= 20 / 0.1  # of what this process did, not of what was done before
    assert state["seconds_left"] == pytest.approx(280 / state["rate"])
    assert not list(file.parent.glob("*.tmp"))


def test_the_file_is_written_now_and_then_and_at_the_end_whatever_ends_it(file: Path) -> None:
    def done() -> float:
        return float(json.loads(file.read_text())["done"])

    with pytest.raises(KeyError), progress("encode", total=10, unit="s") as advance:
        for _ in range(7):
            advance(1)
        assert done() == 0.0  # not two seconds yet
        raise KeyError
    assert done() == 7.0


def test_work_goes_on_where_the_file_cannot_be_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORDLESS_PROGRESS", str(file.parent / "absent" / "file"))
    with progress("encode", total=1, unit="s") as advance:
        advance(1)
    assert list(file.parent.iterdir()) == []


def test_without_the_variable_no_file_is_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORDLESS_PROGRESS")
    with progress("encode", total=1, unit="s") as advance:
        advance(1, note="x")
    assert list(file.parent.iterdir()) == []
