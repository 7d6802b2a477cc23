# shellcheck shell=bash disable=SC2034   # what is set here is used by those
# What the other scripts share. Each value can be given in the environment, as ZONE=us-east5-a tpu_scripts/create.sh; with
# --dry-run a script says what it would do and does nothing.
set -euo pipefail
: "${TPU_NAME:=efficient-lm}"
: "${ZONE:=us-central1-a}"
: "${ACCELERATOR:=v5litepod-8}"
: "${RUNTIME:=v2-alpha-tpuv5-lite}"
: "${SPOT:=}"       # anything: a slice that is cheaper and may be taken away
: "${SHARED:=}"     # SERVER:/PATH of an NFS share (Filestore), which all hosts mount as efficient_lm/runs; several hosts need one
: "${EVERY:=30}"    # seconds between two looks at what goes on

dry_run='' workdir=''
words=()
for word in "$@"; do
  if [ "$word" = --dry-run ]; then dry_run=1; else words+=("$word"); fi
  if [[ $word = --workdir=* ]]; then workdir=${word#--workdir=}; fi
done
set -- ${words[@]+"${words[@]}"}

# Says why, in one line, and ends as the program does for a wrong argument.
refuse() {
  echo "$1" >&2
  exit 2
}

# gcloud, or what would be called.
cloud() {
  if [ -n "$dry_run" ]; then
    printf '%q ' gcloud "$@"
    echo
  else
    gcloud "$@"
  fi
}

# on WORKER COMMAND: a number, or all.
on() {
  cloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$ZONE" --worker="$1" --command "$2"
}

# What is asked of gcloud alone changes nothing: it is asked in a dry run, too.
state() {
  gcloud compute tpus queued-resources describe "$TPU_NAME" --zone "$ZONE" --format 'value(state.state)' 2> /dev/null || echo NONE
}

num_hosts() {
  gcloud compute tpus tpu-vm describe "$TPU_NAME" --zone "$ZONE" --format 'value(networkEndpoints[].ipAddress)' |
    grep -oE '[^;,]+' | wc -l
}
