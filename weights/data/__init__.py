"""Media that programs make, to train and to measure on."""
