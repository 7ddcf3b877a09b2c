"""The verb `train-lm`: a unit language model on a packed corpus, from random weights or from another model's,
or DPO on preferences."""

import math
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from pretrain.config import Config, PathStr, Split
from pretrain.store.hashes import sha256_file
from pretrain.training.engine import train
from pretrain.training.run import Run
from pretrain.training.task import OptimizerConfig, Task, TrainingConfig
from units.corpus.patterns import Pattern
from units.corpus.sequences import Sequences
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from units.lm.language_model import KIND, Batch, LanguageModel, Pieces, load_language_model
from units.lm.model import Decoder, DecoderConfig
from units.lm.preferences import DPOConfig, PreferenceTask
from units.lm.warm_start import fingerprint_of, initial_decoder, is_hugging_face

# What a run says of the units it learned, and where (for the floors beside its scores).
DESCRIBED = (
    "codebook",
    "vocabulary",
    "pattern",
    "loss_on",
    "deduplicated",
    "frame_rate_hz",
    "corpus",
    "split",
    "corpus_folder",
)

LossOn = Literal["all", "speech", "text"]


class LMOptimizerConfig(OptimizerConfig):
    """AdamW as language models take it."""

    lr: float = Field(3e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, ge=0)
    schedule: Literal["constant", "linear", "polynomial", "cosine", "tri_stage"] = "cosine"
    warmup_steps: int = Field(25, ge=0)


class TrainLMConfig(Config):
    """Train a unit language model on one split of a unit corpus."""

    corpus: PathStr | None = Field(None, description="a unit corpus; not with `dpo`, which learns from pairs")
    out: PathStr
    split: Split = "train"
    valid_split: Split = Field(
        "dev", description='its loss is reported while training, if the corpus has it; "": no validation'
    )
    batch_tokens: int = Field(2048, ge=1, description="predicted steps per update, about")
    pattern: Literal["parallel", "delay", "flatten", "coarse-first"] = Field(
        "delay", description="how the levels of a frame follow each other; of no matter with one stream"
    )
    loss_on: LossOn = Field(
        "all", description="of a corpus with text: which symbols are learnt; EOS always is"
    )
    init: PathStr | None = Field(
        None,
        description="begin with these weights: a Hugging Face folder (Llama, Mistral, Qwen2), embeddings "
        "replaced, or a run",
    )
    dpo: DPOConfig | None = Field(
        None,
        description="learn preferences instead of the corpus, from the run `init`, without dropout unless "
        "model.dropout is given",
    )
    model: DecoderConfig = DecoderConfig()
    training: TrainingConfig
    optimizer: LMOptimizerConfig = LMOptimizerConfig()

    @model_validator(mode="after")
    def _has_what_it_begins_with(self) -> Self:
        if self.init is not None and (
            given := self.model.model_fields_set - {"dropout", "context", "sliding_window"}
        ):
            raise ValueError(
                f"the model's size comes from `init`; leave out model.{', model.'.join(sorted(given))}"
            )
        if self.dpo is None and self.corpus is None:
            raise ValueError("give the `corpus` to learn")
        if self.dpo is not None and (self.init is None or self.corpus is not None):
            raise ValueError(
                "`dpo` learns from its pairs alone, beginning with a trained language model: give `init` and "
                "no `corpus`"
            )
        if self.dpo is not None and (
            given := self.model_fields_set & {"split", "valid_split", "pattern", "loss_on"}
        ):
            raise ValueError(f"`dpo` learns from its pairs alone; leave out {', '.join(sorted(given))}")
        return self


