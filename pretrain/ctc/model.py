"""The recogniser: an encoder and a linear head over a vocabulary, and its loss.

Connectionist temporal classification: Graves et al., 2006. The encoder reads waveforms or, as any other
input, discrete units (`front_end = "units"`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn

from pretrain.config import parse_config
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import BLANK, Vocabulary, collapse
from pretrain.data.packing import Layout
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.model.operations import dropout
from pretrain.training.checkpoint import load_weights
from pretrain.training.task import Loss

Layers = Literal["last", "weighted"]


class CTCBatch(NamedTuple):
    """A packed batch of utterances with their transcripts."""

    inputs: Tensor  # waveforms (samples,) float32 or units (frames,) or (frames, levels) int64
    layout: Layout
    targets: Tensor  # (batch, symbols) int64, 0 where padded
    num_targets: tuple[int, ...]  # of each utterance
    mask: Tensor | None = None  # (frames,) bool
    channel_mask: Tensor | None = None  # (batch, dim) bool
    # of the utterance, where these are windows of one (pretrain/model/totals.py)
    totals: dict[str, Tensor] | None = None

    @classmethod
    def untranscribed(
        cls, inputs: Tensor, layout: Layout, totals: dict[str, Tensor] | None = None
    ) -> "CTCBatch":
        return cls(inputs, layout, torch.zeros(0, dtype=torch.int64), (), totals=totals)


class Recognizer(nn.Module):
    """Encoder and a linear head over the vocabulary. The loss is summed over utterances and counted in target
    symbols.

    With `layers = "weighted"` the head reads a learned average of the input of the first layer and every
    layer's output, each normalised without parameters (SUPERB's, arXiv 2105.01051, section 3.2), in place of
    the last output.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        vocabulary: Vocabulary,
        *,
        final_dropout: float = 0.0,
        layers: Layers = "last",
    ):
        super().__init__()
        self.encoder = Encoder(encoder)
        self.vocabulary, self.final_dropout = vocabulary, final_dropout
        self.layer_weights = (
            nn.Parameter(torch.zeros(encoder.num_layers + 1)) if layers == "weighted" else None
        )
        self.head = nn.Linear(encoder.dim, len(vocabulary))

    def logits(self, batch: CTCBatch) -> Tensor:  # (batch, frames, classes)
        inputs, layout, totals = batch.inputs, batch.layout, batch.totals
        encoded = self.encoder.encode(
            inputs, layout, batch.mask, batch.channel_mask, totals=totals, layers=self.layers
        )
        return layout.pad(self.classify(encoded.last, encoded.layers))

    @property
    def layers(self) -> range:
        """The layers whose features the head reads in place of the last output; empty where it reads that."""
        return range(0 if self.layer_weights is None else len(self.layer_weights))

    def classify(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        """The logits (frames, classes) of the encoder's last output (frames, dim), or of its `outputs`."""
        if self.layer_weights is not None:
            # (layers + 1, frames, dim)
            normed = torch.stack([F.layer_norm(output, output.shape[1:]) for output in outputs])
            x = torch.tensordot(self.layer_weights.softmax(0).to(normed.dtype), normed, 1)
        logits: Tensor = self.head(dropout(x, self.final_dropout, self.training))
        return logits

    def forward(self, batch: CTCBatch) -> Loss:
        """The loss; outside training also the error rates of greedy decoding, in words (`wer`; of phones,
        each is one) and, but of phones, in characters (`cer`): edits over the corpus's words and characters,
        as jiwer counts them."""
        log_probs = self.logits(batch).float().log_softmax(2)  # (batch, frames, classes)
        lengths = (
            torch.tensor(batch.layout.num_frames),
            torch.tensor(batch.num_targets),
        )  # on the CPU, where they are needed
        total = F.ctc_loss(log_probs.transpose(0, 1), batch.targets, *lengths, blank=BLANK, reduction="sum")
        metrics = {} if self.training else self._error_rates(log_probs, batch)
        return Loss(total, total.new_full((), sum(batch.num_targets)), metrics)

    def _error_rates(self, log_probs: Tensor, batch: CTCBatch) -> dict[str, tuple[Tensor, Tensor]]:
        said = greedy(log_probs, batch.layout.num_frames, self.vocabulary)
        targets = batch.targets.tolist()
        wanted = [
            self.vocabulary.decode(row[:count]) for row, count in zip(targets, batch.num_targets, strict=True)
        ]
        pairs: dict[str, list[tuple[Sequence[str], Sequence[str]]]] = {
            "wer": [(a.split(), b.split()) for a, b in zip(wanted, said, strict=True)]
        }
        if self.vocabulary.spelling != "phones":
            pairs["cer"] = [*zip(wanted, said, strict=True)]
        return {
            name: (
                log_probs.new_tensor(sum(Levenshtein.distance(a, b) for a, b in both), dtype=torch.float64),
                log_probs.new_tensor(sum(len(a) for a, _ in both), dtype=torch.float64),
            )
            for name, both in pairs.items()
        }


def greedy(log_probs: Tensor, num_frames: Sequence[int], vocabulary: Vocabulary) -> list[str]:
    """Texts of the best path of each row of (batch, frames, classes)."""
    paths = log_probs.argmax(2).cpu().numpy()
    return [
        vocabulary.decode(collapse(path[:frames]).tolist())
        for path, frames in zip(paths, num_frames, strict=True)
    ]


class LoadedRecognizer(NamedTuple):
    """A recogniser to use: `text` says what it writes, `meta` the rest of its run, `fingerprint` its
    weights."""

    model: Recognizer
    vocabulary: Vocabulary
    text: TextConfig
    meta: dict[str, Any]
    fingerprint: str

    @property
    def codebook(self) -> str | None:
        """Of the units it reads (pretrain/ctc/unit_input.py); None for one that reads audio."""
        return self.meta.get("codebook")


def load_recognizer(run: str | Path, checkpoint: Literal["best", "last"] = "best") -> LoadedRecognizer:
    """The model of a `finetune` run in eval mode, of its best checkpoint by dev WER where one is known, or of
    its last."""
    return recognizer_of(run, *load_weights(run, best=checkpoint == "best"))


def recognizer_of(
    run: str | Path, weights: dict[str, Tensor], meta: dict[str, Any], fingerprint: str
) -> LoadedRecognizer:
    """The model of what `load_weights` read in `run`; ValueError where that is no `finetune` run."""
    if "vocabulary" not in meta:
        raise ValueError(f"{run}: a {meta['kind']!r} run has no vocabulary; give a `finetune` run")
    if not isinstance(meta["vocabulary"], dict):
        raise ValueError(
            f"{run}: was fine-tuned by an earlier wordless, whose vocabularies are not read; fine-tune again"
        )
    vocabulary = Vocabulary.from_meta(meta["vocabulary"])
    source = f"{run}/meta.json"
    layers: Layers = "weighted" if "layer_weights" in weights else "last"
    model = Recognizer(parse_config(EncoderConfig, meta["config_encoder"], source), vocabulary, layers=layers)
    model.load_state_dict(weights)
    return LoadedRecognizer(
        model.eval(), vocabulary, parse_config(TextConfig, meta["config"]["text"], source), meta, fingerprint
    )
