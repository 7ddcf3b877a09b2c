"""What a language model of units knows."""
