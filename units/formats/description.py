"""What is known of a file of units: whose units they are, and what one of them stands for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import Field

from pretrain.config import Config, parse_config
from units.corpus.corpus_writing import Document
from units.formats.lines import parse_json


class Described(Config):
    """What units in a file are of; None where nobody wrote it down."""

    codebook: str | None = Field(None, description="fingerprint of the codebook")
    num_units: int | None = Field(None, ge=1, description="K; every level has as many")
    num_levels: int = Field(1, ge=1)
    frame_rate_hz: float | None = Field(None, gt=0)
    deduplicated: bool | None = Field(None, description="runs of equal labels are one unit")
    timed: bool = Field(False, description="how many frames each unit lasts is known")
    source: str | None = Field(None, description="fingerprint of the unit corpus that was exported")


class Sidecar(Described):
    """`FILE.meta.json`, beside a file that wordless wrote: what the format itself has no place for."""

    format: str
    num_documents: int | None = Field(None, ge=0)
    checksum: str | None = Field(None, description="of the units of all documents, whatever their order")

    @classmethod
    def of(
        cls, described: Described, form: str, num_documents: int | None = None, checksum: str | None = None
    ) -> Self:
        """The description of a file in format `form`."""
        known = described.model_dump(include=set(Described.model_fields))
        return cls(format=form, num_documents=num_documents, checksum=checksum, **known)


class Located(NamedTuple):
    """A document and its place in the file, for messages; and the length of its recording, where the file
    gives one."""

    where: str
    document: Document
    num_samples: int | None = None  # at 16 kHz
    length_of: str = ""  # where that is from, for messages


FLAGS = {"levels_first", "per_frame", "stem"}


@dataclass(frozen=True)
class Format:
    """How another tool writes units down."""

    name: str
    read: Callable[..., Iterator[Located]]  # (path, **options), a document at a time
    # makes the files visible when all is written
    write: Callable[[Path, Iterator[Document], Described], None]
    # (path, **options): what can be told of a file that has no sidecar
    describe: Callable[..., Mapping[str, Any]]
    per_frame: bool = False  # a unit is a frame: documents that have durations are written frame by frame
    levels: bool = False  # can hold units of several levels
    sidecar: bool = True  # the description goes beside the file, not into it
    # what else is read and written, beside the file
    companions: Callable[..., list[Path]] = field(default=lambda path, **options: [])
    options: tuple[str, ...] = ()  # names of what `read` takes: bool if in FLAGS, otherwise str
    paths: tuple[str, ...] = ()  # those of them that are paths


def sidecar_path(path: str | Path) -> Path:
    """`FILE.meta.json`, beside the file or folder."""
    path = Path(path)
    return path.with_name(path.name + ".meta.json")


def read_sidecar(path: str | Path) -> Sidecar | None:
    """What stands beside a file of units, None if nothing does. ValueError naming the sidecar and the key
    that is wrong."""
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        return None
    return parse_config(Sidecar, parse_json(sidecar.read_bytes(), str(sidecar)), str(sidecar))
