"""A plugin of pytest's by which `.ci/run` runs every test once, though it has two passes.

`-p tests.passes --passed-to=FILE` writes down what passes, `-p tests.passes --not-in=FILE` leaves that out:
what is left are the slow tests, those that were skipped, and whatever else the first pass did not run. The
`=` matters: pytest takes a path on its own for one to collect, before it knows these options, and the folder
that it shares with the tests for its root.
"""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("passes", "two passes that run every test once")
    group.addoption(
        "--passed-to",
        metavar="FILE",
        type=Path,
        help="write the names of the tests that pass to FILE, a line each",
    )
    group.addoption("--not-in", metavar="FILE", type=Path, help="leave out the tests that FILE names")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--passed-to")
    # xdist's workers report to the process that started them
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Passed(path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("--not-in")
    if path is not None:
        passed = set(path.read_text(encoding="utf-8").splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


class _Passed:
    """Collects the tests of which every part (its fixtures, the test itself, the fixtures' end) passed."""

    def __init__(self, path: Path):
        self.path = path
        self.outcomes: dict[str, set[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.outcomes.setdefault(report.nodeid, set()).add(report.outcome)

    def pytest_sessionfinish(self) -> None:
        passed = [name for name, outcomes in self.outcomes.items() if outcomes == {"passed"}]
        self.path.write_text("".join(f"{name}\n" for name in passed), encoding="utf-8")
