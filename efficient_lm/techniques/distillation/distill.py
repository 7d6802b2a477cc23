"""Knowledge distillation from a teacher that runs beside the student."""
import dataclasses
from typing import Any

from efficient_lm.errors import IncompatibleError


@dataclasses.dataclass(kw_only=True)
class Distill:
  """Mixes the loss with the divergence from a teacher's next-token distribution (Hinton et al. 2015): `weight` 0 leaves
  the loss as it was, 1 drops the labels. `teacher` is a source (an earlier run, say), and lies on the mesh of the run."""
  teacher: Any
  weight: float = 0.5
  temperature: float = 1.0

  touches = 'loss'

  def check(self):
    if not 0 <= self.weight <= 1: yield 'weight', self.weight, 'must be a share between 0 and 1'
    if self.temperature <= 0: yield 'temperature', self.temperature, 'must be positive'

  def __call__(self, learner, key):
    from efficient_lm.parallel.sharding import mesh_in_force
    from efficient_lm.training.losses import Distilled
    teacher = self.teacher.load(mesh_in_force())
    for name, model in (('teacher', teacher), ('student', learner.model)):
      if self.weight and getattr(model, 'softcap', None) is not None:
        raise IncompatibleError(f'the {name} has a soft cap on its logits: a divergence is not computed of those')
    student, taught = learner.model.embed.shape[0], teacher.embed.shape[0]
    if student != taught:
      raise IncompatibleError(f'teacher with a vocabulary of {taught}, student with {student}: they must be equal')
    return learner.replace(loss=Distilled(learner.loss, teacher, self.weight, self.temperature),
                           notes=(*learner.notes, f'Distill: {self.weight:g} of the loss is the teacher\'s'))
