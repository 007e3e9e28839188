"""What texts are worth: the few measures that distill.py's table and bench.py need.

Each is a pure function of texts x (n, L), and returns a mean over texts with its standard
error. No single one is enough: perplexity alone is lowest for a text that repeats itself,
so both entropies stand beside it. tools/metrics.py has more.
"""
import math
from collections import Counter

import torch

from data.devices import in_float64
from data.dataset import (choices, copies, copies_expected, make_tokenizer, oracle,
                          retokenise)
from data.script import EXACT
from model import nll

JUDGE_BATCH = 32                         # texts that the judge reads at a time
NO_VALUE = (None, None)                  # neither a mean nor an error
VERSION = 2              # one more where texts or measures change: kept rows are then stale


def mean_se(values):
    """The mean of values (n,) and its standard error; None for the mean of no values, and
    for the error of fewer than two."""
    values, n = in_float64(values), len(values)
    if n == 0:
        return None, None
    if n == 1:
        return values.mean().item(), None
    return values.mean().item(), (values.std() / math.sqrt(n)).item()


def jackknife(whole, left_out):
    """A statistic of n texts freed of most of its bias, and its standard error. whole: its
    value of all texts; left_out (n,): its values with one text left out. If the bias is c/n
    with n texts, so c/(n-1) with one less, then n whole - (n-1) mean(left_out) has none
    (Quenouille, 1956; Tukey, 1958). Of a single text: its own value, without an error."""
    left_out = torch.as_tensor(left_out, dtype=torch.float64)
    n = len(left_out)
    if n < 2:
        return float(whole), None
    mean = left_out.mean()
    spread = (left_out - mean).square().sum()
    return (n * whole - (n - 1) * mean).item(), ((n - 1) / n * spread).sqrt().item()


def exp(x):
    """e to the x, infinite where a float cannot hold it."""
    if x > 709:
        return math.inf
    return math.exp(x)


def add_mean(row, name, mean_and_se):
    """row[name] = the mean, row[name + "_se"] = its standard error."""
    mean, se = mean_and_se
    row[name] = mean
    row[name + "_se"] = se


# ---- under a judge: what the texts cost another model

def make_judge(model, spec=None, tokenizer=None):
    """An AR model as a judge of texts: a function judge(x (n, L), skip=0, stop=None) ->
    (nats (n,), tokens (n,)), what each text costs the model from its token number `skip`
    on, up to token `stop` (n,) of each (None: to its end), and how many tokens that is.
    spec: the judge's tokenizer; where the texts' `tokenizer` is another, the texts are read
    anew in the judge's tokens (see data.dataset.retokenise), up to the judge's context."""
    same = tokenizer is None or spec == tokenizer.spec
    if not same:
        judges = make_tokenizer(spec)

    def read(row):
        """Ids of a text, as the judge has them."""
        if same:
            return row
        return retokenise(row, tokenizer, judges)[:model.config.context]

    @torch.no_grad()
    def judge(x, skip=0, stop=None):
        rows = x.tolist()
        if stop is not None:
            rows = [row[:n] for row, n in zip(rows, stop.tolist())]
        rows = [read(row) for row in rows]
        # of the judge's tokens, those from `begin` to `end` of a text count
        begin = [len(read(row[:skip])) for row in x.tolist()]
        begin = torch.tensor(begin, device=x.device)                 # (n,)
        end = torch.tensor([len(row) for row in rows], device=x.device)

        # rows of one width W: the judge looks back only, so what stands beyond a text's end
        # does not change its cost
        width = max(1, int(end.max()))
        rows = [row + [0] * (width - len(row)) for row in rows]
        y = torch.tensor(rows, device=x.device)                      # (n, W)
        place = torch.arange(width, device=x.device)
        counts = (place >= begin[:, None]) & (place < end[:, None])  # (n, W)

        batches = [nll(model, batch) for batch in y.split(JUDGE_BATCH)]
        nats = torch.cat(batches)                                    # (n, W)
        nats = in_float64((nats * counts).sum(1))
        return nats, counts.sum(1).to(nats.device)
    return judge


