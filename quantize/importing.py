"""Codebooks from and to other tools: `wordless import --codebook` and `wordless export` of a codebook.

Read: k-means of scikit-learn, fairseq and s3prl (joblib, pickle), torch's `.pt`, `.npy`, safetensors.
Written: `.npy` and safetensors, the centroids in the space of the features. An imported codebook has `mean`
0, so that its centroids are theirs bit for bit, rounded to float32 if they were float64, and a label is the
exact argmin of the distances to them.
"""

import json
import tokenize
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pretrain.config import Config, PathStr
from pretrain.data.label_shards import MAX_CLASSES
from pretrain.model.config import LayerConvention
from pretrain.store.artefact import require_absent
from pretrain.store.disk import atomic_path
from pretrain.store.hashes import sha256_file
from quantize.codebook import Codebook, write_codebook
from quantize.features import FeatureSource, MfccSource, open_encoder_source
from quantize.joblib_file import read_arrays

CodebookFormat = Literal["npy", "safetensors"]
NAMES = (
    "cluster_centers_",
    "cluster_centers",
    "centroids",
    "C",
)  # of the centroids among other tensors, the first that is there
TORCH_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number that begins such a file


class CodebookImportConfig(Config):
    """Centroids in a file, and what they quantise: `mfcc`, or the `layer` of an `encoder`."""

    source: PathStr
    out: PathStr
    mfcc: bool = False
    cmvn: bool = Field(False, description="the MFCC were normalised over each utterance")
    encoder: PathStr | None = Field(None, description="the run folder whose features the centroids are of")
    layer: int | None = Field(None, ge=0, description="0 is the first layer's input")
    convention: LayerConvention = Field(
        "residual", description="a layer's features: its output, or its feed-forward's"
    )
    allow_pickle: bool = False

    @model_validator(mode="after")
    def _one_kind_of_features(self) -> "CodebookImportConfig":
        if self.mfcc == (self.encoder is not None):
            raise ValueError("say what the centroids are of: --mfcc, or --encoder RUN --layer L")
        if (self.encoder is None) != (self.layer is None):
            raise ValueError("--encoder RUN and --layer L go together")
        if self.encoder is not None and self.cmvn:
            raise ValueError("--cmvn is a matter of --mfcc; remove it")
        if self.mfcc and self.convention != "residual":
            raise ValueError("--convention is a matter of --encoder; remove it")
        return self


def import_codebook(config: CodebookImportConfig) -> dict[str, Any]:
    """Make a codebook of the centroids in `config.source`: (K, dim), or (levels, K, dim) of residual levels.

    A ValueError names the source: a pickle without `allow_pickle`, one that is more than a k-means, no
    centroids or several, NaN, or another dimension than the features'.
    """
    require_absent(config.out)
    path, out = Path(config.source), Path(config.out)
    if not (standing := next(folder for folder in (out, *out.parents) if folder.exists())).is_dir():
        raise ValueError(f"{standing}: is a file; give another name for the codebook's folder")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a joblib, .pt, .npy or .safetensors file of centroids")
    form, arrays = read_centroid_file(path, config.allow_pickle)
    found = choose_centroids(arrays, path)
    source: FeatureSource
    if config.encoder is None:
        source = MfccSource(config.cmvn)
        whose = f"MFCC have {source.dim}"
    else:
        assert config.layer is not None
        source = open_encoder_source(config.encoder, config.layer, device="cpu", convention=config.convention)
        whose = f"the features of {config.encoder} have {source.dim}"
    if found.shape[-1] != source.dim:
        turned = (
            "; they lie the other way round, (dim, K): transpose them"
            if found.shape[-2] == source.dim
            else ""
        )
        raise ValueError(
            f"{path}: centroids of {found.shape[-1]} dimensions, {found.shape}, and {whose}{turned}"
        )
    notes = []
    if found.dtype != np.float32:
        notes.append(f"centroids in {found.dtype} became float32")
    with np.errstate(over="ignore"):  # an infinity is told
        centroids = np.ascontiguousarray(found, dtype=np.float32)
    if not np.isfinite(centroids).all():
        raise ValueError(
            f"{path}: NaN or infinity in centroid {int(np.argwhere(~np.isfinite(centroids))[0, -2])}"
        )
    centroids = centroids.reshape(-1, *centroids.shape[-2:])  # (levels, K, dim)
    sha256 = sha256_file(path)
    parents = {"source": sha256[:16]}
    if config.encoder is not None:
        parents["encoder"] = source.describe()["encoder"]
    origin = {"imported_from": path.name, "format": form, "sha256": sha256}
    mean = np.zeros(source.dim, np.float32)
    fingerprint = write_codebook(out, centroids, mean, source.describe(), origin, config.resolved(), parents)
    levels, num_classes, dim = centroids.shape
    return {
        "format": form,
        "num_classes": num_classes,
        "num_levels": levels,
        "dim": dim,
        "source": source.describe(),
        "fingerprint": fingerprint,
        "notes": notes,
    }


