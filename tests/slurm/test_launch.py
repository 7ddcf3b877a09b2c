"""Launching: the sbatch text, local jobs from start to exit status, requeues, and a SLURM of two shell
scripts."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import slurm.follow
import slurm.launch
from slurm.follow import Launched, follow
from slurm.launch import launch, sbatch_text
from slurm.resources import Resources
from slurm.snapshot import NAMES, ROOT, snapshot_path
from slurm.submission import read_submission, task_statuses

GOLDEN = Path(__file__).parents[1] / "golden"
ONE, TWO = Resources(), Resources(tasks_per_node=2, cpus_per_task=1)

TARGETS = """
import json, os, signal, sys, time
from pathlib import Path

def echo(argv):
    print("hello", *argv)
    print("to stderr", file=sys.stderr)
    return 0

def status(argv):
    print("config.toml: lrr: unknown key", file=sys.stderr)
    return int(argv[0])

def leave(argv):
    sys.exit(int(argv[0]))

def broken(argv):
    raise KeyError("a bug")

def killed(argv):
    os.kill(os.getpid(), 9)

def environment(argv):
    Path(argv[0], "task" + os.environ.get("RANK", "")).write_text(json.dumps(dict(os.environ)))

def second_fails(argv):
    if os.environ["RANK"] == "0":
        time.sleep(60)
    print("the second gives up", file=sys.stderr)
    return 3

def all_reduce(argv):
    import torch
    from pretrain.training.parallel import World
    from pretrain.training.stopping import Stop
    world = World.join("cpu")
    with Stop(world):
        print("total", world.sum(torch.tensor([world.rank + 1.0])).item(), "of", world.size)
    torch.distributed.destroy_process_group()
    return 0

def stubborn(argv):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    preempted(argv)

def preempted(argv):
    folder = Path(argv[0])
    if (folder / "pid").exists():
        print("resumed")
        return 0
    (folder / "pid.tmp").write_text(str(os.getpid()))
    (folder / "pid.tmp").rename(folder / "pid")
    time.sleep(60)

def preempted_and_caught(argv):
    try:
        return preempted(argv)
    except SystemExit as stop:
        return stop.code

def deaf(argv):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    preempted(argv)

def trains(argv):
    "As the training loop has it: note the signal, save, put the handlers back, hand the signal on."
    folder, rank = Path(argv[0]), os.environ["RANK"]
    if (folder / f"saved{rank}").exists():
        print("resumed")
        return 0
    noted = []
    numbers = (signal.SIGUSR2, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: noted.append(number)) for number in numbers}
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    while not noted:
        time.sleep(0.01)
    (folder / f"saved{rank}").touch()
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.raise_signal(noted[0])
    raise SystemExit(128 + noted[0])

