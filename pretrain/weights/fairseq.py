"""fairseq's wav2vec 2.0 and HuBERT checkpoints: a `.pt` with `model` and `cfg` (or, of older ones, `args`).

HuBERT's `label_embs_concat` has a row per word of fairseq's dictionary: four special words, then the labels
in the order of dict.km.txt. Ours has a row per class. A checkpoint that holds its dictionary tells which row
is which; otherwise the number of rows does, where only one reading is a usual number of classes.
"""

import argparse
import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.config import parse_config
from pretrain.model.config import EncoderConfig
from pretrain.model.frontend import CONV_KERNELS, CONV_STRIDES
from pretrain.objectives.hubert import HubertConfig
from pretrain.objectives.wav2vec2 import Wav2Vec2Config
from pretrain.store.disk import atomic_path
from pretrain.store.hashes import sha256_file
from pretrain.weights.fairseq_classes import NUM_SPECIALS, dictionary_symbols, keep_classes
from pretrain.weights.foreign import Exported, Foreign, Source, infer_encoder, leave_out, make_encoder
from pretrain.weights.naming import Objective, canonical, head_in
from pretrain.weights.recognizer import read_head

CONV_LAYERS = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"  # what old checkpoints leave out

# Our config's keys as fairseq calls them, with the default that a missing key stands for.
FAIRSEQ_KEYS: dict[str, tuple[str, Any]] = {
    "dim": ("encoder_embed_dim", 768),
    "num_layers": ("encoder_layers", 12),
    "num_heads": ("encoder_attention_heads", 12),
    "ffn_dim": ("encoder_ffn_embed_dim", 3072),
    "norm_first": ("layer_norm_first", False),
    "conv_bias": ("conv_bias", False),
    "pos_kernel": ("conv_pos", 128),
    "pos_groups": ("conv_pos_groups", 16),
    "input_dropout": ("dropout_input", 0.0),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.0),
    "layer_drop": ("encoder_layerdrop", 0.0),
    "feature_gradient_scale": ("feature_grad_mult", 1.0),
}
FAIRSEQ_FIXED = (
    ("activation_fn", "gelu", "another activation"),
    ("layer_type", "transformer", "another kind of layer"),
    ("pos_conv_depth", 1, "several positional convolutions"),
    ("conv_pos_batch_norm", False, "batch norm in the positional convolution"),
    ("quantize_input", False, "quantised inputs"),
    ("target_glu", False, "a GLU over its targets"),
    ("quantizer_depth", 1, "a deeper quantizer"),
)


def claims(source: Source) -> bool:
    """Whether a file is a checkpoint of fairseq, or its tensors alone."""
    inside = isinstance(source.state.get("model"), Mapping)
    return inside or any("post_extract_proj." in name for name in source.names)


def read(source: Source) -> Foreign:
    """The model of a file."""
    state = source.state if isinstance(source.state.get("model"), Mapping) else {"model": source.state}
    return read_fairseq(source.path, state, source.options, source.num_classes, source.vocabulary)


def write(out: Path, model: Exported) -> dict[str, Any]:
    """Writes a checkpoint; returns the objective."""
    if model.objective == "hubert":
        model.notes.append(
            "fairseq wants dict.km.txt in its label_dir, the lines `0 1`, `1 1`, … of every class"
        )
    family: Objective = model.named or "wav2vec2"
    with atomic_path(out) as temporary:
        write_fairseq(temporary, model.tensors("fairseq"), model.encoder, family, model.head)
    return {"objective": family}


