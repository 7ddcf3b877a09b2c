"""Models of fairseq2's hub in place of our runs: `fairseq2:NAME`, NAME being an asset card, wherever a run of
an encoder is expected.

The card's checkpoint becomes what a run of `wordless import` would hold, in memory: the same tensors, the
same meta data and so the same fingerprint, by which codebooks and labels know their encoder. fairseq2 itself
finds cards and downloads (FAIRSEQ2_ASSET_DIR, FAIRSEQ2_USER_ASSET_DIR or ~/.config/fairseq2/assets,
FAIRSEQ2_CACHE_DIR).

The scheme `fairseq2` of pretrain/store/schemes.py. Light to import: fairseq2, torch and pretrain.weights come
when a card is read.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.fairseq2.available import require_fairseq2

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.weights.cards import Card
    from pretrain.weights.foreign import Foreign

PREFIX = "fairseq2:"


def load_asset(name: str) -> tuple[dict[str, "Tensor"], dict[str, Any], str]:
    """Weights, meta data and fingerprint of the model of a card, as pretrain.training.checkpoint.load_weights
    has them of a run.

    ValueError: fairseq2 is missing, no such card, a family or an architecture that is no encoder of ours, a
    damaged checkpoint.
    """
    from pretrain.weights.conversion import in_memory

    weights, meta = in_memory(read_asset(name))
    return weights, meta, fingerprint_of(weights)


@cache
def current_fingerprint(name: str) -> str | None:
    """The fingerprint that `load_asset` gives, read once in a process; None, with a note on stderr, if the
    card cannot be read here."""
    try:
        return load_asset(name)[2]
    except ValueError as error:
        print(
            f"{PREFIX}{name}: cannot be compared with the model that was used before ({error})",
            file=sys.stderr,
        )
        return None


def read_asset(
    name: str,
    vocabulary: Path | None = None,
    options: Mapping[str, Any] | None = None,
    allow_pickle: bool = True,
) -> "Foreign":
    """The model of the asset card `name` (with or without `fairseq2:`), found and downloaded by fairseq2.

    Torch's weights_only reads a card's `.pt`, as in fairseq2 itself. Raises ValueError if fairseq2 is missing
    or another, and for unknown cards, families and architectures, and checkpoints that are missing or do not
    fit.
    """
    from pretrain.weights.fairseq2 import NO_OPTIONS, read_model

    card = find_card(name)
    return read_model(card, vocabulary, options or NO_OPTIONS, allow_pickle, card.source)


def objective(name: str) -> str | None:
    """The objective with which the model of a card was pretrained; None if the card does not say."""
    from pretrain.weights.fairseq2 import objective_of

    return objective_of(find_card(name))


def fingerprint_of(weights: dict[str, "Tensor"]) -> str:
    """The fingerprint of a run with these weights: the first 16 hex digits of the SHA-256 of its
    `model.safetensors`."""
    from safetensors.torch import save

    return hashlib.sha256(save(weights)).hexdigest()[:16]


def resolver() -> Any:
    """fairseq2's, started if it is not yet, with our families whether or not an installation has declared
    them."""
    from fairseq2 import init_fairseq2
    from fairseq2.error import InvalidOperationError
    from fairseq2.runtime.dependency import get_dependency_resolver

    from pretrain.fairseq2.extension import register

    try:
        return init_fairseq2(extras=register)
    except InvalidOperationError:  # it has been started
        return get_dependency_resolver()


def find_card(name: str) -> "Card":
    """The card `name` (with or without `fairseq2:`), found by fairseq2, with its checkpoint and its tokenizer
    downloaded.

    Raises ValueError if fairseq2 is missing, for unknown cards and families, and for cards that fairseq2
    cannot read or download.
    """
    source = PREFIX + (name := name.removeprefix(PREFIX))
    require_fairseq2(source)
    from fairseq2.assets import (
        AssetCardError,
        AssetDownloadError,
        AssetMetadataError,
        AssetSourceNotFoundError,
    )
    from fairseq2.error import NotSupportedError

    try:
        return _read_card(name, source)
    except (AssetCardError, AssetMetadataError, AssetSourceNotFoundError) as error:
        hint = "; a package that brings its architecture may have to be installed"
        reasons, cause = [str(error)], error.__cause__
        while cause is not None:  # one names the key, another the fault of its value
            reasons, cause = [*reasons, str(cause)], cause.__cause__
        if any("recursion" in reason for reason in reasons):
            hint = "; is a card its own base?"
        elif "architecture" not in reasons[0]:
            hint = ""
        told = ": ".join(reason.removesuffix(".") for reason in reasons)
        raise ValueError(f"{source}: {told}{hint}") from None
    except RecursionError:
        raise ValueError(f"{source}: maximum recursion depth exceeded; is a card its own base?") from None
    except UnicodeDecodeError as error:
        strange = ", ".join(map(str, _not_utf8())) or "a card beside it"
        raise ValueError(f"{source}: {strange} is not UTF-8 ({error})") from None
    except (AssetDownloadError, NotSupportedError) as error:
        raise ValueError(f"{source}: {error}") from None


def _read_card(name: str, source: str) -> "Card":
    """`find_card`, with the errors of fairseq2."""
    from fairseq2.assets import AssetDownloadManager, get_asset_store
    from fairseq2.models import ModelFamily
    from fairseq2.models.wav2vec2 import get_wav2vec2_model_hub
    from fairseq2.models.wav2vec2.asr import get_wav2vec2_asr_model_hub
    from fairseq2.runtime.dependency import get_dependency_resolver

    from pretrain.weights.card_config import near_names
    from pretrain.weights.cards import OWN_FAMILIES, Card, require_family

    resolver()  # started with our families
    store = get_asset_store()
    card = store.maybe_retrieve_card(name)
    if card is None:
        raise ValueError(
            f"{source}: fairseq2 has no asset card of that name{near_names(name, _known_names(store))}. "
            "Cards of your own are found in the folders FAIRSEQ2_ASSET_DIR and FAIRSEQ2_USER_ASSET_DIR"
        )
    family_field = card.maybe_get_field("model_family")
    if family_field is None:
        raise ValueError(f"{source}: is the card of something else than a model: it has no model_family")
    family = family_field.as_(str)
    require_family(family, source)
    config: dict[str, Any]
    if family in OWN_FAMILIES:
        config = asdict(resolver().resolve(ModelFamily, key=family).get_model_config(card))
    else:
        hub = get_wav2vec2_model_hub() if family == "wav2vec2" else get_wav2vec2_asr_model_hub()
        config = plain_config(asdict(hub.get_model_config(card)))
    downloads = get_dependency_resolver().resolve(AssetDownloadManager)
    checkpoint = _download(card, "checkpoint", downloads.download_model)
    if checkpoint is None:
        raise ValueError(
            f"{source}: its card has no checkpoint (a gated model?); add one to a card of your own"
        )
    if (inside := card.maybe_get_field("checkpoint_path")) is not None:
        checkpoint = checkpoint / inside.as_(str)
    extra = card.maybe_get_field("wordless")
    held = dict(extra.value) if extra is not None and isinstance(extra.value, Mapping) else {}
    tokenizer = None
    if family == "wav2vec2_asr" and "vocabulary" not in held:
        tokenizer = _tokenizer(card, store, downloads)
    return Card(source, family, config, checkpoint, tokenizer, held)


def _known_names(store: Any) -> list[str]:
    """The names of the cards of models that can be read."""
    from fairseq2.assets import AssetCardError

    from pretrain.weights.cards import OWN_FAMILIES, THEIR_FAMILIES

    names = []
    for full in store.asset_names:  # `name@environment`; not `find_cards`, which one broken card ends
        with contextlib.suppress(AssetCardError):
            card = store.maybe_retrieve_card(full.partition("@")[0])
            family = card.maybe_get_field("model_family") if card is not None else None
            if family is not None and family.value in (*THEIR_FAMILIES, *OWN_FAMILIES):
                names.append(card.name)
    return names


def _download(card: Any, key: str, download: Any) -> Path | None:
    """The file or the folder that a card's field names, on this machine."""
    named = card.maybe_get_field(key)
    if named is None:
        return None
    from pretrain.weights.cards import require_path

    require_path(named.as_(str), f"{PREFIX}{card.name}: {key}")
    uri = named.as_uri()
    return Path(uri.to_path()) if uri.scheme == "file" else Path(download(uri))


