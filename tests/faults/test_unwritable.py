"""An output that cannot be made or written: a file in the way, a name too long, a read-only disk, a limit of
the size of files.

Must hold: before any work, exit status 2 and one line that names the output and the reason; where it shows
late only, the same at the end. Never a traceback, and nothing left behind.
"""

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tomli_w

import wordless.cli
from pretrain.data.indexing import IndexConfig
from pretrain.data.manifest import Manifest
from pretrain.store.destination import require_writable
from pretrain.store.disk import atomic_folder, atomic_path
from tests.faults.conftest import Disk
from tests.faults.test_full_disk import WRITERS
from wordless.cli import main
from wordless.verbs import VERBS, Verb

ROOT = Path(__file__).parents[2]
STEPS = {"training": {"max_steps": 1}}
# The least that makes a valid config of each verb; no file of it exists.
LEAST: dict[str, dict[str, Any]] = {
    "speech": {"hours": 0.01},
    "index": {"source": "s"},
    "pretrain": {"manifest": "m", "objective": "wav2vec2", **STEPS},
    "cluster": {"manifest": "m"},
    "encode": {"manifest": "m", "codebook": "c"},
    "measure": {"manifest": "m", "labels": "l"},
    "pack": {"source": "s"},
    "train-lm": {"corpus": "c", **STEPS},
    "score": {"corpus": "c", "lm": "l"},
    "train-synthesizer": {"manifest": "m", "corpus": "c", **STEPS},
    "sample": {"lm": "l", "corpus": "c"},
    "synthesize": {"synthesizer": "s", "corpus": "c"},
    "finetune": {"manifest": "m", "encoder": "e", **STEPS},
    "transcribe": {"manifest": "m", "recognizer": "r"},
    "compare": {"a": "a", "b": "b"},
    "label-efficiency": {"manifest": "m", "encoder": "e", "finetune": {"training": {"max_steps": 1}}},
    "report": {"manifest": "m"},
}


def refused(argv: list[str], capfd: pytest.CaptureFixture[str], *parts: str) -> None:
    capfd.readouterr()
    assert main(argv) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("wordless: ") and all(part in said[0] for part in parts), (
        said
    )


