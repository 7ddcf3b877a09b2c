"""The whole way from wav files to labels on disk, beside a peer's: audio seconds per second, memory, and
which labels differ.

Ours is the verb `encode` on a manifest, an untrained HuBERT in a run folder and a codebook fitted on features
of its own. The peer is the usual script with the same weights (our `export`) and the same centroids:
soundfile, `HubertModel` with every hidden state, one utterance at a time, scikit-learn's `predict`, a line of
labels for each utterance. `ratio_usual` is against that script as people run it; `ratio` against the fastest
of the peer's ways, which are those that leave the labels alone: the layers beyond the codebook's cut off, and
fairseq's formula for the nearest centroid. (Padded batches would change the units: GroupNorm's statistics go
over the padding.) Both sides load their weights within the round.

Where labels differ, the margin says by how much: how much farther the peer's centroid is than ours from the
float32 feature.
"""

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import corpus
from benchmarks.command import add_model_arguments, argument_parser, run_main, table
from benchmarks.contest import contest
from benchmarks.encode_pipelines import USUAL, Ours, TransformersPeer, labels_folder
from benchmarks.flops import forward_flops
from benchmarks.measure import Contender, ask, say, take_turns

MODULE = "benchmarks.encode"
VARIANTS = {"transformers": [USUAL, "transformers-cut", "transformers-cut-torch"], "none": []}
FRAMES_PER_CLASS = 25  # of those that the codebook is fitted on
TIMES_LONGER = 4


def build(name: str, settings: dict[str, Any], folder: Path) -> Contender:
    """The contender of a name."""
    return (
        TransformersPeer(name, settings, folder)
        if name.startswith("transformers")
        else Ours(name, settings, folder)
    )


def write_model(folder: Path, settings: dict[str, Any]) -> None:
    """A run folder with untrained weights, and the same weights for the peer."""
    from pretrain.model.config import EncoderConfig
    from pretrain.model.encoder import Encoder
    from pretrain.training.checkpoint import save_checkpoint
    from pretrain.weights.exporting import export_weights

    torch.manual_seed(settings["seed"])
    model = nn.Module()
    model.encoder = Encoder(EncoderConfig(**settings["sizes"]))
    state = {
        "kind": "pretraining",
        "config": {"encoder": settings["sizes"]},
        "extra": {"objective": "hubert"},
    }
    save_checkpoint(folder / "run", 0, model, torch.optim.AdamW(model.parameters()), state)
    export_weights(folder / "run", folder / "huggingface", "huggingface")


def write_codebook(folder: Path, settings: dict[str, Any]) -> None:
    """K-means on features of the corpus's first utterances, as a codebook and as plain centroids in the
    features' coordinates."""
    import quantize.codebook
    from pretrain.data.manifest import Manifest
    from quantize.features import open_encoder_source
    from quantize.kmeans import kmeans

    manifest = Manifest(folder / "manifest")
    enough = int(np.searchsorted(np.cumsum(manifest.num_frames), FRAMES_PER_CLASS * settings["classes"])) + 1
    source = open_encoder_source(str(folder / "run"), settings["layer"], device=settings["device"])
    some = [manifest[row] for row in range(min(enough, len(manifest)))]
    fit = kmeans(
        np.concatenate([features for _, features in source.features(some)]),
        settings["classes"],
        seed=settings["seed"],
    )
    quantize.codebook.write_codebook(
        folder / "codebook", fit.centroids, fit.mean, source.describe(), {}, {}, {}
    )
    np.save(folder / "centroids.npy", (fit.centroids[0].astype(np.float64) + fit.mean).astype(np.float32))


def write_longer(folder: Path) -> None:
    """A manifest of the same files, each of them four times."""
    from pretrain.data.manifest import Manifest, write_manifest

    rows = [
        {
            "id": f"{u.id}_{copy}",
            "path": u.path,
            "start": 0,
            "num_samples": u.num_samples,
            "sample_rate": u.sample_rate,
        }
        for copy in range(TIMES_LONGER)
        for u in Manifest(folder / "manifest")
    ]
    write_manifest(folder / "manifest_long", rows, {}, {})


