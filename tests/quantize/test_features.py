from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantize.features
from pretrain.data.manifest import Manifest
from pretrain.data.packing import Layout
from pretrain.data.utterance import Utterance, num_frames
from pretrain.data.windows import equal_windows
from pretrain.model.config import LayerConvention
from pretrain.model.encoder import load_encoder
from quantize.features import (
    CONTEXT_FRAMES,
    WINDOW_FRAMES,
    EncoderSource,
    MfccSource,
    ahead,
    open_encoder_source,
    plan_batches,
)
from quantize.mfcc import deltas, mfcc
from tests.pretrain.model.test_streaming import CHUNKS, KINDS, ROUNDING, encoder


def kaldi_mfcc(wave: np.ndarray) -> np.ndarray:
    """Kaldi's compute-mfcc-feats in float64, frame by frame, as its documentation has it: (frames at 100 Hz,
    13)."""

    def mel(hertz: np.ndarray) -> np.ndarray:
        return 1127 * np.log(1 + hertz / 700)

    edges = np.linspace(mel(np.array(20.0)), mel(np.array(8000.0)), 25)
    bins = mel(np.arange(257) * 16000 / 512)
    bank = np.array(
        [
            np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
            for low, centre, high in zip(edges[:-2], edges[1:-1], edges[2:], strict=True)
        ]
    )
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    dct = np.sqrt(2 / 23) * np.cos(np.pi / 23 * np.outer(np.arange(13), np.arange(23) + 0.5))
    dct[0] = np.sqrt(1 / 23)
    lifter = 1 + 0.5 * 22 * np.sin(np.pi * np.arange(13) / 22)
    frames = []
    for start in range(0, len(wave) - 399, 160):
        frame = wave[start : start + 400].astype(np.float64)
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, 512)) ** 2
        frames.append(
            lifter * (dct @ np.log(np.maximum(bank[:, :256] @ power[:256], np.finfo(np.float32).eps)))
        )
    return np.array(frames)


def slow_deltas(features: np.ndarray) -> np.ndarray:
    last = len(features) - 1
    return np.array(
        [
            sum(n * features[min(max(t + n, 0), last)] for n in (-2, -1, 1, 2)) / 10
            for t in range(len(features))
        ]
    )


def test_mfcc_equal_kaldis_formula_with_hubert_s_deltas() -> None:
    rng = np.random.default_rng(0)
    wave = (0.1 * rng.standard_normal(7000) * np.sin(np.arange(7000) / 900)).astype(np.float32)
    static = kaldi_mfcc(wave)
    first = slow_deltas(static)
    expected = np.hstack([static, first, slow_deltas(first)])[::2]
    # float32 FFT and logarithm against float64, on values up to 40
    np.testing.assert_allclose(mfcc(wave), expected, atol=2e-3)


@settings(deadline=None, max_examples=60)
@given(st.integers(400, 6000))
def test_mfcc_have_exactly_the_encoder_s_frames(num_samples: int) -> None:
    features = mfcc(np.zeros(num_samples, dtype=np.float32))
    assert features.shape == (num_frames(num_samples), 39)
    assert np.isfinite(features).all()


def test_an_mfcc_frame_sees_the_window_of_its_convolution_frame_alone() -> None:
    wave = np.random.default_rng(1).standard_normal(4000).astype(np.float32)
    other = wave.copy()
    other[3 * 320 : 3 * 320 + 400] = 0
    changed = np.flatnonzero((mfcc(wave)[:, :13] != mfcc(other)[:, :13]).any(axis=1))
    assert changed.tolist() == [2, 3, 4]  # 400-sample windows every 320 overlap by 80 with their neighbours


def test_cmvn_takes_out_the_gain_and_survives_silence() -> None:
    wave = 0.1 * np.random.default_rng(2).standard_normal(16000).astype(np.float32)
    # a factor shifts c0 alone; float32 rounding of c0 around -30, divided by deviations of about 1
    np.testing.assert_allclose(mfcc(4 * wave, cmvn=True), mfcc(wave, cmvn=True), atol=1e-3)
    assert np.abs(mfcc(4 * wave)[:, 0] - mfcc(wave)[:, 0]).min() > 1
    assert np.isfinite(mfcc(np.zeros(16000, dtype=np.float32), cmvn=True)).all()


