"""Folders of runs that nobody has written in good faith: each command refuses them in one line that names what is wrong."""
import functools
import json
import os
import pathlib
import shutil
import tarfile

import numpy as np
import pytest

from efficient_lm import commands, evaluate, generate, report
from efficient_lm.config import experiment
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.runs import FromRun, record, results, tracking
from tests import minute

pytestmark = pytest.mark.fault('a run of others: config, record, manifest, tokenizer, log, ledger',
                               'refused in one line, or read as it is')
STORED = pathlib.Path(__file__).parent / 'stored'


def main(workdir):
  """What the command does with a folder before it begins."""
  made = minute.get_config('quick')
  experiment.validate(made, workdir)
  experiment.refuse_other(workdir, made)


READING = {'generate': generate.main, 'evaluate': evaluate.main}


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
  """A run of an earlier version, whose files have no hashes: what it says is all that there is to judge it by."""
  folder = tmp_path_factory.mktemp('stored')
  with tarfile.open(STORED / 'lowered.tar.gz') as archive: archive.extractall(folder, filter='data')
  return folder / 'lowered'


@pytest.fixture
def folder(stored, tmp_path):
  return shutil.copytree(stored, tmp_path / 'run')


@pytest.fixture(params=[*READING, 'report', 'main'])
def command(request, folder, capsys):
  """command() -> the lines on standard error of a command that reads the run, which ends with 2 or 3."""
  def call(name=request.param):
    if name == 'report': code = report.main([str(folder)])
    elif name == 'main': code = commands.exit_code(lambda overrides: main(str(folder)), [name])
    else: code = commands.exit_code(READING[name], [name, f'--run={folder}'] + ['--prompt=abc'] * (name == 'generate'))
    assert code in (2, 3), code
    return capsys.readouterr().err.splitlines()
  call.name = request.param
  return call


def put(data, path, value):
  """Sets what lies at a path such as ('model', 'dim')."""
  functools.reduce(lambda inner, name: inner[name], path[:-1], data)[path[-1]] = value


ODD = {f'{".".join(map(str, path))} = {value!r:.20}': (path, value) for path, values in {
  ('model', 'dim'): (-5, 0, 'x', None, 2.5, True, [], {}, {'class': 'Int'}),
  ('model', 'vocab_size'): (-1, 'x', None), ('model', 'stacks'): (None, [], [None], 'x', 3),
  ('model', 'stacks', 0, 'num_layers'): (-1, 0, 'x', None), ('model',): (None, 3, 'x', [], {'class': 'Experiment'}),
  ('data',): (None, 3, 'x', []), ('train',): (None, 3, {'class': 'Train'}), ('train', 'steps'): (-1, 'x', None),
  ('train', 'batch_size'): (0, 'x', 1.5), ('train', 'optimizer'): (None, 3), ('seed',): (-1, 2 ** 40, 'x', None),
  ('mesh',): (None, 'x'), ('techniques',): (None, 3, [3], [{'class': 'Int'}]), ('stages',): (None, [3], [{'class': 'Int'}]),
  ('start',): (3, {'class': 'Int'}, {'class': 'FromRun'}), ('class',): ('os.system', 'Int', 3, None, ''), ('extra',): (1,),
  ('model', 'extra'): (1,), ('model', 'class'): ('subprocess.Popen', 'Unread', 'Corpus', 3, []),
}.items() for value in values}


@pytest.mark.parametrize('odd', ODD)
@pytest.mark.parametrize('command', ['generate', 'main'], indirect=True)
def test_an_odd_value_in_a_config_is_one_line(command, folder, odd):
  path, value = ODD[odd]
  data = json.loads((folder / 'config.json').read_text())
  put(data, path, value)
  (folder / 'config.json').write_text(json.dumps(data))
  line, = command()
  assert 'config' in line and len(line) < 500


def nested(depth): return '{"class": "Experiment", "model": ' + '[' * depth + ']' * depth + '}'


TEXTS = {
  'nested': nested(10_000), 'nested less': nested(400), 'nested objects': '{"a":' * 10_000 + '1' + '}' * 10_000,
  'empty': '', 'cut': '{"class": "Exp', 'null': 'null', 'a list': '[]', 'a number': '1',
  'no UTF-8': b'{"class": "\xff\xfe"}',
  'UTF-16': '{"class": "Experiment"}'.encode('utf-16'), 'NUL': b'\0' * 100, 'NaN': '{"class": "Experiment", "seed": NaN}',
  'twice': '{"class": "Experiment", "class": "Experiment"}', 'many digits': '{"seed": ' + '9' * 5000 + '}',
  'a hash': '{"class": "Experiment", "sha256": "x"}',
}


@pytest.mark.parametrize('text', TEXTS)
def test_an_odd_text_for_a_config_is_one_line(command, folder, text):
  content = TEXTS[text]
  (folder / 'config.json').write_bytes(content if isinstance(content, bytes) else content.encode())
  line, = command()
  assert 'config.json' in line and len(line) < 500


