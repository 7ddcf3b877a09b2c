"""The cells of a label-efficiency curve: a budget, a system and a seed each."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import pyarrow as pa
from pydantic import Field, model_validator

from pretrain.config import Config, PathStr, Seed, parse_config, part_of, with_new_names
from pretrain.ctc.finetune_config import FinetuneConfig
from pretrain.ctc.finetuning import finetune
from pretrain.ctc.reuse import is_made, merged
from pretrain.ctc.subsets import Budget, amount
from pretrain.ctc.transcribe_config import TranscribeConfig
from pretrain.ctc.transcription import transcribe
from pretrain.progress import console
from pretrain.store.artefact import is_complete, read_meta
from pretrain.store.lock import locked
from pretrain.training.stopping import answer_late

PRETRAINED, SCRATCH = "pretrained", "scratch"  # the two systems that `encoder` stands for


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


class LabelEfficiencyConfig(Config):
    """Budgets x systems x seeds, what is fine-tuned and transcribed, and with which settings."""

    out: PathStr
    manifest: PathStr
    encoder: PathStr | None = Field(
        None,
        description="a pretraining run: it is the system `pretrained`, and `scratch` its architecture with "
        "fresh weights",
    )
    systems: dict[str, dict[str, Any]] = Field(
        {},
        description="name -> keys of `finetune` for it alone: more systems (encoder or labels), or other "
        "settings of those two",
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
        description="budget -> keys of `finetune` that differ (systems' own go over them), and a table "
        "`transcribe` of those of it",
    )
    tests: dict[str, dict[str, Any]] = Field(
        {"test": {}},
        min_length=1,
        description="name -> keys of `transcribe`; without manifest and split, the split of that name. The "
        "first one is drawn",
    )
    transcribe: dict[str, Any] = Field({}, description="keys of `transcribe` for all tests: decoding …")
    baseline: str | None = Field(
        None, description="the system that others are compared with: scratch, or else the last"
    )
    part: Annotated[str | None, part_of('"2/8" for the second of eight shares')] = Field(
        None,
        description='"2/8": the second of eight shares of the cells, for job arrays; the last writes the '
        "table",
    )

    @model_validator(mode="after")
    def _every_cell_is_valid(self) -> Self:
        """Finds every mistake in the settings of any cell; each is named once, with the first cell that has
        it."""
        problems = [*self._wrong_names(), *self._set_by_the_verb(), *self._wrong_amounts()]
        if not problems:
            found: dict[str, str] = {}
            for cell in cells(self):
                parses: list[Callable[[], Config]] = [cell.finetuning]
                parses += [partial(cell.transcribing, test) for test in self.tests]
                for parse in parses:
                    try:
                        parse()
                    except ValueError as error:
                        for line in str(error).split("\n"):
                            found.setdefault(line.partition(": ")[2], line)
            problems = list(found.values())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _wrong_names(self) -> Iterator[str]:
        for key in ("systems", "tests"):
            for name in getattr(self, key):
                if not NAME.fullmatch(name):
                    yield f"{key}: {name!r} is no name for a folder; letters, digits and . _ - are"
        if "recognizer" in self.tests:
            yield "tests: 'recognizer' is the name of the folder beside the tests'; call it otherwise"
        if not self.all_systems:
            yield "encoder: give a pretraining run, or `systems` of your own"
        elif self.baseline is not None and self.baseline not in self.all_systems:
            yield f"baseline: {self.baseline!r} is none of the systems {', '.join(self.all_systems)}"

    def _set_by_the_verb(self) -> Iterator[str]:
        of_finetune = {"finetune": self.finetune}
        of_finetune |= {f"by_budget.{name}": table for name, table in self.by_budget.items()}
        of_finetune |= {f"systems.{name}": table for name, table in self.systems.items()}
        of_transcribe = {"transcribe": self.transcribe, **{f"tests.{k}": v for k, v in self.tests.items()}}
        for name, table in self.by_budget.items():
            of_transcribe[f"by_budget.{name}.transcribe"] = table.get("transcribe", {})
        for where, table in of_finetune.items():
            for key in sorted({"out", "manifest", "budget"} & table.keys()):
                yield f"{where}.{key}: is set for each cell by `label-efficiency`; leave it out"
            training = table.get("training")
            if isinstance(training, dict) and "seed" in training:
                yield f"{where}.training.seed: the seeds are those of `seeds`; leave it out"
        for where, table in of_transcribe.items():
            if not isinstance(table, dict):
                yield f"{where}: a table of keys of `transcribe`, not {table!r}"
                continue
            for key in ("out", "recognizer"):
                if key in table:
                    yield f"{where}.{key}: is set for each cell by `label-efficiency`; leave it out"

    def _wrong_amounts(self) -> Iterator[str]:
        if len(set(self.seeds)) < len(self.seeds):
            yield f"seeds: each once, not {list(self.seeds)}"
        amounts = [amount(budget) for budget in self.budgets]
        pairs = zip(self.budgets, amounts, strict=True)
        if equal := [budget for budget, asked in pairs if amounts.count(asked) > 1]:
            yield f"budgets: each once, but there are equal ones in {', '.join(equal)}"

    @property
    def all_systems(self) -> dict[str, dict[str, Any]]:
        """Name -> keys of `finetune`, those of `encoder` among them."""
        known: dict[str, dict[str, Any]] = {}
        if self.encoder is not None:
            known = {
                PRETRAINED: {"encoder": self.encoder},
                SCRATCH: {"encoder": self.encoder, "init": "random"},
            }
        own = {
            name: with_new_names(table, FinetuneConfig.model_fields) for name, table in self.systems.items()
        }
        return {name: known.get(name, {}) | own.get(name, {}) for name in {**known, **own}}

    @property
    def compared_with(self) -> str:
        """The system that the others are compared with."""
        return self.baseline or (SCRATCH if SCRATCH in self.all_systems else list(self.all_systems)[-1])


class Cell(NamedTuple):
    """One budget, system and seed."""

    config: LabelEfficiencyConfig
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
        known = FinetuneConfig.model_fields
        tables = config.finetune, of_budget, config.all_systems[self.system]
        tree: dict[str, Any] = {}
        for table in tables:
            tree = merged(tree, with_new_names(table, known))
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
        """Fine-tune and transcribe what does not stand; ValueError where it was made with other settings or
        of other inputs."""
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

    def done(self) -> bool:
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
            "initialization": "random" if config.labels else config.init,
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
                    f"{self.transcripts(test)}: no utterance of this test has a transcript; without, there "
                    "is no WER"
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


def cells(config: LabelEfficiencyConfig) -> list[Cell]:
    """Every cell, the systems of one budget beside each other."""
    return [
        Cell(config, budget, system, seed)
        for budget in config.budgets
        for seed in config.seeds
        for system in config.all_systems
    ]


def say(text: str) -> None:
    """A line on the terminal, as it is."""
    console.print(f"label-efficiency: {text}", markup=False, highlight=False, soft_wrap=True)


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
