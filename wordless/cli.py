"""The command line: every verb of the pipeline, `run` for a recipe of stages, `check` for configs and artefacts.

Rooms are imported only when a verb needs them: `wordless --help` imports no torch. The verbs themselves and recipes of them are in
`recipe.py`. A user's mistake is a ValueError: exit status 2 and its message.
"""

import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from wordless.recipe import VERBS, Recipe, Verb, as_toml, require_fitting, say, stands, verb_named, with_paths

if TYPE_CHECKING:
    from slurm.resources import Resources

EXPORTS = {
    "run": ("huggingface", "fairseq", "fairseq2", "torchaudio"),
    "codebook": ("npy", "safetensors"),
    "language model": ("huggingface", "fairseq2"),
    "corpus": (
        "km",
        "gslm",
        "textlesslib",
        "slamkit-features",
        "slamkit-tokens",
        "codec",
        "resynthesis",
        "parquet",
    ),
}
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Speech units and textless language models from raw audio. The verbs, in the order of the pipeline:",
)


def _path(text: str) -> Path:
    """A path of the command line, with `~` and variables replaced as in configs."""
    from pretrain.config import expand_path

    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


ConfigPath = Annotated[
    Path,
    typer.Argument(
        parser=_path, metavar="CONFIG.toml", help="A TOML file; `wordless check FILE` validates it."
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="Dotted keys over the file's.")
]
On = Annotated[
    Literal["here", "local", "slurm"],
    typer.Option("--on", help="Where it runs: this process, a local job, SLURM."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved config (and the sbatch text) and stop.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


def _add_verb(name: str, verb: Verb) -> None:
    def command(
        config: ConfigPath,
        overrides: Overrides = None,
        on: On = "here",
        dry_run: DryRun = False,
        as_json: Json = False,
    ) -> None:
        _run_verb(name, _read(config, overrides), str(config), on, dry_run, as_json)

    app.command(name, help=verb.help)(command)


def _add_index(verb: Verb) -> None:
    def command(
        source: Annotated[
            str,
            typer.Argument(
                help="A folder of audio or tars, a glob, a fairseq .tsv, JSON lines, or a CONFIG.toml."
            ),
        ],
        out: Annotated[
            str | None, typer.Argument(help="The manifest's folder (not with a CONFIG.toml).")
        ] = None,
        overrides: Overrides = None,
        on: On = "here",
        dry_run: DryRun = False,
        as_json: Json = False,
    ) -> None:
        from pretrain.config import apply_overrides

        if source.endswith(".toml"):
            tree = _read(_path(source), [item for item in (out, *(overrides or [])) if item is not None])
        elif out is None or "=" in out:
            raise ValueError(
                "index: give the manifest's folder after the source: wordless index SOURCE OUT [key=value ...]"
            )
        else:
            tree = apply_overrides({"source": source, "out": out}, overrides or [])
        _run_verb("index", tree, source, on, dry_run, as_json)

    app.command("index", help=verb.help)(command)


def _add_sample(verb: Verb) -> None:
    def command(
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
        given = [
            *(overrides or []),
            *([f"audio={json.dumps(os.path.abspath(_path(audio)))}"] if audio else []),
        ]
        _run_verb("sample", _read(config, given), str(config), on, dry_run, as_json)

    app.command("sample", help=verb.help)(command)


for _name, _verb in VERBS.items():
    if _name == "index":
        _add_index(_verb)
    elif _name == "sample":
        _add_sample(_verb)
    else:
        _add_verb(_name, _verb)


@app.command("run")
def run_recipe(
    recipe: ConfigPath,
    overrides: Overrides = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave out a stage (repeatable).")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run this stage alone (repeatable).")] = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="Remove and repeat stages that stand with other settings.")
    ] = False,
    on: On = "here",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run a recipe's stages in order; what already stands is skipped. On SLURM, a dependent job per stage."""
    from pretrain.store.interrupts import ends_in_a_line

    began = time.time()
    stages = Recipe(_read(recipe, overrides), str(recipe))
    chosen = stages.choose(set(skip or []), set(only or []))
    stages.check()
    given = [
        flag
        for name, names in (("--skip", skip), ("--only", only))
        for value in names or []
        for flag in (name, value)
    ]
    command = [
        "run",
        str(recipe),
        *(overrides or []),
        *given,
        *["--redo"] * redo,
        *(["--on", on] if on != "here" else []),
    ]
    record = partial(stages.record, command, set(skip or []), began)
    if not dry_run:
        from pretrain.store.destination import require_writable

        require_writable(stages.folder)
    if dry_run:
        _dry_run({"run": str(stages.folder), **stages.resolved()})
        if on == "slurm":
            from slurm.pipeline import sbatch_texts

            print(
                f"\n# what sbatch would get\n{sbatch_texts(stages.plan(chosen, redo, write=False), stages.folder / 'jobs')}"
            )
    elif on == "here":
        stages.require_feasible(chosen, redo, int(os.environ.get("WORLD_SIZE", "1")))
        with ends_in_a_line(str(stages.folder), resumes=True), stages.occupied(chosen, redo):
            of_a_job = recipe.resolve().is_relative_to((stages.folder / "jobs").resolve())
            if not of_a_job:  # its submission printed all that
                stages.require_no_job(chosen)
                record()
            verb, summary = stages.run(chosen, redo)
        if (
            not of_a_job and set(chosen) <= stages.left_out.keys()
        ):  # a job of one stage ends well, or those after it would not run
            raise ValueError("\n".join(f"{name}: {reason}" for name, reason in stages.left_out.items()))
        _print_summary(
            verb,
            {**summary, "left_out": stages.left_out} if as_json and stages.left_out else summary,
            as_json,
        )
        _say_left_out(stages)
    elif on == "local":
        stages.require_feasible(
            chosen, redo, _resources("run", {}, stages.slurm, stages.source).tasks_per_node
        )
        stages.require_no_job(chosen)
        flags = [*given, *["--redo"] * redo, *["--json"] * as_json]
        tree = {"run": str(stages.folder), **stages.stages}
        with ends_in_a_line(str(stages.folder), resumes=True):
            _launch(
                "run",
                tree,
                flags,
                stages.slurm,
                stages.source,
                stages.folder / "jobs" / "run",
                stages.folder,
                on,
                record,
            )
    else:
        from slurm import pipeline
        from slurm.launch import require_slurm

        require_slurm()
        entries = pipeline.submit(stages.plan(chosen, redo, write=True), stages.folder / "jobs", record)
        print(json.dumps({"stages": pipeline.as_json(entries)}) if as_json else pipeline.table(entries))
        say(
            f"`wordless status {shlex.quote(str(stages.folder))}` tells how they fare"
            if entries
            else "nothing to submit"
        )


