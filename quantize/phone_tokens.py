"""The tokens that ABX compares: phones of aligned utterances, in their context."""

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pretrain.data.utterance import HOP, SAMPLE_RATE, Phone, Utterance

FRAME_RATE_HZ = SAMPLE_RATE / HOP
ROUNDING = 1e-6  # frames: times are decimal seconds, and 0.29 s · 50 Hz is 14.499999999999998

Context = Literal["triphone", "phoneme", "any"]


@dataclass(frozen=True)
class Items:
    """Tokens to compare. Arrays are (tokens,) int64; the numbers in them point into the tables of names,
    which are sorted.

    A token is the frames `first` to `last` (exclusive) of its utterance.
    """

    utterance: np.ndarray
    first: np.ndarray
    last: np.ndarray
    phone: np.ndarray
    context: np.ndarray
    speaker: np.ndarray
    ids: list[str]
    phones: list[str]
    contexts: list[str]
    speakers: list[str]

    def __len__(self) -> int:
        return len(self.phone)

    def take(self, chosen: np.ndarray) -> "Items":
        """Some of the tokens, by number or mask, under the same tables."""
        columns = ("utterance", "first", "last", "phone", "context", "speaker")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})


def phone_items(
    rows: Iterable[Utterance], *, context: Context = "triphone", silence: Collection[str] = ()
) -> Items:
    """The tokens of every utterance that has phones and a speaker.

    "triphone": a token is a phone with its two neighbours, first to last frame, and is compared with tokens
    of the same neighbours: /bag/ with /beg/. "phoneme": the phone's own frames, the same neighbours. "any":
    the phone's own frames, whatever surrounds it. Phones named in `silence` are no tokens, nor neighbours;
    neither is a phone one frame or more away.

    Frame i stands for the time (i + ½)/50 s and belongs to a token if that time lies in it, both ends
    included (fastabx). Tokens without a frame are left out, as in Libri-light.
    """
    usable = [utterance for utterance in rows if utterance.phones and utterance.speaker is not None]
    spans: list[tuple[int, int]] = []
    names: list[tuple[str, str, str, str]] = []
    for utterance in usable:
        for phone, around, start, end in _tokens(utterance.phones or [], context, frozenset(silence)):
            first = max(0, math.ceil(start * FRAME_RATE_HZ - 0.5 - ROUNDING))
            last = min(utterance.num_frames, math.floor(end * FRAME_RATE_HZ - 0.5 + ROUNDING) + 1)
            if first < last:
                spans.append((first, last))
                names.append((utterance.id, phone, around, str(utterance.speaker)))
    ids, phones, contexts, speakers = ([name[column] for name in names] for column in range(4))
    tables, numbers = zip(*(_numbered(column) for column in (ids, phones, contexts, speakers)), strict=True)
    firsts, lasts = np.array(spans, np.int64).reshape(-1, 2).T
    return Items(numbers[0], firsts, lasts, *numbers[1:], *tables)


def _tokens(
    phones: list[Phone], context: Context, silence: frozenset[str]
) -> Iterator[tuple[str, str, float, float]]:
    """(phone, context, start, end) of the tokens among an utterance's phones."""
    if context == "any":
        yield from ((phone, "", start, end) for start, end, phone in phones if phone not in silence)
        return
    for before, this, after in zip(phones, phones[1:], phones[2:], strict=False):
        apart = max(this.start - before.end, after.start - this.end) >= 1 / FRAME_RATE_HZ
        if apart or not silence.isdisjoint({before.phone, this.phone, after.phone}):
            continue
        start, end = (before.start, after.end) if context == "triphone" else (this.start, this.end)
        yield this.phone, f"{before.phone} {after.phone}", start, end


def _numbered(names: list[str]) -> tuple[list[str], np.ndarray]:
    table = sorted(set(names))
    numbers = {name: number for number, name in enumerate(table)}
    return table, np.array([numbers[name] for name in names], np.int64)
