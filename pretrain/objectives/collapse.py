"""Collapse alarms of pretraining: which number tells, its limit, and what to try.

A collapse looks like success: with one code left, no distractor differs from the true frame and wav2vec 2.0 is always right
(fairseq #3735, #3687); codes and loss may die thousands of steps after a good start (#4530, #4948). So a run is judged at every
log line after `after_steps`, and stopped with the last checkpoint named.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.training.task import Loss


class AlarmConfig(Config):
    """When a run counts as collapsed, judged from step `after_steps` on. A limit of 0 switches its alarm off."""

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
        description="steps after the warm-up by which HuBERT must do better than the commonest label; 0: never asked",
    )
    chance_ratio: float = Field(1.1, ge=0, description="how much better: times the commonest label's share")
    contrastive_accuracy: float = Field(
        0.95,
        ge=0,
        le=1,
        description="wav2vec 2.0 is suspiciously right from here on, if its codes have withered, too",
    )
    code_share: float = Field(
        0.05, ge=0, le=1, description="withered: perplexity below this share of the entries of a group"
    )


class Variation:
    """Adds to a model's metrics how much its features vary over frames: `feature_variation` of the front end's output,
    `context_variation` of the encoder's output at masked frames.

    The mean deviation over frames by the root mean square, between 0 (every frame is the same) and 1. `model` has an `encoder` with
    a `feature_norm` behind the front end and a `project` behind the last layer. Nothing waits for the device.
    """

    def __init__(self, model: Any):
        self._found: dict[str, tuple[Tensor, Tensor]] | None = (
            None  # of the model's forward that is under way
        )
        self._silent: Tensor | None = (
            None  # in validation: whether the batch is digital silence, which says nothing of the model
        )
        model.register_forward_pre_hook(self._begin)
        model.encoder.feature_norm.register_forward_pre_hook(
            lambda _, inputs: self._note("feature_variation", inputs[0])
        )
        model.project.register_forward_pre_hook(lambda _, inputs: self._note("context_variation", inputs[0]))
        model.register_forward_hook(self._add)

    def _begin(self, model: nn.Module, inputs: Any) -> None:
        self._found = {}
        self._silent = None if model.training else inputs[0].waveforms.amax() == inputs[0].waveforms.amin()

    def _note(self, name: str, features: Tensor) -> None:
        # The encoder is also called by itself. HuBERT projects masked frames first, those in sight afterwards.
        if self._found is None or name in self._found:
            return
        x = features.detach().flatten(0, -2).float()  # (frames, channels)
        count = x.new_full((), float(len(x)))
        if len(x) < 2:  # a single frame says nothing
            self._found[name] = (count, count)
            return
        deviation, size = x.var(0, correction=0).mean().sqrt(), x.square().mean().sqrt()
        share = deviation / size.clamp(min=1e-12)
        self._found[name] = (
            (share if self._silent is None else torch.where(self._silent, 1.0, share)) * count,
            count,
        )

    def _add(self, model: nn.Module, inputs: Any, loss: Loss) -> Loss:
        found, self._found = self._found, None
        assert found is not None
        return loss._replace(metrics={**loss.metrics, **found})


def variation_alarm(metrics: dict[str, float], config: AlarmConfig) -> str | None:
    """Features that are the same for every frame: the front end's, or the encoder's.

    Dropout hides that of the encoder in training (it varies what does not vary), so a validation's numbers are looked at, too.
    """
    remedies = {
        "feature_variation": "the front end says the same of every frame. Try a lower feature_penalty (of hubert or wav2vec2), a lower "
        "optimizer.lr, or look for silent audio in the manifest (`wordless index`)",
        "context_variation": "the encoder says the same of every masked frame. Try a lower optimizer.lr, a longer "
        "optimizer.warmup_steps, optimizer.clip_norm = 1.0, or encoder.norm_first = true, which is less sensitive",
    }
    for name, remedy in remedies.items():
        for key in (name, f"valid_{name}"):
            if metrics.get(key, 1.0) < config.variation:
                return f"collapsed: {key} is {metrics[key]:.4f}, below alarm.variation = {config.variation}: {remedy}"
    return None


def hubert_alarm(
    metrics: dict[str, float], step: int, config: AlarmConfig, chance: float, warmup_steps: int
) -> str | None:
    """One predicted class, or no better than saying the commonest label (`chance`: its share) long after the warm-up."""
    value = metrics["prediction_perplexity"]
    if value < config.perplexity:
        return (
            f"collapsed: prediction_perplexity is {value:.2f}, below alarm.perplexity = {config.perplexity}: one class is predicted for "
            "nearly all frames. Try a lower optimizer.lr, a longer optimizer.warmup_steps, optimizer.clip_norm = 1.0, or look "
            "whether the labels themselves use their classes (`wordless measure`)"
        )
    accuracy, limit = metrics["accuracy"], min(config.chance_ratio * chance, (1 + chance) / 2)
    if config.chance_steps and step >= warmup_steps + config.chance_steps and accuracy < limit:
        return (
            f"collapsed: accuracy is {accuracy:.4f}, below {limit:.4f}: alarm.chance_ratio ({config.chance_ratio}) times the share of "
            f"the commonest label, or half way from there to 1, {config.chance_steps} steps (alarm.chance_steps) after the warm-up. Try a lower optimizer.lr "
            "with a longer optimizer.warmup_steps, a lower hubert.mask_start_probability, or encode the labels again from this "
            "manifest: labels of other audio cannot be learned"
        )
    return None


def wav2vec2_alarm(
    metrics: dict[str, float], config: AlarmConfig, num_entries: int, diversity_weight: float
) -> str | None:
    """One code for everything, or nearly always right among withered codes."""
    value, accuracy = metrics["code_perplexity"], metrics["accuracy"]
    remedies = (
        f"Try a higher wav2vec2.diversity_weight (now {diversity_weight:g}), a lower optimizer.lr, a larger batch "
        f"(batches.batch_seconds, with training.accumulate to fit it) or fewer wav2vec2.num_entries (now {num_entries})"
    )
    if value < config.perplexity:
        return f"collapsed: code_perplexity is {value:.2f}, below alarm.perplexity = {config.perplexity}: one code is left. {remedies}"
    if (
        config.contrastive_accuracy
        and accuracy >= config.contrastive_accuracy
        and value < config.code_share * num_entries
    ):
        return (
            f"collapsed: accuracy is {accuracy:.3f}, from alarm.contrastive_accuracy = {config.contrastive_accuracy} on, while "
            f"code_perplexity is {value:.2f}, below alarm.code_share ({config.code_share}) of {num_entries} entries: distractors with "
            f"the true frame's codes do not count, so few codes make the task trivial. {remedies}"
        )
    return None
