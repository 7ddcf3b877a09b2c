"""Causal attention in which no document sees another, over documents packed into rows.

Two paths give the same numbers. "mask": one call with a block-diagonal mask, all pairs of a row computed.
"varlen": every document is attended to alone, end to end in one sequence: by the variable-length kernel on a
GPU (bfloat16, float16), on a CPU document after document. Shapes: queries (batch, time, heads, head_dim),
keys and values with as many heads or a divisor of them.
"""

from functools import cached_property
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.model.attention import has_varlen, varlen_attn

CALL_COST = 2e6  # multiply-adds that cost as much as one more call of attention with its backward, on a CPU


class PackedDocuments:
    """Where the documents of a batch lie: `documents` (batch, time), the number of each token's document, -1
    where padded.

    The tokens of a document are consecutive in a row. `path`: how to attend; by default what is faster where
    the tensors are.
    """

    def __init__(self, documents: Tensor, path: Literal["mask", "varlen"] | None = None):
        self.documents, self.path = documents, path
        self._mask: Tensor | None = None

    @cached_property
    def runs(self) -> list[tuple[int, int, bool]]:
        """(documents, length, padding) in the order of the rows: neighbours of one length together."""
        starts = self._starts().tolist()
        padding = (self.documents.flatten()[starts] < 0).tolist()
        runs: list[tuple[int, int, bool]] = []
        for start, end, padded in zip(starts, [*starts[1:], self.documents.numel()], padding, strict=True):
            count, length, kind = runs[-1] if runs else (0, 0, False)
            if (length, kind) == (end - start, padded):
                runs[-1] = (count + 1, length, kind)
            else:
                runs.append((1, end - start, padded))
        return runs

    @cached_property
    def bounds(self) -> Tensor:
        """int32 (runs + 1,): where each document begins in the rows end to end, and the end of the last.
        Padding counts as one."""
        end = torch.tensor([self.documents.numel()], device=self.documents.device)
        return torch.cat([self._starts(), end]).int()

    def _starts(self) -> Tensor:
        first = torch.ones_like(self.documents, dtype=torch.bool)
        first[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return first.flatten().nonzero()[:, 0]

    def mask(self, window: int | None) -> Tensor:
        """`block_causal_mask`, made once for all layers."""
        if self._mask is None:
            self._mask = block_causal_mask(self.documents, window)
        return self._mask

    def choose(self, dtype: torch.dtype, num_heads: int, head_dim: int, window: int | None) -> None:
        """Settle the path for queries of this type and size, unless it was given, and make what it needs."""
        if self.path is None and self.documents.is_cuda:
            # The kernel takes head sizes in steps of 8 up to 256.
            fits = packs_on(self.documents.device, dtype) and head_dim % 8 == 0 and head_dim <= 256
            self.path = "varlen" if fits else "mask"
        elif self.path is None:
            batch, time = self.documents.shape
            pairs = batch * time**2 - sum(
                count * length**2 / 2 for count, length, padding in self.runs if not padding
            )
            self.path = "varlen" if len(self.runs) * CALL_COST < 2 * pairs * num_heads * head_dim else "mask"
        if self.path == "mask":
            self.mask(window)
        elif self.documents.is_cuda:
            _ = self.bounds  # here, outside of what may be compiled


def attend(
    query: Tensor, key: Tensor, value: Tensor, packing: PackedDocuments | None, window: int | None
) -> Tensor:
    """What each token sees, (batch, time, heads, head_dim): the tokens of its document up to itself, `window`
    of them at most.

    Without a `packing` each row is one document.
    """
    if packing is None:
        return causal(query, key, value, window)
    # A compiler would unroll the loop over documents anew for each layout.
    if packing.path == "mask" or (torch.compiler.is_compiling() and not query.is_cuda):
        return sdpa(query, key, value, mask=packing.mask(window))
    flat = [part.flatten(0, 1) for part in (query, key, value)]  # (tokens, heads, head_dim)
    if query.is_cuda:
        assert varlen_attn is not None
        bounds, longest = packing.bounds, query.shape[1]
        reach = (-1 if window is None else window - 1, 0)
        gqa = query.shape[2] != key.shape[2]
        y = varlen_attn(
            flat[0], flat[1], flat[2], bounds, bounds, longest, longest, window_size=reach, enable_gqa=gqa
        )
        assert isinstance(y, Tensor)
        return y.view(query.shape)
    if len(packing.runs) == 1:
        return _run(flat, packing.runs[0], window).view(query.shape)
    sizes = [count * length for count, length, _ in packing.runs]
    parts = zip(*[part.split(sizes) for part in flat], strict=True)
    return torch.cat([_run(part, run, window) for part, run in zip(parts, packing.runs, strict=True)]).view(
        query.shape
    )


def _run(parts: Any, run: tuple[int, int, bool], window: int | None) -> Tensor:
    """Documents of one length, end to end: (count x length, heads, head_dim). Padding sees nothing."""
    count, length, padding = run
    if padding:
        return torch.zeros_like(parts[0])
    query, key, value = (part.unflatten(0, (count, length)) for part in parts)
    return causal(query, key, value, window).flatten(0, 1)


def causal(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Each row (time) is one document. Beyond a window, queries go in blocks as long as it, with no more than
    the keys they may see."""
    time = query.shape[1]
    if window is None or time <= window:
        return sdpa(query, key, value, is_causal=time > 1)
    outputs = []
    for first in range(0, time, window):
        last, oldest = min(first + window, time), max(0, first - window + 1)
        distance = torch.arange(first, last, device=query.device)[:, None] - torch.arange(
            oldest, last, device=query.device
        )
        seen = (distance >= 0) & (distance < window)
        outputs.append(sdpa(query[:, first:last], key[:, oldest:last], value[:, oldest:last], mask=seen))
    return torch.cat(outputs, dim=1)


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """torch's attention in the layout of this module."""
    q, k, v = (part.transpose(1, 2) for part in (query, key, value))  # (batch, heads, time, head_dim)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2)


def block_causal_mask(documents: Tensor, window: int | None = None) -> Tensor:
    """(batch, 1, time, time) bool: True where query and key are of one document and the key is 0 to window -
    1 tokens earlier."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    time = documents.shape[1]
    near = torch.ones(time, time, dtype=torch.bool, device=documents.device).tril()
    return same & (near if window is None else near.triu(1 - window))


def packs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the variable-length kernel is there, with windows and grouped queries (torch 2.12 on)."""
    if varlen_attn is None or not has_varlen(device, dtype):
        return False
    return {"window_size", "enable_gqa"} <= signature(varlen_attn).parameters.keys()
