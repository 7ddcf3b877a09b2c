from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import parse_config
from pretrain.manifest import Manifest
from quantize.clustering import ClusterConfig, cluster
from quantize.codebook import Codebook
from quantize.features import MfccSource, open_encoder_source
from quantize.sampling import VISIT, plan_sample, sample_frames


def test_cluster_fits_mfcc_and_says_what_it_did(corpus: Path, tmp_path: Path) -> None:
    summary = cluster(ClusterConfig(manifest=str(corpus), split="train", num_classes=8, out=str(tmp_path / "codebook")))
    codebook = Codebook.open(tmp_path / "codebook")
    frames = sum(utterance.num_frames for utterance in Manifest(corpus).select("train"))
    assert summary["frames"] == frames and summary["num_classes"] == codebook.num_classes == 8
    assert {"inertia", "iterations", "empty_reseeded", "num_empty", "seconds"} <= set(summary)
    assert codebook.source == {"kind": "mfcc", "cmvn": False} and codebook.dim == 39
    assert codebook.meta["parents"] == {"manifest": Manifest(corpus).fingerprint}
    assert codebook.meta["fit"]["inertia"] == summary["inertia"]


def test_a_seed_gives_the_same_codebook_whatever_decodes_it(corpus: Path, tmp_path: Path) -> None:
    fingerprints = []
    for number, (seed, workers) in enumerate([(0, 1), (0, 3), (1, 1)]):
        out = str(tmp_path / f"codebook{number}")
        cluster(ClusterConfig(manifest=str(corpus), num_classes=6, hours=0.001, seed=seed, workers=workers, out=out))
        fingerprints.append(Codebook.open(out).fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 5000), st.integers(0, 3))
def test_a_sample_has_its_size_and_no_utterance_gives_more_than_it_has(lengths: list[int], budget: int, seed: int) -> None:
    num_frames = np.array(lengths)
    rows, counts = plan_sample(num_frames, budget, seed)
    assert counts.sum() == min(budget, num_frames.sum())
    assert (counts > 0).all() and (counts <= num_frames[rows]).all() and (np.diff(rows) > 0).all()
    assert num_frames[rows].sum() <= VISIT * budget + 400


def test_a_sample_is_frames_of_the_corpus_in_manifest_order_whatever_the_batches(corpus: Path, run: Path) -> None:
    rows = Manifest(corpus)
    everything = np.concatenate([features for _, features in MfccSource().features(list(rows))])
    sample = sample_frames(MfccSource(), rows, 100, seed=0)
    where = [int(np.flatnonzero((everything == frame).all(axis=1))[0]) for frame in sample]
    assert len(sample) == 100 and where == sorted(where) and len(set(where)) == 100
    one, many = (
        sample_frames(open_encoder_source(str(run), 1, device="cpu", batch_seconds=seconds, workers=1), rows, 100, seed=0)
        for seconds in (0, 3.0)
    )
    np.testing.assert_allclose(one, many, atol=2e-5)  # batches change the rounding, not the frames


def test_the_best_layer_is_the_one_with_the_highest_dev_pnmi(corpus: Path, run: Path, tmp_path: Path) -> None:
    config = ClusterConfig(
        manifest=str(corpus),
        split="train",
        features="encoder",
        encoder=str(run),
        layer="best",
        num_classes=8,
        out=str(tmp_path / "c"),
    )
    summary = cluster(config)
    assert set(summary["sweep"]) == {"0", "1", "2"} and all(0 <= score <= 1 for score in summary["sweep"].values())
    assert summary["sweep"][str(summary["layer"])] == max(summary["sweep"]["1"], summary["sweep"]["2"])
    assert summary["chosen_by"] == "highest PNMI on 'dev'"
    codebook = Codebook.open(config.out)
    assert codebook.source["layer"] == summary["layer"] and codebook.dim == 64
    assert codebook.meta["parents"]["encoder"] == codebook.source["encoder"]


def test_without_alignments_the_best_layer_is_the_middle_one_and_says_so(
    make_corpus: Callable[..., Path], run: Path, tmp_path: Path
) -> None:
    manifest = make_corpus(tmp_path, phones=False, num_utterances=4)
    summary = cluster(
        ClusterConfig(manifest=str(manifest), features="encoder", encoder=str(run), num_classes=4, out=str(tmp_path / "codebook"))
    )
    assert summary["layer"] == 1 and "the middle one: 1 of 2" in summary["chosen_by"]


def test_more_classes_than_frames_is_an_error_that_names_both(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_classes: 5000 classes cannot be fitted on \d+ frames"):
        cluster(ClusterConfig(manifest=str(corpus), num_classes=5000, out=str(tmp_path / "codebook")))
    assert not (tmp_path / "codebook" / "meta.json").exists()


def test_an_unknown_split_or_select_split_is_an_error_that_names_the_known(corpus: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no utterances of split 'tran'; it has dev, train"):
        cluster(ClusterConfig(manifest=str(corpus), split="tran", out=str(tmp_path / "codebook")))
    with pytest.raises(ValueError, match="no utterances of split 'valid'"):
        cluster(
            ClusterConfig(
                manifest=str(corpus), features="encoder", encoder=str(run), select_split="valid", out=str(tmp_path / "codebook")
            )
        )


def test_a_finished_codebook_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    config = ClusterConfig(manifest=str(corpus), num_classes=3, out=str(tmp_path / "codebook"))
    cluster(config)
    with pytest.raises(ValueError, match="already holds a finished artefact"):
        cluster(config)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"features": "encoder"}, "go together"),
        ({"encoder": "runs/x"}, "go together"),
        ({"layer": 3}, "layer is a matter of encoders"),
        ({"features": "encoder", "encoder": "runs/x", "cmvn": True}, "cmvn is a matter of MFCC"),
        ({"features": "encoder", "encoder": "runs/x", "layer": "last"}, "layer"),
        ({"num_classes": 70000}, "num_classes"),
        ({"num_clases": 5}, "did you mean 'num_classes'"),
    ],
)
def test_keys_that_do_not_fit_are_reported(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(ClusterConfig, {"manifest": "m", "out": "o", **keys}, "c.toml")
