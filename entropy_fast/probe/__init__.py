"""The front door: from rollouts to a result, through an engine and statistics."""
