"""An open recording: its true length, and any part of it as the same samples that the part has in the whole.

libsndfile decodes; what it gets wrong is settled here. It believes lengths in headers (see `pretrain.data.decoding.containers`), reads the first of
several recordings that lie end to end, and seeks inexactly in MPEG audio (see `pretrain.data.decoding.mpeg`), in Opus, whose decoder never forgets
where it began, in ALAC whose table of packets is damaged, and in the last page of an Ogg Vorbis. GSM 6.10 and a few others cannot seek at all. Such formats are decoded from
their start. A thread keeps the decoder it used last, so that the parts of a long recording, read in order, are decoded once.
"""

import io
import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import soundfile

from pretrain.data.decoding import mpeg
from pretrain.data.decoding.containers import is_unknown, pieces
from pretrain.data.decoding.ogg import last_page_samples
from pretrain.data.decoding.spans import Member, Patch, Span

RATES = (
    1000,
    768_000,
)  # Hz, of recordings that are read: resampling makes 16,000 samples of each one at 1 Hz

_LAST = 1024  # samples: libsndfile gets the last 3 ms of an Opus wrong where a read begins there
_NO_LENGTH = (
    2**63 - 1
)  # frames that libsndfile gives for a flac whose writer could not go back to fill them in
_READ_AHEAD = 1 << 17  # bytes read from a tar at a time: half of ten seconds of flac
_HEADER = (
    1 << 14
)  # the same, for a header alone, of which flac's takes one such read, and mp3 and wav two or three


class Recording(Protocol):
    """Something to decode: `num_samples` of each channel at `sample_rate`."""

    sample_rate: int
    channels: int
    num_samples: int

    def blocks(self, start: int, count: int, most: int) -> Iterator[np.ndarray]:
        """Samples from `start`, `count` or as many as can be decoded, in blocks (samples, channels) float32.

        Blocks have `most` numbers at most, or what a decoder gives at once. Samples stored as integers are in [-1, 1).
        """
        ...


@contextmanager
def open_recording(
    path: str, member: Member | None, *, needed: int | None = None, header_only: bool = False
) -> Iterator[Recording]:
    """Open for reading; the reasons for which a recording cannot be read or decoded, as short ValueErrors without its name.

    Where `needed` samples are known to be there, the header is believed if it promises as many. With `header_only` a file is
    not read through to see whether others were appended to it.
    """
    place = _locate(path, member)
    try:
        with ExitStack() as opened:
            span = opened.enter_context(Span(*place))
            if mpeg.begins(span):
                yield _mpeg(span, place, header_only)
                return
            try:
                file = opened.enter_context(_opened(place, header_only))
            except (
                soundfile.LibsndfileError
            ):  # perhaps of what follows the first of several, or a length that is not known
                if not (parts := _found(place, header_only=True)):
                    raise
                yield _Joined(parts)
                return
            if file.format == "MP3":
                _require_plausible(file, place.size)
                yield _mpeg(span, place, header_only)
            elif (needed is None or not needed <= file.frames < _NO_LENGTH) and (
                parts := _found(place, header_only)
            ):
                yield _Joined(parts)
            else:
                _require_plausible(file, place.size)
                yield _Decoder(file, place)
    except soundfile.LibsndfileError as error:
        detail = error.error_string.rstrip(".") or f"decoder error {error.code}"
        raise ValueError(f"cannot be decoded ({detail}): damaged, truncated or not audio") from None


class _Place(NamedTuple):
    """Where a recording lies: the arguments of `Span`."""

    path: str
    offset: int
    size: int
    patches: tuple[Patch, ...] = ()


def _locate(path: str, member: Member | None) -> _Place:
    if not os.path.isfile(path):
        raise ValueError("no such file")
    size = os.path.getsize(path)
    if (size if member is None else member.size) == 0:
        raise ValueError("is empty (0 bytes)")
    if member is None:
        return _Place(path, 0, size)
    if min(member) < 0:
        raise ValueError(f"lies nowhere in the tar: {member.size} bytes from {member.offset}")
    if size < sum(member):
        raise ValueError(
            f"is truncated: {max(0, size - member.offset)} of {member.size} bytes are in the tar"
        )
    return _Place(path, *member)


@contextmanager
def _opened(place: _Place, header_only: bool = False) -> Iterator[soundfile.SoundFile]:
    with ExitStack() as opened:
        source: str | io.BufferedReader[Span] = place.path
        if place.offset or place.patches or place.size != os.path.getsize(place.path):
            source = opened.enter_context(
                io.BufferedReader(Span(*place), _HEADER if header_only else _READ_AHEAD)
            )
        file = opened.enter_context(soundfile.SoundFile(source))
        # libsndfile quietly shortens a WAV whose data chunk promises more than the file holds; its log has both numbers.
        cut = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
        if cut and int(cut[2]) < int(cut[1]) and not is_unknown(int(cut[1])):
            raise ValueError(f"is truncated: {cut[2]} of {cut[1]} bytes of samples")
        _require_rate(file.samplerate)
        yield file


def _require_rate(sample_rate: int) -> None:
    lowest, highest = RATES
    if not lowest <= sample_rate <= highest:
        raise ValueError(f"is at {sample_rate} Hz; {lowest} to {highest} are read")


def _require_plausible(file: soundfile.SoundFile, num_bytes: int) -> None:
    """Headers may claim anything, and every size that follows from them would be believed."""
    if file.frames > mpeg.DENSEST * num_bytes:
        raise ValueError(
            f"has a header that claims {file.frames} samples, more than its {num_bytes} bytes can hold"
        )


