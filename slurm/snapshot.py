"""The code that a job runs: the state of the checkout, and a copy that later edits do not change."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("pretrain", "quantize", "units", "slurm", "wordless")


def snapshot_path(root: Path, names: Sequence[str], folder: Path) -> Path:
    """The folder of a snapshot of the code as it is now, named by the hash of its contents."""
    digest = hashlib.sha256()
    for path in _files(root, names):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return folder / f"code-{digest.hexdigest()[:16]}"


def snapshot(root: Path, names: Sequence[str], folder: Path) -> Path:
    """Copy the modules and packages `names` of `root` to `folder/code-SHA256`, once for each state of them;
    returns that folder.

    Packages come with their data, without what Python compiled. ValueError where the code changes while it is
    copied.
    """
    target = snapshot_path(root, names, folder)
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".code-", dir=folder))
    try:
        for path in _files(root, names):
            copy = temporary / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        if snapshot_path(temporary, names, folder) != target:
            raise ValueError(f"{root}: the code changed while it was copied for slurm.snapshot; submit again")
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():  # else another submission was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def git_state(root: Path) -> dict[str, Any] | None:
    """{"commit": full hash, "dirty": whether files differ from it or are new}; None where `root` is no
    checkout of wordless."""
    # An installed wordless may be inside the checkout of another project.
    if _git(root, "ls-files", "--error-unmatch", f"{NAMES[-1]}/__init__.py") is None:
        return None
    commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain")
    if commit is None or changes is None:
        return None
    return {"commit": commit.decode().strip(), "dirty": bool(changes.strip())}


def uncommitted(root: Path) -> bytes:
    """What `git apply` would make of the checkout's commit, of tracked files."""
    return _git(root, "diff", "--binary", "HEAD") or b""


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _files(root: Path, names: Sequence[str]) -> Iterator[Path]:
    for name in names:
        paths = sorted((root / name).rglob("*")) if (root / name).is_dir() else [root / name]
        yield from (
            path
            for path in paths
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
        )
