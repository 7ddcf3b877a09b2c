"""CTC training for the engine: what is frozen, dropped and masked, and the batches with their transcripts.

The recipe is wav2vec 2.0's (arXiv 2006.11477, section 4.3 and appendix B): the front end stays frozen, the
encoder for the first `freeze_steps`, spans of time and channels are masked.
"""

from typing import Any

import numpy as np
import torch
from pydantic import Field

from pretrain.config import Config
from pretrain.ctc.model import CTCBatch, Layers, Recognizer
from pretrain.ctc.text import TextConfig
from pretrain.data.batches import SpeechBatches, pad
from pretrain.objectives.masking import span_mask
from pretrain.training.speech_task import SpeechTask


class CTCConfig(Config):
    """What is frozen, dropped and masked in fine-tuning. Dropout rates and LayerDrop that are not given stay
    the encoder's."""

    layers: Layers = Field(
        "last", description="what the head reads; weighted: a learned average of all layers"
    )
    freeze_steps: int = Field(0, ge=0, description="steps during which only the head learns")
    freeze_front_end: bool = True
    head_lr_scale: float = Field(1.0, gt=0, description="the head's learning rate over optimizer.lr")
    final_dropout: float = Field(0.1, ge=0, lt=1)
    dropout: float | None = Field(None, ge=0, lt=1)
    attention_dropout: float | None = Field(None, ge=0, lt=1)
    activation_dropout: float | None = Field(None, ge=0, lt=1)
    input_dropout: float | None = Field(None, ge=0, lt=1)
    layer_drop: float | None = Field(None, ge=0, lt=1)
    warp: float | None = Field(
        None, ge=0, lt=0.5, description="of an encoder on filterbanks: vocal tract length perturbation"
    )
    mask_start_probability: float = Field(0.05, ge=0, lt=1)
    mask_length: int = Field(10, ge=1)
    mask_channel_probability: float = Field(0.0016, ge=0, lt=1)
    mask_channel_length: int = Field(64, ge=1)

    @property
    def of_encoder(self) -> dict[str, float]:
        """Keys of EncoderConfig that fine-tuning sets anew."""
        names = ("dropout", "attention_dropout", "activation_dropout", "input_dropout", "layer_drop", "warp")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class CTCTask(SpeechTask):
    """CTC on `train_set`; with `frozen_phases` the head learns alone for `freeze_steps` (a pretrained
    encoder)."""

    model: Recognizer

    def __init__(
        self,
        model: Recognizer,
        config: CTCConfig,
        text: TextConfig,
        train_set: SpeechBatches,
        valid_set: SpeechBatches | None,
        frozen_phases: bool,
        seed: int,
    ):
        self.model, self.config, self.text, self.seed = model, config, text, seed
        self.train_set, self.valid_set, self.frozen_phases = train_set, valid_set, frozen_phases

    def collate(self, items: np.ndarray, epoch: int) -> CTCBatch:
        rngs = [self.train_set.rng(item, epoch) for item in items.tolist()]
        batch = self._load(self.train_set, items, rngs)
        config, dim = self.config, self.model.encoder.config.dim
        frames = batch.layout.num_frames
        mask = channel_mask = None
        if config.mask_start_probability > 0:
            masks = [
                span_mask(n, config.mask_start_probability, config.mask_length, r)
                for n, r in zip(frames, rngs, strict=True)
            ]
            mask = torch.from_numpy(np.concatenate(masks))
        if config.mask_channel_probability > 0:
            spans = [
                span_mask(dim, config.mask_channel_probability, config.mask_channel_length, r, min_spans=0)
                for r in rngs
            ]
            channel_mask = pad(spans, False)
        return batch._replace(mask=mask, channel_mask=channel_mask)

    def collate_validation(self, items: np.ndarray) -> CTCBatch:
        assert self.valid_set is not None
        return self._load(self.valid_set, items, [self.valid_set.rng(item, -1) for item in items.tolist()])

    def _load(self, batches: SpeechBatches, items: np.ndarray, rngs: list[np.random.Generator]) -> CTCBatch:
        loaded, targets = [], []
        for item, rng in zip(items.tolist(), rngs, strict=True):
            loaded.append(batches.load(item, rng)[0])
            targets.append(self.model.vocabulary.encode(self.text.target(batches.manifest[item])))
        inputs, layout = batches.pack(loaded)
        return CTCBatch(inputs, layout, pad(targets, 0), tuple(len(target) for target in targets))

    def blocks(self) -> list[torch.nn.Module]:
        return list(self.model.encoder.layers)

    def before_step(self, step: int) -> None:
        self.model.encoder.draw_layers(self.seed, step)

    def phase(self, step: int) -> int:
        return int(not self.frozen_phases or step >= self.config.freeze_steps)

    def enter_phase(self, phase: int) -> None:
        """Phase 0: the head (with the weights of the layers) learns alone; phase 1: all but the front end,
        where that stays frozen.

        What the loss does not depend on never learns: the mask embedding without masks in time, and under a
        weighted sum of layers the norm that a pre-norm encoder puts on its last output.
        """
        encoder = self.model.encoder
        encoder.requires_grad_(phase == 1)
        if self.frozen_phases and self.config.freeze_front_end:
            encoder.front_end.requires_grad_(False)
        if self.config.mask_start_probability == 0:
            encoder.mask_embedding.requires_grad_(False)
        if self.model.layer_weights is not None and encoder.config.norm_first:
            encoder.norm.requires_grad_(False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As for every task, the head (and the weights of the layers) with a learning rate of its own."""
        groups = []
        for own, scale in ((False, 1.0), (True, self.config.head_lr_scale)):
            chosen = [p for name, p in self.model.named_parameters() if name.startswith("encoder.") != own]
            groups.append({"params": [p for p in chosen if p.ndim > 1], "lr_scale": scale})
            groups.append(
                {"params": [p for p in chosen if p.ndim <= 1], "lr_scale": scale, "weight_decay": 0.0}
            )
        return groups
