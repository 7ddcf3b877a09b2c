"""The verb `transfer`: how much pretraining is worth at each budget of labels, as a table and a curve.

Every budget is fine-tuned from every system (the pretrained encoder, the same architecture from fresh weights, others that are
named) with every seed, and transcribes every test. Such a cell lies in a folder of its own, `OUT/10min_pretrained_seed0/`: the run
of `finetune` in `recognizer`, and a folder of `transcribe` for each test. A cell that stands is not repeated, so work that was
interrupted goes on where it was, and cells may as well be made by the verbs themselves, by several processes (`part`) or machines.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from pretrain.config import Config, PathStr, Seed, differences, parse_config, part_of, share
from pretrain.ctc.curve import as_text, summarize, write_curve
from pretrain.ctc.finetuning import FinetuneConfig, finetune
from pretrain.ctc.subsets import Budget, amount, draw_subset, transcribed
from pretrain.ctc.text import TextConfig
from pretrain.ctc.transcription import TranscribeConfig, transcribe
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.progress import console
from pretrain.store.artefact import commit, is_complete, known_by, read_meta, require_absent
from pretrain.store.disk import atomic_path, write_json
from pretrain.store.lock import locked
from pretrain.training.checkpoint import load_weights
from pretrain.training.parallel import resolve_device
from pretrain.training.stopping import answer_late
from pretrain.training.task import NEUTRAL

__all__ = ["TransferConfig", "as_text", "transfer"]

PRETRAINED, SCRATCH = "pretrained", "scratch"  # the two systems that `encoder` stands for
# Keys that say how something is computed, or where it lies, not what.
HOW = {*NEUTRAL, "out", "device", "batch_seconds", "workers", "decoding.processes"}
NAME = re.compile(r"[\w.-]+")  # of what becomes part of a folder's name

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("budget", "system")),
        ("seed", pa.int64()),
        ("initialization", pa.string()),
        ("label_minutes", pa.float64()),
        ("steps", pa.int64()),
        ("best_step", pa.int64()),
        ("best_valid_wer", pa.float64()),
        ("train_seconds", pa.float64()),
        ("test", pa.string()),
        ("counted", pa.string()),
        *((f"{rate}{bound}", pa.float64()) for rate in ("wer", "cer") for bound in ("", "_low", "_high")),
        *(
            (name, pa.int64())
            for name in ("substitutions", "insertions", "deletions", "reference_words", "scored_utterances")
        ),
        ("transcripts", pa.string()),
    ]
)


class TransferConfig(Config):
    """Budgets x systems x seeds, what is fine-tuned and transcribed, and with which settings."""

    out: PathStr
    manifest: PathStr
    encoder: PathStr | None = Field(
        None,
        description="a pretraining run: it is the system `pretrained`, and `scratch` its architecture with fresh weights",
    )
    systems: dict[str, dict[str, Any]] = Field(
        {},
        description="name -> keys of `finetune` for it alone: more systems (encoder or labels), or other settings of those two",
    )
    budgets: tuple[Budget, ...] = Field(("10min", "1h", "10h"), min_length=1)
    seeds: tuple[Seed, ...] = Field(
        (0,),
        min_length=1,
        description="of training, and of the draw of labels where finetune.budget_seed is not given",
    )
    finetune: dict[str, Any] = Field(
        description="keys of `finetune` for all cells: ctc, batches, optimizer, training, text …"
    )
    by_budget: dict[Budget, dict[str, Any]] = Field(
        {},
        description="budget -> keys of `finetune` that differ (systems' own go over them), and a table `transcribe` of those of it",
    )
    tests: dict[str, dict[str, Any]] = Field(
        {"test": {}},
        min_length=1,
        description="name -> keys of `transcribe`; without manifest and split, the split of that name. The first one is drawn",
    )
    transcribe: dict[str, Any] = Field({}, description="keys of `transcribe` for all tests: decoding …")
    baseline: str | None = Field(
        None, description="the system that others are compared with: scratch, or else the last"
    )
    part: Annotated[str | None, part_of('"2/8" for the second of eight shares')] = Field(
        None,
        description='"2/8": the second of eight shares of the cells, for job arrays; the last writes the table',
    )

    @model_validator(mode="after")
    def _every_cell_is_valid(self) -> Self:
        """Every mistake in the settings of any cell, each told once, with the first cell that has it."""
        reserved = {"out", "manifest", "budget"}
        problems = [
            f"{key}: {name!r} is no name for a folder; letters, digits and . _ - are"
            for key in ("systems", "tests")
            for name in getattr(self, key)
            if not NAME.fullmatch(name)
        ]
        if "recognizer" in self.tests:
            problems.append(
                "tests: 'recognizer' is the name of the folder beside the tests'; call it otherwise"
            )
        for where, table in (
            ("finetune", self.finetune),
            *((f"by_budget.{k}", v) for k, v in self.by_budget.items()),
            *((f"systems.{k}", v) for k, v in self.systems.items()),
        ):
            problems += [
                f"{where}.{key}: is set for each cell by `transfer`; leave it out"
                for key in sorted(reserved & table.keys())
            ]
            if "seed" in (training if isinstance(training := table.get("training"), dict) else {}):
                problems.append(f"{where}.training.seed: the seeds are those of `seeds`; leave it out")
        for where, table in (
            ("transcribe", self.transcribe),
            *((f"tests.{k}", v) for k, v in self.tests.items()),
            *((f"by_budget.{k}.transcribe", v.get("transcribe", {})) for k, v in self.by_budget.items()),
        ):
            if not isinstance(table, dict):
                problems.append(f"{where}: a table of keys of `transcribe`, not {table!r}")
                continue
            problems += [
                f"{where}.{key}: is set for each cell by `transfer`; leave it out"
                for key in ("out", "recognizer")
                if key in table
            ]
        if not self.all_systems:
            problems.append("encoder: give a pretraining run, or `systems` of your own")
        elif self.baseline is not None and self.baseline not in self.all_systems:
            problems.append(
                f"baseline: {self.baseline!r} is none of the systems {', '.join(self.all_systems)}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            problems.append(f"seeds: each once, not {list(self.seeds)}")
        amounts = [amount(budget) for budget in self.budgets]
        if equal := [
            budget for budget, asked in zip(self.budgets, amounts, strict=True) if amounts.count(asked) > 1
        ]:
            problems.append(f"budgets: each once, but there are equal ones in {', '.join(equal)}")
        if not problems:
            told: dict[str, str] = {}
            for cell in cells(self):
                settings: list[Callable[[], Config]] = [
                    cell.finetuning,
                    *(partial(cell.transcribing, test) for test in self.tests),
                ]
                for parse in settings:
                    try:
                        parse()
                    except ValueError as error:
                        for line in str(error).split("\n"):
                            told.setdefault(line.partition(": ")[2], line)
            problems = list(told.values())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def all_systems(self) -> dict[str, dict[str, Any]]:
        """Name -> keys of `finetune`, those of `encoder` among them."""
        known: dict[str, dict[str, Any]] = {}
        if self.encoder is not None:
            known = {
                PRETRAINED: {"encoder": self.encoder},
                SCRATCH: {"encoder": self.encoder, "initialization": "random"},
            }
        return {name: known.get(name, {}) | self.systems.get(name, {}) for name in {**known, **self.systems}}

    @property
    def compared_with(self) -> str:
        """The system that the others are compared with."""
        return self.baseline or (SCRATCH if SCRATCH in self.all_systems else list(self.all_systems)[-1])


class Cell(NamedTuple):
    """One budget, system and seed."""

    config: TransferConfig
    budget: str
    system: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.budget.replace('%', 'percent')}_{self.system}_seed{self.seed}"

    @property
    def recognizer(self) -> Path:
        return Path(self.config.out, self.name, "recognizer")

    def transcripts(self, test: str) -> Path:
        """The folder of a test's transcripts."""
        return Path(self.config.out, self.name, test)

    def finetuning(self) -> FinetuneConfig:
        """The config of this cell's `finetune`; ValueError for a mistake in it."""
        config = self.config
        of_budget = {
            key: value for key, value in config.by_budget.get(self.budget, {}).items() if key != "transcribe"
        }
        tree = merged(merged(config.finetune, of_budget), config.all_systems[self.system])
        given = tree.get("training", {})
        seeds = {"training": {**given, "seed": self.seed} if isinstance(given, dict) else given}
        fixed = {"out": str(self.recognizer), "manifest": config.manifest, "budget": self.budget}
        return parse_config(
            FinetuneConfig, {"budget_seed": self.seed, **tree, **seeds, **fixed}, f"finetune ({self.name})"
        )

    def transcribing(self, test: str) -> TranscribeConfig:
        """The config of this cell's `transcribe` of a test; ValueError for a mistake in it."""
        of_budget = self.config.by_budget.get(self.budget, {}).get("transcribe", {})
        tree = merged(merged(self.config.transcribe, of_budget), self.config.tests[test])
        tree = {"split": None if "manifest" in tree else test, "manifest": self.config.manifest, **tree}
        if labels := self.config.all_systems[self.system].get("labels"):
            tree = {"labels": labels, **tree}  # a test of another manifest names its own
        else:
            tree.pop("labels", None)  # those are for the systems that read units
        fixed = {"out": str(self.transcripts(test)), "recognizer": str(self.recognizer)}
        return parse_config(TranscribeConfig, {**tree, **fixed}, f"transcribe ({self.name}, {test})")

    def make(self) -> None:
        """Fine-tune and transcribe what does not stand; ValueError where it stands with other settings or of other inputs."""
        config = self.finetuning()
        if not is_made(config, "recognizer"):
            say(f"{self.name}: fine-tuning")
            with locked(config.out):  # the draw of labels, too, which comes before the training
                finetune(config)
            answer_late()
        for test in self.config.tests:
            if not is_made(to_do := self.transcribing(test), "transcripts"):
                with locked(to_do.out):
                    transcribe(to_do)

    def stands(self) -> bool:
        """Whether everything of it is there."""
        return all(
            is_complete(folder)
            for folder in (self.recognizer, *(self.transcripts(test) for test in self.config.tests))
        )

    def fingerprints(self) -> dict[str, str]:
        """Of the recogniser and of each test's transcripts."""
        folders = (self.recognizer, *(self.transcripts(test) for test in self.config.tests))
        return {folder.name: read_meta(folder)["fingerprint"] for folder in folders}

    def encoder_fingerprint(self) -> list[str]:
        """Of the encoder that this cell comes from; none for units."""
        parents = read_meta(self.recognizer)["parents"]
        return [parents["encoder"]] if "encoder" in parents else []

    def rows(self) -> list[dict[str, Any]]:
        """A row of the table for each test."""
        config, trained = self.finetuning(), read_json(self.recognizer / "summary.json")
        run = read_meta(self.recognizer, "recognizer")
        known = {
            "budget": self.budget,
            "system": self.system,
            "seed": self.seed,
            "initialization": "random" if config.labels else config.initialization,
            "label_minutes": run["label_minutes"],
            "steps": trained["steps"],
            "best_step": trained.get("best_step"),
            "best_valid_wer": trained.get("best_valid_wer"),
            "train_seconds": trained.get("seconds"),
        }
        rows = []
        for test in self.config.tests:
            scores = read_json(self.transcripts(test) / "summary.json")
            if "wer" not in scores:
                raise ValueError(
                    f"{self.transcripts(test)}: no utterance of this test has a transcript; without, there is no WER"
                )
            bounds = {rate: scores.get(f"{rate}_interval") or (None, None) for rate in ("wer", "cer")}
            rates = {
                key: value
                for rate, (low, high) in bounds.items()
                for key, value in ((rate, scores.get(rate)), (f"{rate}_low", low), (f"{rate}_high", high))
            }
            counts = (
                "counted",
                "substitutions",
                "insertions",
                "deletions",
                "reference_words",
                "scored_utterances",
            )
            place = str(self.transcripts(test).relative_to(self.config.out))
            rows.append(
                {**known, "test": test, **{key: scores[key] for key in counts}, **rates, "transcripts": place}
            )
        return rows


