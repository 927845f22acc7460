"""The data path in C."""
