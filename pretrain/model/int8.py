"""A linear layer in 8 bits, for inference on a CPU."""

import torch
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """Symmetric 8-bit weights scaled by output channel; inputs are scaled by row.

    `kernel` is the number of taps of a convolution that its (taps x in) inputs are, for `gelu_conv`.
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


def quantize_linears(parent: nn.Module) -> None:
    """Replace the linear layers that are children of `parent`; their float weights are gone."""
    for name, linear in [*parent.named_children()]:
        if isinstance(linear, nn.Linear):
            setattr(parent, name, Int8Linear(linear.weight, linear.bias))
