"""`training.engine = "fairseq2"` against our engine: the same losses, and the same ends of runs that were
cut, stopped or split."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq2.checkpoint import StandardCheckpointManager
from safetensors.torch import load_file

from pretrain.data.manifest import write_manifest
from pretrain.data.utterance import num_frames
from pretrain.fairseq2.available import require_fairseq2
from pretrain.training.checkpoint import load_weights
from pretrain.training.run import Run
from tests.fairseq2.engine_worker import ENGINES, STEPS, TASKS, main
from tests.pretrain.conftest import run_two_processes, write_corpus, write_labels
from tests.pretrain.ctc.tones import TEXTS, save_encoder, spell
from tests.pretrain.distributed_worker import noisy
from tests.pretrain.linear_task import LinearTask, ScoredTask, run_linear
from tests.pretrain.runs import assert_same_run, curve, lines
from tests.pretrain.stopping_worker import (
    MONITOR,
    PATIENT,
    SCORES,
    Validated,
    once_at,
    random_stops,
    until_finished,
)
from tests.units.conftest import NUM_UNITS, planted_documents
from units.corpus.corpus_writing import write_corpus as write_units
from units.corpus.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]
THEIRS = {"engine": "fairseq2"}


def make_corpus(folder: Path) -> Path:
    """Tones that spell texts, with labels and phones, and a unit corpus."""
    waves = [spell(text, seed) for seed, text in enumerate(TEXTS * 2)]
    texts: list[str | None] = [*TEXTS, *TEXTS]
    manifest = write_corpus(folder, waves, texts=texts, splits=["train"] * 6 + ["dev"] * 2)
    write_labels(
        folder / "labels",
        {name: num_frames(len(wave)) for name, wave in zip(manifest.ids, waves, strict=True)},
    )
    rows = [
        {
            "id": u.id,
            "path": u.path,
            "start": 0,
            "num_samples": u.num_samples,
            "sample_rate": 16000,
            "split": u.split,
            "phones": [(0.0, 0.1, "a"), (0.1, 0.2, "b"), (0.2, 1.0, "c")],
        }
        for u in manifest
    ]
    write_manifest(folder / "aligned", rows, {}, {})
    save_encoder(folder / "encoder")
    settings = {"codebook": "c0de", "frame_rate_hz": 50.0, "deduplicated": True}
    write_units(
        folder / "units",
        planted_documents(60, 0),
        {},
        {},
        vocabulary=Vocabulary(num_units=NUM_UNITS),
        **settings,
    )
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one/ and two/, each holding a run per scenario."""
    folder = tmp_path_factory.mktemp("engines")
    corpus = make_corpus(folder / "corpus")
    with run_two_processes(
        ROOT / "tests/fairseq2/engine_worker.py", corpus, folder / "two", logs=folder / "logs", timeout=400
    ):
        main(corpus, folder / "one")
    return folder


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run)]


@pytest.mark.parametrize("processes", ["one", "two"])
@pytest.mark.parametrize("task", TASKS)
def test_both_engines_give_the_same_losses_for_fifty_steps(runs: Path, task: str, processes: str) -> None:
    ours, theirs = (runs / processes / f"{task}_{engine}" for engine in ENGINES)
    assert len(losses(ours)) == STEPS and losses(ours)[-1] < losses(ours)[0]
    assert losses(theirs) == losses(ours)  # to the bit: the same numbers are computed in the same order
    assert_same_run(ours, theirs)


def test_a_task_is_called_after_every_update(tmp_path: Path) -> None:
    class Averaged(LinearTask):
        def after_step(self, step: int) -> None:
            steps.append(step)
            averages.append(next(self.model.parameters()).detach().clone())

    steps: list[int] = []
    averages: list[torch.Tensor] = []
    for settings in ({}, THEIRS):
        run_linear(tmp_path / f"run{len(settings)}", Averaged(), {"max_steps": 6, **settings})
    assert steps == [*range(6), *range(6)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(averages[:6], averages[6:], strict=True))


