"""Connectionist temporal classification on top of an encoder: vocabulary, model, training task.

Graves et al., 2006; the fine-tuning recipe is wav2vec 2.0's (arXiv 2006.11477, section 4.3 and appendix B): the front end stays
frozen, the encoder for the first `freeze_steps`, spans of time and channels are masked.
"""

import unicodedata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.batches import SpeechBatches, SpeechTask, pad
from pretrain.checkpoint import load_weights
from pretrain.config import Config, parse_config
from pretrain.encoder import Encoder, EncoderConfig
from pretrain.engine import Loss
from pretrain.kernels import dropout
from pretrain.masking import span_mask
from pretrain.packing import Layout, pack

BLANK = 0
SPACE = "|"


class TextConfig(Config):
    """How transcripts are normalised, for training and for scoring alike; always Unicode NFC with single spaces, and no `|`."""

    case: Literal["lower", "upper", "keep"] = "lower"
    punctuation: Literal["remove", "keep"] = "remove"

    def normalize(self, text: str) -> str:
        text = text.replace(SPACE, " ").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")  # the sign for the space; don’t is don't
        text = {"lower": text.lower(), "upper": text.upper(), "keep": text}[self.case]
        text = unicodedata.normalize("NFC", text)  # after the case, which can take characters apart
        if self.punctuation == "remove":  # an apostrophe between letters belongs to the word
            kept = [c if c == "'" or not unicodedata.category(c).startswith("P") else " " for c in text]
            text = "".join(kept)
        return " ".join(text.split())


class Vocabulary:
    """Characters; 0 is the blank, the space between words is written `|`."""

    def __init__(self, symbols: list[str]):
        self.symbols = symbols
        self._numbers = {symbol: number for number, symbol in enumerate(symbols, start=1)}

    @classmethod
    def of(cls, texts: list[str]) -> "Vocabulary":
        """Every character of normalised `texts`, sorted."""
        return cls(sorted({SPACE if c == " " else c for text in texts for c in text}))

    def __len__(self) -> int:
        return len(self.symbols) + 1

    def unknown(self, text: str) -> set[str]:
        return {c for c in text if (SPACE if c == " " else c) not in self._numbers}

    def encode(self, text: str) -> np.ndarray:
        return np.array([self._numbers[SPACE if c == " " else c] for c in text], dtype=np.int64)

    def decode(self, path: np.ndarray) -> str:
        """A best path of class numbers per frame to text: repeats merged, blanks removed."""
        kept = path[np.r_[True, path[1:] != path[:-1]]] if len(path) else path
        return "".join(self.symbols[number - 1] for number in kept[kept != BLANK].tolist()).replace(SPACE, " ").strip()


class CTCConfig(Config):
    """What is frozen, dropped and masked in fine-tuning."""

    freeze_steps: int = Field(0, ge=0, description="steps during which only the head learns")
    freeze_front_end: bool = True
    final_dropout: float = Field(0.1, ge=0, lt=1)
    mask_start_probability: float = Field(0.05, ge=0, lt=1)
    mask_length: int = Field(10, ge=1)
    mask_channel_probability: float = Field(0.0016, ge=0, lt=1)
    mask_channel_length: int = Field(64, ge=1)


class CTCBatch(NamedTuple):
    """A packed batch of utterances with their transcripts."""

    waveforms: Tensor  # (samples,) float32
    layout: Layout
    targets: Tensor  # (batch, characters) int64, 0 where padded
    num_targets: tuple[int, ...]  # of each utterance
    mask: Tensor | None  # (frames,) bool
    channel_mask: Tensor | None  # (batch, dim) bool


class Recognizer(nn.Module):
    """Encoder and a linear head over the vocabulary. The loss is summed over utterances and counted in target characters."""

    def __init__(self, encoder: EncoderConfig, num_classes: int, final_dropout: float = 0.0):
        super().__init__()
        self.encoder = Encoder(encoder)
        self.final_dropout = final_dropout
        self.head = nn.Linear(encoder.dim, num_classes)

    def logits(self, batch: CTCBatch) -> Tensor:  # (batch, frames, classes)
        features = self.encoder.feature_norm(self.encoder.features(batch.waveforms, batch.layout))
        x = self.encoder.contextualize(features, batch.layout, batch.mask, batch.channel_mask)
        return batch.layout.pad(self.head(dropout(x, self.final_dropout, self.training)))

    def forward(self, batch: CTCBatch) -> Loss:
        log_probs = self.logits(batch).float().log_softmax(2).transpose(0, 1)  # (frames, batch, classes)
        lengths = (torch.tensor(batch.layout.num_frames), torch.tensor(batch.num_targets))  # on the CPU, where they are needed
        total = F.ctc_loss(log_probs, batch.targets, *lengths, blank=BLANK, reduction="sum")
        return Loss(total, total.new_full((), sum(batch.num_targets)), {})


