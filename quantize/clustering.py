"""The verb `cluster`: fits a codebook on a seeded sample of frames, and chooses the layer of the encoder.

`out/partial` holds the work of an interrupted run: the chosen layer, the sample as far as it is collected,
the state of k-means. The same command goes on from there and ends in the same codebook; `plan.json` prevents
another one from doing so.
"""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pretrain.config import PathStr, Seed, Split
from pretrain.data.label_shards import MAX_CLASSES
from pretrain.data.manifest import Manifest
from pretrain.model.config import LayerConvention
from pretrain.progress import console
from pretrain.store.artefact import is_complete, keep_to_plan, read_meta, require_absent
from pretrain.store.disk import write_json
from quantize.codebook import write_codebook
from quantize.extraction import EncoderPrecision, Extraction, open_encoder
from quantize.features import EncoderSource, FeatureSource, MfccSource
from quantize.kmeans import Fit, kmeans
from quantize.subsample import Balance, Sample, collect, load_sample, require_space
from quantize.sweep import choose_layer, read_choice

FRAMES_PER_HOUR = 50 * 3600
DEFAULT_HOURS = 10.0


class ClusterConfig(Extraction):
    """`hours` or `frames` to fit on. `layer = "best"`: the layer with the highest PNMI on `select_split`, or
    that of `sweep`."""

    manifest: PathStr
    out: PathStr
    split: Split = None
    features: Literal["mfcc", "encoder"] = "mfcc"
    cmvn: bool = Field(False, description="normalise MFCC over each utterance")
    encoder: PathStr | None = Field(
        None, description="run folder, or fairseq2:CARD, for features = 'encoder'"
    )
    layer: Annotated[int, Field(ge=0)] | Literal["best"] = Field(
        "best", description="0 is the first layer's input"
    )
    convention: LayerConvention = Field(
        "residual", description="a layer's features: its output, or its feed-forward's"
    )
    select_split: Split = Field("dev", description="where 'best' is judged, by its phones; \"\": on all")
    sweep: PathStr | None = Field(
        None, description="folder of a `measure` with layers = 'all' whose layer 'best' follows"
    )
    num_classes: int = Field(100, ge=1, le=MAX_CLASSES)
    levels: int = Field(1, ge=1, description="each further one quantises what those before leave")
    spherical: bool = Field(
        False, description="cluster directions: centred frames and centroids of unit length"
    )
    hours: float | None = Field(
        None, gt=0, description=f"audio's worth of frames to fit on; {DEFAULT_HOURS:g} without `frames`"
    )
    frames: int | None = Field(None, ge=1, description="the same in frames of 20 ms; not with `hours`")
    balance: Balance = Field(
        "speaker", description="as many frames from every speaker, where speakers are known, or 'none'"
    )
    memory_gb: float = Field(
        8.0, ge=0, description="a sample that is larger stays on disk; the codebook is the same"
    )
    seed: Seed = 0
    restarts: int = Field(1, ge=1)
    max_iterations: int = Field(100, ge=1)
    tolerance: float = Field(1e-4, ge=0, description="stop when inertia falls by less, relatively")
    precision: EncoderPrecision = "float32"

    @model_validator(mode="before")
    @classmethod
    def _default_hours(cls, keys: Any) -> Any:
        given = isinstance(keys, dict) and (keys.get("hours") is not None or keys.get("frames") is not None)
        return keys if given or not isinstance(keys, dict) else {**keys, "hours": DEFAULT_HOURS}

    @model_validator(mode="after")
    def _keys_that_go_together(self) -> "ClusterConfig":
        if (self.features == "encoder") != (self.encoder is not None):
            raise ValueError("features = 'encoder' and encoder = RUN_FOLDER go together")
        if self.features == "encoder" and self.cmvn:
            raise ValueError("cmvn is a matter of MFCC; remove it")
        if self.features == "mfcc" and self.precision != "float32":
            raise ValueError("precision is a matter of encoders; remove it or give features = 'encoder'")
        if self.features == "mfcc" and self.layer != "best":  # the default, which a resolved config has
            raise ValueError("layer is a matter of encoders; remove it or give features = 'encoder'")
        if self.sweep is not None and (self.features == "mfcc" or self.layer != "best"):
            raise ValueError("sweep is what layer = 'best' of an encoder follows; remove it, or the layer")
        if self.hours is not None and self.frames is not None:
            raise ValueError("hours and frames both say how much to fit on; give one")
        if self.spherical and self.levels > 1:
            raise ValueError("spherical centroids are directions and leave no residual; take levels = 1")
        return self

    @property
    def budget(self) -> int:
        """Frames to fit on, if the split has as many."""
        if self.frames is not None:
            return self.frames
        return max(1, round((self.hours or DEFAULT_HOURS) * FRAMES_PER_HOUR))


