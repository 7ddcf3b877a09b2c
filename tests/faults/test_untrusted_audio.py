"""Hostile recordings cost no more than themselves: neither memory, nor time, nor the process that indexes."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pretrain.data import audio
from pretrain.data.audio import load_audio, probe_audio
from pretrain.data.decoding.spans import Member
from pretrain.data.indexing import IndexConfig, index
from pretrain.data.manifest import Manifest
from pretrain.data.probing import Limits, Probed, Request, probe_recordings
from pretrain.data.utterance import Utterance
from tests.faults.hostile_audio import (
    TEN_HOURS,
    encoded,
    flac_bomb,
    flac_claiming,
    mp3_claiming,
    ogg_claiming,
    wav,
)

ROOT = Path(__file__).parents[2]


def probe_all(
    paths: list[Path],
    limits: Limits = Limits(),  # noqa: B008
    num_workers: int = 2,
    **keys: Any,
) -> list[Probed | str]:
    requests = [Request(str(path), **keys) for path in paths]
    answers = dict(probe_recordings(requests, len(requests), num_workers, limits))
    assert sorted(answers) == list(range(len(paths)))
    return [answers[number] for number in range(len(paths))]


def sine(path: Path, num_samples: int = 4000, rate: int = 16000) -> Path:
    soundfile.write(path, 0.5 * np.sin(0.05 * np.arange(num_samples)), rate)
    return path


HOSTILE: dict[str, tuple[bytes, str]] = {
    "ten hours.wav": (wav(2 * TEN_HOURS), "is truncated: 1000 of 1152000000 bytes"),
    "ten hours.flac": (flac_claiming(TEN_HOURS)[:1000], "claims 576000000 samples, more than its 1000 bytes"),
    "ten hours.ogg": (ogg_claiming(TEN_HOURS), "claims 576000000 samples, more than its"),
    "ten hours.mp3": (mp3_claiming(TEN_HOURS // 576)[:1000], "samples, more than its 1000 bytes"),
    "believable.flac": (flac_claiming(2**24), "cannot be decoded"),
    "believable.ogg": (ogg_claiming(2**24), "is truncated: "),
    "believable.mp3": (mp3_claiming(2**14), "is truncated: "),
    "most.flac": (flac_claiming(2**36 - 1), "claims 68719476735 samples"),
    "most.ogg": (ogg_claiming(2**62), "claims 4611686018427387904 samples"),
    "none.flac": (flac_claiming(0)[:-100], "does not say how long it is"),
    "negative.ogg": (ogg_claiming(-5), "cannot be decoded"),
    "1 Hz.wav": (wav(200_000, bytes(200_000), rate=1), "is at 1 Hz; 1000 to 768000"),
    "1 Hz.flac": (flac_claiming(16000, rate=1), "is at 1 Hz"),
    "2 GHz.wav": (wav(200_000, bytes(200_000), rate=2**31 - 1), "is at 2147483647 Hz"),
    "4 GHz.wav": (wav(200_000, bytes(200_000), rate=2**32 - 1), "cannot be decoded"),
    "0 Hz.wav": (wav(1000, rate=0), "cannot be decoded"),
    "no channel.wav": (wav(1000, channels=0), "cannot be decoded"),
    "65535 channels.wav": (wav(262_140, bytes(262_140), channels=65535, bits=8), "cannot be decoded"),
    "no bits.wav": (wav(1000, bits=0), "cannot be decoded"),
}


def test_headers_that_lie_are_refused_with_the_reason_in_little_memory(tmp_path: Path) -> None:
    for name, (data, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(data)
    began = time.monotonic()
    answers = probe_all([tmp_path / name for name in HOSTILE], Limits(memory_gb=0.15, seconds=20))
    for (name, (_, reason)), answer in zip(HOSTILE.items(), answers, strict=True):
        assert isinstance(answer, str) and reason in answer, (name, answer)
    assert time.monotonic() - began < 60  # half a second where nothing else runs


def test_what_a_header_cannot_claim_is_refused_without_decoding(tmp_path: Path) -> None:
    for name in (
        "ten hours.wav",
        "ten hours.flac",
        "ten hours.ogg",
        "ten hours.mp3",
        "most.ogg",
        "none.flac",
        "1 Hz.wav",
    ):
        data, reason = HOSTILE[name]
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=reason):
            probe_audio(str(tmp_path / name), decode=False)
        (tmp_path / "tar").write_bytes(b"x" * 512 + data + bytes(999))
        with pytest.raises(ValueError, match=reason):
            probe_audio(str(tmp_path / "tar"), decode=False, member=Member(512, len(data)))


def test_the_densest_true_recording_is_within_what_a_header_may_claim(tmp_path: Path) -> None:
    (tmp_path / "x.flac").write_bytes(flac_bomb(40, channels=1))
    assert probe_audio(str(tmp_path / "x.flac")) == (0, 40 * 65535, 16000)


def test_a_file_that_unpacks_to_hours_is_decoded_in_little_memory_and_given_up_when_it_takes_long(
    tmp_path: Path,
) -> None:
    (tmp_path / "bomb.flac").write_bytes(flac_bomb(100))
    assert (tmp_path / "bomb.flac").stat().st_size < 4000  # 52 million samples, 210 MB
    others = [sine(tmp_path / f"{n}.wav") for n in range(3)]
    assert probe_all([tmp_path / "bomb.flac"], Limits(memory_gb=0.15)) == [(0, 100 * 65535, 16000)]
    answers = probe_all(
        [others[0], tmp_path / "bomb.flac", *others[1:]], Limits(0.15, seconds=0.1), num_workers=1
    )
    assert [answers[0], *answers[2:]] == [(0, 4000, 16000)] * 3
    assert str(answers[1]).startswith(
        "takes more than 0.11"
    ) and "s of the processor's time to decode (seconds_limit)" in str(answers[1])


def test_times_beyond_any_recording_are_told(tmp_path: Path) -> None:
    path = str(sine(tmp_path / "x.wav"))
    for far in (1e300, 1e308):
        with pytest.raises(ValueError, match="before the segment's start"):
            probe_audio(path, offset_seconds=far)
        with pytest.raises(ValueError, match="is truncated"):
            probe_audio(path, duration_seconds=far)
    for nowhere in (Member(-1, 100), Member(0, -100)):
        with pytest.raises(ValueError, match="lies nowhere in the tar"):
            probe_audio(path, member=nowhere)


# Workers


BREAKING = """
import os, signal, sys, time
import soundfile
whole, seen = soundfile.SoundFile.__init__, []
def init(self, file, *rest, **keys):
    name = os.path.basename(str(file))
    seen.append(name)
    if name == "crash.wav" or (name == "fragile.wav" and "poison.wav" in seen):
        os.kill(os.getpid(), signal.SIGSEGV)
    elif name == "exit.wav":
        os._exit(3)
    elif name == "greedy.wav":
        bytearray(1 << 30)
    elif name == "failed.wav":
        raise soundfile.LibsndfileError(17, "")
    elif name == "loop.wav":
        while True: pass
    elif name == "hang.wav":
        print("waiting", flush=True)
        time.sleep(1000)
    whole(self, file, *rest, **keys)
