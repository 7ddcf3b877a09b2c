import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.artefact import commit
from pretrain.manifest import Manifest, Phone, Utterance, write_manifest


def row(name: str, **columns: Any) -> dict[str, Any]:
    return {"id": name, "path": f"/audio/{name}.wav", "start": 0, "num_samples": 16000, "sample_rate": 16000} | columns


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = [
        row("a", split="train", speaker="x", text="one", phones=[(0.0, 0.5, "w"), (0.5, 1.0, "ʌ")]),
        row("b", start=800, num_samples=44100, sample_rate=44100, phones=[]),
    ]
    fingerprint = write_manifest(tmp_path, rows, {}, {}, [{"id": "c", "path": "/audio/c.wav", "reason": "is empty"}])
    manifest = Manifest(tmp_path)
    assert manifest.fingerprint == fingerprint and len(manifest) == 2 and manifest.ids == ["a", "b"]
    phones = [Phone(0.0, 0.5, "w"), Phone(0.5, 1.0, "ʌ")]
    assert list(manifest) == [
        Utterance("a", "/audio/a.wav", 0, 16000, 16000, "train", "x", "one", phones),
        Utterance("b", "/audio/b.wav", 800, 44100, 44100, None, None, None, []),
    ]
    assert manifest.has_text and manifest.has_phones and manifest.splits == {"train"}
    assert (tmp_path / "quarantine.jsonl").read_text() == '{"id": "c", "path": "/audio/c.wav", "reason": "is empty"}\n'


def test_meta_counts_utterances_hours_and_quarantine(tmp_path: Path) -> None:
    write_manifest(tmp_path, [row("a"), row("b", num_samples=8000, sample_rate=8000)], {"key": 1}, {"source": "f00d"})
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert (meta["num_utterances"], meta["num_quarantined"], meta["parents"]) == (2, 0, {"source": "f00d"})
    assert meta["hours"] == pytest.approx(2 / 3600)


def test_paths_are_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest("m", [row("a", path="audio/../a.wav")], {}, {})
    assert Manifest("m")[0].path == str(tmp_path / "a.wav")


def test_the_fingerprint_follows_the_rows_and_nothing_else(tmp_path: Path) -> None:
    first = write_manifest(tmp_path / "1", [row("a")], {"seed": 1}, {})
    assert write_manifest(tmp_path / "2", [row("a")], {"seed": 2}, {}) == first
    assert write_manifest(tmp_path / "3", [row("a", num_samples=16001)], {"seed": 1}, {}) != first


def test_a_split_is_a_manifest_of_its_rows(tmp_path: Path) -> None:
    rows = [row(str(i), split="test" if i % 3 == 0 else "train", text="x" if i % 3 else None) for i in range(9)]
    write_manifest(tmp_path, rows, {}, {})
    manifest = Manifest(tmp_path)
    test = manifest.select("test")
    assert test.ids == ["0", "3", "6"] and test.fingerprint == manifest.fingerprint and not test.has_text
    assert manifest.select(None) is manifest and manifest.has_text and len(manifest.select("train")) == 6
    with pytest.raises(ValueError, match=r"no utterances of split 'valid'; it has test, train"):
        manifest.select("valid")


def test_a_manifest_without_splits_says_so(tmp_path: Path) -> None:
    write_manifest(tmp_path, [row("a")], {}, {})
    with pytest.raises(ValueError, match=r"split 'train'; it has no splits"):
        Manifest(tmp_path).select("train")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**9), st.sampled_from([8000, 11025, 16000, 44100, 48000])), min_size=1, max_size=5))
def test_lengths_are_those_of_the_utterances(tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]]) -> None:
    folder = tmp_path_factory.mktemp("m")
    write_manifest(folder, [row(str(i), num_samples=n, sample_rate=rate) for i, (n, rate) in enumerate(sizes)], {}, {})
    manifest = Manifest(folder)
    assert manifest.lengths.dtype == np.int64
    assert manifest.lengths.tolist() == [u.length for u in manifest] == [n * 16000 // rate for n, rate in sizes]
    assert all(u.num_frames == max(0, (u.length - 400) // 320 + 1) for u in manifest if u.length >= 400)


def test_what_is_not_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such manifest"):
        Manifest(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a complete manifest"):
        Manifest(tmp_path)
    (tmp_path / "x").touch()
    commit(tmp_path, "labels", {}, {}, ["x"])
    with pytest.raises(ValueError, match="is a 'labels'; a 'manifest' is needed"):
        Manifest(tmp_path)
