"""Codebooks from scikit-learn's own files and from plain ones, and out again; what a hostile pickle names is
refused, and not run."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from sklearn.cluster import BisectingKMeans, KMeans, MiniBatchKMeans

from pretrain.config import parse_config
from pretrain.store.artefact import is_complete, read_meta
from pretrain.store.hashes import sha256_file
from quantize import joblib_file
from quantize.codebook import Codebook, write_codebook
from quantize.importing import CodebookImportConfig, export_codebook, import_codebook, read_centroid_file
from quantize.joblib_file import read_arrays
from quantize.kmeans import kmeans

DIM = 39


def draws(num_frames: int = 3000, seed: int = 0, offset: float = 20.0) -> np.ndarray:
    """Frames like MFCC: clusters of several sizes, a long way from the origin."""
    rng = np.random.default_rng(seed)
    centres = 4 * rng.standard_normal((12, DIM)) + offset
    return (centres[rng.integers(12, size=num_frames)] + rng.standard_normal((num_frames, DIM))).astype(
        np.float32
    )


def squared_distances(frames: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(frames, K) in float64, from the differences."""
    return np.square(frames[:, None].astype(np.float64) - centroids).sum(axis=2)


def imported(source: Path, out: Path, **options: Any) -> Codebook:
    tree = {"source": str(source), "out": str(out), **(options or {"mfcc": True, "allow_pickle": True})}
    import_codebook(parse_config(CodebookImportConfig, tree, "test"))
    return Codebook.open(out)


def refusal(source: Path, out: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        imported(source, out, **options)
    assert not out.exists()
    return str(caught.value)


# scikit-learn's files


@pytest.fixture(scope="module")
def fitted() -> dict[str, KMeans | MiniBatchKMeans]:
    """As fairseq fits them (float32, MiniBatchKMeans, no seed in the file) and otherwise: float64, a seed, a
    generator."""
    frames = draws()
    fairseq = MiniBatchKMeans(20, batch_size=500, n_init=1, max_no_improvement=20, random_state=0).fit(frames)
    fairseq.random_state = None
    return {
        "fairseq": fairseq,
        "seed": KMeans(20, n_init=1, random_state=1, max_iter=10).fit(frames),
        "float64": MiniBatchKMeans(20, n_init=1, random_state=np.random.RandomState(3)).fit(
            frames.astype(np.float64)
        ),
    }


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("bz2", 3), ("xz", 3), ("lzma", 3)], ids=str)
@pytest.mark.parametrize("kind", ["fairseq", "seed", "float64"])
def test_joblib_files_of_scikit_learn_give_their_labels(
    kind: str, compress: Any, fitted: dict[str, Any], tmp_path: Path
) -> None:
    joblib.dump(fitted[kind], tmp_path / "km.bin", compress=compress)
    codebook = imported(tmp_path / "km.bin", tmp_path / "codebook")
    centroids = fitted[kind].cluster_centers_
    assert centroids.dtype == (np.float64 if kind == "float64" else np.float32)
    # to the last bit: the mean is zero
    assert np.array_equal(codebook.decode(np.arange(20)), centroids.astype(np.float32))
    frames = draws(seed=1)
    found = codebook.assign(frames)
    exact = squared_distances(frames, centroids)
    best = exact.min(axis=1)
    if centroids.dtype == np.float32:
        assert np.array_equal(found, exact.argmin(axis=1))
    # scikit-learn's float32 distances are wrong by some roundings (6e-8) of |x|²; float64 centroids are
    # rounded by as much.
    near = 1e-6 * np.square(frames, dtype=np.float64).sum(axis=1)
    for labels in (found, fitted[kind].predict(frames.astype(centroids.dtype))):
        assert (exact[np.arange(len(frames)), labels] - best <= near).all()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["fairseq", "float64"])
