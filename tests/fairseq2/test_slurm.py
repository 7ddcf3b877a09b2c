"""The fairseq2 engine on a real SLURM: preempted, requeued, over two nodes, split over them, and by `--on
slurm` of the command."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slurm.resources import Resources
from tests.pretrain.runs import curve
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import _cluster, real_slurm  # noqa: F401  # fixtures
from tests.slurm.test_real_training import BIG, ROOT, STEPS, TWO_NODES, Scene, weights, write_config
from wordless.cli import main

pytestmark = pytest.mark.slow
THEIRS = "training.engine=fairseq2"
NOISY = "encoder.dropout=0.1"


@pytest.fixture(scope="module")
def scene(real_slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Scene:  # noqa: F811
    """Every scenario, from submission to end. Nothing is saved but at the end and where a signal makes it be
    saved."""
    scene = Scene(tmp_path_factory.mktemp("engine"), real_slurm)
    write_config(scene.folder)
    on_one = Resources(nodelist="n1", cpus_per_task=1, time_minutes=10)
    scene.submit(
        "preempted", on_one.model_copy(update={"partition": "low", "cpus_per_task": BIG}), THEIRS, NOISY
    )
    scene.submit("requeued", on_one, THEIRS, NOISY)
    scene.submit("two_requeued", TWO_NODES, THEIRS, "training.sharding=full")
    disturb = {  # as soon as they have done a few steps
        "preempted": (
            "sbatch",
            "--partition=high",
            "--nodelist=n1",
            f"--cpus-per-task={2 * BIG}",
            "--output=/dev/null",
            "--wrap",
            "sleep 2",
        ),
        "requeued": ("scontrol", "requeue", scene.jobs["requeued"].job_id),
        "two_requeued": ("scontrol", "requeue", scene.jobs["two_requeued"].job_id),
    }

    def disturb_those_on_their_way() -> bool:
        for name in [name for name in disturb if scene.steps(name) >= 3]:
            scene.slurm.command(*disturb.pop(name))
        return not disturb

    scene.wait(disturb_those_on_their_way, 150)
    scene.submit("two", TWO_NODES, THEIRS, step_seconds=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        assert main([*scene.argv("command", THEIRS, NOISY), "--on", "slurm"]) == 0
    assert main(scene.argv("noisy", THEIRS, NOISY)) == main(scene.argv("still")) == 0
    scene.wait_until_over(*scene.jobs, seconds=250)
    scene.wait((scene.run("command") / "meta.json").is_file, 150)
    return scene


@pytest.mark.parametrize("name", ["preempted", "requeued"])
def test_a_disturbed_run_ends_as_an_undisturbed_one(scene: Scene, name: str) -> None:
    assert scene.record(name)["JobState"] == "COMPLETED", scene.tell()
    assert int(scene.record(name)["Restarts"]) >= 1 and "stopped by SIGTERM after step" in scene.stderr(name)
    assert curve(scene.run(name)) == curve(scene.run("noisy"))
    assert weights(scene.run(name)) == weights(scene.run("noisy"))


@pytest.mark.parametrize("name", ["two", "two_requeued"])
def test_two_nodes_train_as_one_process_of_our_engine_does(scene: Scene, name: str) -> None:
    assert scene.record(name)["JobState"] == "COMPLETED", scene.tell()
    assert scene.record(name)["NodeList"] == "n[1-2]"
    paths = [scene.run(run) / f"step_{STEPS:08d}" / "model.safetensors" for run in ("still", name)]
    one, two = map(load_file, paths)
    for (
        key,
        weight,
    ) in one.items():  # sums in another order in float32, as in tests/pretrain/test_distributed.py
        torch.testing.assert_close(
            two[key], weight, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert [line["step"] for line in curve(scene.run(name))] == list(range(1, STEPS + 1))


def test_the_command_with_on_slurm_gives_the_run_of_here(scene: Scene) -> None:
    assert weights(scene.run("command")) == weights(scene.run("noisy"))
    assert (scene.run("command") / "fairseq2" / "checkpoints" / f"step_{STEPS}").is_dir()
    assert json.loads((scene.run("command") / "summary.json").read_text())["steps"] == STEPS


def test_the_engine_is_told_in_the_config_of_the_run(scene: Scene) -> None:
    assert 'engine = "fairseq2"' in Path(scene.run("two") / "config.toml").read_text()
