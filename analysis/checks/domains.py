"""Calibrated on one domain, used on another: predictor and shares are made from each text in turn and measured on all of them.

python3 analysis/checks/domains.py THERMOCLINE MODEL NAME=TEXT NAME=TEXT ... --work DIR [-o OUT.json]

Of each text the first four fifths are for calibration and the last fifth is for tests. From both, pieces of 2000 characters are
taken, evenly spaced and whole lines, so that many documents are seen. For each domain: `calibrate` on its pieces, `split`, `eval
--fit-shares` on the same pieces, then `eval --mask dense,predicted` on every domain's test pieces. A .zst text needs the zstandard
module. Prints a table of KL divergences (nats a token) and perplexity ratios with their 95 % intervals; splits stay in DIR, and one that
is there already is used as it is.
"""
import argparse, json, os, subprocess, sys, time

PIECE = 2000
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("thermocline"), parser.add_argument("model"), parser.add_argument("texts", nargs="+", metavar="NAME=TEXT")
parser.add_argument("--work", required=True), parser.add_argument("-o", "--output")
parser.add_argument("--tokens", type=int, default=16384, help="tokens that calibrate reads of each domain")
parser.add_argument("--ctx", type=int, default=512), parser.add_argument("--windows", type=int, default=8)
parser.add_argument("--active", default="0.5,0.3")
args = parser.parse_args()


def call(*words):
    done = subprocess.run([args.thermocline, *words, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def read(path):
    if not path.endswith(".zst"):
        return open(path, encoding="utf-8").read()
    import zstandard
    with open(path, "rb") as file:
        return zstandard.ZstdDecompressor().stream_reader(file).read().decode("utf-8")


def pieces(text, n):
    """`n` pieces, each from the first line that begins behind its place on."""
    taken = []
    for i in range(n):
        start = text.find("\n", i * len(text) // n) + 1
        end = text.find("\n", start + PIECE)
        taken.append(text[start:end if end > 0 else len(text)])
    return "\n".join(taken)


def prepare(name, text):
    """Files of a domain: five characters a token are more than any of these tokenizers needs."""
    border = len(text) * 4 // 5
    paths = {}
    for part, of, n_tokens in (("train", text[:border], args.tokens), ("test", text[border:], args.ctx * args.windows)):
        paths[part] = os.path.join(args.work, f"{name}.{part}.txt")
        with open(paths[part], "w", encoding="utf-8") as out:
            out.write(pieces(of, max(1, 5 * n_tokens // PIECE + 1)))
    return paths


os.makedirs(args.work, exist_ok=True)
domains = {}
for given in args.texts:
    name, _, path = given.partition("=")
    if not path:
        sys.exit(f"{given}: expected NAME=TEXT")
    domains[name] = prepare(name, read(path))

begin, rows = time.time(), []
for name, paths in domains.items():
    profile, split = (os.path.join(args.work, f"{name}.{kind}") for kind in ("profile", "split"))
    if not os.path.exists(os.path.join(split, "manifest.json")):
        call("calibrate", "-m", args.model, "--corpus", paths["train"], "--tokens", str(args.tokens), "-o", profile)
        call("split", "-m", args.model, "--profile", profile, "-o", split, "--encoding", "q4")
        call("eval", "-m", split, "--text", paths["train"], "--fit-shares")
    for other, of_other in domains.items():
        out = call("eval", "-m", split, "--text", of_other["test"], "--ctx", str(args.ctx), "--windows", str(args.windows),
                   "--mask", "dense,predicted", "--active", args.active)
        for r in out["results"]:
            kept = ("mask", "active", "perplexity", "perplexity_ratio", "perplexity_ratio_ci95", "kl", "energy_recall", "tokens")
            rows.append({"calibrated_on": name, "measured_on": other, **{k: r[k] for k in kept}})
        print(f"{name} on {other}: {time.time() - begin:.0f} s", file=sys.stderr)

names, shares = list(domains), [float(s) for s in args.active.split(",")]
for share in shares:
    print(f"\n| predicted, {100 * share:.0f} %, calibrated on | " + " | ".join(names) + " |\n|" + " --- |" * (1 + len(names)))
    for name in names:
        cells = []
        for other in names:
            r = next(r for r in rows if (r["calibrated_on"], r["measured_on"], r["active"]) == (name, other, share))
            low, high = r["perplexity_ratio_ci95"]
            cells.append(f"{r['kl']:.2f}, {r['perplexity_ratio']:.2f} ({low:.2f}-{high:.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |")
if args.output:
    record = {"model": args.model.rsplit("/", 2)[-2 if args.model.endswith("model.gguf") else -1], "domains": {},
              "calibration_tokens": args.tokens, "ctx": args.ctx, "windows": args.windows, "rows": rows, "seconds": time.time() - begin}
    record["domains"] = {given.partition("=")[0]: os.path.basename(given.partition("=")[2]) for given in args.texts}
    with open(args.output, "w") as out:
        json.dump(record, out, indent=1)
