#!/usr/bin/env bash
# Several machines with as many GPUs each: one command on each of them, within a few minutes.
#
#   NODES=2 NODE=0 HOST=10.0.0.1 launch/multi_node.sh --data DDR-dataset --run-dir runs/NAME ...   # on the first
#   NODES=2 NODE=1 HOST=10.0.0.1 launch/multi_node.sh --data DDR-dataset --run-dir runs/NAME ...   # on the second
#
# NODES     how many machines          NODE   which of them this is, from 0
# HOST      address of the first one   PORT   a free port there, 29500 by default
# RANKS     processes a machine; by default its GPUs
#
# Run folder and data lie under one path on all machines. Where there are several networks: NCCL_SOCKET_IFNAME, and
# GLOO_SOCKET_IFNAME if it is not the one on which HOST is reached.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
: "${NODES:?how many machines}" "${NODE:?which of them this is, from 0}" "${HOST:?address of the first one}"
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
  echo "multi_node.sh: there is no GPU here; say RANKS=2 for two processes on the CPU." >&2
  exit 2
fi
# Seconds that the ranks have to save and to end trackers when this is asked to stop.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
exec accelerate launch --multi_gpu --same_network --rdzv_backend static --num_machines "$NODES" \
  --num_processes $((NODES * ranks)) --machine_rank "$NODE" --main_process_ip "$HOST" \
  --main_process_port "${PORT:-29500}" --mixed_precision no --dynamo_backend no "$root/fastddr/train.py" "$@"
