#!/usr/bin/env bash
# Says the number of this worker in its slice, as the metadata server of the virtual machine has it.
exec curl -sf -H 'Metadata-Flavor: Google' "http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes/agent-worker-number"
