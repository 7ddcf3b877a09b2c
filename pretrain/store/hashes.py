"""SHA-256 of files."""

import hashlib
from pathlib import Path

BLOCK_BYTES, PIECE_BYTES = 2**24, 2**20


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
