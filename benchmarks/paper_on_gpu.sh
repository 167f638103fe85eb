#!/usr/bin/env bash
# The paper preset on one GPU, in pieces of some minutes: flexible, prescribed, non_expansive at margin 0.07 first.
#
#   benchmarks/paper_on_gpu.sh CIFAR10 WORK [MINUTES]      call it again until it ends with 0
#
# CIFAR10 is a CIFAR-10 copy, WORK keeps the cells (resumable checkpoints too), and a piece is ended MINUTES (8) after
# its start. Ends with 0 when everything is built, 3 when there is more to do. Runs on a CPU too, for weeks;
# PRESET=smoke tries the script itself in a minute.
#
# For machines that are lent bare and give back single files: where PACK names a folder, WORK is unpacked from
# PACK/work.tar.* first when it is empty; at the end it is packed in parts of 15 MB into OUT/pack where OUT names a
# folder, which is then the PACK of the next call, otherwise into PACK. The weights of a network that was attacked are
# not packed: nothing here reads them again. Wheels to carry, where such a machine lacks them: jsonargparse,
# docstring-parser, typeshed-client, and lightning-fabric where there is no pytorch-lightning.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
data=$1 work=${2%/} minutes=${3:-8} pack=${PACK:-} preset=${PRESET:-paper}
into=${OUT:+$OUT/pack}
into=${into:-$pack}
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}

# A new pack takes the place of the old one in steps that a kill may stop anywhere: it is marked when it is whole.
finish_pack() {
  [ -e "$1/new.whole" ] || return 0
  [ -e "$1/old.gone" ] || { rm -f "$1"/work.tar.*; touch "$1/old.gone"; }
  for part in "$1"/new.tar.*; do [ ! -e "$part" ] || mv "$part" "$1/work.tar.${part##*.}"; done
  rm -f "$1/new.whole" "$1/old.gone"
}

missing=$("$python" -c 'from importlib.util import find_spec
print(*(name for name in "jsonargparse lightning_fabric pyarrow rich".split() if find_spec(name) is None))')
if [ -n "$missing" ]; then
  echo "error: $python lacks $missing; install the library with what it needs, or carry wheels, see $0" >&2
  exit 2
fi
"$python" -c 'import torch; print("device:", torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'

if [ -n "$pack" ] && [ "$into" != "$pack" ] && ! compgen -G "$pack/work.tar.*" >/dev/null && [ ! -e "$pack/new.whole" ]; then
  echo "error: PACK=$pack holds no whole pack; name the folder that has work.tar.*, or leave PACK out to begin anew" >&2
  exit 2
fi
mkdir -p "$work"
work=$(cd "$work" && pwd -P)
if [ -n "$pack" ] && [ -w "$pack" ]; then finish_pack "$pack"; fi
if [ -n "$pack" ] && [ -z "$(ls -A "$work")" ] && compgen -G "$pack/work.tar.*" >/dev/null; then
  # Beside WORK first: what a cut pack leaves there is not gone on from, and does not take the pack's place.
  rm -rf "$work.new"
  mkdir "$work.new"
  cat "$pack"/work.tar.* | tar -x -C "$work.new" || {
    echo "error: $pack is not whole; copy it again, or remove its parts to begin anew" >&2
    exit 1
  }
  rmdir "$work"
  mv "$work.new" "$work"
fi

# What is left: a lent machine counts the minutes from the start of the command.
hours=$(awk "BEGIN { left = $minutes * 60 - $SECONDS; hours = (left > 1 ? left : 1) / 3600; print hours }")
pieces=(--preset "$preset" --out "$work" --max-hours "$hours")
[ "$preset" = smoke ] || pieces+=(--data-dir "$data")
status=0
"$python" -m dynablocks reproduce fig4 fig5 fig10 fig12 "${pieces[@]}" || status=$?

if [ -n "$into" ]; then
  left_out=(--exclude=checkpoint.previous)
  for result in "$work"/cells/attack-????????????????????/result.json; do
    [ -e "$result" ] || continue
    training=$(sed -n 's/.*"cell": "\([0-9a-f]\{20\}\).*/\1/p' "${result%/*}/cell.json")
    left_out+=("--exclude=training-$training/checkpoint")
  done
  mkdir -p "$into"
  finish_pack "$into"
  rm -f "$into"/new.tar.* "$into/old.gone"
  tar -c -C "$work" "${left_out[@]}" . | split -b 15m - "$into/new.tar."
  touch "$into/new.whole"
  finish_pack "$into"
fi
exit "$status"
