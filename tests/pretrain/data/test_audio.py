from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data import audio
from pretrain.data.audio import load_audio, probe_audio
from pretrain.data.utterance import Phone, Utterance, num_frames, phone_frames

RATES = [8000, 16000, 22050, 44100, 48000]


def tone(seconds: float, rate: int, hz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def whole(path: Path, **changes: int) -> Utterance:
    start, num_samples, rate = probe_audio(str(path))
    return replace(Utterance("u", str(path), start, num_samples, rate), **changes)  # type: ignore[arg-type]


@given(st.integers(0, 5000))
def test_frames_are_the_windows_that_fit(num_samples: int) -> None:
    assert num_frames(num_samples) == sum(start + 400 <= num_samples for start in range(0, 5000, 320))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_every_rate_width_and_channel_count_becomes_the_same_waveform(
    tmp_path: Path, rate: int, channels: int, subtype: str
) -> None:
    path = tmp_path / "tone.wav"
    wave = tone(0.7001, rate)
    soundfile.write(
        path, wave if channels == 1 else np.stack([1.5 * wave, 0.5 * wave], axis=1), rate, subtype=subtype
    )
    utterance = whole(path)
    loaded = load_audio(utterance)
    assert loaded.dtype == np.float32 and loaded.shape == (utterance.length,) == (len(wave) * 16000 // rate,)
    expected = tone(1, 16000)[: len(loaded)]
    # 16-bit rounding is 1.5e-5; the resampler rings within a few milliseconds of the cut ends only.
    tolerance = 5e-5 if rate == 16000 else 1e-3
    assert np.abs(loaded - expected)[500:-500].max() < tolerance


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [("wav", "PCM_16"), ("flac", "PCM_16"), ("wav", "PCM_24"), ("wav", "PCM_U8"), ("wav", "FLOAT")],
)
def test_samples_are_libsndfiles_own_floats_to_the_bit(
    tmp_path: Path, suffix: str, subtype: str, channels: int
) -> None:
    wave = np.random.default_rng(0).uniform(-1, 1, (4000, channels))
    wave[:2] = [[-1.0], [1.0]]  # the ends of the range, where rounding would show
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, wave, 16000, subtype=subtype)
    expected = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
    read = load_audio(Utterance(id="a", path=str(path), start=0, num_samples=4000, sample_rate=16000))
    assert read.dtype == np.float32 and read.flags.c_contiguous and np.array_equal(read, expected)


@pytest.mark.parametrize(("suffix", "tolerance"), [("flac", 5e-5), ("ogg", 0.05), ("mp3", 0.05)])
def test_compressed_formats_decode_to_the_length_they_were_written_with(
    tmp_path: Path, suffix: str, tolerance: float
) -> None:
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, tone(1.3, 16000), 16000)
    loaded = load_audio(whole(path))
    assert len(loaded) == 20800
    # lossy: within a tenth of the amplitude
    assert np.abs(loaded - tone(1.3, 16000))[1000:-1000].max() < tolerance


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@given(start=st.integers(0, 15000), num_samples=st.integers(400, 900))
def test_a_segment_equals_the_slice_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, start: int, num_samples: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"whole.{suffix}"
    if not path.exists():
        soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 16000), 16000)
    segment = load_audio(whole(path, start=start, num_samples=num_samples))
    np.testing.assert_array_equal(segment, load_audio(whole(path))[start : start + num_samples])
    np.testing.assert_array_equal(load_audio(whole(path), start, num_samples), segment)


@given(
    rate=st.sampled_from([*RATES, 11025, 12345]),
    start=st.integers(0, 3000),
    num_samples=st.integers(1300, 4000),
    data=st.data(),
)
def test_resampled_segments_and_parts_of_them_have_exactly_the_promised_samples(
    tmp_path_factory: pytest.TempPathFactory, rate: int, start: int, num_samples: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / f"rate{rate}.wav"
    if not path.exists():
        soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 8000), rate)
    utterance = whole(path, start=start, num_samples=num_samples)
    wave = load_audio(utterance)
    assert len(wave) == utterance.length == num_samples * 16000 // rate
    first = data.draw(st.integers(0, utterance.length - 1))
    count = data.draw(st.integers(1, utterance.length - first))
    np.testing.assert_array_equal(load_audio(utterance, first, count), wave[first : first + count])


def test_of_a_long_recording_only_the_part_is_read(tmp_path: Path) -> None:
    path = tmp_path / "day.wav"  # 24 hours, nearly all of it a hole: reading it whole would need 5.5 GB
    soundfile.write(path, tone(1, 16000), 16000)
    with open(path, "r+b") as file:
        data = bytearray(file.read(44))
        size = 24 * 3600 * 16000 * 2
        data[4:8], data[40:44] = (size + 36).to_bytes(4, "little"), size.to_bytes(4, "little")
        file.seek(0)
        file.write(data)
        file.truncate(44 + size)
        file.seek(44 + 2 * 12 * 3600 * 16000)
        file.write(np.full(16000, 1000, "<i2").tobytes())
    day = Utterance("u", str(path), 0, 24 * 3600 * 16000, 16000)
    assert (load_audio(day, 12 * 3600 * 16000, 16000) == np.float32(1000 / 32768)).all()


