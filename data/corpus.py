"""From documents to a dataset folder: byte-pair encoding trained on the spot, splitting, writing.

The prepare scripts of real text share this. A corpus comes in parts: pairs (text, ends), where a
part that ends no document is followed by the next part of the same one. So a file may be larger
than memory, and is still one document.
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

# GPT-2's rule for what a merge may not cross: contractions, words, numbers, signs, white space
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

PARTS = "tokens.part", "ends.part"       # of a corpus that is being encoded
SAMPLE = 10 ** 8                         # characters
BLOCK = 2 ** 20                          # tokens or characters in memory at a time


BINS = "train.bin", "val.bin", "meta.json"       # what a prepare script writes


def fetch(file, url):
    """The text of a local file, or of a web address where `file` is None; see as_text.
    Raises UserError."""
    try:
        with open(file, "rb") if file else urllib.request.urlopen(url, timeout=60) as f:
            content = f.read()
    except http.client.HTTPException as e:               # IncompleteRead: it ended early
        raise UserError(f"{url} came only in part ({type(e).__name__}); try again, or give a local "
                        "copy by --file")
    except OSError as e:                                 # URLError is one
        if file:
            raise UserError(f"{file} cannot be read ({reason(e)}); give another --file")
        why = getattr(e, "reason", None) or reason(e)
        raise UserError(f"{url} cannot be downloaded ({why}); connect, or give a local copy by "
                        "--file")
    return as_text(content, f"--file {file}" if file else url)


def refuse_outputs(source, folder):
    """Raises UserError where reading `source`, a file or folder, would read what is written to
    `folder`: if one holds the other, or if source is a file that is written."""
    where, folder = Path(source).resolve(), Path(folder).resolve()
    written = [folder / name for name in BINS + PARTS]
    if where in written:
        raise UserError(f"{source} is a file that is written; give the text that it comes from")
    related = where == folder or where in folder.parents or folder in where.parents
    if where.is_dir() and related:
        raise UserError(f"{source} is, holds or lies in {folder}, where the dataset is written: "
                        "that would be read as text; give a folder beside it, or single files")


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
    documents: strings or parts, or a function that gives an iterator over them, for a corpus larger
    than memory: it is called for every pass. tokenizer: "chars" (documents follow each other in lines),
    or "bpe" (trained here on the first SAMPLE characters, vocab_size tokens with <end>) or "gpt2",
    which put <end> after each document. chunk: see `pieces`. Raises UserError without text, and
    where a split would be empty; an older dataset in the folder is then still there."""
    def read():
        for document in documents() if callable(documents) else documents:
            yield (document, True) if isinstance(document, str) else document
    if not any(text.strip() for text, _ in read()):
        raise UserError("there is no text to prepare; name files that hold some")
    spec = {"kind": tokenizer}
    if tokenizer == "chars":
        if chunk:
            raise UserError("--chunk needs tokens with an <end>: --tokenizer bpe or gpt2")
        spec["items"] = set()
        for line, _ in in_lines(read()):
            spec["items"] |= set(line)
        spec["items"] = sorted(spec["items"])
    if tokenizer == "bpe":
        ranks = train_bpe(beginning(read()), vocab_size - 1)
        spec |= {"pattern": PATTERN, "items": [token.decode("latin-1") for token in ranks]}
    taken = hold(folder / "val.bin")
    remove_parts(folder)
    try:
        append_tokens(folder, in_lines(read()) if tokenizer == "chars" else read(), spec)
        finish(folder, spec, lambda ends: int(ends[-1]) * 9 // 10, chunk)
    finally:
        remove_parts(folder)
        if taken:
            release(folder / "val.bin")
        with contextlib.suppress(OSError):               # it is not empty, if all went well
            folder.rmdir()


def remove_parts(folder):
    """Remove what append_tokens left."""
    for name in PARTS:
        (folder / name).unlink(missing_ok=True)


def in_lines(parts):
    """Parts with a line end before each document but the first."""
    begins = False
    for text, ends in parts:
        yield ("\n" + text if begins else text), ends
        begins = ends


def beginning(parts):
    """The first SAMPLE characters of the documents, in lines."""
    texts, left = [], SAMPLE
    for text, _ in in_lines(parts):
        texts.append(text[:left])
        left -= len(texts[-1])
        if not left:
            break
    return "".join(texts)


# a place between two words: before white space, where no token of GPT-2's rule reaches across
GAP = re.compile(rf"(?<!{BLANK})(?={BLANK})")


def cut(parts, size=BLOCK):
    """The same parts, none much longer than `size` characters, cut at places between words: so
    each document has the tokens that it has in one piece."""
    for text, ends in parts:
        begin = 0
        while len(text) - begin > size and (gap := GAP.search(text, begin + size)):
            yield text[begin:gap.start()], False
            begin = gap.start()
        yield text[begin:], ends


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


def batches(parts):
    """Lists of parts, of 1,000 or of BLOCK characters and a part."""
    batch, size = [], 0
    for text, ends in parts:
        batch.append((text, ends))
        size += len(text or "")
        if len(batch) == 1000 or size > BLOCK:
            yield batch
            batch, size = [], 0
    yield batch


def append_tokens(folder, parts, spec):
    """Encode documents, several at a time by threads, onto the two PARTS in `folder`: all tokens
    in a row, each document's <end> included, and the places where documents end. A document whose
    text is None has no tokens, not even an end."""
    encoder, dtype = make_tokenizer(spec), id_type(make_tokenizer(spec).vocab)
    last = [] if spec["kind"] == "chars" else [encoder.vocab - 1]
    tokens, places = (folder / name for name in PARTS)

    def encode(part):
        text, ends = part
        if text is None:
            return []
        return encoder.encode(text) + (last if ends else [])
    texts = ((text, ends) for part in parts for text, ends in (
        [part] if part[0] is None else cut([part])))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(tokens, "ab") as f, open(places, "ab") as g, ThreadPoolExecutor() as pool:
            place = f.tell() // np.dtype(dtype).itemsize
            for batch in batches(texts):
                for (_, ends), ids in zip(batch, pool.map(encode, batch)):
                    np.array(ids, dtype).tofile(f)
                    place += len(ids)
                    if ends:
                        np.array([place], np.int64).tofile(g)
                f.flush()                                # g never knows more than is there
                g.flush()
    except OSError as e:
        raise UserError(f"{tokens} cannot be written ({reason(e)}); {remedy(e)}, and give the "
                        "command again")


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


def finish(folder, spec, cut, chunk=None, more=None):
    """The PARTS become train.bin and val.bin, which begins at token cut(places where documents
    end), and meta.json. Raises UserError where one of the two would be empty; more: what helps,
    beside a smaller chunk [more text]."""
    vocab = make_tokenizer(spec).vocab
    tokens = np.memmap(folder / PARTS[0], id_type(vocab), "r")
    place = cut(np.memmap(folder / PARTS[1], np.int64, "r"))
    splits = {"train.bin": tokens[:place], "val.bin": tokens[place:]}
    least = chunk - 2 if chunk else 1        # tokens of the text in a row, or at all
    for name, part in splits.items():
        if len(part) < least:
            enough = 10 * least              # the smaller share is a tenth
            row, smaller = "a row", ""
            if chunk:
                row, smaller = f"a row of --chunk {chunk}", "a smaller --chunk or "
            raise UserError(f"{name} would be empty: its share is {len(part):,} of "
                            f"{len(tokens):,} tokens, and {row} takes {least:,}; give {smaller}"
                            + (more or f"more text, {enough:,} tokens or more"))
    meta = {"tokenizer": spec} | ({"stride": chunk, "texts": False} if chunk else {})
    write_blocks(folder, *[pieces(part, chunk, vocab - 1) for part in splits.values()], **meta)
    rows = [len(part) // least for part in splits.values()]
    sizes = [n * (chunk or 1) for n in rows]
    for name in PARTS:
        (folder / name).unlink()
    print(f"{folder}: {sizes[0]:,} + {sizes[1]:,} tokens of {vocab:,} different ones"
          + (f", in {rows[0]:,} + {rows[1]:,} rows" if chunk else ""))
