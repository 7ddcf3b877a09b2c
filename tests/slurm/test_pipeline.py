"""A recipe as dependent jobs: what is submitted, what is kept, how it goes on after a failure, and taking it
back.

The SLURM here is four shell scripts and a folder, and no program of a real one is asked for: nothing of what
is submitted runs, except where a test runs it.
"""

import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tomli_w

from pretrain.store.artefact import is_complete
from slurm.cancelling import cancel
from slurm.jobs import Job, Queue, latest_jobs
from slurm.launch import launch
from slurm.pipeline import in_words
from slurm.resources import Resources
from slurm.submission import Submission, freeze, status_path, write_json
from wordless.cli import main
from wordless.recipe import Recipe
from wordless.recipe_run import RecipeRun

ROOT = Path(__file__).parents[2]
FAKE_SBATCH = """#!/bin/bash
grep -q 'partition=closed' "$1" && { echo "sbatch: error: invalid partition" >&2; exit 1; }
sleep ${SBATCH_SECONDS:-0}
id=$(( $(cat "$FAKE_SLURM/last") + 1 ))
echo $id > "$FAKE_SLURM/last"
cp "$1" "$FAKE_SLURM/$id.sh"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
reason=Priority
grep -q -- '--dependency' "$1" && reason=Dependency
if [ -n "$last" ]; then
    for i in $(seq 0 $last); do echo "PENDING|$reason" > "$FAKE_SLURM/queue/${id}_$i"; done
else echo "PENDING|$reason" > "$FAKE_SLURM/queue/$id"; fi
echo Submitted batch job $id
"""
FAKE_SRUN = """#!/bin/bash
echo "srun: error: the batch scripts are not run here" >&2; exit 9
"""
FAKE_SQUEUE = """#!/bin/bash
[ -e "$FAKE_SLURM/silent" ] && exit 1
cd "$FAKE_SLURM/queue" && for job in *; do [ -e "$job" ] && echo "$job|$(cat $job)"; done; exit 0
"""
FAKE_SCANCEL = """#!/bin/bash
echo "$1" >> "$FAKE_SLURM/cancelled"
rm -f "$FAKE_SLURM/queue/$1" "$FAKE_SLURM/queue/$1"_*
"""


class Cluster:
    """The fake SLURM's folder: a file of `STATE|REASON` per job in the queue, and every script that sbatch
    got."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "queue").mkdir(parents=True)
        (folder / "last").write_text("40")
        for name, text in (
            ("sbatch", FAKE_SBATCH),
            ("srun", FAKE_SRUN),
            ("squeue", FAKE_SQUEUE),
            ("scancel", FAKE_SCANCEL),
        ):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    @property
    def queued(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "queue").iterdir())

    @property
    def cancelled(self) -> list[str]:
        path = self.folder / "cancelled"
        return path.read_text().split() if path.is_file() else []

    def text(self, job_id: str) -> str:
        return (self.folder / f"{job_id}.sh").read_text()

    def set(self, job_id: str, state: str, reason: str = "None") -> None:
        (self.folder / "queue" / job_id).write_text(f"{state}|{reason}")

    def leave(self, *job_ids: str) -> None:
        for job_id in job_ids:
            (self.folder / "queue" / job_id).unlink()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster(tmp_path / "fake_slurm")
    monkeypatch.setenv("PATH", f"{made.folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(made.folder))
    return made


def say(job: Job, state: str, element: int = 0, **changes: Any) -> None:
    """Write the status file of an element's first task, as the task itself would."""
    task = {
        "state": state,
        "status": {"finished": 0, "failed": 1}.get(state),
        "attempt": 1,
        "timeouts": 0,
        "host": "n1",
        "pid": 1,
        "began": time.time() - 60,
        "ended": None if state == "running" else time.time(),
    }
    write_json(status_path(job.folder, job.submission.elements[element], 0), {**task, **changes})


def job_of(run: Path, stage: str) -> Job:
    return latest_jobs(run / "jobs", Queue())[stage]


