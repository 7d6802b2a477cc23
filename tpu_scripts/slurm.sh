#!/usr/bin/env bash
#SBATCH --job-name=efficient_lm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains under Slurm, a process a node with all of its GPUs; JAX finds the others by Slurm's own variables. Two minutes before
# the time is up, or when the job is preempted, all of them save and end with 42, and the job is queued again.
# usage: sbatch [--nodes=4 --time=8:00:00 --partition=…] tpu_scripts/slurm.sh --config=configs/moe.py --workdir=runs/moe
# in the folder of the checkout, which all nodes see and which has .venv with the extra gpu.
set -uo pipefail
case " $* " in
  *" --workdir="*) ;;
  *) echo 'write --workdir=runs/NAME: it is what a job that is queued again resumes' >&2; exit 2 ;;
esac
srun .venv/bin/python -m efficient_lm.main "$@"
code=$?
if [ "$code" = 42 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
