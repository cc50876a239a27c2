"""Speed and memory of the extraction engine beside its alternatives: `make bench`, or `python -m benchmarks --help`."""
