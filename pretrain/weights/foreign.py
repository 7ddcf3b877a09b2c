"""What the readers of other libraries' models share: what a reader returns, safe loading, and inference from shapes.

Pickles are read where `--allow-pickle` says so, and with `weights_only`: nothing in them runs. fairseq's own files hold two kinds of
objects beside tensors and plain values, a Namespace and a Dictionary; both become holders of values. Everything else is refused,
with a way to make a plain file where the library is that wrote it.
"""

import argparse
import json
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import torch
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
from pretrain.weights.naming import ENCODER_NAMES, LAYER_NAMES, Format, Objective

LARGEST_TUPLE = 10_000  # values in all; a tensor's take a dozen, a random generator's state 627
NUM_HEADS = {768: 12, 1024: 16, 1280: 16, 1920: 16}  # of the published models, by width


class CTCHead(NamedTuple):
    """What a recogniser is beside its encoder and its weights."""

    vocabulary: Vocabulary
    text: TextConfig
    ctc: CTCConfig = CTCConfig()


@dataclass(frozen=True)
class Foreign:
    """A model of another library: its tensors under the names of pretrain/weights/naming.py, and what is known about it."""

    form: (
        Format | Literal["wordless"]
    )  # the latter: our own tensors, which a card holds or a run that is exported
    tensors: dict[str, Tensor]
    encoder: EncoderConfig
    family: Objective | None  # None: a bare encoder of a file that does not say
    head: HubertConfig | Wav2Vec2Config | None
    sha256: str  # of the file with the weights; of the first shard's of several
    notes: list[str] = field(default_factory=list)
    recognizer: CTCHead | None = (
        None  # of a model with a CTC head; its tensors lie in the order of our classes
    )
    source: str = ""  # where it was read, for messages; where empty, who reads it knows
    codebook: str | None = None  # of the units that a recogniser of ours reads


class FairseqDictionary:
    """Stands in for fairseq's Dictionary where a checkpoint holds one: its attributes, none of its code."""

    symbols: list[str]


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


def load_pickle(path: Path, allowed: bool) -> dict[str, Any]:
    """`load_torch` of a checkpoint or a state dict: a dict by names, or a ValueError."""
    state = load_torch(path, allowed)
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path}: holds a {type(state).__name__}; a checkpoint or a state dict is needed")
    return dict(state)


def load_torch(path: Path, allowed: bool, remedy: str | None = None) -> Any:
    """What `path` holds, by torch's `weights_only` loading; nothing it holds is run.

    A ValueError that names the file: no pickle of torch's, not `allowed`, damaged, or holding anything but plain values, with
    the `remedy` (None: that of a checkpoint).
    """
    with open(path, "rb") as file:
        start = file.read(16)
    if not start:
        raise ValueError(f"{path}: is empty (0 bytes); was it downloaded whole?")
    if not start.startswith((b"PK", b"\x80")):  # a zip, and a pickle as torch wrote them before 1.6
        raise ValueError(
            f"{path}: not a file that torch can load; it begins with {start!r}. Was it downloaded whole?"
        )
    if not allowed:
        hole = f" ({told})" if (told := weights_only_hole()) else ""
        raise ValueError(
            f"{path}: is a pickle, a kind of file that can run code when it is read. If you trust its makers, say --allow-pickle: "
            f"it is then read by torch's weights_only, which refuses what would run any{hole}. Safetensors need no flag"
        )
    return _load(path, remedy)


def weights_only_hole() -> str | None:
    """What is wrong with `weights_only` in the torch that runs, or None."""
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10):
        return None
    return f"torch {torch.__version__}: weights_only had a hole before 2.10 (CVE-2026-24747); take a newer torch, or safetensors"


def _load(path: Path, remedy: str | None) -> Any:
    allowed: list[Any] = [argparse.Namespace, (FairseqDictionary, "fairseq.data.dictionary.Dictionary")]
    _require_stored(path)
    _require_small_tuples(path)
    try:
        with torch.serialization.safe_globals(allowed):
            # Before 2.10 torch believes a pickle that claims more numbers than are stored, and reads whatever lies behind them in
            # memory. Mapped, a storage ends with the file, and what is left to refuse is a claim that no member bears out.
            mapped = weights_only_hole() is not None and zipfile.is_zipfile(path)
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises what the pickle makes it raise
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None and "weights" not in str(error).lower():
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{path}: not a file that torch can load ({reason})") from None
        what = f"an object of {named[1]}" if named else "more than tensors and plain values"
        raise ValueError(
            f"{path}: holds {what}, and reading such a file can run code, so it is refused.\n{remedy or _remedy(path)}"
        ) from None
    _require_dense(value, path, _member_sizes(path) if mapped else None)
    return value


def _member_sizes(path: Path) -> set[int]:
    with zipfile.ZipFile(path) as archive:
        return {member.file_size for member in archive.infolist()}


def _require_stored(path: Path) -> None:
    """torch stores its zips without compression; what unpacks to more than the file has bytes fills the memory."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise ValueError(f"{path}: not a file that torch can load ({error})") from None
    packed = next((member for member in members if member.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise ValueError(
            f"{path}: {packed.filename} in it is compressed, as torch writes none; it is not read"
        )
    if (total := sum(member.file_size for member in members)) > (size := path.stat().st_size):
        raise ValueError(f"{path}: claims {total} bytes of contents and has {size}; it is not read")


def _require_small_tuples(path: Path) -> None:
    """Hashing a tuple, a dict's key say, visits all that it holds, by recursion in C: torch's reader would overflow the stack on a deep
    one, and never end on one that holds another many times over."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.lower().endswith("data.pkl"):
                        with archive.open(name) as member:
                            _weigh_tuples(member)
        else:
            with open(path, "rb") as file:
                all(
                    _weigh_tuples(file) for _ in range(5)
                )  # before torch 1.6: magic, version, system, contents, names of storages
    except (ValueError, LookupError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{path}: not a file that torch can load ({error or type(error).__name__})"
        ) from None


