"""A decoder layer's training step on a CPU: norm, projections, rotation and SwiGLU with backward passes written by hand.

On a CPU matrix products share their time with every pass over an activation that does not fit the cache. Here the passes between two
products are made on some rows at a time, while these are in the cache: the norm's scale is folded into the weights that follow, the
rotation is one complex product on interleaved pairs, SwiGLU is computed again in backward, residuals are added where gradients are written.
`units.lm.model` has the plain formulation of each, which everything else uses (GPUs, compilers, no gradients) and the tests compare with.

Under bfloat16 autocast the same is done by other classes: products take and give bfloat16, over all tokens at once, for on AMX they are
so fast that a product in blocks loses more than a pass over its result costs; norms, rotations and sums are float32, some rows at a
time. The residual stream and the weights' gradients are float32, what is saved is bfloat16; silu(gate) is saved too, where a pass counts
for more. (Attention's backward by our own blocks of products was slower than torch's: products as narrow as a head are no faster.)
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ROWS = 1024  # tokens at a time
PASS_ROWS = 128  # tokens at a time in passes between bfloat16 products


def apply_here(x: Tensor) -> bool:
    """Whether a layer that is given `x` should run these: a gradient is wanted, in full precision or under bfloat16 autocast, on a CPU."""
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

    x (tokens, dim), `turns` complex (tokens, head_dim / 2): e^(i angle); weights of query, key, value (heads x head_dim, dim). Returns
    (tokens, heads, head_dim) three times and (tokens, dim). Elements i and i + head_dim / 2 of a rotated head lie side by side:
    products of queries with keys do not depend on the order, and the rotation is then a complex product.
    """
    function = _MixedRotatedProjections if torch.is_autocast_enabled("cpu") else _RotatedProjections
    q, k, v, same = function.apply(x, norm, eps, turns, head_dim, *weights, *biases)
    return q, k, v, same