RunFolder = Annotated[
    Path,
    typer.Argument(
        parser=_path, metavar="RUN", help="A recipe's run, or the `out` of a verb that runs as a job."
    ),
]


@app.command("status")
def show_status(run: RunFolder, as_json: Json = False) -> None:
    """How the stages of a run fare; ends with status 1 where one failed or is lost."""
    from slurm.status import show

    text, sound = show(run, as_json=as_json)
    print(text)
    if not sound:
        sys.exit(1)


@app.command("cancel")
def cancel_jobs(
    run: RunFolder,
    stages: Annotated[list[str] | None, typer.Argument(metavar="[STAGE ...]", help="These alone.")] = None,
) -> None:
    """Cancel a run's jobs that are queued or running."""
    from slurm.pipeline import cancel

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
        bool, typer.Option("--follow", "-f", help="Go on with what is added, until the job ends.")
    ] = False,
) -> None:
    """What a stage's job wrote to stdout and stderr."""
    from slurm.logs import show

    show(run, stage, element, task, lines, follow)


@app.command("check")
def check(
    path: Annotated[
        Path,
        typer.Argument(
            parser=_path, metavar="PATH", help="A config, a recipe, an artefact's folder, or fairseq2:CARD."
        ),
    ],
) -> None:
    """Validate a config, a recipe or an artefact; say what is wrong with it."""
    from pretrain.config import parse_config, read_toml
    from pretrain.store.artefact import read_meta, require_as_written
    from pretrain.store.hashes import sha256_file
    from pretrain.store.schemes import plugin, split_scheme
    from slurm.resources import parse_resources

    if (named := split_scheme(path)) is not None:
        scheme, name = named
        _, meta, fingerprint = plugin(scheme).load_asset(name)
        print(f"{path}: a complete {meta['kind']}, weights {fingerprint}")
        return
    if path.is_dir():
        meta = read_meta(path)
        require_as_written(path, meta)
        absent = [name for name in meta["files"] if not (path / name).is_file()]
        if absent:
            raise ValueError(f"{path}: missing: {', '.join(absent)}")
        damaged = [name for name, expected in meta["files"].items() if sha256_file(path / name) != expected]
        if damaged:
            raise ValueError(f"{path}: differ from their recorded SHA-256: {', '.join(damaged)}")
        print(f"{path}: a complete {meta['kind']}, fingerprint {meta['fingerprint']}")
        return
    tree = read_toml(path)
    if "verb" in tree:
        parse_resources(tree.pop("slurm", {}), str(path))
        name = tree.pop("verb")
        parse_config(verb_named(name, str(path)).load()[0], tree, str(path))
        print(f"{path}: a valid config for `{name}`")
    else:
        recipe = Recipe(tree, str(path))
        recipe.check()
        print(f"{path}: a valid recipe with {len(recipe.stages)} stages")


