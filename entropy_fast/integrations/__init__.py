"""Where users are: forecasts inside trainers and training loops, and what those hold, as this package's own objects."""
