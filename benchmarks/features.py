"""Features of one layer beside a peer's: audio seconds per second, peak memory and, in low precision, how
many labels stay.

Ours is the product's own path (quantize/features.py): decoding, batches by length, the encoder to layer L and
no further, float32 arrays out. The peer has its waveforms in memory and gives float32 arrays too. A peer may
work in more than one way (utterances one at a time or padded in batches of like lengths; with transformers
the whole model with `output_hidden_states`, or a model whose layers beyond L the user has cut off); each is
timed, and the ratio is against the fastest.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import corpus
from benchmarks.command import add_model_arguments, argument_parser, run_main, table
from benchmarks.contest import contest
from benchmarks.flops import forward_flops
from benchmarks.measure import Contender, ask
from benchmarks.training_peers import torchaudio_config, transformers_config

NUM_CLASSES = 500
VARIANTS = {
    "transformers": [
        "transformers-cut-single",
        "transformers-cut-batched",
        "transformers-whole-single",
        "transformers-whole-batched",
    ],
    "torchaudio": ["torchaudio-cut-single", "torchaudio-cut-batched"],
    "none": [],
}


class Ours:
    """`EncoderSource` on untrained weights."""

    def __init__(self, settings: dict[str, Any], folder: Path):
        from pretrain.data.manifest import Manifest
        from pretrain.model.config import EncoderConfig
        from pretrain.model.encoder import Encoder

        torch.manual_seed(settings["seed"])
        self.settings = settings
        self.encoder = Encoder(EncoderConfig(**settings["sizes"])).eval().to(settings["device"])
        self.utterances = list(Manifest(folder / "manifest"))
        self.amount = sum(utterance.length for utterance in self.utterances) / corpus.SAMPLE_RATE
        self.source = self._open(settings["precision"])

    def _open(self, precision: str) -> Any:
        """The one place that asks the product for a precision."""
        from quantize.features import EncoderSource

        return EncoderSource(
            self.encoder,
            "untrained",
            self.settings["layer"],
            device=self.settings["device"],
            batch_seconds=self.settings["ours_batch_seconds"],
            workers=self.settings["threads"],
            precision=precision,  # type: ignore[arg-type]
        )

    def about(self) -> dict[str, Any]:
        from pretrain.data.audio import load_audio

        heard = corpus.digest([load_audio(utterance) for utterance in self.utterances])
        return {"inputs_sha256": heard, "batch_seconds": self.source.batch_seconds}

    def prepare(self, number: int) -> None: ...

    def run(self) -> None:
        for _ in self.source.features(self.utterances):
            pass


class Agreement:
    """What a lower precision changes. A contender that only speaks of itself, so that ours pays for none of
    it."""

    amount = 0.0

    def __init__(self, settings: dict[str, Any], folder: Path):
        self.settings, self.folder = settings, folder

    def about(self) -> dict[str, Any]:
        """Share of frames whose nearest of 500 centroids, fitted on the float32 features, is the same in this
        precision."""
        return compare_features(
            self.features("float32"), self.features(self.settings["precision"]), self.settings["seed"]
        )

    def features(self, precision: str) -> np.ndarray:
        """(frames, dim) of the whole corpus in the manifest's order, from the same weights."""
        ours = Ours({**self.settings, "precision": precision}, self.folder)
        return np.concatenate([found for _, found in ours.source.features(ours.utterances)])

    def prepare(self, number: int) -> None: ...

    def run(self) -> None: ...


