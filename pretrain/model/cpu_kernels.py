"""Kernels written for a CPU, with backward passes by hand that store little and allocate less.

Large temporaries cost a CPU more than arithmetic: the operating system maps each fresh one page by page. So
GELU and layer norm are recomputed in backward, in blocks that stay in the cache, and gradients are written
where they are needed. pretrain/model/operations.py defines what each kernel computes and chooses it; the
tests compare both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK_BYTES = 8 << 20  # of activations at a time
TAPS = 8  # of a grouped convolution in one matrix product


@torch.compiler.disable  # blocks are for the interpreter: a compiler would unroll them for every new length
def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    y: Tensor = function.apply(*arguments)
    return y


def gelu_conv(x: Tensor, weight: Tensor, norm: nn.LayerNorm | None) -> Tensor:
    """`operations.gelu_conv` without its bias."""
    scale, shift, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    return _apply(_GeluConv, x, weight, scale, shift, eps)


def dropout(x: Tensor, rate: float) -> Tensor:
    """Dropout with four draws from each 64-bit random number: the rate is exact to 1 / 65536."""
    return _apply(_Dropout, x, rate)


def segment_linear(parts: tuple[Tensor, ...], weights: Tensor, shifts: Tensor) -> Tensor:
    """`operations.segment_linear`."""
    return _apply(_SegmentLinear, weights, shifts, *parts)


def grouped_conv(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """`operations.grouped_conv` without its bias, for kernels of a multiple of 8 taps."""
    taps = weight.unflatten(0, (groups, -1)).permute(0, 3, 2, 1)  # (groups, kernel, in, out)
    return _apply(_GroupedConv, x.unflatten(1, (groups, -1)).transpose(0, 1), taps).transpose(0, 1).flatten(1)


def block_rows(x: Tensor, stride: int) -> int:
    """Output frames of a block of x (time, channels)."""
    return max(1, BLOCK_BYTES // (x.shape[1] * x.element_size() * stride))


def pairs(x: Tensor, frames: int) -> Tensor:
    """Rows 0 and 1, 2 and 3 ... of x (time, channels) side by side: (frames, 2 channels), a view."""
    return x[: 2 * frames].view(frames, 2 * x.shape[1])


class _GeluConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale, shift)
        ctx.eps = eps
        kernel, stride = len(weight), min(2, len(weight))
        frames = (len(x) - kernel) // stride + 1
        y = x.new_empty(frames, weight.shape[2])
        block = block_rows(x, stride)
        scratch = x.new_empty(block * stride + kernel - stride, x.shape[1])
        for first in range(0, frames, block):
            last = min(first + block, frames)
            rows = x[stride * first : stride * (last - 1) + kernel]
            active = torch.ops.aten.gelu.out(_normed(rows, scale, shift, eps)[0], out=scratch[: len(rows)])
            if kernel == 1:
                torch.mm(active, weight[0], out=y[first:last])
            else:
                torch.mm(pairs(active, last - first), weight[:2].flatten(0, 1), out=y[first:last])
            if kernel == 3:
                y[first:last].addmm_(active[2::2], weight[2])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, weight, scale, shift = ctx.saved_tensors
        dy = dy.contiguous()
        kernel, stride = len(weight), min(2, len(weight))
        frames = len(dy)
        dx = torch.empty_like(x)
        dx[stride * frames + (kernel == 3 and frames > 0) :] = 0
        # A linear layer's weight comes transposed; its gradient has the same layout, to save a copy.
        dweight = torch.zeros_like(weight)
        dscale, dshift = (None if part is None else torch.zeros_like(part) for part in (scale, shift))
        block = block_rows(x, stride)
        scratch = x.new_empty(block * stride + kernel - stride, x.shape[1])
        for first in range(0, frames, block):
            last = min(first + block, frames)
            low, high = stride * first, stride * last
            rows = x[low : high + kernel - stride]
            before, mean, rstd = _normed(rows, scale, shift, ctx.eps)
            active = torch.ops.aten.gelu.out(before, out=scratch[: len(rows)])
            own, down = dy[first:last], dx[low:high]
            if kernel == 1:
                dweight[0].addmm_(active.T, own)
                torch.mm(own, weight[0].T, out=down)
            else:
                dweight[:2].view(-1, dweight.shape[2]).addmm_(pairs(active, last - first).T, own)
                torch.mm(own, weight[:2].flatten(0, 1).T, out=pairs(down, last - first))
            if kernel == 3:  # tap 2 of a frame is row 0 of the next one's pair
                dweight[2].addmm_(active[2::2].T, own)
                start = max(first, 1)
                if last > start:
                    dx[2 * start : 2 * last : 2].addmm_(dy[start - 1 : last - 1], weight[2].T)
                if last == frames:
                    torch.mm(dy[frames - 1 :], weight[2].T, out=dx[2 * frames : 2 * frames + 1])
                    down = dx[low : high + 1]
            before = before[: len(down)]
            torch.ops.aten.gelu_backward.grad_input(down, before, grad_input=down)
            if scale is not None:
                n = len(down)
                plain, weighted, biased = torch.ops.aten.native_layer_norm_backward(
                    down, rows[:n], scale.shape, mean[:n], rstd[:n], scale, shift, [True] * 3
                )
                down.copy_(plain)
                dscale += weighted
                dshift += biased
        return dx, dweight, dscale, dshift, None


def _normed(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm with its statistics, or `x` itself."""
    if scale is None:
        return x, x, x
    y, mean, rstd = torch.ops.aten.native_layer_norm(x, scale.shape, scale, shift, eps)
    return y, mean, rstd


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        threshold = min(round(rate * 65536), 65535)
        keep = (words.view(torch.int16)[: x.numel()] >= threshold - 32768).view(x.shape)
        ctx.save_for_backward(keep)
        ctx.scale = 65536 / (65536 - threshold)
        return torch.where(keep, x, 0.0).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return torch.where(keep, gradients[0], 0.0).mul_(ctx.scale), None


