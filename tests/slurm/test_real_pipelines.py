"""Recipes and single verbs on a real SLURM, through the command line: the demo as dependent jobs, a stage
that fails, jobs that are cancelled, code that changes under a job."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tomli_w

from pretrain.store.artefact import is_complete, read_meta
from slurm.launch import launch
from slurm.snapshot import NAMES
from tests.pretrain.conftest import write_corpus
from tests.slurm.cluster import Cluster
from tests.test_pipeline import DEMO, shrunk
from wordless.cli import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ON = ("--on", "slurm")


class Said(NamedTuple):
    status: int
    out: str
    err: str


def wordless(*argv: str | Path) -> Said:
    """A command line, here; module-wide fixtures have no capsys."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main([str(part) for part in argv])
    return Said(status, out.getvalue(), err.getvalue())


def rows(run: Path) -> dict[str, dict[str, Any]]:
    """What `wordless status --json` tells of each stage."""
    return {row["stage"]: row for row in json.loads(wordless("status", run, "--json").out)["stages"]}


def states(run: Path) -> dict[str, str]:
    return {name: row["state"] for name, row in rows(run).items()}


def wait(what: Callable[[], Any], seconds: float, tell: Callable[[], Any]) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, tell()
        time.sleep(0.3)


def wait_until_over(slurm: Cluster, run: Path, seconds: float) -> None:
    """Until none of a run's jobs is left in the queue."""
    jobs = {row["job"] for row in rows(run).values()}
    tell = lambda: f"{slurm.command('squeue')}\n{wordless('status', run).out}"  # noqa: E731
    wait(lambda: not jobs & {job_id.split("_")[0] for job_id in slurm.queue()}, seconds, tell)


