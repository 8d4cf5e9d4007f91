#!/usr/bin/env bash
# All GPUs of this machine, a process each.
#
#   launch/multi_gpu.sh --data DDR-dataset --preset report-convmixer
#   RANKS=2 launch/multi_gpu.sh ...                       # so many processes; on a machine without a GPU too
#   CUDA_VISIBLE_DEVICES=0,3 launch/multi_gpu.sh ...      # these GPUs
#   ACCELERATE_CPU_AFFINITY=1 launch/multi_gpu.sh ...     # each process on the cores beside its GPU (nvidia-ml-py)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
gpus() {
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    # CUDA takes them up to the first that is none; SLURM writes NoDevFiles where a job has no GPU.
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^-1$/,$d; /^NoDevFiles$/,$d' | grep -c . || true
  else
    nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
  fi
}
ranks=${RANKS:-$(gpus)}
if ((ranks == 0)); then
  echo "multi_gpu.sh: there is no GPU here; take launch/local.sh, or say RANKS=2 for two processes on the CPU." >&2
  exit 2
fi
if ((ranks == 1)); then
  # Without a launcher, which as the first process of a container would keep SIGTERM to itself.
  exec python "$root/fastddr/train.py" "$@"
fi
# Seconds that the ranks have to save and to end trackers when this is asked to stop; PyTorch 2.11 always gives 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
exec accelerate launch --multi_gpu --num_machines 1 --num_processes "$ranks" --mixed_precision no \
  --dynamo_backend no --main_process_port "${PORT:-0}" "$root/fastddr/train.py" "$@"
