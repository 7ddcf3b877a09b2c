from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.data.packing import Layout, pack
from pretrain.data.utterance import num_frames
from pretrain.model import streaming
from pretrain.model.blocks import block_spans
from pretrain.model.config import EncoderConfig, StreamingConfig
from pretrain.model.encoder import Encoder
from pretrain.model.frontend import log_mel
from pretrain.model.streaming import Chunks
from tests.reference.convolutions import randomize

KINDS: dict[str, dict[str, Any]] = {
    "small": {"norm_first": True, "front_end": "filterbank"},
    "base": {"norm_first": False, "front_end": "waveform", "conv_norm": "group"},
    "large": {
        "norm_first": True,
        "front_end": "waveform",
        "conv_norm": "layer",
        "conv_bias": True,
        "normalize_waveform": True,
    },
}
CHUNKS = [
    {"chunk_frames": 4, "look_ahead_frames": 3, "left_chunks": 2},
    {"chunk_frames": 5},
    {"chunk_frames": 3, "look_ahead_frames": 5, "left_chunks": 0},
]
LENGTHS = [6000, 14000, 9999, 400, 3567]
# the same float32 products in matrices of another shape or order, through three layers; features are of order
# 1
ROUNDING = {"rtol": 1e-4, "atol": 5e-5}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
cuts = pytest.mark.parametrize("cut", CHUNKS, ids=["left", "all", "alone"])


def encoder(cut: dict[str, Any] | None, **options: Any) -> Encoder:
    torch.manual_seed(0)
    tree = {"architecture": "tiny", "num_layers": 3, "conv_dim": 24, "num_mels": 20, **options}
    module = Encoder(EncoderConfig(**tree, streaming=StreamingConfig(**cut) if cut else None)).eval()
    randomize(module)
    return module


