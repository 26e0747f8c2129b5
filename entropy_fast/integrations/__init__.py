"""Batches of RL trainers, read into this package's own objects; no trainer is imported."""