def test_plain_pickles_are_read_in_every_protocol(
    kind: str, protocol: int, fitted: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "km.pkl"
    path.write_bytes(pickle.dumps(fitted[kind], protocol))
    assert np.array_equal(read_arrays(path)["cluster_centers_"], fitted[kind].cluster_centers_)
    joblib.dump({"k": 20, "C": np.asfortranarray(fitted[kind].cluster_centers_)}, path, protocol=protocol)
    assert np.array_equal(read_arrays(path)["C"], fitted[kind].cluster_centers_)


def test_names_of_older_libraries_are_known(fitted: dict[str, Any], tmp_path: Path) -> None:
    """Files of 2019 name scikit-learn's, numpy's and joblib's modules otherwise, and joblib did not align
    arrays."""
    names = [
        ("sklearn.cluster._kmeans", "sklearn.cluster.k_means_"),
        ("numpy._core.", "numpy.core."),
        ("joblib.numpy_pickle", "sklearn.externals.joblib.numpy_pickle"),
    ]

    class Unseekable(io.BytesIO):
        def tell(self) -> int:  # joblib then aligns nothing
            raise io.UnsupportedOperation

    stream = Unseekable()
    joblib.dump(fitted["fairseq"], stream, protocol=3)  # names stand in lines of their own: `cMODULE\nNAME\n`
    data = stream.getvalue()
    for new, old in names:
        assert old.encode() not in data
        data = data.replace(new.encode(), old.encode())
    (tmp_path / "km.bin").write_bytes(data)
    assert np.array_equal(
        read_arrays(tmp_path / "km.bin")["cluster_centers_"], fitted["fairseq"].cluster_centers_
    )


def test_big_endian_and_half_precision_arrays_keep_their_values(tmp_path: Path) -> None:
    for dtype in (">f8", ">f4", "<f2"):
        array = draws(4)[:, :3].astype(dtype)
        joblib.dump(array, tmp_path / "a.joblib")
        found = read_arrays(tmp_path / "a.joblib")[""]
        assert found.dtype == dtype and np.array_equal(found, array)


def test_a_pickle_is_read_only_where_that_is_allowed(fitted: dict[str, Any], tmp_path: Path) -> None:
    joblib.dump(fitted["seed"], tmp_path / "km.bin")
    torch.save(torch.zeros(3, DIM), tmp_path / "km.pt")
    assert "km.bin: neither .npy nor safetensors" in (
        told := refusal(tmp_path / "km.bin", tmp_path / "c", mfcc=True)
    )
    assert "--allow-pickle" in told
    assert "km.pt: is a pickle" in refusal(tmp_path / "km.pt", tmp_path / "c", mfcc=True)


# Hostile files


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def mark(path: Path) -> list[Calls]:
    """Things that make the file `path` when they are unpickled."""
    return [
        Calls(os.system, f"touch {path}"),
        Calls(eval, f"open({str(path)!r}, 'w')"),
        Calls(open, str(path), "w"),
    ]


def hostile(made: Path) -> list[Any]:
    """What to dump, each with a mark in another place."""
    things: list[Any] = []
    for thing in mark(made):
        model = KMeans(1, n_init=1).fit(np.zeros((2, 2)))
        model.random_state = thing
        nested = [
            {"cluster_centers_": np.zeros((2, DIM)), "deep": [({1: thing},)]},
            np.array([thing, 1], dtype=object),
        ]
        things += [thing, {"centroids": thing}, model, *nested, {"centroids": nested[1]}]
    return things


def test_a_file_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "km.bin"
    for thing in hostile(made):
        for dump in (
            joblib.dump,
            lambda value, file: Path(file).write_bytes(pickle.dumps(value, protocol=2)),
        ):
            dump(thing, path)
            told = refusal(path, tmp_path / "c")
            assert any(
                part in told
                for part in ("system, of which", "eval, of which", "open, of which", "array of type 'O8'")
            ), told
            assert not made.exists()
    joblib.dump(hostile(made)[0], path)
    joblib.load(path)
    assert made.exists()  # the files are what they are taken for


@pytest.mark.parametrize(
    ("opcodes", "named"),
    [
        (b"cos\nsystem\n(S'touch MADE'\ntR.", "os.system"),  # protocol 0
        (b"(S'touch MADE'\nios\nsystem\n.", "INST"),
        (b"(cos\nsystem\nS'touch MADE'\no.", "os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0atouch MADE\x85R.", "os.system"),
        (
            b"\x80\x04\x8c\x05numpy\x8c\x0bdtype.__new\x93)R.",
            "numpy.dtype.__new",
        ),  # no way through what is known
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "BINPERSID"),
        (b"Pa\n.", "PERSID"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x02ccollections\nOrderedDict\n)R.", "collections.OrderedDict"),
    ],
)
def test_every_way_to_reach_code_is_refused_by_name(
    opcodes: bytes, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "km.bin").write_bytes(opcodes)
    assert named in refusal(tmp_path / "km.bin", tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["km.bin"]


def test_a_state_for_a_known_class_changes_no_class(tmp_path: Path) -> None:
    """pickle's own machine would set attributes of scikit-learn's class for the whole process."""
    opcodes = b"\x80\x04\x8c\x17sklearn.cluster._kmeans\x8c\x06KMeans\x93}\x8c\x0ccluster_cent\x8c\x01xsb."
    (tmp_path / "km.bin").write_bytes(opcodes)
    assert "damaged" in refusal(tmp_path / "km.bin", tmp_path / "c")
    assert not hasattr(KMeans, "cluster_cent")


def test_a_deeply_nested_file_ends_in_an_error_and_not_in_a_crash(tmp_path: Path) -> None:
    (tmp_path / "km.bin").write_bytes(b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.")
    assert "damaged" in refusal(tmp_path / "km.bin", tmp_path / "c")
    (tmp_path / "km.bin").write_bytes(b"\x80\x02)" + b"\x85" * 300_000 + b".")
    assert "holds a tuple" in refusal(tmp_path / "km.bin", tmp_path / "c")


def test_a_file_cut_or_changed_anywhere_is_an_error_of_its_own(
    fitted: dict[str, Any], tmp_path: Path
) -> None:
    path, rng = tmp_path / "km.bin", np.random.default_rng(0)
    for compress in (0, 3):
        joblib.dump(fitted["fairseq"], path, compress=compress)
        whole = path.read_bytes()
        for size in [0, 1, 2, *rng.integers(3, len(whole), size=40)]:
            path.write_bytes(whole[:size])
            assert f"{path}: " in refusal(path, tmp_path / "c")
        for place in rng.integers(len(whole), size=150):
            path.write_bytes(whole[:place] + bytes([rng.integers(256)]) + whole[place + 1 :])
            try:
                read_arrays(path)  # a change within an array's numbers cannot be seen
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017 - both outcomes are right


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (KMeans(3), "a sklearn.cluster._kmeans.KMeans that was never fitted"),
        (
            BisectingKMeans(2).fit(np.arange(8.0)[:, None]),
            "names sklearn.cluster._bisect_k_means.BisectingKMeans, of which",
        ),
        ([1, 2], "holds a list; a fitted KMeans or MiniBatchKMeans, or an array, is needed"),
        ({"k": 3}, "holds a dict; a fitted"),
        (np.array(["a"], dtype=object), "array of type 'O8'; numbers alone are read"),
        (np.array(["a"]), "array of type 'U1'"),
    ],
    ids=["unfitted", "bisecting", "list", "dict", "objects", "texts"],
)
def test_what_is_no_fitted_kmeans_is_told_with_a_way_out(value: Any, message: str, tmp_path: Path) -> None:
    joblib.dump(value, tmp_path / "km.joblib")
    told = refusal(tmp_path / "km.joblib", tmp_path / "c")
    assert (
        message in told
        and f"numpy.save('{tmp_path}/km.npy', joblib.load('{tmp_path}/km.joblib').cluster_centers_)" in told
    )