class LanguageModelTask(Task):
    """Next-unit prediction over packed pieces of documents."""

    model: LanguageModel
    unit = "token"

    def __init__(self, config: TrainLMConfig, corpus: UnitCorpus):
        self.config, self.pattern = config, Pattern(config.pattern, corpus.vocabulary.sizes)
        self.model = LanguageModel(new_decoder(config, self.pattern, corpus))
        scored = scored_symbols(corpus.vocabulary, self.pattern, config.loss_on)
        context = self.model.decoder.config.context

        def pieces(split: str | None) -> Pieces:
            return Pieces(
                Sequences(corpus, corpus.documents(split), self.pattern), self.pattern, context, scored
            )

        self.pieces = pieces(config.split)
        self.held_out = (
            pieces(config.valid_split)
            if config.valid_split is not None and corpus.has_split(config.valid_split)
            else None
        )
        self.worst, self.loss_before = math.log(max(self.pattern.vocabularies)) + 1, math.inf

    def blocks(self) -> list[torch.nn.Module]:
        return list(self.model.decoder.layers)

    def plan(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([self.config.training.seed, epoch]).permutation(len(self.pieces))
        return self.pieces.batches(order, self.config.batch_tokens)

    def collate(self, items: np.ndarray, epoch: int) -> Batch:
        return self.pieces.collate(items)

    def amount(self, items: np.ndarray) -> float:
        return float(self.pieces.lengths[items].sum())

    def plan_validation(self) -> list[np.ndarray]:
        if self.held_out is None:
            return []
        return self.held_out.batches(np.arange(len(self.held_out)), self.config.batch_tokens)

    def collate_validation(self, items: np.ndarray) -> Batch:
        assert self.held_out is not None
        return self.held_out.collate(items)

    def alarm(self, metrics: dict[str, float], step: int) -> str | None:
        loss, before = metrics["loss"], self.loss_before
        self.loss_before = loss
        # New embeddings under another model's weights may begin far off: they have the warm-up, and as long
        # as the loss falls.
        if loss < max(self.worst, before) or step <= self.config.optimizer.warmup_steps:
            return None
        return f"the loss {loss:.2f} is a nat above that of a uniform guess: diverged; lower optimizer.lr"


def new_decoder(config: TrainLMConfig, pattern: Pattern, corpus: UnitCorpus) -> Decoder:
    """The decoder before its first step, a function of the seed. A run that it begins with learned the same
    units in the same pattern."""
    torch.manual_seed(config.training.seed)
    if config.init is None:
        return Decoder(config.model, pattern.vocabularies)
    if not is_hugging_face(config.init):
        learned = load_language_model(config.init, corpus, device="cpu").pattern.name
        if pattern.num_levels > 1 and learned != pattern.name:
            raise ValueError(
                f"{config.init} learned its streams in the pattern {learned!r}, and `pattern` is "
                f"{pattern.name!r}: the same symbols stand "
                f'elsewhere; set pattern = "{learned}", or train without `init`'
            )
    return initial_decoder(config.init, pattern.vocabularies, config.model)


def scored_symbols(vocabulary: Vocabulary, pattern: Pattern, loss_on: LossOn) -> list[np.ndarray] | None:
    """Which symbols of each stream of the sequence the loss is about, (symbols,) bool each; None: all."""
    if loss_on == "all":
        return None
    if not vocabulary.text:
        raise ValueError(
            f'loss_on = "{loss_on}", but the corpus has no text: leave it out, or pack the labels with `text`'
        )
    wanted = [vocabulary.is_text(stream) == (loss_on == "text") for stream in range(len(vocabulary.sizes))]
    if pattern.num_streams < len(wanted):  # the sequence's one stream holds all of the corpus's
        wanted = [np.concatenate(wanted)]
    return [
        np.append(of_stream, np.ones(symbols - len(of_stream), bool))
        for of_stream, symbols in zip(wanted, pattern.vocabularies, strict=True)
    ]


def train_lm(config: TrainLMConfig) -> dict[str, Any]:
    """Train a unit language model; returns the run's summary (`valid_bits` is per predicted symbol, EOS among
    them)."""
    task: LanguageModelTask | PreferenceTask
    if config.dpo is None:
        assert config.corpus is not None
        corpus = UnitCorpus(config.corpus)
        task = LanguageModelTask(config, corpus)
        described = {
            "codebook": corpus.codebook,
            "vocabulary": corpus.vocabulary.model_dump(mode="json"),
            "pattern": config.pattern,
            "deduplicated": corpus.deduplicated,
            "frame_rate_hz": corpus.frame_rate_hz,
            "corpus": corpus.fingerprint,
            "split": config.split,
            "corpus_folder": config.corpus,
            "loss_on": config.loss_on,
        }
        parents = {"corpus": corpus.fingerprint} | (
            {} if config.init is None else {"initial": fingerprint_of(config.init)}
        )
    else:
        assert config.init is not None
        begun = load_language_model(config.init, device="cpu")
        # Dropout would part the model from its reference before the first step.
        sizes = (
            config.model
            if "dropout" in config.model.model_fields_set
            else config.model.model_copy(update={"dropout": 0.0})
        )
        decoder = initial_decoder(config.init, begun.pattern.vocabularies, sizes)
        task = PreferenceTask(
            decoder, begun.vocabulary, begun.pattern, config.dpo, config.training, config.batch_tokens
        )
        described = {key: begun.meta[key] for key in DESCRIBED}
        files = {"pairs": config.dpo.pairs, "valid_pairs": config.dpo.valid_pairs}
        hashes = {name: sha256_file(Path(path))[:16] for name, path in files.items() if path is not None}
        parents = {"initial": begun.fingerprint, **hashes}
    decoder = task.model.decoder
    num_parameters = sum(parameter.numel() for parameter in decoder.parameters())
    return train(
        Run(
            task,
            out=config.out,
            kind=KIND,
            training=config.training,
            optimizer=config.optimizer,
            config=config.resolved(),
            parents=parents,
            extra={**described, "decoder": decoder.config.resolved(), "num_parameters": num_parameters},
        )
    )
