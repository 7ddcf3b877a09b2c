"""Configs of fairseq2's wav2vec 2.0 as ours."""

from collections.abc import Mapping
from typing import Any

from pretrain.model.frontend import CONV_KERNELS, CONV_STRIDES
from pretrain.weights.card_config import (
    CONTRASTIVE_KEYS,
    ENCODER_KEYS,
)
from pretrain.weights.cards import Card
from pretrain.weights.fairseq2_classes import (
    held_table,
    note_least_spans,
)

# Keys whose other values make another architecture.
FIXED: tuple[tuple[str, Any, str], ...] = (
    ("use_fbank", False, "log-mel filterbanks in place of waveforms"),
    ("use_conformer", False, "Conformer blocks"),
    ("pos_encoder_type", "conv", "positions in its attention"),
    ("pos_encoder_depth", 1, "several positional convolutions"),
)


def encoder_keys(told: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Our encoder's keys of fairseq2's `encoder_config`; ValueError that names the key and value of what we
    have no place for."""
    where = f"{source}: encoder_config"
    for key, value, description in FIXED:
        if told[key] != value:
            raise ValueError(f"{where}.{key} = {told[key]!r}: a model with {description} is not supported")
    layers = [
        tuple(layer) if isinstance(layer, list | tuple) else layer
        for layer in told["feature_extractor_layer_descs"]
    ]
    expected = [(told["feature_dim"], *shape) for shape in zip(CONV_KERNELS, CONV_STRIDES, strict=True)]
    if layers != expected:
        raise ValueError(
            f"{where}.feature_extractor_layer_descs = {layers}: only {expected} (width, kernel, stride) are "
            "supported"
        )
    order = str(told["norm_order"]).upper()
    if order not in ("PRE", "POST"):
        raise ValueError(f"{where}.norm_order = {told['norm_order']!r}: only PRE and POST are supported")
    if told["layer_norm_features"] != (order == "POST"):
        raise ValueError(
            f"{where}.layer_norm_features = {told['layer_norm_features']} with norm_order = {order}: only "
            "true with POST, false with PRE are supported, as in published models"
        )
    if told["feature_dim"] == told["model_dim"]:
        raise ValueError(
            f"{where}.feature_dim = {told['feature_dim']} = model_dim: a model without a projection is not "
            "supported"
        )
    keys = {ours: told[theirs] for ours, theirs in ENCODER_KEYS.items()}
    keys["front_end"] = "waveform"  # which an architecture may say otherwise
    return {
        **keys,
        "norm_first": order == "PRE",
        "conv_norm": "layer" if told["feature_extractor_layer_norm_convs"] else "group",
    }


def contrastive_tree(card: Card, notes: list[str]) -> dict[str, Any]:
    """Our config of wav2vec 2.0's heads and losses."""
    told = card.config
    if not told["final_proj_bias"]:
        raise ValueError(
            f"{card.source}: final_proj_bias = False: a projection without a bias is not supported"
        )
    temperatures = told["codebook_sampling_temperature"]
    if len(temperatures) != 3:
        raise ValueError(
            f"{card.source}: codebook_sampling_temperature = {temperatures}: first, last and decay are "
            "expected"
        )
    first, last, decay = temperatures
    held = held_table(card, "wav2vec2")
    tree = {"feature_dropout": told["encoder_config"]["first_pass_dropout_p"], **held}
    tree |= {ours: told[theirs] for ours, theirs in CONTRASTIVE_KEYS.items()}
    tree |= {"gumbel_temperature": (first, last), "gumbel_decay": decay}
    tree["mask_start_probability"] = round(
        told["max_temporal_mask_prob"] / max(1, told["temporal_mask_span_len"]), 12
    )
    note_least_spans(card, notes)
    if told["max_spatial_mask_prob"]:
        notes.append("max_spatial_mask_prob is not carried on: wav2vec 2.0 here masks time alone")
    if not told["quantizer_encoder_grad"]:
        notes.append(
            "quantizer_encoder_grad = False is not carried on: the quantizer's gradient reaches the front "
            "end here"
        )
    if not held:
        notes.append(
            "fairseq2's configs do not hold the weights of its losses: diversity 0.1, feature penalty 10, as "
            "its default"
        )
    return tree
