"""Recipes go on without an optional stage that cannot be made: what is left out, when that is seen, and who
learns the reason."""

import errno
import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tomli_w

from pretrain.store.disk import DiskFull
from wordless.cli import main
from wordless.recipe import Recipe
from wordless.stage_records import reasons

Stages = dict[str, dict[str, Any]]


def make_stages(folder: Path) -> Stages:
    """Labels, and a report of them, of measures on a split that is not there, and of labels of audio that is
    not there."""
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        soundfile.write(
            folder / "audio" / f"{number}.wav", 0.1 * rng.standard_normal(16000).clip(-3, 3), 16000
        )
    return {
        "manifest": {"verb": "index", "source": str(folder / "audio")},
        "codebook": {"verb": "cluster", "manifest": "@manifest", "num_classes": 4},
        "labels": {"verb": "encode", "manifest": "@manifest", "codebook": "@codebook"},
        "units": {
            "verb": "measure",
            "manifest": "@manifest",
            "labels": "@labels",
            "split": "other",
            "optional": True,
        },
        "elsewhere": {"verb": "index", "source": str(folder / "nowhere"), "optional": True},
        "labels_elsewhere": {"verb": "encode", "manifest": "@elsewhere", "codebook": "@codebook"},
        "report": {
            "verb": "report",
            "out": "@",
            "manifest": "@manifest",
            "units": {"mfcc": "@units"},
            "labels": {"mfcc": "@labels", "elsewhere": "@labels_elsewhere"},
        },
    }


def run(stages: Stages, folder: Path, *arguments: str) -> int:
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps({"run": str(folder / "run"), **stages}))
    return main(["run", str(path), *arguments])


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    return make_stages(tmp_path)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The folder of a run that left three stages out, what it printed as JSON, and what it said."""
    folder, out, err = tmp_path_factory.mktemp("recipe"), io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert run(make_stages(folder), folder, "--json") == 0
    return folder, json.loads(out.getvalue()), err.getvalue()


def test_an_optional_stage_that_fails_is_left_out_with_those_that_read_it_and_the_page_has_the_reasons(
    ended: tuple[Path, dict[str, Any], str],
) -> None:
    folder, summary, told = ended
    assert "labels_elsewhere: left out: needs elsewhere, which was left out" in told
    assert "3 of 7 stages were left out:\n" in told.partition("report: report ->")[2]  # at the end
    found = reasons(folder / "run")
    assert found.keys() == summary["left_out"].keys() == {"units", "elsewhere", "labels_elsewhere"}
    assert "no utterances of split 'other'" in found["units"] and f"{folder}/nowhere" in found["elsewhere"]
    page = (folder / "run" / "report.html").read_text()
    assert "no utterances of split" in page and "needs elsewhere, which was left out" in page
    assert json.loads((folder / "run" / "stages" / "labels.json").read_text())["summary"]["utterances"] == 6


def test_what_the_manifest_lacks_is_seen_before_the_stages_after_it_begin(
    ended: tuple[Path, dict[str, Any], str],
) -> None:
    assert ended[2].index("units: left out") < ended[2].index("codebook: cluster")


def test_status_names_what_was_left_out(
    ended: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(ended[0] / "run"), "--json"]) == 0
    rows = {
        row["stage"]: (row["state"], row["note"]) for row in json.loads(capsys.readouterr().out)["stages"]
    }
    assert rows["labels"][0] == "done"
    assert rows["labels_elsewhere"] == ("left out", "needs elsewhere, which was left out")


def test_what_the_manifest_lacks_for_a_needed_stage_ends_the_run_before_the_stages_after_it_begin(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages["finer"] = {"verb": "cluster", "manifest": "@manifest", "num_classes": 5000}
    assert run(stages, tmp_path) == 2
    told = capsys.readouterr().err
    assert (
        "wordless: finer: num_classes: 5000 classes cannot be fitted on" in told
        and "codebook: cluster" not in told
    )


def test_a_needed_stage_that_fails_ends_the_run_with_a_page_of_what_there_is(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del stages["elsewhere"]["optional"]
    assert run(stages, tmp_path) == 2
    assert f"wordless: {tmp_path}/nowhere" in capsys.readouterr().err
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"<code>elsewhere</code>: {tmp_path}/nowhere: no such folder or file" in page
    assert main(["status", str(tmp_path / "run")]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("elsewhere"))
    assert "stopped" in row and f"{tmp_path}/nowhere: no such folder or file" in row


def test_a_stage_that_was_left_out_is_made_once_it_can_be(stages: Stages, tmp_path: Path) -> None:
    only = [word for name in stages if name not in ("units", "report") for word in ("--only", name)]
    assert run(stages, tmp_path, *only) == 0
    assert reasons(tmp_path / "run").keys() == {"elsewhere", "labels_elsewhere"}
    shutil.copytree(tmp_path / "audio", tmp_path / "nowhere")
    assert run(stages, tmp_path, *only) == 0
    assert reasons(tmp_path / "run") == {}


def test_of_an_optional_stage_that_is_asked_for_alone_the_reason_is_the_error(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(stages, tmp_path, "--only", "elsewhere") == 2
    assert f"wordless: elsewhere: {tmp_path}/nowhere" in capsys.readouterr().err


def test_stages_that_read_an_optional_one_are_optional_and_a_report_is_not(stages: Stages) -> None:
    assert Recipe({"run": "x", **stages}, "recipe.toml").optional == {
        "units",
        "elsewhere",
        "labels_elsewhere",
    }
    stages["units"]["optional"] = "yes"
    with pytest.raises(ValueError, match=r"units\.optional: true or false; got 'yes'"):
        Recipe({"run": "x", **stages}, "recipe.toml")


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("CUDA out of memory"), 0), (MemoryError(), 0), (OSError(5, "Input/output error"), 0)],
)
def test_whatever_ends_an_optional_stage_the_others_and_the_page_go_on(
    error: Exception,
    status: int,
    stages: Stages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stages["units"].pop("split")

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("quantize.measuring.measure", fail)
    assert run(stages, tmp_path) == status
    assert f"units: left out: {type(error).__name__}: " in capsys.readouterr().err
    assert type(error).__name__ in (tmp_path / "run" / "report.html").read_text()


def test_a_full_disk_ends_the_run_whichever_stage_meets_it(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise DiskFull(tmp_path, errno.ENOSPC, 1000, at_least=False)

    monkeypatch.setattr("quantize.measuring.measure", fail)
    stages["units"].pop("split")
    assert run(stages, tmp_path) == 2
    assert "units: left out" not in capsys.readouterr().err
    assert "failed" in json.loads((tmp_path / "run" / "stages" / "units.json").read_text())


def test_a_report_by_itself_has_the_reasons_that_the_recipe_recorded(
    ended: tuple[Path, dict[str, Any], str],
) -> None:
    folder, _, _ = ended
    config = {
        "verb": "report",
        "out": str(folder / "run"),
        "manifest": str(folder / "run" / "manifest"),
        "units": {"mfcc": str(folder / "run" / "units")},
    }
    (folder / "report.toml").write_text(tomli_w.dumps(config))
    assert main(["report", str(folder / "report.toml")]) == 0
    assert "no utterances of split" in (folder / "run" / "report.html").read_text()
