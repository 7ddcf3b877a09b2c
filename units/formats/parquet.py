"""Units as Parquet, which `datasets.load_dataset("parquet", data_files=…)` reads: a file, or a folder of
them.

Columns: `id` (string), `split` (string or null), `units`, list<int> or, of several levels, list<list<int>>
with a list of levels per step, and `durations`, list<int>, where they are known. The schema's metadata holds
the description under the key `wordless`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pretrain.config import parse_config
from pretrain.store.disk import atomic_path
from units.corpus.corpus_writing import Document
from units.formats.codec import MAX_LEVELS
from units.formats.description import Described, Format, Located, Sidecar
from units.formats.lines import check_durations, id_of_path, parse_json

IDS = ("id", "file_name", "utterance", "utterance_id", "audio_id", "name", "file", "path", "audio_filepath")
PATHS = {
    "file_name",
    "file",
    "path",
    "audio_filepath",
}  # columns of paths: without the suffix they name the utterance
UNITS = ("units", "codes", "audio_codes", "unit")
DURATIONS = ("durations", "duration")  # if they are lists: a number of seconds says nothing of units
METADATA_KEY = b"wordless"
ROWS_AT_ONCE = 64  # read together
GROUP_ROWS, GROUP_UNITS = 10_000, 2**20  # written together


def parquet_files(path: Path) -> list[Path]:
    """The file, or those beneath the folder, in order of their names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    if found := sorted(file for file in path.rglob("*.parquet") if not file.name.startswith(".")):
        return found
    raise ValueError(f"{path}: no .parquet in it")


def read_parquet_description(path: Path) -> Sidecar | None:
    """What the schema's metadata says of the units, None if wordless did not write it. ValueError naming two
    files that differ in it: of a folder all must have the same units. They may come from several corpora;
    then `source` is None."""
    first, *others = parquet_files(path)
    known = _description(first)
    for file in others:
        other = _description(file)
        for key in Described.model_fields:
            ours, theirs = getattr(known, key, None), getattr(other, key, None)
            if ours != theirs and key != "source":
                raise ValueError(
                    f"{first} and {file}: {key} {ours!r} and {theirs!r}; expected the same units in all of a "
                    "folder"
                )
            if ours != theirs and known is not None:
                known = known.model_copy(update={"source": None})
    return known


def _description(file: Path) -> Sidecar | None:
    with _opened(file) as opened:
        described = (opened.schema_arrow.metadata or {}).get(METADATA_KEY)
    where = f"{file}: metadata 'wordless'"
    return None if described is None else parse_config(Sidecar, parse_json(described, where), where)


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a Parquet file ({error})") from None


def read_parquet(
    path: Path,
    ids: str | None = None,
    units: str | None = None,
    durations: str | None = None,
    levels_first: bool = False,
) -> Iterator[Located]:
    """Rows of a Hugging Face dataset. The options name the columns where they have none of the usual names;
    `levels_first`: the units of several levels are [levels][steps], as codecs give them, not
    [steps][levels]."""
    for name in parquet_files(path):
        with _opened(name) as file:
            schema = file.schema_arrow
            columns = [
                _column(name, schema, ids, IDS, "ids", _is_text),
                _column(name, schema, units, UNITS, "units", _is_list),
                _column(
                    name, schema, durations, DURATIONS, "durations", _is_list, needed=durations is not None
                ),
                "split" if "split" in schema.names and _is_text(schema.field("split").type) else None,
            ]
            row = 0
            for batch in _batches(name, file, [column for column in dict.fromkeys(columns) if column]):
                for values in zip(
                    *(batch[column] if column else [None] * len(batch) for column in columns), strict=True
                ):
                    yield _located(
                        f"{name}: row {row}", *values, is_path=columns[0] in PATHS, levels_first=levels_first
                    )
                    row += 1


