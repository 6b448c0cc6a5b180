#!/usr/bin/env bash
# One training job on several nodes under Slurm. Submit it where launch/ is, with the environment active:
#
#   sbatch --nodes=4 launch/multinode/slurm.sh RECIPE [dotted.key=value ...]
#
# Five minutes before the time limit Slurm sends SIGUSR1 to this shell: the ranks finish their step, save and end, and
# the job goes back into the queue, where it continues from that checkpoint. A rank that dies is started again with all
# others up to METATT_RESTARTS times. A job that fails for another reason is not queued again.
#
#SBATCH --job-name=metatt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=metatt-%j.log
set -euo pipefail

if [[ $# -eq 0 ]]; then
  echo "error: no recipe given; sbatch launch/multinode/slurm.sh RECIPE [dotted.key=value ...]" >&2
  exit 2
fi
cd "$SLURM_SUBMIT_DIR" # Slurm runs a copy of this file from another folder

# ---- what a cluster may want to change, from the environment of sbatch
ranks_per_node=${METATT_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
restarts=${METATT_RESTARTS:-3}
# Two jobs on one node do not meet, and no port is among those that Linux gives to clients (32768 and above).
port=${METATT_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
if [[ -n ${METATT_NIC:-} ]]; then # network interface between the nodes, where it must be named
  export GLOO_SOCKET_IFNAME=$METATT_NIC NCCL_SOCKET_IFNAME=$METATT_NIC
fi
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch by itself
# Equal on every start: the number of threads decides the last bits on a CPU.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Ranks may take this long to finish a step and save before torchrun ends them (seconds; less than SIGUSR1's lead).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\n'*}
echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NNODES nodes of $ranks_per_node ranks," \
  "meeting at $first_node:$port"

# A fixed meeting point and rank per node. SLURM_NODEID differs per node, so it is read there and not here.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'exec python -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"' torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks_per_node" --max-restarts "$restarts" \
  --master-addr "$first_node" --master-port "$port" launch/train.py "$@" &
step=$!

stopping=
stop() {
  stopping=yes
  echo "SIGUSR1: the time limit is near; stopping the ranks after this step"
  # To torchrun on every node: signalled ranks alone would be taken for failed ones and started again.
  scancel --signal=TERM "$SLURM_JOB_ID" || true
}
trap stop USR1

while true; do
  code=0
  wait "$step" || code=$?
  [[ $code -eq $((128 + $(kill -l USR1))) ]] || break # the signal interrupted `wait`, not the step
done

if [[ $code -eq 0 ]]; then
  echo "finished"
elif [[ -n $stopping ]]; then
  echo "stopped by SIGUSR1; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
else
  echo "error: the job failed with exit code $code and is not queued again; its own error stands above" >&2
fi
exit "$code"
