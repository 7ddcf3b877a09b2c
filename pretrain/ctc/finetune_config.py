"""The config of the verb `finetune`."""

import json
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pretrain.config import Config, PathStr, Seed, Split
from pretrain.ctc.subsets import (
    Budget,
)
from pretrain.ctc.task import CTCConfig
from pretrain.ctc.text import TextConfig
from pretrain.ctc.unit_input import UnitConfig
from pretrain.data.batches import BatchConfig
from pretrain.model.config import EncoderConfig, StreamingConfig
from pretrain.training.task import OptimizerConfig, TrainingConfig


class CTCBatchConfig(BatchConfig):
    """How much audio goes together. Nothing is cropped in fine-tuning: a transcript is of the whole
    utterance."""

    crop_seconds: float = Field(
        30.0, ge=0.025, description="longer utterances are left out of training (counted)"
    )


class CTCOptimizerConfig(OptimizerConfig):
    """The engine's AdamW with wav2vec 2.0's fine-tuning schedule as its default."""

    schedule: Literal["constant", "linear", "polynomial", "cosine", "tri_stage"] = "tri_stage"
    weight_decay: float = Field(0.0, ge=0)


class CTCTrainingConfig(TrainingConfig):
    """The engine's, with the checkpoint of the best dev WER (of equal ones, the lowest loss) kept beside the
    last."""

    keep_best: bool = Field(True, description="keep the checkpoint with the best WER on valid_split, too")


class FinetuneConfig(Config):
    """Which transcripts, which encoder, and how it is fine-tuned."""

    out: PathStr
    manifest: PathStr
    split: Split = "train"
    valid_manifest: PathStr | None = Field(
        None, description="where valid_split is, if not in `manifest` (a labelled subset has none)"
    )
    valid_split: Split = Field(
        "dev",
        description="judges checkpoints; without being asked for, none where there is no such split (said in "
        'the summary); "": none, '
        "or all of valid_manifest",
    )
    budget: Budget = Field(
        "all", description="labelled audio that is used: 90s, 10min, 1h, 25% or all; a seeded draw"
    )
    budget_at_least: Budget | None = Field(
        None,
        description="where less than the budget is transcribed, but as much as this: all of it; without this "
        "key an error",
    )
    budget_seed: Seed = Field(0, description="of the draw; equal seeds give nested budgets")
    bad_transcripts: Literal["error", "quarantine"] = Field(
        "error", description="quarantine: leave them out, listed"
    )
    encoder: PathStr | None = Field(None, description="a pretraining run, or a recogniser to go on from")
    init: Literal["pretrained", "recognizer", "random"] = Field(
        "pretrained",
        description="recognizer: the head and vocabulary of `encoder`, too; random: its architecture, fresh "
        "weights",
    )
    streaming: StreamingConfig | None = Field(
        None, description="chunked attention; by default as `encoder` has it"
    )
    labels: PathStr | None = Field(None, description="units to read in place of audio; instead of an encoder")
    units: UnitConfig = UnitConfig()
    unit_encoder: EncoderConfig | None = Field(
        None, description="with labels: the encoder over them; by default a small one"
    )
    characters: str | None = Field(
        None, description="the vocabulary; taken from the transcripts of split and valid_split when not given"
    )
    text: TextConfig = TextConfig()
    ctc: CTCConfig = CTCConfig()
    batches: CTCBatchConfig = CTCBatchConfig()
    optimizer: CTCOptimizerConfig = CTCOptimizerConfig()
    training: CTCTrainingConfig

    @field_validator("unit_encoder", mode="before")
    @classmethod
    def _reads_units(cls, given: Any) -> Any:
        """What an `architecture` fills in gives way to what units need; what is asked for by name must agree
        with it."""
        for key, only in (("front_end", "units"), ("normalize_waveform", False)):
            if isinstance(given, dict) and given.get(key, only) != only:
                raise ValueError(
                    f"{key} = {json.dumps(given[key])}: it reads `labels` and no audio; leave the key out"
                )
        return given

    @model_validator(mode="after")
    def _reads_one_thing(self) -> Self:
        if (self.encoder is None) == (self.labels is None):
            raise ValueError("give `encoder`, for audio, or `labels`, for units: one of them")
        if self.labels is None and (given := sorted(self.model_fields_set & {"unit_encoder", "units"})):
            raise ValueError(f"{' and '.join(given)} are about `labels`, which are not given")
        if self.labels is not None and "init" in self.model_fields_set and self.init != "random":
            raise ValueError(
                f"init = {self.init!r}: an encoder over `labels` begins with random weights; leave it out"
            )
        return self