def test_the_way_out_that_is_printed_works(fitted: dict[str, Any], tmp_path: Path) -> None:
    fitted_on_names = KMeans(3, n_init=1).fit(draws(50)[:, :DIM])
    fitted_on_names.feature_names_in_ = np.array(["c0", "c1"], dtype=object)  # as of a DataFrame's columns
    joblib.dump(fitted_on_names, tmp_path / "km.joblib")
    told = refusal(tmp_path / "km.joblib", tmp_path / "c")
    exec(told.split("\n\n", 1)[1], {})
    codebook = imported(tmp_path / "km.npy", tmp_path / "c", mfcc=True)
    assert np.array_equal(codebook.centroids[0], fitted_on_names.cluster_centers_)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x04\x22\x4d\x18....", "compressed with lz4"),
        (b"ZF0x10   ", "by a joblib before 0.10"),
        (b"", "is empty"),
    ],
)
def test_what_is_not_read_says_so(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "km.bin").write_bytes(data)
    assert message in refusal(tmp_path / "km.bin", tmp_path / "c")


def test_a_byte_order_that_is_none_is_refused_and_makes_no_objects(
    fitted: dict[str, Any], tmp_path: Path
) -> None:
    for protocol, mark in ((0, b"V<\n"), (4, b"\x8c\x01<")):
        data = pickle.dumps(fitted["float64"].cluster_centers_, protocol)
        assert data.count(mark) == 1
        for order in (b"O,", b"x", b""):
            other = b"V" + order + b"\n" if protocol == 0 else b"\x8c" + bytes([len(order)]) + order
            (tmp_path / "km.bin").write_bytes(data.replace(mark, other))
            assert "an array without a byte order" in refusal(tmp_path / "km.bin", tmp_path / "c")


