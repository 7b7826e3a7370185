"""Load a trained run, and sample many texts from it at once."""
import numpy as np
import torch

from model import Model, Shape


def load(path, compute=torch.float32):
    """A run's model with its weights rounded to bf16, as they are exported, and arithmetic in `compute`."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    shape = Shape(**(saved["settings"]["shape"] | {"dropout": 0.0}))
    model = Model(shape, compute)
    model.load_state_dict({name: weight.bfloat16().float() for name, weight in saved["weights"].items()})
    return model.cuda().eval()


@torch.no_grad()
def sample(model, prompts, length, temperature, seed, top_k=0):
    """Continues `prompts` [B, T] (ids) to `length` tokens in all; temperature 0 takes the likeliest. Returns [B, length]."""
    s, device = model.shape, next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = torch.as_tensor(np.asarray(prompts), dtype=torch.long, device=device)
    shape = (len(tokens), s.kv_heads, length, s.head_dim)
    caches = [[torch.zeros(shape, device=device, dtype=model.compute) for _ in range(2)] for _ in range(s.layers)]
    given = tokens.shape[1]
    tokens = torch.nn.functional.pad(tokens, (0, length - given))
    for position in range(length - 1):
        logits = model.logits(tokens[:, position : position + 1], caches=caches, position=position)[:, -1]
        if position + 1 < given:
            continue
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            if top_k:
                least = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        tokens[:, position + 1] = chosen
    return tokens.cpu().numpy()
