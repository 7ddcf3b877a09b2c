"""What sources of real people have: other formats, twins, folders and files that cannot be read, and text in
any encoding."""

import errno
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pretrain.data.indexing import IndexConfig, index
from pretrain.data.manifest import Manifest
from pretrain.data.sources.candidates import SUFFIXES, Names
from pretrain.data.sources.sources import read_sources
from pretrain.store.plain_text import decode_text, raw_lines

# What soundfile can write under the suffixes that are read: (format, subtype).
WRITTEN = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", None),
    ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", None),
    ".oga": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".sph": ("NIST", "ULAW"),
    ".aif": ("AIFF", "PCM_16"),
    ".aiff": ("AIFF", "PCM_24"),
    ".aifc": ("AIFF", "FLOAT"),
    ".au": ("AU", "PCM_16"),
    ".snd": ("AU", "ALAW"),
    ".caf": ("CAF", "ALAC_16"),
    ".w64": ("W64", "PCM_16"),
    ".rf64": ("RF64", "PCM_16"),
}


def sound(suffix: str, num_samples: int = 8000) -> bytes:
    buffer = io.BytesIO()
    form, subtype = WRITTEN[suffix.lower()]
    soundfile.write(buffer, np.sin(np.arange(num_samples) / 9) / 3, 16000, format=form, subtype=subtype)
    return buffer.getvalue()


def place(folder: Path, files: dict[str, bytes], tar: bool = False) -> Path:
    """Files in a folder, or in a tar of its name."""
    if not tar:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder
    with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return folder.with_suffix(".tar")


def run(source: Path | list[Path], **keys: Any) -> tuple[dict[str, Any], Manifest, dict[str, str]]:
    """The summary, the manifest, and the quarantine: reason by id."""
    sources = source if isinstance(source, list) else [source]
    out = sources[0].parent / f"manifest{len(list(sources[0].parent.glob('manifest*')))}"
    given = {"dev_share": 0.0, "test_share": 0.0, "max_bad_share": 0.9, "workers": 1} | keys
    summary = index(IndexConfig(source=[str(each) for each in sources], out=str(out), **given))
    rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    return summary, Manifest(out), {row["id"]: row["reason"] for row in rows}


# Formats


@pytest.mark.parametrize("tar", [False, True])
def test_every_suffix_that_libsndfile_reads_is_read(tmp_path: Path, tar: bool) -> None:
    assert set(WRITTEN) == SUFFIXES
    source = place(
        tmp_path / "c",
        {
            f"{suffix[1:]}_{case}{case_of(suffix)}": sound(suffix)
            for suffix in WRITTEN
            for case, case_of in (("a", str.lower), ("b", str.upper))
        },
        tar,
    )
    summary, manifest, quarantine = run(source)
    assert not quarantine and summary["utterances"] == 2 * len(WRITTEN) and "passed_over" not in summary
    assert all(abs(utterance.num_samples - 8000) <= 1200 for utterance in manifest)


@pytest.mark.parametrize("tar", [False, True])
def test_recordings_that_are_not_read_are_counted_by_suffix_and_named(
    tmp_path: Path, tar: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "x.wav": sound(".wav"),
        "a.m4a": b"",
        "b.M4A": b"",
        "d/c.wma": b"",
        ".hidden.aac": b"",
        "notes.pdf": b"",
    }
    source = place(tmp_path / "c", files, tar)
    summary, manifest, _ = run(source)
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 1
        and "3 recordings passed over, which cannot be read here (.m4a 2, .wma 1), such as " in lines[0]
    )
    assert "ffmpeg -i x.m4a x.flac" in lines[0] and summary["passed_over"] == 3 and len(manifest) == 1
    others = place(tmp_path / "others", {"a.m4a": b""}, tar)
    with pytest.raises(ValueError, match=r"no audio found.*; 1 recording passed over.*\(\.m4a 1\)"):
        run(others)


# Twins


@pytest.mark.parametrize("tar", [False, True])
def test_recordings_that_differ_in_their_suffix_alone_keep_it_and_others_do_not(
    tmp_path: Path, tar: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "d/a.wav": sound(".wav"),
        "d/a.mp3": sound(".mp3"),
        "d/a.WAV": sound(".wav"),
        "d/b.wav": sound(".wav"),
        "a.flac": sound(".flac"),
        "d/a.txt": b"one\n",
        "d/b.txt": b"two\n",
    }
    source = place(tmp_path / "c", files, tar)
    _, manifest, quarantine = run(source)
    before = "c/" if tar else ""
    assert {u.id.removeprefix(before): u.text for u in manifest} == {
        "a": None,
        "d/a.WAV": "one",
        "d/a.mp3": "one",
        "d/a.wav": "one",
        "d/b": "two",
    }
    said = capsys.readouterr().err
    assert (
        "3 recordings have a name that another has with another suffix, such as" in said
        and "it counts twice" in said
    )
    assert not quarantine and len(said.splitlines()) == 1