@pytest.fixture(scope="module")
def cluster(real_slurm: Cluster) -> Any:
    """The cluster, and an environment in which jobs take one core each and find this checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        yield real_slurm


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of eight seconds of noise."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    waves = [0.1 * rng.standard_normal(16000) for _ in range(8)]
    write_corpus(folder, waves, splits=["train"] * 6 + ["dev"] * 2, texts=["a b"] * 8)
    return folder


# The demo


class Demo(NamedTuple):
    there: Path  # the run as dependent jobs
    here: Path  # and in this process
    said: Said


@pytest.fixture(scope="module")
def demo(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    there, here = folder / "there", folder / "here"
    asked = ["slurm.cpus_per_task=1", "labels1.slurm.array=2", "labels2.slurm.partition=high"]
    said = wordless("run", DEMO, f"run={there}", *shrunk(DEMO), *asked, *ON)
    assert wordless("run", DEMO, f"run={here}", *shrunk(DEMO)).status == 0
    wait_until_over(cluster, there, 300)
    return Demo(there, here, said)


def test_a_recipe_becomes_a_job_per_stage_and_a_table(demo: Demo) -> None:
    assert demo.said.status == 0
    lines = {line.split()[0]: line for line in demo.said.out.splitlines()}
    assert len(lines) == 1 + 26
    assert "2 x" in lines["labels1"]
    assert lines["labels2"].endswith("high  codebook2")  # which waits for the others that it reads


def test_every_stage_is_done_and_says_so(demo: Demo) -> None:
    said = wordless("status", demo.there)
    assert said.status == 0, said.out
    assert set(states(demo.there).values()) == {"done"}, said.out
    assert list(states(demo.there)) == list(states(demo.here))
    assert "2 of 2" in rows(demo.there)["labels1"]["note"]


def test_the_units_are_those_of_the_recipe_run_here(demo: Demo) -> None:
    for name in ("codebook_mfcc", "labels_mfcc", "codebook1", "labels1", "codebook2", "labels2"):
        assert read_meta(demo.there / name)["fingerprint"] == read_meta(demo.here / name)["fingerprint"], name
    for path in demo.here.glob("*/meta.json"):
        assert is_complete(demo.there / path.parent.name)
    assert (demo.there / "report.html").is_file()
    summaries = [json.loads((run / "summary.json").read_text()) for run in (demo.there, demo.here)]
    assert summaries[0].keys() == summaries[1].keys()
    assert summaries[0]["stages"].keys() == summaries[1]["stages"].keys()


def test_the_same_command_finds_nothing_left_to_submit(demo: Demo) -> None:
    said = wordless("run", DEMO, f"run={demo.there}", *shrunk(DEMO), "slurm.cpus_per_task=1", *ON)
    assert said.status == 0
    assert said.err.count("finished already") == 25


@pytest.mark.parametrize("verb", ["index", "compare", "transfer"])
def test_a_single_verb_runs_as_a_job(cluster: Cluster, demo: Demo, tmp_path: Path, verb: str) -> None:
    out, run = tmp_path / "made", demo.there
    settings: dict[str, Any] = {
        "index": {"source": str(run / "speech" / "audio"), "out": str(out)},
        "compare": {"a": str(run / "text_pretrained"), "b": str(run / "text_scratch"), "out": str(out)},
        "transfer": {
            "manifest": str(run / "manifest"),
            "encoder": str(run / "hubert2"),
            "budgets": ["0.5min"],
            "out": str(out),
            "finetune": {
                "training": {"max_steps": 2, "validate_every": 0},
                "batches": {"batch_seconds": 20},
                "ctc": {"freeze_steps": 0},
                "characters": "abcdefghijklmnopqrstuvwxyz|",
            },
        },
    }
    (tmp_path / "config.toml").write_text(tomli_w.dumps({"slurm": {"cpus_per_task": 1}, **settings[verb]}))
    assert wordless(verb, tmp_path / "config.toml", *ON).status == 0
    wait_until_over(cluster, out, 120)
    assert states(out) == {"made": "done"}, wordless("status", out).out
    assert is_complete(out)


# A stage that fails


def test_a_failing_stage_ends_what_waits_for_it_and_the_mended_command_goes_on(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    run, recipe = tmp_path / "run", tmp_path / "recipe.toml"
    recipe.write_text(
        tomli_w.dumps(
            {
                "run": str(run),
                "slurm": {"cpus_per_task": 1},
                "codebook": {
                    "verb": "cluster",
                    "manifest": str(corpus / "manifest"),
                    "split": "train",
                    "features": "mfcc",
                    "num_classes": 9,
                },
                "labels": {"verb": "encode", "manifest": str(corpus / "manifest"), "codebook": "@codebook"},
                "units": {"verb": "pack", "manifest": str(corpus / "manifest"), "labels": "@labels"},
            }
        )
    )
    assert wordless("run", recipe, "codebook.num_classes=20000", *ON).status == 0
    wait_until_over(cluster, run, 90)
    said = wordless("status", run)
    assert said.status == 1
    assert states(run) == {"codebook": "failed", "labels": "stopped", "units": "stopped"}, said.out
    assert "num_classes" in said.out or "20000" in said.out  # the last lines of its stderr
    assert "wordless run" in said.out
    assert "20000" in wordless("logs", run, "codebook").out
    assert wordless("run", recipe, *ON).status == 0
    wait_until_over(cluster, run, 90)
    assert wordless("status", run).status == 0
    assert states(run) == {"codebook": "done", "labels": "done", "units": "done"}


# Cancelling


def test_a_cancelled_run_has_saved_and_the_same_command_goes_on(
    cluster: Cluster, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = tmp_path / "run", tmp_path / "recipe.toml"
    monkeypatch.setitem(launch.__kwdefaults__, "target", "tests.slurm.slow_training:main")  # type: ignore[arg-type]
    manifest = str(corpus / "manifest")
    tree = {
        "run": str(run),
        "codebook": {
            "verb": "cluster",
            "manifest": manifest,
            "split": "train",
            "features": "mfcc",
            "num_classes": 9,
        },
        "labels": {"verb": "encode", "manifest": manifest, "codebook": "@codebook"},
        "hubert": {
            "verb": "pretrain",
            "objective": "hubert",
            "manifest": manifest,
            "labels": "@labels",
            "slurm": {"nodes": 2},
            "encoder": {"architecture": "tiny", "num_mels": 20},
            "batches": {"batch_seconds": 2.0},
            "training": {"max_steps": 40, "log_every": 1, "checkpoint_every": 1000},
        },
        "layers": {
            "verb": "measure",
            "manifest": manifest,
            "encoder": "@hubert",
            "layers": "all",
            "fit_split": "train",
            "split": "dev",
            "num_classes": 9,
        },
    }

    def submit(step_seconds: float) -> None:
        setup = [f"export PYTHONPATH={shlex.quote(str(ROOT))}", f"export STEP_SECONDS={step_seconds}"]
        recipe.write_text(tomli_w.dumps({**tree, "slurm": {"cpus_per_task": 1, "setup": setup}}))
        said = wordless("run", recipe, *ON)
        assert said.status == 0, said.err

    submit(0.5)
    wait(lambda: (rows(run)["hubert"]["share"] or 0) > 0.1, 120, lambda: wordless("status", run).out)
    fares = rows(run)
    assert (fares["hubert"]["state"], fares["layers"]["state"]) == ("running", "waiting")
    assert (
        fares["hubert"]["unit"] == "step"
        and fares["hubert"]["rate"] > 0
        and fares["hubert"]["seconds_left"] > 0
    )
    assert "loss" in fares["hubert"]["note"]
    assert "hubert: pretrain -> " in wordless("logs", run, "hubert").out
    assert "_1_log.err" in wordless("logs", run, "hubert", "--task", "1").out
    said = wordless("cancel", run)
    assert said.status == 0
    assert {line.split(":")[0] for line in said.out.splitlines()} >= {"hubert", "layers"}
    wait_until_over(cluster, run, 60)
    assert {name: states(run)[name] for name in ("hubert", "layers")} == {
        "hubert": "stopped",
        "layers": "stopped",
    }
    assert wordless("status", run).status == 0
    assert "stopped by SIGTERM after step" in wordless("logs", run, "hubert").out
    assert len(list((run / "hubert").glob("step_*"))) == 1
    submit(0.0)
    wait_until_over(cluster, run, 90)
    assert set(states(run).values()) == {"done"}, wordless("status", run).out
    steps = [json.loads(line)["step"] for line in (run / "hubert" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))


# Code that changes under a job


@pytest.mark.parametrize("snapshot", [True, False])
def test_a_job_with_a_snapshot_runs_the_code_that_was_there_when_it_was_submitted(
    cluster: Cluster, corpus: Path, tmp_path: Path, snapshot: bool
) -> None:
    checkout, out = tmp_path / "checkout", tmp_path / "manifest"
    checkout.mkdir()
    for name in NAMES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, checkout / name)
    argv = [
        "index",
        str(corpus),
        str(out),
        f"slurm.snapshot={json.dumps(snapshot)}",
        "slurm.partition=low",
        "slurm.cpus_per_task=1",
    ]
    code = f"import sys, wordless.cli; sys.exit(wordless.cli.main({[*argv, *ON]!r}))"
    cluster.command("scontrol", "update", "PartitionName=low", "State=DOWN")  # what is submitted now waits
    try:
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=checkout, check=True, capture_output=True
        )
        assert states(out) == {"manifest": "queued"}
        indexing = checkout / "pretrain" / "data" / "indexing.py"
        indexing.write_text(
            indexing.read_text() + "\nraise RuntimeError('edited while the job was waiting')\n"
        )
    finally:
        cluster.command("scontrol", "update", "PartitionName=low", "State=UP")
    wait_until_over(cluster, out, 60)
    assert states(out) == {"manifest": "done" if snapshot else "failed"}, wordless("status", out).out
    if not snapshot:
        assert "edited while the job was waiting" in wordless("status", out).out
