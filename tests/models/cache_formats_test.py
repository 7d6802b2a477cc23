"""A format of caches says what it cannot be, and what shares a scale."""
import jax.numpy as jnp
import pytest

from efficient_lm.models.cache_formats import CACHES, IntegerCache, TiledCache


@pytest.mark.parametrize(('dim', 'bits', 'part'), [(64, 4, 16), (128, 4, 16), (80, 4, 10), (6, 4, 3), (74, 4, 37), (7, 8, 7),
                                                   (96, 8, 16)])
def test_values_of_a_head_share_scales_in_parts_that_divide_it(dim, bits, part):
  rows = TiledCache(bits=bits).values(1, 1, 4, dim, jnp.float32)
  assert rows.scale.shape == (1, 1, rows.x_BKSH.shape[2], dim // part)


@pytest.mark.parametrize('form, field', [
  (IntegerCache(bits=5), 'bits'), (IntegerCache(group=0), 'group'), (TiledCache(bits=2), 'bits'),
  (TiledCache(group=1), 'group'), (TiledCache(part=0), 'part')])
def test_a_format_that_makes_no_sense_is_named(form, field):
  assert [problem[0] for problem in form.check()] == [field]
  assert not any([*sound.check()] for sound in (*CACHES.values(), TiledCache(group=8, part=1)))
