"""Contenders that do nothing for a known time and write down when."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.command import argument_parser, run_main

SECONDS = {
    "ours": 0.05,
    "quick": 0.1,
    "slow": 0.5,
    "deaf": 0.05,
    "frail": 0.05,
}  # far apart: a busy machine oversleeps


class Sleeper:
    """Two units of work a round."""

    amount = 2.0

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder

    def about(self) -> dict[str, Any]:
        return {"inputs_sha256": "other" if self.name == "deaf" else "same"}

    def prepare(self, number: int) -> None:
        time.sleep(0.1)  # not timed

    def run(self) -> None:
        began = time.monotonic()
        if self.name.startswith("frail"):
            sys.exit(1)
        # stands for what the C library does by itself
        time.sleep(SECONDS[self.name] / (2 if os.environ.get("MALLOC_MMAP_MAX_") == "0" else 1))
        with open(self.folder / "turns.txt", "a") as file:
            file.write(f"{self.name} {began} {time.monotonic()}\n")
        print("a library that talks")  # must not end up among the answers


def build(name: str, settings: dict[str, Any], folder: Path) -> Sleeper:
    """A sleeper, or the mistake of a user."""
    if name == "missing":
        raise ImportError("No module named 'missing'")
    return Sleeper(name, folder)


if __name__ == "__main__":
    sys.exit(
        run_main(
            "tests.benchmarks.sleepers", argument_parser(None, ["quick"]), None, build, lambda _: {}, str
        )
    )
