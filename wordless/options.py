"""The arguments and options that commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def path(text: str) -> Path:
    """A path of the command line, with `~` and variables replaced as in configs."""
    from pretrain.config import expand_path

    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


ConfigPath = Annotated[
    Path,
    typer.Argument(
        parser=path, metavar="CONFIG.toml", help="A TOML file; `wordless check FILE` validates it."
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="Dotted keys over the file's.")
]
On = Annotated[
    Literal["here", "local", "slurm"],
    typer.Option("--on", help="Where it runs: this process, a local job, SLURM."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved config (and the sbatch text) and stop.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]
RunFolder = Annotated[
    Path,
    typer.Argument(
        parser=path, metavar="RUN", help="A recipe's run, or the `out` of a verb that runs as a job."
    ),
]
