"""Pickles that were made to run something, or to fill the memory: each is refused by name, and nothing of it
runs."""

import bz2
import io
import lzma
import os
import pickle
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pretrain.weights.conversion import ImportConfig, import_weights
from pretrain.weights.pickles import load_torch
from quantize import joblib_file
from quantize.importing import CodebookImportConfig, import_codebook
from quantize.joblib_file import read_arrays


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Sets:
    """Pickled as a list whose items are made by a call."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self) -> Any:
        return list, (), None, iter([Calls(open, str(self.made), "w")])


def bombs(made: Path) -> dict[str, Any]:
    """Values that make the file `made` when they are unpickled by pickle itself."""
    system, write = Calls(os.system, f"touch {made}"), Calls(eval, f"open({str(made)!r}, 'w')")
    weights = {"encoder.weight": torch.zeros(2, 2)}
    return {
        "alone": system,
        "eval": write,
        "exec": Calls(exec, f"open({str(made)!r}, 'w')"),
        "open": Calls(open, str(made), "w"),
        "subprocess": Calls(subprocess.call, ["touch", str(made)]),
        "items": Sets(made),
        "beside weights": {**weights, "extra": system},
        "deep": {**weights, "extra": [({"a": (write,)},)]},
        "as a key": {**weights, "cfg": {"model": system}},
        "in an object array": {**weights, "x": np.array([system], dtype=object)},
        "loader": {**weights, "x": Calls(np.load, io.BytesIO(pickle.dumps(system)), None, True)},
        "torch's own loader": {**weights, "x": Calls(_load_all, io.BytesIO(_saved(system)))},
    }


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load_all(file: io.BytesIO) -> Any:
    return torch.load(file, weights_only=False)


KINDS = list(bombs(Path("made")))


def replaced(source: bytes, name: str, data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint in which the member that ends in `name` is `data`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for member in old.namelist():
            new.writestr(member, data if member.endswith(name) else old.read(member))
    return buffer.getvalue()


def import_codebook_of(path: Path, out: Path) -> None:
    import_codebook(CodebookImportConfig(source=str(path), out=str(out), mfcc=True, allow_pickle=True))


def import_weights_of(path: Path, out: Path) -> None:
    import_weights(ImportConfig(source=str(path), out=str(out), allow_pickle=True))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_would_run_something_are_refused_and_run_nothing(tmp_path: Path, kind: str) -> None:
    made = tmp_path / "made"
    for form, options in (("zip", {}), ("legacy", {"_use_new_zipfile_serialization": False})):
        for name in ("x.pt", "x.pth"):
            torch.save(bombs(made)[kind], tmp_path / name, **options)
            for read in (import_weights_of, import_codebook_of):
                with pytest.raises(
                    ValueError, match=r"so it is refused|is not read|not a file that torch can load"
                ) as refusal:
                    read(tmp_path / name, tmp_path / "out")
                assert str(tmp_path / name) in str(refusal.value), form
                assert not made.exists() and not (tmp_path / "out").exists()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "hubert"}')
    torch.save(bombs(made)[kind], tmp_path / "hf/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: (holds|not)"):
        import_weights_of(tmp_path / "hf", tmp_path / "out")
    assert not made.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bombs_are_live(tmp_path: Path, kind: str) -> None:
    """Otherwise nothing above would mean anything."""
    torch.save(bombs(tmp_path / "made")[kind], tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("compress", [0, 3, ("bz2", 3), ("xz", 3)], ids=str)
def test_a_joblib_file_that_would_run_something_is_refused_and_runs_nothing(
    tmp_path: Path, compress: Any
) -> None:
    made = tmp_path / "made"
    for kind, bomb in bombs(made).items():
        joblib.dump(bomb, tmp_path / "km.bin", compress=compress)
        with pytest.raises(
            ValueError, match="km.bin: .*(of which no k-means|array of type 'O8'|the pickle opcode)"
        ) as refusal:
            read_arrays(tmp_path / "km.bin")
        assert not made.exists(), (kind, refusal)


OPCODES: dict[str, bytes] = {
    "numpy's internals": b"\x80\x02cnumpy.testing._private.utils\nrunstring\n(X\x01\x00\x00\x001}tR.",
    "numpy's loader": b"\x80\x02cnumpy\nload\nX\x04\x00\x00\x00MADE\x85R.",
    "numpy's old loader": b"\x80\x02cnumpy.lib.npyio\nload\nX\x04\x00\x00\x00MADE\x85R.",
    "a function of torch": b"\x80\x02ctorch.serialization\nload\nX\x04\x00\x00\x00MADE\x85R.",
    "a function of torch's utilities": b"\x80\x02ctorch.utils.collect_env\nrun\nX\x0a\x00\x00\x00touch MADE\x85R.",
    "an attribute of what is allowed": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93)R.",
    "getattr": b"\x80\x02c__builtin__\ngetattr\n(c__builtin__\nopen\nX\x08\x00\x00\x00__call__tR.",
    "import": b"\x80\x02c__builtin__\n__import__\nX\x02\x00\x00\x00os\x85R.",
    "inst": b"(S'touch MADE'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch MADE'\no.",
    "extension": b"\x80\x02\x82\x01.",
    "buffer": b"\x80\x05\x97.",
    "state of a class": b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",
    "many times itself": b"\x80\x04]\x94"
    + b"".join(b"](h%ch%ce\x94" % (n, n) for n in range(60))
    + b"\x8c\x01a\x93.",
}


@pytest.mark.parametrize("kind", OPCODES)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_opcodes_that_reach_for_code_are_refused_in_either_format(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = _saved({"a": torch.zeros(4)})
    (tmp_path / "x.pt").write_bytes(replaced(plain, "data.pkl", OPCODES[kind]))
    (tmp_path / "km.bin").write_bytes(OPCODES[kind])
    for name, read in (("x.pt", lambda path: load_torch(path, True)), ("km.bin", read_arrays)):
        with pytest.raises(ValueError, match=f"{name}: "):
            read(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["km.bin", "x.pt"]


# What fills the memory


def test_storages_that_are_not_there_are_refused(tmp_path: Path) -> None:
    plain, path = _saved({"a": torch.zeros(4)}), tmp_path / "x.pt"
    about = zipfile.ZipFile(io.BytesIO(plain)).read("archive/data.pkl")
    claimed = about.replace(b"K\x04tq", b"J\xff\xff\xff\x0ftq")
    assert claimed != about
    path.write_bytes(replaced(plain, "data.pkl", claimed))
    with pytest.raises(
        ValueError,
        match=r"x.pt: not a file that torch can load \((record size .16 bytes. does not match|no member)",
    ):
        load_torch(path, True)
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(buffer.getvalue().replace(b"K\x04Ntq", b"J\xff\xff\xff\x7fNtq"))
    assert path.read_bytes() != buffer.getvalue()
    with pytest.raises(ValueError, match=r"x.pt: not a file that torch can load"):
        load_torch(path, True)


def test_a_zip_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    plain, path = _saved({"a": torch.zeros(4)}), tmp_path / "x.pt"
    path.write_bytes(replaced(plain, "data/0", bytes(1 << 26), zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"x.pt: archive/\S+ in it is compressed"):
        load_torch(path, True)
    data = bytearray(plain)
    place = data.rindex(b"PK\x01\x02")  # the last entry of the central directory: sizes at 20 and 24
    data[place + 20 : place + 28] = b"\0\0\0\x7f" * 2
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x.pt: claims 21307\d+ bytes of contents and has"):
        load_torch(path, True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: torch.zeros(1).expand(10**12),
            r"a tensor \(1000000000000,\), 4000000000000 bytes, over 4 stored bytes",
        ),
        (
            lambda: torch.sparse_coo_tensor(
                torch.tensor([[0]]), torch.ones(1), (10**12,), check_invariants=False
            ),
            "is sparse_coo",
        ),
        (lambda: torch.zeros(10**12, device="meta"), "is meta"),
        (lambda: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8), "is quantized"),
    ],
    ids=["view", "sparse", "meta", "quantized"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_larger_than_what_is_stored_are_refused(
    tmp_path: Path, make: Callable[[], torch.Tensor], reason: str
) -> None:
    tensor = make()
    itself: list[Any] = [{"deep": ({"tensor": tensor},)}]
    for name, value in (("x.pt", {"a": tensor}), ("y.pt", {"a": torch.zeros(2), "b": itself})):
        torch.save(value, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: holds a tensor.*{reason}|{name}: holds {reason}"):
            load_torch(tmp_path / name, True)


def test_shared_and_transposed_weights_are_no_fault(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    torch.save(
        {"a": weight, "b": weight, "c": weight.T, "d": weight[1], "e": torch.zeros(0)}, tmp_path / "x.pt"
    )
    assert set(load_torch(tmp_path / "x.pt", True)) == set("abcde")


DEEP = b"\x85" * 1_000_000  # TUPLE1
MANY = b"(K\x01K\x02tq\x01" + b"h\x01h\x01\x86q\x01" * 60  # (t, t) again and again: 2**60 values
PUT_IN_MEMO = b"h\x01" * 9000 + b"t"


@pytest.mark.parametrize(
    "key",
    [b"K\x01" + DEEP, MANY, b"(K\x01K\x02tq\x01(" + PUT_IN_MEMO, b"ctorch\nSize\nK\x01" + DEEP + b"R"],
    ids=["deep", "many times itself", "wide", "made of a deep one"],
)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_key_that_overflows_the_stack_or_hashes_for_ever_is_refused(
    tmp_path: Path, key: bytes, form: str
) -> None:
    contents = b"\x80\x02}" + key + b"K\x01s."
    path = tmp_path / "x.pt"
    if form == "zip":
        path.write_bytes(replaced(_saved({"a": torch.zeros(4)}), "data.pkl", contents))
    else:
        path.write_bytes(
            b"".join(pickle.dumps(head, 2) for head in (0x1950A86A20F9469CFC6C, 1001, {}))
            + contents
            + b"\x80\x02]q\0."
        )
    with pytest.raises(
        ValueError, match=r"x.pt: not a file that torch can load \(a tuple of more than 10,000 values"
    ):
        load_torch(path, True)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_what_checkpoints_hold_is_no_large_tuple(tmp_path: Path, options: dict[str, Any]) -> None:
    model = torch.nn.LSTM(4, 4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 4))[0].sum().backward()
    optimizer.step()
    random_state = (3, tuple(range(625)), None)
    value = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": random_state,
        (1, ("a", 2)): list(range(20_000)),
    }
    torch.save(value, tmp_path / "x.pt", **options)
    found = load_torch(tmp_path / "x.pt", True)
    assert found["random"] == random_state and found[1, ("a", 2)] == list(range(20_000))
    assert torch.equal(found["model"]["bias_hh_l2"], model.bias_hh_l2)


@pytest.mark.parametrize("kind", ["zlib", "bz2", "xz"])
def test_a_small_joblib_file_does_not_unpack_to_gigabytes(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joblib_file, "SMALL", 1 << 20)
    assert joblib_file.LARGEST > 2**31
    path = tmp_path / "km.bin"
    packer: Any = {
        "zlib": zlib.compressobj(1),
        "bz2": bz2.BZ2Compressor(1),
        "xz": lzma.LZMACompressor(preset=0),
    }[kind]
    path.write_bytes(b"".join(packer.compress(bytes(1 << 20)) for _ in range(16)) + packer.flush())
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="km.bin: unpacks to more than 64 times its size"):
        read_arrays(path)


def test_a_tar_as_torch_read_them_once_is_not_unpacked(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.pt", "w") as tar:
        for name in ("~x", "storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"\x80\x02N."))
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[0] = 0x80  # as a pickle begins
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512]))
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"x.pt: "):
        load_torch(tmp_path / "x.pt", True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_json_that_is_nested_too_deeply_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"config.json: not valid JSON"):
        import_weights_of(tmp_path, tmp_path / "out")
