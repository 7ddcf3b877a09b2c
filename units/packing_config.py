"""What the verb `pack` packs, and how."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from pretrain.config import Config, PathStr, Seed, Split
from units.corpus.corpus_writing import Document
from units.corpus.sequence import deduplicate
from units.corpus.text import TextConfig
from units.corpus.vocabulary import Vocabulary


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
    """Labels of a manifest's utterances, or another tool's unit file, to a unit corpus; splits come from the
    manifest."""

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


def chosen_levels(wanted: int | Literal["all"], have: int, named: str) -> int:
    """The number of levels to pack. Raises ValueError if there are fewer."""
    levels = have if wanted == "all" else wanted
    if not 1 <= levels <= have:
        raise ValueError(f"{named} has {have} levels; levels = {levels} cannot be packed")
    return levels


def left_out(levels: int, have: int, named: str) -> list[str]:
    """A note where not all levels are packed."""
    packed = "level 0 is packed" if levels == 1 else f"the first {levels} are packed"
    return [f"{named} has {have} levels; {packed}"] if levels < have else []


def as_units(frames: np.ndarray, deduplicated: bool) -> tuple[np.ndarray, np.ndarray]:
    """Units and how many frames each lasts."""
    return deduplicate(frames) if deduplicated else (frames, np.ones(len(frames), np.uint16))
