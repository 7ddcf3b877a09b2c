"""Samples of one recording by libsndfile, from any position.

libsndfile seeks inexactly in Opus, in ALAC with a damaged table of packets and in the last page of an Ogg
Vorbis; it cannot seek in GSM 6.10 and a few other formats. `Decoder` decodes such recordings from an earlier
position. Each thread keeps the sequential decoder it used last, so a long recording whose parts are read in
order is decoded once.
"""

import io
import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import soundfile

from pretrain.data.decoding import mpeg
from pretrain.data.decoding.containers import is_unknown
from pretrain.data.decoding.ogg import last_page_samples
from pretrain.data.decoding.spans import Patch, Span

RATES = (1000, 768_000)  # Hz: resampling makes 16,000 samples of each one at 1 Hz

_LAST = 1024  # samples: libsndfile gets the last 3 ms of an Opus wrong where a read begins there
_READ_AHEAD = 1 << 17  # bytes read from a tar at a time: half of ten seconds of flac
_HEADER = 1 << 14  # the same for a header alone: one such read for flac, two or three for mp3 and wav


class Place(NamedTuple):
    """Where a recording lies: the arguments of `Span`."""

    path: str
    offset: int
    size: int
    patches: tuple[Patch, ...] = ()


@contextmanager
def open_file(place: Place, header_only: bool = False) -> Iterator[soundfile.SoundFile]:
    """Open one recording. Raises ValueError if it is truncated or its rate is outside `RATES`."""
    with ExitStack() as opened:
        source: str | io.BufferedReader[Span] = place.path
        if place.offset or place.patches or place.size != os.path.getsize(place.path):
            source = opened.enter_context(
                io.BufferedReader(Span(*place), _HEADER if header_only else _READ_AHEAD)
            )
        file = opened.enter_context(soundfile.SoundFile(source))
        # libsndfile quietly shortens a WAV whose data chunk promises more than the file holds; its log has
        # both numbers.
        cut = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
        if cut and int(cut[2]) < int(cut[1]) and not is_unknown(int(cut[1])):
            raise ValueError(f"is truncated: {cut[2]} of {cut[1]} bytes of samples")
        _require_rate(file.samplerate)
        yield file


def _require_rate(sample_rate: int) -> None:
    lowest, highest = RATES
    if not lowest <= sample_rate <= highest:
        raise ValueError(f"is at {sample_rate} Hz; {lowest} to {highest} are read")


def require_plausible(file: soundfile.SoundFile, num_bytes: int) -> None:
    """Headers may claim anything, and every size that follows from them would be believed."""
    if file.frames > mpeg.DENSEST * num_bytes:
        raise ValueError(
            f"has a header that claims {file.frames} samples, more than its {num_bytes} bytes can hold"
        )


class Decoder:
    """A recording by libsndfile."""

    def __init__(self, file: soundfile.SoundFile, place: Place):
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
        if file.subtype == "PCM_16":  # finite, and the same numbers as libsndfile's floats in half the time
            integers = file.read(wanted, dtype="int16", always_2d=True)
            block = np.multiply(integers, np.float32(1 / 32768), dtype=np.float32)
        else:
            block = file.read(wanted, dtype="float32", always_2d=True)
            require_finite(block)
        yield block
        count = count - len(block) if len(block) == wanted else 0


def require_finite(block: np.ndarray) -> None:
    """Raises ValueError if a sample is NaN or infinite."""
    if not np.isfinite(block).all():
        raise ValueError("holds NaN or infinite samples")


_LOST = 2**63  # a position past any start: such a decoder is not used again


class _Sequential:
    """A decoder that only goes forward."""

    def __init__(self, place: Place, key: tuple[object, ...]):
        self.key, self.position = key, 0
        self._opened = ExitStack()
        self._file = self._opened.enter_context(open_file(place))

    def blocks(self, start: int, count: int, most: int) -> Iterator[np.ndarray]:
        place = self.position
        self.position = _LOST  # until the read succeeds: an error may come in between
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


def _sequential(place: Place, start: int) -> _Sequential:
    """The thread's decoder of that recording if it has not come past `start`, or a new one, which is kept in
    its place."""
    status = os.stat(place.path)
    # A forked process must not move its parent's files.
    key = (place, status.st_mtime_ns, status.st_size, os.getpid())
    if _kept.decoder is None or _kept.decoder.key != key or _kept.decoder.position > start:
        if _kept.decoder is not None:
            _kept.decoder.close()
            _kept.decoder = None
        _kept.decoder = _Sequential(place, key)
    return _kept.decoder
