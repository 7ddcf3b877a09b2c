"""One process at a time writes an output: who has it is named, who is gone is replaced, and nothing is left
behind."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pretrain.store import lock
from pretrain.store.disk import DiskFull
from pretrain.store.holder import Holder
from pretrain.store.lock import Occupied, locked, taking_turns
from tests.pretrain.linear_task import LinearTask, run_linear
from tests.pretrain.stopping_worker import once_at

ROOT = Path(__file__).parents[3]
HOLD = """
import sys, time
from pretrain.store.lock import locked
out, *part = sys.argv[1:]
with locked(out, *part):
    print("held", flush=True)
    sys.stdin.read()
"""


class Other:
    """Another process with the lock of `out`."""

    def __init__(self, out: Path, *part: str):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(out), *part],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"
        self.pid = self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def finish(self) -> None:
        self.process.communicate("")


@pytest.fixture
def other() -> Iterator[Callable[..., Other]]:
    with ExitStack() as stack:

        def start(out: Path, *part: str) -> Other:
            started = Other(out, *part)
            stack.callback(started.kill)
            return started

        yield start


def leave(path: Path, silent_seconds: float = 0.0, **changes: Any) -> None:
    """A lock file as another process leaves it that was killed `silent_seconds` ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "host": "elsewhere",
        "pid": 4242,
        "since": 1.7e9,
        "command": "wordless x",
        "boot": "b",
        "started": "1",
        **changes,
    }
    path.write_text(json.dumps(record))
    heard = time.time() - silent_seconds
    os.utime(path, (heard, heard))


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_a_thread(function: Callable[[], Any]) -> BaseException | None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught[0] if caught else None


def take(out: Path, *part: str) -> None:
    with locked(out, *part):
        pass


