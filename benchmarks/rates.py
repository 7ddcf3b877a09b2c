"""What no other benchmark measures and benchmarks/scale.py computes with: seconds and bytes of an utterance,
an hour, a row group.

Each probe runs at two sizes, every time in a process of its own with one thread, and the slope between the
two is what counts, so that imports and what is done once drop out. Seconds are those of the processor: files
lie in the page cache, and no disk or network shows. Memory is peak resident memory (VmHWM). Medians over
`--rounds`.
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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import write_result
from benchmarks.measure import machine, say
from benchmarks.rate_probes import (
    SAMPLE_RATE,
    SHARD_ROWS,
    SHORT,
    collate_hubert,
    draw_rows,
    draw_sample,
    encode_mfcc,
    finish_labels,
    hash_files,
    index_audio,
    index_rows,
    open_units,
    pack_labels,
    plan_epoch,
    start_hubert,
)

SECONDS = 12.0  # of a recording, about LibriSpeech's mean


# Probes: what runs in the child. Each returns how much was done, or nothing.


# Measuring


def run(probe: Callable[..., None], *arguments: Any) -> tuple[float, float, float]:
    """What `probe` takes in a fresh process: seconds with those of the processes that it starts, seconds of
    its own, peak bytes. The bytes are of a first run, the seconds of a second, when all is imported."""
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
    """Of this process, all its threads, and the processes it has waited for: what else the machine does
    hardly shows."""
    both = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in both)


def slope(
    probe: Callable[..., None], small: tuple[Any, ...], large: tuple[Any, ...], more: float, rounds: int
) -> dict[str, float]:
    """Seconds and bytes that one more costs, `more` being how many the large case has beyond the small
    one."""
    found = [(run(probe, *small), run(probe, *large)) for _ in range(rounds)]
    seconds, own, size = (
        statistics.median((much[which] - few[which]) / more for few, much in found) for which in (0, 1, 2)
    )
    say(
        f"{probe.__name__} {small[1:] if len(small) > 1 else ''}: {seconds:.3g} s ({own:.3g} of its own) and "
        f"{size:.3g} bytes each"
    )
    return {"seconds": seconds, "own_seconds": own, "bytes": size}


def write_rows(folder: Path, count: int) -> dict[str, float]:
    """A manifest of so many rows and their labels; what writing and the file cost per row."""
    from pretrain.data.label_shards import write_shard
    from pretrain.data.labels import commit_labels
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
    """`count` recordings of noise as wav, flac and one tar of flac; the manifest of the flacs, labels with
    runs of speech's length, a codebook of MFCC."""
    import soundfile

    from pretrain.data.label_shards import write_shard
    from pretrain.data.labels import commit_labels
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
            # 33 units a second, as measured on the demo's speech
            lasting = rng.geometric(33 / 50, size=frames)
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
        "command": f"python -m benchmarks.rates --rows {arguments.rows} --files {arguments.files} --rounds "
        f"{arguments.rounds}",
    }
    if arguments.out is not None:
        say(f"written to {write_result(result, arguments.out)}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