def read_fairseq(
    source: Path,
    state: Mapping[str, Any],
    options: dict[str, Any],
    num_classes: int | None,
    vocabulary: Path | None = None,
) -> Foreign:
    """Read a loaded checkpoint; `state` has at least `model`. `options` win over what it says.

    `vocabulary`: the dict.ltr.txt of a recogniser, where the checkpoint does not hold its dictionary.
    """
    model, task, criterion = _fairseq_settings(source, state)
    notes: list[str] = []
    tensors = canonical(state["model"], "w2v_encoder.w2v_model.", str(source))
    recognizer = read_head(tensors, "fairseq", vocabulary, dictionary_symbols(state), notes, str(source))
    if "final_proj.weight" not in tensors:  # fairseq's fine-tuning removes the projection, not the embeddings
        leave_out(tensors, "label_embs_concat", "a table of label embeddings without its projection", notes)
    objective = head_in(tensors, "fairseq")
    if model:
        encoder = make_encoder(_encoder_keys(model, task, source), options, str(source))
    else:
        encoder = infer_encoder(source, tensors, "fairseq", options, notes)
    mask_length = model.get("mask_length", 10)
    tree: dict[str, Any] = {"temperature": model.get("logit_temp", 0.1), "mask_length": mask_length}
    if "mask_prob" in model:
        tree["mask_start_probability"] = round(model["mask_prob"] / mask_length, 12)
    weights = criterion.get("loss_weights")
    weights = weights if isinstance(weights, list) else []
    head: HubertConfig | Wav2Vec2Config | None = None
    if objective == "wav2vec2":
        tree |= _contrastive_keys(model, tensors, source)
        tree |= dict(zip(("diversity_weight", "feature_penalty"), weights, strict=False))
        head = parse_config(Wav2Vec2Config, tree, str(source))
        for key in ("negatives_from_everywhere", "cross_sample_negatives", "codebook_negatives"):
            if model.get(key):
                notes += [f"{key} = {model[key]!r} is not carried on: distractors are other masked frames"]
    elif objective == "hubert":
        keep_classes(tensors, source, state, num_classes, notes)
        tree["final_dim"] = tensors["label_embs_concat"].shape[1]
        tree |= dict(zip(("feature_penalty",), weights, strict=False))
        masked_weight = criterion.get("pred_masked_weight", 1.0) or 1.0
        tree["unmasked_weight"] = criterion.get("pred_nomask_weight", 0.0) / masked_weight
        head = parse_config(HubertConfig, tree, str(source))
    named = model.get("_name", model.get("arch"))
    by_name: Objective | None = ("hubert" if "hubert" in named else "wav2vec2") if named else None
    family = objective or by_name
    return Foreign("fairseq", tensors, encoder, family, head, sha256_file(source), notes, recognizer)


def _encoder_keys(model: dict[str, Any], task: dict[str, Any], source: Path) -> dict[str, Any]:
    """Keys of EncoderConfig. Raises ValueError for another architecture."""
    for key, value, description in FAIRSEQ_FIXED:
        if model.get(key, value) != value:
            raise ValueError(f"{source}: {key} = {model[key]!r}: a model with {description} is not supported")
    keys = {ours: model.get(theirs, default) for ours, (theirs, default) in FAIRSEQ_KEYS.items()}
    keys["conv_norm"] = "layer" if model.get("extractor_mode") == "layer_norm" else "group"
    keys["conv_dim"] = _conv_width(str(model.get("conv_feature_layers", CONV_LAYERS)), source)
    keys["normalize_waveform"] = bool(task.get("normalize", False))
    return keys