def perplexity(nats, tokens):
    """exp of the mean nats per token of texts that cost nats (n,) for tokens (n,), and its
    standard error."""
    mean = (nats.sum() / tokens.sum()).item()
    # the error of a ratio of two sums, to first order
    _, se = mean_se((nats - mean * tokens) / tokens.double().mean())
    if se is None:                       # of a single text
        return exp(mean), None
    return exp(mean), exp(mean) * se


def gen_ppl(judge, x):
    """Generative perplexity of x (n, L): exp of the judge's mean nats per token, and its
    SE. Lower means that the judge finds the texts more likely."""
    nats, tokens = judge(x)
    return perplexity(nats, tokens)


# ---- diversity: within a text, and among the texts

def entropy(x, vocab):
    """Entropy of the token frequencies of each text of x (n, L): the mean, in nats, and its
    SE. If it is below the data's, texts repeat themselves."""
    counts = torch.zeros(len(x), vocab)
    counts.scatter_add_(1, x, torch.ones(x.shape))                   # (n, V)
    return mean_se(torch.special.entr(counts / x.shape[1]).sum(1))


def pooled_entropy(x, vocab):
    """Entropy of the token frequencies of all of x (n, L) together, in nats, and its SE.
    If it is below the data's, texts resemble each other, however rich each may be.
    Few texts have not yet used every token that they might: the entropy of their
    frequencies is too low, the more so the fewer they are. Leaving out each text in turn
    corrects it, so that values of unequal numbers of texts can be compared. (A correction
    by the number of tokens is not enough: those of one text depend on each other.)"""
    n, L = x.shape
    counts = torch.bincount(x.flatten(), minlength=vocab).double()   # (V,)
    # with N tokens the entropy is log N - sum(c log c) / N
    total = torch.special.xlogy(counts, counts).sum()
    left_out = []                        # that sum without each text
    for row in x:
        # the u different tokens of this text: how often it has them, all have them, (u,),
        # and all others have them
        ids, own = row.unique(return_counts=True)
        c = counts[ids]
        less = c - own
        change = torch.special.xlogy(c, c) - torch.special.xlogy(less, less)
        left_out.append(total - change.sum())
    whole = math.log(n * L) - total / (n * L)
    rest = max(1, n - 1) * L             # tokens without one text
    return jackknife(whole, math.log(rest) - torch.stack(left_out) / rest)       # (n,)


def tally(chosen):
    """How often each value was chosen, {choice: Counter of values}, in a list of {choice:
    value}, one for each text (see data.dataset.choices)."""
    counts = {}
    for text in chosen:
        for choice, value in text.items():
            counts.setdefault(choice, Counter())[value] += 1
    return counts


def counter_entropy(counter):
    """Entropy of the frequencies in a Counter, in nats; 0 where there is nothing."""
    n = torch.tensor(list(counter.values()), dtype=torch.float64)
    return torch.special.entr(n / n.sum()).sum().item()


def choice_entropy(chosen):
    """How freely texts choose, from a list of {choice: value}, one for each text: the
    entropies of all choices, each over the texts that made it, added up, in nats, and the
    standard error; corrected as in pooled_entropy. Words that follow from others, such as a
    name said again, do not count here, although they do in the entropy of tokens."""
    counts = tally(chosen)
    entropies = {choice: counter_entropy(counts[choice]) for choice in counts}
    whole = sum(entropies.values())
    # what the sum loses with a text that chose a value
    loss = {}
    for choice, counter in counts.items():
        for value in counter:
            less = counter_entropy(counter - Counter([value]))
            loss[choice, value] = entropies[choice] - less
    left_out = []                        # the sum without each text
    for text in chosen:
        lost = 0.0
        for choice, value in text.items():
            lost += loss[choice, value]
        left_out.append(whole - lost)
    return jackknife(whole, left_out)


# ---- all of them

