"""A trained synthesizer: units to mel spectra and waveforms."""

import base64
import difflib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from pretrain.data.utterance import SAMPLE_RATE
from pretrain.store.disk import atomic_path
from units.sound.griffin_lim import ITERATIONS, to_waveform
from units.sound.synthesis import (
    load_unit_to_mel,
    merge_runs,
    speaker_number,
)


class Synthesizer:
    """A voice for units.

    >>> synthesizer = load_synthesizer("runs/demo/synthesizer")         # doctest: +SKIP
    >>> synthesizer.speak([3, 49, 7])                            # durations predicted  # doctest: +SKIP
    >>> synthesizer.speak(corpus.units(i), corpus.durations(i), "george")  # doctest: +SKIP
    """

    def __init__(self, run: str | Path):
        self.folder = Path(run)
        self.model, self.meta, self.fingerprint = load_unit_to_mel(run)
        self.codebook: str = self.meta["codebook"]
        self.deduplicated: bool = self.meta["deduplicated"]
        self.speakers: list[str] = self.meta["speakers"]

    def speak(
        self,
        units: Sequence[int] | np.ndarray,
        durations: Sequence[int] | np.ndarray | None = None,
        speaker: str | None = None,
        *,
        deduplicated: bool | None = None,
        iterations: int = ITERATIONS,
        seed: int = 0,
    ) -> np.ndarray:
        """Sound at 16 kHz, float32 (320 frames + 80,), of units (units,) or (units, levels); a function of
        its arguments.

        `durations` (units,) are frames of 20 ms, and the sound has exactly so many; without them they are
        predicted, or 1 each where the units are not `deduplicated` (by default: as those of the training). A
        `speaker` unknown to the training gets the mean voice. No units, or units and durations that do not
        fit the synthesizer or each other: ValueError.
        """
        return to_waveform(
            self.mel(units, durations, speaker, deduplicated=deduplicated), iterations, seed=seed
        )

    def speak_all(
        self,
        documents: Sequence[Sequence[int] | np.ndarray],
        durations: Sequence[Sequence[int] | np.ndarray] | None = None,
        speakers: Sequence[str | None] | None = None,
        **options: Any,
    ) -> list[np.ndarray]:
        """`speak` for each; none depends on its company."""
        times = [None] * len(documents) if durations is None else durations
        voices = [None] * len(documents) if speakers is None else speakers
        return [self.speak(*each, **options) for each in zip(documents, times, voices, strict=True)]

    def mel(
        self,
        units: Sequence[int] | np.ndarray,
        durations: Sequence[int] | np.ndarray | None = None,
        speaker: str | None = None,
        *,
        deduplicated: bool | None = None,
    ) -> torch.Tensor:
        """Log mel magnitudes (2 frames, 80) of the same."""
        return self.mel_and_frames(units, durations, speaker, deduplicated=deduplicated)[0]

    def mel_and_frames(
        self,
        units: Sequence[int] | np.ndarray,
        durations: Sequence[int] | np.ndarray | None = None,
        speaker: str | None = None,
        *,
        deduplicated: bool | None = None,
    ) -> tuple[torch.Tensor, np.ndarray]:
        """`mel`, and how many frames each run of equal units lasts in it, int64 (runs,)."""
        symbols = self._checked(np.asarray(units))
        predicted = durations is None and (self.deduplicated if deduplicated is None else deduplicated)
        lengths = np.ones(len(symbols), np.int64) if durations is None else np.asarray(durations)
        if lengths.shape != (len(symbols),) or lengths.min() < 1:
            raise ValueError(
                f"durations are frames, one or more for each of {len(symbols)} units; these are of shape "
                f"{lengths.shape}, from {lengths.min(initial=1)} on"
            )
        runs, frames = merge_runs(symbols, lengths)
        voice = speaker_number(self.speakers, speaker)
        mel, lasting = self.model.speak(
            torch.from_numpy(runs), None if predicted else torch.from_numpy(frames), voice
        )
        return mel, lasting.numpy()

    def require_speaker(self, speaker: str) -> None:
        """One of the voices of the training, or ValueError."""
        if speaker not in self.speakers:
            near = difflib.get_close_matches(speaker, self.speakers, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f": {', '.join(self.speakers[:10]) or 'none'}"
            raise ValueError(
                f"speaker: {speaker!r} is none of the {len(self.speakers)} voices of {self.folder}{hint}"
            )

    def require_units(self, described: dict[str, Any], source: str | Path) -> None:
        """Units of `source`, `described` by `codebook`, `num_units`, `num_levels` or some of these, are those
        that the synthesizer learned, or a ValueError names both sides."""
        for name, theirs in described.items():
            if self.meta[name] != theirs:
                raise ValueError(
                    f"{self.folder} learned to speak units with {name} {self.meta[name]!r}, but {source} has "
                    f"{name} {theirs!r}; train a synthesizer on these units, or take those that it learned"
                )

    def _checked(self, units: np.ndarray) -> np.ndarray:
        levels, count = self.meta["num_levels"], self.meta["num_units"]
        if not units.size:
            raise ValueError(f"{self.folder}: there are no units to speak")
        shaped = (units.ndim == 2 and units.shape[1] == levels) or units.ndim == levels == 1
        if not shaped or not np.issubdtype(units.dtype, np.integer):
            raise ValueError(
                f"{self.folder}: speaks whole numbers at {levels} level(s), not {units.dtype} of shape "
                f"{units.shape}"
            )
        if units.min() < 0 or units.max() >= count:
            place = int(
                np.flatnonzero(((units < 0) | (units >= count)).reshape(len(units), -1).any(axis=1))[0]
            )
            raise ValueError(
                f"{self.folder}: unit {units[place].tolist()} at place {place} is none of the {count} it "
                f"speaks (0 .. {count - 1})"
            )
        return units


def load_synthesizer(run: str | Path) -> Synthesizer:
    """The synthesizer of a `train-synthesizer` run; ValueError where it is none."""
    return Synthesizer(run)


def as_data_uri(waveform: np.ndarray) -> str:
    """A waveform at 16 kHz as the `src` of an <audio>: MP3 where libsndfile writes it (1.1 on), else 16-bit
    WAV."""
    kind = "MP3" if "MP3" in soundfile.available_formats() else "WAV"
    buffer = io.BytesIO()
    soundfile.write(buffer, _audible(waveform), SAMPLE_RATE, format=kind)
    subtype, text = "mpeg" if kind == "MP3" else "wav", base64.b64encode(buffer.getvalue()).decode()
    return f"data:audio/{subtype};base64,{text}"


def write_wav(path: Path, waveform: np.ndarray) -> None:
    """Write a waveform at 16 kHz as 16-bit WAV, atomically; one that is too loud is made softer, not
    clipped."""
    with atomic_path(path) as temporary:
        soundfile.write(temporary, _audible(waveform), SAMPLE_RATE, format="WAV", subtype="PCM_16")


def _audible(waveform: np.ndarray) -> np.ndarray:
    loudest = float(np.abs(waveform).max(initial=0.0))
    return waveform / loudest * 0.99 if loudest > 0.99 else waveform
