"""`python -m efficient_lm.main` that copies to its address, and shows that it lives, five times a second."""
import runpy

from efficient_lm.runs import lease, mirror
from efficient_lm.system import interruption, output

if __name__ == '__main__':
  output.outlive()
  interruption.begin()
  lease.BEAT = mirror.COPY_EVERY = 0.2
  runpy.run_module('efficient_lm.main', run_name='__main__')
