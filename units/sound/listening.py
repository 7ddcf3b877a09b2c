"""Hearing units: sound from units with a trained synthesizer. The verb `synthesize`, and how many units survive the round trip.

The folder holds wav files (16 kHz, 16 bits) and `sounds.jsonl`, a line for each with `id`, `document`, `kind`, `audio_filepath`,
`duration`, `speaker` and `text`, so that `wordless index sounds.jsonl` takes it for a list of utterances. Kinds:

`original`               the recording
`copy`                   its mel spectrogram through Griffin-Lim: what a synthesizer without fault would sound like here
`resynthesis`            from its units, each as long as it was
`resynthesis-predicted`  from its units, each as long as the synthesizer believes
`prompt`                 from the units that a language model was given (verb `sample`)
`continuation`           from those and the units that it went on with, in one breath; at `prompt_seconds` it takes over
"""

import base64
import difflib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import soundfile
import torch
from pydantic import Field, model_validator

from pretrain.config import Config, PathStr, Seed, Split
from pretrain.data.audio import load_audio
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import HOP, SAMPLE_RATE
from pretrain.progress import progress
from pretrain.store.artefact import commit, read_meta, require_absent
from pretrain.store.disk import atomic_path, write_json
from units.corpus.unit_corpus import UnitCorpus
from units.sound.griffin_lim import ITERATIONS, log_mel, to_waveform
from units.sound.round_trip import RoundTrip
from units.sound.synthesis import (
    load_unit_to_mel,
    merge_runs,
    require_same_frames,
    require_speakable,
    speaker_number,
)


class SynthesizeConfig(Config):
    """Speak the documents of a corpus, the samples of a language model, or both; with `codebook`, hear what comes back."""

    synthesizer: PathStr = Field(description="a run of train-synthesizer")
    out: PathStr
    corpus: PathStr | None = Field(None, description="units of recorded utterances")
    manifest: PathStr | None = Field(
        None, description="of the recordings: adds `original` and `copy`, and the speaker of each"
    )
    split: Split = "test"
    utterances: list[str] | None = Field(
        None, description="ids to speak; by default `num` of the split, spread evenly over it"
    )
    num: int = Field(8, ge=1, description="documents of the corpus, at most")
    durations: Literal["true", "predicted", "both"] = "both"
    samples: PathStr | None = Field(
        None, description="the folder of `sample`; prompts and continuations are spoken"
    )
    speaker: str | None = Field(
        None,
        description="the voice of everything; by default each document's own, if it was trained, or the mean",
    )
    codebook: PathStr | None = Field(
        None, description="encode the sound again with this codebook and compare the units"
    )
    encoder: PathStr | None = Field(None, description="the codebook's encoder, if it has one")
    iterations: int = Field(ITERATIONS, ge=0, description="of Griffin-Lim")
    seed: Seed = 0

    @model_validator(mode="after")
    def _something_to_say(self) -> Self:
        if self.corpus is None and self.samples is None:
            raise ValueError("give a `corpus`, the `samples` of a language model, or both")
        if self.codebook is not None and self.corpus is None:
            raise ValueError("codebook: the round trip compares with the units of a `corpus`; give one")
        return self


class Synthesizer:
    """A voice for units.

    >>> synthesizer = load_synthesizer("runs/demo/synthesizer")         # doctest: +SKIP
    >>> synthesizer.speak([3, 49, 7])                                   # durations predicted  # doctest: +SKIP
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
        """Sound at 16 kHz, float32 (320 frames + 80,), of units (units,) or (units, levels); a function of its arguments.

        `durations` (units,) are frames of 20 ms, and the sound has exactly so many; without them they are predicted, or 1 each where
        the units are not `deduplicated` (by default: as those of the training). A `speaker` unknown to the training gets the mean
        voice. No units, or units and durations that do not fit the synthesizer or each other: ValueError.
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
                f"durations are frames, one or more for each of {len(symbols)} units; these are of shape {lengths.shape}, from "
                f"{lengths.min(initial=1)} on"
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
        """Units of `source`, `described` by `codebook`, `num_units`, `num_levels` or some of these, are those that the synthesizer
        learned, or a ValueError names both sides."""
        for name, theirs in described.items():
            if self.meta[name] != theirs:
                raise ValueError(
                    f"{self.folder} learned to speak units with {name} {self.meta[name]!r}, but {source} has {name} {theirs!r}; train a "
                    "synthesizer on these units, or take those that it learned"
                )

    def _checked(self, units: np.ndarray) -> np.ndarray:
        levels, count = self.meta["num_levels"], self.meta["num_units"]
        if not units.size:
            raise ValueError(f"{self.folder}: there are no units to speak")
        shaped = (units.ndim == 2 and units.shape[1] == levels) or units.ndim == levels == 1
        if not shaped or not np.issubdtype(units.dtype, np.integer):
            raise ValueError(
                f"{self.folder}: speaks whole numbers at {levels} level(s), not {units.dtype} of shape {units.shape}"
            )
        if units.min() < 0 or units.max() >= count:
            place = int(
                np.flatnonzero(((units < 0) | (units >= count)).reshape(len(units), -1).any(axis=1))[0]
            )
            raise ValueError(
                f"{self.folder}: unit {units[place].tolist()} at place {place} is none of the {count} it speaks (0 .. {count - 1})"
            )
        return units


