"""The report of a run: one HTML page, made from its journal alone, and what a notebook shows."""