def test_a_second_process_is_refused_and_hears_which_folder_host_and_process_and_since_when(
    tmp_path: Path, other: Callable[..., Other]
) -> None:
    first = other(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run: another process is at work on it") as refused:
        take(tmp_path / "run")
    text = str(refused.value)
    assert (
        f"process {first.pid} on host {socket.gethostname()}, since 20" in text
        and "Nothing was changed" in text
    )
    assert str(tmp_path / "run") in text and "remove" not in text  # flock knows that it lives
    first.finish()
    assert first.process.returncode == 0 and names(tmp_path) == []
    take(tmp_path / "run")


def test_a_second_training_of_a_folder_changes_nothing_of_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusals: list[BaseException | None] = []

    def on_step(step: int) -> None:
        if step == 5:
            refusals.append(in_a_thread(lambda: run_linear(tmp_path / "run", LinearTask(), {"max_steps": 9})))

    run_linear(tmp_path / "run", LinearTask(on_step=on_step))
    run_linear(tmp_path / "alone", LinearTask())
    assert isinstance(refusals[0], Occupied) and f"process {os.getpid()} on host" in str(refusals[0])
    one, two = ((tmp_path / run / "step_00000012/model.safetensors").read_bytes() for run in ("run", "alone"))
    assert (
        one == two
        and (tmp_path / "run/config.toml").read_text() == (tmp_path / "alone/config.toml").read_text()
    )
    assert names(tmp_path) == ["alone", "run"] and ".lock" not in names(tmp_path / "run")


def test_a_killed_process_s_lock_is_taken_over_with_a_line(
    tmp_path: Path, other: Callable[..., Other], capsys: pytest.CaptureFixture[str]
) -> None:
    first = other(tmp_path / "run")
    first.kill()
    assert names(tmp_path) == [".run.lock"]
    take(tmp_path / "run")
    assert re.search(
        rf"run: takes over from process {first.pid} on host \S+, since .*, which is gone",
        capsys.readouterr().err,
    )
    assert names(tmp_path) == []


def test_a_signal_that_is_handed_on_finds_no_lock(tmp_path: Path) -> None:
    """Its default action runs nothing of Python's any more."""
    found: list[list[str]] = []
    before = signal.signal(signal.SIGTERM, lambda *_: found.append(names(tmp_path)))
    try:
        with pytest.raises(SystemExit):
            run_linear(tmp_path / "run", LinearTask(on_step=once_at(3, number=signal.SIGTERM)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == [["run"]]


def test_a_failure_leaves_neither_a_lock_nor_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "a" / "b" / "run"):
        assert names(tmp_path / "a" / "b") == [".run.lock"]
        raise RuntimeError("fault")
    assert names(tmp_path) == []


def test_nested_it_is_one_lock_and_another_thread_is_another_process(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with locked(tmp_path / "run"), locked(tmp_path / "run" / "sub"):
            pass
        assert isinstance(in_a_thread(lambda: take(tmp_path / "run")), Occupied)
        (tmp_path / "link").symlink_to(tmp_path / "run")
        assert isinstance(in_a_thread(lambda: take(tmp_path / "link")), Occupied)
    assert names(tmp_path) == ["link"]


def test_of_the_ranks_of_one_training_the_first_alone_takes_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(tmp_path / "run"):
        monkeypatch.setenv("RANK", "1")
        assert in_a_thread(lambda: take(tmp_path / "run")) is None
        monkeypatch.setenv("RANK", "0")
        assert isinstance(in_a_thread(lambda: take(tmp_path / "run")), Occupied)


@pytest.mark.parametrize("name", ["labels", "labels[1]*"])
def test_parts_share_an_output_with_each_other_and_not_with_a_process_that_does_all_of_it(
    tmp_path: Path, name: str
) -> None:
    out = tmp_path / name
    with locked(out, "1/2"):
        assert in_a_thread(lambda: take(out, "2/2")) is None and in_a_thread(lambda: take(out, "1/3")) is None
        assert isinstance(in_a_thread(lambda: take(out, "1/2")), Occupied)
        assert isinstance(in_a_thread(lambda: take(out)), Occupied)
    with locked(out):
        assert isinstance(in_a_thread(lambda: take(out, "1/2")), Occupied)
    leave(tmp_path / f".{name}.part-2-2.lock", host=socket.gethostname())  # of one that was killed
    take(out, "1/2")
    take(out)
    assert names(tmp_path) == []


def test_a_lock_of_another_host_counts_until_it_has_been_silent_for_two_minutes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """flock may not reach from one machine to the other: that it is free proves nothing."""
    path = tmp_path / ".run.lock"
    leave(path, 100)
    with pytest.raises(
        Occupied,
        match=r"process 4242 on host elsewhere, since 2023.*last sign of life 100 s ago\), remove "
        rf"{re.escape(str(path))}",
    ):
        take(tmp_path / "run")
    assert path.exists()
    leave(path, 121)
    take(tmp_path / "run")
    assert (
        "takes over from process 4242 on host elsewhere" in capsys.readouterr().err and names(tmp_path) == []
    )


def test_a_container_of_this_machine_with_another_host_name_is_known_to_be_gone(tmp_path: Path) -> None:
    leave(tmp_path / ".run.lock", boot=Holder.me().boot)
    take(tmp_path / "run")
    # and the same machine before it was started again
    leave(tmp_path / ".run.lock", host=socket.gethostname())
    take(tmp_path / "run")


def test_a_lock_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    path = tmp_path / ".run.lock"
    with locked(tmp_path / "run"):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_requeued_job_waits_for_the_lock_of_its_attempt_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.5)
    monkeypatch.setenv("WORDLESS_ATTEMPT", "2")
    leave(tmp_path / ".run.lock")
    take(tmp_path / "run")
    assert "This is a requeued job: it waits" in capsys.readouterr().err and names(tmp_path) == []


def test_without_locks_on_the_file_system_the_record_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    path, me = tmp_path / ".run.lock", Holder.me()
    with locked(tmp_path / "run"):
        assert isinstance(in_a_thread(lambda: take(tmp_path / "run")), Occupied)
        assert isinstance(in_a_thread(lambda: take(tmp_path / "run", "1/2")), Occupied)
    here = {"host": me.host, "boot": me.boot}
    leave(path, **here, pid=me.pid, started="1")  # a process of the same number, long ago
    take(tmp_path / "run")
    leave(path, 1000, **here, pid=me.pid, started=me.started)  # stopped by Ctrl-Z, say
    with pytest.raises(Occupied):
        take(tmp_path / "run")
    leave(path, 100)
    with pytest.raises(Occupied):
        take(tmp_path / "run")
    leave(path, 121)
    take(tmp_path / "run")
    path.write_text("")  # about to be written
    with pytest.raises(Occupied, match="which one is not known"):
        take(tmp_path / "run")


@pytest.mark.parametrize("has_locks", [True, False])
def test_of_many_that_try_at_once_one_is_within_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
) -> None:
    if not has_locks:
        without_locks(monkeypatch)
    within, most, done = 0, 0, 0

    def work() -> None:
        nonlocal within, most, done
        left = 8
        while left:
            try:
                with locked(tmp_path / "run"):
                    within += 1
                    most = max(most, within)
                    time.sleep(0.0002)
                    within -= 1
                    done += 1
                    left -= 1
            except Occupied:
                time.sleep(0.0005)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, done) == (1, 32) and names(tmp_path) == []


