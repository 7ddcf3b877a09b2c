"""The verbs, and recipes of them: stages in a TOML file that run in order here, or as a SLURM job each.

A verb is a config class and a function; VERBS names both, and they are imported when they are needed. Every room is reached from
here and from `cli.py`, and no room reaches back.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wordless import omissions

if TYPE_CHECKING:
    from slurm.pipeline import Stage
    from slurm.resources import Resources


@dataclass(frozen=True)
class Verb:
    """Where a verb's config class and function are."""

    module: str
    config: str
    function: str
    help: str
    text: str | None = (
        None  # the function that writes the summary for a terminal; without one, a line for each value
    )
    grows: bool = False  # a finished output with other settings can be added to: the verb itself checks what stands in it
    distributed: bool = False  # several processes can do it together; any other verb runs in one
    resumes: bool = False  # the same command goes on from what it had done; any other verb begins again

    def load(self) -> tuple[type, Callable[[Any], dict[str, Any]]]:
        module = import_module(self.module)
        return getattr(module, self.config), getattr(module, self.function)


VERBS = {
    "speech": Verb(
        "pretrain.data.speech",
        "SpeechConfig",
        "speech",
        "Make synthetic speech with true phone times (espeak-ng).",
    ),
    "index": Verb(
        "pretrain.data.indexing",
        "IndexConfig",
        "index",
        "List and check audio: a manifest from a folder, tars, .tsv or .jsonl.",
    ),
    "pretrain": Verb(
        "pretrain.objectives.pretraining",
        "PretrainConfig",
        "pretrain",
        "Train a HuBERT or wav2vec 2.0 encoder.",
        distributed=True,
        resumes=True,
    ),
    "cluster": Verb(
        "quantize.clustering",
        "ClusterConfig",
        "cluster",
        "Fit k-means on MFCC or on an encoder layer.",
        resumes=True,
    ),
    "encode": Verb(
        "quantize.encoding", "EncodeConfig", "encode", "Turn a corpus into labels, in one pass.", resumes=True
    ),
    "measure": Verb(
        "quantize.measuring",
        "MeasureConfig",
        "measure",
        "Unit quality: PNMI, ABX, probes; which layer.",
        "as_text",
    ),
    "pack": Verb(
        "units.packing",
        "PackConfig",
        "pack",
        "Labels, or other tools' units, to a unit corpus.",
        resumes=True,
    ),
    "train-lm": Verb(
        "units.lm.training",
        "TrainLMConfig",
        "train_lm",
        "Train the unit language model; DPO.",
        distributed=True,
        resumes=True,
    ),
    "score": Verb(
        "units.scores.scoring", "ScoreConfig", "score", "Likelihood and minimal pairs, beside their floors."
    ),
    "train-synthesizer": Verb(
        "units.sound.synthesis",
        "SynthesizerConfig",
        "train_synthesizer",
        "Learn how units sound.",
        distributed=True,
        resumes=True,
    ),
    "sample": Verb(
        "units.lm.sampling", "SampleConfig", "sample", "Continue units or audio; --audio FILE to hear it."
    ),
    "synthesize": Verb(
        "units.sound.listening",
        "SynthesizeConfig",
        "synthesize",
        "Units back to sound; how many survive the round trip.",
    ),
    "finetune": Verb(
        "pretrain.ctc.finetuning",
        "FinetuneConfig",
        "finetune",
        "Train a CTC recogniser on transcripts.",
        distributed=True,
        resumes=True,
    ),
    "transcribe": Verb(
        "pretrain.ctc.transcription",
        "TranscribeConfig",
        "transcribe",
        "Decode speech to text; WER and CER.",
        "as_text",
    ),
    "compare": Verb(
        "pretrain.ctc.comparison",
        "CompareConfig",
        "compare",
        "Is one recogniser better? Paired tests.",
        "as_text",
    ),
    "transfer": Verb(
        "pretrain.ctc.transfer",
        "TransferConfig",
        "transfer",
        "WER against labelled minutes, pretrained and not.",
        "as_text",
        grows=True,
        resumes=True,
    ),
    "report": Verb(
        "wordless.report.report",
        "ReportConfig",
        "report",
        "One self-contained HTML page of a run.",
        text="as_text",
    ),
}
RECIPE_KEYS = {"run", "slurm"}
STAGE_KEYS = {"verb", "needs", "optional", "slurm"}  # of a stage's table; every other key is its verb's
RUN_FOLDERS = {"jobs", "stages"}  # what a recipe's run has besides its stages' folders


