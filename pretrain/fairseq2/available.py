"""Whether the fairseq2 that this room is written for is there. Imports nothing of it."""

from importlib.metadata import PackageNotFoundError, version

SERIES = "0.8"  # of fairseq2, whose interfaces move with every minor version
REMEDY = (
    "install wordless with the extra in an environment of its own, since fairseq2 pins torch 2.9.1: pip "
    "install --constraint constraints-fairseq2.txt '.[fairseq2]'"
)


def require_fairseq2(what: str) -> None:
    """A ValueError that names `what` needs it and the remedy, where fairseq2 is missing, of another series,
    or does not load."""
    try:
        found = version("fairseq2")
    except PackageNotFoundError:
        raise ValueError(f"{what} needs fairseq2 {SERIES}, which is not installed here; {REMEDY}") from None
    if found.split(".")[:2] != SERIES.split("."):
        raise ValueError(f"{what} needs fairseq2 {SERIES}; fairseq2 {found} is installed here; {REMEDY}")
    try:
        import fairseq2  # noqa: F401  # its C++ library is found and fits torch, or not, here
    except (ImportError, OSError, RuntimeError) as error:  # the last for another torch
        raise ValueError(
            f"{what} needs fairseq2 {SERIES}; fairseq2 {found} does not load here ({error}); {REMEDY}"
        ) from None
