"""efficient_lm: efficient language models in JAX, from a laptop to a pod; the four pillars compose in one trainer.

Importing the package imports nothing heavy: `--help` and a config error answer in a second.
"""
import os

# Modules are plain pytrees here (jax.jit, grad, vmap and scan take them as they are); flax reads this when imported.
os.environ.setdefault('NNX_GRAPH_MODE', 'false')