def preempted_ten_times(argv):
    count = Path(argv[0], "count")
    attempt = len(count.read_text()) if count.exists() else 0
    if attempt == 10:
        return 0
    count.write_text("x" * (attempt + 1))
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of entry points that jobs can import."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "launch_targets.py").write_text(TARGETS)
    path = [str(tmp_path / "modules"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def full_resources() -> Resources:
    return Resources(
        partition="gpu",
        account="speech",
        qos="long",
        constraint="a100&nvlink",
        nodes=2,
        tasks_per_node=8,
        gpus_per_node=8,
        cpus_per_task=12,
        memory_gb=480,
        time_minutes=1440,
        setup=("module load cuda", "export NCCL_DEBUG=WARN"),
    )


def test_the_sbatch_text_is_the_golden_one() -> None:
    text = sbatch_text(["pretrain", "base.toml", "name=it's one"], full_resources(), Path("/shared/jobs"))
    assert text.replace(sys.executable, "PYTHON") == (GOLDEN / "sbatch.txt").read_text()


def test_the_sbatch_text_of_an_array_that_waits_is_the_golden_one() -> None:
    resources = Resources(
        time_minutes=10,
        array_parallelism=3,
        snapshot=True,
        exclude="node[3,7]",
        gres="lscratch:200",
        mail_user="a@b.org",
        mail_type="END,FAIL",
        name="wordless-encode",
        setup=("module load cuda",),
    )
    argv = ["run", "/shared/recipe.toml", "--only", "encode"]
    text = sbatch_text(
        argv, resources, Path("/shared/jobs/encode"), after=["41", "42"], array=4, part_key="encode.part"
    )
    text = text.replace(str(snapshot_path(ROOT, NAMES, Path("/shared/jobs"))), "/shared/jobs/CODE")
    assert text.replace(sys.executable, "PYTHON") == (GOLDEN / "sbatch_array.txt").read_text()


def test_the_sbatch_text_stays_one_comment_whatever_the_arguments_hold() -> None:
    text = sbatch_text(["encode", "a\nrm -rf b"], ONE, Path("jobs"), after=["12"])
    assert not any(line.startswith("rm") for line in text.splitlines())
    assert "#SBATCH --dependency=afterok:12" in text and "#SBATCH --kill-on-invalid-dep=yes" in text
    assert not Path("jobs").exists()  # a dry run leaves nothing behind


def test_a_local_job_streams_its_output_and_returns_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = launch(["two", "words"], "local", ONE, tmp_path / "jobs", wait=True, target="launch_targets:echo")
    assert done.status == 0
    output = capsys.readouterr()
    # submitit's own lines stay in the log
    assert output.out == "hello two words\n" and "to stderr\n" in output.err
    assert done.stdout.parent == done.folder and done.job_id in done.stdout.name


def test_every_submission_has_a_fresh_folder_for_its_user_alone(tmp_path: Path) -> None:
    first, second = (
        launch(["x"], "local", ONE, tmp_path, wait=False, target="launch_targets:echo") for _ in range(2)
    )
    assert first.folder != second.folder
    assert [follow(job).status for job in (first, second)] == [0, 0]
    for job in (first, second):
        assert stat.S_IMODE(job.folder.stat().st_mode) == 0o700
        assert first.status is None


@pytest.mark.parametrize(
    ("target", "argument", "status", "message"),
    [
        ("status", "2", 2, "lrr: unknown key"),
        ("leave", "2", 2, "failed with exit status 2"),
        ("broken", "", 1, "KeyError: 'a bug'"),
        ("killed", "", 1, "ended without a result"),
    ],
)
def test_a_failing_local_job_returns_its_status_and_says_where_to_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, argument: str, status: int, message: str
) -> None:
    done = launch([argument], "local", ONE, tmp_path / "jobs", wait=True, target=f"launch_targets:{target}")
    assert done.status == status
    errors = capsys.readouterr().err
    assert message in errors and str(done.stderr) in errors and str(done.stdout) in errors
    assert ("Traceback" in errors) == (target == "broken")  # a bug has a traceback, a user's mistake has none


def test_setup_runs_before_a_local_job_which_forgets_the_job_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_JOB_ID", "SUBMITIT_EXECUTOR"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_CONF", "kept")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc,5")
    resources = Resources(setup=("FIRST='a b'", 'export SECOND="$FIRST c"'), gpus_per_node=2)
    assert (
        launch(
            [str(tmp_path)], "local", resources, tmp_path, wait=True, target="launch_targets:environment"
        ).status
        == 0
    )
    seen = json.loads((tmp_path / "task").read_text())  # no RANK in the name: a single task
    assert (
        seen["SECOND"] == "a b c"
        and seen["SLURM_CONF"] == "kept"
        and seen["CUDA_VISIBLE_DEVICES"] == "3,GPU-abc"
    )
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_JOB_ID"} & set(seen)
    assert os.environ["RANK"] == "7"


