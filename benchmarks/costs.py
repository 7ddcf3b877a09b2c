"""What each stage of the pipeline costs on a corpus of so many hours: the model behind `python -m benchmarks.scale` and docs/scale.md.

What a step of ours costs a processor was measured here on two cores (benchmarks/results/, named below), seconds of the processor and bytes
of memory; operations are counted from the sizes and the recipes. Nothing of ours has run on a GPU: GPU hours are operations over an
assumed rate, the data sheet's peak times `MFU`. How widely to trust that is told by `PUBLISHED`, runs of others counted the same way.
"""

import functools
import json
import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.flops import forward_flops

ROOT = Path(__file__).parents[1]
RESULTS, RECIPES = ROOT / "benchmarks/results", ROOT / "recipes"
TRAIN_CPU = "2026-11-21-pretrain-hubert-base-equal-float32-cpu-torchaudio.json"
ENCODE_CPU = "2026-11-21-encode-base-layer-6-mixed-float32-cpu-transformers-cut-kept.json"
CLUSTER_CPU = "2026-11-21-cluster-200000-x-768-k-500-drawn-sklearn-hubert.json"
LM_CPU = "2026-11-21-lm-train-float32-cpu-transformers-sdpa-kept.json"
MANIFEST = "2026-11-21-manifest-10000000-rows-read-table.json"
LOADER = "2026-11-21-loader-dataloader.json"
RATES = "2026-11-21-rates.json"

# Stated, not measured by us.
UTTERANCE_SECONDS = 12.0  # LibriSpeech: 281,241 utterances in 961 hours, 12.3 s
FLAC_BYTES = (
    61.7e6 / 3600
)  # a second: LibriSpeech's three training sets are 59.3 GB (openslr.org/12) for 961 hours
WAV_BYTES = 2 * 16000  # 16 bit, 16 kHz
UNITS_PER_SECOND = 33.0  # after deduplication: README, measured on the demo's speech, K = 100
ID_BYTES = 40.0  # of an utterance's name, as Libri-Light's
HEADER_BYTES = (
    16384  # that checking a header in a tar reads: pretrain/data/audio.py asks for so many, once for flac
)
VISITED = 4  # quantize/sampling.py decodes four times the audio it draws frames from
ITERATIONS = 100  # of k-means, at most: max_iterations of the recipes
MFU = 0.2  # share of a GPU's peak that a model's own operations reach
LARGE_FROM = 10_000  # hours from which HuBERT LARGE is trained on labels of a finished BASE, instead of two iterations of BASE


class Gpu(NamedTuple):
    """A data sheet: dense bfloat16."""

    name: str
    peak_flops: float


H100, A100 = Gpu("H100", 989e12), Gpu("A100", 312e12)


class Site(NamedTuple):
    """A place to work. Cores, memory and network are assumptions: those of a usual machine of the kind."""

    name: str
    gpu: Gpu | None
    num_gpus: int
    nodes: int
    cores: int  # of a node
    memory: float  # bytes of a node
    network: float  # bytes a second from the file system, all nodes together
    opens: float = 2000.0  # files a second that the file system's metadata server opens for us


SITES = [
    Site("one node of 8 H100", H100, 8, 1, 96, 2e12, 2.5e9),
    Site("4 nodes of 8 A100", A100, 32, 4, 64, 512e9, 10e9),
    Site("CPU only: 4 nodes of 64 cores", None, 0, 4, 64, 256e9, 5e9),
]


class Published(NamedTuple):
    """Somebody's pretraining run: what it computed, in audio seconds (steps x batch), and the GPU hours it took."""

    what: str
    source: str
    architecture: str
    audio_seconds: float
    gpu_hours: float
    peak_flops: float = 125e12  # V100, float16


