"""Small tensors gain nothing from threads and lose much where cores are shared; first calls may be slow on a
busy machine."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # other workers are on the same cores; OpenMP looks at this once, when it is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# Every run draws the same examples, so that what fails in CI fails here; `--hypothesis-profile=search` draws
# others.
settings.register_profile("wordless", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("wordless")

# The files that take longest, by measurement: workers begin with them, so that none is left with one of them
# while the others have nothing to do. A file that is not here, or no longer there, costs some seconds and
# nothing else.
LONG_FILES = [
    "tests/test_pipeline.py",
    "tests/wordless/report/test_report.py",
    "tests/pretrain/training/test_stopping.py",
    "tests/slurm/test_launch.py",
    "tests/units/scores/test_scoring.py",
    "tests/benchmarks/test_benchmarks.py",
    "tests/units/lm/test_levels.py",
    "tests/faults/test_untrusted_audio.py",
    "tests/units/corpus/test_unit_corpus.py",
    "tests/parity/test_transformers_encoder.py",
    "tests/pretrain/training/test_engine.py",
    "tests/pretrain/weights/test_fairseq2_cards.py",
    "tests/test_readme.py",
    "tests/pretrain/test_resuming.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {name: number for number, name in enumerate(LONG_FILES)}
        items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))
