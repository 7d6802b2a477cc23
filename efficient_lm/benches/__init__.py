"""What `efficient_lm.bench` times: one file a family of cases, each case ours and its baselines on the same numbers."""
