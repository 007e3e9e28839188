"""From documents to a dataset folder: byte-pair encoding trained on the spot, splitting, writing.

The prepare scripts of real text share this.
"""
from collections import Counter, defaultdict

import regex                             # comes with tiktoken
from tqdm import tqdm

from common import UserError
from data.dataset import make_tokenizer, write_data

# GPT-2's rule for what a merge may not cross: contractions, words, numbers, signs, white space
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def train_bpe(text, size, pattern=PATTERN):
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909): text -> `size` tokens, as bytes.

    The 256 bytes first, then one token per merge of the most frequent pair of neighbours; among
    equals, the pair that comes first in the text. Each distinct word is kept once with its count,
    and a merge touches only the words that contain the pair. Stops early where no pair is left.
    Raises UserError for a size below 256.
    """
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


def write_corpus(folder, documents, tokenizer, vocab_size):
    """Tokenize documents (strings) and write the dataset folder; the last tenth is validation.

    tokenizer: "chars" (documents follow each other), or "bpe" (trained here, vocab_size tokens
    with <end>) or "gpt2", which put <end> after each document. Raises UserError without text.
    """
    text = "\n".join(documents)
    if not text.strip():
        raise UserError("there is no text to prepare; name files that hold some")
    spec = {"kind": tokenizer}
    if tokenizer == "chars":
        spec["items"], documents = sorted(set(text)), [text]
    if tokenizer == "bpe":
        ranks = train_bpe(text, vocab_size - 1)
        spec |= {"pattern": PATTERN, "items": [token.decode("latin-1") for token in ranks]}
    encoder = make_tokenizer(spec)
    end = [] if tokenizer == "chars" else [encoder.vocab - 1]
    ids = [i for document in documents for i in encoder.encode(document) + end]
    cut = len(ids) * 9 // 10
    write_data(folder, ids[:cut], ids[cut:], tokenizer=spec)
    print(f"{folder}: {len(text):,} characters, {cut:,} + {len(ids) - cut:,} tokens of "
          f"{encoder.vocab:,} different ones")
