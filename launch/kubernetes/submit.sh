#!/usr/bin/env bash
# Submit launch/kubernetes/pytorchjob.yaml. Never run on a cluster (see there).
#
#   IMAGE=registry/name:tag bash launch/kubernetes/submit.sh            kubectl's current context and namespace
#   IMAGE=... PODS=4 GPUS=8 bash launch/kubernetes/submit.sh --print    the job as it would be submitted
#
# IMAGE   has this repository in /workspace/dist_agc, and has run  pip install '/workspace/dist_agc[demo]'
# PODS    2 or more (2)
# GPUS    of each pod, with a process for each (1)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
image=${IMAGE:?an image with this repository in /workspace/dist_agc}
pods=${PODS:-2} gpus=${GPUS:-1}
for number in "$pods" "$gpus"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || { echo "submit.sh: PODS and GPUS must be whole numbers, got '$number'" >&2 && exit 1; }
done
((pods > 1)) || { echo "submit.sh: PODS is $pods, but a job has a master and at least one worker" >&2 && exit 1; }

job=$(<pytorchjob.yaml)
job=${job//'${IMAGE}'/"$image"}
job=${job//'${GPUS}'/"$gpus"}
job=${job//'${WORKERS}'/"$((pods - 1))"}
if [[ ${1:-} == --print ]]; then
  printf '%s\n' "$job"
else
  kubectl apply --filename - <<<"$job"
fi
