import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from pretrain.config import parse_config
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.data.utterance import num_frames
from units.corpus.corpus_writing import Document, write_corpus
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from units.sound.synthesis import (
    SynthesizerConfig,
    SynthesizerTask,
    crop_runs,
    load_unit_to_mel,
    merge_runs,
    require_speakable,
    train_synthesizer,
)
from units.sound.unit_to_mel import SynthesizerModelConfig, UnitToMel

NUM_UNITS = 5
TINY = {"dim": 32, "unit_layers": 1, "pitch_layers": 1, "frame_layers": 1, "dropout": 0.0}


def sing(frames: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """Labels per frame to sound: unit 0 is noise, unit u a buzz of this pitch with a formant at 400 u Hz."""
    samples = 320 * len(frames) + 80
    time = np.arange(samples) / 16000
    units = np.repeat(frames, 320)[:samples]
    units = np.concatenate([units, np.repeat(units[-1:], samples - len(units))])
    wave = np.where(units == 0, 0.03 * rng.standard_normal(samples), 0.0)
    for harmonic in range(1, 20):
        loudness = np.exp(-(((harmonic * pitch - 400 * units) / 200) ** 2)) * (units > 0)
        wave += 0.1 * loudness * np.sin(2 * np.pi * pitch * harmonic * time)
    return (wave + 0.0005 * rng.standard_normal(samples)).astype(np.float32)


def make(
    root: Path, count: int = 12, *, deduplicated: bool = True, levels: int = 1, extra: int = 0, **other: Any
) -> SynthesizerConfig:
    """Sung utterances of two speakers, unit u lasting about 2 + 2 u frames, and their corpus."""
    rng = np.random.default_rng(0)
    rows, documents = [], []
    root.mkdir(exist_ok=True)
    for number in range(count):
        units = rng.integers(0, NUM_UNITS, 12)
        units = units[np.concatenate([[True], units[1:] != units[:-1]])]
        durations = 2 + 2 * units + rng.integers(0, 2, len(units))
        frames = np.repeat(units, durations)
        wave = sing(frames, (110, 180)[number % 2], rng)
        path = root / f"u{number}.wav"
        soundfile.write(path, wave, 16000, subtype="FLOAT")
        split = "dev" if number % 6 == 5 else "train"
        rows.append(
            {
                "id": path.stem,
                "path": str(path),
                "start": 0,
                "num_samples": len(wave),
                "sample_rate": 16000,
                "split": split,
                "speaker": ("low", "high")[number % 2],
            }
        )
        if not deduplicated:
            units, durations = frames, np.ones(len(frames), np.int64)
        durations = durations + extra
        units = units if levels == 1 else np.stack([units, (units + 1) % NUM_UNITS], axis=1)
        documents.append(Document(path.stem, split, units.astype(np.uint16), durations.astype(np.uint16)))
    write_manifest(root / "manifest", rows, {}, {})
    write_corpus(
        root / "corpus",
        documents,
        {},
        {},
        vocabulary=Vocabulary(num_units=NUM_UNITS, num_levels=levels),
        codebook="c0de",
        frame_rate_hz=50.0,
        deduplicated=deduplicated,
    )
    tree = {
        "manifest": str(root / "manifest"),
        "corpus": str(root / "corpus"),
        "out": str(root / "synthesizer"),
        "model": TINY,
        "batches": {"batch_seconds": 6, "crop_seconds": 0.7},
        "training": {"max_steps": 40, "device": "cpu"},
        **other,
    }
    return parse_config(SynthesizerConfig, tree, "test")


def task_of(config: SynthesizerConfig) -> SynthesizerTask:
    return SynthesizerTask(config, Manifest(config.manifest), UnitCorpus(config.corpus))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SynthesizerConfig:
    torch.set_num_threads(1)
    config = make(
        tmp_path_factory.mktemp("sung"), optimizer={"lr": 5e-3}, training={"max_steps": 80, "device": "cpu"}
    )
    train_synthesizer(config)
    return config


def test_a_crop_holds_the_units_heard_in_it_and_says_which_it_cuts() -> None:
    units, durations = np.array([[7], [8], [9], [5]]), np.array([2, 3, 4, 1])
    frames = np.repeat(units[:, 0], durations)
    for first in range(10):
        for count in range(1, 11 - first):
            some, heard, whole = crop_runs(units, durations, first, count)
            assert np.repeat(some[:, 0], heard).tolist() == frames[first : first + count].tolist()
            assert [int(d) for u, d in zip(units[:, 0], durations, strict=True) if u in some[whole]] == heard[
                whole
            ].tolist()


def test_equal_units_in_a_row_are_one_at_all_levels_together() -> None:
    units = np.array([[1, 1], [1, 1], [1, 2], [3, 2], [3, 2]], np.uint16)
    runs, frames = merge_runs(units, np.array([1, 2, 1, 1, 4], np.uint16))
    assert runs.tolist() == [[1, 1], [1, 2], [3, 2]] and frames.tolist() == [3, 1, 5]
    alone, _ = merge_runs(np.array([4, 4]), np.array([1, 1]))
    assert alone.tolist() == [[4]]


def test_every_mel_frame_of_a_batch_comes_with_the_unit_that_is_heard_in_it(tmp_path: Path) -> None:
    config = make(tmp_path, 4)
    task = task_of(config)
    batch = task.collate(task.train_set.items, 0)
    assert (batch.durations.sum(1) <= 35).all() and batch.mel.shape[1] == 2 * batch.durations.sum(1).max()
    for units, durations, mel in zip(batch.units[:, :, 0], batch.durations, batch.mel, strict=True):
        labels = torch.repeat_interleave(units, durations)[2:-2]
        formant = mel[4 : 4 + 2 * len(labels), :].argmax(1)[::2]  # the loudest band rises with the unit
        # not at a border
        within = labels[1:-1].eq(labels[2:]) & labels[1:-1].eq(labels[:-2]) & (labels[1:-1] > 0)
        heard = [
            formant[1:-1][within & (labels[1:-1] == unit)].float().mean()
            for unit in range(1, 5)
            if (within & (labels[1:-1] == unit)).any()
        ]
        assert heard == sorted(heard)


@pytest.mark.parametrize("levels", [1, 2])
def test_a_corpus_that_was_not_deduplicated_teaches_the_same(tmp_path: Path, levels: int) -> None:
    batches = []
    for deduplicated in (True, False):
        task = task_of(make(tmp_path / str(deduplicated), 4, deduplicated=deduplicated, levels=levels))
        batches.append(task.collate(task.train_set.items, 1))
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one, other)


