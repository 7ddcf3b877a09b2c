"""Direct preference optimisation (DPO; Rafailov et al., 2023) of a unit language model, as Align-SLM has it
for speech (Lin et al., 2024).

The data are JSON lines, each a prompt of units and two continuations of it, the better one and the worse one:

    {"prompt": [17, 4, 9], "chosen": [3, 12], "rejected": [3, 3, 40]}

Units are plain (deduplicated if the model's corpus is; with several levels a list [level 0, level 1, …] for
each), the model's own vocabulary merges them, prompt and continuation each for itself, and EOS ends both
continuations and counts in their likelihood.

With π the model, ref the model before its first step, y the chosen (w) or rejected (l) continuation of the
prompt x, and

    reward(y) = β (log π(y | x) - log ref(y | x)),        margin = reward(w) - reward(l),

a pair's loss is -(1 - ε) log σ(margin) - ε log σ(-margin) - α log π(w | x) / |w|: ε is label smoothing (cDPO;
Mitchell, 2023), α the weight of likelihood itself, per predicted symbol (Pang et al., 2024).
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import Config, PathStr
from pretrain.progress import progress
from pretrain.store.plain_text import read_text
from pretrain.training.parallel import World
from pretrain.training.step import autocast, to_device
from pretrain.training.task import Loss, Task, TrainingConfig
from units.corpus.bpe import Merger
from units.corpus.patterns import Pattern
from units.corpus.sequences import ListedSequences
from units.corpus.vocabulary import Vocabulary
from units.lm.language_model import IGNORED, Batch, Pieces, cut_evenly
from units.lm.model import Decoder

PARTS = ("prompt", "chosen", "rejected")


class DPOConfig(Config):
    """Learn from pairs of continuations which are preferred."""

    pairs: PathStr = Field(description="JSON lines with prompt, chosen and rejected")
    valid_pairs: PathStr | None = Field(None, description="held-out pairs, reported while training")
    beta: float = Field(0.1, gt=0, description="how dearly the model pays for leaving the one it began as")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs that may be the wrong way round (cDPO)"
    )
    likelihood_weight: float = Field(
        0.0, ge=0, description="of the chosen continuation's negative log likelihood per symbol"
    )


class Preferences:
    """The pairs of a file as sequences of the model: 2 i is the chosen one of pair i, 2 i + 1 the rejected
    one.

    Errors: ValueError naming the file and line: what is no such record, units outside the vocabulary, an
    empty continuation, what is longer than the model's `context`.
    """

    def __init__(self, path: str | Path, vocabulary: Vocabulary, pattern: Pattern, context: int):
        self.merger, self.pattern, self.context = Merger(vocabulary), pattern, context
        sequences, answers = ListedSequences(), []
        for where, record in _records(path):
            codes = {part: self._codes(record[part], f"{where}: {part}") for part in PARTS}
            for part in ("chosen", "rejected"):
                if not len(codes[part]):
                    raise ValueError(f"{where}: {part} is empty; a continuation has a unit at least")
                sequence, answer = self._sequence(codes["prompt"], codes[part])
                if len(sequence) - 1 > context:
                    raise ValueError(
                        f"{where}: the prompt's {len(codes['prompt'])} and the {part} continuation's "
                        f"{len(codes[part])} symbols make {len(sequence) - 1} steps; the model's context is "
                        f"{context}"
                    )
                sequences.append(sequence)
                answers.append(answer)
        if not sequences:
            raise ValueError(f"{path}: has no pairs")
        self.pieces = Pieces(sequences, pattern, context)
        self.lengths = self.pieces.lengths.reshape(-1, 2).sum(1)  # (pairs,) steps
        self._answers = np.concatenate(answers)  # (steps of all sequences, Q) bool
        self._starts = np.cumsum(self.pieces.lengths) - self.pieces.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def batches(self, order: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
        return cut_evenly(order, self.lengths[order], batch_tokens)

    def collate(self, pairs: np.ndarray) -> Batch:
        """Both sequences of each pair, packed as documents; only the continuations' symbols and EOS are
        targets."""
        items = np.stack([2 * pairs, 2 * pairs + 1], axis=1).ravel()
        batch = self.pieces.collate(items)
        steps = batch.steps.numpy()
        documents, positions = (
            batch.documents.flatten()[steps].numpy(),
            batch.positions.flatten()[steps].numpy(),
        )
        wanted = self._answers[self._starts[items[documents]] + positions]  # (steps, Q)
        targets = np.where(wanted.reshape(batch.targets.shape), batch.targets, IGNORED)
        some = wanted.any(1)
        return batch._replace(steps=torch.from_numpy(steps[some]), targets=torch.from_numpy(targets[some]))

    def _codes(self, value: Any, where: str) -> np.ndarray:
        """The model's symbols, int64 (n,) or (n, levels)."""
        levels = self.pattern.num_levels
        shape = () if levels == 1 else (levels,)
        wanted = "a list of units" if levels == 1 else f"a list with a list of {levels} units for each time"
        try:
            units = np.array(value) if value else np.zeros((0, *shape), np.int64)
        except ValueError:  # lists of different lengths
            raise ValueError(f"{where}: {wanted} is needed") from None
        if not isinstance(value, list) or units.dtype.kind != "i" or units.shape[1:] != shape:
            raise ValueError(f"{where}: {wanted} is needed, not {json.dumps(value)[:60]}")
        try:
            codes = self.merger.encode(units) if levels == 1 else units
            self.pattern.arrange(codes)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return codes

    def _sequence(self, prompt: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sequence of prompt and answer, and which of the cells after its first row the answer and EOS
        are, (steps - 1, Q)."""
        sequence = self.pattern.arrange(np.concatenate([prompt, answer]))
        asked = self.pattern.predicted(sequence).reshape(len(sequence), -1)
        steps, streams = np.broadcast_arrays(*self.pattern.cells(len(prompt) + len(answer)))
        asked[steps[: len(prompt)], streams[: len(prompt)]] = False
        return sequence, asked[1:]


class PreferenceBatch(NamedTuple):
    """A `Batch` whose documents are pairs, the chosen one first, with the reference's log likelihoods float32
    (pairs, 2)."""

    tokens: Tensor
    positions: Tensor
    documents: Tensor
    steps: Tensor
    targets: Tensor
    reference: Tensor


class PreferenceModel(nn.Module):
    """A decoder with the loss of DPO, summed over pairs. Its weights are named as those of
    `LanguageModel`."""

    def __init__(self, decoder: Decoder, config: DPOConfig):
        super().__init__()
        self.decoder, self.config = decoder, config

    def forward(self, batch: PreferenceBatch) -> Loss:
        likelihoods, symbols = answer_log_likelihoods(
            self.decoder, Batch(*batch[:-1]), 2 * len(batch.reference)
        )
        policy, symbols = likelihoods.view(-1, 2), symbols.view(-1, 2)  # (pairs, 2)
        rewards = self.config.beta * (policy - batch.reference)
        margins, smoothing = rewards[:, 0] - rewards[:, 1], self.config.label_smoothing
        loss = -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)
        total = (loss - self.config.likelihood_weight * policy[:, 0] / symbols[:, 0]).sum()
        count = torch.tensor(len(margins), device=margins.device)
        chosen_bits = -policy[:, 0].detach().sum() / math.log(2)
        told = {
            "margin": margins,
            "accuracy": (margins > 0).float(),
            "chosen_reward": rewards[:, 0],
            "rejected_reward": rewards[:, 1],
        }
        metrics = {name: (values.detach().sum(), count) for name, values in told.items()}
        return Loss(total, count, {**metrics, "chosen_bits": (chosen_bits, symbols[:, 0].sum())})


def answer_log_likelihoods(decoder: Decoder, batch: Batch, num_documents: int) -> tuple[Tensor, Tensor]:
    """Natural log likelihood of each document's targets, float32 (documents,), and how many they are, int64
    (documents,)."""
    hidden = decoder.hidden(batch.tokens, batch.positions, batch.documents).flatten(0, 1)[batch.steps]
    streams = decoder.split(decoder.logits(hidden).float())
    targets = batch.targets.view(len(batch.steps), len(streams))
    of_steps = sum(
        -F.cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORED)
        for logits, wanted in zip(streams, targets.unbind(1), strict=True)
    )
    assert isinstance(of_steps, Tensor)
    owners = batch.documents.flatten()[batch.steps]
    likelihoods = of_steps.new_zeros(num_documents).index_add(0, owners, of_steps)
    counts = owners.new_zeros(num_documents).index_add(0, owners, (targets != IGNORED).sum(1))
    return likelihoods, counts


class PreferenceTask(Task):
    """DPO of `decoder`, which is its own reference: what it says of the pairs is computed here, once, before
    it learns.

    Log lines have `margin` and `accuracy` (share of pairs whose chosen continuation gained more than the
    rejected one), the two mean rewards, and `chosen_bits` per symbol, which tells when chosen continuations
    lose likelihood along with the rejected ones.
    """

    model: PreferenceModel
    unit = "token"

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        pattern: Pattern,
        config: DPOConfig,
        training: TrainingConfig,
        batch_tokens: int,
    ):
        self.model = PreferenceModel(decoder, config)
        self.training, self.batch_tokens = training, batch_tokens
        context = decoder.config.context
        self.pairs = Preferences(config.pairs, vocabulary, pattern, context)
        self.held_out = (
            None
            if config.valid_pairs is None
            else Preferences(config.valid_pairs, vocabulary, pattern, context)
        )
        self.reference = self._log_likelihoods(self.pairs)
        self.held_out_reference = None if self.held_out is None else self._log_likelihoods(self.held_out)

    def blocks(self) -> list[nn.Module]:
        return list(self.model.decoder.layers)

    def plan(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([self.training.seed, epoch]).permutation(len(self.pairs))
        return self.pairs.batches(order, self.batch_tokens)

    def collate(self, items: np.ndarray, epoch: int) -> PreferenceBatch:
        return PreferenceBatch(*self.pairs.collate(items), self.reference[items])

    def amount(self, items: np.ndarray) -> float:
        return float(self.pairs.lengths[items].sum())

    def plan_validation(self) -> list[np.ndarray]:
        return (
            []
            if self.held_out is None
            else self.held_out.batches(np.arange(len(self.held_out)), self.batch_tokens)
        )

    def collate_validation(self, items: np.ndarray) -> PreferenceBatch:
        assert self.held_out is not None
        assert self.held_out_reference is not None
        return PreferenceBatch(*self.held_out.collate(items), self.held_out_reference[items])

    @torch.no_grad()
    def _log_likelihoods(self, preferences: Preferences) -> Tensor:
        """Of the model as it is, in the precision it trains in: float32 (pairs, 2)."""
        device = World.join(self.training.device, self.training.collective_timeout_seconds).device
        decoder, found = self.model.decoder.to(device).eval(), torch.zeros(len(preferences), 2)
        with (
            progress("reference", len(preferences), "pair") as advance,
            autocast(self.training.precision, device),
        ):
            for items in preferences.batches(
                np.argsort(-preferences.lengths, kind="stable"), self.batch_tokens
            ):
                batch = to_device(preferences.collate(items), device)
                found[items] = answer_log_likelihoods(decoder, batch, 2 * len(items))[0].view(-1, 2).cpu()
                advance(len(items))
        self.model.decoder.train()
        return found


def _records(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """(file and line, record) of a file of JSON lines; blank lines are passed over."""
    try:
        lines = read_text(path).split("\n")  # splitlines would part a text at U+2028, too
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as a file of JSON lines: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict) or (missing := [part for part in PARTS if part not in record]):
            lacks = f"lacks {', '.join(missing)}" if isinstance(record, dict) else "is no object"
            raise ValueError(
                f'{where}: {lacks}; {{"prompt": [units], "chosen": [units], "rejected": [units]}} is needed'
            )
        records.append((where, record))
    return records
