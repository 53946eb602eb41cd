"""Give hostile files to every command: `python -m tools.fuzz`."""
