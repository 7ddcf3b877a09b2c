"""docs/slurm.md on a real SLURM: its configs as shown, its commands in order."""

import re
import shlex
import time
from pathlib import Path

import pytest

from pretrain.store.artefact import is_complete
from tests.slurm.cluster import Cluster
from wordless.cli import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "slurm.md").read_text()


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_pages_commands_run_in_order(
    real_slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    configs = [fence for fence in fences("toml") if fence.startswith("# ")]
    for config in configs:
        Path(config.split(maxsplit=2)[1]).write_text(config)
    assert {path.name for path in tmp_path.glob("*.toml")} == {"units.toml", "base.toml"}
    commands = [shlex.split(line, comments=True) for fence in fences("sh") for line in fence.splitlines()]
    assert len(commands) >= 8
    for verb, *argv in (command[1:] for command in commands):
        if "slurm" in argv and "--dry-run" not in argv:
            argv += ["hubert.training.max_steps=1000"]  # still at work when the page cancels it
        if verb == "logs":
            deadline = time.monotonic() + 120
            while "train hubert" not in "".join(
                log.read_text() for log in Path("runs/units/jobs/hubert").glob("*/*_0_log.err")
            ):
                assert time.monotonic() < deadline, real_slurm.command("squeue")
                time.sleep(0.5)
        assert main([verb, *argv]) == 0, (verb, argv, capsys.readouterr().err)
        out = capsys.readouterr().out
        assert verb != "status" or "waiting" in out
        assert verb != "logs" or "train hubert" in out
        assert verb != "cancel" or {"hubert", "layers"} <= {
            line.split(":")[0] for line in out.splitlines() if "cancelled" in line
        }
    assert is_complete("runs/units/labels_mfcc")
    jobs = [path.name.partition("_")[0] for path in Path("runs/units/jobs").glob("*/*/*_submission.sh")]
    while set(jobs) & set(real_slurm.queue()):
        time.sleep(0.5)
    assert list(Path("runs/units/hubert").glob("step_*"))  # it saved before it ended
