"""Measurements. Run from the repository: `python -m bench --help`. Nothing here is installed."""
