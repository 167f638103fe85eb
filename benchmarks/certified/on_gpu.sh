#!/usr/bin/env bash
# A GPU preset of certified accuracy per minute, in pieces of some minutes.
#
#   benchmarks/certified/on_gpu.sh CIFAR10 WORK [PRESET] [MINUTES]      call it again until it ends with 0
#
# CIFAR10 is a CIFAR-10 copy, WORK keeps checkpoints and the result, PRESET is certified/gpu-25min or certified/gpu-5min,
# MINUTES (9) ends a piece; the next call goes on from the last checkpoint. Ends with 0 when WORK/ours-0/result.json is
# there, 3 when there is more to do. Another preset needs another WORK.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
data=$1 work=$2 preset=${3:-certified/gpu-25min} piece=${4:-9}
case $preset in
  certified/gpu-5min) budget=5 ;;
  certified/gpu-25min) budget=25 ;;
  *) echo "unknown preset $preset; take certified/gpu-5min or certified/gpu-25min" >&2; exit 2 ;;
esac
root=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}

"$python" -c 'import torch; print("device:", torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
status=0
timeout --signal=INT "${piece}m" "$python" "$root/benchmarks/certified/run.py" --data-dir "$data" --out "$work" \
  --entries ours --preset "$preset" --minutes "$budget" || status=$?
if [ "$status" = 124 ]; then exit 3; fi
exit "$status"
