"""The machine beneath a run: signals, output that nobody reads, the folder that is written to, and JSON that verifies
itself. Nothing here knows of models, or loads JAX."""