@pytest.mark.parametrize("compress", [0, ("zlib", 9), ("bz2", 9), ("xz", 6)], ids=str)
def test_a_file_that_unpacks_to_more_than_a_codebook_can_be_is_refused(
    compress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joblib.dump(np.zeros((2000, DIM), np.float32), tmp_path / "km.bin", compress=compress)
    assert joblib_file.LARGEST > 8 * 65_536 * 4_096
    read_arrays(tmp_path / "km.bin")
    monkeypatch.setattr(joblib_file, "LARGEST", 100_000)
    assert "km.bin: holds more than 100,000 bytes" in refusal(tmp_path / "km.bin", tmp_path / "c")
    joblib.dump(np.zeros((500, DIM), np.float32), tmp_path / "km.bin", compress=compress)
    assert read_arrays(tmp_path / "km.bin")[""].shape == (500, DIM)


# Plain files


def write_plain(path: Path, centroids: np.ndarray) -> None:
    match path.suffixes:
        case [".npy"]:
            np.save(path, centroids)
        case [".safetensors"]:
            save_file({"anything": centroids}, path)
        case [".pt"]:
            torch.save(torch.from_numpy(centroids), path)
        case [".old", ".pt"]:
            torch.save({"centroids": torch.from_numpy(centroids)}, path, _use_new_zipfile_serialization=False)
        case [".dict", ".pt"]:
            torch.save(
                {
                    "steps": 7,
                    "counts": torch.zeros(5),
                    "codes": torch.nn.Parameter(torch.from_numpy(centroids)),
                },
                path,
            )


@pytest.mark.parametrize("name", ["c.npy", "c.safetensors", "c.pt", "c.old.pt", "c.dict.pt"])
def test_centroids_in_plain_files_are_kept_to_the_last_bit(name: str, tmp_path: Path) -> None:
    centroids = draws(7)
    write_plain(tmp_path / name, centroids)
    codebook = imported(tmp_path / name, tmp_path / "codebook")
    assert np.array_equal(codebook.centroids, centroids[None]) and not codebook.mean.any()
    frames = draws(500, seed=1)
    assert np.array_equal(codebook.assign(frames), squared_distances(frames, centroids).argmin(axis=1))


def test_bfloat16_and_a_known_name_among_others(tmp_path: Path) -> None:
    centroids = torch.randn(5, DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_torch_file({"cluster_centers_": centroids, "other": torch.zeros(4, 4)}, tmp_path / "c.safetensors")
    codebook = imported(tmp_path / "c.safetensors", tmp_path / "codebook", mfcc=True)
    assert np.array_equal(codebook.centroids[0], centroids.float().numpy())


def test_the_codebook_knows_where_it_is_from(tmp_path: Path, run: Path) -> None:
    np.save(tmp_path / "c.npy", draws(5)[:, :DIM].astype(np.float64))
    summary = import_codebook(
        CodebookImportConfig(source=str(tmp_path / "c.npy"), out=str(tmp_path / "m"), mfcc=True, cmvn=True)
    )
    assert (summary["num_classes"], summary["num_levels"], summary["dim"], summary["format"]) == (
        5,
        1,
        DIM,
        "npy",
    )
    assert summary["notes"] == ["centroids in float64 became float32"]
    meta = read_meta(tmp_path / "m", "codebook")
    sha256 = sha256_file(tmp_path / "c.npy")
    assert meta["source"] == {"kind": "mfcc", "cmvn": True} and meta["parents"] == {"source": sha256[:16]}
    assert meta["fit"] == {"imported_from": "c.npy", "format": "npy", "sha256": sha256}

    dim = 64  # of the tiny encoder
    np.save(tmp_path / "e.npy", np.random.default_rng(0).standard_normal((5, dim)).astype(np.float32))
    codebook = imported(
        tmp_path / "e.npy", tmp_path / "e", encoder=str(run), layer=1, convention="feed_forward"
    )
    assert codebook.source["kind"] == "encoder" and (
        codebook.source["layer"],
        codebook.source["convention"],
    ) == (1, "feed_forward")
    assert codebook.meta["parents"]["encoder"] == codebook.source["encoder"]
    told = refusal(tmp_path / "e.npy", tmp_path / "x", mfcc=True)
    assert f"{tmp_path}/e.npy: centroids of {dim} dimensions, (5, {dim}), and MFCC have 39" in told
    told = refusal(tmp_path / "c.npy", tmp_path / "x", encoder=str(run), layer=1)
    assert f"centroids of 39 dimensions, (5, 39), and the features of {run} have {dim}" in told
    assert "layer: 9 does not exist" in refusal(tmp_path / "e.npy", tmp_path / "x", encoder=str(run), layer=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say what the centroids are of: --mfcc, or --encoder RUN --layer L"),
        ({"mfcc": True, "encoder": "run", "layer": 1}, "say what the centroids are of"),
        ({"encoder": "run"}, "--encoder RUN and --layer L go together"),
        ({"mfcc": True, "layer": 1}, "--encoder RUN and --layer L go together"),
        ({"encoder": "run", "layer": 1, "cmvn": True}, "--cmvn is a matter of --mfcc"),
        ({"mfcc": True, "convention": "feed_forward"}, "--convention is a matter of --encoder"),
        ({"encoder": "run", "layer": -1}, "layer: Input should be greater than or equal to 0"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(CodebookImportConfig, {"source": "a", "out": "b", **options}, "import --codebook")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"a": np.zeros((2, DIM)), "b": np.zeros((3, DIM))},
            r"is needed.*there is 'a' float64 \(2, 39\), 'b' float64 \(3, 39\)",
        ),
        ({"a": np.zeros(DIM)}, r"there is 'a' float64 \(39,\)"),
        ({"C": np.zeros((2, DIM), np.int64)}, r"there is 'C' int64 \(2, 39\)"),
        (
            {"C": np.zeros((DIM, 2))},
            r"of 2 dimensions, \(39, 2\), and MFCC have 39; they lie the other way round, \(dim, K\)",
        ),
        ({"C": np.zeros((0, DIM))}, "has 0 centroids"),
        ({"C": np.zeros((2**16 + 1, DIM), np.float16)}, "has 65537 centroids; 1 to 65536 are possible"),
        ({"C": np.full((2, DIM), np.nan)}, "NaN or infinity in centroid 0"),
        ({"C": np.diag(np.full(DIM, 1e300))}, "NaN or infinity in centroid 0"),  # beyond float32
        ({"centroids": np.zeros((1, 2, DIM)), "mean": np.zeros(DIM)}, "has a `mean` beside its centroids"),
    ],
)
def test_files_without_one_set_of_centroids_say_what_they_have(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    save_file(arrays, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=rf"{tmp_path}/c.safetensors: .*{message}"):
        imported(tmp_path / "c.safetensors", tmp_path / "out", mfcc=True)


def test_a_header_of_npy_changed_anywhere_is_an_error_of_its_own(tmp_path: Path) -> None:
    path, rng = tmp_path / "c.npy", np.random.default_rng(0)
    np.save(path, draws(5))
    whole = path.read_bytes()
    places = np.arange(6, whole.index(b"\n"))  # from the version on
    read = 0
    for place in np.repeat(places, 12):
        path.write_bytes(
            whole[:place]
            + bytes([rng.choice([rng.integers(256), *b"()[]{}'\"0L,\\\n\t"])])
            + whole[place + 1 :]
        )
        try:
            read_centroid_file(path, allow_pickle=False)  # a space more or less changes nothing
            read += 1
        except ValueError as error:
            assert str(error).startswith(f"{path}: damaged")  # noqa: PT017 - both outcomes are right
    assert read < len(places) * 8
    for header in (
        b"(" * 9000,
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999, 39), }",
        b"{[]: 1}",
        b'{"a',
    ):
        path.write_bytes(whole[:8] + len(header).to_bytes(2, "little") + header + whole[128:])
        with pytest.raises(ValueError, match=f"{path}: damaged"):
            read_centroid_file(path, allow_pickle=False)


