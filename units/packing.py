"""The verb `pack`: labels, or the unit files of other tools, to the unit corpus that language models train
on."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import Utterance
from pretrain.progress import progress
from pretrain.store.artefact import require_absent
from units.corpus.bpe import learn
from units.corpus.corpus_writing import Document, write_corpus
from units.corpus.grid import grid_document
from units.corpus.interleaving import interleaved_document
from units.corpus.text import TextPieces, learn_pieces
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from units.packing_config import BPEConfig, Contents, PackConfig, as_units, chosen_levels, left_out
from units.packing_foreign import of_source


def pack(config: PackConfig) -> dict[str, Any]:
    """Write the unit corpus; returns its counts. Errors name the utterance, or the line of a foreign file."""
    require_absent(config.out)
    contents = _of_labels(config) if config.labels is not None else of_source(config)
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
    levels = chosen_levels(config.levels, labels.num_levels, f"labels: {config.labels}")
    # the grid is one of frames
    deduplicated = config.deduplicate and (config.text is None or config.text.layout != "grid")
    if levels > 1 and config.text is not None and config.text.layout == "interleaved":
        raise ValueError(
            f"text.layout = interleaved is for units of one level, and {levels} are packed; levels = 1, or "
            "layout = grid"
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
            return Document(utterance.id, utterance.split, *as_units(frames, deduplicated))
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
    notes = left_out(levels, labels.num_levels, f"labels: {config.labels}")
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
            f"{labels.folder}: {counts[first]} labels for utterance {name!r}, which has "
            f"{manifest.num_frames[first]} frames in {manifest.folder} ({len(wrong)} of {len(manifest)} "
            "utterances differ); were these labels made from other audio?"
        )


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