@pytest.mark.parametrize("processes", ["one", "two"])
@pytest.mark.parametrize("run", ["accumulated", "noisy", "linear", "single"])
def test_accumulation_phases_and_ranks_without_items_are_the_same_in_both(
    runs: Path, run: str, processes: str
) -> None:
    ours, theirs = (runs / processes / f"{run}_{whose}" for whose in ("ours", "theirs"))
    for one, other in zip(curve(ours), curve(theirs), strict=True):
        # three micro-batches: the trainer divides each loss by three, and three thirds of a number are not
        # quite the number
        assert other == pytest.approx(one, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("run", "reference"),
    [
        ("cut", "noisy_theirs"),
        ("stopped", "noisy_theirs"),
        ("sharded_cut", "sharded"),
        ("sharded_stopped", "sharded"),
        ("sharded_recomputed", "sharded"),
    ],
)
def test_two_processes_that_were_cut_or_stopped_become_the_run_that_was_not(
    runs: Path, run: str, reference: str
) -> None:
    one, other = runs / "two" / reference, runs / "two" / run
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert checkpoint_file(one, name).read_bytes() == checkpoint_file(other, name).read_bytes()
    assert [line["step"] for line in lines(one)] == [line["step"] for line in lines(other)]
    assert curve(one)[-1] == curve(other)[-1]


@pytest.mark.parametrize(
    ("run", "reference"), [("sharded", "noisy_theirs"), ("sharded_accumulated", "accumulated_ours")]
)
def test_fsdp_gives_the_run_of_ddp(runs: Path, run: str, reference: str) -> None:
    one, other = runs / "two" / reference, runs / "two" / run
    for line, same in zip(curve(one), curve(other), strict=True):
        assert same == pytest.approx(line, rel=1e-5, abs=1e-7)  # sums in another order
    first, second = (load_file(checkpoint_file(folder, "model.safetensors")) for folder in (one, other))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        # a weight moves by 1e-3 a step
        torch.testing.assert_close(second[name], weight, rtol=1e-4, atol=1e-5)


def checkpoint_file(run: Path, name: str) -> Path:
    return sorted(run.glob("step_*"))[-1] / name


def test_one_process_goes_on_with_what_two_began_and_two_with_what_one_began(
    runs: Path, tmp_path: Path
) -> None:
    corpus = runs / "corpus"
    for folder in ("one", "two"):
        copy = unfinished_copy(runs / folder / "noisy_theirs", tmp_path / folder)
        shutil.rmtree(copy / "fairseq2" / "checkpoints" / "step_8")
    noisy(corpus, tmp_path / "two", **THEIRS)
    worker = "from pathlib import Path; from tests.pretrain.distributed_worker import noisy; "
    worker += f"noisy(Path({str(corpus)!r}), Path({str(tmp_path / 'one')!r}), engine='fairseq2')"
    (tmp_path / "worker.py").write_text(worker)
    with run_two_processes(tmp_path / "worker.py", logs=tmp_path / "logs", timeout=100):
        pass
    for folder in ("one", "two"):
        assert [line["step"] for line in lines(tmp_path / folder)] == list(range(1, 9))
        assert json.loads((tmp_path / folder / "summary.json").read_text())["steps_this_time"] == 4


@pytest.fixture
def saves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """fairseq2 writes while training goes on, and these steps take a millisecond: without this a cut comes
    before the writing ends."""
    save = StandardCheckpointManager.save_checkpoint

    def blocking(*arguments: Any, **options: Any) -> None:
        save(*arguments, **{**options, "blocking": True})

    monkeypatch.setattr(StandardCheckpointManager, "save_checkpoint", blocking)


def unfinished_copy(run: Path, copy: Path) -> Path:
    """A finished run as if it had been killed on its last step, in another place."""
    shutil.copytree(run, copy)
    (copy / "meta.json").unlink(missing_ok=True)
    config = copy / "config.toml"
    config.write_text(config.read_text().replace(str(run), str(copy)))
    return copy


