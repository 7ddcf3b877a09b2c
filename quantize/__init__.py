"""From hidden features to discrete labels: feature sources, k-means, codebooks, encoding a corpus, the
quality of units."""