def compare_features(exact: np.ndarray, quick: np.ndarray, seed: int) -> dict[str, Any]:
    """Two versions of the same features, (frames, dim): labels that agree, and the error relative to the
    spread."""
    from quantize.assignment import nearest
    from quantize.kmeans import kmeans

    num_classes = min(NUM_CLASSES, len(exact) // 4)
    fit = kmeans(exact, num_classes, seed=seed)
    same = nearest(exact, fit.centroids[0], fit.mean) == nearest(quick, fit.centroids[0], fit.mean)
    error = float(np.linalg.norm(exact - quick) / np.linalg.norm(exact - exact.mean(0)))
    return {"label_agreement": float(same.mean()), "label_classes": num_classes, "feature_error": error}


class Peer:
    """Waveforms in memory to a list of float32 arrays; a subclass makes the model and calls it."""

    def __init__(self, settings: dict[str, Any], folder: Path, variant: str):
        self.settings, self.device, self.layer = settings, settings["device"], settings["layer"]
        self.cut, batched = variant.startswith("cut"), variant.endswith("batched")
        self.waveforms = corpus.read_corpus(folder).waveforms
        lengths = np.array([len(waveform) for waveform in self.waveforms])
        self.plan = corpus.plan_padded(lengths, settings["batch_seconds"] if batched else 0)
        self.amount = float(lengths.sum()) / corpus.SAMPLE_RATE
        # int8 is held against float32
        self.dtype = torch.bfloat16 if settings["precision"] == "bfloat16" else torch.float32
        torch.manual_seed(settings["seed"])
        self.make_model(settings["sizes"])

    def about(self) -> dict[str, Any]:
        padded = (
            sum(max(len(self.waveforms[item]) for item in items) * len(items) for items in self.plan)
            / corpus.SAMPLE_RATE
        )
        return {
            "inputs_sha256": corpus.digest(self.waveforms),
            "dtype": str(self.dtype),
            "padded_seconds": padded,
        }

    def prepare(self, number: int) -> None: ...

    def run(self) -> None:
        with torch.inference_mode():
            for items in self.plan:
                lengths = [len(self.waveforms[item]) for item in items]
                waves = torch.from_numpy(corpus.pad([self.waveforms[item] for item in items])).to(
                    self.device, self.dtype
                )
                uneven = torch.tensor(lengths, device=self.device) if min(lengths) < max(lengths) else None
                found = self.features(waves, uneven).float().cpu().numpy()
                assert found.shape == (
                    len(items),
                    (max(lengths) - 400) // 320 + 1,
                    self.settings["sizes"]["dim"],
                )

    def make_model(self, sizes: dict[str, Any]) -> None:
        raise NotImplementedError

    def features(self, waves: Tensor, lengths: Tensor | None) -> Tensor:
        """(batch, samples) to (batch, frames, dim) of the layer; `lengths` where they differ."""
        raise NotImplementedError


class TransformersPeer(Peer):
    """`HubertModel` with SDPA: `whole` runs every layer and picks one of the hidden states, `cut` has lost
    the others."""

    def make_model(self, sizes: dict[str, Any]) -> None:
        import transformers

        known = {
            key: value for key, value in transformers_config(sizes).items() if key != "feat_quantizer_dropout"
        }
        config = transformers.HubertConfig(**known)
        config._attn_implementation = "sdpa"
        self.model = transformers.HubertModel(config).eval().to(self.device, self.dtype)
        if self.cut:
            self.model.encoder.layers = self.model.encoder.layers[: self.layer]

    def features(self, waves: Tensor, lengths: Tensor | None) -> Tensor:
        attention = (
            None
            if lengths is None
            else (torch.arange(waves.shape[1], device=self.device) < lengths[:, None]).long()
        )
        if self.cut:
            last: Tensor = self.model(waves, attention_mask=attention).last_hidden_state
            return last
        picked: Tensor = self.model(waves, attention_mask=attention, output_hidden_states=True).hidden_states[
            self.layer
        ]
        return picked


class TorchaudioPeer(Peer):
    """`extract_features(num_layers=L)`."""

    def make_model(self, sizes: dict[str, Any]) -> None:
        from torchaudio.models import wav2vec2_model

        self.model = (
            wav2vec2_model(**torchaudio_config(sizes), aux_num_out=None).eval().to(self.device, self.dtype)
        )

    def features(self, waves: Tensor, lengths: Tensor | None) -> Tensor:
        picked: Tensor = self.model.extract_features(waves, lengths, num_layers=self.layer)[0][-1]
        return picked


def build(name: str, settings: dict[str, Any], folder: Path) -> Contender:
    """The contender of a name: "ours", "agreement", or a peer's, with its variant behind a hyphen."""
    if name in ("ours", "agreement"):
        return Ours(settings, folder) if name == "ours" else Agreement(settings, folder)
    peer, _, variant = name.partition("-")
    return {"transformers": TransformersPeer, "torchaudio": TorchaudioPeer}[peer](settings, folder, variant)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw the corpus, let the contenders take turns, and say what was measured."""
    from pretrain.model.config import EncoderConfig

    encoder = EncoderConfig(architecture=arguments.architecture, front_end="waveform")
    if not 1 <= arguments.layer <= encoder.num_layers:
        raise ValueError(
            f"--layer {arguments.layer}: {arguments.architecture} has layers 1 to {encoder.num_layers}"
        )
    given = "architecture layer precision device threads rounds warmup seed peak_tflops".split()
    given.append("ours_batch_seconds")
    settings = {
        **{name: getattr(arguments, name) for name in given},
        **corpus.resolve(arguments),
        "sizes": encoder.resolved(),
    }
    lengths = corpus.draw_lengths(
        arguments.lengths, arguments.seconds, settings["total_seconds"], arguments.seed
    )
    flops = forward_flops(settings["sizes"], lengths, arguments.layer) / (lengths.sum() / corpus.SAMPLE_RATE)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as temporary:
        folder = Path(temporary)
        corpus.write_corpus(folder, lengths, NUM_CLASSES, arguments.seed)
        variants = VARIANTS[arguments.peer]
        result = contest(
            "benchmarks.features", variants, folder, settings, flops, peer_python=arguments.peer_python
        )
        if arguments.precision != "float32":
            result |= ask("benchmarks.features", "agreement", folder, threads=arguments.threads)
    name = (
        f"features {arguments.architecture} layer {arguments.layer} {arguments.lengths} "
        f"{arguments.precision} {arguments.device}"
    )
    return {"name": name, "unit": "audio seconds per second", **result, "corpus": corpus.describe(lengths)}


def main(given: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argument_parser(__doc__, ["transformers", "torchaudio"])
    parser.add_argument("--architecture", choices=["base", "large", "xlarge", "tiny"], default="base")
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--precision", choices=["float32", "bfloat16", "int8"], default="float32")
    parser.add_argument(
        "--ours-batch-seconds",
        type=float,
        help="batch_seconds of `encode`; by default the product's own default",
    )
    add_model_arguments(parser)
    corpus.add_arguments(parser)
    return run_main("benchmarks.features", parser, given, build, compare, table)


if __name__ == "__main__":
    sys.exit(main())
