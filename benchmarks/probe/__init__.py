"""What a probe costs, beside the training step it forecasts and beside other ways to the same numbers."""
