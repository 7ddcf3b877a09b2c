"""Uncompressed tar shards of audio, as WebDataset lays them out: members that share a name up to the suffix
are one sample.

`KEY.flac` (or another of `SUFFIXES`) is a recording; `KEY.txt` beside it holds its transcript, or `KEY.json`
an object with any of `text`, `speaker`, `split` and `phones`. Members are found by reading headers alone and
later read by offset, so a shard is never unpacked.
"""

import io
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pretrain.data.decoding.spans import Member
from pretrain.data.sources.candidates import (
    OTHER_SUFFIXES,
    SUFFIXES,
    About,
    Candidate,
    Names,
    as_phones,
    as_words,
    parse_row,
)
from pretrain.store.plain_text import decode_text, joined_lines

TAR = ".tar"
LARGEST_TEXT = 1 << 26  # bytes of what lies beside a recording: the phones of a day take half of it
_BLOCK = 1 << 20  # bytes read at a time behind the end mark
_LONGEST_HEADER = 1 << 20  # bytes
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
                f"{path}: is compressed, and its members cannot be read by offset; decompress it: {command} "
                f"{path.name}"
            )


def read_tar(path: Path, base: Path, prefix: str, passed_over: list[str]) -> list[Candidate]:
    """The recordings in a tar, whose ids start with its path below `base`, with the texts and JSON beside
    them.

    What is wrong with a member, with what lies beside it or with the tar is the `problem` of a candidate.
    Recordings that libsndfile does not read are added to `passed_over`. A compressed tar is a ValueError.
    """
    shard = Path(os.path.abspath(path)).relative_to(os.path.abspath(base)).with_suffix("").as_posix()
    try:
        require_uncompressed(path)
        members = list(list_members(path))
    except OSError as error:
        return [
            Candidate(
                prefix + shard, str(path), shard, str(path), problem=f"cannot be read ({error.strerror})"
            )
        ]
    counts = Counter(name for name, _, _ in members)
    sidecars = _Sidecars()
    recordings: list[tuple[str, Candidate]] = []
    for name, member, problem in members:
        suffix, origin = os.path.splitext(name)[1], f"{path}, member {name}"
        if not name:
            recordings.append(("", Candidate(prefix + shard, str(path), shard, str(path), problem=problem)))
        elif os.path.basename(name).startswith("."):
            continue
        elif suffix.lower() in SUFFIXES:
            if counts[name] > 1:
                problem = (
                    problem or f"its name {name} is in the tar {counts[name]} times; which one is meant?"
                )
            recordings.append(
                (name, Candidate("", str(path), f"{shard}/{name}", origin, member=member, problem=problem))
            )
        elif suffix.lower() in OTHER_SUFFIXES:
            passed_over.append(origin)
        elif suffix in (".txt", ".json"):
            sidecars.add(
                path,
                name,
                member,
                "is in the tar more than once" if counts[name] > 1 and not problem else problem,
            )
    names = Names([name for name, _ in recordings if name])
    for name, candidate in recordings:
        if name:
            candidate.id, candidate.has_twin = f"{prefix}{shard}/{names[name]}", names.has_twin(name)
            sidecars.attach(candidate, os.path.splitext(name)[0])
    return [candidate for _, candidate in recordings]


