"""What quantized models are measured on: a module for each kind of media, with a ``SUBJECT``."""
