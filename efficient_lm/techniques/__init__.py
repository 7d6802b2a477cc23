"""Efficiency techniques: dataclasses that a config lists, each a function from Learner to Learner.

A technique says what it `touches`: 'model' (it rewrites Weights or layers), 'loss' or 'optimizer'. Only the first kind
matters to a model that is loaded for evaluation or generation. Every rewrite prints its coverage.
"""
