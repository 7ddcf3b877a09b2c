"""The kernels of cpu_kernels.py under bfloat16 autocast."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from units.lm.row_passes import (
    PASS_ROWS,
    add_blocks,
    as_complex,
    fold_norm,
    inverse_rms,
    norm_backward,
    row_blocks,
    unfold_norm,
    weight_gradient,
)


class MixedRotatedProjections(torch.autograd.Function):
    """`rotated_projections` in bfloat16."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, turns: Tensor, head_dim: int, *parts: Tensor | None
    ) -> tuple[Tensor, ...]:
        weight, bias, sizes = fold_norm(parts, norm, head_dim, torch.bfloat16)
        rotated = sizes[0] + sizes[1]
        normed, rstd = _normed(x, eps)
        y = normed @ weight.T if bias is None else torch.addmm(bias.bfloat16(), normed, weight.T)
        for rows in row_blocks(x, PASS_ROWS):
            turned = y[rows, :rotated].float()
            as_complex(turned, head_dim).mul_(turns[rows, None])
            y[rows, :rotated] = turned
        ctx.save_for_backward(normed, norm, rstd, turns, weight, *parts)
        ctx.head_dim, ctx.sizes = head_dim, sizes
        q, k, v = (part.unflatten(1, (-1, head_dim)) for part in y.split(sizes, dim=1))
        return q, k, v, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normed, norm, rstd, turns, weight, *parts = ctx.saved_tensors
        head_dim, sizes, rotated = ctx.head_dim, ctx.sizes, ctx.sizes[0] + ctx.sizes[1]
        back = turns.conj().resolve_conj()[:, None]
        dy = normed.new_empty(len(normed), len(weight))
        for rows in row_blocks(normed, PASS_ROWS):
            for gradient, own in zip(gradients[:2], dy[rows, :rotated].split(sizes[:2], dim=1), strict=True):
                turned = gradient[rows].flatten(1).float()
                as_complex(turned, head_dim).mul_(back[rows])
                own.copy_(turned)
            dy[rows, rotated:].unflatten(1, (-1, head_dim)).copy_(gradients[2][rows])
        dx = _mixed_norm_backward(dy @ weight, normed, rstd, gradients[3])
        dbias = None if parts[3] is None else dy.sum(0, dtype=torch.float32)
        return dx, *unfold_norm(weight_gradient(dy, normed), dbias, norm, parts[:3], sizes, head_dim)


class MixedAddProjected(torch.autograd.Function):
    """`add_projected` in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        y, weight = y.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(y, weight)
        return add_blocks(x, y @ weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        y, weight = ctx.saved_tensors
        dz = gradients[0].bfloat16()
        return gradients[0], dz @ weight, weight_gradient(dz, y)


class MixedSwiGLU(torch.autograd.Function):
    """`swiglu` in bfloat16."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor, residual: bool
    ) -> Tensor:
        size = len(gate)
        weight = x.new_empty(2 * size, x.shape[1], dtype=torch.bfloat16)
        torch.mul(gate, norm, out=weight[:size])
        torch.mul(up, norm, out=weight[size:])
        low = down.bfloat16()
        normed, rstd = _normed(x, eps)
        hidden = normed @ weight.T
        opened, active = (hidden.new_empty(len(x), size) for _ in range(2))
        for rows in row_blocks(x, PASS_ROWS):
            torch.ops.aten.silu.out(hidden[rows, :size], out=opened[rows])
            torch.mul(opened[rows], hidden[rows, size:], out=active[rows])
        y = active @ low.T
        ctx.save_for_backward(normed, norm, rstd, weight, hidden, opened, gate, up, low)
        ctx.residual = residual
        return add_blocks(x, y) if residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normed, norm, rstd, weight, hidden, opened, gate, up, down = ctx.saved_tensors
        size = len(gate)
        dy = gradients[0].bfloat16()
        dactive, dhidden = dy @ down, torch.empty_like(hidden)
        active = torch.empty_like(dactive)
        for rows in row_blocks(hidden, PASS_ROWS):
            before, gates, own = hidden[rows, :size], hidden[rows, size:], dactive[rows]
            torch.mul(opened[rows], own, out=dhidden[rows, size:])
            torch.mul(opened[rows], gates, out=active[rows])
            torch.ops.aten.silu_backward.grad_input(own.mul_(gates), before, grad_input=dhidden[rows, :size])
        ddown = weight_gradient(dy, active)
        dx = _mixed_norm_backward(dhidden @ weight, normed, rstd, gradients[0] if ctx.residual else None)
        dweight = weight_gradient(dhidden, normed)
        dgate, dup = dweight.split(size)
        dnorm = (dgate * gate).sum(0) + (dup * up).sum(0)
        dweight.mul_(norm)
        return dx, dnorm, None, dgate, dup, ddown, None


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its root mean square, bfloat16, and one over that, (rows, 1)."""
    normed, rstd = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(len(x), 1)
    for rows in row_blocks(x, PASS_ROWS):
        rstd[rows] = inverse_rms(x[rows], eps)
        normed[rows] = x[rows] * rstd[rows]
    return normed, rstd


def _mixed_norm_backward(gradient: Tensor, normed: Tensor, rstd: Tensor, residual: Tensor | None) -> Tensor:
    """`norm_backward` in float32 of a bfloat16 gradient."""
    dx = torch.empty_like(normed, dtype=torch.float32)
    for rows in row_blocks(normed, PASS_ROWS):
        own = None if residual is None else residual[rows]
        norm_backward(gradient[rows].float(), normed[rows].float(), rstd[rows], own, dx[rows])
    return dx
