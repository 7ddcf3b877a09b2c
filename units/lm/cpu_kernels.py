"""A decoder layer's training step on a CPU: norm, projections, rotation and SwiGLU with backward passes
written by hand.

On a CPU matrix products share their time with every pass over an activation that does not fit the cache. Here
the passes between two products are made on some rows at a time, while these are in the cache: the norm's
scale is folded into the weights that follow, the rotation is one complex product on interleaved pairs, SwiGLU
is computed again in backward, residuals are added where gradients are written. `units.lm.model` has the plain
formulation of each, which everything else uses (GPUs, compilers, no gradients) and the tests compare with.

Under bfloat16 autocast the same is done by other classes: products take and give bfloat16, over all tokens at
once, for on AMX they are so fast that a product in blocks loses more than a pass over its result costs;
norms, rotations and sums are float32, some rows at a time. The residual stream and the weights' gradients are
float32, what is saved is bfloat16; silu(gate) is saved too, where a pass counts for more. (Attention's
backward by our own blocks of products was slower than torch's: products as narrow as a head are no faster.)
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from units.lm.mixed_kernels import MixedAddProjected, MixedRotatedProjections, MixedSwiGLU
from units.lm.row_passes import (
    BLOCK_ROWS,
    as_complex,
    fold_norm,
    inverse_rms,
    norm_backward,
    row_blocks,
    unfold_norm,
)


def apply_here(x: Tensor) -> bool:
    """Whether a layer that is given `x` should run these: a gradient is wanted, in full precision or under
    bfloat16 autocast, on a CPU."""
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu"):
        return x.dtype == torch.float32 and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype in (torch.float32, torch.float64)


def rotated_projections(
    x: Tensor,
    norm: Tensor,
    eps: float,
    turns: Tensor,
    head_dim: int,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values of rms_norm(x), and x itself for the residual.

    x (tokens, dim), `turns` complex (tokens, head_dim / 2): e^(i angle); weights of query, key, value (heads
    x head_dim, dim). Returns (tokens, heads, head_dim) three times and (tokens, dim). Elements i and i +
    head_dim / 2 of a rotated head lie side by side: products of queries with keys do not depend on the order,
    and the rotation is then a complex product.
    """
    function = MixedRotatedProjections if torch.is_autocast_enabled("cpu") else _RotatedProjections
    q, k, v, same = function.apply(x, norm, eps, turns, head_dim, *weights, *biases)
    return q, k, v, same


