"""Dynamic time warping of very many short pairs at once.

The distance of two tokens is the cost of the cheapest path through their frame distances, in steps of one
frame of either or both, divided by the path's length (Libri-light's and fastabx's). Of equal predecessors the
path takes the diagonal, then the one a column back, then the one a row back: lengths, and with them
distances, depend on which token is the row where such ties are, so both directions come out, of one pass.

Frame distances are rounded to a grid of 2^-16 (by 8e-6 at most), on which the sums along paths are exact:
tokens that are equally far are so to the last bit, whichever way and in whatever company they are aligned.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

BATCH = 2**22  # frame distances held at a time: 16 MB, and enough pairs that many are of one shape
CHUNK = 2**17  # frame distances aligned at a time: they and their indices stay in the cache
GRID = 2**16  # steps of frame distances in 1
GREATEST = {"angular": 1, "cosine": 2, "discrete": 1}  # frame distance


class Spans(NamedTuple):
    """Tokens in utterances' frames, arrays (tokens,): the utterance's number in a list of ids, first frame,
    last frame (exclusive)."""

    utterance: np.ndarray
    first: np.ndarray
    last: np.ndarray


class Tokens:
    """The frames of tokens, and the distances between them.

    "angular" is arccos(cos)/π, "cosine" 1 − cos, with a frame of zeros at the greatest distance (1 and 2)
    from any that is not; "discrete" is 0 where two labels are equal and 1 where not. A cosine within 1e-6 of
    ±1 counts as ±1: in float32 a frame's cosine with itself is not quite 1, and arccos would make a distance
    of 1e-4 of that.

    Matrix products are in float64: their last bits depend on the place in the matrix, in float32 that would
    put one distance in a hundred on another step of the grid, here one in 10^10. Equal frames, as centroids
    are, are one frame, so that there is less to multiply.
    """

    def __init__(self, ids: list[str], spans: Spans, features: Mapping[str, np.ndarray], distance: str):
        self.length = spans.last - spans.first
        self._distance = distance
        self._start = np.zeros(len(self.length), np.int64)
        parts: list[np.ndarray] = []
        total = 0
        order = np.argsort(spans.utterance, kind="stable")
        for of in np.split(order, np.flatnonzero(np.diff(spans.utterance[order])) + 1) if len(order) else []:
            name = ids[spans.utterance[of[0]]]
            values = features[name]
            used = np.zeros(len(values), bool)
            for first, last in zip(spans.first[of], spans.last[of], strict=True):
                used[first:last] = True
            self._start[of] = total + np.cumsum(used)[spans.first[of]] - 1
            parts.append(values[used] if distance == "discrete" else _unit_length(values[used], name))
            total += len(parts[-1])
        # (total, dim), or (total,) of labels
        frames = np.concatenate(parts) if parts else np.empty((0, 1), np.float32)
        self._frame, first = _numbered(frames)
        self._distinct = frames if len(first) == len(frames) else frames[first]
        # A cheapest path costs no more than the one along the diagonal and then an edge: as many frames as
        # the longer token has.
        exact_in_float32 = int(self.length.max(initial=0)) * GREATEST[distance] * GRID <= 2**24
        self.dtype = np.dtype(np.float32 if exact_in_float32 else np.float64)

    def costs(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Distances of the tokens' frames, (frames of rows, frames of cols), one token after the other."""
        a = self._frames_of(rows)
        b = a if cols is rows else self._frames_of(cols)
        if self._distance == "discrete":
            return (a[:, None] != b[None, :]).astype(self.dtype)
        (one_a, all_a), (one_b, all_b) = _once(a), _once(b)
        frames = self._distinct[one_a]
        costs = self._distances(frames, frames if b is a else self._distinct[one_b])
        costs = costs if all_b is None else costs[:, all_b]
        return costs if all_a is None else costs[all_a]

    def _frames_of(self, tokens: np.ndarray) -> np.ndarray:
        """Numbers of the tokens' frames among the distinct ones."""
        length = self.length[tokens]
        ends = np.cumsum(length)
        return self._frame[np.arange(ends[-1]) + np.repeat(self._start[tokens] - ends + length, length)]

    def _distances(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        wide = a.astype(np.float64)
        cosine = wide @ (wide if b is a else b.astype(np.float64)).T
        cosine[cosine > 1 - 1e-6] = 1
        cosine[cosine < -1 + 1e-6] = -1
        empty_a, empty_b = ~a.any(axis=1), ~b.any(axis=1)
        if empty_a.any() or empty_b.any():
            cosine[empty_a] = -1
            cosine[:, empty_b] = -1
            cosine[np.ix_(empty_a, empty_b)] = 1
        if self._distance == "cosine":
            distances = np.subtract(1, cosine, out=cosine)
            distances *= GRID
        else:
            distances = np.arccos(cosine, out=cosine)
            distances *= GRID / np.pi
        np.rint(distances, out=distances)
        distances /= GRID
        return distances.astype(self.dtype)


def _numbered(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each frame (n, dim) or label (n,) among the distinct ones, and where each of those is
    first; both (…,) int64."""
    if frames.ndim == 1:
        _, first, number = np.unique(frames, return_index=True, return_inverse=True)
        return number, first
    numbers: dict[bytes, int] = {}  # by digest: the bytes themselves would be the features again
    digests = (hashlib.blake2b(frame.tobytes(), digest_size=16).digest() for frame in frames)
    number = np.fromiter(
        (numbers.setdefault(digest, len(numbers)) for digest in digests), np.int64, len(frames)
    )
    return number, np.unique(number, return_index=True)[1]


def _once(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Distinct numbers, and where each of `numbers` is among them: None where they are distinct as they
    come."""
    once, where = np.unique(numbers, return_inverse=True)
    return (numbers, None) if len(once) == len(numbers) else (once, where)


def _unit_length(frames: np.ndarray, name: str) -> np.ndarray:
    """Frames (n, dim) divided by their norms, zeros left as they are; in float64 where they come so, else in
    float32."""
    frames = frames.astype(np.float64 if frames.dtype == np.float64 else np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", frames, frames, dtype=np.float64))
    if not np.isfinite(norms).all():
        raise ValueError(f"ABX: utterance {name!r} has NaN or infinity in its features")
    frames /= np.where(norms > 0, norms, 1)[:, None].astype(frames.dtype)
    return frames


class Block(NamedTuple):
    """Pairs (rows[r[k]], cols[c[k]]) of tokens to align, r ascending."""

    rows: np.ndarray
    cols: np.ndarray
    r: np.ndarray
    c: np.ndarray


def aligned(tokens: Tokens, blocks: Iterable[Block]) -> Iterator[tuple[Block, np.ndarray]]:
    """Each block, in order, with the distances of its pairs, (2, pairs): with r's token as the row, and with
    c's as the row."""
    pending: list[tuple[Block, np.ndarray]] = []
    waiting: list[tuple[Block, np.ndarray]] = []
    size = 0
    for block in blocks:
        found = np.empty((2, len(block.r)))
        waiting.append((block, found))
        full = False
        for piece, place in _pieces(tokens, block):
            pending.append((piece, found[:, place]))
            size += int(tokens.length[piece.rows].sum() * tokens.length[piece.cols].sum())
            if size >= BATCH:
                _align(tokens, pending)
                pending, size, full = [], 0, True
        if full:
            _align(tokens, pending)
            yield from waiting
            pending, waiting, size = [], [], 0
    _align(tokens, pending)
    yield from waiting


def _pieces(tokens: Tokens, block: Block) -> Iterator[tuple[Block, slice]]:
    """A block by some of its rows at a time, about `BATCH` frame distances each, and where the piece's pairs
    are in the block's."""
    frames = np.cumsum(tokens.length[block.rows]) * int(tokens.length[block.cols].sum())
    if frames[-1] <= BATCH:
        yield block, slice(0, len(block.r))
        return
    starts = np.flatnonzero(np.diff((frames - 1) // BATCH, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(block.rows)], strict=True):
        first, last = np.searchsorted(block.r, [start, end])
        if first < last:
            r, c = block.r[first:last] - start, block.c[first:last]
            yield Block(block.rows[start:end], block.cols, r, c), slice(int(first), int(last))


def _align(tokens: Tokens, pieces: list[tuple[Block, np.ndarray]]) -> None:
    """Writes the distances of each piece's pairs into the array (2, pairs) beside it."""
    if not pieces:
        return
    costs: list[np.ndarray] = []
    # of each piece: (4, pairs) first cell of a pair, cells to the next row, its rows and columns
    places: list[np.ndarray] = []
    size = 0
    for (rows, cols, r, c), _ in pieces:
        part = tokens.costs(rows, cols)
        num_rows, num_cols = tokens.length[rows], tokens.length[cols]
        row, col = (np.cumsum(num_rows) - num_rows)[r], (np.cumsum(num_cols) - num_cols)[c]
        stride = part.shape[1]
        places.append(
            np.stack([size + row * stride + col, np.full(len(r), stride), num_rows[r], num_cols[c]])
        )
        costs.append(part.ravel())
        size += part.size
    first, stride, num_rows, num_cols = np.concatenate(places, axis=1)
    distances = warped(np.concatenate(costs), first, stride, np.ones_like(stride), num_rows, num_cols)
    for (_, found), end in zip(pieces, np.cumsum([place.shape[1] for place in places]), strict=True):
        found[:] = distances[:, end - found.shape[1] : end]


def warped(
    costs: np.ndarray,
    first: np.ndarray,
    row_step: np.ndarray,
    col_step: np.ndarray,
    num_rows: np.ndarray,
    num_cols: np.ndarray,
) -> np.ndarray:
    """Mean cost along the best path of each pair, (2, pairs): as it is, and with rows and columns exchanged.

    Frame distance (i, j) of a pair is costs[first + i * row_step + j * col_step], 0 <= i < num_rows, 0 <= j <
    num_cols; the other arguments are (pairs,) int64, `costs` is flat. Means are float64, in which those of
    different sums over lengths differ.
    """
    out = np.empty((2, len(first)))
    # exchanged: with the shorter token as rows there are half as many shapes and shorter diagonals
    tall = num_rows > num_cols
    n, m = np.where(tall, num_cols, num_rows), np.where(tall, num_rows, num_cols)
    row_step, col_step = np.where(tall, col_step, row_step), np.where(tall, row_step, col_step)
    order = np.lexsort((np.where(n % 2, m, -m), n))  # shapes beside each other are alike
    start, count = 0, CHUNK
    while start < len(order):
        pairs = order[start : start + count]
        # all are padded to the largest
        if count > 32 and len(pairs) * int(n[pairs].max()) * int(m[pairs].max()) > CHUNK:
            count //= 2
            continue
        found = _warped(costs, first[pairs], row_step[pairs], col_step[pairs], n[pairs], m[pairs])
        out[:, pairs] = np.where(tall[pairs], found[::-1], found)
        start, count = start + len(pairs), 2 * count
    return out


def _warped(
    costs: np.ndarray,
    first: np.ndarray,
    row_step: np.ndarray,
    col_step: np.ndarray,
    n: np.ndarray,
    m: np.ndarray,
) -> np.ndarray:
    """`warped` of pairs of like shapes (n, m), n <= m, anti-diagonal by anti-diagonal for all pairs at
    once."""
    N, M, P = int(n.max()), int(m.max()), len(first)
    # A pair that has fewer rows or columns repeats its last ones: they come after its last cell and do not
    # change it.
    rows = first + np.minimum(np.arange(N)[:, None], n - 1) * row_step  # (N, P)
    cols = np.minimum(np.arange(M)[:, None], m - 1) * col_step  # (M, P)
    lattice = costs.take(rows[:, None] + cols).reshape(N * M, P)
    # Of three diagonals in turn, and of row i at i + 1: the sum along the best path to a cell, and that
    # path's length, of the pair and of the pair exchanged. What lies outside the lattice stays infinitely
    # dear.
    sums = np.full((3, N + 1, P), np.inf, costs.dtype)
    lengths = np.ones((3, 2, N + 1, P), costs.dtype)
    sums[0, 1] = lattice[0]
    out = np.empty((2, P))
    ends = n + m - 2
    for k in range(int(ends.max()) + 1):
        low, high = max(0, k - M + 1), min(k, N - 1) + 1
        here, last, before = k % 3, (k - 1) % 3, (k - 2) % 3
        if k:
            corner, row_back, col_back = (
                sums[before, low:high],
                sums[last, low:high],
                sums[last, low + 1 : high + 1],
            )
            side = np.minimum(row_back, col_back)
            straight = corner <= side
            best = np.minimum(corner, side, out=side)
            # (i, k - i), M - 1 cells apart
            diagonal = lattice[low * M + k - low : (high - 1) * M + k - high + 2 : max(1, M - 1)]
            np.add(best, diagonal, out=sums[here, low + 1 : high + 1])
            by_corner = lengths[before, :, low:high]
            by_row, by_col = lengths[last, :, low:high], lengths[last, :, low + 1 : high + 1]
            length = lengths[here, :, low + 1 : high + 1]
            _choose(col_back <= row_back, by_col[0], by_row[0], out=length[0])
            _choose(row_back <= col_back, by_row[1], by_col[1], out=length[1])
            _choose(straight, by_corner, length, out=length)
            length += 1
        done = np.flatnonzero(ends == k)
        if len(done):
            out[:, done] = sums[here, n[done], done].astype(np.float64) / lengths[here, :, n[done], done].T
    return out


def _choose(condition: np.ndarray, yes: np.ndarray, no: np.ndarray, out: np.ndarray) -> None:
    """np.where for small whole numbers: without its branches, which the processor cannot foresee here, twenty
    times faster."""
    difference = yes - no
    difference *= condition
    np.add(no, difference, out=out)
