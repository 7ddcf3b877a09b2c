"""Drawing continuations from a language model: by a plain sequence, or by any pattern of several streams."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from units.corpus.patterns import Continuation as Growth
from units.corpus.patterns import Pattern
from units.lm.generation import CompactDecoder


class Continuation(NamedTuple):
    """One sampled continuation."""

    codes: np.ndarray  # int64 (n,) or (n, levels): after the prompt, without EOS and without the stop unit
    # natural log, EOS and stop unit included, under the model itself (temperature 1, uncut)
    log_likelihood: float
    ended_by: str  # "eos", "stop" or "length"


@torch.inference_mode()
def generate(
    model: CompactDecoder,
    pattern: Pattern,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[list[int]],
    rules: "Rules",
) -> list[Continuation]:
    """Continue `prompts`, codes (n,) or (n, levels) of any lengths.

    Row b draws from numpy's generator of seeds[b]: a uniform number a step, of several streams one for each,
    inverts the cumulative distribution.
    """
    continue_prompts = _continue_plain if pattern.num_levels == 1 else _continue_levels
    return continue_prompts(model, pattern, prompts, seeds, rules)


class Rules(NamedTuple):
    """A continuation ends at EOS, which is not drawn before `min_units`, before a symbol of `stops` (of level
    0), or at `max_units`."""

    max_units: int
    min_units: int = 0
    stops: Collection[int] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def pick(self, logits: Tensor, uniform: Tensor) -> Tensor:
        return pick(logits, uniform, self.temperature, self.top_k, self.top_p)


def _continue_plain(
    model: CompactDecoder,
    pattern: Pattern,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[list[int]],
    rules: Rules,
) -> list[Continuation]:
    """One stream of one level: as `_continue_levels` would, with less to do in each step."""
    eos, device, max_units = pattern.eos, model.device, rules.max_units
    uniform = torch.from_numpy(
        np.stack([np.random.default_rng(seed).random(max_units) for seed in seeds])
    ).to(device)
    ends = torch.tensor([eos, *sorted(rules.stops)], device=device)
    reading, logits = model.begin(
        [pattern.arrange(prompt)[: len(prompt) + 1] for prompt in prompts], max_units - 1
    )
    barred = torch.zeros(2, pattern.vocabularies[0], device=device)
    barred[:, eos - 1] = -torch.inf  # BOS
    barred[0, eos] = -torch.inf
    unbegun = torch.tensor([not len(prompt) for prompt in prompts], device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    drawn: list[Tensor] = []
    log_probabilities: list[Tensor] = []
    for step in range(max_units):
        allowed = logits + barred[int(step >= rules.min_units)]
        if step == 0:
            allowed[unbegun, eos] = -torch.inf  # no document is empty
        chosen = rules.pick(allowed, uniform[:, step])
        log_probabilities.append(F.cross_entropy(logits, chosen, reduction="none").masked_fill_(ended, 0.0))
        drawn.append(chosen.masked_fill_(ended, eos))
        ended = ended | (chosen == eos if len(ends) == 1 else torch.isin(chosen, ends))
        if step + 1 == max_units or bool(ended.all()):
            break
        logits = model.step(reading, chosen)
    rows, totals = (
        torch.stack(drawn, dim=1).cpu().numpy(),
        -torch.stack(log_probabilities, dim=1).double().sum(1).cpu().numpy(),
    )
    continuations = []
    for row, total in zip(rows, totals.tolist(), strict=True):
        found = np.flatnonzero(np.isin(row, [eos, *rules.stops]))
        ended_by = "length" if not len(found) else "eos" if row[found[0]] == eos else "stop"
        kept = len(row) if not len(found) else int(found[0])
        continuations.append(Continuation(row[:kept], total, ended_by))
    return continuations


def _continue_levels(
    model: CompactDecoder,
    pattern: Pattern,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[list[int]],
    rules: Rules,
) -> list[Continuation]:
    """Any pattern, by the rules of `units.corpus.patterns.Continuation`."""
    streams, device, max_units = pattern.num_streams, model.device, rules.max_units
    steps_of_code = int(pattern.prefix_length(1) - pattern.prefix_length(0))
    growth = Growth(pattern, prompts, [len(prompt) + max_units for prompt in prompts])
    room = max(
        int(pattern.length(len(prompt) + max_units)) - len(prefix)
        for prompt, prefix in zip(prompts, growth.prefixes, strict=True)
    )
    uniform = torch.from_numpy(
        np.stack([np.random.default_rng(seed).random((room, streams)) for seed in seeds])
    ).to(device)
    reading, logits = model.begin(growth.prefixes, room)
    log_likelihoods: list[np.ndarray] = []  # of each step (batch, streams), 0 where nothing was drawn
    symbols = [torch.arange(size, device=device) for size in pattern.vocabularies]
    for step in range(room):
        low, high, may_end = growth.allowed()
        may_end &= step // steps_of_code >= rules.min_units
        done, drawn, likely = growth.done, [], []
        bounds = torch.from_numpy(np.stack([low, high])).to(device)  # (2, batch, streams)
        for stream, own in enumerate(logits.split(pattern.vocabularies, dim=-1)):
            allowed = (symbols[stream] >= bounds[0, :, stream, None]) & (
                symbols[stream] < bounds[1, :, stream, None]
            )
            if stream == 0:
                allowed[:, pattern.eos] |= torch.from_numpy(may_end).to(device)
            chosen = rules.pick(own.masked_fill(~allowed, -torch.inf), uniform[:, step, stream])
            drawn.append(chosen)
            likely.append(-F.cross_entropy(own, chosen, reduction="none"))
        table = torch.stack(drawn, 1).cpu().numpy()  # (batch, streams)
        rows = growth.append(table[:, 0] if streams == 1 else table)
        free = high - low > 1
        free[:, 0] |= may_end
        free &= ~done[:, None] & (rows.reshape(table.shape) == table)  # what gave way to PAD was not drawn
        log_likelihoods.append(np.where(free, torch.stack(likely, 1).double().cpu().numpy(), 0.0))
        if growth.done.all():
            break
        logits = model.step(reading, torch.from_numpy(rows).to(device))
    return _cut_at_stops(pattern, prompts, growth, np.stack(log_likelihoods, axis=1), rules)


def _cut_at_stops(
    pattern: Pattern, prompts: Sequence[np.ndarray], growth: Growth, log_likelihoods: np.ndarray, rules: Rules
) -> list[Continuation]:
    """The continuations up to their stop units; `log_likelihoods` (batch, steps, streams) of what was
    drawn."""
    continuations = []
    for row, (prompt, own) in enumerate(zip(prompts, log_likelihoods, strict=True)):
        codes = growth.codes(row)[len(prompt) :]
        found = np.flatnonzero(np.isin(codes if codes.ndim == 1 else codes[:, 0], list(rules.stops)))
        if not len(found):
            ended_by = "length" if growth.cut[row] else "eos"
            continuations.append(Continuation(codes, float(own.sum()), ended_by))
            continue
        stop = len(prompt) + found[0]
        steps, of_streams = np.broadcast_arrays(*pattern.cells(len(prompt) + len(codes)))  # (n, levels)
        steps = steps - len(growth.prefixes[row])
        kept = steps >= 0
        kept[stop, 1:] = kept[stop + 1 :] = False  # of the stop, level 0
        total = float(own[steps[kept], of_streams[kept]].sum())
        continuations.append(Continuation(codes[: found[0]], total, "stop"))
    return continuations


def pick(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One symbol per row, int64 (batch,), from logits (batch, vocabulary): the cumulative distribution
    inverted at `uniform` (batch,).

    Symbols stand in the order of their numbers, and where something is cut off in that of their
    probabilities. top_p is of what top_k leaves.
    """
    if temperature == 0:
        return logits.argmax(-1)
    order = None
    if top_k and top_k < logits.shape[1]:
        logits, order = logits.topk(top_k, dim=-1)
    elif top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True, stable=True)
    cumulative = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if top_p < 1:  # the fewest: all before which less than top_p lies
        held = (cumulative[:, :-1] < top_p * total).sum(-1, keepdim=True)
        total = cumulative.gather(1, held)
    place = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    chosen: Tensor = place if order is None else order.gather(1, place)
    return chosen[:, 0]
