"""The verb `encode`: decode, features, nearest centroid, labels, in one pass over the audio and two bytes a frame.

Utterances are cut into shards of like duration, in manifest order. A shard is computed from its own utterances alone, appears when it is
complete, and is passed over when the verb runs again, unless it turns out damaged. So an interrupted run loses at most the shard each
process was at, any number of processes and machines on one disk can take shards of the same folder (`processes`, `part`), two
that happen to do the same one write the same bytes, and whoever finds all of them standing commits. `plan.json` beside the shards
keeps a run from going on with another run's inputs.

Labels of MFCC, and of an encoder on CPUs of one kind, do not depend on batches, shards, processes or threads, not in one frame. On
GPUs they may, where a frame lies within rounding of a border: see `quantize.features`; the same settings on the same kind of GPU
go the same way, interrupted or not.
"""

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pretrain.config import Config, PathStr, Split, part_of, share
from pretrain.data.audio import SAMPLE_RATE
from pretrain.data.labels import (
    Labels,
    commit_labels,
    count_classes,
    id_hashes,
    shard_fault,
    shard_stands,
    write_shard,
)
from pretrain.data.manifest import Manifest, Utterance
from pretrain.progress import console, progress
from pretrain.store.artefact import disagreements, is_complete, keep_to_plan, read_meta, require_absent
from pretrain.store.interrupts import IgnoringContext
from quantize.codebook import Codebook
from quantize.features import FeatureSource, MfccSource, Precision, open_encoder_source
from quantize.quality import usage_metrics

AGREEMENT_UTTERANCES = 50
SHARD_SECONDS = 1800.0
FEWEST_SHARDS, MOST_SHARDS = (
    8,
    1000,
)  # by default: short corpora occupy several processes, long ones do not crowd a folder


class EncodeConfig(Config):
    """`encoder`: the run folder, or fairseq2:CARD, whose features the codebook was fitted on, when they are an encoder's."""

    manifest: PathStr
    codebook: PathStr
    out: PathStr
    split: Split = None
    encoder: PathStr | None = None
    num_shards: int | None = Field(
        None,
        ge=1,
        description="at most; never more than utterances; by default half an hour of audio each, 8 to 1,000 of them",
    )
    processes: int = Field(
        1,
        ge=1,
        description="that take shards side by side, with an even share of the threads, a GPU each in turn",
    )
    part: Annotated[str | None, part_of('"2/16" for the second of sixteen parts')] = Field(
        None,
        description='"2/16" does every 16th shard from the second on: for job arrays and machines that share a disk',
    )
    device: str = "auto"
    batch_seconds: float | None = Field(
        None, ge=0, description="audio per batch on a GPU; a CPU takes utterances one by one"
    )
    precision: Precision = Field(
        "float32",
        description="of the encoder's matrix products; with another, the summary has the label agreement with float32",
    )
    workers: int = Field(2, ge=1, description="threads that decode, in each process")


