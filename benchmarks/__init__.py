"""Measurements against the numbers that kaito-flows promises; README.md says how each is run."""
