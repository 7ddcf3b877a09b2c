"""Pickles of other libraries: read by torch's weights_only, after a look at what they ask for."""

import argparse
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

LARGEST_TUPLE = 10_000  # values in all; a tensor's take a dozen, a random generator's state 627


def load_pickle(path: Path, allowed: bool) -> dict[str, Any]:
    """`load_torch` of a checkpoint or a state dict: a dict by names, or a ValueError."""
    state = load_torch(path, allowed)
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path}: holds a {type(state).__name__}; a checkpoint or a state dict is needed")
    return dict(state)


def load_torch(path: Path, allowed: bool, remedy: str | None = None) -> Any:
    """What `path` holds, by torch's `weights_only` loading; nothing it holds is run.

    A ValueError that names the file: no pickle of torch's, not `allowed`, damaged, or holding anything but
    plain values, with the `remedy` (None: that of a checkpoint).
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
            f"{path}: is a pickle, a kind of file that can run code when it is read. If you trust its "
            "makers, say --allow-pickle: it is then read by torch's weights_only, which refuses what would "
            f"run any{hole}. Safetensors need no flag"
        )
    return _load(path, remedy)


def weights_only_hole() -> str | None:
    """What is wrong with `weights_only` in the torch that runs, or None."""
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10):
        return None
    return (
        f"torch {torch.__version__}: weights_only had a hole before 2.10 (CVE-2026-24747); take a newer "
        "torch, or safetensors"
    )


def _load(path: Path, remedy: str | None) -> Any:
    allowed: list[Any] = [argparse.Namespace, (FairseqDictionary, "fairseq.data.dictionary.Dictionary")]
    _require_stored(path)
    _require_small_tuples(path)
    try:
        with torch.serialization.safe_globals(allowed):
            # Before 2.10 torch believes a pickle that claims more numbers than are stored, and reads whatever
            # lies behind them in memory. Mapped, a storage ends with the file, and what is left to refuse is
            # a claim that no member bears out.
            mapped = weights_only_hole() is not None and zipfile.is_zipfile(path)
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises what the pickle makes it raise
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None and "weights" not in str(error).lower():
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{path}: not a file that torch can load ({reason})") from None
        what = f"an object of {named[1]}" if named else "more than tensors and plain values"
        raise ValueError(
            f"{path}: holds {what}, and reading such a file can run code, so it is "
            f"refused.\n{remedy or _remedy(path)}"
        ) from None
    _require_dense(value, path, _member_sizes(path) if mapped else None)
    return value


def _member_sizes(path: Path) -> set[int]:
    with zipfile.ZipFile(path) as archive:
        return {member.file_size for member in archive.infolist()}


def _require_stored(path: Path) -> None:
    """torch stores its zips without compression; what unpacks to more than the file has bytes fills the
    memory."""
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
    """Hashing a tuple, a dict's key say, visits all that it holds, by recursion in C: torch's reader would
    overflow the stack on a deep one, and never end on one that holds another many times over."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.lower().endswith("data.pkl"):
                        with archive.open(name) as member:
                            _weigh_tuples(member)
        else:
            with open(path, "rb") as file:
                # before torch 1.6: magic, version, system, contents, names of storages
                all(_weigh_tuples(file) for _ in range(5))
    except (ValueError, LookupError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{path}: not a file that torch can load ({error or type(error).__name__})"
        ) from None


def _weigh_tuples(file: IO[bytes]) -> bool:
    """Follow a pickle with the number of its values in place of each tuple; whether to the end, or to an
    opcode that torch refuses."""
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
    """Tensors that are larger than the numbers stored for them (views, sparse ones) fill the memory when they
    are copied.

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
                    f"{path}: not a file that torch can load (no member of it has the {claimed} bytes of a "
                    "storage)"
                )
            if (needed := value.numel() * value.element_size()) > (
                stored := value.untyped_storage().nbytes()
            ):
                raise ValueError(
                    f"{path}: holds a tensor {tuple(value.shape)}, {needed} bytes, over {stored} stored "
                    "bytes; copy it"
                )
        elif isinstance(value, Mapping | list | tuple | argparse.Namespace) and id(value) not in seen:
            seen.add(id(value))  # it may hold itself
            inside = vars(value) if isinstance(value, argparse.Namespace) else value
            waiting.extend(inside.values() if isinstance(inside, Mapping) else inside)


def _remedy(path: Path) -> str:
    if path.suffix == ".bin":
        return f"""If you trust its makers, write its weights beside config.json as safetensors:

import torch
from pathlib import Path
from safetensors.torch import save_file
state = {{}}
for path in Path({str(path.parent)!r}).glob("pytorch_model*.bin"):
    state |= torch.load(path, map_location="cpu", weights_only=False)  # runs what the file says
state = {{name: tensor.clone() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}}
save_file(state, {str(path.with_name("model.safetensors"))!r})"""
    plain = path.with_name(f"{path.stem}.plain.pt")
    return f"""If you trust its makers, write its weights and settings to a plain file where its library is installed:

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


class FairseqDictionary:
    """Stands in for fairseq's Dictionary where a checkpoint holds one: its attributes, none of its code."""

    symbols: list[str]