def _batches(name: Path, file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(ROWS_AT_ONCE, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: damaged ({error})") from None


def _located(
    where: str, name: Any, coded: Any, timed: Any, split: Any, *, is_path: bool, levels_first: bool
) -> Located:
    try:
        known, part = name.as_py(), None if split is None else split.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: its text is not UTF-8 ({error.reason}); the file is damaged") from None
    if not known:
        raise ValueError(f"{where}: has no id")
    steps = _matrix(coded, where, levels_first)
    durations = (
        None if timed is None else check_durations(_integers(timed.values, where, "durations"), steps, where)
    )
    return Located(where, Document(id_of_path(known, where) if is_path else known, part, steps, durations))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _column(
    file: Path,
    schema: pa.Schema,
    given: str | None,
    usual: Sequence[str],
    what: str,
    fits: Any,
    needed: bool = True,
) -> str | None:
    names = [
        name
        for name in ([given] if given else usual)
        if name in schema.names and fits(schema.field(name).type)
    ]
    if names or not needed:
        return names[0] if names else None
    there = ", ".join(f"{field.name} {field.type}" for field in schema)
    raise ValueError(
        f"{file}: no column of {what}, expected {given or ' or '.join(usual)} "
        f"({'strings' if what == 'ids' else 'lists of whole numbers'});"
        f" it has {there} (say which with {what}=…)"
    )


def _integers(values: Any, where: str, what: str) -> np.ndarray:
    """A list column's value of one row to int32 (n,)."""
    if values is None or not len(values):
        raise ValueError(f"{where}: its {what} are empty; leave the utterance out")
    if not pa.types.is_integer(values.type) or values.null_count:
        raise ValueError(
            f"{where}: its {what} are {values.type}{' with nulls' if values.null_count else ''}, expected "
            "whole numbers"
        )
    numbers = values.to_numpy(zero_copy_only=False)
    if numbers.min() < 0 or numbers.max() > 999_999_999:
        wrong = int(numbers.min() if numbers.min() < 0 else numbers.max())
        raise ValueError(f"{where}: its {what} have {wrong}, expected whole numbers that are not negative")
    return numbers.astype(np.int32)


def _matrix(coded: Any, where: str, levels_first: bool) -> np.ndarray:
    """(steps,) or, of nested lists, (steps, levels)."""
    lists = coded.values
    if lists is None or not len(lists) or not _is_list(lists.type):
        return _integers(lists, where, "units")
    lengths = pc.list_value_length(lists)
    if lists.null_count or pc.count_distinct(lengths).as_py() != 1:
        raise ValueError(
            f"{where}: its lists of units differ in length, expected as many levels at every step"
        )
    matrix = _integers(lists.flatten(), where, "units").reshape(len(lists), -1)
    matrix = np.ascontiguousarray(matrix.T) if levels_first else matrix
    if matrix.shape[1] > MAX_LEVELS:
        remedy = (
            "leave levels_first out" if levels_first else "if they are [levels][steps], say levels_first=true"
        )
        raise ValueError(f"{where}: units of {matrix.shape[1]} levels, expected [steps][levels]; {remedy}")
    return matrix[:, 0] if matrix.shape[1] == 1 else matrix


def _describe(path: Path, **options: Any) -> Mapping[str, Any]:
    first = next(read_parquet(path, **options)).document
    return {
        "timed": first.durations is not None,
        "num_levels": first.units.shape[1] if first.units.ndim == 2 else 1,
    }


def write_parquet(path: Path, documents: Iterator[Document], described: Described) -> None:
    """One file; whole numbers are int32, which every reader of a dataset has."""
    numbers = pa.list_(pa.int32())
    columns = [
        ("id", pa.string()),
        ("split", pa.string()),
        ("units", pa.list_(numbers) if described.num_levels > 1 else numbers),
    ]
    schema = pa.schema([*columns, ("durations", numbers)] if described.timed else columns)
    sidecar = Sidecar.of(described, "parquet")
    schema = schema.with_metadata({METADATA_KEY: json.dumps(sidecar.resolved())})
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        group, size = list[Document](), 0
        for document in documents:
            group.append(document)
            size += document.units.size
            if len(group) == GROUP_ROWS or size >= GROUP_UNITS:
                writer.write_table(_table(group, schema))
                group, size = [], 0
        if group:
            writer.write_table(_table(group, schema))


def _table(group: list[Document], schema: pa.Schema) -> pa.Table:
    coded = [document.units for document in group]
    units = pa.array(np.concatenate(coded).reshape(-1).astype(np.int32))
    if coded[0].ndim == 2:
        units = pa.ListArray.from_arrays(
            np.arange(0, len(units) + 1, coded[0].shape[1], dtype=np.int32), units
        )
    offsets = np.cumsum([0, *map(len, coded)], dtype=np.int32)
    columns = [
        pa.array([document.id for document in group]),
        pa.array([document.split for document in group], pa.string()),
        pa.ListArray.from_arrays(offsets, units),
    ]
    if "durations" in schema.names:
        times = np.concatenate([document.durations for document in group if document.durations is not None])
        columns.append(pa.ListArray.from_arrays(offsets, times.astype(np.int32)))
    return pa.Table.from_arrays(columns, schema=schema)


PARQUET = Format(
    "parquet",
    read_parquet,
    write_parquet,
    _describe,
    levels=True,
    sidecar=False,
    options=("ids", "units", "durations", "levels_first"),
)
