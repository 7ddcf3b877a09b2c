"""How features are computed, for all verbs that need some: the keys they share, and a codebook's source."""

from typing import Annotated

from pydantic import Field

from pretrain.config import Config
from pretrain.model.config import LayerConvention
from quantize.codebook import Codebook
from quantize.features import EncoderSource, FeatureSource, MfccSource, Precision, open_encoder_source

EncoderPrecision = Annotated[
    Precision, Field(description="of the encoder's matrix products; int8 on a CPU only")
]
"""For configs whose features may be of less than float32."""


class Extraction(Config):
    """Keys of every config that computes features. None changes them beyond rounding."""

    device: str = "auto"
    batch_seconds: float | None = Field(
        None, ge=0, description="audio per batch on a GPU; a CPU takes utterances one by one"
    )
    workers: int = Field(2, ge=1, description="threads that decode, in each process")


def open_encoder(
    run: str,
    layer: int,
    extraction: Extraction,
    convention: LayerConvention = "residual",
    precision: Precision = "float32",
) -> EncoderSource:
    """The features of one layer of the encoder of a run folder."""
    options = {name: getattr(extraction, name) for name in Extraction.model_fields}
    return open_encoder_source(run, layer, convention=convention, precision=precision, **options)


def open_source(
    codebook: Codebook, encoder: str | None, extraction: Extraction, precision: Precision = "float32"
) -> FeatureSource:
    """The features that a codebook quantises; `encoder` is the run folder of its encoder.

    Raises ValueError if the codebook needs another encoder, or none.
    """
    wanted, folder = codebook.source, codebook.folder
    if wanted["kind"] == "mfcc":
        if encoder is not None:
            raise ValueError(f"encoder: {folder} quantises MFCC; remove encoder = {encoder!r}")
        if precision != "float32":
            raise ValueError(f"precision: {folder} quantises MFCC; remove precision = {precision!r}")
        return MfccSource(wanted["cmvn"], extraction.workers)
    if encoder is None:
        raise ValueError(
            f"encoder: {folder} quantises layer {wanted['layer']} of encoder {wanted['encoder']}; give its "
            "run folder"
        )
    convention = wanted.get("convention", "residual")
    source = open_encoder(encoder, wanted["layer"], extraction, convention, precision)
    if source.fingerprint != wanted["encoder"]:
        raise ValueError(
            f"encoder: {folder} was fitted on encoder {wanted['encoder']}, and {encoder} is encoder "
            f"{source.fingerprint}; give the run it was fitted on, or fit a codebook on this one"
        )
    return source
