"""What every room asks of a kind of media, one module each: see `zoo.modality`."""