def cluster(config: ClusterConfig) -> dict[str, Any]:
    """Fits `levels` × `num_classes` centroids and writes the codebook; returns statistics of the fit and the
    choice of a layer."""
    out, partial = Path(config.out), Path(config.out) / "partial"
    if is_complete(out):
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed right after its commit
    require_absent(out)
    began = time.monotonic()
    manifest = Manifest(config.manifest)
    sample = _draw(config, manifest)
    source, parents = open_features(config), {"manifest": manifest.fingerprint}
    if isinstance(source, EncoderSource):
        parents["encoder"] = source.fingerprint
    if config.sweep is not None:
        parents["sweep"] = read_meta(config.sweep, "layer-sweep")["fingerprint"]
    plan = _plan(config, source, parents)
    if (partial / "plan.json").is_file():
        keep_to_plan(partial, plan)
    require_space(partial, sample.size, source.dim)
    choice: dict[str, Any] = {}
    if isinstance(source, EncoderSource) and config.layer == "best":
        choice = _choose(config, manifest, source, partial)
        source.layer = choice["layer"]
    keep_to_plan(partial, plan)
    if choice:
        write_json(partial / "choice.json", choice)
    fit = _fit(config, load_sample(collect(source, sample, partial), config.memory_gb), partial)
    levels = [asdict(level) for level in fit.levels]
    statistics = levels[0] | {"frames": sample.size, "utterances": len(sample), **_speakers(sample), **choice}
    found, described = {**statistics, "levels": levels}, source.describe()
    write_codebook(config.out, fit.centroids, fit.mean, described, found, config.resolved(), parents)
    shutil.rmtree(partial)
    summary = {"num_classes": config.num_classes, "num_levels": config.levels, **statistics}
    if config.levels > 1:
        summary["inertia_by_level"] = {str(level): found["inertia"] for level, found in enumerate(levels)}
    return {**summary, "seconds": time.monotonic() - began}


def _fit(config: ClusterConfig, points: np.ndarray, partial: Path) -> Fit:
    """K-means of the sample; prints a note on empty classes."""
    options = config.model_dump(
        include={"num_classes", "seed", "levels", "spherical", "max_iterations", "tolerance", "restarts"}
    )
    fit = kmeans(points, state=partial / "kmeans.safetensors", **options)
    for level, found in enumerate(fit.levels):
        if found.num_empty:
            where = f" of level {level}" if config.levels > 1 else ""
            why = "the sample has fewer distinct frames" if found.converged else "stopped by max_iterations"
            console.print(
                f"{config.out}: {found.num_empty} of {config.num_classes} classes{where} are empty: {why}"
            )
    return fit


def require_frames(config: ClusterConfig) -> None:
    """Raises ValueError if the split has fewer frames than classes. Reads the manifest only."""
    _draw(config, Manifest(config.manifest))


def _draw(config: ClusterConfig, manifest: Manifest) -> Sample:
    """The frames to fit on. Raises ValueError if they are fewer than the classes."""
    sample = Sample(manifest.select(config.split), config.budget, config.seed, config.balance)
    if sample.size < config.num_classes:
        few = "hours or frames allow no more" if sample.size == config.budget else "the manifest has no more"
        raise ValueError(
            f"num_classes: {config.num_classes} classes cannot be fitted on {sample.size} frames, and {few}"
        )
    return sample


def open_features(config: ClusterConfig) -> FeatureSource:
    """The features to fit on; of layer 0 of an encoder while `layer` is yet to be chosen."""
    if config.encoder is None:
        return MfccSource(config.cmvn, config.workers)
    layer = 0 if config.layer == "best" else config.layer
    return open_encoder(config.encoder, layer, config, config.convention, config.precision)


def _plan(config: ClusterConfig, source: FeatureSource, parents: dict[str, str]) -> dict[str, Any]:
    """Everything that decides the codebook: fingerprints instead of paths, the device instead of "auto"."""
    ignored = {"out", "workers", "memory_gb", "manifest", "encoder", "sweep"}
    keys = {key: value for key, value in config.resolved().items() if key not in ignored}
    return {**keys, **parents, "device": source.device if isinstance(source, EncoderSource) else "cpu"}


def _choose(
    config: ClusterConfig, manifest: Manifest, source: EncoderSource, partial: Path
) -> dict[str, Any]:
    """`layer`, `chosen_by` and `sweep`: of an interrupted run, of a finished sweep, or judged now."""
    if (partial / "choice.json").is_file():
        return dict(json.loads((partial / "choice.json").read_text(encoding="utf-8")))
    if config.sweep is None:
        return choose_layer(
            manifest, config.split, config.select_split, source, config.num_classes, config.seed, partial
        )
    choice = read_choice(config.sweep)
    if choice["encoder"] != source.fingerprint:
        raise ValueError(
            f"sweep: {config.sweep} is of encoder {choice['encoder']}, and {config.encoder} is encoder "
            f"{source.fingerprint}; give this encoder's sweep, or a layer"
        )
    if choice["convention"] != source.convention:
        raise ValueError(
            f"sweep: {config.sweep} is of {choice['convention']!r} features, and convention is "
            f"{source.convention!r}; make them agree"
        )
    return {key: choice[key] for key in ("layer", "chosen_by", "sweep")}


def _speakers(sample: Sample) -> dict[str, Any]:
    """The number of speakers in the sample, and the smallest and largest share of its frames of one of
    them."""
    if sample.speaker_frames is None:
        return {}
    shares = sample.speaker_frames / sample.size
    return {
        "num_speakers": len(shares),
        "smallest_speaker_share": float(shares.min()),
        "largest_speaker_share": float(shares.max()),
    }
