"""The tokenizer families, one file each, read top to bottom."""
