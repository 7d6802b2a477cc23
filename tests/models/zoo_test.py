"""The zoo against the published dimensions, written here once more and added up by hand."""
import jax
import pytest
from flax import nnx

from efficient_lm.models import zoo
from efficient_lm.runs import measure


def swiglu(dim, hidden): return 3 * dim * hidden


def attention(dim, heads, kv_heads, head_dim): return 2 * dim * heads * head_dim + 2 * dim * kv_heads * head_dim


def latent(dim, heads, query_rank, kv_rank, nope, rope, value):
  query = dim * query_rank + query_rank + query_rank * heads * (nope + rope)
  return query + dim * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + value) + heads * value * dim


def mixture(dim, hidden, num_experts, shared=0, bias=False):
  """All parameters of a layer's mixture, and those of one expert."""
  return dim * num_experts + (num_experts + shared) * swiglu(dim, hidden) + num_experts * bias, swiglu(dim, hidden)


def ends(vocab, dim, tied): return vocab * dim * (1 if tied else 2) + dim


def llama3_8b():
  total = ends(128_256, 4096, False) + 32 * (attention(4096, 32, 8, 128) + swiglu(4096, 14_336) + 2 * 4096)
  assert total == 8_030_261_248   # as the files on Hugging Face add up to
  return total, total


def gpt2_124m():
  total = ends(50_304, 768, True) + 12 * (12 * 768 ** 2 + 2 * 768)   # 4 D^2 of attention, 8 D^2 of the MLP
  return total, total


def mixtral_8x7b():
  layer, expert = mixture(4096, 14_336, 8)
  total = ends(32_000, 4096, False) + 32 * (attention(4096, 32, 8, 128) + layer + 2 * 4096)
  assert total == 46_702_792_704
  return total, total - 32 * (8 - 2) * expert


def olmoe_1b_7b():
  layer, expert = mixture(2048, 1024, 64)
  total = ends(50_304, 2048, False) + 16 * (attention(2048, 16, 16, 128) + 2 * 2048 + layer + 2 * 2048)
  assert total == 6_919_161_856
  return total, total - 16 * (64 - 8) * expert


def qwen3_30b_a3b():
  layer, expert = mixture(2048, 768, 128)
  total = ends(151_936, 2048, False) + 48 * (attention(2048, 32, 4, 128) + 2 * 128 + layer + 2 * 2048)
  assert total == 30_532_122_624
  return total, total - 48 * (128 - 8) * expert


def deepseek_v3():
  layer, expert = mixture(7168, 2048, 256, shared=1, bias=True)
  each = latent(7168, 128, 1536, 512, 128, 64, 128) + 2 * 7168
  total = ends(129_280, 7168, False) + 3 * (each + swiglu(7168, 18_432)) + 58 * (each + layer)
  assert total == 671_026_419_200
  return total, total - 58 * (256 - 8) * expert


PUBLISHED = {   # total and active parameters in billions, as the papers and model cards round them
  llama3_8b: (8.03, 8.03), gpt2_124m: (0.124, 0.124), mixtral_8x7b: (46.7, 12.9), olmoe_1b_7b: (6.92, 1.28),
  qwen3_30b_a3b: (30.5, 3.3), deepseek_v3: (671, 37.5)}


def parameters(spec):
  found = measure.parameters(jax.eval_shape(lambda: spec.build(rngs=nnx.Rngs(0))))
  return found.total, found.active


@pytest.mark.parametrize('published', PUBLISHED, ids=lambda published: published.__name__)
def test_a_published_shape_has_its_published_parameters(published):
  counted = parameters(getattr(zoo, published.__name__)())
  assert counted == published()
  for mine, theirs in zip(counted, PUBLISHED[published], strict=True):
    assert mine / 1e9 == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize('shape, experts', [
  (zoo.tiny, zoo.experts(8, 2, 160)), (zoo.small, zoo.experts(16, 2, 512)), (zoo.gpt2_124m, zoo.experts(8, 2, 1024))],
  ids=lambda part: getattr(part, '__name__', ''))
def test_a_mixture_is_as_active_as_its_dense_row_but_for_the_router(shape, experts):
  spec = shape(experts)
  router = spec.stacks[0].num_layers * spec.dim * experts.num_experts
  assert parameters(spec)[1] == parameters(shape())[1] + router


def test_tiny_is_tiny():
  assert parameters(zoo.tiny())[1] == pytest.approx(0.73e6, rel=0.01)
