import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import lm, lm_ours, lm_peer
from units.lm.generation import CompactDecoder
from units.lm.model import DecoderConfig

SETTINGS: dict[str, Any] = {
    "sizes": DecoderConfig(
        dim=32, num_layers=2, num_heads=4, num_kv_heads=4, ffn_dim=48, context=40, dropout=0.0
    ).resolved(),
    "classes": 20,
    "steps": 3,
    "rows": 2,
    "tokens": 24,
    "prompt_tokens": 5,
    "new_tokens": 7,
    "batch": 3,
    "device": "cpu",
    "threads": 1,
    "rounds": 1,
    "warmup": 0,
    "seed": 0,
    "precision": "float32",
    "clip_norm": 1.0,
    "job": "train",
    "quality_steps": 30,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    lm.write_inputs(folder, SETTINGS)
    return folder


@pytest.mark.parametrize("way", lm_peer.variants("train", "cpu"))
def test_both_sides_train_on_the_same_tokens_to_the_same_losses(way: str, folder: Path) -> None:
    pytest.importorskip("transformers")
    ours, peer = lm.build("ours", SETTINGS, folder), lm.build(way, SETTINGS, folder)
    assert ours.about() == peer.about() and ours.amount == peer.amount == 3 * 2 * 24
    for contender in (ours, peer):
        contender.prepare(0)
        contender.run()
    mine, theirs = ours.contender.losses, peer.contender.losses  # type: ignore[attr-defined]
    assert len(mine) == 3 and mine[0] != mine[2]
    # float32 in another order; the updates between them are 1e-5 each
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_both_sides_have_the_same_model_to_sample_from(folder: Path) -> None:
    pytest.importorskip("transformers")
    model = CompactDecoder(lm_ours.open_decoder(SETTINGS, folder).eval())
    prompts = np.load(folder / "prompts.npy")
    assert prompts.shape == (3, 6) and (prompts[:, 0] == 20).all()
    _, mine = model.begin(list(prompts), 0)
    with torch.inference_mode():
        theirs = lm_peer.open_model(SETTINGS, folder, "sdpa").eval()(torch.from_numpy(prompts)).logits[:, -1]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ours", *lm_peer.variants("sample", "cpu")])
def test_every_way_draws_as_many_tokens(name: str, folder: Path) -> None:
    pytest.importorskip("transformers")
    contender = lm.build(name, {**SETTINGS, "job": "sample-batch", "precision": "int8"}, folder)
    contender.prepare(1)
    contender.run()  # asserts the number of tokens
    assert contender.amount == 3 * 7


def test_the_source_is_the_chain_it_says(folder: Path) -> None:
    source, rng = lm.Source(10, 0), np.random.default_rng(0)
    found = source.sequences(rng, 50, 400)
    assert (found[:, 0] == 10).all() and found[:, 1:].max() < 10
    expected = np.zeros((10, 10))
    np.add.at(
        expected,
        (np.repeat(np.arange(10), lm_ours.SUCCESSORS), source.successors.ravel()),
        source.probabilities.ravel(),
    )
    counts = np.zeros((10, 10))
    np.add.at(counts, (found[:, 1:-1], found[:, 2:]), 1)
    # about 2,000 draws a state
    np.testing.assert_allclose(counts / counts.sum(1, keepdims=True), expected, atol=0.06)


def test_operations_and_bytes_are_counted_from_the_sizes() -> None:
    # by hand: 2 layers of 4 x 32² and 3 x 32 x 48, a head of 22 x 32
    assert lm.matrix_weights(SETTINGS) == 2 * (4 * 32**2 + 3 * 32 * 48) + 22 * 32
    assert lm.flops_per_token(SETTINGS) == 3 * (2 * lm.matrix_weights(SETTINGS) + 4 * 2 * 32 * 12)
    sampling = {**SETTINGS, "job": "sample-batch", "precision": "int8"}
    assert lm.flops_per_token(sampling) == 2 * lm.matrix_weights(sampling) + 4 * 2 * 32 * 8.5
    per_step = lm.matrix_weights(sampling) + 3 * (2 * 2 * 32 * 8.5 * 4)
    assert lm.memory_limit(sampling, 5.0) == pytest.approx(3 * 5e9 / per_step)
    short = {
        **sampling,
        "precision": "bfloat16",
    }  # two bytes a weight; keys and values are so short on a GPU only
    assert lm.memory_limit(short, 5.0) == pytest.approx(3 * 5e9 / (per_step + lm.matrix_weights(short)))
    assert lm.memory_limit({**short, "device": "cuda"}, 5.0) == pytest.approx(
        3 * 5e9 / (2 * lm.matrix_weights(short) + 3 * (2 * 2 * 32 * 8.5 * 2))
    )


def test_the_cost_of_a_lower_precision_is_told_on_a_model_that_learned(folder: Path) -> None:
    about = lm.build("quality", SETTINGS, folder).about()
    found = about["perplexity"]
    assert (
        set(found) == {"float32", "bfloat16", "int8"}
        and about["perplexity_of_source"] < found["float32"] < 19.5
    )
    for name in ("bfloat16", "int8"):
        assert 0 < abs(found[name] / found["float32"] - 1) < 0.02


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--device", "cuda"], "torch sees no GPU"),
        (["--new-tokens", "0"], "--new-tokens 0: at least 1"),
        (["--rounds", "0"], "--rounds 0"),
    ],
)
def test_a_mistake_ends_with_status_2(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in given and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert lm.main(given) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_lm_ends_with_one_json_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(lm_peer, "variants", lambda job, device: ["transformers-sdpa"])
    given = (
        "--dim 32 --layers 1 --heads 2 --ffn-dim 32 --classes 20 --rows 1 --tokens 16 --steps 1 "
        "--batch 2 --prompt-tokens 3 --new-tokens 4 "
        "--quality-steps 2 --gemm-size 64 --rounds 1 --warmup 0 --threads 1 --json"
    )
    assert lm.main(given.split()) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert set(result["jobs"]) == set(lm.JOBS) and result["ours"] == result["jobs"]["train"]["ours"]
    for job in result["jobs"].values():
        assert (
            job["ratio"] == job["ours"] / job["peer"]
            and job["ours_about"]["inputs_sha256"] == job["peer_about"]["inputs_sha256"]
        )
        assert job["unit"] == "tokens per second" and job["share_of_limit"] > 0 and job["limit"] > 0
    sampled = [result["jobs"][name] for name in ("sample", "sample-batch")]
    assert sampled[0]["perplexity"] == sampled[1]["perplexity"] and "perplexity float32" in printed
    # 8-bit products are not measured: the limit is the memory's alone
    assert all(job["limit"] == job["limit_of_memory"] and job["limit_of_products"] is None for job in sampled)
