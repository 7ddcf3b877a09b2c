"""One process at a time writes an output: a lock file beside it, for as long as the work takes.

`.NAME.lock` is locked with flock and contains, as JSON, who has it: host, pid, since when, the command. Where
the folder above may not be written it is `OUT/.lock`. It is touched every ten seconds (a sign of life), and
removed at the end. A part (`part = "2/16"`) has a lock of its own, `.NAME.part-2-16.lock`; parts share an
output with each other, and with no one who takes all of it.

A killed process leaves its lock file behind. On the same machine flock shows that it is gone, and the next
process takes over. A lock file of another machine is taken over after two minutes without a sign of life: not
every shared file system shares locks between machines (NFS does; Lustre and BeeGFS do where they are mounted
so), so a free lock proves nothing there. On a file system without locks, only the record counts.
"""

import errno
import fcntl
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pretrain.store.artefact import is_complete
from pretrain.store.disk import FULL, DiskFull
from pretrain.store.holder import Holder

BEAT_SECONDS = 10.0
# twelve beats; longer than an NFS server keeps the locks of a client that is gone (90 s)
SILENT_SECONDS = 120.0
RETRY_SECONDS = 1.0
SIGNING_SECONDS = 0.4  # at most between making a lock file and writing into it
# Errors of flock on a file system without locks.
NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL
NOT_HERE = (errno.EACCES, errno.EPERM, errno.EROFS)


class Occupied(ValueError):
    """Another process is at work on the same output."""


@dataclass
class _Lock:
    """A lock file that this process has."""

    path: Path
    descriptor: int
    made: list[Path]  # folders that were made for it, the deepest first
    thread: int = field(default_factory=threading.get_ident)
    pid: int = field(default_factory=os.getpid)
    over: threading.Event = field(default_factory=threading.Event)

    def beat(self) -> None:
        while not self.over.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        # a forked child does not give away what its parent has
        if self.over.is_set() or self.pid != os.getpid():
            return
        self.over.set()
        with suppress(OSError):
            # else somebody has removed it by hand
            if os.path.samestat(os.stat(self.path), os.fstat(self.descriptor)):
                self.path.unlink()
        os.close(self.descriptor)
        for folder in self.made:  # where nothing came of the work
            with suppress(OSError):
                folder.rmdir()


_held: dict[tuple[str, str | None], _Lock] = {}


@contextmanager
def locked(out: str | Path, part: str | None = None, *, name: str | Path | None = None) -> Iterator[None]:
    """Within, no other process that asks for the same output (or the same part of it) goes on; nested in one
    thread it is one lock.

    `name` is what messages call it, if not `out`. Of the ranks of one training the first has it. A requeued
    job (WORDLESS_ATTEMPT) waits for the lock of its attempt before.

    Errors: Occupied, a ValueError, names folder, host, pid and since when; ValueError where nothing can be
    written there. A finished output on a disk that may not be written needs no lock.
    """
    place = Path(os.path.realpath(out))
    key = (str(place), part)
    within = key in _held and _held[key].thread == threading.get_ident()
    lock = (
        None
        if within or os.environ.get("RANK", "0") != "0"
        else _take_in_time(Path(name or out), place, part)
    )
    if lock is None:
        yield
        return
    _held[key] = lock
    threading.Thread(target=lock.beat, name="lock", daemon=True).start()
    try:
        yield
    finally:
        if _held.get(key) is lock:
            del _held[key]
        lock.release()


def release_all() -> None:
    """Give back every lock of this process, which is about to end by a signal that Python does not see."""
    while _held:
        _held.popitem()[1].release()


@contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Within, no other process is within this of the same `path`, a file that need not be there; the second
    waits for the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(path, descriptor):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _take_in_time(out: Path, place: Path, part: str | None) -> _Lock | None:
    """The lock; None for a finished output that needs none. A requeued job waits for it."""
    again = int(os.environ.get("WORDLESS_ATTEMPT", "1")) > 1
    deadline = time.monotonic() + (SILENT_SECONDS + 2 * BEAT_SECONDS if again else 0.0)
    told = False
    while True:
        try:
            return _take(out, place, part)
        except Occupied as occupied:
            if time.monotonic() >= deadline:
                raise
            if not told:
                print(
                    f"{occupied}. This is a requeued job: it waits for its attempt before",
                    file=sys.stderr,
                    flush=True,
                )
            told = True
        time.sleep(RETRY_SECONDS)


def _take(out: Path, place: Path, part: str | None) -> _Lock | None:
    above, made = place.parent, _missing(place.parent)
    try:
        try:
            above.mkdir(parents=True, exist_ok=True)
            lock = _acquire(out, above / _name(place.name, part), made)
        except OSError as error:
            if error.errno not in NOT_HERE or not place.is_dir():
                raise
            above = place
            lock = _acquire(out, above / _name("", part), made)
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(out, error.errno, 4096, at_least=False) from None
        if error.errno in NOT_HERE and is_complete(place):
            return None
        raise ValueError(
            f"{out}: cannot be written ({error.strerror}: {error.filename or above}); choose another `out`"
        ) from None
    name = "" if above == place else place.name
    try:
        if part is not None:
            _require_free(out, above / _name(name, None), of_all=False)
        else:
            for other in sorted(
                above.glob(f"{_escaped(_name(name, None).removesuffix('.lock'))}.part-*.lock")
            ):
                _require_free(out, other, of_all=True)
    except BaseException:
        lock.release()
        raise
    return lock