class Plan:
    """What `encode` has before it: the rows, the codebook, and the rows of every shard."""

    def __init__(self, config: EncodeConfig):
        self.config, self.out = config, Path(config.out)
        self.manifest = Manifest(config.manifest)
        self.rows, self.codebook = self.manifest.select(config.split), Codebook.open(config.codebook)
        if not len(self.rows):
            raise ValueError(f"{config.manifest}: holds no utterances to encode")
        lengths = self.rows.lengths
        self.shards = plan_shards(
            lengths, config.num_shards or default_num_shards(float(lengths.sum() / SAMPLE_RATE))
        )
        self.seconds = [float(lengths[rows.start : rows.stop].sum() / SAMPLE_RATE) for rows in self.shards]
        self.part = range(len(self.shards))[share(config.part)]
        self.begun: list[int] = []  # shards handed out

    def identity(self) -> dict[str, Any]:
        """What all that work in one folder must agree on."""
        return {
            "manifest": self.manifest.fingerprint,
            "split": self.config.split,
            "codebook": self.codebook.fingerprint,
            "num_shards": len(self.shards),
            "precision": self.config.precision,
        }

    def left(self) -> Iterator[int]:
        """The shards of this part that do not stand, or not intact, asked for one after another."""
        keep_to_plan(self.out, self.identity())
        hashes = frames = None
        for shard in self.part:
            if shard_stands(self.out, shard):
                if hashes is None or frames is None:
                    hashes, frames = id_hashes(self.rows.column("id")), self.rows.num_frames
                own = slice(self.shards[shard].start, self.shards[shard].stop)
                fault = shard_fault(self.out, shard, hashes[own], frames[own], self.codebook.num_levels)
                if fault is None:
                    continue
                console.print(f"{fault}; the shard is made again")
            self.begun.append(shard)
            yield shard

    def utterances(self, shard: int) -> list[Utterance]:
        return [self.rows[row] for row in self.shards[shard]]


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Write the labels of a split (None: of every row). Returns counts, speed and how the classes are used.

    With `part`, the labels are finished by the part that finds all shards standing; until then the summary has `shards_missing`.
    """
    began = time.monotonic()
    if config.part is None:
        require_absent(config.out)
    plan = Plan(config)
    if not is_complete(plan.out):
        with _unless_overtaken(plan.out):
            _encode_part(plan)
        missing = [shard for shard in range(len(plan.shards)) if not shard_stands(plan.out, shard)]
        if missing:
            return {**_work_done(plan, began), "part": config.part, "shards_missing": len(missing)}
        with _unless_overtaken(plan.out):
            _commit(plan)
    _require_same(plan)
    usage = [usage_metrics(counts) for counts in count_classes(plan.out)]
    by_level = (
        {f"{name}_by_level": [level[name] for level in usage] for name in usage[0]} if len(usage) > 1 else {}
    )
    return {
        "utterances": len(plan.rows),
        "hours": sum(plan.seconds) / 3600,
        "num_classes": plan.codebook.num_classes,
        **_work_done(plan, began),
        **usage[0],
        **by_level,
        **label_agreement(config, plan.codebook, plan.rows),
    }


def _encode_part(plan: Plan) -> None:
    if (
        plan.out / "plan.json"
    ).is_file():  # refuse before anything is loaded; a new plan is written after that
        keep_to_plan(plan.out, plan.identity())
    todo = sum(plan.seconds[shard] for shard in plan.part if not shard_stands(plan.out, shard))
    total = sum(plan.seconds[shard] for shard in plan.part)
    with progress("encode", total=total, unit="s", done=total - todo) as advance:
        if plan.config.processes == 1:
            encode_shards(plan, open_source(plan.config, plan.codebook), plan.left(), advance)
        else:
            _encode_in_processes(plan, advance)


@contextmanager
def _unless_overtaken(out: Path) -> Iterator[None]:
    """Where another process does the same work and is done with it first, it clears up behind itself and us."""
    try:
        yield
    except FileNotFoundError:
        if not is_complete(out):
            raise


def _work_done(plan: Plan, began: float) -> dict[str, Any]:
    seconds = time.monotonic() - began
    return {
        "num_shards": len(plan.shards),
        "shards_already_done": len(plan.part) - len(plan.begun),
        "audio_seconds_per_second": sum(plan.seconds[shard] for shard in plan.begun) / seconds,
        "seconds": seconds,
    }


def encode_shards(
    plan: Plan, source: FeatureSource, shards: Iterable[int], advance: Callable[[float], object]
) -> None:
    """Write the labels of `shards`, which are asked for a little ahead of their turn; `advance` is told the seconds of audio done."""
    under_way: deque[tuple[int, list[Utterance]]] = deque()

    def groups() -> Iterator[list[Utterance]]:
        for shard in shards:
            under_way.append((shard, plan.utterances(shard)))
            yield under_way[-1][1]

    found: list[np.ndarray] = []
    for utterance, features in source.stream(groups()):
        assert len(features) == utterance.num_frames, utterance.id
        try:
            found.append(plan.codebook.assign(features))
        except ValueError as error:
            raise ValueError(f"{utterance.path} (utterance {utterance.id!r}): {error}") from None
        advance(utterance.length / SAMPLE_RATE)
        shard, utterances = under_way[0]
        if len(found) < len(utterances):
            continue
        write_shard(plan.out, shard, [utterance.id for utterance in utterances], found)
        under_way.popleft()
        found = []
    assert not under_way and not found


def _encode_in_processes(plan: Plan, advance: Callable[[float], object]) -> None:
    """The same by processes that ask for shards. One that dies ends the others, and is a ValueError that says so."""
    left, context = plan.left(), IgnoringContext()
    count = min(plan.config.processes, len(plan.part))
    workers: dict[Any, SpawnProcess] = {}
    connection: Any
    worker: SpawnProcess
    try:
        for number in range(count):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(plan.config, theirs), daemon=True)
            with _share_of_the_machine(plan.config, number, count):
                worker.start()
            theirs.close()
            workers[ours] = worker
        while workers:
            for connection in wait(list(workers)):
                try:
                    message = connection.recv()
                    if message is None:
                        connection.send(next(left, None))
                    elif isinstance(message, str):
                        raise ValueError(message)
                    else:
                        advance(message)
                except (EOFError, ConnectionError):
                    worker = workers.pop(connection)
                    worker.join()
                    if worker.exitcode:
                        raise ValueError(_obituary(plan, worker.exitcode)) from None
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join()


def _work(config: EncodeConfig, connection: Connection) -> None:
    """A worker process: sends None to ask for a shard (None: there is no more), seconds of audio done, or a user's mistake."""
    try:
        plan = Plan(config)
        source = open_source(config, plan.codebook)
        with _unless_overtaken(plan.out):
            encode_shards(plan, source, iter(partial(_ask, connection), None), connection.send)
    except (EOFError, ConnectionError):
        pass  # nobody is waiting for us any more
    except ValueError as error:
        connection.send(str(error))


