"""transformers' wav2vec 2.0 and HuBERT models: a folder with config.json, model.safetensors and
preprocessor_config.json.

Also read: pytorch_model.bin and shards with an index. transformers has no HuBERT head; an exported one keeps
its heads in a file of its own, which transformers does not look at and `import` does. Recognisers are its
Wav2Vec2ForCTC and HubertForCTC, with a tokenizer's files beside them (pretrain/weights/recognizer.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pretrain.config import parse_config
from pretrain.model.config import EncoderConfig
from pretrain.model.frontend import CONV_KERNELS, CONV_STRIDES
from pretrain.objectives.hubert import HubertConfig
from pretrain.objectives.wav2vec2 import Wav2Vec2Config
from pretrain.store.disk import atomic_folder
from pretrain.store.hashes import sha256_file
from pretrain.weights.ctc_vocabularies import Classes, read_vocabulary
from pretrain.weights.foreign import (
    CTCHead,
    Exported,
    Foreign,
    Source,
    leave_out,
    load_safetensors,
    make_encoder,
    normalization_note,
    read_json,
)
from pretrain.weights.naming import CTC_HEADS, HEAD_NAMES, Objective, canonical, head_in
from pretrain.weights.pickles import load_pickle
from pretrain.weights.recognizer import read_classes, read_training, take_rows
from pretrain.weights.recognizer_writing import write_head

HEADS_FILE = "pretraining_heads.safetensors"


# Our config's keys as transformers calls them, with the default that a missing key stands for.
HUGGINGFACE_KEYS: dict[str, tuple[str, Any]] = {
    "dim": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "ffn_dim": ("intermediate_size", 3072),
    "norm_first": ("do_stable_layer_norm", False),
    "conv_norm": ("feat_extract_norm", "group"),
    "conv_bias": ("conv_bias", False),
    "pos_kernel": ("num_conv_pos_embeddings", 128),
    "pos_groups": ("num_conv_pos_embedding_groups", 16),
    "input_dropout": ("feat_proj_dropout", 0.0),
    "dropout": ("hidden_dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.1),
    "layer_drop": ("layerdrop", 0.1),
}
CONTRASTIVE_KEYS: dict[str, tuple[str, Any]] = {
    "num_distractors": ("num_negatives", 100),
    "num_groups": ("num_codevector_groups", 2),
    "num_entries": ("num_codevectors_per_group", 320),
    "code_dim": ("codevector_dim", 256),
    "final_dim": ("proj_codevector_dim", 256),
    "temperature": ("contrastive_logits_temperature", 0.1),
    "diversity_weight": ("diversity_loss_weight", 0.1),
    "feature_dropout": ("feat_quantizer_dropout", 0.0),
}
HUBERT_ONLY = {"conv_pos_batch_norm", "feat_proj_layer_norm"}
WAV2VEC2_ONLY = {"add_adapter", "adapter_attn_dim"}
# Keys whose other values make another architecture: (key, the value we compute, what another one is).
HUGGINGFACE_FIXED = (
    ("hidden_act", "gelu", "another activation"),
    ("feat_extract_activation", "gelu", "another activation"),
    ("layer_norm_eps", 1e-5, "another epsilon of its layer norms"),
    ("conv_kernel", list(CONV_KERNELS), "other convolution kernels"),
    ("conv_stride", list(CONV_STRIDES), "other convolution strides"),
    ("conv_pos_batch_norm", False, "batch norm in the positional convolution"),
    ("feat_proj_layer_norm", True, "no layer norm on its features"),
    ("add_adapter", False, "an adapter"),
    ("adapter_attn_dim", None, "attention adapters"),
)


def claims(source: Source) -> bool:
    """Whether a source is a folder. Raises ValueError for a file of transformers' weights."""
    if source.path.is_dir():
        return True
    theirs = "wav2vec2.encoder.layers.", "hubert.encoder.layers.", "feature_projection."
    if any(str(name).startswith(theirs) for name in source.state):
        raise ValueError(
            f"{source.path}: weights of transformers; give the folder that holds them and config.json"
        )
    return False


def read(source: Source) -> Foreign:
    """The model of a folder."""
    return read_huggingface(source.path, source.options, source.allow_pickle, source.vocabulary)


