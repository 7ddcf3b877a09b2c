"""The command line: every verb of the pipeline, `run` for a recipe of stages, `check` for configs and
artefacts.

This file has the commands and their options; what they do is in the modules that they import when they run,
so `wordless --help` imports no torch. A user's mistake is a ValueError: exit status 2 and its message.
"""

import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from wordless import __version__
from wordless.exporting import export_artefact
from wordless.importing import import_model
from wordless.options import ConfigPath, DryRun, Json, On, Overrides, RunFolder, path
from wordless.verbs import ALIASES, VERBS, Verb

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Speech units and textless language models from raw audio. The verbs, in the order of the pipeline:",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"wordless {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _run_config(name: str, config: Path, overrides: list[str], on: str, dry_run: bool, as_json: bool) -> None:
    from wordless.running import read_tree, run_verb

    run_verb(name, read_tree(config, overrides), str(config), on, dry_run, as_json)


def _add_verb(name: str, verb: Verb, command: str, *, hidden: bool) -> None:
    def run(
        config: ConfigPath,
        overrides: Overrides = None,
        on: On = "here",
        dry_run: DryRun = False,
        as_json: Json = False,
    ) -> None:
        _run_config(name, config, overrides or [], on, dry_run, as_json)

    app.command(command, help=verb.help, hidden=hidden)(run)


def index(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of audio or tars, a glob, a fairseq .tsv, JSON lines, or a CONFIG.toml."
        ),
    ],
    out: Annotated[str | None, typer.Argument(help="The manifest's folder (not with a CONFIG.toml).")] = None,
    overrides: Overrides = None,
    on: On = "here",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """The verb `index`, which also takes its source and folder without a config."""
    if source.endswith(".toml"):
        given = [item for item in (out, *(overrides or [])) if item is not None]
        _run_config("index", path(source), given, on, dry_run, as_json)
        return
    from pretrain.config import apply_overrides
    from wordless.running import run_verb

    if out is None or "=" in out:
        raise ValueError(
            "index: give the manifest's folder after the source: wordless index SOURCE OUT [key=value ...]"
        )
    tree = apply_overrides({"source": source, "out": out}, overrides or [])
    run_verb("index", tree, source, on, dry_run, as_json)


def sample(
    config: ConfigPath,
    overrides: Overrides = None,
    audio: Annotated[
        str | None,
        typer.Option(help="Write prompts and continuations to this WAV file; needs `synthesizer`."),
    ] = None,
    on: On = "here",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """The verb `sample`, whose `audio` is an option as well."""
    given = [*(overrides or [])]
    if audio:
        given.append(f"audio={json.dumps(os.path.abspath(path(audio)))}")
    _run_config("sample", config, given, on, dry_run, as_json)


OWN_OPTIONS: dict[str, Any] = {"index": index, "sample": sample}  # verbs with more than config and overrides
for _name, _verb in VERBS.items():
    if _name in OWN_OPTIONS:
        app.command(_name, help=_verb.help)(OWN_OPTIONS[_name])
    else:
        _add_verb(_name, _verb, _name, hidden=False)


@app.command("run")
def run_recipe(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A TOML file, or a recipe's name: `wordless recipes` lists them."
        ),
    ],
    overrides: Overrides = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave out a stage (repeatable).")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run this stage alone (repeatable).")] = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="Remove and repeat stages whose output has other settings.")
    ] = False,
    on: On = "here",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run a recipe's stages in order; finished ones are skipped. On SLURM, a dependent job per stage."""
    from wordless import recipe_command, shipped

    named = shipped.is_name(recipe)
    file = shipped.find_recipe(recipe) if named else path(recipe)
    given = (overrides or [], skip or [], only or [])
    recipe_command.run_recipe(file, recipe if named else str(file), *given, redo, on, dry_run, as_json)


