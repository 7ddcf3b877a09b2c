"""The verb `pack`: labels, or the unit files of other tools, to the unit corpus that language models train on."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from pretrain.config import Config, PathStr, Seed, Split
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import Utterance
from pretrain.progress import progress
from pretrain.store.artefact import read_meta, require_absent
from units.corpus.bpe import learn
from units.corpus.grid import grid_document
from units.corpus.interleaving import interleaved_document
from units.corpus.sequence import deduplicate, expand
from units.corpus.text import TextConfig, TextPieces, learn_pieces
from units.corpus.unit_corpus import Document, UnitCorpus, write_corpus
from units.corpus.vocabulary import Vocabulary
from units.formats import describe_source, fingerprint_source, guess_format, read_located
from units.formats.description import sidecar_path
from units.formats.lengths import LengthCheck


class BPEConfig(Config):
    """Unit BPE: frequent runs of units become symbols of their own."""

    vocabulary_size: int = Field(ge=2, description="symbols in all, the K units included")
    max_units: int = Field(
        8,
        ge=2,
        description="longest run of units that one symbol stands for, so that silence does not fill it",
    )
    min_frequency: int = Field(2, ge=1)
    split: Split = Field("train", description='the documents that merges are learnt from; "": all')
    sample_units: int = Field(
        10_000_000,
        ge=1,
        description="learn from so many units, drawn from all; about 115 bytes of memory each",
    )


class PackConfig(Config):
    """Labels of a manifest's utterances, or another tool's unit file, to a unit corpus; splits come from the manifest."""

    manifest: PathStr | None = None
    labels: PathStr | None = None
    source: PathStr | None = Field(
        None, description="in place of labels: a unit file of another tool, or a folder of them"
    )
    format: str | None = Field(
        None, description="of the source; by default told from its name and first line"
    )
    source_options: dict[str, Any] = Field({}, description="of the format: tsv, durations, stem, per_frame")
    out: PathStr
    deduplicate: bool = True
    levels: int | Literal["all"] = Field(1, description="how many of the codebook's levels, from the first")
    bpe: BPEConfig | None = None
    text: TextConfig | None = None
    codebook: PathStr | None = Field(
        None, description="of a source that does not say: a codebook's folder or fingerprint, or a name"
    )
    num_units: int | None = Field(None, ge=1, description="of a source that does not say: K")
    frame_rate_hz: float | None = Field(
        None, gt=0, description="of a source that does not say; 50 if nothing does"
    )
    dev_share: float = Field(
        0.05, ge=0, lt=1, description="of a source without splits of its own or a manifest: drawn by id"
    )
    test_share: float = Field(0.05, ge=0, lt=1)
    split_seed: Seed = 0

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> Self:
        if (self.labels is None) == (self.source is None):
            raise ValueError("give either `labels`, with their `manifest`, or the `source` of a unit file")
        if self.labels is not None and self.manifest is None:
            raise ValueError("labels are packed with their `manifest`")
        if self.text is not None and self.labels is None:
            raise ValueError("`text` goes with `labels`: words and their times come from the manifest")
        if self.text is not None and self.bpe is not None:
            raise ValueError("`bpe` and `text` do not go together: merges are for units alone")
        if self.labels is not None and (given := self.model_fields_set & OF_SOURCES):
            raise ValueError(
                f"{', '.join(sorted(given))}: of a `source`; labels and their manifest say it themselves"
            )
        if self.dev_share + self.test_share >= 1:
            raise ValueError(
                f"dev_share {self.dev_share} and test_share {self.test_share} leave nothing to train on"
            )
        return self


OF_SOURCES = {
    "format",
    "source_options",
    "codebook",
    "num_units",
    "frame_rate_hz",
    "dev_share",
    "test_share",
    "split_seed",
}


class Contents(NamedTuple):
    """What is packed: whose symbols, from which documents."""

    vocabulary: Vocabulary
    codebook: str
    frame_rate_hz: float
    deduplicated: bool
    timed: bool
    parents: dict[str, str]
    documents: Callable[[int], Iterator[Document]]  # from document number `first` on
    notes: list[str]


def pack(config: PackConfig) -> dict[str, Any]:
    """Write the unit corpus; returns its counts. Errors name the utterance, or the line of a foreign file."""
    require_absent(config.out)
    contents = _of_labels(config) if config.labels is not None else _of_source(config)
    vocabulary = contents.vocabulary
    if config.bpe is not None:
        vocabulary = Vocabulary(num_units=vocabulary.num_units, merges=_learn_merges(config.bpe, contents))
    summary = write_corpus(
        config.out,
        contents.documents,
        config.resolved(),
        contents.parents,
        vocabulary=vocabulary,
        codebook=contents.codebook,
        frame_rate_hz=contents.frame_rate_hz,
        deduplicated=contents.deduplicated,
        timed=contents.timed,
    )
    return {**summary, **({"notes": contents.notes} if contents.notes else {})}


def _of_labels(config: PackConfig) -> Contents:
    """Labels of a manifest's utterances, in the manifest's order."""
    assert config.labels is not None and config.manifest is not None
    manifest, labels = Manifest(config.manifest), Labels(config.labels)
    _require_labels(manifest, labels)
    levels = _chosen_levels(config.levels, labels.num_levels, f"labels: {config.labels}")
    deduplicated = config.deduplicate and (
        config.text is None or config.text.layout != "grid"
    )  # the grid is one of frames
    if levels > 1 and config.text is not None and config.text.layout == "interleaved":
        raise ValueError(
            f"text.layout = interleaved is for units of one level, and {levels} are packed; levels = 1, or layout = grid"
        )
    vocabulary = Vocabulary(num_units=labels.num_classes, num_levels=levels)
    pieces = TextPieces(())
    if config.text is not None:
        pieces = learn_pieces(manifest, config.text)
        vocabulary = Vocabulary(
            num_units=labels.num_classes, num_levels=levels, text=pieces.pieces, layout=config.text.layout
        )

    def document(utterance: Utterance, frames: np.ndarray) -> Document:
        if config.text is None:
            return Document(utterance.id, utterance.split, *_as_units(frames, deduplicated))
        if config.text.layout == "grid":
            return grid_document(utterance, frames, pieces, config.text)
        return interleaved_document(
            utterance, frames, pieces, vocabulary, config.text, deduplicated=deduplicated
        )

    def documents(first: int) -> Iterator[Document]:
        rows = manifest.take(np.arange(first, len(manifest)))
        with progress("pack", len(manifest), "utterance", done=first) as advance:
            for utterance in rows:
                frames = labels[utterance.id]
                if frames.ndim > 1:
                    frames = frames[:, 0] if levels == 1 else frames[:, :levels]
                yield document(utterance, frames)
                advance(1)

    parents = {"manifest": manifest.fingerprint, "labels": labels.fingerprint}
    if config.text is not None and config.text.pieces_of is not None:
        parents["pieces_of"] = UnitCorpus(config.text.pieces_of).fingerprint
    notes = _left_out(levels, labels.num_levels, f"labels: {config.labels}")
    return Contents(
        vocabulary, labels.codebook, labels.frame_rate_hz, deduplicated, True, parents, documents, notes
    )


def _require_labels(manifest: Manifest, labels: Labels) -> None:
    """A label for every frame of every utterance, or a ValueError that names the first without."""
    counts = labels.frame_counts(manifest.column("id"))
    wrong = np.flatnonzero(counts != manifest.num_frames)
    if len(wrong):
        name, first = manifest[int(wrong[0])].id, int(wrong[0])
        raise ValueError(
            f"{labels.folder}: {counts[first]} labels for utterance {name!r}, which has {manifest.num_frames[first]} frames "
            f"in {manifest.folder} ({len(wrong)} of {len(manifest)} utterances differ); were these labels made from other audio?"
        )


def _of_source(config: PackConfig) -> Contents:
    """Another tool's file, in its own order."""
    assert config.source is not None
    _refuse_own(config.source)
    form = config.format or guess_format(config.source)
    said = describe_source(config.source, form, **config.source_options)
    fingerprint, size = _codebook_of(config.codebook)
    codebook = _agreed(config, "codebook", said.codebook, fingerprint)
    num_units = _agreed(config, "num_units", said.num_units, config.num_units, size)
    rate = _agreed(config, "frame_rate_hz", said.frame_rate_hz, config.frame_rate_hz, otherwise=50.0)
    levels = _chosen_levels(config.levels, said.num_levels, f"source: {config.source}")
    timed = said.timed or said.deduplicated is False
    if not timed and not config.deduplicate:
        if said.deduplicated:
            raise ValueError(
                f"{config.source}: its runs of equal units were made one, and how long they were is not known: deduplicate = false cannot be"
            )
        raise ValueError(
            f"{config.source}: does not say whether a unit is a frame; if so, say source_options.per_frame = true, if not, deduplicate"
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
                units, durations = _as_units(expand(units, durations), config.deduplicate)
            elif said.deduplicated is False:
                units, durations = _as_units(units, config.deduplicate)
            elif config.deduplicate:
                units = deduplicate(units)[0]
            yield Document(document.id, split_of(document), units, durations)

    parents["source"] = fingerprint_source(config.source, form, **config.source_options)
    parents |= {"corpus": said.source} if said.source else {}
    notes = _left_out(levels, said.num_levels, f"source: {config.source}")
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
    """What the file, the config and the codebook say, who must not contradict each other; one of them must say it."""
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
                    f"{config.source}: document {document.id!r} is {document.split}, but {split} in {config.manifest}"
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


def _chosen_levels(wanted: int | Literal["all"], have: int, named: str) -> int:
    levels = have if wanted == "all" else wanted
    if not 1 <= levels <= have:
        raise ValueError(f"{named} has {have} levels; levels = {levels} cannot be packed")
    return levels


def _left_out(levels: int, have: int, named: str) -> list[str]:
    """A note where not all levels are packed."""
    packed = "level 0 is packed" if levels == 1 else f"the first {levels} are packed"
    return [f"{named} has {have} levels; {packed}"] if levels < have else []


def _as_units(frames: np.ndarray, deduplicated: bool) -> tuple[np.ndarray, np.ndarray]:
    """Units and how many frames each lasts."""
    return deduplicate(frames) if deduplicated else (frames, np.ones(len(frames), np.uint16))


def _learn_merges(bpe: BPEConfig, contents: Contents) -> tuple[tuple[int, int], ...]:
    if contents.vocabulary.num_levels > 1:
        raise ValueError(
            f"bpe: merges are for units of one level; {contents.vocabulary.num_levels} are packed"
        )
    found = False

    def of_split() -> Iterator[np.ndarray]:
        nonlocal found
        for document in contents.documents(0):
            if bpe.split is None or document.split == bpe.split:
                found = True
                yield document.units

    merges = learn(
        of_split(),
        contents.vocabulary.num_units,
        bpe.vocabulary_size,
        bpe.max_units,
        bpe.min_frequency,
        bpe.sample_units,
    )
    if not found:
        raise ValueError(
            f"bpe: no documents in split {bpe.split!r} to learn merges from; choose another with bpe.split"
        )
    return merges
