"""From documents to a dataset folder: byte-pair encoding trained on the spot, splitting,
writing.

The prepare scripts of real text share this. A corpus comes in parts: pairs (text, ends),
where a part that ends no document is followed by the next part of the same one. So a file
may be larger than memory, and is still one document.
"""
import contextlib
import http.client
import os
import re
import urllib.request
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import regex                             # comes with tiktoken
from tqdm import tqdm

from data.dataset import BLANK, id_type, make_tokenizer, write_blocks
from data.files import UserError, as_text, hold, reason, release, remedy

# GPT-2's rule for what no merge may cross: contractions, words, numbers, signs, white space
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

PARTS = "tokens.part", "ends.part"       # of a corpus that is being encoded
SAMPLE = 10 ** 8                         # characters
BLOCK = 2 ** 20                          # tokens or characters in memory at a time


# ---- what goes in

BINS = "train.bin", "val.bin", "meta.json"       # what a prepare script writes


def fetch(file, url):
    """The text of a local file, or of a web address where `file` is None; see as_text.
    Raises UserError."""
    try:
        if file:
            source = open(file, "rb")
        else:
            source = urllib.request.urlopen(url, timeout=60)
        with source as f:
            content = f.read()
    # IncompleteRead: it ended early
    except http.client.HTTPException as e:
        raise UserError(f"{url} came only in part ({type(e).__name__}); try again, or give "
                        "a local copy by --file")
    # a URLError is an OSError, and has the cause in its own way
    except OSError as e:
        if file:
            raise UserError(f"{file} cannot be read ({reason(e)}); give another --file")
        why = getattr(e, "reason", None) or reason(e)
        raise UserError(f"{url} cannot be downloaded ({why}); connect, or give a local "
                        "copy by --file")
    return as_text(content, f"--file {file}" if file else url)


def refuse_outputs(source, folder):
    """Raises UserError where reading `source`, a file or folder, would read what is written
    to `folder`: if one holds the other, or if source is a file that is written."""
    # whole paths, links followed: only these can be compared
    where = Path(source).resolve()
    folder = Path(folder).resolve()
    if where in [folder / name for name in BINS + PARTS]:
        raise UserError(f"{source} is a file that is written; give the text that it comes "
                        "from")
    related = where == folder or where in folder.parents or folder in where.parents
    if where.is_dir() and related:
        raise UserError(f"{source} is, holds or lies in {folder}, where the dataset is "
                        "written: that would be read as text; give a folder beside it, or "
                        "single files")


# ---- byte-pair encoding

class Pairs:
    """The pairs of neighbouring tokens in the words of a text: how often each occurs, and
    where. words: [tokens, count] of each distinct word, in order of first appearance."""

    def __init__(self, words):
        self.words = words
        self.counts = Counter()              # pair -> how often it occurs in the text
        self.where = defaultdict(set)        # pair -> numbers of the words that have it
        for i in range(len(words)):
            self.add(i)

    def add(self, i):
        """Count the pairs of word number i."""
        word, n = self.words[i]
        for pair in zip(word, word[1:]):
            self.counts[pair] += n
            self.where[pair].add(i)

    def remove(self, i):
        """Count the pairs of word number i no longer."""
        word, n = self.words[i]
        for pair in zip(word, word[1:]):
            self.counts[pair] -= n
            self.where[pair].discard(i)
            # so that `counts` is empty when no pair is left
            if not self.counts[pair]:
                del self.counts[pair], self.where[pair]

    def best(self):
        """The most frequent pair; among equals, the one that comes first in the text."""
        most = max(self.counts.values())
        equals = (pair for pair, n in self.counts.items() if n == most)
        return min(equals, key=self.first_place)

    def first_place(self, pair):
        """Where a pair comes first: (number of the word, place in it)."""
        i = min(self.where[pair])
        word, _ = self.words[i]
        return i, list(zip(word, word[1:])).index(pair)


