"""Recordings whose headers are wrong are read whole, or refused with the true reason; a part is the same
samples as in the whole."""

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pretrain.data.audio import load_audio, probe_audio
from pretrain.data.decoding import libsndfile, mpeg
from pretrain.data.decoding.recordings import open_recording
from pretrain.data.decoding.spans import Member
from pretrain.data.utterance import Utterance

CASES = Path(__file__).parents[5] / "shared/data/cases"
RNG = np.random.default_rng(0)


def sound(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """Loud and soft, with silence at the beginning: (samples, channels)."""
    time = np.arange(round(seconds * rate)) / rate
    wave = 0.4 * np.sin(2 * np.pi * 0.02 * rate * time * (1 + 0.3 * np.sin(time))) * (np.sin(2.1 * time) > 0)
    wave += (
        0.15 * np.random.default_rng(len(time)).standard_normal(len(time)) * (np.sin(1.3 * time - 0.6) > 0)
    )
    return np.stack([wave, 0.5 * wave[::-1]], axis=1)[:, :channels].clip(-1, 1)


def encoded(
    form: str, subtype: str, seconds: float = 3.0, rate: int = 16000, channels: int = 1, **keys: object
) -> bytes:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, channels, subtype, format=form, **keys) as file:
        # libsndfile crashes on long Vorbis blocks
        for block in np.array_split(sound(seconds, rate, channels), max(1, round(seconds))):
            file.write(block)
    return buffer.getvalue()


def everything(path: Path, most: int = 1 << 24, member: Member | None = None) -> np.ndarray:
    with open_recording(str(path), member) as recording:
        return np.concatenate(list(recording.blocks(0, recording.num_samples, most)))


def expected(data: bytes) -> np.ndarray:
    # soundfile.read() would seek, after which some mp3 have other last bits
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        decoded: np.ndarray = file.read(file.frames, dtype="float32", always_2d=True)
    return decoded


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# What lies in the cases, with lengths from a second decoder

TRUE = {
    "chained_ogg.ogg": (192_000, 16000),
    "data_short_header.wav": (32_000, 16000),
    "gsm610.wav": (16_000, 8000),
    "segments.mp3": (960_000, 16000),
    "sox_pipe.wav": (32_000, 16000),
    "vbr_without_header.mp3": (2402 * 576, 16000),
}


@pytest.mark.parametrize("name", TRUE)
def test_the_recordings_that_went_wrong_are_read_whole(name: str) -> None:
    if not CASES.is_dir():
        pytest.skip("../shared/data/cases is not here")
    num_samples, rate = TRUE[name]
    for decode in (True, False):
        assert probe_audio(str(CASES / name), decode=decode) == (0, num_samples, rate)
    wave = load_audio(Utterance("u", str(CASES / name), 0, num_samples, rate))
    # one ends with silence
    assert len(wave) == num_samples * 16000 // rate and np.abs(wave[-int(0.6 * len(wave)) :]).max() > 0.01


# Parts

FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("WAV", "ULAW"),
    ("WAV", "IMA_ADPCM"),
    ("WAV", "MS_ADPCM"),
    ("WAV", "GSM610"),
    ("WAV", "G721_32"),
    ("WAV", "NMS_ADPCM_32"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
    ("NIST", "PCM_16"),
    ("AIFF", "PCM_16"),
    ("AU", "PCM_16"),
    ("CAF", "ALAC_16"),
    ("W64", "PCM_16"),
    ("RF64", "PCM_16"),
]
RATES = {
    "OPUS": (8000, 16000, 48000),
    "GSM610": (8000,),
    "G721_32": (8000,),
    "NMS_ADPCM_32": (8000,),
    "VORBIS": (8000, 16000, 44100, 48000),
}
ANY_RATE = (8000, 11025, 16000, 22050, 44100, 48000)


@pytest.mark.parametrize(("form", "subtype"), FORMATS)
def test_any_part_of_any_format_is_the_same_samples_as_in_the_whole(
    tmp_path: Path, form: str, subtype: str
) -> None:
    rng = np.random.default_rng(1)
    rates = RATES.get(subtype, ANY_RATE if form == "MP3" else (16000, 44100))
    for rate in rates:
        for channels in (1,) if subtype in ("GSM610", "G721_32", "NMS_ADPCM_32") else (1, 2):
            # long enough for three of mpeg's blocks
            data = encoded(form, subtype, 25.0 if form == "MP3" and rate > 16000 else 12.0, rate, channels)
            path = written(tmp_path / f"{rate}_{channels}", data)
            whole = everything(path)
            np.testing.assert_array_equal(whole, expected(data))
            starts = [
                0,
                1,
                len(whole) - 700,
                len(whole) - 3000,
                *rng.integers(0, len(whole) - 3000, 8).tolist(),
            ]
            for start in starts:  # some in order and some not, since a thread keeps its decoder
                with open_recording(str(path), None, needed=start + 3000) as recording:
                    part = np.concatenate(list(recording.blocks(start, 3000, 1 << 24)))
                np.testing.assert_array_equal(
                    part, whole[start : start + 3000], err_msg=f"{rate} Hz, {channels} channels, from {start}"
                )