PUBLISHED = [
    Published(
        "wav2vec 2.0 BASE, 64 V100, 1.6 days", "arXiv 2006.11477, 4.2", "base", 400e3 * 5600, 64 * 1.6 * 24
    ),
    Published(
        "wav2vec 2.0 LARGE on 960 h, 128 V100, 2.3 days",
        "arXiv 2006.11477, 4.2",
        "large",
        250e3 * 2.7 * 3600,
        128 * 2.3 * 24,
    ),
    Published(
        "HuBERT BASE, 100,000 steps, 32 GPUs of no given kind, 9.5 hours",
        "arXiv 2106.07447, IV-C",
        "base",
        100e3 * 2800,
        32 * 9.5,
    ),
]


def read_result(name: str) -> dict[str, Any]:
    """A measured result. ValueError where it is gone: name its successor above."""
    path = RESULTS / name
    if not path.is_file():
        raise ValueError(
            f"{path}: no such result; name the newer one in benchmarks/costs.py, or make it again"
        )
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe as it stands."""
    return tomllib.loads((RECIPES / f"{name}.toml").read_text())


class Cost(NamedTuple):
    """Of one more: seconds of one core in all processes together and in the first alone, and bytes of memory."""

    seconds: float
    own_seconds: float
    bytes: float


class Rates:
    """Measured costs by probe (benchmarks/rates.py), of one more row, file, second of audio, document or 10^9 bytes."""

    def __init__(self) -> None:
        self._found = read_result(RATES)["rates"]

    def __getitem__(self, probe: str) -> Cost:
        found = self._found[probe]
        return Cost(*(max(0.0, found[key]) for key in Cost._fields))

    @property
    def row(self) -> dict[str, float]:
        """Of a row as it is written: `seconds`, `bytes` of the manifest, and `label_table_bytes`, those of its entry beside its labels."""
        found: dict[str, float] = self._found["manifest_row"]
        return found


def loading_seconds() -> float:
    """Of one core for a second of audio in training: flac to a batch with masks and labels, and the look-up of the utterance's row."""
    manifest = read_result(MANIFEST)
    row = manifest["ours_parts"]["read_seconds"] / manifest["settings"]["read"]
    return Rates()["collate_hubert_second"].seconds + float(row) / UTTERANCE_SECONDS


def encoder_sizes(architecture: str) -> dict[str, Any]:
    """The keys of EncoderConfig."""
    from pretrain.model.encoder import EncoderConfig

    return EncoderConfig.model_validate({"architecture": architecture}).resolved()


@functools.cache
def audio_flops(
    architecture: str, num_layers: int | None = None, seconds: float = UTTERANCE_SECONDS
) -> float:
    """Operations of a forward pass per second of audio, to layer `num_layers` (None: all)."""
    sizes = encoder_sizes(architecture)
    layers = sizes["num_layers"] if num_layers is None else num_layers
    return forward_flops(sizes, np.array([round(16000 * seconds)]), layers) / seconds


@functools.cache
def num_parameters(architecture: str) -> int:
    """Of a HuBERT of 500 classes, counted on a model without memory."""
    import torch

    from pretrain.model.encoder import EncoderConfig
    from pretrain.objectives.hubert import Hubert, HubertConfig
    from pretrain.objectives.pretraining import num_parameters as count

    with torch.device("meta"):
        return count(
            Hubert(EncoderConfig.model_validate({"architecture": architecture}), HubertConfig(), 500)
        )


@functools.cache
def lm_sizes() -> tuple[int, float, float]:
    """Of recipes/unit_lm.toml: parameters, operations of training on a token, tokens of the whole run."""
    from benchmarks.lm import flops_per_token, matrix_weights

    lm = read_recipe("unit_lm")["lm"]
    settings = {"sizes": lm["model"], "classes": 500, "job": "train", "tokens": lm["model"]["context"]}
    return (
        round(matrix_weights(settings)),
        flops_per_token(settings),
        float(lm["training"]["max_steps"] * lm["batch_tokens"]),
    )


