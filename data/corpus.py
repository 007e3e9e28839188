"""From documents to a dataset folder: byte-pair encoding trained on the spot, splitting, writing.

The prepare scripts of real text share this.
"""
import os
import urllib.request
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import regex                             # comes with tiktoken
from tqdm import tqdm

from common import UserError
from data.dataset import id_type, make_tokenizer, write_blocks

# GPT-2's rule for what a merge may not cross: contractions, words, numbers, signs, white space
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

PARTS = "tokens.part", "ends.part"       # of a corpus that is being encoded
SAMPLE = 10 ** 8                         # characters
BLOCK = 2 ** 20                          # tokens or characters in memory at a time


def fetch(file, url):
    """The text of a local file, or of a web address where `file` is None. Raises UserError."""
    try:
        with open(file, "rb") if file else urllib.request.urlopen(url, timeout=60) as f:
            return f.read().decode()
    except (OSError, UnicodeDecodeError) as e:                       # URLError is an OSError
        raise UserError(f"{file or url} cannot be read ({e}); give a local copy by --file")


def train_bpe(text, size, pattern=PATTERN):
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909): text -> `size` tokens, as bytes.
    The 256 bytes first, then one token per merge of the most frequent pair of neighbours; among
    equals, the pair that comes first in the text. Each distinct word is kept once with its count,
    and a merge touches only the words that contain the pair. Stops early where no pair is left.
    Raises UserError for a size below 256."""
    if size < 256:
        raise UserError(f"a vocabulary of {size} is less than the 256 bytes; ask for more")
    tokens = [bytes([i]) for i in range(256)]
    words = [[word, n] for word, n in Counter(regex.findall(pattern, text)).items()]
    pairs, where = Counter(), defaultdict(set)           # pair -> count, -> numbers of words
    for i, (word, n) in enumerate(words):
        words[i][0] = [bytes([b]) for b in word.encode()]
        for pair in zip(words[i][0], words[i][0][1:]):
            pairs[pair] += n
            where[pair].add(i)

    def first_place(pair):                               # words are in order of first appearance
        i = min(where[pair])
        return i, next(j for j, p in enumerate(zip(words[i][0], words[i][0][1:])) if p == pair)

    for _ in tqdm(range(size - 256), desc="byte pairs", mininterval=1, ncols=90):
        if not pairs:
            break
        most = max(pairs.values())
        best = min((pair for pair, n in pairs.items() if n == most), key=first_place)
        tokens.append(best[0] + best[1])
        for i in list(where[best]):
            word, n = words[i]
            for pair in zip(word, word[1:]):
                pairs[pair] -= n
                where[pair].discard(i)
                if not pairs[pair]:
                    del pairs[pair], where[pair]
            words[i][0] = word = merge(word, best)
            for pair in zip(word, word[1:]):
                pairs[pair] += n
                where[pair].add(i)
    return tokens


def merge(word, pair):
    """A word (list of tokens) with each occurrence of the pair made one token, left to right."""
    merged, i = [], 0
    while i < len(word):
        n = 2 if tuple(word[i:i + 2]) == pair else 1
        merged.append(b"".join(word[i:i + n]))
        i += n
    return merged


def write_corpus(folder, documents, tokenizer, vocab_size, chunk=None):
    """Tokenize documents and write the dataset folder; the last tenth is validation.
    documents: strings, or a function that gives an iterator over them, for a corpus larger than
    memory: it is called for every pass. tokenizer: "chars" (documents follow each other in lines),
    or "bpe" (trained here on the first SAMPLE characters, vocab_size tokens with <end>) or "gpt2",
    which put <end> after each document. chunk: see `pieces`. Raises UserError without text."""
    read = documents if callable(documents) else lambda: documents
    if not any(document.strip() for document in read()):
        raise UserError("there is no text to prepare; name files that hold some")
    spec = {"kind": tokenizer}
    if tokenizer == "chars":
        if chunk:
            raise UserError("--chunk needs tokens with an <end>: --tokenizer bpe or gpt2")
        spec["items"] = set()
        for line in in_lines(read()):
            spec["items"] |= set(line)
        spec["items"] = sorted(spec["items"])
    if tokenizer == "bpe":
        ranks = train_bpe(beginning(read()), vocab_size - 1)
        spec |= {"pattern": PATTERN, "items": [token.decode("latin-1") for token in ranks]}
    for name in PARTS:
        (folder / name).unlink(missing_ok=True)
    append_tokens(folder, in_lines(read()) if tokenizer == "chars" else read(), spec)
    finish(folder, spec, lambda ends: int(ends[-1]) * 9 // 10, chunk)


def in_lines(documents):
    """Documents with line ends between them."""
    return ("\n" * (i > 0) + document for i, document in enumerate(documents))


def beginning(documents):
    """The first SAMPLE characters of documents, in lines."""
    parts, left = [], SAMPLE
    for line in in_lines(documents):
        parts.append(line[:left])
        left -= len(parts[-1])
        if not left:
            break
    return "".join(parts)


def begun(folder, dtype):
    """How many documents an interrupted append_tokens left whole in `folder`; the rest is cut off,
    so that it can go on after them."""
    tokens, ends = (folder / name for name in PARTS)
    if not (tokens.exists() and ends.exists()):
        tokens.unlink(missing_ok=True)
        ends.unlink(missing_ok=True)
        return 0
    places = np.fromfile(ends, np.int64)
    n = int(np.searchsorted(places, tokens.stat().st_size // np.dtype(dtype).itemsize, "right"))
    os.truncate(ends, 8 * n)
    os.truncate(tokens, int(places[n - 1]) * np.dtype(dtype).itemsize if n else 0)
    return n


def batches(documents):
    """Lists of documents, of 1,000 or of BLOCK characters and a document."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if len(batch) == 1000 or size > BLOCK:
            yield batch
            batch, size = [], 0
    yield batch


