"""The verb `cluster`: fit a codebook on a seeded sample of frames, and choose the encoder layer it reads.

Frames are drawn while features stream by, so memory holds the sample and never the corpus. Which frames are drawn is a
function of the seed and the manifest alone.
"""

import time
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pretrain.artefact import require_absent
from pretrain.audio import SAMPLE_RATE
from pretrain.config import Config
from pretrain.labels import MAX_CLASSES
from pretrain.manifest import Manifest, Utterance
from pretrain.pnmi import JointCounts, phone_metrics
from pretrain.progress import console, progress
from quantize.codebook import write_codebook
from quantize.features import EncoderSource, FeatureSource, LayerConvention, MfccSource, Precision, open_encoder_source
from quantize.kmeans import kmeans, nearest

FRAMES_PER_HOUR = 50 * 3600
VISIT = 4  # audio that may be decoded and encoded, relative to the frames wanted
SWEEP_FRAMES = 20_000  # frames per layer that the sweep fits on, and frames of the select split it scores
SWEEP_ITERATIONS = 20


class ClusterConfig(Config):
    """`hours`: audio's worth of frames to fit on. `layer = "best"`: the layer with the highest PNMI on `select_split`."""

    manifest: str
    out: str
    split: str | None = None
    features: Literal["mfcc", "encoder"] = "mfcc"
    cmvn: bool = Field(False, description="normalise MFCC over each utterance")
    encoder: str | None = Field(None, description="run folder, for features = 'encoder'")
    layer: Annotated[int, Field(ge=0)] | Literal["best"] = Field("best", description="0 is the first layer's input")
    convention: LayerConvention = Field("residual", description="a layer's features: its output, or its feed-forward's")
    select_split: str = Field("dev", description="where 'best' is judged; its phones are used")
    num_classes: int = Field(100, ge=1, le=MAX_CLASSES)
    hours: float = Field(10.0, gt=0)
    seed: int = Field(0, ge=0)
    restarts: int = Field(1, ge=1)
    max_iterations: int = Field(100, ge=1)
    tolerance: float = Field(1e-4, ge=0, description="stop when inertia falls by less, relatively")
    device: str = "auto"
    batch_seconds: float | None = Field(None, ge=0, description="audio per batch; 0 is one utterance at a time")
    precision: Precision = Field("float32", description="of the encoder's matrix products; int8 on a CPU only")
    workers: int = Field(2, ge=1, description="threads that decode")

    @model_validator(mode="after")
    def _encoder_when_needed(self) -> "ClusterConfig":
        if (self.features == "encoder") != (self.encoder is not None):
            raise ValueError("features = 'encoder' and encoder = RUN_FOLDER go together")
        if self.features == "encoder" and self.cmvn:
            raise ValueError("cmvn is a matter of MFCC; remove it")
        if self.features == "mfcc" and self.precision != "float32":
            raise ValueError("precision is a matter of encoders; remove it or give features = 'encoder'")
        if self.features == "mfcc" and self.layer != "best":  # the default, which a resolved config spells out
            raise ValueError("layer is a matter of encoders; remove it or give features = 'encoder'")
        return self


def cluster(config: ClusterConfig) -> dict[str, Any]:
    """Fit `num_classes` centroids and write the codebook; returns the statistics of the fit and how the layer was chosen."""
    require_absent(config.out)
    began = time.monotonic()
    manifest = Manifest(config.manifest)
    rows = manifest.select(config.split)
    budget = round(config.hours * FRAMES_PER_HOUR)
    choice: dict[str, Any] = {}
    source: FeatureSource
    if config.encoder is None:
        source = MfccSource(config.cmvn, config.workers)
    else:
        layer = 0 if config.layer == "best" else config.layer
        encoder_source = open_encoder_source(
            config.encoder, layer, device=config.device, batch_seconds=config.batch_seconds, workers=config.workers,
            precision=config.precision, convention=config.convention,
        )  # fmt: skip
        if config.layer == "best":
            choice = choose_layer(config, manifest, rows, encoder_source)
            encoder_source.layer = choice["layer"]
        source = encoder_source
    frames = sample_frames(source, rows, budget, config.seed)
    fit = kmeans(
        frames, config.num_classes, seed=config.seed, max_iterations=config.max_iterations, tolerance=config.tolerance,
        restarts=config.restarts,
    )  # fmt: skip
    if fit.num_empty:
        console.print(
            f"{config.out}: {fit.num_empty} of {config.num_classes} classes are empty: the sample has fewer distinct frames"
        )
    statistics = {name: value for name, value in asdict(fit).items() if name not in ("centroids", "mean")}
    statistics |= {"frames": len(frames), **choice}
    parents = {"manifest": manifest.fingerprint}
    if config.encoder is not None:
        parents["encoder"] = source.describe()["encoder"]
    write_codebook(config.out, fit.centroids[None], fit.mean, source.describe(), statistics, config.resolved(), parents)
    return {"num_classes": config.num_classes, **statistics, "seconds": time.monotonic() - began}