def run_theirs(
    out: Path, task: LinearTask | None = None, training: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    return run_linear(out, task, {**(training or {}), **THEIRS}, **more)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_stopped_at_random_steps_becomes_the_run_that_was_not(tmp_path: Path, seed: int) -> None:
    settings = {"validate_every": 3, "log_every": 1}
    run_theirs(tmp_path / "straight", LinearTask(dropout=0.3, num_valid=3, freeze_steps=4), settings)
    task = LinearTask(dropout=0.3, num_valid=3, freeze_steps=4, on_step=random_stops(seed, 12, 4))
    _, stops = until_finished(lambda: run_theirs(tmp_path / "stopped", task, settings))
    assert stops >= 3
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("at", [(), {0}, {3, 4, 5}, {6, 9, 13}])
def test_best_and_patience_are_those_of_our_engine_also_where_validations_are_broken_off(
    tmp_path: Path, at: set[int]
) -> None:
    ours = run_linear(tmp_path / "ours", Validated(SCORES), PATIENT, MONITOR)
    task = Validated(SCORES, at)
    theirs, stops = until_finished(lambda: run_theirs(tmp_path / "theirs", task, PATIENT, monitor=MONITOR))
    assert stops >= bool(at)
    for name in ("steps", "best_step", "best_valid_score", "stopped_early", "valid_loss"):
        assert theirs[name] == ours[name]
    assert {path.name for path in (tmp_path / "ours").glob("step_*")} == {
        path.name for path in (tmp_path / "theirs").glob("step_*")
    }
    weights = [load_weights(tmp_path / run)[0] for run in ("ours", "theirs")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_kill_between_a_checkpoint_and_the_validation_after_it_costs_nothing(
    saves_at_once: None, tmp_path: Path
) -> None:
    run_theirs(
        tmp_path / "straight",
        ScoredTask(SCORES),
        {**PATIENT, "patience": None, "checkpoint_every": 4},
        monitor=MONITOR,
    )

    class Killed(ScoredTask):
        def evaluate(self) -> dict[str, float]:
            if self.step == 8:
                raise RuntimeError("power cut")
            return super().evaluate()

    settings = {**PATIENT, "patience": None, "checkpoint_every": 4}
    with pytest.raises(RuntimeError, match="power cut"):
        run_theirs(tmp_path / "killed", Killed(SCORES), settings, monitor=MONITOR)
    summary = run_theirs(tmp_path / "killed", ScoredTask(SCORES), settings, monitor=MONITOR)
    assert summary["steps_this_time"] == 4 and summary["best_step"] == 6
    assert [line["valid_score"] for line in lines(tmp_path / "killed") if "valid_score" in line] == SCORES
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (
            checkpoint_file(tmp_path / "straight", name).read_bytes()
            == checkpoint_file(tmp_path / "killed", name).read_bytes()
        )


def test_a_run_that_was_killed_when_only_its_end_was_left_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Run, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_theirs(tmp_path / "run", LinearTask(num_valid=2))
    summary = run_theirs(tmp_path / "run", LinearTask(num_valid=2))
    assert summary["steps"] == 12 and summary["steps_this_time"] == 0 and "valid_loss" in summary
    run_theirs(tmp_path / "straight", LinearTask(num_valid=2))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_what_is_not_finite_ends_the_run_and_takes_its_checkpoint_with_it(tmp_path: Path) -> None:
    training = {"log_every": 5, "checkpoint_every": 5, "max_steps": 30}
    with pytest.raises(ValueError, match=r"stopped at step 15: loss and gradient_norm not finite.*step_10$"):
        run_theirs(tmp_path / "run", LinearTask(nan_from=2), training)
    assert sorted(path.name for path in (tmp_path / "run/fairseq2/checkpoints").glob("step_*")) == ["step_10"]


def test_a_run_in_training_says_that_its_checkpoints_are_not_ours_yet(
    saves_at_once: None, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        run_theirs(tmp_path / "run", LinearTask(on_step=cut_at_9))
    with pytest.raises(
        ValueError,
        match=r"not finished, and was begun with training.engine = .fairseq2.*give its command again",
    ):
        load_weights(tmp_path / "run")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_can_be_gone_on_from(
    saves_at_once: None, tmp_path: Path
) -> None:
    def fail(step: int) -> None:
        if step == 9:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run_theirs(tmp_path / "run", LinearTask(dropout=0.2, on_step=fail))
    damaged = tmp_path / "run/fairseq2/checkpoints/step_8"
    (damaged / "model/pp_00/tp_00/sdp_00.pt").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=re.escape(str(damaged)) + ".*damaged. Remove that folder"):
        run_theirs(tmp_path / "run", LinearTask(dropout=0.2))
    shutil.rmtree(damaged)
    assert run_theirs(tmp_path / "run", LinearTask(dropout=0.2))["steps_this_time"] == 8
    run_theirs(tmp_path / "straight", LinearTask(dropout=0.2))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_a_pickle_that_would_run_code_is_not_run(saves_at_once: None, tmp_path: Path) -> None:
    def fail(step: int) -> None:
        if step == 9:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run_theirs(tmp_path / "run", LinearTask(on_step=fail))

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"evil": Evil()}, tmp_path / "run/fairseq2/checkpoints/step_8/trainer/rank_00.pt")
    with pytest.raises(ValueError, match="its trainer cannot be read"):
        run_theirs(tmp_path / "run", LinearTask())
    assert not (tmp_path / "ran").exists()


