"""The command `run`: a recipe here, as one local job, or with a SLURM job for each stage."""

import json
import os
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pretrain.progress import say
from pretrain.store.destination import require_writable
from pretrain.store.interrupts import ends_in_a_line
from slurm import pipeline
from slurm.launch import require_slurm
from wordless.job_resources import parse_resources
from wordless.recipe import Recipe
from wordless.recipe_jobs import plan
from wordless.recipe_run import RecipeRun
from wordless.running import Settings, print_config, print_summary, read_tree


def run_recipe(
    path: Path,
    name: str,
    overrides: list[str],
    skip: list[str],
    only: list[str],
    redo: bool,
    on: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run the recipe in the file `path`, which the user called `name`."""
    began = time.time()
    recipe = Recipe(read_tree(path, overrides), str(path))
    run = RecipeRun(recipe, recipe.choose(set(skip), set(only)), redo=redo)
    recipe.check()
    if dry_run:
        _show(run, on)
        return
    flags = [part for stage in skip for part in ("--skip", stage)]
    flags += [part for stage in only for part in ("--only", stage)]
    flags += ["--redo"] * redo
    command = ["run", name, *overrides, *flags, *(["--on", on] if on != "here" else [])]
    record = partial(run.record, command, set(skip), began)
    require_writable(run.folder)
    if on == "here":
        of_a_job = path.resolve().is_relative_to((run.folder / "jobs").resolve())
        _run_here(run, as_json, None if of_a_job else record)
    elif on == "local":
        _run_as_one_job(run, [*flags, *["--json"] * as_json], record)
    else:
        _submit(run, as_json, record)


def _show(run: RecipeRun, on: str) -> None:
    print_config({"run": str(run.folder), **run.recipe.resolved()})
    if on == "slurm":
        texts = pipeline.sbatch_texts(plan(run, write=False), run.folder / "jobs")
        print(f"\n# what sbatch would get\n{texts}")


def _run_here(run: RecipeRun, as_json: bool, record: Callable[[], None] | None) -> None:
    """`record` is None in a job, whose submission has recorded the run."""
    run.require_feasible(int(os.environ.get("WORLD_SIZE", "1")))
    with ends_in_a_line(str(run.folder), resumes=True), run.occupied():
        if record is not None:
            run.require_no_job()
            record()
        verb, summary = run.run()
    left_out = run.left_out
    # A job of one stage ends well, or those that follow it would not start.
    if record is not None and set(run.chosen) <= left_out.keys():
        raise ValueError("\n".join(f"{name}: {reason}" for name, reason in left_out.items()))
    print_summary(verb, {**summary, "left_out": left_out} if as_json and left_out else summary, as_json)
    if left_out:  # again at the end, where it is seen
        say(f"\n{len(left_out)} of {len(run.recipe.stages)} stages were left out:")
    for name, reason in left_out.items():
        say(f"  {name}: {reason.splitlines()[0] if reason else ''}")


def _run_as_one_job(run: RecipeRun, flags: list[str], record: Callable[[], None]) -> None:
    recipe = run.recipe
    run.require_feasible(parse_resources(recipe.slurm, recipe.source).tasks_per_node)
    run.require_no_job()
    tree = {"run": str(run.folder), **recipe.stages}
    with ends_in_a_line(str(run.folder), resumes=True):
        settings = Settings("run", tree, recipe.slurm, recipe.source, run.folder / "jobs" / "run", flags)
        settings.submit("local", run.folder, record)


def _submit(run: RecipeRun, as_json: bool, record: Callable[[], None]) -> None:
    require_slurm()
    entries = pipeline.submit(plan(run, write=True), run.folder / "jobs", record)
    print(json.dumps({"stages": pipeline.as_json(entries)}) if as_json else pipeline.table(entries))
    follow = f"`wordless status {shlex.quote(str(run.folder))}` shows how they fare"
    say(follow if entries else "nothing to submit")
