"""Recipes that come with wordless: by name from any folder, listed, copied, and in the wheel."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import get_args

import pytest

import wordless
from quantize.importing import CodebookFormat
from units.formats.known import FORMATS
from wordless.cli import main
from wordless.exporting import EXPORTS, KINDS
from wordless.shipped import FIELDS, describe, recipes
from wordless.verbs import VERBS, Verb

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_described_and_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(describe(recipes()[name])) == len(FIELDS) - 1
    assert main(["check", name]) == 0
    assert f"{name}.toml: a valid recipe with" in capsys.readouterr().out


def test_recipes_are_listed_with_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "recipe" and [row.split()[0] for row in rows] == list(recipes())


def test_a_recipe_runs_by_its_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "demo", "run=here", "speech.hours=0.5", "--dry-run"]) == 0
    resolved = tomllib.loads(capsys.readouterr().out)
    assert resolved["run"] == "here" and resolved["speech"]["hours"] == 0.5


def test_an_unknown_recipe_is_refused_with_the_nearest_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["run", "dmo"], ["check", "dmo"], ["recipes", "dmo", "x.toml"]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "dmo: no such recipe; did you mean 'demo'? There are ctc_10min, demo, " in told


def test_a_file_wins_over_a_recipe_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text('run = "x"\n')
    assert main(["check", "demo"]) == 0
    assert capsys.readouterr().out == "demo: a valid recipe with 0 stages\n"
    assert main(["run", "demo.toml"]) == 2
    assert "demo.toml: no such config file" in capsys.readouterr().err


def test_a_recipe_is_copied_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "mine.toml"
    assert main(["recipes", "fsdd", str(copy)]) == 0
    assert copy.read_bytes() == recipes()["fsdd"].read_bytes()
    assert main(["recipes", "fsdd", str(copy)]) == 2
    assert f"{copy}: exists already" in capsys.readouterr().err
    assert main(["recipes", "fsdd"]) == 2
    assert "wordless recipes fsdd fsdd.toml" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"wordless {wordless.__version__}\n"


@pytest.mark.parametrize("verb", ["transfer", "label-efficiency"])
def test_the_earlier_name_of_a_verb_works(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []
    load = Verb.load
    monkeypatch.setattr(
        Verb, "load", lambda self: (load(self)[0], lambda config: made.append(config.out) or {})
    )
    keys = f'manifest = "{tmp_path}"\nencoder = "e"\nfinetune = {{training = {{max_steps = 1}}}}\n'
    (tmp_path / "a.toml").write_text(f'verb = "{verb}"\nout = "{tmp_path}/a"\n{keys}')
    (tmp_path / "r.toml").write_text(f'run = "{tmp_path}/r"\n[curve]\nverb = "{verb}"\n{keys}')
    assert main(["check", str(tmp_path / "a.toml")]) == 0 == main([verb, str(tmp_path / "a.toml"), "--json"])
    assert main(["run", str(tmp_path / "r.toml"), "--json"]) == 0 and made == [
        f"{tmp_path}/a",
        f"{tmp_path}/r/curve",
    ]
    assert "curve: label-efficiency -> " in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "\n  transfer" not in capsys.readouterr().out and "transfer" not in VERBS


def test_every_package_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for room in ("pretrain", "quantize", "units", "slurm", "wordless")
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == found | {"wordless.recipes"}


@pytest.mark.slow
def test_a_wheel_works_in_another_folder(tmp_path: Path) -> None:
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listed:  # a build leaves folders behind
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-c",
        f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})",
    ]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("wordless-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(unpacked)
    assert (unpacked / "wordless" / "py.typed").is_file()
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": "1"}
    for argv in (["recipes"], ["check", "demo"], ["run", "demo", "run=x", "--dry-run"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-m", "wordless", *argv],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert argv != ["check", "demo"] or str(unpacked) in done.stdout


def test_the_formats_of_export_are_those_that_their_writers_know() -> None:
    assert EXPORTS["corpus"] == list(FORMATS)
    assert EXPORTS["codebook"] == list(get_args(CodebookFormat))
    assert set(KINDS.values()) == set(EXPORTS)
