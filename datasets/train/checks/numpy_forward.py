"""Recompute an exported folder's logits with numpy alone and compare them with what training recorded.

    python3 numpy_forward.py FOLDER reference.json

Reads config.json, model.safetensors and tokenizer.json with no machine-learning library (the `tokenizers` package is used
if it is there, to check the prompt's ids). Exits with 1 if a logit is off by more than 0.002 or a greedy token differs.
"""
import json
import struct
import sys
from pathlib import Path

import numpy as np

TOLERANCE = 2e-3  # logits; float32 sums in another order


def weights(path):
    """All tensors of a bf16 safetensors file as float32."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, result = json.loads(data[8 : 8 + size]), {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16", name
        start, end = (8 + size + o for o in entry["data_offsets"])
        raw = np.frombuffer(data[start:end], dtype="<u2").astype(np.uint32) << 16
        result[name] = raw.view(np.float32).reshape(entry["shape"])
    return result


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x, theta):
    """x [T, heads, K]: pairs are (i, i + K/2), angle position * theta^(-2i/K)."""
    t, _, k = x.shape
    angle = np.arange(t)[:, None] * theta ** (-np.arange(0, k, 2) / k)
    cos, sin = (f(angle).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    a, b = x[..., : k // 2], x[..., k // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def gated(g, u, act):
    gate = g / (1 + np.exp(-g)) if act == "silu" else np.maximum(g, 0)
    return gate * (np.maximum(u, 0) if act == "drelu" else u)


def forward(w, c, ids):
    """Logits [T, vocab] of a sequence, and every layer's count of nonzero h [layers][T]."""
    heads, groups, k, eps = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], c["rms_norm_eps"]
    x, t, active = w["model.embed_tokens.weight"][ids], len(ids), []
    mask = np.triu(np.full((t, t), -np.inf, dtype=np.float32), 1)
    for layer in range(c["num_hidden_layers"]):
        p = lambda name: w[f"model.layers.{layer}.{name}.weight"]  # noqa: E731
        y = norm(x, p("input_layernorm"), eps)
        q, key = (rotate((y @ p(f"self_attn.{n}_proj").T).reshape(t, -1, k), c["rope_theta"]) for n in "qk")
        value = (y @ p("self_attn.v_proj").T).reshape(t, -1, k)
        mixed = np.empty_like(q)
        for head in range(heads):
            group = head * groups // heads
            scores = q[:, head] @ key[:, group].T / np.sqrt(k).astype(np.float32) + mask
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, head] = scores / scores.sum(-1, keepdims=True) @ value[:, group]
        x = x + mixed.reshape(t, -1) @ p("self_attn.o_proj").T
        y = norm(x, p("post_attention_layernorm"), eps)
        h = gated(y @ p("mlp.gate_proj").T, y @ p("mlp.up_proj").T, c["hidden_act"])
        active.append((h != 0).sum(-1).tolist())
        x = x + h @ p("mlp.down_proj").T
    return norm(x, w["model.norm.weight"], eps) @ w["model.embed_tokens.weight"].T, active


def main(folder, reference):
    config, expected = (json.loads(p.read_text()) for p in (folder / "config.json", reference))
    w, ids = weights(folder / "model.safetensors"), expected["prompt_ids"]
    try:
        from tokenizers import Tokenizer

        same = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(expected["prompt"]).ids == ids
        print("prompt ids:", "equal" if same else "DIFFERENT")
    except ImportError:
        same = True
    logits, active = forward(w, config, ids)
    worst = max(abs(logits[int(p), i] - v) for p, top in expected["top_logits"].items() for i, v in top)
    worst = max([worst] + [np.abs(logits[int(p)] - full).max() for p, full in expected["full_logits"].items()])
    changed = sum(a != b for mine, theirs in zip(active, expected["active_neurons"]) for a, b in zip(mine, theirs))
    greedy = []
    for _ in expected["greedy_ids"]:
        greedy.append(int(forward(w, config, ids + greedy)[0][-1].argmax()))
    print(f"largest difference of a logit: {worst:.2e}; (layer, token) places with another count of active neurons: {changed}")
    print("greedy continuation:", "equal" if greedy == expected["greedy_ids"] else f"DIFFERENT: {greedy}")
    sys.exit(0 if same and worst < TOLERANCE and greedy == expected["greedy_ids"] else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
