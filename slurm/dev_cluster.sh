#!/bin/bash
# A real Slurm on one machine, for tests and first steps. Needs root, but no systemd, no cgroups, and no database.
#
#   dev_cluster.sh up                 start it, replacing a running one; installs Slurm with apt-get if it is missing
#   eval "$(dev_cluster.sh env)"      then sbatch, srun, squeue, scontrol, and submitit use it
#   dev_cluster.sh down | status
#   dev_cluster.sh kill-node N        power cut                  start-node N   power on, or a reboot
#   dev_cluster.sh cut-net N          unplug its network         heal-net N     plug it in again
#   dev_cluster.sh kill-slurmd N      only the daemon dies       pid N          pid of that daemon on this machine
#
# Nodes node0, node1, ... are net, uts, ipc, mount, and pid namespaces with their own hostname, address, and /dev/shm.
# They see the files of this machine. Partitions: low (Slurm requeues its preempted jobs after GRACE seconds) and high.
# The cluster has its own munge, ports, addresses, and directory, so it does not disturb other Slurms or clusters with
# other numbers.
set -euo pipefail

# `up` reads these from the environment; the other commands need only CLUSTER (or CLUSTER_DIR).
GIVEN=${CLUSTER:-}${CLUSTER_DIR:-}${TMPDIR:-}
CLUSTER=${CLUSTER:-77}                                   # 1-254; sets the defaults of the next three
CLUSTER_DIR=${CLUSTER_DIR:-${TMPDIR:-/tmp}/slurm-dev-$CLUSTER}
CLUSTER_NET=${CLUSTER_NET:-10.213.$CLUSTER}              # a /24
CLUSTER_PORT=${CLUSTER_PORT:-$((26800 + CLUSTER))}
NODES=${NODES:-4}
CPUS=${CPUS:-8}                                          # per node, however many this machine has
GPUS=${GPUS:-0}                                          # per node, for --gres; there are no real devices
GRACE=${GRACE:-10}                                       # seconds from a preemption's first signal to the end
USERSIG=${USERSIG:-1}                                    # 1: preemption sends the signal of sbatch --signal; 0: SIGTERM
PRIVATE_DIR=${PRIVATE_DIR:-}                             # a directory where every node mounts its own tmpfs
EXTRA_CONF=${EXTRA_CONF:-}                               # extra lines for slurm.conf

SELF=$(realpath "$0")
COMMAND=${1:-}
fail() { echo "dev_cluster.sh: $*" >&2; exit 1; }
refuse() { echo "dev_cluster.sh: $*" >&2; exit 3; }      # this machine cannot run it; `fail` means an error
exists() { [ -O "$CLUSTER_DIR/settings" ]; }             # -O: owned by this user, not planted in /tmp

case $COMMAND in
  up) ;;
  down) exists || exit 0 ;;
  status | env | init | kill-node | start-node | kill-slurmd | cut-net | heal-net | pid)
    exists || fail "no cluster in $CLUSTER_DIR; start one with: $0 up" ;;
  *) sed -n '2,/^set/{/^#/p}' "$SELF"; exit 2 ;;
esac
# shellcheck disable=SC1091
[ "$COMMAND" = up ] || . "$CLUSTER_DIR/settings"         # the settings from `up`