def test_a_run_that_one_engine_has_begun_is_not_gone_on_with_by_the_other(
    saves_at_once: None, tmp_path: Path
) -> None:
    for begun, other in (ENGINES, ENGINES[::-1]):
        with pytest.raises(RuntimeError, match="power cut"):
            run_linear(tmp_path / begun, LinearTask(on_step=cut_at_9), {"engine": begun})
        with pytest.raises(ValueError, match=f"training.engine: '{begun}', now '{other}'"):
            run_linear(tmp_path / begun, LinearTask(), {"engine": other})


def cut_at_9(step: int) -> None:
    if step == 9:
        raise RuntimeError("power cut")


def test_a_model_split_over_other_processes_is_refused_with_both_numbers(runs: Path, tmp_path: Path) -> None:
    unfinished_copy(runs / "two" / "sharded", tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"holds the model in 2 shards .*this run wants 1.*as many processes"
    ):
        noisy(runs / "corpus", tmp_path / "run", sharding="full", **THEIRS)


def test_fairseq2_itself_reads_the_model_of_a_checkpoint(runs: Path) -> None:
    from fairseq2.file_system import GlobalFileSystem
    from fairseq2.io import TensorFileLoadOptions, _TorchTensorFileLoader

    run = runs / "one" / "hubert_fairseq2"
    file = run / "fairseq2" / "checkpoints" / f"step_{STEPS}" / "model/pp_00/tp_00/sdp_00.pt"
    theirs = _TorchTensorFileLoader(GlobalFileSystem()).load(file, TensorFileLoadOptions(restrict=True))
    ours = load_weights(run)[0]
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_its_recorders_write_beside_our_log(runs: Path) -> None:
    folder = runs / "one" / "ctc_fairseq2" / "fairseq2"
    train = [json.loads(line) for line in (folder / "metrics/train.jsonl").read_text().splitlines()]
    assert [line["Step"] for line in train] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in train] == losses(runs / "one" / "ctc_fairseq2") and "grad_norm" in train[
        0
    ]
    assert [
        json.loads(line)["Step"] for line in (folder / "metrics/valid.jsonl").read_text().splitlines()
    ] == [25, 50]
    assert list((folder / "tb" / "train").iterdir()) and list((folder / "tb" / "valid").iterdir())


def test_a_signal_stops_after_the_step_and_is_passed_on(tmp_path: Path) -> None:
    task = LinearTask(on_step=once_at(6))
    _, stops = until_finished(lambda: run_theirs(tmp_path / "run", task))
    assert stops == 1
    numbers = sorted(int(path.name[5:]) for path in (tmp_path / "run/fairseq2/checkpoints").glob("step_*"))
    assert numbers == [8, 12]  # of 4, 7 (the stop), 8 and 12 the last two


