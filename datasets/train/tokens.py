"""Train the byte-level BPE on the training shards and turn all shards into token arrays.

    python3 tokens.py SHARDS OUT [VOCAB]

Writes tokenizer.json, `train.npy` (uint16, every chapter preceded by the end-of-text token), and for the held-out
documents `heldout-novels.npy` and `heldout-wiki.npy`. Token 0 is `<|endoftext|>`.
"""
import json
import lzma
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"


def documents(paths):
    for path in paths:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def train_tokenizer(texts, vocab):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer, chapters):
    ids = []
    for encoding in tokenizer.encode_batch(chapters):
        ids.append(np.array([0] + encoding.ids, dtype=np.uint16))
    return np.concatenate(ids)


def byte_lengths(tokenizer):
    """How many bytes of text each token stands for; none for the end of a text."""
    names = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    return np.array([0 if name == END_OF_TEXT else len(name) for name in names], dtype=np.int64)


def main(shards, out, vocab):
    out.mkdir(parents=True, exist_ok=True)
    train = list(documents(sorted(shards.glob("train-*.jsonl.xz"))))
    chapters = [chapter for document in train for chapter in document["chapters"]]
    tokenizer = train_tokenizer((p for chapter in chapters for p in chapter.split("\n")), vocab)
    tokenizer.save(str(out / "tokenizer.json"))
    np.save(out / "train.npy", encode(tokenizer, chapters))
    held_out = list(documents([shards / "heldout.jsonl.xz"]))
    for name, chosen in (("novels", [d for d in held_out if d["collection"] != "wikitext-2"]),
                         ("wiki", [d for d in held_out if d["collection"] == "wikitext-2"])):  # fmt: skip
        np.save(out / f"heldout-{name}.npy", encode(tokenizer, [c for d in chosen for c in d["chapters"]]))
    np.save(out / "byte-lengths.npy", byte_lengths(tokenizer))
    sizes = {path.stem: int(np.load(path).size) for path in sorted(out.glob("*.npy"))}
    print(json.dumps({"tokens": sizes, "chapters": len(chapters)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 4096)
