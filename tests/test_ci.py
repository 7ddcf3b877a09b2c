"""CI's own programs. How it keeps the packages of its last stage (.ci/fairseq2_environment.py): built once,
shared, never half; nothing is installed here. How it hides what it installs (.ci/bare.py), and runs every
test once in two passes (tests/passes.py)."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
DiskUsage = namedtuple("DiskUsage", "total used free")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ci(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("fairseq2_environment")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 0, 10**12))
    return module


@pytest.fixture
def bare() -> ModuleType:
    return load("bare")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("pyproject.toml", "constraints-fairseq2.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_everything_that_is_asked_for_is_pinned_to_a_version_that_will_do(ci: ModuleType) -> None:
    lines = (
        line.partition("#")[0].strip()
        for line in (ROOT / "constraints-fairseq2.txt").read_text().splitlines()
    )
    pins = {
        name.lower().replace("_", "-"): version
        for name, _, version in (line.partition("==") for line in lines if line)
    }
    for requirement in map(Requirement, ci.requirements(ROOT)):
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), requirement


def test_packages_are_other_ones_when_a_version_or_a_requirement_is_and_not_for_a_comment(
    ci: ModuleType, clone: Path
) -> None:
    first = ci.key(clone)
    rewrite(clone / "constraints-fairseq2.txt", "# ", "# Really: ")
    rewrite(clone / "pyproject.toml", 'description = "', 'description = "New: ')
    assert ci.key(clone) == first
    rewrite(clone / "constraints-fairseq2.txt", "transformers==", "transformers==1")
    second = ci.key(clone)
    rewrite(clone / "pyproject.toml", '"safetensors>=', '"safetensors>=0.0.')
    assert len({first, second, ci.key(clone)}) == 3


def test_clones_at_a_time_build_once_and_share(
    ci: ModuleType, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def install(root: Path, folder: Path) -> None:
        built.append(folder)
        folder.mkdir()
        (folder / "package").touch()

    monkeypatch.setattr(ci, "install", install)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: ci.packages(clone, clone / "cache"), range(4)))
    assert len(built) == 1 and len(set(folders)) == 1
    assert [path.name for path in folders[0].iterdir()] == ["package"]


@pytest.mark.parametrize("how", [SystemExit("pip could not"), KeyboardInterrupt()])
def test_a_build_that_fails_or_is_cut_off_is_never_used(
    how: BaseException, ci: ModuleType, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(root: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise how

    def install(root: Path, folder: Path) -> None:
        folder.mkdir()  # the remains are gone

    monkeypatch.setattr(ci, "install", fail)
    with pytest.raises(type(how)):
        ci.packages(clone, clone / "cache")
    assert [path.suffix for path in (clone / "cache").iterdir()] == [".lock"]
    unfinished = clone / "cache" / f"fairseq2-{ci.key(clone)}.unfinished"
    unfinished.mkdir()  # as one leaves it that was killed
    (unfinished / "half").touch()
    monkeypatch.setattr(ci, "install", install)
    assert list(ci.packages(clone, clone / "cache").iterdir()) == []
    assert not unfinished.exists()


def test_packages_of_other_versions_stay_and_are_named(
    ci: ModuleType, clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = clone / "cache" / "fairseq2-0123456789abcdef"
    old.mkdir(parents=True)
    monkeypatch.setattr(ci, "install", lambda root, folder: folder.mkdir())
    ci.packages(clone, clone / "cache")
    assert f"to be removed by hand when no clone uses them: {old}\n" in capsys.readouterr().out
    assert old.exists()


def test_too_little_disk_is_said_before_anything_is_fetched(
    ci: ModuleType, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 0, 3 * 10**9))
    monkeypatch.setattr(ci, "install", pytest.fail)
    with pytest.raises(SystemExit, match=r"cache has 3\.0 GB free; fairseq2 and torch 2\.9\.1 need 14"):
        ci.packages(clone, clone / "cache")


def test_without_packages_to_be_had_it_fails_and_says_so(
    ci: ModuleType, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(folder: Path, with_pip: bool) -> None:
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to("/bin/false")  # a pip that fails, for any reason

    monkeypatch.setattr(ci.venv, "create", create)
    with pytest.raises(SystemExit, match="pip could not install fairseq2 and its requirements"):
        ci.install(clone, clone / "folder")


def test_a_python_without_wheels_of_fairseq2_hands_over_or_says_so(
    ci: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="this is 3.13, and neither is on the PATH"):
        ci.use_a_python_that_will_do()
    called: list[str] = []
    monkeypatch.setattr(
        shutil, "which", lambda name: {"python3.12": "/bin/false", "python3.11": "/bin/true"}[name]
    )
    monkeypatch.setattr(ci.os, "execv", lambda path, argv: called.append(path))
    with pytest.raises(SystemExit):  # what is behind a call that never returns
        ci.use_a_python_that_will_do()
    assert called == ["/bin/true"]  # python3.12 does not run


# What is hidden


LOAD = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"


def loads(library: str, **environment: str) -> bool:
    """In a process of its own: this one may have the library of soundfile's wheel, whose name is the same."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, library],
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def in_sight(bare: ModuleType) -> list[str]:
    """The programs along the PATH, and the libraries that load, that are in the table of what is hidden."""
    folders = [Path(folder or ".") for folder in os.environ["PATH"].split(os.pathsep)]
    names = {name for folder in folders if folder.is_dir() for name in os.listdir(folder)}
    programs = sorted(name for name in names if bare.is_hidden(name) and shutil.which(name))
    return programs + [name for _, libraries in bare.HIDDEN.values() for name in libraries if loads(name)]


