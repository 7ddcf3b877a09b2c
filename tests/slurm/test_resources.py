"""The `[slurm]` table: strict, every mistake at once, and submitit's names for what it asks."""

import inspect
import tomllib

import pytest
from pydantic import ValidationError
from submitit.slurm.slurm import _get_default_parameters

from slurm.resources import Resources
from wordless.job_resources import overlaid, parse_resources


def test_an_empty_table_gives_the_defaults_of_one_small_job() -> None:
    resources = parse_resources({}, "base.toml")
    assert (resources.nodes, resources.tasks_per_node, resources.gpus_per_node, resources.cpus_per_task) == (
        1,
        1,
        0,
        2,
    )
    assert resources.time_minutes == 60 and resources.setup == ()


def test_all_mistakes_are_reported_at_once_with_dotted_keys() -> None:
    table = tomllib.loads(
        'partion = "gpu"\nzzz = 1\nnodes = 0\ncpus_per_task = "four"\nsetup = ["a", 1]\nqos = "a\\nb"'
    )
    with pytest.raises(ValueError) as error:
        parse_resources(table, "base.toml")
    lines = str(error.value).splitlines()
    assert "base.toml: slurm.partion: unknown key; did you mean 'partition'?" in lines
    known = "account, array, array_parallelism, constraint, cpus_per_task, "
    assert any(line.startswith(f"base.toml: slurm.zzz: unknown key; known here: {known}") for line in lines)
    for key in ("slurm.nodes", "slurm.cpus_per_task", "slurm.setup.1", "slurm.qos"):
        assert sum(line.startswith(f"base.toml: {key}: ") for line in lines) == 1
    assert len(lines) == 6


@pytest.mark.parametrize("table", [3, "gpu", ["gpu"]])
def test_a_value_instead_of_the_table_is_an_error(table: object) -> None:
    with pytest.raises(ValueError, match=r"^base.toml: slurm: "):
        parse_resources(table, "base.toml")


@pytest.mark.parametrize(
    "table", [{"nodes": True}, {"nodes": "2"}, {"nodes": 1.5}, {"memory_gb": 0}, {"gpus_per_node": -1}]
)
def test_types_are_strict_and_ranges_checked(table: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^base.toml: slurm\.{next(iter(table))}: "):
        parse_resources(table, "base.toml")


def test_resources_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Resources().nodes = 2


def test_every_key_has_a_parameter_that_submitit_knows() -> None:
    parameters = Resources().slurm_parameters()
    assert set(parameters) <= set(_get_default_parameters())
    of_ours = {"array", "snapshot"}  # `launch` sees to these
    assert len(parameters) == len(Resources.model_fields) - len(of_ours)
    for name in set(Resources.model_fields) - of_ours:  # none is forgotten on the way
        name = {"signal_seconds": "signal_delay_seconds"}.get(name, name)
        assert f"self.{name}" in inspect.getsource(Resources.slurm_parameters)


def test_no_gpus_and_no_memory_are_left_to_the_cluster() -> None:
    assert (
        Resources().slurm_parameters()["gpus_per_node"] is None
        and Resources().slurm_parameters()["mem"] is None
    )
    asked = Resources(gpus_per_node=4, memory_gb=64).slurm_parameters()
    assert asked["gpus_per_node"] == 4 and asked["mem"] == "64GB"


@pytest.mark.parametrize(("minutes", "seconds"), [(1, 12), (5, 60), (8, 90), (1440, 90)])
def test_a_job_is_told_to_save_a_fifth_of_its_time_before_the_end_or_90_seconds(
    minutes: int, seconds: int
) -> None:
    assert Resources(time_minutes=minutes).signal_delay_seconds == seconds
    assert Resources(time_minutes=minutes, signal_seconds=7).slurm_parameters()["signal_delay_s"] == 7


def test_a_signal_before_the_job_begins_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"(?m)^base.toml: slurm: .*signal_seconds \(60\) must be less than time_minutes"
    ):
        parse_resources({"signal_seconds": 60, "time_minutes": 1}, "base.toml")


def test_a_stage_lays_its_own_table_over_the_recipes() -> None:
    recipe = Resources(partition="gpu", nodes=2, setup=("module load cuda",), array=4)
    stage = overlaid(recipe, {"nodes": 1, "setup": []}, "r.toml")
    assert (stage.partition, stage.nodes, stage.setup, stage.array) == ("gpu", 1, (), 4)
    assert overlaid(recipe, {}, "r.toml") == recipe
    with pytest.raises(ValueError, match=r"r\.toml: slurm\.nodez: unknown key; did you mean 'nodes'"):
        overlaid(recipe, {"nodez": 1}, "r.toml")
    with pytest.raises(ValueError, match=r"^r.toml: slurm: "):
        overlaid(recipe, 3, "r.toml")
