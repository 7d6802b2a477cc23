"""Efficiency techniques and stages: dataclasses that a config lists.

A technique is a function from Learner to Learner, `technique(learner, key)`. It says what it `touches`: 'model' (it rewrites
weights or layers, and perhaps more), 'loss' or 'optimizer'. Where it leaves something in the model at the end of training,
it has `finish(model, opt_state)`; where it can tell that a training does not suit it, `check_training(training)`.

A stage is a function from model to model, `stage(model, context) -> (model, notes)`, with `abstract(model)` for its shapes
(see `efficient_lm.runs.context`). Every rewrite says what it reaches. Techniques never import each other; what several need
is in `efficient_lm.compression`. Descriptions are light: what computes is imported where the computing begins.
"""
from efficient_lm.compression.allocation import Erk, Global, Owl, Uniform
from efficient_lm.compression.budget import Budget, Grid
from efficient_lm.compression.gradual import AtOnce, Cubic, Periodic
from efficient_lm.compression.group_scores import Activations, BlockInfluence, Frequency, Reap, Reconstruction
from efficient_lm.compression.merging import MergeExperts
from efficient_lm.compression.method import RoundToNearest
from efficient_lm.compression.patterns import Blocks, NofM, PerMatrix, PerOutput
from efficient_lm.compression.rules import LAYERS, Rule
from efficient_lm.compression.scores import Magnitude, Random, Snip, Taylor
from efficient_lm.compression.shape import Shape
from efficient_lm.compression.training_scores import Movement, Saliency
from efficient_lm.techniques.adapters.lora import Lora
from efficient_lm.techniques.adapters.merge import Merge
from efficient_lm.techniques.distillation.distill import Distill
from efficient_lm.techniques.giving_up import GivingUp
from efficient_lm.techniques.moe.skip_experts import SkipExperts
from efficient_lm.techniques.moe.upcycle import Upcycle
from efficient_lm.techniques.pruning.pack import Pack
from efficient_lm.techniques.pruning.prune import Prune
from efficient_lm.techniques.pruning.prune_blocks import PruneBlocks, StoreBlocks
from efficient_lm.techniques.pruning.prune_once import PruneOnce
from efficient_lm.techniques.pruning.shrink import Shrink
from efficient_lm.techniques.pruning.sparse_gpt import SparseGpt
from efficient_lm.techniques.pruning.sparse_training import SET, AcDc, RigL, SparseTraining, StaticMask, StraightThroughMask
from efficient_lm.techniques.pruning.teal import Teal
from efficient_lm.techniques.pruning.wanda import Wanda
from efficient_lm.techniques.quantization.awq import Awq
from efficient_lm.techniques.quantization.bitnet import BitNet
from efficient_lm.techniques.quantization.convert import Convert
from efficient_lm.techniques.quantization.gptq import Gptq
from efficient_lm.techniques.quantization.low_precision_training import LowPrecisionTraining
from efficient_lm.techniques.quantization.ptq import Quantize
from efficient_lm.techniques.quantization.qat import LearnedClip, LearnedSteps, QuantAware, StraightThrough, StretchedLevels
from efficient_lm.techniques.quantization.rotate import Rotate
from efficient_lm.techniques.quantization.smooth_quant import SmoothQuant
from efficient_lm.techniques.skip_spikes import SkipSpikes
from efficient_lm.techniques.unroll import Unroll
from efficient_lm.training.train import Train, Training

__all__ = ['LAYERS', 'SET', 'AcDc', 'Activations', 'AtOnce', 'Awq', 'BitNet', 'BlockInfluence', 'Blocks', 'Budget',
           'Convert', 'Cubic', 'Distill', 'Erk', 'Frequency', 'GivingUp', 'Global', 'Gptq', 'Grid', 'LearnedClip',
           'LearnedSteps', 'Lora', 'LowPrecisionTraining', 'Magnitude', 'Merge', 'MergeExperts', 'Movement', 'NofM', 'Owl',
           'Pack', 'PerMatrix', 'PerOutput', 'Periodic', 'Prune', 'PruneBlocks', 'PruneOnce', 'QuantAware', 'Quantize',
           'Random', 'Reap', 'Reconstruction', 'RigL', 'Rotate', 'RoundToNearest', 'Rule', 'Saliency', 'Shape', 'Shrink',
           'SkipExperts', 'SkipSpikes', 'SmoothQuant', 'Snip', 'SparseGpt', 'SparseTraining', 'StaticMask', 'StoreBlocks',
           'StraightThrough', 'StraightThroughMask', 'StretchedLevels', 'Taylor', 'Teal', 'Train', 'Training', 'Uniform',
           'Unroll', 'Upcycle', 'Wanda']