def test_twins_in_lists_keep_their_suffix_too_and_segments_their_start(tmp_path: Path) -> None:
    place(tmp_path, {"a.wav": sound(".wav"), "a.mp3": sound(".mp3"), "b.wav": sound(".wav")})
    rows: list[dict[str, Any]] = [{"audio_filepath": "a.wav"}, {"audio_filepath": "a.mp3"}]
    rows += [{"audio_filepath": "b.wav", "offset": offset, "duration": 0.2} for offset in (0, 0.2)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [candidate.id for candidate in read_sources([str(tmp_path / "l.jsonl")])] == [
        "a.wav",
        "a.mp3",
        "b-0.000",
        "b-0.200",
    ]
    (tmp_path / "l.tsv").write_text(f"{tmp_path}\na.wav\t8000\na.mp3\t8000\nb.wav\t8000\n")
    assert [candidate.id for candidate in read_sources([str(tmp_path / "l.tsv")])] == ["a.wav", "a.mp3", "b"]
    rows[1]["id"] = "given"
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert [candidate.id for candidate in read_sources([str(tmp_path / "l.jsonl")])] == ["a", "given"]


def test_names_lose_their_suffix_unless_that_makes_two_equal() -> None:
    names = Names(["a.wav", "b.wav", "b.mp3", "c/b.wav", "c/b.wav"])
    assert [names[name] for name in ("a.wav", "b.wav", "b.mp3", "c/b.wav")] == ["a", "b.wav", "b.mp3", "c/b"]


# What cannot be read


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """A function that makes a file or folder unreadable, also for root, who may read all."""
    paths: set[str] = set()
    scandir, open_ = os.scandir, io.open

    def refuse(path: Any) -> None:
        if not isinstance(path, int) and os.fspath(path) in paths:
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))

    def scan(path: Any = ".") -> Any:
        refuse(path)
        return scandir(path)

    def opened(path: Any, *arguments: Any, **keys: Any) -> Any:
        refuse(path)
        return open_(path, *arguments, **keys)

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr(io, "open", opened)
    return lambda path: paths.add(str(path))


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, forbidden: Callable[[Path], None]) -> None:
    corpus = place(tmp_path / "c", {"a/x.wav": sound(".wav"), "b/deep/y.wav": sound(".wav")})
    forbidden(corpus / "b/deep")
    _, manifest, quarantine = run(corpus)
    assert manifest.ids == ["a/x"]
    assert quarantine == {
        "b/deep": "is a folder that cannot be read (Permission denied); make it readable, or move it away"
    }
    forbidden(corpus)
    with pytest.raises(
        ValueError, match=rf"1 of 1 recordings cannot be used:\n  {corpus}: is a folder that cannot be read"
    ):
        run(corpus)


def test_a_tar_or_a_text_that_cannot_be_read_is_left_out_by_name(
    tmp_path: Path, forbidden: Callable[[Path], None]
) -> None:
    corpus = place(
        tmp_path / "c",
        {
            "x.wav": sound(".wav"),
            "y.wav": sound(".wav"),
            "y.txt": b"why",
            "z/z.wav": sound(".wav"),
            "z/z.trans.txt": b"z ZED\n",
            "w/w.wav": sound(".wav"),
            "w/w.alignment.txt": b'w "A" "0.1"\n',
        },
    )
    place(tmp_path / "c/s", {"x.wav": sound(".wav")}, tar=True)
    for name in ("y.txt", "z/z.trans.txt", "w/w.alignment.txt", "s.tar"):
        forbidden(corpus / name)
    _, manifest, quarantine = run(corpus)
    assert manifest.ids == ["x"]
    assert quarantine == {
        "s": "cannot be read (Permission denied)",
        "w/w": f"{corpus}/w/w.alignment.txt: cannot be read (Permission denied)",
        "y": f"{corpus}/y.txt: cannot be read (Permission denied)",
        "z/z": f"{corpus}/z/z.trans.txt: cannot be read (Permission denied)",
    }


# Text