def test_the_loss_of_a_batch_is_the_sum_over_any_split_of_it_so_padding_moves_nothing(tmp_path: Path) -> None:
    task = task_of(make(tmp_path, 8))
    items = task.train_set.items
    whole = task.model(task.collate(items, 0))
    parts = [task.model(task.collate(part, 0)) for part in (items[:1], items[1:4], items[4:])]
    assert whole.count == sum(part.count for part in parts)
    torch.testing.assert_close(
        whole.total, torch.stack([part.total for part in parts]).sum(), rtol=1e-5, atol=1e-4
    )  # order of sums


def test_training_learns_bands_durations_voicing_and_the_pitch_of_each_speaker(
    trained: SynthesizerConfig,
) -> None:
    model, meta, _ = load_unit_to_mel(trained.out)
    assert (
        meta["codebook"] == "c0de" and meta["speakers"] == ["high", "low"] and meta["num_units"] == NUM_UNITS
    )
    untrained = UnitToMel(SynthesizerModelConfig(**TINY), NUM_UNITS, 1, 2).eval()
    task = task_of(trained)
    batch = task.collate_validation(np.arange(2))
    for buffer in ("mel_mean", "mel_deviation", "styles"):
        setattr(untrained, buffer, getattr(model, buffer))
    with torch.no_grad():
        before, after = (
            {name: float(total / count) for name, (total, count) in each(batch).metrics.items()}
            for each in (untrained, model)
        )
    assert after["mel_decibels"] < 0.7 * before["mel_decibels"]
    assert after["duration_squared_error"] < 0.15 and after["voicing_accuracy"] > 0.9
    units = torch.tensor([[3], [0], [4], [1]])
    durations = model.speak(units, None, 0)[1]
    assert durations[1] < durations[0] < durations[2]  # they last 2, 8 and 10 frames


