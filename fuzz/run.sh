#!/usr/bin/env bash
# Runs the fuzz targets one after another: `fuzz/run.sh SECONDS [TARGET...]`. Needs a nightly toolchain and cargo-fuzz
# (`cargo install cargo-fuzz --locked`). Findings lie in `fuzz/artifacts/TARGET`; corpora grow in the cache folder.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:?usage: fuzz/run.sh SECONDS [TARGET...]}
shift
cache=${XDG_CACHE_HOME:-$HOME/.cache}/thermocline
target_dir=${FUZZ_TARGET_DIR:-$cache/target-fuzz}
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(sed -n 's/^name = "\(.*\)"$/\1/p' fuzz/Cargo.toml | tail -n +2)

# Templates and inputs as files belong in memory: a target writes thousands of them a second.
temporary=$(mktemp -d "$([ -w /dev/shm ] && echo /dev/shm || echo "${TMPDIR:-/tmp}")/fuzz.XXXXXX")
trap 'rm -rf "$temporary"' EXIT
export TMPDIR=$temporary

cargo +nightly fuzz build --target-dir "$target_dir"
binaries=$target_dir/$(rustc +nightly -vV | sed -n 's/^host: //p')/release

failed=0
for target in "${targets[@]}"; do
    corpus=$cache/fuzz-corpus/$target
    mkdir -p "$corpus" "fuzz/artifacts/$target"
    log=$temporary/$target.log
    status=0
    ASAN_OPTIONS=detect_odr_violation=0 "$binaries/$target" "$corpus" "fuzz/seeds/$target" \
        -max_total_time="$seconds" -rss_limit_mb=2048 -malloc_limit_mb=512 -timeout=20 -max_len=32768 \
        -dict=fuzz/words.dict -print_final_stats=1 -artifact_prefix="fuzz/artifacts/$target/" \
        > "$log" 2>&1 || status=$?
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -n 1)
    coverage=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
    printf '%-20s %5d s  %10s executions  coverage %6s  %s\n' "$target" "$seconds" "${executions:-?}" "${coverage:-?}" \
        "$([ "$status" = 0 ] && echo 'nothing found' || echo "FAILED, see fuzz/artifacts/$target")"
    if [ "$status" != 0 ]; then
        failed=1
        tail -n 60 "$log" >&2
    fi
    find "$temporary" -mindepth 1 -maxdepth 1 ! -name '*.log' -exec rm -rf {} +
done
exit $failed
