from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from units.lm import cpu_kernels as kernels
from units.lm import mixed_kernels, row_passes
from units.lm.model import Decoder, DecoderConfig

TOKENS, DIM, HEAD_DIM, EPS = 7, 6, 4, 1e-5


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and a last one that is not full."""
    for module in (kernels, row_passes):
        monkeypatch.setattr(module, "BLOCK_ROWS", 3)
    monkeypatch.setattr(mixed_kernels, "PASS_ROWS", 4)
    torch.manual_seed(0)


@pytest.mark.parametrize("biased", [False, True])
def test_rotated_projections_have_the_gradients_of_finite_differences(biased: bool) -> None:
    turns = torch.polar(
        torch.ones(TOKENS, HEAD_DIM // 2, dtype=torch.float64), torch.randn(TOKENS, HEAD_DIM // 2).double()
    )
    weights = draw(2 * HEAD_DIM, DIM), draw(HEAD_DIM, DIM), draw(HEAD_DIM, DIM)
    biases = (draw(2 * HEAD_DIM), draw(HEAD_DIM), draw(HEAD_DIM)) if biased else ()

    def function(
        x: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor
    ) -> tuple[Tensor, ...]:
        given = (bias[0], bias[1], bias[2]) if bias else (None, None, None)
        return kernels.rotated_projections(x, norm, EPS, turns, HEAD_DIM, (q, k, v), given)

    assert torch.autograd.gradcheck(function, (draw(TOKENS, DIM), draw(DIM), *weights, *biases))


@pytest.mark.parametrize("residual", [False, True])
def test_swiglu_has_the_value_and_the_gradients_of_the_plain_formula(residual: bool) -> None:
    x, norm, gate, up, down = inputs = (
        draw(TOKENS, DIM),
        draw(DIM),
        draw(10, DIM),
        draw(10, DIM),
        draw(DIM, 10),
    )
    normed = F.rms_norm(x, (DIM,), norm, EPS)
    plain = F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down) + (x if residual else 0)
    ours = kernels.swiglu(x, norm, EPS, gate, up, down, residual)
    weight = torch.randn_like(plain)
    mine, reference = (torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, plain))
    # float64 in another order
    for a, b in zip((ours, *mine), (plain, *reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_training_step_equals_that_of_the_plain_layers(
    dropout: float, qkv_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DecoderConfig(
        dim=24,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        ffn_dim=40,
        context=32,
        dropout=dropout,
        qkv_bias=qkv_bias,
    )
    model = Decoder(config, 11)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    tokens, positions = torch.randint(11, (2, 9)), torch.arange(9).expand(2, -1)
    documents = torch.tensor([[0] * 4 + [1] * 3 + [-1] * 2, [2] * 9])
    results = []
    for here in (kernels.apply_here, lambda _x: False):
        monkeypatch.setattr(kernels, "apply_here", here)
        model.zero_grad()
        torch.manual_seed(1)  # the same elements are dropped
        logits = model(tokens, positions, documents)[documents >= 0]
        logits.square().sum().backward()
        results.append([logits, *[weight.grad for weight in model.parameters()]])
    for mine, plain in zip(*results, strict=True):
        assert plain is not None and plain.abs().max() > 0
        # float32 in another order
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-4 * plain.detach().abs().max().item())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_under_autocast_a_step_is_as_near_to_float32_as_that_of_the_plain_layers(
    dropout: float, qkv_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DecoderConfig(
        dim=48,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        ffn_dim=96,
        context=64,
        dropout=dropout,
        qkv_bias=qkv_bias,
    )
    model = Decoder(config, 11)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    tokens, positions = torch.randint(11, (4, 50)), torch.arange(50).expand(4, -1)
    documents = torch.arange(4)[:, None].expand(4, 50).clone()
    documents[0, 30:], documents[1, 20:] = -1, 5
    target = torch.randn(4, 50, 11)
    calls: list[str] = []
    mixed = mixed_kernels.MixedSwiGLU.forward

    def counted(*inputs: Any) -> Tensor:
        calls.append("swiglu")
        return mixed(*inputs)

    monkeypatch.setattr(mixed_kernels.MixedSwiGLU, "forward", counted)

    def step(low: bool) -> list[Tensor]:
        """Logits and the gradients of all weights."""
        model.zero_grad()
        torch.manual_seed(1)  # the same elements are dropped
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = model(tokens, positions, documents)
        (logits * target)[documents >= 0].sum().backward()
        gradients = [weight.grad for weight in model.parameters()]
        assert all(gradient is not None for gradient in gradients)
        return [part.detach().double() for part in (logits[documents >= 0], *gradients) if part is not None]

    ours = step(low=True)
    assert len(calls) == config.num_layers
    monkeypatch.setattr(kernels, "apply_here", lambda _x: False)
    plain, exact = step(low=True), step(low=False)  # float32 is 2^16 times as fine as bfloat16
    errors = [
        [((part - true).norm() / true.norm()).item() for part, true in zip(parts, exact, strict=True)]
        for parts in (ours, plain)
    ]
    mean_ours, mean_plain = (sum(own) / len(own) for own in errors)
    assert 0 < mean_ours < 1.1 * mean_plain  # rounded in other places, no more often
    for own, other in zip(*errors, strict=True):
        assert own < 1.5 * other + 1e-3  # the smaller a weight, the more by chance


def test_under_autocast_bfloat16_is_what_is_saved_and_float32_what_the_next_layer_gets() -> None:
    x, norm, gate, up, down = (
        part.detach().float().requires_grad_()
        for part in (draw(9, 8), draw(8), draw(10, 8), draw(10, 8), draw(8, 10))
    )
    saved: list[Tensor] = []

    def keep(part: Tensor) -> Tensor:
        saved.append(part)
        return part

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part),
        torch.autocast("cpu", torch.bfloat16),
    ):
        y = kernels.swiglu(x, norm, EPS, gate, up, down, residual=True)
    assert y.dtype == torch.float32
    weights = {part.data_ptr() for part in (norm, gate, up, down)}
    wide = [part for part in saved if part.dtype != torch.bfloat16 and part.data_ptr() not in weights]
    assert [part.shape for part in wide] == [(9, 1)]  # of all tokens only the norm's scale
