"""Experiments as typed, nested dataclasses: fields, validation, overrides, mesh."""
