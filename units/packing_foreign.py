"""Packing units that other tools made."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

from pretrain.data.manifest import Manifest
from pretrain.store.artefact import read_meta
from units.corpus.corpus_writing import Document
from units.corpus.sequence import deduplicate, expand
from units.corpus.vocabulary import Vocabulary
from units.formats.description import sidecar_path
from units.formats.lengths import LengthCheck
from units.formats.reading import describe_source, fingerprint_source, guess_format, read_located
from units.packing_config import Contents, PackConfig, as_units, chosen_levels, left_out


def of_source(config: PackConfig) -> Contents:
    """Another tool's file, in its own order."""
    assert config.source is not None
    _refuse_own(config.source)
    form = config.format or guess_format(config.source)
    said = describe_source(config.source, form, **config.source_options)
    fingerprint, size = _codebook_of(config.codebook)
    codebook = _agreed(config, "codebook", said.codebook, fingerprint)
    num_units = _agreed(config, "num_units", said.num_units, config.num_units, size)
    rate = _agreed(config, "frame_rate_hz", said.frame_rate_hz, config.frame_rate_hz, otherwise=50.0)
    levels = chosen_levels(config.levels, said.num_levels, f"source: {config.source}")
    timed = said.timed or said.deduplicated is False
    if not timed and not config.deduplicate:
        if said.deduplicated:
            raise ValueError(
                f"{config.source}: its runs of equal units were made one, and how long they were is not "
                "known: deduplicate = false cannot be"
            )
        raise ValueError(
            f"{config.source}: does not say whether a unit is a frame; if so, say source_options.per_frame = "
            "true, if not, deduplicate"
        )
    manifest = None if config.manifest is None else Manifest(config.manifest)
    rows = {} if manifest is None else {name: row for row, name in enumerate(manifest.ids)}
    split_of = _splits_of(config, manifest, rows)
    parents = {} if manifest is None else {"manifest": manifest.fingerprint}
    description = config.source if form == "parquet" else str(sidecar_path(config.source))

    def documents(first: int) -> Iterator[Document]:
        assert config.source is not None
        check = LengthCheck(
            config.source, rate, description if said.frame_rate_hz is not None else None, manifest, rows
        )
        for document in itertools.islice(
            check.checked(read_located(config.source, form, **config.source_options)), first, None
        ):
            units, durations = document.units, document.durations
            if units.ndim > 1:
                units = units[:, 0] if levels == 1 else units[:, :levels]
            if durations is not None:
                units, durations = as_units(expand(units, durations), config.deduplicate)
            elif said.deduplicated is False:
                units, durations = as_units(units, config.deduplicate)
            elif config.deduplicate:
                units = deduplicate(units)[0]
            yield Document(document.id, split_of(document), units, durations)

    parents["source"] = fingerprint_source(config.source, form, **config.source_options)
    parents |= {"corpus": said.source} if said.source else {}
    notes = left_out(levels, said.num_levels, f"source: {config.source}")
    if (said.frame_rate_hz, config.frame_rate_hz) == (None, None):
        notes.append(
            f"source: {config.source} does not say its frame rate; 50 Hz is assumed (frame_rate_hz = …)"
        )
    vocabulary = Vocabulary(num_units=num_units, num_levels=levels)
    return Contents(vocabulary, codebook, rate, config.deduplicate, timed, parents, documents, notes)


def _refuse_own(source: str) -> None:
    """Labels and corpora of wordless are no files of other tools."""
    try:
        kind = read_meta(source)["kind"]
    except ValueError:
        return
    remedies = {"labels": "give it as `labels`, with their `manifest`", "units": "it is packed already"}
    raise ValueError(f"source: {source} is a {kind!r} of wordless; {remedies.get(kind, 'it holds no units')}")


def _agreed(
    config: PackConfig, key: str, said: Any, given: Any, of_codebook: Any = None, otherwise: Any = None
) -> Any:
    """What the file, the config and the codebook say, who must not contradict each other; one of them must
    say it."""
    accounts = {"by its own account": said, "in the config": given, "by the codebook's": of_codebook}
    known = {whose: value for whose, value in accounts.items() if value is not None}
    if len(set(known.values())) > 1:
        raise ValueError(
            f"{config.source}: {key} " + ", ".join(f"{value!r} {whose}" for whose, value in known.items())
        )
    value = next(iter(known.values()), otherwise)
    if value is None:
        raise ValueError(f"{config.source}: does not say its {key}; give it as {key} = …")
    return value


def _codebook_of(named: str | None) -> tuple[str | None, int | None]:
    """Fingerprint and K of a codebook's folder; a text that is no path names the codebook itself."""
    if named is None or not ("/" in named or os.path.exists(named)):
        return named, None
    meta = read_meta(named, "codebook")
    return meta["fingerprint"], meta["num_classes"]


def _splits_of(
    config: PackConfig, manifest: Manifest | None, rows: dict[str, int]
) -> Callable[[Document], str | None]:
    """The split of a document: the manifest's, or else its own, or one drawn from a hash of its id."""
    if manifest is not None:
        splits = manifest.column("split").to_pylist()

        def look_up(document: Document) -> str | None:
            if document.id not in rows:
                raise ValueError(
                    f"{config.source}: document {document.id!r} is no utterance of {config.manifest}"
                )
            split: str | None = splits[rows[document.id]]
            if document.split and split and document.split != split:
                raise ValueError(
                    f"{config.source}: document {document.id!r} is {document.split}, but {split} in "
                    f"{config.manifest}"
                )
            return split or document.split

        return look_up

    def draw(document: Document) -> str:
        digest = hashlib.sha256(f"{config.split_seed}:{document.id}".encode()).digest()
        share = int.from_bytes(digest[:8]) / 2**64
        drawn = (
            "test"
            if share < config.test_share
            else "dev"
            if share < config.test_share + config.dev_share
            else "train"
        )
        return document.split or drawn

    return draw