def write(out: Path, model: Exported) -> dict[str, Any]:
    """Writes a folder; returns the objective."""
    if model.objective == "hubert":
        model.notes.append(
            f"the heads are in {HEADS_FILE}, which `wordless import` reads: transformers' HubertModel has no "
            "place for them"
        )
    family: Objective = model.named or "wav2vec2"
    tensors = model.tensors("huggingface")
    with atomic_folder(out) as temporary:
        write_huggingface(temporary, tensors, model.encoder, family, model.head, model.recognizer)
    return {"objective": family}


def read_huggingface(
    folder: Path, options: dict[str, Any], allow_pickle: bool, vocabulary: Path | None = None
) -> Foreign:
    """Read a folder with config.json. `options` win over what it says; `allow_pickle`: its weights may be
    pickles.

    `vocabulary`: what the classes of its CTC head are, where the folder has no tokenizer.
    """
    if (folder / "meta.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: is an artefact of wordless; `import` reads models of other libraries")
    config = read_json(folder / "config.json", "a transformers model has one")
    kind = config.get("model_type")
    if kind not in ("wav2vec2", "hubert"):
        raise ValueError(
            f"{folder}/config.json: model_type {kind!r} is not supported; 'wav2vec2' and 'hubert' are"
        )
    for key, value, description in HUGGINGFACE_FIXED:
        if config.get(key, value) != value:
            raise ValueError(
                f"{folder}/config.json: {key} = {config[key]!r}: a model with {description} is not supported"
            )
    state, sha256 = _huggingface_tensors(folder, allow_pickle)
    notes: list[str] = []
    widths = set(config.get("conv_dim", [512]))
    if len(widths) != 1:
        raise ValueError(
            f"{folder}/config.json: conv_dim = {config['conv_dim']}: convolutions of different widths are "
            "not supported"
        )
    keys = {ours: config.get(theirs, default) for ours, (theirs, default) in HUGGINGFACE_KEYS.items()}
    if (processor := _feature_extractor(folder)) is not None:
        keys["normalize_waveform"] = bool(processor.get("do_normalize", True))
    else:
        normalize = keys["normalize_waveform"] = keys["conv_norm"] == "layer"
        if options["normalize_waveform"] is None:
            notes.append(normalization_note("there is no preprocessor_config.json", normalize))
    tensors = canonical(state, f"{kind}.", str(folder))
    recognizer = _recognizer(folder, config, tensors, vocabulary, notes)
    if (folder / HEADS_FILE).is_file():
        tensors |= load_safetensors(folder / HEADS_FILE)
    encoder = make_encoder({**keys, "conv_dim": widths.pop()}, options, f"{folder}/config.json")
    head: HubertConfig | Wav2Vec2Config | None = None
    if (objective := head_in(tensors, "huggingface")) == "wav2vec2":
        # Masks are left at the paper's: a published config.json has those of fine-tuning.
        tree = {ours: config.get(theirs, default) for ours, (theirs, default) in CONTRASTIVE_KEYS.items()}
        head = parse_config(Wav2Vec2Config, tree, f"{folder}/config.json")
    elif objective == "hubert":
        head = HubertConfig(final_dim=tensors["label_embeddings"].shape[1])
    return Foreign("huggingface", tensors, encoder, kind, head, sha256, notes, recognizer)


def _recognizer(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    vocabulary: Path | None,
    notes: list[str],
) -> CTCHead | None:
    """The CTC head among the tensors, None if there is none; one whose classes are unknown is left out."""
    if (weight := tensors.get(f"{CTC_HEADS['huggingface']}.weight")) is None:
        return None
    if vocabulary:
        classes: Classes | None = read_vocabulary(vocabulary, len(weight), notes)
    else:
        classes = read_classes(folder, config, len(weight), notes)
    if classes is None:
        leave_out(tensors, "lm_head.", "a CTC head", notes)
        notes.append(
            "no vocab.json says what the classes of the CTC head are; --vocabulary FILE does, and keeps it"
        )
        return None
    take_rows(tensors, CTC_HEADS["huggingface"], classes.rows, str(folder))
    return CTCHead(classes.vocabulary, classes.text, read_training(config, f"{folder}/config.json"))


