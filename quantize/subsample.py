"""Frames to fit on: drawn over the whole corpus while features stream by, and kept in a file.

Which frames are drawn is a function of the seed and the manifest alone. Memory holds some hundred bytes for
each row while the plan is made; the frames go to `sample.npy`, and what an interrupted run has written stays.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from pretrain.data.manifest import Manifest
from pretrain.data.utterance import SAMPLE_RATE, Utterance
from pretrain.progress import progress
from pretrain.store.disk import telling_full_disk, write_json
from quantize.features import FeatureSource

Balance = Literal["speaker", "none"]

VISIT = 4  # audio that may be decoded and encoded, relative to the frames wanted
PIECE_SECONDS = 600.0  # of audio; an interrupted run goes on at the start of a piece
RECORD_SECONDS = 15.0  # between notes of how far the file is written


def plan_sample(
    num_frames: np.ndarray, budget: int, seed: int, speakers: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Which utterances to visit and how many frames to draw from each: (rows ascending, counts), `budget`
    frames or all there are.

    `num_frames` (rows,) int64; `speakers` (rows,) are numbers from 0. Every speaker gives the same number of
    frames, as far as it has them (`share_out`); without `speakers` all rows are one. A speaker's utterances
    are drawn until they hold `VISIT` times what it is to give; each of them then gives the same share of its
    frames.
    """
    num_frames = np.asarray(num_frames, np.int64)
    speakers = np.zeros(len(num_frames), np.int64) if speakers is None else speakers
    rng = np.random.default_rng([seed, len(num_frames)])
    order = rng.permutation(len(num_frames))
    have = _sums(speakers, num_frames)
    quotas = share_out(have, budget, rng)
    order = order[np.argsort(speakers[order], kind="stable")]  # speaker by speaker, at random within each
    before = np.cumsum(num_frames[order]) - num_frames[order] - (np.cumsum(have) - have)[speakers[order]]
    rows = order[(before < VISIT * quotas[speakers[order]]) & (num_frames[order] > 0)]
    rows = rows[np.lexsort((rows, speakers[rows]))]
    frames, owner = num_frames[rows], speakers[rows]
    held, wanted = _sums(owner, frames, len(have))[owner], quotas[owner]
    # Of a speaker's frames up to the end of an utterance, `wanted / held` are drawn, rounded down; the
    # utterance gives what that adds. As whole part and carried rest, because the product of two frame counts
    # would not fit 64 bits.
    whole, rest = np.divmod(frames * wanted, held)
    ends = np.cumsum(rest)
    ends -= (ends - rest)[np.searchsorted(owner, owner)]
    counts = whole + ends // held - (ends - rest) // held
    rows, counts = rows[counts > 0], counts[counts > 0]
    ascending = np.argsort(rows)
    return rows[ascending], counts[ascending]


def share_out(have: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """`budget` in equal parts among holders of `have` (n,): what one lacks, the others give. (n,) int64, at
    most `have`.

    Everybody gives up to one level, as water finds its own; the few that are left over in rounding go to
    holders at random.
    """
    budget, count = min(budget, int(have.sum())), len(have)
    rising = np.sort(have)
    below = np.cumsum(rising) - rising
    # so many give all they have
    full = int(np.searchsorted(below + rising * np.arange(count, 0, -1), budget))
    if full == count:
        return have.astype(np.int64)
    level = (budget - int(below[full])) // (count - full)
    quotas = np.minimum(have, level).astype(np.int64)
    quotas[rng.permutation(np.flatnonzero(have > level))[: budget - int(quotas.sum())]] += 1
    return quotas


def _sums(numbers: np.ndarray, values: np.ndarray, count: int = 0) -> np.ndarray:
    """Sum of the values under each number, int64; exact, as float64 is below 2^53 frames."""
    return np.bincount(numbers, weights=values, minlength=count).astype(np.int64)


def speaker_numbers(rows: Manifest) -> np.ndarray | None:
    """A number from 0 for the speaker of each row, (rows,) int64; rows without a speaker share one. None
    where none is known."""
    column = rows.column("speaker")
    if column.null_count == len(column):
        return None
    encoded = column.dictionary_encode(null_encoding="encode").unify_dictionaries()
    return np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks]).astype(np.int64)


