"""The report of a run: one HTML page, made from its journal alone, and the summaries shown in notebooks."""
