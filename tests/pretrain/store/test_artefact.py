import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.store import artefact
from pretrain.store.artefact import commit, is_complete, keep_to_plan, read_meta, require_absent
from pretrain.store.disk import atomic_folder, atomic_path, write_json
from pretrain.store.hashes import sha256_file


def make(
    folder: Path, content: str = "abc", kind: str = "thing", config: dict | None = None, **extra: object
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.txt").write_text(content)
    return commit(folder, kind, config or {}, {"mother": "0123"}, ["data.txt"], **extra)


def test_an_interrupted_write_leaves_nothing_visible(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "table.bin") as temporary:
        temporary.write_bytes(b"half of i")
        raise RuntimeError("interrupted")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_rewrite_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.json"
    write_json(path, {"value": 1})
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert json.loads(path.read_text()) == {"value": 1}
    assert os.listdir(path.parent) == ["table.json"]


def test_until_the_rename_the_file_has_another_name_that_is_hidden(tmp_path: Path) -> None:
    path = tmp_path / "table.bin"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"whole")
        assert not path.exists() and temporary.name.startswith(".") and temporary.parent == path.parent
    assert path.read_bytes() == b"whole" and os.listdir(tmp_path) == ["table.bin"]


def test_meta_comes_last_and_says_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "thing"
    with monkeypatch.context() as patched:
        patched.setattr(artefact, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            make(folder)
    assert not is_complete(folder)
    with pytest.raises(ValueError, match=r"thing: no meta\.json, so not a complete thing; run the stage"):
        read_meta(folder, "thing")
    require_absent(folder)  # unfinished work may be taken up again
    fingerprint = make(folder, config={"lr": 1.5}, frame_rate_hz=50.0)
    meta = read_meta(folder, "thing")
    assert meta["fingerprint"] == fingerprint and len(fingerprint) == 16
    assert (meta["kind"], meta["config"], meta["parents"], meta["frame_rate_hz"]) == (
        "thing",
        {"lr": 1.5},
        {"mother": "0123"},
        50.0,
    )
    assert meta["files"] == {"data.txt": sha256_file(folder / "data.txt")}
    assert meta["versions"]["torch"] and meta["format_version"] == 1 and "git_commit" in meta


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    first = make(tmp_path / "a", config={"seed": 1})
    assert make(tmp_path / "somewhere" / "else", config={"seed": 2}) == first
    assert make(tmp_path / "b", content="abd") != first
    assert make(tmp_path / "c", kind="other") != first


def test_a_finished_artefact_is_not_written_over(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(
        ValueError, match="a: already holds a finished artefact; remove it or choose another `out`"
    ):
        require_absent(tmp_path / "a")
    require_absent(tmp_path / "b")


def test_another_kind_a_newer_format_and_damage_are_told_apart(tmp_path: Path) -> None:
    make(tmp_path / "a")
    assert read_meta(tmp_path / "a")["kind"] == "thing"
    with pytest.raises(ValueError, match="a: is a 'thing'; a 'codebook' is needed here"):
        read_meta(tmp_path / "a", "codebook")
    with pytest.raises(ValueError, match="nowhere: no such codebook"):
        read_meta(tmp_path / "nowhere", "codebook")
    path = tmp_path / "a" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "format_version": 2}))
    with pytest.raises(ValueError, match=r"format 2 is newer than this wordless reads \(1\)"):
        read_meta(tmp_path / "a", "thing")
    for damage in ("{", "[]", "{}", '"text"'):
        path.write_text(damage)
        with pytest.raises(ValueError, match=r"meta\.json: not "):
            read_meta(tmp_path / "a")


def test_unfinished_work_is_known_by_all_the_keys_of_its_plan(tmp_path: Path) -> None:
    plan = {"manifest": "m", "sweep": "x"}
    keep_to_plan(tmp_path, plan)
    keep_to_plan(tmp_path, plan)
    for other in ({"manifest": "m"}, {"manifest": "m", "sweep": "y"}, {**plan, "split": "train"}):
        with pytest.raises(ValueError, match="unfinished work on something else"):
            keep_to_plan(tmp_path, other)


def test_a_folder_is_visible_once_all_in_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("half of i")
        raise RuntimeError("interrupted")
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "deep" / "out") as temporary:
        (temporary / "b").mkdir()
        (temporary / "b" / "a").write_text("whole")
        assert temporary.name.startswith(".") and not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep/out/b/a").read_text() == "whole" and os.listdir(tmp_path / "deep") == ["out"]


def test_the_library_that_learns_merges_is_among_the_versions() -> None:
    assert {"torch", "numpy", "tokenizers"} <= artefact.library_versions().keys()


def test_json_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pretrain.store.artefact import *; p = Path(sys.argv[1])\n"
    )
    program += (
        r"write_json(p / 'a.json', {'text': '\u017c|\ud558'}); commit(p, 'x', {'text': '\u017c|\ud558'}, {}, "
        r"['a.json']); read_meta(p)"
    )
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=ascii_only, cwd=root)
    assert json.loads((tmp_path / "a.json").read_bytes().decode("utf-8")) == {"text": "ż|하"}
    assert read_meta(tmp_path)["config"] == {"text": "ż|하"}
