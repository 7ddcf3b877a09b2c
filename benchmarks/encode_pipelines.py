"""Contenders of the benchmark encode: ours, and the field's script on transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import corpus

USUAL = "transformers-usual"


class Ours:
    """The verb. "ours-long" has every utterance four times; "agreement" is not timed and says what the verb's
    own check found."""

    def __init__(self, name: str, settings: dict[str, Any], folder: Path):
        import pretrain.model.encoder  # noqa: F401  # so that no round pays for it, as with the peer's
        import quantize.encoding
        from pretrain.data.manifest import Manifest

        self.name, self.settings, self.folder, self.number = name, settings, folder, 0
        self.encoding = quantize.encoding
        self.manifest = Manifest(folder / ("manifest_long" if name == "ours-long" else "manifest"))
        self.amount = float(self.manifest.lengths.sum()) / corpus.SAMPLE_RATE

    def about(self) -> dict[str, Any]:
        from pretrain.data.audio import load_audio

        if self.name == "agreement":
            return {key: value for key, value in self.encode().items() if key.startswith("label_agreement")}
        return {
            "inputs_sha256": corpus.digest(map(load_audio, self.manifest)) if self.name == "ours" else None
        }

    def prepare(self, number: int) -> None:
        self.number = number

    def run(self) -> None:
        # In low precision the verb encodes 50 utterances once more in float32: nothing beside hours of audio,
        # half of a corpus like this. It is left out here and done by "agreement".
        with patch.object(self.encoding, "label_agreement", return_value={}):
            self.encode()

    def encode(self) -> dict[str, Any]:
        summary: dict[str, Any] = self.encoding.encode(
            self.encoding.EncodeConfig(
                manifest=str(self.manifest.folder),
                codebook=str(self.folder / "codebook"),
                encoder=str(self.folder / "run"),
                out=str(labels_folder(self.folder, self.name, self.number)),
                precision=self.settings["precision"],
                batch_seconds=self.settings["ours_batch_seconds"],
                device=self.settings["device"],
                workers=self.settings["threads"],
            )
        )
        return summary


def labels_folder(folder: Path, name: str, number: int) -> Path:
    """Where a contender of ours leaves round `number`: the verb never writes over anything."""
    return folder / f"labels_{name}_{number}"


class TransformersPeer:
    """The script, in float32 whatever the precision of ours: "usual", "cut" (the model is loaded with the
    layers up to the codebook's and no others), "cut-torch" (and fairseq's `ApplyKmeans` instead of
    scikit-learn's `predict`)."""

    def __init__(self, name: str, settings: dict[str, Any], folder: Path):
        import sklearn.cluster  # noqa: F401  # no round pays for an import
        import soundfile  # noqa: F401
        import transformers

        transformers.logging.set_verbosity_error()  # of the weights that "cut" leaves in the file
        transformers.logging.disable_progress_bar()
        self.model_class = transformers.HubertModel
        self.settings, self.folder, self.name = settings, folder, name
        self.device, self.layer = settings["device"], settings["layer"]
        self.paths = sorted(folder.glob("u*.wav"))
        self.amount = 0.0

    def about(self) -> dict[str, Any]:
        return {"inputs_sha256": corpus.digest(map(read_audio, self.paths))}

    def prepare(self, number: int) -> None: ...

    def run(self) -> None:
        cut = {} if self.name == USUAL else {"num_hidden_layers": self.layer}
        model = self.model_class.from_pretrained(self.folder / "huggingface", **cut).eval().to(self.device)
        predict = (open_formula if self.name.endswith("torch") else open_kmeans)(
            self.folder / "centroids.npy", self.device
        )
        samples = 0
        with open(self.folder / f"{self.name}.km", "w") as file, torch.inference_mode():
            for path in self.paths:
                wave = read_audio(path)
                hidden = model(torch.from_numpy(wave)[None].to(self.device), output_hidden_states=not cut)
                # (1, frames, dim)
                features = hidden.last_hidden_state if cut else hidden.hidden_states[self.layer]
                file.write(" ".join(map(str, predict(features[0]).tolist())) + "\n")
                samples += len(wave)
        self.amount = samples / corpus.SAMPLE_RATE


def read_audio(path: Path) -> np.ndarray:
    """By soundfile alone."""
    import soundfile

    wave: np.ndarray = soundfile.read(path, dtype="float32")[0]
    return wave


def open_kmeans(path: Path, device: str) -> Callable[[torch.Tensor], np.ndarray]:
    """scikit-learn's `predict`. A model with these centroids is made here, where the script would read it
    from a pickle."""
    from sklearn.cluster import MiniBatchKMeans

    centroids = np.load(path)
    model = MiniBatchKMeans(len(centroids), init=centroids, n_init=1, max_iter=1).fit(centroids)
    model.cluster_centers_ = centroids  # not what the one step made of them
    return lambda features: model.predict(features.cpu().numpy())


def open_formula(path: Path, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """|x|² - 2x·c + |c|² in float32, as fairseq's `dump_km_label.py` has it."""
    columns = torch.from_numpy(np.load(path)).to(device).T.contiguous()  # (dim, K)
    squares = columns.square().sum(0, keepdim=True)
    return lambda features: (
        features.square().sum(1, keepdim=True) - 2 * features @ columns + squares
    ).argmin(1)
