"""Embedded checkpoints."""
