"""Loss and natural sparsity of a trained run on the held-out text, as JSON and per-neuron rates.

    python3 measure.py RUN TOKENS OUT

Weights are rounded to bf16 as they are exported, arithmetic is float32, so a zero here is a zero anywhere.
OUT receives `NAME.json` and, for sparse models, `NAME-rates.npz` with `rates` [layers, ffn], each neuron's share of tokens
with h != 0, and `mean_abs_h` of the same shape. NAME is RUN's last part.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

import structure
from generate import load

LOSS_BATCH = 16  # windows
STRUCTURE_WINDOWS = 64  # of the model's context each; half to fit an order of neurons, half to test it


def windows(tokens, context):
    """Consecutive windows [n, context + 1]; each shares one token with the next, so every token but the first counts."""
    n = (len(tokens) - 1) // context
    return torch.stack([tokens[i * context : i * context + context + 1] for i in range(n)])


@torch.no_grad()
def loss(model, tokens, lengths):
    """Summed nats, tokens and bytes of text over all windows."""
    nats, count, n_bytes = 0.0, 0, 0
    for batch in windows(tokens, model.shape.context).split(LOSS_BATCH):
        logits, targets = model.logits(batch[:, :-1]), batch[:, 1:]
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").double().item()
        count += targets.numel()
        n_bytes += lengths[targets].sum().item()
    return nats, count, n_bytes


@torch.no_grad()
def activations(model, tokens, n_windows):
    """Yields, layer by layer because all layers at once are large, h [n_windows, context, ffn] on evenly spread windows,
    and the shares of g > 0 and u > 0."""
    context = model.shape.context
    starts = torch.linspace(0, len(tokens) - context - 1, n_windows).long().tolist()
    batch = torch.stack([tokens[s : s + context] for s in starts])
    x = torch.nn.functional.embedding(batch, model.embedding).to(model.compute)
    for block in model.blocks:
        x = x + block.attend(x, model.cos[:context], model.sin[:context])
        h, gates, ups = [], [], []
        for part in x.split(8):
            one, g, u = block.activations(part)
            h.append(one)
            gates.append((g > 0).float().mean())
            ups.append((u > 0).float().mean())
        h = torch.cat(h)
        yield h, torch.stack(gates).mean().item(), torch.stack(ups).mean().item()
        x = x + torch.nn.functional.linear(h, block.down.to(h.dtype))


def near_zero(h):
    """Of a dense activation: the shares of |h| under fractions of its layer's mean |h|, and of neurons that hold its energy."""
    sizes = h.flatten(0, 1)[::16].abs().float()
    mean = sizes.mean()
    energy = sizes.square().sort(-1, descending=True).values.cumsum(-1)
    energy = energy / energy[:, -1:]
    return {
        "under_share_of_mean": {str(f): round((sizes < f * mean).float().mean().item(), 4) for f in (0.01, 0.03, 0.1, 0.3)},
        "neurons_for_energy": {str(e): round(((energy < e).float().sum(-1) + 1).mean().item() / sizes.shape[-1], 4)
                               for e in (0.9, 0.95, 0.99)},
        "exactly_zero": round((sizes == 0).float().mean().item(), 6),
    }  # fmt: skip


def rounded(value):
    return [round(v, 4) for v in value] if isinstance(value, list) else round(value, 4)


def main(run, tokens_dir, out):
    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("highest")
    model = load(run / "model.pt")
    lengths = torch.from_numpy(np.load(tokens_dir / "byte-lengths.npy")).cuda()
    held_out = {part: torch.from_numpy(np.load(tokens_dir / f"heldout-{part}.npy").astype(np.int64)).cuda()
                for part in ("novels", "wiki")}  # fmt: skip
    report = {"run": run.name, "loss": {}, "layers": []}
    totals = np.zeros(3)
    for part, tokens in held_out.items():
        nats, count, n_bytes = loss(model, tokens, lengths)
        totals += nats, count, n_bytes
        report["loss"][part] = {"nats_per_token": nats / count, "bits_per_byte": nats / math.log(2) / n_bytes, "tokens": count}
    nats, count, n_bytes = totals
    report["loss"]["all"] = {"nats_per_token": nats / count, "bits_per_byte": nats / math.log(2) / n_bytes,
                             "tokens": int(count), "bytes": int(n_bytes)}  # fmt: skip

    sparse = model.shape.act != "silu"
    rates, sizes = [], []
    wiki = activations(model, held_out["wiki"], STRUCTURE_WINDOWS) if sparse else None
    for h, gate, up in activations(model, held_out["novels"], STRUCTURE_WINDOWS):
        row = {"gate_positive": gate, "up_positive": up}
        if sparse:
            fired = h != 0
            row |= {"active": fired.float().mean().item()} | structure.describe(fired, next(wiki)[0] != 0)
            rates.append(fired.float().mean((0, 1)).cpu().numpy())
            sizes.append(h.abs().mean((0, 1)).cpu().numpy())
        else:
            row |= near_zero(h)
        report["layers"].append({k: v if isinstance(v, dict) else rounded(v) for k, v in row.items()})
    if sparse:
        report["active"] = float(np.mean([layer["active"] for layer in report["layers"]]))
        report["active_wiki"] = float(np.mean([layer["active_wiki"] for layer in report["layers"]]))
        np.savez_compressed(out / f"{run.name}-rates.npz", rates=np.stack(rates).astype(np.float32),
                            mean_abs_h=np.stack(sizes).astype(np.float32))  # fmt: skip
    (out / f"{run.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"run": run.name, "loss": report["loss"]["all"], "active": report.get("active")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
