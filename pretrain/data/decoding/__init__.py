"""Samples of recordings of many formats, and their true lengths."""
