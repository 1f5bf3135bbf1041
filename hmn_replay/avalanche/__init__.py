"""Replay of a memory inside Avalanche."""