def test_deltas_of_a_line_are_its_slope_inside() -> None:
    line = 3 * np.arange(10, dtype=np.float32)[:, None]
    assert deltas(line)[2:-2].ravel().tolist() == [3.0] * 6


def test_sources_give_every_utterance_its_frames_and_describe_themselves(corpus: Path, run: Path) -> None:
    utterances = list(Manifest(corpus))
    encoder = open_encoder_source(str(run), 1, device="cpu", batch_seconds=None, workers=2)
    for source in (MfccSource(), encoder):
        found = {utterance.id: features for utterance, features in source.features(utterances)}
        assert list(found) == [utterance.id for utterance in utterances]
        for utterance in utterances:
            assert found[utterance.id].shape == (utterance.num_frames, source.dim)
            assert found[utterance.id].dtype == np.float32
    assert MfccSource().describe() == {"kind": "mfcc", "cmvn": False}
    assert encoder.describe() == {"kind": "encoder", "encoder": encoder.fingerprint, "layer": 1}


def test_an_utterance_alone_has_the_same_bits_in_any_company(corpus: Path, run: Path) -> None:
    utterances = list(Manifest(corpus))
    source = open_encoder_source(str(run), 2, device="cpu", batch_seconds=None, workers=1)
    together = {utterance.id: features for utterance, features in source.features(utterances)}
    for utterance in utterances[::3]:
        ((_, alone),) = source.features([utterance])
        assert np.array_equal(alone, together[utterance.id])


def test_the_number_of_threads_changes_no_bit_and_stays_what_it_was(corpus: Path, run: Path) -> None:
    utterances, threads, found = list(Manifest(corpus)), torch.get_num_threads(), []
    source = open_encoder_source(str(run), 2, device="cpu")
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append([features for _, layers in source.all_layers(utterances) for features in layers])
            for _ in source.features(utterances):
                break  # a consumer that stops early
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert all(np.array_equal(*pair) for others in found[1:] for pair in zip(found[0], others, strict=True))


def test_batches_change_features_by_rounding_only(corpus: Path, run: Path) -> None:
    utterances = list(Manifest(corpus))
    source = open_encoder_source(str(run), 2, device="cpu")
    expected = [features for _, features in source.features(utterances)]
    source.batch_seconds = 4.0  # what a GPU does, done by the CPU
    assert max(map(len, plan_batches(utterances, 4.0))) > 1
    found = list(source._in_batches([utterances[:5], [], utterances[5:]], [2]))
    assert [utterance for utterance, _ in found] == utterances
    for (_, (features,)), alone in zip(found, expected, strict=True):
        # the same sums in another order: float32 rounding through two layers, on values of order 1
        np.testing.assert_allclose(features, alone, atol=2e-5)