def test_damaged_plain_files_and_places_that_are_taken(tmp_path: Path) -> None:
    write_plain(tmp_path / "c.npy", draws(5))
    write_plain(tmp_path / "c.safetensors", draws(5))
    for name in ("c.npy", "c.safetensors"):
        (tmp_path / f"cut.{name}").write_bytes((tmp_path / name).read_bytes()[:-9])
        assert f"cut.{name}: damaged" in refusal(tmp_path / f"cut.{name}", tmp_path / "out", mfcc=True)
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    assert "an array of objects" in refusal(tmp_path / "objects.npy", tmp_path / "out")
    assert "none.npy: no such file" in refusal(tmp_path / "none.npy", tmp_path / "out")
    with pytest.raises(ValueError, match=r"c.npy: is a file; give another name"):
        imported(tmp_path / "c.npy", tmp_path / "c.npy" / "out")
    imported(tmp_path / "c.npy", tmp_path / "out")
    with pytest.raises(ValueError, match="already holds a finished artefact"):
        imported(tmp_path / "c.npy", tmp_path / "out")


# Out again


def fit_codebook(folder: Path, levels: int) -> Codebook:
    rng, frames = np.random.default_rng(0), draws()
    centroids = [kmeans(frames, 16, seed=0, max_iterations=5)]
    mean = np.asarray(centroids[0].mean)
    first = np.asarray(centroids[0].centroids).reshape(-1, 16, DIM)[0]
    more = [0.3 * rng.standard_normal((16, DIM)).astype(np.float32) for _ in range(levels - 1)]
    write_codebook(folder, np.stack([first, *more]), mean, {"kind": "mfcc", "cmvn": False}, {}, {}, {})
    return Codebook.open(folder)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("form", ["npy", "safetensors"])
