"""wordless: speech units and textless language models from raw audio."""

__version__ = "0.1.0"
