"""Uncompressed tar shards of audio, as WebDataset lays them out: members that share a name up to the suffix are one sample.

`KEY.flac` (or wav, ogg, mp3) is a recording; `KEY.txt` beside it holds its transcript, or `KEY.json` an object with any of `text`,
`speaker`, `split` and `phones`. Members are found by reading headers alone and later read by offset, so a shard is never unpacked.
"""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path

from pretrain.audio import Member

TAR = ".tar"
_BLOCK = 1 << 20  # bytes read at a time behind the end mark
_MAGIC = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
_COMPRESSED = (".tgz", ".tbz2", ".txz", ".tzst", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_tar(path: Path) -> bool:
    """Whether the name is that of a tar, compressed or not."""
    return path.suffix == TAR or path.name.endswith(_COMPRESSED)


def require_uncompressed(path: Path) -> None:
    """A compressed tar, whatever its name, is a ValueError: nothing in it can be read by offset."""
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, command in _MAGIC.items():
        if start.startswith(magic):
            raise ValueError(
                f"{path}: is compressed, and its members cannot be read by offset; decompress it: {command} {path.name}"
            )


def list_members(path: Path) -> Iterator[tuple[str, Member, str | None]]:
    """(name, place, what is wrong with it) of each member that is a file, in the order of the tar; directories are passed over.

    A tar that ends early, is damaged or holds more behind its end mark closes with a nameless ("", Member(offset, 0), problem): what came behind is lost.
    """
    size, last, end, whole = os.path.getsize(path), "its start", 0, True
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                last, end, problem = info.name, tar.offset, None
                if not info.isreg() or info.sparse:  # the bytes lie elsewhere
                    problem = "is a link or sparse; pack the tar again with plain files"
                elif info.offset_data + info.size > size:
                    problem = f"is truncated: {max(0, size - info.offset_data)} of {info.size} bytes are in the tar"
                if not info.isdir():
                    yield posixpath.normpath(info.name).lstrip("/"), Member(info.offset_data, info.size), problem
    except tarfile.ReadError:
        whole = False
    more = _first_byte_behind(path, end)
    if not whole or (more is not None and more < end + tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
        yield "", Member(end, 0), f"is cut or damaged behind {last} (byte {end}): what followed cannot be found"
    elif more is not None:
        yield "", Member(more, 0), f"holds more behind its end mark (byte {more}): joined with cat? Join with `tar -A`"


def _first_byte_behind(path: Path, end: int) -> int | None:
    """Where the first byte from `end` on lies that is not zero; None where there is none."""
    with open(path, "rb") as file:
        file.seek(end)
        while block := file.read(_BLOCK):
            if rest := block.lstrip(b"\0"):
                return file.tell() - len(rest)
    return None


def read_member(path: Path, member: Member) -> bytes:
    """The bytes of a small member."""
    with open(path, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)
