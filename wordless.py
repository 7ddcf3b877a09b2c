"""The command line: every verb of the pipeline, `run` for a recipe of stages, `check` for configs and artefacts.

The only module that imports every room, and only when a verb needs it: `wordless --help` imports no torch. A verb is a config
class and a function; both are found by name in VERBS. A user's mistake is a ValueError: exit status 2 and its message.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer


@dataclass(frozen=True)
class Verb:
    """Where a verb's config class and function are."""

    module: str
    config: str
    function: str
    help: str
    text: str | None = None  # the function that writes the summary for a terminal; without one, a line for each value
    grows: bool = False  # a finished output with other settings can be added to: the verb itself checks what stands in it

    def load(self) -> tuple[type, Callable[[Any], dict[str, Any]]]:
        module = import_module(self.module)
        return getattr(module, self.config), getattr(module, self.function)


VERBS = {
    "speech": Verb("pretrain.speech", "SpeechConfig", "speech", "Make synthetic speech with true phone times (espeak-ng)."),
    "index": Verb(
        "pretrain.indexing", "IndexConfig", "index", "List and check audio: a manifest from a folder, tars, .tsv or .jsonl."
    ),
    "pretrain": Verb("pretrain.pretraining", "PretrainConfig", "pretrain", "Train a HuBERT or wav2vec 2.0 encoder."),
    "cluster": Verb("quantize.clustering", "ClusterConfig", "cluster", "Fit k-means on MFCC or on an encoder layer."),
    "encode": Verb("quantize.encoding", "EncodeConfig", "encode", "Turn a corpus into labels, in one pass."),
    "measure": Verb("quantize.measuring", "MeasureConfig", "measure", "Unit quality: PNMI, ABX, probes; which layer.", "as_text"),
    "pack": Verb("units.packing", "PackConfig", "pack", "Labels, or other tools' units, to a unit corpus."),
    "train-lm": Verb("units.training", "TrainLMConfig", "train_lm", "Train the unit language model; DPO."),
    "score": Verb("units.scoring", "ScoreConfig", "score", "Likelihood and minimal pairs, beside their floors."),
    "train-synthesizer": Verb("units.synthesis", "SynthesizerConfig", "train_synthesizer", "Learn how units sound."),
    "sample": Verb("units.sampling", "SampleConfig", "sample", "Continue units or audio; --audio FILE to hear it."),
    "synthesize": Verb(
        "units.listening", "SynthesizeConfig", "synthesize", "Units back to sound; how many survive the round trip."
    ),
    "finetune": Verb("pretrain.ctc.finetuning", "FinetuneConfig", "finetune", "Train a CTC recogniser on transcripts."),
    "transcribe": Verb(
        "pretrain.ctc.transcription", "TranscribeConfig", "transcribe", "Decode speech to text; WER and CER.", "as_text"
    ),
    "compare": Verb("pretrain.ctc.comparison", "CompareConfig", "compare", "Is one recogniser better? Paired tests.", "as_text"),
    "transfer": Verb(
        "pretrain.ctc.transfer",
        "TransferConfig",
        "transfer",
        "WER against labelled minutes, pretrained and not.",
        "as_text",
        grows=True,
    ),
    "report": Verb("units.report", "ReportConfig", "report", "One self-contained HTML page of a run.", text="as_text"),
}
EXPORTS = {
    "run": ("huggingface", "fairseq", "torchaudio"),
    "codebook": ("npy", "safetensors"),
    "language model": ("huggingface",),
    "corpus": ("km", "gslm", "textlesslib", "slamkit-features", "slamkit-tokens", "codec", "resynthesis", "parquet"),
}
RECIPE_KEYS = {"run", "slurm"}

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Speech units and textless language models from raw audio. The verbs, in the order of the pipeline:",
)  # fmt: skip

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="A TOML file; `wordless check FILE` validates it.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Dotted keys over the file's.")]
On = Annotated[Literal["here", "local", "slurm"], typer.Option("--on", help="Where it runs: this process, a local job, SLURM.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config (and the sbatch text) and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


def _add_verb(name: str, verb: Verb) -> None:
    def command(
        config: ConfigPath, overrides: Overrides = None, on: On = "here", dry_run: DryRun = False, as_json: Json = False
    ) -> None:
        again = [name, str(config.resolve()), *(overrides or [])]
        _run_verb(name, _read(config, overrides), str(config), again, on, dry_run, as_json)

    app.command(name, help=verb.help)(command)


def _add_index(verb: Verb) -> None:
    def command(
        source: Annotated[
            str, typer.Argument(help="A folder of audio or tars, a glob, a fairseq .tsv, JSON lines, or a CONFIG.toml.")
        ],
        out: Annotated[str | None, typer.Argument(help="The manifest's folder (not with a CONFIG.toml).")] = None,
        overrides: Overrides = None,
        on: On = "here",
        dry_run: DryRun = False,
        as_json: Json = False,
    ) -> None:
        from pretrain.config import apply_overrides

        if source.endswith(".toml"):
            tree = _read(Path(source), [item for item in (out, *(overrides or [])) if item])
        elif out is None or "=" in out:
            raise ValueError("index: give the manifest's folder after the source: wordless index SOURCE OUT [key=value ...]")
        else:
            tree = apply_overrides({"source": source, "out": out}, overrides or [])
        again = ["index", os.path.abspath(source), *([out] if out else []), *(overrides or [])]
        _run_verb("index", tree, source, again, on, dry_run, as_json)

    app.command("index", help=verb.help)(command)


def _add_sample(verb: Verb) -> None:
    def command(
        config: ConfigPath,
        overrides: Overrides = None,
        audio: Annotated[
            str | None, typer.Option(help="Write prompts and continuations to this WAV file; needs `synthesizer`.")
        ] = None,
        on: On = "here",
        dry_run: DryRun = False,
        as_json: Json = False,
    ) -> None:
        given = [*(overrides or []), *([f"audio={json.dumps(os.path.abspath(audio))}"] if audio else [])]
        again = ["sample", str(config.resolve()), *given]
        _run_verb("sample", _read(config, given), str(config), again, on, dry_run, as_json)

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
    redo: Annotated[bool, typer.Option("--redo", help="Remove and repeat stages that stand with other settings.")] = False,
    on: On = "here",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run a recipe's stages in order; what already stands is skipped."""
    tree = _read(recipe, overrides)
    resources = tree.pop("slurm", {})
    stages = Recipe(tree, str(recipe))
    if on == "here" and not dry_run:
        _print_summary(*stages.run(set(skip or []), set(only or []), redo), as_json)
        return
    stages.check()
    chosen = [part for name in skip or [] for part in ("--skip", name)] + [part for name in only or [] for part in ("--only", name)]
    flags = [flag for flag, given in (("--redo", redo), ("--json", as_json)) if given]
    again = ["run", str(recipe.resolve()), *(overrides or []), *chosen, *flags]
    _run_elsewhere(again, {"run": str(stages.folder), **stages.resolved()}, resources, str(recipe), stages.folder, on, dry_run)


@app.command("check")
def check(path: Annotated[Path, typer.Argument(help="A config, a recipe, or an artefact's folder.")]) -> None:
    """Validate a config, a recipe or an artefact; say what is wrong with it."""
    from pretrain.artefact import read_meta, sha256_file
    from pretrain.config import parse_config, read_toml
    from slurm.resources import parse_resources

    if path.is_dir():
        meta = read_meta(path)
        absent = [name for name in meta["files"] if not (path / name).is_file()]
        if absent:
            raise ValueError(f"{path}: missing: {', '.join(absent)}")
        damaged = [name for name, expected in meta["files"].items() if sha256_file(path / name) != expected]
        if damaged:
            raise ValueError(f"{path}: differ from their recorded SHA-256: {', '.join(damaged)}")
        print(f"{path}: a complete {meta['kind']}, fingerprint {meta['fingerprint']}")
        return
    tree = read_toml(path)
    parse_resources(tree.pop("slurm", {}), str(path))
    if "verb" in tree:
        name = tree.pop("verb")
        parse_config(_verb_named(name, str(path)).load()[0], tree, str(path))
        print(f"{path}: a valid config for `{name}`")
    else:
        recipe = Recipe(tree, str(path))
        recipe.check()
        print(f"{path}: a valid recipe with {len(recipe.stages)} stages")


@app.command("import")
def import_model(
    source: Annotated[
        Path, typer.Argument(help="A transformers folder, a fairseq .pt, a torchaudio .pth; with --codebook a file of centroids.")
    ],
    out: Annotated[Path, typer.Argument(help="The run folder, or the codebook's, to make.")],
    num_heads: Annotated[int | None, typer.Option(help="Attention heads, where no config and no published width tells.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="K of a fairseq HuBERT; its embeddings may have 4 more rows.")] = None,
    normalize_waveform: Annotated[
        bool | None,
        typer.Option("--normalize-waveform/--no-normalize-waveform", help="Zero mean and unit variance, whatever the source says."),
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(help="What the classes of a CTC head are, where its file does not say: dict.ltr.txt or vocab.json."),
    ] = None,
    codebook: Annotated[
        bool, typer.Option("--codebook", help="Import k-means instead: scikit-learn or fairseq joblib, .pt, .npy, .safetensors.")
    ] = False,
    encoder: Annotated[Path | None, typer.Option(help="With --codebook: the run whose features the centroids are of.")] = None,
    layer: Annotated[int | None, typer.Option(help="With --codebook: its layer; 0 is the first layer's input.")] = None,
    convention: Annotated[
        Literal["residual", "feed_forward"] | None,
        typer.Option(
            help="With --codebook: the layer's output (residual, the default), or its feed-forward's before the residual."
        ),
    ] = None,
    mfcc: Annotated[bool, typer.Option("--mfcc", help="With --codebook: the centroids are of 39-dimensional MFCC.")] = False,
    cmvn: Annotated[bool, typer.Option("--cmvn", help="With --mfcc: normalised over each utterance.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read files that are pickles (.pt, .pth, .bin, joblib); nothing in them is run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Other libraries' wav2vec 2.0 and HuBERT weights to a run; with --codebook, their k-means to a codebook."""
    from pretrain.config import parse_config, without_none

    given = {"source": str(source), "out": str(out), "allow_pickle": allow_pickle}
    of_runs: dict[str, Any] = {
        "num_heads": num_heads, "num_classes": num_classes, "normalize_waveform": normalize_waveform,
        "vocabulary": None if vocabulary is None else str(vocabulary),
    }  # fmt: skip
    of_codebooks = {"encoder": encoder, "layer": layer, "convention": convention, "mfcc": mfcc or None, "cmvn": cmvn or None}
    for name, value in (of_runs if codebook else of_codebooks).items():
        if value is not None:
            kind = "runs, not codebooks" if codebook else "codebooks; say --codebook too"
            raise ValueError(f"import: --{name.replace('_', '-')} is for {kind}")
    if codebook:
        from quantize.importing import CodebookImportConfig, import_codebook

        tree = without_none({**given, **of_codebooks})
        _print_summary(None, import_codebook(parse_config(CodebookImportConfig, tree, "import --codebook")), as_json)
    else:
        from pretrain.weights.conversion import ImportConfig, import_weights

        _print_summary(None, import_weights(parse_config(ImportConfig, {**given, **of_runs}, "import")), as_json)


@app.command("export")
def export_artefact(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|CODEBOOK|CORPUS", help="Of `pretrain`, `finetune`, `train-lm`, `cluster`, `pack` or `import`."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder (huggingface, codec) or file (every other format) to write.")],
    form: Annotated[
        str, typer.Option("--format", help="; ".join(f"a {kind}: {', '.join(forms)}" for kind, forms in EXPORTS.items()))
    ],
    encoder_only: Annotated[bool, typer.Option("--encoder-only", help="Of an encoder or recogniser: leave out its heads.")] = False,
    split: Annotated[str | None, typer.Option(help="Of a corpus of units: this split alone.")] = None,
    as_json: Json = False,
) -> None:
    """Weights, centroids and units to other libraries' files."""
    from pretrain.artefact import is_complete, read_meta

    if form in EXPORTS["run"] and not is_complete(source):
        from pretrain.checkpoint import load_weights  # a run in training has no meta.json yet, and its weights can be exported

        found = load_weights(source)[1]["kind"]
    else:
        found = read_meta(source)["kind"]
    kinds = {"codebook": "codebook", "units": "corpus", "unit-lm": "language model", "encoder": "run", "recognizer": "run"}
    if found not in kinds:
        raise ValueError(f"{source}: is a {found!r}; what is exported are a {', a '.join(EXPORTS)}")
    kind = kinds[found]
    if form not in EXPORTS[kind]:
        raise ValueError(f"{source}: is a {kind}, whose formats are {', '.join(EXPORTS[kind])}; --format {form} is not one of them")
    if encoder_only and kind != "run":
        raise ValueError(f"export: --encoder-only is for runs of an encoder; {source} is a {kind}")
    if split is not None and kind != "corpus":
        raise ValueError(f"export: --split is for a corpus of units; {source} is a {kind}")
    if kind == "codebook":
        from quantize.importing import export_codebook

        summary = export_codebook(source, out, cast(Any, form))
    elif kind == "corpus":
        from units.formats import export_corpus

        summary = export_corpus(source, out, form, split)
    elif kind == "language model":
        from units.exporting import export_language_model

        summary = export_language_model(source, out)
    else:
        from pretrain.weights.conversion import export_weights

        summary = export_weights(source, out, cast(Any, form), encoder_only)
    _print_summary(None, summary, as_json)


class Recipe:
    """Stages in a TOML file: each table with a `verb` is a stage; its other keys are that verb's config.

    A stage writes to `run/NAME` unless it has an `out`. A string `@NAME` or `@NAME/file` is the output of an earlier stage,
    `@` alone the run's folder. `needs = "text"`, `"phones"` or `"words"` skips a stage whose manifest has none.
    """

    def __init__(self, tree: dict[str, Any], source: str):
        self.source = source
        self.stages = {name: table for name, table in tree.items() if isinstance(table, dict) and name not in RECIPE_KEYS}
        problems = [f"{source}: {name}: unknown key; a recipe has `run`, `slurm` and tables with a `verb`" for name in tree
                    if name not in RECIPE_KEYS and name not in self.stages]  # fmt: skip
        problems += [f"{source}: {name}: a stage needs a `verb`" for name, table in self.stages.items() if "verb" not in table]
        problems += [] if isinstance(tree.get("run"), str) else [f"{source}: run: the run's folder is needed"]
        if problems:
            raise ValueError("\n".join(problems))
        self.folder = Path(tree["run"])

    def parse(self, name: str) -> Any:
        """The validated config of a stage, its references resolved."""
        from pretrain.config import parse_config

        table = {key: value for key, value in self.stages[name].items() if key not in ("verb", "needs", "slurm")}
        config_class, _ = _verb_named(self.stages[name]["verb"], f"{self.source}: {name}").load()
        if (needs := self.stages[name].get("needs")) not in (None, "text", "phones", "words") or (
            needs and "manifest" not in table
        ):
            raise ValueError(f'{self.source}: {name}.needs: "text", "phones" or "words", of the stage\'s `manifest`; got {needs!r}')
        resolved = {"out": str(self.folder / name), **self._resolve(table, name)}
        try:
            return parse_config(config_class, resolved, self.source)
        except ValueError as error:
            raise ValueError(str(error).replace(f"{self.source}: ", f"{self.source}: {name}.")) from None

    def check(self) -> None:
        """Validate every stage, reporting all mistakes at once."""
        problems = []
        for name in self.stages:
            try:
                self.parse(name)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))

    def resolved(self) -> dict[str, Any]:
        """Every stage's resolved config, under its name."""
        kept = {name: {key: table[key] for key in ("verb", "needs") if key in table} for name, table in self.stages.items()}
        return {name: {**table, **self.parse(name).resolved()} for name, table in kept.items()}

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
        earlier = list(self.stages)[: list(self.stages).index(name)]
        if stage not in earlier:
            raise ValueError(f"{self.source}: {name}: {value!r} is no earlier stage; there are {', '.join(earlier) or 'none'}")
        return str(Path(self.stages[stage].get("out", self.folder / stage)) / rest)

    def run(self, skip: set[str], only: set[str], redo: bool) -> tuple[str | None, dict[str, Any]]:
        """Run what does not stand yet, in order; returns verb and summary of the last stage (in most recipes the report)."""
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError(f"{self.source}: a recipe runs in one process; give torchrun or slurm.tasks_per_node a training verb")
        unknown = (skip | only) - set(self.stages)
        if unknown:
            raise ValueError(f"{self.source}: no stage {', '.join(sorted(unknown))}; there are {', '.join(self.stages)}")
        self.check()
        records = _read_records(self.folder)
        chosen = [name for name in self.stages if name not in skip and (not only or name in only)]
        for name, following in zip(chosen, [*chosen[1:], None], strict=True):
            summary = self._run_stage(name, records, redo)
            if summary.get("cells_missing") or summary.get("shards_missing"):  # of a stage with `part`
                if following is not None:
                    _say(
                        f"{name}: other parts have not made all of it; {following} and what follows wait for the part that is the last"
                    )
                return self.stages[name]["verb"], summary
        return next(((records[name]["verb"], records[name]["summary"]) for name in reversed(chosen) if name in records), (None, {}))

    def _run_stage(self, name: str, records: dict[str, Any], redo: bool) -> dict[str, Any]:
        """Its summary; empty where there was nothing to do."""
        import shutil

        from pretrain.artefact import is_complete, read_meta, write_json
        from pretrain.config import differences

        table = self.stages[name]
        _, function = VERBS[table["verb"]].load()
        config = self.parse(name)
        if "needs" in table and not _manifest_has(config.manifest, table["needs"]):
            _say(f"{name}: skipped, the manifest has no {table['needs']}")
            return {}
        out = Path(config.out)
        if table["verb"] != "report" and is_complete(out):
            meta, resolved = read_meta(out), config.resolved()
            changed = [f"{key}: {old!r} -> {new!r}" for key, old, new in differences(meta["config"], resolved) if key != "part"]
            replaced = _replaced_inputs(meta, resolved)
            if not changed and not replaced:
                _say(f"{name}: stands already ({out})")
                return {}
            reason = f"stands with other settings ({'; '.join(changed)})" if changed else f"was made from {'; '.join(replaced)}"
            if redo:
                shutil.rmtree(out)
            elif replaced or not VERBS[table["verb"]].grows:
                raise ValueError(f"{name}: {out} {reason}. --redo removes it and runs the stage again")
        _say(f"{name}: {table['verb']} -> {out}")
        began = time.monotonic()
        summary = function(config)
        records[name] = {"verb": table["verb"], "seconds": time.monotonic() - began, "summary": summary}
        if os.environ.get("RANK", "0") == "0":
            write_json(self.folder / "stages.json", records)
        return summary


def _read_records(folder: Path) -> dict[str, Any]:
    path = folder / "stages.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _replaced_inputs(meta: dict[str, Any], resolved: dict[str, Any]) -> list[str]:
    """Inputs of a standing artefact that have been made anew, otherwise, since: `key FINGERPRINT, which FOLDER no longer is`."""
    from pretrain.artefact import is_complete, read_meta

    inputs: dict[str, Any] = {}
    for key, value in resolved.items():  # those of a list are `source`, `source_1`, …
        values = value if isinstance(value, list) else [value]
        inputs |= {key + (f"_{n}" if n else ""): item for n, item in enumerate(values)}
    replaced = []
    for key, fingerprint in meta["parents"].items():
        path = Path(str(inputs.get(key)))
        folder = path.parent if path.is_file() else path
        if is_complete(folder):
            now = read_meta(folder)
            # A run of training is known by its weights, everything else by its own fingerprint.
            if fingerprint not in {now["fingerprint"], *(sha256[:16] for sha256 in now["files"].values())}:
                replaced.append(f"{key} {fingerprint}, which {folder} no longer is")
    return replaced


def _manifest_has(manifest: str, what: str) -> bool:
    from pretrain.manifest import Manifest

    return bool(getattr(Manifest(manifest), f"has_{what}"))


def _run_verb(name: str, tree: dict[str, Any], source: str, again: list[str], on: str, dry_run: bool, as_json: bool) -> None:
    """Validate and run one verb here, or run the command line `again` elsewhere."""
    from pretrain.config import parse_config

    if tree.pop("verb", name) != name:
        raise ValueError(f"{source}: verb: is a config for another verb than `{name}`")
    resources = tree.pop("slurm", {})
    config_class, function = VERBS[name].load()
    config: Any = parse_config(config_class, tree, source)
    if on == "here" and not dry_run:
        _print_summary(name, function(config), as_json)
    else:
        _run_elsewhere(
            [*again, *(["--json"] if as_json else [])], config.resolved(), resources, source, Path(config.out), on, dry_run
        )


def _run_elsewhere(
    argv: list[str], resolved: dict[str, Any], table: dict[str, Any], source: str, out: Path, on: str, dry_run: bool
) -> None:
    """Submit `argv` as a job whose folder lies in `OUT/../jobs`, or print what would be submitted."""
    from slurm.resources import parse_resources

    resources = parse_resources(table, source)
    folder = out.parent / "jobs"
    if dry_run:
        import tomli_w

        from pretrain.config import without_none

        print(tomli_w.dumps(without_none(resolved)), end="")
        if on == "slurm":
            from slurm.launch import sbatch_text

            print(f"\n# what sbatch would get\n{sbatch_text(argv, resources, folder)}")
        return
    from slurm.launch import launch

    place: Literal["local", "slurm"] = "local" if on == "local" else "slurm"
    launched = launch(argv, place, resources, folder, wait=on == "local")
    _say(f"job {launched.job_id}: logs in {launched.folder}")
    if launched.status:
        sys.exit(launched.status)


def _verb_named(name: Any, source: str) -> Verb:
    if not isinstance(name, str) or name not in VERBS:
        raise ValueError(f"{source}: no verb {name!r}; there are {', '.join(VERBS)}")
    return VERBS[name]


def _read(path: Path, overrides: list[str] | None) -> dict[str, Any]:
    from pretrain.config import apply_overrides, read_toml

    return apply_overrides(read_toml(path), overrides or [])


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def _print_summary(verb: str | None, summary: dict[str, Any], as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps(summary))
        return
    from pretrain.config import flatten

    for note in summary.get("notes", []):
        _say(f"note: {note}")
    if verb is not None and (writer := VERBS[verb].text) is not None:
        print(getattr(import_module(VERBS[verb].module), writer)(summary))
        return
    for key, value in flatten({key: value for key, value in summary.items() if key != "notes"}).items():
        print(f"{key:<40} {value:.4g}" if isinstance(value, float) else f"{key:<40} {value}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status (2 for a user's mistake)."""
    try:
        app(args=argv, prog_name="wordless")
    except ValueError as error:
        if os.environ.get("WORDLESS_TRACEBACK"):
            raise
        print(f"wordless: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def entry_point() -> None:
    """The script `wordless`."""
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
