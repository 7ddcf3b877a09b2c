import hashlib
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pretrain.config import parse_config
from pretrain.data.espeak import Espeak, PhoneEvent, true_phones, true_words
from pretrain.data.indexing import IndexConfig, index
from pretrain.data.manifest import Manifest
from pretrain.data.speech import (
    ADVERBS,
    POSSESSIVES,
    SUBJECTS,
    VARIANTS,
    VERBS,
    SpeechConfig,
    compose,
    draw_voices,
    speech,
)
from pretrain.store.artefact import read_meta

pytest.importorskip("espeakng_loader")


def small(out: Path, **keys: Any) -> SpeechConfig:
    sizes: dict[str, Any] = {"hours": 0.02, "num_voices": 6, "num_dev_voices": 1, "num_test_voices": 2}
    return SpeechConfig(out=str(out), **(sizes | keys))


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.suffix in (".wav", ".jsonl")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech") / "corpus"
    speech(small(folder, workers=2))
    return folder


@pytest.fixture(scope="module")
def rows(corpus: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (corpus / "speech.jsonl").read_text().splitlines()]


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(corpus: Path, tmp_path: Path) -> None:
    speech(small(tmp_path, workers=1))
    assert content(tmp_path) == content(corpus)


def test_the_recordings_are_what_the_list_says(corpus: Path, rows: list[dict[str, Any]]) -> None:
    meta = read_meta(corpus, "speech")
    assert meta["utterances"] == len(rows) == len({row["id"] for row in rows}) == len(content(corpus)) - 1
    for row in rows:
        info = soundfile.info(corpus / row["audio_filepath"])
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert info.frames / 16000 == row["duration"]
        assert row["audio_filepath"] == f"audio/{row['speaker']}/{row['id']}.wav"
    seconds = {row["speaker"]: 0.0 for row in rows}
    for row in rows:
        seconds[row["speaker"]] += row["duration"]
    # a sentence lasts less than 8 s
    assert len(seconds) == 6 and all(12 <= total < 12 + 8 for total in seconds.values())


