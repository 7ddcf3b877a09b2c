"""A run of bytes of a file as a file of its own: a recording in a tar, or one of several that were written
end to end."""

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


_BLOCK = 1 << 20  # bytes searched at a time


class Member(NamedTuple):
    """Where a recording lies in an uncompressed tar, in bytes."""

    offset: int
    size: int


class Patch(NamedTuple):
    """Bytes to read in place of those at `place`, such as the length in a header that is wrong."""

    place: int
    data: bytes


class Span(io.RawIOBase):
    """`size` bytes from `offset` of the file at `path`: nothing before or behind them can be read."""

    def __init__(self, path: str, offset: int, size: int, patches: Sequence[Patch] = ()):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by close()
        self.path, self.offset, self.size = path, offset, size
        self._patches, self._position = tuple(patches), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self.size)[whence])
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)[: max(0, self.size - self._position)]
        count = os.preadv(self._file.fileno(), [view], self.offset + self._position)
        for place, data in self._patches:
            first, last = max(place, self._position), min(place + len(data), self._position + count)
            if first < last:
                view[first - self._position : last - self._position] = data[first - place : last - place]
        self._position += count
        return count

    def at(self, place: int, count: int) -> bytes:
        """The bytes from `place`, `count` or as many as there are; the position for reading stays."""
        place = max(0, place)
        if place >= self.size:  # wherever a header's lengths lead
            return b""
        return os.pread(self._file.fileno(), max(0, min(count, self.size - place)), self.offset + place)

    def find(self, what: bytes, place: int) -> int:
        """Where `what` begins next, from `place` on, or the end."""
        while place < self.size:
            data = self.at(place, _BLOCK)
            if (found := data.find(what)) >= 0:
                return place + found
            if len(data) < _BLOCK:
                break
            place += len(data) - len(what) + 1
        return self.size

    def tag_size(self, place: int) -> int:
        """Bytes of the ID3v2 tag at `place`, 0 where there is none."""
        header = self.at(place, 10)
        if header[:3] != b"ID3" or len(header) < 10:
            return 0
        return 10 + (header[6] << 21 | header[7] << 14 | header[8] << 7 | header[9])

    def close(self) -> None:
        self._file.close()
        super().close()
