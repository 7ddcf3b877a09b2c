"""Tars that were made to mislead: each member is read whole and from within the tar, or left out by name;
nothing is ever unpacked."""

import io
import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.audio import load_audio
from pretrain.data.indexing import IndexConfig, index
from pretrain.data.manifest import Manifest
from pretrain.data.sources.tar import list_members
from units.corpus.corpus_writing import Document
from units.formats.codec import write_codec
from units.formats.description import Described


def sound(num_samples: int = 4000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(
        buffer, np.random.default_rng(num_samples).uniform(-0.5, 0.5, num_samples), 16000, format="WAV"
    )
    return buffer.getvalue()


SOUND = sound()


def header(name: bytes, size: int | bytes = 0, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A ustar header of 512 bytes; `size` as a number, or as the 12 bytes of its field."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = struct.pack(
        "100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12x",
        name,
        b"644",
        b"0",
        b"0",
        field,
        b"0",
        b" " * 8,
        kind,
        link,
        b"ustar\x0000",
        b"",
        b"",
        b"",
        b"",
        b"",
    )
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def member(name: bytes, data: bytes = SOUND, **keys: Any) -> bytes:
    return header(name, **({"size": len(data)} | keys)) + data + bytes(-len(data) % 512)


def pax(**records: str) -> bytes:
    """An extended header for the member behind it."""
    lines = b""
    for key, value in records.items():
        line = f" {key}={value}\n".encode()
        length = next(n for n in range(len(line), len(line) + 9) if n == len(line) + len(str(n)))
        lines += str(length).encode() + line
    return member(b"pax", lines, kind=b"x")


END = bytes(1024)


def run(folder: Path, data: bytes, **keys: Any) -> tuple[list[str], dict[str, str], Manifest]:
    """Index a tar: the ids that it gives, and what was left out, and why."""
    (folder / "s.tar").write_bytes(data)
    keys = {"dev_share": 0.0, "test_share": 0.0, "max_bad_share": 0.99, "workers": 1} | keys
    index(IndexConfig(source=str(folder / "s.tar"), out=str(folder / "m"), **keys))
    left_out = [json.loads(line) for line in (folder / "m/quarantine.jsonl").read_text().splitlines()]
    return Manifest(folder / "m").ids, {row["id"]: row["reason"] for row in left_out}, Manifest(folder / "m")


LEADS_OUT = "has a name that leads out of the tar"
HOSTILE: dict[str, tuple[bytes, str, str]] = {
    "up": (member(b"../x.wav"), "s/../x", LEADS_OUT),
    "up within": (member(b"a/../../x.wav"), "s/../x", LEADS_OUT),
    "up and back": (member(b"a/../x.wav"), "s/x", LEADS_OUT),
    "absolute": (member(b"/etc/x.wav"), "s/etc/x", LEADS_OUT),
    "pax path": (pax(path="../../../x.wav") + member(b"ok2.wav"), "s/../../../x", LEADS_OUT),
    "symbolic link": (
        member(b"x.wav", b"", kind=b"2", link=b"/etc/passwd"),
        "s/x",
        "is a link, to '/etc/passwd'",
    ),
    "hard link": (member(b"x.wav", b"", kind=b"1", link=b"ok.wav"), "s/x", "is a link, to 'ok.wav'"),
    "device": (member(b"x.wav", b"", kind=b"3"), "s/x", "is no plain file"),
    "pipe": (member(b"x.wav", b"", kind=b"6"), "s/x", "is no plain file"),
    "old sparse": (member(b"x.wav", kind=b"S"), "s/x", "is sparse"),
    "pax sparse": (
        pax(**{"GNU.sparse.map": "0,9", "GNU.sparse.size": "9"}) + member(b"x.wav"),
        "s/x",
        "is sparse",
    ),
    "twice": (member(b"x.wav") + member(b"./x.wav", sound(5000)), "s/x", "is in the tar 2 times"),
    "transcript twice": (
        member(b"x.txt", b"a") + member(b"x.txt", b"b") + member(b"x.wav"),
        "s/x",
        "x.txt beside it is in the tar more",
    ),
    "linked transcript": (
        member(b"x.json", b"", kind=b"2", link=b"/y") + member(b"x.wav"),
        "s/x",
        "x.json beside it is a link",
    ),
    "control": (member(b"x\x1b[2J.wav"), "s/x\\x1b[2J", "control characters"),
    "new line": (member(b"x\ny.wav"), "s/x\\ny", "control characters"),
    "no UTF-8": (member(b"x\xff.wav"), "s/x\\udcff", "no UTF-8"),
    "minus one": (member(b"x.wav", b"", size=b"\xff" * 12), "s/x", "has a size of -1 bytes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_member_that_is_not_what_it_seems_is_left_out_by_name(tmp_path: Path, kind: str) -> None:
    data, name, reason = HOSTILE[kind]
    ids, left_out, manifest = run(
        tmp_path, member(b"./ok.wav") + data + member(b"after.wav", sound(6000)) + END
    )
    assert ids == ["s/ok", "s/after"] and set(left_out) == {name} and reason in left_out[name]
    assert [len(load_audio(utterance)) for utterance in manifest] == [4000, 6000]
    assert {path.name for path in tmp_path.iterdir()} == {"s.tar", "m"} and not (
        tmp_path.parent / "x.wav"
    ).exists()


BROKEN: dict[str, tuple[bytes, str]] = {
    "backwards": (
        member(b"x.wav", b"", size=b"\xff" * 8 + struct.pack(">i", -1536)),
        "a size that leads back to byte",
    ),
    "before the start": (
        member(b"x.wav", b"", size=b"\xff" * 4 + struct.pack(">q", -(2**40))),
        "a size that leads back to byte -",
    ),
    "far behind": (
        member(b"x.wav", b"", size=b"\x80" + bytes(3) + struct.pack(">q", 2**60)),
        "x: is truncated",
    ),
    "further behind": (member(b"x.wav", b"", size=b"\x80" + b"\x7f" * 11), "a size that leads to byte"),
    "pax backwards": (pax(size="-2048") + member(b"x.wav"), "a size that leads back to byte"),
    "pax far behind": (pax(size=str(10**15)) + member(b"x.wav"), "x: is truncated"),
    "pax of no number": (pax(**{"GNU.sparse.map": "a,b"}) + member(b"x.wav"), "ValueError"),
    "long pax": (header(b"pax", 2**33, kind=b"x"), "an extended header of 8589934592 bytes"),
    "long name": (
        header(b"name", 2**40 // 512, kind=b"L") + member(b"x.wav"),
        "an extended header of 2147483648 bytes",
    ),
    "negative name": (
        header(b"name", b"\xff" * 8 + struct.pack(">i", -1536), kind=b"L") + member(b"x.wav"),
        "an extended header of -1536",
    ),
    "endless names": (
        b"".join(member(b"name", b"y.wav\0", kind=b"L") for _ in range(2000)) + member(b"x.wav"),
        "RecursionError",
    ),
    "sparse at the end": (
        pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"})
        + member(b"x.wav", b"9"),
        "ValueError",
    ),
    "no octal number": (member(b"x.wav", b"", size=b"12x45\0\0\0\0\0\0\0"), "is cut or damaged"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_header_that_leads_astray_ends_the_tar_in_little_memory(tmp_path: Path, kind: str) -> None:
    data, reason = BROKEN[kind]
    tracemalloc.start()
    ids, left_out, _ = run(tmp_path, member(b"ok.wav") + data + END)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    told = "; ".join(f"{name.removeprefix('s/')}: {why}" for name, why in left_out.items())
    assert ids == ["s/ok"] and reason in told, told
    assert peak < 20_000_000


@pytest.mark.parametrize("size", [-512, -1024, -(2**40)])
def test_a_first_member_that_leads_back_hides_nothing(tmp_path: Path, size: int) -> None:
    (tmp_path / "s.tar").write_bytes(
        member(b"x.wav", b"", size=b"\xff" * 4 + struct.pack(">q", size)) + member(b"y.wav") + END
    )
    (name, _, problem), (nameless, _, lost) = list_members(tmp_path / "s.tar")
    assert (name, problem) == ("x.wav", f"has a size of {size} bytes")
    assert not nameless and lost is not None and "is cut or damaged behind x.wav (byte 512)" in lost


def test_a_transcript_larger_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with open(path, "wb") as file:
        file.write(member(b"ok.wav") + header(b"x.txt", 2**30))
        file.truncate(file.tell() + 2**30)  # a hole
        file.seek(0, os.SEEK_END)
        file.write(member(b"x.wav") + END)
    tracemalloc.start()
    keys: dict[str, Any] = {"dev_share": 0.0, "test_share": 0.0, "max_bad_share": 0.5, "workers": 1}
    index(IndexConfig(source=str(path), out=str(tmp_path / "m"), **keys))
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert "x.txt beside it has 1073741824 bytes" in (tmp_path / "m/quarantine.jsonl").read_text()


@settings(max_examples=300)
@given(st.data())
def test_whatever_is_flipped_in_headers_the_members_lie_in_the_tar(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    parts = [
        member(b"a.wav"),
        pax(path="b/b.wav", size="8044"),
        member(b"b.wav"),
        member(b"l", b"c" * 120 + b".wav\0", kind=b"L"),
        member(b"c.wav"),
    ]
    whole = bytearray(b"".join(parts) + END)
    starts = [sum(map(len, parts[:n])) for n in range(len(parts))]
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.sampled_from(starts))
        whole[start + data.draw(st.integers(0, 540))] = data.draw(st.integers(0, 255))
        total = sum(whole[start : start + 148]) + 8 * 32 + sum(whole[start + 156 : start + 512])
        # or nearly every flip would be told by this sum
        whole[start + 148 : start + 156] = b"%06o\0 " % total
    path = tmp_path_factory.getbasetemp() / "flipped.tar"
    path.write_bytes(whole)
    listed = list(list_members(path))
    assert len(listed) < 20
    for name, place, problem in listed:
        assert problem or (name and 0 <= place.offset <= sum(place) <= len(whole))
        assert problem or not (name.startswith("/") or ".." in name.split("/"))


def test_ids_that_lead_elsewhere_name_no_file_of_an_export(tmp_path: Path) -> None:
    """A list may give any id; the one format with a file for each utterance refuses those that lead out of
    its folder."""
    for name in ("../x", "/tmp/x", "a/../../x", "a//x", ".x", "x\0", ""):
        described = Described(deduplicated=False, timed=True, num_units=5)
        with pytest.raises(ValueError, match="its id is no name for a file"):
            write_codec(tmp_path / "out", iter([Document(name, None, np.array([1, 2]))]), described)
        assert list(tmp_path.iterdir()) == []
