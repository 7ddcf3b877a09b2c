"""The verb `cluster`: fit a codebook on a seeded sample of frames, and choose the encoder layer it reads."""

import time
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pretrain.artefact import require_absent
from pretrain.config import Config
from pretrain.labels import MAX_CLASSES
from pretrain.manifest import Manifest
from pretrain.progress import console
from quantize.codebook import write_codebook
from quantize.features import FeatureSource, LayerConvention, MfccSource, Precision, open_encoder_source
from quantize.kmeans import kmeans
from quantize.sampling import sample_frames
from quantize.sweep import choose_layer

FRAMES_PER_HOUR = 50 * 3600


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
            choice = choose_layer(manifest, config.split, config.select_split, encoder_source, config.num_classes, config.seed)
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
