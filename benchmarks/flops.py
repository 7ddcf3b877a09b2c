"""What a model computes at least: floating-point operations counted from its sizes."""

from typing import Any

import numpy as np

CONV_KERNELS, CONV_STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


def forward_flops(sizes: dict[str, Any], lengths: np.ndarray, num_layers: int) -> float:
    """Floating-point operations (2 a multiply-add) of the encoder to layer `num_layers` on utterances of
    `lengths` samples.

    Convolutions, feature projection, positional convolution, linear layers and attention over each
    utterance's own frames; no padding, no normalisation or activation, no head (under 1 %). `sizes` are the
    keys of `EncoderConfig`.
    """
    total, dim = 0.0, sizes["dim"]
    for length in lengths.tolist():
        frames, inputs = length, 1
        for kernel, stride in zip(CONV_KERNELS, CONV_STRIDES, strict=True):
            frames = (frames - kernel) // stride + 1
            total += 2 * frames * kernel * inputs * sizes["conv_dim"]
            inputs = sizes["conv_dim"]
        total += 2 * frames * dim * (inputs + sizes["pos_kernel"] * dim // sizes["pos_groups"])
        total += num_layers * 2 * frames * dim * (4 * dim + 2 * sizes["ffn_dim"] + 2 * frames)
    return total
