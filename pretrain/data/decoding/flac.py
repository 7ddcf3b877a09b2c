"""FLAC (RFC 9639): where several lie end to end in a file, and how long each is by its last frame."""

import re

from pretrain.data.decoding.checksums import crc
from pretrain.data.decoding.spans import Patch, Span

# the magic and the header of STREAMINFO, which must come first
_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
_TOTAL, _TOTAL_BITS = 18, 2**36 - 1  # the number of samples is the end of the eight bytes there
_TAIL = 1 << 17  # bytes searched for the last frame where the header has no size of the largest
_MOST = 1 << 20  # the same, whatever it has


def streams(span: Span, thorough: bool) -> list[int]:
    """Where each FLAC begins, of several that were appended to one another; without `thorough`, only if the
    last one differs in length."""
    starts = [span.tag_size(0)]
    if thorough or end_of(span, starts[0], span.size) not in (None, total(span, starts[0])):
        place = starts[0]
        while (place := _next(span, place + 4)) < span.size:
            starts.append(place)
    return starts


def _next(span: Span, place: int) -> int:
    while (place := span.find(b"fLaC", place)) < span.size:
        if _START.match(span.at(place, 8)):
            return place
        place += 4
    return place


def total(span: Span, start: int) -> int:
    """Samples, as the header has them; 0 where its writer did not know."""
    return int.from_bytes(span.at(start + _TOTAL, 8), "big") & _TOTAL_BITS


def correction(span: Span, start: int, end: int) -> Patch | None:
    """The length that the header of the FLAC in these bytes should have, where it has less or none."""
    claimed, found = total(span, start), end_of(span, start, end)
    if found is None and claimed == 0:
        raise ValueError(
            "does not say how long it is, and its last frame is damaged; write it again to a file"
        )
    if found is None or found <= claimed:
        return None
    about = int.from_bytes(span.at(start + _TOTAL, 8), "big") & ~_TOTAL_BITS | found
    return Patch(_TOTAL, about.to_bytes(8, "big"))


def end_of(span: Span, start: int, end: int) -> int | None:
    """Samples up to the end of the last frame, whose checksum holds to the end of the file; None where there
    is no such frame."""
    shortest = int.from_bytes(span.at(start + 8, 2), "big")
    largest = int.from_bytes(span.at(start + 15, 3), "big") or _TAIL
    if span.at(end - 128, 3) == b"TAG":
        end -= 128
    first = max(start, end - min(largest + 64, _MOST))
    tail = span.at(first, end - first)
    view, place = memoryview(tail), len(tail)
    while (place := tail.rfind(b"\xff", 0, place)) >= 0:
        if (
            tail[place + 1 : place + 2] in (b"\xf8", b"\xf9")
            and (found := _frame_end(view[place:], shortest)) is not None
        ):
            return found
    return None


_SIZES = (
    0,
    192,
    *(576 << n for n in range(4)),
    0,
    0,
    *(256 << n for n in range(8)),
)  # samples in a frame, by their code


def _frame_end(data: memoryview, block_size: int) -> int | None:
    """The sample at which the frame `data` ends (RFC 9639 section 9.1); None unless both of its checksums
    hold."""
    if len(data) < 8:
        return None
    code, length = data[2] >> 4, 4
    ones = 8 - (~data[4] & 0xFF).bit_length()  # as in UTF-8: so many bytes, or one without any
    number, length = (data[4] & 0x7F >> ones if ones else data[4]), length + max(1, ones)
    for byte in data[5:length]:
        number = number << 6 | byte & 0x3F
    extra = {6: 1, 7: 2}.get(code, 0)
    size = int.from_bytes(data[length : length + extra], "big") + 1 if extra else _SIZES[code]
    length += extra + {12: 1, 13: 2, 14: 2}.get(data[2] & 15, 0)
    if (
        size == 0
        or len(data) <= length
        or crc(data[:length], 0x07, 8) != data[length]
        or crc(data, 0x8005, 16)
    ):
        return None
    return (number if data[1] & 1 else number * block_size) + size
