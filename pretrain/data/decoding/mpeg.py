"""MPEG audio (ISO 11172-3 and 13818-3), of which layer III is decoded so that a part is the same samples as
in the whole, to the bit.

A frame may use bytes of frames before it (the bit reservoir), and the decoder carries its last block over; a
decoder that starts in the middle therefore gets the first samples wrong, and libsndfile's estimate of the
length is off by half where the bit rate varies and no Xing header counts the frames. So the frames are
walked, and decoded in blocks of BLOCK_FRAMES: every block by a decoder of its own, from a stream made for it.
That stream starts early enough to fill the reservoir, with frames whose side information is emptied (they
decode to silence and cannot fail), at a multiple of PERIOD frames, after which the decoder's sums are in the
same order again. So a block comes out as it does when the whole file is decoded at once, and never depends on
what was asked for before.
"""

import io
import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import soundfile

from pretrain.data.decoding.checksums import crc
from pretrain.data.decoding.mpeg_header import SYNC, Kind, parse_header
from pretrain.data.decoding.spans import Span

BLOCK_FRAMES = 256  # 6.7 s at 44.1 kHz: what decoding one sample costs, and 15 frames more
PERIOD = 8  # frames of 18 or 36 vectors of the synthesis filter, whose buffer has 16 places
DECODER_DELAY = 529  # samples; libmpg123 leaves them out at the start of any stream with an Info header
# Samples in a byte: more than in flac's emptiest frames (65,535 in 12 bytes) and in any lossy format.
DENSEST = 8192
_RESERVOIR = 512  # bytes, the most that a frame may refer back to: 511 (MPEG 1) or 255
_SETTLING = 2  # frames until the overlap and the synthesis filter hold what they would
_READ = 1 << 20
_ID3V1 = 128  # bytes of a tag at the end


class Frames(NamedTuple):
    """The frames of a stream: where they lie, (num_frames,) int64, how long they are, int32, and which
    samples are the recording."""

    kind: Kind
    places: np.ndarray
    sizes: np.ndarray
    first: int  # sample of the recording's start, counted from the first frame's
    num_samples: int


def begins(span: Span) -> bool:
    """Whether a file begins with frames, behind tags: what libsndfile need not be asked about. It warns of
    many on stderr."""
    place = 0
    while tag := span.tag_size(place):
        place += tag
    parsed = parse_header(span.at(place, 4))
    return parsed is not None and place + parsed[1] < span.size and _confirmed(span, place)


def walk(path: str, offset: int, size: int) -> Frames | None:
    """The frames of the MPEG stream in `size` bytes from `offset` of a file; None where there are none, or of
    a free bit rate.

    Raises ValueError where frames are missing that a Xing header counts, or the sample rate or the number of
    channels changes.
    """
    status = os.stat(path)
    return _walk(path, offset, size, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)
def _walk(path: str, offset: int, size: int, *_: int) -> Frames | None:
    with Span(path, offset, size) as span:
        found = list(_frames(span))
        if not found:
            return None
        places, sizes = (
            np.array(column, dtype)
            for column, dtype in zip(zip(*found, strict=True), (np.int64, np.int32), strict=True)
        )
        parsed = parse_header(span.at(int(places[0]), 4))
        assert parsed is not None
        kind = parsed[0]
        info = _xing(span.at(int(places[0]), int(sizes[0])), kind)
    if info is None:
        return Frames(kind, places, sizes, 0, len(places) * kind.samples)
    places, sizes = places[1:], sizes[1:]
    num_samples = len(places) * kind.samples
    if info.num_frames is None:
        return Frames(kind, places, sizes, 0, num_samples)
    if info.num_frames * kind.samples > DENSEST * size:
        raise ValueError(
            f"has a header that claims {info.num_frames * kind.samples} samples, more than its {size} bytes "
            "can hold"
        )
    if info.num_frames > len(places) + 1:  # some count the header's own frame
        raise ValueError(f"is truncated: {num_samples} of {info.num_frames * kind.samples} samples")
    return Frames(kind, places, sizes, *info.trimmed(num_samples, is_whole=info.num_frames >= len(places)))


