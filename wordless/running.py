"""One verb, here or as a job: its config is validated, its output is locked, its summary is printed."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.config import apply_overrides, parse_config, read_toml, without_none
from pretrain.progress import say
from pretrain.store.artefact import require_absent
from pretrain.store.destination import require_writable
from pretrain.store.interrupts import ends_in_a_line
from pretrain.store.lock import locked
from slurm.follow import follow
from slurm.jobs import require_no_job
from slurm.launch import launch, require_slurm, sbatch_text
from slurm.resources import Resources
from slurm.submission import Place, freeze, submitting
from wordless.finished import is_current
from wordless.job_resources import parse_resources
from wordless.recipe import as_toml, with_paths
from wordless.value_lines import value_lines
from wordless.verbs import VERBS, canonical, load, require_fitting


def read_tree(path: Path, overrides: list[str] | None) -> dict[str, Any]:
    """A TOML file with the overrides of the command line applied."""
    return apply_overrides(read_toml(path), overrides or [])


def run_verb(name: str, tree: dict[str, Any], source: str, on: str, dry_run: bool, as_json: bool) -> None:
    """Validate a verb's config and run it here or as a job."""
    if canonical(tree.pop("verb", name)) != name:
        raise ValueError(f"{source}: verb: is a config for another verb than `{name}`")
    table, verb = tree.pop("slurm", {}), VERBS[name]
    config_class, function = verb.load()
    config: Any = parse_config(config_class, tree, source)
    out = Path(config.out)
    folder = out.absolute().parent / "jobs" / out.absolute().name
    if on == "here" and not dry_run:
        # A later attempt of a job may find its work done; a user who submits is refused before.
        if int(os.environ.get("WORDLESS_ATTEMPT", "1")) > 1 and is_current(config):
            say(f"{config.out}: finished already, by an earlier attempt of this job")
            return
        require_writable(out)
        if "WORDLESS_ATTEMPT" not in os.environ:  # else this is that job
            require_no_job(folder.parent, {folder.name: config.out})
        with writing(config.out, resumes=verb.resumes, part=getattr(config, "part", None)):
            print_summary(name, function(config), as_json)
        return
    settings = Settings(
        name, with_paths(tree, config.resolved()), table, source, folder, ["--json"] * as_json
    )
    if dry_run:
        print_config(config.resolved())
        resources = settings.resources()
        if on == "slurm":
            argv, array = settings.argv(write=False), resources.array
            print(f"\n# what sbatch would get\n{sbatch_text(argv, resources, folder, array=array)}")
        return
    require_writable(out)
    if not verb.grows:
        require_absent(out)
    with ends_in_a_line(config.out, resumes=verb.resumes):
        settings.submit(on, out)


@contextmanager
def writing(out: str | Path, *, resumes: bool, part: str | None = None) -> Iterator[None]:
    """Within, no other process writes `out`, and an interrupt ends in a line that tells the user how to
    continue."""
    with ends_in_a_line(str(out), resumes=resumes), locked(out, part):
        yield


class Settings:
    """What a job of its own runs: a verb (or "run") on a config as it is now, whatever its file becomes."""

    def __init__(
        self, name: str, tree: dict[str, Any], slurm: Any, source: str, folder: Path, flags: list[str]
    ):
        self.name, self.tree, self.slurm, self.source = name, tree, slurm, source
        self.folder, self.flags = folder, flags

    def resources(self) -> Resources:
        """What the job asks for."""
        resources = parse_resources(self.slurm, self.source)
        if self.name != "run":
            require_fitting(self.name, self.tree, resources, self.source)
        return resources

    def argv(self, *, write: bool) -> list[str]:
        """The command line on a file with the settings, which `write` False only names."""
        text = as_toml({**self.tree, "slurm": self.slurm}, self.source)
        return [self.name, str(freeze(text, self.folder.absolute(), write=write)), *self.flags]

    def submit(self, on: str, out: Path, record: Callable[[], None] = lambda: None) -> None:
        """Submit the job, and follow a local one to its end. `record` is called once it is submitted."""
        resources = self.resources()
        if on == "slurm":
            require_slurm()
        with submitting(self.folder.absolute().parent):
            require_no_job(self.folder.parent, {self.folder.name: str(out)})
            argv = self.argv(write=True)
            place: Place = "local" if on == "local" else "slurm"
            launched = launch(argv, place, resources, self.folder, wait=False, out=out, array=resources.array)
            record()
        if on == "local":
            launched = follow(launched)
        say(f"job {launched.job_id}: logs in {launched.folder}")
        if launched.status:
            sys.exit(launched.status)


def print_config(resolved: dict[str, Any]) -> None:
    """Print a resolved config as TOML."""
    import tomli_w

    print(tomli_w.dumps(without_none(resolved)), end="")


def print_summary(verb: str | None, summary: dict[str, Any], as_json: bool) -> None:
    """Print a verb's summary, from one rank: as JSON, as the verb formats it, or a line for each value."""
    for note in summary.get("notes", []):  # on stderr, so with --json, too
        say(f"note: {note}")
    if os.environ.get("RANK", "0") != "0":
        return
    writer = VERBS[verb].text if verb is not None else None
    if as_json:
        print(json.dumps(summary))
    elif verb is not None and writer is not None:
        print(load(f"{VERBS[verb].module}:{writer}")(summary))
    else:
        for line in value_lines({key: value for key, value in summary.items() if key != "notes"}):
            print(line)
