"""A run: the loop over stages, checkpoints, ledger, tracking, reports; and runs as sources of models."""
from efficient_lm.runs.sources import FromRun, trained

__all__ = ['FromRun', 'trained']
