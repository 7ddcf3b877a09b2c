"""Files: artefacts and their meta data, atomic writes, locks, destinations."""
