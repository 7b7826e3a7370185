"""Decode speed beside llama.cpp's, interleaved in one run.

python3 analysis/checks/compare_llama_cpp.py THERMOCLINE MODEL.gguf SPLIT [--threads 2] [--rounds 5] [--tokens 64] [-o OUT.json]

Needs `pip install llama-cpp-python` (built from source with its defaults: native instructions). Each round runs
llama.cpp, then thermocline in exact mode (dense for a SwiGLU model) and in sparse mode at 30 %, everything in RAM, all
after a 16-token prompt; the medians over the rounds and their ratios are printed. Absolute speeds on a shared machine
are noise; the ratios of one run are what counts.
"""
import argparse, json, statistics, subprocess, time
from llama_cpp import Llama, __version__ as llama_version

parser = argparse.ArgumentParser()
parser.add_argument("thermocline"), parser.add_argument("model"), parser.add_argument("split")
parser.add_argument("--threads", type=int, default=2), parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--tokens", type=int, default=64), parser.add_argument("-o", "--output")
args = parser.parse_args()

llama = Llama(args.model, n_ctx=512, n_threads=args.threads, n_threads_batch=args.threads, verbose=False)


def run_llama():
    llama.reset()
    llama.eval(list(range(100, 116)))
    llama.eval([99])
    start = time.perf_counter()
    for token in range(args.tokens):
        llama.eval([1000 + token])
    return args.tokens / (time.perf_counter() - start)


def run_ours(mode):
    command = [args.thermocline, "bench", "-m", args.split, "--vram-budget", "0", "--mode", mode, "-t", str(args.threads), "--n-prompt", "16",
               "--n-gen", str(args.tokens), "-r", "3", "--json"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return report["decode_tok_s"]["median"], report


rows = {"llama.cpp": [], "exact": [], "sparse": []}
for _ in range(args.rounds):
    rows["llama.cpp"].append(run_llama())
    for mode in ("exact", "sparse"):
        speed, report = run_ours(mode)
        rows[mode].append(speed)
medians = {name: statistics.median(values) for name, values in rows.items()}
result = {
    "llama_cpp_python": llama_version, "model": args.model.split("/")[-1], "cpu": report["cpu"], "isa": report["isa"],
    "threads": args.threads, "tok_s": rows, "median_tok_s": medians,
    "ratio_to_llama_cpp": {name: medians[name] / medians["llama.cpp"] for name in ("exact", "sparse")},
    "ratio_sparse_to_exact": medians["sparse"] / medians["exact"],
}
print(json.dumps(result, indent=1))
if args.output:
    json.dump(result, open(args.output, "w"), indent=1)