@pytest.mark.skipif(
    os.environ.get("WORDLESS_BARE") != "1", reason="only in the pass of .ci/run that hides what it installs"
)
def test_no_srun_no_libsndfile_and_nothing_else_that_ci_installs_is_in_sight(bare: ModuleType) -> None:
    assert not shutil.which("srun") and not loads("libsndfile.so.1")
    assert in_sight(bare) == []


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has everything, as the environment shows it: `srun` among other programs, and a
    libsndfile that loads."""
    for place in ("bin/srun", "bin/slurmctld", "bin/chromium", "bin/greet", "other/greet", "other/tool"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(f"#!/bin/sh\necho {place}\n")
        (tmp_path / place).chmod(0o755)
    (tmp_path / "lib").mkdir()
    wheel = importlib.util.find_spec("_soundfile_data")
    assert wheel is not None and wheel.origin is not None
    shutil.copy(next(Path(wheel.origin).parent.glob("libsndfile*.so")), tmp_path / "lib" / "libsndfile.so.1")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{tmp_path}/other:{os.environ['PATH']}")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "lib"))
    return tmp_path


def test_what_is_in_the_table_is_seen_where_it_is_and_hidden_where_it_is_to_be(
    bare: ModuleType, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"srun", "slurmctld", "chromium", "libsndfile.so.1"} <= set(in_sight(bare))
    (machine / "hidden").mkdir()
    for name, value in bare.hide(machine / "hidden", dict(os.environ)).items():
        monkeypatch.setenv(name, value)
    assert in_sight(bare) == []
    assert loads(str(machine / "lib" / "libsndfile.so.1"))  # as soundfile loads that of its wheel


def test_a_command_runs_without_what_is_hidden_and_with_everything_else(machine: Path) -> None:
    script = """
        command -v srun slurmctld chromium; greet; tool; echo "$WORDLESS_BARE"
        srun 2>&-; echo "$?"
        "$1" -c "$2" libsndfile.so.1 2>&1 | tail -n 1 | cut -d : -f 1
        exit 3"""
    argv = [sys.executable, str(ROOT / ".ci" / "bare.py"), "sh", "-c", script, "sh", sys.executable, LOAD]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.returncode) == (["bin/greet", "other/tool", "1", "127", "OSError"], 3)


def test_an_environment_that_is_made_where_things_are_hidden_outlives_that(machine: Path) -> None:
    (machine / "bin" / "python3").symlink_to(sys._base_executable)  # type: ignore[attr-defined]
    make = [
        sys.executable,
        str(ROOT / ".ci" / "bare.py"),
        "python3",
        "-m",
        "venv",
        "--without-pip",
        str(machine / "made"),
    ]
    subprocess.run(make, check=True)
    asked = [machine / "made" / "bin" / "python", "-c", "import sys; print(sys.prefix)"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == f"{machine / 'made'}\n"


def test_folders_with_nothing_to_hide_stay_on_the_path_as_they_are(bare: ModuleType, machine: Path) -> None:
    (machine / "hidden").mkdir()
    path = bare.hide(machine / "hidden", {"PATH": f"{machine}/bin:{machine}/other:{machine}/none"})[
        "PATH"
    ].split(":")
    assert path == [f"{machine}/hidden/path0", f"{machine}/other", f"{machine}/none"]
    assert os.listdir(path[0]) == ["greet"]


def test_the_bare_pass_comes_first_and_hides_every_package_that_ci_installs(bare: ModuleType) -> None:
    text = (ROOT / ".ci" / "run").read_text()
    packages = {name for names in re.findall(r"packages\+=\((.*?)\)", text) for name in names.split()}
    assert {"slurm-wlm", "munge", "libsndfile1"} <= packages <= set(bare.HIDDEN)
    order = [
        ".ci/bare.py make test",
        "--passed-to=$passed",
        "apt-get install",
        '--not-in="$passed"',
        "make test-fairseq2",
    ]
    assert sorted(order, key=text.index) == order


# Every test once, in two passes


def test_the_second_pass_runs_what_did_not_pass_in_the_first_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os, pathlib, pytest\n"
        "@pytest.fixture\n"
        "def broken():\n"
        "    yield\n"
        "    assert 'THERE' in os.environ\n"
        "@pytest.fixture(autouse=True)\n"
        "def ran(request): pathlib.Path(os.environ['RAN'], request.function.__name__).touch()\n"
        "@pytest.mark.parametrize('text', ['a::b @ c', 'ü\\n'])\n"
        "def test_passes(text): pass\n"
        "@pytest.mark.skipif('THERE' not in os.environ, reason='not there')\n"
        "def test_needs_it(): pass\n"
        "def test_ends_badly(ran, broken): pass\n"
        "@pytest.mark.slow\n"
        "def test_slow(): pass\n"
    )

    def run(name: str, *arguments: str, **environment: str) -> list[str]:
        """The functions that ran."""
        (tmp_path / name).mkdir()
        environment |= {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAN": str(tmp_path / name),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        argv = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            "/dev/null",
            "-p",
            "tests.passes",
            "-W",
            "ignore",
            *arguments,
        ]
        subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, check=False)
        return sorted(os.listdir(tmp_path / name))

    first = run("first", "-p", "xdist", "-n", "2", "-m", "not slow", "--passed-to=passed.txt")
    assert first == ["test_ends_badly", "test_passes"]
    # test_passes, with each of its parameters
    assert len((tmp_path / "passed.txt").read_text().splitlines()) == 2
    assert run("second", "--not-in=passed.txt", THERE="1") == [
        "test_ends_badly",
        "test_needs_it",
        "test_slow",
    ]
