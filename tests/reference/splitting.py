"""A batch is the sum of its utterances: in its loss, its counts and its gradients."""

import pytest
import torch
from torch import nn

from pretrain.training.task import Loss


def assert_batch_is_the_sum_of(
    together: Loss, parts: list[Loss], module: nn.Module, floor: float = 0.0
) -> None:
    """`together` and `parts` are losses of `module`; `floor` is how far apart gradients may be that are
    rounding alone."""
    # float32, matrices of other shapes
    assert together.total.item() == pytest.approx(sum(part.total.item() for part in parts), rel=1e-5)
    assert together.count.item() == sum(part.count.item() for part in parts)
    together.total.backward()
    whole = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    sum(part.total for part in parts).backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            # gradients of thousands of summed products in float32, beside the largest of the tensor
            atol = 1e-4 * float(whole[name].abs().max()) + floor
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-3, atol=atol)