def plan_sample(num_frames: np.ndarray, budget: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which utterances to visit and how many frames to draw from each: (rows ascending, counts), `budget` frames or all there are.

    Utterances are drawn until they hold `VISIT` times the budget; each then gives the same share of its frames.
    """
    order = np.random.default_rng([seed, len(num_frames)]).permutation(len(num_frames))
    ends = np.cumsum(num_frames[order])
    rows = np.sort(order[: int(np.searchsorted(ends, VISIT * budget)) + 1])
    ends = np.cumsum(num_frames[rows], dtype=np.int64)
    quotas = ends * min(budget, ends[-1]) // ends[-1]  # Python-exact integers: no utterance gives more than it has
    counts = np.diff(quotas, prepend=0)
    return rows[counts > 0], counts[counts > 0]


class Sample:
    """Frames drawn from each utterance it visits, in manifest order whatever the order of arrival."""

    def __init__(self, rows: Manifest, budget: int, seed: int):
        lengths = rows.lengths
        visited, counts = plan_sample(rows.num_frames, budget, seed)
        self.utterances = [rows[int(row)] for row in visited]
        self.size = int(counts.sum())
        self.seconds = float(lengths[visited].sum() / SAMPLE_RATE)
        starts = np.cumsum(counts) - counts
        self._places = {
            utterance.id: (int(row), int(start), int(count))
            for utterance, row, start, count in zip(self.utterances, visited, starts, counts, strict=True)
        }
        self._seed = seed

    def draw(self, utterance: Utterance) -> tuple[slice, np.ndarray]:
        """Where this utterance's frames go in the sample, and which of its frames they are."""
        row, start, count = self._places[utterance.id]
        chosen = np.random.default_rng([self._seed, row, 1]).choice(utterance.num_frames, size=count, replace=False)
        return slice(start, start + count), np.sort(chosen)


def sample_frames(source: FeatureSource, rows: Manifest, budget: int, seed: int) -> np.ndarray:
    """Up to `budget` frames of `rows`, (frames, dim) float32."""
    sample = Sample(rows, budget, seed)
    frames = np.empty((sample.size, source.dim), dtype=np.float32)
    with progress("frames to fit on", total=sample.seconds, unit="s") as advance:
        for utterance, features in source.features(sample.utterances):
            place, chosen = sample.draw(utterance)
            frames[place] = features[chosen]
            advance(utterance.length / SAMPLE_RATE)
    return frames


def choose_layer(config: ClusterConfig, manifest: Manifest, rows: Manifest, source: EncoderSource) -> dict[str, Any]:
    """`layer`, `chosen_by` and `sweep` {layer: PNMI}: the layer whose quick k-means on `rows` suits the phones of the select split.

    All layers come out of one pass over a sample of `rows` and one over the select split. Without phone alignments it is
    the layer in the middle, as in HuBERT's first iteration (6 of 12).
    """
    num_layers = source.encoder.config.num_layers
    judge = manifest.select(config.select_split) if manifest.has_phones else None
    if judge is None or not judge.has_phones:
        middle = max(1, num_layers // 2)
        reason = f"no phone alignments to judge layers by, so the middle one: {middle} of {num_layers}"
        console.print(f"layer: {reason}")
        return {"layer": middle, "chosen_by": reason, "sweep": {}}
    budget = max(SWEEP_FRAMES, 20 * config.num_classes)
    sample, test = Sample(rows, budget, config.seed), Sample(judge, budget, config.seed)
    frames = np.empty((num_layers + 1, sample.size, source.dim), dtype=np.float32)
    counts = [JointCounts(config.num_classes) for _ in frames]
    with progress("all layers", total=sample.seconds + test.seconds, unit="s") as advance:
        for utterance, layers in source.all_layers(sample.utterances):
            place, chosen = sample.draw(utterance)
            for layer, features in enumerate(layers):
                frames[layer, place] = features[chosen]
            advance(utterance.length / SAMPLE_RATE)
        fits = [kmeans(points, config.num_classes, seed=config.seed, max_iterations=SWEEP_ITERATIONS) for points in frames]
        for utterance, layers in source.all_layers([utterance for utterance in test.utterances if utterance.phones is not None]):
            for fit, features, joint in zip(fits, layers, counts, strict=True):
                joint.add(utterance, nearest(features, fit.centroids, fit.mean))
            advance(utterance.length / SAMPLE_RATE)
    scores = [phone_metrics(joint.matrix()[1])["pnmi"] for joint in counts]
    best = max(range(1, num_layers + 1), key=scores.__getitem__)
    sweep = {str(layer): score for layer, score in enumerate(scores)}
    return {"layer": best, "chosen_by": f"highest PNMI on {config.select_split!r}", "sweep": sweep}
