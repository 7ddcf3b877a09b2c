"""Drawing train, dev and test: whole speakers, or utterances, so that the hours of dev and test are nearest
to the shares asked for.

Who goes where is a function of the seed, the names and their lengths, never of the order of rows.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

EXACT = 10  # up to so many names every assignment is tried: 3 ** 10 of them
MOST_PAIRS = 4_000_000  # swaps are looked for up to here; beyond, one name is a small part of any split
SHORT_SECONDS = 120.0  # a split below this is warned of
TRAIN = 0  # number of the split; those with a share follow


class Split(NamedTuple):
    """A split to be drawn: its name, and the share of all hours it should have."""

    name: str
    share: float


def draw_splits(
    seconds: Mapping[str, float], splits: list[Split], seed: int, seconds_of_train: float = 0.0
) -> dict[str, str]:
    """The split of each name: one of `splits`, each of which gets at least one name, or `train`, which gets
    the rest.

    `seconds` is the length of each name's recordings, `seconds_of_train` that of recordings which are in
    train anyway. The sum over splits of |seconds - share * all seconds| is the least possible for up to ten
    names. For more, names are taken in an order drawn by the seed as long as they fit, and then no move of
    one name and no swap of two makes the sum less (of splits with millions of pairs: no move). ValueError if
    there are too few names.
    """
    order = sorted(seconds, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    if not splits:
        return dict.fromkeys(order, "train")
    if len(order) <= len(splits):
        names = " and ".join(split.name for split in splits)
        raise ValueError(
            f"{len(order)} are too few to draw {names} from and leave a train split; set dev_share or "
            "test_share to 0, add recordings, or cut long ones with max_seconds"
        )
    # in ms: sums of integers are exact
    lengths = np.array([max(1, round(seconds[name] * 1000)) for name in order], np.int64)
    total = int(lengths.sum()) + round(seconds_of_train * 1000)
    targets = np.array([int(split.share * total + 1e-6) for split in splits], np.int64)
    places = (
        _try_all(lengths, targets)
        if len(order) <= EXACT
        else _improve(_first_fit(lengths, targets), lengths, targets)
    )
    parts = ["train", *(split.name for split in splits)]
    return {name: parts[place] for name, place in zip(order, places.tolist(), strict=True)}


def _try_all(lengths: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The best of all assignments, (names,) int64: the least sum of errors, then the least largest error,
    then the first."""
    num_parts = len(targets) + 1
    every = np.indices((num_parts,) * len(lengths)).reshape(len(lengths), -1).T  # (assignments, names)
    every = every[np.all([(every == part).any(1) for part in range(num_parts)], axis=0)]  # no split is empty
    errors = np.stack(
        [np.abs((every == part + 1) @ lengths - target) for part, target in enumerate(targets)], axis=1
    )
    best = errors.sum(1) == errors.sum(1).min()
    chosen: np.ndarray = every[best][errors[best].max(1).argmin()]
    return chosen


def _first_fit(lengths: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """For one split after the other the names, in order, that its target has room for; the shortest one where
    none fits. (names,)"""
    places = np.zeros(len(lengths), np.int64)
    for part, target in enumerate(targets.tolist(), start=1):
        room, free = target, np.flatnonzero(places == TRAIN)
        for name, length in zip(free.tolist(), lengths[free].tolist(), strict=True):
            if length <= room:
                places[name], room = part, room - length
        if room == target:
            places[free[lengths[free].argmin()]] = part
    return places


def _improve(places: np.ndarray, lengths: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The best move of one name or swap of two between splits, again and again until none makes the sum of
    errors less. (names,)"""
    num_parts = len(targets) + 1
    while True:
        excess = np.array([lengths[places == part + 1].sum() for part in range(len(targets))]) - targets
        best, change = 0, None
        for a in range(num_parts):
            for b in range(a + 1, num_parts):
                gain, names = _best_exchange(places, lengths, excess, a, b)
                if gain > best:
                    best, change = gain, names
        if change is None:
            return places
        for name, part in change:
            places[name] = part


Change = list[tuple[int, int]]  # name and its new split


def _best_exchange(
    places: np.ndarray, lengths: np.ndarray, excess: np.ndarray, a: int, b: int
) -> tuple[int, Change]:
    """How much less the sum of errors becomes by the best move or swap between splits a and b, a < b, and
    what that is."""
    of_a, of_b = np.flatnonzero(places == a), np.flatnonzero(places == b)
    before = (0 if a == TRAIN else abs(int(excess[a - 1]))) + abs(int(excess[b - 1]))

    def gains(moved: np.ndarray) -> np.ndarray:
        """When so much goes from a to b."""
        after = np.abs(excess[b - 1] + moved)
        return before - (after if a == TRAIN else after + np.abs(excess[a - 1] - moved))

    found: list[tuple[int, Change]] = [(0, [])]
    if len(of_a) > 1:
        gain = gains(lengths[of_a])
        found.append((int(gain.max()), [(int(of_a[gain.argmax()]), b)]))
    if len(of_b) > 1:
        gain = gains(-lengths[of_b])
        found.append((int(gain.max()), [(int(of_b[gain.argmax()]), a)]))
    if len(of_a) * len(of_b) <= MOST_PAIRS:
        gain = gains(lengths[of_a][:, None] - lengths[of_b][None])
        i, j = np.unravel_index(int(gain.argmax()), gain.shape)
        found.append((int(gain[i, j]), [(int(of_a[i]), b), (int(of_b[j]), a)]))
    return max(found, key=lambda pair: pair[0])  # the first of equal ones


def notes_on_splits(seconds: Mapping[str, float], splits: list[Split], drawn_by: str) -> list[str]:
    """What a user should know of splits that were drawn, whose lengths are `seconds`: those that are short or
    far larger than asked."""
    notes, total = [], sum(seconds.values())
    for split in [*splits, Split("train", 1.0)]:
        has = seconds.get(split.name, 0.0)
        if has < SHORT_SECONDS:
            remedy = "add audio" if split.name == "train" else f"raise {split.name}_share or add audio"
            notes.append(
                f"split {split.name!r} has {has:.0f} s, under two minutes: too little to rely on; {remedy}"
            )
        if has > 2 * split.share * total:
            notes.append(
                f"split {split.name!r} has {has / total:.1%} of the hours, and {split.name}_share asks for "
                f"{split.share:.1%}: whole {drawn_by}s allow nothing nearer; give `split` in JSON lines, or "
                f"set {split.name}_share to 0"
            )
    return notes