class _Decoder:
    """A recording by libsndfile."""

    def __init__(self, file: soundfile.SoundFile, place: _Place):
        self._file, self._place = file, place
        self.sample_rate: int = file.samplerate
        self.channels: int = file.channels
        self.num_samples: int = file.frames

    def blocks(self, start: int, count: int, most: int) -> Iterator[np.ndarray]:
        file, start = self._file, min(start, self.num_samples)
        count, most = min(count, self.num_samples - start), max(1, most // self.channels)
        if (
            file.seekable()
            and not (file.format == "OGG" and file.subtype != "VORBIS")
            and not file.subtype.startswith("ALAC")
        ):
            target = start
            if file.format == "OGG" and start:  # libsndfile seeks in the last page as if it were whole
                with Span(*self._place) as span:
                    target = max(0, min(start, self.num_samples - last_page_samples(span) - 1))
            try:
                if target != file.tell():
                    file.seek(target)
            except soundfile.LibsndfileError:  # some damage ends a search and not the decoder
                pass
            else:
                yield from _without_first(start - target, _read(file, start - target + count, most))
                return
        early = max(0, min(start, self.num_samples - _LAST))
        decoder = _sequential(self._place, early)
        yield from _without_first(start - early, decoder.blocks(early, start - early + count, most))


class _Mpeg:
    """A recording by `pretrain.data.decoding.mpeg`."""

    def __init__(self, span: Span, frames: mpeg.Frames):
        self._span, self._frames = span, frames
        self.sample_rate, self.channels = frames.kind.sample_rate, frames.kind.channels
        self.num_samples = frames.num_samples

    def blocks(self, start: int, count: int, most: int) -> Iterator[np.ndarray]:
        for block in mpeg.decode(self._span, self._frames, start, count):
            _require_finite(block)
            yield block


def _mpeg(span: Span, place: _Place, header_only: bool) -> _Mpeg:
    frames = (mpeg.promised(*place[:3]) if header_only else None) or mpeg.walk(*place[:3])
    if frames is None:
        raise ValueError("is MPEG audio of a free bit rate, whose length is not known; convert it")
    return _Mpeg(span, frames)


class _Part(NamedTuple):
    """One of the recordings in a file, and what its header says where there are several."""

    place: _Place
    num_samples: int
    sample_rate: int
    channels: int


def _found(place: _Place, header_only: bool) -> list[_Part]:
    """What is at `place` where it is not just what libsndfile finds there; nothing otherwise."""
    status = os.stat(place.path)
    parts = _parts(place, not header_only, status.st_mtime_ns, status.st_size)
    return [] if [part.place for part in parts] == [place] else parts


@lru_cache(maxsize=64)
def _parts(place: _Place, thorough: bool, *_: int) -> list[_Part]:
    """The recordings at `place`; the rest of the arguments distinguish one state of the file from another."""
    with Span(*place) as span:
        found = pieces(span, thorough=thorough)
    parts = []
    for piece in found:
        where = _Place(place.path, place.offset + piece.offset, piece.size, piece.patches)
        if where == place:
            return [_Part(where, 0, 0, 0)]
        with _opened(where) as file:
            _require_plausible(file, piece.size)
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
                with _opened(part.place) as file:
                    found = 0
                    for block in _Decoder(file, part.place).blocks(begin, end - begin, most):
                        found += len(block)
                        yield block
                if found < end - begin:  # what follows would come too early
                    return
            first += part.num_samples


def _without_first(count: int, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Blocks without their first `count` samples."""
    for block in blocks:
        left = block[count:]
        count = max(0, count - len(block))
        if len(left):
            yield left


def _read(file: soundfile.SoundFile, count: int, most: int) -> Iterator[np.ndarray]:
    """The next `count` samples, or as many as there are, in blocks of `most`: (samples, channels) float32."""
    while count > 0:
        wanted = count if count < most + _LAST else most
        if (
            file.subtype == "PCM_16"
        ):  # finite, and the same numbers as libsndfile's own floats, in half the time
            block = np.multiply(
                file.read(wanted, dtype="int16", always_2d=True), np.float32(1 / 32768), dtype=np.float32
            )
        else:
            block = file.read(wanted, dtype="float32", always_2d=True)
            _require_finite(block)
        yield block
        count = count - len(block) if len(block) == wanted else 0


def _require_finite(block: np.ndarray) -> None:
    if not np.isfinite(block).all():
        raise ValueError("holds NaN or infinite samples")


# Formats without seeking


_LOST = 2**63  # a position past any start: such a decoder is not used again


class _Sequential:
    """A decoder that only goes forward."""

    def __init__(self, place: _Place, key: tuple[object, ...]):
        self.key, self.position = key, 0
        self._opened = ExitStack()
        self._file = self._opened.enter_context(_opened(place))

    def blocks(self, start: int, count: int, most: int) -> Iterator[np.ndarray]:
        place, self.position = (
            self.position,
            _LOST,
        )  # until what is read is known: an error may come in between
        for wanted, given in ((start - place, False), (count, True)):
            for block in _read(self._file, wanted, most):
                place += len(block)
                if given:
                    self.position = place
                    yield block
                    self.position = _LOST
        self.position = place

    def close(self) -> None:
        self._opened.close()


class _Kept(threading.local):
    decoder: _Sequential | None = None


_kept = _Kept()


def _sequential(place: _Place, start: int) -> _Sequential:
    """The thread's decoder of that recording if it has not come past `start`, or a new one, which is kept in its place."""
    status = os.stat(place.path)
    key = (
        place,
        status.st_mtime_ns,
        status.st_size,
        os.getpid(),
    )  # a forked process must not move its parent's files
    if _kept.decoder is None or _kept.decoder.key != key or _kept.decoder.position > start:
        if _kept.decoder is not None:
            _kept.decoder.close()
            _kept.decoder = None
        _kept.decoder = _Sequential(place, key)
    return _kept.decoder
