"""Where users are: forecasts inside trainers and training loops."""