def load_synthesizer(run: str | Path) -> Synthesizer:
    """The synthesizer of a `train-synthesizer` run; ValueError where it is none."""
    return Synthesizer(run)


def as_data_uri(waveform: np.ndarray) -> str:
    """A waveform at 16 kHz as the `src` of an <audio>: MP3 where libsndfile writes it (1.1 on), else 16-bit WAV."""
    kind = "MP3" if "MP3" in soundfile.available_formats() else "WAV"
    buffer = io.BytesIO()
    soundfile.write(buffer, _audible(waveform), SAMPLE_RATE, format=kind)
    return f"data:audio/{'mpeg' if kind == 'MP3' else 'wav'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_wav(path: Path, waveform: np.ndarray) -> None:
    """Write a waveform at 16 kHz as 16-bit WAV, atomically; one that is too loud is made softer, not clipped."""
    with atomic_path(path) as temporary:
        soundfile.write(temporary, _audible(waveform), SAMPLE_RATE, format="WAV", subtype="PCM_16")


def _audible(waveform: np.ndarray) -> np.ndarray:
    loudest = float(np.abs(waveform).max(initial=0.0))
    return waveform / loudest * 0.99 if loudest > 0.99 else waveform


class Sound(NamedTuple):
    """One line of `sounds.jsonl` and what is heard there."""

    document: str
    kind: str
    waveform: np.ndarray
    more: dict[str, Any]


def synthesize(config: SynthesizeConfig) -> dict[str, Any]:
    """Write the sounds, `sounds.jsonl` and `summary.json`; returns the latter: counts and, with `codebook`, the round trip."""
    require_absent(config.out)
    out, synthesizer = Path(config.out), load_synthesizer(config.synthesizer)
    if config.speaker is not None:
        synthesizer.require_speaker(config.speaker)
    parents = {"synthesizer": synthesizer.fingerprint}
    spoken: list[Iterator[Sound]] = []
    corpus, expected = None, 0
    if config.corpus is not None:
        corpus = UnitCorpus(config.corpus)
        parents["corpus"] = corpus.fingerprint
        require_speakable(corpus)
        described = {
            "codebook": corpus.codebook,
            "num_units": corpus.num_units,
            "num_levels": corpus.num_levels,
        }
        synthesizer.require_units(described, corpus.folder)
        chosen = _choose(config, corpus)
        recordings = None if config.manifest is None else _recordings(config.manifest, corpus, chosen)
        if recordings is not None:
            parents["manifest"] = recordings.fingerprint
        expected += len(chosen) * (2 * (config.manifest is not None) + 1 + (config.durations == "both"))
        spoken.append(_documents(config, synthesizer, corpus, chosen, recordings))
    if config.samples is not None:
        meta = read_meta(config.samples, "samples")
        if "codebook" not in meta:
            raise ValueError(f"{config.samples}: made by an older wordless; sample again")
        parents["samples"] = meta["fingerprint"]
        synthesizer.require_units({"codebook": meta["codebook"]}, config.samples)
        samples = _read_samples(config.samples)
        expected += 2 * len(samples)
        spoken.append(_samples(config, synthesizer, samples))
    trip = (
        RoundTrip(config.codebook, config.encoder, corpus)
        if corpus is not None and config.codebook is not None
        else None
    )
    if trip is not None:
        parents["codebook"] = trip.codebook.fingerprint
    lines: list[dict[str, Any]] = []
    with progress("synthesize", expected, "sound") as advance:
        for number, sound in enumerate(chain.from_iterable(spoken)):
            name = f"{number:04d}_{sound.kind}.wav"
            write_wav(out / name, sound.waveform)
            lines.append(
                {
                    "id": f"{sound.document}.{sound.kind}.{number}",
                    "document": sound.document,
                    "kind": sound.kind,
                    "audio_filepath": name,
                    "duration": len(sound.waveform) / SAMPLE_RATE,
                    **sound.more,
                }
            )
            advance(1)
    with atomic_path(out / "sounds.jsonl") as temporary:
        temporary.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
    summary: dict[str, Any] = {"sounds": dict(Counter(line["kind"] for line in lines))}
    summary["seconds_of_sound"] = sum(line["duration"] for line in lines)
    if trip is not None:
        summary |= trip.measure(out, lines)
    write_json(out / "summary.json", summary)
    files = ["sounds.jsonl", "summary.json", *(line["audio_filepath"] for line in lines)]
    commit(out, "sounds", config.resolved(), parents, files)
    return summary


