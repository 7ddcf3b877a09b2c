"""Codes of audio codecs: a folder of `.npy`, one per utterance, each [levels, frames].

[frames] of one level and [1, levels, frames], a batch of one, are read too. Pickled arrays are not.
"""

import os
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.store.disk import atomic_folder
from units.corpus.corpus_writing import Document
from units.formats.description import Described, Format, Located

MAX_LEVELS = 64  # beyond what codecs have; more rows than this are frames
# What numpy raises for headers that it reads as Python text and then cannot make sense of.
DAMAGED = (
    ValueError,
    EOFError,
    SyntaxError,
    tokenize.TokenError,
    TypeError,
    OverflowError,
    RecursionError,
    MemoryError,
    KeyError,
)


def codec_files(path: Path) -> Iterator[tuple[str, Path]]:
    """(id, file): the path below the folder without `.npy`, in order; of a single file its name."""
    if path.is_file():
        yield path.stem, path
        return
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    found = False
    for folder, subfolders, names in os.walk(path):
        subfolders.sort()
        for name in sorted(names):
            if name.endswith(".npy") and not name.startswith("."):
                found = True
                file = Path(folder, name)
                yield file.relative_to(path).as_posix().removesuffix(".npy"), file
    if not found:
        raise ValueError(f"{path}: no .npy in it, expected one for each utterance")


def read_codec(path: Path) -> Iterator[Located]:
    """Codes (frames,) or (frames, levels) of each file. ValueError naming the file: pickled, damaged, no
    whole numbers, negative, empty, or of another shape."""
    for name, file in codec_files(path):
        yield Located(str(file), Document(name, None, _codes(file)))


def _load(file: Path) -> np.ndarray:
    try:
        codes = np.load(file, mmap_mode="r", allow_pickle=False)
    except DAMAGED as error:
        raise ValueError(
            f"{file}: cannot be read as a .npy of numbers ({str(error)[:100]}); pickled arrays are refused"
        ) from None
    if not isinstance(codes, np.ndarray):
        raise ValueError(f"{file}: is an archive of arrays, expected a .npy of codes [levels, frames]")
    if codes.dtype.kind not in "iu":
        raise ValueError(f"{file}: {codes.dtype} codes, expected whole numbers")
    shape = codes.shape
    if codes.ndim == 3 and shape[0] == 1:
        codes = codes[0]
    if codes.ndim not in (1, 2):
        raise ValueError(
            f"{file}: codes of shape {list(shape)}, expected [levels, frames], [frames] or [1, levels, "
            "frames]"
        )
    if codes.ndim == 2 and len(codes) > MAX_LEVELS:
        raise ValueError(
            f"{file}: codes of shape {list(shape)} would have {len(codes)} levels; expected [levels, "
            "frames], transpose it"
        )
    if not codes.size:
        raise ValueError(f"{file}: codes of shape {list(shape)} are empty; leave the utterance out")
    return codes


def _codes(file: Path) -> np.ndarray:
    codes = np.asarray(_load(file))
    if codes.min() < 0 or codes.max() > 999_999_999:
        wrong = int(codes.min() if codes.min() < 0 else codes.max())
        raise ValueError(
            f"{file}: has the code {wrong}, expected whole numbers that are not negative (padding is to be "
            "cut off)"
        )
    codes = codes.astype(np.int32)
    # (frames, levels)
    return codes if codes.ndim == 1 else codes[0] if len(codes) == 1 else np.ascontiguousarray(codes.T)


def _describe(path: Path, **options: Any) -> Mapping[str, Any]:
    _, file = next(codec_files(path))
    codes = _load(file)
    return {"deduplicated": False, "timed": True, "num_levels": len(codes) if codes.ndim == 2 else 1}


def write_codec(path: Path, documents: Iterator[Document], described: Described) -> None:
    """A folder of `ID.npy`, [levels, frames], int16 where the codes fit (torch does little with uint16), else
    int32."""
    dtype = np.int16 if (described.num_units or 2**31) <= 2**15 else np.int32
    with atomic_folder(path) as temporary:
        for document in documents:
            parts = document.id.split("/")
            if (
                any(part in ("", ".", "..") or len(part.encode()) > 250 for part in parts)
                or parts[-1][0] == "."
                or "\0" in document.id
            ):
                raise ValueError(
                    f"document {document.id!r}: its id is no name for a file; export it as parquet"
                )
            file = temporary / f"{document.id}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                raise ValueError(f"document {document.id!r}: a second one with this id")
            codes = document.units.reshape(len(document.units), -1).T  # (levels, frames)
            np.save(file, np.ascontiguousarray(codes, dtype), allow_pickle=False)


CODEC = Format("codec", read_codec, write_codec, _describe, per_frame=True, levels=True)
