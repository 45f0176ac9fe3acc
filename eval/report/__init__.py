"""The report of a run: HTML pages and their plots."""
