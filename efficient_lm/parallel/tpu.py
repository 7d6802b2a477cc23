"""How many hosts a TPU slice has, asked before JAX is loaded."""
import glob
import importlib.util
import os
import urllib.request
from collections.abc import Mapping

ENDPOINTS = 'computeMetadata/v1/instance/attributes/worker-network-endpoints'   # of each host, separated by commas
SECONDS = 5   # that the metadata server of a virtual machine may take


def num_hosts(environ: Mapping[str, str] = os.environ) -> int:
  """Of all slices of a job; 1 where there is no TPU, or nobody says. What JAX's own detection reads is read here, so that a
  machine of its own opens no socket: GKE's variables, or the metadata server of Google's virtual machines."""
  wanted = environ.get('JAX_PLATFORMS', 'tpu').split(',')
  if 'tpu' not in wanted or not _is_here(): return 1
  names = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES') or _endpoints(environ)
  return len(names.split(',')) * int(environ.get('MEGASCALE_NUM_SLICES') or 1)


def _is_here() -> bool:
  """Whether there are chips, and the library that drives them."""
  return bool(glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')) and importlib.util.find_spec('libtpu') is not None


def _endpoints(environ) -> str:
  if environ.get('TPU_SKIP_MDS_QUERY'): return ''
  address = f'http://{environ.get("GCE_METADATA_IP", "metadata.google.internal")}/{ENDPOINTS}'
  request = urllib.request.Request(address, headers={'Metadata-Flavor': 'Google'})
  try:
    with urllib.request.urlopen(request, timeout=SECONDS) as answer: return answer.read().decode()
  except OSError: return ''