def read_centroid_file(path: Path, allow_pickle: bool) -> tuple[str, dict[str, np.ndarray]]:
    """The format of a file, told by its first bytes, and the arrays in it; a lone one has the name ""."""
    with open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(b"\x93NUMPY"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a header that Python reads with a frown
                return "npy", {"": np.load(path, allow_pickle=False)}
        except (
            ValueError,
            EOFError,
            SyntaxError,
            tokenize.TokenError,
            TypeError,
            OverflowError,
            RecursionError,
            MemoryError,
        ) as error:
            # NumPy reads the header as Python text, which fails in as many ways.
            raise ValueError(f"{path}: damaged, or an array of objects ({error})") from None
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "safetensors", _read_safetensors(path)
    if head.startswith((b"PK", TORCH_BEFORE_1_6)):
        from pretrain.weights.pickles import load_torch

        remedy = (
            "If you trust its makers, write the centroids to a plain file where they can be read:\n"
            f"numpy.save({str(path.with_suffix('.npy'))!r}, centroids)"
        )
        return "torch", _numbers(load_torch(path, allow_pickle, remedy))
    if not head:
        raise ValueError(f"{path}: is empty (0 bytes); was it downloaded whole?")
    if not allow_pickle:
        raise ValueError(
            f"{path}: neither .npy nor safetensors. A joblib or pickle file can run code when it is read; "
            "with --allow-pickle it is read as data, by a reader that runs nothing of it and refuses what is "
            "more than a k-means"
        )
    return "joblib", read_arrays(path)


def choose_centroids(arrays: dict[str, np.ndarray], path: Path) -> np.ndarray:
    """The array that holds centroids, of float16, 32 or 64: by its name, or the only one of two or three
    axes."""
    known = [name for name in NAMES if name in arrays]
    shaped = known[:1] or [name for name, array in arrays.items() if array.ndim in (2, 3)]
    if len(shaped) != 1 or arrays[shaped[0]].ndim not in (2, 3) or arrays[shaped[0]].dtype.kind != "f":
        there = ", ".join(
            f"{f'{name!r} ' if name else ''}{array.dtype} {array.shape}" for name, array in arrays.items()
        )
        raise ValueError(
            f"{path}: one array of floats (K, dim), or (levels, K, dim), is needed, by any name or as "
            f"{NAMES[0]!r}; there is {there or 'none'}"
        )
    found = arrays[shaped[0]]
    if "mean" in arrays:
        raise ValueError(
            f"{path}: has a `mean` beside its centroids, as the codebooks of wordless have; use the "
            "codebook's folder as it is, or write it with `wordless export`"
        )
    if not 1 <= found.shape[-2] <= MAX_CLASSES or found.shape[0] == 0:
        raise ValueError(
            f"{path}: {found.shape} has {found.shape[-2]} centroids; 1 to {MAX_CLASSES} are possible"
        )
    return found


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return _numbers(load_file(path))  # torch knows bfloat16
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged safetensors ({error}); was it downloaded whole?") from None


def _numbers(value: Any) -> dict[str, np.ndarray]:
    """The tensors of a dict, or a lone one, as arrays; floats of other sizes than 64 bits as float32."""
    import torch

    tensors = value.items() if isinstance(value, dict) else [("", value)]
    found = {str(name): tensor.detach() for name, tensor in tensors if isinstance(tensor, torch.Tensor)}
    return {
        name: (it.float() if it.is_floating_point() and it.element_size() < 8 else it).numpy()
        for name, it in found.items()
    }


def export_codebook(folder: str | Path, out: str | Path, form: CodebookFormat) -> dict[str, Any]:
    """Write a codebook's centroids in the space of the features to the file `out`: float32 (K, dim), or
    (levels, K, dim).

    Level 0 has the mean added, so the nearest of its rows, squared Euclidean, is the label; a further level's
    rows are compared with what the levels before leave of a frame. `safetensors` has one tensor, `centroids`,
    and says in its metadata where it is from.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: is there already; remove it or choose another name")
    codebook = Codebook.open(folder)
    centroids = codebook.centroids.copy()
    centroids[0] = centroids[0].astype(np.float64) + codebook.mean
    tensor = centroids[0] if codebook.num_levels == 1 else centroids
    with atomic_path(out) as temporary:
        if form == "npy":
            with open(temporary, "wb") as file:
                np.save(file, tensor)
        else:
            from safetensors.numpy import save_file

            save_file(
                {"centroids": tensor},
                temporary,
                {"codebook": codebook.fingerprint, "source": json.dumps(codebook.source)},
            )
    return {
        "out": str(out),
        "format": form,
        "codebook": codebook.fingerprint,
        "num_classes": codebook.num_classes,
        "num_levels": codebook.num_levels,
        "dim": codebook.dim,
        "notes": []
        if codebook.num_levels == 1
        else ["levels after the first quantise what the levels before them leave"],
    }
