"""The config of the verb `transcribe`, and the table that it writes."""

from typing import Annotated, Literal, Self

import pyarrow as pa
from pydantic import Field, model_validator

from pretrain.config import Config, PathStr, Split
from pretrain.ctc.decoding import DecodingConfig

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("speaker", pa.string()),
        ("text", pa.string()),
        ("hypothesis", pa.string()),
        ("score", pa.float64()),
        (
            "nbest",
            pa.list_(
                pa.struct(
                    [
                        ("text", pa.string()),
                        ("score", pa.float64()),
                        ("ctc_score", pa.float64()),
                        ("lm_score", pa.float64()),
                    ]
                )
            ),
        ),
        (
            "words",
            pa.list_(pa.struct([("start", pa.float64()), ("end", pa.float64()), ("word", pa.string())])),
        ),
    ]
)


class TuneConfig(Config):
    """Weights of the language model that are tried on this split, every one with every other; the best by WER
    are used."""

    lm_weight: tuple[Annotated[float, Field(ge=0)], ...] = Field(min_length=1)
    word_score: tuple[float, ...] | None = Field(
        None, min_length=1, description="by default decoding.word_score alone"
    )


class TranscribeConfig(Config):
    """What is transcribed with which recogniser, and how."""

    out: PathStr
    manifest: PathStr
    split: Split = "test"
    recognizer: PathStr
    checkpoint: Literal["best", "last"] = Field("best", description="best: by dev WER, where one was kept")
    labels: PathStr | None = Field(None, description="the units to read, for a recogniser of units")
    decoding: DecodingConfig = DecodingConfig()
    tune: TuneConfig | None = Field(
        None, description="find decoding.lm_weight and word_score on this split: give a dev split"
    )
    words: bool = Field(False, description="times of the words, or phones, of each text")
    align: Literal["text"] | None = Field(
        None, description="text: times of the transcripts, as alignments.jsonl, which `index` reads"
    )
    max_seconds: float = Field(
        30.0, ge=1, description="longer recordings go through the encoder in windows of this length"
    )
    online: bool = Field(
        False, description="for a streaming recogniser: utterances one by one as if spoken; measures latency"
    )
    batch_seconds: float = Field(60.0, gt=0, description="audio that goes through the encoder together")
    workers: int = Field(2, ge=1, description="threads that decode audio ahead")
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on a GPU that has it"
    )

    @model_validator(mode="after")
    def _tunes_a_beam_search(self) -> Self:
        if self.tune is not None and self.decoding.lm is None:
            raise ValueError(
                'tune: finds the weights of a language model; give decoding = {method = "beam", lm = ...}'
            )
        return self
