"""Compares token ids that this crate gives with those of a reference, line by line.

    python compare_tokenizer.py MODEL.gguf LINES.txt IDS.txt [--reference llama.cpp|transformers]

Last results, against llama.cpp, on 11,904 lines of Wikipedia, textbooks and novels and a few of odd signs:
SmolLM2-135M 0 lines differ of 748,962 tokens; Qwen2.5-Coder-0.5B 2 lines of 740,459 tokens, both because Qwen2's own
tokenizer composes characters first (NFC), which llama.cpp leaves out; a SentencePiece BPE vocabulary of 3000 pieces
trained on such lines 0 of 1,019,070 tokens.

IDS.txt is what the crate's example `tokenize` wrote for the same model and lines. The reference is llama-cpp-python
(an implementation that shares nothing with the `tokenizers` crate) or transformers (which reads the same GGUF
metadata, but merges with the same library).
"""

import argparse
import pathlib


def reference(kind, model):
    if kind == "llama.cpp":
        import llama_cpp

        llama = llama_cpp.Llama(model, vocab_only=True, verbose=False)
        return lambda line: llama.tokenize(line.encode(), add_bos=False, special=True)
    import transformers

    path = pathlib.Path(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    return lambda line: tokenizer(line, add_special_tokens=False)["input_ids"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("lines")
    parser.add_argument("ids")
    parser.add_argument("--reference", choices=["llama.cpp", "transformers"], default="llama.cpp")
    arguments = parser.parse_args()
    encode = reference(arguments.reference, arguments.model)
    lines = pathlib.Path(arguments.lines).read_text(encoding="utf-8").split("\n")
    ours = pathlib.Path(arguments.ids).read_text().split("\n")
    n_different, n_tokens = 0, 0
    for number, (line, ids) in enumerate(zip(lines, ours)):
        expected, got = encode(line), [int(i) for i in ids.split()]
        n_tokens += len(expected)
        if expected != got:
            n_different += 1
            if n_different <= 10:
                print(f"line {number}: {line!r}\n  expected {expected}\n  got      {got}")
    print(f"{len(lines)} lines, {n_tokens} tokens, {n_different} lines differ")
    raise SystemExit(1 if n_different else 0)


if __name__ == "__main__":
    main()