@app.command("import")
def import_model(
    source: Annotated[
        Path,
        typer.Argument(
            parser=_path,
            metavar="SOURCE",
            help="A transformers folder, a fairseq .pt, a torchaudio .pth, fairseq2:CARD or a folder with a card of fairseq2's; with "
            "--codebook a file of centroids.",
        ),
    ],
    out: Annotated[
        Path, typer.Argument(parser=_path, metavar="OUT", help="The run folder, or the codebook's, to make.")
    ],
    num_heads: Annotated[
        int | None, typer.Option(help="Attention heads, where no config and no published width tells.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="K of a fairseq HuBERT; its embeddings may have 4 more rows.")
    ] = None,
    normalize_waveform: Annotated[
        bool | None,
        typer.Option(
            "--normalize-waveform/--no-normalize-waveform",
            help="Zero mean and unit variance, whatever the source says.",
        ),
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            parser=_path,
            metavar="PATH",
            help="What the classes of a CTC head are, where its file does not say: dict.ltr.txt, vocab.json, .model.",
        ),
    ] = None,
    codebook: Annotated[
        bool,
        typer.Option(
            "--codebook",
            help="Import k-means instead: scikit-learn or fairseq joblib, .pt, .npy, .safetensors.",
        ),
    ] = False,
    encoder: Annotated[
        Path | None,
        typer.Option(
            parser=_path, metavar="PATH", help="With --codebook: the run whose features the centroids are of."
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="With --codebook: its layer; 0 is the first layer's input.")
    ] = None,
    convention: Annotated[
        Literal["residual", "feed_forward"] | None,
        typer.Option(
            help="With --codebook: the layer's output (residual, the default), or its feed-forward's before the residual."
        ),
    ] = None,
    mfcc: Annotated[
        bool, typer.Option("--mfcc", help="With --codebook: the centroids are of 39-dimensional MFCC.")
    ] = False,
    cmvn: Annotated[
        bool, typer.Option("--cmvn", help="With --mfcc: normalised over each utterance.")
    ] = False,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Read files that are pickles (.pt, .pth, .bin, joblib); nothing in them is run.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Other libraries' wav2vec 2.0 and HuBERT weights to a run; with --codebook, their k-means to a codebook."""
    from pretrain.config import parse_config, without_none
    from pretrain.store.destination import require_writable
    from pretrain.store.interrupts import ends_in_a_line
    from pretrain.store.lock import locked

    given = {"source": str(source), "out": str(out), "allow_pickle": allow_pickle}
    of_runs: dict[str, Any] = {
        "num_heads": num_heads,
        "num_classes": num_classes,
        "normalize_waveform": normalize_waveform,
        "vocabulary": None if vocabulary is None else str(vocabulary),
    }
    require_writable(out)
    of_codebooks = {
        "encoder": encoder and str(encoder),
        "layer": layer,
        "convention": convention,
        "mfcc": mfcc or None,
        "cmvn": cmvn or None,
    }
    for name, value in (of_runs if codebook else of_codebooks).items():
        if value is not None:
            kind = "runs, not codebooks" if codebook else "codebooks; say --codebook too"
            raise ValueError(f"import: --{name.replace('_', '-')} is for {kind}")
    if codebook:
        from quantize.importing import CodebookImportConfig, import_codebook

        importing: Any = parse_config(
            CodebookImportConfig, without_none({**given, **of_codebooks}), "import --codebook"
        )
        function: Callable[[Any], dict[str, Any]] = import_codebook
    else:
        from pretrain.weights.conversion import ImportConfig, import_weights

        importing, function = parse_config(ImportConfig, {**given, **of_runs}, "import"), import_weights
    with ends_in_a_line(str(out), resumes=False), locked(out):
        _print_summary(None, function(importing), as_json)


@app.command("export")
def export_artefact(
    source: Annotated[
        Path,
        typer.Argument(
            parser=_path,
            metavar="RUN|CODEBOOK|CORPUS",
            help="Of `pretrain`, `finetune`, `train-lm`, `cluster`, `pack` or `import`.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            parser=_path,
            metavar="OUT",
            help="The folder (huggingface, fairseq2, codec) or file (every other format) to write.",
        ),
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format", help="; ".join(f"a {kind}: {', '.join(forms)}" for kind, forms in EXPORTS.items())
        ),
    ],
    encoder_only: Annotated[
        bool, typer.Option("--encoder-only", help="Of an encoder or recogniser: leave out its heads.")
    ] = False,
    split: Annotated[str | None, typer.Option(help="Of a corpus of units: this split alone.")] = None,
    as_json: Json = False,
) -> None:
    """Weights, centroids and units to other libraries' files."""
    from pretrain.store.artefact import is_complete, read_meta
    from pretrain.store.destination import require_writable
    from pretrain.store.interrupts import ends_in_a_line
    from pretrain.store.lock import locked

    if form in EXPORTS["run"] and not is_complete(source):
        from pretrain.training.checkpoint import (
            load_weights,  # a run in training has no meta.json yet, and its weights can be exported
        )

        found = load_weights(source)[1]["kind"]
    else:
        found = read_meta(source)["kind"]
    kinds = {
        "codebook": "codebook",
        "units": "corpus",
        "unit-lm": "language model",
        "encoder": "run",
        "recognizer": "run",
    }
    if found not in kinds:
        raise ValueError(f"{source}: is a {found!r}; what is exported are a {', a '.join(EXPORTS)}")
    kind = kinds[found]
    if form not in EXPORTS[kind]:
        raise ValueError(
            f"{source}: is a {kind}, whose formats are {', '.join(EXPORTS[kind])}; --format {form} is not one of them"
        )
    if encoder_only and kind != "run":
        raise ValueError(f"export: --encoder-only is for runs of an encoder; {source} is a {kind}")
    if split is not None and kind != "corpus":
        raise ValueError(f"export: --split is for a corpus of units; {source} is a {kind}")
    require_writable(out, may_be_file=True)
    if kind == "codebook":
        from quantize.importing import export_codebook

        write = partial(export_codebook, source, out, cast(Any, form))
    elif kind == "corpus":
        from units.formats import export_corpus

        write = partial(export_corpus, source, out, form, split)
    elif kind == "language model" and form == "fairseq2":
        from units.lm.fairseq2 import export_card

        write = partial(export_card, source, out)
    elif kind == "language model":
        from units.lm.exporting import export_language_model

        write = partial(export_language_model, source, out)
    else:
        from pretrain.weights.conversion import export_weights

        write = partial(export_weights, source, out, cast(Any, form), encoder_only)
    with ends_in_a_line(str(out), resumes=False), locked(out):
        _print_summary(None, write(), as_json)