def promised(path: str, offset: int, size: int) -> Frames | None:
    """What `walk` would find, without the frames, where a Xing header counts as many bytes as there are; None
    otherwise."""
    with Span(path, offset, size) as span:
        place = next((place for place, _ in _frames(span, 1 << 12)), None)
        if place is None:
            return None
        parsed = parse_header(span.at(place, 4))
        assert parsed is not None
        kind, length = parsed
        info = _xing(span.at(place, length), kind)
        if info is None or info.num_frames is None or not 0 <= size - place - info.num_bytes <= _ID3V1:
            return None
        nothing = np.zeros(0, np.int64)
        return Frames(kind, nothing, nothing, *info.trimmed(info.num_frames * kind.samples, is_whole=True))


def _frames(span: Span, ahead: int = _READ) -> Iterator[tuple[int, int]]:
    """(place, size) of every whole frame, reading so many bytes ahead. Between frames, tags and damage are
    left out."""
    place, kind = 0, None
    buffer, start = b"", 0
    while place < span.size - 3:
        if not start <= place <= start + len(buffer) - 4:
            buffer, start = span.at(place, ahead), place
        parsed = parse_header(buffer[place - start : place - start + 4])
        if parsed is not None and (kind is None or parsed[0] != kind) and not _confirmed(span, place):
            parsed = None
        if parsed is None:
            place = _resume(span, place)
            continue
        if kind is not None and parsed[0] != kind:
            raise ValueError(
                f"changes from {kind} to {parsed[0]} at byte {place}; split it there, or convert it"
            )
        kind = parsed[0]
        if place + parsed[1] > span.size:
            return  # the last frame is cut off
        yield place, parsed[1]
        place += parsed[1]


def _confirmed(span: Span, place: int) -> bool:
    """Whether a frame at `place` is followed by another of its kind, or ends the file: four bytes alone look
    like a header by chance."""
    parsed = parse_header(span.at(place, 4))
    if parsed is None:
        return False
    after = place + parsed[1]
    following = span.at(after, 4)
    if len(following) < 4 or following.startswith((b"TAG", b"ID3", b"APET", b"LYRI")):
        return True
    second = parse_header(following)
    return second is not None and second[0] == parsed[0]


def _resume(span: Span, place: int) -> int:
    """Where the next frame may begin after what is none: behind a tag, or at a sync word that another frame
    follows."""
    data = span.at(place, 32)
    if tag := span.tag_size(place):
        return place + tag
    if data.startswith(b"TAG"):
        return place + _ID3V1
    if data.startswith(b"APETAGEX"):  # its size counts all but the header that is here
        return place + 32 + int.from_bytes(data[12:16], "little")
    place += 1
    while len(data := span.at(place, _READ)) > 3:
        for match in SYNC.finditer(data):
            if _confirmed(span, place + match.start()):
                return place + match.start()
        place += len(data) - 1
    return span.size


class _Info(NamedTuple):
    """A Xing or Info header: what follows it, and the samples that LAME put before and behind the
    recording."""

    num_frames: int | None
    num_bytes: int
    delay: int
    padding: int

    def trimmed(self, num_samples: int, *, is_whole: bool) -> tuple[int, int]:
        """(first sample, samples) of the recording; where other frames follow those that are counted, the
        padding is not the end's."""
        first = min(num_samples, self.delay + DECODER_DELAY)
        last = min(num_samples, num_samples - self.padding + DECODER_DELAY) if is_whole else num_samples
        return first, max(0, last - first)


def _xing(frame: bytes, kind: Kind) -> _Info | None:
    """The header that a frame is in place of sound; None of any other frame."""
    place = 4 + kind.side
    if kind.layer != 3 or frame[place : place + 4] not in (b"Xing", b"Info"):
        return None
    flags, place = int.from_bytes(frame[place + 4 : place + 8], "big"), place + 8
    num_frames, num_bytes = None, 0
    if flags & 1:
        num_frames, place = int.from_bytes(frame[place : place + 4], "big"), place + 4
    if flags & 2:
        num_bytes, place = int.from_bytes(frame[place : place + 4], "big"), place + 4
    place += 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    if place + 24 > len(frame) or not frame[place]:  # no tag of LAME's
        return _Info(num_frames, num_bytes, 0, 0)
    delays = int.from_bytes(frame[place + 21 : place + 24], "big")
    return _Info(num_frames, num_bytes, delays >> 12, delays & 0xFFF)


