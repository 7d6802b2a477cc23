"""Folders: shards, and a hundred hostile ones, each of which is one line."""
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop import families, folder
from efficient_lm.interop.huggingface import HuggingFace

INDEX = 'model.safetensors.index.json'
LLAMA = pathlib.Path(__file__).parent / 'fixtures' / 'llama'


def copied(tmp_path, name: str = 'model') -> pathlib.Path:
  target = tmp_path / name
  target.mkdir()
  for file in ('config.json', 'model.safetensors'): shutil.copy(LLAMA / file, target / file)
  return target


def sharded(path: pathlib.Path, num_files: int = 3) -> pathlib.Path:
  """The same checkpoint in shards with an index, as transformers writes large ones."""
  arrays = load_file(path / 'model.safetensors')
  (path / 'model.safetensors').unlink()
  names, weight_map = list(arrays), {}
  for i in range(num_files):
    file = f'model-{i + 1:05}-of-{num_files:05}.safetensors'
    save_file({name: arrays[name] for name in names[i::num_files]}, path / file)
    weight_map |= dict.fromkeys(names[i::num_files], file)
  (path / INDEX).write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': weight_map}))
  return path


def test_shards_are_one_checkpoint(tmp_path):
  whole, parts = folder.read(str(LLAMA)), folder.read(str(sharded(copied(tmp_path))))
  assert whole.tensors.keys() == parts.tensors.keys() and whole.config == parts.config
  for name, tensor in whole.tensors.items(): assert tensor.read().tobytes() == parts.tensors[name].read().tobytes()


def test_a_folder_of_a_run_is_none_of_hugging_face(tmp_path):
  (tmp_path / 'config.json').write_text('{"class": "Experiment", "seed": 0}')
  assert folder.holds_model(str(LLAMA))
  assert not folder.holds_model(str(tmp_path)) and not folder.holds_model('/no/such/folder')


@pytest.mark.parametrize(('file', 'words'), [
  ('pytorch_model.bin', 'save it again as safetensors'), ('adapter_config.json', 'merge it into its base model'),
  ('other', 'holds neither')])
def test_folders_of_other_kinds_say_what_makes_one_of_them(tmp_path, file, words):
  path = copied(tmp_path)
  (path / 'model.safetensors').rename(path / file)
  with pytest.raises(ConfigError, match=words): folder.read(str(path))


# ------------------------------------------------------------------ hostile folders

def _index(change):
  def act(path):
    file = sharded(path) / INDEX
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
  return act


def _named(name):
  def change(index): index['weight_map'][next(iter(index['weight_map']))] = name
  return _index(change)


def _bytes(file, content): return lambda path: (path / file).write_bytes(content)


def _config(**changes):
  def act(path):
    file = path / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  return act


OUTSIDE = ['../secret.safetensors', '/etc/passwd', 'a/b.safetensors', '..', '.', '', 'model.bin', '..\\x.safetensors', None,
           3, 'C:\\x.safetensors', 'x\0.safetensors', '.hidden.safetensors', 'x' * 300 + '.safetensors', '~/x.txt', ['a']]
NOT_JSON = [b'', b'{', b'[]', b'null', b'\xff\xfe', b'{"a": 1, "a": 2}', b'[' * 200_000, b'{"model_type": NaN', b'"text"']
NUMBERS = [-1, 0, 1.5, 10 ** 9, 10 ** 30, 'x', [], {}, True]
HOSTILE = [
  *(_named(name) for name in OUTSIDE), _named('model-00009-of-00003.safetensors'),
  _index(lambda index: index.update(weight_map={})), _index(lambda index: index.update(weight_map=[1])),
  _index(lambda index: index.pop('weight_map')),
  _index(lambda index: index['weight_map'].pop(next(iter(index['weight_map'])))),
  _index(lambda index: index['weight_map'].update(more='model-00001-of-00003.safetensors')),
  *(_bytes('config.json', content) for content in NOT_JSON),
  *((lambda path, content=content: (sharded(path) / INDEX).write_bytes(content)) for content in NOT_JSON),
  *(_config(**{key: value}) for key in ('num_hidden_layers', 'vocab_size', 'hidden_size', 'intermediate_size',
                                        'num_attention_heads') for value in NUMBERS),
  *(_config(rope_parameters=value) for value in ([], 'x', {'rope_type': []}, {'rope_theta': -1.0}, {'rope_type': 'yarn'})),
  *(_config(architectures=value) for value in ('x', [1], ['x'])), _config(model_type=['llama']), _config(model_type={}),
  lambda path: (path / 'model.safetensors').unlink(), lambda path: (path / 'config.json').unlink(),
  lambda path: (path / 'model.safetensors').write_bytes((path / 'model.safetensors').read_bytes()[:-1]),
  lambda path: (path / 'model.safetensors').write_bytes((path / 'model.safetensors').read_bytes()[:100]),
  lambda path: ((path / 'model.safetensors').unlink(), (path / 'model.safetensors').mkdir()),
  lambda path: (path / 'config.json').chmod(0o000) if os.getuid() else (path / 'config.json').unlink(),
]


def test_a_hundred_hostile_folders_are_a_line_each_and_touch_nothing_outside(tmp_path):
  secret = tmp_path / 'secret.safetensors'
  shutil.copy(LLAMA / 'model.safetensors', secret)   # what '../secret.safetensors' would read
  before, opened = secret.stat().st_mtime_ns, []
  lines = []
  for number, act in enumerate(HOSTILE):
    path = copied(tmp_path, f'model{number}')
    act(path)
    content = {file: file.stat().st_size for file in path.iterdir()}
    source = HuggingFace(path=str(path))
    with pytest.raises((ConfigError, CheckpointError)) as caught: opened.append((source.spec(), folder.read(str(path))))
    lines.append(str(caught.value))
    assert '\n' not in lines[-1] and len(lines[-1]) < 600 and f'model{number}' in lines[-1], lines[-1]
    assert content == {file: file.stat().st_size for file in path.iterdir()}
  assert len(lines) == len(HOSTILE) >= 95 and not opened
  assert secret.stat().st_mtime_ns == before and not [line for line in lines if 'Traceback' in line]


def test_huge_counts_are_refused_before_names_are_made():
  config = json.loads((LLAMA.parent / 'qwen3_moe' / 'config.json').read_text())
  with pytest.raises(ConfigError, match='more, times the layers, than any model has'):
    families.spec_of(config | {'num_hidden_layers': 1000, 'num_local_experts': 4000, 'mlp_only_layers': []})


def test_samples_see_a_change_at_either_end_of_any_tensor(tmp_path):
  """Which `key` is made of. In the middle of a tensor of more than 8 KiB they would not: said in the docstring."""
  path = copied(tmp_path)
  arrays, first = load_file(path / 'model.safetensors'), list(folder.samples(str(path)))
  name = 'model.layers.1.self_attn.k_proj.weight'
  for at in (0, -1):
    changed = arrays | {name: arrays[name].copy()}
    changed[name].reshape(-1)[at] += np.float32(1)
    save_file(changed, path / 'model.safetensors')
    assert list(folder.samples(str(path))) != first
  save_file(arrays, path / 'model.safetensors')
  assert list(folder.samples(str(path))) == first
