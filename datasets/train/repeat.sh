#!/usr/bin/env bash
# Everything from the texts to the demo model, its twins and the reference model. Under an hour on one H200.
#   repeat.sh CORPORA WORK
# CORPORA holds the three compressed collections (README.md); WORK receives data, runs, measures and the exported model.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
corpora=$1 work=$2
mkdir -p "$work"
[ -e "$work/data/manifest.json" ] || python3 "$here/prepare.py" "$corpora" "$work/data"
[ -e "$work/tokens/train.npy" ] || python3 "$here/tokens.py" "$work/data" "$work/tokens" 4096
for plan in shapes sparsity demo; do
  python3 "$here/sweep.py" "$work/tokens" "$work/$plan" "$here/settings/$plan.json" 3
done
python3 "$here/sweep.py" "$work/tokens" "$work/reference" "$here/settings/reference.json" 1
for run in "$work"/demo/* "$work/reference/reference"; do
  python3 "$here/measure.py" "$run" "$work/tokens" "$work/measured"
done
chosen=$work/demo/demo8-drelu-1
python3 "$here/export.py" "$chosen" "$work/tokens" "$work/model"
python3 "$here/oracle.py" "$chosen" "$work/tokens" "$work/reference_logits.json"
python3 "$here/checks/against_transformers.py" "$work/model" "$work/reference_logits.json"
python3 "$here/checks/numpy_forward.py" "$work/model" "$work/reference_logits.json"
python3 "$here/sample.py" "$chosen" "$work/tokens" "$work/sampled.txt" 1500000 7
python3 "$here/sample.py" "$work/reference/reference" "$work/tokens" "$work/reference-sample.txt" 85000 11
