"""What a recipe records of its stages, and from that, what it left out and why.

A stage's record, RUN/stages/NAME.json, has the reason as `left_out`, `skipped` or (of a stage that ended the
run) `failed`, and `out`, the folder that is missing for it. Records are files because on SLURM each stage is
a process of its own.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.store.artefact import is_complete
from pretrain.store.disk import write_json


def record_path(run: Path, stage: str) -> Path:
    """The file of a stage's record."""
    return run / "stages" / f"{stage}.json"


def read_record(run: Path, stage: str) -> dict[str, Any]:
    """The record of a stage; empty if there is none."""
    path = record_path(run, stage)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_record(run: Path, stage: str, record: dict[str, Any]) -> None:
    """Write a stage's record, from one rank."""
    if os.environ.get("RANK", "0") == "0":
        write_json(record_path(run, stage), record)


def read_records(run: Path) -> dict[str, dict[str, Any]]:
    """The records of a recipe's run by stage; none if `run` is not a recipe's folder."""
    return {path.stem: read_record(run, path.stem) for path in sorted((run / "stages").glob("*.json"))}


def reasons(run: Path, reads: Iterable[str] = ()) -> dict[str, str]:
    """Stage → why it was left out of `run`, for each whose output is still missing.

    A stage that began, did not end and leads to one of the paths `reads` is among them: its SLURM job may
    have been killed.
    """
    found = {}
    for name, record in _missing(run).items():
        skipped = record.get("skipped", "").removeprefix("skipped, ")
        if reason := record.get("left_out") or record.get("failed") or skipped:
            found[name] = reason
        elif _began_only(record) and any(_lies_in(path, record.get("out")) for path in reads):
            found[name] = f"it began and did not end; `wordless status {run}` shows more"
    return found


def lacking(run: Path, reads: Iterable[str]) -> str | None:
    """Why a stage that reads the paths `reads` cannot be made: the first stage there that was left out."""
    records, left_out = _missing(run), reasons(run)
    found = (name for path in reads for name in left_out if _lies_in(path, records[name].get("out")))
    return next((f"needs {name}, which was left out" for name in found), None)


def _missing(run: Path) -> dict[str, dict[str, Any]]:
    """Records of stages without a complete output, by name, but of reports, whose output no stage reads."""
    return {
        name: record
        for name, record in read_records(run).items()
        if record["verb"] != "report" and not ("out" in record and is_complete(record["out"]))
    }


def _began_only(record: dict[str, Any]) -> bool:
    return "pid" in record and "summary" not in record


def _lies_in(path: str, folder: str | None) -> bool:
    return folder is not None and f"{os.path.abspath(path)}{os.sep}".startswith(f"{folder}{os.sep}")