@app.command("recipes")
def show_recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe to copy; none: list them.")] = None,
    out: Annotated[
        Path | None, typer.Argument(parser=path, metavar="[OUT.toml]", help="The copy, which you can edit.")
    ] = None,
) -> None:
    """List the recipes that come with wordless, or copy one to a file."""
    from slurm.status import as_table
    from wordless import shipped

    if name is None:
        rows = [(known, *shipped.describe(file)) for known, file in shipped.recipes().items()]
        print(as_table([shipped.FIELDS, *rows]))
    elif out is None:
        raise ValueError(f"recipes: give the file to write: wordless recipes {name} {name}.toml")
    else:
        shipped.copy_recipe(name, out)


@app.command("status")
def show_status(run: RunFolder, as_json: Json = False) -> None:
    """Show the state of each stage of a run; ends with status 1 if one failed or is lost."""
    from slurm.status import show

    text, sound = show(run, as_json=as_json)
    print(text)
    if not sound:
        sys.exit(1)


@app.command("cancel")
def cancel_jobs(
    run: RunFolder,
    stages: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE ...]", help="Only these stages.")
    ] = None,
) -> None:
    """Cancel a run's jobs that are queued or running."""
    from slurm.cancelling import cancel

    print("\n".join(cancel(run, stages or [])))


@app.command("logs")
def show_logs(
    run: RunFolder,
    stage: Annotated[str | None, typer.Argument(help="Of a recipe's run: the stage.")] = None,
    task: Annotated[
        int | None, typer.Option(help="Of several: its rank. Default: the first that failed, or 0.")
    ] = None,
    element: Annotated[int | None, typer.Option(help="Of an array: its number, from 0.")] = None,
    lines: Annotated[int, typer.Option(min=0, help="How many, from the end.")] = 40,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Continue with what is added, until the job ends.")
    ] = False,
) -> None:
    """What a stage's job wrote to stdout and stderr."""
    from slurm.logs import show

    show(run, stage, element, task, lines, follow)


@app.command("check")
def check(
    what: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A config, a recipe or its name, an artefact's folder, or fairseq2:CARD."
        ),
    ],
) -> None:
    """Validate a config, a recipe or an artefact; list what is wrong with it."""
    from wordless import checking, shipped

    print(checking.check(shipped.find_recipe(what) if shipped.is_name(what) else path(what)))


app.command("import")(import_model)
app.command("export")(export_artefact)
for _alias, _name in ALIASES.items():
    _add_verb(_name, VERBS[_name], _alias, hidden=True)


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status: 2 for a user's mistake, 130 after Ctrl-C."""
    from pretrain.store.interrupts import INTERRUPTED, second_interrupt_ends

    try:
        with second_interrupt_ends():
            app(args=argv, prog_name="wordless")
    except (ValueError, OSError) as error:
        if os.environ.get("WORDLESS_TRACEBACK"):
            raise
        print(f"wordless: {_in_words(error)}", file=sys.stderr)
        # A lost rank is no mistake of the user's; its message has the rest.
        return 1 if isinstance(error, ConnectionError) else 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _in_words(error: ValueError | OSError) -> str:
    """The message of an error; of one of the operating system in a line: `FILE: No space left on device`."""
    if not isinstance(error, OSError) or error.strerror is None or isinstance(error, ConnectionError):
        return str(error)
    names = (name for name in (error.filename, error.filename2) if isinstance(name, (str, bytes)))
    files = " -> ".join(map(os.fsdecode, names))
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    return f"{f'{files}: ' if files else ''}{error.strerror}{notes}"


def entry_point() -> None:
    """The script `wordless`."""
    from pretrain.store.interrupts import INTERRUPTED, end_now

    _speak_utf8()
    status = main()
    if status == INTERRUPTED:
        end_now()
    sys.exit(status)


def _speak_utf8() -> None:
    """File names are UTF-8 whatever the locale (Python would not find `ü.wav` in an ASCII one), and
    characters that a terminal cannot show are escaped: no print fails."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1" and sys.executable:
        streams = os.environ.get("PYTHONIOENCODING") or f"{sys.stdout.encoding}:backslashreplace"
        environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": streams}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    entry_point()