def _name(name: str, part: str | None) -> str:
    """The name of an output's lock file."""
    if len(os.fsencode(name)) > 200:  # a name may have 255 bytes
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    share = part and "part-" + part.replace("/", "-")
    return ".".join(["", *filter(None, (name, share)), "lock"])


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _missing(folder: Path) -> list[Path]:
    """Of a folder and those above it the ones that are not there, the deepest first."""
    found = []
    while not os.path.exists(folder) and folder != folder.parent:
        found.append(folder)
        folder = folder.parent
    return found


def _acquire(out: Path, path: Path, made: list[Path]) -> _Lock:
    """The lock file at `path`, made or taken over; Occupied where another process has it."""
    while True:
        descriptor, new = _open(out, path)
        try:
            has_locks = _flock(out, path, descriptor)
            if not _is_at(path, descriptor):  # its owner has just removed it
                os.close(descriptor)
                continue
            if not new:
                _take_over(out, path, descriptor, has_locks)
            _sign(path, descriptor, has_locks)
        except BaseException as error:
            if isinstance(error, OSError) and new:
                path.unlink(missing_ok=True)
            with suppress(OSError):
                os.close(descriptor)
            raise
        return _Lock(path, descriptor, made)


def _sign(path: Path, descriptor: int, has_locks: bool) -> None:
    """Write into a lock file who has it. On a full disk the lock works without it, and the next write raises
    DiskFull."""
    os.ftruncate(descriptor, 0)
    os.utime(path)
    try:
        os.pwrite(descriptor, json.dumps(asdict(Holder.me())).encode() + b"\n", 0)
    except OSError as error:
        if not has_locks or error.errno not in FULL:
            raise


def _open(out: Path, path: Path) -> tuple[int, bool]:
    """The lock file, and whether it is new."""
    while True:
        with suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        try:
            return os.open(path, os.O_RDWR), False
        except FileNotFoundError:  # removed in between
            continue
        except PermissionError:
            raise _occupied(out, path, *_read(path)) from None  # another user's


def _flock(out: Path, path: Path, descriptor: int, how: int = fcntl.LOCK_EX) -> bool:
    """Lock a file or raise Occupied; False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _occupied(out, path, *_read_signed(path)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # the second over NFS
            raise
        return False


def _read(path: Path) -> tuple[Holder | None, float]:
    """Who has the lock at `path`, None while that is not written; and the time of the last sign of life."""
    holder, heard = None, time.time()
    with suppress(OSError, ValueError, TypeError):
        heard = path.stat().st_mtime
        holder = Holder(**json.loads(path.read_text(encoding="utf-8")))
    return holder, heard


def _read_signed(path: Path) -> tuple[Holder | None, float]:
    """The same a moment later where who has it is about to sign."""
    deadline = time.monotonic() + SIGNING_SECONDS
    while (found := _read(path))[0] is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def _is_left(holder: Holder | None, heard: float, has_locks: bool) -> bool:
    """Whether the owner of a lock that was found is gone; with `has_locks`, flock succeeded."""
    silent = time.time() - heard > SILENT_SECONDS
    if holder is None:  # killed before it could write; or, without flock, about to write
        return has_locks or silent
    if holder.is_of_this_machine if has_locks else holder.is_of_this_host:
        return has_locks or not holder.lives()
    return silent


def _take_over(out: Path, path: Path, descriptor: int, has_locks: bool) -> None:
    """A line on stderr where what is found was left by a process that is gone; Occupied where it may not
    be."""
    holder, heard = _read_signed(path)  # on another machine, where flock does not reach, it may be new
    if not _is_left(holder, heard, has_locks):
        raise _occupied(out, path, holder, heard)
    if holder is not None:
        print(f"{out}: takes over from {holder}, which is gone", file=sys.stderr, flush=True)


def _require_free(out: Path, path: Path, *, of_all: bool) -> None:
    """Occupied where another process has the lock at `path`. Who has the lock `of_all` removes what one that
    is gone has left."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    except PermissionError:
        raise _occupied(out, path, *_read(path)) from None
    try:
        has_locks = _flock(out, path, descriptor, fcntl.LOCK_EX if of_all else fcntl.LOCK_SH)
        holder, heard = _read(path)
        if not _is_at(path, descriptor):
            return
        if not _is_left(holder, heard, has_locks):
            raise _occupied(out, path, holder, heard)
        if of_all:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _occupied(out: Path, path: Path, holder: Holder | None, heard: float) -> Occupied:
    who = holder or "which one is not known"
    text = f"{out}: another process is at work on it: {who}. Nothing was changed. Wait, or stop that one"
    if holder is None or not holder.is_of_this_host:
        text += (
            f"; if it is gone (last sign of life {max(0.0, time.time() - heard):,.0f} s ago), remove {path}"
        )
    return Occupied(text)
