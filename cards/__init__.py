"""Model cards, one per family."""