def test_those_that_take_turns_wait_for_each_other_and_leave_nothing(tmp_path: Path) -> None:
    within, most = 0, 0

    def work() -> None:
        nonlocal within, most
        for _ in range(20):
            with taking_turns(tmp_path / "folder" / ".x.lock"):
                within += 1
                most = max(most, within)
                within -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and names(tmp_path / "folder") == []


def test_a_lock_that_was_removed_by_hand_is_not_removed_again_from_another(tmp_path: Path) -> None:
    path = tmp_path / ".run.lock"
    with locked(tmp_path / "run"):
        path.unlink()
        leave(path)
    assert path.exists()


def refuse(monkeypatch: pytest.MonkeyPatch, folder: Path, code: int) -> None:
    """Nothing can be made in `folder`."""
    opened = os.open

    def open_there(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_CREAT and Path(path).parent == folder:
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", open_there)


def test_where_the_folder_above_may_not_be_written_the_lock_is_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    refuse(monkeypatch, tmp_path, errno.EACCES)
    with locked(tmp_path / "out"):
        assert names(tmp_path / "out") == [".lock"]
        assert isinstance(in_a_thread(lambda: take(tmp_path / "out")), Occupied)
        assert isinstance(in_a_thread(lambda: take(tmp_path / "out", "1/2")), Occupied)
    with locked(tmp_path / "out", "1/2"):
        assert names(tmp_path / "out") == [".part-1-2.lock"]
        assert isinstance(in_a_thread(lambda: take(tmp_path / "out")), Occupied)
    assert names(tmp_path / "out") == []


def test_a_read_only_disk_is_one_clear_message_and_a_finished_output_on_it_needs_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, tmp_path, errno.EROFS)
    with pytest.raises(
        ValueError, match=r"run: cannot be written \(Read-only file system: .*\); choose another `out`"
    ):
        take(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "meta.json").write_text("{}")
    refuse(monkeypatch, tmp_path / "run", errno.EROFS)
    take(tmp_path / "run")


def test_on_a_full_disk_flock_does_without_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be written there names the file and the bytes."""

    def pwrite(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with locked(tmp_path / "run"):
        assert "which one is not known" in str(in_a_thread(lambda: take(tmp_path / "run")))
    without_locks(monkeypatch)
    with pytest.raises(DiskFull, match="run: no space left on the disk"):
        take(tmp_path / "run")
    assert names(tmp_path) == []


def test_a_full_disk_a_file_in_the_way_and_a_name_too_long_are_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for out in (
        tmp_path / "file" / "run",
        tmp_path / "file" / "deep" / "run",
        tmp_path / ("x" * 300) / "run",
    ):
        with pytest.raises(ValueError, match=r"run: cannot be written \("):
            take(out)
    take(tmp_path / ("ä" * 120))  # 240 bytes are a name; with ".lock" they are no longer
    assert names(tmp_path) == ["file"]
    refuse(monkeypatch, tmp_path, errno.ENOSPC)
    with pytest.raises(DiskFull, match="run: no space left on the disk"):
        take(tmp_path / "run")
