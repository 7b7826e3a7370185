"""Train one model.

    python3 train.py TOKENS OUT SETTINGS.json

SETTINGS is one JSON object: the fields of `Run` and, under "shape", those of `model.Shape`. OUT receives `log.jsonl` (the
loss curve), `summary.json` and `model.pt` (float32 weights). Needs one GPU with bf16; nothing is read but TOKENS.
"""
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from model import Model, Shape

VALIDATION_WINDOWS = 64
WEIGHT_FLOOR = 0.05  # the learning rate ends at this share of its peak


@dataclass
class Run:
    """Everything that decides the result, besides the text."""

    tokens: int = 400_000_000  # seen in training, epochs counted again
    batch: int = 64  # sequences of shape.context tokens
    lr: float = 3e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    l1: float = 0.0  # final weight of the mean over layers and neurons of |h|
    l1_slope: float = 0.0  # -1..1: how much heavier late layers weigh than early ones
    l1_start: float = 0.05  # share of the run after which L1 begins to grow
    l1_full: float = 0.7  # share of the run at which it has its final weight
    seed: int = 0
    shape: Shape = field(default_factory=Shape)


def settings(values):
    return Run(**(values | {"shape": Shape(**values.get("shape", {}))}))


def learning_rate(run, step, steps):
    """Linear warm-up, then a cosine down to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return run.lr * min(1, (step + 1) / run.warmup_steps) * (WEIGHT_FLOOR + (1 - WEIGHT_FLOOR) * cosine)


def l1_weight(run, step, steps):
    """Grows along half a cosine from nothing: the model first learns, then learns with fewer neurons."""
    share = (step / steps - run.l1_start) / (run.l1_full - run.l1_start)
    return run.l1 * 0.5 * (1 - math.cos(math.pi * min(1, max(0, share))))


def layer_weights(run, device):
    """Relative L1 weight of every layer, mean 1."""
    return 1 + run.l1_slope * torch.linspace(-1, 1, run.shape.layers, device=device)


class Batches:
    """Windows of the training text without replacement; every epoch cuts the text at another offset."""

    def __init__(self, tokens, run):
        self.tokens, self.context, self.batch = tokens, run.shape.context, run.batch
        self.generator = torch.Generator(device=tokens.device).manual_seed(run.seed)
        self.span = torch.arange(self.context + 1, device=tokens.device)
        self.starts, self.used = torch.empty(0, device=tokens.device, dtype=torch.long), 0

    def next(self):
        """Inputs and targets, [batch, context] each."""
        if self.used + self.batch > len(self.starts):
            device = self.tokens.device
            offset = int(torch.randint(self.context, (1,), device=device, generator=self.generator))
            windows = (len(self.tokens) - 1 - offset) // self.context
            self.starts = offset + self.context * torch.randperm(windows, device=device, generator=self.generator)
            self.used = 0
        chosen = self.starts[self.used : self.used + self.batch]
        self.used += self.batch
        window = self.tokens[chosen[:, None] + self.span]
        return window[:, :-1], window[:, 1:]


@torch.no_grad()
def validate(model, held_out):
    """Cross-entropy (nats a token) on fixed held-out windows, and every layer's share of nonzero h."""
    model.eval()
    context, losses, active = model.shape.context, [], []
    starts = torch.linspace(0, len(held_out) - context - 1, VALIDATION_WINDOWS).long().tolist()
    for i in range(0, VALIDATION_WINDOWS, 16):
        window = torch.stack([held_out[s : s + context + 1] for s in starts[i : i + 16]])
        record = []
        logits = model.logits(window[:, :-1], record=record)
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten().long()))
        active.append(torch.stack([(h != 0).float().mean() for h, _, _ in record]))
    model.train()
    return torch.stack(losses).mean().item(), torch.stack(active).mean(0).tolist()


def optimizer(model, run):
    """AdamW; norms are not decayed."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": run.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.95), fused=True)


def train(run, tokens_dir, out):
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(run.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda")
    text = torch.from_numpy(np.load(tokens_dir / "train.npy").astype(np.int32)).to(device)
    held_out = np.concatenate([np.load(tokens_dir / f"heldout-{part}.npy") for part in ("novels", "wiki")])
    held_out = torch.from_numpy(held_out.astype(np.int32)).to(device)

    model = Model(run.shape).to(device)
    compiled, update = torch.compile(model), optimizer(model, run)
    batches, relative = Batches(text, run), layer_weights(run, device)
    tokens_per_step = run.batch * run.shape.context
    steps = run.tokens // tokens_per_step
    every = max(1, steps // 40)
    parameters = sum(p.numel() for p in model.parameters())
    log, weight = (out / "log.jsonl").open("w"), torch.zeros((), device=device)
    started = first = time.time()
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            loss, active = validate(model, held_out)
            row = {"step": step, "tokens": step * tokens_per_step, "validation_loss": round(loss, 4),
                   "active": [round(a, 4) for a in active], "l1_weight": round(l1_weight(run, step, steps), 4),
                   "lr": round(learning_rate(run, step, steps), 6), "seconds": round(time.time() - started, 1)}  # fmt: skip
            if step:
                row |= {"training_loss": round(train_loss.item(), 4), "mean_abs_h": [round(m, 5) for m in sizes.tolist()]}
            print(json.dumps(row), file=log, flush=True)
        if step == steps:
            break
        if step == 10:  # compiled by now
            torch.cuda.synchronize()
            first = time.time()
        for group in update.param_groups:
            group["lr"] = learning_rate(run, step, steps)
        weight.fill_(l1_weight(run, step, steps))
        train_loss, sizes = compiled(*batches.next())
        (train_loss + weight * (relative * sizes).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()
        update.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    summary = {
        "settings": asdict(run), "parameters": parameters, "steps": steps, "tokens": steps * tokens_per_step,
        "epochs": round(steps * tokens_per_step / len(text), 2), "validation_loss": loss,
        "active_by_layer": active, "active": float(np.mean(active)), "seconds": round(time.time() - started, 1),
        "tokens_per_second": round((steps - 10) * tokens_per_step / (time.time() - first)),
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }  # fmt: skip
    torch.save({"settings": asdict(run), "weights": model.state_dict()}, out / "model.pt")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps({"run": out.name} | {k: summary[k] for k in (
        "parameters", "tokens", "epochs", "validation_loss", "active", "seconds", "tokens_per_second")}), flush=True)  # fmt: skip


if __name__ == "__main__":
    train(settings(json.loads(Path(sys.argv[3]).read_text())), Path(sys.argv[1]), Path(sys.argv[2]))
