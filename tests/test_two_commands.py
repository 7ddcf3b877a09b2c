"""Two commands that write one output: the second ends with status 2 and one line, before it has touched
anything."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tomli_w

from pretrain.data.labels import Labels
from pretrain.store.lock import locked
from wordless import verbs
from wordless.cli import main
from wordless.verbs import VERBS

ROOT = Path(__file__).parents[1]
REQUIRED: dict[str, dict[str, Any]] = {
    "speech": {"hours": 0.01},
    "index": {"source": "audio"},
    "pretrain": {"manifest": "m", "objective": "wav2vec2", "training": {"max_steps": 1}},
    "cluster": {"manifest": "m"},
    "encode": {"manifest": "m", "codebook": "c"},
    "measure": {"manifest": "m", "labels": "l"},
    "pack": {"labels": "l", "manifest": "m"},
    "train-lm": {"corpus": "c", "training": {"max_steps": 1}},
    "score": {"corpus": "c", "lm": "l"},
    "train-synthesizer": {"manifest": "m", "corpus": "c", "training": {"max_steps": 1}},
    "sample": {"lm": "l", "corpus": "c"},
    "synthesize": {"synthesizer": "s", "manifest": "m", "corpus": "c"},
    "finetune": {"manifest": "m", "encoder": "e", "training": {"max_steps": 1}},
    "transcribe": {"manifest": "m", "recognizer": "r"},
    "compare": {"a": "a", "b": "b"},
    "label-efficiency": {"manifest": "m", "encoder": "e", "finetune": {"training": {"max_steps": 1}}},
    "report": {"manifest": "m"},
}


@contextmanager
def held(out: Path, *part: str) -> Iterator[None]:
    """As another process has it: another thread."""
    begun, over = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(out, *part):
            begun.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    assert begun.wait(10)
    try:
        yield
    finally:
        over.set()
        thread.join()


def write(folder: Path, name: str, tree: dict[str, Any]) -> str:
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(tree))
    return str(path)


def require_refused(argv: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert (
        f"{out}: another process is at work on it: process {os.getpid()} on host" in told
        and told.count("\n") == 1
    ), told


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_leaves_an_output_alone_that_another_process_writes(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, verb, {"verb": verb, "out": "out", **REQUIRED[verb]})
    with held(tmp_path / "out"):
        require_refused([verb, path] if verb != "index" else ["index", "audio", "out"], Path("out"), capsys)
    assert sorted(os.listdir()) == [f"{verb}.toml"]
    assert main([verb, path]) == (0 if verb == "speech" else 2)  # others' inputs are not there
    assert "another process" not in capsys.readouterr().err and ".out.lock" not in os.listdir()


def test_import_and_export_leave_an_output_alone_that_another_process_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from quantize.codebook import write_codebook

    centroids = np.random.default_rng(0).standard_normal((1, 4, 39)).astype(np.float32)
    write_codebook(
        str(tmp_path / "codebook"),
        centroids,
        np.zeros(39, np.float32),
        {"kind": "mfcc", "cmvn": False},
        {},
        {},
        {},
    )
    np.save(tmp_path / "centroids.npy", centroids[0])
    imported = ["import", "--codebook", "--mfcc", str(tmp_path / "centroids.npy"), str(tmp_path / "imported")]
    exported = ["export", str(tmp_path / "codebook"), str(tmp_path / "exported.npy"), "--format", "npy"]
    for argv, out in ((imported, tmp_path / "imported"), (exported, tmp_path / "exported.npy")):
        with held(out):
            require_refused(argv, out, capsys)
        assert not out.exists()
        assert main(argv) == 0
    assert not list(tmp_path.rglob(".*"))


def test_a_part_is_refused_where_the_same_part_or_all_is_being_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    path = write(tmp_path, "encode", {"out": str(out), "part": "1/2", **REQUIRED["encode"]})
    for part in (("1/2",), ()):
        with held(out, *part):
            require_refused(["encode", path], out, capsys)
    with held(out, "2/2"):
        assert main(["encode", path]) == 2 and "m: no such manifest" in capsys.readouterr().err


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for number in range(8):
        soundfile.write(tmp_path / f"audio/{number}.wav", 0.1 * rng.standard_normal(16000), 16000)
    return tmp_path / "audio"


def test_a_second_run_of_a_recipe_ends_before_its_first_stage_and_a_stage_of_its_own_may_run(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    stages = {"one": {"verb": "index", "source": str(audio)}, "two": {"verb": "index", "source": str(audio)}}
    path = write(tmp_path, "recipe", {"run": str(run), **stages})
    with held(run / "stages"):
        require_refused(["run", path], run, capsys)
        assert os.listdir(run) == [".stages.lock"]
        assert main(["run", path, "--only", "one"]) == 0
    with held(run / "two"):
        capsys.readouterr()
        record = (run / "stages" / "one.json").read_bytes()
        assert main(["run", path]) == 2
        told = capsys.readouterr().err.splitlines()
        assert (
            told[0].startswith("one: finished already")
            and f"{run / 'two'}: another process" in told[1]
            and len(told) == 2
        )
        assert (run / "stages" / "one.json").read_bytes() == record and not (
            run / "stages" / "two.json"
        ).exists()
    assert main(["run", path]) == 0
    assert not list(run.rglob(".*"))


def test_what_stands_needs_no_lock_in_a_recipe(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    path = write(tmp_path, "recipe", {"run": str(run), "one": {"verb": "index", "source": str(audio)}})
    assert main(["run", path]) == 0
    with held(run / "one"):
        assert main(["run", path]) == 0
    assert "one: finished already" in capsys.readouterr().err


def test_redo_of_a_stage_leaves_no_lock_file(audio: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = write(tmp_path, "recipe", {"run": str(run), "one": {"verb": "index", "source": str(audio)}})
    assert main(["run", path]) == 0
    assert main(["run", path, "one.test_share=0.3", "--redo"]) == 0
    assert not list(run.rglob(".*"))


def test_ctrl_c_in_a_stage_ends_the_recipe_there_with_one_line(
    audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    stages = {name: {"verb": "index", "source": str(audio)} for name in ("one", "two", "three")}
    path = write(tmp_path, "recipe", {"run": str(run), **stages})
    load = verbs.Verb.load

    def interrupted(verb: verbs.Verb) -> Any:
        config_class, function = load(verb)

        def work(config: Any) -> Any:
            if Path(config.out).name == "two":
                raise KeyboardInterrupt
            return function(config)

        return config_class, work

    monkeypatch.setattr(verbs.Verb, "load", interrupted)
    assert main(["run", path]) == 130
    told = capfd.readouterr().err.splitlines()
    assert told[-1] == f"{run}: stopped by Ctrl-C; run the same command again to go on from what is done"
    assert "Traceback" not in "".join(told) and not (run / "three").exists() and not list(run.rglob(".*"))
    monkeypatch.undo()
    assert main(["run", path]) == 0 and (run / "three" / "meta.json").is_file()


HANGING = """
import time
import soundfile
opened = soundfile.SoundFile.__init__
def init(self, file, *rest, **keys):
    if str(file).endswith("3.wav"):
        time.sleep(600)
    opened(self, file, *rest, **keys)