def _tokenizer(card: Any, store: Any, downloads: Any) -> Path | None:
    """The tokenizer of characters of a card, or of the one that it refers to; None where there is none, or
    none of characters."""
    from fairseq2.data.tokenizers.ref import resolve_tokenizer_reference

    card = resolve_tokenizer_reference(store, card)
    kind = card.maybe_get_field("tokenizer_family")
    return (
        _download(card, "tokenizer", downloads.download_tokenizer)
        if kind is not None and kind.value == "char_tokenizer"
        else None
    )


def _not_utf8() -> list[Path]:
    """The cards on the user's paths that fairseq2, which reads them all, cannot decode and does not name."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    folders = [
        os.environ.get("FAIRSEQ2_ASSET_DIR"),
        os.environ.get("FAIRSEQ2_USER_ASSET_DIR") or Path(home, "fairseq2/assets"),
    ]
    found = []
    for path in sorted(path for folder in folders if folder for path in Path(folder).rglob("*.y*ml")):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            found.append(path)
        except OSError:
            continue
    return found


def plain_config(value: Any) -> Any:
    """A config as YAML has it: tables, lists, and the names of enumerated values."""
    if isinstance(value, dict):
        return {key: plain_config(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_config(item) for item in value]
    return getattr(value, "name", value)
