"""Rules a probe checks before, while and after it touches a model."""
