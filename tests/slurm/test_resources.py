"""The `[slurm]` table: strict, every mistake at once, and submitit's names for what it asks."""

import inspect
import tomllib

import pytest
from pydantic import ValidationError
from submitit.slurm.slurm import _get_default_parameters

from slurm.resources import Resources, parse_resources


def test_an_empty_table_gives_the_defaults_of_one_small_job() -> None:
    resources = parse_resources({})
    assert (resources.nodes, resources.tasks_per_node, resources.gpus_per_node, resources.cpus_per_task) == (1, 1, 0, 2)
    assert resources.time_minutes == 60 and resources.setup == ()


def test_all_mistakes_are_reported_at_once_with_dotted_keys() -> None:
    table = tomllib.loads('partion = "gpu"\nzzz = 1\nnodes = 0\ncpus_per_task = "four"\nsetup = ["a", 1]\nqos = "a\\nb"')
    with pytest.raises(ValueError) as error:
        parse_resources(table, "base.toml")
    lines = str(error.value).splitlines()
    assert "base.toml: slurm.partion: unknown key; did you mean 'partition'?" in lines
    assert "base.toml: slurm.zzz: unknown key" in lines
    for key in ("slurm.nodes", "slurm.cpus_per_task", "slurm.setup.1", "slurm.qos"):
        assert sum(line.startswith(f"base.toml: {key}: ") for line in lines) == 1
    assert lines[-1].startswith("base.toml: valid keys of [slurm]: account, array_parallelism, constraint, cpus_per_task, ")
    assert len(lines) == 7


@pytest.mark.parametrize("table", [3, "gpu", ["gpu"]])
def test_a_value_instead_of_the_table_is_an_error(table: object) -> None:
    with pytest.raises(ValueError, match=r"^slurm: "):
        parse_resources(table)


@pytest.mark.parametrize("table", [{"nodes": True}, {"nodes": "2"}, {"nodes": 1.5}, {"memory_gb": 0}, {"gpus_per_node": -1}])
def test_types_are_strict_and_ranges_checked(table: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^slurm\.{next(iter(table))}: "):
        parse_resources(table)


def test_resources_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Resources().nodes = 2


def test_every_key_has_a_parameter_that_submitit_knows() -> None:
    parameters = Resources().slurm_parameters()
    assert set(parameters) <= set(_get_default_parameters())
    assert len(parameters) == len(Resources.model_fields)
    for name in Resources.model_fields:  # none is forgotten on the way
        assert f"self.{name}" in inspect.getsource(Resources.slurm_parameters)


def test_no_gpus_and_no_memory_are_left_to_the_cluster() -> None:
    assert Resources().slurm_parameters()["gpus_per_node"] is None and Resources().slurm_parameters()["mem"] is None
    asked = Resources(gpus_per_node=4, memory_gb=64).slurm_parameters()
    assert asked["gpus_per_node"] == 4 and asked["mem"] == "64GB"