def carry_out(job: Job) -> None:
    """Do what a queued job would, in this process."""
    assert main(job.submission.argv) == 0
    say(job, "finished")


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    (tmp_path / "audio").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        soundfile.write(
            tmp_path / "audio" / f"{number}.wav", 0.1 * rng.standard_normal(16000).clip(-3, 3), 16000
        )
    return tmp_path / "audio"


@pytest.fixture
def recipe(audio: Path, tmp_path: Path) -> Path:
    """Four stages in a row and one, `other`, beside them."""
    stages = {
        "manifest": {"verb": "index", "source": str(audio)},
        "codebook": {"verb": "cluster", "manifest": "@manifest", "num_classes": 4},
        "labels": {
            "verb": "encode",
            "manifest": "@manifest",
            "codebook": "@codebook",
            "slurm": {"array": 3, "time_minutes": 5},
        },
        "units": {"verb": "pack", "manifest": "@manifest", "labels": "@labels"},
        "other": {"verb": "index", "source": str(audio)},
    }
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps({"run": str(tmp_path / "run"), "slurm": {"partition": "cpu"}, **stages}))
    return path


def submit_recipe(recipe: Path, *arguments: str) -> int:
    return main(["run", str(recipe), "--on", "slurm", *arguments])


# What is submitted