def speech(lengths: list[int] = LENGTHS, seed: int = 1) -> list[np.ndarray]:
    """Noise whose loudness moves, so that statistics so far are not those of the whole."""
    rng = np.random.default_rng(seed)
    envelopes = [
        np.interp(np.arange(n), np.arange(0, n + 2000, 2000), rng.uniform(0.01, 0.3, -(-n // 2000) + 1))
        for n in lengths
    ]
    return [(e * rng.standard_normal(len(e)) + 0.02).astype(np.float32) for e in envelopes]


def sees(
    own: int, other: int, copied_for: tuple[int | None, int | None], size: int, left: int | None
) -> bool:
    """Whether the row of frame `own` attends that of `other`, by the definition; each is of a chunk, or a
    copy for one."""
    chunk = own // size if copied_for[0] is None else copied_for[0]
    if copied_for[1] is not None:
        return copied_for[1] == chunk
    return other // size <= chunk and (left is None or other // size >= chunk - left)


def plain_chunks(frames: int, config: StreamingConfig) -> tuple[list[int], list[int | None], Tensor]:
    """Frame and chunk copied for of each row, and (rows, rows): who sees whom."""
    size, rows = config.chunk_frames, []
    for first in range(0, frames, size):
        rows += [(t, None) for t in range(first, min(first + size, frames))]
        rows += [
            (t, first // size)
            for t in range(first + size, min(first + size + config.look_ahead_frames, frames))
        ]
    seen = [[sees(t, u, (copy, other), size, config.left_chunks) for u, other in rows] for t, copy in rows]
    return [t for t, _ in rows], [copy for _, copy in rows], torch.tensor(seen)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(0, 14),
    st.none() | st.integers(0, 4),
    st.sampled_from([1, 7, 256]),
)
def test_attention_in_groups_of_chunks_is_attention_under_the_mask_of_the_definition(
    frames: list[int], size: int, ahead: int, left: int | None, together: int
) -> None:
    config = StreamingConfig(chunk_frames=size, look_ahead_frames=ahead, left_chunks=left)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "QUERY_ROWS", together)
        chunks = Chunks(config, tuple(frames), torch.device("cpu"))
        generator, before, offset, expected, taken = torch.Generator().manual_seed(0), 0, 0, [], []
        for length in frames:
            rows, copies, seen = plain_chunks(length, config)
            assert chunks.frames[before : before + len(rows)].tolist() == [offset + t for t in rows]
            taken += [before + row for row, copy in enumerate(copies) if copy is None]
            before, offset = before + len(rows), offset + length
            heads = torch.randn(3, len(rows), 2, 4, generator=generator)
            scores = torch.einsum("qhd,khd->hqk", heads[0], heads[1]) / 2  # the root of 4
            weights = scores.masked_fill(~seen, -torch.inf).softmax(2)
            expected.append((heads, torch.einsum("hqk,khd->qhd", weights, heads[2]).flatten(1)))
        assert chunks.originals.tolist() == taken and len(chunks.frames) == before
        heads = torch.cat([heads for heads, _ in expected], dim=1)
        torch.testing.assert_close(
            chunks.attend(*heads), torch.cat([y for _, y in expected]), rtol=1e-5, atol=1e-5
        )  # float32


@kinds
@cuts
def test_the_transformer_is_the_plain_one_with_each_chunk_s_convolution_cut_off_and_the_mask_of_the_definition(
    kind: dict[str, Any], cut: dict[str, Any]
) -> None:
    module = encoder(cut, **kind)
    assert module.config.streaming is not None
    buffer, layout = pack(speech())
    outputs = module.extract_packed(buffer, layout, 3)
    with torch.no_grad():
        projected = module.project(module.feature_norm(module.features(buffer, layout)))
    for number, x in enumerate(layout.split(projected)):
        rows, copies, seen = plain_chunks(len(x), module.config.streaming)
        with torch.no_grad():
            for layer, expected in enumerate(plain_outputs(module, x, rows, copies, seen)):
                torch.testing.assert_close(
                    layout.split(outputs[layer])[number], expected, **ROUNDING, msg=f"layer {layer}"
                )


def plain_outputs(
    module: Encoder, x: Tensor, rows: list[int], copies: list[int | None], seen: Tensor
) -> list[Tensor]:
    config, positional = module.config, module.positional
    cut, heads = config.streaming, config.num_heads
    assert cut is not None
    convolved = []
    for t, copy in zip(rows, copies, strict=True):
        stop = (
            (t // cut.chunk_frames if copy is None else copy) + 1
        ) * cut.chunk_frames + cut.look_ahead_frames
        window = torch.stack(
            [
                x[u] if 0 <= u < min(stop, len(x)) else torch.zeros_like(x[0])
                for u in range(t - positional.kernel // 2, t - positional.kernel // 2 + positional.kernel)
            ]
        )
        convolved.append(
            F.conv1d(window.T[None], positional.weight(), positional.bias, groups=positional.groups)[0, :, 0]
        )
    y = x[rows] + F.gelu(torch.stack(convolved))
    own = [row for row, copy in enumerate(copies) if copy is None]
    y = y if config.norm_first else module.norm(y)
    outputs = [y[own]]
    for layer in module.layers:
        normed = layer.attention_norm(y) if config.norm_first else y
        q, k, v = (part.unflatten(1, (heads, -1)) for part in layer.qkv(normed).chunk(3, dim=1))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(2), v).flatten(
            1
        )
        y = y + layer.attention_out(attended)
        y = y if config.norm_first else layer.attention_norm(y)
        added = layer.ffn_out(F.gelu(layer.ffn_in(layer.ffn_norm(y) if config.norm_first else y)))
        y = y + added if config.norm_first else layer.ffn_norm(y + added)
        outputs.append(y[own])
    return outputs


@kinds
def test_with_a_chunk_as_long_as_the_utterance_nothing_differs_from_full_attention(
    kind: dict[str, Any],
) -> None:
    module, full = encoder({"chunk_frames": 50}, **kind), encoder(None, **kind)
    full.load_state_dict(module.state_dict())  # the same names: a pretrained encoder becomes a streaming one
    buffer, layout = pack(speech())
    for one, other in zip(
        module.extract_packed(buffer, layout, 3), full.extract_packed(buffer, layout, 3), strict=True
    ):
        # the filterbank's variance of float32 energies in float32 and in float64 is what differs most
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@kinds
@cuts
def test_a_chunk_depends_on_nothing_beyond_its_look_ahead_to_the_last_bit(
    kind: dict[str, Any], cut: dict[str, Any]
) -> None:
    module = encoder(cut, **kind)
    (wave,) = speech([20000])
    expected = module.extract_packed(*pack([wave]), 3)
    size, ahead, tail = cut["chunk_frames"], cut.get("look_ahead_frames", 0), module.front_end.tail
    for chunk in (0, 1, 4):
        stop = 320 * ((chunk + 1) * size + ahead) + tail
        changed = np.concatenate([wave[:stop], wave[stop:][::-1] * 3])
        got = module.extract_packed(*pack([changed]), 3)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one[: (chunk + 1) * size], other[: (chunk + 1) * size])
            assert not torch.equal(one[(chunk + 1) * size :], other[(chunk + 1) * size :])


@cuts
def test_the_look_ahead_does_not_grow_over_layers_and_all_of_it_is_used(cut: dict[str, Any]) -> None:
    module = encoder(cut, **KINDS["base"])
    buffer, layout = pack(speech([14000]))
    with torch.no_grad():
        features = module.feature_norm(module.features(buffer, layout))
    size, ahead, left = cut["chunk_frames"], cut.get("look_ahead_frames", 0), cut.get("left_chunks")
    for chunk in (0, 3):
        leaf = features.clone().requires_grad_()
        module.contextualize(leaf, layout).last[chunk * size : (chunk + 1) * size].square().sum().backward()
        assert leaf.grad is not None
        seen = leaf.grad.abs().sum(1) > 0
        assert (
            seen[chunk * size : (chunk + 1) * size + ahead].all()
            and not seen[(chunk + 1) * size + ahead :].any()
        )
        if left is None:
            assert seen[: chunk * size].all()
        elif left == 0:  # only the convolution reaches further to the left
            assert not seen[: max(chunk * size - module.positional.kernel // 2, 0)].any()


@pytest.mark.parametrize(
    "kind", [KINDS["small"], KINDS["large"], {**KINDS["base"], "normalize_waveform": True}]
)
@cuts
def test_nothing_that_an_utterance_is_batched_with_changes_it(
    kind: dict[str, Any], cut: dict[str, Any]
) -> None:
    module = encoder(cut, **kind)
    waves = speech()
    buffer, layout = pack(waves)
    together = module.extract_packed(buffer, layout, 3)
    for number, wave in enumerate(waves):
        for one, many in zip(module.extract_packed(*pack([wave]), 3), together, strict=True):
            torch.testing.assert_close(one, layout.split(many)[number], **ROUNDING)
        first, last = layout.slot_bounds[number]
        beside = buffer * float("nan")
        beside[320 * first : 320 * last] = buffer[320 * first : 320 * last]
        for one, other in zip(module.extract_packed(beside, layout, 3), together, strict=True):
            assert torch.equal(layout.split(one)[number], layout.split(other)[number])


@cuts
def test_mel_statistics_are_those_of_all_windows_until_the_frame_s_block_ends(cut: dict[str, Any]) -> None:
    module = encoder(cut, **KINDS["small"])
    (wave,) = speech([14321])
    buffer, layout = pack([wave])
    mel = log_mel(torch.from_numpy(wave), module.front_end.window, module.front_end.mel).double()
    features = module.features(buffer, layout)
    size, ahead = cut["chunk_frames"], cut.get("look_ahead_frames", 0)
    for t, frame in enumerate(features):
        block = max(t - ahead, 0) // size
        known = mel[: 2 * ((block + 1) * size + ahead)]
        mean, scale = known.mean(0), (known.var(0, correction=0) + 1e-5).rsqrt()
        windows = mel[2 * t], mel[min(2 * t + 1, len(mel) - 1)]
        expected = torch.cat([(window - mean) * scale for window in windows]).float()
        # energies are rounded to float32 by either FFT
        torch.testing.assert_close(frame, expected, rtol=1e-4, atol=1e-4)


@given(st.integers(400, 30000), st.integers(1, 20), st.integers(0, 20), st.sampled_from([80, 240]))
def test_blocks_hold_every_frame_once(num_samples: int, size: int, ahead: int, tail: int) -> None:
    config = StreamingConfig(chunk_frames=size, look_ahead_frames=ahead)
    spans = block_spans(num_samples, config, tail)
    counts = [num_frames(stop - start) for start, stop in spans]
    assert sum(counts) == num_frames(num_samples)
    assert [start for start, _ in spans] == [320 * sum(counts[:block]) for block in range(len(spans))]
    assert all(count == size + (ahead if block == 0 else 0) for block, count in enumerate(counts[:-1]))


@kinds
def test_gradients_of_a_batch_are_the_sum_of_its_utterances_and_reach_every_parameter(
    kind: dict[str, Any],
) -> None:
    waves = speech([6000, 4321, 400])
    found = []
    for groups in ([waves], [[wave] for wave in waves]):
        module = encoder(CHUNKS[0], **kind, dropout=0.0, input_dropout=0.0, attention_dropout=0.0).train()
        for group in groups:
            buffer, layout = pack(group)
            mask = torch.cat([torch.arange(frames) % 5 == 0 for frames in layout.num_frames])
            x = module.encode(buffer, layout, mask).last
            x.square().sum().backward()
        found.append({name: p.grad for name, p in module.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None and gradient.any(), name
        scale = gradient.abs().max().clamp(min=1e-3)  # sums of many float32 products, in another order
        torch.testing.assert_close(gradient / scale, found[1][name] / scale, rtol=0, atol=1e-4, msg=name)


def test_training_drops_frames_values_and_layers_and_masks_as_elsewhere() -> None:
    module = encoder(
        CHUNKS[0],
        **KINDS["small"],
        dropout=0.1,
        input_dropout=0.1,
        attention_dropout=0.2,
        activation_dropout=0.1,
        layer_drop=0.5,
    ).train()
    buffer, layout = pack(speech())
    features = module.feature_norm(module.features(buffer, layout)).detach()
    mask, channels = (
        torch.zeros(layout.total_frames, dtype=torch.bool),
        torch.zeros(len(LENGTHS), 64, dtype=torch.bool),
    )
    mask[::3], channels[:, ::5] = True, True

    def run() -> Tensor:
        return module.contextualize(features, layout, mask, channels).last

    module.gates = [True, False, True]
    torch.manual_seed(0)
    one = run()
    assert one.shape == (layout.total_frames, 64)
    torch.manual_seed(0)
    assert torch.equal(run(), one)
    assert not torch.equal(run(), one)
    one.sum().backward()
    # of a dropped layer, too: every rank reduces the same
    assert all(p.grad is not None for p in module.layers[1].parameters())


def test_the_order_of_units_is_seen_in_chunks_too() -> None:
    module = encoder(CHUNKS[0], norm_first=True, front_end="units", num_units=7)
    units = torch.from_numpy(np.random.default_rng(0).integers(0, 7, 40))
    layout = Layout((400 + 320 * 39,))
    expected = module.extract_packed(units, layout, 3)[-1]
    changed = units.clone()
    changed[4 * 5 + 3 :] = (changed[4 * 5 + 3 :] + 1) % 7  # what chunk 4 does not see
    got = module.extract_packed(changed, layout, 3)[-1]
    assert torch.equal(got[:20], expected[:20]) and not torch.equal(got[20:24], expected[20:24])


def test_latency_counts_the_chunk_the_look_ahead_and_the_window() -> None:
    config = StreamingConfig(chunk_frames=16, look_ahead_frames=8)
    for tail in (80, 240):
        # samples from a frame's first to the last that its chunk needs
        waits = [320 * (16 + 8 - t) + tail for t in range(16)]
        assert config.latency_ms(tail) == {
            "worst": max(waits) / 16,
            "mean": pytest.approx(np.mean(waits) / 16),
        }
    assert StreamingConfig(chunk_frames=1).latency_ms(80) == {"worst": 25.0, "mean": 25.0}


def test_configs_without_the_key_stay_as_they_are_and_bad_values_are_named() -> None:
    assert EncoderConfig(architecture="small").streaming is None
    tree = EncoderConfig(architecture="small").resolved()
    del tree["streaming"]
    assert EncoderConfig.model_validate(tree) == EncoderConfig(architecture="small")
    with pytest.raises(ValueError, match="chunk_frames"):
        EncoderConfig.model_validate_json('{"streaming": {"chunk_frames": 0}}')
