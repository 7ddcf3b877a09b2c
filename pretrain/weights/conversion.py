"""The verbs `import` and `export`: wav2vec 2.0 and HuBERT weights from and to transformers, fairseq,
fairseq2, torchaudio.

An imported model is a finished run folder like those of `pretrain`, or, with a CTC head, of `finetune`, at
step 0: whatever takes a run takes it. Names and layouts are told by pretrain/weights/naming.py, each
library's files by its own module, and the classes of CTC heads by pretrain/weights/recognizer.py.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor, nn

from pretrain.config import Config, PathStr, without_none
from pretrain.ctc.model import Layers, Recognizer
from pretrain.model.encoder import Encoder
from pretrain.objectives.hubert import Hubert, HubertConfig
from pretrain.objectives.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from pretrain.store.artefact import commit, require_absent
from pretrain.store.disk import atomic_path, write_json
from pretrain.store.schemes import plugin, split_scheme
from pretrain.training.checkpoint import latest_checkpoint, save_checkpoint
from pretrain.weights.foreign import Foreign, Source
from pretrain.weights.naming import (
    ENCODER_NAMES,
    HEAD_NAMES,
    Format,
    Objective,
    Parameter,
    parameters,
    to_ours,
    type_name,
)
from pretrain.weights.pickles import weights_only_hole

# The formats, in the order in which they may claim a source. Each module has `claims` and `read` of a Source,
# and `write` of an Exported.
FORMATS: dict[Format, str] = {
    "fairseq2": "pretrain.weights.fairseq2",
    "huggingface": "pretrain.weights.huggingface",
    "fairseq": "pretrain.weights.fairseq",
    "torchaudio": "pretrain.weights.torchaudio",
}


class ImportConfig(Config):
    """What `import` was given; the options win over what the source says, or tell what it does not."""

    source: PathStr
    out: PathStr
    num_heads: int | None = None
    num_classes: int | None = None
    normalize_waveform: bool | None = None
    vocabulary: PathStr | None = None
    allow_pickle: bool = False


def read_foreign(config: ImportConfig) -> Foreign:
    """Reads `config.source` by the format that claims it."""
    options = {"num_heads": config.num_heads, "normalize_waveform": config.normalize_waveform}
    vocabulary = Path(config.vocabulary) if config.vocabulary else None
    if (named := split_scheme(config.source)) is not None:
        scheme, name = named
        return plugin(scheme).read_asset(name, vocabulary, options, config.allow_pickle)
    source = Source(Path(config.source), options, vocabulary, config.num_classes, config.allow_pickle)
    if not source.path.exists():
        raise ValueError(
            f"{source.path}: no such file or folder; nothing is downloaded here, so give the path of a "
            "downloaded model"
        )
    for module in map(import_module, FORMATS.values()):
        if module.claims(source):
            return module.read(source)
    raise ValueError(
        f"{source.path}: neither a fairseq checkpoint (keys `model` and `cfg` or `args`) nor a state dict of "
        f"tensors; it has the keys {', '.join(map(repr, list(source.state)[:8]))}"
    )


def import_weights(config: ImportConfig) -> dict[str, Any]:
    """Run the verb `import`; returns what was read, what was inferred and what was left out."""
    run, source = Path(config.out), Path(config.source)
    require_absent(run)
    if run.is_dir() and latest_checkpoint(run) is not None:
        raise ValueError(f"{run}: holds an unfinished run; remove it or choose another folder")
    if not (standing := next(path for path in (run, *run.parents) if path.exists())).is_dir():
        raise ValueError(f"{standing}: is a file; give another name for the run's folder")
    foreign = read_foreign(config)
    if config.num_classes is not None and (
        foreign.form != "fairseq" or not isinstance(foreign.head, HubertConfig)
    ):
        raise ValueError(
            f"{source}: --num-classes is for fairseq's HuBERT models, whose embeddings may have rows of "
            "special words"
        )
    if config.vocabulary is not None and foreign.recognizer is None:
        raise ValueError(f"{source}: has no CTC head; --vocabulary is for models that have one")
    weights, meta = in_memory(foreign, str(source))
    if config.allow_pickle and (hole := weights_only_hole()) and hole not in meta["notes"]:
        meta["notes"].append(hole)
    notes, kind, recognizer = meta["notes"], meta["kind"], foreign.recognizer
    with torch.device("meta"):
        model = _skeleton(foreign)
    model.load_state_dict(weights, assign=True)
    resolved = {**config.resolved(), **meta["config"]}
    extra = {key: value for key, value in meta.items() if key not in ("kind", "config")}
    run.mkdir(parents=True, exist_ok=True)
    with atomic_path(run / "config.toml") as temporary:
        temporary.write_text(tomli_w.dumps(without_none(resolved)), encoding="utf-8")
    stored = {"epoch": 0, "batch": 0, "seconds": 0.0, "kind": kind, "extra": extra, "config": resolved}
    save_checkpoint(run, 0, model, torch.optim.AdamW(model.parameters()), stored)
    summary = {
        "format": foreign.form,
        "kind": kind,
        "objective": foreign.family,
        "heads": foreign.head is not None,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "layers": foreign.encoder.num_layers,
        "dim": foreign.encoder.dim,
        "num_heads": foreign.encoder.num_heads,
        "steps": 0,
        "normalize_waveform": foreign.encoder.normalize_waveform,
        "notes": notes,
    }
    if recognizer is not None:
        summary["vocabulary"] = len(recognizer.vocabulary)
    write_json(run / "summary.json", summary)
    commit(run, kind, resolved, {"source": foreign.sha256[:16]}, ["step_00000000/model.safetensors"], **extra)
    return summary


def in_memory(foreign: Foreign, source: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a foreign model under our names, and the meta data that `load_weights` gives for a run
    of it.

    `source` is for messages, in place of the model's own. Errors: a ValueError that names every tensor that
    does not fit.
    """
    source = source or foreign.source
    notes = list(foreign.notes)
    if foreign.head is None and foreign.recognizer is None:
        notes.append("there are no pretraining heads in the file: the run is an encoder alone")
    if foreign.encoder.num_layers > len(foreign.tensors):  # before so many are made
        raise ValueError(
            f"{source}: {foreign.encoder.num_layers} layers are told, but there are only "
            f"{len(foreign.tensors)} tensors"
        )
    try:
        with torch.device("meta"):
            model = _skeleton(foreign)
    except RuntimeError as error:  # sizes that no tensor can have
        raise ValueError(f"{source}: no model can be that large ({str(error).splitlines()[0]})") from None
    weights = _ours(
        foreign, {name: tensor.shape for name, tensor in model.state_dict().items()}, source, notes
    )
    table = {str(foreign.family): foreign.head.resolved()} if foreign.head is not None else {}
    config = {"objective": foreign.family, "encoder": foreign.encoder.resolved(), **table}
    origin = {"format": foreign.form, "name": Path(source).name, "sha256": foreign.sha256}
    meta: dict[str, Any] = {
        "kind": "encoder",
        "config": config,
        "objective": foreign.family,
        "heads": foreign.head is not None,
    }
    meta |= {"source": origin, "notes": notes}
    if (recognizer := foreign.recognizer) is not None:
        meta["kind"] = "recognizer"
        config |= {"text": recognizer.text.resolved(), "ctc": recognizer.ctc.resolved()}
        meta |= {
            "vocabulary": recognizer.vocabulary.to_meta(),
            "config_encoder": foreign.encoder.resolved(),
            "codebook": foreign.codebook,
        }
    return weights, meta