def _ask(connection: Connection) -> int | None:
    connection.send(None)
    shard: int | None = connection.recv()
    return shard


@contextmanager
def _share_of_the_machine(config: EncodeConfig, number: int, count: int) -> Iterator[None]:
    """The environment in which worker `number` of `count` starts: its share of the threads, and one of the GPUs where there are more."""
    import torch

    share = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}
    if (
        config.encoder is not None
        and config.device in ("auto", "cuda")
        and (gpus := torch.cuda.device_count()) > 1
    ):
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        share["CUDA_VISIBLE_DEVICES"] = names.split(",")[number % gpus]
    before = {name: os.environ.get(name) for name in share}
    os.environ.update(share)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _obituary(plan: Plan, exit_code: int) -> str:
    cause = f"ended with status {exit_code}; what it said stands above"
    if exit_code < 0:
        cause = f"was ended by {signal.Signals(-exit_code).name}"
        if -exit_code == signal.SIGKILL:
            cause += ", as happens when memory runs out: fewer `processes` or threads need less"
    stand = sum(shard_stands(plan.out, shard) for shard in plan.part)
    return (
        f"{plan.out}: one of {plan.config.processes} processes {cause}. {stand} of {len(plan.part)} shards stand, and the same command "
        "goes on from there"
    )


def _commit(plan: Plan) -> None:
    """Verify the shards and finish the labels; another process may be doing the same."""
    parents = {"manifest": plan.manifest.fingerprint, "codebook": plan.codebook.fingerprint}
    if plan.codebook.source["kind"] == "encoder":
        parents["encoder"] = plan.codebook.source["encoder"]
    commit_labels(
        plan.out,
        len(plan.shards),
        plan.config.model_copy(update={"part": None}).resolved(),
        parents,
        codebook=plan.codebook.fingerprint,
        num_classes=plan.codebook.num_classes,
        num_levels=plan.codebook.num_levels,
        expected_ids=plan.rows.column("id"),
        expected_frames=plan.rows.num_frames,
    )
    (plan.out / "plan.json").unlink(missing_ok=True)
    for path in plan.out.glob(".*.tmp"):  # of killed processes
        path.unlink(missing_ok=True)


