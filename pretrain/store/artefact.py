"""Artefacts: folders whose `meta.json` is written last, so that a visible artefact is a complete one.

`meta.json` holds the format version, the kind, the resolved config, library versions, the git commit, the
fingerprints of the parents and the artefact's own fingerprint. A folder without `meta.json` is unfinished
work, never an artefact.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.store.disk import write_json
from pretrain.store.hashes import sha256_file
from pretrain.store.schemes import plugin, split_scheme

FORMAT_VERSION = 1
META_KEY = "meta_sha256"


def commit(
    folder: Path,
    kind: str,
    config: dict[str, Any],
    parents: dict[str, str],
    files: Sequence[str] | Mapping[str, str],
    **extra: Any,
) -> str:
    """Completes `folder`: writes its `meta.json` for the named `files` (with their SHA-256 if known). Returns
    the fingerprint.

    The fingerprint is a SHA-256 over the kind and the names and SHA-256 of `files`: the content, not the time
    or place. `extra` keys (frame rate, codebook, counts) belong to the module of the artefact.
    """
    known = files if isinstance(files, Mapping) else {}
    hashes = {name: known.get(name) or sha256_file(folder / name) for name in sorted(files)}
    fingerprint = hashlib.sha256(json.dumps([kind, hashes]).encode()).hexdigest()[:16]
    meta = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "fingerprint": fingerprint,
        "parents": parents,
        "files": hashes,
        "versions": library_versions(),
        "git_commit": git_commit(),
        **extra,
        "config": config,
    }
    write_json(folder / "meta.json", {**meta, META_KEY: _meta_hash(meta)})
    return fingerprint


def read_meta(folder: str | Path, kind: str | None = None) -> dict[str, Any]:
    """`meta.json` of a complete artefact. Raises ValueError if it is missing, unfinished, of another kind or
    a newer format."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such {kind or 'artefact'}")
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: no meta.json, so not a complete {kind or 'artefact'}; run the stage that writes it"
        ) from None
    except ValueError as error:  # or not UTF-8
        raise ValueError(f"{folder}/meta.json: not valid JSON ({error})") from None
    if not isinstance(meta, dict) or not {"format_version", "kind", "fingerprint"} <= meta.keys():
        raise ValueError(f"{folder}/meta.json: not written by wordless")
    if kind is not None and meta["kind"] != kind:
        raise ValueError(f"{folder}: is a {meta['kind']!r}; a {kind!r} is needed here")
    if meta["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{folder}: format {meta['format_version']} is newer than this wordless reads ({FORMAT_VERSION})"
        )
    return meta


def require_as_written(folder: str | Path, meta: dict[str, Any]) -> None:
    """Raises ValueError if the meta data are not those that `commit` wrote. Those of older versions have no
    hash."""
    if meta.get(META_KEY) not in (None, _meta_hash(meta)):
        raise ValueError(
            f"{folder}/meta.json: damaged or edited: not what was written (SHA-256); restore it, or remove "
            f"{folder} and make it again"
        )


def _meta_hash(meta: dict[str, Any]) -> str:
    rest = {key: value for key, value in meta.items() if key != META_KEY}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def is_complete(folder: str | Path) -> bool:
    """Whether the folder has its `meta.json`, which is written last."""
    return (Path(folder) / "meta.json").is_file()


def known_by(source: str | Path) -> set[str]:
    """The fingerprints by which artefacts made from `source` now refer to it.

    Of a training run that of its weights, of other artefacts their own, of `scheme:NAME` that of the model.
    Empty if nothing finished is there, or the model cannot be read here.
    """
    if (named := split_scheme(source)) is not None:
        scheme, name = named
        return {fingerprint} if (fingerprint := plugin(scheme).current_fingerprint(name)) else set()
    if not is_complete(source):
        return set()
    meta = read_meta(source)
    return {meta["fingerprint"], *(sha256[:16] for sha256 in meta["files"].values())}


def require_absent(folder: str | Path) -> None:
    """Raises ValueError if a finished artefact is there."""
    if is_complete(folder):
        raise ValueError(f"{folder}: already holds a finished artefact; remove it or choose another `out`")


def library_versions() -> dict[str, str]:
    """Versions of wordless and of the libraries that decide numbers."""
    names = ["wordless", "torch", "numpy", "faiss-cpu", "faiss-gpu-cu12", "safetensors", "tokenizers"]
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """The commit of the wordless checkout that runs, with `+` when its files differ from it; None outside a
    checkout.

    For a job that runs a copy of the code, WORDLESS_COMMIT is its commit.
    """
    if commit := os.environ.get("WORDLESS_COMMIT"):
        return commit
    root = Path(__file__).resolve().parents[2]
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def keep_to_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Records in `plan.json` the inputs of the unfinished work in `folder`. Raises ValueError if they were
    others before."""
    path = folder / "plan.json"
    if not path.is_file():
        write_json(path, plan)
        return
    if differing := disagreements(json.loads(path.read_text(encoding="utf-8")), plan):
        raise ValueError(
            f"{folder}: holds unfinished work on something else ({differing}); remove it or change `out`"
        )


def disagreements(there: dict[str, Any], now: dict[str, Any]) -> str:
    """The keys whose values differ, for a message; empty if all agree."""
    keys = dict.fromkeys([*now, *there])
    return "; ".join(
        f"{key} {there.get(key)!r} there, {now.get(key)!r} now"
        for key in keys
        if there.get(key) != now.get(key)
    )