def verb_named(name: Any, source: str) -> Verb:
    """The verb of that name, or a ValueError with those there are."""
    if not isinstance(name, str) or name not in VERBS:
        raise ValueError(f"{source}: no verb {name!r}; there are {', '.join(VERBS)}")
    return VERBS[name]


class Recipe:
    """Stages in a TOML file: each table with a `verb` is a stage; its other keys are that verb's config.

    A stage writes to `run/NAME` unless it has an `out`. A string `@NAME` or `@NAME/file` is the output of an earlier stage,
    `@` alone the run's folder. `needs = "text"`, `"phones"` or `"words"` skips a stage whose manifest has none. A table
    `[NAME.slurm]` in a stage lies over the recipe's `[slurm]`. A stage with `optional = true` that fails (but for a full disk) is left
    out, and with it the stages that read it, except reports, which get the reasons as `left_out`.
    """

    def __init__(self, tree: dict[str, Any], source: str):
        self.source, self.slurm = source, tree.get("slurm", {})
        self.stages = {
            name: table for name, table in tree.items() if isinstance(table, dict) and name not in RECIPE_KEYS
        }
        problems = [
            f"{source}: {name}: unknown key; a recipe has `run`, `slurm` and tables with a `verb`"
            for name in tree
            if name not in RECIPE_KEYS and name not in self.stages
        ]
        problems += [
            f"{source}: {name}: a stage needs a `verb`"
            for name, table in self.stages.items()
            if "verb" not in table
        ]
        problems += [
            f"{source}: {name}.optional: true or false; got {table['optional']!r}"
            for name, table in self.stages.items()
            if not isinstance(table.get("optional", False), bool)
        ]
        problems += [
            f"{source}: {name!r}: no name for a stage, whose folder is named so: letters, digits, -, _ and ., not "
            f"{' or '.join(sorted(RUN_FOLDERS))}"
            for name in self.stages
            if not re.fullmatch(r"\w[\w.-]*", name) or name in RUN_FOLDERS
        ]
        problems += [] if isinstance(tree.get("run"), str) else [f"{source}: run: the run's folder is needed"]
        if problems:
            raise ValueError("\n".join(problems))
        self.folder = Path(self._expand(tree["run"], "run"))
        self.left_out: dict[str, str] = {}  # by `run`: stages and the reasons

    def choose(self, skip: set[str], only: set[str]) -> list[str]:
        """The stages to run, in order."""
        if unknown := (skip | only) - set(self.stages):
            raise ValueError(
                f"{self.source}: no stage {', '.join(sorted(unknown))}; there are {', '.join(self.stages)}"
            )
        return [name for name in self.stages if name not in skip and (not only or name in only)]

    @cached_property
    def optional(self) -> set[str]:
        """The stages that the others go on without: they say so, or read one that does. A report goes on without what it reads."""
        found: set[str] = set()
        for name, table in self.stages.items():
            if table.get("optional") or (table["verb"] != "report" and found & set(self.reads(name))):
                found.add(name)
        return found

    def parse(self, name: str, **more: Any) -> Any:
        """The validated config of a stage, its references resolved; `more` keys are those of the run."""
        from pretrain.config import parse_config

        table = {key: value for key, value in self.stages[name].items() if key not in STAGE_KEYS}
        config_class, _ = verb_named(self.stages[name]["verb"], f"{self.source}: {name}").load()
        if (needs := self.stages[name].get("needs")) not in (None, "text", "phones", "words") or (
            needs and "manifest" not in table
        ):
            raise ValueError(
                f'{self.source}: {name}.needs: "text", "phones" or "words", of the stage\'s `manifest`; got {needs!r}'
            )
        resolved = {"out": self._out(name), **self._resolve(table, name), **more}
        try:
            return parse_config(config_class, resolved, self.source)
        except ValueError as error:
            raise self._within(name, error) from None

    def resources(self, name: str) -> "Resources":
        """What a stage's job asks for: the recipe's [slurm], of which a verb of one process takes one task and one GPU, and its own."""
        from slurm.resources import parse_resources

        table, verb = self.stages[name], verb_named(self.stages[name]["verb"], f"{self.source}: {name}")
        resources = parse_resources(self.slurm, self.source)
        modest: dict[str, Any] = {} if has_parts(table["verb"], table) else {"array": 1}
        if not verb.distributed:
            modest |= {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": min(1, resources.gpus_per_node)}
        resources = resources.model_copy(update={**modest, "name": f"{resources.name or 'wordless'}-{name}"})
        try:
            resources = resources.overlaid(table.get("slurm", {}), self.source)
            require_fitting(table["verb"], table, resources, self.source)
        except ValueError as error:
            raise self._within(name, error) from None
        return resources

    def _within(self, name: str, error: ValueError) -> ValueError:
        """The mistakes in a stage's table, each under the stage's name."""
        return ValueError(str(error).replace(f"{self.source}: ", f"{self.source}: {name}."))

    def check(self) -> None:
        """Validate every stage and what it asks for, reporting all mistakes at once."""
        from slurm.resources import parse_resources

        problems = []
        try:
            parse_resources(self.slurm, self.source)
            checks: tuple[Callable[[str], Any], ...] = (self.parse, self.resources)
        except ValueError as error:
            problems, checks = [str(error)], (self.parse,)
        for name in self.stages:
            for validate in checks:
                try:
                    validate(name)
                except ValueError as error:
                    problems.append(str(error))
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))

    def resolved(self) -> dict[str, Any]:
        """Every stage's resolved config, under its name."""
        kept = {
            name: {key: table[key] for key in ("verb", "needs", "optional") if key in table}
            for name, table in self.stages.items()
        }
        return {name: {**table, **self.parse(name).resolved()} for name, table in kept.items()}

    def _out(self, name: str) -> str:
        out = self._resolve(self.stages[name].get("out", str(self.folder / name)), name)
        return self._expand(out, f"{name}.out") if isinstance(out, str) else str(out)

    def _expand(self, path: str, key: str) -> str:
        """A path with `~` and variables replaced, as in every config."""
        from pretrain.config import expand_path

        try:
            return expand_path(path)
        except ValueError as error:
            raise ValueError(f"{self.source}: {key}: {error}") from None

    def _resolve(self, value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: self._resolve(item, name) for key, item in value.items()}
        if isinstance(value, list):
            return [self._resolve(item, name) for item in value]
        if not isinstance(value, str) or not value.startswith("@"):
            return value
        stage, _, rest = value[1:].partition("/")
        if stage == "":
            return str(self.folder / rest)
        if stage not in (earlier := self._earlier(name)):
            raise ValueError(
                f"{self.source}: {name}: {value!r} is no earlier stage; there are {', '.join(earlier) or 'none'}"
            )
        return str(Path(self._out(stage)) / rest)

    def _earlier(self, name: str) -> list[str]:
        return list(self.stages)[: list(self.stages).index(name)]

    def reads(self, name: str) -> tuple[str, ...]:
        """The earlier stages that a stage follows: those it names by `@`, and those whose output a path leads into, or holds."""
        from pretrain.store.schemes import split_scheme

        outs = {stage: os.path.abspath(self._out(stage)) for stage in self._earlier(name)}
        table = {key: value for key, value in self.stages[name].items() if key not in STAGE_KEYS}
        found = {text[1:].partition("/")[0] for text in _strings(table) if text.startswith("@")} - {""}
        for text in _strings({key: value for key, value in table.items() if key != "out"}):
            if text and split_scheme(text) is None:
                path = self._resolve(text, name)
                with suppress(ValueError):  # a text that is no path, such as a regular expression
                    path = self._expand(path, name)
                path = os.path.abspath(path)
                around = [
                    stage for stage, out in outs.items() if f"{path}{os.sep}".startswith(f"{out}{os.sep}")
                ]
                found |= {max(around, key=lambda stage: len(outs[stage]))} if around else set()
                found |= {stage for stage, out in outs.items() if out.startswith(f"{path}{os.sep}")}
        return tuple(stage for stage in outs if stage in found)

    def plan(self, chosen: list[str], redo: bool, *, write: bool) -> list["Stage"]:
        """What is to be submitted of the `chosen`: what does not stand, or reads what will be made anew. Each job gets its settings as
        they are now, in a file of its own, which `write` False only names."""
        from pretrain.store.destination import require_writable
        from slurm.pipeline import Stage, freeze

        jobs: list[Stage] = []
        for name in chosen:
            config, reads = self.parse(name), self.reads(name)
            reason = self.idle(name, config, redo)
            if reason is not None and not {job.name for job in jobs} & set(reads):
                say(f"{name}: {reason}")
                continue
            if write:
                require_writable(config.out)
            table = {key: value for key, value in self.stages[name].items() if key != "slurm"}
            table = {**with_paths(self._resolve(table, name), config.resolved()), "out": self._out(name)}
            if name in self.optional:
                table["optional"] = True  # also where it is so by what it reads, which is not in this file
            alone = {"run": str(self.folder), name: table}
            settings = freeze(
                as_toml(alone, self.source), (self.folder / "jobs" / name).absolute(), write=write
            )
            argv = ["run", str(settings), "--only", name, *["--redo"] * redo]
            out = Path(config.out).absolute()
            after_any = (
                tuple(parent for parent in reads if parent in self.optional)
                if table["verb"] == "report"
                else ()
            )
            jobs.append(
                Stage(name, table["verb"], argv, out, reads, self.resources(name), f"{name}.part", after_any)
            )
        return jobs

    def require_no_job(self, chosen: list[str]) -> None:
        """ValueError where a job is at work on one of the stages, or on all of them."""
        from slurm.jobs import require_no_job

        require_no_job(
            self.folder / "jobs",
            {"run": str(self.folder), **{name: f"{self.folder} {name}" for name in chosen}},
        )

    def require_feasible(self, chosen: list[str], redo: bool, num_processes: int) -> None:
        """ValueError, before any work, where a stage stands with other settings, its output cannot be written, or so many processes
        cannot do the stages."""
        from pretrain.store.destination import require_writable

        if num_processes > 1 and not (len(chosen) == 1 and VERBS[self.stages[chosen[0]]["verb"]].distributed):
            raise ValueError(
                f"{self.source}: a recipe runs in one process. Several take one stage that trains: `--only STAGE`; or --on slurm, "
                "which makes a job of each stage"
            )
        for name in chosen:
            config = self.parse(name)
            if self.idle(name, config, redo) is None:
                require_writable(config.out)

    def record(self, command: list[str], skip: set[str], given: float) -> None:
        """Tell `status` which stages there are and by which command they run, given at that time."""
        from slurm.status import write_recipe

        if os.environ.get("RANK", "0") == "0":
            stages = [
                {
                    "name": name,
                    "verb": table["verb"],
                    "out": os.path.abspath(self._out(name)),
                    "left_out": name in skip,
                }
                for name, table in self.stages.items()
            ]
            write_recipe(self.folder, command, stages, given)

    def run(self, chosen: list[str], redo: bool) -> tuple[str | None, dict[str, Any]]:
        """Run what does not stand yet, in order; returns verb and summary of the last stage (in most recipes the report).

        Optional stages that could not be made are in `left_out`, with the reasons. A needed one that fails is a ValueError, after the
        reports of what there is.
        """
        for place, (name, following) in enumerate(zip(chosen, [*chosen[1:], None], strict=True)):
            try:
                with self._occupied_stage(name, redo):
                    summary = self._run_stage(name, redo)
            except Exception:
                if "failed" in self._read_record(name) and self.stages[name]["verb"] != "report":
                    self._report_nevertheless(chosen[place + 1 :], redo)
                raise
            for note in (
                summary.get("notes", []) if following is not None else []
            ):  # the last one's go with its summary
                say(f"{name}: note: {note}")
            if self.stages[name]["verb"] == "index":
                self._foresee(chosen[place + 1 :], redo)
            if following is not None and VERBS[self.stages[name]["verb"]].distributed:
                from pretrain.training.stopping import answer_late

                answer_late()  # what follows may have no ear for a signal that came in the last step
            if _unfinished(summary):
                if following is not None:
                    say(
                        f"{name}: other parts have not made all of it; {following} and what follows wait for the part that is the last"
                    )
                return self.stages[name]["verb"], summary
        records = (self._read_record(name) for name in reversed(chosen))
        return next(
            ((record["verb"], record["summary"]) for record in records if "summary" in record), (None, {})
        )

    def occupied(self, chosen: list[str], redo: bool) -> AbstractContextManager[None]:
        """Within, no other process runs several stages of this recipe, or writes the only one chosen. ValueError where one does."""
        from pretrain.store.lock import locked

        if len(chosen) == 1:
            return self._occupied_stage(chosen[0], redo)
        return locked(self.folder / "stages", name=self.folder)

    def _occupied_stage(self, name: str, redo: bool) -> AbstractContextManager[None]:
        """Within, no other process writes a stage's output, unless there is nothing to do."""
        from pretrain.store.lock import locked

        config = self.parse(name)
        if name in self.left_out or self.idle(name, config, redo):
            return nullcontext()
        return locked(config.out, getattr(config, "part", None))

    def _run_stage(self, name: str, redo: bool) -> dict[str, Any]:
        """Its summary; empty where there was nothing to do."""
        import socket
        import traceback

        from pretrain.store.disk import DiskFull
        from wordless.stage_records import lacking, reasons

        verb, config = self.stages[name]["verb"], self.parse(name)
        if name in self.left_out:
            return {}
        if (reason := self.idle(name, config, redo)) is not None:
            say(f"{name}: {reason}")
            if not reason.startswith("stands"):
                self._write_record(
                    name, {"verb": verb, "skipped": reason, "out": os.path.abspath(config.out)}
                )
            return {}
        if name in self.optional and (reason := lacking(self.folder, self._paths(name))) is not None:
            return self._leave_out(name, reason)
        if verb == "report":
            config = self.parse(name, left_out=reasons(self.folder, self._paths(name)))
        if redo and verb != "report":
            self._remove(name, config)
        say(f"{name}: {verb} -> {config.out}")
        record = {"verb": verb, "began": time.time(), "out": os.path.abspath(config.out)}
        if getattr(config, "part", None) is None:
            self._write_record(name, {**record, "host": socket.gethostname(), "pid": os.getpid()})
        began = time.monotonic()
        try:
            summary = VERBS[verb].load()[1](config)
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            if name in self.optional and not isinstance(
                error, (DiskFull, ConnectionError)
            ):  # which the other stages meet as well
                if not isinstance(
                    error, ValueError
                ):  # no mistake of the user's, such as a GPU without memory
                    traceback.print_exc()
                return self._leave_out(name, reason)
            self._write_record(name, {**record, "failed": reason})
            raise
        if not _unfinished(summary):  # the part that is the last tells of all
            self._write_record(name, {**record, "seconds": time.monotonic() - began, "summary": summary})
        return summary

    def _foresee(self, following: list[str], redo: bool) -> None:
        """Leave out, before hours of work, the optional stages that cannot be made of a finished manifest; ValueError for others."""
        from pretrain.store.artefact import is_complete

        for name in following:
            config = self.parse(name)
            if name in self.left_out or self.idle(name, config, redo) is not None:
                continue
            if name in self.optional and (parent := next(filter(self.left_out.get, self.reads(name)), None)):
                self._leave_out(
                    name, f"needs {parent}, which was left out"
                )  # now; what an earlier run left out may be made yet
            elif is_complete(getattr(config, "manifest", None) or ""):
                try:
                    omissions.require_feasible(self.stages[name]["verb"], config)
                except ValueError as error:
                    if name not in self.optional:
                        raise ValueError(f"{name}: {error}") from None
                    self._leave_out(name, str(error))

    def _report_nevertheless(self, following: list[str], redo: bool) -> None:
        """Make the reports among the stages `following` one that failed."""
        for name in following:
            if self.stages[name]["verb"] == "report":
                with suppress(ValueError):  # it may have nothing to report, and the failure is the message
                    self._run_stage(name, redo)

    def _leave_out(self, name: str, reason: str) -> dict[str, Any]:
        """Say and record that a stage is left out; its summary, which is empty."""
        say(f"{name}: left out: {reason}")
        self.left_out[name] = reason
        table = self.stages[name]
        self._write_record(
            name, {"verb": table["verb"], "left_out": reason, "out": os.path.abspath(self._out(name))}
        )
        return {}

    def _paths(self, name: str) -> list[str]:
        """All strings of a stage's table but its `out`, references resolved: the paths it reads are among them."""
        table = {key: value for key, value in self.stages[name].items() if key not in STAGE_KEYS | {"out"}}
        return list(_strings(with_paths(self._resolve(table, name), self.parse(name).resolved())))

    def idle(self, name: str, config: Any, redo: bool) -> str | None:
        """Why a stage has nothing to do; None where it has. ValueError where it stands with other settings, without `redo`."""
        from pretrain.store.artefact import is_complete

        table, out = self.stages[name], Path(config.out)
        if (
            "needs" in table
            and is_complete(config.manifest)
            and not _manifest_has(config.manifest, table["needs"])
        ):
            return f"skipped, the manifest has no {table['needs']}"
        if table["verb"] == "report" or not is_complete(out):
            return None
        changed, replaced = _deviations(out, config)
        if not changed and not replaced:
            return f"stands already ({out})"
        if redo or (VERBS[table["verb"]].grows and not replaced):
            return None
        reason = (
            f"stands with other settings ({'; '.join(changed)})"
            if changed
            else f"was made from {'; '.join(replaced)}"
        )
        raise ValueError(f"{name}: {out} {reason}. --redo removes it and runs the stage again")

    def _remove(self, name: str, config: Any) -> None:
        """Remove what stands with other settings. Of several processes (ranks, parts) one does it, and the others find new work there."""
        import shutil

        from pretrain.store.artefact import is_complete
        from pretrain.store.lock import taking_turns

        with taking_turns(self.folder / "stages" / f".{name}.lock"):
            if is_complete(out := Path(config.out)) and self.idle(name, config, redo=True) is None:
                if self.folder.absolute().is_relative_to(out.absolute()):
                    raise ValueError(
                        f"{name}: {out} holds the whole run; remove what is to be made again by hand"
                    )
                removed = out.with_name(f".{out.name}.{os.getpid()}.removed")
                out.rename(removed)  # at once, whatever ends this process before all of it is gone
                shutil.rmtree(removed)

    def _record_path(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.json"

    def _read_record(self, name: str) -> dict[str, Any]:
        path = self._record_path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _write_record(self, name: str, record: dict[str, Any]) -> None:
        from pretrain.store.disk import write_json

        if os.environ.get("RANK", "0") == "0":
            write_json(self._record_path(name), record)


def _unfinished(summary: dict[str, Any]) -> bool:
    """Whether other parts of a stage have work to do: the summary of a stage with `part`."""
    return bool(summary.get("cells_missing") or summary.get("shards_missing"))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value


def stands(config: Any) -> bool:
    """Whether what a verb would make is there, made with the same settings from what its inputs still are."""
    from pretrain.store.artefact import is_complete

    return is_complete(config.out) and not any(_deviations(Path(config.out), config))


def _deviations(out: Path, config: Any) -> tuple[list[str], list[str]]:
    """Of an artefact that stands: the settings that are others now, and the inputs that have been made anew."""
    from pretrain.config import differences
    from pretrain.store.artefact import read_meta

    meta, resolved = read_meta(out), config.resolved()
    changed = [
        f"{key}: {old!r} -> {new!r}"
        for key, old, new in differences(meta["config"], resolved)
        if key != "part"
    ]
    return changed, _replaced_inputs(meta, resolved)


def _replaced_inputs(meta: dict[str, Any], resolved: dict[str, Any]) -> list[str]:
    """Inputs of a standing artefact that have been made anew, otherwise, since: `key FINGERPRINT, which FOLDER no longer is`."""
    from pretrain.store.artefact import known_by

    inputs: dict[str, Any] = {}
    for key, value in resolved.items():  # those of a list are `source`, `source_1`, …
        values = value if isinstance(value, list) else [value]
        inputs |= {key + (f"_{n}" if n else ""): item for n, item in enumerate(values)}
    replaced = []
    for key, fingerprint in meta["parents"].items():
        path = Path(str(inputs.get(key)))
        folder = path.parent if path.is_file() else path
        if (known := known_by(folder)) and fingerprint not in known:
            replaced.append(f"{key} {fingerprint}, which {folder} no longer is")
    return replaced


def _manifest_has(manifest: str, what: str) -> bool:
    from pretrain.data.manifest import Manifest

    return bool(getattr(Manifest(manifest), f"has_{what}"))


def require_fitting(name: str, table: dict[str, Any], resources: "Resources", source: str) -> None:
    """ValueError where the verb `name` with the settings `table` cannot use so many tasks, or an array."""
    for key in ("nodes", "tasks_per_node"):
        if getattr(resources, key) > 1 and not VERBS[name].distributed:
            several = ", ".join(verb for verb in VERBS if VERBS[verb].distributed)
            raise ValueError(
                f"{source}: slurm.{key}: {getattr(resources, key)}, but `{name}` runs in one process; several take {several}"
            )
    if resources.array > 1 and not has_parts(name, table):
        why = "its `part` is given" if "part" in table else f"`{name}` has no `part`"
        raise ValueError(f"{source}: slurm.array: {resources.array}, but {why}")


def has_parts(name: str, table: dict[str, Any]) -> bool:
    """Whether the work of a verb with the settings `table` can be shared out by `part`."""
    fields = VERBS[name].load()[0].model_fields  # type: ignore[attr-defined]
    return "part" in fields and "part" not in table


def with_paths(given: Any, resolved: Any) -> Any:
    """The settings `given`, with the texts of the config that they became: paths as they are here, whatever a job's variables are."""
    if isinstance(given, dict) and isinstance(resolved, dict):
        return {key: with_paths(value, resolved.get(key)) for key, value in given.items()}
    if isinstance(given, list) and isinstance(resolved, list) and len(given) == len(resolved):
        return [with_paths(*pair) for pair in zip(given, resolved, strict=True)]
    return resolved if isinstance(given, str) and isinstance(resolved, str) else given


def as_toml(tree: dict[str, Any], source: str) -> str:
    """Settings for a file of their own, which says where they are from."""
    import tomli_w

    return f"# {os.path.basename(source)}, with what was given on the command line, as it was when the job was submitted\n{tomli_w.dumps(tree)}"


def say(text: str) -> None:
    """A line on stderr, from one rank."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
