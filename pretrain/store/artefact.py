"""What every artefact shares: it is a folder, its `meta.json` is written last, and a visible file is a complete file.

`meta.json` holds the format version, the kind, the resolved config, library versions, the git commit, the fingerprints of
the parents and the artefact's own fingerprint. A folder without `meta.json` is unfinished work, never an artefact.

A disk that is full, or a quota, is a `DiskFull` that names the file and the bytes, whichever library was writing: here is where
errors become one (`telling_full_disk`). Every other error of the operating system while writing becomes an OSError there.
"""

import errno
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.store.schemes import plugin, split_scheme

if TYPE_CHECKING:
    import numpy as np

FORMAT_VERSION = 1
META_KEY = "meta_sha256"
BLOCK_BYTES, PIECE_BYTES = 2**24, 2**20
FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(ValueError):
    """No space or no quota is left. What stood before stands; with room made the same command goes on. So whoever clears up after
    a ValueError, because its remedy is another command, must not after this one."""

    def __init__(self, path: Path, code: int, num_bytes: int, *, at_least: bool):
        where = next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())
        free, inodes = shutil.disk_usage(where).free, os.statvfs(where)
        why = "the quota is used up" if code == errno.EDQUOT else "no space left on the disk"
        if code == errno.ENOSPC and free > num_bytes and inodes.f_files and not inodes.f_favail:
            why += " (no inodes: it holds too many files)"
        elif (
            code == errno.ENOSPC and at_least
        ):  # safetensors takes away what it has written, which then counts as free
            num_bytes = max(num_bytes, free)
        super().__init__(
            f"{path}: {why}: needs {'more than ' if at_least else ''}{num_bytes:,} bytes, {free:,} are free. What stood before is "
            "unharmed; make room and run the same command again"
        )


@contextmanager
def telling_full_disk(
    path: Path, num_bytes: int | None = None, temporary: Path | None = None
) -> Iterator[None]:
    """Within, `path` is written, of `num_bytes` if that is known; a full disk or quota is a `DiskFull`. Another error of the operating
    system is an OSError, whichever library was writing.

    `temporary` is what is written first, a file or folder: it is removed, and where `num_bytes` is not known its size is told.
    """
    try:
        yield
    except Exception as error:
        files = (
            []
            if temporary is None
            else [file for file in (temporary, *temporary.rglob("*")) if file.is_file()]
        )
        sizes = [file.stat().st_size for file in files]
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
    """The operating system's number of what went wrong while writing a file of `num_bytes` so far; None if nothing of its did. What is
    written in Rust (safetensors, tokenizers) has the number in its text; numpy's tofile and libsndfile lose it: then the file system
    is asked, which is still full, with what was written lying there."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is not None and int(number[1]) in (
        *FULL,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
    ):
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
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`, on failure removed.

    A full disk is a `DiskFull`; it tells `num_bytes` where the caller knows how many there will be.
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
    """Yield a temporary folder beside `folder`; on success all in it is fsynced and it is renamed, on failure removed."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    make_folder(temporary)
    try:
        with telling_full_disk(folder, temporary=temporary):
            yield temporary
            os.sync()  # at once what a million files would write one after another; fsync then says whether one failed
            for path in temporary.rglob("*"):
                sync_folder(path)
            os.replace(temporary, folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """The folder and those above it, unless they are there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskFull(folder, error.errno, 0, at_least=True) from None


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable, or the bytes of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_blocks(path: Path) -> tuple[str, list[str]]:
    """Hexadecimal SHA-256 of a file, and of each of its blocks of 16 MiB."""
    whole, blocks = hashlib.sha256(), []
    with open(path, "rb") as file:
        for place in range(0, path.stat().st_size, PIECE_BYTES):
            if place % BLOCK_BYTES == 0:
                blocks.append(hashlib.sha256())
            piece = file.read(PIECE_BYTES)
            whole.update(piece)
            blocks[-1].update(piece)
    return whole.hexdigest(), [block.hexdigest() for block in blocks]


def map_npy(path: Path) -> "np.ndarray":
    """A `.npy` memory-mapped; a ValueError names one that is missing, or not one array from its first byte to its last."""
    import numpy as np

    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (
        Exception
    ) as error:  # numpy reads headers with Python's parser, and flipped bytes make that throw anything
        raise ValueError(f"{path}: missing or damaged ({error})") from None
    if (
        not isinstance(array, np.memmap)
        or array.offset + array.nbytes != path.stat().st_size
        or not array.flags.c_contiguous
    ):
        raise ValueError(f"{path}: damaged: not an array from its first byte to its last")
    return array


class CheckedNpy:
    """A `.npy` memory-mapped, whose bytes are compared with their SHA-256 the first time that they are read, block by block.

    So a flipped byte never becomes a label or a token in silence, and who reads three documents of a large corpus hashes three
    blocks. `hashes` as by `sha256_blocks`, or one of the whole file (`block_bytes` None); without any nothing is compared.
    `array` is that of `map_npy`.
    """

    def __init__(
        self, path: Path, array: "np.ndarray", hashes: Sequence[str], block_bytes: int | None = None
    ):
        size = path.stat().st_size
        self.path, self.array, self._hashes = path, array, hashes
        self._block_bytes = block_bytes or size
        self._row_bytes = array.dtype.itemsize * math.prod(array.shape[1:])
        self._header_bytes = size - array.nbytes
        self._unread = [True] * len(hashes)
        if hashes and len(hashes) != -(-size // self._block_bytes):
            raise damaged(path)

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int) -> "np.ndarray":
        """Rows start .. stop, compared. A ValueError names a file that is damaged. Several threads may read."""
        if len(self._hashes) and stop > start:
            first = (self._header_bytes + start * self._row_bytes) // self._block_bytes
            last = (self._header_bytes + stop * self._row_bytes - 1) // self._block_bytes
            for block in (0, *range(first, last + 1)):  # the header is in block 0
                if self._unread[block]:
                    self._compare(block)
        return self.array[start:stop]

    def _compare(self, block: int) -> None:
        found, left = hashlib.sha256(), self._block_bytes
        with open(self.path, "rb") as file:
            file.seek(block * self._block_bytes)
            while piece := file.read(min(left, PIECE_BYTES)):
                found.update(piece)
                left -= len(piece)
        if found.hexdigest() != self._hashes[block]:
            raise damaged(self.path)
        self._unread[block] = False


def damaged(path: Path) -> ValueError:
    """What to tell of a file of a finished artefact whose bytes have changed."""
    return ValueError(
        f"{path}: damaged: not the bytes that were written (SHA-256); restore the file, or remove {path.parent} and make it again"
    )


def commit(
    folder: Path,
    kind: str,
    config: dict[str, Any],
    parents: dict[str, str],
    files: Sequence[str] | Mapping[str, str],
    **extra: Any,
) -> str:
    """Declare `folder` complete: write its `meta.json` over the named `files` (with their SHA-256 if it is known). Returns the
    fingerprint.

    The fingerprint is a SHA-256 over the kind and the names and SHA-256 of `files`: the content, not the time or place.
    `extra` keys (frame rate, codebook, counts) are stored beside and are the owner's business.
    """
    known = files if isinstance(files, Mapping) else {}
    hashes = {name: known.get(name) or sha256_file(folder / name) for name in sorted(files)}
    fingerprint = hashlib.sha256(json.dumps([kind, hashes]).encode()).hexdigest()[:16]
    meta = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "fingerprint": fingerprint,
        "parents": parents,
        "files": hashes,
        "versions": library_versions(),
        "git_commit": git_commit(),
        **extra,
        "config": config,
    }
    write_json(folder / "meta.json", {**meta, META_KEY: _meta_hash(meta)})
    return fingerprint


def read_meta(folder: str | Path, kind: str | None = None) -> dict[str, Any]:
    """`meta.json` of a complete artefact. Missing, unfinished, of another kind or a newer format: a ValueError that says so."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such {kind or 'artefact'}")
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: no meta.json, so not a complete {kind or 'artefact'}; run the stage that writes it"
        ) from None
    except ValueError as error:  # or not UTF-8
        raise ValueError(f"{folder}/meta.json: not valid JSON ({error})") from None
    if not isinstance(meta, dict) or not {"format_version", "kind", "fingerprint"} <= meta.keys():
        raise ValueError(f"{folder}/meta.json: not written by wordless")
    if kind is not None and meta["kind"] != kind:
        raise ValueError(f"{folder}: is a {meta['kind']!r}; a {kind!r} is needed here")
    if meta["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{folder}: format {meta['format_version']} is newer than this wordless reads ({FORMAT_VERSION})"
        )
    return meta


