"""Language models of units."""
