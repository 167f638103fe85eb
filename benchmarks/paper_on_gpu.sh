#!/usr/bin/env bash
# The paper preset on one GPU, in pieces of some minutes: flexible, prescribed, non_expansive at margin 0.07 first.
#
#   benchmarks/paper_on_gpu.sh CIFAR10 WORK [MINUTES]      call it again until it says that everything is built
#
# CIFAR10 is a CIFAR-10 copy, WORK keeps the cells (resumable checkpoints too), MINUTES (9) ends a piece. Where PACK
# names a folder, WORK is unpacked from PACK/work.tar.* first when it is empty, and packed there in parts of 15 MB at
# the end: for machines that are lent bare and give back single files. Runs on a CPU too, for weeks; PRESET=smoke tries
# the script itself in a minute. Ends with 0 when everything is built, 3 when there is more to do.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
data=$1 work=$2 minutes=${3:-9} pack=${PACK:-} preset=${PRESET:-paper}
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}

# A new pack takes the place of the old one in steps that a kill may stop anywhere: it is marked when it is whole.
finish_pack() {
  [ -e "$pack/new.whole" ] || return 0
  [ -e "$pack/old.gone" ] || { rm -f "$pack"/work.tar.*; touch "$pack/old.gone"; }
  for part in "$pack"/new.tar.*; do [ ! -e "$part" ] || mv "$part" "$pack/work.tar.${part##*.}"; done
  rm -f "$pack/new.whole" "$pack/old.gone"
}

mkdir -p "$work"
[ -z "$pack" ] || finish_pack
if [ -n "$pack" ] && [ -z "$(ls -A "$work")" ] && compgen -G "$pack/work.tar.*" >/dev/null; then
  cat "$pack"/work.tar.* | tar -x -C "$work"
fi
pieces=(--preset "$preset" --out "$work" --max-hours "$(awk "BEGIN { print $minutes / 60 }")")
[ "$preset" = smoke ] || pieces+=(--data-dir "$data")
"$python" -c 'import torch; print("device:", torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
status=0
"$python" -m dynablocks reproduce fig4 fig5 fig10 fig12 "${pieces[@]}" || status=$?
if [ -n "$pack" ]; then
  mkdir -p "$pack"
  rm -f "$pack"/new.tar.*
  tar -c -C "$work" --exclude=checkpoint.previous . | split -b 15m - "$pack/new.tar."
  touch "$pack/new.whole"
  finish_pack
fi
exit "$status"
