"""The real SLURM that tests share: started when the first of them asks for it."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, Unavailable, slurm_cluster


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
            yield cluster
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def real_slurm(_cluster: Cluster) -> Iterator[Cluster]:
    """Two nodes. Its environment is in effect for the module's tests; they skip with the reason where there
    can be no cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _cluster.environment.items():
            patch.setenv(name, value)
        yield _cluster