def decode(span: Span, frames: Frames, start: int, count: int) -> Iterator[np.ndarray]:
    """Samples `start` to `start + count` of the recording, block by block, (samples, channels) float32."""
    first, last = frames.first + start, frames.first + min(start + count, frames.num_samples)
    block = BLOCK_FRAMES * frames.kind.samples
    for number in range(first // block, -(-last // block)):
        decoded = _decode_block(span, frames, number * BLOCK_FRAMES)
        yield decoded[max(0, first - number * block) : last - number * block]


def _decode_block(span: Span, frames: Frames, wanted: int) -> np.ndarray:
    """Frames `wanted` to `wanted + BLOCK_FRAMES`, (samples, channels) float32."""
    end, kind = min(wanted + BLOCK_FRAMES, len(frames.places)), frames.kind
    begin = sounding = max(0, wanted - _SETTLING)
    filled = 0
    while begin > 0 and (filled < _RESERVOIR or begin % PERIOD):
        begin -= 1
        filled += int(frames.sizes[begin]) - 6 - kind.side
    if kind.layer == 3:
        before = [_info(span, frames, PERIOD + end - begin), *[_silent(span, frames)] * PERIOD]
        before += [_emptied(_frame(span, frames, number), kind) for number in range(begin, sounding)]
        skipped = (PERIOD + wanted - begin) * kind.samples - DECODER_DELAY
        stream = [*before, *_bodies(span, frames, sounding, end)]
    else:  # no reservoir, and no header that counts: libsndfile estimates the length from the bytes
        skipped = (wanted - begin) * kind.samples
        stream = [
            *_bodies(span, frames, begin, end),
            *[_silent(span, frames)] * (PERIOD + (end - begin) // 8),
        ]
    num_samples = (end - wanted) * kind.samples
    with soundfile.SoundFile(io.BytesIO(b"".join(stream))) as file:
        file.read(skipped, dtype="float32")
        decoded: np.ndarray = file.read(num_samples, dtype="float32", always_2d=True)
    if len(decoded) < num_samples:  # the decoder stops at some damage
        raise ValueError(
            f"is damaged: {len(decoded)} of {num_samples} samples can be decoded from frame {wanted} on"
        )
    return decoded


def _bodies(span: Span, frames: Frames, first: int, last: int) -> Iterator[bytes]:
    """The bytes of frames, with one read where they lie end to end."""
    places, sizes = frames.places[first:last], frames.sizes[first:last]
    gaps = np.flatnonzero(places[1:] != places[:-1] + sizes[:-1]) + 1
    for begin, end in pairwise([0, *gaps.tolist(), len(places)]):
        if begin < end:
            yield span.at(int(places[begin]), int(places[end - 1] + sizes[end - 1] - places[begin]))


def _frame(span: Span, frames: Frames, number: int) -> bytes:
    return span.at(int(frames.places[number]), int(frames.sizes[number]))


def _emptied(frame: bytes, kind: Kind) -> bytes:
    """A frame that decodes to silence: its side information counts no bits. Where its data begins, and the
    data itself, stay."""
    emptied, protected = bytearray(frame), not frame[1] & 1
    place, begins = 4 + 2 * protected, 9 if kind.version == 3 else 8  # bits that say where the data begins
    about = int.from_bytes(frame[place : place + kind.side], "big")
    emptied[place : place + kind.side] = (about >> 8 * kind.side - begins << 8 * kind.side - begins).to_bytes(
        kind.side, "big"
    )
    if protected:  # CRC-16 over the second half of the header and the side information
        emptied[4:6] = crc(bytes(emptied[2:4] + emptied[6 : 6 + kind.side]), 0x8005, 16, 0xFFFF).to_bytes(
            2, "big"
        )
    return bytes(emptied)


def _silent(span: Span, frames: Frames) -> bytes:
    """A frame of nothing, of the stream's kind."""
    header = bytearray(span.at(int(frames.places[0]), 4))
    header[1] |= 1  # no checksum
    return bytes(header) + bytes(int(frames.sizes[0]) - 4)


def _info(span: Span, frames: Frames, count: int) -> bytes:
    """An Info header that counts `count` frames, from which libsndfile takes the length."""
    header = bytearray(span.at(int(frames.places[0]), 4))
    header[1] |= 1
    size = choice = 0
    while size < 4 + frames.kind.side + 60:  # the smallest frame that it fits in
        choice += 1
        header[2] = choice << 4 | header[2] & 0x0C
        parsed = parse_header(bytes(header))
        assert parsed is not None
        size = parsed[1]
    about = b"Info" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    return (bytes(header) + bytes(frames.kind.side) + about).ljust(size, b"\0")
