"""Rules that make raw books and tokenised Wikipedia articles into plain paragraphs, one a line."""
import re

MIN_CHAPTER_CHARS = 400
MIN_ARTICLE_CHARS = 1000

# One way to write each mark: a small model should not spend its capacity on typography.
MARKS = str.maketrans({
    "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "‚": "'", "‛": "'", "\u00a0": " ", "\u00ad": None,
    "‐": "-", "‑": "-", "―": "—", "\ufeff": None, "\u200b": None, "\u2009": " ", "\t": " ", "\r": "\n",
})  # fmt: skip

HEADING = re.compile(
    r"^\W{0,3}(chapter|book|part|volume|vol|letter|scene|phase|prologue|epilogue|introduction)\b.{0,90}$"
    r"|^\W{0,3}[IVXLC]{1,7}\.?\W{0,3}$|^\W{0,3}\d{1,3}\.?\W{0,3}$",
    re.IGNORECASE,
)
# Lines that a printer, not the author, put at the end of a book.
COLOPHON = re.compile(
    r"\bprinters?\b|printed (by|at|in)\b|\b(whitefriars|tauchnitz|unwin brothers|university press)\b|^\W*finis\W*$"
    r"|^\W*(the )?end\W*$|^\W*-->\W*$|limited, (london|edinburgh)|sons, ltd|^[\W_]+$",
    re.IGNORECASE,
)
COLOPHON_LINES = 6


def words(text):
    """Lower-case words, without marks: what two editions of a book share."""
    return re.findall(r"[a-z]+", text.lower())


def line(text):
    """One paragraph with uniform marks and single spaces."""
    text = text.translate(MARKS)
    text = re.sub(r"_+([^_\n]+?)_+", r"\1", text)  # _italics_ of plain-text editions
    text = re.sub(r"\s*-{2,}\s*", "—", text)
    text = re.sub(r"…", "...", text)
    text = re.sub(r"\[\d+\]", "", text)  # footnote marks
    return re.sub(r" +", " ", text.replace("|", "").replace("\ufffd", "")).strip()


def book(text):
    """A book's chapters, each a text of lines; short pieces (a heading, a motto) join what follows them."""
    lines = [clean for clean in map(line, text.split("\n")) if re.search(r"\w", clean)]
    while lines and COLOPHON.search(lines[-1]):
        lines.pop()
    tail = lines[-COLOPHON_LINES:]
    lines[-COLOPHON_LINES:] = [last for last in tail if len(last) > 120 or not COLOPHON.search(last)]
    chapters, current = [], []
    for one in lines:
        if HEADING.match(one) and sum(map(len, current)) >= MIN_CHAPTER_CHARS:
            chapters.append("\n".join(current))
            current = []
        current.append(one)
    if current:
        chapters.append("\n".join(current))
    return chapters


def detokenised(text):
    """A wikitext line with its spaces where a writer puts them."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$£€#]) ", r"\1", text)
    text = re.sub(r" '(s|t|re|ve|ll|d|m)\b", r"'\1", text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    text = re.sub(r"(^| )' ([^']*?) '(?= |$|[,.;:])", r"\1'\2'", text)
    return line(text)


def wikitext_articles(text):
    """Articles as one-chapter documents. Sentences with `<unk>`, which stands for a rare word, are left out."""
    for body in re.split(r"\n(?= = [^=])", "\n" + text):
        lines = []
        for raw in body.split("\n"):
            raw = raw.strip()
            if raw.startswith("="):
                lines.append(detokenised(raw.strip("= ")) if "<unk>" not in raw else "")
                continue
            sentences = re.split(r"(?<=[.!?]) (?=[A-Z\"(])", detokenised(raw))
            lines.append(" ".join(s for s in sentences if "<unk>" not in s))
        article = "\n".join(one for one in lines if re.search(r"\w", one))
        if len(article) >= MIN_ARTICLE_CHARS:
            yield [article]
