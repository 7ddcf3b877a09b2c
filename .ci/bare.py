#!/usr/bin/env python3
"""Run a command as on a machine that has none of what `.ci/run` installs: `.ci/bare.py make test`.

The README promises `make test` on a bare machine, and a machine of CI is kept, with the packages of the run
before. So programs are hidden from the PATH and libraries from the loader, for this command and what it
starts; nothing on the machine changes.

- A folder of the PATH that holds a program of `HIDDEN` is replaced by a folder of links to everything else in
  it. Folders without one stay as they are: a virtual environment's Python finds its packages by its own path.
- The loader looks through LD_LIBRARY_PATH first and takes an empty file of the library's name there for a
  broken library, so loading it by its name raises OSError, as if it were missing. Only
  `ctypes.util.find_library`, which asks ldconfig, still finds the name. A mount namespace would need root, or
  a kernel that gives namespaces away; this works for every user.

What is given by its full path is not hidden: the libraries in the wheels of soundfile and espeakng-loader are
loaded so, and are to be. The command runs with WORDLESS_BARE=1, by which a test in tests/test_ci.py knows
that nothing of `HIDDEN` may be in sight.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

# By Debian's package: patterns of its programs, and names of libraries as they are asked for. A test holds
# `.ci/run` to this table: what that installs must have its line here. The others are those that a test could
# come to need where a developer happens to have them.
HIDDEN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "slurm-wlm": (
        (
            "sacct",
            "sacctmgr",
            "salloc",
            "sattach",
            "sbatch",
            "sbcast",
            "scancel",
            "scontrol",
            "scrontab",
            "sdiag",
            "sinfo",
            "sprio",
            "squeue",
            "sreport",
            "srun",
            "sshare",
            "sstat",
            "strigger",
            "slurm*",
        ),
        (),
    ),
    "munge": (("munge", "munged", "mungekey", "remunge", "unmunge"), ("libmunge.so.2",)),
    "libsndfile1": ((), ("libsndfile.so.1", "libsndfile.so")),
    "sndfile-programs": (("sndfile-*",), ()),
    "espeak-ng": (
        ("espeak", "espeak-ng", "speak", "speak-ng"),
        ("libespeak-ng.so.1", "libespeak-ng.so", "libespeak.so.1", "libespeak.so"),
    ),
    "ffmpeg": (("ffmpeg", "ffprobe"), ()),
    "sox": (("sox", "soxi"), ()),
    "chromium": (("chromium*", "google-chrome*", "chrome"), ()),
}


def is_hidden(program: str) -> bool:
    """Whether a program of this name is one of `HIDDEN`."""
    return any(fnmatchcase(program, pattern) for programs, _ in HIDDEN.values() for pattern in programs)


def hide(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """The environment in which what is in `HIDDEN` is out of sight. `folder`, new or empty, holds what that
    needs."""
    path = []
    for number, given in enumerate(environment.get("PATH", os.defpath).split(os.pathsep)):
        there = Path(given or ".")  # an empty entry is the working directory
        programs = os.listdir(there) if there.is_dir() and os.access(there, os.R_OK) else []
        if not any(map(is_hidden, programs)):
            path.append(given)
            continue
        links = folder / f"path{number}"
        links.mkdir()
        for name in programs:
            # finds itself by where it was started: `python -m venv` would keep a path into `links`
            if name.startswith("python"):
                (links / name).write_text(
                    f'#!/bin/sh\nexec {shlex.quote(str((there / name).absolute()))} "$@"\n'
                )
                (links / name).chmod(0o755)
            elif not is_hidden(name):
                (links / name).symlink_to((there / name).absolute())
        path.append(str(links))
    libraries = folder / "libraries"
    libraries.mkdir()
    for _, names in HIDDEN.values():
        for library in names:
            (libraries / library).touch()
    searched = filter(None, [str(libraries), environment.get("LD_LIBRARY_PATH")])
    return {
        **environment,
        "PATH": os.pathsep.join(path),
        "LD_LIBRARY_PATH": os.pathsep.join(searched),
        "WORDLESS_BARE": "1",
    }


def main(argv: list[str]) -> int:
    """Returns the exit status of the command, as a shell would give it."""
    with tempfile.TemporaryDirectory(prefix="bare-") as folder:
        shell = ["sh", "-c", 'exec "$@"', "sh"]  # which looks for the command along the new PATH
        status = subprocess.run(
            [*shell, *argv], env=hide(Path(folder), dict(os.environ)), check=False
        ).returncode
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: .ci/bare.py COMMAND [ARGUMENT ...]")
    sys.exit(main(sys.argv[1:]))
