"""Measuring what a tokenizer keeps: metrics, the reconstruction run and its report."""
