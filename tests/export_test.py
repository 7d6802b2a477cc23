"""A model taken away, by the command and by a stage of its run."""
import json

import numpy as np
import pytest

from efficient_lm import export
from efficient_lm.commands import exit_code
from efficient_lm.compression.rules import Rule
from efficient_lm.formats import Group, Int
from efficient_lm.interop.export import Export
from efficient_lm.interop.gguf.source import Gguf
from efficient_lm.interop.huggingface import HuggingFace
from efficient_lm.interop.targets import CompressedTensors
from efficient_lm.runs import loading, record, run
from efficient_lm.techniques.quantization.ptq import Quantize
from tests import minute

pytestmark = pytest.mark.usefixtures('quick_compilation')   # nearly all of their time is compiling
FLAGS = ('run', 'format', 'out', 'dtype', 'text', 'stage')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run that trains nothing, quantizes, and writes what it has in the words of others."""
  folder = tmp_path_factory.mktemp('run')
  layers = Rule(where='attention|mlp', weights=Int(bits=4, scales=Group(size=16)))
  made = minute.over_bytes(folder, stages=(Quantize(rules=(layers,)), Export(to=CompressedTensors())))
  run.run(made, made, folder / 'run')
  return folder / 'run'


@pytest.fixture
def said(workdir, capsys):
  """said(code, **words): what export prints, on standard output if it succeeds, else on standard error."""
  def call(code=0, **words):
    given = [f'--{name}={value}' for name, value in ({'run': workdir} | words).items()]
    try: assert exit_code(export.main, ['export', *given]) == code
    finally:
      for name in FLAGS: export.FLAGS[name].unparse()
    out, err = capsys.readouterr()
    return err if code else ' '.join(out.split())   # wherever lines are broken
  return call


def test_what_is_exported_is_a_source_that_computes_the_same(said, workdir, tmp_path):
  out = said(format='hf', out=tmp_path / 'out')
  assert 'Hugging Face folder of' in out and 'written as the floats' in out
  model, source = loading.load_model(workdir), HuggingFace(path=str(tmp_path / 'out'))
  tokenizer, ids_BT = record.tokenizer(workdir), np.arange(24).reshape(2, 12)
  # Sums in another order: products of integers with a scale a group there, of dequantized floats here.
  np.testing.assert_allclose(source.load()(ids_BT).logits_BTV, model(ids_BT).logits_BTV, atol=1e-5)
  np.testing.assert_array_equal(source.tokenizer().prompt('some ä'), tokenizer.prompt('some ä'))
  again = said(run=tmp_path / 'out', format='hf', out=tmp_path / 'again')   # a folder of others is exported as well
  assert 'Hugging Face folder' in again
  assert (tmp_path / 'again' / 'model.safetensors').read_bytes() == (tmp_path / 'out' / 'model.safetensors').read_bytes()


def test_the_stage_writes_what_the_command_writes(said, workdir, tmp_path):
  said(format='compressed-tensors', out=tmp_path / 'out')
  (stage,) = workdir.glob('stages/*/export')
  assert (stage / 'model.safetensors').read_bytes() == (tmp_path / 'out' / 'model.safetensors').read_bytes()
  ledger = json.loads((workdir / 'ledger.json').read_text())
  assert 'Export: Hugging Face folder in few bits in' in json.dumps(ledger)


def test_programs_for_others_compute_what_the_model_does(said, workdir, tmp_path):
  """jax alone is always there to ask."""
  assert 'jax in a process without this project computes' in ' '.join(said(format='stablehlo', out=tmp_path / 'out').split())
  found = json.loads((tmp_path / 'out' / 'parity.json').read_text())
  assert found['parity']['relative_difference'] < 1e-6 and '| perplexity |' in (tmp_path / 'out' / 'README.md').read_text()
  assert not (tmp_path / 'out' / '__pycache__').exists()


def test_a_file_for_llama_cpp_is_a_source_that_computes_the_same(said, workdir, tmp_path):
  said(2, format='gguf', out=tmp_path / 'out')   # groups of 16 in 4 bits are no block of that format
  said(format='hf', out=tmp_path / 'hf')
  said(run=tmp_path / 'hf', format='gguf', out=tmp_path / 'out')
  model, source = loading.load_model(workdir), Gguf(path=str(tmp_path / 'out'))
  ids_BT = np.arange(24).reshape(2, 12)
  np.testing.assert_allclose(source.load()(ids_BT).logits_BTV, model(ids_BT).logits_BTV, atol=1e-5)   # as above


@pytest.mark.parametrize(('words', 'line'), [
  ({'format': 'onnx', 'out': 'x'}, "--format = 'onnx': must be one of hf, compressed-tensors, gguf"),
  ({'format': 'hf'}, '--out = None: is missing'),
  ({'format': 'hf', 'dtype': 'int8', 'out': 'x'}, "--dtype = 'int8': must be float32"),
  ({'format': 'gguf', 'dtype': 'int8', 'out': 'x'}, "--dtype = 'int8': must be one of 'float32'"),
  ({'format': 'stablehlo', 'dtype': 'float16', 'out': 'x'}, '--dtype'),
  ({'format': 'hf', 'text': 'nowhere.txt', 'out': 'x'}, '--text'),
  ({'format': 'hf', 'run': 'nowhere', 'out': 'x'}, 'nowhere'),
])
def test_a_mistake_is_one_line_and_nothing_is_written(said, tmp_path, monkeypatch, words, line):
  monkeypatch.chdir(tmp_path)
  err = said(2, **words)
  assert line in err and err.count('\n') == 1 and not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_touched(said, tmp_path):
  (tmp_path / 'mine').write_text('mine')
  assert 'is there already' in said(2, format='hf', out=tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['mine']
