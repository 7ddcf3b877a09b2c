from pathlib import Path

import numpy as np
import pytest

from benchmarks import loader
from benchmarks.measure import Measurement
from pretrain.audio import load_audio
from pretrain.manifest import Manifest


def test_the_contenders_load_the_same_audio(tmp_path: Path) -> None:
    loader.write_formats(tmp_path, np.array([16000, 20000, 4000]), seed=0)
    settings = {"batch_seconds": 2.0, "seed": 0, "threads": 1}
    waves = [np.concatenate(sorted(map(load_audio, Manifest(tmp_path / name / "manifest")), key=len)) for name in loader.FORMATS]
    for suffix, wave in zip(loader.FORMATS, waves, strict=True):
        np.testing.assert_array_equal(wave, waves[0])
        for kind in ("ours", "decoding"):
            contender = loader.build(f"{kind}-{suffix}", settings, tmp_path)
            for number in range(2):  # the same epoch again
                contender.prepare(number)
                contender.run()
                assert contender.amount == 2.5
    peer = loader.Peer(settings, tmp_path / "tar")
    batches = list(peer.loader)
    assert sum(int(lengths.sum()) for _, lengths in batches) == 40000 and len(batches) == 2


def test_a_format_is_reported_with_the_designs_keys() -> None:
    ours, limit, peer = (Measurement([rate], rate / 100, {}) for rate in (200.0, 400.0, 100.0))
    found = loader.figures(ours, limit, peer)
    assert (found["ours"], found["peer"], found["ratio"], found["limit"], found["share_of_limit"]) == (200, 100, 2, 400, 0.5)
    assert (found["ours_peak_gb"], found["peer_peak_gb"], found["memory_ratio"]) == (2, 1, 0.5) and loader.figures(
        ours, limit, None
    )["ratio"] is None


def test_a_round_of_ours_reads_one_epoch_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader.write_formats(tmp_path, np.array([16000] * 8), seed=0)
    ours = loader.Ours({"batch_seconds": 2.0, "seed": 0, "threads": 1}, tmp_path / "wav")
    read: list[str] = []
    monkeypatch.setattr("pretrain.batches.load_audio", lambda utterance, *_: read.append(utterance.id) or load_audio(utterance))
    assert not read  # no head start
    for number in range(2):
        read.clear()
        ours.prepare(number)
        assert not read
        ours.run()
        assert sorted(read) == sorted(Manifest(tmp_path / "wav/manifest").ids)  # each once, and nothing of the next epoch
        assert ours.amount == 8.0
