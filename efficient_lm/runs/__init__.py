"""A run: the loop over stages, checkpoints, ledger, tracking, reports."""
