#!/usr/bin/env bash
# Run one command on two "hosts": network namespaces of this machine, joined by a veth pair and nothing else.
#
#   tests/distributed/two_hosts.sh torchrun --nnodes 2 --nproc-per-node 1 --node-rank @HOST@ \
#     --master-addr @FIRST@ --master-port 29500 launch/train.py RECIPE
#
# @HOST@ in the arguments becomes 0 or 1, @FIRST@ the address of host 0. Ends with the first exit code that is not 0, or
# with 77 and a reason where namespaces may not be made. The namespaces and all that runs in them go with this script.
set -uo pipefail

names=("metatt-$$-0" "metatt-$$-1")
addresses=(10.77.0.1 10.77.0.2)

make_hosts() {
  command -v ip >/dev/null || { echo "the program ip (iproute2) is missing"; return 1; }
  for name in "${names[@]}"; do
    ip netns add "$name" || return 1
    ip -n "$name" link set lo up || return 1
  done
  ip link add eth0 netns "${names[0]}" type veth peer name eth0 netns "${names[1]}" || return 1
  for i in 0 1; do
    ip -n "${names[i]}" addr add "${addresses[i]}/24" dev eth0 || return 1
    ip -n "${names[i]}" link set eth0 up || return 1
  done
}

launchers=()

remove_hosts() {
  trap '' TERM INT # a second signal would leave half of them
  exec 2>/dev/null # the shell would tell of everything killed
  # Not by the list: a signal may come between the start of a launcher and its entry there.
  jobs -p | xargs -r kill -KILL 2>/dev/null
  wait 2>/dev/null
  for name in "${names[@]}"; do
    # A namespace outlives its name while a process runs in it, so those go first.
    while pids=$(ip netns pids "$name" 2>/dev/null) && [[ -n $pids ]]; do
      xargs -r kill -KILL <<<"$pids" 2>/dev/null
    done
    ip netns del "$name" 2>/dev/null
  done
}

trap remove_hosts EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
if ! reason=$(make_hosts 2>&1); then
  echo "no network namespaces here: $reason"
  exit 77
fi

# gloo and NCCL are told the interface between the hosts: without a name gloo may choose loopback and wait for ever.
export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
for i in 0 1; do
  command=("${@//@HOST@/$i}")
  ip netns exec "${names[i]}" "${command[@]//@FIRST@/${addresses[0]}}" &
  launchers+=($!)
done
code=0
for launcher in "${launchers[@]}"; do
  wait "$launcher" || { last=$?; [[ $code -ne 0 ]] || code=$last; }
done
exit "$code"