def test_ctrl_c_stops_after_the_step_and_the_run_becomes_the_one_that_was_not(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped after step 7"):
            run_theirs(tmp_path / "run", LinearTask(dropout=0.3, on_step=once_at(6, number=signal.SIGINT)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / ".run.lock").exists()
    run_theirs(tmp_path / "run", LinearTask(dropout=0.3))
    run_theirs(tmp_path / "straight", LinearTask(dropout=0.3))
    weights = [
        checkpoint_file(tmp_path / name, "model.safetensors").read_bytes() for name in ("straight", "run")
    ]
    assert weights[0] == weights[1]


def test_patience_begins_with_the_last_phase_as_in_our_engine(tmp_path: Path) -> None:
    summaries = [
        run(tmp_path / name, ScoredTask([1, 2, 2, 2, 2, 2], freeze_steps=4), PATIENT, monitor=MONITOR)
        for name, run in (("ours", run_linear), ("theirs", run_theirs))
    ]
    assert [(summary["steps"], summary["best_step"]) for summary in summaries] == [(8, 2)] * 2
    scores = [line["valid_score"] for line in lines(tmp_path / "theirs") if "valid_score" in line]
    assert scores == [1, 2, 2, 2]  # whole numbers, too
    states = [
        json.loads((tmp_path / name / "step_00000002/state.json").read_text()) for name in ("ours", "theirs")
    ]
    assert [(state["epoch"], state["batch"]) for state in states] == [(0, 2)] * 2


def test_the_last_good_checkpoint_stays_also_where_one_is_kept(tmp_path: Path) -> None:
    training = {"log_every": 5, "checkpoint_every": 5, "max_steps": 30, "keep_checkpoints": 1}
    with pytest.raises(ValueError, match=r"stopped at step 15: .*The last good checkpoint: .*step_10$"):
        run_theirs(tmp_path / "run", LinearTask(nan_from=2), training)


def test_an_alarm_of_a_validation_that_a_stop_broke_off_ends_the_run_where_it_stood(tmp_path: Path) -> None:
    class Alarmed(Validated):
        def alarm(self, metrics: dict[str, float], step: int) -> str | None:
            return "collapsed" if metrics.get("valid_score") == 3.0 else None

    task = Alarmed(SCORES, {7})  # the second batch of the validation after step 6
    with pytest.raises(ValueError, match=r"stopped at step 6: collapsed\. .*step_4$"):
        until_finished(
            lambda: run_theirs(tmp_path / "run", task, {**PATIENT, "checkpoint_every": 4}, monitor=MONITOR)
        )
    assert task.step == 6


def test_a_run_goes_on_on_another_device_and_counts_the_seconds_of_all_sessions(tmp_path: Path) -> None:
    task = LinearTask(dropout=0.3, on_step=once_at(6))
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        with pytest.raises(SystemExit):
            run_theirs(tmp_path / "run", task)
    finally:
        signal.signal(signal.SIGUSR2, before)
    stopped = tmp_path / "run/fairseq2/checkpoints/step_7"
    for name, change in {"trainer/rank_00.pt": written_on_a_gpu, "data_reader/dp_00.pt": of_an_hour}.items():
        state = torch.load(stopped / name, weights_only=True)
        change(state)
        torch.save(state, stopped / name)
    summary = run_theirs(tmp_path / "run", task)
    assert summary["steps_this_time"] == 5 and 3600 < summary["seconds"] < 4200
    run_theirs(tmp_path / "straight", LinearTask(dropout=0.3))
    weights = [
        checkpoint_file(tmp_path / name, "model.safetensors").read_bytes() for name in ("straight", "run")
    ]
    assert weights[0] == weights[1]


def written_on_a_gpu(state: dict[str, Any]) -> None:
    """Its generator has a state, too: fairseq2 wants as many as it writes."""
    state["_rng_bag"]["generators"].append(torch.zeros(16, dtype=torch.uint8))


def of_an_hour(state: dict[str, Any]) -> None:
    state["seconds"] += 3600.0


def test_fairseq2_beside_another_torch_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "fairseq2":
                raise RuntimeError("fairseq2 requires a CPU-only build of PyTorch 2.9.1")

    monkeypatch.delitem(sys.modules, "fairseq2")
    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    with pytest.raises(ValueError, match=r"does not load here \(fairseq2 requires .*\); install"):
        require_fairseq2("this test")
