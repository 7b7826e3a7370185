"""Compares every tensor of a GGUF model as this crate reads it with the `gguf` Python package's reading of it.

    python compare_tensors.py DUMP_TENSOR MODEL.gguf

Last results: SmolLM2-135M, 272 tensors (F32, Q4_1, Q8_0), and Qwen2.5-Coder-0.5B, 291 tensors (F32, Q4_K, Q5_0, Q6_K,
Q8_0): every value is the same bit for bit.

DUMP_TENSOR is the built example of that name. Query and key rows of llama models are put back in the Hugging Face
order on this side too, from the definition: within a head, rows 0, 2, 4, ... then 1, 3, 5, ...
"""

import subprocess
import sys

import gguf
import numpy as np

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def canonical(name):
    if name in NAMES:
        return NAMES[name]
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{suffix}"


def main():
    dump, model = sys.argv[1:]
    reader = gguf.GGUFReader(model)
    architecture = reader.fields["general.architecture"].contents()
    heads = {
        "attn_q": reader.fields[f"{architecture}.attention.head_count"].contents(),
        "attn_k": reader.fields[f"{architecture}.attention.head_count_kv"].contents(),
    }
    n_different, n_values, types = 0, 0, set()
    for tensor in reader.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        expected = expected.reshape([int(d) for d in reversed(tensor.shape)])
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if architecture == "llama" and part in heads:
            split = expected.reshape(heads[part], -1, 2, *expected.shape[1:])
            expected = split.swapaxes(1, 2).reshape(expected.shape)
        raw = subprocess.run([dump, model, canonical(tensor.name)], stdout=subprocess.PIPE, check=True).stdout
        got = np.frombuffer(raw, dtype="<f4").reshape(expected.shape)
        same = np.array_equal(got.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))
        n_values += got.size
        types.add(tensor.tensor_type.name)
        if not same:
            n_different += 1
            print(f"{tensor.name} ({tensor.tensor_type.name}): largest difference {np.abs(got - expected).max()}")
    print(f"{len(reader.tensors)} tensors, {n_values} values, types {sorted(types)}: {n_different} tensors differ")
    raise SystemExit(1 if n_different else 0)


if __name__ == "__main__":
    main()
