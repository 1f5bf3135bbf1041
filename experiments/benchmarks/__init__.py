"""The sub-commands of `experiments/benchmark.py`, a module each, and what they share."""
