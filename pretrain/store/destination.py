"""Where a command is to write: looked at before any work, so that hours of it are not lost at the end."""

import os
import uuid
from contextlib import suppress
from pathlib import Path

from pretrain.store.disk import FULL


def require_writable(out: str | Path, *, may_be_file: bool = False) -> None:
    """Raises ValueError with the reason if the folder `out` (with `may_be_file`, the file) cannot be made and
    written.

    Tries it with a file in `out`, or in a folder beside the first one that is to be made, and leaves nothing
    behind. A full disk is no reason: writing to it raises DiskFull with the room that is needed.
    """
    path = Path(out).absolute()
    # as long a name as anything has that is written for `out`
    probe = f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    reason = _unreachable(path, probe)
    if may_be_file and path.is_file():
        path = path.parent
    place = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if reason is None and not place.is_dir():
        reason = f"{place} is {'a link that leads nowhere' if place.is_symlink() else 'no folder'}"
    if reason is None:
        reason = _unwritable(place, probe, is_there=place == path)
    if reason is not None:
        raise ValueError(
            f"{out}: cannot be written ({reason}); choose another `out`, or make this one writable"
        )


def _unreachable(path: Path, probe: str) -> str | None:
    """Why nothing can have the name `path`, or a name beside or in it: names that are too long, folders that
    may not be entered."""
    try:
        for name in (path.with_name(probe), path / probe) if path.name else (path,):
            with suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(name)
    except OSError as error:
        return error.strerror
    return None


def _unwritable(place: Path, probe: str, *, is_there: bool) -> str | None:
    """Why nothing can be written in the folder `place`, where `is_there`, or otherwise in a folder in it."""
    folder = place if is_there else place / probe
    file = folder / (probe if is_there else "probe")
    try:
        if not is_there:
            folder.mkdir()
        try:
            file.write_bytes(bytes(4096))
        finally:
            file.unlink(missing_ok=True)
            if not is_there:
                folder.rmdir()
    except OSError as error:
        if error.errno not in FULL:
            return f"{place}: {error.strerror}"
    return None
