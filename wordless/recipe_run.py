"""A run of a recipe in this process: the stages in order, those that are left out, and the records of
both."""

import os
import shutil
import socket
import time
import traceback
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from pretrain.data.manifest import Manifest
from pretrain.progress import say
from pretrain.store.artefact import is_complete
from pretrain.store.destination import require_writable
from pretrain.store.disk import DiskFull
from pretrain.store.lock import locked, taking_turns
from slurm.jobs import require_no_job
from slurm.status import write_recipe
from wordless.finished import deviations
from wordless.recipe import Recipe
from wordless.stage_records import lacking, read_record, reasons, write_record


class RecipeRun:
    """The stages `chosen` of a recipe, in order. `redo` removes and repeats outputs made with other
    settings."""

    def __init__(self, recipe: Recipe, chosen: list[str], *, redo: bool = False):
        self.recipe, self.chosen, self.redo = recipe, chosen, redo
        self.folder = recipe.folder
        self.left_out: dict[str, str] = {}  # by `run`: stages and the reasons

    def require_no_job(self) -> None:
        """Raises ValueError if a job works on one of the stages, or on all of them."""
        cancels = {"run": str(self.folder), **{name: f"{self.folder} {name}" for name in self.chosen}}
        require_no_job(self.folder / "jobs", cancels)

    def require_feasible(self, num_processes: int) -> None:
        """Raises ValueError, before any work, if an output has other settings or cannot be written, or if so
        many processes cannot do the stages."""
        if num_processes > 1 and not (len(self.chosen) == 1 and self.recipe.verb(self.chosen[0]).distributed):
            raise ValueError(
                f"{self.recipe.source}: a recipe runs in one process. Several take one stage that trains: "
                "`--only STAGE`; or --on slurm, which makes a job of each stage"
            )
        for name in self.chosen:
            if self.idle(name) is None:
                require_writable(self.recipe.parse(name).out)

    def record(self, command: list[str], skip: set[str], given: float) -> None:
        """Write what `wordless status` reads: the stages, the command that runs them and when it was
        given."""
        if os.environ.get("RANK", "0") == "0":
            stages = [
                {
                    "name": name,
                    "verb": self.recipe.verb_of(name),
                    "out": os.path.abspath(self.recipe.out(name)),
                    "left_out": name in skip,
                }
                for name in self.recipe.stages
            ]
            write_recipe(self.folder, command, stages, given)

    def run(self) -> tuple[str | None, dict[str, Any]]:
        """Run the stages that are not done; returns verb and summary of the last (in most recipes the
        report).

        Optional stages that could not be made are in `left_out`, with the reasons. If a needed one fails, the
        reports that follow it are made, and its error is raised.
        """
        for place, name in enumerate(self.chosen):
            following = self.chosen[place + 1 :]
            try:
                with self._occupied_stage(name):
                    summary = self._run_stage(name)
            except Exception:
                if "failed" in self._record_of(name) and self.recipe.verb_of(name) != "report":
                    self._report_nevertheless(following)
                raise
            for note in summary.get("notes", []) if following else []:
                say(f"{name}: note: {note}")  # the notes of the last stage are printed with its summary
            if self.recipe.verb_of(name) == "index":
                self._foresee(following)
            if following and self.recipe.verb(name).distributed:
                from pretrain.training.stopping import answer_late

                answer_late()  # a signal of the last step, which the next stage may not handle
            if _is_unfinished(summary):
                if following:
                    wait = f"{following[0]} and what follows wait for the part that is the last"
                    say(f"{name}: other parts have not made all of it; {wait}")
                return self.recipe.verb_of(name), summary
        for record in map(self._record_of, reversed(self.chosen)):
            if "summary" in record:
                return record["verb"], record["summary"]
        return None, {}

    def occupied(self) -> AbstractContextManager[None]:
        """Within, no other process runs several stages of this recipe, or writes the only one chosen.

        Raises ValueError if one does.
        """
        if len(self.chosen) == 1:
            return self._occupied_stage(self.chosen[0])
        return locked(self.folder / "stages", name=self.folder)

    def _occupied_stage(self, name: str) -> AbstractContextManager[None]:
        """Within, no other process writes a stage's output, unless there is nothing to do."""
        config = self.recipe.parse(name)
        if name in self.left_out or self.idle(name):
            return nullcontext()
        return locked(config.out, getattr(config, "part", None))

    def _run_stage(self, name: str) -> dict[str, Any]:
        """The stage's summary; empty if there was nothing to do."""
        config, verb = self.recipe.parse(name), self.recipe.verb_of(name)
        if name in self.left_out:
            return {}
        if (reason := self.idle(name)) is not None:
            say(f"{name}: {reason}")
            if reason.startswith("skipped"):
                self._write_record(name, skipped=reason)
            return {}
        reads = self.recipe.paths(name)
        if name in self.recipe.optional and (reason := lacking(self.folder, reads)) is not None:
            return self._leave_out(name, reason)
        if verb == "report":
            config = config.model_copy(update={"left_out": reasons(self.folder, reads)})
        elif self.redo:
            self._remove(name)
        say(f"{name}: {verb} -> {config.out}")
        times = {"began": time.time()}
        if getattr(config, "part", None) is None:
            self._write_record(name, **times, host=socket.gethostname(), pid=os.getpid())
        began = time.monotonic()
        try:
            summary = self.recipe.verb(name).load()[1](config)
        except Exception as error:
            return self._fail(name, error, times)
        if not _is_unfinished(summary):  # the last part's summary is of all parts
            self._write_record(name, **times, seconds=time.monotonic() - began, summary=summary)
        return summary

    def _fail(self, name: str, error: Exception, times: dict[str, Any]) -> dict[str, Any]:
        """Leave an optional stage out; of any other record the failure and raise its error."""
        users = isinstance(error, ValueError)
        reason = str(error) if users else f"{type(error).__name__}: {error}"
        ends_all = isinstance(error, (DiskFull, ConnectionError))  # the other stages would meet it as well
        if name not in self.recipe.optional or ends_all:
            self._write_record(name, **times, failed=reason)
            raise error
        if not users:  # no mistake of the user's, such as a GPU without memory
            traceback.print_exception(error)
        return self._leave_out(name, reason)

    def _foresee(self, following: list[str]) -> None:
        """Before hours of work on others, leave out the optional stages that a finished manifest does not
        allow.

        Raises ValueError for a needed one.
        """
        for name in following:
            config, reads = self.recipe.parse(name), self.recipe.reads(name)
            if name in self.left_out or self.idle(name) is not None:
                continue
            # Only what this run left out: a stage that an earlier run left out may still be made.
            if name in self.recipe.optional and (parent := next(filter(self.left_out.get, reads), None)):
                self._leave_out(name, f"needs {parent}, which was left out")
            elif is_complete(getattr(config, "manifest", None) or ""):
                try:
                    self.recipe.verb(name).require_feasible(config)
                except ValueError as error:
                    if name not in self.recipe.optional:
                        raise ValueError(f"{name}: {error}") from None
                    self._leave_out(name, str(error))

    def _report_nevertheless(self, following: list[str]) -> None:
        """Make the reports among the stages that follow one that failed."""
        for name in following:
            if self.recipe.verb_of(name) == "report":
                with suppress(ValueError):  # it may have nothing to report, and the failure is the message
                    self._run_stage(name)

    def _leave_out(self, name: str, reason: str) -> dict[str, Any]:
        """Print and record that a stage is left out; its summary, which is empty."""
        say(f"{name}: left out: {reason}")
        self.left_out[name] = reason
        self._write_record(name, left_out=reason)
        return {}

    def idle(self, name: str) -> str | None:
        """Why a stage has nothing to do; None if it has.

        Raises ValueError if its output has other settings, without `redo`.
        """
        config, needs = self.recipe.parse(name), self.recipe.stages[name].get("needs")
        if needs and is_complete(config.manifest) and not getattr(Manifest(config.manifest), f"has_{needs}"):
            return f"skipped, the manifest has no {needs}"
        if self.recipe.verb_of(name) == "report" or not is_complete(config.out):
            return None
        changed, replaced = deviations(config)
        if not changed and not replaced:
            return f"finished already ({Path(config.out)})"
        if self.redo or (self.recipe.verb(name).grows and not replaced):
            return None
        made = f"was made from {'; '.join(replaced)}"
        reason = f"was made with other settings ({'; '.join(changed)})" if changed else made
        raise ValueError(f"{name}: {Path(config.out)} {reason}. --redo removes it and runs the stage again")

    def _remove(self, name: str) -> None:
        """Remove an output with other settings. One of several processes (ranks, parts) does it; the others
        then find it gone."""
        with taking_turns(self.folder / "stages" / f".{name}.lock"):
            out = Path(self.recipe.parse(name).out)
            if is_complete(out) and self.idle(name) is None:
                if self.folder.absolute().is_relative_to(out.absolute()):
                    raise ValueError(
                        f"{name}: {out} holds the whole run; remove what is to be made again by hand"
                    )
                removed = out.with_name(f".{out.name}.{os.getpid()}.removed")
                out.rename(removed)  # at once, whatever ends this process before all of it is gone
                shutil.rmtree(removed)

    def _record_of(self, name: str) -> dict[str, Any]:
        return read_record(self.folder, name)

    def _write_record(self, name: str, **known: Any) -> None:
        verb, out = self.recipe.verb_of(name), os.path.abspath(self.recipe.parse(name).out)
        write_record(self.folder, name, {"verb": verb, "out": out, **known})


def _is_unfinished(summary: dict[str, Any]) -> bool:
    """Whether other parts of a stage have work to do: the summary of a stage with `part`."""
    return bool(summary.get("cells_missing") or summary.get("shards_missing"))