def test_the_last_page_of_a_vorbis_is_read_where_it_lies(tmp_path: Path) -> None:
    # libsndfile puts these parts 48 samples off
    path = written(tmp_path / "a.ogg", encoded("OGG", "VORBIS", 20.0, 44100))
    whole = everything(path)
    for start in range(len(whole) - 9000, len(whole) - 100, 517):
        with open_recording(str(path), None, needed=len(whole)) as recording:
            np.testing.assert_array_equal(
                np.concatenate(list(recording.blocks(start, 100, 1 << 24))), whole[start : start + 100]
            )


def test_a_recording_that_only_goes_forward_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.opus", encoded("OGG", "OPUS", 6.0))
    whole, opened = everything(path), []
    sequential = libsndfile._Sequential
    monkeypatch.setattr(libsndfile, "_Sequential", lambda *given: opened.append(given) or sequential(*given))  # type: ignore[func-returns-value]
    monkeypatch.setattr(libsndfile._kept, "decoder", None)
    for start in range(0, len(whole) - 1000, 7000):
        part = load_audio(Utterance("u", str(path), start, 1000, 16000))
        np.testing.assert_array_equal(part, whole[start : start + 1000, 0])
    assert len(opened) == 1
    load_audio(Utterance("u", str(path), 0, 1000, 16000))
    assert len(opened) == 2
    path.write_bytes(encoded("OGG", "OPUS", 5.0))  # another recording of that name
    os.utime(path, (1, 1))
    assert len(load_audio(Utterance("u", str(path), 60_000, 1000, 16000))) == 1000 and len(opened) == 3


# MPEG audio


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000])
@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
def test_an_mp3_in_blocks_is_what_libsndfile_decodes_at_once(
    tmp_path: Path, mode: str, rate: int, channels: int
) -> None:
    seconds = 2.3 * mpeg.BLOCK_FRAMES * (1152 if rate >= 32000 else 576) / rate
    data = encoded("MP3", "MPEG_LAYER_III", seconds, rate, channels, bitrate_mode=mode, compression_level=0.5)
    np.testing.assert_array_equal(everything(written(tmp_path / "a.mp3", data)), expected(data))


def without_xing(data: bytes) -> bytes:
    """The frames alone, as from a stream."""
    kind, size = mpeg.parse_header(data[:4]) or (None, 0)
    assert kind is not None and data[4 + kind.side : 8 + kind.side] in (b"Xing", b"Info")
    return data[size:]


@pytest.mark.parametrize("rate", [16000, 44100])
def test_an_mp3_of_variable_bit_rate_without_a_header_is_read_whole(tmp_path: Path, rate: int) -> None:
    data = encoded("MP3", "MPEG_LAYER_III", 20.0, rate, bitrate_mode="VARIABLE", compression_level=0.2)
    bare = without_xing(data)
    frames = mpeg.walk(str(written(tmp_path / "a.mp3", bare)), 0, len(bare))
    assert frames is not None
    num_samples = len(frames.places) * frames.kind.samples
    assert num_samples >= 20 * rate and soundfile.info(io.BytesIO(bare)).frames != num_samples  # the estimate
    for decode in (True, False):
        assert probe_audio(str(tmp_path / "a.mp3"), decode=decode) == (0, num_samples, rate)
    # The decoder's first 529 samples and the encoder's 576 are trimmed where a header counts them.
    whole = everything(tmp_path / "a.mp3")
    np.testing.assert_array_equal(
        whole[529 + 576 : 529 + 576 + 20 * rate], everything(written(tmp_path / "b.mp3", data))
    )


