"""A run that adapts and merges: shapes are those of the model that it began with, and lost bits are an error or declared."""
import dataclasses

import jax
import numpy as np
import optax
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.formats import Group, Int
from efficient_lm.runs import FromRun, ledger, run
from efficient_lm.techniques import GivingUp, Lora, Merge, PruneOnce, Quantize, Rule, Train
from efficient_lm.training import learner
from efficient_lm.tree import rewrite, select
from efficient_lm.weights.low_rank import LowRank, released
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.quantized import Quantized
from tests import minute
from tests.training.tiny import model_of

INT4 = (Rule(where='mlp', weights=Int(bits=4, scales=Group(size=8))),)


def made(*stages):
  quick = minute.get_config('quick')
  training = dataclasses.replace(quick.train, steps=2)
  adapt = Train(training=training, techniques=(Lora(rank=2),))
  return dataclasses.replace(quick, train=training, stages=tuple(adapt if stage == 'adapt' else stage for stage in stages))


def test_it_is_pruned_adapted_and_merged_and_each_stage_is_read_again(tmp_path):
  config = made(PruneOnce(sparsity=0.5), 'adapt', Merge())
  run.run(config, config, tmp_path)
  rows = ledger.read(tmp_path / 'ledger.json')
  assert [row.stage for row in rows] == ['1 train', '2 pruneonce', '3 train', '4 merge']
  one, pruned, adapted, merged = rows
  assert merged.size.bytes_in_memory == pruned.size.bytes_in_memory < adapted.size.bytes_in_memory
  assert merged.size.parameters == one.size.parameters
  assert merged.size.nonzero_parameters == pruned.size.nonzero_parameters < one.size.nonzero_parameters
  assert dict(select(FromRun(path=str(tmp_path), stage=3).load(), LowRank))
  model = FromRun(path=str(tmp_path)).load()
  assert dict(select(model, Masked)) and not dict(select(model, LowRank))
  assert jax.tree.structure(model) == jax.tree.structure(FromRun(path=str(tmp_path), stage=2).load())


def test_bits_that_merging_loses_are_an_error_unless_they_are_given_up(tmp_path):
  config = made(Quantize(rules=INT4), 'adapt', Merge())
  with pytest.raises(ConfigError, match='bits') as error: run.run(config, config, tmp_path / 'a')
  assert '\n' not in str(error.value)
  config = made(Quantize(rules=INT4), 'adapt', GivingUp(stage=Merge(), lost=('bits',)))
  run.run(config, config, tmp_path / 'b')
  assert ledger.read(tmp_path / 'b' / 'ledger.json')[-1].size.bits_per_parameter == 32


def test_what_rounds_a_model_rounds_the_sum():
  """No stage passes an adapter by."""
  made = learner.assemble(model_of('dense'), optax.sgd(0.1), (Lora(rank=2),), jax.random.key(0)).model
  more = lambda up: up.replace(up.get_value() + 0.1)
  adapted = rewrite(made, LowRank, lambda _, weight: LowRank(weight.inner, weight.down, more(weight.up), weight.scale))
  merged, _ = Merge()(released(adapted), None)
  rounded = [dict(select(Quantize(rules=INT4).to_nearest(model), Quantized)) for model in (adapted, merged)]
  assert rounded[0].keys() == rounded[1].keys() and rounded[0]
  for path, weight in rounded[0].items(): jax.tree.map(np.testing.assert_array_equal, weight, rounded[1][path])
