"""Quantization: QAT, PTQ, low-precision training."""