BRIDGE=slurm${CLUSTER_NET##*.}
CONF=$CLUSTER_DIR/slurm.conf
RUN=$CLUSTER_DIR/run
export SLURM_CONF=$CONF

# A pid file may outlive its process, and another process may get its number. So this checks that the cluster directory
# is among the arguments of the process. (A zombie has no arguments; in a container, it may never be reaped.)
alive() { [ -n "$1" ] && grep -qasF -- "$CLUSTER_DIR" "/proc/$1/cmdline"; }

stop() {  # PIDFILE SIGNAL
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  for signal in "$2" KILL; do
    alive "$pid" || break
    kill -"$signal" "$pid" || true
    for _ in {1..100}; do alive "$pid" || break; sleep 0.05; done
  done
  rm -f "$1"
}

wait_for() {  # WHAT COMMAND...: waits up to 30 s
  local what=$1
  shift
  for _ in {1..300}; do "$@" && return; sleep 0.1; done
  fail "waited 30 s for $what"
}

check_machine() {
  [ "$(id -u)" = 0 ] || refuse "must be root, to create namespaces and to install Slurm if it is missing"
  local program missing=
  for program in slurmctld slurmd sbatch munged ip pgrep; do
    command -v $program > /dev/null || missing+=" $program"
  done
  if [ -n "$missing" ]; then
    command -v apt-get > /dev/null || refuse "apt-get, which would install$missing, is missing; install them yourself"
    local install=(apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge iproute2 procps)
    export DEBIAN_FRONTEND=noninteractive
    "${install[@]}" > /dev/null 2>&1 || { apt-get update -qq && "${install[@]}" > /dev/null; } || fail "apt-get failed"
  fi
  unshare --net --uts --ipc --mount --pid --fork --mount-proc true ||
    refuse "unshare is not permitted here; a container needs --privileged"
}

write_slurm_conf() {
  local gpus=
  if [ "$GPUS" -gt 0 ]; then
    gpus=Gres=gpu:$GPUS
    for ((i = 0; i < GPUS; i++)); do mknod "$CLUSTER_DIR/gpu$i" c 1 3; done  # Slurm needs devices: like /dev/null
    echo "Name=gpu File=$CLUSTER_DIR/gpu[0-$((GPUS - 1))]" > "$CLUSTER_DIR/gres.conf"
  fi
  # Unused, but unless this names v1, slurmd requires a mounted /sys/fs/cgroup.
  echo "CgroupPlugin=cgroup/v1" > "$CLUSTER_DIR/cgroup.conf"
  # cred_expire: a requeued job waits this many seconds plus one; 121 s by default.
  # FirstJobId: if job ids repeated those of an earlier cluster, old result folders would look like new ones.
  # MinJobAge: there is no accounting database, so slurmctld must remember how jobs ended.
  # SlurmdTimeout, MessageTimeout: Slurm notices a lost node after 16 s, and a returning node after 10 s. With 10 s for
  # each, it would take 30 and 40 s.
  # config_overrides: allows more CPUs than the machine has.
  cat << CONF
ClusterName=dev
SlurmctldHost=$(hostname -s)($CLUSTER_NET.1)
SlurmUser=root
SlurmctldPort=$CLUSTER_PORT
SlurmdPort=$((CLUSTER_PORT + 1))
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$RUN/munge.sock,cred_expire=5
StateSaveLocation=$CLUSTER_DIR/state
SlurmdSpoolDir=$CLUSTER_DIR/spool/%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$CLUSTER_DIR/spool/%n.pid
SlurmctldLogFile=$CLUSTER_DIR/log/slurmctld.log
SlurmdLogFile=$CLUSTER_DIR/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=2
SlurmdTimeout=5
MessageTimeout=5
MinJobAge=3600
FirstJobId=$(($(date +%s) % 60000000 + 1))
CONF
  if [ "$GPUS" -gt 0 ]; then echo "GresTypes=gpu"; fi
  if [ "$USERSIG" = 1 ]; then echo "SlurmctldParameters=preempt_send_user_signal"; fi
  echo "$EXTRA_CONF"
  for ((i = 0; i < NODES; i++)); do
    echo "NodeName=node$i NodeAddr=$CLUSTER_NET.$((10 + i)) CPUs=$CPUS RealMemory=4000 $gpus"
  done
  echo "PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE"
  echo "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF"
}

write_sacct() {  # submitit calls `sacct -j ID ...`, which needs a database; this answers from slurmctld's memory
  cat << 'SACCT'
#!/bin/bash
echo 'JobID|State|NodeList'
while [ $# -gt 0 ]; do
  if [ "$1" = -j ]; then scontrol -o show job "$2" 2> /dev/null; shift; fi
  shift
done | awk '{
  delete job
  for (i = 1; i <= NF; i++) { split($i, pair, "="); if (!(pair[1] in job)) job[pair[1]] = pair[2] }
  id = job["JobId"]; task = job["ArrayTaskId"]; state = job["JobState"]
  if ("ArrayJobId" in job) id = job["ArrayJobId"] "_" (task ~ /^[0-9]+$/ ? task : "[" task "]")
  if (state ~ /^(SIGNALING|CONFIGURING|STAGE_OUT)$/) state = "RUNNING"  # as the real sacct reports it
  print id "|" state "|" job["NodeList"] }'
SACCT
}

has_network() { ip link show eth0 > /dev/null 2>&1; }

init() {  # N: runs as PID 1 of a node
  hostname "node$1"
  mount --bind "$CLUSTER_DIR/hosts" /etc/hosts
  mount -t tmpfs tmpfs /dev/shm
  if [ -n "$PRIVATE_DIR" ]; then mount -t tmpfs tmpfs "$PRIVATE_DIR"; fi
  wait_for "the network" has_network
  ip link set lo up
  ip addr add "$CLUSTER_NET.$((10 + $1))/24" dev eth0
  ip link set eth0 up
  slurmd -f "$CONF" -N "node$1"
  while true; do sleep 3600 || true; done  # meanwhile, bash reaps orphans
}

start_node() {
  stop "$RUN/node$1.pid" KILL
  ip link del "${BRIDGE}n$1" 2> /dev/null || true
  mkdir -p "$CLUSTER_DIR/spool/node$1"
  setsid unshare --net --uts --ipc --mount --pid --fork --kill-child=KILL --mount-proc \
    "$SELF" init "$1" "$CLUSTER_DIR" >> "$CLUSTER_DIR/log/node$1.log" 2>&1 < /dev/null &
  wait_for "node$1" pgrep -P $! > "$RUN/node$1.pid"
  ip link add "${BRIDGE}n$1" type veth peer name eth0 netns "$(cat "$RUN/node$1.pid")"
  ip link set "${BRIDGE}n$1" master "$BRIDGE" up
}

slurmd_pid() { pgrep -P "$(cat "$RUN/node$1.pid")" -x slurmd; }

all_idle() { [ "$(sinfo -h -p low -t idle -o %D 2> /dev/null)" = "$NODES" ]; }

up() {
  check_machine
  if exists; then "$SELF" down; fi
  [ ! -e "$CLUSTER_DIR" ] || fail "$CLUSTER_DIR exists but is not a cluster; choose another CLUSTER_DIR"
  [ ! -e "/sys/class/net/$BRIDGE" ] || fail "$BRIDGE exists: another cluster has $CLUSTER_NET.*; choose another CLUSTER"
  case $CLUSTER_DIR/ in "${PRIVATE_DIR:-none}"/*) fail "PRIVATE_DIR would hide $CLUSTER_DIR from the nodes" ;; esac
  mkdir -p "$CLUSTER_DIR"/{run,state,spool,log,bin} ${PRIVATE_DIR:+"$PRIVATE_DIR"}
  chmod 755 "$CLUSTER_DIR" "$RUN"  # munge requires this mode
  declare -p CLUSTER_DIR CLUSTER_NET CLUSTER_PORT NODES PRIVATE_DIR > "$CLUSTER_DIR/settings"
  trap 'tail -n 5 "$CLUSTER_DIR"/log/* >&2; down' EXIT

  write_slurm_conf > "$CONF"
  write_sacct > "$CLUSTER_DIR/bin/sacct"
  chmod +x "$CLUSTER_DIR/bin/sacct"
  { echo "127.0.0.1 localhost"; echo "$CLUSTER_NET.1 $(hostname -s)"; } > "$CLUSTER_DIR/hosts"
  for ((i = 0; i < NODES; i++)); do echo "$CLUSTER_NET.$((10 + i)) node$i"; done >> "$CLUSTER_DIR/hosts"

  (umask 077 && head -c 128 /dev/urandom > "$CLUSTER_DIR/munge.key")
  munged --key-file="$CLUSTER_DIR/munge.key" --socket="$RUN/munge.sock" --pid-file="$RUN/munged.pid" \
    --log-file="$CLUSTER_DIR/log/munged.log" --seed-file="$RUN/munge.seed"
  ip link add "$BRIDGE" type bridge
  ip addr add "$CLUSTER_NET.1/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  slurmctld -f "$CONF"
  for ((i = 0; i < NODES; i++)); do start_node "$i"; done
  wait_for "$NODES idle nodes" all_idle
  trap - EXIT
  echo "$NODES node(s) up. To use them:  eval \"\$(${GIVEN:+CLUSTER_DIR=$CLUSTER_DIR }$0 env)\""
}

down() {
  for pidfile in "$RUN"/node*.pid; do stop "$pidfile" KILL; done
  stop "$RUN/slurmctld.pid" TERM
  stop "$RUN/munged.pid" TERM
  for link in /sys/class/net/"$BRIDGE"{,n*}; do ip link del "${link##*/}" 2> /dev/null || true; done
  rm -rf "$CLUSTER_DIR"
}

N=${2:-}
case $COMMAND in
  up) up ;;
  down) down ;;
  status) sinfo -N -l; squeue -l ;;
  env) echo "export SLURM_CONF='$CONF' PATH='$CLUSTER_DIR/bin':\"\$PATH\"" ;;
  init) init "$N" ;;
  start-node)
    [[ $N =~ ^[0-9]+$ && $N -lt $NODES ]] || fail "there is no node '$N'"
    start_node "$N"
    wait_for "the slurmd of node$N" slurmd_pid "$N" > /dev/null ;;
  *)
    [ -e "$RUN/node$N.pid" ] || fail "no node '$N' is running"
    case $COMMAND in
      kill-node) stop "$RUN/node$N.pid" KILL ;;
      cut-net) ip link set "${BRIDGE}n$N" down ;;
      heal-net) ip link set "${BRIDGE}n$N" up ;;
      pid) slurmd_pid "$N" ;;
      kill-slurmd) pid=$(slurmd_pid "$N") || fail "node$N has no slurmd"; kill -KILL "$pid" ;;
    esac ;;
esac
