"""Make `.venv-fairseq2`: what wordless needs with the extra fairseq2, and this clone of wordless itself.

fairseq2 pins torch 2.9.1, so it cannot live in `.venv`. Its 8 GB are kept outside the clone, in a folder
named after everything that decides what is in it, so that clones share them and no run of CI waits for them
twice. They hold packages only, never wordless: the clone's own environment sees them through a `.pth` file
and adds the clone in editable form, with its command and entry points.

Exits with 1 and the reason where it cannot: no Python that fairseq2 has wheels for, too little disk, no
packages to be had.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = ".ci/fairseq2_environment.py"
ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ((3, 12), (3, 11))  # fairseq2 0.8.1 has wheels for these and older ones
EXTRAS = ("demo", "dev", "lm", "peers", "fairseq2")
NEEDED_GB = 14  # 8 installed, 4 of wheels while pip works, and room to breathe


def requirements(root: Path) -> list[str]:
    """What the environment holds besides wordless: its requirements with all extras, and what builds it."""
    import tomllib  # an older Python gets as far as `use_a_python_that_will_do`

    project = tomllib.loads((root / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    return [
        *project["project"]["dependencies"],
        *(requirement for extra in EXTRAS for requirement in extras[extra]),
        *project["dependency-groups"]["fairseq2-tests"],
        *project["build-system"]["requires"],
    ]


def key(root: Path) -> str:
    """A short name for what the packages are; comments and order do not count."""
    lines = (
        line.partition("#")[0].strip()
        for line in (root / "constraints-fairseq2.txt").read_text().splitlines()
    )
    made_of = [
        sys.implementation.cache_tag,
        platform.system(),
        platform.machine(),
        sorted(requirements(root)),
        sorted(filter(None, lines)),
    ]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One builder at a time; the lock goes with the process that holds it."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process holds {path}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def packages(root: Path, cache: Path) -> Path:
    """The folder of packages for `root`, an environment without its programs; built if it is not there
    yet."""
    folder = cache / f"fairseq2-{key(root)}"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if folder.exists():
            return folder
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a build that was cut off
        free = shutil.disk_usage(cache).free / 1e9
        if free < NEEDED_GB:
            raise SystemExit(
                f"{NAME}: {cache} has {free:.1f} GB free; fairseq2 and torch 2.9.1 need {NEEDED_GB} (8 once "
                "installed)"
            )
        say(f"installing fairseq2, torch 2.9.1 and what the tests need in {folder}: 8 GB, once")
        started = time.monotonic()
        try:
            install(root, unfinished)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        unfinished.rename(folder)
        say(f"installed in {(time.monotonic() - started) / 60:.1f} minutes")
        others = sorted(str(path) for path in cache.glob("fairseq2-*") if path.is_dir() and path != folder)
        if others:
            say(f"of other versions, to be removed by hand when no clone uses them: {' '.join(others)}")
    return folder


def install(root: Path, folder: Path) -> None:
    """Fill `folder` with an environment, less its programs, which would name a folder that is about to be
    renamed."""
    venv.create(folder, with_pip=True)
    wanted = folder / "requirements.txt"
    wanted.write_text("\n".join(requirements(root)) + "\n")
    # no cache of pip's own: this folder is the cache
    pip = [
        str(folder / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-cache-dir",
    ]
    temporary = folder / "tmp"  # wheels are unpacked where the disk was found large enough
    temporary.mkdir()
    constraints = root / "constraints-fairseq2.txt"
    done = subprocess.run(
        [*pip, "--constraint", str(constraints), "--requirement", str(wanted)],
        env={**os.environ, "TMPDIR": str(temporary)},
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"{NAME}: pip could not install fairseq2 and its requirements (its message is above); the tests "
            "with fairseq2 need a package index or an environment built before. Nothing was kept"
        )
    shutil.rmtree(temporary)
    shutil.rmtree(folder / "bin")


def link(root: Path, folder: Path) -> None:
    """Make `root`/.venv-fairseq2 anew above the packages in `folder`, with wordless in editable form."""
    environment = root / ".venv-fairseq2"
    venv.create(environment, clear=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (there,) = folder.glob("lib/python*/site-packages")
    (site_packages / "packages.pth").write_text(f"{there}\n")
    for library in folder.glob("lib/*.so*"):  # fairseq2's C++ part looks for oneTBB here
        (environment / "lib" / library.name).symlink_to(library)
    pip = [
        str(environment / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", str(root)], check=True)
    check = "from pretrain.fairseq2.available import require_fairseq2; require_fairseq2('.venv-fairseq2')"
    done = subprocess.run(
        [environment / "bin" / "python", "-c", check],
        cwd=root,
        check=False,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{NAME}: {done.stderr.splitlines()[-1]}")


def say(text: str) -> None:
    """Tell the user, at once."""
    print(f"{NAME}: {text}", flush=True)


def use_a_python_that_will_do() -> None:
    """Go on in the newest Python that fairseq2 has wheels for, where this one is too new."""
    if sys.version_info[:2] in PYTHONS:
        return
    for major, minor in PYTHONS:
        path = shutil.which(f"python{major}.{minor}")
        # pyenv puts a name on the PATH for every Python it has, whether it may be called or not
        if path and subprocess.run([path, "-c", ""], check=False, stderr=subprocess.DEVNULL).returncode == 0:
            os.execv(path, [path, *sys.argv])  # noqa: S606
    here = ".".join(map(str, sys.version_info[:2]))
    raise SystemExit(
        f"{NAME}: fairseq2 has wheels for Python 3.11 and 3.12; this is {here}, and neither is on the PATH. "
        "Install one, or name it: make FAIRSEQ2_PYTHON=/path/to/python3.12 install-fairseq2"
    )


def main() -> None:
    """The packages, then this clone's environment above them."""
    use_a_python_that_will_do()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wordless"
    link(ROOT, packages(ROOT, cache))


if __name__ == "__main__":
    main()
