"""How CI keeps the packages of its second stage (.ci/fairseq2_environment.py): built once, shared, never half. Nothing is installed here."""

import importlib.util
import shutil
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def ci(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fairseq2_environment", ROOT / ".ci" / "fairseq2_environment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 0, 10**12))
    return module


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
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints-fairseq2.txt").read_text().splitlines())
    pins = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines if line)}
    for requirement in map(Requirement, ci.requirements(ROOT)):
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), requirement


def test_packages_are_other_ones_when_a_version_or_a_requirement_is_and_not_for_a_comment(ci: ModuleType, clone: Path) -> None:
    first = ci.key(clone)
    rewrite(clone / "constraints-fairseq2.txt", "# ", "# Really: ")
    rewrite(clone / "pyproject.toml", 'version = "0.1.0"', 'version = "0.2.0"')
    assert ci.key(clone) == first
    rewrite(clone / "constraints-fairseq2.txt", "transformers==", "transformers==1")
    second = ci.key(clone)
    rewrite(clone / "pyproject.toml", '"safetensors>=', '"safetensors>=0.0.')
    assert len({first, second, ci.key(clone)}) == 3


def test_clones_at_a_time_build_once_and_share(ci: ModuleType, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_too_little_disk_is_said_before_anything_is_fetched(ci: ModuleType, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 0, 3 * 10**9))
    monkeypatch.setattr(ci, "install", pytest.fail)
    with pytest.raises(SystemExit, match=r"cache has 3\.0 GB free; fairseq2 and torch 2\.9\.1 need 14"):
        ci.packages(clone, clone / "cache")


def test_without_packages_to_be_had_it_fails_and_says_so(ci: ModuleType, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(folder: Path, with_pip: bool) -> None:
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to("/bin/false")  # a pip that fails, for any reason

    monkeypatch.setattr(ci.venv, "create", create)
    with pytest.raises(SystemExit, match="pip could not install fairseq2 and its requirements"):
        ci.install(clone, clone / "folder")


def test_a_python_without_wheels_of_fairseq2_hands_over_or_says_so(ci: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="this is 3.13, and neither is on the PATH"):
        ci.use_a_python_that_will_do()
    called: list[str] = []
    monkeypatch.setattr(shutil, "which", lambda name: {"python3.12": "/bin/false", "python3.11": "/bin/true"}[name])
    monkeypatch.setattr(ci.os, "execv", lambda path, argv: called.append(path))
    with pytest.raises(SystemExit):  # what is behind a call that never returns
        ci.use_a_python_that_will_do()
    assert called == ["/bin/true"]  # python3.12 does not run
