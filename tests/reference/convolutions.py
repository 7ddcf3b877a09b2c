"""wav2vec 2.0's convolutional front end as the papers' code spells it: Conv1d, then GroupNorm or LayerNorm,
then GELU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.frontend import CONV_STRIDES, WaveformFrontEnd


def convolve(front_end: WaveformFrontEnd, waveform: Tensor) -> Tensor:
    """One unpadded waveform (samples,) to frames (frames, channels), with `front_end`'s weights."""
    x = waveform[None, None]  # (1, channels, time)
    for layer, (weight, stride) in enumerate(zip(front_end.weights, CONV_STRIDES, strict=True)):
        bias = None if front_end.biases is None else front_end.biases[layer]
        x = F.conv1d(x, weight.permute(2, 1, 0), bias, stride=stride)
        if front_end.group_norm and layer == 0:
            norm = front_end.norms[0]
            x = F.group_norm(x, x.shape[1], norm.weight, norm.bias, norm.eps)
        elif not front_end.group_norm:
            x = front_end.norms[layer](x.transpose(1, 2)).transpose(1, 2)
        x = F.gelu(x)
    return x[0].T


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Draw norms and biases too, which are born as ones and zeros and would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
