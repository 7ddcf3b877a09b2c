"""A disk of its own for what is to become full."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class Disk:
    """A file system in memory of `size` bytes, mounted at `path`."""

    def __init__(self, path: Path, size: int):
        self.path, self.size = path, size

    def leave(self, num_bytes: int) -> None:
        """Fill it until so many bytes are free (whole pages)."""
        free = os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_frsize
        with open(self.path / "ballast", "ab", buffering=0) as file:
            file.write(bytes(max(0, free - num_bytes)))

    def make_room(self) -> None:
        (self.path / "ballast").unlink()

    @property
    def hidden(self) -> list[str]:
        """Temporary files and folders anywhere on it."""
        return sorted(str(path.relative_to(self.path)) for path in self.path.rglob(".*"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small disk; skips with the reason where nothing may be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    size = 4 * 2**20
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes=500", "tmpfs", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here ({mounted.stderr.strip()})")
    yield Disk(path, size)
    subprocess.run(["umount", "--lazy", str(path)], check=True)
