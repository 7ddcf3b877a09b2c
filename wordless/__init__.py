"""wordless: speech units and textless language models from raw audio."""
