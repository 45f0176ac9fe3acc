"""Tokenizers that exist for tests only."""