def _require_same(plan: Plan) -> None:
    """The finished labels are those that were asked for: another part may have committed them."""
    meta = read_meta(plan.out, "labels")
    there = {**meta, **meta["config"], **meta["parents"], "num_shards": meta["num_shards"]}
    identity = plan.identity()
    if differing := disagreements({key: there.get(key) for key in identity}, identity):
        raise ValueError(
            f"{plan.out}: holds finished labels of something else ({differing}); choose another `out`"
        )


def label_agreement(config: EncodeConfig, codebook: Codebook, rows: Manifest) -> dict[str, float]:
    """With a precision other than float32: the share of frames, of a seeded draw of utterances, with the label of float32.

    `label_agreement` is of level 0; with more levels, `label_agreement_all_levels` counts the frames that agree at every level.
    """
    if config.precision == "float32" or config.encoder is None:
        return {}
    chosen = np.sort(
        np.random.default_rng(0).choice(len(rows), size=min(len(rows), AGREEMENT_UTTERANCES), replace=False)
    )
    labels, exact = (
        Labels(config.out),
        open_source(config.model_copy(update={"precision": "float32"}), codebook),
    )
    same = [
        labels[row.id] == codebook.assign(features)
        for row, features in exact.features([rows[int(i)] for i in chosen])
    ]
    agree = np.concatenate(same)  # (frames,) or (frames, levels)
    if agree.ndim == 1:
        return {"label_agreement": float(agree.mean())}
    return {
        "label_agreement": float(agree[:, 0].mean()),
        "label_agreement_all_levels": float(agree.all(axis=1).mean()),
    }


def open_source(config: EncodeConfig, codebook: Codebook) -> FeatureSource:
    """The source of the features that the codebook quantises; an encoder other than its own is a ValueError naming both."""
    wanted = codebook.source
    if wanted["kind"] == "mfcc":
        if config.encoder is not None:
            raise ValueError(
                f"encoder: {config.codebook} quantises MFCC; remove encoder = {config.encoder!r}"
            )
        if config.precision != "float32":
            raise ValueError(
                f"precision: {config.codebook} quantises MFCC; remove precision = {config.precision!r}"
            )
        return MfccSource(wanted["cmvn"], config.workers)
    if config.encoder is None:
        raise ValueError(
            f"encoder: {config.codebook} quantises layer {wanted['layer']} of encoder {wanted['encoder']}; give its run folder"
        )
    source = open_encoder_source(
        config.encoder,
        wanted["layer"],
        device=config.device,
        batch_seconds=config.batch_seconds,
        workers=config.workers,
        precision=config.precision,
        convention=wanted.get("convention", "residual"),
    )
    if source.fingerprint != wanted["encoder"]:
        raise ValueError(
            f"encoder: {config.codebook} was fitted on encoder {wanted['encoder']}, and {config.encoder} is encoder "
            f"{source.fingerprint}; give the run it was fitted on, or fit a codebook on this one"
        )
    return source


def default_num_shards(seconds: float) -> int:
    """Half an hour of audio each, within limits."""
    return min(MOST_SHARDS, max(FEWEST_SHARDS, math.ceil(seconds / SHARD_SECONDS)))


def plan_shards(lengths: np.ndarray, num_shards: int) -> list[range]:
    """Rows of each shard: consecutive rows of about the same total length; at most `num_shards`, none of them empty."""
    ends = np.cumsum(lengths, dtype=np.float64)
    shard = np.floor((ends - lengths / 2) / ends[-1] * num_shards)
    bounds = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(lengths)]
    return [range(first, last) for first, last in pairwise(bounds)]
