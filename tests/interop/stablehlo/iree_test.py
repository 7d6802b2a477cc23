"""IREE, another compiler of StableHLO, gives the numbers of the model: make check-iree, whose environment has its packages.

It takes no size that is known only when a program runs, nor writes to slots that differ by sequence: what it reads has fixed
sizes, and one slot for all sequences.
"""
import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from efficient_lm.interop.stablehlo import programs
from efficient_lm.models.spec import FloatCache
from tests.interop.stablehlo.models import INT4, TOKENIZER, drawn

MISSING = [name for name in ('iree.compiler', 'iree.runtime') if importlib.util.find_spec('iree') is None
           or importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f'{", ".join(MISSING)} is not installed: make check-iree')
BATCH, LENGTH, STEPS = 2, 16, 3


@pytest.mark.parametrize('format', [None, INT4], ids=['float', 'int4'])
def test_decoding_gives_the_numbers_of_the_model(format):
  """Token by token from an empty cache, each step from the cache that IREE itself has made: within 1e-5 of the largest
  logit. Weights are arguments, in few bits as they are stored."""
  from iree import compiler, runtime
  model = drawn('dense', format)
  step = programs.decode_step(model, programs.Sizes(BATCH, LENGTH, TOKENIZER.vocab_size, FloatCache()))
  alike = [(name, jax.ShapeDtypeStruct((), np.int32) if name == 'starts' else shape) for name, shape in step.arguments]
  step = dataclasses.replace(step, arguments=tuple(alike))
  binary = compiler.compile_str(step.export(('cpu',)).mlir_module(), input_type='stablehlo', target_backends=['llvm-cpu'])
  config = runtime.Config('local-task')
  module = runtime.load_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, binary), config)
  weights = [np.asarray(array) for _, array in programs.weights_of(model)]
  empty = [np.zeros(shape.shape, shape.dtype) for _, shape in step.arguments[2:]]
  tokens_BT = np.random.default_rng(1).integers(0, TOKENIZER.vocab_size, (BATCH, STEPS)).astype(np.int32)
  own, found_cache, own_cache = jax.jit(step.run), empty, empty
  for i in range(STEPS):
    given = tokens_BT[:, i], np.array(i, np.int32)
    found, *found_cache = (np.asarray(array) for array in module.main(*weights, *given, *found_cache))
    expected, *own_cache = own(*weights, *given, *own_cache)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
