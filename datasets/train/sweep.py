"""Train every run of a settings file, some at a time.

    python3 sweep.py TOKENS OUT SETTINGS.json [WORKERS]

SETTINGS: `{"base": {...}, "runs": {"name": {changes to the base}}}`. A run whose summary exists is not repeated.
"""
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def merged(base, changes):
    """The base with the changes, the inner objects merged too."""
    inner = {k: base.get(k, {}) | v for k, v in changes.items() if isinstance(v, dict)}
    return base | changes | inner


def one(tokens, out, settings):
    if (out / "summary.json").exists():
        return 0
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    script = Path(__file__).with_name("train.py")
    with (out / "output.txt").open("w") as output:
        code = subprocess.run([sys.executable, script, tokens, out, out / "settings.json"], stdout=output,
                              stderr=subprocess.STDOUT).returncode  # fmt: skip
    print((out / "output.txt").read_text().strip().splitlines()[-1][:600], flush=True)
    return code


def main(tokens, out, plan, workers):
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(one, tokens, out / name, merged(plan["base"], changes))
                for name, changes in plan["runs"].items()]  # fmt: skip
    sys.exit(max(job.result() for job in jobs))


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[3]).read_text())
    main(Path(sys.argv[1]), Path(sys.argv[2]), plan, int(sys.argv[4]) if len(sys.argv) > 4 else 1)