def test_phones_cover_every_utterance(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        phones = row["phones"]
        assert phones[0][0] == 0 and phones[-1][1] == pytest.approx(row["duration"], abs=1e-4)
        assert all(start < end for start, end, _ in phones)
        assert all(first[1] == second[0] for first, second in pairwise(phones))
        assert all(not (first[2] == second[2] == "sil") for first, second in pairwise(phones))
        assert len(phones) > 2 * len(row["text"].split())


def test_words_are_those_of_the_transcript_and_made_of_whole_phones(rows: list[dict[str, Any]]) -> None:
    """Between the words are pauses and nothing else. "with the", which espeak speaks as one word, is told
    apart."""
    spoken: dict[str, set[str]] = {}
    together = 0
    for row in rows:
        words = row["words"]
        assert " ".join(word for _, _, word in words) == row["text"]
        assert all(first[1] <= second[0] for first, second in pairwise(words))
        left = {tuple(phone) for phone in row["phones"]}
        for start, end, word in words:
            inside = [phone for phone in row["phones"] if start <= phone[0] < end]
            assert (
                inside
                and (inside[0][0], inside[-1][1]) == (start, end)
                and all(phone[2] != "sil" for phone in inside)
            )
            spoken.setdefault(word, set()).add(" ".join(phone for _, _, phone in inside))
            left -= {tuple(phone) for phone in inside}
        assert {phone for _, _, phone in left} <= {"sil"}
        together += sum(first[2] == "with" and second[2] == "the" for first, second in pairwise(words))
    assert spoken["the"] <= {"ð ə", "ð ɪ", "ð i"} and together and spoken["with"] == {"w ɪ ð"}
    assert spoken["water"] <= {"w ɔ ɾ ɚ"} and spoken["fish"] <= {"f ɪ ʃ"}


def test_words_that_are_spoken_as_one_share_its_phones_by_their_letters() -> None:
    # "of the" is one word for espeak, whose phones all point at "of"; a pause has no name; the last phone
    # begins after the end.
    events = [
        (0.0, "", 0),
        (0.1, "ʌ", 0),
        (0.2, "v", 0),
        (0.3, "ð", 0),
        (0.4, "ə", 0),
        (0.5, "", 7),
        (0.6, "s", 8),
        (0.9, "z", 8),
    ]
    assert true_words("of the, sea", [PhoneEvent(*event) for event in events], 0.8) == [
        (0.1, 0.3, "of"),
        (0.3, 0.5, "the"),
        (0.6, 0.8, "sea"),
    ]


def test_the_alignment_is_true(corpus: Path, rows: list[dict[str, Any]]) -> None:
    """Sibilants hold their energy above 3 kHz and vowels below; pauses are quieter than vowels. Shifted by
    100 ms they do not."""

    def measure(shift: float) -> tuple[float, float]:
        high: dict[str, list[float]] = {"sibilant": [], "vowel": []}
        level: dict[str, list[float]] = {"sil": [], "vowel": []}
        for row in rows:
            wave, _ = soundfile.read(corpus / row["audio_filepath"])
            for start, end, phone in row["phones"]:
                kind = (
                    "sibilant"
                    if phone in ("s", "ʃ", "tʃ")
                    else "vowel"
                    if phone in ("ɑ", "ɔ", "oʊ", "ɜ", "aɪ", "eɪ")
                    else phone
                )
                piece = wave[round((start + shift) * 16000) : round((end + shift) * 16000)]
                if kind not in ("sibilant", "vowel", "sil") or len(piece) < 480:
                    continue
                power = np.abs(np.fft.rfft(piece * np.hanning(len(piece)))) ** 2
                if kind in high:
                    high[kind].append(float(power[len(power) * 3 // 8 :].sum() / power.sum()))
                if kind in level:
                    level[kind].append(float(np.log(np.mean(piece**2) + 1e-9)))
        return (
            float(np.median(high["sibilant"]) - np.median(high["vowel"])),
            float(np.median(level["vowel"]) - np.median(level["sil"])),
        )

    contrast, loudness = measure(0.0)
    assert contrast > 0.4 and loudness > 2.0
    shifted_contrast, shifted_loudness = measure(0.1)
    assert shifted_contrast < contrast / 2 and shifted_loudness < loudness / 2


def test_it_is_ready_to_index(corpus: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    summary = index(IndexConfig(source=str(corpus / "speech.jsonl"), out=str(tmp_path / "m")))
    assert (
        summary["utterances"] == len(rows)
        and summary["quarantined"] == 0
        and summary["has_text"]
        and summary["has_phones"]
    )
    assert {split: counts["speakers"] for split, counts in summary["splits"].items()} == {
        "train": 3,
        "dev": 1,
        "test": 2,
    }
    manifest = Manifest(tmp_path / "m")
    assert manifest.ids == [row["id"] for row in rows]
    assert [[list(phone) for phone in u.phones or []] for u in manifest] == [row["phones"] for row in rows]
    assert [[list(word) for word in u.words or []] for u in manifest] == [row["words"] for row in rows]
    assert read_meta(tmp_path / "m")["parents"] == {"source": read_meta(corpus)["fingerprint"]}


@pytest.mark.parametrize("num_voices", [12, 32, 100])
def test_held_out_voices_use_variants_of_their_own(num_voices: int) -> None:
    voices = draw_voices(small(Path("x"), num_voices=num_voices, num_dev_voices=4, num_test_voices=6, seed=3))
    variants = {split: [v.variant for v in voices if v.split == split] for split in ("train", "dev", "test")}
    assert (len(variants["dev"]), len(variants["test"]), len(variants["train"])) == (4, 6, num_voices - 10)
    held_out = variants["dev"] + variants["test"]
    assert len(set(held_out)) == 10 and not set(held_out) & set(variants["train"])
    assert len({v.name for v in voices}) == num_voices
    assert len(set(variants["train"])) == min(num_voices - 10, len(VARIANTS) - 10)


def test_another_seed_speaks_otherwise() -> None:
    assert draw_voices(small(Path("x"), seed=1)) != draw_voices(small(Path("x"), seed=2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_speaker_is_untouched_by_others_and_keeps_an_english_inventory(variant: str) -> None:
    def say() -> tuple[np.ndarray, list[tuple[float, float, str]]]:
        speaker = Espeak(f"en-us+{variant}", 170, 50, 50, seed=5)
        speaker.say("the boy")
        other.say("and the teacher")
        return speaker.say("these boys watch a fish")[:2]

    other = Espeak("en-us+m1", 150, 30, 60, seed=6)
    (first, phones), (second, _) = say(), say()
    np.testing.assert_array_equal(first, second)
    assert (
        first.any()
        and [phone for _, _, phone in phones if phone != "sil"] == "ð i z b ɔɪ z w ɑ tʃ ə f ɪ ʃ".split()
    )


def test_the_corpus_has_a_known_inventory() -> None:
    speaker = Espeak("en-us+m3", 200, 50, 50, seed=0)
    rng = np.random.default_rng(0)
    phones: set[str] = set()
    words: set[str] = set()
    for _ in range(300):
        sentence = compose(rng)
        words |= set(sentence.replace(",", "").split())
        phones |= {phone for _, _, phone in speaker.say(sentence).phones}
    assert len(phones) == 48 and len(words) == 91
    assert phones >= set(
        "sil p b t d k ɡ f v θ ð s z ʃ ʒ h tʃ dʒ m n ŋ l ɹ w j ɪ i ɛ æ ɑ ɔ ʊ u ʌ ə ɚ ɜ aɪ aʊ eɪ oʊ ɔɪ".split()
    )


def test_sentences_agree_over_distance() -> None:
    pronoun_of = {
        noun: pronoun
        for singular, plural, pronoun in SUBJECTS
        for noun, pronoun in ((singular, pronoun), (plural, "they"))
    }
    forms = {
        form: (verb[0], kind)
        for verb in VERBS
        for form, kind in zip(verb[:3], ("plural", "singular", "past"), strict=True)
    }
    rng = np.random.default_rng(1)
    for _ in range(500):
        words = compose(rng).replace(",", "").split()
        pronoun = pronoun_of[next(word for word in words if word in pronoun_of)]
        assert {word for word in words if word in POSSESSIVES} <= {pronoun}
        assert {word for word in words if word in POSSESSIVES.values()} <= {POSSESSIVES[pronoun]}
        future = "will" in words
        for position, word in enumerate(words):
            if word not in forms:
                continue
            before = [w for w in words[:position] if w not in ADVERBS][-1]
            expected = "plural" if before == "will" or pronoun == "they" else "singular"
            assert (before == "will") == future
            assert forms[word][1] in (expected, "past") and not (future and forms[word][1] == "past")
        kinds = {forms[word][1] for word in words if word in forms}
        assert len(kinds) == 1 and (words[0] != "yesterday" or kinds == {"past"})
        assert words[0] != "today" or "past" not in kinds
        assert (words[0] == "tomorrow") <= future


def test_phones_last_until_the_next_begins() -> None:
    events = [(0.01, "ð"), (0.05, "ˈiː"), (0.11, ""), (0.11, "ᵻ"), (0.2, ""), (0.3, ""), (0.4, "z")]
    assert true_phones([PhoneEvent(*event, 0) for event in events], 0.35) == [
        (0.0, 0.01, "sil"),
        (0.01, 0.05, "ð"),
        (0.05, 0.11, "i"),
        (0.11, 0.2, "ɪ"),
        (0.2, 0.35, "sil"),
    ]


def test_a_missing_library_is_an_error_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ValueError, match=r"needs espeakng-loader; pip install '.\[demo\]'"):
        speech(small(tmp_path))


def test_an_unknown_language_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'klingonese\+\w+': espeak-ng has no such voice"):
        speech(small(tmp_path, language="klingonese", workers=1))
    assert not (tmp_path / "meta.json").exists()


def test_held_out_voices_must_leave_some_to_train_on() -> None:
    with pytest.raises(
        ValueError,
        match=r"conf.toml: 10 held-out voices leave none to train on; of 10, at most 9 can be held out",
    ):
        parse_config(SpeechConfig, {"out": "x", "hours": 1, "num_voices": 10}, "conf.toml")
