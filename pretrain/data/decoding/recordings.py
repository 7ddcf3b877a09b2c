"""An open recording: its true length, and any part of it, with the same samples as in the whole.

`pretrain.data.decoding.libsndfile` decodes all formats but MPEG audio, which is decoded by
`pretrain.data.decoding.mpeg`. libsndfile trusts the lengths in headers and reads only the first of several
recordings that lie end to end; `pretrain.data.decoding.containers` finds the true lengths and all recordings.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import soundfile

from pretrain.data.decoding import mpeg
from pretrain.data.decoding.containers import pieces
from pretrain.data.decoding.libsndfile import Decoder, Place, open_file, require_finite, require_plausible
from pretrain.data.decoding.spans import Member, Span

_NO_LENGTH = 2**63 - 1  # frames that libsndfile gives for a flac whose writer could not fill them in


class Recording(Protocol):
    """Something to decode: `num_samples` of each channel at `sample_rate`."""

    sample_rate: int
    channels: int
    num_samples: int

    def blocks(self, start: int, count: int, most: int) -> Iterator[np.ndarray]:
        """Samples from `start`, `count` or as many as can be decoded, in blocks (samples, channels) float32.

        Blocks have `most` numbers at most, or what a decoder gives at once. Samples stored as integers are in
        [-1, 1).
        """
        ...


@contextmanager
def open_recording(
    path: str, member: Member | None, *, needed: int | None = None, header_only: bool = False
) -> Iterator[Recording]:
    """Open for reading; the reasons for which a recording cannot be read or decoded, as short ValueErrors
    without its name.

    Where `needed` samples are known to be there, the header is believed if it promises as many. With
    `header_only` a file is not read through to see whether others were appended to it.
    """
    place = _locate(path, member)
    try:
        with ExitStack() as opened:
            span = opened.enter_context(Span(*place))
            if mpeg.begins(span):
                yield _mpeg(span, place, header_only)
                return
            try:
                file = opened.enter_context(open_file(place, header_only))
            except soundfile.LibsndfileError:
                # perhaps of what follows the first of several, or a length that is not known
                if not (parts := _found(place, header_only=True)):
                    raise
                yield _Joined(parts)
                return
            if file.format == "MP3":
                require_plausible(file, place.size)
                yield _mpeg(span, place, header_only)
            elif (needed is None or not needed <= file.frames < _NO_LENGTH) and (
                parts := _found(place, header_only)
            ):
                yield _Joined(parts)
            else:
                require_plausible(file, place.size)
                yield Decoder(file, place)
    except soundfile.LibsndfileError as error:
        detail = error.error_string.rstrip(".") or f"decoder error {error.code}"
        raise ValueError(f"cannot be decoded ({detail}): damaged, truncated or not audio") from None


def _locate(path: str, member: Member | None) -> Place:
    if not os.path.isfile(path):
        raise ValueError("no such file")
    size = os.path.getsize(path)
    if (size if member is None else member.size) == 0:
        raise ValueError("is empty (0 bytes)")
    if member is None:
        return Place(path, 0, size)
    if min(member) < 0:
        raise ValueError(f"lies nowhere in the tar: {member.size} bytes from {member.offset}")
    if size < sum(member):
        raise ValueError(
            f"is truncated: {max(0, size - member.offset)} of {member.size} bytes are in the tar"
        )
    return Place(path, *member)


class _Mpeg:
    """A recording by `pretrain.data.decoding.mpeg`."""

    def __init__(self, span: Span, frames: mpeg.Frames):
        self._span, self._frames = span, frames
        self.sample_rate, self.channels = frames.kind.sample_rate, frames.kind.channels
        self.num_samples = frames.num_samples

    def blocks(self, start: int, count: int, most: int) -> Iterator[np.ndarray]:
        for block in mpeg.decode(self._span, self._frames, start, count):
            require_finite(block)
            yield block


def _mpeg(span: Span, place: Place, header_only: bool) -> _Mpeg:
    frames = (mpeg.promised(*place[:3]) if header_only else None) or mpeg.walk(*place[:3])
    if frames is None:
        raise ValueError("is MPEG audio of a free bit rate, whose length is not known; convert it")
    return _Mpeg(span, frames)


class _Part(NamedTuple):
    """One of the recordings in a file, and what its header says where there are several."""

    place: Place
    num_samples: int
    sample_rate: int
    channels: int


def _found(place: Place, header_only: bool) -> list[_Part]:
    """What is at `place` where it is not just what libsndfile finds there; nothing otherwise."""
    status = os.stat(place.path)
    parts = _parts(place, not header_only, status.st_mtime_ns, status.st_size)
    return [] if [part.place for part in parts] == [place] else parts


@lru_cache(maxsize=64)
def _parts(place: Place, thorough: bool, *_: int) -> list[_Part]:
    """The recordings at `place`; the rest of the arguments distinguish one state of the file from another."""
    with Span(*place) as span:
        found = pieces(span, thorough=thorough)
    parts = []
    for piece in found:
        where = Place(place.path, place.offset + piece.offset, piece.size, piece.patches)
        if where == place:
            return [_Part(where, 0, 0, 0)]
        with open_file(where) as file:
            require_plausible(file, piece.size)
            parts.append(_Part(where, file.frames, file.samplerate, file.channels))
        if parts[-1][2:] != parts[0][2:]:
            rates, channels = zip(*(part[2:] for part in (parts[0], parts[-1])), strict=True)
            what = (
                f"{rates[0]} to {rates[1]} Hz"
                if rates[0] != rates[1]
                else f"{channels[0]} to {channels[1]} channels"
            )
            raise ValueError(f"changes from {what} at byte {piece.offset}; split it there")
    return parts


class _Joined:
    """Recordings that lie end to end, or one with a corrected header."""

    def __init__(self, parts: list[_Part]):
        self._parts = parts
        _, _, self.sample_rate, self.channels = parts[0]
        self.num_samples = sum(part.num_samples for part in parts)

    def blocks(self, start: int, count: int, most: int) -> Iterator[np.ndarray]:
        first = 0
        for part in self._parts:
            begin, end = max(0, start - first), min(part.num_samples, start + count - first)
            if begin < end:
                with open_file(part.place) as file:
                    found = 0
                    for block in Decoder(file, part.place).blocks(begin, end - begin, most):
                        found += len(block)
                        yield block
                if found < end - begin:  # what follows would come too early
                    return
            first += part.num_samples
