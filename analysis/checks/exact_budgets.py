"""Greedy tokens of exact mode under memory budgets, on ten prompts.

python3 analysis/checks/exact_budgets.py THERMOCLINE SPLIT [--tokens 256] [-o OUT.json]

Budgets: all, a half and a quarter of the split's dense size. Fails if a token differs from the unconstrained run's.
"""
import argparse, json, subprocess, sys

PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "The sea was calm that morning, and",
    "List three reasons to learn Rust:", "In 1905, Albert Einstein", "Dear Sir or Madam,", "The recipe calls for",
    "She opened the old wooden box and", "Water boils at",
]
parser = argparse.ArgumentParser()
parser.add_argument("thermocline"), parser.add_argument("split"), parser.add_argument("--tokens", type=int, default=256)
parser.add_argument("-o", "--output")
args = parser.parse_args()


def call(*words):
    return json.loads(subprocess.run([args.thermocline, *words, "--json"], check=True, capture_output=True, text=True).stdout)


dense = call("inspect", args.split)["dense_bytes"]
differences, rows = 0, []
for prompt in PROMPTS:
    base = None
    for share in (None, 0.5, 0.25):
        budget = "auto" if share is None else f"{int(dense * share)}B"
        out = call("run", "-m", args.split, "-p", prompt, "-n", str(args.tokens), "--temp", "0", "--ignore-eos", "--ram-budget", budget,
                   "--vram-budget", "0")
        base = base or out["tokens"]
        same = out["tokens"] == base
        differences += not same
        rows.append({"prompt": prompt, "share": share, "budget": budget, "n": len(out["tokens"]), "same": same,
                     "tok_s": out["decode_tok_s"], "disk_bytes_per_token": out["bytes_per_token"]["disk"],
                     "limit_share": out["limit_share"], "peak_rss_bytes": out["peak_rss_bytes"]})
        print(rows[-1], file=sys.stderr)
print(f"{len(rows)} runs of {args.tokens} tokens, {differences} that differ from the unconstrained one")
if args.output:
    json.dump({"dense_bytes": dense, "runs": rows}, open(args.output, "w"), indent=1)
sys.exit(differences > 0)
