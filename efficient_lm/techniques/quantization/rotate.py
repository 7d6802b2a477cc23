"""Rotate (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456): rotate the spaces between products, so that no channel stands
out, and what is quantized is nearly normal. `compression.rotation` says how."""
import dataclasses


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Rotate:
  """A stage, to stand in front of quantization. `residual`, `values`, `hidden`: the largest block of R1, R2 and R4, a power
  of two; 1 leaves that space as it is. A tied head becomes an array of its own: it takes up the last norm's scales. Zeros of
  a pruned model do not survive it."""
  residual: int = 4096
  values: int = 4096
  hidden: int = 4096

  cannot_keep = ('zeros', 'pattern', 'bits')   # of the arrays that it rotates

  def check(self):
    for name, size in dataclasses.asdict(self).items():
      if size < 1 or size & (size - 1): yield name, size, 'must be a power of two'

  def __call__(self, model, context):
    """The rotated model, which computes the same, and a line on what was done."""
    from efficient_lm.compression import rotation
    sizes = dataclasses.asdict(self)
    blocks = ', '.join(f'{name} in blocks of {", ".join(map(str, sorted(found)))}'
                       for name, found in rotation.blocks(model, **sizes).items() if found)
    untied = model.own_head is None and self.residual > 1
    note = f'Rotate: {blocks}{"; the tied head became an array of its own" if untied else ""}'
    return rotation.rotated(model, context.key, **sizes), (note,)

  def abstract(self, model):
    """The same structure, from shapes alone."""
    import jax

    from efficient_lm.compression import rotation
    return rotation.rotated(model, jax.random.key(0), **dataclasses.asdict(self))
