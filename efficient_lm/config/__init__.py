"""Experiments as typed, nested dataclasses: what a config file is written with."""
from efficient_lm.config.experiment import Experiment, choose
from efficient_lm.config.mesh import Mesh
from efficient_lm.training.train import Train, Training

__all__ = ['Experiment', 'Mesh', 'Train', 'Training', 'choose']
