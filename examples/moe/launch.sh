#!/usr/bin/env bash
# Train on the nodes of a Slurm job: the common part of the *.sbatch files in this folder, which end with
#
#     exec examples/moe/launch.sh CONFIG.toml [--section.key value ...]
#
# Run them in the root of the repository. docs/slurm.md has a diagram. Environment variables and defaults:
#
#   PYTHON            Python interpreter [.venv/bin/python]
#   RANKS_PER_NODE    trainer processes per node [the number of its GPUs, or 1]
#   ROLLOUT_NODES     number of nodes, the last ones, that run SGLang servers instead of trainers [0];
#                     "all": every node runs both. (In a heterogeneous job, the second component runs them.)
#   CONTAINER_IMAGE   image to run everything in, with pyxis if srun has it, else with apptainer [none]
#   CONTAINER_MOUNTS  host folders that the container sees [the repository]
#   MAX_RESTARTS      maximum restarts of the job [50]
#   MAX_CRASHES       maximum restarts after a crash, a hang or a bad node [3]
set -uo pipefail

{ # bash reads up to the closing brace before it runs anything, so the file may change during the job

PYTHON=${PYTHON:-.venv/bin/python}
RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
ROLLOUT_NODES=${ROLLOUT_NODES:-0}
export PYTHON RANKS_PER_NODE MAX_RESTARTS=${MAX_RESTARTS:-50} MAX_CRASHES=${MAX_CRASHES:-3} PYTHONUNBUFFERED=1

say() { printf '[%(%F %T)T] %s\n' -1 "$*"; }
fail() { say "error: ${*:2}"; exit "$1"; }

# --- nodes --------------------------------------------------------------------------------------------------

if [[ -n ${SLURM_HET_SIZE:-} ]]; then
  trainer_nodelist=$SLURM_JOB_NODELIST_HET_GROUP_0
  num_trainers=$SLURM_JOB_NUM_NODES_HET_GROUP_0
  on_trainers=(--het-group=0 --nodes="$num_trainers" --ntasks="$num_trainers")
  ROLLOUT_NODES=$SLURM_JOB_NUM_NODES_HET_GROUP_1
  on_servers=(--het-group=1 --nodes="$ROLLOUT_NODES" --ntasks="$ROLLOUT_NODES")
elif [[ $ROLLOUT_NODES == all ]]; then
  trainer_nodelist=$SLURM_JOB_NODELIST
  num_trainers=$SLURM_JOB_NUM_NODES
  ROLLOUT_NODES=$num_trainers
  on_trainers=(--overlap --nodes="$num_trainers" --ntasks="$num_trainers")
  on_servers=("${on_trainers[@]}")
else
  trainer_nodelist=$SLURM_JOB_NODELIST
  num_trainers=$((SLURM_JOB_NUM_NODES - ROLLOUT_NODES))
  on_trainers=(--relative=0 --nodes="$num_trainers" --ntasks="$num_trainers")
  on_servers=(--relative="$num_trainers" --nodes="$ROLLOUT_NODES" --ntasks="$ROLLOUT_NODES")
fi
((num_trainers > 0)) ||
  fail 2 "ROLLOUT_NODES = $ROLLOUT_NODES of $SLURM_JOB_NUM_NODES nodes leaves none for trainers: choose fewer"

# Slurm's address of the first node. Its name may resolve to an address that other nodes cannot reach.
first_node=$(scontrol show hostnames "$trainer_nodelist" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first_node" --oneliner | grep -oP ' NodeAddr=\K\S+')
# Each attempt uses another port, in case a process of the last attempt still holds the old one. SGLang
# servers use ports above this range.
MASTER_PORT=$((10000 + (SLURM_JOB_ID + 97 * ${SLURM_RESTART_COUNT:-0}) % 10000))
export MASTER_ADDR MASTER_PORT

# gloo and NCCL use the interface of that address. Set the two variables if its name differs between nodes.
address=$(getent ahostsv4 "$MASTER_ADDR" | awk 'NR == 1 { print $1 }')
interface=$(ip -oneline -4 address show to "$address" 2>/dev/null | awk 'NR == 1 { print $2 }')
if [[ -n $interface ]]; then
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
  export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
fi

# --- the container ------------------------------------------------------------------------------------------

srun_container=() inside=()
if [[ -z ${CONTAINER_IMAGE:-} ]]; then
  [[ -x $(type -P "$PYTHON") ]] ||
    fail 2 "PYTHON = $PYTHON does not exist: run make install, or set PYTHON to the environment's interpreter"
elif srun --help 2>&1 | grep -q -e --container-image; then
  srun_container=(--container-image="$CONTAINER_IMAGE" --container-mounts="${CONTAINER_MOUNTS:-$PWD}"
    --container-workdir="$PWD")
elif type -P apptainer >/dev/null; then
  inside=(apptainer exec --nv --bind "${CONTAINER_MOUNTS:-$PWD}" --pwd "$PWD" "$CONTAINER_IMAGE")
else
  fail 2 "CONTAINER_IMAGE = $CONTAINER_IMAGE needs pyxis or apptainer, and neither is installed:" \
    "install one, or leave it empty"
fi

# attempt begin | end: record the attempt and decide about a restart, on this node
attempt() {
  local one_task=()
  ((${#srun_container[@]})) &&
    one_task=(srun --overlap --nodes=1 --ntasks=1 --relative=0 "${srun_container[@]}")
  "${one_task[@]}" "${inside[@]}" "$PYTHON" -m megatron_gmpo slurm_attempt "$@"
}

# step NAME srun-options... -- command...: run a job step with one task and one log file per node
step() {
  local name=$1 options=()
  shift
  while [[ $1 != -- ]]; do options+=("$1") && shift; done
  shift
  trap '' USR1 # until srun has set its own handler
  exec srun "${options[@]}" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --open-mode=append \
    --output="${run_dir//%/%%}/logs/$name-%n.log" "${srun_container[@]}" "${inside[@]}" "$@"
}

# --- signals ------------------------------------------------------------------------------------------------

# USR1 comes from sbatch --signal before the time limit or a preemption, or from a user. TERM comes from Slurm
# when it ends the job.
asked='' trainers='' servers=''
stop_trainers() {
  say "SIG$asked: asking the trainers to save and stop"
  # repeat the signal: a rank that is still starting does not handle it yet
  while kill -USR1 "$trainers" 2>/dev/null; do sleep 10; done &
}
on_signal() {
  [[ -n $asked ]] && return
  asked=$1
  [[ -n $trainers ]] && stop_trainers
}
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM

# --- the attempt --------------------------------------------------------------------------------------------

run_dir=$(attempt begin "$@") || exit $?
mkdir -p "$run_dir/logs"
say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $num_trainers nodes with" \
  "$RANKS_PER_NODE ranks each, rendezvous $MASTER_ADDR:$MASTER_PORT, logs in $run_dir/logs"

if ((ROLLOUT_NODES > 0)); then
  step servers "${on_servers[@]}" -- "$PYTHON" -m megatron_gmpo.rollout.sglang.serve "$@" &
  servers=$!
  set -- "$@" --rollout.servers_file "$run_dir/servers.json"
fi

status=85 # if the attempt is asked to stop before it starts the trainers
if [[ -z $asked ]]; then
  # torchrun must ignore the signals that the ranks handle: it would end the ranks 30 s later, saved or not
  step trainer "${on_trainers[@]}" -- bash -c 'trap "" USR1 TERM
    exec "$PYTHON" -m megatron_gmpo.supervision.torchrun \
      --nnodes="$SLURM_STEP_NUM_NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS_PER_NODE" \
      --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --signals-to-handle=SIGINT,SIGHUP,SIGQUIT \
      -m megatron_gmpo.train "$@"' trainer "$@" &
  trainers=$!
  [[ -n $asked ]] && stop_trainers
  wait "$trainers"
  status=$?
  while kill -0 "$trainers" 2>/dev/null; do # a signal interrupted the wait
    wait "$trainers"
    status=$?
  done
fi
trap '' USR1 TERM # the rest is short, and the requeue must not end the scontrol that requests it
[[ -n $servers ]] && kill "$servers" 2>/dev/null && wait "$servers"

# --- the end of the attempt ---------------------------------------------------------------------------------

excluded=$(attempt end "$run_dir" "$status") # logs the reason, and prints a node to exclude
code=$?
if [[ -n $excluded ]]; then
  before=$(scontrol show job "$SLURM_JOB_ID" --oneliner | grep -oP ' ExcNodeList=\K[^( ]\S*')
  excluded+=${before:+,$before}
  others=$(sinfo --noheader --Node --format=%N --states=idle,alloc,mix,comp \
    --partition="$SLURM_JOB_PARTITION" |
    grep --invert-match --line-regexp --fixed-strings --file=<(scontrol show hostnames "$excluded") --count)
  ((others >= SLURM_JOB_NUM_NODES)) ||
    fail 87 "partition $SLURM_JOB_PARTITION has fewer than $SLURM_JOB_NUM_NODES nodes without $excluded"
fi
# If Slurm is ending the job, it was cancelled or already requeued. Requeue it only if it is running, or if
# its time limit ended it.
state=''
for ((tries = 0; tries < 6; tries++)); do # the controller may be busy or restarting
  state=$(squeue --noheader --job="$SLURM_JOB_ID" --format='%T %r' | head -n 1)
  [[ -n $state ]] && break
  sleep 10
done
[[ -n $state ]] || fail 1 "squeue does not report the state of job $SLURM_JOB_ID, so it cannot be requeued"
if ((code == 85)) && [[ $state == RUNNING* || $state == *TimeLimit ]]; then
  scontrol requeue "$SLURM_JOB_ID" && say "job $SLURM_JOB_ID is requeued" || code=1
  [[ -n $excluded ]] && scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded"
fi
exit "$code"

}
