"""`--on slurm` on a machine without SLURM: a sentence and status 2 before anything is written; a dry run
needs none of it."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import tomli_w

from wordless.cli import main


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the only one on the PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, list[str]]:
    """A verb without a config file, one with, a recipe with an array, and one of its stages."""
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "a.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 16000), 16000)
    index = {"source": str(tmp_path / "audio")}
    (tmp_path / "index.toml").write_text(tomli_w.dumps({**index, "out": str(tmp_path / "new" / "manifest")}))
    stages = {
        "manifest": {"verb": "index", **index},
        "codebook": {"verb": "cluster", "manifest": "@manifest", "num_classes": 4},
        "labels": {"verb": "encode", "manifest": "@manifest", "codebook": "@codebook", "slurm": {"array": 2}},
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps({"run": str(tmp_path / "run"), **stages}))
    return {
        "source": ["index", index["source"], str(tmp_path / "new" / "manifest")],
        "config": ["index", str(tmp_path / "index.toml")],
        "recipe": ["run", str(tmp_path / "recipe.toml")],
        "stage": ["run", str(tmp_path / "recipe.toml"), "--only", "manifest"],
    }


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("name", ["source", "config", "recipe", "stage"])
@pytest.mark.parametrize(
    ("there", "absent"),
    [((), "`sbatch` and no `srun`"), (("sbatch",), "`srun`"), (("srun",), "`sbatch`")],
    ids=["none", "sbatch", "srun"],
)
def test_submitting_without_slurm_is_one_sentence_and_writes_nothing(
    name: str,
    there: tuple[str, ...],
    absent: str,
    commands: dict[str, list[str]],
    programs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for program in there:
        (programs / program).write_text("#!/bin/sh\nexit 1\n")
        (programs / program).chmod(0o755)
    before = everything(tmp_path)
    assert main([*commands[name], "--on", "slurm"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    remedy = "go to a login node of the cluster, or use --on local or --dry-run"
    assert told.err == f"wordless: --on slurm: there is no {absent} here; {remedy}\n"
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["source", "config", "recipe", "stage"])
def test_a_dry_run_needs_no_slurm_and_writes_nothing(
    name: str,
    commands: dict[str, list[str]],
    programs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = everything(tmp_path)
    assert main([*commands[name], "--on", "slurm", "--dry-run"]) == 0
    assert "#SBATCH --time=60" in capsys.readouterr().out
    assert everything(tmp_path) == before
