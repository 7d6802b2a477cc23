"""Weights: matrices that know how they are multiplied, and what wraps them."""