def test_a_batch_has_utterances_of_one_group_only(
    corpus: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utterances = list(Manifest(corpus))
    source = open_encoder_source(str(run), 0, device="cpu", workers=1)
    source.batch_seconds = 60.0
    sizes: list[int] = []
    real = EncoderSource._extract

    def extract(
        self: EncoderSource, waveforms: list[np.ndarray], layers: list[int], totals: Any = None
    ) -> list[list[np.ndarray]]:
        sizes.append(len(waveforms))
        return real(self, waveforms, layers, totals)

    monkeypatch.setattr(EncoderSource, "_extract", extract)
    assert len(list(source._in_batches([utterances[:5], utterances[5:6], utterances[6:]], [0]))) == 12
    assert sizes == [5, 1, 6]


def test_groups_are_asked_for_as_they_are_needed(corpus: Path, run: Path) -> None:
    utterances, asked = list(Manifest(corpus)), []
    for source in (MfccSource(workers=1), open_encoder_source(str(run), 1, device="cpu", workers=1)):
        asked.clear()
        groups = ((asked.append(place), [utterance])[1] for place, utterance in enumerate(utterances))
        stream = source.stream(groups)
        first, _ = next(stream)
        assert first == utterances[0] and len(asked) < 12  # decoded and computed a little ahead
        assert [utterance for utterance, _ in stream] == utterances[1:]


def test_all_layers_at_once_equal_each_layer_alone(corpus: Path, run: Path) -> None:
    utterances = list(Manifest(corpus))[:2]
    source = open_encoder_source(str(run), 1, device="cpu", batch_seconds=None, workers=1)
    for (_, layers), (_, features) in zip(
        source.all_layers(utterances), source.features(utterances), strict=True
    ):
        assert len(layers) == 3
        assert np.array_equal(layers[1], features)


class WindowSums:
    """Stands for an encoder without context: a frame is the sum of its 400 samples."""

    config = SimpleNamespace(dim=1, num_layers=0, streaming=None, normalize_waveform=False)
    front_end = SimpleNamespace(has_statistics=False)

    def extract_packed(
        self, waveforms: torch.Tensor, layout: Layout, last: int, convention: str, totals: None
    ) -> list[torch.Tensor]:
        return [layout.drop_between(waveforms.double().unfold(0, 400, 320).sum(dim=1, keepdim=True))]


def test_long_utterances_go_through_the_encoder_in_windows_that_keep_every_frame(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utterance = max(Manifest(corpus), key=lambda utterance: utterance.length)
    source = EncoderSource(WindowSums(), "", 0, batch_seconds=0)  # type: ignore[arg-type]
    ((_, whole),) = source.features([utterance])
    monkeypatch.setattr(quantize.features, "WINDOW_FRAMES", 20)
    monkeypatch.setattr(quantize.features, "CONTEXT_FRAMES", 7)
    assert len(equal_windows(utterance.num_frames, 20, CONTEXT_FRAMES)) > 2
    ((_, windowed),) = source.features([utterance])
    assert whole.shape == (utterance.num_frames, 1) and np.array_equal(windowed, whole)


def test_a_long_utterance_goes_through_in_windows_whatever_it_is_batched_with(
    corpus: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utterances = sorted(Manifest(corpus), key=lambda utterance: -utterance.length)[:3]
    monkeypatch.setattr(quantize.features, "WINDOW_FRAMES", utterances[0].num_frames - 1)
    source = open_encoder_source(str(run), 2, device="cpu", workers=1)
    ((_, alone),) = source.features(utterances[:1])
    source.batch_seconds = 60.0
    for order in (utterances, utterances[::-1]):
        found = {utterance.id: features for utterance, (features,) in source._in_batches([order], [2])}
        assert np.array_equal(found[utterances[0].id], alone)
    assert [len(batch) for batch in plan_batches(utterances, 60)] == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("convention", ["residual", "feed_forward"])
def test_a_streaming_encoder_has_no_cuts_in_a_long_utterance(
    kind: str, convention: LayerConvention, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utterances = sorted(Manifest(corpus), key=lambda utterance: -utterance.length)[:2]
    source = EncoderSource(encoder(CHUNKS[0], **KINDS[kind]), "", 2, convention=convention)
    expected = list(source.all_layers(utterances, [0, 2]))
    monkeypatch.setattr(quantize.features, "WINDOW_FRAMES", utterances[1].num_frames)
    monkeypatch.setattr(quantize.features, "CONTEXT_FRAMES", 7)
    extracted: list[np.ndarray] = []
    real = EncoderSource._extract_online
    monkeypatch.setattr(
        EncoderSource,
        "_extract_online",
        lambda self, wave, layers: [extracted.append(wave), real(self, wave, layers)][1],
    )
    for found in (
        list(source.all_layers(utterances, [0, 2])),
        list(source._in_batches([utterances], [0, 2])),
    ):
        for (utterance, layers), (_, wanted) in zip(found, expected, strict=True):
            for one, other in zip(layers, wanted, strict=True):
                assert one.shape == (utterance.num_frames, source.dim)
                np.testing.assert_allclose(one, other, **ROUNDING)
    # that, and not the other
    assert [num_frames(len(wave)) for wave in extracted] == [utterances[0].num_frames] * 2


@given(st.integers(1, 30_000))
def test_windows_cover_each_frame_once(total: int) -> None:
    windows = equal_windows(total, WINDOW_FRAMES, CONTEXT_FRAMES)
    assert windows[0].start == 0 and windows[-1].end == total
    assert all(left.end == right.start for left, right in pairwise(windows))
    assert all(
        0 < end - start <= 5000 and first <= start and last >= end for first, last, start, end in windows
    )


def test_other_precisions_change_features_a_little_and_nothing_but_that(corpus: Path, run: Path) -> None:
    utterances = list(Manifest(corpus))
    options: dict[str, Any] = {"device": "cpu", "batch_seconds": None, "workers": 1}
    expected = {
        utterance.id: features
        for utterance, features in open_encoder_source(str(run), 2, **options).features(utterances)
    }
    scale = np.concatenate(list(expected.values())).std()
    # relative errors of a product: 2^-9 of a bfloat16 factor, 1 / 254 of the largest of a row in 8 bits; a
    # few products deep
    for precision, bound in (("bfloat16", 0.03), ("int8", 0.1)):
        source = open_encoder_source(str(run), 2, precision=precision, **options)
        for utterance, features in source.features(utterances):
            error = np.sqrt(np.mean((features - expected[utterance.id]) ** 2)) / scale
            assert features.dtype == np.float32 and 0 < error < bound, precision


def test_int8_is_refused_on_a_gpu(run: Path) -> None:
    encoder, _ = load_encoder(run)
    with pytest.raises(ValueError, match='precision: "int8" runs on a CPU, not on cuda'):
        EncoderSource(encoder, "", 1, device="cuda", precision="int8")


def test_the_other_layer_convention_is_what_the_feed_forward_adds_and_the_codebook_knows_it(
    corpus: Path, run: Path
) -> None:
    utterances = list(Manifest(corpus))[:2]
    sources = [
        open_encoder_source(str(run), 2, device="cpu", batch_seconds=None, workers=1, convention=convention)
        for convention in ("residual", "feed_forward")
    ]
    assert sources[1].describe() == {**sources[0].describe(), "convention": "feed_forward"}
    after, added = (list(source.all_layers(utterances)) for source in sources)
    encoder, _ = load_encoder(run)
    for (_, outputs), (utterance, updates) in zip(after, added, strict=True):
        assert len(outputs) == len(updates) == 3 and np.array_equal(outputs[0], updates[0])
        block = encoder.layers[1]
        with torch.no_grad():
            stream, update = block.residual_terms(torch.from_numpy(outputs[1]), Layout((utterance.length,)))
            final = stream + update if encoder.config.norm_first else block.ffn_norm(stream + update)
        # the same products in the same shapes
        np.testing.assert_allclose(updates[2], update.numpy(), atol=1e-6)
        np.testing.assert_allclose(outputs[2], final.numpy(), atol=1e-6)


def test_a_layer_that_does_not_exist_is_an_error(run: Path) -> None:
    with pytest.raises(ValueError, match="layer: 3 does not exist; this encoder has layers 0 to 2"):
        open_encoder_source(str(run), 3, device="cpu", batch_seconds=None, workers=1)


def test_an_error_in_a_decoding_thread_reaches_the_consumer_and_stops_the_rest() -> None:
    def fail(utterance: Utterance) -> int:
        if utterance.id == "3":
            raise ValueError("u3.wav: is truncated")
        return int(utterance.id)

    utterances = [Utterance(str(number), "", 0, 400, 16000) for number in range(100)]
    seen = []
    with pytest.raises(ValueError, match="is truncated"):
        for utterance, _ in ahead(fail, utterances, workers=2):
            seen.append(utterance.id)
    assert seen == ["0", "1", "2"]


def test_of_hour_long_recordings_two_at_a_time_are_decoded() -> None:
    utterances = [Utterance(str(number), "", 0, 3000 * 16000, 16000) for number in range(10)]
    asked: list[Utterance] = []
    generator = ahead(
        lambda utterance: utterance.id,
        ((asked.append(utterance), utterance)[1] for utterance in utterances),
        2,
    )
    for place, (utterance, name) in enumerate(generator):
        assert utterance == utterances[place] and name == utterance.id and len(asked) <= place + 2
    assert asked == utterances


def test_a_cpu_takes_one_utterance_at_a_time_whatever_batch_seconds_say(run: Path) -> None:
    for batch_seconds in (None, 0.0, 60.0):
        source = open_encoder_source(str(run), 1, device="cpu", batch_seconds=batch_seconds, workers=1)
        assert isinstance(source, EncoderSource) and source.batch_seconds == 0


def test_a_device_that_is_not_here_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="^device: 'foo' is not here; torch .* has cpu"):
        open_encoder_source(str(run), 1, device="foo")
