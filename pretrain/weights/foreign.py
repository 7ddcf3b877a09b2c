"""What the readers of other libraries' models share: what a reader returns, safe loading, and inference from
shapes.

Pickles are read where `--allow-pickle` says so, and with `weights_only`: nothing in them runs. fairseq's own
files hold two kinds of objects beside tensors and plain values, a Namespace and a Dictionary; both become
holders of values. Everything else is refused, with a way to make a plain file where the library is that wrote
it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pretrain.config import parse_config
from pretrain.ctc.task import CTCConfig
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.model.config import EncoderConfig
from pretrain.objectives.hubert import HubertConfig
from pretrain.objectives.wav2vec2 import Wav2Vec2Config
from pretrain.store.plain_text import read_text
from pretrain.weights.naming import ENCODER_NAMES, LAYER_NAMES, Format, Objective, parameters, to_theirs
from pretrain.weights.pickles import load_pickle

NUM_HEADS = {768: 12, 1024: 16, 1280: 16, 1920: 16}  # of the published models, by width


class CTCHead(NamedTuple):
    """What a recogniser is beside its encoder and its weights."""

    vocabulary: Vocabulary
    text: TextConfig
    ctc: CTCConfig = CTCConfig()


@dataclass(frozen=True)
class Foreign:
    """A model of another library: its tensors under the names of pretrain/weights/naming.py, and what is
    known about it."""

    # the latter: our own tensors, which a card holds or a run that is exported
    form: Format | Literal["wordless"]
    tensors: dict[str, Tensor]
    encoder: EncoderConfig
    family: Objective | None  # None: a bare encoder of a file that does not say
    head: HubertConfig | Wav2Vec2Config | None
    sha256: str  # of the file with the weights; of the first shard's of several
    notes: list[str] = field(default_factory=list)
    # of a model with a CTC head; its tensors lie in the order of our classes
    recognizer: CTCHead | None = None
    source: str = ""  # where it was read, for messages; where empty, who reads it knows
    codebook: str | None = None  # of the units that a recogniser of ours reads


class Source:
    """What `import` was given: a path, options that win over it, and the content of a file, which is loaded
    once."""

    def __init__(
        self,
        path: Path,
        options: dict[str, Any],
        vocabulary: Path | None = None,
        num_classes: int | None = None,
        allow_pickle: bool = False,
    ):
        self.path, self.options, self.vocabulary = path, options, vocabulary
        self.num_classes, self.allow_pickle = num_classes, allow_pickle

    @cached_property
    def state(self) -> dict[str, Any]:
        """The content of a file of weights."""
        if self.path.suffix == ".safetensors":
            return dict(load_safetensors(self.path))
        return dict(load_pickle(self.path, self.allow_pickle))

    @property
    def names(self) -> list[str]:
        """The names of the tensors, or of the parts, of a file."""
        inside = self.state["model"] if isinstance(self.state.get("model"), Mapping) else self.state
        return [str(name) for name in inside]


@dataclass
class Exported:
    """What `export` writes: the weights of a run and what is known about them. `named`: its objective, None
    if unknown."""

    run: str
    weights: dict[str, Tensor]
    encoder: EncoderConfig
    named: Objective | None
    fingerprint: str
    codebook: str | None
    head: HubertConfig | Wav2Vec2Config | None = None
    recognizer: CTCHead | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def objective(self) -> Objective | None:
        """The objective of the head."""
        return None if self.head is None else "hubert" if isinstance(self.head, HubertConfig) else "wav2vec2"

    def tensors(self, form: Format) -> dict[str, Tensor]:
        """The tensors under the canonical names of a format."""
        groups = self.head.num_groups if isinstance(self.head, Wav2Vec2Config) else 1
        ctc = self.recognizer is not None
        return to_theirs(self.weights, parameters(form, self.encoder, self.objective, groups, ctc=ctc))


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError that names it where it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); was it downloaded whole?"
        ) from None


def infer_encoder(
    source: Path, tensors: Mapping[str, Tensor], form: Format, options: dict[str, Any], notes: list[str]
) -> EncoderConfig:
    """The architecture that the shapes tell. Norms go together as in every published model: group and post,
    layer and pre."""
    names = ENCODER_NAMES[form]
    first, ffn = (
        f"{names['conv'].format(0)}.weight",
        f"{names['layer'].format(0)}.{LAYER_NAMES[form]['ffn_in']}.weight",
    )
    position = f"{names['positional']}.weight_v"
    axes = {first: 3, ffn: 2, position: 3}
    if absent := [name for name in axes if name not in tensors]:
        raise ValueError(
            f"{source}: not a wav2vec 2.0 or HuBERT state dict of {form}: no {absent[0]!r}; it begins with "
            f"{', '.join(map(repr, list(tensors)[:4]))}"
        )
    if strange := next(
        (name for name, count in axes.items() if tensors[name].ndim != count or 0 in tensors[name].shape),
        None,
    ):
        raise ValueError(
            f"{source}: {strange!r} is {tuple(tensors[strange].shape)}; {axes[strange]} axes, none empty, "
            "are expected"
        )
    dim, group, kernel = tensors[position].shape
    layer_norm = f"{names['layer_norm'].format(1)}.weight" in tensors
    numbers = [
        re.fullmatch(names["layer"].replace(".", r"\.").replace("{}", r"(\d+)") + r"\..*", name)
        for name in tensors
    ]
    if dim not in NUM_HEADS and options["num_heads"] is None:
        raise ValueError(
            f"{source}: the number of attention heads does not show in the weights; say --num-heads N (width "
            f"{dim})"
        )
    keys = {
        "dim": dim,
        "num_layers": 1 + max(int(match[1]) for match in numbers if match),
        "num_heads": NUM_HEADS.get(dim),
        "ffn_dim": len(tensors[ffn]),
        "norm_first": layer_norm,
        "conv_norm": "layer" if layer_norm else "group",
        "conv_bias": f"{names['conv'].format(0)}.bias" in tensors,
        "conv_dim": len(tensors[first]),
        "pos_kernel": kernel,
        "pos_groups": dim // group,
        "normalize_waveform": layer_norm,
    }
    encoder = make_encoder(keys, options, str(source))
    notes.append(
        f"no config in the file: inferred {encoder.num_layers} layers of width {dim}, {encoder.num_heads} "
        f"heads, {'pre' if layer_norm else 'post'}-norm, dropout as published"
    )
    if options["normalize_waveform"] is None:
        notes.append(normalization_note("the file does not say", layer_norm))
    return encoder


def make_encoder(keys: dict[str, Any], options: dict[str, Any], source: str) -> EncoderConfig:
    """The config of our `keys`, over which `options` that are not None win."""
    if keys["conv_bias"] and keys["conv_norm"] == "group":
        raise ValueError(f"{source}: conv_bias with a group norm is not supported; no published model has it")
    widths = {768: "base", 1024: "large", 1280: "xlarge"}
    given = {name: value for name, value in options.items() if value is not None}
    return parse_config(
        EncoderConfig, {"architecture": widths.get(keys["dim"], "base"), **keys, **given}, source
    )


def normalization_note(why: str, normalize: bool) -> str:
    """What to tell where nothing says whether waveforms are normalised."""
    flag, is_what = ("--no-normalize-waveform", "are") if normalize else ("--normalize-waveform", "are not")
    return (
        f"{why}: waveforms {is_what} normalised, as in published models of this kind; {flag} says otherwise"
    )


def leave_out(tensors: dict[str, Tensor], prefix: str, what: str, notes: list[str]) -> None:
    """Remove what begins with `prefix`, and say so."""
    if names := [name for name in tensors if name.startswith(prefix)]:
        for name in names:
            del tensors[name]
        notes.append(f"{what} ({prefix}*) is left out: the encoder alone is imported")


def read_json(path: Path, reason: str = "it is named by another file") -> dict[str, Any]:
    """A JSON object; where the file is missing, `reason` says why it is needed."""
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {reason}") from None
    except (ValueError, RecursionError) as error:  # not JSON, or no text
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is needed")
    return value