def test_with_durations_given_there_are_so_many_mel_frames_and_dropout_is_off(
    trained: SynthesizerConfig,
) -> None:
    model, _, _ = load_unit_to_mel(trained.out)
    units, durations = torch.tensor([[0], [2], [4]]), torch.tensor([3, 1, 8])
    mel, told = model.speak(units, durations, 0)
    assert mel.shape == (24, 80) and told.tolist() == [3, 1, 8]
    assert torch.equal(mel, model.speak(units, durations, 0)[0])
    assert not torch.allclose(mel, model.speak(units, durations, 1)[0])  # another voice


def test_the_levels_of_a_codebook_are_embedded_one_by_one(tmp_path: Path) -> None:
    model = task_of(make(tmp_path, 4, levels=2)).model.eval()
    durations = torch.tensor([2, 2])
    one, other = (model.speak(torch.tensor([[0, 1], [2, second]]), durations, 0)[0] for second in (3, 4))
    assert model.embed_units.num_embeddings == 2 * NUM_UNITS and not torch.allclose(one, other)


def test_without_speakers_there_is_one_voice(tmp_path: Path) -> None:
    config = make(tmp_path, 4, model={**TINY, "speakers": False})
    task = task_of(config)
    assert task.speakers == [] and task.model.embed_speakers is None
    assert torch.isfinite(task.model(task.collate(task.train_set.items, 0)).total)


def test_a_manifest_of_other_audio_is_refused_with_the_utterance(tmp_path: Path) -> None:
    config = make(tmp_path, 4, extra=1)
    with pytest.raises(
        ValueError, match=r"corpus: \d+ frames for utterance 'u0', which has \d+ in .*manifest"
    ):
        task_of(config)


def test_an_utterance_without_units_is_refused_by_name(tmp_path: Path) -> None:
    config = make(tmp_path / "many", 8)
    fewer = make(tmp_path / "few", 4)
    with pytest.raises(ValueError, match=r"no units for 3 of 7 utterances of .*, first 'u4'"):
        task_of(config.model_copy(update={"corpus": fewer.corpus}))


@pytest.mark.parametrize(
    ("vocabulary", "timed", "problem"),
    [
        (Vocabulary(num_units=5), False, "its units have no durations"),
        (Vocabulary(num_units=5, text=("a",), layout="interleaved"), True, "has text among its units"),
    ],
)
def test_units_that_cannot_be_spoken_are_refused(
    tmp_path: Path, vocabulary: Vocabulary, timed: bool, problem: str
) -> None:
    documents = [
        Document("a", None, np.array([1, 2], np.uint16), np.array([1, 1], np.uint16) if timed else None)
    ]
    write_corpus(
        tmp_path,
        documents,
        {},
        {},
        vocabulary=vocabulary,
        codebook="c0de",
        frame_rate_hz=50.0,
        deduplicated=True,
        timed=timed,
    )
    with pytest.raises(ValueError, match=problem):
        require_speakable(UnitCorpus(tmp_path))


def test_a_run_of_another_kind_is_no_synthesizer(trained: SynthesizerConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_unit_to_mel(tmp_path)
    shutil.copytree(trained.out, tmp_path / "lm")
    meta = json.loads((tmp_path / "lm" / "meta.json").read_text())
    (tmp_path / "lm" / "meta.json").write_text(json.dumps({**meta, "kind": "unit-lm"}))
    with pytest.raises(
        ValueError, match=r"kind 'unit-lm'; a 'synthesizer' \(verb train-synthesizer\) is needed"
    ):
        load_unit_to_mel(tmp_path / "lm")


def test_the_audio_of_the_crop_and_its_frames_agree_at_the_end_of_an_utterance(tmp_path: Path) -> None:
    config = make(tmp_path, 4)
    task = task_of(config)
    for epoch in range(5):
        for item in task.train_set.items:
            batch = task.collate(np.array([item]), epoch)
            waveform, _ = task.train_set.load(item, task.train_set.rng(item, epoch))
            assert (
                batch.durations.sum() == num_frames(len(waveform))
                and batch.pitch.shape == batch.mel.shape[:2]
            )
