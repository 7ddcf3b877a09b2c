"""Training on a real SLURM whose jobs are preempted, requeued, out of time, cancelled and robbed of a node;
all at once, as that takes SLURM its time. Each run must end as if nothing had happened."""

import re
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from pretrain.data.utterance import num_frames
from slurm.follow import Launched
from slurm.jobs import Queue
from slurm.launch import launch
from slurm.resources import Resources
from slurm.status import read_rows
from slurm.submission import TaskStatus, read_submission, task_statuses
from tests.pretrain.conftest import write_corpus, write_labels
from tests.pretrain.runs import curve
from tests.slurm.cluster import CPUS_PER_NODE, Cluster
from wordless.cli import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS, STEP_SECONDS = 30, 0.4
STILL = {"input_dropout": 0.0, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
TWO_NODES = Resources(nodes=2, cpus_per_task=1)
# two jobs of this size leave no room for a third one beside them and some small ones
BIG = CPUS_PER_NODE // 3


@dataclass
class Scene:
    """A folder with a run per scenario, and the jobs that make them."""

    folder: Path
    slurm: Cluster
    jobs: dict[str, Launched] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)  # what `status` says of the jobs of a node that is down

    def argv(self, name: str, *overrides: str) -> list[str]:
        return ["pretrain", str(self.folder / "hubert.toml"), f"out={self.run(name)}", *overrides]

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def submit(
        self,
        name: str,
        resources: Resources,
        *overrides: str,
        step_seconds: float = STEP_SECONDS,
        target: str = "main",
    ) -> None:
        setup = (
            "export OMP_NUM_THREADS=1",
            f"export PYTHONPATH={shlex.quote(str(ROOT))}",
            f"export STEP_SECONDS={step_seconds}",
        )
        self.jobs[name] = launch(
            self.argv(name, *overrides),
            "slurm",
            resources.model_copy(update={"setup": setup}),
            self.run(name).parent / "jobs" / name,
            wait=False,
            target=f"tests.slurm.slow_training:{target}",
        )

    def steps(self, name: str) -> int:
        """How many steps a run has done."""
        log = self.run(name) / "metrics.jsonl"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def task(self, name: str, rank: int = 0) -> TaskStatus:
        folder = self.jobs[name].folder
        status = task_statuses(folder, read_submission(folder))[0][rank]
        assert status is not None
        return status

    def record(self, name: str) -> dict[str, str]:
        return self.slurm.job(self.jobs[name].job_id)

    def stderr(self, name: str) -> str:
        return self.jobs[name].stderr.read_text()

    def wait(self, what: Callable[[], Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.tell()
            time.sleep(0.5)

    def wait_until_over(self, *names: str, seconds: float) -> None:
        ids = {self.jobs[name].job_id for name in names}
        self.wait(lambda: not ids & set(self.slurm.queue()), seconds)

    def tell(self) -> str:
        """What to look at where something is not as it should be."""
        texts = [self.slurm.command("squeue", "--format=%i %j %T %r %M %l %N")]
        for name, job in self.jobs.items():
            for path in sorted(job.folder.glob("*_log.err")):
                texts.append(f"{name} {path.name} ({self.steps(name)} steps):\n" + path.read_text()[-1500:])
        return "\n".join(texts)


def write_config(folder: Path) -> None:
    rng, lengths = np.random.default_rng(0), [9000, 4000, 12000, 30000, 7000, 16000, 5000, 6000]
    waves = [0.1 * rng.standard_normal(length) for length in lengths]
    manifest = write_corpus(folder / "corpus", waves, splits=["train"] * 6 + ["dev"] * 2)
    labels = write_labels(
        folder / "labels", {name: num_frames(n) for name, n in zip(manifest.ids, lengths, strict=True)}
    )
    config = {
        "manifest": str(folder / "corpus" / "manifest"),
        "labels": str(labels),
        "objective": "hubert",
        "encoder": {"architecture": "tiny", "num_mels": 20, **STILL, "layer_drop": 0.5, "num_layers": 3},
        "hubert": {"final_dim": 16, "unmasked_weight": 0.5},
        "batches": {"batch_seconds": 2.0, "crop_seconds": 0.8},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "clip_norm": 1.0},
        "alarm": {"after_steps": 1000},
        "training": {
            "max_steps": STEPS,
            "log_every": 1,
            "checkpoint_every": 1000,
            "validate_every": 10,
            "device": "cpu",
        },
    }
    (folder / "hubert.toml").write_text(tomli_w.dumps(config))


@pytest.fixture(scope="module")
def scene(real_slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Every scenario, from submission to end. Where no node dies, nothing is saved but what a signal makes be
    saved."""
    scene = Scene(tmp_path_factory.mktemp("training"), real_slurm)
    write_config(scene.folder)
    on_one = Resources(nodelist="n1", cpus_per_task=1, time_minutes=10)
    noisy = "encoder.dropout=0.1"
    # The signal comes after 40 s, or up to half a minute before that: this SLURM looks at its clock every 30
    # s.
    short = {"time_minutes": 1, "signal_seconds": 20}
    scene.submit("out_of_time", on_one.model_copy(update=short), noisy, step_seconds=48 / STEPS)
    with pytest.MonkeyPatch.context() as limit:
        limit.setattr("slurm.launch.MAX_TIMEOUTS", 0)
        scene.submit("hopeless", on_one.model_copy(update=short), noisy, step_seconds=10)
    scene.submit("preempted", on_one.model_copy(update={"partition": "low", "cpus_per_task": BIG}), noisy)
    scene.submit("graced", on_one.model_copy(update={"partition": "grace", "cpus_per_task": BIG}), noisy)
    scene.submit("requeued", on_one, noisy)
    scene.submit("cancelled", on_one, noisy)
    scene.submit("two_requeued", TWO_NODES)
    disturb = {  # as soon as these have done a few steps
        ("preempted", "graced"): (
            "sbatch",
            "--partition=high",
            "--nodelist=n1",
            f"--cpus-per-task={2 * BIG}",
            "--output=/dev/null",
            "--wrap",
            "sleep 2",
        ),
        ("requeued",): ("scontrol", "requeue", scene.jobs["requeued"].job_id),
        ("two_requeued",): ("scontrol", "requeue", scene.jobs["two_requeued"].job_id),
        ("cancelled",): ("scancel", scene.jobs["cancelled"].job_id),
    }

    def disturb_those_on_their_way() -> bool:
        for names in [names for names in disturb if all(scene.steps(name) >= 3 for name in names)]:
            scene.slurm.command(*disturb.pop(names))
        return not disturb

    scene.wait(disturb_those_on_their_way, 120)
    scene.submit("told_too_late", on_one, target="told_to_stop_too_late")
    scene.submit("two", TWO_NODES, step_seconds=0)
    scene.submit("two_sharded", TWO_NODES, "training.sharding=full", step_seconds=0)
    assert main(scene.argv("noisy", noisy)) == main(scene.argv("still")) == 0
    waiting_for_its_time = {"out_of_time", "hopeless"}  # on the first node, and in no hurry
    scene.wait_until_over(*(scene.jobs.keys() - waiting_for_its_time), seconds=200)
    lose_a_node(scene)
    scene.wait_until_over(*waiting_for_its_time, seconds=200)
    return scene


def lose_a_node(scene: Scene) -> None:
    """The second node dies in the middle of a job of two nodes and of one that it has to itself, and comes
    back."""
    often = "training.checkpoint_every=5"
    scene.submit("two_lost", TWO_NODES, often)
    scene.submit("lost", Resources(nodelist="n2", cpus_per_task=1), often)
    scene.wait(lambda: all(scene.steps(name) >= 8 for name in ("two_lost", "lost")), 60)
    scene.slurm.kill_node("n2")
    scene.wait(
        lambda: (
            "down"
            in scene.slurm.command("sinfo", "--noheader", "--nodes=n2", "--partition=main", "--format=%T")
        ),
        90,
    )
    scene.told = [row.state for name in ("two_lost", "lost") for row in read_rows(scene.run(name), Queue())]
    scene.slurm.start_node("n2")
    scene.wait_until_over("two_lost", "lost", seconds=120)


def weights(run: Path) -> bytes:
    return (run / f"step_{STEPS:08d}" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["preempted", "graced", "requeued", "out_of_time"])
def test_a_disturbed_run_ends_as_an_undisturbed_one(scene: Scene, name: str) -> None:
    assert scene.record(name)["JobState"] == "COMPLETED", scene.tell()
    assert int(scene.record(name)["Restarts"]) >= 1
    assert curve(scene.run(name)) == curve(scene.run("noisy"))
    assert weights(scene.run(name)) == weights(scene.run("noisy"))
    assert (scene.task(name).state, scene.task(name).status) == ("finished", 0)
    assert scene.task(name).attempt >= 2


@pytest.mark.parametrize("name", ["preempted", "graced", "requeued", "two_requeued", "out_of_time"])
def test_what_a_signal_saved_is_gone_on_from(scene: Scene, name: str) -> None:
    signal = "SIGUSR2" if name == "out_of_time" else "SIGTERM"
    stopped = re.search(rf"stopped by {signal} after step (\d+), saved", scene.stderr(name))
    assert stopped is not None
    # each step's line is in the log once, or `curve` would not be the same: none was done again
    assert int(stopped[1]) >= 1


def test_only_running_out_of_time_is_charged_as_a_timeout(scene: Scene) -> None:
    timeouts = {
        name: scene.task(name).timeouts for name in ("preempted", "graced", "requeued", "two_requeued")
    }
    assert timeouts == dict.fromkeys(timeouts, 0)
    assert scene.task("out_of_time").timeouts >= 1


def test_a_job_that_has_run_out_of_time_too_often_ends_and_says_so(scene: Scene) -> None:
    assert scene.record("hopeless")["Restarts"] == "0"
    assert scene.record("hopeless")["JobState"] != "COMPLETED"
    assert scene.task("hopeless").state in ("failed", "stopped")
    assert "CommandFailed: out of time" in scene.stderr("hopeless")


def test_a_cancelled_job_has_saved_and_does_not_come_back(scene: Scene) -> None:
    record = scene.record("cancelled")
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0")
    assert scene.task("cancelled").state == "stopped"
    assert 3 <= scene.steps("cancelled") < STEPS
    assert list(scene.run("cancelled").glob("step_*"))


def test_a_signal_at_the_very_end_does_not_fail_a_finished_job(scene: Scene) -> None:
    """SLURM sends one to a node that was away for a moment, for a step of the same number that has ended long
    since."""
    assert scene.record("told_too_late")["JobState"] == "COMPLETED", scene.tell()


@pytest.mark.parametrize("name", ["two", "two_sharded"])
def test_two_nodes_train_as_one_process_does(scene: Scene, name: str) -> None:
    assert scene.record(name)["NodeList"] == "n[1-2]"
    for alone, together in zip(curve(scene.run("still")), curve(scene.run(name)), strict=True):
        for line in (alone, together):  # of a micro-batch, so they depend on the split
            for key in [key for key in line if key.endswith("_variation")]:
                del line[key]
        # Sums in another order in float32, as in tests/pretrain/test_distributed.py.
        assert together == pytest.approx(alone, rel=1e-5, abs=1e-7), f"step {alone['step']}"
    paths = [scene.run(run) / f"step_{STEPS:08d}" / "model.safetensors" for run in ("still", name)]
    one, two = map(load_file, paths)
    for key, weight in one.items():
        torch.testing.assert_close(
            two[key], weight, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_a_requeued_job_of_two_nodes_ends_as_an_undisturbed_one(scene: Scene) -> None:
    assert scene.record("two_requeued")["JobState"] == "COMPLETED", scene.tell()
    assert [scene.task("two_requeued", rank).attempt for rank in range(2)] == [2, 2]
    assert curve(scene.run("two_requeued")) == curve(scene.run("two"))
    assert weights(scene.run("two_requeued")) == weights(scene.run("two"))


def test_a_job_of_a_node_that_died_is_requeued_and_ends_as_an_undisturbed_one(scene: Scene) -> None:
    assert scene.record("lost")["JobState"] == "COMPLETED", scene.tell()
    assert (scene.task("lost").attempt, scene.task("lost").timeouts) == (2, 0)
    assert set(scene.told) <= {"running", "requeued"}  # also of two_lost, one of whose tasks has failed
    assert curve(scene.run("lost")) == curve(scene.run("still"))
    assert weights(scene.run("lost")) == weights(scene.run("still"))


def test_a_job_that_lost_one_of_its_nodes_goes_on_from_its_last_checkpoint(scene: Scene) -> None:
    # its own end came before SLURM knew of the node's
    if scene.record("two_lost")["JobState"] != "COMPLETED":
        assert "lost another one" in scene.stderr("two_lost")
        scene.submit("two_lost", TWO_NODES, "training.checkpoint_every=5", step_seconds=0)
        scene.wait_until_over("two_lost", seconds=60)
    assert scene.record("two_lost")["JobState"] == "COMPLETED", scene.tell()
    assert curve(scene.run("two_lost")) == curve(scene.run("two"))
    assert weights(scene.run("two_lost")) == weights(scene.run("two"))
