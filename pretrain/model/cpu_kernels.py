"""The encoder's expensive pieces, written for a CPU: hand-written backward passes that store little and allocate less.

On a CPU large temporaries cost more than arithmetic: each fresh one is mapped page by page by the kernel. So GELU and layer norm
are recomputed in backward, in blocks that stay in the cache, and gradients are written where they are needed. Each function has
a plain formulation, which GPUs (where `torch.compile` fuses it) and autocast use, and which the tests compare with.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.packing import Layout

try:
    from torch.nn.attention import varlen  # torch >= 2.10, CUDA only

    varlen_attn: Any = varlen.varlen_attn  # units/lm/attention.py takes it from here
except ImportError:  # pragma: no cover
    varlen_attn = None

BLOCK_BYTES = 8 << 20  # of activations at a time
TAPS = 8  # of a grouped convolution in one matrix product


@torch.compiler.disable  # blocks are for the interpreter: a compiler would unroll them for every new length
def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    y: Tensor = function.apply(*arguments)
    return y


def gelu_conv(
    x: Tensor,
    weight: "Tensor | Int8Linear",
    bias: Tensor | None = None,
    norm: torch.nn.LayerNorm | None = None,
) -> Tensor:
    """Convolution of gelu(norm(x)) over time: x (time, in), weight (kernel, in, out) -> (frames, out).

    A kernel of one tap has stride 1 (a linear layer); kernels of two and three have stride 2 (wav2vec 2.0's front end). In
    (time, channel) layout taps 0 and 1 are rows of a (frames, 2 in) view and tap 2 is every second row added on top: plain matrix
    products with nothing copied.
    """
    if isinstance(weight, Tensor) and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        scale, shift, eps = (norm.weight, norm.bias, norm.eps) if norm is not None else (None, None, 0.0)
        y = _apply(_GeluConv, x, weight, scale, shift, eps)
    elif x.device.type == "cpu" and not torch.is_grad_enabled():
        kernel = len(weight)
        stride, block = min(2, kernel), _block(x, min(2, kernel))
        frames = (len(x) - kernel) // stride + 1
        spans = [
            (stride * first, stride * (min(first + block, frames) - 1) + kernel)
            for first in range(0, frames, block)
        ]
        y = torch.cat(
            [strided_conv(F.gelu(x[a:b] if norm is None else norm(x[a:b])), weight) for a, b in spans]
        )
    else:
        y = strided_conv(F.gelu(x if norm is None else norm(x)), weight)
    return y if bias is None else y + bias


def gelu_linear(x: Tensor, linear: "torch.nn.Linear | Int8Linear") -> Tensor:
    """linear(gelu(x)) for x (rows, in)."""
    if isinstance(linear, Int8Linear):
        return linear(F.gelu(x))
    return gelu_conv(x, linear.weight.T[None], linear.bias)


def strided_conv(x: Tensor, weight: "Tensor | Int8Linear") -> Tensor:
    """The convolution alone: x (time, in), weight (kernel, in, out) -> (frames, out)."""
    kernel = len(weight)
    if kernel == 1:
        return weight(x) if isinstance(weight, Int8Linear) else x @ weight[0]
    frames = (len(x) - kernel) // 2 + 1
    if isinstance(weight, Int8Linear):
        pairs = _pairs(x, frames)
        return weight(pairs if kernel == 2 else torch.cat([pairs, x[2 : 2 * frames + 1 : 2]], dim=1))
    y = _pairs(x, frames) @ weight[:2].flatten(0, 1)
    return y if kernel == 2 else y + x[2 : 2 * frames + 1 : 2] @ weight[2]


def _pairs(x: Tensor, frames: int) -> Tensor:
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
        block = _block(x, stride)
        scratch = x.new_empty(block * stride + kernel - stride, x.shape[1])
        for first in range(0, frames, block):
            last = min(first + block, frames)
            rows = x[stride * first : stride * (last - 1) + kernel]
            active = torch.ops.aten.gelu.out(_normed(rows, scale, shift, eps)[0], out=scratch[: len(rows)])
            if kernel == 1:
                torch.mm(active, weight[0], out=y[first:last])
            else:
                torch.mm(_pairs(active, last - first), weight[:2].flatten(0, 1), out=y[first:last])
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
        # A linear layer's weight comes here transposed; its gradient is laid out like it, so that nothing is copied later.
        dweight = torch.zeros_like(weight)
        dscale, dshift = (
            (torch.zeros_like(scale), torch.zeros_like(shift)) if scale is not None else (None, None)
        )
        block = _block(x, stride)
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
                dweight[:2].view(-1, dweight.shape[2]).addmm_(_pairs(active, last - first).T, own)
                torch.mm(own, weight[:2].flatten(0, 1).T, out=_pairs(down, last - first))
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
                plain, weighted, biased = torch.ops.aten.native_layer_norm_backward(
                    down,
                    x[low : low + len(down)],
                    scale.shape,
                    mean[: len(down)],
                    rstd[: len(down)],
                    scale,
                    shift,
                    [True] * 3,
                )
                down.copy_(plain)
                dscale += weighted
                dshift += biased
        return dx, dweight, dscale, dshift, None


def _block(x: Tensor, stride: int) -> int:
    return max(1, BLOCK_BYTES // (x.shape[1] * x.element_size() * stride))


def _normed(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm with its statistics, or `x` itself."""
    if scale is None:
        return x, x, x
    y, mean, rstd = torch.ops.aten.native_layer_norm(x, scale.shape, scale, shift, eps)
    return y, mean, rstd


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout. On a CPU four draws come from each 64-bit random number, instead of one from each: the rate is exact to 1 / 65536."""
    if not training or rate == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate, training)
    return _apply(_Dropout, x, rate)


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


def segment_linear(parts: tuple[Tensor, ...], weights: Tensor, shifts: Tensor) -> Tensor:
    """A linear layer of its own for each segment: parts (time_i, in) without gradients, weights (segments, in, out), shifts
    (segments, out) -> the results end to end, (time, out)."""
    if parts[0].device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        return _apply(_SegmentLinear, weights, shifts, *parts)
    return torch.cat(
        [torch.addmm(shift, part, weight) for part, weight, shift in zip(parts, weights, shifts, strict=True)]
    )


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


@torch.compiler.disable  # or every new set of lengths would be compiled anew
def attention(heads: Tensor, layout: Layout, rate: float) -> Tensor:
    """Self-attention within each utterance: heads (frames, 3, num_heads, head_dim), query, key and value -> (frames, dim).

    Dropout of attention probabilities would force the unfused path on a CPU and is unknown to the variable-length kernels. Here a
    frame's value is dropped instead, for a head and all queries at once: for any one query that is the very distribution of the
    published dropout (each probability is set to zero with the rate, independently, and the others are scaled by 1 / (1 - rate),
    without a new normalisation); only its draws are shared by the queries of a head.
    """
    query, key, value = heads.unbind(1)  # (frames, num_heads, head_dim)
    value = drop_values(value, rate)
    if varlen_attn is not None and has_varlen(heads.device, heads.dtype):
        bounds, longest = layout.frame_ends(heads.device), max(layout.num_frames)
        y = varlen_attn(query, key, value, bounds, bounds, longest, longest)
        assert isinstance(y, Tensor)
        return y.flatten(1)
    outputs = []
    for parts in zip(layout.split(query), layout.split(key), layout.split(value), strict=True):
        q, k, v = (part.transpose(0, 1)[None] for part in parts)  # (1, num_heads, frames, head_dim)
        y = F.scaled_dot_product_attention(q, k, v)
        outputs.append(y[0].transpose(0, 1))
    return torch.cat(outputs).flatten(1)


def drop_values(value: Tensor, rate: float) -> Tensor:
    """Dropout of attention as `attention` explains it: value (rows, num_heads, head_dim), whole heads of a row set to zero."""
    if rate == 0:
        return value
    ones = torch.ones(
        value.shape[:2], dtype=torch.promote_types(value.dtype, torch.float32), device=value.device
    )
    keep = dropout(ones, rate, training=True)  # (rows, num_heads)
    return (value * keep[..., None]).to(value.dtype)


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's variable-length kernel takes tensors like these: bfloat16 or float16 on a GPU from Ampere on."""
    half = dtype in (torch.bfloat16, torch.float16)
    return (
        varlen_attn is not None
        and device.type == "cuda"
        and half
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


class Int8Linear(torch.nn.Module):
    """A linear layer for inference on a CPU in 8 bits: symmetric, weights scaled by output channel, inputs by row.

    `kernel`: how many taps of a convolution its (taps x in) inputs are, for `gelu_conv`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, kernel: int = 1):  # (out, in), (out,)
        super().__init__()
        weight = weight.detach().float()
        self.scale = (weight.abs().amax(1) / 127).clamp(min=1e-30)  # (out,)
        self.weight = (weight / self.scale[:, None]).round().to(torch.int8).T.contiguous()  # (in, out)
        self.bias, self.kernel = bias, kernel

    def __len__(self) -> int:
        return self.kernel

    def forward(self, x: Tensor) -> Tensor:  # (rows, in)
        scale = (x.abs().amax(1, keepdim=True) / 127).clamp_(min=1e-30)
        y = torch._int_mm((x / scale).round_().to(torch.int8), self.weight) * scale
        return y.mul_(self.scale) if self.bias is None else torch.addcmul(self.bias, y, self.scale)


def grouped_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Grouped convolution over time, stride 1, no padding: x (time, channels), weight (out, in / groups, kernel) as
    `torch.nn.Conv1d` has it -> (time - kernel + 1, out)."""
    groups = x.shape[1] // weight.shape[1]
    if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and weight.shape[2] % TAPS == 0:
        taps = weight.unflatten(0, (groups, -1)).permute(0, 3, 2, 1)  # (groups, kernel, in, out)
        y = _apply(_GroupedConv, x.unflatten(1, (groups, -1)).transpose(0, 1), taps)
        return y.transpose(0, 1).flatten(1) + bias
    return F.conv1d(x.T[None], weight, bias, groups=groups)[0].T


class _GroupedConv(torch.autograd.Function):
    """As matrix products. Frames r, r + 8, r + 16 ... of x (groups, time, in) read as rows of 8 x in channels are a view; taps
    8 b ... 8 b + 7 applied to them are one product, and every eighth output frame is the sum of kernel / 8 such products."""

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
    """Frames `first` and on, TAPS at a time: (groups, rows, TAPS x in), a view of contiguous x."""
    groups, time, channels = x.shape
    return x.as_strided(
        (groups, rows, TAPS * channels),
        (time * channels, TAPS * channels, 1),
        x.storage_offset() + first * channels,
    )
