"""Models of fairseq2's hub in place of our runs: `fairseq2:NAME`, NAME being an asset card, wherever a run of an encoder is expected.

The card's checkpoint becomes what a run of `wordless import` would hold, in memory: the same tensors, the same meta data and so the same
fingerprint, by which codebooks and labels know their encoder. fairseq2 itself finds cards and downloads (FAIRSEQ2_ASSET_DIR,
FAIRSEQ2_USER_ASSET_DIR or ~/.config/fairseq2/assets, FAIRSEQ2_CACHE_DIR). Light to import: fairseq2 and torch come when a card is read.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.fairseq2.available import require_fairseq2

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "fairseq2:"


def asset_name(run: str | Path) -> str | None:
    """NAME where `run` is fairseq2:NAME; None where it is a folder. ValueError for a prefix alone."""
    text = str(run)
    if not text.startswith(PREFIX):
        return None
    if not (name := text.removeprefix(PREFIX).strip()):
        raise ValueError(f"{text}: names no asset card; write {PREFIX}NAME")
    return name


def load_asset(name: str) -> tuple[dict[str, "Tensor"], dict[str, Any], str]:
    """Weights, meta data and fingerprint of the model of a card, as pretrain.checkpoint.load_weights has them of a run.

    ValueError: fairseq2 is missing, no such card, a family or an architecture that is no encoder of ours, a damaged checkpoint.
    """
    require_fairseq2(f"{PREFIX}{name}")
    resolver()
    from pretrain.weights.conversion import in_memory
    from pretrain.weights.fairseq2 import read_asset

    weights, meta = in_memory(read_asset(name))
    return weights, meta, fingerprint_of(weights)


@cache
def current_fingerprint(name: str) -> str | None:
    """The fingerprint that `load_asset` gives, read once in a process; None where the card cannot be read here."""
    try:
        return load_asset(name)[2]
    except ValueError:
        return None


def fingerprint_of(weights: dict[str, "Tensor"]) -> str:
    """The fingerprint of a run with these weights: the first 16 hex digits of the SHA-256 of its `model.safetensors`."""
    from safetensors.torch import save

    return hashlib.sha256(save(weights)).hexdigest()[:16]


def resolver() -> Any:
    """fairseq2's, started if it is not yet, with our families whether or not an installation has declared them."""
    from fairseq2 import init_fairseq2
    from fairseq2.error import InvalidOperationError
    from fairseq2.runtime.dependency import get_dependency_resolver

    from pretrain.fairseq2.extension import register

    try:
        return init_fairseq2(extras=register)
    except InvalidOperationError:  # it has been started
        return get_dependency_resolver()