def train_bpe(text, size, pattern=PATTERN):
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909): text -> `size` tokens, as
    bytes. The 256 bytes first, then one token per merge of the most frequent pair of
    neighbours; among equals, the pair that comes first in the text. Stops early where no
    pair is left. Raises UserError for a size below 256."""
    if size < 256:
        raise UserError(f"a vocabulary of {size} is less than the 256 bytes; ask for more")
    # each distinct word once, with its count: no merge reaches across words
    words = []
    for word, n in Counter(regex.findall(pattern, text)).items():
        words.append([[bytes([byte]) for byte in word.encode()], n])
    pairs = Pairs(words)

    tokens = [bytes([byte]) for byte in range(256)]
    for _ in tqdm(range(size - 256), desc="byte pairs", mininterval=1, ncols=90):
        if not pairs.counts:
            break
        best = pairs.best()
        tokens.append(best[0] + best[1])
        # only the words that have the pair change
        for i in list(pairs.where[best]):
            pairs.remove(i)
            words[i][0] = merge(words[i][0], best)
            pairs.add(i)
    return tokens


def merge(word, pair):
    """A word (list of tokens) with each occurrence of the pair made one token, left to
    right."""
    merged = []
    i = 0
    while i < len(word):
        n = 2 if tuple(word[i:i + 2]) == pair else 1     # tokens that become one
        merged.append(b"".join(word[i:i + n]))
        i += n
    return merged


# ---- a corpus at once

def write_corpus(folder, documents, tokenizer, vocab_size, chunk=None):
    """Tokenize documents and write the dataset folder; the last tenth is validation.
    documents: strings or parts, or a function that gives an iterator over them, for a
    corpus larger than memory: it is called for every pass. tokenizer: "chars" (documents
    follow each other in lines), or "bpe" (trained here on the first SAMPLE characters,
    vocab_size tokens with <end>) or "gpt2", which put <end> after each document. chunk: see
    `pieces`. Raises UserError without text, and where a split would be empty; an older
    dataset in the folder is then still there."""
    def read():
        """All parts, from the beginning."""
        for document in documents() if callable(documents) else documents:
            yield (document, True) if isinstance(document, str) else document

    def place(ends):
        """The token with which the last tenth begins."""
        return int(ends[-1]) * 9 // 10

    if not any(text.strip() for text, _ in read()):
        raise UserError("there is no text to prepare; name files that hold some")
    if tokenizer == "chars" and chunk:
        raise UserError("--chunk needs tokens with an <end>: --tokenizer bpe or gpt2")
    spec = tokenizer_spec(read, tokenizer, vocab_size)
    taken = hold(folder / "val.bin")
    # what a killed run left does not belong to these documents
    remove_parts(folder)
    try:
        append_tokens(folder, in_lines(read()) if tokenizer == "chars" else read(), spec)
        finish(folder, spec, place, chunk)
    finally:
        remove_parts(folder)
        if taken:
            release(folder / "val.bin")
        # it goes if it is empty; if all went well, it is not
        with contextlib.suppress(OSError):
            folder.rmdir()


def tokenizer_spec(read, tokenizer, vocab_size):
    """What make_tokenizer needs for a corpus. read: a function that gives its parts; see
    write_corpus for the rest."""
    spec = {"kind": tokenizer}
    if tokenizer == "chars":
        # all characters that there are
        items = set()
        for line, _ in in_lines(read()):
            items |= set(line)
        spec["items"] = sorted(items)
    if tokenizer == "bpe":
        # one token less than asked for: <end> is added to them
        ranks = train_bpe(beginning(read()), vocab_size - 1)
        spec["pattern"] = PATTERN
        spec["items"] = [token.decode("latin-1") for token in ranks]
    return spec


def remove_parts(folder):
    """Remove what append_tokens left."""
    for name in PARTS:
        (folder / name).unlink(missing_ok=True)


# ---- parts of documents

def in_lines(parts):
    """Parts with a line end before each document but the first."""
    begins = False               # whether this part begins a document, and not the first
    for text, ends in parts:
        yield ("\n" + text if begins else text), ends
        begins = ends


def beginning(parts):
    """The first SAMPLE characters of the documents, in lines."""
    texts = []
    left = SAMPLE                # characters still wanted
    for text, _ in in_lines(parts):
        texts.append(text[:left])
        left -= len(texts[-1])
        if not left:
            break
    return "".join(texts)


# a place between two words: before white space, which no token of GPT-2's rule reaches
# across
GAP = re.compile(rf"(?<!{BLANK})(?={BLANK})")


def cut(parts, size=BLOCK):
    """The same parts, none much longer than `size` characters, cut at places between words:
    so each document has the tokens that it has in one piece. A text that is None stays."""
    for text, ends in parts:
        if text is None:
            yield text, ends
            continue
        begin = 0
        while len(text) - begin > size:
            gap = GAP.search(text, begin + size)
            # one word up to the end: it stays whole
            if gap is None:
                break
            yield text[begin:gap.start()], False
            begin = gap.start()
        # only the last piece can end a document
        yield text[begin:], ends


def batches(parts):
    """Lists of parts, of 1,000 or of BLOCK characters and a part."""
    batch = []
    size = 0                     # characters in it
    for text, ends in parts:
        batch.append((text, ends))
        size += len(text or "")
        if len(batch) == 1000 or size > BLOCK:
            yield batch
            batch = []
            size = 0
    yield batch


# ---- from parts to tokens on the disk

def begun(folder, dtype):
    """How many documents an interrupted append_tokens left whole in `folder`; the rest is
    cut off, so that it can go on after them."""
    tokens = folder / PARTS[0]
    ends = folder / PARTS[1]
    # one is of no use without the other
    if not (tokens.exists() and ends.exists()):
        tokens.unlink(missing_ok=True)
        ends.unlink(missing_ok=True)
        return 0
    # documents whose end lies within the tokens that are there
    width = np.dtype(dtype).itemsize         # bytes of a token
    places = np.fromfile(ends, np.int64)
    n = int(np.searchsorted(places, tokens.stat().st_size // width, "right"))
    last = int(places[n - 1]) if n else 0    # where the last of them ends
    os.truncate(ends, 8 * n)                 # an int64 each
    os.truncate(tokens, last * width)
    return n


def append_tokens(folder, parts, spec):
    """Encode documents, several at a time by threads, onto the two PARTS in `folder`: all
    tokens in a row, each document's <end> included, and the places where documents end. A
    document whose text is None has no tokens, not even an end."""
    encoder = make_tokenizer(spec)
    dtype = id_type(encoder.vocab)
    last = [] if spec["kind"] == "chars" else [encoder.vocab - 1]        # <end>
    tokens = folder / PARTS[0]
    places = folder / PARTS[1]

    def encode(part):
        text, ends = part
        if text is None:
            return []
        ids = encoder.encode(text)
        return ids + last if ends else ids

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(tokens, "ab") as f, open(places, "ab") as g, ThreadPoolExecutor() as pool:
            # "ab" goes on at the end: as many tokens are there already
            place = f.tell() // np.dtype(dtype).itemsize
            for batch in batches(cut(parts)):
                for (_, ends), ids in zip(batch, pool.map(encode, batch)):
                    np.array(ids, dtype).tofile(f)
                    place += len(ids)
                    if ends:
                        np.array([place], np.int64).tofile(g)
                # tokens first: so g never has an end beyond them
                f.flush()
                g.flush()
    except OSError as e:
        raise UserError(f"{tokens} cannot be written ({reason(e)}); {remedy(e)}, and give "
                        "the command again")


def pieces(tokens, chunk, end):
    """A long row of tokens in blocks, as it is, or, with chunk, in the published form
    (MDLM, SDTT): every `chunk` tokens an <end>, chunk - 2 of the row, and another <end>;
    the rest is left out."""
    if chunk is None:
        for i in range(0, len(tokens), BLOCK):
            yield tokens[i:i + BLOCK]
        return
    rows = BLOCK // chunk + 1            # of a block
    width = chunk - 2                    # tokens of the text in a row
    for i in range(0, len(tokens), rows * width):
        block = tokens[i:i + rows * width]
        # whole rows only; the last block may have fewer, N
        N = len(block) // width
        block = block[:N * width].reshape(N, width)                      # (N, chunk - 2)
        # a column of <end> before them and one after: (N, chunk)
        yield np.pad(block, ((0, 0), (1, 1)), constant_values=end)


def finish(folder, spec, cut, chunk=None, more=None):
    """The PARTS become train.bin and val.bin, which begins at token cut(places where
    documents end), and meta.json. Raises UserError where one of the two would be empty;
    more: what helps, beside a smaller chunk [more text]."""
    # the two splits, on the disk
    vocab = make_tokenizer(spec).vocab
    tokens = np.memmap(folder / PARTS[0], id_type(vocab), "r")
    place = cut(np.memmap(folder / PARTS[1], np.int64, "r"))
    train = tokens[:place]
    val = tokens[place:]
    least = chunk - 2 if chunk else 1    # tokens of the text in a row, or at all
    for name, part in (("train.bin", train), ("val.bin", val)):
        if len(part) < least:
            raise UserError(f"{name} would be empty: its share is {len(part):,} of "
                            f"{len(tokens):,} tokens, and {too_short(chunk, least, more)}")

    # the same tokens in blocks, as the dataset's files
    meta = {"tokenizer": spec}
    if chunk:
        meta |= {"stride": chunk, "texts": False}        # a row is no text of its own
    end = vocab - 1
    write_blocks(folder, pieces(train, chunk, end), pieces(val, chunk, end), **meta)
    for name in PARTS:
        (folder / name).unlink()

    # what was written, in a line
    train_rows = len(train) // least
    val_rows = len(val) // least
    width = chunk or 1                   # tokens of a row; without rows each stands alone
    line = (f"{folder}: {train_rows * width:,} + {val_rows * width:,} tokens of {vocab:,} "
            "different ones")
    if chunk:
        line += f", in {train_rows:,} + {val_rows:,} rows"
    print(line)


def too_short(chunk, least, more):
    """How many tokens a split needs, and the remedy where it has fewer, in words; see
    finish."""
    # the smaller split is a tenth of the text
    remedies = more or f"more text, {10 * least:,} tokens or more"
    if not chunk:
        return f"a row takes {least:,}; give {remedies}"
    return (f"a row of --chunk {chunk} takes {least:,}; give a smaller --chunk or "
            f"{remedies}")
