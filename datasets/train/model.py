"""A Llama-shaped decoder whose feed-forward layers can be sparse.

Shapes: B sequences, T tokens, D hidden, F feed-forward neurons, H query heads, G key/value heads, K head width.
Master weights are float32; `compute` is the type that the arithmetic runs in (bfloat16 in training).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Shape:
    """The sizes of a model and the nonlinearity of its feed-forward layers."""

    hidden: int = 256
    ffn: int = 2048
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    vocab: int = 4096
    context: int = 1024
    act: str = "drelu"
    dropout: float = 0.0
    rope_theta: float = 10_000.0
    eps: float = 1e-5


ACTIVATIONS = {
    "silu": lambda g, u: F.silu(g) * u,
    "relu": lambda g, u: F.relu(g) * u,
    "drelu": lambda g, u: F.relu(g) * F.relu(u),
    "relu2": lambda g, u: F.relu(g).square() * u,
}


def linear(x, weight):
    """x [..., in] times weight [out, in], in the type of x."""
    return F.linear(x, weight.to(x.dtype))


class Norm(nn.Module):
    """RMSNorm, summed in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary embedding in the rotate-half form: x [B, heads, T, K]; cos and sin [T, K/2], float32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Block(nn.Module):
    """One decoder layer. q, k and v are one matrix here, gate and up another; the export takes them apart."""

    def __init__(self, s):
        super().__init__()
        self.s = s
        self.attention_norm, self.ffn_norm = Norm(s.hidden, s.eps), Norm(s.hidden, s.eps)
        self.qkv = nn.Parameter(torch.empty((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden))
        self.o = nn.Parameter(torch.empty(s.hidden, s.heads * s.head_dim))
        self.gate_up = nn.Parameter(torch.empty(2 * s.ffn, s.hidden))
        self.down = nn.Parameter(torch.empty(s.hidden, s.ffn))

    def attend(self, x, cos, sin, cache=None):
        """x [B, T, D]. With a cache (keys, values, position), T is 1 and earlier tokens come from the cache."""
        s, (b, t, _) = self.s, x.shape
        qkv = linear(self.attention_norm(x), self.qkv).view(b, t, s.heads + 2 * s.kv_heads, s.head_dim).transpose(1, 2)
        q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            keys, values, position = cache
            keys[:, :, position : position + 1], values[:, :, position : position + 1] = k, v
            k, v = keys[:, :, : position + 1], values[:, :, : position + 1]
        repeat = s.heads // s.kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        return linear(y.transpose(1, 2).reshape(b, t, -1), self.o)

    def activations(self, x):
        """The neurons' activations h [B, T, F], and the two products they are made of."""
        g, u = linear(self.ffn_norm(x), self.gate_up).chunk(2, -1)
        return ACTIVATIONS[self.s.act](g, u), g, u

    def forward(self, x, cos, sin, cache=None, record=None):
        """Returns the new residual stream [B, T, D] and the mean of |h|."""
        x = x + F.dropout(self.attend(x, cos, sin, cache), self.s.dropout, self.training)
        h, g, u = self.activations(x)
        if record is not None:
            record.append((h, g, u))
        x = x + F.dropout(linear(h, self.down), self.s.dropout, self.training)
        return x, h.abs().mean(dtype=torch.float32)


class Model(nn.Module):
    """The decoder; the embedding is also the head."""

    def __init__(self, shape, compute=torch.bfloat16):
        super().__init__()
        self.shape, self.compute = shape, compute
        self.embedding = nn.Parameter(torch.empty(shape.vocab, shape.hidden))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.eps)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:  # keep the residual stream's variance independent of depth
            for parameter in (block.o, block.down):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers))
        frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angle = torch.arange(shape.context).float()[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def hidden(self, tokens, caches=None, position=0, record=None):
        """Final hidden states [B, T, D] and every layer's mean |h| [layers]."""
        x = F.embedding(tokens, self.embedding).to(self.compute)
        t, sizes = tokens.shape[1], []
        cos, sin = self.cos[position : position + t], self.sin[position : position + t]
        for layer, block in enumerate(self.blocks):
            cache = None if caches is None else (*caches[layer], position)
            x, size = block(x, cos, sin, cache, record)
            sizes.append(size)
        return self.norm(x), torch.stack(sizes)

    def logits(self, tokens, **options):
        """[B, T, vocab], float32."""
        return linear(self.hidden(tokens, **options)[0], self.embedding).float()

    def forward(self, tokens, targets):
        """Mean cross-entropy in nats, and every layer's mean |h|."""
        x, sizes = self.hidden(tokens)
        logits = linear(x, self.embedding).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long()), sizes
