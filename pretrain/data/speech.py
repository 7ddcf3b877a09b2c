"""`speech`: synthetic speech of many voices with true phone and word times and speakers, for trying
everything without data.

espeak-ng speaks sentences of a small grammar and reports when each phone begins, and of which word. A voice
is one of its variants with a drawn pitch, pitch range, rate and spectral tilt; every utterance has its own
level and noise. Some voices, with their variants, are held out for dev and test. The sentences agree over
distance (number, tense, gender), so that there is something to learn beyond neighbouring words.
`speech.jsonl` is a source for `index`.
"""

import json
import os
from concurrent.futures import as_completed
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import soundfile
import soxr
from pydantic import Field, model_validator

from pretrain.config import Config, PathStr, Seed
from pretrain.data.espeak import Espeak, library_paths
from pretrain.data.utterance import SAMPLE_RATE
from pretrain.progress import progress
from pretrain.store.artefact import commit, require_absent
from pretrain.store.disk import atomic_path
from pretrain.store.interrupts import process_pool

# espeak-ng's variants that sound like people.
VARIANTS = (
    "m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 Alex Alicia Andrea Andy Annie Denis Gene Gene2 Hugo Jacky Lee "
    "Marco Mario Michael Mike Reed adam anika antonio aunty belinda benjamin boris caleb david ed edward "
    "grandma grandpa gustave ian john linda max michel miguel norbert pablo paul pedro quincy rob robert "
    "sandro shelby steph travis victor zac"
).split()

# The grammar. In each list the first is the most frequent (weights 1, 1/2, 1/3, ...).
SUBJECTS = [
    ("boy", "boys", "he"),
    ("girl", "girls", "she"),
    ("father", "fathers", "he"),
    ("teacher", "teachers", "she"),
]
SUBJECTS += [("horse", "horses", "it"), ("bird", "birds", "it")]
PLACES = [("house", "houses"), ("river", "rivers"), ("bridge", "bridges"), ("garden", "gardens")]
VERBS = [  # plural, singular, past, and what it is done to
    ("watch", "watches", "watched", ["fish", "water", "children"]),
    ("find", "finds", "found", ["book", "treasure", "toy", "shoe"]),
    ("bring", "brings", "brought", ["bread", "orange", "water"]),
    ("measure", "measures", "measured", ["water", "chair", "treasure"]),
    ("enjoy", "enjoys", "enjoyed", ["music", "bread", "orange"]),
    ("choose", "chooses", "chose", ["toy", "book", "shoe", "chair"]),
    ("hear", "hears", "heard", ["music", "children", "water"]),
    ("catch", "catches", "caught", ["fish", "toy", "shoe"]),
]
ADJECTIVES = ["old", "young", "small", "good", "yellow", "pretty", "white", "purple"]
PREPOSITIONS = ["near", "with", "under", "behind"]
ADVERBS = ["always", "usually", "quickly", "slowly"]
POSSESSIVES = {"he": "his", "she": "her", "it": "its", "they": "their"}


class SpeechConfig(Config):
    """How much speech of how many voices (dev and test voices included), evenly spread over them."""

    out: PathStr
    hours: Annotated[float, Field(gt=0)]
    num_voices: Annotated[int, Field(ge=1)] = 32
    num_dev_voices: Annotated[int, Field(ge=0)] = 4
    num_test_voices: Annotated[int, Field(ge=0)] = 6
    seed: Seed = 0
    language: str = "en-us"
    # processes; 0: one for each core. The speech does not depend on it
    workers: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _holds_out_some_voices(self) -> Self:
        held_out = self.num_dev_voices + self.num_test_voices
        if held_out >= min(self.num_voices, len(VARIANTS)):
            raise ValueError(
                f"{held_out} held-out voices leave none to train on; of {self.num_voices}, at most "
                f"{min(self.num_voices, len(VARIANTS)) - 1} can be held out"
            )
        return self


class Voice(NamedTuple):
    """What makes a voice. Pitch and its range are espeak's 0 to 99, the rate is in words a minute."""

    number: int
    name: str
    split: str
    variant: str
    pitch: int
    pitch_range: int
    rate: int
    tilt: float
    snr_db: float


def speech(config: SpeechConfig) -> dict[str, Any]:
    """Speak `config.hours` into `out/audio/VOICE/VOICE-0001.wav` (16 kHz, 16 bit, mono) and list them in
    `out/speech.jsonl`."""
    require_absent(config.out)
    library_paths()
    voices = draw_voices(config)
    seconds = 3600 * config.hours / len(voices)
    rows: dict[int, list[dict[str, Any]]] = {}
    # Fresh processes: espeak-ng keeps its state in globals and changes the locale, and forking is unsafe once
    # torch has threads.
    workers = min(config.workers or os.cpu_count() or 1, len(voices))
    with process_pool(workers) as pool, progress("speech", len(voices), "voice") as advance:
        futures = {pool.submit(speak_voice, voice, seconds, config): voice.number for voice in voices}
        for future in as_completed(futures):
            rows[futures[future]] = future.result()
            advance(1)
    listed = [row for number in sorted(rows) for row in rows[number]]
    with atomic_path(Path(config.out) / "speech.jsonl") as temporary:
        temporary.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in listed), encoding="utf-8"
        )
    summary = {
        **_count(listed),
        "splits": {
            split: _count([row for row in listed if row["split"] == split])
            for split in ("train", "dev", "test")
        },
        "num_phones": len({phone for row in listed for _, _, phone in row["phones"]}),
        "num_words": len({word for row in listed for word in row["text"].split()}),
    }
    commit(Path(config.out), "speech", config.resolved(), {}, ["speech.jsonl"], **summary)
    return summary