def test_a_config_without_end_is_one_line(command, folder):
  with open(folder / 'config.json', 'wb') as file: file.truncate(10 ** 12)
  line, = command()
  assert 'config.json' in line and 'more than' in line


@pytest.mark.parametrize('command', ['generate', 'evaluate', 'main'], indirect=True)
@pytest.mark.parametrize('chain', [['run'], ['b', 'run'], ['b', 'c', 'b'], [f'r{i}' for i in range(60)]],
                         ids=['itself', 'a cycle', 'into a cycle', 'many'])
def test_a_run_that_starts_in_the_end_from_itself_is_one_line(command, folder, chain):
  data = json.loads((folder / 'config.json').read_text())
  for name, start in zip(['run', *chain], chain, strict=False):
    (folder.parent / name).mkdir(exist_ok=True)
    start = {'class': 'FromRun', 'path': str(folder.parent / start), 'stage': None}
    (folder.parent / name / 'config.json').write_text(json.dumps(data | {'model': None, 'start': start}))
  line, = command()
  if command.name != 'main': assert 'run' in line


TOKENIZERS = ['', '{', '[]', 'null', '{"kind": "bytes"}', '{"kind": "symbols", "symbols": "ab' + 'c' * 300 + '"}',
              '{"kind": "symbols", "symbols": 3}', '{"kind": "nothing"}', '{"kind": ["bytes"]}', '[' * 10_000,
              '{"kind": "bpe", "vocab_size": "x", "model": {}}', '{"kind": "symbols", "symbols": "abcdefghi"}']


@pytest.mark.parametrize('command', ['generate', 'evaluate'], indirect=True)
@pytest.mark.parametrize('content', TOKENIZERS)
def test_an_odd_tokenizer_is_one_line(command, folder, content):
  """One of more ids than the model has is none of that model's."""
  (folder / 'tokenizer.json').write_text(content)
  line, = command()
  assert 'tokenizer' in line and len(line) < 500
  (folder / 'tokenizer.json').write_bytes(b'{"kind": "\xff"}')
  line, = command()
  assert 'tokenizer' in line


RECORD = {'text': {'hash': 'h'}, 'tokenizer': 'symbols abcdefgh', 'start': None, 'sources': {},
          'plan': [{'folder': '1_train', 'name': '1 train', 'key': 'k'}]}


@pytest.mark.parametrize('path, value', [
  (('text',), None), (('text',), {'hash': 3}), (('tokenizer',), 3), (('start',), 3),
  (('start',), {'key': 3}), (('sources',), None), (('sources',), {'a': 3}), (('plan',), []), (('plan',), None),
  (('plan',), [3]), (('plan', 0, 'key'), 3),
  (('plan', 0, 'folder'), '../../1_x'), (('plan', 0, 'folder'), '1_/x'), (('plan', 0, 'folder'), 'x'),
  (('plan', 0, 'folder'), '1_\0'), (('plan', 0, 'name'), 'train')])
@pytest.mark.parametrize('command', ['generate', 'report'], indirect=True)
def test_an_odd_record_of_a_run_is_one_line(command, folder, path, value):
  data = json.loads(json.dumps(RECORD))
  put(data, path, value)
  (folder / 'run.json').write_text(json.dumps(data))
  line, = command()
  assert 'run.json' in line


def test_a_record_whose_start_is_odd_is_one_line(tmp_path):
  """It stands in for a source that is gone."""
  from efficient_lm.errors import CheckpointError
  from efficient_lm.runs import FromRun
  made = minute.get_config('quick')
  made.model, made.start = None, FromRun(path=str(tmp_path / 'gone'))
  good = experiment.to_json(minute.get_config().model)
  for spec in (None, 3, {'class': 'Transformer'}, {'class': 'Int'}, good | {'dim': -1}):
    record.sealed.write(tmp_path, 'run.json', RECORD | {'start': {'source': 's', 'key': 'k', 'spec': spec}})
    with pytest.raises(CheckpointError, match=r'run\.json is damaged') as caught: experiment.model_of(made, str(tmp_path))
    assert '\n' not in str(caught.value)


def manifest(folder, entries):
  place = folder / 'stages' / '1_train' / '4' / record.MANIFEST
  place.parent.mkdir(parents=True)
  place.write_text(json.dumps({'record': entries, 'record_crc32': record.crc32(entries), 'leaves': {}, 'crc32': 0}))
  record.sealed.write(folder, 'run.json', RECORD)


STRUCTURES = [None, 3, [], {'module': 'Nothing'}, {'module': 3}, {'variable': 'Param', 'shape': 'x', 'dtype': 'float32'},
              {'variable': 'Param', 'shape': [-1], 'dtype': 'float32'}, {'variable': 'Param', 'shape': [2], 'dtype': 'x'},
              {'static': 'Nothing'}, {'config': {'class': 'os.system'}}, {'list': 3}, {'tuple': [{}]},
              {'module': 'Transformer'}]


@pytest.mark.parametrize('structure', STRUCTURES)
@pytest.mark.parametrize('command', ['generate'], indirect=True)
def test_an_odd_structure_of_a_model_is_one_line(command, folder, structure):
  manifest(folder, {'key': 'k', 'step': 4, 'row': {'stage': '1 train'}, 'structure': structure, 'weights': []})
  line, = command()
  assert ('1_train' in line or 'class is not at hand' in line) and len(line) < 500


