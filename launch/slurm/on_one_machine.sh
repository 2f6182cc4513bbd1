#!/usr/bin/env bash
# A SLURM of two nodes on this machine, to try the sbatch files without a cluster. Debian or Ubuntu, as root.
#
#   bash launch/slurm/on_one_machine.sh         install and start it
#   bash launch/slurm/on_one_machine.sh stop    end it and delete what it kept (the names in /etc/hosts stay)
#
# Writes /etc/slurm/slurm.conf (refused where one is already) and two names for 127.0.0.1 into /etc/hosts.
set -euo pipefail

conf=/etc/slurm/slurm.conf
mark="# Made by launch/slurm/on_one_machine.sh"
state=/var/tmp/dist-agc-slurm # the same for start and stop, and not emptied in between, as /tmp may be
host=$(hostname)

fail() {
  echo "slurm: $*" >&2
  exit 1
}

((EUID == 0)) || fail "run this as root"
if [[ -e $conf ]] && ! grep -qF "$mark" "$conf"; then fail "$conf is another SLURM's: not touched"; fi

if [[ ${1:-} == stop ]]; then
  [[ -e $conf ]] || fail "none that this script started runs here"
  pkill -x slurmctld || true
  pkill -x slurmd || true
  for _ in {1..20}; do
    pgrep -x slurmctld >/dev/null || break # it writes its state first
    sleep 0.5
  done
  rm -rf "$conf" "$state"
  exit
fi

if ! command -v slurmctld >/dev/null || ! command -v slurmd >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends slurm-wlm munge >/dev/null
fi
mkdir -p /etc/slurm "$state"/{ctld,node0,node1} /run/munge
chown munge /run/munge
for node in node0 node1; do
  getent hosts "$node" >/dev/null || echo "127.0.0.1 $node" >>/etc/hosts
done
cat >"$conf" <<END
$mark
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.%n.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName=node[0-1] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2
PartitionName=local Nodes=ALL Default=YES State=UP
END
pgrep -x munged >/dev/null || runuser -u munge -- munged
pgrep -x slurmctld >/dev/null || slurmctld
for node in node0 node1; do
  pgrep -f "slurmd -N $node" >/dev/null || slurmd -N "$node"
done
for _ in {1..30}; do
  if [[ $(sinfo -h -t idle -o %D 2>/dev/null) == 2 ]]; then
    sinfo
    exit
  fi
  sleep 1
done
sinfo || true
fail "its two nodes did not come up; the logs are in $state"
