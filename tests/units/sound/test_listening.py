import base64
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import torch

from pretrain.config import parse_config
from pretrain.data.indexing import IndexConfig, index
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.data.utterance import num_frames
from pretrain.store.artefact import commit, read_meta
from quantize.clustering import ClusterConfig, cluster
from quantize.encoding import encode
from quantize.encoding_plan import EncodeConfig
from units.corpus.corpus_writing import Document, write_corpus
from units.corpus.sequence import deduplicate
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from units.sound.listening import SynthesizeConfig, synthesize
from units.sound.round_trip import frame_agreement, unit_error_rate
from units.sound.synthesis import SynthesizerConfig, train_synthesizer
from units.sound.synthesizer import as_data_uri, load_synthesizer, write_wav
from units.sound.unit_to_mel import UnitToMel


class Workshop(NamedTuple):
    """Everything that a round trip needs, made of buzzes and noises."""

    root: Path
    corpus: UnitCorpus

    def config(self, out: Path, **other: Any) -> SynthesizeConfig:
        tree = {
            "synthesizer": str(self.root / "synthesizer"),
            "corpus": str(self.corpus.folder),
            "out": str(out),
            "iterations": 8,
            "num": 3,
        }
        return parse_config(SynthesizeConfig, {**tree, **other}, "test")


def babble(rng: np.random.Generator, pitch: float) -> np.ndarray:
    """Two seconds of vowels and noises, a tenth to a fifth of a second each."""
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < 32000:
        time = np.arange(rng.integers(1600, 3200)) / 16000
        sound = rng.integers(0, 5)
        wave = 0.05 * rng.standard_normal(len(time)) * (sound == 0)
        for harmonic in range(1, 20):
            wave += (
                0.1
                * np.exp(-(((harmonic * pitch - 500 * sound) / 250) ** 2))
                * np.sin(2 * np.pi * harmonic * pitch * time)
            )
        parts.append(wave)
    return np.concatenate(parts)[:32000] + 0.001 * rng.standard_normal(32000)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    torch.set_num_threads(1)
    root, rng, rows = tmp_path_factory.mktemp("workshop"), np.random.default_rng(0), []
    for number in range(16):
        speaker = ("low", "high", "stranger")[number % 2 if number < 14 else 2]
        path = root / f"u{number:02d}.wav"
        soundfile.write(
            path, babble(rng, {"low": 110, "high": 190, "stranger": 140}[speaker]), 16000, subtype="FLOAT"
        )
        rows.append(
            {
                "id": path.stem,
                "path": str(path),
                "start": 0,
                "num_samples": 32000,
                "sample_rate": 16000,
                "split": "train" if number < 12 else "test",
                "speaker": speaker,
                "text": f"text {number}",
            }
        )
    write_manifest(root / "manifest", rows, {}, {})
    common = {"manifest": str(root / "manifest")}
    cluster(
        parse_config(
            ClusterConfig,
            {**common, "out": str(root / "codebook"), "features": "mfcc", "cmvn": True, "num_classes": 8},
            "",
        )
    )
    encode(
        parse_config(
            EncodeConfig, {**common, "codebook": str(root / "codebook"), "out": str(root / "labels")}, ""
        )
    )
    labels = Labels(root / "labels")
    documents = [Document(row["id"], row["split"], *deduplicate(labels[row["id"]])) for row in rows]
    write_corpus(
        root / "corpus",
        documents,
        {},
        {},
        vocabulary=Vocabulary(num_units=8),
        codebook=labels.codebook,
        frame_rate_hz=50.0,
        deduplicated=True,
    )
    tree = {
        **common,
        "corpus": str(root / "corpus"),
        "out": str(root / "synthesizer"),
        "batches": {"batch_seconds": 8, "crop_seconds": 1},
        "model": {"dim": 48, "unit_layers": 1, "pitch_layers": 1, "frame_layers": 2, "dropout": 0.0},
        "optimizer": {"lr": 5e-3},
        "training": {"max_steps": 90, "device": "cpu"},
    }
    train_synthesizer(parse_config(SynthesizerConfig, tree, ""))
    return Workshop(root, UnitCorpus(root / "corpus"))


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "sounds.jsonl").read_text().splitlines()]