def test_what_goes_out_and_comes_back_in_gives_the_same_labels(
    form: Any, levels: int, tmp_path: Path
) -> None:
    codebook = fit_codebook(tmp_path / "codebook", levels)
    assert np.abs(codebook.mean).max() > 10
    out = tmp_path / f"c.{form}"
    summary = export_codebook(tmp_path / "codebook", out, form)
    assert summary["codebook"] == codebook.fingerprint and bool(summary["notes"]) == (levels > 1)
    stored = np.load(out) if form == "npy" else load_file(out)["centroids"]
    assert stored.dtype == np.float32 and stored.shape == ((16, DIM) if levels == 1 else (levels, 16, DIM))
    back = imported(out, tmp_path / "back", mfcc=True)
    frames = draws(5000, seed=1)
    # mean + centroid is rounded to float32 once, by at most 1e-6 here; none of these frames lies that near to
    # a border.
    assert np.array_equal(back.assign(frames), codebook.assign(frames))
    # the mean, the centroids and a sum of four float32 of about 30: each rounds by at most 2e-6
    assert np.abs(back.decode(back.assign(frames)) - codebook.decode(codebook.assign(frames))).max() < 1e-5
    # and what came in once goes out bit for bit
    export_codebook(tmp_path / "back", tmp_path / "again.npy", "npy")
    assert np.array_equal(np.load(tmp_path / "again.npy"), stored)


def test_the_nearest_row_of_an_export_is_the_label(tmp_path: Path) -> None:
    codebook = fit_codebook(tmp_path / "codebook", 1)
    export_codebook(tmp_path / "codebook", tmp_path / "c.npy", "npy")
    frames = draws(1000, seed=1)
    # mean + centroid is rounded to float32 once; none of these frames lies within 1e-6 of a border.
    assert np.array_equal(
        squared_distances(frames, np.load(tmp_path / "c.npy")).argmin(axis=1), codebook.assign(frames)
    )


def test_export_refuses_a_name_that_is_taken_and_what_is_no_codebook(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "there.npy").touch()
    with pytest.raises(ValueError, match=r"there.npy: is there already"):
        export_codebook(tmp_path, tmp_path / "there.npy", "npy")
    with pytest.raises(ValueError, match=rf"{corpus}: is a 'manifest'; a 'codebook' is needed"):
        export_codebook(corpus, tmp_path / "c.npy", "npy")
    assert not (tmp_path / "c.npy").exists() and not is_complete(tmp_path)
