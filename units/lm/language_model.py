"""The unit language model: packing of documents into batches, its loss, its likelihoods.

A document is read as BOS u1 .. un and predicts u1 .. un EOS, so EOS counts in every loss and score; with
several levels, steps are those of a pattern (units/corpus/patterns.py). A document longer than the context is
cut into consecutive pieces, each of which begins with the step before its first prediction: every symbol is
predicted once. Documents share rows of a batch but never see each other, and positions start at 0 in each
piece.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.progress import progress
from pretrain.training.checkpoint import load_weights
from pretrain.training.parallel import resolve_device
from pretrain.training.task import Loss
from units.corpus.patterns import Pattern
from units.corpus.sequences import DocumentSequences
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from units.lm.model import Decoder, DecoderConfig

IGNORED = -100
KIND = "unit-lm"


class Batch(NamedTuple):
    """Rows of whole pieces, padded at the end. With several streams, tokens (rows, time, streams) and targets
    (steps, streams)."""

    tokens: Tensor  # int64 (rows, time)
    positions: Tensor  # int64 (rows, time)
    documents: Tensor  # int64 (rows, time): number of the piece in the batch, -1 where padded
    steps: Tensor  # int64 (steps,): places in the flattened rows that have something to predict
    targets: Tensor  # int64 (steps,); IGNORED where a stream has nothing to predict


class Pieces:
    """The pieces of some documents: at most `context` predictions each, in document order. `owners` index the
    documents.

    `scored` tells for each stream which symbols are to be predicted, (symbols,) bool; by default all but
    padding are.
    """

    def __init__(
        self,
        sequences: DocumentSequences,
        pattern: Pattern,
        context: int,
        scored: list[np.ndarray] | None = None,
    ):
        self.sequences, self.pattern, self.scored = sequences, pattern, scored
        predictions = sequences.lengths
        counts = -(-predictions // context)
        self.owners = np.repeat(np.arange(len(predictions)), counts)
        self.starts = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * context
        self.lengths = np.minimum(np.repeat(predictions, counts) - self.starts, context)

    def __len__(self) -> int:
        return len(self.owners)

    def read(self, piece: int) -> np.ndarray:
        """(length + 1,) steps: the inputs are all but the last, the targets all but the first."""
        start = int(self.starts[piece])
        return self.sequences.read(int(self.owners[piece]), start, start + int(self.lengths[piece]) + 1)

    def batches(self, order: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
        return cut_evenly(order, self.lengths[order], batch_tokens)

    def collate(self, items: np.ndarray) -> Batch:
        """Pack pieces into rows as long as the longest of them, longest first into the first row with
        room."""
        sequences = [self.read(piece) for piece in items]
        rows = first_fit([len(sequence) - 1 for sequence in sequences])
        width = max(sum(len(sequences[i]) - 1 for i in row) for row in rows)
        streams = sequences[0].shape[1:]
        tokens = np.zeros((len(rows), width, *streams), np.int64)
        targets = np.full((len(rows), width, *streams), IGNORED, np.int64)
        positions, documents = (
            np.zeros((len(rows), width), np.int64),
            np.full((len(rows), width), -1, np.int64),
        )
        for number, row in enumerate(rows):
            at = 0
            for i in row:
                piece, size = sequences[i], len(sequences[i]) - 1
                place = (number, slice(at, at + size))
                tokens[place], targets[place] = piece[:-1], self._targets(piece[1:])
                positions[place], documents[place] = np.arange(size), i
                at += size
        flat = targets.reshape(len(rows) * width, *streams)
        steps = np.flatnonzero((flat != IGNORED).reshape(len(flat), -1).any(1))
        return Batch(*map(torch.from_numpy, (tokens, positions, documents, steps, flat[steps])))

    def _targets(self, sequence: np.ndarray) -> np.ndarray:
        """Steps with IGNORED in place of what is not to be predicted."""
        asked = self.pattern.predicted(sequence)
        if self.scored is not None:
            table = sequence.reshape(len(sequence), -1)
            wanted = [of_stream[table[:, stream]] for stream, of_stream in enumerate(self.scored)]
            asked = asked & np.stack(wanted, axis=1).reshape(sequence.shape)
        return np.where(asked, sequence, IGNORED)


def cut_evenly(order: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """`order` cut into consecutive runs of about `batch_tokens` steps each, as equal as may be; `lengths`
    (items,) are its steps."""
    ends = np.cumsum(lengths)
    count = max(1, round(ends[-1] / batch_tokens))
    middles = ends - lengths / 2
    groups = (middles * count / ends[-1]).astype(int)
    return np.split(order, np.flatnonzero(np.diff(groups)) + 1)


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

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, batch: Batch) -> Loss:
        hidden = self.decoder.hidden(batch.tokens, batch.positions, batch.documents).flatten(0, 1)[
            batch.steps
        ]
        streams = self.decoder.split(self.decoder.logits(hidden).float())
        targets = batch.targets.view(len(batch.steps), len(streams))
        total, correct = (
            hidden.new_zeros((), dtype=torch.float32),
            torch.zeros((), dtype=torch.int64, device=hidden.device),
        )
        for logits, wanted in zip(streams, targets.unbind(1), strict=True):
            total = total + F.cross_entropy(logits, wanted, reduction="sum", ignore_index=IGNORED)
            correct = correct + (logits.detach().argmax(-1) == wanted).sum()
        count = (targets != IGNORED).sum()
        return Loss(
            total, count, {"bits": (total.detach() / math.log(2), count), "accuracy": (correct, count)}
        )


class LoadedLM(NamedTuple):
    """A trained unit language model, ready to be asked."""

    decoder: Decoder  # in eval mode, on its device
    pattern: Pattern
    vocabulary: Vocabulary
    meta: dict[str, Any]  # of the run
    fingerprint: str  # of the weights
    folder: Path


def load_language_model(run: str | Path, corpus: UnitCorpus | None = None, device: str = "auto") -> LoadedLM:
    """The language model of a run.

    Errors: ValueError when the run is no unit language model, or learned other units than `corpus` has; both
    sides are named.
    """
    weights, meta, fingerprint = load_weights(run)
    if meta["kind"] != KIND:
        raise ValueError(
            f"{run}: is a run of kind {meta['kind']!r}; a {KIND!r} (verb train-lm) is needed here"
        )
    if "vocabulary" not in meta:
        raise ValueError(f"{run}: trained by an older wordless; train it again")
    vocabulary = Vocabulary.read(meta["vocabulary"])
    if corpus is not None:
        require_same_units(str(run), meta, vocabulary, corpus)
    pattern = Pattern(meta["pattern"], vocabulary.sizes)
    decoder = Decoder(DecoderConfig.model_validate(meta["decoder"], strict=False), pattern.vocabularies)
    decoder.load_state_dict({name.removeprefix("decoder."): weight for name, weight in weights.items()})
    return LoadedLM(
        decoder.to(resolve_device(device)).eval(), pattern, vocabulary, meta, fingerprint, Path(run)
    )


def require_same_units(run: str, meta: dict[str, Any], vocabulary: Vocabulary, corpus: UnitCorpus) -> None:
    """ValueError that names both sides unless the model of `run` learned the units that `corpus` has."""
    problems = [
        f"{name} {meta[name]!r} against {there!r}"
        for name, there in (("codebook", corpus.codebook), ("deduplicated", corpus.deduplicated))
        if meta[name] != there
    ]
    if differences := vocabulary.differences(corpus.vocabulary):
        problems.append(differences)
    if problems:
        raise ValueError(
            f"{run} was trained on other units than {corpus.folder} has: {'; '.join(problems)}; pack labels "
            "of the codebook that the model learned, as they were packed then, or train a model on these"
        )


@torch.inference_mode()
def log_likelihoods(
    decoder: Decoder,
    pattern: Pattern,
    sequences: DocumentSequences,
    batch_tokens: int,
    scored: list[np.ndarray] | None = None,
) -> np.ndarray:
    """Natural log likelihood of each document, its EOS included: float64 (documents,).

    Documents longer than the model's context are scored in consecutive pieces, each given the one step before
    it.
    """
    device = decoder.embed_tokens.weight.device
    pieces = Pieces(sequences, pattern, decoder.config.context, scored)
    sums = np.zeros(len(sequences))
    with progress("score", len(sequences), "document") as advance:
        for items in pieces.batches(np.argsort(-pieces.lengths, kind="stable"), batch_tokens):
            batch = pieces.collate(items)
            hidden = decoder.hidden(
                batch.tokens.to(device), batch.positions.to(device), batch.documents.to(device)
            )
            streams = decoder.split(decoder.logits(hidden.flatten(0, 1)[batch.steps.to(device)]).float())
            log_probabilities = torch.zeros(len(batch.steps), dtype=torch.float64)
            for logits, wanted in zip(
                streams, batch.targets.view(len(batch.steps), -1).to(device).unbind(1), strict=True
            ):
                taken = logits.log_softmax(-1).gather(1, wanted.clamp(min=0)[:, None])[:, 0].double()
                log_probabilities += torch.where(wanted == IGNORED, 0.0, taken).cpu()
            owners = batch.documents.flatten()[batch.steps]
            of_pieces = torch.zeros(len(items), dtype=torch.float64).index_add_(0, owners, log_probabilities)
            np.add.at(sums, pieces.owners[items], of_pieces.numpy())
            advance(len(np.unique(pieces.owners[items])))
    return sums