def test_with_durations_given_the_sound_has_exactly_so_many_frames(workshop: Workshop) -> None:
    synthesizer = load_synthesizer(workshop.root / "synthesizer")
    for document in workshop.corpus.documents("test")[:2].tolist():
        units, durations = workshop.corpus.units(document), workshop.corpus.durations(document)
        wave = synthesizer.speak(units, durations, "low", iterations=2)
        assert (
            wave.dtype == np.float32 and num_frames(len(wave)) == durations.sum() and np.isfinite(wave).all()
        )
    assert num_frames(len(synthesizer.speak([3], [1], iterations=1))) == 1


def test_speech_depends_on_the_speaker_and_the_seed_and_not_on_company(workshop: Workshop) -> None:
    synthesizer = load_synthesizer(workshop.root / "synthesizer")
    low, high, unknown, nobody = synthesizer.speak_all(
        [[1, 2, 3]] * 4, speakers=["low", "high", "who", None], iterations=2
    )
    assert not np.array_equal(low[:2000], high[:2000])
    assert np.array_equal(unknown, nobody)  # the mean voice
    assert np.array_equal(low, synthesizer.speak([1, 2, 3], speaker="low", iterations=2))
    assert not np.array_equal(low, synthesizer.speak([1, 2, 3], speaker="low", iterations=2, seed=1))


def test_units_that_are_frames_last_a_frame_each(workshop: Workshop) -> None:
    synthesizer = load_synthesizer(workshop.root / "synthesizer")
    frames = synthesizer.mel([4, 4, 4, 2], deduplicated=False)
    assert torch.equal(frames, synthesizer.mel([4, 2], [3, 1])) and len(frames) == 8
    # otherwise one unit, of predicted length
    assert torch.equal(synthesizer.mel([4, 4, 4, 2]), synthesizer.mel([4, 2]))