def measure(x, judge, data):
    """The measures that cost next to nothing, as a row of a table: {"gen_ppl",
    "gen_ppl_se", "entropy", ..., "samples", "tokens"} of texts x (n, L). gen_ppl counts
    every token alike, text_ppl is the mean of the texts' own perplexities; judge None:
    neither. What only some datasets can say (choices, valid, contradictions, copies,
    copies_expected, log_p) is None for the others."""
    row = {"samples": len(x), "tokens": x.numel()}
    vocab = data.tokenizer.vocab

    # quality, under the judge
    add_mean(row, "gen_ppl", NO_VALUE)
    add_mean(row, "text_ppl", NO_VALUE)
    if judge:
        nats, tokens = judge(x)
        add_mean(row, "gen_ppl", perplexity(nats, tokens))
        add_mean(row, "text_ppl", mean_se((nats / tokens.clamp(min=1)).exp()))

    # diversity
    x = x.cpu()
    add_mean(row, "entropy", entropy(x, vocab))
    add_mean(row, "pooled_entropy", pooled_entropy(x, vocab))
    add_mean(row, "choices", NO_VALUE)
    chosen = choices(x, data)            # where there is an oracle
    if chosen:
        add_mean(row, "choices", choice_entropy(chosen))

    # truth: whether a text obeys the rules of its language, or is copied from the data
    verdict, copied = oracle(x, data), copies(x, data)
    add_mean(row, "valid", NO_VALUE)
    add_mean(row, "contradictions", NO_VALUE)
    add_mean(row, "copies", NO_VALUE)
    add_mean(row, "copies_expected", NO_VALUE)
    add_mean(row, "log_p", NO_VALUE)
    if copied is not None:
        add_mean(row, "copies", mean_se(copied))
    if verdict:
        faults, log_p = verdict                                      # (n,) both
        add_mean(row, "valid", mean_se(faults == 0))
        add_mean(row, "contradictions", mean_se(faults))
        add_mean(row, "log_p", mean_se(log_p[faults == 0]))
    if copied is not None and verdict:
        # a model that prefers likely texts meets more of them by chance: copies beyond this
        # share are learned by heart
        add_mean(row, "copies_expected", mean_se(copies_expected(log_p, data)))
    return row


# ---- as text

def step_key(steps):
    """What to sort numbers of steps by: None, of data and AR, first, EXACT last."""
    if steps is None:
        return 0
    return math.inf if steps == EXACT else steps


def in_steps(steps, order=None):
    """"8 steps", or "exact"; or "8 steps, confidence", as an order of reveal that is not
    the model's own is always named."""
    text = steps if steps == EXACT else f"{steps} steps"
    if order not in (None, "random"):
        text += f", {order}"
    return text


def summary(row):
    """A row of `measure` in one line of text."""
    text = f"{row['gen_ppl']:.2f}"
    if row["gen_ppl_se"] is not None:    # of a single text there is none
        text += f" (±{row['gen_ppl_se']:.2f})"
    text += f" at entropy {row['entropy']:.2f}"
    if row["valid"] is not None:
        text += f", {row['valid']:.0%} valid, {row['contradictions']:.2f} contradictions"
    return text


# the lines of a model in the table: (label, key, its format)
LINES = (("perplexity", "gen_ppl", ".2f"), ("entropy", "entropy", ".2f"),
         ("entropy of all", "pooled_entropy", ".2f"), ("choices", "choices", ".1f"),
         ("valid", "valid", ".0%"), ("contradictions", "contradictions", ".2f"),
         ("copies", "copies", ".0%"), ("calls", "calls", ".1f"),
         ("reads a token", "reads", ".1f"))


def table(rows):
    """Rows as text: a block of labelled lines for each model, a column for each number of
    steps; data and AR, which take no steps, have one column of their own. A line is left
    out where the model has no value of it. (Rows of older versions have no choices, and no
    calls.)"""
    columns = sorted({row["steps"] for row in rows if row["steps"]}, key=step_key)
    heading = f"{'sampling steps':26}{'-':>9}"
    for steps in columns:
        heading += f"{steps:>9}"
    lines = [heading]
    for name in dict.fromkeys(row["model"] for row in rows):
        cells = {row["steps"]: row for row in rows if row["model"] == name}
        title = name                     # beside the model's first line only
        for label, key, form in LINES:
            if all(row.get(key) is None for row in cells.values()):
                continue
            line = f"{title:10}{label:16}"
            for steps in [None, *columns]:
                text = ""
                if steps in cells and cells[steps].get(key) is not None:
                    text = format(cells[steps][key], form)
                line += f"{text:>9}"
            lines.append(line.rstrip())
            title = ""
    return "\n".join(lines)
