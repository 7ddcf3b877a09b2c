"""`batches.decoder = "fairseq2"`: the samples and the errors of our own reading, for whatever a manifest may hold."""

import json
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pretrain.data.audio import load_audio
from pretrain.data.batches import BatchConfig, SpeechBatches
from pretrain.data.manifest import Manifest, Utterance
from pretrain.fairseq2 import decoding
from pretrain.objectives.pretraining import PretrainConfig, pretrain
from tests.pretrain.conftest import write_corpus


def recording(
    path: Path, samples: int = 8000, channels: int = 1, rate: int = 16000, subtype: str | None = None
) -> Utterance:
    soundfile.write(
        path, np.random.default_rng(0).uniform(-0.9, 0.9, (samples, channels)), rate, subtype=subtype
    )
    return Utterance("u", str(path), 0, samples, rate)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("flac", "PCM_16"), ("flac", "PCM_24")],
)
def test_whole_recordings_are_read_to_the_same_bits_and_by_fairseq2(
    tmp_path: Path, suffix: str, subtype: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    utterance = recording(tmp_path / f"a.{suffix}", channels=channels, subtype=subtype)
    expected = load_audio(utterance)
    monkeypatch.setattr(decoding, "load_audio", lambda utterance: pytest.fail("was not read by fairseq2"))
    wave = decoding.load_whole(utterance)
    assert wave.dtype == np.float32 and wave.flags.c_contiguous and np.array_equal(wave, expected)


def test_a_member_of_a_tar_is_read_and_nothing_beside_it(tmp_path: Path) -> None:
    shorter = recording(tmp_path / "b.flac", 5000)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in (recording(tmp_path / "a.flac").path, shorter.path):
            tar.add(path, Path(path).name)
    with tarfile.open(tmp_path / "a.tar") as tar:
        inside = tar.getmember("b.flac")
    member = replace(
        shorter, path=str(tmp_path / "a.tar"), member_offset=inside.offset_data, member_size=inside.size
    )
    assert np.array_equal(decoding.load_whole(member), load_audio(shorter))


@pytest.mark.parametrize(
    "case", ["another rate", "a segment", "a part from the start", "a colon in the path", "a lossy format"]
)
def test_what_fairseq2_cannot_read_is_read_by_us(tmp_path: Path, case: str) -> None:
    path = tmp_path / {"a colon in the path": "a:b.wav", "a lossy format": "a.ogg"}.get(case, "a.wav")
    utterance = recording(path, rate=8000 if case == "another rate" else 16000)
    if case == "a segment":
        utterance = replace(utterance, start=1000, num_samples=3000)
    elif case == "a part from the start":
        utterance = replace(utterance, num_samples=3000)
    assert np.array_equal(decoding.load_whole(utterance), load_audio(utterance))


@pytest.mark.parametrize(
    "damage", ["gone", "empty", "no audio", "cut", "NaN", "another rate than recorded", "too short"]
)
def test_errors_are_ours_and_name_the_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.wav"
    utterance = recording(path, subtype="FLOAT")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage in ("empty", "no audio", "cut"):
        path.write_bytes({"empty": b"", "no audio": b"no audio", "cut": content[: len(content) // 2]}[damage])
    elif damage == "NaN":
        soundfile.write(path, np.full(8000, np.nan), 16000, subtype="FLOAT")
    elif damage == "another rate than recorded":
        soundfile.write(path, np.zeros(8000), 8000)
    else:
        utterance = recording(path, 300)
    with pytest.raises(ValueError, match=r"a\.wav \(utterance 'u'\)") as ours:
        load_audio(utterance)
    with pytest.raises(ValueError, match=r"a\.wav \(utterance 'u'\)") as theirs:
        decoding.load_whole(utterance)
    assert str(theirs.value) == str(ours.value)


def test_threads_that_read_the_same_files_at_once_get_the_same_samples(tmp_path: Path) -> None:
    utterances = [
        recording(tmp_path / f"{number}.flac", 4000 + 100 * number) for number in range(150)
    ]  # more than are kept mapped
    expected = [load_audio(utterance) for utterance in utterances]
    wrong: list[str] = []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).permutation(len(utterances)).tolist():
            if not np.array_equal(decoding.load_whole(utterances[number]), expected[number]):
                wrong.append(utterances[number].path)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_batches_are_the_same_with_crops_too_and_a_run_trains_to_the_same_loss(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    manifest = write_corpus(
        tmp_path, [0.1 * rng.standard_normal(length) for length in (9000, 20000, 12000, 5000)]
    )
    ours, theirs = (
        SpeechBatches(manifest, BatchConfig(crop_seconds=0.8, decoder=name), 0)
        for name in ("soundfile", "fairseq2")
    )
    for item in range(len(manifest)):
        (one, first), (other, same) = (batches.load(item, batches.rng(item, 0)) for batches in (ours, theirs))
        assert first == same and np.array_equal(one, other)
    losses = []
    for decoder in ("soundfile", "fairseq2"):
        tree = {
            "out": str(tmp_path / decoder),
            "manifest": str(Manifest(tmp_path / "manifest").folder),
            "objective": "wav2vec2",
            "encoder": {"architecture": "tiny"},
            "batches": {"batch_seconds": 2.0, "crop_seconds": 0.8, "decoder": decoder},
            "wav2vec2": {"num_entries": 8, "code_dim": 16, "final_dim": 16, "num_distractors": 10},
            "training": {"max_steps": 3, "log_every": 1, "device": "cpu"},
        }
        losses.append(pretrain(PretrainConfig.model_validate_json(json.dumps(tree)))["loss_last"])
    assert losses[0] == losses[1]