soundfile.SoundFile.__init__ = init
"""


@pytest.fixture
def breaking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where a recording's name says what decoding it does to a worker; files by number are whole."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(BREAKING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "c").mkdir()
    return tmp_path / "c"


def test_a_recording_that_ends_its_worker_costs_itself_alone(breaking: Path) -> None:
    reasons = {
        "crash": "ends the process that decodes it (SIGSEGV)",
        "exit": "ends the process that decodes it (exit status 3)",
        "greedy": "takes more than 0.2 GB of memory to decode (memory_limit_gb)",
        "failed": "takes more than 0.2 GB of memory",
        "loop": "s of the processor's time to decode (seconds_limit)",
    }
    names = ["0", "crash", "1", "exit", "greedy", "2", "loop", "3", "failed", "4"]
    paths = [sine(breaking / f"{name}.wav", 1000 + 100 * n) for n, name in enumerate(names)]
    for num_workers in (1, 3):
        answers = probe_all(paths, Limits(memory_gb=0.2, seconds=0.4), num_workers)
        for n, (name, answer) in enumerate(zip(names, answers, strict=True)):
            assert (
                reasons[name] in str(answer) if name in reasons else answer == (0, 1000 + 100 * n, 16000)
            ), (name, answer)


def test_a_recording_is_not_blamed_for_what_another_left_behind(breaking: Path) -> None:
    paths = [sine(breaking / f"{name}.wav") for name in ("0", "poison", "fragile", "1")]
    assert probe_all(paths, num_workers=1) == [(0, 4000, 16000)] * 4


def test_a_recording_whose_disk_hangs_is_given_up(breaking: Path) -> None:
    paths = [sine(breaking / "hang.wav"), sine(breaking / "0.wav")]
    began = time.monotonic()
    assert probe_all(paths, Limits(seconds=0.15)) == [
        "takes more than 1.9 s to read (ten times seconds_limit)",
        (0, 4000, 16000),
    ]
    assert time.monotonic() - began < 60


def test_waiting_for_more_work_is_held_against_no_recording(tmp_path: Path) -> None:
    paths = [sine(tmp_path / f"{n}.wav") for n in range(2)]
    requests = [Request(str(path)) for path in paths]
    answers = probe_recordings(requests, 2, 1, Limits(seconds=0.1))  # one recording at a time
    found = [next(answers)]
    time.sleep(2.5)  # the terminal that shows progress may be stopped
    assert [*found, *answers] == [(0, (0, 4000, 16000)), (1, (0, 4000, 16000))]


def test_a_worker_that_cannot_start_is_no_fault_of_the_recordings(breaking: Path) -> None:
    (breaking.parent / "site/sitecustomize.py").write_text("import os; os._exit(5)")
    with pytest.raises(RuntimeError, match="did not start .exit status 5"):
        probe_all([sine(breaking / "0.wav")])


def test_index_leaves_out_what_ends_a_worker_and_keeps_the_order(breaking: Path, tmp_path: Path) -> None:
    for name in ("0", "1", "crash", "2", "greedy", "3"):
        sine(breaking / f"{name}.wav", 4000)
    keys = {"dev_share": 0.0, "test_share": 0.0, "max_bad_share": 0.5, "workers": 2, "memory_limit_gb": 0.2}
    summary = index(IndexConfig(source=str(breaking), out=str(tmp_path / "m"), **keys))  # type: ignore[arg-type]
    assert Manifest(tmp_path / "m").ids == ["0", "1", "2", "3"] and summary["quarantined"] == 2
    left_out = [json.loads(line) for line in (tmp_path / "m/quarantine.jsonl").read_text().splitlines()]
    assert [row["id"] for row in left_out] == ["crash", "greedy"]
    assert "SIGSEGV" in left_out[0]["reason"] and "0.2 GB" in left_out[1]["reason"]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_an_interrupt_ends_every_worker(breaking: Path, tmp_path: Path) -> None:
    for n in range(4):
        (breaking / str(n)).mkdir()
        sine(breaking / str(n) / "hang.wav")
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pretrain.data.indexing import IndexConfig, index\n"
        f"index(IndexConfig(source={str(breaking)!r}, out={str(tmp_path / 'm')!r}, workers=2))"
    )
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE
    )
    try:
        workers: list[int] = []
        for _ in range(600):
            workers = children(process.pid)
            if len(workers) == 2 or process.poll() is not None:
                break
            time.sleep(0.1)
        assert len(workers) == 2
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert b"KeyboardInterrupt" in told and not (tmp_path / "m").exists()
    for _ in range(100):  # one that was just starting ends by itself, at the end of its input
        if not any(Path(f"/proc/{worker}").exists() for worker in workers):
            break
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_answer_what_probing_here_does(tmp_path: Path, num_workers: int) -> None:
    requests = []
    for n in range(30):
        path = sine(
            tmp_path / f"{n} \x01ü.{'wav' if n % 2 else 'flac'}", 1000 + 100 * n, 8000 if n % 3 else 16000
        )
        if n % 7 == 0:
            path.write_bytes(path.read_bytes()[: 300 * (n % 2)])
        member = Member(0, path.stat().st_size) if n % 5 else None
        requests.append(
            Request(str(path), 0.01 * (n % 4), 0.05 if n % 6 else None, None, n % 11 != 0, member)
        )
    expected: list[Probed | str] = []
    for request in requests:
        try:
            expected.append(probe_audio(*request))
        except ValueError as error:
            expected.append(str(error))
    answers = dict(probe_recordings(iter(requests), len(requests), num_workers, Limits()))
    assert [answers[n] for n in range(30)] == expected
    assert sum(isinstance(answer, str) for answer in expected) >= 4


# Files that changed after they were indexed


def test_many_channels_are_read_bit_by_bit_and_sound_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waves = np.random.default_rng(0).uniform(-0.5, 0.5, (40_000, 64))
    soundfile.write(tmp_path / "x.wav", waves, 16000, subtype="PCM_U8")
    utterance = Utterance("x", str(tmp_path / "x.wav"), 100, 39_000, 16000)
    at_once = load_audio(utterance)
    monkeypatch.setattr(audio, "_LARGEST_READ", 1 << 16)
    tracemalloc.start()
    np.testing.assert_array_equal(load_audio(utterance), at_once)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # of 10 MB of all channels; the mean takes 160 kB


def test_a_header_that_lies_takes_no_memory_while_loading(tmp_path: Path) -> None:
    (tmp_path / "x.ogg").write_bytes(ogg_claiming(2**24))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"x.ogg .utterance 'x'.: is truncated: \d+ of 16777216 samples"):
        load_audio(Utterance("x", str(tmp_path / "x.ogg"), 0, 2**24, 16000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80_000_000  # a block of 2**24 samples, whatever is claimed: 67 MB


def test_a_recording_in_place_of_another_is_refused_or_read_to_the_same_length(tmp_path: Path) -> None:
    utterance = Utterance("x", str(tmp_path / "x.flac"), 0, 16000, 16000)
    for data in (encoded("FLAC"), flac_bomb(2), encoded("OGG")):
        (tmp_path / "x.flac").write_bytes(data)
        assert load_audio(utterance).shape == (16000,)
    for data in (HOSTILE["1 Hz.wav"][0], HOSTILE["most.flac"][0], encoded("FLAC")[:9000]):
        (tmp_path / "x.flac").write_bytes(data)
        with pytest.raises(ValueError, match="x.flac"):
            load_audio(utterance)