class _SegmentLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, shifts: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        y = weights.new_empty(sum(map(len, parts)), weights.shape[2])
        for out, part, weight, shift in zip(y.split([*map(len, parts)]), parts, weights, shifts, strict=True):
            torch.addmm(shift, part, weight, out=out)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        pieces = gradients[0].split([*map(len, parts)])
        dweights = torch.stack([part.T @ piece for part, piece in zip(parts, pieces, strict=True)])
        ones = [piece.new_ones(len(piece)) for piece in pieces]
        dshifts = torch.stack([one @ piece for one, piece in zip(ones, pieces, strict=True)])
        return dweights, dshifts, *[None] * len(parts)


class _GroupedConv(torch.autograd.Function):
    """A grouped convolution by matrix products.

    Frames r, r + 8, r + 16 ... of x (groups, time, in), read as rows of 8 x in channels, are a view. Taps
    8 b ... 8 b + 7 applied to them are one product, and every eighth output frame is the sum of kernel / 8
    such products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> Tensor:
        x, taps = x.contiguous(), taps.contiguous()
        ctx.save_for_backward(x, taps)
        return _slide(x, taps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, taps = ctx.saved_tensors
        kernel = taps.shape[1]
        dy = F.pad(gradients[0], (0, 0, kernel - 1, kernel - 1))  # (groups, time + kernel - 1, out)
        dx = _slide(dy, taps.flip(1).transpose(2, 3).contiguous())
        dtaps = torch.zeros_like(taps).view(len(taps), kernel // TAPS, -1, taps.shape[3])
        frames = gradients[0].shape[1]
        rows = -(-frames // TAPS)
        x = F.pad(x, (0, 0, 0, rows * TAPS - frames))
        dy = dy[:, kernel - 1 : kernel - 1 + rows * TAPS]
        for phase in range(TAPS):
            own = dy[:, phase::TAPS]  # (groups, rows, out)
            for block in range(kernel // TAPS):
                dtaps[:, block].baddbmm_(_rows(x, phase + TAPS * block, rows).transpose(1, 2), own)
        return dx, dtaps.view_as(taps)


def _slide(x: Tensor, taps: Tensor) -> Tensor:
    """x (groups, time, in), taps (groups, kernel, in, out) -> (groups, time - kernel + 1, out)."""
    groups, kernel, _, out = taps.shape
    frames = x.shape[1] - kernel + 1
    rows = -(-frames // TAPS)
    x = F.pad(x, (0, 0, 0, rows * TAPS - frames))
    weights = taps.view(groups, kernel // TAPS, -1, out)
    y, total = x.new_empty(groups, rows, TAPS, out), x.new_empty(groups, rows, out)
    for phase in range(TAPS):
        torch.bmm(_rows(x, phase, rows), weights[:, 0], out=total)
        for block in range(1, kernel // TAPS):
            total.baddbmm_(_rows(x, phase + TAPS * block, rows), weights[:, block])
        y[:, :, phase] = total
    return y.flatten(1, 2)[:, :frames]


def _rows(x: Tensor, first: int, rows: int) -> Tensor:
    """Frames from `first` on, TAPS at a time: (groups, rows, TAPS x in), a view of contiguous x."""
    groups, time, channels = x.shape
    width = TAPS * channels
    start = x.storage_offset() + first * channels
    return x.as_strided((groups, rows, width), (time * channels, width, 1), start)
