"""A summary for a terminal: a line for each value, under its dotted key."""

from typing import Any

from pretrain.config import flatten


def value_lines(summary: dict[str, Any]) -> list[str]:
    """`key  value` for each value of nested tables; floats with four digits."""
    shown = {
        key: f"{value:.4g}" if isinstance(value, float) else value for key, value in flatten(summary).items()
    }
    return [f"{key:<40} {value}" for key, value in shown.items()]
