"""Hostile files for every command: `python -m tools.fuzz`."""