def test_two_local_tasks_meet_and_all_reduce(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = launch(["x"], "local", TWO, tmp_path, wait=True, target="launch_targets:all_reduce")
    assert done.status == 0
    assert capsys.readouterr().out == "total 3.0 of 2\n"  # the first task's alone, and nothing of torch's
    assert "total 3.0 of 2" in Path(str(done.stdout).replace("_0_log", "_1_log")).read_text()


def test_a_failed_task_ends_its_partners_even_where_sigint_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script, and inherited
    monkeypatch.setattr(slurm.launch, "FAILURE_GRACE_SECONDS", 0.2)
    done = launch(["x"], "local", TWO, tmp_path, wait=True, target="launch_targets:second_fails")
    signal.signal(signal.SIGINT, before)
    assert done.status == 3
    errors = capsys.readouterr().err
    assert "the second gives up" in errors and "task 1 failed with exit status 3" in errors
    assert of_tasks(done, "state") == ["stopped", "failed"]


def wait_for_pid(folder: Path) -> int:
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int((folder / "pid").read_text())


@pytest.mark.parametrize(
    ("number", "whole_group", "ignored", "target"),
    [
        (signal.SIGINT, True, False, "stubborn"),  # as a terminal does it
        (signal.SIGINT, False, False, "stubborn"),  # `kill -INT` of the launcher alone
        (signal.SIGTERM, False, False, "preempted"),
        (
            signal.SIGTERM,
            False,
            True,
            "preempted",
        ),  # started in the background of a script, where SIGINT is ignored
        (signal.SIGTERM, False, True, "deaf"),
    ],
)
def test_a_signal_to_the_launcher_ends_its_local_job(
    tmp_path: Path, number: int, whole_group: bool, ignored: bool, target: str
) -> None:
    code = f"""
from pathlib import Path
from slurm.launch import Resources, launch
resources = Resources(signal_seconds=1)  # after which a task that does not listen is killed
launch([{str(tmp_path)!r}], "local", resources, Path({str(tmp_path / "jobs")!r}), wait=True,
       target="launch_targets:{target}")
"""
    shell = ["bash", "-c", ("trap '' INT; " if ignored else "") + 'exec "$@"', "shell"]
    launcher = subprocess.Popen(
        [*shell, sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL
    )
    pid = wait_for_pid(tmp_path)
    time.sleep(0.3)  # the launcher may not have begun to follow
    (os.killpg if whole_group else os.kill)(launcher.pid, number)
    assert (launcher.wait(60) != 0) == (number == signal.SIGINT)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/exe").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("target", ["preempted", "preempted_and_caught"])
def test_a_preempted_local_job_is_requeued_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    job = launch(
        [str(tmp_path)], "local", ONE, tmp_path / "jobs", wait=False, target=f"launch_targets:{target}"
    )
    os.kill(wait_for_pid(tmp_path), signal.SIGUSR2)
    assert follow(job).status == 0
    assert "resumed\n" in capsys.readouterr().out


def of_tasks(job: Launched, name: str) -> list[object]:
    (ranks,) = task_statuses(job.folder, read_submission(job.folder))
    return [getattr(status, name) for status in ranks]


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return path.read_text()


def test_a_preempted_local_job_of_two_tasks_saves_and_is_requeued_without_a_timeout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = launch([str(tmp_path)], "local", TWO, tmp_path / "jobs", wait=False, target="launch_targets:trains")
    for pid in [int(wait_for(tmp_path / f"pid{rank}")) for rank in (1, 0)]:
        os.kill(pid, signal.SIGUSR2)
    assert follow(job).status == 0
    assert "resumed\n" in capsys.readouterr().out
    assert of_tasks(job, "state") == ["finished"] * 2 and of_tasks(job, "attempt") == [2, 2]
    assert of_tasks(job, "timeouts") == [0, 0]


@pytest.mark.slow
def test_a_local_job_of_two_tasks_out_of_time_is_requeued_and_charged(tmp_path: Path) -> None:
    # told after 15 s
    resources = Resources(tasks_per_node=2, cpus_per_task=1, time_minutes=1, signal_seconds=45)
    job = launch(
        [str(tmp_path)], "local", resources, tmp_path / "jobs", wait=True, target="launch_targets:trains"
    )
    assert job.status == 0
    assert of_tasks(job, "attempt") == [2, 2] and of_tasks(job, "timeouts") == [1, 1]
    assert "timeout: requeued, 1 of 20 timeouts used" in job.stderr.read_text()


def test_a_sigterm_ends_a_local_job_of_two_tasks_which_save_and_are_not_requeued(tmp_path: Path) -> None:
    job = launch([str(tmp_path)], "local", TWO, tmp_path / "jobs", wait=False, target="launch_targets:trains")
    for rank in (0, 1):
        wait_for(tmp_path / f"pid{rank}")
    os.kill(int(job.job_id), signal.SIGTERM)
    assert follow(job).status == 143
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
    assert of_tasks(job, "state") == ["stopped"] * 2 and of_tasks(job, "attempt") == [1, 1]
    assert of_tasks(job, "reason") == ["SIGTERM"] * 2


@pytest.mark.slow
def test_a_local_job_may_be_preempted_any_number_of_times(tmp_path: Path) -> None:
    job = launch(
        [str(tmp_path)],
        "local",
        ONE,
        tmp_path / "jobs",
        wait=True,
        target="launch_targets:preempted_ten_times",
    )
    assert job.status == 0 and of_tasks(job, "attempt") == [11]


def test_a_killed_task_stays_running_with_a_heartbeat_that_stands_still(tmp_path: Path) -> None:
    job = launch(["x"], "local", ONE, tmp_path / "jobs", wait=True, target="launch_targets:killed")
    assert job.status == 1
    assert of_tasks(job, "state") == ["running"] and of_tasks(job, "status") == [None]
    (heartbeat,) = of_tasks(job, "heartbeat")
    assert isinstance(heartbeat, float) and abs(time.time() - heartbeat) < 60


def test_a_submission_says_what_was_submitted(tmp_path: Path) -> None:
    resources = Resources(time_minutes=7, partition="gpu")
    job = launch(
        ["x"],
        "local",
        resources,
        tmp_path / "jobs" / "hubert",
        wait=False,
        target="launch_targets:echo",
        out=tmp_path / "o",
        array=3,
    )
    submission = read_submission(job.folder)
    assert (submission.name, submission.job_id, submission.place, submission.argv) == (
        "hubert",
        job.job_id,
        "local",
        ["x"],
    )
    assert (submission.array, submission.after, submission.out) == (
        None,
        [],
        str(tmp_path / "o"),
    )  # locally one job does it all
    assert (
        submission.pid == int(job.job_id)
        and submission.elements == [job.job_id]
        and submission.num_tasks == 1
    )
    assert Resources.model_validate_json(json.dumps(submission.resources)) == resources
    assert abs(submission.submitted - time.time()) < 60
    assert (
        stat.S_IMODE((tmp_path / "jobs").stat().st_mode)
        == stat.S_IMODE((tmp_path / "jobs" / "hubert").stat().st_mode)
        == 0o700
    )
    assert follow(job).status == 0
    for text in ("{", "{}"):
        (job.folder / "submission.json").write_text(text)
        with pytest.raises(ValueError, match=r"submission\.json: cannot be read"):
            read_submission(job.folder)
    with pytest.raises(ValueError, match="is no submission's folder"):
        read_submission(tmp_path)


def test_what_cannot_be_submitted_is_a_value_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"slurm\.nodes: 2, but a local job has one"):
        launch(["x"], "local", Resources(nodes=2), tmp_path, wait=True)
    with pytest.raises(ValueError, match="%"):
        launch(["x"], "local", ONE, tmp_path / "100%", wait=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ValueError, match=r"slurm\.gpus_per_node: 2, but CUDA_VISIBLE_DEVICES='3' shows 1"):
        launch(["x"], "local", Resources(gpus_per_node=2), tmp_path, wait=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no `sbatch` and no `srun` here"):
        launch(["x"], "slurm", ONE, tmp_path, wait=True)


FAKE_SBATCH = """#!/bin/bash
cp "$1" "$FAKE_SLURM/sbatch.txt"
grep -q partition=closed "$1" && { echo "sbatch: error: invalid partition" >&2; exit 1; }
export SLURM_JOB_ID=41 SLURM_NTASKS=2 SLURM_JOB_NUM_NODES=2 SLURM_JOB_NODELIST='no-such-node[1-2]'
export SLURM_LAUNCH_NODE_IPADDR=127.0.0.1
if grep -q array= "$1"; then
    for element in 0 1; do
        export SLURM_ARRAY_JOB_ID=41 SLURM_ARRAY_TASK_ID=$element SLURM_JOB_ID=$((41 + element))
        setsid bash "$1" >"$FAKE_SLURM/out" 2>&1 &
    done
elif ! grep -q partition=lost "$1"; then setsid bash "$1" >"$FAKE_SLURM/out" 2>&1 & fi
echo Submitted batch job 41
"""
FAKE_SRUN = """#!/bin/bash
[ "$1 $2 $4 $6 $7" = "--unbuffered --output --error --cpus-per-task=1 --kill-on-bad-exit=1" ] || exit 9
job=41${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID} out=${3//%A_%a/%j} err=${5//%A_%a/%j}
out=${out//%j/$job} err=${err//%j/$job}
shift 7
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_NODEID=$rank SLURM_LOCALID=0 "$@" >>"${out//%t/$rank}" 2>>"${err//%t/$rank}" &
done
wait
"""
FAKE_SQUEUE = """#!/bin/bash
grep -q partition=lost "$FAKE_SLURM/sbatch.txt" || echo "41|RUNNING|None"
"""


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`sbatch`, `srun` and `squeue` as shell scripts: two nodes with a task each, no accounting."""
    folder = tmp_path / "fake_slurm"
    folder.mkdir()
    for name, text in (("sbatch", FAKE_SBATCH), ("srun", FAKE_SRUN), ("squeue", FAKE_SQUEUE)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return folder


def test_a_slurm_job_submits_the_dry_run_text_and_its_tasks_know_each_other(
    tmp_path: Path, fake_slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resources = Resources(nodes=2, cpus_per_task=1)
    argv = [str(tmp_path)]
    done = launch(argv, "slurm", resources, tmp_path / "jobs", wait=True, target="launch_targets:environment")
    assert (done.status, done.job_id) == (0, "41")
    submitted = (fake_slurm / "sbatch.txt").read_text()
    assert submitted.replace(done.folder.name, "SUBMISSION") == sbatch_text(
        argv, resources, tmp_path / "jobs"
    )
    for rank in range(2):
        seen = json.loads((tmp_path / f"task{rank}").read_text())
        assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"], seen["LOCAL_WORLD_SIZE"]) == (
            str(rank),
            "0",
            "2",
            "1",
        )
        assert (seen["MASTER_ADDR"], seen["MASTER_PORT"]) == ("127.0.0.1", "20041")
    assert capsys.readouterr().out == ""


def test_the_elements_of_an_array_each_run_their_part(
    tmp_path: Path, fake_slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resources = Resources(nodes=2, cpus_per_task=1)
    job = launch(
        ["encode", "--only", "e"],
        "slurm",
        resources,
        tmp_path / "jobs",
        wait=True,
        target="launch_targets:echo",
        array=2,
        part_key="e.part",
        after=["7", "8"],
    )
    assert (job.status, job.job_id) == (0, "41")
    submission = read_submission(job.folder)
    assert (submission.array, submission.after, submission.elements) == (2, ["7", "8"], ["41_0", "41_1"])
    assert [
        [status.state for status in ranks] for ranks in task_statuses(job.folder, submission) if all(ranks)
    ] == [["finished"] * 2] * 2
    for element in (0, 1):
        for rank in (0, 1):
            log = (job.folder / f"41_{element}_{rank}_log.out").read_text()
            assert f"hello encode --only e e.part={element + 1}/2\n" in log
    expected = sbatch_text(
        ["encode", "--only", "e"], resources, tmp_path / "jobs", after=["7", "8"], array=2, part_key="e.part"
    )
    assert (fake_slurm / "sbatch.txt").read_text().replace(job.folder.name, "SUBMISSION") == expected


def test_a_job_that_sbatch_refuses_is_a_value_error(tmp_path: Path, fake_slurm: Path) -> None:
    with pytest.raises(ValueError, match="sbatch refused the job: .*invalid partition"):
        launch(["x"], "slurm", Resources(partition="closed"), tmp_path / "jobs", wait=True)
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_slurm_job_that_vanishes_has_failed(
    tmp_path: Path, fake_slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm.follow, "QUEUE_SECONDS", 0.0)
    monkeypatch.setattr(slurm.follow, "SHARED_DISK_SECONDS", 0.0)
    done = launch(["x"], "slurm", Resources(partition="lost"), tmp_path, wait=True)
    assert done.status == 1
    assert "job 41: task 0 ended without a result" in capsys.readouterr().err


def test_submitit_is_imported_only_when_a_job_is_launched() -> None:
    code = "import sys, slurm.launch; sys.exit(bool({'submitit', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
