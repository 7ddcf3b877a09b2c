"""Damage of every kind, drawn from a seed: each command ends with 0 or 2, without a traceback and in time,
and no length is believed that a second decoder does not find. WORDLESS_FUZZ_SEED draws another minute of
it."""

import io
import json
import os
import random
import re
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile

import wordless.cli
from pretrain.data.audio import load_audio
from pretrain.data.manifest import Manifest
from pretrain.data.probing import Limits, Request, probe_recordings
from tests.pretrain.data.decoding.test_recordings import FORMATS, encoded, without_xing
from wordless.verbs import VERBS

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("WORDLESS_FUZZ_SEED", "0"))
SECONDS = 60  # for one command, beyond which it hangs
NUMBERS = [
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0x7FFFF000,
    2**63 - 1,
    2**64 - 1,
]

pytestmark = pytest.mark.slow


@contextmanager
def in_time(what: object) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"hangs: {what}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(draw: random.Random, data: bytes, head: int) -> bytes:
    """One to three changes, most of them in the first `head` bytes."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        place = (
            draw.randrange(min(head, len(changed))) if draw.random() < 0.7 else draw.randrange(len(changed))
        )
        match draw.randrange(7):
            case 0:
                changed[place] ^= 1 << draw.randrange(8)
            case 1:
                changed[place] = draw.randrange(256)
            case 2 | 3:  # a number that means something
                width = draw.choice([1, 2, 4, 8])
                number = (draw.choice(NUMBERS) % 256**width).to_bytes(width, draw.choice(["little", "big"]))
                changed[place : place + width] = number
            case 4:
                del changed[place : place + draw.choice([1, 4, 100, len(changed)])]
            case 5:
                changed[place:place] = draw.randbytes(draw.choice([1, 4, 1000]))
            case _:
                changed += draw.choice(
                    [data, data[: len(data) // 2], bytes(500), b"TAG" + bytes(125), draw.randbytes(300)]
                )
        if not changed:
            return bytes(draw.randbytes(3))
    return bytes(changed)


def test_any_damage_to_a_recording_is_refused_or_its_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    draw = random.Random(SEED)
    bases = [
        encoded(form, subtype, 0.6, 8000 if subtype in ("GSM610", "G721_32", "NMS_ADPCM_32") else 16000)
        for form, subtype in FORMATS
    ]
    bases += [without_xing(encoded("MP3", "MPEG_LAYER_III", 0.6, bitrate_mode="VARIABLE"))]
    paths = []
    for number in range(20 * len(bases)):
        paths.append(tmp_path / f"{number}.wav")
        paths[-1].write_bytes(damaged(draw, bases[number % len(bases)], 100))
    requests = [Request(str(path)) for path in paths]
    with in_time("index"):
        answers = dict(probe_recordings(iter(requests), len(requests), 2, Limits(seconds=10)))
    from pretrain.data.utterance import Utterance

    num_read = 0
    for number, answer in answers.items():
        if isinstance(answer, str):
            assert answer and "\n" not in answer and "Traceback" not in answer
            continue
        start, num_samples, rate = answer
        utterance = Utterance("u", str(paths[number]), start, num_samples, rate)
        with in_time(paths[number]):
            whole = load_audio(utterance)
            first = draw.randrange(max(1, len(whole) - 400))
            try:  # libsndfile cannot search some damaged FLAC
                part = load_audio(utterance, first, 400)
            except ValueError as error:
                assert str(paths[number]) in str(error) and "cannot be decoded" in str(error)  # noqa: PT017
            else:
                np.testing.assert_array_equal(part, whole[first : first + 400], err_msg=str(paths[number]))
        assert len(whole) == utterance.length and np.isfinite(whole).all()
        num_read += 1
    assert len(answers) // 5 < num_read < len(answers), "damage shows in some, and some of it does no harm"


def test_every_length_is_that_of_a_second_decoder(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV, the second decoder, is not installed")
    draw = random.Random(SEED)
    checked = 0
    for number in range(120):  # FFmpeg cannot decode NMS ADPCM, and leaves out the last packet of an ALAC
        form, subtype = draw.choice([pair for pair in FORMATS if pair[1] not in ("NMS_ADPCM_32", "ALAC_16")])
        rates = {"GSM610": [8000], "G721_32": [8000], "OPUS": [48000]}.get(
            subtype, [8000, 11025, 16000, 22050, 24000, 44100, 48000]
        )
        channels = 1 if subtype in ("GSM610", "G721_32") else draw.choice([1, 2])
        keys: dict[str, object] = {}
        if form == "MP3":
            keys = {
                "bitrate_mode": draw.choice(["CONSTANT", "AVERAGE", "VARIABLE"]),
                "compression_level": draw.random(),
            }
        # FFmpeg does not cut the end of a Vorbis in one page
        seconds = (1.5 if form == "OGG" else 0.1) + 3 * draw.random()
        data = encoded(form, subtype, seconds, draw.choice(rates), channels, **keys)
        # no room in the smallest frames
        if form == "MP3" and draw.random() < 0.5 and (b"Xing" in data[:60] or b"Info" in data[:60]):
            data = without_xing(data)
        if form == "MP3" and draw.random() < 0.3:
            data = b"ID3\x04\0\0\0\0\x02\x01" + bytes(257) + data + b"TAG" + bytes(125)
        if form == "FLAC" and draw.random() < 0.5:  # to a pipe
            data = (
                data[:18] + (int.from_bytes(data[18:26], "big") & ~(2**36 - 1)).to_bytes(8, "big") + data[26:]
            )
        if form == "WAV" and subtype != "IMA_ADPCM" and draw.random() < 0.5:
            place = data.index(b"data") + 4
            if place + 4 + int.from_bytes(data[place : place + 4], "little") == len(data):
                data = (
                    data[:place]
                    + struct.pack("<I", draw.choice([0xFFFFFFFF, 0x7FFFF000]))
                    + data[place + 4 :]
                )
        path = tmp_path / f"{number}.{form.lower()}"
        path.write_bytes(data)
        with av.open(str(path)) as container:
            expected = sum(frame.samples for frame in container.decode(audio=0))
        [(_, answer)] = probe_recordings(iter([Request(str(path))]), 1, 1, Limits())
        assert not isinstance(answer, str), (answer, path)
        assert answer[1] == expected, path
        checked += 1
    assert checked == 120


# Commands


def ends_well(argv: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """Run a command; its status, which is 0 or 2. Any exception but a ValueError, which a user sees as a
    message, comes out of it."""
    with in_time(argv):
        status = wordless.cli.main(argv)
    text = capsys.readouterr()
    assert status in (0, 2), (argv, status, text.err)
    assert "Traceback" not in text.err and (status == 0 or text.err.strip()), argv
    return status


def mangled(draw: random.Random, text: str) -> bytes:
    """A text with lines, numbers, words and characters that are others."""
    lines = text.splitlines(keepends=True)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(lines))
        match draw.randrange(8):
            case 0:
                del lines[at : at + draw.randint(1, 3)]
            case 1:
                lines.insert(at, lines[draw.randrange(len(lines))])
            case 2:
                numbers = ["-1", "0", "1e400", "nan", "9" * 30, "true", '""', "[]", "{}", "0.5", "'ä'"]
                lines[at] = re.sub(r"-?\b\d[\d.e-]*\b", draw.choice(numbers), lines[at], count=1)
            case 3:
                lines[at] = re.sub(
                    r'"[^"]*"',
                    lambda _: draw.choice(['""', '"\\u0000"', '"~"', '"$NOWHERE"', "7", '["x"]', '"@x"']),
                    lines[at],
                )
            case 4:
                lines[at] = lines[at].replace(
                    draw.choice("=_,:[]{}\"'\t "), draw.choice(["", "=", "\t", "ü", "\x00", "{"]), 1
                )
            case 5:
                lines[at] = (
                    draw.choice(["\ufeff", "[x]\n", "x = 1\n", "a.b.c = 'd'\n", "\u2028", '"' * 3])
                    + lines[at]
                )
            case 6:
                lines[at] = lines[at][: draw.randrange(len(lines[at]) + 1)]
            case _:
                lines[at] = lines[at].swapcase()
        if not lines:
            return b""
    data = "".join(lines).encode("utf-8", "surrogatepass")
    if draw.random() < 0.1:
        data = data.decode("utf-8", "ignore").encode(
            "utf-16" if draw.random() < 0.5 else "latin-1", "replace"
        )
    return data


def test_any_config_is_valid_or_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(SEED)
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").glob("*.toml"))]
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        texts += [
            block
            for block in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
            if "verb =" in block
        ]
    assert len(texts) > 20
    statuses = []
    for number in range(400):
        path = tmp_path / f"{number}.toml"
        path.write_bytes(mangled(draw, texts[number % len(texts)]))
        statuses.append(ends_well(["check", str(path)], capsys))
        if number % 8 == 0:
            verb = next(
                (verb for verb in VERBS if f'verb = "{verb}"' in texts[number % len(texts)]),
                None,
            )
            assert verb is not None
            ends_well([verb, str(path), "--dry-run"], capsys)
            ends_well(["run", str(path), "--dry-run", "run=x"], capsys)
    assert 0 in statuses and 2 in statuses
    assert not list(tmp_path.glob("*/")), "nothing was written"


def sources(folder: Path) -> dict[str, str]:
    """Lists of three recordings as people have them, by name."""
    for name in ("a", "b", "c"):
        soundfile.write(folder / f"{name}.wav", 0.1 * np.ones(3200), 16000)
        (folder / f"{name}.txt").write_text("one two\n", encoding="utf-8")
    rows = [
        {
            "audio_filepath": f"{name}.wav",
            "id": name,
            "text": "one two",
            "speaker": name,
            "split": split,
            "duration": 0.2,
            "offset": 0.0,
            "phones": [[0.0, 0.1, "w"], [0.1, 0.2, "ʌ"]],
            "words": [[0.0, 0.1, "one"], [0.1, 0.2, "two"]],
        }
        for name, split in zip("abc", ("train", "dev", "test"), strict=True)
    ]
    alignments = "".join(
        json.dumps({"id": row["id"], "phones": row["phones"]}, ensure_ascii=False) + "\n" for row in rows
    )
    return {
        "list.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "list.tsv": f"{folder}\n" + "".join(f"{name}.wav\t3200\n" for name in "abc"),
        "list.wrd": "one two\n" * 3,
        "alignments.jsonl": alignments,
    }


def test_any_list_of_recordings_becomes_a_manifest_or_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(SEED)
    texts = sources(tmp_path)
    statuses = []
    for number in range(40):
        for name, text in texts.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        victim = draw.choice(list(texts))
        (tmp_path / victim).write_bytes(mangled(draw, texts[victim]))
        source = "list.jsonl" if victim in ("list.jsonl", "alignments.jsonl") else "list.tsv"
        more = ["alignments=alignments.jsonl"] if victim == "alignments.jsonl" else []
        out = tmp_path / f"m{number}"
        statuses.append(
            ends_well(
                ["index", source, str(out), *more, "max_bad_share=0.7", "verify=header", "workers=1"], capsys
            )
        )
        if statuses[-1] == 0:
            assert all(len(load_audio(utterance)) == utterance.length for utterance in Manifest(out))
            ends_well(["check", str(out)], capsys)
        else:
            assert not (out / "meta.json").exists()
    assert 0 in statuses and 2 in statuses


def test_any_damage_to_a_manifest_is_a_message_or_does_no_harm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(SEED)
    for name, text in sources(tmp_path).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert ends_well(["index", "list.jsonl", "m", "workers=1"], capsys) == 0
    files = {name: (tmp_path / "m" / name).read_bytes() for name in ("manifest.parquet", "meta.json")}
    config = 'verb = "cluster"\nmanifest = "m"\nfeatures = "mfcc"\nnum_classes = 4\nframes = 20\nout = "c"\n'
    (tmp_path / "cluster.toml").write_text(config, encoding="utf-8")
    statuses = []
    for number in range(80):
        victim = draw.choice(list(files))
        for name, data in files.items():
            (tmp_path / "m" / name).write_bytes(data)
        (tmp_path / "m" / victim).write_bytes(damaged(draw, files[victim], len(files[victim])))
        statuses.append(ends_well(["check", "m"], capsys))
        ends_well(["cluster", "cluster.toml", f"out=c{number}", "split="], capsys)
    assert 2 in statuses


def test_the_seed_draws_the_same_damage() -> None:
    data = encoded("WAV", "PCM_16", 0.1)
    twice = [
        [damaged(draw, data, 50) for _ in range(20)] for draw in (random.Random(SEED), random.Random(SEED))
    ]
    assert twice[0] == twice[1] and len(set(twice[0])) > 10 and io.BytesIO(data).read(4) == b"RIFF"