def add_projected(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x + y weight.T: x (tokens, dim), y (tokens, features), weight (dim, features)."""
    if not torch.is_autocast_enabled("cpu"):
        return torch.addmm(x, y, weight.T)
    z: Tensor = MixedAddProjected.apply(x, y, weight)
    return z


def swiglu(
    x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor, residual: bool
) -> Tensor:
    """down(silu(gate n) * up n) of n = rms_norm(x), plus x with `residual`: x (tokens, dim), weights as in
    `torch.nn.Linear`."""
    function = MixedSwiGLU if torch.is_autocast_enabled("cpu") else _SwiGLU
    y: Tensor = function.apply(x, norm, eps, gate, up, down, residual)
    return y


class _RotatedProjections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, turns: Tensor, head_dim: int, *parts: Tensor | None
    ) -> tuple[Tensor, ...]:
        weight, bias, sizes = fold_norm(parts, norm, head_dim, x.dtype)
        rotated, rstd = sizes[0] + sizes[1], inverse_rms(x, eps)
        y = x.new_empty(len(x), len(weight))
        for rows in row_blocks(x):
            torch.mm(x[rows] * rstd[rows], weight.T, out=y[rows])
            if bias is not None:
                y[rows] += bias
            as_complex(y[rows, :rotated], head_dim).mul_(turns[rows, None])
        ctx.save_for_backward(x, norm, rstd, turns, weight, *parts)
        ctx.head_dim, ctx.sizes = head_dim, sizes
        q, k, v = (part.unflatten(1, (-1, head_dim)) for part in y.split(sizes, dim=1))
        return q, k, v, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, rstd, turns, weight, *parts = ctx.saved_tensors
        weights, biases = parts[:3], parts[3:]
        head_dim, sizes, rotated = ctx.head_dim, ctx.sizes, ctx.sizes[0] + ctx.sizes[1]
        dq, dk, dv = (
            gradient if gradient.stride(2) == 1 else gradient.contiguous() for gradient in gradients[:3]
        )
        back = turns.conj().resolve_conj()[:, None]
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        dbias = None if biases[0] is None else x.new_zeros(len(weight))
        scratch = x.new_empty(min(len(x), BLOCK_ROWS), len(weight))
        for rows in row_blocks(x):
            dy = scratch[: len(x[rows])]
            for gradient, own in ((dq, dy[:, : sizes[0]]), (dk, dy[:, sizes[0] : rotated])):
                torch.mul(
                    torch.view_as_complex(gradient[rows].unflatten(2, (-1, 2))),
                    back[rows],
                    out=as_complex(own, head_dim),
                )
            dy[:, rotated:].unflatten(1, (-1, head_dim)).copy_(dv[rows])
            normed = x[rows] * rstd[rows]
            dweight.addmm_(dy.T, normed)
            if dbias is not None:
                dbias += dy.sum(0)
            norm_backward(dy @ weight, normed, rstd[rows], gradients[3][rows], dx[rows])
        return dx, *unfold_norm(dweight, dbias, norm, weights, sizes, head_dim)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor, residual: bool
    ) -> Tensor:
        size = len(gate)
        weight, rstd = torch.cat([gate, up]).mul_(norm), inverse_rms(x, eps)
        hidden, y = x.new_empty(len(x), 2 * size), torch.empty_like(x)
        scratch = x.new_empty(min(len(x), BLOCK_ROWS), size)
        for rows in row_blocks(x):
            own = torch.mm(x[rows] * rstd[rows], weight.T, out=hidden[rows])
            active = torch.ops.aten.silu.out(own[:, :size], out=scratch[: len(own)]).mul_(own[:, size:])
            if residual:
                torch.addmm(x[rows], active, down.T, out=y[rows])
            else:
                torch.mm(active, down.T, out=y[rows])
        ctx.save_for_backward(x, norm, rstd, weight, hidden, gate, up, down)
        ctx.residual = residual
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, rstd, weight, hidden, gate, up, down = ctx.saved_tensors
        dy, size = gradients[0].contiguous(), len(gate)
        dx, dweight, ddown = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(down)
        scratch = x.new_empty(min(len(x), BLOCK_ROWS), 2 * size)
        other = x.new_empty(2, min(len(x), BLOCK_ROWS), size)
        for rows in row_blocks(x):
            before, gates = hidden[rows, :size], hidden[rows, size:]
            dhidden, active, dactive = (
                scratch[: len(before)],
                other[0, : len(before)],
                other[1, : len(before)],
            )
            torch.mm(dy[rows], down, out=dactive)
            torch.ops.aten.silu.out(before, out=active)
            torch.mul(active, dactive, out=dhidden[:, size:])
            ddown.addmm_(dy[rows].T, active.mul_(gates))
            torch.ops.aten.silu_backward.grad_input(dactive.mul_(gates), before, grad_input=dhidden[:, :size])
            normed = x[rows] * rstd[rows]
            dweight.addmm_(dhidden.T, normed)
            norm_backward(dhidden @ weight, normed, rstd[rows], dy[rows] if ctx.residual else None, dx[rows])
        dgate, dup = dweight.split(size)
        dnorm = (dgate * gate).sum(0) + (dup * up).sum(0)
        dweight.mul_(norm)
        return dx, dnorm, None, dgate, dup, ddown, None
