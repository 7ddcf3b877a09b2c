"""What a recipe records of its stages, and from that, what it left out and why.

A stage's record, RUN/stages/NAME.json, has the reason as `left_out`, `skipped` or (of one that ended the run) `failed`, and `out`,
the folder that is missing for it. Records are files because on SLURM each stage is a process of its own.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.store.artefact import is_complete


def read_records(run: Path) -> dict[str, dict[str, Any]]:
    """The records of a recipe's run by stage; none where `run` is not a recipe's folder."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((run / "stages").glob("*.json"))
    }


def reasons(run: Path, reads: Iterable[str] = ()) -> dict[str, str]:
    """Stage → why it was left out of `run`, for those whose output is missing still.

    A stage that began, did not end and leads to one of the paths `reads` is among them: on SLURM its job may have been killed.
    """
    found = {}
    for name, record in _missing(run).items():
        if (
            reason := record.get("left_out")
            or record.get("failed")
            or record.get("skipped", "").removeprefix("skipped, ")
        ):
            found[name] = reason
        elif (
            "pid" in record
            and "summary" not in record
            and any(_lies_in(path, record.get("out")) for path in reads)
        ):
            found[name] = f"it began and did not end; `wordless status {run}` shows more"
    return found


def lacking(run: Path, reads: Iterable[str]) -> str | None:
    """Why a stage that reads the paths `reads` cannot be made: the first stage there that was left out. Its reason is its own."""
    records, left_out = _missing(run), reasons(run)
    found = (name for path in reads for name in left_out if _lies_in(path, records[name].get("out")))
    return next((f"needs {name}, which was left out" for name in found), None)


def _missing(run: Path) -> dict[str, dict[str, Any]]:
    """Records of stages whose output is not there, by name. A report has no output of its own that others read."""
    return {
        name: record
        for name, record in read_records(run).items()
        if record["verb"] != "report" and not ("out" in record and is_complete(record["out"]))
    }


def _lies_in(path: str, folder: str | None) -> bool:
    return folder is not None and f"{os.path.abspath(path)}{os.sep}".startswith(f"{folder}{os.sep}")
