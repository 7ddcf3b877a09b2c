"""Tests that need fairseq2 are skipped where it is missing, with the reason; where WORDLESS_FAIRSEQ2=required
(CI), they fail."""

import os
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import NoReturn

import pytest

from pretrain.fairseq2.available import require_fairseq2


def _missing() -> str | None:
    """Why these tests cannot run, None if they can."""
    try:
        require_fairseq2("tests/fairseq2")
    except ValueError as error:
        return str(error)
    return None


class _Missing(pytest.File):
    def collect(self) -> NoReturn:
        reason = _missing()
        assert reason is not None
        if os.environ.get("WORDLESS_FAIRSEQ2") == "required":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(
    file_path: Path, parent: pytest.Collector
) -> Generator[None, list[pytest.Collector], Iterable[pytest.Collector]]:
    """Put one skipped (or failed) file in the place of every test file: each imports fairseq2 at its top. So
    do the workers beside them, which are looked through for doctests."""
    collected = yield
    if file_path.suffix != ".py" or file_path.name == "conftest.py" or _missing() is None:
        return collected
    return [_Missing.from_parent(parent, path=file_path)] if file_path.name.startswith("test_") else []
