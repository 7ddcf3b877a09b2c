"""The verb `label-efficiency`: how much pretraining is worth at each budget of labels, as a table and a
curve.

Every budget is fine-tuned from every system (the pretrained encoder, the same architecture from fresh
weights, others that are named) with every seed, and transcribes every test. Such a cell lies in a folder of
its own, `OUT/10min_pretrained_seed0/`: the run of `finetune` in `recognizer`, and a folder of `transcribe`
for each test. A cell that stands is not repeated, so work that was interrupted goes on where it was, and
cells may as well be made by the verbs themselves, by several processes (`part`) or machines.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.config import differences, share
from pretrain.ctc.cells import SCHEMA, Cell, LabelEfficiencyConfig, cells, say
from pretrain.ctc.curve import as_text as as_text
from pretrain.ctc.curve import summarize, write_curve
from pretrain.ctc.finetune_config import FinetuneConfig
from pretrain.ctc.subsets import draw_subset, transcribed
from pretrain.ctc.text import TextConfig
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.store.artefact import commit, is_complete, read_meta, require_absent
from pretrain.store.disk import atomic_path, write_json
from pretrain.training.checkpoint import load_weights
from pretrain.training.parallel import resolve_device


def label_efficiency(config: LabelEfficiencyConfig) -> dict[str, Any]:
    """Runs the verb; returns `cells` (rows of the table), `curve` and `comparisons` (see
    `pretrain.ctc.curve`).

    Writes `transfer.parquet` (a row for each cell and test), `summary.json`, and the curve as `transfer.svg`
    and `transfer.png`. With `part`, the share that finds every cell done writes them; until then the summary
    has `cells_missing`. Raises ValueError for missing inputs, and budgets above what is transcribed, before
    any cell is begun. A cell that fails does not keep the others from being made; the ValueError at the end
    names the failed ones, with reasons. A finished curve with other settings is replaced once every cell that
    is asked for is done.
    """
    out = Path(config.out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "label-efficiency: runs its cells in one process; share them out with `part`, or train large "
            "cells with `finetune` under torchrun"
        )
    asked = config.model_copy(update={"part": None}).resolved()
    if not is_complete(out) or read_meta(out)["kind"] != "transfer":
        require_absent(out)
    elif not any(differences(read_meta(out)["config"], asked)):
        raise ValueError(
            f"{out}: already holds this curve, finished; budgets, systems, seeds and tests that are added to "
            "the settings are added to it"
        )
    every = cells(config)
    mine = every[share(config.part)]
    left = [cell for cell in mine if not cell.done()]
    if unused := [budget for budget in config.by_budget if budget not in config.budgets]:
        say(
            f"by_budget: settings of {', '.join(unused)} are not used; budgets are "
            f"{', '.join(config.budgets)}"
        )
    names = ", ".join(cell.name for cell in left) or "none"
    say(f"{len(mine) - len(left)} of {len(mine)} cells are done; left: {names}")
    require_inputs(left)
    _make(out, mine)
    if missing := [cell.name for cell in every if not cell.done()]:
        return {"part": config.part, "cells": len(mine), "cells_missing": missing}
    return _finish(config, out, every, asked)


def _make(out: Path, mine: Sequence[Cell]) -> None:
    """Makes the cells, and checks those that are done. Raises ValueError at the end if some failed."""
    failed: dict[str, list[str]] = {}  # cells by their error
    for cell in mine:
        try:
            cell.make()
        except (ValueError, RuntimeError) as error:  # RuntimeError: of torch, such as out of memory
            alike = failed.setdefault(str(error), [])
            alike.append(cell.name)
            say(f"{cell.name}: failed{f': {error}' if len(alike) == 1 else f', as {alike[0]} did'}")
    if failed:
        lines = "\n".join(f"  {', '.join(alike)}: {problem}" for problem, alike in failed.items())
        count = sum(map(len, failed.values()))
        raise ValueError(f"{out}: {count} of {len(mine)} cells failed; the others are kept:\n{lines}")


def _finish(
    config: LabelEfficiencyConfig, out: Path, every: Sequence[Cell], asked: dict[str, Any]
) -> dict[str, Any]:
    """Writes the table, the summary and the curve of all cells."""
    rows = [row for cell in every for row in cell.rows()]
    summary = {"cells": rows, **summarize(rows, out, config.compared_with)}
    parents = {"manifest": Manifest(config.manifest).fingerprint}
    for cell in every:
        parents |= {f"{cell.name}/{name}": fingerprint for name, fingerprint in cell.fingerprints().items()}
    encoders = {f for c in every if c.finetuning().encoder == config.encoder for f in c.encoder_fingerprint()}
    if len(encoders) > 1:
        raise ValueError(
            f"{out}: cells come from {len(encoders)} different weights of {config.encoder}, such as "
            "checkpoints of a run that went on; remove the older ones, whose meta.json names them under "
            "`parents`"
        )
    parents |= {"encoder": encoders.pop()} if encoders else {}
    (out / "meta.json").unlink(missing_ok=True)  # of the curve that this one replaces
    with atomic_path(out / "transfer.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary)
    write_json(out / "summary.json", summary)
    write_curve(out, summary["curve"])
    files = ["transfer.parquet", "summary.json", "transfer.svg", "transfer.png"]
    commit(out, "transfer", asked, parents, files)
    return summary


def require_inputs(left: Sequence[Cell]) -> None:
    """Before hours of work: whether what these cells read is there, each thing looked at once. ValueError
    with all that is not."""
    wanted: dict[tuple[Any, ...], None] = {}  # functions with their arguments
    for cell in left:
        learning = cell.finetuning()
        if not is_complete(cell.recognizer):
            wanted[resolve_device, learning.training.device, "finetune.training.device"] = None
            wanted[_require_labelled, *_labelled(learning)] = None
            for key, read in (("valid_manifest", Manifest), ("encoder", load_weights), ("labels", Labels)):
                if (folder := getattr(learning, key)) is not None:
                    wanted[read, folder] = None
        for test in cell.config.tests:
            hearing = cell.transcribing(test)
            wanted[resolve_device, hearing.device, "transcribe.device"] = None
            wanted[_require_split, hearing.manifest, hearing.split] = None
    problems: dict[str, None] = {}
    for require, *arguments in wanted:
        try:
            require(*arguments)
        except ValueError as error:
            problems[str(error)] = None
    if problems:
        raise ValueError("\n".join(problems))


def _require_split(manifest: str, split: str | None) -> None:
    Manifest(manifest).select(split)


def _require_labelled(
    manifest: str, split: str | None, text: TextConfig, budget: str, at_least: str | None
) -> None:
    """ValueError for a budget above the transcribed audio. (`finetune` says what of it cannot be used.)"""
    chosen = Manifest(manifest).select(split)
    if len(rows := transcribed(chosen, text)):
        draw_subset(chosen, rows, budget, 0, at_least)


def _labelled(learning: FinetuneConfig) -> tuple[str, str | None, TextConfig, str, str | None]:
    """What `_require_labelled` is about, of a cell."""
    return learning.manifest, learning.split, learning.text, learning.budget, learning.budget_at_least


def require_transcripts(config: LabelEfficiencyConfig) -> None:
    """ValueError for budgets above what is transcribed; reads the manifest alone."""
    for wanted in dict.fromkeys(_labelled(cell.finetuning()) for cell in cells(config)):
        _require_labelled(*wanted)
