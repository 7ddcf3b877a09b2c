"""The copy of the code that a job runs, and what is known of the checkout it came from."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import slurm.launch
from pretrain.store.artefact import git_commit
from slurm.launch import launch
from slurm.resources import Resources
from slurm.snapshot import NAMES, ROOT, git_state, snapshot, snapshot_path, uncommitted
from slurm.submission import read_submission

MAIN = """
import os
def main(argv):
    print("one", __file__, os.environ.get("WORDLESS_COMMIT"))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small wordless under git: our `slurm`, rooms that hold a file, and a main that prints one word."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "slurm", root / "slurm", ignore=shutil.ignore_patterns("__pycache__"))
    for room in ("pretrain", "quantize", "units"):
        (root / room / "__pycache__").mkdir(parents=True)
        (root / room / "__init__.py").write_text("")
        (root / room / "__pycache__" / "__init__.pyc").write_bytes(b"compiled")
    (root / "units" / "page.html.j2").write_text("{{ title }}")
    (root / "wordless").mkdir()
    (root / "wordless" / "__init__.py").write_text("")
    (root / "wordless" / "cli.py").write_text(MAIN)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.org", "-c", "commit.gpgsign=false"]
    (root / ".gitignore").write_text("__pycache__\n")
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


def test_a_snapshot_has_the_code_and_its_data_and_nothing_compiled(checkout: Path, tmp_path: Path) -> None:
    code = snapshot(checkout, NAMES, tmp_path / "jobs")
    files = {path.relative_to(code).as_posix() for path in code.rglob("*") if path.is_file()}
    expected = {path.relative_to(checkout).as_posix() for path in checkout.rglob("*.py")} | {
        "units/page.html.j2"
    }
    assert files == expected
    assert all((code / name).read_bytes() == (checkout / name).read_bytes() for name in files)


def test_a_snapshot_is_made_once_for_each_state_of_the_code(checkout: Path, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    assert not snapshot_path(checkout, NAMES, jobs).exists()
    first = snapshot(checkout, NAMES, jobs)
    (checkout / "docs.md").write_text("no code")
    made = first.stat().st_mtime_ns
    assert snapshot(checkout, NAMES, jobs) == first == snapshot_path(checkout, NAMES, jobs)
    assert first.stat().st_mtime_ns == made
    (checkout / "units" / "page.html.j2").write_text("{{ other }}")
    second = snapshot(checkout, NAMES, jobs)
    assert second != first and sorted(path.name for path in jobs.iterdir()) == sorted(
        [first.name, second.name]
    )
    os.rename(checkout / "units" / "page.html.j2", checkout / "units" / "sheet.html.j2")
    assert snapshot(checkout, NAMES, jobs) not in (first, second)


def test_code_that_changes_while_it_is_copied_is_an_error(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copyfile = shutil.copyfile

    def edited(source: Path, copy: Path) -> None:
        (checkout / "wordless" / "cli.py").write_text("edited")
        copyfile(source, copy)

    monkeypatch.setattr(shutil, "copyfile", edited)
    with pytest.raises(ValueError, match="the code changed while it was copied"):
        snapshot(checkout, NAMES, tmp_path / "jobs")
    assert list((tmp_path / "jobs").iterdir()) == []


def test_the_state_of_the_checkout_is_its_commit_and_whether_anything_differs(
    checkout: Path, tmp_path: Path
) -> None:
    state = git_state(checkout)
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    assert uncommitted(checkout) == b""
    (checkout / "new.py").write_text("")
    assert git_state(checkout) == {**state, "dirty": True}
    (checkout / "new.py").unlink()
    (checkout / "wordless" / "cli.py").write_text("edited\n")
    assert git_state(checkout) == {**state, "dirty": True}
    assert b"+edited" in uncommitted(checkout)


def test_what_is_installed_in_another_projects_checkout_has_no_git_state(
    checkout: Path, tmp_path: Path
) -> None:
    inside = checkout / "venv" / "site-packages"
    inside.mkdir(parents=True)
    (inside / "wordless").mkdir()
    (inside / "wordless" / "__init__.py").write_text("")  # not under git
    assert git_state(inside) is None
    assert git_state(tmp_path) is None


@pytest.mark.parametrize("kept", [True, False])
def test_a_job_runs_the_snapshot_though_the_checkout_is_edited_before_it_starts(
    checkout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kept: bool,
) -> None:
    monkeypatch.setattr(slurm.launch, "ROOT", checkout)
    monkeypatch.setenv("PYTHONPATH", str(checkout))  # the checkout is what would run
    (checkout / "slurm" / "note.py").write_text("")
    (checkout / "units" / "page.html.j2").write_text("{{ tracked }}")
    resources = Resources(snapshot=kept, setup=(f"sed -i s/one/two/ {checkout}/wordless/cli.py",))
    done = launch(["x"], "local", resources, tmp_path / "run" / "jobs" / "x", wait=True)
    submission = read_submission(done.folder)
    word, file, commit = capsys.readouterr().out.split()
    assert submission.git is not None and submission.git["dirty"] is True
    if kept:
        code = tmp_path / "run" / "jobs" / Path(str(submission.code)).name
        assert word == "one" and Path(file).parents[1] == code and (code / "slurm" / "note.py").exists()
        assert commit == submission.git["commit"][:12] + "+"
        monkeypatch.setenv("WORDLESS_COMMIT", commit)
        assert git_commit() == commit  # what a `meta.json` gets
    else:
        assert word == "two" and submission.code is None and commit == "None"
    patch = (done.folder / "uncommitted.patch").read_text()
    assert "+{{ tracked }}" in patch and "note.py" not in patch  # an untracked file is in the snapshot alone
