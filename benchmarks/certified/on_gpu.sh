#!/usr/bin/env bash
# A GPU preset of certified accuracy per minute, in pieces of some minutes.
#
#   benchmarks/certified/on_gpu.sh CIFAR10 WORK [PRESET] [MINUTES]      call it again until it ends with 0
#
# CIFAR10 is a CIFAR-10 copy, WORK keeps checkpoints and result, PRESET is certified/gpu-5min or certified/gpu-25min,
# MINUTES (9) ends a piece; the next call goes on from the last checkpoint. Ends with 0 when WORK/ours-0/result.json is
# there, 3 when there is more to do. Another preset needs another WORK. Where OUT names a folder, a finished entry is
# copied to it at the end: result, radii, and the whole run directory as ours-0/run.tar.* in parts of 15 MB, which
# "mkdir RUN && cat run.tar.* | tar -x -C RUN" makes a directory again, for attack.py, dynablocks certify and audit. That is for
# machines that are lent bare for ten minutes and give back what is in OUT: gpu-5min fits into one piece there, and
# gpu-25min needs a machine that stays.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
data=$1 work=$2 preset=${3:-certified/gpu-5min} piece=${4:-9} out=${OUT:-}
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
began=$SECONDS
timeout --signal=INT --kill-after=60s "${piece}m" "$python" "$root/benchmarks/certified/run.py" --data-dir "$data" --out "$work" \
  --entries ours --preset "$preset" --minutes "$budget" || status=$?
# A job in the background does not hear INT, and is killed; one that is killed early has run out of memory.
if [ "$status" = 124 ] || { [ "$status" = 137 ] && [ $((SECONDS - began)) -ge $((piece * 60)) ]; }; then status=3; fi
for result in "$work"/*/result.json; do
  if [ -n "$out" ] && [ -e "$result" ]; then
    entry=$(dirname "$result")
    copy="$out/$(basename "$entry")"
    mkdir -p "$copy"
    rm -f "$copy"/run.tar.*
    for file in "$result" "$entry/radii.safetensors"; do [ ! -e "$file" ] || cp "$file" "$copy/"; done
    tar -c -C "$entry" --exclude=checkpoint.previous . | split -b 15m - "$copy/run.tar."
  fi
done
exit "$status"
