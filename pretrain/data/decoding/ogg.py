"""Ogg (RFC 3533): where the streams lie that are chained in a file, and how much the last page holds.

Offsets in a page: flags at 5 (2: the first page of a stream), granule position at 6 (samples up to its end),
serial number at 14.
"""

from collections.abc import Iterator

from pretrain.data.decoding.spans import Span

_TAIL = 1 << 17  # bytes: two pages of the largest size
_NO_END = 2**64 - 1  # granule position of a page in which no packet ends


def links(span: Span, thorough: bool) -> list[int]:
    """Where each of the chained streams begins (section 4). Without `thorough`, streams of one serial number
    count as one.

    Raises ValueError where a stream's last page ends before an earlier one.
    """
    tail = _last_pages(span)
    if not thorough and tail and tail[-1][2] == int.from_bytes(span.at(14, 4), "little"):
        return [0]
    starts, was_first, highest, last = [0], True, 0, 0
    for place, flags, granule, _ in _pages(span):
        is_first = bool(flags & 2)
        if is_first and not was_first:
            _require_ascending(last, highest)
            starts.append(place)
            highest = 0
        was_first = is_first
        if granule != _NO_END:
            last, highest = granule, max(highest, granule)
    _require_ascending(last, highest)
    return starts


def _require_ascending(last: int, highest: int) -> None:
    if last < highest:
        raise ValueError(f"is a damaged Ogg: its last page ends at sample {last}, one before it at {highest}")


def _pages(span: Span) -> Iterator[tuple[int, int, int, int]]:
    """(place, flags, granule position, serial number) of each page."""
    place, start, buffer = 0, 0, b""
    while place < span.size - 26:
        if not start <= place <= start + len(buffer) - 282:  # the longest header
            start, buffer = place, span.at(place, _TAIL)
        header = buffer[place - start : place - start + 282]
        if not header.startswith(b"OggS"):
            place = span.find(b"OggS", place + 1)
            continue
        yield (
            place,
            header[5],
            int.from_bytes(header[6:14], "little"),
            int.from_bytes(header[14:18], "little"),
        )
        place += 27 + header[26] + sum(header[27 : 27 + header[26]])


def _last_pages(span: Span, num_bytes: int = _TAIL) -> list[tuple[int, int, int]]:
    """(flags, granule position, serial number) of the pages that begin in the last bytes, the last one
    last."""
    tail = span.at(span.size - num_bytes, num_bytes)
    found: list[tuple[int, int, int]] = []
    place = tail.rfind(b"OggS")
    while place >= 0 and len(found) < 16:
        header = tail[place : place + 27]
        if len(header) == 27 and header[4] == 0:
            found.append(
                (header[5], int.from_bytes(header[6:14], "little"), int.from_bytes(header[14:18], "little"))
            )
        place = tail.rfind(b"OggS", 0, place)
    return found[::-1]


def last_page_samples(span: Span) -> int:
    """Samples of the last Ogg page with an end, at most: from the end of the one before."""
    for num_bytes in (_TAIL // 16, _TAIL):  # most pages have some 4 kB
        ends = [granule for _, granule, _ in _last_pages(span, num_bytes) if granule != _NO_END]
        if len(ends) > 1:
            return max(0, ends[-1] - ends[-2])
    return 2**62
