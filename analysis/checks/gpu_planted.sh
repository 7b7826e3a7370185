#!/usr/bin/env bash
# Measures the GPU engine on planted models of 70B shape: for each case, the link alone and link and CPU together.
#
#   analysis/checks/gpu_planted.sh THERMOCLINE FOLDER OUT [CASE...]
#
# FOLDER holds one split at a time (39 GB: a RAM disk makes this quick); OUT gets a JSON record for each run.
set -euo pipefail
thermocline=$1 folder=$2 out=$3
shift 3
cases=("$@")
[ ${#cases[@]} -gt 0 ] || cases=(a b c)
declare -A active=([a]=0.10 [b]=0.10 [c]=0.044)
common=(--mode sparse --greedy --n-gen 128 -r 3 --json)
for case in "${cases[@]}"; do
    split=$folder/planted-70b-$case
    [ -d "$split" ] || "$thermocline" split --planted 70b --case "$case" -o "$split" --json > "$out/split-$case.json"
    for share in 0 auto; do
        "$thermocline" bench -m "$split" --active "${active[$case]}" --vram-budget 16GiB --cpu-share $share \
            --n-prompt "${PROMPT:-512}" "${common[@]}" > "$out/70b-$case-cpu-$share.json"
    done
    [ -n "${KEEP:-}" ] || rm -r "$split"
done
python3 - "$out" << 'PYTHON'
import glob, json, sys
print(f"{'run':28} {'tok/s':>7} {'limit':>6} {'planned':>8} {'prompt':>7} {'hits':>5} {'link GB/s':>9} {'CPU GB/s':>8} {'VRAM GiB':>8}")
for path in sorted(glob.glob(sys.argv[1] + "/70b-*.json")):
    r = json.load(open(path))
    print(f"{path.split('/')[-1][:-5]:28} {r['decode_tok_s']['median']:7.1f} {r['limit_share']:6.2f} {r['predicted']['tok_s']:8.1f} "
          f"{r['prompt_tok_s']['median']:7.0f} {r['cache_hit_rate'] or 0:5.2f} {r['link_bytes_per_second']/1e9:9.1f} "
          f"{r['host_bytes_per_second']/1e9:8.1f} {r['device_used_bytes']/2**30:8.2f}")
PYTHON
