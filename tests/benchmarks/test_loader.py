import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import loader
from benchmarks.loader_fairseq2 import WAYS, Fairseq2, crop, name
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
        first = crop(task.train_set, item, 0)
        np.testing.assert_array_equal(wave, loader.read_audio(utterance, first, task.train_set.crop_samples))
    assert (
        loader.build("decoding-flac", settings, tmp_path).amount == task.train_set.seconds(np.arange(4)) < 7
    )


@pytest.mark.parametrize("crop_seconds", [30.0, 1.1])
@pytest.mark.parametrize("suffix", loader.FORMATS)
def test_every_way_of_fairseq2_delivers_our_batches(tmp_path: Path, suffix: str, crop_seconds: float) -> None:
    pytest.importorskip("fairseq2")
    loader.write_formats(tmp_path, np.array([16000, 20000, 4000, 12000]), seed=0)
    settings = {**SETTINGS, "crop_seconds": crop_seconds}
    speech = loader.LoadTask(Manifest(tmp_path / suffix / "manifest"), settings).train_set
    plan = speech.plan(0)
    wanted = [[speech.load(item, speech.rng(item, 0))[0] for item in items.tolist()] for items in plan]
    for way in WAYS:
        peer = Fairseq2(settings, speech, [items.tolist() for items in plan], way)
        assert peer.amount == sum(speech.seconds(items) for items in plan)
        batches = list(peer.load())
        assert len(batches) == len(wanted) > 1
        for found, waves in zip(batches, wanted, strict=True):
            joined = torch.from_numpy(np.concatenate(waves))
            if way == "joined":
                torch.testing.assert_close(found, joined, rtol=0, atol=0)
                continue
            found = (
                found
                if isinstance(found, dict)
                else {"seqs": found, "seq_lens": [found.shape[1]] * len(found)}
            )
            assert list(found["seq_lens"]) == [len(wave) for wave in waves]
            rows = (
                [found["seqs"]]
                if way == "packed"
                else [row[: len(wave)] for row, wave in zip(found["seqs"], waves, strict=True)]
            )
            torch.testing.assert_close(torch.cat(rows)[: len(joined)], joined, rtol=0, atol=0)


def test_what_fairseq2_cannot_read_is_told() -> None:
    sound = Utterance(
        id="a",
        path="/a.wav",
        start=0,
        num_samples=16000,
        sample_rate=16000,
        split="train",
        speaker=None,
        text=None,
    )
    assert name(sound) == "/a.wav"
    assert name(replace(sound, member_offset=512, member_size=99)) == "/a.wav:512:99"
    for changed in (replace(sound, sample_rate=8000), replace(sound, start=5)):
        with pytest.raises(ValueError, match=r"a\.wav: fairseq2 neither resamples nor reads a segment"):
            name(changed)
    with pytest.raises(ValueError, match="takes the colon"):
        name(replace(sound, path="/a:1/b.wav"))


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
    rates = {
        "ours": 200.0,
        "system": 300.0,
        "decoding": 400.0,
        "fairseq2-a": 50.0,
        "fairseq2-b": 100.0,
        "fairseq2-a-kept": 150.0,
    }
    found = loader.figures({name: measurement(rate) for name, rate in rates.items()})
    assert (found["peer_way"], found["peer_way_default"]) == ("fairseq2-a-kept", "fairseq2-b")
    assert (found["ratio"], found["ratio_default"], found["ratio_system"], found["ours_system"]) == (
        200 / 150,
        2,
        2,
        300,
    )
    assert list(found["peer_variants"]) == ["fairseq2-a-kept", "fairseq2-b", "fairseq2-a"]


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
        assert sorted(read) == sorted(
            Manifest(tmp_path / "wav/manifest").ids
        )  # each once, and nothing of the next epoch
        assert ours.amount == 8.0


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["dataloader", "fairseq2"])
def test_loader_ends_with_one_json_line_and_every_way_of_the_peer(
    peer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if peer == "fairseq2":
        pytest.importorskip("fairseq2")
    monkeypatch.setattr(loader, "WAYS", ("joined",))
    given = "--format flac --lengths mixed --total-seconds 30 --batch-seconds 20 --rounds 1 --threads 1 --json".split()
    assert loader.main(["--peer", peer, *given]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    way = "dataloader" if peer == "dataloader" else "fairseq2-joined"
    assert set(result["peer_variants"]) == {way, f"{way}-kept"}
    assert result["ratio"] == result["ours"] / result["peer"] and result["peer_name"] == peer
    if peer == "fairseq2":
        assert result["ours_system"] > 0 and set(result["libsndfile"]) == {"ours", "system"}
        assert set(result["ours_variants"]) == set(loader.OURS)


def test_a_recording_longer_than_a_batch_is_told(tmp_path: Path) -> None:
    pytest.importorskip("fairseq2")
    loader.write_formats(tmp_path, np.array([16000, 48000]), seed=0)
    with pytest.raises(ValueError, match="longer than a batch"):
        loader.build("fairseq2-packed-wav", SETTINGS, tmp_path)
