"""Unit corpora: the documents that language models read."""
