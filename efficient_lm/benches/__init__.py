"""The cases that `efficient_lm.bench` times: each computes the same, by this package and by its baselines."""
