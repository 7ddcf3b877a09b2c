"""SentencePiece models of characters, fairseq2's `char_tokenizer`: which text each class is, read and written
without the library.

The file is a protocol buffer (github.com/google/sentencepiece, src/sentencepiece_model.proto): pieces with a
type each, in the order of their numbers, what they were trained as, and how text is normalised. The space is
`▁`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SPACE_PIECE = "\u2581"
NORMAL, UNKNOWN, CONTROL = 1, 2, 3
CHARACTERS = 4  # the kind of model
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # how a field is written


class Pieces(NamedTuple):
    """The pieces of a model by number, with the type of each, and whether the model is one of characters."""

    names: list[str]
    types: list[int]
    of_characters: bool


def read_pieces(path: Path) -> Pieces:
    """The pieces of a SentencePiece model; ValueError that names the file for what is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: not a readable SentencePiece model ({error.strerror})") from None
    names, types, kind = [], [], 1  # unigram, where nothing is said
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                name = piece.get(1, b"")
                names.append(name.decode() if isinstance(name, bytes) else "")
                types.append(_number(piece.get(3, NORMAL)))
            elif number == 2 and isinstance(value, bytes):
                kind = _number(dict(_fields(value)).get(3, kind))
    except (ValueError, IndexError):
        raise ValueError(f"{path}: not a SentencePiece model (or a damaged one)") from None
    if not names or "" in names:
        raise ValueError(
            f"{path}: not a SentencePiece model: it has no pieces"
            if not names
            else f"{path}: has a piece without a name"
        )
    return Pieces(names, types, kind == CHARACTERS)


def write_pieces(path: Path, blank: str, symbols: Sequence[str], unknown: str) -> None:
    """A model of characters: `blank`, then `symbols` with the space as `▁`. `unknown`, one of `symbols` or
    after them, is for all others.

    Nothing is normalised but spaces: each is one, and none is before the first word.
    """
    names = [blank, *symbols]
    names += [unknown] if unknown not in names else []
    place = names.index(unknown)
    whole = b""
    for number, name in enumerate(names):
        type_ = CONTROL if number == 0 or (name.startswith("<") and len(name) > 1) else NORMAL
        piece = (
            _text(1, name) + _tag(2, FIXED32) + bytes(4) + _integer(3, UNKNOWN if number == place else type_)
        )
        whole += _bytes(1, piece)
    ends = {
        number: names.index(name) if name in names else -1 for number, name in ((41, "<s>"), (42, "</s>"))
    }
    trained = _integer(3, CHARACTERS) + _integer(4, len(names)) + _integer(40, place)
    trained += b"".join(_integer(number, where) for number, where in ends.items()) + _integer(43, 0)
    trained += _text(45, unknown) + _text(48, blank)
    normalised = _text(1, "identity") + _integer(3, 0) + _integer(4, 1) + _integer(5, 1)
    path.write_bytes(whole + _bytes(2, trained) + _bytes(3, normalised))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Each field of a message: its number, and a number or the bytes that it holds."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        if kind not in (FIXED64, BYTES, FIXED32):
            raise ValueError(kind)
        length = 8 if kind == FIXED64 else 4
        if kind == BYTES:
            length, place = _varint(data, place)
        if place + length > len(data):
            raise ValueError(length)
        yield number, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[place] & 0x7F) << shift
        place += 1
        if data[place - 1] < 0x80:
            return value, place
    raise ValueError(place)


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError(value)
    return value


def _encode(value: int) -> bytes:
    value &= (1 << 64) - 1  # a negative number is its two's complement
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def _tag(number: int, kind: int) -> bytes:
    return _encode(number << 3 | kind)


def _integer(number: int, value: int) -> bytes:
    return _tag(number, VARINT) + _encode(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _tag(number, BYTES) + _encode(len(value)) + value


def _text(number: int, value: str) -> bytes:
    return _bytes(number, value.encode())
