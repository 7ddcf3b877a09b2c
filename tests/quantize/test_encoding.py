import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.labels import Labels
from pretrain.manifest import Manifest
from quantize.clustering import ClusterConfig, cluster
from quantize.codebook import Codebook
from quantize.encoding import EncodeConfig, encode, plan_shards
from quantize.features import MfccSource


@pytest.fixture(scope="module")
def mfcc_codebook(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("codebooks") / "mfcc")
    cluster(ClusterConfig(manifest=str(corpus), num_classes=8, out=out))
    return out


@pytest.fixture(scope="module")
def encoder_codebook(corpus: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("codebooks") / "encoder")
    cluster(ClusterConfig(manifest=str(corpus), num_classes=8, features="encoder", encoder=str(run), layer=2, out=out))
    return out


def _power_cut(*_: Any, **__: Any) -> None:
    raise RuntimeError("power cut")


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("shard_*")}


def labels_by_id(folder: Path) -> dict[str, list[int]]:
    labels = Labels(folder)
    return {utterance: labels[utterance].tolist() for utterance in sorted(labels.ids)}


def test_encode_labels_every_frame_with_its_nearest_centroid(corpus: Path, mfcc_codebook: str, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    summary = encode(EncodeConfig(manifest=str(corpus), codebook=mfcc_codebook, num_shards=3, out=str(out)))
    labels, codebook = Labels(out), Codebook.open(mfcc_codebook)
    assert labels.ids == Manifest(corpus).ids
    assert (labels.codebook, labels.num_classes, labels.frame_rate_hz) == (codebook.fingerprint, 8, 50.0)
    for utterance, features in MfccSource().features(list(Manifest(corpus))):
        distances = ((features[:, None] - (codebook.centroids[0] + codebook.mean)) ** 2).sum(axis=2)
        assert labels[utterance.id].tolist() == distances.argmin(axis=1).tolist()
    assert summary["utterances"] == 12 and summary["num_shards"] == 3 and summary["audio_seconds_per_second"] > 0
    assert 0 < summary["usage"] <= 1 <= summary["perplexity"] <= 8
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".npy", ".npy", ".npy", ".parquet", ".parquet", ".parquet"]


def test_labels_do_not_depend_on_shards_or_workers(corpus: Path, run: Path, encoder_codebook: str, tmp_path: Path) -> None:
    found = []
    for shards, workers in ((1, 1), (5, 3), (100, 2)):
        out = tmp_path / f"labels{shards}"
        keys: dict[str, Any] = {"manifest": str(corpus), "codebook": encoder_codebook, "encoder": str(run), "out": str(out)}
        summary = encode(EncodeConfig(num_shards=shards, workers=workers, **keys))
        assert summary["num_shards"] <= 12
        found.append(labels_by_id(out))
    assert found[0] == found[1] == found[2]


def test_a_lower_precision_tells_how_many_labels_agree_with_float32(
    corpus: Path, run: Path, encoder_codebook: str, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"manifest": str(corpus), "codebook": encoder_codebook, "encoder": str(run)}
    assert "label_agreement" not in encode(EncodeConfig(**keys, out=str(tmp_path / "float32")))
    summary = encode(EncodeConfig(**keys, out=str(tmp_path / "int8"), precision="int8"))
    exact, quick = (labels_by_id(tmp_path / name) for name in ("float32", "int8"))
    same = np.concatenate([np.equal(exact[name], quick[name]) for name in exact])
    assert summary["label_agreement"] == pytest.approx(same.mean()) and same.mean() > 0.8


def test_shards_of_another_precision_are_not_added_to(corpus: Path, run: Path, encoder_codebook: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "manifest": str(corpus),
        "codebook": encoder_codebook,
        "encoder": str(run),
        "out": str(tmp_path / "out"),
    }
    with pytest.MonkeyPatch.context() as patched, pytest.raises(RuntimeError, match="power cut"):
        patched.setattr("quantize.encoding.commit_labels", _power_cut)
        encode(EncodeConfig(**keys, num_shards=3))
    with pytest.raises(ValueError, match="precision 'float32' there, 'bfloat16' now"):
        encode(EncodeConfig(**keys, num_shards=3, precision="bfloat16"))


