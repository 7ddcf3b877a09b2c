"""The unit language model: packing of documents into batches, the task for the training engine, the verb `train-lm`.

A document is read as BOS u1 .. un and predicts u1 .. un EOS, so EOS counts in every loss and score. A document longer than the
context is cut into consecutive pieces, each of which begins with the unit before its first prediction: every symbol is predicted
once. Documents share rows of a batch but never see each other, and positions start at 0 in each piece.
"""

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.checkpoint import load_weights
from pretrain.config import Config
from pretrain.engine import Loss, OptimizerConfig, Task, TrainingConfig, train
from units.corpus import UnitCorpus
from units.model import Decoder, DecoderConfig

IGNORED = -100
KIND = "unit-lm"


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

    corpus: str
    out: str
    split: str | None = "train"
    valid_split: str | None = Field("dev", description="its loss is reported while training, if the corpus has it")
    batch_tokens: int = Field(2048, ge=1, description="predicted tokens per update, about")
    model: DecoderConfig = DecoderConfig()
    training: TrainingConfig
    optimizer: LMOptimizerConfig = LMOptimizerConfig()


class Batch(NamedTuple):
    """Rows of whole pieces, padded at the end; all int64 (rows, time)."""

    tokens: Tensor
    targets: Tensor  # IGNORED where padded
    positions: Tensor
    documents: Tensor  # number of the piece in the batch, -1 where padded


class Pieces:
    """The pieces of some documents: at most `context` predictions each, in document order. `owners` index `documents`."""

    def __init__(self, corpus: UnitCorpus, documents: np.ndarray, context: int):
        self.corpus, self.documents = corpus, documents
        predictions = corpus.lengths[documents] + 1
        counts = -(-predictions // context)
        self.owners = np.repeat(np.arange(len(documents)), counts)
        self.starts = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * context
        self.lengths = np.minimum(np.repeat(predictions, counts) - self.starts, context)

    def __len__(self) -> int:
        return len(self.owners)

    def read(self, piece: int) -> np.ndarray:
        """(length + 1,) symbols: the inputs are all but the last, the targets all but the first."""
        start = int(self.starts[piece])
        return self.corpus.sequence(self.documents[self.owners[piece]], start, start + int(self.lengths[piece]) + 1)

    def batches(self, order: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
        """`order` cut into consecutive runs of about `batch_tokens` predictions each, as equal as may be."""
        ends = np.cumsum(self.lengths[order])
        count = max(1, round(ends[-1] / batch_tokens))
        middles = ends - self.lengths[order] / 2
        groups = (middles * count / ends[-1]).astype(int)
        return np.split(order, np.flatnonzero(np.diff(groups)) + 1)

    def collate(self, items: np.ndarray) -> Batch:
        """Pack pieces into rows as long as the longest of them, longest first into the first row with room."""
        sequences = [self.read(piece) for piece in items]
        rows = first_fit([len(sequence) - 1 for sequence in sequences])
        width = max(sum(len(sequences[i]) - 1 for i in row) for row in rows)
        fields = [np.full((len(rows), width), fill, np.int64) for fill in (0, IGNORED, 0, -1)]
        for number, row in enumerate(rows):
            at = 0
            for i in row:
                size = len(sequences[i]) - 1
                columns = (sequences[i][:-1], sequences[i][1:], np.arange(size), np.full(size, i))
                for field, values in zip(fields, columns, strict=True):
                    field[number, at : at + size] = values
                at += size
        return Batch(*[torch.from_numpy(field) for field in fields])


def first_fit(lengths: list[int]) -> list[list[int]]:
    """First-fit decreasing: indices of `lengths` in rows, each summing to at most the longest length."""
    capacity = max(lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), None)
        if row is None:
            rows.append([])
            room.append(capacity)
            row = len(rows) - 1
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


class LanguageModel(nn.Module):
    """A decoder with its loss: cross-entropy in nats, summed over the predicted symbols, EOS among them."""

    def __init__(self, config: DecoderConfig, vocabulary_size: int):
        super().__init__()
        self.decoder = Decoder(config, vocabulary_size)

    def forward(self, batch: Batch) -> Loss:
        chosen = batch.targets != IGNORED
        logits = self.decoder.logits(self.decoder.hidden(batch.tokens, batch.positions, batch.documents)[chosen]).float()
        targets = batch.targets[chosen]
        total, count = F.cross_entropy(logits, targets, reduction="sum"), chosen.sum()
        correct = (logits.detach().argmax(-1) == targets).sum()
        return Loss(total, count, {"bits": (total.detach() / math.log(2), count), "accuracy": (correct, count)})


class LanguageModelTask(Task):
    """Next-unit prediction over packed pieces of documents."""

    model: LanguageModel
    unit = "token"

    def __init__(self, config: TrainLMConfig, corpus: UnitCorpus):
        torch.manual_seed(config.training.seed)
        self.model = LanguageModel(config.model, corpus.vocabulary_size)
        self.config = config
        self.pieces = Pieces(corpus, corpus.documents(config.split), config.model.context)
        self.held_out = None
        if config.valid_split is not None and config.valid_split in corpus.splits:
            self.held_out = Pieces(corpus, corpus.documents(config.valid_split), config.model.context)
        self.worst = math.log(corpus.vocabulary_size) + 1

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
        if metrics["loss"] < self.worst:
            return None
        return f"the loss {metrics['loss']:.2f} is a nat above that of a uniform guess: diverged; lower optimizer.lr"


def train_lm(config: TrainLMConfig) -> dict[str, Any]:
    """Train a unit language model; returns the run's summary (`valid_bits` is per predicted symbol, EOS among them)."""
    corpus = UnitCorpus(config.corpus)
    task = LanguageModelTask(config, corpus)
    described = {
        "codebook": corpus.codebook, "num_units": corpus.num_units, "deduplicated": corpus.deduplicated,
        "frame_rate_hz": corpus.frame_rate_hz, "corpus": corpus.fingerprint,
        "num_parameters": sum(parameter.numel() for parameter in task.model.parameters()),
    }  # fmt: skip
    return train(
        task, out=config.out, kind=KIND, training=config.training, optimizer=config.optimizer,
        config=config.resolved(), parents={"corpus": corpus.fingerprint}, extra=described,
    )  # fmt: skip


def load_language_model(run: str | Path, corpus: UnitCorpus, device: str = "auto") -> tuple[Decoder, dict[str, Any], str]:
    """The decoder of a run in eval mode, the run's meta data and its weights' fingerprint.

    Errors: ValueError when the run is no unit language model, or learned the units of another codebook than `corpus` has.
    """
    weights, meta, fingerprint = load_weights(run)
    if meta["kind"] != KIND:
        raise ValueError(f"{run}: is a run of kind {meta['kind']!r}; a {KIND!r} (verb train-lm) is needed here")
    for name, theirs in (("codebook", corpus.codebook), ("num_units", corpus.num_units), ("deduplicated", corpus.deduplicated)):
        if meta[name] != theirs:
            raise ValueError(
                f"{run} was trained on units with {name} {meta[name]!r}, but {corpus.folder} has {name} {theirs!r}; "
                "pack labels of the codebook that the model learned, or train a model on these"
            )
    decoder = Decoder(DecoderConfig.model_validate(meta["config"]["model"]), corpus.vocabulary_size)
    decoder.load_state_dict({name.removeprefix("decoder."): weight for name, weight in weights.items()})
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return decoder.to(device).eval(), meta, fingerprint
