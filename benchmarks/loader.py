"""The loader alone, without a step: seconds of 16 kHz audio delivered per second, from flac, wav and tar
shards.

Ours is the engine's own loader: plan, micro-batches, decoding in threads, packing, a few batches ahead. The
peer is what the field's recipes do: torch's DataLoader with as many worker processes, soundfile, and zero
padding, on the same batches. A round is an epoch, the same one each time, from the first utterance to the
last; nothing is loaded before the clock starts. The limit is soundfile alone, decoding the same files in as
many threads and keeping nothing. `needed` is what the fastest training step on this machine consumes, when it
is given: the loader should deliver at least twenty times that.
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor, nn

from benchmarks import corpus
from benchmarks.command import argument_parser, run_main
from benchmarks.measure import KEPT, Contender, Measurement, load_before, machine, sides, take_turns
from pretrain.data.batches import BatchConfig, SpeechBatches
from pretrain.data.indexing import IndexConfig, index
from pretrain.data.manifest import Manifest
from pretrain.data.packing import Layout, pack
from pretrain.data.utterance import HOP, SAMPLE_RATE, Utterance
from pretrain.training.loading import load_ahead
from pretrain.training.memory import keep_freed_memory
from pretrain.training.parallel import World
from pretrain.training.speech_task import SpeechTask
from pretrain.training.task import TrainingConfig

FORMATS = ("flac", "wav", "tar")
MODULE = "benchmarks.loader"


class Packed(NamedTuple):
    """What the simplest task would train on."""

    waveforms: Tensor
    layout: Layout


class LoadTask(SpeechTask):
    """A task that loads one epoch and does nothing. Of the next one, which the engine's loader looks into,
    nothing is read."""

    model = nn.Identity()
    valid_set = None

    def __init__(self, manifest: Manifest, settings: dict[str, Any]):
        config = BatchConfig(**{key: settings[key] for key in ("batch_seconds", "crop_seconds")})
        self.train_set = SpeechBatches(manifest, config, settings["seed"])

    def collate(self, items: np.ndarray, epoch: int) -> Packed:
        items = items[: len(items) if epoch == 0 else 0]
        return Packed(
            *pack([self.train_set.load(item, self.train_set.rng(item, epoch))[0] for item in items.tolist()])
        )


class Ours:
    """The engine's loader, begun and ended within the round. As in training, the C library keeps what is
    freed."""

    amount = 0.0

    def __init__(self, settings: dict[str, Any], folder: Path):
        keep_freed_memory()
        self.task = LoadTask(Manifest(folder / "manifest"), settings)
        self.training = TrainingConfig(max_steps=1, loader_threads=settings["threads"])
        self.steps = len(self.task.plan(0))
        self.parts: dict[str, float] = {}

    def about(self) -> dict[str, Any]:
        return {"libsndfile": library_version()}

    def prepare(self, number: int) -> None: ...

    def run(self) -> None:
        began = time.process_time()
        batches = load_ahead(self.task, (0, 0), self.training, World(0, 1, torch.device("cpu")))
        self.amount = 0.0
        for _, _, micro_batches, amount in islice(batches, self.steps):
            list(micro_batches)
            self.amount += amount
        batches.close()
        self.parts = {"cpu_seconds": time.process_time() - began}


def library_version() -> str:
    """Of libsndfile, as soundfile calls it now."""
    version: str = soundfile._ffi.string(soundfile._snd.sf_version_string()).decode()
    return version


def read_audio(utterance: Utterance, first: int = 0, count: int = -1) -> np.ndarray:
    """By soundfile alone; a member of a tar from memory."""
    source: str | io.BytesIO = utterance.path
    if utterance.member is not None:
        with open(utterance.path, "rb") as file:
            file.seek(utterance.member.offset)
            source = io.BytesIO(file.read(utterance.member.size))
    wave: np.ndarray = soundfile.read(source, count, first, dtype="float32")[0]
    return wave


class Peer:
    """DataLoader: a data set of waveforms, our batches as its batch sampler, padding as its collate
    function."""

    def __init__(self, settings: dict[str, Any], folder: Path):
        manifest = Manifest(folder / "manifest")
        utterances, speech = list(manifest), LoadTask(manifest, settings).train_set
        self.amount = float(speech.lengths.sum()) / SAMPLE_RATE

        class Waveforms(torch.utils.data.Dataset[Tensor]):
            def __len__(self) -> int:
                return len(utterances)

            def __getitem__(self, item: int) -> Tensor:
                return torch.from_numpy(
                    read_audio(utterances[item], crop(speech, item, 0), speech.crop_samples)
                )

        def collate(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
            lengths = torch.tensor([len(waveform) for waveform in waveforms])
            return nn.utils.rnn.pad_sequence(waveforms, batch_first=True), lengths

        plan = [items.tolist() for items in speech.plan(0)]
        self.loader = torch.utils.data.DataLoader(
            Waveforms(),
            batch_sampler=plan,
            collate_fn=collate,
            num_workers=settings["threads"],
            persistent_workers=True,
        )

    def about(self) -> dict[str, Any]:
        return {"memory": "of the main process alone, without its workers"}

    def prepare(self, number: int) -> None: ...

    def run(self) -> None:
        for _ in self.loader:
            pass


class Decoding:
    """The limit: every file decoded once, in threads, in the order of the manifest, from its crop's start."""

    def __init__(self, settings: dict[str, Any], folder: Path):
        manifest = Manifest(folder / "manifest")
        speech = LoadTask(manifest, settings).train_set
        self.utterances = [
            (utterance, crop(speech, item, 0), speech.crop_samples) for item, utterance in enumerate(manifest)
        ]
        self.amount = float(speech.lengths.sum()) / SAMPLE_RATE
        self.pool = ThreadPoolExecutor(settings["threads"])

    def about(self) -> dict[str, Any]:
        return {}

    def prepare(self, number: int) -> None: ...

    def run(self) -> None:
        # In pieces of a few utterances, so that handing out the work costs next to nothing.
        list(
            self.pool.map(
                lambda first: [len(read_audio(*u)) for u in self.utterances[first : first + 8]],
                range(0, len(self.utterances), 8),
            )
        )


