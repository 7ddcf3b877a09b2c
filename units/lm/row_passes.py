"""Passes over some rows at a time, while these are in the cache: what the kernels of a layer share."""

from typing import Any

import torch
from torch import Tensor

BLOCK_ROWS = 1024  # tokens at a time


PASS_ROWS = 128  # tokens at a time in passes between bfloat16 products


def fold_norm(
    parts: tuple[Tensor | None, ...], norm: Tensor, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, list[int]]:
    """Weights of queries, keys and values times the norm's, one below the other in `dtype`, their biases end
    to end, and the sizes."""
    weights, biases = parts[:3], parts[3:]
    sizes = [len(weight) for weight in weights if weight is not None]
    folded = norm.new_empty(sum(sizes), len(norm), dtype=dtype)
    for rows, own in zip(folded.split(sizes), _sources(weights, head_dim), strict=True):
        torch.mul(own, norm, out=rows.view(own.shape))
    bias = None if biases[0] is None else torch.cat([own.flatten() for own in _sources(biases, head_dim)])
    return folded, bias, sizes


def unfold_norm(
    dweight: Tensor, dbias: Tensor | None, norm: Tensor, weights: Any, sizes: list[int], head_dim: int
) -> tuple[Tensor | None, ...]:
    """Gradients of norm, eps, turns, head_dim, weights and biases from those of the rotated projections'
    folded weight and bias."""
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


def row_blocks(x: Tensor, size: int | None = None) -> list[slice]:
    """The rows of x, `size` at a time."""
    size = BLOCK_ROWS if size is None else size
    return [slice(first, first + size) for first in range(0, len(x), size)]


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """One over the root mean square of each row, (rows, 1)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return norm.square_().div_(x.shape[1]).add_(eps).rsqrt_()


def norm_backward(
    gradient: Tensor, normed: Tensor, rstd: Tensor, residual: Tensor | None, out: Tensor
) -> None:
    """Gradient of the norm's input from that of its output `normed`, plus `residual`; `gradient` is used
    up."""
    along = (gradient * normed).mean(1, keepdim=True)  # (linalg.vecdot takes a row at a time here)
    gradient.addcmul_(normed, along, value=-1)
    if residual is None:
        torch.mul(gradient, rstd, out=out)
    else:
        torch.addcmul(residual, gradient, rstd, out=out)


def add_blocks(x: Tensor, y: Tensor) -> Tensor:
    """x + y, y bfloat16. (One addition of the two types would take twice as long.)"""
    z = torch.empty_like(x)
    for rows in row_blocks(x, PASS_ROWS):
        torch.add(x[rows], y[rows].float(), out=z[rows])
    return z


def weight_gradient(gradient: Tensor, inputs: Tensor) -> Tensor:
    """gradient.T @ inputs as float32; the sum over tokens is one of float32 inside the product."""
    return (gradient.T @ inputs).float()


def as_complex(x: Tensor, head_dim: int) -> Tensor:
    """(rows, heads x head_dim) as complex (rows, heads, head_dim / 2), a view."""
    return torch.view_as_complex(x.unflatten(1, (-1, head_dim // 2, 2)))


def _sources(parts: Any, head_dim: int, rotated: bool | None = None) -> list[Tensor]:
    """Weights (rows, dim) or biases (rows,) of query, key and value with the pairs that turn together side by
    side; views.

    The first two are the rotated ones, or all or none as `rotated` says.
    """
    views = []
    for number, part in enumerate(parts):
        paired = part.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)
        views.append(paired if (number < 2 if rotated is None else rotated) else part)
    return views
