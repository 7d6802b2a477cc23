"""Models: pytrees of layers that own Weights. `transformer.py` reads first; `spec.py` is what a config says of them."""