def add_projected(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x + y weight.T: x (tokens, dim), y (tokens, features), weight (dim, features)."""
    if not torch.is_autocast_enabled("cpu"):
        return torch.addmm(x, y, weight.T)
    z: Tensor = _MixedAddProjected.apply(x, y, weight)
    return z


def swiglu(
    x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor, residual: bool
) -> Tensor:
    """down(silu(gate n) * up n) of n = rms_norm(x), plus x with `residual`: x (tokens, dim), weights as in `torch.nn.Linear`."""
    function = _MixedSwiGLU if torch.is_autocast_enabled("cpu") else _SwiGLU
    y: Tensor = function.apply(x, norm, eps, gate, up, down, residual)
    return y


class _RotatedProjections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, turns: Tensor, head_dim: int, *parts: Tensor | None
    ) -> tuple[Tensor, ...]:
        weight, bias, sizes = _folded(parts, norm, head_dim, x.dtype)
        rotated, rstd = sizes[0] + sizes[1], _rstd(x, eps)
        y = x.new_empty(len(x), len(weight))
        for rows in _blocks(x):
            torch.mm(x[rows] * rstd[rows], weight.T, out=y[rows])
            if bias is not None:
                y[rows] += bias
            _complex(y[rows, :rotated], head_dim).mul_(turns[rows, None])
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
        for rows in _blocks(x):
            dy = scratch[: len(x[rows])]
            for gradient, own in ((dq, dy[:, : sizes[0]]), (dk, dy[:, sizes[0] : rotated])):
                torch.mul(
                    torch.view_as_complex(gradient[rows].unflatten(2, (-1, 2))),
                    back[rows],
                    out=_complex(own, head_dim),
                )
            dy[:, rotated:].unflatten(1, (-1, head_dim)).copy_(dv[rows])
            normed = x[rows] * rstd[rows]
            dweight.addmm_(dy.T, normed)
            if dbias is not None:
                dbias += dy.sum(0)
            _norm_backward(dy @ weight, normed, rstd[rows], gradients[3][rows], dx[rows])
        return dx, *_unfolded(dweight, dbias, norm, weights, sizes, head_dim)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor, residual: bool
    ) -> Tensor:
        size = len(gate)
        weight, rstd = torch.cat([gate, up]).mul_(norm), _rstd(x, eps)
        hidden, y = x.new_empty(len(x), 2 * size), torch.empty_like(x)
        scratch = x.new_empty(min(len(x), BLOCK_ROWS), size)
        for rows in _blocks(x):
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
        for rows in _blocks(x):
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
            _norm_backward(dhidden @ weight, normed, rstd[rows], dy[rows] if ctx.residual else None, dx[rows])
        dgate, dup = dweight.split(size)
        dnorm = (dgate * gate).sum(0) + (dup * up).sum(0)
        dweight.mul_(norm)
        return dx, dnorm, None, dgate, dup, ddown, None


class _MixedRotatedProjections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, turns: Tensor, head_dim: int, *parts: Tensor | None
    ) -> tuple[Tensor, ...]:
        weight, bias, sizes = _folded(parts, norm, head_dim, torch.bfloat16)
        rotated = sizes[0] + sizes[1]
        normed, rstd = _normed(x, eps)
        y = normed @ weight.T if bias is None else torch.addmm(bias.bfloat16(), normed, weight.T)
        for rows in _blocks(x, PASS_ROWS):
            turned = y[rows, :rotated].float()
            _complex(turned, head_dim).mul_(turns[rows, None])
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
        for rows in _blocks(normed, PASS_ROWS):
            for gradient, own in zip(gradients[:2], dy[rows, :rotated].split(sizes[:2], dim=1), strict=True):
                turned = gradient[rows].flatten(1).float()
                _complex(turned, head_dim).mul_(back[rows])
                own.copy_(turned)
            dy[rows, rotated:].unflatten(1, (-1, head_dim)).copy_(gradients[2][rows])
        dx = _mixed_norm_backward(dy @ weight, normed, rstd, gradients[3])
        dbias = None if parts[3] is None else dy.sum(0, dtype=torch.float32)
        return dx, *_unfolded(_weight_gradient(dy, normed), dbias, norm, parts[:3], sizes, head_dim)


class _MixedAddProjected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        y, weight = y.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(y, weight)
        return _sum(x, y @ weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        y, weight = ctx.saved_tensors
        dz = gradients[0].bfloat16()
        return gradients[0], dz @ weight, _weight_gradient(dz, y)


class _MixedSwiGLU(torch.autograd.Function):
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
        for rows in _blocks(x, PASS_ROWS):
            torch.ops.aten.silu.out(hidden[rows, :size], out=opened[rows])
            torch.mul(opened[rows], hidden[rows, size:], out=active[rows])
        y = active @ low.T
        ctx.save_for_backward(normed, norm, rstd, weight, hidden, opened, gate, up, low)
        ctx.residual = residual
        return _sum(x, y) if residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normed, norm, rstd, weight, hidden, opened, gate, up, down = ctx.saved_tensors
        size = len(gate)
        dy = gradients[0].bfloat16()
        dactive, dhidden = dy @ down, torch.empty_like(hidden)
        active = torch.empty_like(dactive)
        for rows in _blocks(hidden, PASS_ROWS):
            before, gates, own = hidden[rows, :size], hidden[rows, size:], dactive[rows]
            torch.mul(opened[rows], own, out=dhidden[rows, size:])
            torch.mul(opened[rows], gates, out=active[rows])
            torch.ops.aten.silu_backward.grad_input(own.mul_(gates), before, grad_input=dhidden[rows, :size])
        ddown = _weight_gradient(dy, active)
        dx = _mixed_norm_backward(dhidden @ weight, normed, rstd, gradients[0] if ctx.residual else None)
        dweight = _weight_gradient(dhidden, normed)
        dgate, dup = dweight.split(size)
        dnorm = (dgate * gate).sum(0) + (dup * up).sum(0)
        dweight.mul_(norm)
        return dx, dnorm, None, dgate, dup, ddown, None


def _folded(
    parts: tuple[Tensor | None, ...], norm: Tensor, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, list[int]]:
    """Weights of queries, keys and values times the norm's, one below the other in `dtype`, their biases end to end, and the sizes."""
    weights, biases = parts[:3], parts[3:]
    sizes = [len(weight) for weight in weights if weight is not None]
    folded = norm.new_empty(sum(sizes), len(norm), dtype=dtype)
    for rows, own in zip(folded.split(sizes), _sources(weights, head_dim), strict=True):
        torch.mul(own, norm, out=rows.view(own.shape))
    bias = None if biases[0] is None else torch.cat([own.flatten() for own in _sources(biases, head_dim)])
    return folded, bias, sizes


def _unfolded(
    dweight: Tensor, dbias: Tensor | None, norm: Tensor, weights: Any, sizes: list[int], head_dim: int
) -> tuple[Tensor | None, ...]:
    """Gradients of norm, eps, turns, head_dim, weights and biases from those of the rotated projections' folded weight and bias."""
    dnorm = torch.zeros_like(norm)
    dweights: list[Tensor | None] = []
    dbiases: list[Tensor | None] = []
    for own, rows in zip(weights, dweight.split(sizes), strict=True):
        result = torch.empty_like(own)
        (source,), (target,) = (
            _sources([own], head_dim, len(dweights) < 2),
            _sources([result], head_dim, len(dweights) < 2),
        )
        gradient = rows.view(source.shape)
        dnorm += (gradient * source).flatten(0, -2).sum(0)
        torch.mul(gradient, norm, out=target)
        dweights.append(result)
    if dbias is not None:
        for number, rows in enumerate(dbias.split(sizes)):
            ordered = rows.view(-1, head_dim // 2, 2).transpose(1, 2).flatten() if number < 2 else rows
            dbiases.append(ordered)
    return dnorm, None, None, None, *dweights, *(dbiases or [None] * 3)


def _blocks(x: Tensor, size: int | None = None) -> list[slice]:
    size = BLOCK_ROWS if size is None else size
    return [slice(first, first + size) for first in range(0, len(x), size)]


def _rstd(x: Tensor, eps: float) -> Tensor:
    """One over the root mean square of each row, (rows, 1)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return norm.square_().div_(x.shape[1]).add_(eps).rsqrt_()


def _norm_backward(
    gradient: Tensor, normed: Tensor, rstd: Tensor, residual: Tensor | None, out: Tensor
) -> None:
    """Gradient of the norm's input from that of its output `normed`, plus `residual`; `gradient` is used up."""
    along = (gradient * normed).mean(1, keepdim=True)  # (linalg.vecdot takes a row at a time here)
    gradient.addcmul_(normed, along, value=-1)
    if residual is None:
        torch.mul(gradient, rstd, out=out)
    else:
        torch.addcmul(residual, gradient, rstd, out=out)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its root mean square, bfloat16, and one over that, (rows, 1)."""
    normed, rstd = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(len(x), 1)
    for rows in _blocks(x, PASS_ROWS):
        rstd[rows] = _rstd(x[rows], eps)
        normed[rows] = x[rows] * rstd[rows]
    return normed, rstd


def _mixed_norm_backward(gradient: Tensor, normed: Tensor, rstd: Tensor, residual: Tensor | None) -> Tensor:
    """`_norm_backward` in float32 of a bfloat16 gradient."""
    dx = torch.empty_like(normed, dtype=torch.float32)
    for rows in _blocks(normed, PASS_ROWS):
        own = None if residual is None else residual[rows]
        _norm_backward(gradient[rows].float(), normed[rows].float(), rstd[rows], own, dx[rows])
    return dx


def _sum(x: Tensor, y: Tensor) -> Tensor:
    """x + y, y bfloat16. (One addition of the two types would take twice as long.)"""
    z = torch.empty_like(x)
    for rows in _blocks(x, PASS_ROWS):
        torch.add(x[rows], y[rows].float(), out=z[rows])
    return z


def _weight_gradient(gradient: Tensor, inputs: Tensor) -> Tensor:
    """gradient.T @ inputs as float32; the sum over tokens is one of float32 inside the product."""
    return (gradient.T @ inputs).float()


def _complex(x: Tensor, head_dim: int) -> Tensor:
    """(rows, heads x head_dim) as complex (rows, heads, head_dim / 2), a view."""
    return torch.view_as_complex(x.unflatten(1, (-1, head_dim // 2, 2)))


def _sources(parts: Any, head_dim: int, rotated: bool | None = None) -> list[Tensor]:
    """Weights (rows, dim) or biases (rows,) of query, key and value with the pairs that turn together side by side; views.

    The first two are the rotated ones, or all or none as `rotated` says.
    """
    views = []
    for number, part in enumerate(parts):
        paired = part.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)
        views.append(paired if (number < 2 if rotated is None else rotated) else part)
    return views
