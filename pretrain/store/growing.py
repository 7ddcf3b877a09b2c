"""Files that grow, and survive a kill: what lies behind the recorded end is dropped when they are opened
again."""

import io
import math
import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Self

import numpy as np

from pretrain.store.disk import telling_full_disk


class GrowingFile:
    """A file that grows at its end. `size` bytes of an existing one are kept. Raises DiskFull if the disk is
    full."""

    def __init__(self, path: Path, size: int = 0):
        self.name, self.path, self.size = path.name, path, size
        with telling_full_disk(path, size):
            self._file = open(path, "r+b" if size else "wb")  # noqa: SIM115  # closed by __exit__
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)

    def write(self, content: bytes) -> None:
        self.size += len(content)
        try:
            self._file.write(content)
        except OSError:
            with telling_full_disk(self.path, self.size):
                raise

    def make_safe(self) -> None:
        """Flushes everything to the disk."""
        with telling_full_disk(self.path, self.size):
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with nullcontext() if kind is None else suppress(OSError):  # a full disk has been reported
            self._file.close()


class GrowingNpy(GrowingFile):
    """A `.npy` array that grows along its first axis. `count` rows of an existing file are kept."""

    def __init__(self, path: Path, dtype: str, columns: tuple[int, ...] = (), count: int = 0):
        self.dtype, self.columns, self.count = np.dtype(dtype), columns, count
        super().__init__(path, 128 + count * self.dtype.itemsize * math.prod(columns) if count else 0)
        if not count:
            self.write(self._header())

    def append(self, values: np.ndarray) -> None:
        self.write(values.astype(self.dtype, copy=False).tobytes())
        self.count += len(values)

    def finish(self) -> None:
        """Writes the true length into the header, which numpy pads so that the first axis can grow in
        place."""
        self.make_safe()
        self._file.seek(0)
        self._file.write(self._header())
        self.make_safe()

    def _header(self) -> bytes:
        buffer = io.BytesIO()
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count, *self.columns)}
        np.lib.format.write_array_header_1_0(buffer, header)
        assert buffer.tell() == 128
        return buffer.getvalue()
