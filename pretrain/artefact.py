"""What every artefact shares: it is a folder, its `meta.json` is written last, and a visible file is a complete file.

`meta.json` holds the format version, the kind, the resolved config, library versions, the git commit, the fingerprints of
the parents and the artefact's own fingerprint. A folder without `meta.json` is unfinished work, never an artefact.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`, on failure removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.sync()  # at once what a million files would write one after another; fsync then says whether one failed
        for path in temporary.rglob("*"):
            sync_folder(path)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def commit(
    folder: Path,
    kind: str,
    config: dict[str, Any],
    parents: dict[str, str],
    files: list[str],
    **extra: Any,
) -> str:
    """Declare `folder` complete: write its `meta.json` over the named `files`. Returns the fingerprint.

    The fingerprint is a SHA-256 over the kind and the names and SHA-256 of `files`: the content, not the time or place.
    `extra` keys (frame rate, codebook, counts) are stored beside and are the owner's business.
    """
    hashes = {name: sha256_file(folder / name) for name in sorted(files)}
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
    write_json(folder / "meta.json", meta)
    return fingerprint


def read_meta(folder: str | Path, kind: str | None = None) -> dict[str, Any]:
    """`meta.json` of a complete artefact. Missing, unfinished, of another kind or a newer format: a ValueError that says so."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such {kind or 'artefact'}")
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: no meta.json, so not a complete {kind or 'artefact'}; run the stage that writes it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}/meta.json: not valid JSON ({error})") from None
    if not isinstance(meta, dict) or not {"format_version", "kind", "fingerprint"} <= meta.keys():
        raise ValueError(f"{folder}/meta.json: not written by wordless")
    if kind is not None and meta["kind"] != kind:
        raise ValueError(f"{folder}: is a {meta['kind']!r}; a {kind!r} is needed here")
    if meta["format_version"] > FORMAT_VERSION:
        raise ValueError(f"{folder}: format {meta['format_version']} is newer than this wordless reads ({FORMAT_VERSION})")
    return meta


def is_complete(folder: str | Path) -> bool:
    """Whether the folder has its `meta.json`, which is written last."""
    return (Path(folder) / "meta.json").is_file()


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
    """The commit of the wordless checkout that runs, with `+` when its files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
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
        raise ValueError(f"{folder}: holds unfinished work on something else ({differing}); remove it or change `out`")


def disagreements(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Which keys have other values than they are to have now, for a message; empty where all agree."""
    keys = dict.fromkeys([*now, *there])
    return "; ".join(f"{key} {there.get(key)!r} there, {now.get(key)!r} now" for key in keys if there.get(key) != now.get(key))
