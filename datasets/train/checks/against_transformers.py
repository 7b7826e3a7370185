"""Load an exported folder with transformers' Llama and compare its logits with what training recorded.

    python3 against_transformers.py FOLDER reference.json

transformers knows no dReLU, so its feed-forward layers are given one here; all else is its own code.
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM


@torch.no_grad()
def main(folder, reference):
    config, expected = (json.loads(p.read_text()) for p in (folder / "config.json", reference))
    drelu = config["hidden_act"] == "drelu"
    model = LlamaForCausalLM(LlamaConfig(**(config | ({"hidden_act": "relu"} if drelu else {})))).float().eval()
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()},
                                                strict=False)  # fmt: skip
    print("missing:", missing, "unexpected:", unexpected)
    if drelu:
        for layer in model.model.layers:
            m = layer.mlp
            m.forward = lambda x, m=m: m.down_proj(m.gate_proj(x).relu() * m.up_proj(x).relu())
    logits = model(torch.tensor([expected["prompt_ids"]])).logits[0]
    worst = max((logits[int(p)] - torch.tensor(full)).abs().max().item() for p, full in expected["full_logits"].items())
    print(f"largest difference of a logit: {worst:.2e}")
    sys.exit(0 if worst < 2e-3 else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