def crop(speech: SpeechBatches, item: int, epoch: int) -> int:
    """The sample that our crop of an utterance starts at."""
    spare = int(speech.manifest.lengths[item]) - speech.crop_samples
    return HOP * int(speech.rng(item, epoch).integers(spare // HOP + 1)) if spare > 0 else 0


def build(name: str, settings: dict[str, Any], folder: Path) -> Contender:
    """Names are contenders with the format behind a hyphen."""
    kind, _, suffix = name.rpartition("-")
    contenders: dict[str, Callable[[dict[str, Any], Path], Contender]] = {
        "ours": Ours,
        "dataloader": Peer,
        "decoding": Decoding,
    }
    return contenders[kind](settings, folder / suffix)


def write_formats(folder: Path, lengths: np.ndarray, seed: int) -> None:
    """The same utterances as wav, flac and shards of flac, each indexed into a manifest of its own."""
    (folder / "drawn").mkdir()
    corpus.write_corpus(folder / "drawn", lengths, 2, seed)
    waves = sorted((folder / "drawn").glob("*.wav"))
    for suffix in FORMATS:
        (folder / suffix / "audio").mkdir(parents=True)
    for path in waves:
        wave, rate = soundfile.read(path, dtype="int16")
        soundfile.write(folder / "wav/audio" / path.name, wave, rate)
        soundfile.write(folder / "flac/audio" / f"{path.stem}.flac", wave, rate)
    for number in range(2):
        with tarfile.open(folder / f"tar/audio/{number}.tar", "w") as tar:
            for path in waves[number::2]:
                tar.add(folder / "flac/audio" / f"{path.stem}.flac", f"{path.stem}.flac")
    for suffix in FORMATS:
        out = str(folder / suffix / "manifest")
        index(
            IndexConfig(
                source=str(folder / suffix / "audio"), out=out, verify="header", dev_share=0.0, test_share=0.0
            )
        )


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each format's contenders in turn, all of a peer's ways among them; the figures of the first format
    stand for the whole."""
    load = load_before()
    given = "threads rounds warmup seed needed total_seconds lengths batch_seconds crop_seconds".split()
    settings = {"device": "cpu", **{name: getattr(arguments, name) for name in given}}
    if min(arguments.batch_seconds, arguments.total_seconds) <= 0 or arguments.crop_seconds < 0.025:
        raise ValueError(
            "--batch-seconds, --total-seconds: more than 0 s is needed, and --crop-seconds of at least 0.025"
        )
    lengths = corpus.draw_lengths(arguments.lengths, 10.0, arguments.total_seconds, arguments.seed)
    ways = [] if arguments.peer == "none" else [arguments.peer]
    names = ["ours", "decoding", *ways]
    formats = {}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as temporary:
        folder = Path(temporary)
        write_formats(folder, lengths, arguments.seed)
        (folder / "settings.json").write_text(json.dumps(settings))
        turns = {key: settings[key] for key in ("rounds", "warmup", "threads")}
        for suffix in FORMATS if arguments.format == "all" else (arguments.format,):
            asked = {
                f"{name}-{suffix}{kept}": name + kept
                for name in names
                for kept in ("", *([KEPT] if name in ways else []))
            }
            measured = take_turns(MODULE, dict.fromkeys(asked, sys.executable), folder, **turns)
            formats[suffix] = figures({short: measured[name] for name, short in asked.items()})
    first = next(iter(formats.values()))
    return {
        "name": " ".join(
            ["loader", *([f"crop {arguments.crop_seconds:g}"] if arguments.crop_seconds < 20 else [])]
        ),
        "unit": "audio seconds per second",
        **first,
        "formats": formats,
        "times_needed": arguments.needed and first["ours"] / arguments.needed,
        "peer_name": None if arguments.peer == "none" else arguments.peer,
        "settings": settings,
        "load_before": load,
        "corpus": corpus.describe(lengths),
        "machine": {**machine(), "torch": torch.__version__},
        "date": date.today().isoformat(),
    }


def figures(measured: dict[str, Measurement]) -> dict[str, Any]:
    """DESIGN.md's keys for one format: ours against the faster of the peer's ways, and against its way with
    the C library's defaults."""
    ours, limit = measured["ours"], measured["decoding"]
    ways = {name: found for name, found in measured.items() if name not in ("ours", "decoding")}
    by_rate = sorted(ways, key=lambda name: -ways[name].rate)
    best = next(iter(by_rate), None)
    default = next((name for name in by_rate if not name.endswith(KEPT)), None)
    return {
        **sides(ours, ways[best] if best else None),
        "peer_way": best,
        "peer_way_default": default,
        "ratio_default": default and ours.rate / ways[default].rate,
        "peer_variants": {name: ways[name].rate for name in by_rate},
        "libsndfile": {"ours": ours.hello["about"]["libsndfile"]},
        "cpu_seconds": {name: found.parts["cpu_seconds"] for name, found in measured.items() if found.parts},
        "limit": limit.rate,
        "share_of_limit": ours.rate / limit.rate,
    }


def show(result: dict[str, Any]) -> str:
    """A line for each format."""
    peer_name, unit = result["peer_name"] or "(no peer)", result["unit"]
    lines = [f"{'':5}{'ours':>10}{peer_name:>12}{'soundfile alone':>17}   {unit}"]
    for suffix, found in result["formats"].items():
        peer = f"{found['peer']:.0f}" if found["peer"] else "-"
        way = f"; {found['peer_way']}" if len(found["peer_variants"]) > 1 else ""
        rates = f"{found['ours']:10.0f}{peer:>12}{found['limit']:17.0f}"
        lines.append(f"{suffix:5}{rates}   peak memory {found['ours_peak_gb']:.2f} GB{way}")
    if result["times_needed"]:
        lines.append(f"{result['times_needed']:.0f} times what the training step consumes")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argument_parser(__doc__, ["dataloader"])
    parser.add_argument("--format", choices=["all", *FORMATS], default="all")
    parser.add_argument(
        "--lengths", choices=["equal", "mixed"], default="equal", help="equal: 10 s; mixed: 1 to 20 s"
    )
    parser.add_argument("--batch-seconds", type=float, default=87.5)
    parser.add_argument(
        "--crop-seconds", type=float, default=30.0, help="longer utterances are cropped at random"
    )
    parser.add_argument("--total-seconds", type=float, default=1800.0, help="audio in a round")
    parser.add_argument(
        "--needed",
        type=float,
        metavar="RATE",
        help="audio seconds per second that the training step consumes",
    )
    return run_main(MODULE, parser, given, build, compare, show)


if __name__ == "__main__":
    sys.exit(main())
