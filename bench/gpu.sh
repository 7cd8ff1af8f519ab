#!/usr/bin/env bash
# Everything there is to measure, on one GPU, in under 9 minutes; or --rehearse: every step at tiny sizes on a CPU.
#
#   bash bench/gpu.sh OUT [--rehearse]
#
# Runs from anywhere, uninstalled, under $PY (default: python3), without a network. OUT gets rows.json, calibration.json,
# report.md, plots where matplotlib is installed, and log.txt. A step that fails or runs out of its time stops nothing;
# started again with the same OUT, what is complete is left out and the rest goes on; of another commit, or in a new OUT,
# everything is measured anew. BENCH_COMMIT names the commit where git cannot.
# Exit status: 0; 1 where a step failed, or an output was wrong.
set -uo pipefail

usage() { echo "usage: bash bench/gpu.sh OUT [--rehearse]" >&2; exit 2; }
[[ $# -ge 1 && $# -le 2 && $1 != -* && ${2:---rehearse} == --rehearse ]] || usage
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
rehearse=${2:-}
py=${PY:-python3}
cd "$(dirname "$0")/.." || exit 2
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

# a CPU may be slow, and shared: there the limits only end what hangs
slower=6
[[ -z $rehearse ]] && "$py" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && slower=1

log="$out/log.txt"
status=0
started=$SECONDS

# step NAME SECONDS SCRIPT [ARGUMENTS]: leaves the exit status in $code
step() {
	local name=$1 limit=$2 begun=$SECONDS
	shift 2
	echo "== $name: $py $*" >>"$log"
	timeout -k 5 "$limit" "$py" "$@" >>"$log" 2>&1
	code=$?
	case $code in
		0) echo "$name: ran, $((SECONDS - begun)) s" ;;
		124 | 137) echo "$name: stopped after $limit s" ;;
		*) echo "$name: exit status $code; its log ends: $(tail -n 1 "$log" | cut -c 1-200)" ;;
	esac
	[[ $code -eq 0 ]] || status=1
}

# bench NAME SECONDS BENCHES [ARGUMENTS]: bench/bench_NAME.py, which holds these benches and stops by itself fifteen seconds
# early; if it lost the GPU (exit status 3), a new process goes on with the next case
bench() {
	local name=$1 until=$((SECONDS + $2 * slower)) benches=$3 left
	shift 3
	# shellcheck disable=SC2086  # a list of names
	if "$py" bench/_rows.py "$out" $benches; then
		echo "$name: complete already"
		return
	fi
	code=3
	while [[ $code -eq 3 ]] && left=$((until - SECONDS)) && [[ $left -gt 20 ]]; do
		step "$name" "$left" "bench/bench_$name.py" --out "$out" --budget $((left - 15)) "$@" ${rehearse:+"$rehearse"}
	done
}

bench kernels 220 "tree_attention accept accept_sample compact" --seconds 0.1
bench generate 220 generate
bench round 60 round
# the table comes last
timeout -k 5 $((20 * slower)) "$py" bench/report.py "$out" 2>>"$log" || { status=1; echo "report: failed, see $log"; }
echo "$((SECONDS - started)) s in all; everything is in $out"
exit $status
