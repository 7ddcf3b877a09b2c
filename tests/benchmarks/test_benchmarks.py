"""The harness, the inputs, and both benchmarks on tiny models, one round each."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import corpus, features, loader, manifest, pretrain
from benchmarks.command import add_model_arguments, argument_parser, command, table, write_result
from benchmarks.contest import contest, try_out
from benchmarks.flops import forward_flops
from benchmarks.training_peers import PEERS, transformers_config
from pretrain.data.audio import load_audio
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.model.config import EncoderConfig

SLEEPERS = "tests.benchmarks.sleepers"
SETTINGS = {
    "device": "cpu",
    "precision": "float32",
    "threads": 1,
    "rounds": 3,
    "warmup": 1,
    "gemm_size": 64,
    "peak_tflops": 2.0,
}
KEYS = set(
    "name unit ours peer ratio ours_peak_gb peer_peak_gb memory_ratio limit share_of_limit "
    "gemm_tflops rounds ours_rounds peer_rounds "
    "peer_name settings machine date corpus".split()
)
TINY = [
    "--architecture",
    "tiny",
    "--seconds",
    "1",
    "--batch",
    "2",
    "--rounds",
    "1",
    "--threads",
    "1",
    "--json",
]


@pytest.mark.slow
def test_contenders_take_turns_and_the_fastest_variant_is_the_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")  # of the parent: must reach nobody
    result = contest(SLEEPERS, ["slow", "quick"], tmp_path, SETTINGS, 1e6, peer_python=None)
    turns = [line.split() for line in (tmp_path / "turns.txt").read_text().splitlines()]
    # tried alone first, with the C library's defaults and with freed memory kept; then ours, the fastest, the
    # fastest default
    assert [name for name, _, _ in turns] == ["slow"] * 4 + ["quick"] * 4 + ["ours", "quick", "quick"] * 4
    times = [float(time) for _, *pair in turns for time in pair]
    assert times == sorted(times)  # nobody begins before the one before has ended
    assert result["peer_name"] == "quick-kept" and result["peer_name_default"] == "quick"
    assert set(result["peer_variants"]) == {"quick-kept", "quick", "slow-kept", "slow"}
    # a sleep is never shorter than asked for; on a busy machine it may well be longer
    assert max(result["ours_rounds"]) <= 2 / 0.02 and max(result["peer_rounds"]) <= 2 / 0.02
    assert max(result["peer_rounds_default"]) <= 2 / 0.1
    assert result["ours"] == sorted(result["ours_rounds"])[1]  # the median of three, without the warm-up
    assert (
        result["ratio"]
        == result["ours"] / result["peer"]
        < result["ratio_default"]
        == result["ours"] / result["peer_default"]
    )
    assert result["limit"] == pytest.approx(1e12 * result["gemm_tflops"] / 1e6)
    assert result["mfu"] == pytest.approx(result["ours"] * 1e6 / 2e12)
    assert result["share_of_limit"] == result["ours"] / result["limit"]
    assert 0.01 < result["ours_peak_gb"] < 10 and result["machine"]["torch"] == torch.__version__
    assert f"{result['ratio_default']:.2f} times as fast" in table({**result, "unit": "x"})


def test_a_compiled_variant_that_fails_is_left_out_and_any_other_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    pythons = dict.fromkeys(["frail-compiled", "quick"], sys.executable)
    tried = try_out(SLEEPERS, pythons, tmp_path, warmup=0, threads=1)
    assert list(tried) == ["quick", "frail-compiled"] and tried["frail-compiled"] is None
    with pytest.raises(RuntimeError, match="frail: its process ended"):
        try_out(SLEEPERS, {"frail": sys.executable}, tmp_path, warmup=0, threads=1)


def test_a_result_is_written_once_more_not_over_and_says_what_to_type(tmp_path: Path) -> None:
    parser = argument_parser(None, ["quick"])
    add_model_arguments(parser)
    given = ["--threads", "1", "--peer-python", "/somewhere/python", "--out", str(tmp_path), "--json"]
    assert (
        command("benchmarks.x", parser, parser.parse_args(given))
        == "python -m benchmarks.x --threads 1 --peer-python PYTHON"
    )
    result = {"name": "x base", "date": "2026-01-02", "peer_name": "quick-kept", "ratio": 2.0}
    assert [write_result(result, tmp_path / "new").name for _ in range(2)] == [
        "2026-01-02-x-base-quick-kept.json",
        "2026-01-02-x-base-quick-kept-2.json",
    ]
    assert json.loads((tmp_path / "new/2026-01-02-x-base-quick-kept.json").read_text()) == result


@pytest.mark.slow
def test_different_inputs_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="different inputs"):
        contest(SLEEPERS, ["deaf"], tmp_path, SETTINGS, 1e6, peer_python=None)


def test_a_peer_that_is_not_installed_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing: No module named 'missing'; --peer-python"):
        contest(SLEEPERS, ["missing"], tmp_path, SETTINGS, 1e6, peer_python=sys.executable)


def test_ours_and_a_peer_read_the_same_samples_and_labels(tmp_path: Path) -> None:
    lengths = corpus.draw_lengths("mixed", 10.0, 20.0, seed=1)
    corpus.write_corpus(tmp_path, lengths, 50, seed=1)
    audio, manifest, labels = (
        corpus.read_corpus(tmp_path),
        Manifest(tmp_path / "manifest"),
        Labels(tmp_path / "labels"),
    )
    assert len(audio.waveforms) == len(manifest) == len(lengths)
    for number, utterance in enumerate(manifest):
        np.testing.assert_array_equal(load_audio(utterance), audio.waveforms[number])
        np.testing.assert_array_equal(labels[utterance.id], audio.labels[number])
        assert len(audio.labels[number]) == utterance.num_frames
    assert corpus.digest(audio.waveforms) != corpus.digest(audio.waveforms[::-1])


def test_mixed_lengths_are_log_uniform_from_1_to_20_seconds() -> None:
    seconds = corpus.draw_lengths("mixed", 10.0, 20000.0, seed=0) / 16000
    assert seconds.min() >= 1 and seconds.max() <= 20 and abs(seconds.sum() - 20000) <= 20
    assert np.median(seconds) == pytest.approx(20**0.5, rel=0.1)  # 3,000 draws: standard error 3 %


def test_padded_batches_hold_everything_once_and_stay_within_their_seconds() -> None:
    lengths = corpus.draw_lengths("mixed", 10.0, 500.0, seed=2)
    plan = corpus.plan_padded(lengths, 40.0)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(lengths)))
    assert all(len(batch) * lengths[batch].max() <= 40 * 16000 for batch in plan)


def test_operations_of_base_are_those_known() -> None:
    sizes, second = EncoderConfig().resolved(), np.array([160000])
    front, everything = (forward_flops(sizes, second, num_layers) / 10 / 1e9 for num_layers in (0, 12))
    # GFLOP a second of audio, rounded: convolutions 4.9, positional 0.5; linear layers 8.5, attention over
    # 499 frames 0.9
    assert front == pytest.approx(4.9 + 0.5, rel=0.02)
    assert everything - front == pytest.approx(8.5 + 0.9, rel=0.02)


def test_operations_are_those_that_torch_counts_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = EncoderConfig(architecture="tiny", front_end="waveform").resolved()
    known = {
        key: value for key, value in transformers_config(sizes).items() if key != "feat_quantizer_dropout"
    }
    model = transformers.HubertModel(transformers.HubertConfig(**known, attn_implementation="eager")).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 48000))
    # the positional convolution computes one frame more than it keeps
    assert forward_flops(sizes, np.array([48000, 48000]), sizes["num_layers"]) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


def last_line(out: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def check(result: dict[str, Any]) -> None:
    assert result.keys() >= KEYS
    assert result["ours"] > 0 and result["peer"] > 0 and result["ratio"] == result["ours"] / result["peer"]
    assert result["ours_about"]["inputs_sha256"] == result["peer_about"]["inputs_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["wav2vec2", "hubert"])
def test_pretrain_ends_with_one_json_line(objective: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert pretrain.main(["--objective", objective, "--attention", "sdpa", *TINY]) == 0
    result = last_line(capsys.readouterr().out)
    check(result)
    assert (
        result["peer_name"] in ("transformers-sdpa", "transformers-sdpa-kept")
        and result["settings"]["objective"] == objective
    )
    assert result["settings"]["sizes"]["layer_drop"] == 0
    if objective == "hubert":  # the very same model, so nothing is left out on either side
        assert result["ours_about"]["parameters"] == result["peer_about"]["parameters"]


@pytest.mark.slow
def test_fairseq2s_own_step_takes_turns_with_ours(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fairseq2")
    assert pretrain.main(["--peer", "fairseq2", "--attention", "eager", *TINY]) == 0
    result = last_line(capsys.readouterr().out)
    check(result)
    assert result["peer_name"] in ("fairseq2-eager", "fairseq2-eager-kept")
    assert result["ours_about"]["parameters"] == result["peer_about"]["parameters"]


@pytest.mark.slow
def test_features_end_with_one_json_line_and_every_way_of_the_peer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setitem(
        features.VARIANTS, "transformers", ["transformers-cut-batched", "transformers-whole-single"]
    )
    assert features.main(["--layer", "1", "--lengths", "mixed", "--total-seconds", "10", *TINY]) == 0
    result = last_line(capsys.readouterr().out)
    check(result)
    ways = features.VARIANTS["transformers"]
    assert set(result["peer_variants"]) == {*ways, *[f"{way}-kept" for way in ways]}
    assert result["peer"] >= result["peer_default"] and result["peer_name_default"] in ways
    assert "label_agreement" not in result  # nothing to compare in float32


def test_every_way_of_transformers_gives_the_same_features(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    corpus.write_corpus(tmp_path, np.array([16000, 16000]), 5, seed=0)
    sizes = EncoderConfig(architecture="tiny", front_end="waveform", norm_first=False).resolved()
    settings = {
        "sizes": sizes,
        "layer": 1,
        "device": "cpu",
        "precision": "float32",
        "batch_seconds": 2.0,
        "seed": 0,
    }
    waves = torch.from_numpy(np.stack(corpus.read_corpus(tmp_path).waveforms))
    with torch.inference_mode():
        cut, whole = (
            features.TransformersPeer(settings, tmp_path, way).features(waves, None)
            for way in ("cut-batched", "whole-batched")
        )
    torch.testing.assert_close(cut, whole, rtol=0, atol=0)  # the same operations on the same numbers


def test_label_agreement_counts_the_frames_that_keep_their_class(tmp_path: Path) -> None:
    exact = np.random.default_rng(0).standard_normal((148, 8)).astype(np.float32)
    assert features.compare_features(exact, exact.copy(), 0) == {
        "label_agreement": 1.0,
        "label_classes": 37,
        "feature_error": 0.0,
    }
    assert features.compare_features(exact, -exact, 0)["label_agreement"] < 0.5
    # its mean is near 0
    assert features.compare_features(exact, 1.1 * exact, 0)["feature_error"] == pytest.approx(0.1, rel=0.1)


def test_agreement_compares_the_same_weights_on_the_same_utterances(tmp_path: Path) -> None:
    corpus.write_corpus(tmp_path, np.array([32000, 16000]), 5, seed=0)
    sizes = EncoderConfig(architecture="tiny", front_end="waveform").resolved()
    settings = {
        "sizes": sizes,
        "layer": 1,
        "device": "cpu",
        "precision": "bfloat16",
        "threads": 1,
        "seed": 0,
        "ours_batch_seconds": None,
    }
    about = features.Agreement(settings, tmp_path).about()
    assert about["label_classes"] == (99 + 49) // 4
    # bfloat16 keeps 8 bits: 0.4 % an operation
    assert 0 < about["feature_error"] < 0.05 and about["label_agreement"] > 0.9


@pytest.mark.parametrize(
    ("run", "given", "message"),
    [
        (
            pretrain.main,
            ["--peer", "torchaudio"],
            "torchaudio: does not pretrain wav2vec2; those that do: fairseq2, transformers",
        ),
        (pretrain.main, ["--batch", "0"], "--batch 0"),
        (pretrain.main, ["--rounds", "0"], "--rounds 0"),
        (loader.main, ["--rounds", "0"], "--rounds 0"),
        (loader.main, ["--total-seconds", "0"], "--total-seconds: more than 0 s"),
        (manifest.main, ["--rows", "0"], "--rows 0"),
        (features.main, ["--layer", "13"], "--layer 13: base has layers 1 to 12"),
    ],
)
def test_a_mistake_ends_with_status_2_and_says_what_to_do(
    run: Any, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(given) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_every_peer_of_the_command_line_pretrains_something() -> None:
    assert {peer for _, peer in PEERS} == {"transformers", "torchaudio", "fairseq2"}


@pytest.mark.slow
def test_manifest_ends_with_one_json_line_and_the_seconds_of_each_part(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert manifest.main(["--rows", "3000", "--read", "20", "--rounds", "1", "--threads", "1", "--json"]) == 0
    result = last_line(capsys.readouterr().out)
    assert (
        result["ratio"] == result["ours"] / result["peer"]
        and 0 < result["start_gb"] <= result["ours_peak_gb"]
    )
    assert (
        result["ours_parts"].keys()
        == result["peer_parts"].keys()
        == {"open_seconds", "plan_seconds", "read_seconds"}
    )
    # the parts are the whole
    assert 3000 / sum(result["ours_parts"].values()) == pytest.approx(result["ours"], rel=0.05)


def test_both_readers_of_a_manifest_plan_and_read_the_same(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest.draw_rows(2500, 0), {}, {}, root="/corpus")
    ours, peer = Manifest(tmp_path), manifest.Whole(tmp_path)
    np.testing.assert_array_equal(ours.lengths, peer.lengths)
    assert [ours[row].id for row in (0, 1023, 2499)] == [peer[row]["id"] for row in (0, 1023, 2499)]
