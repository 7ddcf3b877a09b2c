"""The verbs `import` and `export`: wav2vec 2.0 and HuBERT weights from and to transformers, fairseq, fairseq2, torchaudio.

An imported model is a finished run folder like those of `pretrain`, or, with a CTC head, of `finetune`, at step 0: whatever takes a
run takes it. Names and layouts are told by pretrain/weights/naming.py, each library's files by its own module, and the classes of CTC
heads by pretrain/weights/recognizer.py.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor, nn

from pretrain.config import Config, PathStr, parse_config, without_none
from pretrain.ctc.model import Layers, LoadedRecognizer, Recognizer, recognizer_of
from pretrain.ctc.task import CTCConfig
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.objectives.hubert import Hubert, HubertConfig
from pretrain.objectives.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from pretrain.store.artefact import commit, is_complete, read_meta, require_absent
from pretrain.store.disk import atomic_folder, atomic_path, write_json
from pretrain.store.hashes import sha256_file
from pretrain.store.schemes import plugin, split_scheme
from pretrain.training.checkpoint import latest_checkpoint, load_weights, save_checkpoint
from pretrain.weights.card_writing import write_card
from pretrain.weights.cards import is_card
from pretrain.weights.fairseq import read_fairseq, write_fairseq
from pretrain.weights.fairseq2 import read_folder, read_weights
from pretrain.weights.foreign import (
    NUM_HEADS,
    CTCHead,
    Foreign,
    load_pickle,
    load_safetensors,
    weights_only_hole,
)
from pretrain.weights.huggingface import HEADS_FILE, read_huggingface, write_huggingface
from pretrain.weights.naming import (
    ENCODER_NAMES,
    HEAD_NAMES,
    Format,
    Objective,
    Parameter,
    parameters,
    to_ours,
    to_theirs,
    type_name,
)
from pretrain.weights.torchaudio import read_torchaudio, write_torchaudio


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
    """Find out what `config.source` is and read it."""
    vocabulary = Path(config.vocabulary) if config.vocabulary else None
    source, options = (
        Path(config.source),
        {"num_heads": config.num_heads, "normalize_waveform": config.normalize_waveform},
    )
    if (named := split_scheme(config.source)) is not None:
        scheme, name = named
        return plugin(scheme).read_asset(name, vocabulary, options, config.allow_pickle)
    if not (source / "config.json").is_file() and is_card(source):
        return read_folder(source, vocabulary, options, config.allow_pickle)
    if source.is_dir():
        return read_huggingface(source, options, config.allow_pickle, vocabulary)
    if not source.is_file():
        raise ValueError(
            f"{source}: no such file or folder; nothing is downloaded here, so give the path of a downloaded model"
        )
    state = (
        load_safetensors(source)
        if source.suffix == ".safetensors"
        else load_pickle(source, config.allow_pickle)
    )
    inside = state["model"] if isinstance(state.get("model"), Mapping) else state
    if any(str(name).removeprefix("module.").startswith("encoder_frontend.") for name in inside):
        return read_weights(source, state, sha256_file(source), options, vocabulary)
    if isinstance(state.get("model"), Mapping):
        return read_fairseq(source, state, options, config.num_classes, vocabulary)
    if all(isinstance(tensor, Tensor) for tensor in state.values()):
        if any(
            name.startswith(("wav2vec2.encoder.layers.", "hubert.encoder.layers.", "feature_projection."))
            for name in state
        ):
            raise ValueError(
                f"{source}: weights of transformers; give the folder that holds them and config.json"
            )
        if any("post_extract_proj." in name for name in state):
            return read_fairseq(source, {"model": state}, options, config.num_classes, vocabulary)
        return read_torchaudio(source, state, options, vocabulary)
    raise ValueError(
        f"{source}: neither a fairseq checkpoint (keys `model` and `cfg` or `args`) nor a state dict of tensors; it has the keys "
        f"{', '.join(map(repr, list(state)[:8]))}"
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
            f"{source}: --num-classes is for fairseq's HuBERT models, whose embeddings may have rows of special words"
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
    """The tensors of a foreign model under our names, and the meta data that `load_weights` gives for a run of it.

    `source` is for messages, in place of the model's own. Errors: a ValueError that names every tensor that does not fit.
    """
    source = source or foreign.source
    notes = list(foreign.notes)
    if foreign.head is None and foreign.recognizer is None:
        notes.append("there are no pretraining heads in the file: the run is an encoder alone")
    if foreign.encoder.num_layers > len(foreign.tensors):  # before so many are made
        raise ValueError(
            f"{source}: {foreign.encoder.num_layers} layers are told, but there are only {len(foreign.tensors)} tensors"
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


def export_weights(
    run: str | Path, out: str | Path, form: Format, encoder_only: bool = False
) -> dict[str, Any]:
    """Run the verb `export`: a run's weights as a folder (huggingface, fairseq2) or a file (fairseq, torchaudio) named `out`.

    They are the best that it kept (`keep_best`), else the newest; of a recogniser with its head where `form` has a place for one.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: is there already; remove it or choose another name")
    weights, meta, fingerprint = load_weights(run)
    tree = meta.get("config_encoder") or meta["config"].get("encoder")
    if tree is None:
        raise ValueError(
            f"{run}: a {meta['kind']!r} run holds no encoder; give a pretraining or fine-tuning run"
        )
    encoder = parse_config(EncoderConfig, tree, f"{run}/meta.json")
    objective = _objective_of(weights)
    named = objective or _pretrained_with(meta)
    if form == "fairseq2":
        return _export_card(str(run), out, encoder, (weights, meta, fingerprint), named, encoder_only)
    family: Objective = named or "wav2vec2"
    _refuse_inexpressible(encoder, form, str(run))
    notes = []
    if named is None and form != "torchaudio":
        notes.append(
            "the run does not say whether it is wav2vec 2.0 or HuBERT, whose encoders are alike: written as wav2vec 2.0"
        )
    recognizer: CTCHead | None = None
    if meta["kind"] == "recognizer" and form == "huggingface" and not encoder_only:
        recognizer = _recognizer(recognizer_of(run, weights, meta, fingerprint), notes)
    elif meta["kind"] == "recognizer":
        why = "as --encoder-only says" if encoder_only else "--format huggingface has it, too"
        notes.append(f"the CTC head is left out: the encoder alone is exported; {why}")
    if objective and (encoder_only or (form, objective) not in HEAD_NAMES):
        why = (
            "as --encoder-only says" if encoder_only else f"{form} has no model with the heads of {objective}"
        )
        notes.append(f"the pretraining heads are left out: {why}")
        objective = None
    head: HubertConfig | Wav2Vec2Config | None = None
    if objective:
        kind: type[HubertConfig] | type[Wav2Vec2Config] = (
            HubertConfig if objective == "hubert" else Wav2Vec2Config
        )
        head = parse_config(kind, meta["config"][objective], f"{run}/meta.json")
    if form == "torchaudio" and objective is None:
        notes.append("the mask embedding is left out: torchaudio's Wav2Vec2Model has none")
    if form == "torchaudio" and (flags := _flags_to_import_again(encoder)):
        notes.append(f"a torchaudio file has no config: `wordless import` of this one needs {flags}")
    if form == "huggingface" and objective == "hubert":
        notes.append(
            f"the heads are in {HEADS_FILE}, which `wordless import` reads: transformers' HubertModel has no place for them"
        )
    if form == "fairseq" and objective == "hubert":
        notes.append("fairseq wants dict.km.txt in its label_dir, the lines `0 1`, `1 1`, … of every class")
    groups = head.num_groups if isinstance(head, Wav2Vec2Config) else 1
    tensors = to_theirs(weights, parameters(form, encoder, objective, groups, ctc=recognizer is not None))
    if form == "huggingface":
        with atomic_folder(out) as temporary:
            write_huggingface(temporary, tensors, encoder, family, head, recognizer)
    else:
        with atomic_path(out) as temporary:
            if form == "fairseq":
                write_fairseq(temporary, tensors, encoder, family, head)
            else:
                write_torchaudio(temporary, tensors)
    return {
        "out": str(out),
        "format": form,
        "objective": family,
        "heads": objective is not None,
        "recognizer": recognizer is not None,
        "weights": fingerprint,
        "notes": notes,
    }


