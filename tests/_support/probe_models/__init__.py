"""Tiny models, batches and oracles for tests that run the probe itself."""
