"""What `export --format fairseq2` writes: a folder with `card.yaml`, `model.safetensors` and, of recognisers
of characters, `tokenizer.model`.

fairseq2 loads it by its name where the folder is below FAIRSEQ2_ASSET_DIR. Its own families hold wav2vec 2.0
with heads and CTC models on waveforms. Whatever else we train becomes a card of one of ours, over our own
tensors, which fairseq2 loads where wordless is installed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.ctc.task import CTCConfig
from pretrain.ctc.text import SPACE
from pretrain.model.config import EncoderConfig
from pretrain.model.frontend import CONV_KERNELS, CONV_STRIDES
from pretrain.objectives.hubert import HubertConfig
from pretrain.objectives.wav2vec2 import Wav2Vec2Config
from pretrain.weights.card_config import CONTRASTIVE_KEYS, COUNTER, DEFAULTS, ENCODER_KEYS
from pretrain.weights.cards import CARD
from pretrain.weights.foreign import CTCHead, Foreign
from pretrain.weights.naming import CTC_HEADS, parameters, to_theirs
from pretrain.weights.recognizer import name_blank, take_rows
from pretrain.weights.sentencepiece import SPACE_PIECE, write_pieces

TENSORS, TOKENIZER = "model.safetensors", "tokenizer.model"


def own_family(run: Foreign) -> str:
    """The family of ours that it is of."""
    if run.recognizer is not None:
        return "wordless_recognizer"
    if run.head is None:
        return "wordless_encoder"
    return "wordless_hubert" if isinstance(run.head, HubertConfig) else "wordless_wav2vec2"


def why_own_family(run: Foreign) -> str | None:
    """Why none of fairseq2's families holds it; None where one does."""
    encoder = run.encoder
    if isinstance(run.head, HubertConfig):
        return "fairseq2 has no HuBERT"
    if run.head is None and run.recognizer is None:
        return "fairseq2 has no family of encoders without heads"
    if encoder.front_end != "waveform":
        return (
            "fairseq2's models read waveforms, this one "
            f"{'units' if encoder.front_end == 'units' else 'filterbank features'}"
        )
    if encoder.streaming is not None:
        return "fairseq2 has no streaming encoder"
    if encoder.conv_dim == encoder.dim:
        return f"fairseq2 has no projection where conv_dim equals dim ({encoder.dim})"
    if "layer_weights" in run.tensors:
        return 'fairseq2 has no recogniser with ctc.layers = "weighted"'
    return None


def write_card(folder: Path, name: str, run: Foreign) -> str:
    """Write `run`, whose tensors are ours, into the existing `folder` as the asset `name`; returns its
    family. What fairseq2 cannot hold is added to its notes."""
    import yaml  # type: ignore[import-untyped]

    notes = run.notes
    card: dict[str, Any]
    if why := why_own_family(run):
        notes.append(
            f"{why}: the card is of {own_family(run)}, which fairseq2 knows where wordless is installed "
            "beside it"
        )
        card, tensors = _own_card(run), dict(run.tensors)
    else:
        card, tensors = _their_card(folder, run)
        if run.encoder.normalize_waveform:
            notes.append(
                "fairseq2's models take waveforms as they are: give them normalised, as this one was trained"
            )
    card = {"name": name, "model_family": card.pop("model_family"), "checkpoint": TENSORS, **card}
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        folder / TENSORS,
        metadata={"format": "pt"},
    )
    (folder / CARD).write_text(
        yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8"
    )
    return str(card["model_family"])


def _own_card(run: Foreign) -> dict[str, Any]:
    config: dict[str, Any] = {"encoder": run.encoder.resolved()}
    if isinstance(run.head, HubertConfig):
        config |= {"hubert": run.head.resolved(), "num_classes": len(run.tensors["class_embeddings"])}
    elif run.head is not None:
        config["wav2vec2"] = run.head.resolved()
    if run.recognizer is not None:
        vocabulary, text, ctc = run.recognizer
        layers = "weighted" if "layer_weights" in run.tensors else "last"
        config |= {
            "vocabulary": vocabulary.to_meta(),
            "text": text.resolved(),
            "ctc": {**ctc.resolved(), "layers": layers},
        }
    extra = {"objective": run.family, "codebook": run.codebook}
    return {"model_family": own_family(run), "model_config": config, "wordless": extra}


