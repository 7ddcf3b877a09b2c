"""From recordings to batches: manifests, labels, indexing."""
