"""The command `import`: other libraries' weights to a run, their k-means to a codebook."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from wordless.options import Json, path

Source = Annotated[
    Path,
    typer.Argument(
        parser=path,
        metavar="SOURCE",
        help="A transformers folder, a fairseq .pt, a torchaudio .pth, fairseq2:CARD or a folder with a card "
        "of fairseq2's; with --codebook a file of centroids.",
    ),
]
Out = Annotated[
    Path, typer.Argument(parser=path, metavar="OUT", help="The run folder, or the codebook's, to make.")
]
NumHeads = Annotated[
    int | None, typer.Option(help="Attention heads, if neither a config nor a published width gives them.")
]
NumClasses = Annotated[
    int | None, typer.Option(help="K of a fairseq HuBERT; its embeddings may have 4 more rows.")
]
NormalizeWaveform = Annotated[
    bool | None,
    typer.Option(
        "--normalize-waveform/--no-normalize-waveform",
        help="Zero mean and unit variance, whatever the source has.",
    ),
]
Vocabulary = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        metavar="PATH",
        help="The classes of a CTC head, if its file does not have them: dict.ltr.txt, vocab.json, .model.",
    ),
]
Codebook = Annotated[
    bool,
    typer.Option(
        "--codebook", help="Import k-means instead: scikit-learn or fairseq joblib, .pt, .npy, .safetensors."
    ),
]
Encoder = Annotated[
    Path | None,
    typer.Option(
        parser=path, metavar="PATH", help="With --codebook: the run whose features the centroids are of."
    ),
]
Layer = Annotated[int | None, typer.Option(help="With --codebook: its layer; 0 is the first layer's input.")]
Convention = Annotated[
    Literal["residual", "feed_forward"] | None,
    typer.Option(
        help="With --codebook: the layer's output (residual, the default), or its feed-forward's before the "
        "residual."
    ),
]
Mfcc = Annotated[
    bool, typer.Option("--mfcc", help="With --codebook: the centroids are of 39-dimensional MFCC.")
]
Cmvn = Annotated[bool, typer.Option("--cmvn", help="With --mfcc: normalised over each utterance.")]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Read files that are pickles (.pt, .pth, .bin, joblib); nothing in them is run.",
    ),
]


def import_model(
    source: Source,
    out: Out,
    num_heads: NumHeads = None,
    num_classes: NumClasses = None,
    normalize_waveform: NormalizeWaveform = None,
    vocabulary: Vocabulary = None,
    codebook: Codebook = False,
    encoder: Encoder = None,
    layer: Layer = None,
    convention: Convention = None,
    mfcc: Mfcc = False,
    cmvn: Cmvn = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Other libraries' wav2vec 2.0 and HuBERT weights to a run; with --codebook, their k-means to a
    codebook."""
    given = {"source": str(source), "out": str(out), "allow_pickle": allow_pickle}
    of_runs = {
        "num_heads": num_heads,
        "num_classes": num_classes,
        "normalize_waveform": normalize_waveform,
        "vocabulary": vocabulary and str(vocabulary),
    }
    of_codebooks = {
        "encoder": encoder and str(encoder),
        "layer": layer,
        "convention": convention,
        "mfcc": mfcc or None,
        "cmvn": cmvn or None,
    }
    _import(given, of_runs, of_codebooks, codebook, as_json)


def _import(
    given: dict[str, Any],
    of_runs: dict[str, Any],
    of_codebooks: dict[str, Any],
    codebook: bool,
    as_json: bool,
) -> None:
    """Raises ValueError for an option that the other kind of import takes."""
    from pretrain.config import parse_config, without_none
    from pretrain.store.destination import require_writable
    from wordless.running import print_summary, writing
    from wordless.verbs import load

    require_writable(Path(given["out"]))
    mine, others = (of_codebooks, of_runs) if codebook else (of_runs, of_codebooks)
    kind = "runs, not codebooks" if codebook else "codebooks; say --codebook too"
    for name in without_none(others):
        raise ValueError(f"import: --{name.replace('_', '-')} is for {kind}")
    if codebook:
        where, config, function = "quantize.importing", "CodebookImportConfig", "import_codebook"
    else:
        where, config, function = "pretrain.weights.conversion", "ImportConfig", "import_weights"
    title = "import --codebook" if codebook else "import"
    importing = parse_config(load(f"{where}:{config}"), {**given, **without_none(mine)}, title)
    with writing(given["out"], resumes=False):
        print_summary(None, load(f"{where}:{function}")(importing), as_json)
