"""Recipes that train the embedded checkpoints, one module each."""
