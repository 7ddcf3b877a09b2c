"""The encoder's expensive operations: convolutions over time, dropout, and linear layers of segments.

Each has a plain formulation here, which GPUs (where `torch.compile` fuses it) and autocast use. On a CPU in
full precision the kernels of pretrain/model/cpu_kernels.py compute the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model import cpu_kernels
from pretrain.model.cpu_kernels import pairs
from pretrain.model.int8 import Int8Linear


def _by_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def gelu_conv(
    x: Tensor, weight: Tensor | Int8Linear, bias: Tensor | None = None, norm: nn.LayerNorm | None = None
) -> Tensor:
    """Convolution of gelu(norm(x)) over time: x (time, in), weight (kernel, in, out) -> (frames, out).

    A kernel of one tap has stride 1 (a linear layer); kernels of two and three have stride 2 (wav2vec 2.0's
    front end).
    """

    def plain(rows: Tensor) -> Tensor:
        return strided_conv(F.gelu(rows if norm is None else norm(rows)), weight)

    if isinstance(weight, Tensor) and _by_hand(x):
        y = cpu_kernels.gelu_conv(x, weight, norm)
    elif x.device.type == "cpu" and not torch.is_grad_enabled():  # in blocks that stay in the cache
        kernel, stride = len(weight), min(2, len(weight))
        frames, block = (len(x) - kernel) // stride + 1, cpu_kernels.block_rows(x, stride)
        ends = [(first, min(first + block, frames)) for first in range(0, frames, block)]
        y = torch.cat([plain(x[stride * a : stride * (b - 1) + kernel]) for a, b in ends])
    else:
        y = plain(x)
    return y if bias is None else y + bias


def gelu_linear(x: Tensor, linear: nn.Linear | Int8Linear) -> Tensor:
    """linear(gelu(x)) for x (rows, in)."""
    if isinstance(linear, Int8Linear):
        return linear(F.gelu(x))
    return gelu_conv(x, linear.weight.T[None], linear.bias)


def strided_conv(x: Tensor, weight: Tensor | Int8Linear) -> Tensor:
    """The convolution of `gelu_conv` alone: x (time, in), weight (kernel, in, out) -> (frames, out).

    In (time, channel) layout taps 0 and 1 are rows of a (frames, 2 in) view, and tap 2 is every second row
    added on top: plain matrix products with nothing copied.
    """
    kernel = len(weight)
    if kernel == 1:
        return weight(x) if isinstance(weight, Int8Linear) else x @ weight[0]
    frames = (len(x) - kernel) // 2 + 1
    taps, third = pairs(x, frames), x[2 : 2 * frames + 1 : 2]
    if isinstance(weight, Int8Linear):
        return weight(taps if kernel == 2 else torch.cat([taps, third], dim=1))
    y = taps @ weight[:2].flatten(0, 1)
    return y if kernel == 2 else y + third @ weight[2]


def grouped_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Grouped convolution over time, stride 1, no padding: x (time, channels) -> (time - kernel + 1, out).

    `weight` is (out, in / groups, kernel), as `torch.nn.Conv1d` has it.
    """
    groups = x.shape[1] // weight.shape[1]
    if _by_hand(x) and weight.shape[2] % cpu_kernels.TAPS == 0:
        return cpu_kernels.grouped_conv(x, weight, groups) + bias
    return F.conv1d(x.T[None], weight, bias, groups=groups)[0].T


def segment_linear(parts: tuple[Tensor, ...], weights: Tensor, shifts: Tensor) -> Tensor:
    """A linear layer of its own for each segment, the results end to end: (time, out).

    `parts` are (time_i, in) without gradients, `weights` (segments, in, out) and `shifts` (segments, out).
    """
    if _by_hand(parts[0]):
        return cpu_kernels.segment_linear(parts, weights, shifts)
    segments = zip(parts, weights, shifts, strict=True)
    return torch.cat([torch.addmm(shift, part, weight) for part, weight, shift in segments])


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout; on a CPU with draws of 16 bits each."""
    if not training or rate == 0:
        return x
    return cpu_kernels.dropout(x, rate) if x.device.type == "cpu" else F.dropout(x, rate, training)
