#!/usr/bin/env bash
# Measures everything on one GPU. --rehearse runs every step at tiny sizes on a CPU.
#
#   bash bench/gpu.sh OUT [--first | --second] [--rehearse]
#
# --first takes at most 7.5 minutes: correctness, set-up time of a call, our kernels, stages of a round.
# --second takes at most 4.7 minutes: whole calls against transformers, candidates of a draft, then peers that compile
# for seconds at each size.
# Without a flag, both run, and then all steps that are not complete. Steps are listed in bench/steps.py.
#
# Runs from any folder, without installation or network, under $PY (default: python3). OUT gets rows.json,
# calibration.json, report.md, three plots if matplotlib is installed, and log.txt. If a step fails or uses up its time,
# the next one runs. A second run with the same OUT skips complete steps and continues the others; with another commit or
# a new OUT, everything is measured again. BENCH_COMMIT names the commit if git cannot.
# Exit status: 0; 1 if a step failed or an output was wrong.
set -uo pipefail

usage() { echo "usage: bash bench/gpu.sh OUT [--first | --second] [--rehearse]" >&2; exit 2; }
[[ $# -ge 1 && $# -le 3 && $1 != -* ]] || usage
given=$1 part='' rehearse=''
shift
for flag in "$@"; do
	case $flag in
		--first | --second) [[ -z $part ]] && part=${flag#--} || usage ;;
		--rehearse) rehearse=$flag ;;
		*) usage ;;
	esac
done
mkdir -p "$given" || exit 2
out=$(cd "$given" && pwd)
py=${PY:-python3}
cd "$(dirname "$0")/.." || exit 2
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# tiny sizes: more threads only wait for each other
[[ -n $rehearse ]] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# a CPU may be slow and shared: there the limits only end steps that hang
slower=6
[[ -z $rehearse ]] && "$py" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && slower=1

# if torch cannot use the GPU of a rented machine, do not spend an hour on the sizes for a CPU
if [[ -z $rehearse && $slower -ne 1 ]] && command -v nvidia-smi >/dev/null; then
	echo "gpu.sh: wanted a GPU that torch can use, got none (nvidia-smi is here)" >&2
	exit 2
fi

log="$out/log.txt"
status=0
started=$SECONDS

# steps PART SECONDS: the benches stop by themselves fifteen seconds early. If a process lost its GPU (exit status 3), a
# new one continues with the next case.
steps() {
	local until=$((SECONDS + $2 * slower)) code=3 left begun
	while [[ $code -eq 3 ]] && left=$((until - SECONDS)) && [[ $left -gt 20 ]]; do
		begun=$SECONDS
		echo "== $1: $py bench/steps.py" >>"$log"
		timeout -k 5 "$left" "$py" bench/steps.py "$out" "$1" --budget $((left - 15)) ${rehearse:+"$rehearse"} 2>>"$log" |
			tee -a "$log" | sed -un 's/^\(== .\{1,190\}\).*/\1/p'
		code=${PIPESTATUS[0]}
		case $code in
			0 | 1) echo "$1: $((SECONDS - begun)) s" ;;
			3) echo "$1: the GPU was lost after $((SECONDS - begun)) s, a new process goes on" ;;
			124 | 137 | 143) echo "$1: stopped after $left s" ;;
			*) echo "$1: exit status $code; its log ends: $(tail -n 1 "$log" | cut -c 1-200)" ;;
		esac
	done
	[[ $code -eq 0 ]] || status=1
}

case $part in
	first) steps first 425 ;;
	second) steps second 260 ;;
	*)
		steps first 425
		steps second 260
		steps rest 600
		;;
esac
# the table comes last
timeout -k 5 $((30 * slower)) "$py" bench/report.py "$out" 2>>"$log" || { status=1; echo "report: failed, see $log"; }
echo "$((SECONDS - started)) s in all; everything is in $out"
exit $status
