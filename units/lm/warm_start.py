"""A decoder that begins with the weights of another language model.

TWIST (Hassid et al., 2023, "Textually pretrained speech language models", section 3): of a text model the
transformer is kept and the embeddings are replaced by random ones of the units, which then learn faster than
from random weights alone. Read are local Hugging Face folders of Llama, Mistral or Qwen2 (config.json and
safetensors; nothing in them runs), and our own runs.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.config import parse_config
from pretrain.store.hashes import sha256_file
from pretrain.training.checkpoint import load_weights
from pretrain.weights.foreign import read_json
from units.corpus.patterns import Pattern
from units.corpus.vocabulary import Vocabulary
from units.lm.language_model import KIND
from units.lm.model import Decoder, DecoderConfig

MODEL_TYPES = ("llama", "mistral", "qwen2")
OVERRIDABLE = ("dropout", "context", "sliding_window")  # what weights do not depend on
REPLACED = ("embed_tokens.weight", "lm_head.weight")
# Keys whose other values make another architecture: (key, the value we compute).
FIXED = (("hidden_act", "silu"), ("mlp_bias", False))
SIZES = {
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
    "context": "max_position_embeddings",
}


def initial_decoder(
    folder: str | Path, vocabularies: int | Sequence[int], overrides: DecoderConfig | None = None
) -> Decoder:
    """A decoder over `vocabularies` with the sizes and the weights of `folder`; dropout, context and the
    sliding window as `overrides` sets them.

    What is random is drawn from torch's global generator. Errors: as `config_of` and `warm_start`.
    """
    given = (
        {}
        if overrides is None
        else {key: getattr(overrides, key) for key in OVERRIDABLE if key in overrides.model_fields_set}
    )
    decoder = Decoder(config_of(folder).model_copy(update=given), vocabularies)
    warm_start(folder, decoder)
    return decoder


def fingerprint_of(folder: str | Path) -> str:
    """Of the weights in `folder`: a run's, or the first 16 hex digits of a SHA-256 over those of config.json
    and the weight files."""
    folder = Path(folder)
    if not is_hugging_face(folder):
        return _run_weights(folder)[2]
    paths = [folder / "config.json", *_SafetensorsFolder(folder).paths]
    return hashlib.sha256(
        json.dumps([[path.name, sha256_file(path)] for path in paths]).encode()
    ).hexdigest()[:16]


def config_of(folder: str | Path) -> DecoderConfig:
    """Sizes of the language model in a Hugging Face folder or a run of ours; a Hugging Face model has no
    dropout.

    Errors: ValueError naming file and key: no such model, another architecture, a rotation or a window we do
    not compute, quantised weights.
    """
    folder = Path(folder)
    if not is_hugging_face(folder):
        _, meta, _ = _run_weights(folder)
        return DecoderConfig.model_validate(meta["decoder"], strict=False)
    path = folder / "config.json"
    config = read_json(path)
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"{path}: model_type: {kind!r} is not supported; {', '.join(MODEL_TYPES)} are")
    if config.get("quantization_config"):
        raise ValueError(
            f"{path}: quantization_config: quantised weights cannot be trained further; give the model they "
            "were made from"
        )
    for key, value in FIXED:
        if config.get(key, value) != value:
            raise ValueError(f"{path}: {key}: {config[key]!r} is not supported; {value!r} is")
    if kind == "llama" and config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config.get("num_attention_heads")
    if missing := [key for key in SIZES.values() if not isinstance(config.get(key), int)]:
        raise ValueError(f"{path}: {missing[0]}: a number is needed there, not {config.get(missing[0])!r}")
    tree: dict[str, Any] = {ours: config[theirs] for ours, theirs in SIZES.items()}
    attention_dim = config["num_attention_heads"] * (
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )
    tree |= {
        "attention_dim": attention_dim if attention_dim != config["hidden_size"] else None,
        "dropout": 0.0,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tied_embeddings": config.get("tie_word_embeddings", False),
        "qkv_bias": kind == "qwen2" or bool(config.get("attention_bias", False)),
        "sliding_window": _window(config, path),
        **_rope(config, path),
    }
    return parse_config(DecoderConfig, tree, str(path))


def warm_start(folder: str | Path, decoder: Decoder) -> None:
    """Overwrite the decoder's weights with those of `folder`.

    Embeddings and head become normal with the standard deviation of the old ones, which a head that is tied
    has from the embeddings; of a run of ours over as many symbols of each stream they are kept, too. (That
    the symbols mean the same, a caller compares.)

    Errors: ValueError naming the file and the tensor that is missing, too many or of another shape.
    """
    folder = Path(folder)
    tensors: Mapping[str, Tensor]
    keep = False
    if is_hugging_face(folder):
        tensors = _SafetensorsFolder(folder)
    else:
        tensors, meta, _ = _run_weights(folder)
        keep = _vocabularies(meta) == decoder.vocabularies
    wanted = decoder.state_dict()
    body = [name for name in wanted if keep or name not in REPLACED]
    if missing := [name for name in [*body, "embed_tokens.weight"] if name not in tensors]:
        raise ValueError(
            f"{folder}: holds no {missing[0]}, which its config promises ({len(missing)} tensors are missing)"
        )
    unknown = [
        name
        for name in tensors
        if name not in wanted and name not in REPLACED and not name.endswith("inv_freq")
    ]
    # transformers' Llama with biases has one on the attention's output; ours is exported with zeros there
    unknown = [name for name in unknown if not name.endswith("o_proj.bias") or tensors[name].any()]
    if unknown:
        raise ValueError(
            f"{folder}: {unknown[0]}: the decoder has no such tensor ({len(unknown)} are unknown)"
        )
    with torch.no_grad():
        for name, weight in wanted.items():
            if name in body:
                found = tensors[name]
                if found.shape != weight.shape:
                    raise ValueError(
                        f"{folder}: {name}: has shape {tuple(found.shape)}; by its config it should be "
                        f"{tuple(weight.shape)}"
                    )
                if not found.is_floating_point():
                    raise ValueError(
                        f"{folder}: {name}: is {found.dtype}; quantised weights cannot be trained further"
                    )
                weight.copy_(found)
            else:
                source = tensors[name if name in tensors else "embed_tokens.weight"]
                weight.normal_(std=float(source.float().std()))


class _SafetensorsFolder(Mapping[str, Tensor]):
    """Tensors of model.safetensors, or of the shards that an index lists, by our names; each is read when
    asked for."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            parts = read_json(index).get("weight_map")
            if (
                not isinstance(parts, dict)
                or not parts
                or not all(isinstance(part, str) for part in parts.values())
            ):
                raise ValueError(
                    f"{index}: weight_map: should name a file for each tensor; download it again"
                )
            self.paths = [folder / part for part in sorted(set(parts.values()))]
        else:
            self.paths = [folder / "model.safetensors"]
        self._places: dict[str, tuple[Path, str]] = {}
        for path in self.paths:
            if not path.is_file():
                why = "the index names it" if index.is_file() else "the weights are expected there"
                if any(folder.glob("*.bin")):
                    why += " (a pickle beside it is not read: save the model with safe_serialization)"
                raise ValueError(f"{path}: no such file; {why}")
            try:
                with safe_open(path, "pt") as file:
                    self._places |= {name.removeprefix("model."): (path, name) for name in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(
                    f"{path}: not a whole safetensors file ({error}); was it downloaded whole?"
                ) from None

    def __getitem__(self, name: str) -> Tensor:
        path, theirs = self._places[name]
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(theirs)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Any:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def is_hugging_face(folder: str | Path) -> bool:
    """Whether the folder is a Hugging Face model's; otherwise it is taken for a run's. ValueError if there is
    none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a Hugging Face model's or a training run's")
    return (folder / "config.json").is_file()


def _run_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Of a run of ours: weights by the decoder's names, meta data, fingerprint."""
    try:
        weights, meta, fingerprint = load_weights(folder)
    except ValueError as error:
        raise ValueError(
            f"{folder}: holds neither a Hugging Face model (config.json) nor a training run: {error}"
        ) from None
    if meta["kind"] != KIND or "decoder" not in meta:
        raise ValueError(
            f"{folder}: is a run of kind {meta['kind']!r}; a {KIND!r} (verb train-lm) of this version is "
            "needed here"
        )
    return {name.removeprefix("decoder."): weight for name, weight in weights.items()}, meta, fingerprint


def _vocabularies(meta: dict[str, Any]) -> tuple[int, ...]:
    return Pattern(meta["pattern"], Vocabulary.read(meta["vocabulary"]).sizes).vocabularies


def _window(config: dict[str, Any], path: Path) -> int | None:
    """The sliding window of all layers. (A Mistral whose config has no such key has 4096, transformers'
    default.)"""
    if config["model_type"] == "llama":
        return None
    if config["model_type"] == "mistral":
        window: int | None = config.get("sliding_window", 4096)
        return window
    if not config.get("use_sliding_window", False):
        return None
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types") or [
        "sliding_attention" if number >= config.get("max_window_layers", 28) else "full_attention"
        for number in range(layers)
    ]
    if len(set(kinds)) > 1:
        raise ValueError(
            f"{path}: use_sliding_window: a window in some layers and none in others is not supported"
        )
    return config.get("sliding_window", 4096) if kinds[0] == "sliding_attention" else None


def _rope(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Our keys of the rotation, which transformers 5 writes as `rope_parameters` and earlier ones as
    `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given = config.get(key) or {}
    kind = given.get("rope_type", given.get("type", "default"))
    tree = {"rope_theta": given.get("rope_theta", config.get("rope_theta", 10_000.0)), "rope_scaling": None}
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1:
        raise ValueError(f"{path}: partial_rotary_factor: a rotation of a part of each head is not supported")
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        given = {"original_max_position_embeddings": config["max_position_embeddings"], **given}
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"{path}: {key}.{missing[0]}: is missing; rotations of type llama3 have it")
        tree["rope_scaling"] = {name: given[name] for name in names}
    elif kind != "default":
        raise ValueError(
            f"{path}: {key}: rotations of type {kind!r} are not supported; 'default' and 'llama3' are"
        )
    return tree
