"""Real images under the same bytes, and which of them to keep."""