def _export_card(
    run: str,
    out: Path,
    encoder: EncoderConfig,
    loaded: tuple[dict[str, Tensor], dict[str, Any], str],
    named: Objective | None,
    encoder_only: bool,
) -> dict[str, Any]:
    """`export_weights` to fairseq2: a card with everything the run has, of fairseq2's own families or of ours."""
    if "@" in out.name or not out.name.strip():
        raise ValueError(
            f"{out}: the folder's name becomes the asset's, and {out.name!r} cannot be one; take one without @"
        )
    weights, meta, fingerprint = loaded
    notes: list[str] = []
    objective, head, recognizer = _objective_of(weights), None, None
    if meta["kind"] == "recognizer" and not encoder_only:
        found = recognizer_of(run, weights, meta, fingerprint)
        recognizer = CTCHead(
            found.vocabulary,
            found.text,
            parse_config(CTCConfig, meta["config"].get("ctc", {}), f"{run}/meta.json"),
        )
    elif objective and not encoder_only:
        kind: type[HubertConfig] | type[Wav2Vec2Config] = (
            HubertConfig if objective == "hubert" else Wav2Vec2Config
        )
        head = parse_config(kind, meta["config"][objective], f"{run}/meta.json")
    elif encoder_only:
        weights = {name: tensor for name, tensor in weights.items() if name.startswith("encoder.")}
        notes.append("the heads are left out: as --encoder-only says")
    foreign = Foreign(
        "wordless", weights, encoder, named, head, fingerprint, notes, recognizer, run, meta.get("codebook")
    )
    with atomic_folder(out) as temporary:
        family = write_card(temporary, out.name, foreign)
    return {
        "out": str(out),
        "format": "fairseq2",
        "family": family,
        "objective": named,
        "heads": head is not None,
        "recognizer": recognizer is not None,
        "weights": fingerprint,
        "notes": notes,
    }


