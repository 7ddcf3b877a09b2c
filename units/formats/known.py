"""The formats of units that other tools use."""

import difflib

from units.formats.codec import CODEC
from units.formats.description import Format
from units.formats.parquet import PARQUET
from units.formats.records import RESYNTHESIS, SLAMKIT_FEATURES, SLAMKIT_TOKENS
from units.formats.text import GSLM, KM, TEXTLESSLIB

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (KM, GSLM, TEXTLESSLIB, SLAMKIT_FEATURES, SLAMKIT_TOKENS, CODEC, RESYNTHESIS, PARQUET)
}


SUFFIXES = {".km": "km", ".units": "textlesslib", ".npy": "codec", ".parquet": "parquet"}


def find_format(form: str, where: str = "") -> Format:
    """A format by its name, or a ValueError with the nearest and all names, after `where`."""
    if form in FORMATS:
        return FORMATS[form]
    near = difflib.get_close_matches(form, FORMATS, n=1)
    raise ValueError(
        f"{where}no format {form!r}{f'; did you mean {near[0]!r}?' if near else ''} (there are "
        f"{', '.join(FORMATS)})"
    )
