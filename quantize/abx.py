"""ABX: is a phone nearer to another token of itself than to a token of another phone? The error rate, without
any training.

Of tokens a and x of one phone and b of another, a triple is an error when d(x, a) > d(x, b) and half of one
when they are equal. "within": all three of one speaker; "across": a and b of one speaker, x of another
(Schatz 2016; Kahn et al. 2020, Libri-light; Nguyen et al. 2020, ZeroSpeech 2021). What is counted, and in
which order it is averaged, follows Libri-light and fastabx; the frames of a token follow fastabx, which takes
the last frame that Libri-light leaves out by mistake (a slightly higher error).

`phone_items` lists the tokens of aligned utterances, `abx` scores them under a distance: "angular"
arccos(cos)/π, "cosine" 1 − cos, or, of discrete units, "discrete": 0 where two are equal, 1 where not, which
is the cosine distance of one-hot vectors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pretrain.progress import progress
from quantize.dtw import Block, Spans, Tokens, aligned
from quantize.phone_tokens import FRAME_RATE_HZ, Items

COMPARISONS = 2**22  # triples compared at a time

Mode = Literal["within", "across"]
Distance = Literal["angular", "cosine", "discrete"]


@dataclass(frozen=True)
class AbxScore:
    """`error` in [0, 1], 0.5 at chance; None where there is nothing to compare, and then `reason` says why.

    `contrasts` (phones, phones): the error of telling the row's phone from the column's, NaN where no cell
    has the two; `error` is its mean. A cell is a phone pair in one context, of one speaker or of two.
    """

    error: float | None
    num_cells: int
    num_triples: int
    contrasts: np.ndarray
    reason: str = ""


def draw_tokens(items: Items, max_group: int | None, seed: int) -> Items:
    """At most `max_group` tokens of each (context, speaker, phone), sorted by these; the same whatever the
    order they come in.

    Libri-light draws a group's tokens anew for each cell. Once for all cells lets them share their distances.
    """
    items = items.take(np.lexsort((items.first, items.utterance, items.phone, items.speaker, items.context)))
    if max_group is None:
        return items
    shuffled = np.random.default_rng([seed, 0]).permutation(len(items))
    group = np.cumsum(np.diff(_keys(items), prepend=-1) != 0)
    shuffled = shuffled[np.argsort(group[shuffled], kind="stable")]  # by group, at random within
    rank = np.arange(len(items)) - np.searchsorted(group, group)
    return items.take(np.sort(shuffled[rank < max_group]))


def draw_speakers(items: Items, max_x_across: int | None, seed: int) -> dict[tuple[int, int, int], list[int]]:
    """From whom x comes: for (context, phone, speaker of a and b), at most `max_x_across` others with that
    phone in that context."""
    rng, chosen = np.random.default_rng([seed, 1]), {}
    speakers: dict[tuple[int, int], list[int]] = {}
    triples = zip(items.context.tolist(), items.phone.tolist(), items.speaker.tolist(), strict=True)
    for context, phone, speaker in sorted(set(triples)):
        speakers.setdefault((context, phone), []).append(speaker)
    for (context, phone), group in speakers.items():
        for speaker in group:
            others = [other for other in group if other != speaker]
            if max_x_across is not None and len(others) > max_x_across:
                others = sorted(rng.choice(others, max_x_across, replace=False).tolist())
            chosen[context, phone, speaker] = others
    return chosen


def abx(
    items: Items,
    features: Mapping[str, np.ndarray],
    *,
    mode: Mode,
    distance: Distance = "angular",
    max_group: int | None = 10,
    max_x_across: int | None = 5,
    seed: int = 0,
) -> AbxScore:
    """The ABX error of features by utterance id, (frames, dim) float at 50 Hz or, for "discrete", labels
    (frames,).

    Tokens are aligned by dynamic time warping; their distance is the mean frame distance along the path. The
    errors of a phone pair's cells (contexts and, across, speakers of x) are averaged, then its speakers, then
    the ordered pairs of phones. At most `max_group` tokens stand for a phone in a context of a speaker and,
    across, at most `max_x_across` other speakers say x (Libri-light: 10 and 5; None: all), drawn by the seed.

    Frame distances are rounded to 2^-16 (quantize/dtw.py), so that tokens that are equally far tie, and
    scores are the same however the work is cut. A frame of zeros is as far as can be from any that is not.
    Missing or non-finite features and arrays of the wrong form or length are ValueErrors.
    """
    items = draw_tokens(_within_features(items, features, distance), max_group, seed)
    tokens = Tokens(items.ids, Spans(items.utterance, items.first, items.last), features, distance)
    across = mode == "across"
    jobs = list(
        _jobs_across(items, draw_speakers(items, max_x_across, seed)) if across else _jobs_within(items)
    )
    cells: list[tuple[int, int, np.ndarray, np.ndarray]] = []
    num_triples = 0
    with progress(f"ABX {mode}", total=sum(job.num_pairs for job in jobs), unit="pair") as advance:
        found = aligned(tokens, (job.block(items.phone) for job in jobs))
        for job, (block, distances) in zip(jobs, found, strict=True):
            for speaker, phone, others, errors, triples in job.cells(items, block, distances):
                cells.append((speaker, phone, others, errors))
                num_triples += triples
            advance(job.num_pairs)
    contrasts = _averaged(cells, len(items.phones))
    if not cells:
        return AbxScore(None, 0, 0, contrasts, _why_nothing(items, mode))
    return AbxScore(
        float(np.nanmean(contrasts)), sum(len(errors) for *_, errors in cells), num_triples, contrasts
    )


def _within_features(items: Items, features: Mapping[str, np.ndarray], distance: Distance) -> Items:
    """The tokens, cut to the frames there are. Missing features, other forms and other lengths are
    ValueErrors."""
    lengths = np.zeros(len(items.ids), np.int64)
    for number in np.unique(items.utterance):
        name = items.ids[number]
        if name not in features:
            raise ValueError(
                f"ABX: no features for utterance {name!r}; extract those of every id in Items.ids"
            )
        values, wanted = features[name], 1 if distance == "discrete" else 2
        if values.ndim != wanted or (wanted == 1) != (values.dtype.kind in "iu"):
            form = "labels (frames,) of integers" if wanted == 1 else "features (frames, dim) of floats"
            raise ValueError(
                f"ABX: utterance {name!r} has an array {values.shape} of {values.dtype}; the distance "
                f"{distance!r} is of {form}"
            )
        lengths[number] = len(values)
    beyond = items.last - lengths[items.utterance]
    if len(items) and beyond.max() > 1:  # one frame of difference is a matter of padding
        worst = int(beyond.argmax())
        raise ValueError(
            f"ABX: utterance {items.ids[items.utterance[worst]]!r} has {lengths[items.utterance[worst]]} "
            f"frames of features and a token that ends at frame {items.last[worst]}; they belong to other "
            f"audio, or are not at {FRAME_RATE_HZ:g} Hz"
        )
    cut = replace(items, last=np.minimum(items.last, lengths[items.utterance]))
    return cut.take(cut.first < cut.last)


@dataclass
class _Job:
    """Tokens `rows` against `cols` (sorted by phone), the same array within a speaker; whose distances a few
    queries need.

    A query (side, phone) takes the row (0) or column (1) tokens of a phone as x, and the other side's as a
    and b.
    """

    rows: np.ndarray
    cols: np.ndarray
    queries: list[tuple[int, int]]

    @property
    def num_pairs(self) -> int:
        return len(self.rows) * len(self.cols)

    def block(self, phone: np.ndarray) -> Block:
        """Which rows are compared with which columns."""
        wanted = np.zeros((2, int(phone.max()) + 1), bool)
        for side, a in self.queries:
            wanted[side, a] = True
        row, col = wanted[0, phone[self.rows]], wanted[1, phone[self.cols]]
        if self.rows is self.cols:
            return Block(self.rows, self.cols, *np.nonzero(np.triu(row[:, None] | row[None, :], 1)))
        return Block(self.rows, self.cols, *np.nonzero(row[:, None] | col[None, :]))

    def cells(
        self, items: Items, block: Block, found: np.ndarray
    ) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, int]]:
        """(speaker of a and b, their phone a, the phones b, errors of the cells, triples in all) of each
        query.

        `found` (2, pairs): the distances of the block's pairs with the row's token as x, and with the
        column's.
        """
        by_row = np.full((len(self.rows), len(self.cols)), np.nan, found.dtype)
        by_col = by_row if self.rows is self.cols else np.full(by_row.shape[::-1], np.nan, found.dtype)
        by_row[block.r, block.c], by_col[block.c, block.r] = found
        tables = [
            np.unique(items.phone[tokens], return_index=True, return_counts=True)
            for tokens in (self.rows, self.cols)
        ]
        for side, a in self.queries:
            x, targets = (self.rows, self.cols) if side == 0 else (self.cols, self.rows)
            phones, starts, sizes = tables[1 - side]  # of the targets
            distances = (by_row, by_col)[side][items.phone[x] == a]  # (x, targets)
            to_a = distances[:, items.phone[targets] == a]
            # Within a speaker a token's distance from itself is NaN, which is nearer than nothing.
            num_pairs = to_a.size - (len(to_a) if x is targets else 0)
            right = np.add.reduceat(_nearer(to_a, distances), starts)
            others = phones != a
            triples = num_pairs * sizes[others]
            yield (
                int(items.speaker[targets[0]]),
                a,
                phones[others],
                1 - right[others] / triples,
                int(triples.sum()),
            )


def _nearer(to_a: np.ndarray, to_targets: np.ndarray) -> np.ndarray:
    """For each target, the (x, a) with d(x, a) < d(x, target), equals as half: of (x, a) and (x, targets),
    (targets,)."""
    step = max(1, COMPARISONS // (to_a.shape[1] * to_targets.shape[1]))
    total = np.zeros(to_targets.shape[1])
    for start in range(0, len(to_a), step):
        near, far = to_a[start : start + step, :, None], to_targets[start : start + step, None, :]
        total += ((near < far).sum((0, 1)) + (near <= far).sum((0, 1))) / 2
    return total


def _keys(items: Items) -> np.ndarray:
    """(context, speaker, phone) as one number."""
    return (items.context * len(items.speakers) + items.speaker) * len(items.phones) + items.phone


def _blocks(items: Items) -> Iterator[tuple[int, int, np.ndarray, dict[int, int]]]:
    """(context, speaker, tokens by phone, number of tokens of each phone) of sorted items."""
    keys = items.context * len(items.speakers) + items.speaker
    for tokens in np.split(np.arange(len(items)), np.flatnonzero(np.diff(keys)) + 1):
        if len(tokens):
            phones, counts = np.unique(items.phone[tokens], return_counts=True)
            sizes = dict(zip(phones.tolist(), counts.tolist(), strict=True))
            yield int(items.context[tokens[0]]), int(items.speaker[tokens[0]]), tokens, sizes


def _jobs_within(items: Items) -> Iterator[_Job]:
    for _, _, tokens, sizes in _blocks(items):
        queries = [(0, phone) for phone, size in sizes.items() if size > 1]
        if queries and len(sizes) > 1:
            yield _Job(tokens, tokens, queries)


def _jobs_across(items: Items, chosen: dict[tuple[int, int, int], list[int]]) -> Iterator[_Job]:
    blocks = {(context, speaker): (tokens, sizes) for context, speaker, tokens, sizes in _blocks(items)}
    # by context and the two speakers, the smaller number first
    queries: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for (context, phone, speaker), others in chosen.items():
        if len(blocks[context, speaker][1]) > 1:
            for other in others:
                side = int(speaker < other)  # x is the other's: the columns where the other is the second
                pair = context, min(speaker, other), max(speaker, other)
                queries.setdefault(pair, []).append((side, phone))
    for (context, one, two), wanted in queries.items():
        yield _Job(blocks[context, one][0], blocks[context, two][0], wanted)


def _averaged(cells: list[tuple[int, int, np.ndarray, np.ndarray]], num_phones: int) -> np.ndarray:
    """Errors by phone pair: the mean over a speaker's cells, then over speakers. (phones, phones), NaN where
    there are none."""
    contrasts = np.full(num_phones * num_phones, np.nan)
    if cells:
        speaker = np.concatenate([np.full(len(others), speaker) for speaker, _, others, _ in cells])
        pair = np.concatenate([phone * num_phones + others for _, phone, others, _ in cells])
        keys = speaker * num_phones**2 + pair
        groups, which, counts = np.unique(keys, return_inverse=True, return_counts=True)
        errors = np.bincount(which, np.concatenate([errors for *_, errors in cells])) / counts
        pairs, which, counts = np.unique(groups % num_phones**2, return_inverse=True, return_counts=True)
        contrasts[pairs] = np.bincount(which, errors) / counts
    return contrasts.reshape(num_phones, num_phones)


def _why_nothing(items: Items, mode: Mode) -> str:
    if not len(items):
        return "no phone tokens: they need utterances with both phones and a speaker"
    if mode == "across" and len(np.unique(items.speaker)) < 2:
        return "one speaker only"
    shared = " of one speaker" if mode == "within" else ", of one speaker and again of another,"
    return (
        f"no two phones{shared} share a context, one of them spoken twice; more speech, or context 'any', "
        "may help"
    )