LATIN = "not UTF-8 text"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le with a mark"])
def test_text_with_a_byte_order_mark_is_read_wherever_it_lies(tmp_path: Path, encoding: str) -> None:
    def coded(text: str) -> bytes:
        return (
            b"\xff\xfe" + text.encode("utf-16-le")
            if encoding.startswith("utf-16-le")
            else text.encode(encoding)
        )

    wav = sound(".wav")
    corpus = place(
        tmp_path / "c",
        {
            "x.wav": wav,
            "x.txt": coded("schön\r\nist es\n"),
            "84/84-1.wav": wav,
            "84/84.trans.txt": coded("84-1 GRÜẞ DICH\r\n"),
            "84/84.alignment.txt": coded('84-1 ",GRÜẞ" "0.1,0.3"\r\n'),
        },
    )
    manifest = run(corpus)[1]
    assert {u.id: u.text for u in manifest} == {"84/84-1": "GRÜẞ DICH", "x": "schön ist es"}
    assert [word.word for word in manifest[1].words or []] == ["GRÜẞ"]
    tar = place(
        tmp_path / "t",
        {"x.wav": wav, "x.txt": coded("schön"), "y.wav": wav, "y.json": coded('{"text": "süß"}')},
        tar=True,
    )
    assert [u.text for u in run(tar)[1]] == ["schön", "süß"]
    lists = place(
        tmp_path,
        {
            "l.jsonl": coded('{"audio_filepath": "c/x.wav", "text": "für"}\n'),
            "l.tsv": coded(f"{corpus}\r\nx.wav\t8000\r\n"),
            "l.wrd": coded("ÜBER\r\n"),
            "a.jsonl": coded('{"id": "c/x", "words": [[0, 0.2, "für"]]}\n'),
        },
    )
    assert [u.text for u in run(lists / "l.tsv")[1]] == ["ÜBER"]
    (utterance,) = run(lists / "l.jsonl", alignments=str(lists / "a.jsonl"))[1]
    assert utterance.text == "für" and [word.word for word in utterance.words or []] == ["für"]


def test_one_bad_text_sends_its_recording_to_quarantine_and_ends_nothing(tmp_path: Path) -> None:
    wav, bad = sound(".wav"), "schön".encode("latin-1")
    corpus = place(
        tmp_path / "c",
        {
            "x.wav": wav,
            "x.txt": bad,
            "y.wav": wav,
            "y.txt": b"fine",
            "84/84-1.wav": wav,
            "84/84-2.wav": wav,
            "84/84-3.wav": wav,
            "84/84.trans.txt": b"84-1 A\n84-2 " + bad + b"\n84-9 " + bad + b"\n84-3 C\n",
            "84/84.alignment.txt": b'84-1 ",A" "0.1,0.3"\n84-3 ",' + bad + b'" "0.1,0.3"\n',
        },
    )
    _, manifest, quarantine = run(corpus)
    assert {u.id: u.text for u in manifest} == {"84/84-1": "A", "y": "fine"}
    assert quarantine["x"].startswith(
        f"{corpus}/x.txt: {LATIN} (invalid start byte at byte 3); as Latin-1 it reads 'schön'"
    )
    assert quarantine["84/84-2"].startswith(f"{corpus}/84/84.trans.txt line 2: {LATIN}")
    assert (
        quarantine["84/84-3"].startswith(f"{corpus}/84/84.alignment.txt line 2: {LATIN}")
        and len(quarantine) == 3
    )
    tar = place(
        tmp_path / "t",
        {
            "x.wav": wav,
            "x.txt": bad,
            "y.wav": wav,
            "y.json": b'{"text": 3',
            "z.wav": wav,
            "z.txt": b"fine",
            "w.wav": wav,
            "w.json": b'{"words": [[0.2, 0.1, "a"]]}',
            "none.json": b"[",
        },
        tar=True,
    )
    _, manifest, quarantine = run(tar)
    assert [(u.id, u.text) for u in manifest] == [("t/z", "fine")]
    assert (
        LATIN in quarantine["t/x"]
        and "member y.json" in quarantine["t/y"]
        and "ends before it starts" in quarantine["t/w"]
    )


def test_a_list_in_another_encoding_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_bytes(
        '{"audio_filepath": "a.wav"}\n{"audio_filepath": "ä.wav"}\n'.encode("latin-1")
    )
    with pytest.raises(
        ValueError,
        match=r"l\.jsonl line 2: not UTF-8 text .*as Latin-1 it reads .*ä\.wav.*iconv -f latin1 -t utf-8",
    ):
        read_sources([str(tmp_path / "l.jsonl")])
    (tmp_path / "l.tsv").write_bytes("/a\na.wav\t3\nä.wav\t3\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"l\.tsv line 3: not UTF-8 text"):
        read_sources([str(tmp_path / "l.tsv")])
    (tmp_path / "l.tsv").write_bytes("/a\na.wav\t3\n".encode("utf-16-le"))
    with pytest.raises(
        ValueError,
        match=r"l\.tsv line 1: has a NUL byte.*UTF-16 is read where the file has a byte-order mark",
    ):
        read_sources([str(tmp_path / "l.tsv")])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", ["", "a", "a\n", "ä\r\n\nb", "\n\n\n\n\n", "a\nb\nc\nd\n", "\u2028x\n"])
def test_lines_one_by_one_are_those_of_the_whole_text(encoding: str, text: str) -> None:
    data = text.encode(encoding)
    assert decode_text(data, "f") == text
    lines = [raw.decode("utf-8") for raw in raw_lines(io.BytesIO(data), "f")]
    assert lines == text.replace("\r\n", "\n").removesuffix("\n").split("\n") or (
        not text and lines in ([], [""])
    )