class CTCTask(SpeechTask):
    """CTC on `train_set`; with `frozen_phases` the head learns alone for `freeze_steps` (a pretrained encoder)."""

    model: Recognizer

    def __init__(
        self, model: Recognizer, config: CTCConfig, vocabulary: Vocabulary, text: TextConfig,
        train_set: SpeechBatches, valid_set: SpeechBatches | None, frozen_phases: bool, seed: int,
    ):  # fmt: skip
        self.model, self.config, self.vocabulary, self.text, self.seed = model, config, vocabulary, text, seed
        self.train_set, self.valid_set, self.frozen_phases = train_set, valid_set, frozen_phases
        for batches in (train_set, valid_set):
            if batches is not None:
                _check_transcripts(batches, vocabulary, text)

    def collate(self, items: np.ndarray, epoch: int) -> CTCBatch:
        rngs = [self.train_set.rng(item, epoch) for item in items.tolist()]
        batch = self._load(self.train_set, items, rngs)
        config, dim = self.config, self.model.encoder.config.dim
        frames = batch.layout.num_frames
        mask = channel_mask = None
        if config.mask_start_probability > 0:
            masks = [span_mask(n, config.mask_start_probability, config.mask_length, r) for n, r in zip(frames, rngs, strict=True)]
            mask = torch.from_numpy(np.concatenate(masks))
        if config.mask_channel_probability > 0:
            spans = [span_mask(dim, config.mask_channel_probability, config.mask_channel_length, r, min_spans=0) for r in rngs]
            channel_mask = pad(spans, False)
        return batch._replace(mask=mask, channel_mask=channel_mask)

    def collate_validation(self, items: np.ndarray) -> CTCBatch:
        assert self.valid_set is not None
        return self._load(self.valid_set, items, [self.valid_set.rng(item, -1) for item in items.tolist()])

    def _load(self, batches: SpeechBatches, items: np.ndarray, rngs: list[np.random.Generator]) -> CTCBatch:
        waveforms = [batches.load(item, rng)[0] for item, rng in zip(items.tolist(), rngs, strict=True)]
        targets = [self.vocabulary.encode(self.text.normalize(batches.manifest[item].text or "")) for item in items.tolist()]
        buffer, layout = pack(waveforms)
        return CTCBatch(buffer, layout, pad(targets, 0), tuple(len(target) for target in targets), None, None)

    def blocks(self) -> list[torch.nn.Module]:
        return list(self.model.encoder.layers)

    def before_step(self, step: int) -> None:
        self.model.encoder.draw_layers(self.seed, step)

    def phase(self, step: int) -> int:
        return int(not self.frozen_phases or step >= self.config.freeze_steps)

    def enter_phase(self, phase: int) -> None:
        """Phase 0: the head alone learns; phase 1: everything but a frozen front end and the mask embedding's unused copy."""
        self.model.encoder.requires_grad_(phase == 1)
        if phase == 1 and self.frozen_phases and self.config.freeze_front_end:
            self.model.encoder.front_end.requires_grad_(False)
        if self.config.mask_start_probability == 0:
            self.model.encoder.mask_embedding.requires_grad_(False)


def _check_transcripts(batches: SpeechBatches, vocabulary: Vocabulary, text: TextConfig) -> None:
    """Every transcript is there, is spelled in the vocabulary and fits the frames, or ValueError names the rows."""
    problems = []
    for item in batches.items.tolist():
        utterance = batches.manifest[item]
        normalized = text.normalize(utterance.text or "")
        target = vocabulary.encode(normalized) if normalized and not vocabulary.unknown(normalized) else None
        if not normalized:
            problems.append(f"{utterance.id!r}: no transcript")
        elif target is None:
            problems.append(f"{utterance.id!r}: {normalized!r} has {sorted(vocabulary.unknown(normalized))}, not in the vocabulary")
        elif len(target) + int((target[1:] == target[:-1]).sum()) > utterance.num_frames:
            problems.append(f"{utterance.id!r}: {len(target)} characters do not fit {utterance.num_frames} frames")
    if problems:
        shown = "\n  ".join(problems[:10])
        raise ValueError(f"{batches.manifest.folder}: {len(problems)} transcripts cannot be used:\n  {shown}")


def load_recognizer(run: str | Path) -> tuple[Recognizer, Vocabulary, TextConfig, str]:
    """Model in eval mode, vocabulary, text normalisation and weights' fingerprint of a `finetune` run."""
    weights, meta, fingerprint = load_weights(run)
    if "vocabulary" not in meta:
        raise ValueError(f"{run}: a {meta['kind']!r} run has no vocabulary; give a `finetune` run")
    vocabulary = Vocabulary(meta["vocabulary"])
    source = f"{run}/meta.json"
    model = Recognizer(parse_config(EncoderConfig, meta["config_encoder"], source), len(vocabulary))
    model.load_state_dict(weights)
    text: dict[str, Any] = meta["config"]["text"]
    return model.eval(), vocabulary, parse_config(TextConfig, text, source), fingerprint
