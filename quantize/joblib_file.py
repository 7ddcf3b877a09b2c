"""Pickles and joblib files of fitted k-means (scikit-learn, fairseq, s3prl), read as data: nothing they name
is imported or called.

A pickle is a program for a small stack machine that may import and call anything. Here `pickletools` takes it
apart; the opcodes that build plain values are followed, and what would be imported or called is only written
down (`Named`, `Made`). Names that a fitted k-means has no need of are refused. A joblib file is a pickle with
the bytes of each array right behind the opcodes of its `NumpyArrayWrapper`, the whole of it compressed or not
(joblib 0.10 of 2016 and newer).
"""

import bz2
import io
import lzma
import math
import pickletools
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


@dataclass(frozen=True)
class Named:
    """A class or function that the pickle names; numpy 2's names are told as numpy 1's."""

    full: str


@dataclass(eq=False)
class Made:
    """What the pickle would make an object from: the class or function to call, its arguments, the state to
    set."""

    maker: Named
    arguments: tuple[Any, ...]
    state: Any = None


class RefusedError(ValueError):
    """Of a file that is whole: why it is not read."""


KMEANS = {
    f"sklearn.cluster.{module}.{name}"
    for module in ("_kmeans", "k_means_")
    for name in ("KMeans", "MiniBatchKMeans")
}
WRAPPERS = {
    "joblib.numpy_pickle.NumpyArrayWrapper",
    "sklearn.externals.joblib.numpy_pickle.NumpyArrayWrapper",
}
RECONSTRUCTORS = {
    "copy_reg._reconstructor",
    "copyreg._reconstructor",
}  # make objects in the pickle protocols 0 and 1
KNOWN = {
    *KMEANS,
    *WRAPPERS,
    *RECONSTRUCTORS,
    "builtins.object",
    "__builtin__.object",
    "builtins.bytes",
    "__builtin__.bytes",
    "_codecs.encode",
    "numpy.ndarray",
    "numpy.memmap",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.numeric._frombuffer",
    # states of random generators, which stay unread
    "numpy.random.__RandomState_ctor",
    "numpy.random._mt19937.MT19937",
    "numpy.random._pickle.__randomstate_ctor",
    "numpy.random._pickle.__bit_generator_ctor",
}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}
# bytes: 65,536 centroids of 4,096 dimensions in float64, and half a gigabyte for all else
LARGEST = 8 * 2**16 * 2**12 + 2**29
SMALL = 2**28  # bytes that any packed file may unpack to
PLAIN = {"int_or_bool", "int", "float", "str", "bytes", "bytearray", "bytes_or_str"}
VALUES = {  # opcodes whose argument is the value they push
    code.name
    for code in pickletools.opcodes
    if code.arg is not None and not code.stack_before and {kind.name for kind in code.stack_after} & PLAIN
}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a pickle or joblib file: a k-means' `cluster_centers_`, those of a dict by name, or one
    alone by the name "".

    A ValueError names the file: damaged; holding something else; naming what no k-means needs; of a joblib
    before 0.10, or compressed with lz4; larger than any k-means, unpacked if it is packed.
    """
    data = _decompress(path)
    try:
        return _arrays(_Machine().run(io.BytesIO(data)))
    except RefusedError as error:
        raise ValueError(f"{path}: {error}.\n{_remedy(path)}") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        # The opcodes of a whole pickle fit each other; here they did not, in one way of many.
        raise ValueError(f"{path}: damaged, or not a pickle ({error}); was it downloaded whole?") from None


def _arrays(value: Any) -> dict[str, np.ndarray]:
    if isinstance(value, Made) and value.maker.full in KMEANS:
        if "cluster_centers_" not in value.state:
            raise RefusedError(f"holds a {value.maker.full} that was never fitted")
        return _arrays({"cluster_centers_": value.state["cluster_centers_"]})
    by_name = value if isinstance(value, dict) else {"": value}
    found = {str(name): array for name, item in by_name.items() if (array := _as_array(item)) is not None}
    if not found:
        what = value.maker.full if isinstance(value, Made) else type(value).__name__
        raise RefusedError(f"holds a {what}; a fitted KMeans or MiniBatchKMeans, or an array, is needed")
    return found


def _as_array(value: Any) -> np.ndarray | None:
    """The array that `value` is or would be made into; None if it is something else."""
    if isinstance(value, np.ndarray):
        return value
    match value:
        case Made(Named("numpy.core.multiarray._reconstruct"), state=(_, shape, dtype, fortran, data)):
            return _array(data, dtype, shape, "F" if fortran else "C")
        case Made(Named("numpy.core.numeric._frombuffer"), arguments=(data, dtype, shape, order)):
            return _array(data, dtype, shape, order)
    return None


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """An array of numbers from its bytes; of objects: refused. A dtype is `dtype('f4', False, True)` with the
    state (3, '<', …)."""
    match dtype:
        case Made(Named("numpy.dtype"), (str(code), *_), (_, str(endian), *_)):
            pass
        case _:
            raise TypeError("an array without a dtype")
    if not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
        raise RefusedError(f"holds an array of type {code!r}; numbers alone are read, no objects")
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise TypeError("an array without a shape")
    data = data.encode("latin-1") if isinstance(data, str) else data  # as Python 2 wrote them
    if endian not in ("<", ">", "=", "|"):  # "O,", say, would make an array of objects of it
        raise TypeError("an array without a byte order")
    kind = np.dtype(endian + code)
    if isinstance(data, io.BytesIO):  # in place, as joblib writes it
        data = data.read(math.prod(shape) * kind.itemsize)
    return np.frombuffer(data, kind).reshape(shape, order="F" if order == "F" else "C")


class _Machine:
    """The stack machine of the pickle protocols 0 to 5, less whatever imports, calls or looks outside of the
    file."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument, file)
        raise ValueError("it has no end")

    def step(self, name: str, argument: Any, file: BinaryIO) -> None:
        match name:
            case "PROTO" | "FRAME":
                return
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_DICT":
                self.stack.append(EMPTY[name]())
            case "MARK":
                self.marks.append(len(self.stack))
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "POP":
                self.pop(1)
            case "POP_MARK":
                self.since_mark()
            case "DUP":
                self.stack.append(self.stack[-1])
            case "LIST" | "TUPLE" | "DICT":
                collect: dict[str, Callable[[Any], Any]] = {"LIST": list, "TUPLE": tuple, "DICT": _pairs}
                self.stack.append(collect[name](self.since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self.pop(int(name[-1]))))
            case "APPEND" | "APPENDS":
                items = self.pop(1) if name == "APPEND" else self.since_mark()
                list.extend(self.stack[-1], items)
            case "SETITEM" | "SETITEMS":
                items = self.pop(2) if name == "SETITEM" else self.since_mark()
                dict.update(self.stack[-1], _pairs(items))
            case "GLOBAL" | "STACK_GLOBAL":
                module, attribute = argument.split(" ", 1) if name == "GLOBAL" else self.pop(2)
                self.stack.append(_known(module, attribute))
            case "REDUCE" | "NEWOBJ":
                maker, arguments = self.pop(2)
                self.stack.append(_make(maker, arguments))
            case "BUILD":
                self.build(file)
            case _ if name in VALUES:
                self.stack.append(argument)
            case _:  # persistent ids, the extension registry, buffers elsewhere, classes of Python 2, sets
                raise RefusedError(
                    f"uses the pickle opcode {name}, of which no k-means has need, so it is not read"
                )

    def build(self, file: BinaryIO) -> None:
        """Keep the state of the object on top; the bytes of joblib's arrays follow in the file."""
        (state,) = self.pop(1)
        made = self.stack[-1]
        if not isinstance(made, Made):
            raise TypeError("a state for what is no object")
        made.state = state
        if made.maker.full in WRAPPERS:
            if state.get("numpy_array_alignment_bytes") is not None:
                file.read(file.read(1)[0])  # joblib 1.2 and newer: so many bytes to a multiple of 16
            self.stack[-1] = _array(file, state["dtype"], state["shape"], state["order"])

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def since_mark(self) -> list[Any]:
        return self.pop(len(self.stack) - start) if (start := self.marks.pop()) < len(self.stack) else []


