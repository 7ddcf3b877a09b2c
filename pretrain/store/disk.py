"""Writing files: atomically, durably, and with one message for a full disk (`DiskFull`)."""

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FULL = errno.ENOSPC, errno.EDQUOT
WRITE_ERRORS = *FULL, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO


class DiskFull(ValueError):
    """The disk or the quota is full. Earlier work is unharmed, and the same command goes on once there is
    room.

    So code that removes unfinished work after a ValueError must keep it after this one.
    """

    def __init__(self, path: Path, code: int, num_bytes: int, *, at_least: bool):
        where = next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())
        free, inodes = shutil.disk_usage(where).free, os.statvfs(where)
        why = "the quota is used up" if code == errno.EDQUOT else "no space left on the disk"
        if code == errno.ENOSPC and free > num_bytes and inodes.f_files and not inodes.f_favail:
            why += " (no inodes: it holds too many files)"
        elif code == errno.ENOSPC and at_least:  # safetensors removes its file, whose bytes are free then
            num_bytes = max(num_bytes, free)
        super().__init__(
            f"{path}: {why}: needs {'more than ' if at_least else ''}{num_bytes:,} bytes, {free:,} are free. "
            "Earlier work is unharmed; make room and run the same command again"
        )


@contextmanager
def telling_full_disk(
    path: Path, num_bytes: int | None = None, temporary: Path | None = None
) -> Iterator[None]:
    """Within, `path` is written, of `num_bytes` if that is known. Raises DiskFull if the disk or quota is
    full.

    Raises OSError for other errors of the operating system, whichever library was writing. `temporary`, a
    file or folder that is written first, is removed; its size replaces an unknown `num_bytes` in the message.
    """
    try:
        yield
    except Exception as error:
        files = [] if temporary is None else [temporary, *temporary.rglob("*")]
        sizes = [file.stat().st_size for file in files if file.is_file()]
        written = sum(sizes)
        code = _write_error(error, path.parent, max(sizes, default=0))
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.add_note(f"while writing {path}")
        if code is None or (code not in FULL and isinstance(error, OSError) and error.errno is not None):
            raise
        if code not in FULL:
            raise OSError(code, os.strerror(code), str(path)) from None
        if temporary is not None:
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise DiskFull(
            path, code, written if num_bytes is None else num_bytes, at_least=num_bytes is None
        ) from None


def _write_error(error: Exception, folder: Path, num_bytes: int) -> int | None:
    """The error number of the operating system behind `error`, after `num_bytes` of a file; None if there is
    none.

    Libraries in Rust (safetensors, tokenizers) put the number in the text. Numpy's tofile and libsndfile lose
    it: then a probe is written to `folder`, which fails in the same way.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is not None and int(number[1]) in WRITE_ERRORS:
        return int(number[1])
    if isinstance(error, ValueError | LookupError | TypeError | AttributeError | AssertionError):
        return None
    probe = folder / f".probe.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(probe, "wb", buffering=0) as file:
            for _ in range(16):
                file.write(bytes(4096))
            os.fsync(file.fileno())
            os.ftruncate(file.fileno(), num_bytes + 1)  # a limit of the size of files
    except OSError as asked:
        return asked.errno
    finally:
        probe.unlink(missing_ok=True)
    return None


@contextmanager
def atomic_path(path: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is fsynced and renamed to `path`, on failure
    removed.

    Raises DiskFull if the disk is full; `num_bytes`, if known, is the size in its message.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with telling_full_disk(path, num_bytes, temporary):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`; on success all in it is fsynced and it is renamed, on
    failure removed."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    make_folder(temporary)
    try:
        with telling_full_disk(folder, temporary=temporary):
            yield temporary
            os.sync()  # all at once; fsync then raises for a file that failed
            for path in temporary.rglob("*"):
                sync_folder(path)
            os.replace(temporary, folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Makes the folder and those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskFull(folder, error.errno, 0, at_least=True) from None


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable, or the bytes of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
