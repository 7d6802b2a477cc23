"""A model describes itself as the description that has built it."""
import dataclasses
import json
import pathlib

import jax
import pytest
from flax import nnx

from efficient_lm.errors import IncompatibleError
from efficient_lm.interop import families
from efficient_lm.models import spec, zoo
from efficient_lm.models.described import alike, described, layers
from efficient_lm.models.moe import routing
from efficient_lm.models.transformer import unrolled

FIXTURES = pathlib.Path(__file__).parent.parent / 'interop' / 'fixtures'
MODELS = {path.parent.name: families.spec_of(config) for path in FIXTURES.glob('*/config.json')
          if 'quantization_config' not in (config := json.loads(path.read_text()))}
MODELS |= {name: getattr(zoo, name)() for name in ('tiny', 'gpt2_124m', 'mixtral_8x7b', 'olmoe_1b_7b', 'deepseek_v3')}


def shapes(one: spec.Transformer):
  return jax.eval_shape(lambda key: one.build(rngs=nnx.Rngs(params=key)), jax.random.key(0))


@pytest.mark.parametrize('name', MODELS)
def test_a_model_describes_itself_as_what_has_built_it_taken_apart_or_not(name):
  model = shapes(MODELS[name])
  assert described(model) == alike(MODELS[name])
  assert described(jax.eval_shape(unrolled, model)) == alike(MODELS[name])
  assert len(layers(model)) == sum(stack.num_layers for stack in MODELS[name].stacks)


def test_a_change_of_any_field_that_changes_the_computation_is_seen():
  one = zoo.tiny(zoo.experts(4, 2, 32))
  attention = lambda **changes: dataclasses.replace(
    one, stacks=(dataclasses.replace(one.stacks[0], attention=dataclasses.replace(one.stacks[0].attention, **changes)),))
  mlp = lambda **changes: dataclasses.replace(
    one, stacks=(dataclasses.replace(one.stacks[0], mlp=dataclasses.replace(one.stacks[0].mlp, **changes)),))
  others = [
    attention(rope=spec.Rope(theta=5.0)), attention(rope=spec.Rope(layout='interleaved')), attention(rope=None),
    attention(rope=spec.Rope(scaling=spec.LinearScaling(factor=2.0))), attention(window=3), attention(qk_norm='H'),
    attention(qk_norm='NH'), attention(biases=('query',)), attention(softcap=3.0), attention(scale=0.5),
    mlp(capacity=1.25), mlp(num_shared=1), mlp(router=routing.SoftmaxTopK(top_k=1)),
    mlp(router=routing.SoftmaxTopK(top_k=2, normalize=False)), mlp(balance=(routing.LossFreeBias(),)),
    dataclasses.replace(one, norm_eps=1e-4), dataclasses.replace(one, tied=False),
    dataclasses.replace(one, dtype='bfloat16'),
    dataclasses.replace(one, norm=spec.LayerNorm()), dataclasses.replace(one, ends=spec.Ends(softcap=3.0)),
    dataclasses.replace(one, ends=spec.Ends(positions=spec.Learned(length=8))),
    dataclasses.replace(one, stacks=(dataclasses.replace(one.stacks[0], block=spec.PostNorm()),))]
  for other in others:
    assert described(shapes(other)) == alike(other) != alike(one)


def test_what_a_model_balances_and_how_it_is_run_is_no_part_of_it():
  one = zoo.tiny(zoo.experts(4, 2, 32))
  balanced = zoo.tiny(zoo.experts(4, 2, 32, balance=()))
  assert alike(one) == alike(balanced) == described(shapes(balanced))
  assert alike(dataclasses.replace(one, stacks=(dataclasses.replace(one.stacks[0], unroll=1, remat='full'),))) == alike(one)


def test_a_layer_of_another_kind_is_refused_by_its_name():
  class Own(nnx.Module): pass
  model = jax.eval_shape(unrolled, shapes(zoo.tiny()))
  model.stacks[0].blocks[2].mlp = Own()
  with pytest.raises(IncompatibleError, match='layer 2: Own is a kind of feed-forward layer'): described(model)
