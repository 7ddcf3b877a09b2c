"""The configs of fairseq2's wav2vec 2.0 models as its cards have them: every key with its default, and which
of ours it is."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# fairseq2 0.8's configs without an architecture, which are those of "base" and "base_10h".
_ENCODER: dict[str, Any] = {
    "model_dim": 768,
    "max_seq_len": 4096,
    "feature_dim": 512,
    "use_fbank": False,
    "first_pass_dropout_p": 0.0,
    "layer_norm_features": True,
    "feature_extractor_layer_descs": [[512, 10, 5], *[[512, 3, 2]] * 4, *[[512, 2, 2]] * 2],
    "feature_extractor_bias": False,
    "feature_extractor_layer_norm_convs": False,
    "feature_grad_scale": 0.1,
    "num_fbank_channels": 0,
    "fbank_stride": 0,
    "sample_fbank_every_k": 0,
    "pos_encoder_type": "conv",
    "pos_encoder_depth": 1,
    "pos_conv_kernel_size": 128,
    "num_pos_conv_groups": 16,
    "use_conformer": False,
    "num_encoder_layers": 12,
    "num_encoder_attn_heads": 12,
    "ffn_inner_dim": 3072,
    "dropout_p": 0.1,
    "attn_dropout_p": 0.1,
    "ffn_inner_dropout_p": 0.0,
    "layer_drop_p": 0.05,
    "norm_order": "POST",
    "depthwise_conv_kernel_size": 0,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "wav2vec2": {
        "encoder_config": _ENCODER,
        "final_dim": 256,
        "final_proj_bias": True,
        "quantizer_encoder_grad": True,
        "temporal_mask_span_len": 10,
        "max_temporal_mask_prob": 0.69,
        "min_num_temporal_mask_spans": 2,
        "spatial_mask_span_len": 10,
        "max_spatial_mask_prob": 0.0,
        "min_num_spatial_mask_spans": 2,
        "quantized_dim": 256,
        "num_codebooks": 2,
        "num_codebook_entries": 320,
        "codebook_sampling_temperature": [2.0, 0.5, 0.999995],
        "num_distractors": 100,
        "logit_temp": 0.1,
    },
    "wav2vec2_asr": {
        "encoder_config": {
            **_ENCODER,
            "feature_grad_scale": 1.0,
            "dropout_p": 0.0,
            "attn_dropout_p": 0.0,
            "ffn_inner_dropout_p": 0.1,
        },
        "target_vocab_size": 32,
        "final_dropout_p": 0.0,
        "use_masking": True,
        "temporal_mask_span_len": 10,
        "max_temporal_mask_prob": 0.69,
        "min_num_temporal_mask_spans": 2,
        "spatial_mask_span_len": 64,
        "max_spatial_mask_prob": 0.55,
        "min_num_spatial_mask_spans": 2,
    },
}

COUNTER = "quantizer.num_updates"  # a tensor: of steps, which Gumbel's temperature follows

# Our config's keys as fairseq2 calls them.
ENCODER_KEYS = {
    "dim": "model_dim",
    "num_layers": "num_encoder_layers",
    "num_heads": "num_encoder_attn_heads",
    "ffn_dim": "ffn_inner_dim",
    "conv_dim": "feature_dim",
    "conv_bias": "feature_extractor_bias",
    "pos_kernel": "pos_conv_kernel_size",
    "pos_groups": "num_pos_conv_groups",
    "input_dropout": "first_pass_dropout_p",
    "dropout": "dropout_p",
    "attention_dropout": "attn_dropout_p",
    "activation_dropout": "ffn_inner_dropout_p",
    "layer_drop": "layer_drop_p",
    "feature_gradient_scale": "feature_grad_scale",
}
CONTRASTIVE_KEYS = {
    "mask_length": "temporal_mask_span_len",
    "num_distractors": "num_distractors",
    "num_groups": "num_codebooks",
    "num_entries": "num_codebook_entries",
    "code_dim": "quantized_dim",
    "final_dim": "final_dim",
    "temperature": "logit_temp",
}
CTC_KEYS = {
    "final_dropout": "final_dropout_p",
    "mask_length": "temporal_mask_span_len",
    "mask_channel_length": "spatial_mask_span_len",
}
# Theirs that are computed of ours: of masks, the probability that a span begins times its length.
COMPUTED_KEYS = {
    "mask_start_probability": "max_temporal_mask_prob",
    "mask_channel_probability": "max_spatial_mask_prob",
    "gumbel_temperature": "codebook_sampling_temperature",
    "gumbel_decay": "codebook_sampling_temperature",
    "feature_dropout": "encoder_config.first_pass_dropout_p",
}


def complete_config(family: str, given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A whole config of fairseq2's from what a card says; ValueError for keys and types that are not of
    it."""
    return _complete(DEFAULTS[family], given, source, "model_config")


def _complete(
    defaults: Mapping[str, Any], given: Mapping[str, Any], source: str, where: str
) -> dict[str, Any]:
    whole = dict(defaults)
    for key, value in given.items():
        if key not in defaults:
            near = near_names(str(key), defaults)
            raise ValueError(f"{source}: {where}.{key} = {value!r}: no key of fairseq2 0.8's config{near}")
        default = defaults[key]
        if isinstance(default, dict):
            if not isinstance(value, Mapping):
                raise ValueError(f"{source}: {where}.{key} = {value!r}: a table is expected")
            whole[key] = _complete(default, value, source, f"{where}.{key}")
            continue
        if isinstance(default, float) and isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML 1.1 takes 1e-05 for a text
        expected = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, expected) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise ValueError(f"{source}: {where}.{key} = {value!r}: like {default!r} is expected")
        whole[key] = value
    return whole


def near_names(name: str, known: Iterable[str]) -> str:
    """What to add to a message that `name` is not known."""
    known = sorted(known)
    if near := difflib.get_close_matches(name, known, n=3, cutoff=0.5):
        return f"; near it are {', '.join(near)}"
    return f"; known are {', '.join(known[:8])}" if known else ""


@contextlib.contextmanager
def told_with(theirs: Mapping[str, str], source: str) -> Iterator[None]:
    """What `parse_config` says of `source` names their key beside ours, where a card holds theirs."""
    try:
        yield
    except ValueError as error:
        said = re.compile(rf"(?m)^({re.escape(source)}: )(\w+)(?=[.:])")
        told = said.sub(
            lambda found: (
                f"{found[1]}{theirs[found[2]]}, here {found[2]}" if found[2] in theirs else found[0]
            ),
            str(error),
        )
        raise ValueError(told) from None
