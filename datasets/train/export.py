"""Write a trained run as a Hugging Face folder in bf16.

    python3 export.py RUN TOKENS OUT

q, k, v, gate and up become matrices of their own; the rotary layout is already Hugging Face Llama's. `hidden_act` names
what is applied: "silu" and "relu" act on the gate alone as everywhere, "drelu" means h = relu(gate) * relu(up).
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from model import Shape


def config(shape):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": shape.act,
        "hidden_size": shape.hidden, "intermediate_size": shape.ffn, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "max_position_embeddings": shape.context, "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16",
    }  # fmt: skip


def tensors(weights, shape):
    """The weights under Hugging Face's names."""
    named = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": weights["norm.weight"]}
    widths = [shape.heads * shape.head_dim] + 2 * [shape.kv_heads * shape.head_dim]
    for layer in range(shape.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        q, k, v = weights[ours + "qkv"].split(widths)
        gate, up = weights[ours + "gate_up"].chunk(2)
        for name, tensor in (
            ("self_attn.q_proj", q), ("self_attn.k_proj", k), ("self_attn.v_proj", v),
            ("self_attn.o_proj", weights[ours + "o"]), ("mlp.gate_proj", gate), ("mlp.up_proj", up),
            ("mlp.down_proj", weights[ours + "down"]), ("input_layernorm", weights[ours + "attention_norm.weight"]),
            ("post_attention_layernorm", weights[ours + "ffn_norm.weight"]),
        ):  # fmt: skip
            named[theirs + name + ".weight"] = tensor
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in named.items()}


def main(run, tokens, out):
    out.mkdir(parents=True, exist_ok=True)
    saved = torch.load(run / "model.pt", map_location="cpu", weights_only=True)
    shape = Shape(**saved["settings"]["shape"])
    save_file(tensors(saved["weights"], shape), out / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": True, "temperature": 0.8}
    end = "<|endoftext|>"
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "add_bos_token": True,
                 "model_max_length": shape.context}  # fmt: skip
    for name, content in (("config", config(shape)), ("generation_config", generation), ("tokenizer_config", tokenizer)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    # Users' texts begin with the end of the one before; the training tokens had that put in by tokens.py.
    with_start = Tokenizer.from_file(str(tokens / "tokenizer.json"))
    with_start.post_processor = TemplateProcessing(single=f"{end} $A", pair=f"{end} $A $B", special_tokens=[(end, 0)])
    with_start.save(str(out / "tokenizer.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