def _their_card(folder: Path, run: Foreign) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The card's fields, and the tensors under fairseq2's names."""
    extra: dict[str, Any] = {"objective": run.family, "encoder": run.encoder.resolved()}
    head, recognizer, notes = run.head, run.recognizer, run.notes
    told = _encoder_config(run.encoder, notes)
    if isinstance(head, Wav2Vec2Config):
        tensors = to_theirs(run.tensors, parameters("fairseq2", run.encoder, "wav2vec2", head.num_groups))
        tensors[COUNTER] = torch.zeros((), dtype=torch.int64)
        config = {**DEFAULTS["wav2vec2"], "encoder_config": told, **_contrastive_config(head)}
        if head.feature_dropout != run.encoder.input_dropout:
            notes.append(
                "fairseq2 has one dropout for the quantizer's input and the encoder's: that of the latter, "
                f"{run.encoder.input_dropout}, is written, feature_dropout = {head.feature_dropout} is not"
            )
        if (head.diversity_weight, head.feature_penalty) != (0.1, 10.0):
            notes.append(
                "the weights of the losses are settings of fairseq2's recipes: diversity "
                f"{head.diversity_weight}, penalty {head.feature_penalty}"
            )
        return {
            "model_family": "wav2vec2",
            "model_config": config,
            "wordless": {**extra, "wav2vec2": head.resolved()},
        }, tensors
    assert recognizer is not None
    tensors = to_theirs(run.tensors, parameters("fairseq2", run.encoder, None, ctc=True))
    config = {
        **DEFAULTS["wav2vec2_asr"],
        "encoder_config": told,
        **_ctc_config(recognizer.ctc, run.encoder.dim, notes),
    }
    if not config["use_masking"]:
        del tensors["masker.temporal_mask_embed"]
        notes.append("the mask embedding is left out: fairseq2 has none where no time is masked")
    if run.family == "hubert":
        notes.append("written as wav2vec 2.0, whose encoder is HuBERT's")
    extra |= {
        "vocabulary": recognizer.vocabulary.to_meta(),
        "text": recognizer.text.resolved(),
        "ctc": recognizer.ctc.resolved(),
    }
    card = {"model_family": "wav2vec2_asr", "model_config": config, "wordless": extra}
    card |= _write_tokenizer(folder, recognizer, tensors, notes)
    extra["unknown_class"] = "tokenizer" in card and "<unk>" not in recognizer.vocabulary.symbols
    config["target_vocab_size"] = len(tensors[f"{CTC_HEADS['fairseq2']}.weight"])
    return card, tensors


def _encoder_config(encoder: EncoderConfig, notes: list[str]) -> dict[str, Any]:
    told = {
        **DEFAULTS["wav2vec2"]["encoder_config"],
        **{theirs: getattr(encoder, ours) for ours, theirs in ENCODER_KEYS.items()},
    }
    if not 0 < encoder.feature_gradient_scale <= 1:
        told["feature_grad_scale"] = 1.0
        notes.append(
            f"feature_gradient_scale = {encoder.feature_gradient_scale} is written as 1: fairseq2 takes more "
            "than 0, up to 1"
        )
    shapes = [
        [encoder.conv_dim, kernel, stride] for kernel, stride in zip(CONV_KERNELS, CONV_STRIDES, strict=True)
    ]
    return told | {
        "feature_extractor_layer_descs": shapes,
        "feature_extractor_layer_norm_convs": encoder.conv_norm == "layer",
        "norm_order": "PRE" if encoder.norm_first else "POST",
        "layer_norm_features": not encoder.norm_first,
    }


def _contrastive_config(head: Wav2Vec2Config) -> dict[str, Any]:
    """fairseq2 masks `max_temporal_mask_prob` · frames / length spans of an utterance; ours begin at each
    frame with a probability."""
    told = {theirs: getattr(head, ours) for ours, theirs in CONTRASTIVE_KEYS.items()}
    told["max_temporal_mask_prob"] = round(head.mask_start_probability * head.mask_length, 12)
    return told | {"codebook_sampling_temperature": [*head.gumbel_temperature, head.gumbel_decay]}


def _ctc_config(ctc: CTCConfig, dim: int, notes: list[str]) -> dict[str, Any]:
    """fairseq2 raises where an utterance has room for fewer spans than its least number, so that is 0 here:
    it is then not masked."""
    told: dict[str, Any] = {
        "final_dropout_p": ctc.final_dropout,
        "use_masking": ctc.mask_start_probability > 0,
    }
    if not told["use_masking"]:
        if ctc.mask_channel_probability > 0:
            notes.append(
                "fairseq2 masks no channels where it masks no time: mask_channel_probability is not written"
            )
        return told
    channels = ctc.mask_channel_probability
    # fairseq2 raises for spans as long as the width, and rounds less than one span down to none
    if channels > 0 and (ctc.mask_channel_length >= dim or channels * (dim - 1) < 1):
        notes.append(
            f"fairseq2 masks no channels where a span of {ctc.mask_channel_length} does not fit {dim} of "
            f"them, or fewer than one is to begin ({channels} of {dim - 1}): max_spatial_mask_prob is 0"
        )
        channels = 0.0
    return told | {
        "temporal_mask_span_len": ctc.mask_length,
        "max_temporal_mask_prob": round(ctc.mask_start_probability * ctc.mask_length, 12),
        "min_num_temporal_mask_spans": 0,
        "spatial_mask_span_len": ctc.mask_channel_length,
        "max_spatial_mask_prob": round(channels * ctc.mask_channel_length, 12),
        "min_num_spatial_mask_spans": 0,
    }


def _write_tokenizer(
    folder: Path, recognizer: CTCHead, tensors: dict[str, Tensor], notes: list[str]
) -> Mapping[str, str]:
    """A SentencePiece model of characters with our classes in our order; its fields for the card.

    SentencePiece needs a piece for unknown characters. Where the vocabulary has none it is one more class,
    which never wins.
    """
    vocabulary = recognizer.vocabulary
    symbols = [SPACE_PIECE if symbol == SPACE else symbol for symbol in vocabulary.symbols]
    plain = [symbol for symbol in symbols if not (symbol.startswith("<") and symbol.endswith(">"))]
    if (
        vocabulary.spelling not in ("characters", "jamo")
        or len(set(symbols)) < len(symbols)
        or max(map(len, plain), default=1) > 1
    ):
        notes.append(
            "there is no tokenizer for fairseq2, which has one of characters; the classes are in the card's "
            "wordless.vocabulary"
        )
        return {}
    if vocabulary.spelling == "jamo":
        notes.append("the tokenizer spells jamo: give it texts in which syllables are taken apart (NFD)")
    write_pieces(folder / TOKENIZER, name_blank(symbols), symbols, "<unk>")
    if "<unk>" not in symbols:
        take_rows(tensors, CTC_HEADS["fairseq2"], [*range(len(vocabulary)), -1], str(folder))
    return {"tokenizer_family": "char_tokenizer", "tokenizer": TOKENIZER}