def compare_labels(folder: Path, ours: Path, lines: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """How many frames have another label in the peer's `lines`, and the widest margin among those.

    The margin of a frame is (|x - theirs|² - |x - ours|²) / |x - ours|² in float64, of the float32 feature x;
    its size is what counts. Two float32 computations of |x - c|² in the usual form differ by about 1e-7 |x|²
    each.
    """
    from pretrain.data.labels import Labels
    from pretrain.data.manifest import Manifest
    from quantize.features import open_encoder_source

    manifest, labels = Manifest(folder / "manifest"), Labels(ours)
    theirs = [np.array(line.split(), dtype=np.int64) for line in lines.read_text().splitlines()]
    pairs = [
        (labels[utterance].astype(np.int64), their)
        for utterance, their in zip(manifest.ids, theirs, strict=True)
    ]
    for own, their in pairs:
        assert own.shape == their.shape, "one label a frame on both sides"
    rows = [row for row, (own, their) in enumerate(pairs) if (own != their).any()]
    source = open_encoder_source(str(folder / "run"), settings["layer"], device=settings["device"])
    centroids, widest = np.load(folder / "centroids.npy").astype(np.float64), 0.0
    for row, (_, features) in zip(rows, source.features([manifest[row] for row in rows]), strict=True):
        frames = np.flatnonzero(pairs[row][0] != pairs[row][1])
        near, far = (np.square(features[frames] - centroids[side[frames]]).sum(axis=1) for side in pairs[row])
        widest = max(widest, float(np.abs((far - near) / near).max()))
    differ = sum(int((own != their).sum()) for own, their in pairs)
    return {"labels_differ": differ, "largest_margin": widest}


def usage(ours: Path) -> dict[str, Any]:
    """Frames, and how many classes they use: that labels agree says little where there are few of them."""
    from pretrain.data.labels import Labels

    labels = Labels(ours)
    counts = np.bincount(np.concatenate([labels[utterance] for utterance in labels.ids]))
    shares = counts[counts > 0] / counts.sum()
    return {
        "frames": int(counts.sum()),
        "classes_used": len(shares),
        "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
    }


def same_labels(folder: Path, rounds: int) -> bool:
    """Whether every round of ours left the very same bytes."""
    shards = [
        [
            hashlib.sha256(path.read_bytes()).digest()
            for path in sorted(labels_folder(folder, "ours", number).glob("*.npy"))
        ]
        for number in range(rounds)
    ]
    return all(found == shards[0] for found in shards)


def measure_flatness(folder: Path, threads: int) -> dict[str, Any]:
    """Peak memory of ours on the corpus and on one four times as long, each in a fresh process."""
    write_longer(folder)
    peaks = [
        take_turns(MODULE, {name: sys.executable}, folder, rounds=1, warmup=0, threads=threads)[name].peak_gb
        for name in ("ours-short", "ours-long")
    ]
    return {
        "ours_peak_gb_short": peaks[0],
        "ours_peak_gb_long": peaks[1],
        "ours_rss_flat": peaks[1] / peaks[0],
    }


def _require_possible(arguments: argparse.Namespace, num_layers: int) -> None:
    if not 1 <= arguments.layer <= num_layers:
        raise ValueError(f"--layer {arguments.layer}: {arguments.architecture} has layers 1 to {num_layers}")
    if arguments.precision == "int8" and arguments.device != "cpu":
        raise ValueError("--precision int8: runs on a CPU; use bfloat16 or --device cpu")


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw the corpus, make model and codebook, let the contenders take turns, and compare what they left."""
    from pretrain.model.config import EncoderConfig

    encoder = EncoderConfig(architecture=arguments.architecture, front_end="waveform", norm_first=False)
    _require_possible(arguments, encoder.num_layers)
    shape = corpus.resolve(arguments)
    lengths = corpus.draw_lengths(
        arguments.lengths, arguments.seconds, shape["total_seconds"], arguments.seed
    )
    frames, seconds = int(((lengths - 400) // 320 + 1).sum()), lengths.sum() / corpus.SAMPLE_RATE
    if not 2 <= arguments.classes <= frames // 4:
        raise ValueError(
            f"--classes {arguments.classes}: 2 to {frames // 4} can be fitted on this corpus of {frames} "
            "frames"
        )
    given = (
        "architecture layer classes precision device threads rounds warmup seed peak_tflops "
        "ours_batch_seconds".split()
    )
    settings = {**{name: getattr(arguments, name) for name in given}, **shape, "sizes": encoder.resolved()}
    flops = (
        forward_flops(settings["sizes"], lengths, arguments.layer)
        + 2.0 * frames * arguments.classes * settings["sizes"]["dim"]
    )
    with tempfile.TemporaryDirectory(prefix="benchmark_") as temporary:
        folder = Path(temporary)
        say("corpus, model and codebook")
        corpus.write_corpus(folder, lengths, arguments.classes, arguments.seed)
        write_model(folder, settings)
        write_codebook(folder, settings)
        variants = VARIANTS[arguments.peer]
        result = contest(
            MODULE,
            variants,
            folder,
            settings,
            flops / seconds,
            peer_python=arguments.peer_python,
            usual=USUAL,
        )
        if arguments.precision != "float32":
            result |= ask(MODULE, "agreement", folder, threads=arguments.threads)
        num_rounds = arguments.warmup + arguments.rounds
        last = labels_folder(folder, "ours", num_rounds - 1)
        compared = {name: compare_labels(folder, last, folder / f"{name}.km", settings) for name in variants}
        result |= {
            **usage(last),
            **compared.get(USUAL, {}),
            "peer_labels": compared,
            "rounds_agree": same_labels(folder, num_rounds),
        }
        if arguments.check_memory:
            result |= measure_flatness(folder, arguments.threads)
    name = (
        f"encode {arguments.architecture} layer {arguments.layer} {arguments.lengths} {arguments.precision} "
        f"{arguments.device}"
    )
    return {"name": name, "unit": "audio seconds per second", **result, "corpus": corpus.describe(lengths)}


def show(result: dict[str, Any]) -> str:
    """The contest's table, and what became of the labels."""
    lines = [table(result)]
    if result["ratio_usual"] is not None:
        lines.append(
            f"{result['ratio_usual']:.2f} times as fast as the usual script ({result['peer_usual']:.2f})"
        )
    lines.append(
        f"{result['frames']} labels, {result['classes_used']} classes, perplexity {result['perplexity']:.1f}"
    )
    for name, found in result["peer_labels"].items():
        lines.append(
            f"{name}: {found['labels_differ']} labels differ, by a margin of {found['largest_margin']:.1e} "
            "at most"
        )
    if "label_agreement" in result:
        lines.append(f"label agreement with float32 {result['label_agreement']:.4f}")
    if "ours_rss_flat" in result:
        short, longer = result["ours_peak_gb_short"], result["ours_peak_gb_long"]
        lines.append(f"peak memory {short:.3f} GB, with {TIMES_LONGER} times the audio {longer:.3f} GB")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argument_parser(__doc__, ["transformers"])
    parser.add_argument("--architecture", choices=["base", "tiny"], default="base")
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--classes", type=int, default=500)
    parser.add_argument(
        "--precision",
        choices=["float32", "bfloat16", "int8"],
        default="float32",
        help="of ours; the peer's is float32",
    )
    parser.add_argument(
        "--ours-batch-seconds",
        type=float,
        help="batch_seconds of `encode`; by default the product's own default",
    )
    parser.add_argument(
        "--check-memory",
        action="store_true",
        help=f"also encode {TIMES_LONGER} times the corpus, and compare the peaks",
    )
    add_model_arguments(parser)
    corpus.add_arguments(parser)
    parser.set_defaults(lengths="mixed", total_seconds=600.0, rounds=3, warmup=0)
    return run_main(MODULE, parser, given, build, compare, show)


if __name__ == "__main__":
    sys.exit(main())