class _Sidecars:
    """What lies beside the recordings of a tar, by the stem of its name; `wrong` where it cannot be used."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.about: dict[str, About] = {}
        self.wrong: dict[str, str] = {}

    def add(self, path: Path, name: str, member: Member, problem: str | None) -> None:
        """Read the member `name`, unless there is a `problem` with it."""
        (stem, suffix), origin = os.path.splitext(name), f"{path}, member {name}"
        if problem is None and member.size > LARGEST_TEXT:
            problem = f"has {member.size} bytes, more than any transcript"
        if problem is not None:
            self.wrong[stem] = f"{name} beside it {problem}"
            return
        try:
            text = decode_text(read_member(path, member), origin)
            if suffix == ".txt":
                self.texts[stem] = joined_lines(text)
            else:
                self.about[stem] = parse_row(About, text, origin)
        except (OSError, ValueError) as error:
            self.wrong[stem] = str(error)

    def attach(self, candidate: Candidate, stem: str) -> None:
        """Give a recording what lies beside it."""
        # WebDataset's key ends at the first dot: `7.mic1.flac` and `7.json` are one sample.
        names = (stem, os.path.join(os.path.dirname(stem), os.path.basename(stem).partition(".")[0]))
        candidate.problem = candidate.problem or next(
            (self.wrong[name] for name in names if name in self.wrong), None
        )
        found = next((self.about[name] for name in names if name in self.about), About())
        candidate.text = next((self.texts[name] for name in names if name in self.texts), found.text)
        candidate.speaker, candidate.split = found.speaker, found.split
        try:
            candidate.phones, candidate.words = (
                as_phones(found.phones, candidate.origin),
                as_words(found.words, candidate.origin),
            )
        except ValueError as error:
            candidate.problem = candidate.problem or str(error)


def list_members(path: Path) -> Iterator[tuple[str, Member, str | None]]:
    """(name, place, what is wrong with it) of each member that is a file, in the order of the tar;
    directories are passed over.

    Wrong are links, sparse files and devices, names that lead out of the tar, and bytes that are not there. A
    tar that ends early, is damaged or holds more behind its end mark closes with a nameless ("",
    Member(offset, 0), problem): what came behind is lost.
    """
    size, last, end, broken = os.path.getsize(path), "its start", 0, ""
    try:
        with open(path, "rb") as file, tarfile.open(path, "r:", _Headers(file, size)) as tar:
            for info in tar:
                last, end = (
                    info.name,
                    min(max(tar.offset, info.offset_data), size),
                )  # a size below 0 leads back
                if not info.isdir():
                    yield (
                        posixpath.normpath(info.name).lstrip("/"),
                        Member(info.offset_data, info.size),
                        _problem(info, size),
                    )
    except tarfile.ReadError as error:
        broken = str(error) or "no tar"
    except (
        tarfile.TarError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        # Python's reader trusts the numbers in extended headers, and fails in as many ways.
        broken = f"{type(error).__name__}: {error}"
    more = _first_byte_behind(path, end)
    # tarfile takes a damaged header for the end
    if broken or (more is not None and more < end + tarfile.BLOCKSIZE):
        why = f" ({broken[:200]})" if broken else ""
        yield (
            "",
            Member(end, 0),
            f"is cut or damaged behind {last} (byte {end}){why}: what followed cannot be found",
        )
    elif more is not None:
        yield (
            "",
            Member(more, 0),
            f"holds more behind its end mark (byte {more}): joined with cat? Join with `tar -A`",
        )


def _problem(info: tarfile.TarInfo, size: int) -> str | None:
    """What is wrong with a member of a tar of `size` bytes."""
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return f"has a name that leads out of the tar, {info.name!r}; pack it again by relative names"
    if info.issym() or info.islnk():
        return (
            f"is a link, to {info.linkname!r}; pack the tar again with plain files (tar --dereference "
            "--hard-dereference)"
        )
    if info.issparse():  # the bytes lie elsewhere
        return "is sparse; pack the tar again with plain files"
    if not info.isreg():
        return f"is no plain file (type {info.type!r})"
    if info.size < 0:
        return f"has a size of {info.size} bytes"
    if info.offset_data + info.size > size:
        return f"is truncated: {max(0, size - info.offset_data)} of {info.size} bytes are in the tar"
    return None


class _Headers(io.RawIOBase):
    """What tarfile reads headers from: ever onwards, and no extended header longer than any that is meant.

    It adds up sizes as headers claim them: negative ones lead it in a circle (CVE-2025-8194), large ones to
    fill the memory.
    """

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"an extended header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET, "as tarfile seeks"
        if offset < self._file.tell() - 1:  # tarfile reads the last byte of a member to see that it is there
            raise tarfile.ReadError(f"a size that leads back to byte {offset}")
        if offset > self._size:
            raise tarfile.ReadError(f"a size that leads to byte {offset} of {self._size}")
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


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
