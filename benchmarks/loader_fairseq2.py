"""fairseq2's C++ data pipeline on our manifests: the same files, batches and crops, as float32.

Every way reads whole recordings through `FileMapper` (mapped files; a member of a tar as PATH:OFFSET:SIZE) and `AudioDecoder`
(libsndfile), in the order of our plan, and prefetches four batches. It has no resampling, mixes no channels down, cannot read a part
of a recording, and takes a wav that was cut short or a NaN as it comes; so a corpus that needs none of these is what it is measured on.

| way | batches |
| --- | --- |
| `recipe` | made first and decoded as lists, `num_parallel_calls=10`, padded by its `Collater`: its wav2vec 2.0 recipe |
| `threads` | the same with as many parallel calls as threads |
| `joined` | the same, concatenated without padding by a Python function |
| `bucket` | recordings decoded one by one, 16 at a time, then put together by `dynamic_bucket` and padded |
| `packed` | the same, then laid end to end by its `pack`, in a buffer as large as a full batch |
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.corpus import SAMPLE_RATE
from pretrain.data.batches import SpeechBatches
from pretrain.data.utterance import Utterance

WAYS = ("recipe", "threads", "joined", "bucket", "packed")
PARALLEL_RECIPE = 10
PARALLEL_UTTERANCES = 16
OPEN_FILES = 100  # as its recipe has it
PREFETCH = 4


def name(utterance: Utterance) -> str:
    """What `FileMapper` takes. A colon within a path it takes for the start of an offset."""
    if utterance.sample_rate != SAMPLE_RATE or utterance.start:
        raise ValueError(
            f"{utterance.path}: fairseq2 neither resamples nor reads a segment; whole recordings at 16 kHz are needed"
        )
    if ":" in utterance.path:
        raise ValueError(
            f"{utterance.path}: fairseq2 takes the colon for the start of an offset; use a folder without one"
        )
    member = utterance.member
    return utterance.path if member is None else f"{utterance.path}:{member.offset}:{member.size}"


class Fairseq2:
    """One of `WAYS`; the pipeline is built within the round, as ours is. `plan` are the batches of `speech` in one epoch."""

    def __init__(self, settings: dict[str, Any], speech: SpeechBatches, plan: list[list[int]], way: str):
        import fairseq2.data.data_pipeline  # noqa: F401  # a missing peer is told before the clock starts

        self.way, self.threads = way, settings["threads"]
        self.limit = int(settings["batch_seconds"] * SAMPLE_RATE)
        self.longest = speech.crop_samples
        rows = list(speech.manifest)
        self.cropped = any(rows[item].length > self.longest for batch in plan for item in batch)
        if way == "packed" and min(self.longest, max(row.length for row in rows)) > self.limit:
            raise ValueError(
                "fairseq2 packs no recording that is longer than a batch; give a longer --batch-seconds"
            )
        self.batches = [
            [
                {
                    "audio": name(rows[item]),
                    "first": crop(speech, item, 0),
                    "last": float(place == len(batch)),
                }
                for place, item in enumerate(batch, 1)
            ]
            for batch in plan
        ]
        self.amount = sum(speech.seconds(np.array(batch)) for batch in plan)
        self.parts: dict[str, float] = {}

    def about(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {"fairseq2": version("fairseq2"), "way": self.way}

    def prepare(self, number: int) -> None: ...

    def run(self) -> None:
        began = time.process_time()
        for _ in self.load():
            pass
        self.parts = {"cpu_seconds": time.process_time() - began}

    def load(self) -> Iterator[Any]:
        """One epoch: {"seqs", "seq_lens", ...} where it pads or packs, a tensor of joined samples otherwise."""
        from fairseq2.data.audio import AudioDecoder
        from fairseq2.data.data_pipeline import Collater, FileMapper, read_sequence

        one_by_one = self.way in ("bucket", "packed")
        parallel = {
            "threads": self.threads,
            "bucket": PARALLEL_UTTERANCES,
            "packed": PARALLEL_UTTERANCES,
        }.get(self.way, PARALLEL_RECIPE)
        each = "" if one_by_one else "[*]."
        pipeline = read_sequence(
            [row for batch in self.batches for row in batch] if one_by_one else self.batches
        )
        pipeline.map(FileMapper(cached_fd_count=OPEN_FILES), selector=f"{each}audio")
        pipeline.map(
            AudioDecoder(dtype=torch.float32), selector=f"{each}audio.data", num_parallel_calls=parallel
        )
        if self.way == "packed":
            pipeline.map(self.waveform)
            pipeline.pack(self.limit, self.limit, truncate=False, drop_remainder=False)
        else:
            if self.way == "bucket":
                pipeline.dynamic_bucket(1.0, lambda row: row["last"])
            pipeline.map(lambda rows: [self.waveform(row) for row in rows])
            pipeline.map(torch.cat if self.way == "joined" else Collater(pad_value=0))
        yield from pipeline.prefetch(PREFETCH).and_return()

    def waveform(self, row: dict[str, Any]) -> Tensor:
        """(samples,), cropped where it must be: only here does Python look at a recording."""
        waveform: Tensor = row["audio"]["data"]["waveform"]
        return waveform[row["first"] : row["first"] + self.longest] if self.cropped else waveform


def crop(speech: SpeechBatches, item: int, epoch: int) -> int:
    """The sample that our crop of an utterance starts at."""
    from pretrain.data.utterance import HOP

    spare = int(speech.manifest.lengths[item]) - speech.crop_samples
    return HOP * int(speech.rng(item, epoch).integers(spare // HOP + 1)) if spare > 0 else 0
