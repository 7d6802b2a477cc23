"""Runs what a config describes: trains, then performs the stages that follow.

  python -m efficient_lm.main --config=configs/moe.py --workdir=runs/moe
  python -m efficient_lm.main --config=configs/moe.py:gpt2_124m --config.train.steps=500

  --config=FILE.py[:variant]   the experiment; the file is Python and is executed
  --config.FIELD=VALUE         overrides a field, such as --config.model.stacks[0].mlp.num_experts=4
  --workdir=FOLDER             where the run is kept (default: runs/NAME[-variant]); the same command resumes it

Several processes train as one when each of them is given the same command: by themselves on the hosts of a TPU slice and
under Slurm's srun, elsewhere with
  --coordinator=HOST:PORT      where process 0 listens for the others
  --process_id=N --num_processes=N
  --coordinator_timeout=300    seconds until who does not answer is given up
The workdir must be one folder that all of them see.

With the extra gcs it may be an address, --workdir=gs://bucket/runs/moe: the run is kept below runs/mirrors, copied to the
address while it goes, and fetched from there on a machine that has not seen it.

Exit codes: 0 done, 2 wrong config or arguments, 3 no usable checkpoint, 4 training went non-finite, 5 what has to be kept
cannot be written, 6 another process does not answer or has failed, 7 a device is faulty: copies of an array that must be
equal, or results of a step that was computed twice, are not, 42 preempted: by SIGTERM, SIGINT (Ctrl-C) or SIGHUP, once what
there was to save is saved, and the same command goes on. A second signal ends the program at once, with 128 and its number.
A reader of the output that goes away does not matter.
"""
from efficient_lm.system import interruption, output

if __name__ == '__main__':   # before anything that takes time is loaded
  output.outlive()
  interruption.begin()

import contextlib

from absl import flags

from efficient_lm import commands
from efficient_lm.config import experiment, paths
from efficient_lm.parallel import processes
from efficient_lm.runs import mirror

FLAGS = flags.FLAGS
commands.define_config()
commands.define_processes()
flags.DEFINE_string('workdir', None, 'where the run is kept')


def main(overrides: list[str]):
  """Reads, checks, meets the other processes where there are some, runs."""
  group = commands.processes_around()
  workdir = paths.expanded('--workdir', FLAGS.workdir) or (commands.default_workdir() if FLAGS.config else None)
  there = mirror.of('--workdir', workdir)
  if there:
    processes.join(group, FLAGS.coordinator_timeout)   # one of them fetches what the others read, too
    processes.on_first(there.fetch)
    workdir = there.folder
  config, default = commands.load_config(overrides, workdir)
  experiment.refuse_other(workdir, config)
  if not there: processes.join(group, FLAGS.coordinator_timeout)
  from efficient_lm.runs import run
  with there.kept() if there else contextlib.nullcontext(), processes.ending_together(): run.run(config, default, workdir)


if __name__ == '__main__': commands.start(main, __doc__)