def cells(config: TransferConfig) -> list[Cell]:
    """Every cell, the systems of one budget beside each other."""
    return [
        Cell(config, budget, system, seed)
        for budget in config.budgets
        for seed in config.seeds
        for system in config.all_systems
    ]


def transfer(config: TransferConfig) -> dict[str, Any]:
    """Run the verb; returns `cells` (rows of the table), `curve` and `comparisons` (see `pretrain.ctc.curve`).

    Writes `transfer.parquet` (a row for each cell and test), `summary.json`, and the curve as `transfer.svg` and `transfer.png`.
    With `part`, the share that finds every cell standing writes them; until then the summary has `cells_missing`. Inputs that are not
    there, and budgets above what is transcribed, are a ValueError before any cell is begun. A cell that fails does not keep the
    others from being made; the ValueError at the end names those that did, and why. A finished curve with other settings is replaced
    once every cell that is asked for stands, and stays as it is until then.
    """
    out = Path(config.out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "transfer: runs its cells in one process; share them out with `part`, or train large cells with `finetune` under torchrun"
        )
    asked = config.model_copy(update={"part": None}).resolved()
    if not is_complete(out) or read_meta(out)["kind"] != "transfer":
        require_absent(out)
    elif not any(differences(read_meta(out)["config"], asked)):
        raise ValueError(
            f"{out}: already holds this curve, finished; budgets, systems, seeds and tests that are added to the settings are added to it"
        )
    every = cells(config)
    mine = every[share(config.part)]
    left = [cell for cell in mine if not cell.stands()]
    if unused := [budget for budget in config.by_budget if budget not in config.budgets]:
        say(
            f"by_budget: settings of {', '.join(unused)} are not used; budgets are {', '.join(config.budgets)}"
        )
    names = ", ".join(cell.name for cell in left) or "none"
    say(f"{len(mine) - len(left)} of {len(mine)} cells stand; left: {names}")
    require_inputs(left)
    failed: dict[str, list[str]] = {}  # by what went wrong, with which cells
    for cell in mine:  # those that stand, too: whether they are what is asked for
        try:
            cell.make()
        except (ValueError, RuntimeError) as error:  # RuntimeError: torch's, out of memory among them
            alike = failed.setdefault(str(error), [])
            alike.append(cell.name)
            say(f"{cell.name}: failed{f': {error}' if len(alike) == 1 else f', as {alike[0]} did'}")
    if failed:
        lines = "\n".join(f"  {', '.join(alike)}: {problem}" for problem, alike in failed.items())
        count = sum(map(len, failed.values()))
        raise ValueError(f"{out}: {count} of {len(mine)} cells failed; the others are kept:\n{lines}")
    if missing := [cell.name for cell in every if not cell.stands()]:
        return {"part": config.part, "cells": len(mine), "cells_missing": missing}
    rows = [row for cell in every for row in cell.rows()]
    summary = {"cells": rows, **summarize(rows, out, config.compared_with)}
    parents = {"manifest": Manifest(config.manifest).fingerprint}
    parents |= {
        f"{c.name}/{name}": fingerprint for c in every for name, fingerprint in c.fingerprints().items()
    }
    encoders = {f for c in every if c.finetuning().encoder == config.encoder for f in c.encoder_fingerprint()}
    if len(encoders) > 1:
        raise ValueError(
            f"{out}: cells come from {len(encoders)} different weights of {config.encoder}, such as checkpoints of a run that went on; "
            "remove the older ones, whose meta.json names them under `parents`"
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
    """Before hours of work: whether what these cells read is there, each thing looked at once. ValueError with all that is not."""
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


def require_transcripts(config: TransferConfig) -> None:
    """ValueError for budgets above what is transcribed; reads the manifest alone."""
    for wanted in dict.fromkeys(_labelled(cell.finetuning()) for cell in cells(config)):
        _require_labelled(*wanted)


def is_made(config: FinetuneConfig | TranscribeConfig, kind: str) -> bool:
    """Whether the output of `config` stands; ValueError where it stands with other settings or was made from other inputs."""
    if not is_complete(config.out):
        return False
    meta, now = read_meta(config.out, kind), config.resolved()
    changed = {
        key: f"{key}: {old!r} -> {new!r}"
        for key, old, new in differences(meta["config"], now)
        if key not in HOW
    }
    for name, fingerprint in meta["parents"].items():
        folder = now.get(name)
        if isinstance(folder, str) and (known := known_by(folder)):
            if fingerprint not in known:
                raise ValueError(
                    f"{config.out}: was made from {name} {fingerprint}, which {folder} is not; remove it to make it again"
                )
            changed.pop(name, None)  # the same thing in another place
    if changed:
        listed = "; ".join(changed.values())
        raise ValueError(
            f"{config.out}: stands with other settings ({listed}); restore them, or remove it to make it again"
        )
    return True


def merged(tree: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`tree` with the values of `over`, table by table."""
    both = {
        key: merged(tree[key], value)
        if isinstance(value, dict) and isinstance(tree.get(key), dict)
        else value
        for key, value in over.items()
    }
    return {**tree, **both}


def say(text: str) -> None:
    """A line on the terminal, as it is."""
    console.print(f"transfer: {text}", markup=False, highlight=False, soft_wrap=True)


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
