#!/usr/bin/env python3
"""Random VRAM budgets against what the driver says is taken, while a model is loaded, prompted and decoded.

    analysis/checks/gpu_budgets.py THERMOCLINE SPLIT [RUNS [SEED]]

Prints a line for each run: mode, budget, the program's own figure, the most that `nvidia-smi` saw beyond what was taken
before (sampled; nobody else may use the GPU). Budgets that hold nothing must end with code 3. Ends with 1 if a run took more
than its budget.
"""

import json
import random
import subprocess
import sys

MIB = 1 << 20


def used_mib():
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def run(program, split, mode, budget):
    """Exit code, result, most MiB in use."""
    command = [program, "bench", "-m", split, "--mode", mode, "--vram-budget", f"{budget}MiB", "--n-prompt", "128"]
    command += ["--n-gen", "16", "-r", "1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    most = 0
    while process.poll() is None:
        most = max(most, used_mib())
    output, errors = process.communicate()
    return process.returncode, json.loads(output) if process.returncode == 0 else errors.strip(), most


def main():
    program, split = sys.argv[1:3]
    runs, seed = (int(a) for a in (sys.argv[3:] + ["20", "1"][len(sys.argv) - 3 :]))
    draw = random.Random(seed)
    before = used_mib()
    # What everything takes.
    code, whole, _ = run(program, split, "exact", 1 << 20)
    if code != 0:
        sys.exit(whole)
    most = whole["device_used_bytes"] / MIB
    print(f"{'mode':8} {'budget MiB':>11} {'program MiB':>12} {'driver MiB':>11}")
    exceeded = refused = 0
    for _ in range(runs):
        mode, budget = draw.choice(["exact", "sparse"]), int(draw.uniform(0.1, 1.05) * most)
        code, result, seen = run(program, split, mode, budget)
        if code == 3:
            refused += 1
            print(f"{mode:8} {budget:11} {'too small':>12}")
            continue
        if code != 0:
            sys.exit(result)
        own, driver = result["device_used_bytes"] / MIB, seen - before
        exceeded += max(own, driver) > budget
        print(f"{mode:8} {budget:11} {own:12.0f} {driver:11.0f}")
    print(f"{runs} budgets, {refused} too small, {exceeded} exceeded")
    sys.exit(exceeded > 0)


main()
