#!/usr/bin/env python3
"""Kills the download of SmolLM2 at random moments, and looks at what is there.

    analysis/checks/killed_fetch.py [KILLS [SEED]]

After each kill (SIGKILL, the whole process group) there is no model, or the right one. A last run, left alone, must fetch it and
leave nothing else behind. Needs what datasets/fetch-models.sh needs, and 300 MB in the temporary folder.
"""

import hashlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def start(script):
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(["sh", script, "smollm2"], start_new_session=True, **silent)


def main():
    kills, seed = (int(a) for a in (sys.argv[1:] + ["20", "1"][len(sys.argv) - 1 :]))
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        script = shutil.copy(pathlib.Path(__file__).parents[2] / "datasets/fetch-models.sh", folder)
        model = pathlib.Path(folder) / "models/smollm2/model.gguf"
        begin = time.monotonic()
        if start(script).wait() != 0:
            sys.exit("SmolLM2 cannot be fetched here")
        seconds = time.monotonic() - begin
        whole = 0
        for _ in range(kills):
            model.unlink(missing_ok=True)
            process = start(script)
            time.sleep(draw.uniform(0, 1.05 * seconds))
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # It was done.
            process.wait()
            if model.exists():
                whole += 1
                if hashlib.sha256(model.read_bytes()).hexdigest() != DIGEST:
                    sys.exit("a model under its own name that is not whole")
        if start(script).wait() != 0 or hashlib.sha256(model.read_bytes()).hexdigest() != DIGEST:
            sys.exit("after the kills the model could not be fetched")
        others = [path.name for path in model.parent.iterdir() if path != model]
        if others:
            sys.exit(f"left behind: {others}")
        print(f"{kills} kills within {seconds:.1f} s each, {whole} after the model was there; fetched whole in the end")


main()
