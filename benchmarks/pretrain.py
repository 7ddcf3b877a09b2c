"""A training step of wav2vec 2.0 or HuBERT beside a peer's: audio seconds per second and peak memory.

A step is forward with new masks and the published dropouts, loss, backward, gradient clipping as published
and AdamW (fused), on audio that stays the same. Loading and, where the peer does that in its data loader,
drawing masks come before the clock starts. `--lengths mixed` makes a round one pass over a corpus of 1 to 20
s: ours in the batches that the product plans, the peer in padded batches of like lengths, the same audio a
batch. README.md here says how each peer is set up.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import corpus
from benchmarks.command import add_model_arguments, argument_parser, run_main, table
from benchmarks.contest import contest
from benchmarks.flops import forward_flops
from benchmarks.measure import Contender
from benchmarks.training_peers import PEERS
from benchmarks.training_step import Update

NUM_CLASSES = 500
# As published: HuBERT clips the gradient's norm at 10, wav2vec 2.0 does not clip.
CLIP_NORM = {"hubert": 10.0, "wav2vec2": 0.0}


class Ours:
    """The product's task, batches, model and losses; the update is the benchmark's own, the same as the
    peers'."""

    def __init__(self, settings: dict[str, Any], folder: Path):
        from pretrain.data.labels import Labels
        from pretrain.data.manifest import Manifest
        from pretrain.objectives.hubert import HubertTask
        from pretrain.objectives.pretraining import PretrainConfig
        from pretrain.objectives.task import PretrainTask
        from pretrain.objectives.wav2vec2 import Wav2Vec2Task
        from pretrain.training.memory import keep_freed_memory
        from pretrain.training.parallel import compile_in_place

        torch.manual_seed(settings["seed"])
        config, manifest = PretrainConfig(**product_config(settings, folder)), Manifest(folder / "manifest")
        hubert = settings["objective"] == "hubert"
        self.task: PretrainTask = (
            HubertTask(config, manifest, Labels(folder / "labels"))
            if hubert
            else Wav2Vec2Task(config, manifest)
        )
        self.device = torch.device(settings["device"])
        self.task.model.to(self.device).train()
        if settings["compile"]:
            compile_in_place(self.task.model, self.task.blocks())
        if self.device.type == "cpu":
            keep_freed_memory()
        self.update = Update(self.task.model, self.task.parameter_groups(), settings)
        self.plan = self.task.train_set.plan(0)
        self.amount = float(sum(self.task.train_set.seconds(items) for items in self.plan))
        self.batches: list[Any] = []
        self.step = 0

    def about(self) -> dict[str, Any]:
        train_set = self.task.train_set
        heard = [train_set.load(item, np.random.default_rng(0))[0] for item in range(len(train_set.manifest))]
        parameters = sum(p.numel() for p in self.task.model.parameters())
        return {
            "inputs_sha256": corpus.digest(heard),
            "parameters": parameters,
            "steps_per_round": len(self.plan),
        }

    def prepare(self, number: int) -> None:
        self.batches = [self.task.collate(items, number) for items in self.plan]

    def run(self) -> None:
        from pretrain.training.step import autocast, to_device

        for batch in self.batches:
            self.task.before_step(self.step)
            with autocast(self.task.config.training.precision, self.device):
                loss = self.task.model(to_device(batch, self.device))
            self.update(loss.total / loss.count)
            self.step += 1


