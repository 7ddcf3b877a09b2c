import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import audio
from pretrain.data.audio import load_audio
from pretrain.data.decoding import libsndfile, mpeg, recordings, spans
from pretrain.data.indexing import IndexConfig, index
from pretrain.data.manifest import Manifest
from pretrain.data.sources.tar import list_members
from pretrain.data.utterance import Phone, Word


def encoded(num_samples: int = 4000, suffix: str = "flac", rate: int = 16000) -> bytes:
    """A recording whose samples tell its length."""
    buffer = io.BytesIO()
    soundfile.write(
        buffer, np.random.default_rng(num_samples).uniform(-0.5, 0.5, num_samples), rate, format=suffix
    )
    return buffer.getvalue()


def pack_tar(path: Path, members: dict[str, bytes], mode: Any = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def run(source: Path | list[Path], out: Path, **keys: Any) -> tuple[dict[str, Any], Manifest]:
    named = [str(path) for path in source] if isinstance(source, list) else str(source)
    summary = index(IndexConfig(source=named, out=str(out), **({"dev_share": 0.0, "test_share": 0.0} | keys)))
    return summary, Manifest(out)


def quarantine(manifest: Manifest) -> dict[str, str]:
    lines = (manifest.folder / "quarantine.jsonl").read_text().splitlines()
    return {row["id"]: row["reason"] for row in map(json.loads, lines)}


def test_members_sound_as_the_files_they_were(tmp_path: Path) -> None:
    sounds = {
        f"{suffix}/{n}.{suffix}": encoded(3000 + n, suffix)
        for suffix in ("wav", "flac", "ogg", "mp3")
        for n in (0, 777)
    }
    for name, data in sounds.items():
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(data)
    shard = pack_tar(tmp_path / "s.tar", sounds)
    packed, files = run(shard, tmp_path / "m")[1], run(tmp_path / "files", tmp_path / "m2")[1]
    by_id = {utterance.id: utterance for utterance in packed}
    assert len(files) == 8 and by_id.keys() == {f"s/{utterance.id}" for utterance in files}
    for utterance in files:
        member = by_id[f"s/{utterance.id}"]
        assert member.path == str(shard) and member.member is not None
        assert (
            shard.read_bytes()[member.member.offset :][: member.member.size]
            == Path(utterance.path).read_bytes()
        )
        np.testing.assert_array_equal(load_audio(member), load_audio(utterance))


def test_transcripts_and_speakers_lie_beside_their_recording(tmp_path: Path) -> None:
    about = {
        "text": "three",
        "speaker": 7,
        "split": "dev",
        "phones": [[0.0, 0.1, "a"]],
        "words": [[0, 0.1, "three"]],
        "lang": "en",
    }
    pack_tar(
        tmp_path / "s.tar",
        {
            "a/1.txt": b"one\ntwo\n",
            "a/1.flac": encoded(),
            "a/2.flac": encoded(),
            "a/2.json": json.dumps(about | {"split": "train"}).encode(),
            "./a/3.mic1.flac": encoded(),
            "a/3.mic2.flac": encoded(),
            "a/3.json": json.dumps(about).encode(),
            "a/4.json": b"{}",
        },
    )
    with pytest.raises(ValueError, match="'s/a/1' has no split though others do"):
        run(tmp_path / "s.tar", tmp_path / "m")
    pack_tar(tmp_path / "s.tar", {"a/1.json": b'{"split": "dev"}'}, "a")
    manifest = run(tmp_path / "s.tar", tmp_path / "m")[1]
    assert [(u.id, u.text, u.speaker, u.split) for u in manifest] == [
        ("s/a/1", "one two", None, "dev"),
        ("s/a/2", "three", "7", "train"),
        ("s/a/3.mic1", "three", "7", "dev"),
        ("s/a/3.mic2", "three", "7", "dev"),
    ]
    assert manifest[2].phones == [Phone(0.0, 0.1, "a")] and manifest[2].words == [Word(0.0, 0.1, "three")]


def test_a_mistake_beside_a_recording_names_the_member(tmp_path: Path) -> None:
    for name, data, message in (
        ("x.json", b'{"text": ["a"]}', "text: .*string"),
        ("x.txt", b"\xff", "not UTF-8"),
    ):
        pack_tar(tmp_path / "s.tar", {"x.flac": encoded(), name: data})
        with pytest.raises(ValueError, match=f"s.tar, member {name}: {message}"):
            run(tmp_path / "s.tar", tmp_path / "m")


def test_a_folder_or_a_glob_of_shards_gives_ids_by_shard_and_member(tmp_path: Path) -> None:
    for shard in ("0", "1", "deep/0"):
        pack_tar(tmp_path / f"shards/{shard}.tar", {"x.flac": encoded(), "y.wav": encoded(5000, "wav")})
    assert run(tmp_path / "shards", tmp_path / "m1")[1].ids == [
        "0/x",
        "0/y",
        "1/x",
        "1/y",
        "deep/0/x",
        "deep/0/y",
    ]
    assert run(tmp_path / "shards/*.tar", tmp_path / "m2")[1].ids == ["0/x", "0/y", "1/x", "1/y"]
    assert run(tmp_path / "shards/**/0.tar", tmp_path / "m3")[1].ids == ["0/x", "0/y", "deep/0/x", "deep/0/y"]
    two = run([tmp_path / "shards/1.tar", tmp_path / "shards/deep"], tmp_path / "m4")[1]
    assert two.ids == ["1/x", "1/y", "deep/0/x", "deep/0/y"]
    with pytest.raises(ValueError, match=r"none\*\.tar: no audio found"):
        run(tmp_path / "shards/none*.tar", tmp_path / "m5")


def test_a_folder_of_files_and_shards_gives_both(tmp_path: Path) -> None:
    pack_tar(tmp_path / "c/s.tar", {"x.flac": encoded()})
    (tmp_path / "c/y.wav").write_bytes(encoded(suffix="wav"))
    (tmp_path / "c/download.tar.gz").write_bytes(b"\x1f\x8b")  # the archive that the files came in
    assert run(tmp_path / "c", tmp_path / "m")[1].ids == ["y", "s/x"]


@pytest.mark.parametrize("place", ["", "deep/", "deep/s/"])
def test_a_tar_beside_its_unpacked_files_is_refused(tmp_path: Path, place: str) -> None:
    pack_tar(tmp_path / "c/deep/s.tar", {"a/x.flac": encoded()})
    (tmp_path / "c" / place / "a").mkdir(parents=True)
    (tmp_path / "c" / place / "a/x.wav").write_bytes(encoded(suffix="wav"))
    with pytest.raises(
        ValueError, match=r"s.tar, member a/x.flac: .*x.wav has its name.* count twice; move one of them away"
    ):
        run(tmp_path / "c", tmp_path / "m")


@pytest.mark.parametrize("more", [1, 3])
def test_tars_that_were_joined_with_cat_are_told(tmp_path: Path, more: int) -> None:
    parts = [pack_tar(tmp_path / f"{n}.tar", {f"{n}.flac": encoded()}).read_bytes() for n in range(1 + more)]
    (tmp_path / "s.tar").write_bytes(b"".join(parts))
    manifest = run(tmp_path / "s.tar", tmp_path / "m", max_bad_share=0.5)[1]
    assert manifest.ids == ["s/0"]
    assert (
        f"holds more behind its end mark (byte {len(parts[0])}): joined with cat?"
        in quarantine(manifest)["s"]
    )
    (tmp_path / "s.tar").write_bytes(parts[0] + bytes(3 << 20))  # as a tape's padding
    assert run(tmp_path / "s.tar", tmp_path / "m2")[0]["quarantined"] == 0


@pytest.mark.parametrize(
    ("name", "mode", "command"),
    [("s.tar.gz", "w:gz", "gzip"), ("s.tar", "w:bz2", "bzip2"), ("s.txz", "w:xz", "xz")],
)
def test_a_compressed_tar_is_refused_with_the_remedy(
    tmp_path: Path, name: str, mode: str, command: str
) -> None:
    pack_tar(tmp_path / "shards" / name, {"x.flac": encoded()}, mode)
    for source in (tmp_path / "shards", tmp_path / "shards" / name):
        with pytest.raises(ValueError, match=rf"{name}: is compressed, .*decompress it: {command} -d {name}"):
            run(source, tmp_path / "m")


def test_damaged_members_are_quarantined_by_name(tmp_path: Path) -> None:
    pack_tar(
        tmp_path / "s.tar",
        {
            "ok.flac": encoded(),
            "noise.flac": b"noise" * 99,
            "empty.wav": b"",
            "cut.wav": encoded(4000, "wav")[:5000],
        },
    )
    with tarfile.open(tmp_path / "s.tar", "a") as tar:
        info = tarfile.TarInfo("link.flac")
        info.type, info.linkname = tarfile.SYMTYPE, "ok.flac"
        tar.addfile(info)
    summary, manifest = run(tmp_path / "s.tar", tmp_path / "m", max_bad_share=0.9)
    assert manifest.ids == ["s/ok"] and summary["found"] == 5
    reasons = quarantine(manifest)
    for name, reason in (
        ("noise", "cannot be decoded"),
        ("empty", "is empty"),
        ("cut", "truncated"),
        ("link", "is a link"),
    ):
        assert reason in reasons[f"s/{name}"]


@settings(max_examples=12, deadline=None)  # each starts a worker
@given(st.data())
def test_wherever_a_shard_is_cut_whole_members_stay_and_the_loss_is_told(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    sounds = {f"{n}.wav": encoded(1000 + 100 * n, "wav") for n in range(4)}
    shard = pack_tar(folder / "s.tar", sounds)
    places = {name: place for name, place, _ in list_members(shard)}
    size = data.draw(st.integers(places["0.wav"].offset + places["0.wav"].size, sum(places["3.wav"]) - 1))
    shard.write_bytes(shard.read_bytes()[:size])
    whole = [f"s/{name[0]}" for name, place in places.items() if sum(place) <= size]
    headers = {place.offset - 512 for place in places.values()}
    summary, manifest = run(shard, folder / "m", max_bad_share=0.99)
    assert manifest.ids == whole and summary["found"] == len(whole) + summary["quarantined"]
    cut = [f"s/{name[0]}" for name, place in places.items() if place.offset <= size < sum(place)]
    told = quarantine(manifest)
    assert [name for name in told if name != "s"] == cut
    # a tar may end without its trailing zeros: then nothing tells that it was cut
    assert told or size in headers
    assert all(load_audio(utterance).any() for utterance in manifest)


def test_a_damaged_header_is_told_with_the_member_before_it(tmp_path: Path) -> None:
    shard = pack_tar(tmp_path / "s.tar", {f"{n}.flac": encoded() for n in range(3)})
    data = bytearray(shard.read_bytes())
    places = {name: place for name, place, _ in list_members(shard)}
    data[places["1.flac"].offset - 500] ^= 255
    shard.write_bytes(data)
    manifest = run(shard, tmp_path / "m", max_bad_share=0.9)[1]
    assert manifest.ids == ["s/0"] and "damaged behind 0.flac" in quarantine(manifest)["s"]
    (tmp_path / "zero.tar").touch()
    with pytest.raises(
        ValueError,
        match=r"1 of 1 recordings cannot be used(.|\n)*zero.tar: is cut or damaged behind its start",
    ):
        run(tmp_path / "zero.tar", tmp_path / "m2")


def test_a_shard_that_shrank_since_it_was_indexed_is_an_error(tmp_path: Path) -> None:
    shard = pack_tar(tmp_path / "s.tar", {"x.flac": encoded(), "y.flac": encoded(9000)})
    utterance = run(shard, tmp_path / "m")[1][1]
    assert utterance.member is not None
    shard.write_bytes(shard.read_bytes()[: utterance.member.offset + 99])
    with pytest.raises(
        ValueError, match=rf"s.tar \(utterance 's/y'\): is truncated: 99 of {utterance.member.size} bytes"
    ):
        load_audio(utterance)


def test_threads_share_a_shard(tmp_path: Path) -> None:
    manifest = run(
        pack_tar(tmp_path / "s.tar", {f"{n}.flac": encoded(4000 + n) for n in range(20)}), tmp_path / "m"
    )[1]
    alone = [load_audio(utterance) for utterance in manifest]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda item: load_audio(manifest[item]), list(range(20)) * 5))
    for item, wave in enumerate(together):
        np.testing.assert_array_equal(wave, alone[item % 20])


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_segment_of_a_long_member_reads_little_of_it(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []

    class Window(spans.Span):
        def readinto(self, buffer: Any) -> int:
            first, count = self._position, super().readinto(buffer)
            read.append((first, first + count))
            return count

        def at(self, place: int, count: int) -> bytes:
            read.append((place, place + count))
            return super().at(place, count)

    for module in (libsndfile, recordings, mpeg):
        monkeypatch.setattr(module, "Span", Window)
    monkeypatch.setattr(libsndfile, "_READ_AHEAD", 1 << 13)
    shard = pack_tar(
        tmp_path / "s.tar",
        {"before.txt": b"x" * 3000, f"long.{suffix}": encoded(60 * 16000, suffix), "z.txt": b"z" * 9000},
    )
    whole = run(shard, tmp_path / "m")[1][0]
    everything = load_audio(whole)
    assert whole.member is not None
    read.clear()
    np.testing.assert_array_equal(load_audio(whole, 700_000, 16000), everything[700_000:716_000])
    # wav goes there, flac and ogg search by halving, which takes some tens of kB however long the recording
    # is. Of an mp3, which was read through when it was loaded, the frames are known.
    assert sum(last - first for first, last in read) < min(170_000, whole.member.size)
    assert max(last for _, last in read) <= whole.member.size  # and nothing behind it


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_a_header_is_checked_by_reading_little(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, read = (
        pack_tar(
            tmp_path / "s.tar", {f"long.{suffix}": encoded(60 * 16000, suffix), "z.txt": b"z" * 200_000}
        ),
        0,
    )

    class Window(spans.Span):
        def readinto(self, buffer: Any) -> int:
            nonlocal read
            count = super().readinto(buffer)
            read += count
            return count

        def at(self, place: int, count: int) -> bytes:
            nonlocal read
            data = super().at(place, count)
            read += len(data)
            return data

    member = next(member for name, member, _ in list_members(shard) if name.startswith("long"))
    for module in (libsndfile, recordings, mpeg):
        monkeypatch.setattr(module, "Span", Window)
    assert audio.probe_audio(str(shard), decode=False, member=member)[2] == 16000
    assert 0 < read <= 50_000


def test_a_member_is_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    with spans.Span(str(path), 10, 20) as window:
        assert window.read() == bytes(range(10, 30)) and window.read(5) == b""
        assert window.seek(-3, io.SEEK_END) == 17 and window.read(9) == bytes(range(27, 30))
        assert window.seek(-5) == 0 and window.seek(-99, io.SEEK_END) == 0 and window.read(1) == bytes([10])
        assert window.seek(2) == 2 and window.seek(1, io.SEEK_CUR) == 3 and window.read(2) == bytes([13, 14])
