"""Self-attention within the utterances of a packed batch, or among the rows of a streaming encoder."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.packing import Layout
from pretrain.model.operations import dropout

try:
    from torch.nn.attention import varlen  # torch >= 2.10, CUDA only

    varlen_attn: Any = varlen.varlen_attn
except ImportError:  # pragma: no cover
    varlen_attn = None


class Attending(Protocol):
    """Rows of a transformer layer that are not whole utterances (pretrain/model/streaming.py)."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each (rows, num_heads, head_dim) -> (rows, dim)."""


@torch.compiler.disable  # or every new set of lengths would be compiled anew
def attention(heads: Tensor, place: Layout | Attending, rate: float) -> Tensor:
    """Self-attention: heads (frames, 3, num_heads, head_dim), query, key and value -> (frames, dim).

    Dropout of attention probabilities would force the unfused path on a CPU, and the variable-length kernels
    lack it. Here a frame's value is dropped instead, for a head and all queries at once: for any one query
    that is the very distribution of the published dropout (each probability is set to zero with the rate,
    independently, and the others are scaled by 1 / (1 - rate), without a new normalisation); only its draws
    are shared by the queries of a head.
    """
    query, key, value = heads.unbind(1)  # (frames, num_heads, head_dim)
    value = drop_values(value, rate)
    if not isinstance(place, Layout):
        return place.attend(query, key, value)
    if has_varlen(heads.device, heads.dtype):
        bounds, longest = place.frame_ends(heads.device), max(place.num_frames)
        y = varlen_attn(query, key, value, bounds, bounds, longest, longest)
        assert isinstance(y, Tensor)
        return y.flatten(1)
    outputs = []
    for parts in zip(place.split(query), place.split(key), place.split(value), strict=True):
        q, k, v = (part.transpose(0, 1)[None] for part in parts)  # (1, num_heads, frames, head_dim)
        outputs.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
    return torch.cat(outputs).flatten(1)


def drop_values(value: Tensor, rate: float) -> Tensor:
    """The dropout of `attention`: whole heads of a row (rows, num_heads, head_dim) become zero."""
    if rate == 0:
        return value
    wide = torch.promote_types(value.dtype, torch.float32)
    ones = torch.ones(value.shape[:2], dtype=wide, device=value.device)
    keep = dropout(ones, rate, training=True)  # (rows, num_heads)
    return (value * keep[..., None]).to(value.dtype)


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the variable-length kernel takes such tensors: 16 bits, on a GPU from Ampere on."""
    return (
        varlen_attn is not None
        and device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
