"""Hearing units: sound from units with a trained synthesizer. The verb `synthesize`, and how many units
survive the round trip.

The folder holds wav files (16 kHz, 16 bits) and `sounds.jsonl`, a line for each with `id`, `document`,
`kind`, `audio_filepath`, `duration`, `speaker` and `text`, so that `wordless index sounds.jsonl` takes it for
a list of utterances. Kinds:

`original`               the recording
`copy`                   its mel spectrogram through Griffin-Lim: the sound of a perfect synthesizer here
`resynthesis`            from its units, with their true durations
`resynthesis-predicted`  from its units, with predicted durations
`prompt`                 from the units that a language model continued (verb `sample`)
`continuation`           from the prompt and the continuation, which begins at `prompt_seconds`
"""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
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
    merge_runs,
    require_same_frames,
    require_speakable,
)
from units.sound.synthesizer import Synthesizer, load_synthesizer, write_wav


class SynthesizeConfig(Config):
    """Speak the documents of a corpus, the samples of a language model, or both; with `codebook`, hear what
    comes back."""

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


class Sound(NamedTuple):
    """One line of `sounds.jsonl` and its waveform."""

    document: str
    kind: str
    waveform: np.ndarray
    more: dict[str, Any]


def synthesize(config: SynthesizeConfig) -> dict[str, Any]:
    """Writes the sounds, `sounds.jsonl` and `summary.json`; returns the latter: counts and, with `codebook`,
    the round trip."""
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
        described = {name: getattr(corpus, name) for name in ("codebook", "num_units", "num_levels")}
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
    trip = None
    if corpus is not None and config.codebook is not None:
        trip = RoundTrip(config.codebook, config.encoder, corpus)
        parents["codebook"] = trip.codebook.fingerprint
    lines = _write_sounds(out, chain.from_iterable(spoken), expected)
    summary: dict[str, Any] = {"sounds": dict(Counter(line["kind"] for line in lines))}
    summary["seconds_of_sound"] = sum(line["duration"] for line in lines)
    if trip is not None:
        summary |= trip.measure(out, lines)
    write_json(out / "summary.json", summary)
    files = ["sounds.jsonl", "summary.json", *(line["audio_filepath"] for line in lines)]
    commit(out, "sounds", config.resolved(), parents, files)
    return summary


def _write_sounds(out: Path, sounds: Iterator[Sound], expected: int) -> list[dict[str, Any]]:
    """Writes the WAV files and `sounds.jsonl`; returns its lines."""
    lines: list[dict[str, Any]] = []
    with progress("synthesize", expected, "sound") as advance:
        for number, sound in enumerate(sounds):
            name = f"{number:04d}_{sound.kind}.wav"
            write_wav(out / name, sound.waveform)
            line: dict[str, Any] = {
                "id": f"{sound.document}.{sound.kind}.{number}",
                "document": sound.document,
                "kind": sound.kind,
            }
            line |= {"audio_filepath": name, "duration": len(sound.waveform) / SAMPLE_RATE, **sound.more}
            lines.append(line)
            advance(1)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with atomic_path(out / "sounds.jsonl") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return lines


def _choose(config: SynthesizeConfig, corpus: UnitCorpus) -> np.ndarray:
    """Numbers of the documents to speak."""
    if config.utterances is not None:
        if not config.utterances:
            raise ValueError("utterances: the list is empty; name some, or leave the key out")
        return np.array([corpus.index(name) for name in dict.fromkeys(config.utterances)])
    documents = corpus.documents(config.split)
    return documents[np.unique(np.linspace(0, len(documents) - 1, config.num).round().astype(int))]


def _recordings(folder: str, corpus: UnitCorpus, chosen: np.ndarray) -> Manifest:
    """The utterances of the chosen documents, one by one; one that is missing or of another length is a
    ValueError."""
    manifest, names = Manifest(folder), [corpus.ids[document] for document in chosen]
    rows = {name: row for row, name in enumerate(manifest.ids)}
    if missing := [name for name in names if name not in rows]:
        raise ValueError(
            f"{folder}: no utterance {missing[0]!r}, which {corpus.folder} has; give the manifest that was "
            "packed"
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
            # Equal units in a row become one, whether the corpus was deduplicated or not: their number must
            # not tell the durations.
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
            # Units last otherwise with others behind them: the prompt alone does not tell how long it is
            # here.
            frames = int(lasting[: _num_runs(prompt)].sum()) if deduplicated else len(prompt)
            sound = to_waveform(mel, config.iterations, seed=config.seed)
            yield Sound(name, "continuation", sound, {**more, "prompt_seconds": frames * HOP / SAMPLE_RATE})


def _num_runs(units: np.ndarray) -> int:
    return len(merge_runs(units, np.ones(len(units)))[0]) if len(units) else 0