def _run_verb(name: str, tree: dict[str, Any], source: str, on: str, dry_run: bool, as_json: bool) -> None:
    """Validate one verb's config and run it here or as a job."""
    from pretrain.config import parse_config
    from pretrain.store.artefact import require_absent
    from pretrain.store.destination import require_writable
    from pretrain.store.interrupts import ends_in_a_line
    from pretrain.store.lock import locked
    from slurm.jobs import require_no_job

    if tree.pop("verb", name) != name:
        raise ValueError(f"{source}: verb: is a config for another verb than `{name}`")
    table = tree.pop("slurm", {})
    config_class, function = VERBS[name].load()
    config: Any = parse_config(config_class, tree, source)
    out = Path(config.out)
    folder, flags = out.absolute().parent / "jobs" / out.absolute().name, ["--json"] * as_json
    if on == "here" and not dry_run:
        if int(os.environ.get("WORDLESS_ATTEMPT", "1")) > 1 and stands(
            config
        ):  # not a mistake: submitting refuses what stands
            say(f"{config.out}: stands already, by an earlier attempt of this job")
            return
        require_writable(out)
        if "WORDLESS_ATTEMPT" not in os.environ:  # else this is that job
            require_no_job(folder.parent, {folder.name: config.out})
        with (
            ends_in_a_line(config.out, resumes=VERBS[name].resumes),
            locked(config.out, getattr(config, "part", None)),
        ):
            _print_summary(name, function(config), as_json)
        return
    tree = with_paths(tree, config.resolved())
    if not dry_run:
        require_writable(out)
        if not VERBS[name].grows:
            require_absent(out)
        with ends_in_a_line(config.out, resumes=VERBS[name].resumes):
            _launch(name, tree, flags, table, source, folder, out, on)
        return
    _dry_run(config.resolved())
    resources = _resources(name, tree, table, source)
    if on == "slurm":
        from slurm.launch import sbatch_text
        from slurm.pipeline import freeze

        argv = [name, str(freeze(as_toml({**tree, "slurm": table}, source), folder, write=False)), *flags]
        print(f"\n# what sbatch would get\n{sbatch_text(argv, resources, folder, array=resources.array)}")


