"""A multiple-choice cloze set from novels, in the manner of the Children's Book Test (Hill et al. 2015, arXiv 1511.02301).

python3 datasets/tasks/make_cloze.py NOVELS.txt[.zst] -o cloze.jsonl [--examples 100] [--seed 0]

Of 21 sentences in a row one word of the last is left out, and ten words of the same kind from the other twenty are offered for
it, the right one among them. Half of the examples ask for a name: a capitalised word that does not begin a sentence and that the
passage never writes small. The other half ask for a small word of six letters or more, no function word, and offer words with
the same ending (-ing, -ed, -ly, -s, none of these): there is no tagger here, and this is what stands for one.

A line is {"context", "choices", "answer", "kind", "line"}: the context ends before the gap, a choice is the word and the rest of its
sentence, so that what follows the gap counts too (as in Radford et al. 2019, section 3.2), and `line` is where the passage begins
in the text. Passages do not overlap, none occurs twice, no answer more than twice. The same text and seed give the same file. Only the
standard library is needed, and zstandard for .zst.
"""
import argparse, hashlib, json, random, re, sys

N_CONTEXT, N_CHOICES = 20, 10
TITLES = "Mr Mrs Ms Dr St Messrs Mme Mlle Rev Hon Esq Capt Col Gen Lieut Prof Jr Sr vol No".split()
END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z])")
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
NO_NAMES = set("I Mr Mrs Miss Ms Dr Sir Lord Lady Madam Madame God Heaven Lor Oh Ah Yes No And But The Well Now Then What Why How You He She It "
               "We They My Your His Her There Here That This If When Who So Come Good Dear Monsieur English French Christian".split())
FUNCTION = set("before behind between beyond because without within through though although always against almost already another "
               "around across became become besides beneath beside cannot during either enough except herself himself itself indeed "
               "little myself neither nothing perhaps rather really should something somewhat sometimes themselves therefore "
               "together towards toward upwards whatever whenever wherever whether whichever yourself ourselves everything anything "
               "nobody somebody everybody anybody yet unless until several having however".split())


def read(path):
    if not path.endswith(".zst"):
        return open(path, encoding="utf-8").read()
    import zstandard
    with open(path, "rb") as file:
        return zstandard.ZstdDecompressor().stream_reader(file).read().decode("utf-8")


def sentences(text):
    """(line, sentence, first of its paragraph), and None where a line is no prose."""
    for number, line in enumerate(text.split("\n"), 1):
        line = " ".join(line.replace("_", "").split())
        if len(line.split()) < 3 or line.upper() == line or not line.endswith(tuple(".!?\"'")) or "*" in line:
            if line:
                yield None
            continue
        start, first = 0, True
        for end in END.finditer(line):
            before = line[start:end.start()].rstrip(".").rsplit(" ", 1)[-1].strip("\"'([")
            if before in TITLES or len(before) == 1:
                continue
            yield number, line[start:end.end()].strip(), first
            start, first = end.end(), False
        yield number, line[start:].strip(), first


def kinds(passage):
    """Names and small words of the context, {kind: {word}}."""
    inner, small = set(), set()
    for _, sentence, _ in passage:
        words = WORD.findall(sentence)
        small.update(w for w in words if w.islower())
        inner.update(m.group() for m in WORD.finditer(sentence) if begins_nothing(sentence, m.start()))
    found = {"name": {w for w in inner if w.isalpha() and w[0].isupper() and w[1:].islower() and len(w) > 2
                      and w not in NO_NAMES and w.lower() not in small}}
    for word in small:
        if len(word) >= 6 and word.isalpha() and word not in FUNCTION:
            found.setdefault(ending(word), set()).add(word)
    return found


def begins_nothing(sentence, at):
    """Whether the word at `at` comes behind another one, a comma or a blank: not behind a mark that a sentence may begin with."""
    return at > 1 and sentence[at - 1] == " " and (sentence[at - 2].isalpha() or sentence[at - 2] == ",")


