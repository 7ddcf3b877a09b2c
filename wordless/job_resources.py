"""The `[slurm]` tables of configs and recipes, read as every other config: strictly, all mistakes at once."""

from typing import Any

from pretrain.config import Config, parse_config
from slurm.resources import Resources


class Job(Config):
    """The part of a config that describes its job."""

    slurm: Resources = Resources()


def parse_resources(table: Any, source: str) -> Resources:
    """Validate a `[slurm]` table as `tomllib` returns it.

    Raises ValueError with a line for each mistake: `source: slurm.KEY: what is wrong`.
    """
    return parse_config(Job, {"slurm": table}, source).slurm


def overlaid(resources: Resources, table: Any, source: str) -> Resources:
    """`resources` with a stage's own `[STAGE.slurm]` over them. Raises ValueError as `parse_resources`
    does."""
    given = resources.model_dump(mode="json")
    return parse_resources({**given, **table} if isinstance(table, dict) else table, source)
