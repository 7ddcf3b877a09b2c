"""How long a recording truly is: what its container holds, where that is another length than its header
claims.

Headers are written before the samples and often stay wrong: streams written to a pipe, files appended to one
another, recorders that were switched off. libsndfile believes them and shortens the recording without a word.
`pieces` finds the recordings that lie end to end in a file, and corrects the lengths in their headers as they
are read. Formats: RIFF and RF64 (Microsoft, EBU Tech 3306), FLAC (RFC 9639), Ogg (RFC 3533, chained streams
section 4), Sun AU, AIFF and AIFF-C, NIST SPHERE, Sony Wave64 and Apple CAF. MPEG audio is in
`pretrain.data.decoding.mpeg`.
"""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

from pretrain.data.decoding import flac, ogg
from pretrain.data.decoding.spans import Patch, Span

_BLOCK = 1 << 20
# Chunks that programs write behind the samples of a WAV or AIFF. Others count where they end with the file.
_CHUNKS = set(
    b"LIST INFO JUNK PAD  FLLR bext cue  plst smpl inst acid fact PEAK iXML axml chna cart DISP id3  ID3  "
    b"_PMX aXML strc umid "
    b"minf elm1 regn SAUR NAME AUTH ANNO COMT MARK INST APPL MIDI (c)  afsp levl r64m".split(b" ")
) | {b"PAD ", b"cue ", b"id3 ", b"ID3 ", b"(c) "}
_LONGEST = 2**63 - 1  # in 64 bits, this and more mean that the writer could not know the length
_GSM = b"1\0"  # the format's number, 0x31
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")  # a player's tags at the end of a file


class Piece(NamedTuple):
    """A recording of `size` bytes from `offset`, once the `patches` lie over it."""

    offset: int
    size: int
    patches: tuple[Patch, ...] = ()


def is_unknown(size: int) -> bool:
    """Whether a 32-bit length means that the writer could not know it: 0, or (nearly) 2 or 4 GiB.

    sox writes 0x7FFFF000, ffmpeg 0xFFFFFFFF, others 0x7FFFFFFF, 0x80000000 or 0xFFFFFFFF less their header.
    """
    return size == 0 or 0x7FFFF000 <= size <= 0x80000000 or 0xFFFFF000 <= size <= 0xFFFFFFFF


def pieces(span: Span, *, thorough: bool) -> list[Piece]:
    """The recordings in `span`, in order, each with its true length.

    `thorough` reads Ogg and FLAC through, which finds recordings of one length that were appended to one
    another; otherwise their ends are read. A length that is wrong and cannot be corrected is a ValueError.
    """
    magic = span.at(0, 4)
    if (tag := span.tag_size(0)) and span.at(tag, 4) == b"fLaC":
        magic = b"fLaC"
    readers: dict[bytes, Callable[[Span, bool], list[Piece]]] = {
        b"RIFF": _riff,
        b"RIFX": _riff,
        b"RF64": _riff,
        b"BW64": _riff,
        b"OggS": _ogg,
        b"fLaC": _flac,
        b".snd": _au,
        b"FORM": _aiff,
        b"NIST": _sphere,
        b"riff": _wave64,
        b"caff": _caf,
    }
    return readers.get(magic, _as_it_is)(span, thorough)


def _as_it_is(span: Span, thorough: bool) -> list[Piece]:
    return [Piece(0, span.size)]


def _ogg(span: Span, thorough: bool) -> list[Piece]:
    return [Piece(start, end - start) for start, end in pairwise([*ogg.links(span, thorough), span.size])]


def _flac(span: Span, thorough: bool) -> list[Piece]:
    found = []
    for start, end in pairwise([*flac.streams(span, thorough), span.size]):
        patch = flac.correction(span, start, end)
        found.append(Piece(start, end - start, () if patch is None else (patch,)))
    return found


# RIFF and RF64


def _riff(span: Span, thorough: bool) -> list[Piece]:
    found, start = [], 0
    while start < span.size:
        piece, start = _riff_piece(span, start)
        found.append(piece)
    return found


def _riff_piece(span: Span, start: int) -> tuple[Piece, int]:
    """The WAV that begins at `start`, and where the next one does, or the end."""
    order: Literal["big", "little"] = "big" if span.at(start, 4) == b"RIFX" else "little"
    place, large, rest, align = start + 12, None, span.size - start, 1
    patches: tuple[Patch, ...] = ()
    while len(header := span.at(place, 8)) == 8:
        name, size = header[:4], int.from_bytes(header[4:], order)
        if name == b"ds64":
            large = place + 16
        if name == b"fmt " and span.at(place + 8, 2) == _GSM:
            align = int.from_bytes(span.at(place + 20, 2), order) or 1
        if name == b"data":
            break
        place += 8 + size + size % 2
    else:
        return Piece(start, rest), span.size  # no samples: libsndfile reports it
    data = place + 8
    if large is not None and size == 0xFFFFFFFF:
        size = int.from_bytes(span.at(large, 8), "little")
        patch_at, width = large, 8
    else:
        large, patch_at, width = None, place + 4, 4
    available = span.size - data
    end = None
    if size == 0 or (size < _LONGEST if large is not None else not is_unknown(size)):
        if size > available:
            raise ValueError(f"is truncated: {available} of {size} bytes of samples")
        end = _chunks_end(span, data + size + size % 2, order)
        if end is None and size % 2:  # some writers leave the padding out
            end = _chunks_end(span, data + size, order)
    if end is None:
        end, size = span.size, available
        patches = (_corrected(patch_at - start, size, width, order),)
    if align > 1:  # GSM: libsndfile takes the byte that makes an odd size even for a block of its own
        size -= size % align
        patches = (_corrected(patch_at - start, size - size % 2, width, order),)
        return Piece(start, data + size - start, patches), end
    return Piece(start, end - start, patches), end


