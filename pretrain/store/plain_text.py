"""Plain text from other programs' files: UTF-8 with or without a byte-order mark, and UTF-16 with one.

Everything else (Latin-1, UTF-16 without a mark, binary files) is a ValueError that names the file, the line
and the remedy.
"""

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

UTF_8_MARK = codecs.BOM_UTF8
# UTF-32's mark in little-endian order begins with that of UTF-16, so it is compared first.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LONGEST_MARK = 4


def wide_encoding(start: bytes) -> str | None:
    """The encoding by the byte-order mark that a file starts with, where it is UTF-16 or UTF-32; None for all
    other files."""
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), None)


def decode_text(data: bytes, origin: str) -> str:
    """The text of a whole file, without its byte-order mark. ValueError `ORIGIN line N: what is wrong` where
    it is no such text."""
    if encoding := wide_encoding(data[:LONGEST_MARK]):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{origin}: not {encoding.upper()} text though it starts as such ({error.reason})"
            ) from None
    data = data.removeprefix(UTF_8_MARK)
    try:
        text = data.decode("utf-8")
        place = text.find("\0")
        if place < 0:
            return text
        number = text.count("\n", 0, place) + 1
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
    return decode_line(data.split(b"\n")[number - 1], _at(origin, number, data))


def decode_line(line: bytes, origin: str) -> str:
    """The text of one line of UTF-8, or a ValueError `ORIGIN: what is wrong`."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        guess = line.decode("latin-1")[:40]
        raise ValueError(
            f"{origin}: not UTF-8 text ({error.reason} at byte {error.start}); as Latin-1 it reads "
            f"{guess!r}; write the file again as UTF-8, for example: iconv -f latin1 -t utf-8"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"{origin}: has a NUL byte, so it is no UTF-8 text; UTF-16 is read where the file has a "
            "byte-order mark"
        )
    return text


def _at(origin: str, number: int, data: bytes) -> str:
    return f"{origin} line {number}" if b"\n" in data.rstrip(b"\n") else origin


def read_text(path: str | Path) -> str:
    """The text of a file. ValueError where it is no text, OSError where it cannot be read."""
    return decode_text(Path(path).read_bytes(), str(path))


def raw_lines(file: BinaryIO, origin: str) -> Iterator[bytes]:
    """The lines of a text file that can seek, as UTF-8 without mark and line ends, one at a time.

    UTF-16 is decoded as a whole (ValueError where it is none); lines of UTF-8 are not, see `decode_line`.
    """
    start = file.read(LONGEST_MARK)
    if wide_encoding(start):
        file = io.BytesIO(decode_text(start + file.read(), origin).encode("utf-8"))
    else:
        file.seek(len(UTF_8_MARK) if start.startswith(UTF_8_MARK) else 0)
    yield from (line.removesuffix(b"\n").removesuffix(b"\r") for line in file)


def joined_lines(text: str) -> str:
    """The lines of a text as one, with spaces between them."""
    return " ".join(text.replace("\r\n", "\n").split("\n")).strip()
