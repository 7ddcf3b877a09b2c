"""Collapse alarms of pretraining: their limits, and the variation of features over frames.

A collapse looks like success: with one code left, no distractor differs from the true frame and wav2vec 2.0
is always right (fairseq #3735, #3687); codes and loss may die thousands of steps after a good start (#4530,
#4948). So a run is judged at every log line after `after_steps`, and stopped with the last checkpoint named.
"""

import torch
from pydantic import Field
from torch import Tensor

from pretrain.config import Config


class AlarmConfig(Config):
    """When a run counts as collapsed, from step `after_steps` on. A limit of 0 switches its alarm off."""

    after_steps: int = Field(200, ge=0)
    perplexity: float = Field(
        2.0, ge=0, description="least perplexity of the predicted classes (HuBERT) or codes (wav2vec 2.0)"
    )
    variation: float = Field(
        0.01,
        ge=0,
        le=1,
        description="least deviation over frames, as a share of the features' root mean square",
    )
    chance_steps: int = Field(
        5000,
        ge=0,
        description="steps after the warm-up by which HuBERT must beat the commonest label; 0: never",
    )
    chance_ratio: float = Field(1.1, ge=0, description="how much better: times the commonest label's share")
    contrastive_accuracy: float = Field(
        0.95, ge=0, le=1, description="wav2vec 2.0 is suspiciously right from here on, if its codes withered"
    )
    code_share: float = Field(
        0.05, ge=0, le=1, description="withered: perplexity below this share of the entries of a group"
    )


def variations(
    waveforms: Tensor, features: Tensor, context: Tensor, training: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Metrics of the variation over frames: of the front end's features, and of the masked frames' context.

    Each is the mean deviation over frames by the root mean square, between 0 (every frame is the same) and 1.
    Nothing waits for the device. In validation a batch of digital silence counts as 1: its features show no
    collapse.
    """
    silent = None if training else waveforms.amax() == waveforms.amin()
    named = {"feature_variation": features, "context_variation": context}
    return {name: _variation(x, silent) for name, x in named.items()}


def _variation(x: Tensor, silent: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.detach().float()  # (frames, channels)
    count = x.new_full((), float(len(x)))
    if len(x) < 2:  # a single frame has no variation to judge
        return count, count
    deviation, size = x.var(0, correction=0).mean().sqrt(), x.square().mean().sqrt()
    share = deviation / size.clamp(min=1e-12)
    return (share if silent is None else torch.where(silent, 1.0, share)) * count, count


def variation_alarm(metrics: dict[str, float], config: AlarmConfig) -> str | None:
    """The message for features that are the same for every frame: the front end's, or the encoder's.

    In training dropout hides that of the encoder (it varies what does not vary), so a validation's numbers
    are judged, too.
    """
    remedies = {
        "feature_variation": "the front end gives the same features for every frame. Try a lower "
        "feature_penalty (of hubert or wav2vec2), a lower optimizer.lr, or look for silent audio in the "
        "manifest (`wordless index`)",
        "context_variation": "the encoder gives the same output for every masked frame. Try a lower "
        "optimizer.lr, a longer optimizer.warmup_steps, optimizer.clip_norm = 1.0, or encoder.norm_first = "
        "true, which is less sensitive",
    }
    for name, remedy in remedies.items():
        for key in (name, f"valid_{name}"):
            if metrics.get(key, 1.0) < config.variation:
                below = f"below alarm.variation = {config.variation}"
                return f"collapsed: {key} is {metrics[key]:.4f}, {below}: {remedy}"
    return None
