"""The command `export`: weights, centroids and units to other libraries' files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from wordless.options import Json, path


@dataclass(frozen=True)
class Writer:
    """A function ("module:function") that writes `forms`; after source and destination it takes
    `arguments`."""

    forms: tuple[str, ...]
    function: str
    arguments: tuple[str, ...] = ()


RUNS = Writer(
    ("huggingface", "fairseq", "fairseq2", "torchaudio"),
    "pretrain.weights.exporting:export_weights",
    ("form", "encoder_only"),
)
# What can be exported, and how. The names of the formats are those that the writing modules know.
WRITERS = {
    "run": (RUNS,),
    "codebook": (Writer(("npy", "safetensors"), "quantize.importing:export_codebook", ("form",)),),
    "language model": (
        Writer(("huggingface",), "units.lm.exporting:export_language_model"),
        Writer(("fairseq2",), "units.lm.fairseq2:export_card"),
    ),
    "corpus": (
        Writer(
            tuple("km gslm textlesslib slamkit-features slamkit-tokens codec resynthesis parquet".split()),
            "units.formats.writing:export_corpus",
            ("form", "split"),
        ),
    ),
}
KINDS = {  # of artefacts
    "encoder": "run",
    "recognizer": "run",
    "codebook": "codebook",
    "unit-lm": "language model",
    "units": "corpus",
}
EXPORTS = {kind: [form for writer in writers for form in writer.forms] for kind, writers in WRITERS.items()}


def export_artefact(
    source: Annotated[
        Path,
        typer.Argument(
            parser=path,
            metavar="RUN|CODEBOOK|CORPUS",
            help="Of `pretrain`, `finetune`, `train-lm`, `cluster`, `pack` or `import`.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            parser=path,
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
    from pretrain.store.destination import require_writable
    from wordless.running import print_summary, writing
    from wordless.verbs import load

    kind = _kind(source, form)
    if encoder_only and kind != "run":
        raise ValueError(f"export: --encoder-only is for runs of an encoder; {source} is a {kind}")
    if split is not None and kind != "corpus":
        raise ValueError(f"export: --split is for a corpus of units; {source} is a {kind}")
    require_writable(out, may_be_file=True)
    writer = next(writer for writer in WRITERS[kind] if form in writer.forms)
    options: dict[str, Any] = {"form": form, "encoder_only": encoder_only, "split": split}
    with writing(out, resumes=False):
        summary = load(writer.function)(source, out, *(options[name] for name in writer.arguments))
        print_summary(None, summary, as_json)


def _kind(source: Path, form: str) -> str:
    """What is exported, a key of EXPORTS. Raises ValueError if it has no such format, or none at all."""
    from pretrain.store.artefact import is_complete, read_meta

    if form in RUNS.forms and not is_complete(source):
        from pretrain.training.checkpoint import load_weights

        found = load_weights(source)[1]["kind"]  # a run in training has weights, and no meta.json yet
    else:
        found = read_meta(source)["kind"]
    if found not in KINDS:
        raise ValueError(f"{source}: is a {found!r}; what is exported are a {', a '.join(EXPORTS)}")
    kind = KINDS[found]
    if form not in EXPORTS[kind]:
        formats = ", ".join(EXPORTS[kind])
        raise ValueError(
            f"{source}: is a {kind}, whose formats are {formats}; --format {form} is not one of them"
        )
    return kind