@pytest.mark.parametrize('change', [{'row': None}, {'row': {'stage': 3}},
                                    {'row': {'stage': 'a', 'size': {'parameters': 'x'}}},
                                    {'row': {'stage': 'a', 'notes': 3}}, {'row': {'stage': 'a', 'quality': 3}},
                                    {'weights': None}, {'weights': [3]}, {'weights': [{'path': 'a'}]}, {'step': 'x'},
                                    {'row': {'stage': 'a', 'size': {'parameters': 10 ** 400}}}])
@pytest.mark.parametrize('command', ['report'], indirect=True)
def test_an_odd_commit_is_one_line(command, folder, change):
  manifest(folder, {'key': 'k', 'step': 4, 'row': {'stage': '1 train'}, 'structure': None, 'weights': []} | change)
  (folder / 'ledger.json').unlink()
  line = command()[-1]
  assert '1_train' in line and len(line) < 500


@pytest.mark.parametrize('spec', [3, [], 'x', {}, {'class': 'Train'}, {'class': 'Transformer', 'dim': 'x'},
                                  {'class': 'Transformer', 'dim': -1}])
def test_an_odd_description_of_what_a_stage_left_is_one_line(folder, spec):
  manifest(folder, {'key': 'k', 'step': 4, 'spec': spec})
  with pytest.raises((CheckpointError, ConfigError)) as caught: FromRun(path=str(folder)).spec()
  assert '1_train' in str(caught.value) and '\n' not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize('leaves', [3, [], {'model/a': 3}, {'model/a': ['float32', [2]]}, {'model/a': ['x', [2], 0]},
                                    {'model/a': ['float32', 'ab', 0]}, {'model/a': ['float32', [-1], 0]},
                                    {'model/a': ['float32', [2], None]}, {'model/a': ['float32', [2.5], 0]}])
@pytest.mark.parametrize('command', ['generate'], indirect=True)
def test_an_odd_manifest_of_a_checkpoint_is_one_line(command, folder, leaves):
  path = folder / 'checkpoints' / '6' / record.MANIFEST
  path.write_text(json.dumps({'leaves': leaves, 'crc32': record.crc32(leaves)}))
  line, = command()
  assert 'checkpoints' in line and len(line) < 500


ROWS = [{'step': 10 ** 400, 'loss': 1.0}, {'step': 1, 'loss': 10 ** 400}, {'step': 'x'}, {'step': True}, {'loss': 1}, 3,
        None, [], {'step': 1, 'stage': 'x'}, {'step': 1, 'not_finite': 3}, {'step': 1, 'not_finite': {'loss': 'x'}},
        {'step': 1, 'not_finite': {'loss': {}}}, {'step': 1, 'load': 'x'}, {'step': 1, 'load': [[1], [1, 2]]},
        {'step': 1, 'load': [[10 ** 400]]}, {'step': 1, 'load': [[[1]]]}, {'step': 1, 'load': 3}, {'step': 1, 'loss': [1]},
        {'step': 1, 'loss': {'a': 1}}, {'step': 1, 'loss': 'x', 'eval/bits_per_byte': None}]


def test_an_odd_row_of_a_log_is_left_out_or_not_drawn(folder):
  before = (folder / 'metrics.jsonl').read_text()
  for row in ROWS:
    (folder / 'metrics.jsonl').write_text(before + json.dumps(row) + '\n')
    found = results.load(folder)
    for name in ('loss', 'eval/bits_per_byte'): assert np.isfinite(found.curve(name)[0]).all()
    assert found.load_LE is None or tracking.load_heatmap(found.load_LE).ndim == 3
  (folder / 'metrics.jsonl').write_text(before + '\n'.join(map(json.dumps, ROWS)) + '\n')
  assert report.main([str(folder)]) == 0


def test_what_a_report_reads_may_be_without_end_or_no_file(folder):
  (folder / 'samples').mkdir(exist_ok=True)
  with open(folder / 'samples' / 'a.txt', 'wb') as file: file.truncate(10 ** 12)
  (folder / 'stages' / '1_train').mkdir(parents=True)
  os.mkfifo(folder / 'samples' / 'b.txt')
  assert report.main([str(folder)]) == 0
  os.mkfifo(folder / 'stages' / '1_train' / 'weights.json')
  assert report.main([str(folder)]) == 2


@pytest.mark.parametrize('content', ['', '{', 'null', '{}', '[3]', '[{"stage": 3}]', '[' * 10_000, b'\xff',
                                     '[{"stage": "a", "size":{"parameters": "x"}}]',
                                     '[{"stage": "a", "notes": 3}]'])
@pytest.mark.parametrize('command', ['report'], indirect=True)
def test_an_odd_ledger_of_an_earlier_version_is_one_line(command, folder, content):
  (folder / 'ledger.json').write_bytes(content if isinstance(content, bytes) else content.encode())
  line, = command()
  assert 'ledger.json' in line
