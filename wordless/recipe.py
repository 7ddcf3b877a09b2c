"""Recipes: stages in a TOML file, each a verb and its config, that run in order.

`Recipe` reads the file, resolves references between stages and validates them. `recipe_run.py` runs the
stages in this process, `recipe_jobs.py` plans a SLURM job for each.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from pretrain.config import expand_path, parse_config
from pretrain.store.schemes import split_scheme
from slurm.resources import Resources
from wordless.job_resources import overlaid, parse_resources
from wordless.verbs import Verb, canonical, require_fitting, verb_named

RECIPE_KEYS = {"run", "slurm"}
STAGE_KEYS = {"verb", "needs", "optional", "slurm"}  # of a stage's table; every other key is its verb's
RUN_FOLDERS = {"jobs", "stages"}  # what a recipe's run contains besides its stages' folders
NEEDS = ("text", "phones", "words")


class Recipe:
    """Stages in a TOML file: each table with a `verb` is a stage; its other keys are that verb's config.

    A stage writes to `run/NAME` unless it has an `out`. A string `@NAME` or `@NAME/file` is the output of an
    earlier stage, `@` alone the run's folder. `needs = "text"`, `"phones"` or `"words"` skips a stage whose
    manifest has none. A table `[NAME.slurm]` in a stage lies over the recipe's `[slurm]`. A stage with
    `optional = true` that fails (but for a full disk) is left out, and with it the stages that read it,
    except reports, which get the reasons as `left_out`.
    """

    def __init__(self, tree: dict[str, Any], source: str):
        self.source, self.slurm = source, tree.get("slurm", {})
        self.stages = {
            name: table for name, table in tree.items() if isinstance(table, dict) and name not in RECIPE_KEYS
        }
        problems = [
            f"{name}: unknown key; a recipe has `run`, `slurm` and tables with a `verb`"
            for name in tree
            if name not in RECIPE_KEYS and name not in self.stages
        ]
        for name, table in self.stages.items():
            if "verb" not in table:
                problems.append(f"{name}: a stage needs a `verb`")
            if not isinstance(optional := table.get("optional", False), bool):
                problems.append(f"{name}.optional: true or false; got {optional!r}")
            if not re.fullmatch(r"\w[\w.-]*", name) or name in RUN_FOLDERS:
                problems.append(
                    f"{name!r}: no name for a stage, whose folder is named so: letters, digits, -, _ and ., "
                    f"not {' or '.join(sorted(RUN_FOLDERS))}"
                )
        if not isinstance(tree.get("run"), str):
            problems.append("run: the run's folder is needed")
        if problems:
            raise ValueError("\n".join(f"{source}: {problem}" for problem in problems))
        self.folder = Path(self._expand(tree["run"], "run"))
        self._parsed: dict[str, Any] = {}

    def verb_of(self, name: str) -> str:
        """The present name of a stage's verb."""
        return str(canonical(self.stages[name]["verb"]))

    def verb(self, name: str) -> Verb:
        """The verb of a stage. Raises ValueError if it does not exist."""
        return verb_named(self.stages[name]["verb"], f"{self.source}: {name}")

    def choose(self, skip: set[str], only: set[str]) -> list[str]:
        """The stages to run, in order."""
        if unknown := (skip | only) - set(self.stages):
            raise ValueError(
                f"{self.source}: no stage {', '.join(sorted(unknown))}; there are {', '.join(self.stages)}"
            )
        return [name for name in self.stages if name not in skip and (not only or name in only)]

    @cached_property
    def optional(self) -> set[str]:
        """The stages that a run continues without: those marked so, and all that read one, except reports."""
        found: set[str] = set()
        for name, table in self.stages.items():
            if table.get("optional") or (table["verb"] != "report" and found & set(self.reads(name))):
                found.add(name)
        return found

    def settings(self, name: str) -> dict[str, Any]:
        """The keys of a stage's table that are its verb's."""
        return {key: value for key, value in self.stages[name].items() if key not in STAGE_KEYS}

    def parse(self, name: str) -> Any:
        """The validated config of a stage, its references resolved. Each stage is parsed once."""
        if name not in self._parsed:
            table, needs = self.settings(name), self.stages[name].get("needs")
            config_class, _ = self.verb(name).load()
            if needs not in (None, *NEEDS) or (needs and "manifest" not in table):
                raise ValueError(
                    f'{self.source}: {name}.needs: "text", "phones" or "words", of the stage\'s `manifest`; '
                    f"got {needs!r}"
                )
            resolved = {"out": self.out(name), **self.resolve(table, name)}
            try:
                self._parsed[name] = parse_config(config_class, resolved, self.source)
            except ValueError as error:
                raise self._within(name, error) from None
        return self._parsed[name]

    def resources(self, name: str) -> Resources:
        """What a stage's job asks for: the recipe's [slurm], of which a verb of one process takes one task
        and one GPU, with the stage's own [slurm] over it."""
        table, verb = self.stages[name], self.verb(name)
        resources = parse_resources(self.slurm, self.source)
        modest: dict[str, Any] = {} if verb.has_parts(table) else {"array": 1}
        if not verb.distributed:
            modest |= {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": min(1, resources.gpus_per_node)}
        modest["name"] = f"{resources.name or 'wordless'}-{name}"
        try:
            resources = overlaid(resources.model_copy(update=modest), table.get("slurm", {}), self.source)
            require_fitting(self.verb_of(name), table, resources, self.source)
        except ValueError as error:
            raise self._within(name, error) from None
        return resources

    def _within(self, name: str, error: ValueError) -> ValueError:
        """The mistakes in a stage's table, each under the stage's name."""
        return ValueError(str(error).replace(f"{self.source}: ", f"{self.source}: {name}."))

    def check(self) -> None:
        """Validate every stage and what it asks for, reporting all mistakes at once."""
        problems = []
        checks: list[Callable[[str], Any]] = [self.parse]
        try:
            parse_resources(self.slurm, self.source)
            checks.append(self.resources)
        except ValueError as error:
            problems.append(str(error))
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

    def out(self, name: str) -> str:
        """The folder that a stage writes."""
        out = self.resolve(self.stages[name].get("out", str(self.folder / name)), name)
        return self._expand(out, f"{name}.out") if isinstance(out, str) else str(out)

    def _expand(self, path: str, key: str) -> str:
        try:
            return expand_path(path)
        except ValueError as error:
            raise ValueError(f"{self.source}: {key}: {error}") from None

    def resolve(self, value: Any, name: str) -> Any:
        """A value of a stage's table with every `@NAME` replaced by the path that it means."""
        if isinstance(value, dict):
            return {key: self.resolve(item, name) for key, item in value.items()}
        if isinstance(value, list):
            return [self.resolve(item, name) for item in value]
        if not isinstance(value, str) or not value.startswith("@"):
            return value
        stage, _, rest = value[1:].partition("/")
        if stage == "":
            return str(self.folder / rest)
        if stage not in (earlier := self._earlier(name)):
            there = ", ".join(earlier) or "none"
            raise ValueError(f"{self.source}: {name}: {value!r} is no earlier stage; there are {there}")
        return str(Path(self.out(stage)) / rest)

    def _earlier(self, name: str) -> list[str]:
        return list(self.stages)[: list(self.stages).index(name)]

    def reads(self, name: str) -> tuple[str, ...]:
        """The earlier stages that a stage follows: those that it names by `@`, and those whose output a path
        of its table leads into, or contains."""
        outs = {stage: f"{os.path.abspath(self.out(stage))}{os.sep}" for stage in self._earlier(name)}
        table = self.settings(name)
        found = {text[1:].partition("/")[0] for text in strings(table) if text.startswith("@")}
        for text in strings({key: value for key, value in table.items() if key != "out"}):
            path = self._absolute(text, name)
            if path is not None:
                around = [stage for stage, out in outs.items() if path.startswith(out)]
                found |= set(sorted(around, key=lambda stage: len(outs[stage]))[-1:])
                found |= {stage for stage, out in outs.items() if out.startswith(path) and out != path}
        return tuple(stage for stage in outs if stage in found)

    def _absolute(self, text: str, name: str) -> str | None:
        """The path that a text of a stage's table names, with a separator at its end; None if it names
        none."""
        if not text or split_scheme(text) is not None:
            return None
        path = str(self.resolve(text, name))
        with suppress(ValueError):  # no path, such as a regular expression
            path = expand_path(path)
        return f"{os.path.abspath(path)}{os.sep}"

    def paths(self, name: str) -> list[str]:
        """All strings of a stage's table but its `out`, references resolved: what it reads is among them."""
        table = {key: value for key, value in self.settings(name).items() if key != "out"}
        return list(strings(with_paths(self.resolve(table, name), self.parse(name).resolved())))


def strings(value: Any) -> Iterator[str]:
    """Every string in nested tables and lists."""
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


def with_paths(given: Any, resolved: Any) -> Any:
    """The settings `given` with each string as the resolved config has it: paths as they are here, whatever
    the variables of a job's environment are."""
    if isinstance(given, dict) and isinstance(resolved, dict):
        return {key: with_paths(value, resolved.get(key)) for key, value in given.items()}
    if isinstance(given, list) and isinstance(resolved, list) and len(given) == len(resolved):
        return [with_paths(*pair) for pair in zip(given, resolved, strict=True)]
    return resolved if isinstance(given, str) and isinstance(resolved, str) else given


def as_toml(tree: dict[str, Any], source: str) -> str:
    """Settings as the text of a file of their own, with a comment that names their origin."""
    import tomli_w

    origin = "with what was given on the command line, as it was when the job was submitted"
    return f"# {os.path.basename(source)}, {origin}\n{tomli_w.dumps(tree)}"
