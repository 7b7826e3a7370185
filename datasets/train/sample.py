"""Write texts sampled from a trained run.

    python3 sample.py RUN TOKENS OUT.txt BYTES [SEED]     documents from nothing, temperature 1, until BYTES are reached
    python3 sample.py RUN TOKENS - PROMPT [SEED]          one continuation of PROMPT to the terminal

Documents end at the model's own end-of-text token or at its context length; a blank line separates them.
"""
import sys
from pathlib import Path

from tokenizers import Tokenizer

from generate import load, sample

AT_ONCE = 256


def until_end(ids):
    """A sampled row without the token it began with, up to the first end of text."""
    ids = ids.tolist()[1:]
    return ids[: ids.index(0)] if 0 in ids else ids


def documents(model, tokenizer, n_bytes, seed):
    """Texts of at least `n_bytes` in all. Batch k uses seed + k, so more bytes only add texts."""
    texts, size = [], 0
    while size < n_bytes:
        rows = sample(model, [[0]] * AT_ONCE, model.shape.context, 1.0, seed)
        for row in rows:
            text = tokenizer.decode(until_end(row)).strip()
            if text and size < n_bytes:
                texts.append(text)
                size += len(text.encode()) + 2
        seed += 1
    return texts


def main(run, tokens, out, what, seed=0):
    model = load(run / "model.pt")
    tokenizer = Tokenizer.from_file(str(tokens / "tokenizer.json"))
    if out == "-":
        ids = [0] + tokenizer.encode(what).ids
        print(tokenizer.decode(until_end(sample(model, [ids], min(model.shape.context, len(ids) + 200), 0.8, seed)[0])))
    else:
        Path(out).write_text("\n\n".join(documents(model, tokenizer, int(what), seed)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], *map(int, sys.argv[5:]))