def ending(word):
    return next((e for e in ("ing", "ed", "ly", "s") if word.endswith(e)), "other")


def example(passage, kind, rng, used, words_max):
    """The example of a passage, or None if it gives none of that kind."""
    context, (_, query, first) = passage[:N_CONTEXT], passage[N_CONTEXT]
    if not 6 <= len(query.split()) <= 24 or sum(len(s.split()) for _, s, _ in context) > words_max:
        return None
    if any(len(s.split()) < 2 or s.count('"') % 2 for _, s, _ in passage):
        return None
    in_query, found = WORD.findall(query), kinds(context)
    gaps = []
    for match in WORD.finditer(query):
        word = match.group()
        group = found.get("name" if kind == "name" else ending(word), set())
        if word in group and in_query.count(word) == 1 and begins_nothing(query, match.start()) and used.get(word, 0) < 2:
            others = sorted(group - set(in_query))
            if len(others) >= N_CHOICES - 1:
                gaps.append((match, others))
    if not gaps:
        return None
    match, others = rng.choice(gaps)
    choices = rng.sample(others, N_CHOICES - 1) + [match.group()]
    rng.shuffle(choices)
    used[match.group()] = used.get(match.group(), 0) + 1
    before = "".join(("\n" if starts and i else " " if i else "") + s for i, (_, s, starts) in enumerate(context))
    before += ("\n" if first else " ") + query[:match.start()]
    return {"context": before.rstrip(" "), "choices": [" " + c + query[match.end():] for c in choices],
            "answer": choices.index(match.group()), "kind": "name" if kind == "name" else "word", "line": passage[0][0]}


def passages(text):
    """21 sentences in a row, from every third on; the caller skips those that overlap with what it took."""
    row = []
    for sentence in sentences(text):
        if sentence is None:
            row = []
            continue
        row.append(sentence)
        if len(row) == N_CONTEXT + 1:
            yield list(row)
            row = row[3:]


def make(text, n, seed, words_max):
    rng, used, seen, made, taken = random.Random(seed), {}, set(), {"name": [], "word": []}, -1
    candidates = list(passages(text))
    # Spread over all books: starts are tried in a shuffled order.
    order = list(range(len(candidates)))
    rng.shuffle(order)
    lines = set()
    for i in order:
        passage = candidates[i]
        covered = range(passage[0][0] - 1, passage[-1][0] + 2)
        if lines.intersection(covered):
            continue
        for kind in sorted(made, key=lambda k: len(made[k])):
            if len(made[kind]) >= (n + 1) // 2:
                continue
            digest = hashlib.sha256(" ".join(s for _, s, _ in passage).encode()).digest()
            found = None if digest in seen or passage[N_CONTEXT][1] in seen else example(passage, kind, rng, used, words_max)
            if found:
                seen.update((digest, passage[N_CONTEXT][1]))
                lines.update(covered)
                made[kind].append(found)
                break
        if all(len(m) >= (n + 1) // 2 for m in made.values()):
            break
    # In turn, so that the first few are of both kinds.
    return [e for pair in zip(made["name"], made["word"]) for e in pair][:n]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text"), parser.add_argument("-o", "--output", required=True)
parser.add_argument("--examples", type=int, default=100), parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--words-max", type=int, default=300, help="words of the twenty sentences, at most (default 300)")
args = parser.parse_args()
examples = make(read(args.text), args.examples, args.seed, args.words_max)
if len(examples) < args.examples:
    sys.exit(f"{args.text} gives {len(examples)} examples of both kinds, {args.examples} were asked for: "
             "take more text, or allow longer passages with --words-max")
lines = [json.dumps(e, ensure_ascii=False) + "\n" for e in examples]
with open(args.output, "w", encoding="utf-8") as out:
    out.writelines(lines)
print(f"{len(lines)} examples, {sum(e['kind'] == 'name' for e in examples)} of names, {sum(len(l.encode()) for l in lines)} bytes, "
      f"sha256 {hashlib.sha256(''.join(lines).encode()).hexdigest()[:16]}", file=sys.stderr)
