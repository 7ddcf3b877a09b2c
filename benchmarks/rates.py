"""What no other benchmark measures and benchmarks/scale.py computes with: seconds and bytes of an utterance, an hour, a row group.

Each probe runs at two sizes, every time in a process of its own with one thread, and the slope between the two is what counts, so that
imports and what is done once drop out. Seconds are those of the processor: files lie in the page cache, and no disk or network shows.
Memory is peak resident memory (VmHWM). Medians over `--rounds`.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import write_result
from benchmarks.measure import machine, say

SAMPLE_RATE = 16000
SHORT = 1680  # samples of a drawn row, five frames: what a row costs does not depend on its length
SHARD_ROWS = 100_000
SECONDS = 12.0  # of a recording, about LibriSpeech's mean


# Probes: what runs in the child. Each returns how much was done, or nothing.


def _fresh(folder: Path) -> Path:
    return folder / f"out-{time.monotonic_ns()}"


def index_audio(folder: Path, kind: str, verify: str) -> None:
    """The verb `index` with one thread, to a manifest."""
    from pretrain.data.indexing import IndexConfig, index

    index(IndexConfig(source=str(folder / kind), out=str(_fresh(folder)), verify=verify, workers=1))  # type: ignore[arg-type]


def index_rows(folder: Path, count: int) -> None:
    """The verb `index` on a list of so many segments of one recording: its memory, whatever the number of files."""
    from pretrain.data.indexing import IndexConfig, index

    rows = (
        {
            "id": row["id"],
            "speaker": row["speaker"],
            "audio_filepath": "wav/00000.wav",
            "offset": 0,
            "duration": 0.1,
        }
        for row in draw_rows(count)
    )
    source = folder / f"rows-{count}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index(IndexConfig(source=str(source), out=str(_fresh(folder)), verify="header", workers=1))


def plan_epoch(folder: Path) -> None:
    """What a rank holds of the manifest when it trains: split, lengths, and the first epoch's plan."""
    from pretrain.data.batches import BatchConfig, SpeechBatches
    from pretrain.data.manifest import Manifest

    SpeechBatches(Manifest(folder / "manifest").select("train"), BatchConfig(batch_seconds=24.0), 0).plan(0)


def start_hubert(folder: Path) -> None:
    """The same with labels, which are checked against the manifest."""
    from pretrain.data.batches import BatchConfig, SpeechBatches
    from pretrain.data.labels import Labels
    from pretrain.data.manifest import Manifest
    from pretrain.objectives.pretraining import check_label_counts

    batches = SpeechBatches(Manifest(folder / "manifest").select("train"), BatchConfig(batch_seconds=24.0), 0)
    labels = Labels(folder / "labels")
    check_label_counts(batches, labels)
    assert len(batches.plan(0)) and labels.num_classes


def draw_sample(folder: Path) -> None:
    """The plan of `cluster`: which frames to visit."""
    from pretrain.data.manifest import Manifest
    from quantize.subsample import Sample

    Sample(Manifest(folder / "manifest").select("train"), 1000, 0)


def finish_labels(folder: Path) -> None:
    """What the last part of an `encode` does when every shard stands."""
    from pretrain.data.labels import commit_labels
    from pretrain.data.manifest import Manifest

    rows = Manifest(folder / "manifest").select("train")
    num_shards = len(list((folder / "labels").glob("shard_*.npy")))
    commit_labels(
        folder / "labels",
        num_shards,
        {},
        {},
        codebook="drawn",
        num_classes=100,
        expected_ids=rows.column("id"),
        expected_frames=rows.num_frames,
    )


def pack_labels(folder: Path) -> None:
    """The verb `pack`."""
    from units.packing import PackConfig, pack

    out = _fresh(folder)
    pack(PackConfig(manifest=str(folder / "manifest"), labels=str(folder / "labels"), out=str(out)))
    if not (folder / "units").exists():
        os.symlink(out, folder / "units")


def open_units(folder: Path) -> None:
    """What a rank holds of a unit corpus when it trains a language model: the documents, and an epoch's plan."""
    from units.corpus.patterns import Pattern
    from units.corpus.unit_corpus import Sequences, UnitCorpus
    from units.lm.language_model import Pieces

    corpus = UnitCorpus(folder / "units")
    pattern = Pattern("parallel", corpus.vocabulary.sizes)
    pieces = Pieces(Sequences(corpus, corpus.documents("train"), pattern), pattern, 2048, None)
    pieces.batches(np.random.default_rng(0).permutation(len(pieces)), 131072)


def encode_mfcc(folder: Path) -> None:
    """The verb `encode` with a codebook of MFCC, decoding in one thread."""
    from quantize.encoding import EncodeConfig, encode

    encode(
        EncodeConfig(
            manifest=str(folder / "manifest"),
            codebook=str(folder / "codebook"),
            out=str(_fresh(folder)),
            workers=1,
        )
    )


