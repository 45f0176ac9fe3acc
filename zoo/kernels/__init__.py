"""The few operations worth a kernel."""
