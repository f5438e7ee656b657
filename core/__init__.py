"""Shared by all programs: networks, training, the data file, command lines."""