def _contrastive_keys(model: dict[str, Any], tensors: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """Keys of Wav2Vec2Config, without masks and weights of the losses."""
    codes, groups = tensors.get("quantizer.vars"), model.get("latent_groups", 2)
    first, last, decay = _temperatures(model.get("latent_temp", (2, 0.5, 0.999995)), source)
    return {
        "num_groups": groups,
        "num_entries": model.get("latent_vars", 320),
        # A missing tensor is reported later, with all others.
        "code_dim": groups * (codes.shape[-1] if codes is not None else 128),
        "final_dim": len(tensors.get("project_q.weight", [None] * 256)),
        "num_distractors": model.get("num_negatives", 100),
        **({"feature_dropout": model.get("dropout_features", 0.0)} if model else {}),
        "gumbel_temperature": (first, last),
        "gumbel_decay": decay,
    }


def _fairseq_settings(
    source: Path, state: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The settings of model, task and criterion; all empty where the file has none."""
    cfg, args = state.get("cfg"), state.get("args")
    if not cfg and args is None:
        return {}, {}, {}
    parts = [vars(args) if not cfg else cfg.get(key) for key in ("model", "task", "criterion")]
    model, task, criterion = (
        {} if part is None else vars(part) if isinstance(part, argparse.Namespace) else part for part in parts
    )
    if not isinstance(model, dict) or not isinstance(task, dict) or not isinstance(criterion, dict):
        raise ValueError(f"{source}: cfg.model, cfg.task and cfg.criterion must be plain dicts")
    if inner := model.get("w2v_args"):  # of a fine-tuned model: those of the encoder within
        inner = vars(inner) if isinstance(inner, argparse.Namespace) else inner
        model, task = (
            inner.get("model") or inner,
            inner.get("task") if isinstance(inner.get("task"), dict) else task,
        )
        model = vars(model) if isinstance(model, argparse.Namespace) else model
    return model, task or {}, criterion


def _temperatures(value: Any, source: Path) -> tuple[float, float, float]:
    """fairseq's latent_temp (first, last, decay), a sequence or its text."""
    try:
        first, last, decay = (
            float(x) for x in (ast.literal_eval(value) if isinstance(value, str) else value)
        )
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(f"{source}: latent_temp = {value!r}: three numbers are expected") from None
    return first, last, decay


def _conv_width(text: str, source: Path) -> int:
    """The width in fairseq's `[(512,10,5)] + [(512,3,2)] * 4 + …`, evaluated without running it; other stacks
    are refused."""
    try:
        layers = _evaluate(ast.parse(text.strip(), mode="eval").body)
        widths = {width for width, _, _ in layers}
        shape = [(kernel, stride) for _, kernel, stride in layers]
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(
            f"{source}: conv_feature_layers = {text!r}: not a list of (width, kernel, stride)"
        ) from None
    if shape != list(zip(CONV_KERNELS, CONV_STRIDES, strict=True)) or len(widths) != 1:
        raise ValueError(
            f"{source}: conv_feature_layers = {text!r}: only kernels {CONV_KERNELS} and strides "
            f"{CONV_STRIDES} are supported"
        )
    return int(widths.pop())


def _evaluate(node: ast.expr) -> Any:
    match node:
        case ast.BinOp(left, ast.Add(), right):
            return _evaluate(left) + _evaluate(right)
        case ast.BinOp(left, ast.Mult(), ast.Constant(int(times))) if times <= 16:
            return _evaluate(left) * times
        case ast.List(items):
            return [_evaluate(item) for item in items]
        case ast.Tuple(items):
            return tuple(_evaluate(item) for item in items)
        case ast.Constant(int(value)):
            return value
    raise ValueError


def write_fairseq(
    path: Path,
    tensors: dict[str, Tensor],
    encoder: EncoderConfig,
    family: Objective,
    head: HubertConfig | Wav2Vec2Config | None,
) -> None:
    """Writes canonical `tensors` as a checkpoint of plain dicts, with rows for fairseq's special words before
    HuBERT's classes."""
    model: dict[str, Any] = {"_name": family}
    model |= {theirs: getattr(encoder, ours) for ours, (theirs, _) in FAIRSEQ_KEYS.items()}
    model["extractor_mode"] = "layer_norm" if encoder.conv_norm == "layer" else "default"
    model["activation_fn"] = "gelu"
    layers = zip([encoder.conv_dim] * len(CONV_KERNELS), CONV_KERNELS, CONV_STRIDES, strict=True)
    model["conv_feature_layers"] = str(list(layers))
    task: dict[str, Any] = {"data": ".", "sample_rate": 16000, "normalize": encoder.normalize_waveform}
    criterion: dict[str, Any] = {"_name": family}
    state: dict[str, Any] = {}
    if head is not None:
        model |= {
            "final_dim": head.final_dim,
            "logit_temp": head.temperature,
            "mask_length": head.mask_length,
        }
        model["mask_prob"] = round(head.mask_start_probability * head.mask_length, 12)
    if isinstance(head, Wav2Vec2Config):
        model |= _quantizer_settings(head)
        criterion |= {"infonce": True, "loss_weights": [head.diversity_weight, head.feature_penalty]}
    elif isinstance(head, HubertConfig):
        classes = tensors["label_embs_concat"]
        # No label names these rows, so they are only ever wrong answers: they point away from all classes.
        specials = -classes.mean(0, keepdim=True).expand(NUM_SPECIALS, -1)
        tensors = {**tensors, "label_embs_concat": torch.cat([specials, classes])}
        criterion |= {"pred_masked_weight": 1.0, "pred_nomask_weight": head.unmasked_weight}
        criterion["loss_weights"] = [head.feature_penalty]
        state["symbols"] = [["<s>", "<pad>", "</s>", "<unk>", *map(str, range(len(classes)))]]
    if family == "hubert":
        model |= {"label_rate": 50, "untie_final_proj": False}
        task |= {"_name": "hubert_pretraining", "labels": ["km"], "label_rate": 50, "label_dir": None}
    else:
        task |= {"_name": "audio_pretraining"}
    state["args"] = None
    state["cfg"] = {"_name": None, "model": model, "task": task, "criterion": criterion}
    state["model"] = tensors
    # What fairseq's loader looks for beside the weights.
    history = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
    state["optimizer_history"] = [history]
    state["extra_state"] = {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}}
    torch.save(state, path)


def _quantizer_settings(head: Wav2Vec2Config) -> dict[str, Any]:
    return {
        "quantize_targets": True,
        "num_negatives": head.num_distractors,
        "latent_groups": head.num_groups,
        "latent_vars": head.num_entries,
        "latent_dim": head.code_dim,
        "dropout_features": head.feature_dropout,
        "latent_temp": [*head.gumbel_temperature, head.gumbel_decay],
    }
