"""What other libraries call the weights of wav2vec 2.0 and HuBERT, and how their tensors lie.

`parameters` lists every tensor of ours with the tensors of theirs that hold it; one list serves reading and
writing, so what one direction does the other undoes. The names are those of fairseq's, fairseq2's,
transformers' and torchaudio's state dicts without the prefix of the wrapping model. Weight normalisation is
`weight_g` and `weight_v` here; `canonical` brings torch's newer `parametrizations.weight.original0` and
`original1` to it.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pretrain.model.config import EncoderConfig
from pretrain.model.frontend import CONV_KERNELS

Format = Literal["huggingface", "fairseq", "fairseq2", "torchaudio"]
Objective = Literal["hubert", "wav2vec2"]
SHOWN = 6  # wrong names of a kind that a message lists

# Where each part of the encoder is. {} is the number of a convolution or a layer. `norm` is the last one of
# pre-norm models and the one before the layers of post-norm models; `first_norm` is the latter's name where
# it has one of its own.
ENCODER_NAMES: dict[Format, dict[str, str]] = {
    "huggingface": {
        "conv": "feature_extractor.conv_layers.{}.conv",
        "group_norm": "feature_extractor.conv_layers.{}.layer_norm",
        "layer_norm": "feature_extractor.conv_layers.{}.layer_norm",
        "feature_norm": "feature_projection.layer_norm",
        "project": "feature_projection.projection",
        "mask_embedding": "masked_spec_embed",
        "positional": "encoder.pos_conv_embed.conv",
        "norm": "encoder.layer_norm",
        "layer": "encoder.layers.{}",
    },
    "torchaudio": {
        "conv": "feature_extractor.conv_layers.{}.conv",
        "group_norm": "feature_extractor.conv_layers.{}.layer_norm",
        "layer_norm": "feature_extractor.conv_layers.{}.layer_norm",
        "feature_norm": "encoder.feature_projection.layer_norm",
        "project": "encoder.feature_projection.projection",
        "mask_embedding": "mask_generator.mask_embedding",
        "positional": "encoder.transformer.pos_conv_embed.conv",
        "norm": "encoder.transformer.layer_norm",
        "layer": "encoder.transformer.layers.{}",
    },
    "fairseq": {
        "conv": "feature_extractor.conv_layers.{}.0",
        "group_norm": "feature_extractor.conv_layers.{}.2",
        "layer_norm": "feature_extractor.conv_layers.{}.2.1",
        "feature_norm": "layer_norm",
        "project": "post_extract_proj",
        "mask_embedding": "mask_emb",
        "positional": "encoder.pos_conv.0",
        "norm": "encoder.layer_norm",
        "layer": "encoder.layers.{}",
    },
    "fairseq2": {
        "conv": "encoder_frontend.feature_extractor.layers.{}.conv",
        "group_norm": "encoder_frontend.feature_extractor.layers.{}.group_norm",
        "layer_norm": "encoder_frontend.feature_extractor.layers.{}.layer_norm",
        "feature_norm": "encoder_frontend.post_extract_layer_norm",
        "project": "encoder_frontend.model_dim_proj",
        "mask_embedding": "masker.temporal_mask_embed",
        "positional": "encoder_frontend.pos_encoder.conv",
        "norm": "encoder.layer_norm",
        "first_norm": "encoder_frontend.layer_norm",
        "layer": "encoder.layers.{}",
    },
}
_HUGGINGFACE_LAYER = {
    "attention": "attention",
    "attention_out": "attention.out_proj",
    "attention_norm": "layer_norm",
    "ffn_in": "feed_forward.intermediate_dense",
    "ffn_out": "feed_forward.output_dense",
    "ffn_norm": "final_layer_norm",
}
LAYER_NAMES: dict[Format, dict[str, str]] = {
    "huggingface": _HUGGINGFACE_LAYER,
    "torchaudio": _HUGGINGFACE_LAYER,
    "fairseq": {
        "attention": "self_attn",
        "attention_out": "self_attn.out_proj",
        "attention_norm": "self_attn_layer_norm",
        "ffn_in": "fc1",
        "ffn_out": "fc2",
        "ffn_norm": "final_layer_norm",
    },
    "fairseq2": {
        "attention": "self_attn",
        "attention_out": "self_attn.output_proj",
        "attention_norm": "self_attn_layer_norm",
        "ffn_in": "ffn.inner_proj",
        "ffn_out": "ffn.output_proj",
        "ffn_norm": "ffn_layer_norm",
    },
}
# The pretraining heads. transformers has no HuBERT head: those two names are of the file we put beside its
# model.
HEAD_NAMES: dict[tuple[Format, Objective], dict[str, str]] = {
    ("huggingface", "wav2vec2"): {
        "quantizer.codes": "quantizer.codevectors",
        "quantizer.logits": "quantizer.weight_proj",
        "project_code": "project_q",
        "project": "project_hid",
    },
    ("fairseq", "wav2vec2"): {
        "quantizer.codes": "quantizer.vars",
        "quantizer.logits": "quantizer.weight_proj",
        "project_code": "project_q",
        "project": "final_proj",
    },
    ("fairseq2", "wav2vec2"): {
        "quantizer.codes": "quantizer.entries",
        "quantizer.logits": "quantizer.entry_proj",
        "project_code": "final_target_proj",
        "project": "final_proj",
    },
    ("huggingface", "hubert"): {"class_embeddings": "label_embeddings", "project": "final_proj"},
    ("fairseq", "hubert"): {"class_embeddings": "label_embs_concat", "project": "final_proj"},
    ("torchaudio", "hubert"): {
        "class_embeddings": "logit_generator.label_embeddings",
        "project": "logit_generator.final_proj",
    },
}
CTC_HEADS: dict[Format, str] = {
    "huggingface": "lm_head",
    "fairseq": "w2v_encoder.proj",
    "fairseq2": "final_proj",
    "torchaudio": "aux",
}
# A sign in a tensor's name, and what it says the model is.
UNSUPPORTED = {
    r"rel_attn_embed|gru_rel_pos|grep_linear|relative_attention_bias": "WavLM (gated relative positions)",
    r"conv_module|depthwise_conv|pos_bias_u": "a Conformer",
    r"running_mean": "a model with batch norm in the positional convolution",
    r"sdpa\.": "a model with relative positions in its attention",
    r"pos_conv_embed\.layers|pos_conv\.\d+\.0\.|pos_encoder\.layers": "data2vec (positional convolutions)",
    r"adapter": "a model with adapters",
    r"target_glu": "a model with a GLU over its targets (target_glu)",
    r"input_quantizer|project_inp": "a model with quantised inputs (quantize_input)",
}


@dataclass(frozen=True)
class Parameter:
    """One tensor of ours and the tensors of theirs that hold it."""

    ours: str
    theirs: tuple[str, ...]
    read: Callable[[Sequence[Tensor]], Tensor] = lambda tensors: tensors[0]
    write: Callable[[Tensor], tuple[Tensor, ...]] = lambda tensor: (tensor,)


def parameters(
    form: Format,
    encoder: EncoderConfig,
    objective: Objective | None,
    num_groups: int = 1,
    *,
    ctc: bool = False,
) -> list[Parameter]:
    """Every tensor of an encoder, named `encoder.…`, and of the heads of `objective` (None: no heads), or of
    a CTC head.

    `num_groups`: of wav2vec 2.0's codebook.
    """
    names = ENCODER_NAMES[form]
    found = _front_end(names, encoder)
    found += _affine("encoder.feature_norm", names["feature_norm"])
    found += _affine("encoder.project", names["project"])
    found.append(Parameter("encoder.mask_embedding", (names["mask_embedding"],)))
    for ours, theirs in (("magnitude", "weight_g"), ("direction", "weight_v"), ("bias", "bias")):
        found.append(Parameter(f"encoder.positional.{ours}", (f"{names['positional']}.{theirs}",)))
    norm = names["norm"] if encoder.norm_first else names.get("first_norm", names["norm"])
    found += _affine("encoder.norm", norm)
    for number in range(encoder.num_layers):
        found += _layer(f"encoder.layers.{number}", names["layer"].format(number), LAYER_NAMES[form])
    for ours, theirs in HEAD_NAMES[form, objective].items() if objective else ():
        if ours == "quantizer.codes":  # theirs are (1, groups · entries, dim)
            found.append(
                Parameter(
                    ours,
                    (theirs,),
                    lambda x: x[0][0].unflatten(0, (num_groups, -1)),
                    lambda x: (x.flatten(0, 1)[None],),
                )
            )
        else:
            found += [Parameter(ours, (theirs,))] if ours == "class_embeddings" else _affine(ours, theirs)
    return found + (_affine("head", CTC_HEADS[form]) if ctc else [])


def _front_end(names: Mapping[str, str], encoder: EncoderConfig) -> list[Parameter]:
    found = []
    for number in range(len(CONV_KERNELS)):
        conv, ours = names["conv"].format(number), "encoder.front_end"
        found.append(Parameter(f"{ours}.weights.{number}", (f"{conv}.weight",), _taps_first, _taps_last))
        if encoder.conv_bias:
            found.append(Parameter(f"{ours}.biases.{number}", (f"{conv}.bias",)))
        if encoder.conv_norm == "layer" or number == 0:
            found += _affine(f"{ours}.norms.{number}", names[f"{encoder.conv_norm}_norm"].format(number))
    return found


def _layer(ours: str, theirs: str, names: Mapping[str, str]) -> list[Parameter]:
    found = []
    for kind in ("weight", "bias"):
        parts = tuple(f"{theirs}.{names['attention']}.{letter}_proj.{kind}" for letter in "qkv")
        qkv = f"{ours}.qkv.{kind}"
        found.append(Parameter(qkv, parts, lambda rows: torch.cat(list(rows)), lambda rows: rows.chunk(3)))
    for part in ("attention_out", "attention_norm", "ffn_in", "ffn_out", "ffn_norm"):
        found += _affine(f"{ours}.{part}", f"{theirs}.{names[part]}")
    return found


def _affine(ours: str, theirs: str) -> list[Parameter]:
    return [Parameter(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]


def _taps_first(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].permute(2, 1, 0)  # (out, in, kernel) to (kernel, in, out)


def _taps_last(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor.permute(2, 1, 0),)


def head_in(names: Mapping[str, object], form: Format) -> Objective | None:
    """The objective whose heads are among canonical `names`, or None."""
    if any(name.startswith("quantizer.") for name in names):
        return "wav2vec2"
    hubert = HEAD_NAMES.get((form, "hubert"))
    return "hubert" if hubert and hubert["class_embeddings"] in names else None


def canonical(state: Mapping[str, Tensor], prefix: str, source: str) -> dict[str, Tensor]:
    """The tensors under their names here: without `prefix`, weight normalisation as weight_g and weight_v.

    Errors: a ValueError that names the architecture, where a name is a sign of one that is not supported.
    """
    renamed = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{source}: {name!r} is a {type(tensor).__name__}; a state dict holds tensors alone"
            )
        for pattern, description in UNSUPPORTED.items():
            if re.search(pattern, name):
                raise ValueError(f"{source}: holds {name!r}, so it is {description}, which is not supported")
        short = name.removeprefix(prefix)
        short = short.replace(".parametrizations.weight.original0", ".weight_g")
        renamed[short.replace(".parametrizations.weight.original1", ".weight_v")] = tensor
    return renamed


def to_ours(
    theirs: Mapping[str, Tensor], table: Sequence[Parameter], shapes: Mapping[str, torch.Size], source: str
) -> dict[str, Tensor]:
    """Their tensors as ours, float32 and contiguous. `shapes` are those of our model.

    Errors: a ValueError that names every kind of tensor that is missing, not expected, or of another shape or
    type.
    """
    expected: dict[str, torch.Size] = {}
    for parameter in table:
        parts = parameter.write(torch.empty(shapes[parameter.ours], device="meta"))
        expected |= {name: part.shape for name, part in zip(parameter.theirs, parts, strict=True)}
    _compare(theirs, expected, source)
    return {p.ours: p.read([theirs[name].float() for name in p.theirs]).contiguous() for p in table}


def type_name(tensor: Tensor) -> str:
    """Of its numbers: float32, int8, …"""
    return str(tensor.dtype).removeprefix("torch.")


def to_theirs(ours: Mapping[str, Tensor], table: Sequence[Parameter]) -> dict[str, Tensor]:
    """Our tensors as theirs, contiguous, under canonical names."""
    written = {}
    for parameter in table:
        for name, part in zip(parameter.theirs, parameter.write(ours[parameter.ours]), strict=True):
            # parts of one tensor must not share its storage in the file
            written[name] = part.contiguous().clone()
    return written


def _compare(theirs: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: str) -> None:
    missing, surplus = (
        [name for name in expected if name not in theirs],
        [name for name in theirs if name not in expected],
    )
    strange = [name for name in expected if name in theirs and not theirs[name].is_floating_point()]
    misshaped = [name for name, shape in expected.items() if name in theirs and theirs[name].shape != shape]
    problems = []
    for name in missing[:SHOWN]:
        near = difflib.get_close_matches(name, surplus, n=1)
        problems.append(f"missing: {name}" + (f" (there is {near[0]!r})" if near else ""))
    for name in surplus[:SHOWN]:
        near = difflib.get_close_matches(name, missing or list(expected), n=1)
        problems.append(
            f"not expected: {name}" + (f" (the nearest known name is {near[0]!r})" if near else "")
        )
    problems += [
        f"{name}: is {tuple(theirs[name].shape)}; {tuple(expected[name])} is expected"
        for name in misshaped[:SHOWN]
    ]
    problems += [
        f"{name}: holds {type_name(theirs[name])}; floating-point numbers are expected"
        for name in strange[:SHOWN]
    ]
    kinds = (
        ("missing", missing),
        ("not expected", surplus),
        ("of another shape", misshaped),
        ("of another type", strange),
    )
    problems += [
        f"{len(names)} tensors are {kind}, of which {SHOWN} are named here"
        for kind, names in kinds
        if len(names) > SHOWN
    ]
    if problems:
        raise ValueError("\n".join(f"{source}: {problem}" for problem in problems))
