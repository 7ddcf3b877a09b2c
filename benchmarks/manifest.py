"""Opening a large manifest: rows per second from nothing to a planned epoch and its first batches' rows, and
the memory it takes.

The manifest is drawn, written by the product's own writer before the clock starts, and lies in the page cache
when it is opened. A round opens it anew, plans an epoch of batches and looks up `--read` rows in the plan's
order. Ours reads lengths whole and rows by row group; the peer does what is common,
`pyarrow.parquet.read_table` of the whole file, with the same plan and the same rows after that. The limit is
pyarrow reading the two columns that a plan needs, and nothing else.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.command import argument_parser, run_main
from benchmarks.corpus import SAMPLE_RATE, draw_lengths
from benchmarks.measure import Contender, machine, say, sides, take_turns
from pretrain.data.batches import BatchConfig, SpeechBatches
from pretrain.data.manifest import Manifest, write_manifest

MODULE = "benchmarks.manifest"


class Whole:
    """The whole table in memory."""

    def __init__(self, folder: Path):
        self.table = pq.read_table(folder / "manifest.parquet")
        self.lengths = (
            self.table["num_samples"].to_numpy() * SAMPLE_RATE // self.table["sample_rate"].to_numpy()
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.table.slice(index, 1).to_pylist()[0]
        return row


class Reader:
    """Open, plan, read rows; each part's seconds are told."""

    def __init__(self, name: str, settings: dict[str, Any], folder: Path):
        self.name, self.settings, self.folder = name, settings, folder / "manifest"
        self.amount, self.parts = float(settings["rows"]), dict[str, float]()

    def about(self) -> dict[str, Any]:
        return {"bytes": (self.folder / "manifest.parquet").stat().st_size}

    def prepare(self, number: int) -> None: ...

    def run(self) -> None:
        times = [time.perf_counter()]
        manifest: Any = Manifest(self.folder) if self.name == "ours" else Whole(self.folder)
        assert self.amount == len(manifest) == len(manifest.lengths)
        times.append(time.perf_counter())
        batches = SpeechBatches(manifest, BatchConfig(), self.settings["seed"]).plan(0)
        times.append(time.perf_counter())
        for row in np.concatenate(batches)[: self.settings["read"]].tolist():
            manifest[row]
        times.append(time.perf_counter())
        self.parts = dict(
            zip(("open_seconds", "plan_seconds", "read_seconds"), np.diff(times).tolist(), strict=True)
        )


class Columns:
    """The limit: two columns, read a batch at a time and forgotten."""

    def __init__(self, settings: dict[str, Any], folder: Path):
        self.amount, self.path = float(settings["rows"]), folder / "manifest/manifest.parquet"

    def about(self) -> dict[str, Any]:
        return {}

    def prepare(self, number: int) -> None: ...

    def run(self) -> None:
        for _ in pq.ParquetFile(self.path, pre_buffer=False).iter_batches(
            columns=["num_samples", "sample_rate"], use_threads=False
        ):
            pass


def build(name: str, settings: dict[str, Any], folder: Path) -> Contender:
    """The contender of a name."""
    return Columns(settings, folder) if name == "columns" else Reader(name, settings, folder)


def draw_rows(rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Utterances of 1 to 20 s, named like those of a large corpus: a thousand of a speaker, a hundred of a
    file."""
    lengths = draw_lengths("mixed", 10.0, 10000.0, seed).tolist()
    for number in range(rows):
        speaker, file = f"speaker{number // 1000:06d}", f"{number // 100:08d}"
        yield {
            "id": f"{speaker}-{file}-{number:09d}",
            "path": f"/corpus/{speaker}/{file}.flac",
            "start": number % 100 * 320000,
            "num_samples": lengths[number % len(lengths)],
            "sample_rate": SAMPLE_RATE,
            "split": "train",
            "speaker": speaker,
        }


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the manifest, let the contenders take turns, and say what was measured."""
    if min(arguments.rows, arguments.read) < 1:
        raise ValueError(f"--rows {arguments.rows} --read {arguments.read}: at least 1 is needed")
    load = os.getloadavg()[0]
    given = "rows read threads rounds warmup seed".split()
    settings = {"device": "cpu", **{name: getattr(arguments, name) for name in given}}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as temporary:
        folder = Path(temporary)
        (folder / "settings.json").write_text(json.dumps(settings))
        began = time.perf_counter()
        write_manifest(folder / "manifest", draw_rows(arguments.rows, arguments.seed), {}, {}, root="/corpus")
        write_seconds = time.perf_counter() - began
        say(f"{arguments.rows:,} rows written in {write_seconds:.1f} s")
        names = ["ours", *([] if arguments.peer == "none" else [arguments.peer]), "columns"]
        turns = {key: settings[key] for key in ("rounds", "warmup", "threads")}
        measured = take_turns(MODULE, dict.fromkeys(names, sys.executable), folder, **turns)
    ours, peer, limit = measured["ours"], measured.get(arguments.peer), measured["columns"]
    return {
        "name": f"manifest {arguments.rows} rows",
        "unit": "rows per second",
        **sides(ours, peer),
        "limit": limit.rate,
        "share_of_limit": ours.rate / limit.rate,
        "write_seconds": write_seconds,
        "ours_parts": ours.parts,
        "peer_parts": peer.parts if peer else {},
        "start_gb": ours.hello["start_gb"],
        "file_gb": ours.hello["about"]["bytes"] / 1e9,
        "peer_name": None if arguments.peer == "none" else arguments.peer,
        "settings": settings,
        "load_before": load,
        "machine": {**machine(), "torch": torch.__version__},
        "date": date.today().isoformat(),
    }


def show(result: dict[str, Any]) -> str:
    """Seconds of each part, and peak memory."""
    sizes, lines = result["settings"], []
    lines.append(
        f"{sizes['rows']:,} rows, {result['file_gb']:.2f} GB, written in {result['write_seconds']:.0f} s"
    )
    lines.append(f"{'':12}{'open':>10}{'plan':>10}{'read ' + str(sizes['read']):>14}{'peak memory':>16}")
    for name, parts, peak in (
        ("ours", result["ours_parts"], result["ours_peak_gb"]),
        (result["peer_name"], result["peer_parts"], result["peer_peak_gb"]),
    ):
        if parts:
            opened, planned, read = (f"{seconds:.2f} s" for seconds in parts.values())
            lines.append(f"{name:12}{opened:>10}{planned:>10}{read:>14}{peak:>13.2f} GB")
    lines.append(f"before a manifest is opened, imports take {result['start_gb']:.2f} GB")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argument_parser(__doc__, ["read_table"])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--read", type=int, default=1000, help="rows looked up in the plan's order")
    return run_main(MODULE, parser, given, build, compare, show)


if __name__ == "__main__":
    sys.exit(main())
