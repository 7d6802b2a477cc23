"""What `efficient_lm.bench` times: each case is ours and its baselines, on the same numbers."""