def require_as_written(folder: str | Path, meta: dict[str, Any]) -> None:
    """The meta data of an artefact are those that `commit` wrote, or a ValueError; those of older versions do not say."""
    if meta.get(META_KEY) not in (None, _meta_hash(meta)):
        raise ValueError(
            f"{folder}/meta.json: damaged or edited: not what was written (SHA-256); restore it, or remove {folder} and make it again"
        )


def _meta_hash(meta: dict[str, Any]) -> str:
    rest = {key: value for key, value in meta.items() if key != META_KEY}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def is_complete(folder: str | Path) -> bool:
    """Whether the folder has its `meta.json`, which is written last."""
    return (Path(folder) / "meta.json").is_file()


def known_by(source: str | Path) -> set[str]:
    """The fingerprints by which what is made from `source` now knows it: of a run of training that of its weights, of everything else
    its own, of `fairseq2:NAME` that of the card's model. Empty where nothing finished is there, or the card cannot be read here."""
    if (named := split_scheme(source)) is not None:
        scheme, name = named
        return {fingerprint} if (fingerprint := plugin(scheme).current_fingerprint(name)) else set()
    if not is_complete(source):
        return set()
    meta = read_meta(source)
    return {meta["fingerprint"], *(sha256[:16] for sha256 in meta["files"].values())}


def require_absent(folder: str | Path) -> None:
    """Refuse to write over a finished artefact."""
    if is_complete(folder):
        raise ValueError(f"{folder}: already holds a finished artefact; remove it or choose another `out`")


def library_versions() -> dict[str, str]:
    """Versions of wordless and of the libraries that decide numbers."""
    names = ["wordless", "torch", "numpy", "faiss-cpu", "faiss-gpu-cu12", "safetensors", "tokenizers"]
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """The commit of the wordless checkout that runs, with `+` when its files differ from it; None outside a checkout.

    A job that runs a copy of the code is told its commit by WORDLESS_COMMIT.
    """
    if told := os.environ.get("WORDLESS_COMMIT"):
        return told
    root = Path(__file__).resolve().parents[2]
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def keep_to_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Record in `plan.json` what the unfinished work in `folder` is made of; refuse to add to work made of something else."""
    path = folder / "plan.json"
    if not path.is_file():
        write_json(path, plan)
        return
    if differing := disagreements(json.loads(path.read_text(encoding="utf-8")), plan):
        raise ValueError(
            f"{folder}: holds unfinished work on something else ({differing}); remove it or change `out`"
        )


def disagreements(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Which keys have other values than they are to have now, for a message; empty where all agree."""
    keys = dict.fromkeys([*now, *there])
    return "; ".join(
        f"{key} {there.get(key)!r} there, {now.get(key)!r} now"
        for key in keys
        if there.get(key) != now.get(key)
    )
