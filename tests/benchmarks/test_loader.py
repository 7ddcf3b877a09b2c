import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import loader
from benchmarks.measure import Measurement
from pretrain.data.audio import load_audio
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import Utterance

SETTINGS = {"batch_seconds": 2.0, "crop_seconds": 30.0, "seed": 0, "threads": 1}


def measurement(rate: float) -> Measurement:
    return Measurement([rate], rate / 100, {"about": {"libsndfile": "x"}})


def test_the_contenders_load_the_same_audio(tmp_path: Path) -> None:
    loader.write_formats(tmp_path, np.array([16000, 20000, 4000]), seed=0)
    waves = [
        np.concatenate(sorted(map(load_audio, Manifest(tmp_path / name / "manifest")), key=len))
        for name in loader.FORMATS
    ]
    for suffix, wave in zip(loader.FORMATS, waves, strict=True):
        np.testing.assert_array_equal(wave, waves[0])
        for kind in ("ours", "decoding"):
            contender = loader.build(f"{kind}-{suffix}", SETTINGS, tmp_path)
            for number in range(2):  # the same epoch again
                contender.prepare(number)
                contender.run()
                assert contender.amount == 2.5
    peer = loader.Peer(SETTINGS, tmp_path / "tar")
    batches = list(peer.loader)
    assert sum(int(lengths.sum()) for _, lengths in batches) == 40000 and len(batches) == 2


def test_every_contender_crops_where_ours_does(tmp_path: Path) -> None:
    loader.write_formats(tmp_path, np.array([16000, 20000, 48000, 33000]), seed=0)
    settings = {**SETTINGS, "batch_seconds": 2.5, "crop_seconds": 1.1}
    task = loader.LoadTask(Manifest(tmp_path / "flac/manifest"), settings)
    utterances = list(task.train_set.manifest)
    for item, utterance in enumerate(utterances):
        wave = task.train_set.load(item, task.train_set.rng(item, 0))[0]
        first = loader.crop(task.train_set, item, 0)
        np.testing.assert_array_equal(wave, loader.read_audio(utterance, first, task.train_set.crop_samples))
    assert (
        loader.build("decoding-flac", settings, tmp_path).amount == task.train_set.seconds(np.arange(4)) < 7
    )


def test_a_format_is_reported_with_the_designs_keys() -> None:
    measured = {"ours": measurement(200.0), "decoding": measurement(400.0), "dataloader": measurement(100.0)}
    found = loader.figures(measured)
    assert (found["ours"], found["peer"], found["ratio"], found["limit"], found["share_of_limit"]) == (
        200,
        100,
        2,
        400,
        0.5,
    )
    assert (found["ours_peak_gb"], found["peer_peak_gb"], found["memory_ratio"]) == (2, 1, 0.5)
    assert loader.figures({name: measured[name] for name in ("ours", "decoding")})["ratio"] is None


def test_the_fastest_way_is_the_peer_and_the_fastest_with_the_defaults_is_named() -> None:
    rates = {"ours": 200.0, "decoding": 400.0, "a": 50.0, "b": 100.0, "a-kept": 150.0}
    found = loader.figures({name: measurement(rate) for name, rate in rates.items()})
    assert (found["peer_way"], found["peer_way_default"]) == ("a-kept", "b")
    assert (found["ratio"], found["ratio_default"]) == (200 / 150, 2)
    assert list(found["peer_variants"]) == ["a-kept", "b", "a"]


def test_a_round_of_ours_reads_one_epoch_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader.write_formats(tmp_path, np.array([16000] * 8), seed=0)
    ours = loader.Ours(SETTINGS, tmp_path / "wav")
    read: list[str] = []

    def load(utterance: Utterance, *_: int) -> np.ndarray:
        read.append(utterance.id)
        return load_audio(utterance)

    monkeypatch.setattr("pretrain.data.batches.load_audio", load)
    assert not read  # no head start
    for number in range(2):
        read.clear()
        ours.prepare(number)
        assert not read
        ours.run()
        # each once, and nothing of the next epoch
        assert sorted(read) == sorted(Manifest(tmp_path / "wav/manifest").ids)
        assert ours.amount == 8.0


@pytest.mark.slow
def test_loader_ends_with_one_json_line_and_every_way_of_the_peer(capsys: pytest.CaptureFixture[str]) -> None:
    given = (
        "--format flac --lengths mixed --total-seconds 30 --batch-seconds 20 --rounds 1 --threads 1 --json"
    )
    assert loader.main(["--peer", "dataloader", *given.split()]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["peer_variants"]) == {"dataloader", "dataloader-kept"}
    assert result["ratio"] == result["ours"] / result["peer"] and result["peer_name"] == "dataloader"