def _corrected(place: int, size: int, width: int, order: Literal["big", "little"]) -> Patch:
    if size >= 256**width - 1:
        raise ValueError(
            f"has {size} bytes of samples, which its header cannot count; write it again as FLAC or RF64"
        )
    return Patch(place, size.to_bytes(width, order))


def _chunks_end(span: Span, place: int, order: Literal["big", "little"]) -> int | None:
    """Where the chunks and tags end that follow the samples of a RIFF or AIFF: at the next such file, or at
    the end of `span`.

    None where what follows are no chunks, and therefore samples that the header does not count.
    """
    first = place
    while place < span.size - 7:
        header = span.at(place, 8)
        name, size = header[:4], int.from_bytes(header[4:], order)
        if name in (b"RIFF", b"RIFX", b"RF64", b"FORM") and place > 12:
            return place
        if header.startswith(_TAGS) or (place == first and not _any(span, place)):
            return span.size
        after = place + 8 + size + size % 2
        if name not in _CHUNKS and not (
            all(0x20 <= letter < 0x7F for letter in name) and after <= span.size + 1
        ):
            return None
        place = after
    return span.size


def _any(span: Span, place: int) -> bool:
    """Whether there is anything but zeros, which pad files to the blocks of a disk."""
    return any(any(span.at(start, _BLOCK)) for start in range(place, span.size, _BLOCK))


# Other uncompressed formats: a header that is wrong is an error, since they are rare and none of their
# lengths lies in one place


def _au(span: Span, thorough: bool) -> list[Piece]:
    header = span.at(0, 12)
    data, size = int.from_bytes(header[4:8], "big"), int.from_bytes(header[8:12], "big")
    available = span.size - data
    if size != available and (size < available or is_unknown(size)):
        return [Piece(0, span.size, (_corrected(8, available, 4, "big"),))]
    return [Piece(0, span.size)]


def _aiff(span: Span, thorough: bool) -> list[Piece]:
    place, num_bytes = 12, None
    while len(header := span.at(place, 8)) == 8:
        name, size = header[:4], int.from_bytes(header[4:], "big")
        if name == b"COMM":
            about = span.at(place + 8, 22)
            plain = span.at(8, 4) == b"AIFF" or about[18:22] in (b"NONE", b"sowt", b"twos")
            channels, frames, bits = (int.from_bytes(about[a:b], "big") for a, b in ((0, 2), (2, 6), (6, 8)))
            num_bytes = channels * frames * -(-bits // 8) if plain else None
        if name == b"SSND":
            if num_bytes is not None:
                _require_claimed(num_bytes, size - 8)
            if (
                place + 8 + size <= span.size
                and _chunks_end(span, place + 8 + size + size % 2, "big") is None
            ):
                _require_claimed(size, span.size - place - 8)
            break
        place += 8 + size + size % 2
    return [Piece(0, span.size)]


def _sphere(span: Span, thorough: bool) -> list[Piece]:
    """NIST SPHERE: text of a length that its second line says, then samples up to the end."""
    first = re.match(rb"NIST_1A\n\s*(\d{1,8})\n", span.at(0, 24))
    if first:
        text = span.at(0, int(first[1]))
        values = [
            re.search(rb"\n%s -i (\d{1,15})" % name, text)
            for name in (b"sample_count", b"channel_count", b"sample_n_bytes")
        ]
        if all(values):
            count, channels, width = (int(value[1]) for value in values if value)
            _require_claimed(count * channels * width, span.size - int(first[1]))
    return [Piece(0, span.size)]


def _wave64(span: Span, thorough: bool) -> list[Piece]:
    """Chunks with a GUID of 16 bytes and a size of 8 that includes both, at multiples of 8."""
    for place, name, size in _long_chunks(span, 40, 16, "little"):
        if name[:4] == b"data" and size >= _LONGEST:
            return [Piece(0, span.size, (Patch(place + 16, (span.size - place).to_bytes(8, "little")),))]
        if name[:4] == b"data":
            _require_followed(span, place + size + -size % 8, size, span.size - place)
            break
    return [Piece(0, span.size)]


def _caf(span: Span, thorough: bool) -> list[Piece]:
    for place, name, size in _long_chunks(span, 8, 4, "big"):
        if name == b"data" and size >= _LONGEST:  # -1: up to the end
            return [Piece(0, span.size, (Patch(place + 4, (span.size - place - 12).to_bytes(8, "big")),))]
        if name == b"data":
            _require_followed(span, place + 12 + size, size, span.size - place - 12)
            break
    return [Piece(0, span.size)]


def _long_chunks(
    span: Span, place: int, width: int, order: Literal["big", "little"]
) -> Iterator[tuple[int, bytes, int]]:
    """(place, name, size) of chunks with a name of `width` bytes and a size of eight."""
    while len(header := span.at(place, width + 8)) == width + 8:
        size = int.from_bytes(header[width:], order)
        yield place, header[:width], size
        step = size + -size % 8 if width == 16 else 12 + size
        if step <= 0:
            return
        place += step


def _require_followed(span: Span, end: int, size: int, available: int) -> None:
    """ValueError unless what follows the samples begins like a chunk: with four letters."""
    name = span.at(end, 4)
    if len(name) == 4 and not all(0x20 <= letter < 0x7F for letter in name) and _any(span, end):
        _require_claimed(size, available)


def _require_claimed(claimed: int, available: int) -> None:
    if 0 < claimed < available - 8 and (available - claimed) * 1000 > available:
        raise ValueError(
            f"has a header that counts {claimed} of {available} bytes of samples; write it again, for "
            "example with sox"
        )
