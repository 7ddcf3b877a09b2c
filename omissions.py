"""What a recipe's run leaves out and why: optional stages that cannot be made, and those whose manifest lacks what they need.

A stage's record, RUN/stages/NAME.json, holds the reason as `left_out`, `skipped` or (of one that ended the run) `failed`, and `out`,
the folder that is missing for it. Records are files because on SLURM each stage is a process of its own.
"""

import json
import os
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

# Of a verb, the function that raises ValueError where the manifest of its config alone shows that it cannot be done.
FORESEEN = {
    "pretrain": "pretrain.batches:require_audio",
    "cluster": "quantize.clustering:require_frames",
    "measure": "quantize.measuring:require_frames",
    "train-synthesizer": "pretrain.batches:require_audio",
    "finetune": "pretrain.ctc.finetuning:require_transcripts",
    "transfer": "pretrain.ctc.transfer:require_transcripts",
}


def require_feasible(verb: str, config: Any) -> None:
    """ValueError where the config's finished manifest lacks what the verb needs."""
    if verb in FORESEEN:
        module, _, function = FORESEEN[verb].partition(":")
        getattr(import_module(module), function)(config)


def reasons(run: Path, reads: Iterable[str] = ()) -> dict[str, str]:
    """Stage → why it was left out of `run`, for those whose output is missing still.

    A stage that began, did not end and leads to one of the paths `reads` is among them: on SLURM its job may have been killed.
    """
    found = {}
    for name, record in _records(run).items():
        if reason := record.get("left_out") or record.get("failed") or record.get("skipped", "").removeprefix("skipped, "):
            found[name] = reason
        elif "pid" in record and "summary" not in record and any(_lies_in(path, record["out"]) for path in reads):
            found[name] = f"it began and did not end; `wordless status {run}` shows more"
    return found


def lacking(run: Path, reads: Iterable[str]) -> str | None:
    """Why a stage that reads the paths `reads` cannot be made: the first stage there that was left out. Its reason is its own."""
    records, left_out = _records(run), reasons(run)
    found = (name for path in reads for name in left_out if _lies_in(path, records[name]["out"]))
    return next((f"needs {name}, which was left out" for name in found), None)


def _records(run: Path) -> dict[str, dict[str, Any]]:
    """Records of stages whose output is not there, by name. A report has no output of its own that others read."""
    from pretrain.artefact import is_complete

    read = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((run / "stages").glob("*.json"))}
    return {
        name: record
        for name, record in read.items()
        if record["verb"] != "report" and "out" in record and not is_complete(record["out"])
    }


def _lies_in(path: str, folder: str) -> bool:
    return f"{os.path.abspath(path)}{os.sep}".startswith(f"{folder}{os.sep}")