def _weigh_tuples(file: IO[bytes]) -> bool:
    """Follow a pickle with the number of its values in place of each tuple; whether to the end, or to an opcode that torch refuses."""
    stack: list[int] = []
    outer: list[list[int]] = []  # below each mark
    memo: dict[Any, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO":
                pass
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE":
                values, stack = stack, outer.pop()
                stack.append(1 + sum(values))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [1 + sum(stack[-count:])]
            case "REDUCE" | "NEWOBJ":
                stack[-2:] = stack[-1:]  # what is made of a tuple may be one: torch.Size
            case "BINPERSID":
                stack[-1] = 1
            case "APPEND" | "BUILD":
                stack.pop()
            case "SETITEM":
                del stack[-2:]
            case "APPENDS" | "SETITEMS":
                stack = outer.pop()
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case _ if not opcode.stack_before and opcode.stack_after:
                stack.append(1)
            case name:
                return name == "STOP"
        if stack and stack[-1] > LARGEST_TUPLE:
            raise ValueError(
                f"a tuple of more than {LARGEST_TUPLE:,} values, counted with those of the tuples in it"
            )
    return False


def _require_dense(value: Any, path: Path, sizes: set[int] | None) -> None:
    """Tensors that are larger than the numbers stored for them (views, sparse ones) fill the memory when they are copied.

    `sizes`, where torch does not look itself: those that storages can have.
    """
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                kind = (
                    "quantized"
                    if value.is_quantized
                    else str(value.layout if value.device.type == "cpu" else value.device)
                )
                raise ValueError(
                    f"{path}: holds a tensor that is {kind.removeprefix('torch.')}; plain ones are read"
                )
            if sizes is not None and (claimed := value.untyped_storage().nbytes()) not in sizes:
                raise ValueError(
                    f"{path}: not a file that torch can load (no member of it has the {claimed} bytes of a storage)"
                )
            if (needed := value.numel() * value.element_size()) > (
                stored := value.untyped_storage().nbytes()
            ):
                raise ValueError(
                    f"{path}: holds a tensor {tuple(value.shape)}, {needed} bytes, over {stored} stored bytes; copy it"
                )
        elif isinstance(value, Mapping | list | tuple | argparse.Namespace) and id(value) not in seen:
            seen.add(id(value))  # it may hold itself
            inside = vars(value) if isinstance(value, argparse.Namespace) else value
            waiting.extend(inside.values() if isinstance(inside, Mapping) else inside)


def _remedy(path: Path) -> str:
    if path.suffix == ".bin":
        return f"""If you trust its makers, write its weights beside config.json as safetensors, which are read instead:

import torch
from pathlib import Path
from safetensors.torch import save_file
state = {{}}
for path in Path({str(path.parent)!r}).glob("pytorch_model*.bin"):
    state |= torch.load(path, map_location="cpu", weights_only=False)  # runs what the file says
state = {{name: tensor.clone() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}}
save_file(state, {str(path.with_name("model.safetensors"))!r})"""
    plain = path.with_name(f"{path.stem}.plain.pt")
    return f"""If you trust its makers, write its weights and settings to a plain file where the library that wrote it is installed:

import json, torch
state = torch.load({str(path)!r}, map_location="cpu", weights_only=False)  # runs what the file says
state = state.state_dict() if hasattr(state, "state_dict") else state
if "model" in state:
    cfg = state.get("cfg") or dict.fromkeys(("model", "task", "criterion"), vars(state["args"]) if state.get("args") else {{}})
    if not isinstance(cfg, dict):
        from omegaconf import OmegaConf
        cfg = OmegaConf.to_container(cfg, enum_to_str=True)
    words = [value for key, value in (state.get("task_state") or {{}}).items() if "dictionar" in key]
    words = [word.symbols for value in words
             for word in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]) if word]
    cfg = json.loads(json.dumps(cfg, default=lambda value: getattr(value, "__dict__", str(value))))
    state = {{"cfg": cfg, "model": dict(state["model"]), "symbols": words}}
torch.save(dict(state), {str(plain)!r})

then: wordless import {plain} OUT --allow-pickle"""


def infer_encoder(
    source: Path, tensors: Mapping[str, Tensor], form: Format, options: dict[str, Any], notes: list[str]
) -> EncoderConfig:
    """The architecture that the shapes tell. Norms go together as in every published model: group and post, layer and pre."""
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
            f"{source}: {strange!r} is {tuple(tensors[strange].shape)}; {axes[strange]} axes, none empty, are expected"
        )
    dim, group, kernel = tensors[position].shape
    layer_norm = f"{names['layer_norm'].format(1)}.weight" in tensors
    numbers = [
        re.fullmatch(names["layer"].replace(".", r"\.").replace("{}", r"(\d+)") + r"\..*", name)
        for name in tensors
    ]
    if dim not in NUM_HEADS and options["num_heads"] is None:
        raise ValueError(
            f"{source}: the number of attention heads does not show in the weights; say --num-heads N (width {dim})"
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
        f"no config in the file: inferred {encoder.num_layers} layers of width {dim}, {encoder.num_heads} heads, "
        f"{'pre' if layer_norm else 'post'}-norm, dropout as published"
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