def config(path: Path, **keys: Any) -> str:
    path.write_text(tomli_w.dumps(keys), encoding="utf-8")
    return str(path)


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """Within, no file may grow beyond that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def places(folder: Path) -> dict[Path, str]:
    """Outputs that cannot be, with the reason."""
    (folder / "file").write_text("of somebody")
    (folder / "link").symlink_to(folder / "nowhere")
    (folder / "circle").symlink_to(folder / "circle")
    return {
        folder / "file": f"{folder}/file is no folder",
        folder / "file/below/out": f"{folder}/file is no folder",
        folder / "link": "is a link that leads nowhere",
        folder / ("x" * 300): "File name too long",
        folder / ("x" * 250): "File name too long",  # what is written for it has a longer name
        folder / "/".join(["y" * 200] * 25): "File name too long",
        folder / "circle/out": "Too many levels of symbolic links",
    }


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_an_output_that_cannot_be_before_any_work(
    verb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out, reason in places(tmp_path).items():
        path = config(tmp_path / "c.toml", **LEAST[verb], out=str(out))
        refused([verb, path], capfd, f"{out}: cannot be written (", reason, "choose another `out`")
        if verb in ("index", "pretrain"):  # all verbs go the same way
            refused([verb, path, "--on", "local"], capfd, f"{out}: cannot be written (")
    refused(
        [verb, config(tmp_path / "c.toml", **LEAST[verb], out="")],
        capfd,
        "c.toml: out: is '', and a path is needed",
    )
    assert sorted(os.listdir(tmp_path)) == ["c.toml", "circle", "file", "link"]


def test_import_and_export_look_at_their_output_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    refused(["import", str(tmp_path / "none"), str(tmp_path / "file/out")], capfd, "cannot be written")
    refused(["import", str(tmp_path / "none"), str(tmp_path / "file")], capfd, "cannot be written")
    require_writable(tmp_path / "file", may_be_file=True)  # an export is written anew
    assert os.listdir(tmp_path) == ["file"]


def test_a_recipe_looks_at_the_output_of_every_stage_before_the_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "x.wav", np.zeros(16000), 16000)
    (tmp_path / "file").touch()
    index = {"verb": "index", "source": str(tmp_path), "dev_share": 0.0, "test_share": 0.0}
    stages = {
        "manifest": index,
        "codebook": {"verb": "cluster", "manifest": "@manifest", "out": str(tmp_path / "file/codebook")},
    }
    path = config(tmp_path / "r.toml", run=str(tmp_path / "run"), **stages)
    for on in (["--on", "here"], ["--on", "local"]):
        refused(
            ["run", path, *on],
            capfd,
            f"{tmp_path}/file/codebook: cannot be written ({tmp_path}/file is no folder)",
        )
    refused(["run", path, f"run={tmp_path}/file"], capfd, f"{tmp_path}/file: cannot be written")
    refused(["run", path, "run="], capfd, "r.toml: run: is '', and a path is needed")
    refused(
        ["run", path, "codebook.out=$WORDLESS_NONE/x"],
        capfd,
        "r.toml: codebook.out: ",
        "$WORDLESS_NONE, which is not set",
    )
    assert sorted(os.listdir(tmp_path)) == ["file", "r.toml", "x.wav"]


def test_a_read_only_disk_is_refused_before_any_work(
    disk: Disk, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (disk.path / "there").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk.path)], check=True)
    for out in (disk.path / "new/out", disk.path / "there"):
        path = config(tmp_path / "c.toml", **LEAST["index"], out=str(out))
        refused(["index", path], capfd, f"{out}: cannot be written (", "Read-only file system")


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For root no permission is a hindrance; so the operating system is made to refuse."""

    def refuse(path: Path, *_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for name in ("mkdir", "write_bytes"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, name, refuse)
            out = tmp_path / "new" if name == "mkdir" else tmp_path
            with pytest.raises(
                ValueError, match=rf"{out}: cannot be written \({tmp_path}: Permission denied\)"
            ):
                require_writable(out)
    require_writable(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_limit_of_the_size_of_files_ends_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(120):
        soundfile.write(tmp_path / f"{number:03}_{'x' * 40}.wav", np.zeros(800), 16000)
    argv = ["index", str(tmp_path), str(tmp_path / "m"), "dev_share=0.0", "test_share=0.0", "verify=header"]
    with files_up_to(1000):
        refused(argv, capfd, f"{tmp_path}/m: cannot be written ({tmp_path}: File too large)")
    with files_up_to(4096):
        refused(argv, capfd, "File too large", f"{tmp_path}/m/manifest.parquet")
    assert not list((tmp_path / "m").iterdir())  # neither a manifest nor a temporary file
    assert main(argv) == 0


@pytest.mark.parametrize("library", WRITERS)
def test_whichever_library_meets_the_limit_the_error_is_the_operating_systems(
    tmp_path: Path, library: str
) -> None:
    with (
        pytest.raises(OSError, match="File too large") as told,
        files_up_to(100_000),
        atomic_path(tmp_path / "a") as temporary,
    ):
        WRITERS[library](temporary)
    assert told.value.errno == errno.EFBIG and str(tmp_path / "a") in wordless.cli._in_words(told.value)
    with (
        pytest.raises(OSError, match="File too large"),
        files_up_to(100_000),
        atomic_folder(tmp_path / "b") as folder,
    ):
        WRITERS[library](folder / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "code",
    ["ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENAMETOOLONG", "ENOTDIR", "ESTALE"],
)
def test_an_error_of_the_operating_system_at_any_time_is_one_line(
    code: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(errno, code)
    for error, line in (
        (OSError(number, os.strerror(number), "/a/b"), f"/a/b: {os.strerror(number)}"),
        (OSError(number, os.strerror(number)), os.strerror(number)),
        (OSError(number, os.strerror(number), "/a", None, "/b"), f"/a -> /b: {os.strerror(number)}"),
    ):

        def fail(config: Any, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr(Verb, "load", lambda self, fail=fail: (IndexConfig, fail))
        refused(["index", str(tmp_path / "a"), str(tmp_path / "b")], capfd, f"wordless: {line}")
    monkeypatch.setenv("WORDLESS_TRACEBACK", "1")
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        main(["index", str(tmp_path / "a"), str(tmp_path / "b")])


# Names that are no ASCII, where the locale is


ASCII = {
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONIOENCODING": "",
    "COLUMNS": "200",
}


def run_in_ascii(*argv: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    here = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **ASCII, **environment}
    return subprocess.run(
        [sys.executable, "-m", "wordless", *argv], capture_output=True, env=here, check=False
    )


def test_an_ascii_locale_reads_writes_and_prints_any_name(tmp_path: Path) -> None:
    corpus = tmp_path / "grüße"
    corpus.mkdir()
    soundfile.write(corpus / "ä.wav", np.zeros(16000), 16000)
    (corpus / "ä.txt").write_text("schöne grüße", encoding="utf-8")
    (corpus / "kaputt-ß.wav").write_bytes(b"RIFF")
    path = config(
        tmp_path / "köln.toml",
        source=str(corpus),
        out=str(tmp_path / "ü"),
        dev_share=0.0,
        test_share=0.0,
        max_bad_share=0.5,
    )
    done = run_in_ascii("index", path)
    assert done.returncode == 0, done.stderr
    assert rb"kaputt-\xdf.wav" in done.stderr and b"Traceback" not in done.stderr
    assert [(u.id, u.text) for u in Manifest(tmp_path / "ü")] == [("ä", "schöne grüße")]
    done = run_in_ascii("check", str(tmp_path / "ü"))
    assert done.returncode == 0 and rb"/\xfc: a complete manifest" in done.stdout
    done = run_in_ascii("index", path, "--json")
    assert (
        done.returncode == 2
        and rb"/\xfc: already holds a finished artefact" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )
    # only what is printed is ASCII
    done = run_in_ascii("transcribe", "--help", PYTHONUTF8="1", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"Usage" in done.stdout
