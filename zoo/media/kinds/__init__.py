"""Answers of each kind of media to what every room asks, one module each: see `zoo.modality`."""
