"""Coverage-guided fuzzing of what takes bytes from the network: `python -m tests.fuzz`, or `make fuzz`."""
