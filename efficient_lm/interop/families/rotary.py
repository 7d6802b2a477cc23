"""How a config.json says rotary positions: transformers 5 writes `rope_parameters`, 4 wrote `rope_theta` and `rope_scaling`.

Where both stand they must agree. Types that change with the length of the text ('dynamic', 'longrope') are refused: the keys
in a cache were rotated by other angles.
"""
from efficient_lm.interop.families.keys import Keys
from efficient_lm.models.spec import LinearScaling, Llama3Scaling, Rope, Yarn


def rope(keys: Keys, theta: float = 10_000.0, layout: str = 'half') -> Rope:
  """The one rotary embedding of all layers; `theta` is the family's, where the config gives none."""
  new, old = keys.table('rope_parameters'), keys.table('rope_scaling')
  theta = keys.number('rope_theta', theta)
  keys.only('partial_rotary_factor', None, 1, 1.0)
  length = keys.whole('max_position_embeddings', 2048)
  said = [_rope(table, theta, layout, length) for table in (new, old) if table is not None]
  if len(said) == 2 and said[0] != said[1]: keys.refuse('rope_scaling', 'says something else than rope_parameters')
  found = said[0] if said else Rope(theta=theta, layout=layout)
  if keys.config.get('rope_theta') is not None and found.theta != theta:
    keys.refuse('rope_theta', f'says something else than rope_parameters, {found.theta}')
  return found


def by_layer_type(keys: Keys, theta: float, local_theta: float) -> dict[str, Rope]:
  """Those of 'full_attention' and 'sliding_attention', as Gemma 3 has them: nested by transformers 5; 4 had `rope_theta` and
  `rope_scaling` for the first, `rope_local_base_freq` for the second."""
  nested, old = keys.table('rope_parameters'), keys.table('rope_scaling')
  theta, local_theta = keys.number('rope_theta', theta), keys.number('rope_local_base_freq', local_theta)
  length = keys.whole('max_position_embeddings', 131_072)
  full, local = (nested.table(name) if nested else None for name in ('full_attention', 'sliding_attention'))
  if nested: nested.finish()
  said = [_rope(table, theta, 'half', length) for table in (full, old) if table]
  if len(said) == 2 and said[0] != said[1]: keys.refuse('rope_scaling', 'says something else than rope_parameters')
  return {'full_attention': said[0] if said else Rope(theta=theta),
          'sliding_attention': _rope(local, local_theta, 'half', length) if local else Rope(theta=local_theta)}


def _rope(table: Keys, theta: float, layout: str, length: int) -> Rope:
  kind, older = table.get('rope_type'), table.get('type')
  if None not in (kind, older) and kind != older: table.refuse('type', f'says something else than rope_type, {kind}')
  theta = table.number('rope_theta', theta)
  table.only('partial_rotary_factor', None, 1, 1.0)
  match next((one for one in (kind, older) if one is not None), 'default'):
    case 'default': scaling = None
    case 'linear': scaling = LinearScaling(factor=table.number('factor'))
    case 'llama3': scaling = _llama3(table, length)
    case 'yarn': scaling = _yarn(table, length)
    case other:
      fix = f'{other!r} cannot be read: there are default, linear, llama3 and yarn'
      table.refuse('type' if kind is None else 'rope_type', fix)
  table.finish()
  return Rope(theta=theta, layout=layout, scaling=scaling)


def _llama3(table: Keys, length: int) -> Llama3Scaling:
  return Llama3Scaling(factor=table.number('factor'), low_freq_factor=table.number('low_freq_factor'),
                       high_freq_factor=table.number('high_freq_factor'),
                       original_length=table.whole('original_max_position_embeddings', length))


def _yarn(table: Keys, length: int) -> Yarn:
  return Yarn(factor=table.number('factor'), original_length=table.whole('original_max_position_embeddings', length),
              beta_fast=table.number('beta_fast', 32.0), beta_slow=table.number('beta_slow', 1.0),
              attention_factor=table.number_or_none('attention_factor'), mscale=table.number_or_none('mscale'),
              mscale_all_dim=table.number_or_none('mscale_all_dim'), truncate=table.flag('truncate', True))
