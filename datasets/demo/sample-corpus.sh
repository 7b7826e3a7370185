#!/bin/sh
# Samples corpus.txt from the demo model: one document a seed, temperature 1, from the start-of-text token to the model's
# own end or to 1000 tokens, blank lines between.
#
#     datasets/demo/sample-corpus.sh THERMOCLINE [N_DOCUMENTS] > corpus.txt
#
# The split is bf16 in a fixed random order, and exact mode sums in a fixed order: the text is the same for every budget
# and number of threads, and on every CPU with the same instruction set (the committed file: AVX-512).
set -eu

thermocline=$1 n_documents=${2:-450}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$thermocline" calibrate -m "$here/model" --corpus "$here/novel.txt" --tokens 4096 -o "$work/profile" >&2
"$thermocline" split -m "$here/model" --profile "$work/profile" --encoding bf16 --order random -o "$work/split" >&2
seq "$n_documents" | xargs -P "$(nproc)" -I SEED sh -c \
    '"$0" run -m "$1/split" -p "" -n 1000 --temp 1 --top-k 0 --top-p 1 --min-p 0 -s SEED -t 1 --json >"$1/SEED.json" 2>"$1/SEED.log" ||
     { cat "$1/SEED.log" >&2; exit 1; }' "$thermocline" "$work"
seq "$n_documents" | python3 -c '
import json, sys
for seed in sys.stdin:
    text = json.load(open(f"{sys.argv[1]}/{seed.strip()}.json"))["text"].strip()
    if text:
        print(text, end="\n\n")' "$work"