def test_an_mp3_that_begins_with_silence_is_not_truncated(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    wave = np.concatenate([np.zeros(16000 * 5), sound(5.0, 16000)[:, 0]])
    soundfile.write(buffer, wave, 16000, format="MP3", bitrate_mode="VARIABLE", compression_level=0.1)
    start, num_samples, _ = probe_audio(str(written(tmp_path / "a.mp3", without_xing(buffer.getvalue()))))
    assert start == 0 and 160_000 <= num_samples <= 160_000 + 4 * 576


def test_what_lies_between_the_frames_of_an_mp3_is_left_out(tmp_path: Path) -> None:
    data = encoded("MP3", "MPEG_LAYER_III", 3.0)
    plain = everything(written(tmp_path / "plain.mp3", data))
    id3 = b"ID3\x04\0\0\0\0\x02\x01" + bytes(257)
    for name, tagged in {
        "before": id3 + data,
        "two before": id3 + id3 + data,
        "behind": data + b"TAG" + bytes(125),
        "ape": data + b"APETAGEX" + struct.pack("<IIII8x", 2000, 32, 0, 0) + b"x" * 32,
    }.items():
        np.testing.assert_array_equal(
            everything(written(tmp_path / f"{name}.mp3", tagged)), plain, err_msg=name
        )
    twice = everything(written(tmp_path / "twice.mp3", data + id3 + data))
    assert len(twice) >= 2 * len(plain) and len(twice) % 576 == (-mpeg.DECODER_DELAY - 576) % 576
    np.testing.assert_array_equal(twice[: len(plain)], plain)
    assert probe_audio(str(tmp_path / "twice.mp3"), decode=False) == (0, len(twice), 16000)


def test_an_mp3_with_a_xing_header_that_counts_too_few_frames_is_read_whole(tmp_path: Path) -> None:
    data = bytearray(encoded("MP3", "MPEG_LAYER_III", 3.0))
    place = max(data.find(b"Xing"), data.find(b"Info"))
    data[place + 8 : place + 12] = struct.pack(">I", 10)
    whole = everything(written(tmp_path / "a.mp3", bytes(data)))
    assert len(whole) >= 48_000 and probe_audio(str(tmp_path / "a.mp3"))[1] == len(whole)


def test_an_mp3_that_changes_its_rate_or_channels_is_refused(tmp_path: Path) -> None:
    first = encoded("MP3", "MPEG_LAYER_III", 1.0)
    for second in (
        encoded("MP3", "MPEG_LAYER_III", 1.0, 22050),
        encoded("MP3", "MPEG_LAYER_III", 1.0, channels=2),
    ):
        with pytest.raises(
            ValueError, match=rf"changes from 16000 Hz mono to .* at byte {len(first)}; split it"
        ):
            probe_audio(str(written(tmp_path / "a.mp3", first + second)))


def test_a_frame_emptied_keeps_its_checksum_right() -> None:
    kind = mpeg.Kind(3, 3, 44100, 2)
    frame = bytes.fromhex("fffa9064") + bytes(2) + RNG.bytes(32 + 379)
    emptied = mpeg._emptied(frame, kind)
    assert emptied[38:] == frame[38:] and emptied[8:38] == bytes(30)
    assert int.from_bytes(emptied[6:8], "big") >> 7 == int.from_bytes(frame[6:8], "big") >> 7
    value = 0xFFFF  # bit by bit, as ISO 11172-3 section 2.4.3.1 has it
    for bit in "".join(f"{byte:08b}" for byte in emptied[2:4] + emptied[6:38]):
        value = (value << 1 ^ (0x8005 if (value >> 15) ^ int(bit) else 0)) & 0xFFFF
    assert value == int.from_bytes(emptied[4:6], "big")


# Several recordings, one after the other


@pytest.mark.parametrize(
    ("form", "subtype"),
    [("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", "PCM_16"), ("WAV", "PCM_16"), ("RF64", "PCM_16")],
)
@pytest.mark.parametrize("same", [True, False])
def test_recordings_appended_to_one_another_are_read_on(
    tmp_path: Path, form: str, subtype: str, same: bool
) -> None:
    parts = [encoded(form, subtype, seconds) for seconds in ((1.0, 1.0, 1.0) if same else (1.0, 2.5, 0.5))]
    whole = np.concatenate([expected(part) for part in parts])
    path = written(tmp_path / "a", b"".join(parts))
    np.testing.assert_array_equal(everything(path), whole)
    np.testing.assert_array_equal(
        everything(
            written(tmp_path / "tar", b"x" * 512 + path.read_bytes() + b"y" * 9),
            member=Member(512, path.stat().st_size),
        ),
        whole,
    )
    assert probe_audio(str(path)) == (0, len(whole), 16000)
    if not same or form in (
        "WAV",
        "RF64",
    ):  # of one length: the end of the file looks as that of the first would
        assert probe_audio(str(path), decode=False) == (0, len(whole), 16000)
    for start in (0, 7000, 15_990, 16_000, len(whole) - 900):
        part = load_audio(Utterance("u", str(path), start, 900, 16000))
        np.testing.assert_array_equal(part, whole[start : start + 900, 0])


def test_parts_of_several_rates_are_refused(tmp_path: Path) -> None:
    for form, subtype in (("OGG", "VORBIS"), ("FLAC", "PCM_16"), ("WAV", "PCM_16")):
        first = encoded(form, subtype, 1.0)
        with pytest.raises(ValueError, match=rf"changes from 16000 to 8000 Hz at byte {len(first)}"):
            probe_audio(str(written(tmp_path / "a", first + encoded(form, subtype, 1.0, 8000))))
        with pytest.raises(ValueError, match=rf"changes from 1 to 2 channels at byte {len(first)}"):
            probe_audio(str(written(tmp_path / "a", first + encoded(form, subtype, 1.0, channels=2))))


# Lengths in headers


def data_size(data: bytes, size: int) -> bytes:
    place = data.index(b"data") + 4
    return data[:place] + struct.pack("<I", size) + data[place + 4 :]


UNKNOWN = [
    0,
    0xFFFFFFFF,
    0x7FFFFFFF,
    0x80000000,
    0x7FFFF000,
    0x80000000 - 44,
    0xFFFFFFFF - 36,
    0x7FFFFFFF - 36,
    0xFFFFFFFF - 44 - 8,
]


@pytest.mark.parametrize("size", UNKNOWN)
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT", "GSM610", "IMA_ADPCM"])
def test_a_wav_that_was_written_to_a_pipe_is_read_to_its_end(tmp_path: Path, subtype: str, size: int) -> None:
    whole = encoded("WAV", subtype, 2.0, 8000)
    start = whole.index(b"data") + 8
    for riff in (size, min(0xFFFFFFFF, size + 36), 0):
        data = bytearray(data_size(whole[: start + int.from_bytes(whole[start - 4 : start], "little")], size))
        data[4:8] = struct.pack("<I", riff)
        for decode in (True, False):
            assert probe_audio(str(written(tmp_path / "a.wav", bytes(data))), decode=decode) == probe_audio(
                str(written(tmp_path / "b.wav", whole))
            )
        np.testing.assert_array_equal(everything(tmp_path / "a.wav"), everything(tmp_path / "b.wav"))


@pytest.mark.parametrize("form", ["WAV", "RF64", "AU", "FLAC"])
def test_a_header_that_counts_less_than_the_file_holds_is_corrected(tmp_path: Path, form: str) -> None:
    whole = encoded(form, "PCM_16", 2.0)
    match form:
        case "WAV":
            short = data_size(whole, 32_000)
        case "RF64":
            short = whole[:28] + struct.pack("<Q", 32_000) + whole[36:]
        case "AU":
            short = whole[:8] + struct.pack(">I", 32_000) + whole[12:]
        case _:
            about = int.from_bytes(whole[18:26], "big") & ~(2**36 - 1) | 16_000
            short = whole[:18] + about.to_bytes(8, "big") + whole[26:]
    assert soundfile.info(io.BytesIO(short)).frames == 16_000
    path = written(tmp_path / "a", short)
    for decode in (True, False):
        assert probe_audio(str(path), decode=decode) == (0, 32_000, 16000)
    np.testing.assert_array_equal(everything(path), expected(whole))
    np.testing.assert_array_equal(
        load_audio(Utterance("u", str(path), 20_000, 12_000, 16000)), expected(whole)[20_000:, 0]
    )


@pytest.mark.parametrize("form", ["AIFF", "NIST", "W64", "CAF"])
def test_a_header_that_counts_less_than_the_file_holds_is_refused_where_it_cannot_be_corrected(
    tmp_path: Path, form: str
) -> None:
    whole = bytearray(encoded(form, "PCM_16", 2.0))
    assert probe_audio(str(written(tmp_path / "whole", bytes(whole)))) == (0, 32_000, 16000)
    match form:
        case "AIFF":
            place = whole.index(b"COMM") + 10
            whole[place : place + 4] = struct.pack(">I", 16_000)
        case "NIST":
            whole[: whole.index(b"end_head")] = whole[: whole.index(b"end_head")].replace(
                b"-i 32000\n", b"-i 16000\n", 1
            )
        case "W64":
            place = whole.index(b"data") + 16
            whole[place : place + 8] = struct.pack("<Q", 24 + 32_000)
        case _:
            place = whole.index(b"data") + 4
            whole[place : place + 8] = struct.pack(">Q", 4 + 32_000)
    for decode in (True, False):
        with pytest.raises(ValueError, match=r"counts \d+ of \d+ bytes of samples; write it again"):
            probe_audio(str(written(tmp_path / "a", bytes(whole))), decode=decode)


@pytest.mark.parametrize(
    "behind",
    [
        b"LIST\x08\0\0\0INFOabcd",
        b"LIST\x08\0\0\0INFOabcdid3 \x04\0\0\0abcd",
        b"LIST\xff\0\0\0INFO",
        b"TAG" + bytes(125),
        bytes(2000),
        b"my1 \x03\0\0\0abc\0",
        b"ab",
    ],
)
def test_what_follows_the_samples_of_a_wav_is_not_sound(tmp_path: Path, behind: bytes) -> None:
    whole = encoded("WAV", "PCM_16", 1.0)
    for decode in (True, False):
        assert probe_audio(str(written(tmp_path / "a.wav", whole + behind)), decode=decode) == (
            0,
            16_000,
            16000,
        )


def test_a_flac_that_was_written_to_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    for subtype in ("PCM_16", "PCM_24"):
        for channels in (1, 2):
            whole = encoded("FLAC", subtype, 2.1, 16000, channels)
            about = int.from_bytes(whole[18:26], "big") & ~(2**36 - 1)
            path = written(tmp_path / "a.flac", whole[:12] + bytes(6) + about.to_bytes(8, "big") + whole[26:])
            for tagged in (
                path.read_bytes(),
                b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + path.read_bytes() + b"TAG" + bytes(125),
            ):
                for decode in (True, False):
                    assert probe_audio(str(written(path, tagged)), decode=decode) == (0, 33_600, 16000)
                np.testing.assert_array_equal(everything(path), expected(whole))
            path.write_bytes(path.read_bytes()[:-200])
            with pytest.raises(
                ValueError, match="does not say how long it is, and its last frame is damaged"
            ):
                probe_audio(str(path))


def test_an_ogg_whose_last_page_ends_before_another_is_refused(tmp_path: Path) -> None:
    from tests.faults.hostile_audio import ogg_claiming

    data = ogg_claiming(100)
    pages: Callable[[bytes], int] = lambda data: data.count(b"OggS")  # noqa: E731
    assert pages(data) >= 4
    with pytest.raises(ValueError, match="last page ends at sample 100, one before it at "):
        probe_audio(str(written(tmp_path / "a.ogg", data)))


def test_a_wav_with_more_samples_than_its_header_can_count_is_refused(tmp_path: Path) -> None:
    header = data_size(encoded("WAV", "PCM_16", 0.1)[:44], 0xFFFFFFFF)
    path = written(tmp_path / "a.wav", header)
    with open(path, "r+b") as file:
        file.truncate(44 + 5 * 2**30)  # a hole
    with pytest.raises(
        ValueError,
        match="has 5368709120 bytes of samples, which its header cannot count; write it again as FLAC or "
        "RF64",
    ):
        probe_audio(str(path), decode=False)


@pytest.mark.parametrize("size", [2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("form", ["W64", "CAF", "RF64"])
def test_a_length_of_64_bits_that_is_not_known_is_read_to_the_end(
    tmp_path: Path, form: str, size: int
) -> None:
    whole = bytearray(encoded(form, "PCM_16", 1.0))
    start, order = {
        "W64": (whole.index(b"data") + 16, "<Q"),
        "CAF": (whole.index(b"data") + 4, ">Q"),
        "RF64": (28, "<Q"),
    }[form]
    whole[start : start + 8] = struct.pack(order, size)
    path = written(tmp_path / "a", bytes(whole))
    for decode in (True, False):
        assert probe_audio(str(path), decode=decode) == (0, 16_000, 16000)
    np.testing.assert_array_equal(everything(path), expected(encoded("WAV", "PCM_16", 1.0)))


def test_after_an_error_a_decoder_that_only_goes_forward_is_not_used_again(tmp_path: Path) -> None:
    path = written(tmp_path / "a.opus", encoded("OGG", "OPUS", 3.0))
    whole = everything(path)
    decoder = libsndfile._sequential(libsndfile.Place(str(path), 0, path.stat().st_size), 0)
    blocks = decoder.blocks(0, 20_000, 4000)
    next(blocks)
    blocks.close()  # as where what it gave is refused
    part = load_audio(Utterance("u", str(path), 4500, 1000, 16000))
    np.testing.assert_array_equal(part, whole[4500:5500, 0])
