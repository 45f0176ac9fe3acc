"""Single questions and their measurements, run by ``zoo study NAME``."""