def _pairs(items: list[Any]) -> dict[Any, Any]:
    keys = items[::2]
    if not all(isinstance(key, str | int) for key in keys):  # hashing a deep tuple overflows the stack of C
        raise TypeError("a dict with other keys than names and numbers")
    return dict(zip(keys, items[1::2], strict=True))


def _known(module: Any, name: Any) -> Named:
    # a list that holds itself many times would be written out
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("a name that is no text")
    full = f"{module}.{name}".replace("numpy._core.", "numpy.core.", 1)
    if full.endswith("NDArrayWrapper"):
        raise RefusedError("was written by a joblib before 0.10, with its arrays in other files")
    if full not in KNOWN:
        raise RefusedError(
            f"names {full}, of which no k-means of scikit-learn has need, so it is not read; nothing of it "
            "was run"
        )
    return Named(full)


def _make(maker: Any, arguments: Any) -> Any:
    if not isinstance(maker, Named) or not isinstance(arguments, tuple):
        raise TypeError("a call of what is no class or function")
    if maker.full == "_codecs.encode":  # bytes in the protocols 0 to 2
        return str.encode(arguments[0], "latin-1")
    if maker.full.endswith(".bytes"):
        return b""
    if maker.full in RECONSTRUCTORS:
        return Made(arguments[0], ())
    return Made(maker, arguments)


def _decompress(path: Path) -> bytes:
    """The bytes of a file that joblib may have compressed."""
    too_large = (
        f"{path}: holds more than {LARGEST:,} bytes, as no codebook does, so it is not read.\n{_remedy(path)}"
    )
    if path.stat().st_size > LARGEST:
        raise ValueError(too_large)
    data = path.read_bytes()
    if data.startswith((b"\x04\x22\x4d\x18", b"ZF")):
        how = "by a joblib before 0.10" if data.startswith(b"ZF") else "with lz4"
        raise ValueError(f"{path}: is compressed {how}, which is not read here.\n{_remedy(path)}")
    decoder: Any
    if data.startswith((b"\x78", b"\x1f\x8b")):
        decoder = zlib.decompressobj(wbits=47)  # zlib or gzip, as the file says
    elif data.startswith(b"BZ"):
        decoder = bz2.BZ2Decompressor()
    elif data.startswith((b"\x5d\x00", b"\xfd7zXZ")):
        decoder = lzma.LZMADecompressor()
    else:
        return data
    try:
        most = min(LARGEST, SMALL + 64 * len(data))  # centroids hardly shrink; zeros do, a thousandfold
        plain: bytes = decoder.decompress(data, most)
    except (zlib.error, OSError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: damaged ({error}); was it downloaded whole?") from None
    if not decoder.eof:
        if len(plain) == LARGEST:
            raise ValueError(too_large)
        many = "unpacks to more than 64 times its size, as no codebook does, so it is not read"
        raise ValueError(f"{path}: {many if len(plain) == most else 'cut short; was it downloaded whole?'}")
    return plain


def _remedy(path: Path) -> str:
    return f"""If you trust its makers, write its centroids to a plain file where its library is installed:

import joblib, numpy
numpy.save({str(path.with_suffix(".npy"))!r}, joblib.load({str(path)!r}).cluster_centers_)  # runs what the file says"""
