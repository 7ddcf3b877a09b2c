"""ABX as the papers write it: a loop over triples, a textbook DTW with its path traced back, averages in
nested dictionaries.

Frame distances are rounded to 2^-16: then sums are exact, and what is equal is equal.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np


def frame_distance(distance: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def measured(a: np.ndarray, b: np.ndarray) -> float:
        if distance == "discrete":
            return float(a != b)
        if not a.any() or not b.any():
            cosine = 1.0 if not a.any() and not b.any() else -1.0
        else:
            cosine = float(a @ b / math.sqrt((a @ a) * (b @ b)))
            cosine = math.copysign(1.0, cosine) if abs(cosine) > 1 - 1e-6 else cosine
        return round((1 - cosine if distance == "cosine" else math.acos(cosine) / math.pi) * 2**16) / 2**16

    return measured


def dtw(costs: np.ndarray) -> float:
    """Sum of costs (rows, cols) along the cheapest path over its length; of equal predecessors the diagonal,
    then a column back."""
    rows, cols = costs.shape
    sums = np.full((rows, cols), np.inf)
    for i in range(rows):
        for j in range(cols):
            before = [sums[a, b] for a, b in ((i - 1, j - 1), (i, j - 1), (i - 1, j)) if a >= 0 and b >= 0]
            sums[i, j] = costs[i, j] + min(before, default=0.0)
    i, j, length = rows - 1, cols - 1, 1
    while i or j:
        steps = [(a, b) for a, b in ((i - 1, j - 1), (i, j - 1), (i - 1, j)) if a >= 0 and b >= 0]
        i, j = min(steps, key=lambda step: sums[step])  # the first of equals
        length += 1
    return float(sums[-1, -1] / length)


def token_distance(x: np.ndarray, y: np.ndarray, distance: str) -> float:
    measured = frame_distance(distance)
    return dtw(np.array([[measured(a, b) for b in y] for a in x]))


def abx(
    tokens: Sequence[tuple[str, str, str, np.ndarray]],
    mode: str,
    distance: str,
    speakers_of_x: Mapping[tuple[str, str, str], Sequence[str]] | None = None,
) -> tuple[float | None, int, int]:
    """(error, cells, triples) of tokens (context, speaker, phone, frames).

    `speakers_of_x`: who may say x, by (context, phone, speaker of a); None: everybody else.
    """
    groups: dict[tuple[str, str, str], list[np.ndarray]] = defaultdict(list)
    for context, speaker, phone, frames in tokens:
        groups[context, speaker, phone].append(frames)
    errors: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    num_cells = num_triples = 0
    for (context, speaker, phone), a_tokens in groups.items():
        for (other_context, other_speaker, other), b_tokens in groups.items():
            if (other_context, other_speaker) != (context, speaker) or other == phone:
                continue
            if mode == "within":
                x_speakers = [speaker]
            else:
                x_speakers = [x for c, x, p in groups if (c, p) == (context, phone) and x != speaker]
                if speakers_of_x is not None:
                    x_speakers = [x for x in x_speakers if x in speakers_of_x[context, phone, speaker]]
            for x_speaker in x_speakers:
                outcomes = []
                for x in groups[context, x_speaker, phone]:
                    for a in a_tokens:
                        if a is x:
                            continue
                        to_a = token_distance(x, a, distance)
                        for b in b_tokens:
                            to_b = token_distance(x, b, distance)
                            outcomes.append(0.5 if to_a == to_b else float(to_a > to_b))
                if outcomes:
                    errors[phone, other][speaker].append(sum(outcomes) / len(outcomes))
                    num_cells += 1
                    num_triples += len(outcomes)
    if not errors:
        return None, 0, 0
    pairs = [np.mean([np.mean(cells) for cells in by_speaker.values()]) for by_speaker in errors.values()]
    return float(np.mean(pairs)), num_cells, num_triples
