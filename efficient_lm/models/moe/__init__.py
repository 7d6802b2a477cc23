"""Mixtures of experts: routing, rows, dispatch between devices, the layer."""
