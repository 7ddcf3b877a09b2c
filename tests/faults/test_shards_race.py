"""Two workers on one shard.

Broken: two processes encode the same part of the same labels at once (a job that was requeued while the old
one still ran), and one of them is killed in the middle. Must hold: the other finishes; every shard is there
once, with the bytes that one process alone would have written; the labels are finished once; nothing half
written is left over.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.store.artefact import read_meta
from quantize.codebook import write_codebook
from quantize.encoding import encode
from quantize.encoding_plan import EncodeConfig
from tests.quantize.conftest import write_corpus

ROOT = Path(__file__).parents[2]


def encode_at_once(config: dict[str, Any], *killed_after: float | str) -> list[int]:
    command = [
        sys.executable,
        "-m",
        "tests.faults.encoding_worker",
        json.dumps(config),
        *map(str, killed_after),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    statuses: list[int] = json.loads(done.stdout.splitlines()[-1])
    return statuses


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of 12 utterances in 4 shards, which take one process 0.6 s; `whole` are the labels of one process."""
    folder = tmp_path_factory.mktemp("race")
    manifest = write_corpus(folder)
    centroids = np.random.default_rng(0).standard_normal((1, 7, 39)).astype(np.float32)
    write_codebook(folder / "codebook", centroids, np.zeros(39), {"kind": "mfcc", "cmvn": True}, {}, {}, {})
    config = {"manifest": str(manifest), "codebook": str(folder / "codebook"), "num_shards": 4, "workers": 1}
    encode(EncodeConfig(**config, out=str(folder / "whole")))
    return config


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "meta.json"}


@pytest.mark.parametrize("seed", range(3))
def test_of_two_workers_on_the_same_shards_one_may_be_killed_at_any_moment(
    config: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    whole, out = Path(config["codebook"]).parent / "whole", tmp_path / "labels"
    moment = random.Random(seed).uniform(0.05, 0.5)
    statuses = encode_at_once({**config, "out": str(out), "part": "1/1"}, moment, "never")
    assert statuses[1] == 0 and statuses[0] in (0, -9)
    assert contents(out) == contents(whole)  # shards alone: no plan, no temporary file
    assert read_meta(out)["fingerprint"] == read_meta(whole)["fingerprint"]
    assert Labels(out).ids == Manifest(config["manifest"]).ids


def test_when_both_are_killed_a_third_goes_on_from_the_shards_that_stand(
    config: dict[str, Any], tmp_path: Path
) -> None:
    whole, out = Path(config["codebook"]).parent / "whole", tmp_path / "labels"
    keys = {**config, "out": str(out), "part": "1/1"}
    assert encode_at_once(keys, 0.4, 0.45) == [-9, -9]
    standing = len(list(out.glob("shard_*.parquet")))
    assert not (out / "meta.json").exists() and standing < 4
    summary = encode(EncodeConfig(**keys))
    assert summary["shards_already_done"] == standing
    assert (
        contents(out) == contents(whole) and read_meta(out)["fingerprint"] == read_meta(whole)["fingerprint"]
    )
