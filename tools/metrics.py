"""What samples are worth: pure functions of texts x (n, L), token ids, each with a standard error.

Generative perplexity never stands without entropy and diversity: a model that repeats itself
pleases the judge. Where a measure depends on how many texts there are (self-BLEU, distinct-n), its
error is of the value at that number, and only values at equal numbers can be compared.
"""
from collections import Counter

import numpy as np
import torch

from common import package
from data.dataset import retokenise
from data.measures import mean_se, add_mean

GRAM = 8                             # tokens of a piece that is looked for in the training data
SEARCHED, BLOCK = 10 ** 8, 2 ** 20   # tokens of train.bin that it is looked for in, and at a time


def jackknife(whole, without):
    """A statistic of n texts, and its standard error from its values without (n,) one of them."""
    n, without = len(without), torch.as_tensor(without, dtype=torch.float64)
    return whole, ((n - 1) / n * (without - without.mean()).square().sum()).sqrt().item()


# ---- diversity

def grams(rows, n):
    """The n-grams of each of rows (lists of ids), with their counts: a list of Counters."""
    return [Counter(zip(*[row[i:] for i in range(n)])) for row in rows]


def self_bleu(x, most=4):
    """Self-BLEU-1 .. -`most` (arXiv 1802.01886): the mean over texts of the BLEU of a text against
    all others as references, in tokens, without smoothing; 1 where all are the same. x (n, L), all
    of one length, so that there is no brevity penalty; n >= 3. A list of (value, SE), the error by
    leaving out each text in turn as a text and as a reference."""
    n, rows = len(x), x.tolist()
    log_p = torch.zeros(n, n, dtype=torch.float64)       # [i, j]: of i without reference j, sum of
    found = []                                           # log precisions; [i, i]: with all others
    for order in range(1, most + 1):
        counts, holders = grams(rows, order), {}
        for i, counter in enumerate(counts):             # the three highest counts of each n-gram
            for gram, count in counter.items():
                holders[gram] = sorted(holders.get(gram, []) + [(count, i)], reverse=True)[:3]
        hits = torch.zeros(n, n, dtype=torch.float64)
        for i, counter in enumerate(counts):
            for gram, count in counter.items():
                (a, j), (b, _) = ([h for h in holders[gram] if h[1] != i] + [(0, i)] * 2)[:2]
                hits[i] += min(a, count)
                if j != i:
                    hits[i, j] -= min(a, count) - min(b, count)
        log_p += (hits / (x.shape[1] - order + 1)).log()
        bleu = (log_p / order).exp()
        without = (bleu.sum(0) - bleu.diagonal()) / (n - 1)          # the mean without text j
        found.append(jackknife(bleu.diagonal().mean().item(), without))
    return found


def distinct(x, most=4):
    """Distinct-1 .. -`most` (arXiv 1510.03055): different n-grams of all texts x (n, L) together,
    as a share of all n-grams. A list of (value, SE), the error by leaving out each text in turn."""
    n, found = len(x), []
    for order in range(1, most + 1):
        counts = grams(x.tolist(), order)
        texts = Counter(gram for counter in counts for gram in counter)      # how many have it
        total, each = sum(texts[g] > 0 for g in texts), x.shape[1] - order + 1
        only = np.array([sum(texts[gram] == 1 for gram in counter) for counter in counts])
        found.append(jackknife(total / (n * each), (total - only) / ((n - 1) * each)))
    return found


def repetition(x, order=4):
    """Share of a text's n-grams that have occurred in it before (arXiv 1908.04319), and its SE."""
    return mean_se(torch.tensor([1 - len(counter) / (x.shape[1] - order + 1)
                                 for counter in grams(x.tolist(), order)]))


def hashes(rows):
    """A number of 64 bits for each piece of GRAM tokens in rows (..., L): (..., L - GRAM + 1)."""
    rows, width = rows.astype(np.uint64), rows.shape[-1] - GRAM + 1
    total = np.zeros(rows.shape[:-1] + (max(0, width),), np.uint64)
    for i in range(GRAM if width > 0 else 0):            # wraps around
        total = total * np.uint64(0x9E3779B97F4A7C15) + rows[..., i:i + width] + np.uint64(1)
    return total


def seen(x, data):
    """Share of each text's pieces of GRAM tokens that the training data holds, and its SE; of the
    first SEARCHED tokens. (None, None) without training data."""
    mine, train = hashes(x.numpy()), data.train[:SEARCHED]
    if not len(train) or not mine.size:
        return None, None
    wanted, size = np.unique(mine), BLOCK
    known = np.zeros(len(wanted), bool)
    if data.texts:                                       # pieces do not reach from text to text
        size = max(1, size // data.stride) * data.stride
    for i in range(0, len(train), size):
        part = np.asarray(train[i:i + size + (0 if data.texts else GRAM - 1)])
        part = part[:len(part) // data.stride * data.stride].reshape(
            -1, data.stride) if data.texts else part
        known |= np.isin(wanted, hashes(part))
    return mean_se(torch.from_numpy(known[np.searchsorted(wanted, mine)].mean(-1)))


def diversity(x, data):
    """The others, some of which look at all pairs of texts: self_bleu1..4, distinct1..4, seen,
    repetition, each with NAME_se."""
    row, x = {}, x.cpu()
    for name, values in (("self_bleu", self_bleu(x)), ("distinct", distinct(x))):
        for order, value in enumerate(values, 1):
            add_mean(row, f"{name}{order}", value)
    add_mean(row, "seen", seen(x, data))
    add_mean(row, "repetition", repetition(x))
    return row


@torch.no_grad()
def mauve(gpt2, x, y, tokenizer, seeds=5, **settings):
    """MAUVE (arXiv 2102.01454) between texts x and y (n, L), in 0..1, 1 = alike: (mean over seeds
    of its clustering, SE). Features: the last hidden state of gpt2, (model, tokenizer), on each
    text; SDTT's scaling factor of 5. Needs mauve-text."""
    (model, tokens), package_ = gpt2, package("mauve")

    def features(texts):
        rows = [retokenise(row, tokenizer, tokens)[:model.config.context] or [tokens.vocab - 1]
                for row in texts.tolist()]
        device = next(model.parameters()).device
        return np.stack([model.norm(model.hidden(torch.tensor([row], device=device))[0, -1].float()
                                    ).cpu().numpy() for row in rows])
    p, q = features(x), features(y)
    return mean_se(torch.tensor([package_.compute_mauve(
        p_features=p, q_features=q, mauve_scaling_factor=5, seed=seed, verbose=False,
        **settings).mauve for seed in range(seeds)]))