def _skeleton(foreign: Foreign) -> nn.Module:
    """The model of a run with these weights: the encoder with its heads, or alone."""
    if foreign.recognizer is not None:
        layers: Layers = (
            "weighted" if foreign.form == "wordless" and "layer_weights" in foreign.tensors else "last"
        )
        return Recognizer(foreign.encoder, foreign.recognizer.vocabulary, layers=layers)
    if isinstance(foreign.head, Wav2Vec2Config):
        return Wav2Vec2(foreign.encoder, foreign.head)
    if isinstance(foreign.head, HubertConfig):
        name = (
            "class_embeddings"
            if foreign.form == "wordless"
            else HEAD_NAMES[foreign.form, "hubert"]["class_embeddings"]
        )
        return Hubert(foreign.encoder, foreign.head, len(foreign.tensors[name]))
    return nn.ModuleDict({"encoder": Encoder(foreign.encoder)})


def _ours(
    foreign: Foreign, shapes: Mapping[str, torch.Size], source: str, notes: list[str]
) -> dict[str, Tensor]:
    """The tensors of a foreign model under our names; a mask embedding that is not there is zero."""
    if foreign.form == "wordless":
        same = [Parameter(name, (name,)) for name in shapes]
        return to_ours(foreign.tensors, same, shapes, source)
    tensors = dict(foreign.tensors)
    name = ENCODER_NAMES[foreign.form]["mask_embedding"]
    if name not in tensors:
        tensors[name] = torch.zeros(shapes["encoder.mask_embedding"])
        notes.append("there is no mask embedding in the file; it is zero")
    if kinds := {type_name(tensor) for tensor in tensors.values()} - {"float32"}:
        notes.append(f"weights in {' and '.join(sorted(kinds))} became float32")
    groups = foreign.head.num_groups if isinstance(foreign.head, Wav2Vec2Config) else 1
    objective = foreign.family if foreign.head is not None else None
    table = parameters(foreign.form, foreign.encoder, objective, groups, ctc=foreign.recognizer is not None)
    return to_ours(tensors, table, shapes, source)


def objective_of(weights: Mapping[str, Tensor]) -> Objective | None:
    """The objective of a model with heads; None of an encoder alone."""
    if "quantizer.codes" in weights:
        return "wav2vec2"
    return "hubert" if "class_embeddings" in weights else None
