"""fairseq2's own look-up of an asset card: found in its folders and packages, put together with its bases, downloaded.

The one module of the room that imports fairseq2; `require_fairseq2` comes first.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.weights.cards import FAMILIES, OWN_FAMILIES, Card, near_names, require_family


def find_card(name: str, source: str) -> Card:
    """fairseq2's own look-up: the card with its bases and architecture, its checkpoint and its tokenizer, downloaded."""
    from fairseq2.assets import (
        AssetCardError,
        AssetDownloadError,
        AssetDownloadManager,
        AssetMetadataError,
        AssetSourceNotFoundError,
        get_asset_store,
    )
    from fairseq2.models import ModelFamily
    from fairseq2.models.wav2vec2 import get_wav2vec2_model_hub
    from fairseq2.models.wav2vec2.asr import get_wav2vec2_asr_model_hub
    from fairseq2.runtime.dependency import get_dependency_resolver

    from pretrain.fairseq2.assets import resolver

    try:
        resolver()  # started with our families
        store = get_asset_store()
        card = store.maybe_retrieve_card(name)
        if card is None:
            ours = []
            for full in store.asset_names:  # `name@environment`; not `find_cards`, which one broken card ends
                with contextlib.suppress(AssetCardError):
                    known = store.maybe_retrieve_card(full.partition("@")[0])
                    told = known.maybe_get_field("model_family") if known is not None else None
                    if told is not None and told.value in (*FAMILIES, *OWN_FAMILIES):
                        ours.append(known.name)
            raise ValueError(
                f"{source}: fairseq2 has no asset card of that name{near_names(name, ours)}. Cards of your own are found in the folders "
                "FAIRSEQ2_ASSET_DIR and FAIRSEQ2_USER_ASSET_DIR"
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
            config = _plain(asdict(hub.get_model_config(card)))
        downloads = get_dependency_resolver().resolve(AssetDownloadManager)
        checkpoint = _download(card, "checkpoint", downloads.download_model)
        if checkpoint is None:
            raise ValueError(f"{source}: its card has no checkpoint (a gated model?); add one to a card of your own")
        if (inside := card.maybe_get_field("checkpoint_path")) is not None:
            checkpoint = checkpoint / inside.as_(str)
        extra = card.maybe_get_field("wordless")
        held = dict(extra.value) if extra is not None and isinstance(extra.value, Mapping) else {}
        tokenizer = _tokenizer(card, store, downloads) if family == "wav2vec2_asr" and "vocabulary" not in held else None
    except (AssetCardError, AssetMetadataError, AssetSourceNotFoundError) as error:
        hint = "; a package that brings its architecture may have to be installed" if "architecture" in str(error) else ""
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise ValueError(f"{source}: {error}{cause}{hint}") from None
    except AssetDownloadError as error:
        raise ValueError(f"{source}: {error}") from None
    return Card(source, family, config, checkpoint, tokenizer, held)


def _download(card: Any, key: str, download: Any) -> Path | None:
    """The file or the folder that a card's field names, on this machine."""
    named = card.maybe_get_field(key)
    if named is None:
        return None
    uri = named.as_uri()
    return Path(uri.to_path()) if uri.scheme == "file" else Path(download(uri))


def _tokenizer(card: Any, store: Any, downloads: Any) -> Path | None:
    """The tokenizer of characters of a card, or of the one that it refers to; None where there is none, or none of characters."""
    from fairseq2.data.tokenizers.ref import resolve_tokenizer_reference

    card = resolve_tokenizer_reference(store, card)
    kind = card.maybe_get_field("tokenizer_family")
    return (
        _download(card, "tokenizer", downloads.download_tokenizer) if kind is not None and kind.value == "char_tokenizer" else None
    )


def _plain(value: Any) -> Any:
    """A config as YAML has it: tables, lists, and the names of enumerated values."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "name", value)
