"""The verb `export` of runs: their weights to transformers, fairseq, fairseq2, torchaudio."""

from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from pretrain.config import parse_config
from pretrain.ctc.model import LoadedRecognizer, recognizer_of
from pretrain.ctc.task import CTCConfig
from pretrain.model.config import EncoderConfig
from pretrain.objectives.hubert import HubertConfig
from pretrain.objectives.wav2vec2 import Wav2Vec2Config
from pretrain.store.artefact import is_complete, read_meta
from pretrain.store.schemes import plugin, split_scheme
from pretrain.training.checkpoint import load_weights
from pretrain.weights.conversion import FORMATS, objective_of
from pretrain.weights.foreign import CTCHead, Exported
from pretrain.weights.naming import (
    HEAD_NAMES,
    Format,
    Objective,
)


def export_weights(
    run: str | Path, out: str | Path, form: Format, encoder_only: bool = False
) -> dict[str, Any]:
    """Runs the verb `export`: the weights of a run as a folder (huggingface, fairseq2) or a file (fairseq,
    torchaudio) named `out`.

    The weights are the best that were kept (`keep_best`), else the newest; of a recogniser with its head if
    `form` can hold one.
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
    named = objective_of(weights) or _pretrained_with(meta)
    model = Exported(str(run), weights, encoder, named, fingerprint, meta.get("codebook"))
    if form != "fairseq2":
        _refuse_inexpressible(encoder, form, str(run))
        if named is None and form != "torchaudio":
            model.notes.append(
                "the run does not say whether it is wav2vec 2.0 or HuBERT, whose encoders are alike: written "
                "as wav2vec 2.0"
            )
    _add_heads(model, meta, form, encoder_only)
    return {
        "out": str(out),
        "format": form,
        **import_module(FORMATS[form]).write(out, model),
        "heads": model.head is not None,
        "recognizer": model.recognizer is not None,
        "weights": fingerprint,
        "notes": model.notes,
    }


def _add_heads(model: Exported, meta: dict[str, Any], form: Format, encoder_only: bool) -> None:
    """The heads that `form` can hold; those left out are noted."""
    objective, own = objective_of(model.weights), form == "fairseq2"
    if meta["kind"] == "recognizer" and form in ("huggingface", "fairseq2") and not encoder_only:
        found = recognizer_of(model.run, model.weights, meta, model.fingerprint)
        if not own:
            _refuse_recognizer(found, model.notes)
        where = f"{model.run}/meta.json" if own else "meta.json: ctc"
        ctc = parse_config(CTCConfig, meta["config"].get("ctc", {}), where)
        model.recognizer = CTCHead(found.vocabulary, found.text, ctc)
    elif meta["kind"] == "recognizer" and not own:
        why = "as --encoder-only says" if encoder_only else "--format huggingface has it, too"
        model.notes.append(f"the CTC head is left out: the encoder alone is exported; {why}")
    if own and encoder_only:
        model.weights = {
            name: tensor for name, tensor in model.weights.items() if name.startswith("encoder.")
        }
        model.notes.append("the heads are left out: as --encoder-only says")
    elif objective and not own and (encoder_only or (form, objective) not in HEAD_NAMES):
        why = (
            "as --encoder-only says" if encoder_only else f"{form} has no model with the heads of {objective}"
        )
        model.notes.append(f"the pretraining heads are left out: {why}")
    elif objective and model.recognizer is None:
        kind: type[HubertConfig] | type[Wav2Vec2Config] = (
            HubertConfig if objective == "hubert" else Wav2Vec2Config
        )
        model.head = parse_config(kind, meta["config"][objective], f"{model.run}/meta.json")


def _refuse_recognizer(loaded: LoadedRecognizer, notes: list[str]) -> None:
    """Raises ValueError for a recogniser that transformers cannot hold; notes what it spells otherwise."""
    if loaded.model.layer_weights is not None:
        raise ValueError(
            'a recogniser with ctc.layers = "weighted" has no counterpart: transformers sums layers for '
            "classification alone. --encoder-only exports its encoder"
        )
    if loaded.vocabulary.spelling == "jamo":
        notes.append(
            "transformers writes the jamo as they are; unicodedata.normalize('NFC', text) puts the syllables "
            "together"
        )
    if loaded.vocabulary.spelling == "phones":
        notes.append(
            "the tokenizer is of phones: it spells phones with spaces between them, not words (do_phonemize "
            "= false)"
        )


def _pretrained_with(meta: Mapping[str, Any]) -> Objective | None:
    """The objective of a run, or of what it was fine-tuned from, where that still stands; None where nothing
    says."""
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
            f"{run}: an encoder on {encoder.front_end} features has no counterpart elsewhere; only waveform "
            "encoders do"
        )
    if encoder.streaming is not None:
        raise ValueError(
            f"{run}: a streaming encoder has no counterpart elsewhere: another library would let every frame "
            "see the whole utterance"
        )
    if form == "fairseq" and encoder.conv_dim == encoder.dim:
        raise ValueError(
            f"{run}: fairseq has no projection where conv_dim equals dim ({encoder.dim}), so it cannot hold "
            "this model"
        )
    if form == "torchaudio" and (encoder.conv_norm == "layer") != encoder.norm_first:
        raise ValueError(
            f"{run}: conv_norm = {encoder.conv_norm!r} with norm_first = {encoder.norm_first}: a torchaudio "
            "file has no config, and readers tell one from the other, as in published models; export to "
            "huggingface or fairseq"
        )