class Sample:
    """Which frames of `rows` to draw: `budget` of them, or all there are.

    `balance` "speaker": as many from each speaker, where the manifest knows speakers. No frame in `rows`:
    ValueError.
    """

    def __init__(self, rows: Manifest, budget: int, seed: int, balance: Balance = "speaker"):
        numbers = speaker_numbers(rows)
        self._rows, self._seed = rows, seed
        self._visited, self._counts = plan_sample(
            rows.num_frames, budget, seed, numbers if balance == "speaker" else None
        )
        self._ends = np.cumsum(self._counts)
        self.size = int(self._counts.sum())
        if self.size == 0:
            raise ValueError(
                f"{rows.folder}: no frame of 20 ms in the {len(rows)} utterances to fit on; choose another "
                "split"
            )
        self._seconds = rows.lengths[self._visited] / SAMPLE_RATE
        self.seconds = float(self._seconds.sum())
        known = rows.num_frames > 0
        self.speaker_frames = (
            None
            if numbers is None
            else _sums(numbers[self._visited], self._counts, numbers.max() + 1)[np.unique(numbers[known])]
        )  # (speakers,) frames drawn of each that has any

    def __len__(self) -> int:
        """Utterances to visit."""
        return len(self._visited)

    @property
    def utterances(self) -> list[Utterance]:
        """Those to visit, in manifest order."""
        return list(self._rows.take(self._visited))

    @cached_property
    def bounds(self) -> list[int]:
        """Numbers of the utterances where a piece of `PIECE_SECONDS` begins, and the number of all. A sample
        has one set of pieces."""
        piece = np.floor((np.cumsum(self._seconds) - self._seconds) / PIECE_SECONDS)
        return [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(self)]

    def pieces(self, first: int = 0) -> Iterator[list[Utterance]]:
        """The utterances from number `first`, where a piece begins, piece by piece."""
        for start, end in pairwise(self.bounds[self.bounds.index(first) :]):
            yield list(self._rows.take(self._visited[start:end]))

    def seconds_of(self, num_utterances: int) -> float:
        """Audio in the first so many of the utterances to visit."""
        return float(self._seconds[:num_utterances].sum())

    def draw(self, utterance: Utterance) -> tuple[slice, np.ndarray]:
        """Where this utterance's frames go in the sample, and which of its frames they are."""
        number = self._numbers[utterance.id]
        count, end = int(self._counts[number]), int(self._ends[number])
        rng = np.random.default_rng([self._seed, int(self._visited[number]), 1])
        return slice(end - count, end), np.sort(rng.choice(utterance.num_frames, size=count, replace=False))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self._rows.take(self._visited).ids)}


def collect(source: FeatureSource, sample: Sample, folder: Path) -> Path:
    """Write the sample to `folder/sample.npy`, (frames, dim) float32, in manifest order; go on where an
    earlier call stopped.

    `collected.json` says how many utterances are safely in the file. Work goes on at the start of a piece,
    and no batch reaches into two, so that batches are made of the same utterances however often it was
    interrupted, and the file has the same bytes. NaN or infinity in a feature: a ValueError names the
    utterance.
    """
    path, record = folder / "sample.npy", folder / "collected.json"
    done = (
        json.loads(record.read_text(encoding="utf-8"))["utterances"]
        if path.is_file() and record.is_file()
        else 0
    )
    if done == len(sample):
        return path
    row_bytes = 4 * source.dim
    folder.mkdir(parents=True, exist_ok=True)
    header = {"descr": "<f4", "fortran_order": False, "shape": (sample.size, source.dim)}
    bar = progress("frames to fit on", total=sample.seconds, unit="s", done=sample.seconds_of(done))
    num_bytes = 128 + row_bytes * sample.size
    with telling_full_disk(path, num_bytes), open(path, "r+b" if done else "wb") as file, bar as advance:
        np.lib.format.write_array_header_1_0(file, header)
        start, recorded, bounds = file.tell(), time.monotonic(), set(sample.bounds)
        for utterance, features in source.stream(sample.pieces(done)):
            require_finite(utterance, features)
            place, chosen = sample.draw(utterance)
            # Written, not mapped: a full disk is then an error and not a dead process.
            file.seek(start + place.start * row_bytes)
            file.write(features[chosen].astype("<f4").tobytes())
            advance(utterance.length / SAMPLE_RATE)
            done += 1
            if done == len(sample) or (done in bounds and time.monotonic() - recorded >= RECORD_SECONDS):
                file.flush()
                os.fsync(file.fileno())
                write_json(record, {"utterances": done})
                recorded = time.monotonic()
    return path


def require_space(folder: Path, num_frames: int, dim: int) -> None:
    """The disk has room for the sample that `collect` is to write to `folder`, beside what it has written, or
    a ValueError says how much."""
    path = folder / "sample.npy"
    needed = 4 * num_frames * dim - (path.stat().st_size if path.is_file() else 0)
    standing = next(parent for parent in path.absolute().parents if parent.is_dir())
    if (free := shutil.disk_usage(standing).free) < needed:
        raise ValueError(
            f"{folder}: the sample needs {needed:,} bytes of disk and {free:,} are free; lower `hours` or "
            "`frames`, or choose an `out` with more space"
        )


def require_finite(utterance: Utterance, features: np.ndarray) -> None:
    """Features (frames, dim) without NaN and infinity, or a ValueError names the utterance and the frame."""
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{utterance.path} (utterance {utterance.id!r}): NaN or infinity in the features of frame "
            f"{int(np.argmin(finite))}; leave the utterance out of the manifest, or see whether the encoder "
            "has diverged"
        )


def load_sample(path: Path, memory_gb: float) -> np.ndarray:
    """The sample (frames, dim) float32: in memory if it fits into so many 10^9 bytes, else as a read-only map
    of the file."""
    fits = path.stat().st_size <= memory_gb * 1e9
    points: np.ndarray = np.load(path, mmap_mode=None if fits else "r", allow_pickle=False)
    return points


def frame_file(folder: str | Path | None, shape: tuple[int, int, int]) -> np.ndarray:
    """A float32 array in a file without a name, which the system removes when the work ends.

    Raises ValueError with the number of bytes if the disk has too little space.
    """
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    if 0 in shape:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(dir=folder) as file:
        size = 4 * int(np.prod(shape, dtype=np.int64))
        try:
            # a full disk is an error here rather than a dead process later
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # macOS
                file.truncate(size)
        except OSError as error:
            where = folder or tempfile.gettempdir()
            raise ValueError(
                f"{where}: the features need {size:,} bytes of disk for a while ({error.strerror}); lower "
                "`frames`"
            ) from None
        return np.memmap(file, np.float32, "r+", shape=shape)
