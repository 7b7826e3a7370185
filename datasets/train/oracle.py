"""Record what a trained run computes on a fixed prompt, for other engines to be compared with.

    python3 oracle.py RUN TOKENS OUT.json

Weights are the exported bf16 ones, arithmetic is float32. Positions count from 0, the end-of-text token.
"""
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from generate import load, sample

PROMPT = 'The old man shut the door of the library behind him, and looked at the letter in his hand. "It is from your'
GREEDY_TOKENS = 32
TOP = 16


@torch.no_grad()
def main(run, tokens, out):
    torch.set_float32_matmul_precision("highest")
    model = load(run / "model.pt")
    tokenizer = Tokenizer.from_file(str(tokens / "tokenizer.json"))
    ids = [0] + tokenizer.encode(PROMPT).ids
    record = []
    logits = model.logits(torch.tensor([ids], device="cuda"), record=record)[0]
    whole = sample(model, [ids], len(ids) + GREEDY_TOKENS, 0, 0)[0].tolist()
    over = model.logits(torch.tensor([whole[:-1]], device="cuda"))[0, len(ids) - 1 :]
    first, second = over.topk(2).values.T
    result = {
        "prompt": PROMPT, "prompt_ids": ids, "arithmetic": "float32 on bf16 weights",
        "top_logits": {str(p): [[i, round(v, 5)] for i, v in zip(*map(torch.Tensor.tolist, reversed(logits[p].topk(TOP))))]
                       for p in range(0, len(ids), 4)},
        "full_logits": {str(p): [round(v, 5) for v in logits[p].tolist()] for p in (1, len(ids) - 1)},
        "log_sum_exp": [round(v, 5) for v in logits.logsumexp(-1).tolist()],
        "active_neurons": [(h != 0).sum(-1)[0].tolist() for h, _, _ in record],
        "greedy_ids": whole[len(ids) :], "greedy_text": tokenizer.decode(whole[len(ids) :]),
        "greedy_margins": [round(v, 5) for v in (first - second).tolist()],
    }  # fmt: skip
    out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