def _recognizer(loaded: LoadedRecognizer, notes: list[str]) -> CTCHead:
    """What transformers has to know of a recogniser; a ValueError for what it has no place for."""
    if loaded.model.layer_weights is not None:
        raise ValueError(
            'a recogniser with ctc.layers = "weighted" has no counterpart: transformers sums layers for classification alone. '
            "--encoder-only exports its encoder"
        )
    if loaded.vocabulary.spelling == "jamo":
        notes.append(
            "transformers writes the jamo as they are; unicodedata.normalize('NFC', text) puts the syllables together"
        )
    if loaded.vocabulary.spelling == "phones":
        notes.append(
            "the tokenizer is of phones: it spells phones with spaces between them, not words (do_phonemize = false)"
        )
    ctc = parse_config(CTCConfig, loaded.meta["config"].get("ctc", {}), "meta.json: ctc")
    return CTCHead(loaded.vocabulary, loaded.text, ctc)


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


def _objective_of(weights: Mapping[str, Tensor]) -> Objective | None:
    if "quantizer.codes" in weights:
        return "wav2vec2"
    return "hubert" if "class_embeddings" in weights else None


def _pretrained_with(meta: Mapping[str, Any]) -> Objective | None:
    """The objective of a run, or of what it was fine-tuned from, where that still stands; None where nothing says."""
    named: Objective | None = meta.get("objective")
    source = meta["config"].get("encoder")
    if named is None and isinstance(source, str) and (model := split_scheme(source)) is not None:
        scheme, name = model
        with suppress(ValueError):  # the model, or its library, is gone
            return plugin(scheme).objective(name)
    if named is None and isinstance(source, str) and is_complete(source):
        return _pretrained_with(read_meta(source))
    return named


def _refuse_inexpressible(encoder: EncoderConfig, form: Format, run: str) -> None:
    if encoder.front_end != "waveform":
        raise ValueError(
            f"{run}: an encoder on {encoder.front_end} features has no counterpart elsewhere; only waveform encoders do"
        )
    if encoder.streaming is not None:
        raise ValueError(
            f"{run}: a streaming encoder has no counterpart elsewhere: another library would let every frame see the whole utterance"
        )
    if form == "fairseq" and encoder.conv_dim == encoder.dim:
        raise ValueError(
            f"{run}: fairseq has no projection where conv_dim equals dim ({encoder.dim}), so it cannot hold this model"
        )
    if form == "torchaudio" and (encoder.conv_norm == "layer") != encoder.norm_first:
        raise ValueError(
            f"{run}: conv_norm = {encoder.conv_norm!r} with norm_first = {encoder.norm_first}: a torchaudio file has no config, and "
            "readers tell one from the other, as in published models; export to huggingface or fairseq"
        )


def _flags_to_import_again(encoder: EncoderConfig) -> str:
    """What `import` would take otherwise from the shapes of a file without a config."""
    flags = [f"--num-heads {encoder.num_heads}"] if NUM_HEADS.get(encoder.dim) != encoder.num_heads else []
    if encoder.normalize_waveform != (encoder.conv_norm == "layer"):
        flags.append("--normalize-waveform" if encoder.normalize_waveform else "--no-normalize-waveform")
    return " ".join(flags)
