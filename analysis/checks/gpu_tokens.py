"""Greedy tokens of exact mode on the GPU against the CPU engine's, on ten prompts.

python3 analysis/checks/gpu_tokens.py THERMOCLINE SPLIT [--vram-budget auto] [--tokens 256]

Fails if a token differs.
"""
import argparse, json, subprocess, sys

PROMPTS = [
    "The sea was calm", "Once upon a time", "She looked at him and", "In the year of", "The old man",
    "It was a dark night and", "My dear sir", "The captain of the ship", "When I was young", "He opened the letter",
]
parser = argparse.ArgumentParser()
parser.add_argument("thermocline"), parser.add_argument("split"), parser.add_argument("--tokens", type=int, default=256)
parser.add_argument("--vram-budget", default="auto")
args = parser.parse_args()


def run(prompt, vram):
    words = ["run", "-m", args.split, "-p", prompt, "-n", str(args.tokens), "--temp", "0", "--ignore-eos"]
    words = [args.thermocline, *words, "--vram-budget", vram, "--json"]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


differ = 0
for prompt in PROMPTS:
    cpu, gpu = run(prompt, "0"), run(prompt, args.vram_budget)
    if gpu["bytes_per_token"]["device"] == 0:
        sys.exit("no GPU was used")
    differ += cpu["tokens"] != gpu["tokens"]
print(f"{len(PROMPTS)} prompts of {args.tokens} tokens, {differ} that differ; "
      f"GPU {gpu['decode_tok_s']:.0f} tok/s, {gpu['limit_share']:.2f} of its limit, CPU {cpu['decode_tok_s']:.0f} tok/s")
sys.exit(differ > 0)
