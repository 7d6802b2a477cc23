"""Trains what a config describes:

  python -m efficient_lm.main --config=configs/moe.py --workdir=runs/moe
  python -m efficient_lm.main --config=configs/moe.py:gpt2_124m --config.train.steps=500

  --config=FILE.py[:variant]   the experiment; the file is Python and is executed
  --config.FIELD=VALUE         overrides a field, such as --config.model.stacks[0].mlp.num_experts=4
  --workdir=FOLDER             where the run is kept (default: runs/NAME[-variant]); the same command resumes it

Exit codes: 0 done, 2 wrong config or arguments, 3 no usable checkpoint, 4 training went non-finite, 42 preempted.
"""
from absl import flags

from efficient_lm import commands
from efficient_lm.config import experiment
from efficient_lm.lazy import lazy

run = lazy('efficient_lm.runs.run')

FLAGS = flags.FLAGS
commands.define_config()
flags.DEFINE_string('workdir', None, 'where the run is kept')


def main(overrides: list[str]):
  """Reads, checks, trains."""
  config, default = commands.load_config(overrides)
  workdir = FLAGS.workdir or commands.default_workdir()
  experiment.refuse_other(workdir, config)
  run.run(config, default, workdir)


if __name__ == '__main__': commands.start(main, __doc__)
