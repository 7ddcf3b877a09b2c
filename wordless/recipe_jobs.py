"""What a recipe submits to SLURM: a job for each stage that is not done, with its settings in a file of its
own."""

from pathlib import Path

from pretrain.progress import say
from pretrain.store.destination import require_writable
from slurm.pipeline import Stage
from slurm.submission import freeze
from wordless.recipe import as_toml, with_paths
from wordless.recipe_run import RecipeRun


def plan(run: RecipeRun, *, write: bool) -> list[Stage]:
    """The jobs of the stages that are not done, or that read one that will be made again.

    Each job gets its settings as they are now, in a file, which `write` False only names.
    """
    jobs: list[Stage] = []
    for name in run.chosen:
        reason = run.idle(name)
        if reason is None or {job.name for job in jobs} & set(run.recipe.reads(name)):
            jobs.append(_job(run, name, write=write))
        else:
            say(f"{name}: {reason}")
    return jobs


def _job(run: RecipeRun, name: str, *, write: bool) -> Stage:
    recipe = run.recipe
    config, reads, verb = recipe.parse(name), recipe.reads(name), recipe.verb_of(name)
    if write:
        require_writable(config.out)
    table = {key: value for key, value in recipe.stages[name].items() if key != "slurm"}
    table = {**with_paths(recipe.resolve(table, name), config.resolved()), "out": recipe.out(name)}
    if name in recipe.optional:
        table["optional"] = True  # also if it is so by what it reads, which is not in this file
    text = as_toml({"run": str(run.folder), name: table}, recipe.source)
    settings = freeze(text, (run.folder / "jobs" / name).absolute(), write=write)
    argv = ["run", str(settings), "--only", name, *["--redo"] * run.redo]
    after_any = tuple(parent for parent in reads if parent in recipe.optional) if verb == "report" else ()
    out = Path(config.out).absolute()
    return Stage(name, verb, argv, out, reads, recipe.resources(name), f"{name}.part", after_any)