def collate_hubert(folder: Path) -> None:
    """An epoch of HuBERT's micro-batches as a loader thread makes them: decode, crop, mask, labels, pack."""
    from pretrain.config import parse_config
    from pretrain.data.labels import Labels
    from pretrain.data.manifest import Manifest
    from pretrain.objectives.pretraining import HubertTask, PretrainConfig

    keys = {
        "out": "unused",
        "manifest": str(folder / "manifest"),
        "labels": str(folder / "labels"),
        "objective": "hubert",
        "valid_split": "",
        "encoder": {"architecture": "tiny"},
        "training": {"max_steps": 1},
    }
    task = HubertTask(
        parse_config(PretrainConfig, keys, "rates"), Manifest(folder / "manifest"), Labels(folder / "labels")
    )
    for items in task.plan(0):
        task.collate(items, 0)


def hash_files(folder: Path) -> None:
    """SHA-256 as `commit` takes it."""
    from pretrain.store.hashes import sha256_file

    sha256_file(folder / "bytes")


# Measuring


def run(probe: Callable[..., None], *arguments: Any) -> tuple[float, float, float]:
    """What `probe` takes in a fresh process: seconds with those of the processes that it starts, seconds of its own, peak bytes. The bytes
    are of a first run, the seconds of a second, when all is imported."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_timed, probe, arguments).result()


def _timed(probe: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[float, float, float]:
    import torch

    torch.set_num_threads(1)
    probe(*arguments)
    peak = next(
        line.split()[1]
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    own, whole = time.process_time(), _processor_seconds()
    probe(*arguments)
    return _processor_seconds() - whole, time.process_time() - own, 1024.0 * int(peak)


def _processor_seconds() -> float:
    """Of this process, all its threads, and the processes it has waited for: what else the machine does hardly shows."""
    both = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in both)


def slope(
    probe: Callable[..., None], small: tuple[Any, ...], large: tuple[Any, ...], more: float, rounds: int
) -> dict[str, float]:
    """Seconds and bytes that one more costs, `more` being how many the large case has beyond the small one."""
    found = [(run(probe, *small), run(probe, *large)) for _ in range(rounds)]
    seconds, own, size = (
        statistics.median((much[which] - few[which]) / more for few, much in found) for which in (0, 1, 2)
    )
    say(
        f"{probe.__name__} {small[1:] if len(small) > 1 else ''}: {seconds:.3g} s ({own:.3g} of its own) and {size:.3g} bytes each"
    )
    return {"seconds": seconds, "own_seconds": own, "bytes": size}


def draw_rows(count: int) -> Iterator[dict[str, Any]]:
    """Utterances named like those of Libri-Light, ids of 40 bytes, a thousand of a speaker."""
    for number in range(count):
        speaker = f"{number // 1000:06d}"
        name = f"medium/{speaker}/a_book_of_{number // 100:08d}_{number:07d}"
        yield {
            "id": name,
            "path": f"/corpus/{name}.flac",
            "start": 0,
            "num_samples": SHORT,
            "sample_rate": SAMPLE_RATE,
            "split": "train",
            "speaker": speaker,
        }


def write_rows(folder: Path, count: int) -> dict[str, float]:
    """A manifest of so many rows and their labels; what writing and the file cost per row."""
    from pretrain.data.labels import commit_labels, write_shard
    from pretrain.data.manifest import write_manifest

    began = _processor_seconds()
    write_manifest(folder / "manifest", draw_rows(count), {}, {}, root="/corpus")
    seconds = _processor_seconds() - began
    ids, rng = [row["id"] for row in draw_rows(count)], np.random.default_rng(0)
    frames = (SHORT - 400) // 320 + 1
    for shard, first in enumerate(range(0, count, SHARD_ROWS)):
        own = ids[first : first + SHARD_ROWS]
        write_shard(
            folder / "labels", shard, own, list(rng.integers(100, size=(len(own), frames)).astype(np.uint16))
        )
    commit_labels(folder / "labels", -(-count // SHARD_ROWS), {}, {}, codebook="drawn", num_classes=100)
    size = (folder / "manifest/manifest.parquet").stat().st_size
    tables = sum(path.stat().st_size for path in (folder / "labels").glob("*.parquet"))
    return {"seconds": seconds / count, "bytes": size / count, "label_table_bytes": tables / count}


def write_audio(folder: Path, count: int, seconds: float) -> None:
    """`count` recordings of noise as wav, flac and one tar of flac; the manifest of the flacs, labels with runs of speech's length, a codebook of MFCC."""
    import soundfile

    from pretrain.data.labels import commit_labels, write_shard
    from pretrain.data.manifest import write_manifest
    from quantize.codebook import write_codebook

    rng, ids, rows, labels = np.random.default_rng(0), [f"{number:05d}" for number in range(count)], [], []
    length = round(seconds * SAMPLE_RATE)
    for kind in ("wav", "flac", "tar"):
        (folder / kind).mkdir(parents=True)
    with tarfile.open(folder / "tar/0.tar", "w") as tar:
        for name in ids:
            level = np.repeat(10 ** rng.uniform(-2.5, -1, length // 1600 + 1), 1600)[:length]
            wave = np.round(np.clip(rng.standard_normal(length) * level, -1, 1) * 32767).astype(np.int16)
            for kind in ("wav", "flac"):
                soundfile.write(folder / kind / f"{name}.{kind}", wave, SAMPLE_RATE, subtype="PCM_16")
            tar.add(folder / f"flac/{name}.flac", f"{name}.flac")
            rows.append(
                {
                    "id": name,
                    "path": str(folder / f"flac/{name}.flac"),
                    "start": 0,
                    "num_samples": length,
                    "sample_rate": SAMPLE_RATE,
                    "split": "train",
                }
            )
            frames = (length - 400) // 320 + 1
            lasting = rng.geometric(
                33 / 50, size=frames
            )  # 33 units a second, as measured on the demo's speech
            labels.append(np.repeat(rng.integers(100, size=frames), lasting)[:frames].astype(np.uint16))
    write_manifest(folder / "manifest", rows, {}, {})
    write_shard(folder / "labels", 0, ids, labels)
    commit_labels(folder / "labels", 1, {}, {}, codebook="drawn", num_classes=100)
    centroids = rng.standard_normal((1, 100, 39)).astype(np.float32)
    write_codebook(
        folder / "codebook", centroids, np.zeros(39, np.float32), {"kind": "mfcc", "cmvn": False}, {}, {}, {}
    )
    (folder / "bytes").write_bytes(bytes(1 << 20) * 16 * round(seconds))


def measure(rows: int, files: int, rounds: int) -> dict[str, Any]:
    """Every rate, in seconds and bytes; see `benchmarks.scale.Rates` for what they mean."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rates_") as temporary:
        folder = Path(temporary)
        few, many = folder / "few", folder / "many"
        write_rows(few, rows // 5)
        found["manifest_row"] = write_rows(many, rows)
        more = rows - rows // 5
        for probe in (plan_epoch, start_hubert, draw_sample, finish_labels):
            found[probe.__name__] = slope(probe, (few,), (many,), more, rounds)
        fewest = folder / "fewest"
        write_rows(fewest, rows // 20)
        more = rows // 5 - rows // 20
        found["pack_document"] = slope(pack_labels, (fewest,), (few,), more, 1)
        found["open_units"] = slope(open_units, (fewest,), (few,), more, rounds)
        say("writing recordings")
        short, long, some, others = (folder / name for name in ("short", "long", "some", "others"))
        for place, number, seconds in (
            (short, files, 1.0),
            (long, files, SECONDS),
            (some, files, 0.1),
            (others, 9 * files, 0.1),
        ):
            write_audio(place, number, seconds)
        longer = files * (SECONDS - 1)
        for kind in ("wav", "flac"):
            found[f"index_decode_second_{kind}"] = slope(
                index_audio, (short, kind, "decode"), (long, kind, "decode"), longer, rounds
            )
        for kind in ("wav", "flac", "tar"):
            found[f"index_header_file_{kind}"] = slope(
                index_audio, (some, kind, "header"), (others, kind, "header"), 8 * files, rounds
            )
        segments = 20 * files
        found["index_row"] = slope(index_rows, (short, segments), (short, 5 * segments), 4 * segments, 1)
        for probe in (encode_mfcc, collate_hubert, pack_labels):
            found[f"{probe.__name__}_second"] = slope(probe, (short,), (long,), longer, rounds)
        gigabytes = ((long / "bytes").stat().st_size - (short / "bytes").stat().st_size) / 1e9
        found["sha256_gigabyte"] = slope(hash_files, (short,), (long,), gigabytes, rounds)
    return found


def main(given: list[str] | None = None) -> int:
    """Measure; print the JSON object, and keep it with `--out`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=400_000, help="of the larger drawn manifest")
    parser.add_argument("--files", type=int, default=300, help="recordings of each length")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write the JSON object there too, as DATE-rates.json"
    )
    arguments = parser.parse_args(given)
    load = os.getloadavg()[0]
    rates = measure(arguments.rows, arguments.files, arguments.rounds)
    settings = {name: getattr(arguments, name) for name in ("rows", "files", "rounds")}
    result = {
        "name": "rates",
        "peer_name": None,
        "unit": "seconds and bytes of one more",
        "rates": rates,
        "settings": settings,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "machine": machine(),
        "date": date.today().isoformat(),
        "command": f"python -m benchmarks.rates --rows {arguments.rows} --files {arguments.files} --rounds {arguments.rounds}",
    }
    if arguments.out is not None:
        say(f"written to {write_result(result, arguments.out)}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
