"""More of what samples are worth than data/measures.py: pure functions of texts x (n, L),
token ids, each with a standard error.

Generative perplexity never stands without entropy and diversity: a model that repeats
itself pleases the judge. Where a measure depends on how many texts there are (self-BLEU,
distinct-n), its error is of the value at that number, and only values at equal numbers can
be compared.
"""
from collections import Counter

import numpy as np
import torch

from data.dataset import retokenise
from data.measures import add_mean, jackknife, mean_se
from data.script import package

GRAM = 8                                 # tokens of a piece that is looked for in train.bin
SEARCHED = 10 ** 8                       # tokens of train.bin that it is looked for in
BLOCK = 2 ** 20                          # of these at a time


# ---- diversity

def grams(rows, n):
    """The n-grams of each of rows (lists of ids), with their counts: a list of Counters."""
    counters = []
    for row in rows:
        shifted = [row[i:] for i in range(n)]
        counters.append(Counter(zip(*shifted)))
    return counters


def self_bleu(x, most=4):
    """Self-BLEU-1 .. -`most` (arXiv 1802.01886): the mean over texts of the BLEU of a text
    against all others as references, in tokens, without smoothing; 1 where all are the
    same. x (n, L), all of one length, so that there is no brevity penalty; n >= 3. A list
    of (value, SE), the error by leaving out each text in turn as a text and as a
    reference."""
    n, rows = len(x), x.tolist()
    # [i, j]: the sum of log precisions of text i without reference j; [i, i]: with all
    # others
    log_p = torch.zeros(n, n, dtype=torch.float64)
    values = []
    for order in range(1, most + 1):
        hits = clipped_hits(grams(rows, order))                      # (n, n)
        log_p += (hits / (x.shape[1] - order + 1)).log()
        bleu = (log_p / order).exp()
        # the mean without text j, for each j
        without = (bleu.sum(0) - bleu.diagonal()) / (n - 1)
        whole = bleu.diagonal().mean().item()
        _, se = jackknife(whole, without)
        values.append((whole, se))
    return values


def clipped_hits(counts):
    """Of n texts with n-grams `counts` (Counters), BLEU's clipped matches (n, n): [i, j]
    those of text i without reference j, [i, i] with all others."""
    n = len(counts)
    # the three highest counts of each n-gram, with their texts
    holders = {}
    for i, counter in enumerate(counts):
        for gram, count in counter.items():
            known = holders.get(gram, [])
            holders[gram] = sorted([*known, (count, i)], reverse=True)[:3]
    hits = torch.zeros(n, n, dtype=torch.float64)
    for i, counter in enumerate(counts):
        for gram, count in counter.items():
            # the highest count among the others, text j's, and the second highest
            others = [holder for holder in holders[gram] if holder[1] != i]
            if not others:
                continue
            highest, j = others[0]
            second = others[1][0] if len(others) > 1 else 0
            hits[i] += min(highest, count)
            hits[i, j] -= min(highest, count) - min(second, count)
    return hits


def distinct(x, most=4):
    """Distinct-1 .. -`most` (arXiv 1510.03055): different n-grams of all texts x (n, L)
    together, as a share of all n-grams. A list of (value, SE), the error by leaving out
    each text in turn."""
    n, values = len(x), []
    for order in range(1, most + 1):
        counts = grams(x.tolist(), order)
        # how many texts have an n-gram, and how many n-grams a text has alone: (n,)
        holders = Counter()
        for counter in counts:
            holders.update(counter.keys())
        alone = np.zeros(n)
        for i, counter in enumerate(counts):
            alone[i] = sum(holders[gram] == 1 for gram in counter)
        each = x.shape[1] - order + 1    # n-grams of a text
        without = (len(holders) - alone) / ((n - 1) * each)
        whole = len(holders) / (n * each)
        _, se = jackknife(whole, without)
        values.append((whole, se))
    return values


def repetition(x, order=4):
    """Share of a text's n-grams that have occurred in it before (arXiv 1908.04319), and its
    SE."""
    each = x.shape[1] - order + 1        # n-grams of a text
    shares = [1 - len(counter) / each for counter in grams(x.tolist(), order)]
    return mean_se(torch.tensor(shares))


def hashes(rows):
    """A number of 64 bits for each piece of GRAM tokens in rows (..., L): (..., L - GRAM +
    1), or (..., 0) where rows are shorter than a piece."""
    rows = rows.astype(np.uint64)
    width = max(0, rows.shape[-1] - GRAM + 1)
    total = np.zeros(rows.shape[:-1] + (width,), np.uint64)
    if width == 0:
        return total
    factor = np.uint64(0x9E3779B97F4A7C15)
    for i in range(GRAM):                # products wrap around
        total = total * factor + rows[..., i:i + width] + np.uint64(1)
    return total


def seen(x, data):
    """Share of each text's pieces of GRAM tokens that the training data holds, and its SE;
    of the first SEARCHED tokens. (None, None) without training data."""
    mine = hashes(x.numpy())                                         # (n, pieces)
    if not len(data.train) or not mine.size:
        return None, None
    wanted = np.unique(mine)
    known = np.zeros(len(wanted), bool)
    for block in blocks(data):
        known |= np.isin(wanted, hashes(block))
    return mean_se(torch.from_numpy(known[np.searchsorted(wanted, mine)].mean(-1)))


def blocks(data):
    """The training tokens, BLOCK or so at a time: one text a row, so that no piece reaches
    from text to text; or, of running text, blocks that overlap by all but one token of a
    piece."""
    train = data.train[:SEARCHED]
    if data.texts:
        size = max(1, BLOCK // data.stride) * data.stride
        for i in range(0, len(train), size):
            part = np.asarray(train[i:i + size])
            whole = len(part) // data.stride * data.stride
            yield part[:whole].reshape(-1, data.stride)
    else:
        for i in range(0, len(train), BLOCK):
            yield np.asarray(train[i:i + BLOCK + GRAM - 1])


def diversity(x, data):
    """All of these, some of which look at all pairs of texts: self_bleu1..4, distinct1..4,
    seen, repetition, each with NAME_se."""
    row, x = {}, x.cpu()
    for name, values in (("self_bleu", self_bleu(x)), ("distinct", distinct(x))):
        for order, value in enumerate(values, 1):
            add_mean(row, f"{name}{order}", value)
    add_mean(row, "seen", seen(x, data))
    add_mean(row, "repetition", repetition(x))
    return row


@torch.no_grad()
def mauve(gpt2, x, y, tokenizer, seeds=5, **settings):
    """MAUVE (arXiv 2102.01454) between texts x and y, lists of ids, in 0..1, 1 = alike:
    (mean over seeds of its clustering, SE). Features: the last hidden state of gpt2, which
    is (model, tokenizer), on each text; SDTT's scaling factor of 5. Needs mauve-text."""
    model, tokens = gpt2
    library = package("mauve")

    def features(texts):
        """The last state of each text, (n, C)."""
        states = []
        for row in texts:
            ids = retokenise(row, tokenizer, tokens)[:model.config.context]
            if not ids:                  # an empty text: its end alone
                ids = [tokens.vocab - 1]
            z = torch.tensor([ids], device=model.embed.weight.device)        # (1, L)
            h = model.hidden(z)[0, -1].float()                       # (C,)
            states.append(model.norm(h).cpu().numpy())
        return np.stack(states)

    p, q = features(x), features(y)
    values = []
    for seed in range(seeds):
        result = library.compute_mauve(p_features=p, q_features=q, mauve_scaling_factor=5,
                                       seed=seed, verbose=False, **settings)
        values.append(result.mauve)
    return mean_se(torch.tensor(values))
