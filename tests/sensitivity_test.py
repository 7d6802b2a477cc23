"""The command measures each weight, and prints a plan that a config can hold and that the run's model takes."""
import re

import jax
import pytest

from efficient_lm import sensitivity
from efficient_lm.commands import exit_code
from efficient_lm.compression.rewriting import assign
from efficient_lm.compression.rules import Rule
from efficient_lm.config import experiment
from efficient_lm.formats import Group, Int
from efficient_lm.runs import loading, run


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  config, default = experiment.load('tests/minute.py:dense', ['--config.train.steps=0'])
  jax.config.update('jax_disable_most_optimizations', True)   # compiling is all that takes time here
  run.run(config, default, folder)
  yield folder
  jax.config.update('jax_disable_most_optimizations', False)


def printed(capsys, workdir, *words, code=0):
  """What it says: on standard output where it succeeds, else on standard error."""
  try: assert exit_code(sensitivity.main, ['sensitivity', f'--run={workdir}', '--sequences=8', *words]) == code
  finally:
    for flag in ('formats', 'group', 'where', 'budget', 'sequences', 'each_layer'): sensitivity.FLAGS[flag].unparse()
  said = capsys.readouterr()
  return said.err if code else said.out


def plan_of(said):
  """The rules that it printed, as a config would read them."""
  return eval(said.partition('\nrules=')[2], {'Rule': Rule, 'Int': Int, 'Group': Group})


def test_it_prints_every_weight_in_every_format_and_a_plan_within_the_budget(workdir, capsys):
  said = printed(capsys, workdir, '--formats=int2,int8', '--group=16', '--where=(up|gate)$', '--budget=1500')
  assert len(re.findall(r'int2 with zero point per group of 16 +\d', said)) == len(re.findall('(up|gate) .*int2', said)) + 1
  plan = plan_of(said)
  decided = assign(loading.abstract_model(workdir), plan)
  assert len(decided) == len(plan) == len(re.findall('(up|gate) .*int2', said))
  size, = re.findall(r'this plan +([\d,]+)', said)
  assert int(size.replace(',', '')) <= 1500


def test_layers_apart_have_rules_of_their_own(workdir, capsys):
  said = printed(capsys, workdir, '--each_layer', '--formats=int2,int8', '--group=16', '--where=up$', '--budget=600')
  assert 'stages=(Unroll(), Quantize(rules=…))' in said
  assert [rule.where for rule in plan_of(said)] == [f'^stacks/0/blocks/{i}/mlp/up$' for i in range(2)]


def test_groups_that_do_not_divide_a_weight_are_fitted_to_it_with_a_note(workdir, capsys):
  said = printed(capsys, workdir, '--formats=int4,int8', '--group=7', '--where=(up|down)$', '--budget=4000')
  for bits in (4, 8):
    fitted = rf'^int{bits} per group of 4 in place of int{bits} per group of 7, which does not divide stacks/0'
    assert re.search(fitted, said, re.M)
  plan = plan_of(said)
  assert {rule.weights.scales for rule in plan} == {Group(size=4)}
  assert len(assign(loading.abstract_model(workdir), plan)) == 2
  assert len(re.findall(r'^ ?int\d per group of 7 +[\d,]+', said, re.M)) == 2, 'one format for all, as it was asked for'


@pytest.mark.parametrize('words, wrong', [
  (('--formats=int5',), "--formats = 'int5': choose from int2, int3"), (('--group=0',), '--group = 0: must be at least 1'),
  (('--formats=mxfp4',), 'groups of 32 do not divide 16 inputs'), (('--where=blcoks',), "--where = 'blcoks': "),
  (('--where=(',), "--where = '(': must be a regular expression"), (('--sequences=0',), '--sequences = 0: must be'),
  (('--formats=int2', '--group=16', '--budget=1'), '--budget = 1: 1 bytes are too few'),
])
def test_what_is_wrong_is_one_line(workdir, capsys, words, wrong):
  said = printed(capsys, workdir, *words, code=2)
  assert wrong in said and said.count('\n') == 1
