"""The plan of `encode`: which rows make a shard of labels, which shards are done, and how one is made."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pretrain.config import PathStr, Split, part_of, share
from pretrain.data.label_shards import id_hashes, shard_fault, shard_stands, write_shard
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import SAMPLE_RATE, Utterance
from pretrain.progress import console
from pretrain.store.artefact import is_complete, keep_to_plan
from quantize.codebook import Codebook
from quantize.extraction import EncoderPrecision, Extraction
from quantize.features import FeatureSource

SHARD_SECONDS = 1800.0
FEWEST_SHARDS, MOST_SHARDS = 8, 1000  # by default: enough for several processes, few enough for one folder


class EncodeConfig(Extraction):
    """`encoder`: the run folder, or fairseq2:CARD, whose features the codebook was fitted on, when they are
    an encoder's.

    With a `precision` other than float32, the summary has the label agreement with float32.
    """

    manifest: PathStr
    codebook: PathStr
    out: PathStr
    split: Split = None
    encoder: PathStr | None = None
    num_shards: int | None = Field(
        None,
        ge=1,
        description=(
            "at most; never more than utterances; by default half an hour of audio each, 8 to 1,000 of them"
        ),
    )
    processes: int = Field(
        1,
        ge=1,
        description="that take shards side by side, with an even share of the threads, a GPU each in turn",
    )
    part: Annotated[str | None, part_of('"2/16" for the second of sixteen parts')] = Field(
        None,
        description=(
            '"2/16" does every 16th shard from the second on: for job arrays and machines that share a disk'
        ),
    )
    precision: EncoderPrecision = "float32"


class Plan:
    """The rows to encode, the codebook, and the rows of every shard."""

    def __init__(self, config: EncodeConfig):
        self.config, self.out = config, Path(config.out)
        self.manifest = Manifest(config.manifest)
        self.rows, self.codebook = self.manifest.select(config.split), Codebook.open(config.codebook)
        if not len(self.rows):
            raise ValueError(f"{config.manifest}: holds no utterances to encode")
        lengths = self.rows.lengths
        num_shards = config.num_shards or default_num_shards(float(lengths.sum() / SAMPLE_RATE))
        self.shards = plan_shards(lengths, num_shards)
        self.seconds = [float(lengths[rows.start : rows.stop].sum() / SAMPLE_RATE) for rows in self.shards]
        self.part = range(len(self.shards))[share(config.part)]
        self.begun: list[int] = []  # shards handed out

    def identity(self) -> dict[str, Any]:
        """What all processes that write to one folder must agree on."""
        return {
            "manifest": self.manifest.fingerprint,
            "split": self.config.split,
            "codebook": self.codebook.fingerprint,
            "num_shards": len(self.shards),
            "precision": self.config.precision,
        }

    def left(self) -> Iterator[int]:
        """Yields the shards of this part that are missing or damaged."""
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


def encode_shards(
    plan: Plan, source: FeatureSource, shards: Iterable[int], advance: Callable[[float], object]
) -> None:
    """Writes the labels of `shards`, which are taken a little ahead of their turn; `advance` gets seconds of
    audio."""
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


@contextmanager
def unless_overtaken(out: Path) -> Iterator[None]:
    """Ignores missing files where another process has finished the same labels first, and removed the
    rest."""
    try:
        yield
    except FileNotFoundError:
        if not is_complete(out):
            raise


def default_num_shards(seconds: float) -> int:
    """Half an hour of audio each, within limits."""
    return min(MOST_SHARDS, max(FEWEST_SHARDS, math.ceil(seconds / SHARD_SECONDS)))


def plan_shards(lengths: np.ndarray, num_shards: int) -> list[range]:
    """Rows of each shard: consecutive rows of about the same total length; at most `num_shards`, none of them
    empty."""
    ends = np.cumsum(lengths, dtype=np.float64)
    shard = np.floor((ends - lengths / 2) / ends[-1] * num_shards)
    bounds = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(lengths)]
    return [range(first, last) for first, last in pairwise(bounds)]
