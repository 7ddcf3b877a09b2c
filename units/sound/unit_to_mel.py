"""The network of the synthesizer: units and how long they last to log mel magnitudes, two mel frames for each
frame of 20 ms.

As FastSpeech 2 (Ren et al. 2021) with convolutions in place of attention: over units, from which the log
duration of each is predicted (mean squared error); the length regulator, in training with the true durations;
over frames, from which the pitch is predicted, in training with the true one going on; over frames again,
then the mel bands (L1). What neither units nor pitch tell, loudness, microphone and noise, comes as a style:
each band's mean and deviation over the recording, in speaking those of a speaker.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.training.task import Loss
from units.sound.griffin_lim import NUM_MELS, PER_FRAME
from units.sound.pitch import patterns

REFERENCE_HZ = 120.0  # pitch is logarithmic, relative to this
DECIBELS = 20 / math.log(10)  # of a natural log of a magnitude


class SynthesizerModelConfig(Config):
    """Sizes of the decoder."""

    dim: int = Field(160, ge=8)
    unit_layers: int = Field(2, ge=1, description="convolutions over units")
    pitch_layers: int = Field(1, ge=1, description="convolutions over frames of 20 ms that predict the pitch")
    frame_layers: int = Field(4, ge=1, description="convolutions over frames of 20 ms that know the pitch")
    kernel: int = Field(3, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    duration_weight: float = Field(
        0.1, ge=0, description="of a unit's squared error of log duration beside a frame's L1 of mel bands"
    )
    pitch_weight: float = Field(
        0.1, ge=0, description="of the errors of voicing and log pitch beside a frame's L1 of mel bands"
    )
    speakers: bool = Field(True, description="an embedding for each speaker that the manifest names")


class Batch(NamedTuple):
    """Crops of utterances, padded at the end."""

    units: Tensor  # (batch, units, levels) int64
    durations: Tensor  # (batch, units) int64 frames, 0 where padded
    whole: Tensor  # (batch, units) bool: not cut by the crop
    speakers: Tensor  # (batch,) int64; the number of speakers: none that is known
    mel: Tensor  # (batch, mel frames, 80) float32
    pitch: Tensor  # (batch, mel frames) float32 Hz, 0 where unvoiced


class UnitToMel(nn.Module):
    """Units and durations to log mel magnitudes; its forward is the loss."""

    def __init__(self, config: SynthesizerModelConfig, num_units: int, num_levels: int, num_speakers: int):
        super().__init__()
        self.config, self.num_units, self.num_levels, self.num_speakers = (
            config,
            num_units,
            num_levels,
            num_speakers,
        )
        self.embed_units = nn.Embedding(num_units * num_levels, config.dim)
        self.embed_speakers = nn.Embedding(num_speakers, config.dim) if num_speakers else None
        self.position = nn.Linear(3, config.dim)
        self.unit_layers = nn.ModuleList(ConvBlock(config) for _ in range(config.unit_layers))
        self.duration_layer = ConvBlock(config)
        self.duration_head = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, 1))
        self.pitch_layers = nn.ModuleList(ConvBlock(config) for _ in range(config.pitch_layers))
        self.pitch_head = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, PER_FRAME * 2))
        self.embed_pitch = nn.Linear(PER_FRAME * 2, config.dim)
        self.frame_layers = nn.ModuleList(ConvBlock(config) for _ in range(config.frame_layers))
        self.mel_head = nn.Sequential(
            nn.LayerNorm(config.dim), nn.Linear(config.dim, PER_FRAME * 2 * NUM_MELS)
        )
        self.embed_style = nn.Linear(2 * NUM_MELS, config.dim)
        self.mel_mean: Tensor
        self.mel_deviation: Tensor
        self.styles: Tensor
        self.register_buffer("mel_mean", torch.zeros(NUM_MELS))
        self.register_buffer("mel_deviation", torch.ones(NUM_MELS))
        # of each speaker; the last is the mean
        self.register_buffer("styles", torch.zeros(num_speakers + 1, 2 * NUM_MELS))

    def encode(self, units: Tensor, speakers: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (batch, units, dim) and log durations (batch, units) of units (batch, units,
        levels)."""
        offsets = self.num_units * torch.arange(self.num_levels, device=units.device)
        x = self.embed_units(units + offsets).sum(2)  # (batch, units, dim)
        if self.embed_speakers is not None:
            voices = torch.cat([self.embed_speakers.weight, self.embed_speakers.weight.mean(0, keepdim=True)])
            x = x + voices[speakers][:, None]
        for layer in self.unit_layers:
            x = layer(x, valid)
        return x, self.duration_head(self.duration_layer(x, valid))[:, :, 0]

    def decode(
        self, hidden: Tensor, durations: Tensor, style: Tensor, pitch: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised log mel magnitudes (batch, 2 frames, 80) of hidden states that last `durations` (batch,
        units) frames.

        `style` (batch, 160) is `mel_style` of the recording; `pitch` (batch, 2 frames) is in Hz, 0 where
        unvoiced, and the predicted one is taken where none is given. The prediction comes along: logits of
        being voiced and log pitch over 120 Hz, each (batch, 2 frames).
        """
        ends = durations.cumsum(1)
        total = int(ends[:, -1].max())
        frames = torch.arange(total, device=ends.device).expand(len(ends), total).contiguous()
        owner = torch.searchsorted(ends, frames, right=True).clamp(max=ends.shape[1] - 1)  # (batch, frames)
        length = durations.gather(1, owner).clamp(min=1)
        place = frames - (ends.gather(1, owner) - length)  # in the unit, from 0
        valid = frames < ends[:, -1:]
        shape = torch.stack(
            [(place + 0.5) / length, (place + 1).clamp(max=50).log() / 2, length.log() / 2], dim=2
        )
        x = hidden.gather(1, owner[:, :, None].expand(-1, -1, hidden.shape[2])) + self.position(
            shape.to(hidden.dtype)
        )
        x = x + self.embed_style(style)[:, None]
        for layer in self.pitch_layers:
            x = layer(x, valid)
        # (batch, 2 frames, 2)
        guess: Tensor = self.pitch_head(x).unflatten(2, (PER_FRAME, 2)).flatten(1, 2).float()
        voicing, height = guess.unbind(2)
        if pitch is None:
            pitch = torch.where(voicing > 0, REFERENCE_HZ * height.exp(), 0.0)
        voiced = (pitch > 0).float()
        heard = torch.stack([voiced, log_pitch(pitch)], dim=2)  # (batch, 2 frames, 2)
        x = x + self.embed_pitch(heard.unflatten(1, (total, PER_FRAME)).flatten(2).to(x.dtype))
        for layer in self.frame_layers:
            x = layer(x, valid)
        # An envelope, and how strongly the harmonics of this pitch stand out of it.
        envelope, depth = self.mel_head(x).unflatten(2, (PER_FRAME, 2, NUM_MELS)).flatten(1, 2).unbind(2)
        return envelope + depth * patterns(pitch), voicing, height

    def forward(self, batch: Batch) -> Loss:
        hidden, log_durations = self.encode(batch.units, batch.speakers, batch.durations > 0)
        lengths = PER_FRAME * batch.durations.sum(1, keepdim=True)
        present = torch.arange(batch.mel.shape[1], device=batch.mel.device) < lengths
        wanted = (batch.mel - self.mel_mean) / self.mel_deviation
        mel, voicing, height = self.decode(hidden, batch.durations, mel_style(wanted, present), batch.pitch)
        count = batch.durations.sum()
        error = (mel.float() - wanted).abs()[present]  # (mel frames, 80)
        squared = (log_durations.float() - batch.durations.clamp(min=1).log()).square()[batch.whole]
        voiced = batch.pitch > 0
        unclear = F.binary_cross_entropy_with_logits(voicing, voiced.float(), reduction="none")[present]
        off = (height - log_pitch(batch.pitch)).square()[voiced]
        total = error.mean(1).sum() / PER_FRAME + self.config.duration_weight * squared.sum()
        total = total + self.config.pitch_weight * (unclear.sum() + off.sum()) / PER_FRAME
        distance = DECIBELS * (error.detach() * self.mel_deviation).mean(1).sum() / PER_FRAME
        return Loss(
            total,
            count,
            {
                "loss": (total.detach(), count),
                "mel_decibels": (distance, count),
                "duration_squared_error": (squared.detach().sum(), batch.whole.sum()),
                "voicing_accuracy": (((voicing > 0) == voiced)[present].sum(), present.sum()),
                "log_pitch_squared_error": (off.detach().sum(), voiced.sum()),
            },
        )

    @torch.inference_mode()
    def speak(self, units: Tensor, durations: Tensor | None, speaker: int) -> tuple[Tensor, Tensor]:
        """Log mel magnitudes (2 frames, 80) and durations (units,) of units (units, levels); None: durations
        are predicted."""
        valid = torch.ones(1, len(units), dtype=torch.bool, device=units.device)
        hidden, log_durations = self.encode(units[None], torch.tensor([speaker], device=units.device), valid)
        if durations is None:
            durations = log_durations[0].exp().round().clamp(min=1).long()
        mel = self.decode(hidden, durations[None], self.styles[speaker, None])[0][0]
        return mel * self.mel_deviation + self.mel_mean, durations


def mel_style(mel: Tensor, present: Tensor) -> Tensor:
    """Mean and standard deviation over time of each band: (batch, 160) of (batch, time, 80), of which (batch,
    time) are present.

    Loudness, microphone and noise: what units leave out by design, and an L1 loss would average over.
    """
    weight = (present / present.sum(1, keepdim=True))[:, :, None]
    mean = (mel * weight).sum(1)
    deviation = ((mel - mean[:, None]).square() * weight).sum(1).sqrt()
    return torch.cat([mean, deviation], dim=1)


def log_pitch(pitch: Tensor) -> Tensor:
    """Natural log of pitch over 120 Hz, 0 where unvoiced."""
    return torch.where(pitch > 0, (pitch.clamp(min=1.0) / REFERENCE_HZ).log(), 0.0)


class ConvBlock(nn.Module):
    """x + W gelu(conv(norm(x))) in (batch, time, dim), zero where nothing is."""

    def __init__(self, config: SynthesizerModelConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.conv = nn.Conv1d(config.dim, config.dim, config.kernel, padding="same")
        self.out = nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        y = self.norm(x) * valid[:, :, None]
        y = F.gelu(self.conv(y.transpose(1, 2))).transpose(1, 2)
        return x + self.dropout(self.out(y))
