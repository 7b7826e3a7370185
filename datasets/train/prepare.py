"""Turn the three text collections into clean, deduplicated, split shards.

    python3 prepare.py CORPORA OUT

CORPORA holds `eltec_eng.txt.zst`, `litbank_full.txt.zst` and `wikitext-2.tar.zst`. Only these are read, and of
wikitext-2 only its train and valid parts: its test part is for evaluation and no weight may see it.
OUT receives `train-N.jsonl.xz` and `heldout.jsonl.xz`, one document a line
`{"id", "collection", "chapters": [text, ...]}`, and `manifest.json`, which names every document and what became of it.
Needs the `zstd` program and nothing outside the standard library.
"""
import hashlib
import io
import json
import lzma
import subprocess
import sys
import tarfile
from pathlib import Path

import cleaning

HELD_OUT_ONE_IN = 32  # share of documents that no training run sees
SHARD_CHARS = 40_000_000
SHINGLE_WORDS = 8
SKETCH_ONE_IN = 64  # of all shingles, the share that a book's sketch keeps
DUPLICATE_OVERLAP = 0.2  # of the smaller sketch


def unpack(path):
    """The bytes inside a .zst file."""
    return subprocess.run(["zstd", "-dc", path], check=True, stdout=subprocess.PIPE).stdout


def novels(path):
    """The books of one collection, in the collection's order."""
    text = unpack(path).decode("utf-8", errors="replace")
    for book in text.split("<|doc|>"):
        book = cleaning.book(book)
        if book:
            yield book


def articles(path):
    """The articles of wikitext-2's train and valid parts."""
    with tarfile.open(fileobj=io.BytesIO(unpack(path))) as tar:
        for part in ("wiki.train.reordered.tokens", "wiki.valid.tokens"):
            text = tar.extractfile(f"wikitext-2/{part}").read().decode("utf-8")
            yield from cleaning.wikitext_articles(text)


def stable_id(text):
    """A document's name, from its first letters, so that it survives changes in punctuation and layout."""
    letters = "".join(c for c in text[:8000].lower() if c.isalpha())[:4000]
    return hashlib.sha256(letters.encode()).hexdigest()[:12]


def sketch(text):
    """A fixed sample of the hashes of all runs of 8 words: texts that share passages share hashes."""
    words = cleaning.words(text)
    kept = set()
    for i in range(len(words) - SHINGLE_WORDS + 1):
        digest = hashlib.blake2b(" ".join(words[i : i + SHINGLE_WORDS]).encode(), digest_size=8).digest()
        value = int.from_bytes(digest, "little")
        if value % SKETCH_ONE_IN == 0:
            kept.add(value)
    return kept


def without_duplicates(documents):
    """Drops the shorter of any two books of which one repeats a fifth of the other; says which."""
    documents = sorted(documents, key=lambda d: -d["chars"])
    kept, sketches, dropped = [], [], []
    for document in documents:
        mine = sketch("\n".join(document["chapters"]))
        overlaps = [(len(mine & other) / max(1, min(len(mine), len(other))), k) for k, other in enumerate(sketches)]
        overlap, twin = max(overlaps, default=(0.0, 0))
        if overlap >= DUPLICATE_OVERLAP:
            dropped.append(document | {"duplicate_of": kept[twin]["id"], "overlap": round(overlap, 3)})
        else:
            kept.append(document)
            sketches.append(mine)
    return kept, dropped


def write_shard(path, documents):
    with lzma.open(path, "wt", encoding="utf-8", preset=6) as out:
        for document in documents:
            out.write(json.dumps({k: document[k] for k in ("id", "collection", "chapters")}, ensure_ascii=False) + "\n")


def main(corpora, out):
    out.mkdir(parents=True, exist_ok=True)
    sources = {
        "eltec": novels(corpora / "eltec_eng.txt.zst"),
        "litbank": novels(corpora / "litbank_full.txt.zst"),
        "wikitext-2": articles(corpora / "wikitext-2.tar.zst"),
    }
    documents = [
        {"id": stable_id("\n".join(chapters)), "collection": name, "chapters": chapters,
         "chars": sum(map(len, chapters)), "starts": " ".join(chapters)[:60]}
        for name, source in sources.items() for chapters in source
    ]  # fmt: skip
    kept, dropped = without_duplicates(documents)
    kept.sort(key=lambda d: d["id"])  # an order that depends on nothing but the texts
    held_out = [d for d in kept if int(d["id"], 16) % HELD_OUT_ONE_IN == 0]
    train = [d for d in kept if int(d["id"], 16) % HELD_OUT_ONE_IN != 0]

    write_shard(out / "heldout.jsonl.xz", held_out)
    shard, size, n_shards = [], 0, 0
    for document in train + [None]:
        if document is None or size + document["chars"] > SHARD_CHARS:
            write_shard(out / f"train-{n_shards}.jsonl.xz", shard)
            shard, size, n_shards = [], 0, n_shards + 1
        if document is not None:
            shard.append(document)
            size += document["chars"]

    def row(document):
        return {k: v for k, v in document.items() if k != "chapters"}

    totals = {
        f"{part} {name}": {"documents": len(chosen), "chars": sum(d["chars"] for d in chosen)}
        for part, group in (("train", train), ("held out", held_out), ("dropped", dropped))
        for name in sources
        for chosen in [[d for d in group if d["collection"] == name]]
    }
    manifest = {"totals": totals, "held_out": list(map(row, held_out)), "dropped": list(map(row, dropped)),
                "train": list(map(row, train))}  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
    print(json.dumps(totals, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
