"""Memory-mapped arrays that are compared with their SHA-256 while they are read."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain.store.hashes import PIECE_BYTES


def map_npy(path: Path) -> np.ndarray:
    """A `.npy`, memory-mapped. Raises ValueError if it is missing, or is not one array from its first byte to
    its last."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        # numpy reads headers with Python's parser, and flipped bytes make that throw anything
        raise ValueError(f"{path}: missing or damaged ({error})") from None
    if (
        not isinstance(array, np.memmap)
        or array.offset + array.nbytes != path.stat().st_size
        or not array.flags.c_contiguous
    ):
        raise ValueError(f"{path}: damaged: not an array from its first byte to its last")
    return array


class CheckedNpy:
    """A `.npy`, memory-mapped, whose bytes are compared with their SHA-256 block by block, when they are
    first read.

    So a flipped byte never becomes a label or a token in silence, and reading three documents of a large
    corpus hashes three blocks. `hashes` are those of `sha256_blocks`, or one of the whole file (`block_bytes`
    None); without any, nothing is compared. `array` is that of `map_npy`.
    """

    def __init__(self, path: Path, array: np.ndarray, hashes: Sequence[str], block_bytes: int | None = None):
        size = path.stat().st_size
        self.path, self.array, self._hashes = path, array, hashes
        self._block_bytes = block_bytes or size
        self._row_bytes = array.dtype.itemsize * math.prod(array.shape[1:])
        self._header_bytes = size - array.nbytes
        self._unread = [True] * len(hashes)
        if hashes and len(hashes) != -(-size // self._block_bytes):
            raise damaged(path)

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop. Raises ValueError if they are damaged. Several threads may read."""
        if len(self._hashes) and stop > start:
            first = (self._header_bytes + start * self._row_bytes) // self._block_bytes
            last = (self._header_bytes + stop * self._row_bytes - 1) // self._block_bytes
            for block in (0, *range(first, last + 1)):  # the header is in block 0
                if self._unread[block]:
                    self._compare(block)
        return self.array[start:stop]

    def _compare(self, block: int) -> None:
        found, left = hashlib.sha256(), self._block_bytes
        with open(self.path, "rb") as file:
            file.seek(block * self._block_bytes)
            while piece := file.read(min(left, PIECE_BYTES)):
                found.update(piece)
                left -= len(piece)
        if found.hexdigest() != self._hashes[block]:
            raise damaged(self.path)
        self._unread[block] = False


def damaged(path: Path) -> ValueError:
    """The error for a file of a finished artefact whose bytes have changed."""
    return ValueError(
        f"{path}: damaged: not the bytes that were written (SHA-256); restore the file, or remove "
        f"{path.parent} and make it again"
    )