def _feature_extractor(folder: Path) -> dict[str, Any] | None:
    """The settings of how waveforms are prepared; transformers 5 writes them into the processor's file. None
    where there are none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            held = read_json(folder / name)
            settings: Any = held if name.startswith("pre") else held.get("feature_extractor")
            if isinstance(settings, dict):
                return settings
    return None


def _huggingface_tensors(folder: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], str]:
    """The tensors of model.safetensors or pytorch_model.bin, or of the shards that an index lists, and a
    SHA-256 of one."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        files = [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            parts = read_json(index).get("weight_map")
            if (
                not isinstance(parts, dict)
                or not parts
                or not all(isinstance(part, str) for part in parts.values())
            ):
                raise ValueError(
                    f"{index}: no `weight_map` from the tensors' names to the files that hold them; download "
                    "it again"
                )
            files = [folder / part for part in sorted(set(parts.values()))]
        if not all(path.is_file() for path in files):
            if len(files) > 1:
                absent = ", ".join(path.name for path in files if not path.is_file())
                raise ValueError(f"{index}: names shards that are not there: {absent}")
            continue
        tensors: dict[str, Tensor] = {}
        for path in files:
            tensors |= (
                load_safetensors(path) if path.suffix == ".safetensors" else load_pickle(path, allow_pickle)
            )
        return tensors, sha256_file(files[0])
    raise ValueError(f"{folder}: no model.safetensors and no pytorch_model.bin beside config.json")


def write_huggingface(
    folder: Path,
    tensors: Mapping[str, Tensor],
    encoder: EncoderConfig,
    family: Objective,
    head: HubertConfig | Wav2Vec2Config | None,
    recognizer: CTCHead | None = None,
) -> None:
    """Writes canonical `tensors` as a model that `from_pretrained` takes, into the existing `folder`.

    A recogniser's masks are those of its training. Others' are left to transformers' defaults, those of its
    released models: it takes `mask_time_prob` for SpecAugment's when a model is fine-tuned, where
    pretraining's 0.65 would be far too much.
    """
    contrastive = head if isinstance(head, Wav2Vec2Config) else None
    name = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert"}[family]
    name += "ForCTC" if recognizer else "ForPreTraining" if contrastive else "Model"
    config: dict[str, Any] = {"model_type": family, "architectures": [name], "torch_dtype": "float32"}
    config |= {theirs: getattr(encoder, ours) for ours, (theirs, _) in HUGGINGFACE_KEYS.items()}
    unknown = WAV2VEC2_ONLY if family == "hubert" else HUBERT_ONLY
    config |= {key: value for key, value, _ in HUGGINGFACE_FIXED if key not in unknown}
    config["conv_dim"] = [encoder.conv_dim] * len(CONV_KERNELS)
    config["num_feat_extract_layers"] = len(CONV_KERNELS)
    if contrastive:
        config |= {theirs: getattr(contrastive, ours) for ours, (theirs, _) in CONTRASTIVE_KEYS.items()}
    processor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": 16000,
        "padding_side": "right",
        "padding_value": 0.0,
        "do_normalize": encoder.normalize_waveform,
        "return_attention_mask": encoder.conv_norm == "layer",
    }
    if recognizer:
        tensors = dict(tensors)
        config |= write_head(folder, recognizer, tensors)
        processor["processor_class"] = "Wav2Vec2Processor"
    heads = {*HEAD_NAMES["huggingface", "hubert"].values()}
    apart = {key: tensor for key, tensor in tensors.items() if _module(key) in heads}
    prefix = f"{family}." if contrastive or recognizer else ""
    inside = {*HEAD_NAMES["huggingface", "wav2vec2"].values(), CTC_HEADS["huggingface"]}
    written = {}
    for key, tensor in tensors.items():
        if key not in apart:
            full = key if _module(key) in inside else prefix + key
            full = full.replace(".weight_g", ".parametrizations.weight.original0")
            written[full.replace(".weight_v", ".parametrizations.weight.original1")] = tensor
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    if apart:
        save_file(apart, folder / HEADS_FILE)


def _module(key: str) -> str:
    """The module of a weight or bias."""
    return key.removesuffix(".weight").removesuffix(".bias")
