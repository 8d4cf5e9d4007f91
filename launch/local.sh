#!/usr/bin/env bash
# One process: on the GPU if there is one, else on the CPU.
#
#   launch/local.sh --data DDR-dataset --preset report-convmixer
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
exec accelerate launch --config_file "$root/accelerate_config.yaml" "$root/fastddr/train.py" "$@"