def test_a_lost_shard_is_made_again_with_identical_bytes(corpus: Path, mfcc_codebook: str, tmp_path: Path) -> None:
    config = EncodeConfig(manifest=str(corpus), codebook=mfcc_codebook, num_shards=4, out=str(tmp_path / "labels"))
    encode(config)
    whole = content(tmp_path / "labels")
    (tmp_path / "labels" / "meta.json").unlink()
    (tmp_path / "labels" / "shard_00002.parquet").unlink()  # the array without its table is not a shard
    untouched = (tmp_path / "labels" / "shard_00001.npy").stat().st_mtime_ns
    summary = encode(config)
    assert summary["shards_already_done"] == 3
    assert content(tmp_path / "labels") == whole
    assert (tmp_path / "labels" / "shard_00001.npy").stat().st_mtime_ns == untouched


def test_an_error_half_way_keeps_the_finished_shards_and_a_rerun_goes_on(
    corpus: Path, mfcc_codebook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EncodeConfig(manifest=str(corpus), codebook=mfcc_codebook, num_shards=4, out=str(tmp_path / "labels"))
    real, calls = Codebook.assign, []

    def assign(codebook: Codebook, features: np.ndarray) -> np.ndarray:
        calls.append(1)
        return real(codebook, features * (np.nan if len(calls) == 8 else 1))

    monkeypatch.setattr(Codebook, "assign", assign)
    with pytest.raises(ValueError, match=r"u07\.wav \(utterance 'u07'\): features: NaN or infinity in frame 0"):
        encode(config)
    finished = content(tmp_path / "labels")
    assert len(finished) >= 2 and not (tmp_path / "labels" / "meta.json").exists()
    encode(config)
    encode(EncodeConfig(manifest=str(corpus), codebook=mfcc_codebook, num_shards=4, out=str(tmp_path / "again")))
    assert content(tmp_path / "labels") == content(tmp_path / "again")


def test_unfinished_work_on_something_else_is_not_continued(corpus: Path, mfcc_codebook: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"manifest": str(corpus), "codebook": mfcc_codebook, "out": str(tmp_path / "labels")}
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "plan.json").write_text('{"manifest": "x", "split": null, "codebook": "y", "num_shards": 8}')
    with pytest.raises(ValueError, match="unfinished work on something else .*codebook 'y' there"):
        encode(EncodeConfig(**keys))


def test_an_encoder_that_is_not_the_codebook_s_is_an_error_naming_both(
    corpus: Path, run: Path, make_run: Callable[..., Path], encoder_codebook: str, mfcc_codebook: str, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"manifest": str(corpus), "out": str(tmp_path / "labels")}
    other = make_run(tmp_path / "other", seed=1)
    own = Codebook.open(encoder_codebook).source["encoder"]
    with pytest.raises(ValueError, match=rf"{encoder_codebook} was fitted on encoder {own}, and {other} is encoder \w+"):
        encode(EncodeConfig(codebook=encoder_codebook, encoder=str(other), **keys))
    with pytest.raises(ValueError, match="quantises layer 2 of encoder .* give its run folder"):
        encode(EncodeConfig(codebook=encoder_codebook, **keys))
    with pytest.raises(ValueError, match="quantises MFCC; remove encoder"):
        encode(EncodeConfig(codebook=mfcc_codebook, encoder=str(run), **keys))
    assert not (tmp_path / "labels").exists()


def test_one_split_can_be_encoded_alone(corpus: Path, mfcc_codebook: str, tmp_path: Path) -> None:
    summary = encode(EncodeConfig(manifest=str(corpus), codebook=mfcc_codebook, split="dev", out=str(tmp_path / "labels")))
    assert summary["utterances"] == 3 and Labels(tmp_path / "labels").ids == Manifest(corpus).select("dev").ids


@given(st.lists(st.integers(400, 500_000), min_size=1, max_size=60), st.integers(1, 20))
def test_shards_hold_every_row_once_in_order_and_none_is_empty(lengths: list[int], num_shards: int) -> None:
    shards = plan_shards(np.array(lengths), num_shards)
    assert np.concatenate(shards).tolist() == list(range(len(lengths)))
    assert 1 <= len(shards) <= num_shards and all(len(shard) for shard in shards)
    assert max(sum(lengths[row] for row in shard) for shard in shards) <= sum(lengths) / num_shards + max(lengths)
