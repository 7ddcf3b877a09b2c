from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.data.packing import Layout
from pretrain.model import attention as attending
from pretrain.model import cpu_kernels as kernels
from pretrain.model.attention import attention, has_varlen
from pretrain.model.int8 import Int8Linear
from pretrain.model.operations import (
    dropout,
    gelu_conv,
    gelu_linear,
    grouped_conv,
    segment_linear,
    strided_conv,
)

# In float64 two orders of summation agree to 1e-15 of what is summed, some hundred terms of order 1.
EXACT = {"rtol": 1e-10, "atol": 1e-10}
# bfloat16 keeps 8 bits: 0.4 % of each product and of what is stored between operations, against outputs of
# order 1.
BFLOAT16 = {"rtol": 2e-2, "atol": 2e-2}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def assert_same(one: Callable[[], Tensor], other: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    """Two formulations have the same value and the same gradients of a random weighting of it."""
    y, expected = one(), other()
    torch.testing.assert_close(y, expected, **EXACT)
    weight = draw(*y.shape, seed=99).detach()
    for mine, theirs in zip(
        torch.autograd.grad(y, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs, **EXACT)


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor | None, norm: nn.LayerNorm | None) -> Tensor:
    active = F.gelu(x if norm is None else norm(x))
    return F.conv1d(active.T[None], weight.permute(2, 1, 0), bias, stride=min(2, len(weight)))[0].T


@pytest.mark.parametrize("rows_a_block", [1, 2, 3, 1000])
@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_gelu_conv_has_the_value_and_gradients_of_its_plain_formulation(
    kernel: int, biased: bool, normed: bool, rows_a_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels, stride = 5, min(2, kernel)
    monkeypatch.setattr(kernels, "BLOCK_BYTES", rows_a_block * channels * stride * 8)
    weight, bias, norm = draw(kernel, channels, 4), draw(4, seed=1) if biased else None, None
    if normed:
        norm = nn.LayerNorm(channels).double()
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    for length in (
        kernel,
        kernel + 1,
        6,
        7,
        12,
        13,
        14,
    ):  # one frame; rows that no frame reaches; blocks that end early or not
        x = draw(length, channels, seed=length)
        inputs = [
            x,
            weight,
            *([bias] if bias is not None else []),
            *(norm.parameters() if norm is not None else []),
        ]
        assert_same(
            lambda x=x: gelu_conv(x, weight, bias, norm),
            lambda x=x: plain_conv(x, weight, bias, norm),
            inputs,
        )
        torch.testing.assert_close(
            strided_conv(F.gelu(x), weight), plain_conv(x, weight, None, None), **EXACT
        )


def test_blocks_of_eight_mebibytes_change_nothing() -> None:
    """At the width and length of a real batch, where one pass takes several blocks."""
    x = draw(5000, 512, dtype=torch.float32)
    assert x.numel() * 4 > kernels.BLOCK_BYTES
    weight = draw(3, 512, 8, dtype=torch.float32)
    y, expected = gelu_conv(x, weight), plain_conv(x, weight, None, None)
    mine, theirs = (torch.autograd.grad(out.square().sum(), [x, weight]) for out in (y, expected))
    for one, other in zip((y.detach(), *mine), (expected.detach(), *theirs), strict=True):
        # float32 sums of 1500 to 2500 products, beside the largest of the tensor
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_gelu_linear_has_the_value_and_gradients_of_a_linear_layer_after_gelu() -> None:
    linear, x = nn.Linear(7, 3).double(), draw(11, 7)
    assert_same(lambda: gelu_linear(x, linear), lambda: linear(F.gelu(x)), [x, *linear.parameters()])


def test_the_gradient_of_a_linear_layers_weight_is_laid_out_like_the_weight() -> None:
    """So that nothing is copied where gradients are accumulated."""
    linear = nn.Linear(7, 3)
    gelu_linear(draw(11, 7, dtype=torch.float32), linear).sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.is_contiguous()


def test_gradients_come_through_an_output_that_is_used_transposed() -> None:
    x, weight = draw(9, 5), draw(3, 5, 4)
    assert_same(
        lambda: gelu_conv(x, weight).T.clone(),
        lambda: plain_conv(x, weight, None, None).T.clone(),
        [x, weight],
    )


@pytest.mark.parametrize("kernel", [8, 16, 24, 5])  # the last is not made of eights and goes another way
def test_grouped_conv_has_the_value_and_gradients_of_conv1d(kernel: int) -> None:
    weight, bias = draw(6, 2, kernel), draw(6, seed=1)  # three groups
    for frames in (1, 7, 8, 9, 17):
        x = draw(kernel - 1 + frames, 6, seed=frames)
        plain = lambda x=x: F.conv1d(x.T[None], weight, bias, groups=3)[0].T  # noqa: E731
        assert_same(lambda x=x: grouped_conv(x, weight, bias), plain, [x, weight, bias])
        view = x.detach().T.contiguous().T  # strides are no matter
        torch.testing.assert_close(grouped_conv(view, weight, bias), plain(), **EXACT)


def test_a_frame_of_grouped_conv_sees_its_kernel_and_nothing_else() -> None:
    weight, bias, x = draw(6, 2, 8), draw(6, seed=1), draw(40, 6).detach()
    expected = grouped_conv(x, weight, bias)
    for place in (0, 13, 39):
        y = grouped_conv(x.index_fill(0, torch.tensor([place]), float("nan")), weight, bias)
        touched = (torch.arange(33) <= place) & (place < torch.arange(33) + 8)
        assert torch.equal(y[~touched], expected[~touched]) and y[touched].isnan().all()


def test_segment_linear_is_a_linear_layer_for_each_segment() -> None:
    weights, shifts = draw(3, 6, 4), draw(3, 4, seed=1)
    parts = tuple(draw(length, 6, seed=length).detach() for length in (5, 1, 8))

    def plain() -> torch.Tensor:
        return torch.cat(
            [part @ weight + shift for part, weight, shift in zip(parts, weights, shifts, strict=True)]
        )

    assert_same(lambda: segment_linear(parts, weights, shifts), plain, [weights, shifts])


def test_segments_may_overlap_as_windows_do() -> None:
    """The front end's windows are a view of the waveform with strides of its own."""
    weights, shifts = draw(2, 10, 4), draw(2, 4, seed=1)
    windows = draw(200).detach().unfold(0, 10, 5)
    parts = windows.split([20, len(windows) - 20])

    def plain() -> torch.Tensor:
        return torch.cat(
            [
                part.clone() @ weight + shift
                for part, weight, shift in zip(parts, weights, shifts, strict=True)
            ]
        )

    assert_same(lambda: segment_linear(parts, weights, shifts), plain, [weights, shifts])


@pytest.mark.parametrize("bias", [None, torch.arange(5.0)])
def test_int8_is_exact_where_8_bits_hold_inputs_and_weights(bias: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-127, 128, shape, generator=generator).float() for shape in ((9, 33), (5, 33)))
    x[:, 0], weight[:, 0] = 127, -127
    x, weight = (
        x / 1024,
        weight * torch.tensor([[1.0], [2], [0.25], [64], [0]]),
    )  # each row and channel has a scale of its own
    expected = x.double() @ weight.double().T
    expected = expected if bias is None else expected + bias
    # float32's rounding of the scales
    torch.testing.assert_close(
        Int8Linear(weight, bias)(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )
    x[3] = 0
    assert torch.equal(Int8Linear(weight, bias)(x)[3], torch.zeros(5) if bias is None else bias)


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_int8_errs_by_no_more_than_half_a_step_of_each_factor(
    kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 7 * 16 * 4)
    norm = nn.LayerNorm(16)
    x, weight, bias = (
        draw(*shape, dtype=torch.float32).detach() for shape in ((43, 16), (kernel, 16, 12), (12,))
    )
    int8 = Int8Linear(weight.flatten(0, 1).T, kernel=kernel)
    active = F.gelu(norm(x)).double().detach()
    stride = min(2, kernel)
    taps = active.unfold(0, kernel, stride).transpose(1, 2).flatten(1)  # (frames, kernel x in)
    columns = weight.flatten(0, 1).double()
    expected = taps @ columns + bias
    row, column = taps.abs().amax(1, keepdim=True) / 127, columns.abs().amax(0, keepdim=True) / 127
    bound = (
        taps.abs().sum(1, keepdim=True) * column / 2
        + columns.abs().sum(0) * row / 2
        + taps.shape[1] * row * column / 4
    )
    with torch.no_grad():
        y = gelu_conv(x, int8, bias, norm)
    assert y.shape == expected.shape and ((y - expected).abs() <= bound + 1e-5).all()
    # Independent errors, each uniform over a step, have a twelfth of its square as variance.
    variance = (taps.square().sum(1, keepdim=True) * column**2 + columns.square().sum(0) * row**2) / 12
    assert float(((y - expected).square() / variance).mean()) == pytest.approx(1.0, abs=0.3)
    if kernel == 1:
        linear = nn.Linear(16, 12)
        torch.testing.assert_close(
            gelu_linear(x, Int8Linear(linear.weight, linear.bias)), linear(F.gelu(x)), rtol=0.05, atol=0.02
        )


@pytest.mark.parametrize("kernel", [1, 2, 3])
@torch.no_grad()
def test_without_gradients_autocast_goes_by_blocks_too(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = nn.LayerNorm(16)
    x, weight, bias = (
        draw(*shape, dtype=torch.float32).detach() for shape in ((43, 16), (kernel, 16, 12), (12,))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gelu_conv(x, weight, bias, norm)
        for rows in (1, 3, 8):
            monkeypatch.setattr(kernels, "BLOCK_BYTES", rows * 16 * 4 * min(2, kernel))
            # an ulp of bfloat16
            torch.testing.assert_close(gelu_conv(x, weight, bias, norm), expected, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_autocast_to_bfloat16_runs_and_is_close(kernel: int) -> None:
    norm, linear = nn.LayerNorm(32), nn.Linear(32, 16)
    x, weight, bias = (
        draw(*shape, seed=i, dtype=torch.float32)
        for i, shape in enumerate([(40, 32), (kernel, 32, 16), (16,)])
    )
    weights, shifts = draw(2, 10, 16, dtype=torch.float32), draw(2, 16, dtype=torch.float32)
    parts = draw(200, dtype=torch.float32).detach().unfold(0, 10, 5).split([20, 19])
    # Of 8 channels a group oneDNN's own product of bfloat16 is wrong on CPUs with AMX (torch 2.9 to 2.13);
    # the models have 16 to 80.
    filters, shift = draw(32, 16, 16, dtype=torch.float32), draw(32, dtype=torch.float32)
    heads, layout = draw(9, 3, 2, 8, dtype=torch.float32), Layout((1040, 2200))  # 3 and 6 frames
    calls: list[Callable[[], Tensor]] = [
        lambda: gelu_conv(x, weight / 10, bias, norm),
        lambda: gelu_linear(x, linear),
        lambda: segment_linear(parts, weights / 3, shifts),
        lambda: attention(heads, layout, 0.0),
        lambda: grouped_conv(x, filters / 10, shift),
    ]
    leaves = [
        x,
        weight,
        bias,
        weights,
        shifts,
        heads,
        filters,
        shift,
        *norm.parameters(),
        *linear.parameters(),
    ]
    for call in calls:
        expected = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product, y = x @ linear.weight.T, call()
        assert product.dtype == torch.bfloat16  # autocast is on
        torch.testing.assert_close(y.float(), expected, **BFLOAT16)
        mine, theirs = (
            torch.autograd.grad(out.float().sum(), leaves, allow_unused=True) for out in (y, expected)
        )
        for one, other in zip(mine, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2 * float(other.abs().max()))


def test_without_training_or_rate_dropout_is_the_identity() -> None:
    x = draw(3, 5)
    assert dropout(x, 0.5, training=False) is x and dropout(x, 0.0, training=True) is x


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_dropout_drops_its_rate_independently_and_scales_the_rest(rate: float) -> None:
    torch.manual_seed(0)
    count = 1 << 20
    y = dropout(torch.ones(count), rate, training=True)
    kept = y != 0
    # The rate is a multiple of 1 / 65536, at most half of that away; what is kept is scaled by it exactly.
    near = 2**-17
    torch.testing.assert_close(
        y[kept], torch.full_like(y[kept], 1 / (1 - rate)), rtol=2 * near / (1 - rate), atol=0
    )
    deviation = (rate * (1 - rate) / count) ** 0.5
    assert abs(float((~kept).float().mean()) - rate) < near + 5 * deviation
    # Four neighbours share a random number: each has the rate, and no pair more in common than chance.
    four = kept.view(-1, 4).double()
    assert (four.mean(0) - (1 - rate)).abs().max() < near + 5 * 2 * deviation
    correlation = torch.corrcoef(torch.cat([four[:-1], four[1:]], dim=1).T) - torch.eye(8)
    assert correlation.abs().max() < 5 / len(four) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (5, 7), (3, 1, 11), (0, 4)])
def test_dropout_uses_one_mask_forward_and_backward_whatever_size_and_type(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.5, training=True)
    assert y.shape == x.shape and y.dtype == dtype and set(y.flatten().tolist()) <= {0.0, 2.0}
    weight = torch.randn(shape).to(dtype)
    (gradient,) = torch.autograd.grad(y, x, weight)
    assert torch.equal(gradient, weight * y)


def test_dropout_reads_a_tensor_by_its_shape_not_by_its_strides() -> None:
    x = draw(6, 4).detach().T
    torch.manual_seed(3)
    y = dropout(x, 0.5, training=True)
    torch.manual_seed(3)
    assert torch.equal(y, dropout(x.contiguous(), 0.5, training=True))


def test_dropout_follows_the_seed() -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([dropout(torch.ones(501), 0.5, training=True) for _ in range(2)])

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert not torch.equal(drawn(0)[:501], drawn(0)[501:])


LAYOUT = Layout((1040, 400, 2320, 3920))  # 3, 1, 7 and 12 frames
FRAMES = LAYOUT.total_frames


def plain_attention(heads: Tensor, layout: Layout) -> Tensor:
    """Every query, key and head in turn, as the definition has it."""
    outputs = []
    for part in layout.split(heads):
        query, key, value = part.unbind(1)  # (frames, num_heads, head_dim)
        scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[2] ** 0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(2), value).flatten(1))
    return torch.cat(outputs)


def test_attention_is_that_of_each_utterance_alone_with_its_gradients() -> None:
    heads = draw(FRAMES, 3, 2, 8)
    assert_same(lambda: attention(heads, LAYOUT, 0.0), lambda: plain_attention(heads, LAYOUT), [heads])
    parts = [
        attention(part, Layout((length,)), 0.0)
        for part, length in zip(LAYOUT.split(heads), LAYOUT.num_samples, strict=True)
    ]
    torch.testing.assert_close(attention(heads, LAYOUT, 0.0), torch.cat(parts), **EXACT)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_no_gradient_passes_between_utterances(rate: float) -> None:
    for number, (first, last) in enumerate(LAYOUT.frame_bounds):
        heads = draw(FRAMES, 3, 2, 8)
        torch.manual_seed(0)
        out = LAYOUT.split(attention(heads, LAYOUT, rate))[number]
        out.square().sum().backward()
        assert heads.grad is not None
        # a frame that sees itself alone may be dropped
        assert heads.grad[first:last].any() or last - first == 1
        assert not heads.grad[:first].any() and not heads.grad[last:].any()


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_an_utterance_beside_one_of_nan_does_not_notice(rate: float) -> None:
    heads = draw(FRAMES, 3, 2, 8).detach()
    for number, (first, last) in enumerate(LAYOUT.frame_bounds):
        beside = torch.full_like(heads, float("nan"))
        beside[first:last] = heads[first:last]
        torch.manual_seed(0)
        expected = LAYOUT.split(attention(heads, LAYOUT, rate))[number]
        torch.manual_seed(0)
        y = attention(beside, LAYOUT, rate)
        assert torch.equal(LAYOUT.split(y)[number], expected)
        assert not y[:first].isfinite().any() and not y[last:].isfinite().any()


def probabilities(heads: Tensor, rate: float) -> Tensor:
    """The probabilities that reach the output, dropped and scaled, of one utterance: (queries, num_heads,
    keys).

    Frame k's value is the k-th unit vector in every head, so that entry k of an output is what reaches it
    from frame k.
    """
    frames, _, num_heads, head_dim = heads.shape
    unit = torch.eye(frames, head_dim, dtype=heads.dtype)[:, None, None].expand(-1, 1, num_heads, -1)
    y = attention(torch.cat([heads[:, :2], unit], dim=1), Layout((400 + 320 * (frames - 1),)), rate)
    return y.unflatten(1, (num_heads, head_dim))[..., :frames]


def test_dropout_of_one_querys_probabilities_is_the_published_one() -> None:
    """y = sum over k of P_k m_k v_k / (1 - p) for each query, with m_k zero at the rate, independently over
    keys and heads.

    The queries of a head share their m: that alone differs from dropout of the matrix of probabilities.
    """
    rate, draws, frames, num_heads = 0.25, 1500, 6, 3
    heads = draw(frames, 3, num_heads, 8).detach()
    whole = probabilities(heads, 0.0)
    torch.testing.assert_close(whole.sum(2), torch.ones(frames, num_heads, dtype=torch.float64), **EXACT)
    torch.manual_seed(0)
    # (draws, queries, num_heads, keys)
    ratios = torch.stack([probabilities(heads, rate) for _ in range(draws)]) / whole
    first = ratios[:, :1] != 0
    # 0 or 1 / (1 - p), and for every query the same
    torch.testing.assert_close(ratios, (first.double() / (1 - rate)).expand_as(ratios), **EXACT)
    masks = first[:, 0].double().numpy()
    flat = masks.reshape(draws, -1)
    deviation = (rate * (1 - rate) / draws) ** 0.5
    assert np.abs(flat.mean(0) - (1 - rate)).max() < 4.5 * deviation  # 18 marginal rates
    off_diagonal = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert np.abs(off_diagonal).max() < 5 / draws**0.5  # 153 pairs: other keys, other heads
    # and how many of a query's keys are dropped at once is binomial
    dropped = np.bincount((frames - masks[:, 0].sum(1)).astype(int), minlength=frames + 1) / draws
    ways = np.array([1, 6, 15, 20, 15, 6, 1])
    expected = ways * rate ** np.arange(7) * (1 - rate) ** (6 - np.arange(7))
    assert (np.abs(dropped - expected) < 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-3).all()


def test_attention_with_dropout_has_the_gradients_of_dropped_probabilities() -> None:
    heads = draw(6, 3, 3, 8)
    torch.manual_seed(5)
    with torch.no_grad():
        mask = (probabilities(heads, 0.25)[:1] != 0).double()  # (1, num_heads, keys)

    def dropped() -> Tensor:
        torch.manual_seed(5)
        return attention(heads, Layout((2000,)), 0.25)

    def plain() -> Tensor:
        query, key, value = heads.unbind(1)
        chances = (torch.einsum("qhd,khd->qhk", query, key) / 8**0.5).softmax(2) * mask / 0.75
        return torch.einsum("qhk,khd->qhd", chances, value).flatten(1)

    assert_same(dropped, plain, [heads])


def test_the_mean_of_attention_with_dropout_is_attention() -> None:
    heads, rate, draws = draw(FRAMES, 3, 2, 8).detach(), 0.3, 1500
    torch.manual_seed(0)
    outputs = torch.stack([attention(heads, LAYOUT, rate) for _ in range(draws)])
    error = (outputs.mean(0) - attention(heads, LAYOUT, 0.0)).abs()
    standard = outputs.std(0) / draws**0.5
    assert (error < 5 * standard).all()  # 368 outputs
    # the utterances draw of themselves, and a frame that sees itself alone is dropped whole
    alone = outputs[:, LAYOUT.frame_bounds[1][0]].view(draws, 2, 8)
    gone = (alone == 0).all(2).double().mean(0)
    assert (gone - rate).abs().max() < 5 * (rate * (1 - rate) / draws) ** 0.5


def test_every_utterance_has_draws_of_its_own() -> None:
    layout = Layout((2000, 2000))  # twice the same six frames
    part = draw(6, 3, 2, 8).detach()
    torch.manual_seed(0)
    one, two = layout.split(attention(torch.cat([part, part]), layout, 0.5))
    assert not torch.allclose(one, two)
    assert [last - first for first, last in layout.frame_bounds] == [6, 6] and all(
        a[1] == b[0] for a, b in pairwise(layout.frame_bounds)
    )


def test_the_variable_length_kernel_is_given_each_utterances_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of torch's `varlen_attn` (which needs a GPU) that knows utterances by its arguments
    alone."""

    def stand_in(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        assert (
            cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k) and max_q == max_k == int(cu_q.diff().max())
        )
        y = torch.empty_like(query)  # (frames, heads, head_dim), as the kernel's
        for first, last in pairwise(cu_q.tolist()):
            q, k, v = (x[first:last].transpose(0, 1) for x in (query, key, value))
            y[first:last] = F.scaled_dot_product_attention(q, k, v).transpose(0, 1)
        return y

    layout = Layout((4000, 400, 9000))
    heads = torch.randn(layout.total_frames, 3, 2, 8)
    expected = attention(heads, layout, 0.0)
    monkeypatch.setattr(attending, "varlen_attn", stand_in)
    monkeypatch.setattr(attending, "has_varlen", lambda *_: True)
    torch.testing.assert_close(attention(heads, layout, 0.0), expected)  # the same products


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a GPU")
def test_the_variable_length_kernel_equals_the_plain_formulation() -> None:
    layout = Layout((4000, 400, 90000))
    heads = torch.randn(
        layout.total_frames, 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    assert has_varlen(heads.device, heads.dtype)
    weight = torch.randn(layout.total_frames, 128, device="cuda", dtype=torch.bfloat16)
    results = []
    for x in (heads, heads.detach().float().requires_grad_()):  # float32 takes the plain path
        y = attention(x, layout, 0.0)
        (gradient,) = torch.autograd.grad((y.float() * weight.float()).sum(), x)
        results.append((y.float(), gradient.float()))
    for mine, reference in zip(*results, strict=True):
        # bfloat16 keeps 8 bits; sums of up to 281 products
        torch.testing.assert_close(mine, reference, rtol=0.05, atol=0.02 * float(reference.abs().max()))