@pytest.mark.parametrize(
    ("units", "durations", "problem"),
    [
        ([], None, "there are no units to speak"),
        ([1, 8], None, r"unit 8 at place 1 is none of the 8 it speaks \(0 .. 7\)"),
        ([1, -1], None, "unit -1 at place 1"),
        ([[1, 2], [3, 4]], None, r"speaks whole numbers at 1 level\(s\), not int64 of shape \(2, 2\)"),
        ([0.5], None, "whole numbers"),
        (3, None, "whole numbers"),
        ([1, 2], [3], "durations are frames, one or more for each of 2 units"),
        ([1, 2], [3, 0], "from 0 on"),
    ],
)
def test_what_cannot_be_spoken_is_refused(
    workshop: Workshop, units: Any, durations: Any, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        load_synthesizer(workshop.root / "synthesizer").speak(units, durations, iterations=1)


def test_the_round_trip_lies_between_its_floors_and_its_ceiling(workshop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "sounds"
    summary = synthesize(
        workshop.config(
            out,
            num=4,
            manifest=str(workshop.root / "manifest"),
            codebook=str(workshop.root / "codebook"),
            iterations=16,
        )
    )
    assert summary["documents"] == 4
    assert summary["sounds"] == dict.fromkeys(("original", "copy", "resynthesis", "resynthesis-predicted"), 4)
    agreement, errors = (
        {key.removeprefix(prefix): value for key, value in summary.items() if key.startswith(prefix)}
        for prefix in ("frame_agreement_", "unit_error_rate_")
    )
    assert agreement["commonest_unit"] < 0.5 * agreement["resynthesis"] < agreement["copy"] <= 1
    assert (
        errors["another_utterance"] > errors["resynthesis"]
        and errors["another_utterance"] > errors["resynthesis_predicted"]
    )
    assert errors["copy"] < 1 and 0.6 < summary["duration_ratio"] < 1.4
    assert json.loads((out / "summary.json").read_text()) == summary
    meta = read_meta(out, "sounds")
    parents = {"corpus": "corpus", "manifest": "manifest", "codebook": "codebook"}
    fingerprints = {
        name: read_meta(workshop.root / folder)["fingerprint"] for name, folder in parents.items()
    }
    assert (
        meta["parents"]
        == {**fingerprints, "synthesizer": load_synthesizer(workshop.root / "synthesizer").fingerprint}
        and len(meta["files"]) == 4 * 4 + 2
    )


def test_sounds_are_a_list_of_utterances_that_can_be_indexed(workshop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "sounds"
    synthesize(
        workshop.config(
            out, manifest=str(workshop.root / "manifest"), durations="true", utterances=["u13", "u15"]
        )
    )
    lines = lines_of(out)
    assert [(line["document"], line["kind"], line.get("voice")) for line in lines] == [
        ("u13", "original", None),
        ("u13", "copy", None),
        ("u13", "resynthesis", "high"),
        ("u15", "original", None),
        ("u15", "copy", None),
        ("u15", "resynthesis", "mean"),
    ]
    index(IndexConfig(source=str(out / "sounds.jsonl"), out=str(tmp_path / "manifest")))
    manifest = Manifest(tmp_path / "manifest")
    assert [row.text for row in manifest] == ["text 13"] * 3 + ["text 15"] * 3 and manifest[
        2
    ].speaker == "high"
    assert manifest[2].num_frames == manifest[0].num_frames


def test_prompts_and_continuations_of_a_language_model_are_spoken(workshop: Workshop, tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    rows = [
        {"document": "a", "prompt": [1, 2, 3], "continuation": [4, 2]},
        {"document": None, "prompt": [], "continuation": [5]},
    ]
    (samples / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    commit(
        samples, "samples", {}, {}, ["samples.jsonl"], codebook=workshop.corpus.codebook, deduplicated=True
    )
    out = tmp_path / "sounds"
    synthesize(workshop.config(out, corpus=None, samples=str(samples), speaker="low"))
    prompt, continuation, bare = lines_of(out)
    assert [line["kind"] for line in (prompt, continuation, bare)] == [
        "prompt",
        "continuation",
        "continuation",
    ]
    assert 0 < continuation["prompt_seconds"] < continuation["duration"] and bare["prompt_seconds"] == 0
    synthesizer = load_synthesizer(workshop.root / "synthesizer")
    spoken = synthesizer.speak([1, 2, 3, 4, 2], speaker="low", iterations=8)
    assert continuation["duration"] == len(spoken) / 16000 and {line["voice"] for line in lines_of(out)} == {
        "low"
    }
    lasting = synthesizer.mel_and_frames([1, 2, 3, 4, 2], speaker="low")[1]
    # the prompt's end in the whole, not the prompt alone
    assert continuation["prompt_seconds"] == lasting[:3].sum() / 50
    commit(
        samples, "samples", {}, {}, ["samples.jsonl"], codebook=workshop.corpus.codebook, deduplicated=False
    )
    synthesize(workshop.config(tmp_path / "frames", corpus=None, samples=str(samples)))
    assert lines_of(tmp_path / "frames")[1]["prompt_seconds"] == 3 / 50
    commit(samples, "samples", {}, {}, ["samples.jsonl"], codebook="0ther", deduplicated=True)
    with pytest.raises(
        ValueError,
        match=rf"units with codebook '{workshop.corpus.codebook}', but .*samples has codebook '0ther'",
    ):
        synthesize(workshop.config(tmp_path / "none", corpus=None, samples=str(samples)))


def test_where_the_model_takes_over_is_told_by_durations_in_the_whole(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lasts_as_its_company(
        model: UnitToMel, units: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        durations = torch.full((len(units),), len(units))
        return torch.zeros(2 * int(durations.sum()), 80), durations

    monkeypatch.setattr(UnitToMel, "speak", lasts_as_its_company)
    row = {"document": "a\u2028b", "prompt": [1, 1, 3], "continuation": [3, 2]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    commit(
        tmp_path, "samples", {}, {}, ["samples.jsonl"], codebook=workshop.corpus.codebook, deduplicated=True
    )
    synthesize(workshop.config(tmp_path / "sounds", corpus=None, samples=str(tmp_path)))
    with open(tmp_path / "sounds" / "sounds.jsonl", encoding="utf-8") as file:
        prompt, continuation = map(json.loads, file)
    assert prompt["duration"] == (4 * 320 + 80) / 16000  # two runs of two frames each
    # two of three, three frames each
    assert continuation["prompt_seconds"] == 2 * 3 / 50 and continuation["document"] == "a\u2028b"


def test_a_speaker_that_was_never_learned_is_refused_with_the_nearest_name(
    workshop: Workshop, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"speaker: 'hihg' is none of the 2 voices of .*synthesizer; did you mean 'high'\?"
    ):
        synthesize(workshop.config(tmp_path / "sounds", speaker="hihg"))
    with pytest.raises(ValueError, match=r"speaker: 'george' is none of the 2 voices of .*: high, low"):
        synthesize(workshop.config(tmp_path / "sounds", speaker="george"))


@pytest.mark.parametrize("more", [{}, {"codebook": "codebook"}])
def test_recordings_of_other_lengths_under_the_same_ids_are_refused(
    workshop: Workshop, tmp_path: Path, more: dict[str, str]
) -> None:
    shorter = [replace(row, num_samples=28800) for row in Manifest(workshop.root / "manifest")]  # by 0.2 s
    rows = [asdict(row) for row in shorter]
    write_manifest(tmp_path / "shorter", rows, {}, {})
    folders = {key: str(workshop.root / folder) for key, folder in more.items()}
    with pytest.raises(
        ValueError,
        match=r"corpus: 99 frames for utterance 'u12', which has 89 in .*shorter; give the manifest that was",
    ):
        synthesize(workshop.config(tmp_path / "sounds", manifest=str(tmp_path / "shorter"), **folders))
    write_manifest(tmp_path / "fewer", rows[:12], {}, {})
    with pytest.raises(ValueError, match=r"fewer: no utterance 'u12', which .*corpus has"):
        synthesize(workshop.config(tmp_path / "sounds", manifest=str(tmp_path / "fewer")))


def test_a_corpus_of_another_codebook_is_refused_with_both_sides(workshop: Workshop, tmp_path: Path) -> None:
    documents = [Document("a", "test", np.array([1], np.uint16), np.array([3], np.uint16))]
    write_corpus(
        tmp_path / "corpus",
        documents,
        {},
        {},
        vocabulary=Vocabulary(num_units=8),
        codebook="0ther",
        frame_rate_hz=50.0,
        deduplicated=True,
    )
    with pytest.raises(
        ValueError, match=rf"codebook '{workshop.corpus.codebook}', but .*corpus has codebook '0ther'"
    ):
        synthesize(workshop.config(tmp_path / "sounds", corpus=str(tmp_path / "corpus")))


def test_the_round_trip_wants_the_codebook_of_the_corpus(workshop: Workshop, tmp_path: Path) -> None:
    tree = {
        "manifest": str(workshop.root / "manifest"),
        "out": str(tmp_path / "codebook"),
        "features": "mfcc",
        "num_classes": 8,
    }
    cluster(parse_config(ClusterConfig, tree, ""))
    with pytest.raises(
        ValueError, match=rf"is codebook \w+, and .* has units of codebook {workshop.corpus.codebook}"
    ):
        synthesize(workshop.config(tmp_path / "sounds", codebook=str(tmp_path / "codebook")))


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"corpus": None}, "give a `corpus`, the `samples` of a language model, or both"),
        (
            {"corpus": None, "samples": "s", "codebook": "c"},
            "codebook: the round trip compares with the units of a `corpus`",
        ),
    ],
)
def test_a_config_with_nothing_to_say_is_refused(
    workshop: Workshop, tmp_path: Path, other: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        workshop.config(tmp_path, **other)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"utterances": []}, "the list is empty"),
        ({"utterances": ["nobody"]}, "no document 'nobody'"),
        ({"split": "x"}, "no documents in split 'x'"),
    ],
)
def test_no_documents_are_a_message(
    workshop: Workshop, tmp_path: Path, other: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        synthesize(workshop.config(tmp_path / "sounds", **other))


def test_agreement_and_error_rate_count_frames_and_units() -> None:
    recorded = [np.array([[1], [1], [2], [3]]), np.array([[4], [4]])]
    heard = [np.array([[1], [2], [2], [2]]), np.array([[4], [4]])]
    assert frame_agreement(recorded, heard) == pytest.approx(4 / 6)
    assert unit_error_rate(recorded, heard) == pytest.approx(1 / 4)  # 1 2 3 -> 1 2, and 4 -> 4
    assert unit_error_rate(recorded, recorded) == 0


def test_sound_in_a_page_and_in_a_file_is_not_clipped(tmp_path: Path) -> None:
    wave = 3 * np.sin(np.arange(16000) * 0.05).astype(np.float32)
    write_wav(tmp_path / "loud.wav", wave)
    stored, rate = soundfile.read(tmp_path / "loud.wav")
    # 16 bits
    assert rate == 16000 and np.abs(stored).max() <= 0.9901 and np.allclose(stored, wave * 0.33, atol=1e-4)
    head, _, body = as_data_uri(wave).partition(";base64,")
    decoded, rate = soundfile.read(io.BytesIO(base64.b64decode(body)))
    assert (
        head in ("data:audio/mpeg", "data:audio/wav") and rate == 16000 and abs(len(decoded) - 16000) < 2500
    )  # MP3 pads
