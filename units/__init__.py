"""Labels become language: unit corpora, their n-gram floors, and the unit language model with its scores and
samples."""