def make_bad(kind: str, folder: Path) -> Path:
    """A recording of each kind that cannot be used."""
    path = folder / f"{kind}.wav"
    wave = tone(1, 16000)
    match kind:
        case "missing":
            return path
        case "empty":
            path.touch()
        case "unreadable":
            path.write_bytes(b"this is not audio" * 100)
        case "folder":
            path.mkdir()
        case "zero-sample":
            soundfile.write(path, wave[:0], 16000)
        case "short":
            soundfile.write(path, wave[:399], 16000)
        case "short at 48 kHz":
            soundfile.write(path, wave[:1199], 48000)
        case "NaN" | "Inf":
            wave[12345] = float(kind)
            soundfile.write(path, wave, 16000, subtype="FLOAT")
        case "truncated":
            soundfile.write(path, wave, 16000)
            path.write_bytes(path.read_bytes()[:20000])
        case "truncated flac" | "truncated mp3":
            path = path.with_suffix("." + kind.split()[1])
            soundfile.write(path, wave, 16000)
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2])
    return path


BAD = {
    "missing": "no such file",
    "empty": "empty",
    "unreadable": "cannot be decoded",
    "folder": "no such file",
    "zero-sample": "no samples",
    "short": "too short: 399",
    "short at 48 kHz": "too short: 399",
    "NaN": "NaN",
    "Inf": "NaN or infinite",
    "truncated": "truncated",
    "truncated flac": "truncated",
    "truncated mp3": "truncated",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_an_error_that_says_why(tmp_path: Path, kind: str) -> None:
    path = make_bad(kind, tmp_path)
    with pytest.raises(ValueError, match=BAD[kind]):
        probe_audio(str(path))
    if kind not in ("zero-sample", "short", "short at 48 kHz"):
        with pytest.raises(ValueError, match=rf"{kind}.*'u'.*{BAD[kind]}"):
            load_audio(Utterance("u", str(path), 0, 16000, 16000))


def test_a_file_that_changed_since_it_was_indexed_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1, 16000), 16000)
    utterance = whole(path)
    soundfile.write(path, tone(0.98, 16000), 16000)
    with pytest.raises(ValueError, match=r"truncated: 15680 of 16000 samples"):
        load_audio(utterance)
    soundfile.write(path, tone(1, 8000), 8000)
    with pytest.raises(ValueError, match=r"8000 Hz where the manifest has 16000; index it again"):
        load_audio(utterance)


def test_up_to_ten_milliseconds_may_be_missing_and_become_zeros(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.full(16000 - 160, 0.5), 16000)
    loaded = load_audio(whole(path, num_samples=16000))
    assert len(loaded) == 16000 and not loaded[-160:].any() and loaded[:-160].all()


def test_a_streamed_wav_with_an_unknown_size_is_not_truncated(tmp_path: Path) -> None:
    path = tmp_path / "streamed.wav"
    soundfile.write(path, tone(1, 16000), 16000)
    data = bytearray(path.read_bytes())
    assert data[36:40] == b"data"
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert probe_audio(str(path)) == (0, 16000, 16000)


def test_probing_block_by_block_sees_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "_BLOCK", 1000)
    soundfile.write(tmp_path / "ok.wav", tone(1, 16000), 16000)
    assert probe_audio(str(tmp_path / "ok.wav")) == (0, 16000, 16000)
    with pytest.raises(ValueError, match="NaN"):
        probe_audio(str(make_bad("NaN", tmp_path)))


def test_the_header_alone_does_not_see_what_only_decoding_shows(tmp_path: Path) -> None:
    assert probe_audio(str(make_bad("NaN", tmp_path)), decode=False) == (0, 16000, 16000)
    with pytest.raises(ValueError, match="truncated"):
        probe_audio(str(make_bad("truncated", tmp_path)), decode=False)


def test_a_segment_must_lie_inside_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1, 8000), 8000)
    assert probe_audio(str(path), 0.25, 0.5) == (2000, 4000, 8000)
    assert probe_audio(str(path), 0.25) == (2000, 6000, 8000)
    assert probe_audio(str(path), 0.5, 0.505) == (4000, 4000, 8000)  # rounded durations may run over by 10 ms
    with pytest.raises(ValueError, match="truncated: 4000 of 4160 samples"):
        probe_audio(str(path), 0.5, 0.52)
    with pytest.raises(ValueError, match=r"ends after 1.00 s, before the segment's start at 1.50 s"):
        probe_audio(str(path), 1.5)


def slow_phone_frames(phones: list[Phone], num_frames: int) -> list[str]:
    centres = [(320 * t + 200) / 16000 for t in range(num_frames)]
    return [next((p.phone for p in phones if p.start <= centre < p.end), "") for centre in centres]


@given(
    st.lists(
        st.tuples(st.integers(0, 120), st.integers(0, 60), st.sampled_from(["a", "tʃ", "sil"])), max_size=12
    ),
    st.integers(0, 60),
)
def test_phone_frames_agree_with_the_slow_way(pieces: list[tuple[int, int, str]], num_frames: int) -> None:
    phones, time = [], 0  # in units of 2.5 ms, so that boundaries fall on frame centres too
    for duration, gap, phone in pieces:
        phones.append(Phone((time + gap) * 0.0025, (time + gap + duration) * 0.0025, phone))
        time += gap + duration
    frames = phone_frames(phones, num_frames)
    assert frames.shape == (num_frames,)
    assert frames.tolist() == slow_phone_frames(phones, num_frames)