def _choose(config: SynthesizeConfig, corpus: UnitCorpus) -> np.ndarray:
    """Numbers of the documents to speak."""
    if config.utterances is not None:
        if not config.utterances:
            raise ValueError("utterances: the list is empty; name some, or leave the key out")
        return np.array([corpus.index(name) for name in dict.fromkeys(config.utterances)])
    documents = corpus.documents(config.split)
    return documents[np.unique(np.linspace(0, len(documents) - 1, config.num).round().astype(int))]


def _recordings(folder: str, corpus: UnitCorpus, chosen: np.ndarray) -> Manifest:
    """The utterances of the chosen documents, one by one; one that is missing or of another length is a ValueError."""
    manifest, names = Manifest(folder), [corpus.ids[document] for document in chosen]
    rows = {name: row for row, name in enumerate(manifest.ids)}
    if missing := [name for name in names if name not in rows]:
        raise ValueError(
            f"{folder}: no utterance {missing[0]!r}, which {corpus.folder} has; give the manifest that was packed"
        )
    recordings = manifest.take(np.array([rows[name] for name in names]))
    require_same_frames(corpus, chosen, recordings)
    return recordings


def _documents(
    config: SynthesizeConfig,
    synthesizer: Synthesizer,
    corpus: UnitCorpus,
    chosen: np.ndarray,
    recordings: Manifest | None,
) -> Iterator[Sound]:
    for row, document in enumerate(chosen.tolist()):
        name, units, durations = corpus.ids[document], corpus.units(document), corpus.durations(document)
        more: dict[str, Any] = {}
        if recordings is not None:
            recording = recordings[row]
            more = {
                key: value for key in ("speaker", "text") if (value := getattr(recording, key)) is not None
            }
            waveform = load_audio(recording)
            yield Sound(name, "original", waveform, more)
            yield Sound(
                name, "copy", to_waveform(log_mel(waveform), config.iterations, seed=config.seed), more
            )
        speaker = config.speaker or more.get("speaker")
        options: Any = {"iterations": config.iterations, "seed": config.seed}
        more |= {"voice": speaker if speaker in synthesizer.speakers else "mean"}
        if config.durations != "predicted":
            yield Sound(name, "resynthesis", synthesizer.speak(units, durations, speaker, **options), more)
        if config.durations != "true":
            # Equal units in a row become one, whether the corpus was deduplicated or not: their number must not tell the durations.
            yield Sound(
                name,
                "resynthesis-predicted",
                synthesizer.speak(units, None, speaker, deduplicated=True, **options),
                more,
            )


def _read_samples(folder: str) -> list[dict[str, Any]]:
    with open(Path(folder) / "samples.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _samples(
    config: SynthesizeConfig, synthesizer: Synthesizer, samples: list[dict[str, Any]]
) -> Iterator[Sound]:
    """Prompts and continuations of the language model whose samples these are."""
    deduplicated = read_meta(config.samples or "", "samples")["deduplicated"]
    for sample in samples:
        prompt, continuation = (np.array(sample[part], np.int64) for part in ("prompt", "continuation"))
        name, more = sample["document"] or "prompt", {"voice": config.speaker or "mean"}
        if len(prompt):
            mel = synthesizer.mel(prompt, None, config.speaker, deduplicated=deduplicated)
            yield Sound(name, "prompt", to_waveform(mel, config.iterations, seed=config.seed), more)
        if len(continuation):
            whole = np.concatenate([prompt, continuation]) if len(prompt) else continuation
            mel, lasting = synthesizer.mel_and_frames(whole, None, config.speaker, deduplicated=deduplicated)
            # Units last otherwise with others behind them: the prompt alone does not tell how long it is here.
            frames = int(lasting[: _num_runs(prompt)].sum()) if deduplicated else len(prompt)
            sound = to_waveform(mel, config.iterations, seed=config.seed)
            yield Sound(name, "continuation", sound, {**more, "prompt_seconds": frames * HOP / SAMPLE_RATE})


def _num_runs(units: np.ndarray) -> int:
    return len(merge_runs(units, np.ones(len(units)))[0]) if len(units) else 0