def _launch(
    name: str,
    tree: dict[str, Any],
    flags: list[str],
    table: dict[str, Any],
    source: str,
    folder: Path,
    out: Path,
    on: str,
    record: Callable[[], None] = lambda: None,
) -> None:
    """Run the verb `name` (or "run") as a job, on `tree` as it is now, whatever becomes of the file it was read from.

    `record` is called once the job is submitted.
    """
    from slurm.jobs import require_no_job
    from slurm.launch import follow, launch, require_slurm
    from slurm.pipeline import freeze, submitting

    resources = _resources(name, tree, table, source)
    if on == "slurm":
        require_slurm()
    with submitting(folder.absolute().parent):
        require_no_job(folder.parent, {folder.name: str(out)})
        settings = freeze(as_toml({**tree, "slurm": table}, source), folder.absolute())
        place: Literal["local", "slurm"] = "local" if on == "local" else "slurm"
        launched = launch(
            [name, str(settings), *flags],
            place,
            resources,
            folder,
            wait=False,
            out=out,
            array=resources.array,
        )
        record()
    if place == "local":
        launched = follow(launched)
    say(f"job {launched.job_id}: logs in {launched.folder}")
    if launched.status:
        sys.exit(launched.status)


def _resources(name: str, tree: dict[str, Any], table: dict[str, Any], source: str) -> "Resources":
    """What one job asks for: the `[slurm]` table of a config."""
    from slurm.resources import parse_resources

    resources = parse_resources(table, source)
    if name != "run":
        require_fitting(name, tree, resources, source)
    return resources


def _dry_run(resolved: dict[str, Any]) -> None:
    import tomli_w

    from pretrain.config import without_none

    print(tomli_w.dumps(without_none(resolved)), end="")


def _read(path: Path, overrides: list[str] | None) -> dict[str, Any]:
    from pretrain.config import apply_overrides, read_toml

    return apply_overrides(read_toml(path), overrides or [])


def _print_summary(verb: str | None, summary: dict[str, Any], as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    for note in summary.get("notes", []):  # on stderr, so with --json, too
        say(f"note: {note}")
    if as_json:
        print(json.dumps(summary))
        return
    from pretrain.config import flatten

    if verb is not None and (writer := VERBS[verb].text) is not None:
        print(getattr(import_module(VERBS[verb].module), writer)(summary))
        return
    for key, value in flatten({key: value for key, value in summary.items() if key != "notes"}).items():
        print(f"{key:<40} {value:.4g}" if isinstance(value, float) else f"{key:<40} {value}")


def _say_left_out(stages: Recipe) -> None:
    """Name the stages that were left out, at the end, where they are seen."""
    if stages.left_out:
        say(f"\n{len(stages.left_out)} of {len(stages.stages)} stages were left out:")
    for name, reason in stages.left_out.items():
        say(f"  {name}: {reason.splitlines()[0] if reason else ''}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status: 2 for a user's mistake, 130 after Ctrl-C."""
    from pretrain.store.interrupts import INTERRUPTED, second_interrupt_ends

    try:
        with second_interrupt_ends():
            app(args=argv, prog_name="wordless")
    except ValueError as error:
        if os.environ.get("WORDLESS_TRACEBACK"):
            raise
        print(f"wordless: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if os.environ.get("WORDLESS_TRACEBACK"):
            raise
        print(f"wordless: {_in_words(error)}", file=sys.stderr)
        return 1 if isinstance(error, ConnectionError) else 2  # of a lost rank the message tells the rest
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _in_words(error: OSError) -> str:
    """What the operating system could not do, in a line: `FILE: No space left on device`."""
    if error.strerror is None or isinstance(error, ConnectionError):
        return str(error)
    files = " -> ".join(
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))
    )
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
    """Names of files are UTF-8 whatever the locale (Python would not find `ü.wav` in an ASCII one), and what a terminal cannot show is
    escaped: nothing that is printed can fail."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1" and sys.executable:
        streams = os.environ.get("PYTHONIOENCODING") or f"{sys.stdout.encoding}:backslashreplace"
        environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": streams}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    entry_point()