def append_tokens(folder, documents, spec):
    """Encode documents, several at a time by threads, onto the two PARTS in `folder`: all tokens
    in a row, each document's <end> included, and the places where documents end."""
    encoder, dtype = make_tokenizer(spec), id_type(make_tokenizer(spec).vocab)
    last = [] if spec["kind"] == "chars" else [encoder.vocab - 1]
    tokens, ends = (folder / name for name in PARTS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(tokens, "ab") as f, open(ends, "ab") as g, ThreadPoolExecutor() as pool:
            place = f.tell() // np.dtype(dtype).itemsize
            for batch in batches(documents):
                for ids in pool.map(encoder.encode, batch):
                    np.array(ids + last, dtype).tofile(f)
                    place += len(ids + last)
                    np.array([place], np.int64).tofile(g)
                f.flush()                                # g never knows more than is there
                g.flush()
    except OSError as e:
        raise UserError(f"{tokens} cannot be written ({e}); make room and give the command again")


def pieces(tokens, chunk, end):
    """A long row of tokens in blocks, as it is, or, with chunk, in the published form (MDLM, SDTT):
    every `chunk` tokens an <end>, chunk - 2 of the row, and another <end>; the rest is left out."""
    rows, width = (1, BLOCK) if chunk is None else (BLOCK // chunk + 1, chunk - 2)
    for i in range(0, len(tokens), rows * width):
        block = tokens[i:i + rows * width]
        if chunk:
            block = np.pad(block[:len(block) // width * width].reshape(-1, width), ((0, 0), (1, 1)),
                           constant_values=end)
        yield block


def finish(folder, spec, cut, chunk=None):
    """The PARTS become train.bin and val.bin, which begins at token cut(places where documents
    end), and meta.json."""
    vocab = make_tokenizer(spec).vocab
    tokens = np.memmap(folder / PARTS[0], id_type(vocab), "r")
    place = cut(np.memmap(folder / PARTS[1], np.int64, "r"))
    meta = {"tokenizer": spec} | ({"stride": chunk, "texts": False} if chunk else {})
    write_blocks(folder, *[pieces(part, chunk, vocab - 1)
                           for part in (tokens[:place], tokens[place:])], **meta)
    for name in PARTS:
        (folder / name).unlink()
    print(f"{folder}: {place:,} + {len(tokens) - place:,} tokens of {vocab:,} different ones")