def test_each_stage_is_a_job_that_waits_for_those_it_reads(
    recipe: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit_recipe(recipe, "--json") == 0
    stages = {row["stage"]: row for row in json.loads(capsys.readouterr().out)["stages"]}
    assert {name: (row["job"], row["after"]) for name, row in stages.items()} == {
        "manifest": ("41", []),
        "codebook": ("42", ["manifest"]),
        "labels": ("43", ["manifest", "codebook"]),
        "units": ("44", ["manifest", "labels"]),
        "other": ("45", []),
    }
    assert cluster.queued == ["41", "42", "43_0", "43_1", "43_2", "44", "45"]
    labels = cluster.text("43")
    for line in (
        "--job-name=wordless-labels",
        "--partition=cpu",
        "--time=5",
        "--dependency=afterok:41:42",
        "--array=0-2%",
    ):
        assert f"#SBATCH {line}" in labels
    assert "--array" not in cluster.text("44") and "--time=60" in cluster.text("44")


def test_the_table_names_the_jobs_and_what_they_ask_for(
    recipe: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit_recipe(recipe) == 0
    told = capsys.readouterr()
    lines = [line.split("  ") for line in told.out.splitlines()]
    assert [line[0] for line in lines] == ["stage", "manifest", "codebook", "labels", "units", "other"]
    # codebook itself waits for manifest
    assert "labels    encode   43   3 x 2 CPUs, 5 min, cpu  codebook\n" in told.out
    assert "wordless status" in told.err


def test_the_parts_of_an_array_share_a_stage_and_its_jobs_take_it_to_its_end(
    recipe: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert submit_recipe(recipe, "labels.num_shards=3") == 0
    for name in ("manifest", "codebook"):
        carry_out(job_of(run, name))
    labels = job_of(run, "labels")
    for part in range(3):
        assert not is_complete(run / "labels")
        assert main([*labels.submission.argv, f"labels.part={part + 1}/3"]) == 0  # as launch puts it
        say(labels, "finished", element=part)
    assert is_complete(run / "labels")
    # of the part that was the last
    assert json.loads((run / "stages" / "labels.json").read_text())["summary"]["utterances"] == 6
    capsys.readouterr()
    assert submit_recipe(recipe, "labels.num_shards=3") == 0
    told = capsys.readouterr()
    assert f"labels: finished already ({run}/labels)" in told.err
    assert [line.split()[0] for line in told.out.splitlines()] == ["stage", "units", "other"]
    assert "kept, waiting" in told.out and cluster.cancelled == []


def test_a_job_runs_on_the_settings_with_which_it_was_submitted(
    recipe: Path, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert submit_recipe(recipe, "codebook.num_classes=3") == 0
    recipe.write_text(
        recipe.read_text().replace("num_classes = 4", "num_classes = 5").replace('"cpu"', '"gpu"')
    )
    carry_out(job_of(run, "manifest"))
    carry_out(job_of(run, "codebook"))
    meta = json.loads((run / "codebook" / "meta.json").read_text())
    assert meta["config"]["num_classes"] == 3
    settings = Path(job_of(run, "codebook").submission.argv[1])
    assert settings.parent == run / "jobs" / "codebook" and settings.parent.stat().st_mode & 0o77 == 0
    assert tomllib.loads(settings.read_text())["codebook"]["manifest"] == str(run / "manifest")
    recorded = json.loads((run / "recipe.json").read_text())  # by the submission, and not again by its jobs
    assert [stage["name"] for stage in recorded["stages"]] == [
        "manifest",
        "codebook",
        "labels",
        "units",
        "other",
    ]
    assert recorded["command"] == ["run", str(recipe), "codebook.num_classes=3", "--on", "slurm"]


def test_a_dry_run_prints_every_job_and_leaves_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a SLURM here."""
    assert submit_recipe(recipe, "--dry-run") == 0
    resolved, sbatch = capsys.readouterr().out.split("# what sbatch would get")
    assert tomllib.loads(resolved)["labels"]["codebook"] == str(tmp_path / "run" / "codebook")
    assert [line[8:] for line in sbatch.splitlines() if line.startswith("# stage ")] == [
        "manifest",
        "codebook",
        "labels",
        "units",
        "other",
    ]
    assert "#SBATCH --dependency=afterok:manifest:codebook" in sbatch and "--array=0-2%" in sbatch
    assert f"# wordless run {tmp_path}/run/jobs/labels/settings-" in sbatch and "--only labels" in sbatch
    assert not (tmp_path / "run").exists()


# Going on


def test_the_same_command_again_keeps_what_is_under_way(
    recipe: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit_recipe(recipe) == 0
    queued = cluster.queued
    cluster.set("41", "RUNNING")
    say(job_of(tmp_path / "run", "manifest"), "running")
    capsys.readouterr()
    assert submit_recipe(recipe, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["stages"]
    assert [row["kept"] for row in rows] == ["running", "waiting", "waiting", "waiting", "queued"]
    assert cluster.queued == queued and cluster.cancelled == []


def test_after_a_failure_the_same_command_submits_what_is_missing(
    recipe: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SLURM has ended one of those that waited for the failed one; the other it has not noticed yet."""
    run = tmp_path / "run"
    assert submit_recipe(recipe) == 0
    carry_out(job_of(run, "manifest"))
    say(job_of(run, "codebook"), "failed")
    cluster.leave("41", "42", "43_0", "43_1", "43_2")
    cluster.set("44", "PENDING", "DependencyNeverSatisfied")
    capsys.readouterr()
    assert submit_recipe(recipe, "--json") == 0
    rows = {row["stage"]: row for row in json.loads(capsys.readouterr().out)["stages"]}
    assert list(rows) == ["codebook", "labels", "units", "other"]
    assert [(name, row["after"]) for name, row in rows.items()] == [
        ("codebook", []),
        ("labels", ["codebook"]),
        ("units", ["labels"]),
        ("other", []),
    ]
    assert rows["other"]["kept"] == "queued" and cluster.cancelled == ["44"]
    assert "afterok:46" in cluster.text("47") and "afterok:47" in cluster.text("48")


def test_a_queued_job_with_other_settings_or_resources_is_submitted_anew(
    recipe: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit_recipe(recipe, "--only", "codebook", "--only", "other") == 0
    capsys.readouterr()
    assert (
        submit_recipe(
            recipe, "--only", "codebook", "--only", "other", "codebook.num_classes=3", "other.slurm.qos=long"
        )
        == 0
    )
    assert "instead of 41" in capsys.readouterr().out
    assert sorted(cluster.cancelled) == ["41", "42"] and cluster.queued == ["43", "44"]


def test_a_running_job_with_other_settings_stands_in_the_way(
    recipe: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert submit_recipe(recipe) == 0
    cluster.set("45", "RUNNING")
    say(job_of(run, "other"), "running")
    queued, recorded = cluster.queued, (run / "recipe.json").read_text()
    for arguments in (
        ("other.workers=1", "--on", "slurm"),
        ("--only", "other"),
    ):  # there, and in this process
        assert main(["run", str(recipe), *arguments]) == 2
        assert f"`wordless cancel {run} other`" in capsys.readouterr().err
        assert cluster.queued == queued and (run / "recipe.json").read_text() == recorded
    # it would begin while this process is at work
    assert main(["run", str(recipe), "--only", "codebook"]) == 2
    assert "codebook: job 42, which makes it, is waiting" in capsys.readouterr().err
    (cluster.folder / "silent").touch()  # without a SLURM, what never began may never do so
    assert main(["run", str(recipe), "--only", "manifest"]) == 0


def test_an_array_with_a_failed_part_is_cancelled_and_submitted_again(
    recipe: Path, cluster: Cluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert submit_recipe(recipe, "--only", "labels") == 0
    labels = job_of(run, "labels")
    cluster.leave("41_0")
    say(labels, "failed", element=0)
    cluster.set("41_1", "RUNNING")
    say(labels, "running", element=1)
    assert submit_recipe(recipe, "--only", "labels") == 0
    assert cluster.cancelled == ["41"] and cluster.queued == ["42_0", "42_1", "42_2"]


def test_a_stage_left_to_itself_waits_for_the_job_of_another_that_is_under_way(
    recipe: Path, cluster: Cluster
) -> None:
    assert submit_recipe(recipe, "--only", "manifest") == 0
    assert submit_recipe(recipe, "--only", "codebook") == 0
    assert "#SBATCH --dependency=afterok:41\n" in cluster.text("42")


def test_what_stands_is_made_again_where_it_reads_what_is_made_again(
    recipe: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, only = tmp_path / "run", ("--only", "manifest", "--only", "codebook")
    assert main(["run", str(recipe), *only]) == 0
    assert submit_recipe(recipe, *only) == 0 and cluster.queued == []
    changed = ("manifest.dev_share=0.5", *only)
    capsys.readouterr()
    assert submit_recipe(recipe, *changed) == 2
    assert "dev_share" in (told := capsys.readouterr().err) and "--redo" in told and cluster.queued == []
    assert submit_recipe(recipe, *changed, "--redo") == 0
    assert cluster.queued == ["41", "42"] and "afterok:41" in cluster.text("42")
    before = json.loads((run / "codebook" / "meta.json").read_text())["parents"]
    for name in ("manifest", "codebook"):
        carry_out(job_of(run, name))
    assert json.loads((run / "codebook" / "meta.json").read_text())["parents"] != before
    assert not list(run.glob(".*.removed"))


def test_of_several_processes_one_removes_what_is_to_be_made_again_and_the_others_leave_its_new_work(
    recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert main(["run", str(recipe), "--only", "manifest"]) == 0
    changed = tomllib.loads(recipe.read_text())
    changed["manifest"]["dev_share"] = 0.5
    ours = RecipeRun(Recipe(changed, "recipe.toml"), ["manifest"], redo=True)
    for new_work in (False, True):  # the second process decided when the first had not removed it yet
        if new_work:
            (run / "manifest").mkdir()
            (run / "manifest" / "half").touch()
        ours._remove("manifest")
        assert (run / "manifest" / "half").is_file() == new_work
    assert not list(run.glob(".*.removed"))
    all_of_it = Recipe({"run": str(run), "all": {**changed["manifest"], "out": "@"}}, "recipe.toml")
    (run / "manifest" / "half").unlink()
    assert main(["run", str(recipe), "--only", "other"]) == 0
    for path in (run / "other").iterdir():
        path.rename(run / path.name)
    with pytest.raises(ValueError, match="holds the whole run; remove what is to be made again by hand"):
        RecipeRun(all_of_it, ["all"], redo=True)._remove("all")


def test_nothing_is_submitted_where_squeue_does_not_say_what_is_there(
    recipe: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit_recipe(recipe) == 0
    (cluster.folder / "silent").touch()
    assert submit_recipe(recipe) == 2
    assert "squeue does not answer; try again" in capsys.readouterr().err
    assert len(cluster.queued) == 7


def test_a_job_that_sbatch_refuses_is_named_and_the_same_command_goes_on_from_there(
    recipe: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert submit_recipe(recipe, "labels.slurm.partition=closed") == 2
    told = capsys.readouterr().err
    assert "labels: sbatch refused the job" in told and "manifest, codebook: submitted before" in told
    recorded = run / "recipe.json"
    # two of its jobs are there
    assert "labels.slurm.partition=closed" in json.loads(recorded.read_text())["command"]
    recorded.unlink()
    assert submit_recipe(recipe, "slurm.partition=closed", "--only", "units") == 2
    assert "units: sbatch refused the job" in capsys.readouterr().err and not recorded.exists()
    assert submit_recipe(recipe) == 0
    assert "kept, waiting" in capsys.readouterr().out and "afterok:41:42" in cluster.text("43")


def test_of_two_commands_given_at_once_one_submits_and_the_other_keeps_its_jobs(
    recipe: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_SECONDS", "0.4")
    command = [sys.executable, "-m", "wordless", "run", str(recipe), "--on", "slurm", "--json"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (
        [row["kept"] for row in json.loads(process.communicate(timeout=60)[0])["stages"]] for process in both
    )
    assert cluster.queued == ["41", "42", "43_0", "43_1", "43_2", "44", "45"]
    assert sorted([first, second], key=str) == [
        ["queued", "waiting", "waiting", "waiting", "queued"],
        [None] * 5,
    ]


def test_what_stands_is_not_submitted(
    audio: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["index", str(audio), str(tmp_path / "m")]
    assert main(command) == 0
    for place in ("slurm", "local"):
        assert main([*command, "--on", place]) == 2
        assert f"{tmp_path}/m: already holds a finished artefact" in capsys.readouterr().err
    assert cluster.queued == [] and not (tmp_path / "jobs").exists()


def test_a_later_attempt_that_finds_its_own_work_done_ends_well_and_a_mistake_does_not(
    audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["index", str(audio), str(tmp_path / "m")]
    assert main(command) == 0
    for attempt, more, status in (("1", [], 2), ("2", [], 0), ("2", ["dev_share=0.5"], 2)):
        monkeypatch.setenv("WORDLESS_ATTEMPT", attempt)
        capsys.readouterr()
        assert main([*command, *more]) == status
        told = capsys.readouterr().err
        assert (
            "by an earlier attempt of this job" if status == 0 else "already holds a finished artefact"
        ) in told


def test_a_verb_is_not_submitted_while_a_job_of_its_is_under_way(
    audio: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["index", str(audio), str(tmp_path / "m"), "--on", "slurm"]
    assert main(again) == 0
    for command in (again, again[:-2]):  # there, and in this process
        capsys.readouterr()
        assert main(command) == 2
        assert (
            f"m: job 41, which makes it, is queued; wait, or `wordless cancel {tmp_path}/m`"
            in capsys.readouterr().err
        )
    assert main(["cancel", str(tmp_path / "m")]) == 0
    assert main(again) == 0 and cluster.queued == ["42"]


def test_a_verb_with_parts_is_an_array_where_that_is_asked_for(
    audio: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "encode.toml"
    keys = {"manifest": "m", "codebook": "c", "out": str(tmp_path / "labels"), "slurm": {"array": 2}}
    path.write_text(tomli_w.dumps(keys))
    assert main(["encode", str(path), "--on", "slurm"]) == 0
    assert cluster.queued == ["41_0", "41_1"]
    assert tomllib.loads(Path(job_of(tmp_path, "labels").submission.argv[1]).read_text()) == keys
    for override, why in (
        ("part=1/2", "its `part` is given"),
        ("slurm.nodes=2", "`encode` runs in one process"),
    ):
        assert main(["encode", str(path), override, "--on", "slurm"]) == 2
        assert why in capsys.readouterr().err


# What stages read, and what their jobs ask for


def stages_of(**tables: dict[str, Any]) -> Recipe:
    return Recipe({"run": "runs/x", **tables}, "recipe.toml")


def test_a_stage_follows_what_it_names_and_every_path_that_leads_into_an_output() -> None:
    index = {"verb": "index", "source": "audio"}
    here = Recipe(
        {"run": ".", "one": index, "two": {**index, "split": "", "source": "one", "more": "ones"}},
        "recipe.toml",
    )
    assert here.reads("two") == ("one",)
    recipe = stages_of(
        one=index,
        two=index,
        three={**index, "out": "/data/three"},
        four=index,
        all={**index, "out": "@"},
        named={"verb": "pack", "manifest": "@one", "labels": "@two/part"},
        nested={
            "verb": "report",
            "units": {"a": "@one"},
            "manifest": "runs/x/four/manifest.parquet",
            "list": ["/data/three"],
        },
        above={"verb": "index", "source": "/data/"},
        everything={"verb": "index", "source": "@"},
        within={"verb": "index", "source": "audio", "out": "@one/more"},
        similar={"verb": "index", "source": "runs/x/onewards", "split": "", "other": "one"},
    )
    assert recipe.reads("named") == ("one", "two")
    assert recipe.reads("nested") == ("one", "three", "four")
    assert recipe.reads("above") == ("three",)
    assert recipe.reads("everything") == ("one", "two", "four", "all", "named", "nested", "above")
    assert recipe.reads("within") == ("one",)
    assert recipe.reads("similar") == ("all",)  # it lies in the run's folder, to which `all` writes


def test_training_gets_what_the_recipe_asks_for_and_other_verbs_one_process() -> None:
    table = {
        "nodes": 2,
        "tasks_per_node": 8,
        "gpus_per_node": 8,
        "cpus_per_task": 4,
        "array": 6,
        "name": "exp1",
    }
    recipe = stages_of(
        slurm=table,
        train={"verb": "pretrain"},
        encode={"verb": "encode", "slurm": {"gpus_per_node": 2, "memory_gb": 16}},
        cluster={"verb": "cluster", "slurm": {"name": "kmeans"}},
        shard={"verb": "encode", "part": "1/2"},
    )
    asked = {name: recipe.resources(name) for name in recipe.stages}
    shape = {name: (r.nodes, r.tasks_per_node, r.gpus_per_node, r.array, r.name) for name, r in asked.items()}
    assert shape == {
        "train": (2, 8, 8, 1, "exp1-train"),
        "encode": (1, 1, 2, 6, "exp1-encode"),
        "cluster": (1, 1, 1, 1, "kmeans"),
        "shard": (1, 1, 1, 1, "exp1-shard"),
    }
    assert asked["encode"].memory_gb == 16
    assert in_words(asked["train"]) == "2 nodes of 8 tasks, 8 GPUs, 32 CPUs, 1 h 00"
    assert in_words(asked["encode"]) == "6 x 2 GPUs, 4 CPUs, 16 GB, 1 h 00"


def test_every_mistake_in_the_resources_of_stages_is_told_at_once(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = {"verb": "index", "source": str(audio)}
    tables = {
        "a": {**index, "slurm": {"tasks_per_node": 2}},
        "b": {**index, "slurm": {"node": 1}},
        "c": {**index, "slurm": {"array": 2}},
    }
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps({"run": str(tmp_path / "run"), **tables}))
    for command in (["check", str(path)], ["run", str(path), "--on", "slurm"], ["run", str(path)]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert (
            f"{path}: a.slurm.tasks_per_node: 2, but `index` runs in one process; several take pretrain, "
            "train-lm" in told
        )
        assert f"{path}: b.slurm.node: unknown key; did you mean 'nodes'?" in told
        assert f"{path}: c.slurm.array: 2, but `index` has no `part`" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["jobs", "stages", "a/b", "-x", ".x", "a b"])
def test_a_stage_whose_name_cannot_be_a_folder_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no name for a stage"):
        stages_of(**{name: {"verb": "index"}})


def test_several_processes_take_one_stage_that_trains(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for only in ((), ("--only", "labels")):
        assert main(["run", str(recipe), *only]) == 2
        assert "a recipe runs in one process. Several take one stage that trains" in capsys.readouterr().err
    train = stages_of(hubert={"verb": "pretrain"})
    monkeypatch.setattr(RecipeRun, "_run_stage", lambda *_: {})
    monkeypatch.setattr(RecipeRun, "_occupied_stage", lambda *_: nullcontext())
    assert RecipeRun(train, ["hubert"]).run() == (None, {})


def test_settings_have_one_name_for_one_content(tmp_path: Path) -> None:
    first = freeze("a = 1\n", tmp_path / "jobs" / "x")
    assert first == freeze("a = 1\n", tmp_path / "jobs" / "x") != freeze("a = 2\n", tmp_path / "jobs" / "x")
    assert first.read_text() == "a = 1\n" and (tmp_path / "jobs").stat().st_mode & 0o77 == 0


# Taking back


def test_cancel_takes_back_what_is_queued_or_runs_and_says_so(
    recipe: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert submit_recipe(recipe) == 0
    say(job_of(run, "manifest"), "finished")
    cluster.leave("41")
    cluster.set("42", "RUNNING")
    say(job_of(run, "codebook"), "running")
    capsys.readouterr()
    assert main(["cancel", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "manifest: nothing to cancel, it is done",
        "codebook: job 42, running, cancelled",
        "labels: job 43, waiting, cancelled",
        "units: job 44, waiting, cancelled",
        "other: job 45, queued, cancelled",
    ]
    assert cluster.cancelled == ["45", "44", "43", "42"]  # first those that wait
    assert job_of(run, "units").state == job_of(run, "other").state == "stopped"
    assert submit_recipe(recipe, "--only", "other") == 0 and cluster.queued == ["46"]


def test_one_stage_is_cancelled_and_those_that_wait_for_it_are_named(
    recipe: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert submit_recipe(recipe) == 0
    capsys.readouterr()
    assert main(["cancel", str(run), "labels"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "labels: job 43, waiting, cancelled",
        "units: job 44 waited for what was cancelled; SLURM will cancel it, too",
    ]
    assert cluster.cancelled == ["43"]
    assert main(["cancel", str(run), "lables"]) == 2
    assert "no job of lables; there are manifest, codebook, labels, units, other" in capsys.readouterr().err
    assert main(["cancel", str(tmp_path)]) == 2


TARGET = """
import os, pathlib, signal, sys, time

import wordless.cli

def preempted_when_done(argv):
    status = wordless.cli.main(argv)
    if os.environ["WORDLESS_ATTEMPT"] == "1":
        signal.raise_signal(signal.SIGUSR2)
    return status

def sleep(argv):
    pathlib.Path(argv[0]).touch()
    time.sleep(60)
"""


def test_a_local_job_is_cancelled_by_a_signal_to_what_controls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pipeline_target.py").write_text(TARGET)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    folder, began = tmp_path / "jobs" / "x", tmp_path / "began"
    launched = launch(
        [str(began)],
        "local",
        Resources(),
        folder,
        wait=False,
        target="pipeline_target:sleep",
        out=tmp_path / "x",
    )
    deadline = time.monotonic() + 60
    while not began.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert job_of(tmp_path, "x").state == "running"
    assert cancel(tmp_path / "x", []) == [f"x: process {launched.job_id} told to stop"]
    while not launched.job.done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert job_of(tmp_path, "x").state == "stopped"
    assert cancel(tmp_path / "x", []) == ["x: nothing to cancel, it is stopped"]


def test_a_job_that_is_requeued_when_its_work_is_done_ends_well(
    audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pipeline_target.py").write_text(TARGET)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    command, folder = ["index", str(audio), str(tmp_path / "m")], tmp_path / "jobs" / "m"
    launched = launch(
        command, "local", Resources(), folder, wait=True, target="pipeline_target:preempted_when_done"
    )
    assert launched.status == 0 and "finished already, by an earlier attempt" in capfd.readouterr().err
    job = job_of(tmp_path, "m")
    assert job.state == "done" and job.decisive.task is not None and job.decisive.task.attempt == 2


def test_a_process_that_took_the_number_of_a_local_job_is_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        folder = tmp_path / "jobs" / "x" / "1"
        folder.mkdir(parents=True)
        sent = Submission(
            "x",
            str(other.pid),
            "local",
            ["index"],
            None,
            [],
            None,
            Resources().model_dump(mode="json"),
            time.time(),
            socket.gethostname(),
            other.pid,
        )
        write_json(folder / "submission.json", vars(sent))
        say(job_of(tmp_path, "x"), "running")
        assert job_of(tmp_path, "x").state == "lost"
        assert cancel(tmp_path, []) == ["x: nothing to cancel, it is lost"]
        assert other.poll() is None
        write_json(folder / "submission.json", vars(sent) | {"host": "elsewhere"})
        with pytest.raises(ValueError, match="x: its job was started on elsewhere; cancel it there"):
            cancel(tmp_path, [])
    finally:
        other.kill()
        other.wait()


# What is left out


def test_a_report_waits_for_needed_stages_and_for_the_end_of_optional_ones_and_gets_their_reasons(
    recipe: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, run = tomllib.loads(recipe.read_text()), tmp_path / "run"
    del tree["other"], tree["units"]
    tree["extra"] = {"verb": "index", "source": str(tmp_path / "nowhere"), "optional": True}
    tree["more"] = {"verb": "encode", "manifest": "@extra", "codebook": "@codebook"}
    tree["killed"] = {"verb": "measure", "manifest": "@manifest", "labels": "@labels", "optional": True}
    tree["report"] = {
        "verb": "report",
        "out": "@",
        "manifest": "@manifest",
        "labels": {"a": "@labels", "b": "@more"},
        "units": {"a": "@killed"},
    }
    del tree["labels"]["slurm"]
    recipe.write_text(tomli_w.dumps(tree))
    assert submit_recipe(recipe) == 0
    assert "#SBATCH --dependency=afterok:42:44\n" in cluster.text("45")  # `more`, of codebook and extra
    assert "#SBATCH --dependency=afterok:41:43,afterany:45:46\n" in cluster.text("47")
    assert job_of(run, "report").submission.after_any == ["45", "46"]
    for name in ("manifest", "codebook", "labels", "extra", "more"):
        carry_out(job_of(run, name))  # those of stages that are left out end well, too
    write_json(
        run / "stages" / "killed.json",
        {"verb": "measure", "began": 0.0, "pid": 1, "host": "n1", "out": str(run / "killed")},
    )
    say(job_of(run, "killed"), "failed")
    carry_out(job_of(run, "report"))
    page = (run / "report.html").read_text()
    assert "needs extra, which was left out" in page and "it began and did not end" in page
    capsys.readouterr()
    assert main(["status", str(run), "--json"]) == 1
    rows = {row["stage"]: row["state"] for row in json.loads(capsys.readouterr().out)["stages"]}
    assert (rows["extra"], rows["more"], rows["killed"], rows["report"]) == (
        "left out",
        "left out",
        "failed",
        "done",
    )
