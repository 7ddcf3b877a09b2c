"""Units back to sound."""