def _count(rows: list[dict[str, Any]]) -> dict[str, Any]:
    hours = sum(row["duration"] for row in rows) / 3600
    return {"utterances": len(rows), "hours": hours, "speakers": len({row["speaker"] for row in rows})}


def draw_voices(config: SpeechConfig) -> list[Voice]:
    """Test and dev voices have espeak variants of their own; train voices share the others when there are
    more of them."""
    rng = np.random.default_rng([config.seed, 0])
    splits = ["test"] * config.num_test_voices + ["dev"] * config.num_dev_voices
    variants = rng.permutation(VARIANTS).tolist()
    held_out, shared = variants[: len(splits)], variants[len(splits) :]
    splits += ["train"] * (config.num_voices - len(splits))
    voices = []
    for number, split in enumerate(splits):
        variant = (
            held_out[number] if number < len(held_out) else shared[(number - len(held_out)) % len(shared)]
        )
        pitch, pitch_range, rate = rng.integers([25, 20, 140], [76, 81, 211]).tolist()
        name = f"v{number:02d}_{variant.lower()}"
        voices.append(
            Voice(
                number,
                name,
                split,
                variant,
                pitch,
                pitch_range,
                rate,
                rng.uniform(-0.3, 0.6),
                rng.uniform(12, 28),
            )
        )
    return voices


# Sentences


def compose(rng: np.random.Generator) -> str:
    """A sentence with a comma where a speaker would pause. Verbs agree with the subject and the time,
    pronouns with the subject."""
    tense = _pick(rng, ["present", "past", "future"])
    time = {"present": "today", "past": "yesterday", "future": "tomorrow"}[tense]
    singular, plural, pronoun = _pick(rng, SUBJECTS)
    many = rng.random() < 0.4
    words = [time + ","] if rng.random() < 0.5 else []
    words += [_pick(rng, ["the", "these", "three"] if many else ["the", "this", "every"])]
    words += [_pick(rng, ADJECTIVES)] if rng.random() < 0.6 else []
    words += [plural if many else singular]
    if rng.random() < 0.5:
        words += [_pick(rng, PREPOSITIONS), "the", _pick(rng, PLACES)[rng.integers(2)]]
    pronoun = "they" if many else pronoun
    words += _predicate(rng, tense, pronoun)
    if rng.random() < 0.5:
        words[-1] += ","
        words += [_pick(rng, ["because", "and", "but"]), pronoun, *_predicate(rng, tense, pronoun)]
    return " ".join(words)


def _predicate(rng: np.random.Generator, tense: str, pronoun: str) -> list[str]:
    plural, singular, past, objects = _pick(rng, VERBS)
    adverb = [_pick(rng, ADVERBS)] if rng.random() < 0.3 else []
    verb = past if tense == "past" else plural if tense == "future" or pronoun == "they" else singular
    words = [
        *(["will"] if tense == "future" else []),
        *adverb,
        verb,
        "the" if rng.random() < 0.6 else POSSESSIVES[pronoun],
    ]
    return [*words, *([_pick(rng, ADJECTIVES)] if rng.random() < 0.4 else []), _pick(rng, objects)]


def _pick(rng: np.random.Generator, options: list[Any]) -> Any:
    weights = np.cumsum(1 / np.arange(1, len(options) + 1))
    return options[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]


# Speaking


def speak_voice(voice: Voice, seconds: float, config: SpeechConfig) -> list[dict[str, Any]]:
    """Write one voice's utterances, at least `seconds` of them, and return their rows."""
    noise = int(np.random.default_rng([config.seed, 2, voice.number]).integers(2**31))
    espeak = Espeak(f"{config.language}+{voice.variant}", voice.rate, voice.pitch, voice.pitch_range, noise)
    folder = Path(config.out, "audio", voice.name)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    spoken = 0.0
    while spoken < seconds:
        rng = np.random.default_rng([config.seed, 1, voice.number, len(rows)])
        sentence = compose(rng)
        said = espeak.say(sentence)
        wave = _record(said.wave, espeak.sample_rate, voice, rng)
        name = f"{voice.name}-{len(rows) + 1:04d}"
        soundfile.write(folder / f"{name}.wav", wave, SAMPLE_RATE, subtype="PCM_16")
        spoken += len(wave) / SAMPLE_RATE
        rows.append(
            {
                "audio_filepath": f"audio/{voice.name}/{name}.wav",
                "id": name,
                "text": sentence.replace(",", ""),
                "speaker": voice.name,
                "split": voice.split,
                "duration": len(wave) / SAMPLE_RATE,
                "phones": said.phones,
                "words": said.words,
            }
        )
    return rows


def _record(wave: np.ndarray, sample_rate: int, voice: Voice, rng: np.random.Generator) -> np.ndarray:
    """The voice's spectral tilt, then a level and coloured noise of the utterance's own: int16 at 16 kHz."""
    wave = soxr.resample(wave, sample_rate, SAMPLE_RATE)
    wave = np.convolve(wave, np.array([1, -voice.tilt], np.float32))[: len(wave)]
    wave *= 10 ** (rng.uniform(-15, -4) / 20) / max(float(np.abs(wave).max()), 1e-6)
    noise = rng.standard_normal(len(wave) + 1, dtype=np.float32)
    noise = noise[1:] + rng.uniform(0, 0.9) * noise[:-1]
    snr_db = voice.snr_db + rng.uniform(-2, 2)
    noise *= np.sqrt(np.mean(wave**2) / np.mean(noise**2)) * 10 ** (-snr_db / 20)
    return np.round(np.clip(wave + noise, -1, 1) * 32767).astype(np.int16)