@dataclass(frozen=True)
class Stage:
    """What a stage costs in all: bytes, files opened where each utterance is a file of its own, bytes of scratch beside the artefact,
    operations that a GPU or else CPU cores do (`cpu_flops`: how many a second of one core), seconds of cores beside that, which can be
    spread, and seconds that cannot. `memory` is what one process holds, for the manifest's rows; every GPU has one if `trains`.
    What does not `spread` runs on one node, and on one of its GPUs."""

    name: str
    reads: float = 0.0
    writes: float = 0.0
    opens: float = 0.0
    scratch: float = 0.0
    memory: float = 0.0
    flops: float = 0.0
    cpu_flops: float = 1.0
    core_seconds: float = 0.0
    serial_seconds: float = 0.0
    trains: bool = False
    spread: bool = True

    def gpu_hours(self, gpu: Gpu, mfu: float) -> float:
        return self.flops / (gpu.peak_flops * mfu) / 3600

    def core_hours(self, with_gpu: bool) -> float:
        """Of a processor, where a GPU does the operations or where it does them itself."""
        return (
            self.core_seconds + self.serial_seconds + (0.0 if with_gpu else self.flops / self.cpu_flops)
        ) / 3600

    def node_memory(self, site: Site) -> float:
        return self.memory * (max(1, site.num_gpus // site.nodes) if self.trains else 1)

    def wall_hours(self, site: Site, mfu: float, files: bool = False) -> dict[str, float]:
        """The hours that each resource of a site alone would take; the longest is the bottleneck. `files`: every utterance is a file."""
        cores = site.cores * (site.nodes if self.spread else 1)
        alone = {
            "cores": (self.core_seconds + (0.0 if site.gpu else self.flops / self.cpu_flops)) / cores / 3600,
            "one thread": self.serial_seconds / 3600,
            "network": (self.reads + self.writes) / site.network / 3600,
        }
        if site.gpu:
            alone["GPU"] = self.gpu_hours(site.gpu, mfu) / (site.num_gpus if self.spread else 1)
        if files:
            alone["opening files"] = self.opens / site.opens / 3600
        return alone


def stages(hours: float) -> list[Stage]:
    """The pipeline on `hours` of audio as our recipes have it, audio as flac."""
    rates, seconds, rows = Rates(), 3600 * hours, 3600 * hours / UTTERANCE_SECONDS
    large = hours >= LARGE_FROM
    train = read_result(TRAIN_CPU)
    cpu = {
        "train": train["ours"]
        * train["model_gflops_per_second_of_audio"]
        * 1e9
        / train["settings"]["threads"],
        "encode": (encode := read_result(ENCODE_CPU))["ours"]
        * encode["model_gflops_per_second_of_audio"]
        * 1e9
        / 2,
        "lm": (lm_run := read_result(LM_CPU))["ours"] * lm_run["model_gflops_per_token"] * 1e9 / 2,
    }
    flac, decoding = seconds * FLAC_BYTES, loading_seconds()
    labels = Stage(
        "",
        reads=flac,
        opens=rows,
        memory=rows * rates["finish_labels"].bytes,
        writes=100 * seconds + rows * rates.row["label_table_bytes"],
        core_seconds=seconds * decoding,
    )

    def cluster(name: str, sampled: float, dim: int, classes: int, flops: float = 0.0) -> Stage:
        fit = read_result(CLUSTER_CPU)
        points, width, found = (float(n) for n in re.findall(r"\d+", fit["name"])[:3])
        one = (
            fit["ours"] * fit["settings"]["threads"] / (points * width * found * fit["iterations"])
        )  # core-seconds
        sampled = min(sampled, hours)
        frames, heard = 180_000 * sampled, 3600 * min(VISITED * sampled, hours)
        return Stage(
            name,
            spread=False,
            reads=heard * FLAC_BYTES,
            opens=heard / UTTERANCE_SECONDS,
            memory=rows * rates["draw_sample"].bytes,
            scratch=4 * dim * frames,
            flops=heard * flops,
            cpu_flops=cpu["encode"],
            core_seconds=heard * rates["encode_mfcc_second"].seconds
            + one * frames * dim * classes * ITERATIONS,
        )

    def encoded(name: str, architecture: str, layer: int) -> Stage:
        return replace(
            labels, name=name, flops=seconds * audio_flops(architecture, layer), cpu_flops=cpu["encode"]
        )

    def pretrained(name: str, recipe: dict[str, Any], architecture: str) -> Stage:
        steps, batch = recipe["training"]["max_steps"], recipe["batches"]["batch_seconds"]
        heard = max(steps * batch, seconds)  # at least one pass
        saved = heard / batch / recipe["training"]["checkpoint_every"] * 12 * num_parameters(architecture)
        return Stage(
            name,
            reads=heard * FLAC_BYTES,
            writes=saved,
            opens=heard / UTTERANCE_SECONDS,
            memory=rows * rates["start_hubert"].bytes,
            trains=True,
            flops=3 * heard * audio_flops(architecture, seconds=15.6),
            cpu_flops=cpu["train"],
            core_seconds=heard * decoding,
        )

    base = read_recipe("hubert_base_ls960")
    member = rates["index_header_file_tar"]
    decoded = 0.0 if large else seconds * rates["index_decode_second_flac"].seconds
    found = [
        Stage(
            spread=False,
            name="index (headers)" if large else "index (decodes)",
            reads=min(rows * HEADER_BYTES, flac) if large else flac,
            opens=rows,
            writes=rows * rates.row["bytes"],
            memory=rows * rates["index_row"].bytes,
            core_seconds=decoded + rows * (member.seconds - member.own_seconds),
            serial_seconds=rows * member.own_seconds,
        )
    ]
    if large:
        teacher = read_recipe("hubert_large_ll60k")
        layer, dim = teacher["codebook"]["layer"], encoder_sizes("base")["dim"]
        found += [
            encoded(f"labels, BASE layer {layer}", "base", layer),
            pretrained("HuBERT LARGE", teacher["hubert"], "large"),
        ]
        final, top = "large", 18
    else:
        dim = encoder_sizes("base")["dim"]
        found += [
            cluster(
                "k-means, MFCC", base["codebook_mfcc"]["hours"], 39, base["codebook_mfcc"]["num_classes"]
            ),
            replace(labels, name="labels, MFCC", core_seconds=seconds * rates["encode_mfcc_second"].seconds),
            pretrained("HuBERT BASE, iteration 1", base["hubert1"], "base"),
            cluster(
                "k-means, layer 6",
                base["codebook1"]["hours"],
                dim,
                base["codebook1"]["num_classes"],
                audio_flops("base", 6),
            ),
            encoded("labels, layer 6", "base", 6),
            pretrained("HuBERT BASE, iteration 2", base["hubert2"], "base"),
        ]
        final, top = "base", 9
    units = read_recipe("unit_lm")["codebook"]
    found += [
        cluster(
            f"k-means, layer {top}",
            units["hours"],
            encoder_sizes(final)["dim"],
            units["num_classes"],
            audio_flops(final, top),
        ),
        encoded(f"labels, layer {top}", final, top),
    ]
    parameters, token_flops, tokens = lm_sizes()
    packed = seconds * UNITS_PER_SECOND
    found += [
        Stage(
            "pack",
            spread=False,
            reads=100 * seconds,
            writes=4 * packed + rows * (8 + ID_BYTES),
            memory=rows * rates["start_hubert"].bytes,
            scratch=rows * (ID_BYTES + 20),
            serial_seconds=rows * rates["pack_document"].seconds
            + seconds * rates["pack_labels_second"].seconds,
        ),
        Stage(
            "unit LM",
            reads=2 * max(tokens, packed),
            writes=max(tokens, packed) / tokens * 50 * 12 * parameters,
            memory=rows * rates["open_units"].bytes,
            trains=True,
            flops=max(tokens, packed) * token_flops,
            cpu_flops=cpu["lm"],
        ),
    ]
    ctc = read_recipe("ctc_10min")["transfer"]
    heard = ctc["by_budget"]["10h"]["training"]["max_steps"] * ctc["finetune"]["batches"]["batch_seconds"]
    found.append(
        Stage(
            "CTC on 10 h",
            reads=10 * 3600 * FLAC_BYTES,
            flops=3 * heard * audio_flops(final),
            cpu_flops=cpu["train"],
            core_seconds=heard * decoding,
        )
    )
    return found