def product_config(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Keys of `PretrainConfig` for these settings."""
    hubert, heads = settings["objective"] == "hubert", settings["heads"]
    return {
        "out": str(folder / "run"),
        "manifest": str(folder / "manifest"),
        "split": None,
        "valid_split": None,
        "objective": settings["objective"],
        "labels": str(folder / "labels") if hubert else None,
        "encoder": settings["sizes"],
        **({"hubert": {"final_dim": heads["final_dim"]}} if hubert else {"wav2vec2": heads}),
        # a little room: four utterances of 10 s are one batch of 40 s however they are laid out
        "batches": {
            "batch_seconds": 1.005 * settings["batch_seconds"],
            "crop_seconds": max(20.0, settings["seconds"]),
        },
        "training": {
            "max_steps": 1,
            "seed": settings["seed"],
            "precision": settings["precision"],
            "device": settings["device"],
        },
    }


def build(name: str, settings: dict[str, Any], folder: Path) -> Contender:
    """The contender of a name: "ours", or a peer's, with its variant behind a hyphen."""
    if name == "ours":
        return Ours(settings, folder)
    peer, _, variant = name.partition("-")
    return PEERS[settings["objective"], peer](settings, folder, variant)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw the corpus, let the contenders take turns, and say what was measured."""
    if arguments.peer != "none" and (arguments.objective, arguments.peer) not in PEERS:
        able = sorted(peer for objective, peer in PEERS if objective == arguments.objective)
        raise ValueError(
            f"--peer {arguments.peer}: does not pretrain {arguments.objective}; those that do: "
            f"{', '.join(able)}"
        )
    settings = resolve(arguments)
    lengths = corpus.draw_lengths(
        arguments.lengths, arguments.seconds, settings["total_seconds"], arguments.seed
    )
    audio_seconds = lengths.sum() / 16000
    # A dropped layer computes nothing, so the layers count by how often they run; backward is twice the
    # forward.
    layers = settings["sizes"]["num_layers"] * (1 - settings["sizes"]["layer_drop"])
    whole, bare = (forward_flops(settings["sizes"], lengths, n) for n in (settings["sizes"]["num_layers"], 0))
    flops = 3 * (bare + (whole - bare) * layers / settings["sizes"]["num_layers"]) / audio_seconds
    variants = [] if arguments.peer == "none" else [arguments.peer]
    if arguments.peer in ("transformers", "fairseq2"):
        attentions = ["sdpa", "eager"] if arguments.attention == "auto" else [arguments.attention]
        variants = [f"{arguments.peer}-{attention}" for attention in attentions]
    if arguments.compile:
        variants += [f"{variant}-compiled" for variant in variants]
    with tempfile.TemporaryDirectory(prefix="benchmark_") as temporary:
        folder = Path(temporary)
        corpus.write_corpus(folder, lengths, NUM_CLASSES, arguments.seed)
        result = contest(
            "benchmarks.pretrain", variants, folder, settings, flops, peer_python=arguments.peer_python
        )
    kind = [getattr(arguments, key) for key in "objective architecture lengths precision device".split()]
    name = " ".join(["pretrain", *kind, *(["compiled"] if arguments.compile else [])])
    return {"name": name, "unit": "audio seconds per second", **result, "corpus": corpus.describe(lengths)}


def resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything the contenders need to know, peers without our code included: sizes and dropouts of the
    published models."""
    from pretrain.model.config import EncoderConfig
    from pretrain.objectives.wav2vec2 import Wav2Vec2Config

    hubert, large = arguments.objective == "hubert", arguments.architecture in ("large", "xlarge")
    encoder = EncoderConfig(
        architecture=arguments.architecture,
        front_end="waveform",
        layer_drop=arguments.layer_drop,
        conv_bias=large and not hubert,  # as released
    )
    heads: dict[str, Any] = {"final_dim": 768 if large else 256}
    if not hubert:
        published = Wav2Vec2Config(**heads, code_dim=heads["final_dim"]).resolved()
        # strict configs take no list back
        heads = {key: value for key, value in published.items() if not isinstance(value, list)}
    given = "objective architecture precision device threads rounds seed peak_tflops".split()
    # a new shape may be compiled anew
    return {
        **{name: getattr(arguments, name) for name in given},
        "warmup": max(3, arguments.warmup) if arguments.compile else arguments.warmup,
        **corpus.resolve(arguments),
        "compile": arguments.compile,
        "num_classes": NUM_CLASSES,
        "clip_norm": CLIP_NORM[arguments.objective],
        "sizes": encoder.resolved(),
        "heads": heads,
    }


def main(given: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argument_parser(__doc__, ["transformers", "torchaudio", "fairseq2"])
    parser.add_argument("--objective", choices=["wav2vec2", "hubert"], default="wav2vec2")
    parser.add_argument("--architecture", choices=["base", "large", "xlarge", "tiny"], default="base")
    add_model_arguments(parser)
    corpus.add_arguments(parser)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layer-drop", type=float, default=0.0, help="on both sides; published: 0.05")
    parser.add_argument(
        "--attention",
        choices=["auto", "sdpa", "eager"],
        default="auto",
        help="of transformers and fairseq2; auto tries both",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="ours with torch.compile; the peer is tried with and without; at least 3 warm-up rounds",
    )
    return run_main("benchmarks.pretrain", parser, given, build, compare, table)


if __name__ == "__main__":
    sys.exit(main())
