"""Sources: models that a run starts from, learns from, or is compared with.

A source is a dataclass with

  spec()       what a config says of its model, for checks before anything is loaded
  abstract()   the shapes of its model
  load(mesh)   the model itself, on the mesh
  tokenizer()  the tokenizer that it was trained with
  key()        a name of its content: another one when the model is another
  label        what it is called in files and messages
  here         whether it can be read

and may stand wherever a model is asked for: `Experiment.start`, teachers, --run. There are `runs.FromRun`,
`interop.huggingface.HuggingFace` and `interop.gguf.source.Gguf`.
"""
import dataclasses


def is_source(value) -> bool:
  """Whether a part of a config is a source."""
  return dataclasses.is_dataclass(value) and all(hasattr(type(value), verb) for verb in ('spec', 'load', 'tokenizer', 'key'))