soundfile.SoundFile.__init__ = init
"""


def test_ctrl_c_of_encode_in_processes_ends_them_and_the_same_command_goes_on_to_the_same_labels(
    audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, codebook, out = (str(tmp_path / name) for name in ("manifest", "codebook", "labels"))
    assert main(["index", str(audio), manifest]) == 0
    assert (
        main(
            ["cluster", write(tmp_path, "cluster", {"manifest": manifest, "num_classes": 4, "out": codebook})]
        )
        == 0
    )
    keys = {"manifest": manifest, "codebook": codebook, "num_shards": 8}
    path = write(tmp_path, "encode", {**keys, "out": out, "processes": 2})
    assert main(["encode", write(tmp_path, "alone", {**keys, "out": str(tmp_path / "alone")})]) == 0
    # A worker is at one of the shards when the signal comes: a recording on a disk that hangs.
    (tmp_path / "hangs").mkdir()
    (tmp_path / "hangs" / "sitecustomize.py").write_text(HANGING, encoding="utf-8")
    code = (
        "import signal; signal.signal(2, signal.default_int_handler); import wordless.cli; "
        "wordless.cli.entry_point()"
    )
    places = os.pathsep.join([str(tmp_path / "hangs"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "encode", path],
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline, seen, since = time.monotonic() + 90, set[Path](), time.monotonic()
        # until nothing is being written, and the recording that hangs is waited for
        while not seen or time.monotonic() - since < 1.5:
            assert process.poll() is None and time.monotonic() < deadline
            if (found := set(Path(out).rglob("*shard*"))) != seen:
                seen, since = found, time.monotonic()
            time.sleep(0.05)
        workers = [
            int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and error.splitlines()[-1].endswith(
        "labels: stopped by Ctrl-C; run the same command again to go on from what is done"
    )
    assert "Traceback" not in error and len(workers) >= 2
    deadline = time.monotonic() + 10  # one is multiprocessing's own, which ends when it notices
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not list(Path(out).rglob(".*")) and not list(tmp_path.glob(".*"))
    assert main(["encode", path]) == 0
    for identity in Labels(out).ids:
        np.testing.assert_array_equal(Labels(out)[identity], Labels(str(tmp_path / "alone"))[identity])
