# What the other scripts share; each value can be given in the environment: ZONE=us-east5-a tpu_scripts/create.sh
set -eu
: "${TPU_NAME:=efficient-lm}"
: "${ZONE:=us-central1-a}"
: "${ACCELERATOR:=v5litepod-8}"
: "${RUNTIME:=v2-alpha-tpuv5-lite}"

on_all_workers() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$ZONE" --worker=all --command "$1"
}
