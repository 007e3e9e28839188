"""What a model thinks of a text: a diffusion model's bound, an AR model's likelihood, and
how both complete a passage by its last word (LAMBADA, arXiv 1606.06031).

Models as in diffusion.py. Noise comes from torch's global generators; evaluate.py seeds
them by the number of the batch, so that all models meet the same masks.
"""
import itertools
import math
import re

import torch

from data.devices import float64_device, in_float64
from data.files import UserError
from data.lambada.prepare import WORD
from data.measures import NO_VALUE, add_mean, exp, mean_se
from diffusion import prompt_first, random_order, states_at
from exact import nats_of, nll_in_order
from model import nll, shifted

LONGEST = 5                  # tokens of a word whose orders are enumerated: 120
DRAWS = 16                   # maskings for the bound of a longer one


# ---- whole texts

@torch.no_grad()
def token_nats(model, z, x, rank=None):
    """-log p(x_i | z) at each mask of z, where z differs from x, and 0 elsewhere: (B,
    L)."""
    at = (z != x).nonzero(as_tuple=True)                             # N of them
    h = states_at(model, z, at, rank)                                # (N, C)
    nats = nats_of(model, h, x[at])                                  # (N,), float64
    out = torch.zeros(x.shape, dtype=nats.dtype, device=nats.device)
    text, position = at
    out[text.to(nats.device), position.to(nats.device)] = nats
    return out


def bound(model, x, mask_id, draws=1):
    """The NELBO of each text of x (B, L) in nats per token, (B,): the integral over t in
    (0, 1] of (1/t) sum over masks of -log p(x_i | z_t) (MDLM, eq. 10), by one u from each
    of `draws` equal parts of (0, 1], t = u^2 and dt / t = 2 du / u. (With t itself uniform
    the variance is infinite: a text of one mask at t near 0 has weight 1/t.)"""
    B, L = x.shape
    exact = dict(dtype=torch.float64, device=float64_device(x.device))
    total = torch.zeros(B, **exact)
    for i in range(draws):
        # (0, 1] by this order of operations: 1 - rand is never 0, so u is not, either
        u = (i + (1 - torch.rand(B, 1, **exact))) / draws            # (B, 1)
        # in float64, too: float32 draws below u^2 < 2^-24 would come too often
        masked = torch.rand(x.shape, **exact) < u ** 2               # (B, L)
        z = torch.where(masked.to(x.device), mask_id, x)
        total += token_nats(model, z, x).sum(1) * 2 / u[:, 0]
    return total / (draws * L)


def any_order(model, x, mask_id, draws=1, known=0):
    """The same bound without t: -log p(x) <= E_n (L / n) sum over n random masks of
    -log p(x_i | z), with n uniform in 1..L (arXiv 2110.02037), of the tokens after the
    first `known`; in nats per such token, (B,), by one n from each of `draws` equal
    parts."""
    B, L = len(x), x.shape[1] - known
    total = torch.zeros(B, dtype=torch.float64, device=float64_device(x.device))
    for i in range(draws):
        u = torch.rand(B, 1, device=x.device)
        n = 1 + ((i + u) * L / draws).long().clamp(max=L - 1)        # (B, 1), of 1..L
        # n of the L positions, in random order
        masked = torch.rand((B, L), device=x.device).argsort(1) < n
        end = torch.where(masked, mask_id, x[:, known:])
        z = torch.cat((x[:, :known], end), 1)
        n = n[:, 0].to(total.device)                                 # (B,)
        total += token_nats(model, z, x, rank_of(model, x, L)).sum(1) / n
    return total / draws


def in_orders(model, x, mask_id, draws):
    """Of a model with attention in the order of reveal, for each text of x (B, L), in nats
    per token, (B,) both: the mean of -log p(x | order) over so many random orders, an
    estimate of the bound; and -log of the mean of p(x | order), a tighter bound, which
    comes nearer to -log p(x) with more orders."""
    nats = [nll_in_order(model, x, mask_id) for _ in range(draws)]
    nats = torch.stack(nats)                                         # (draws, B)
    mixture = math.log(draws) - torch.logsumexp(-nats, dim=0)
    return nats.mean(0) / x.shape[1], mixture / x.shape[1]


def known_first(x, known, mask_id):
    """A random order of the positions of each text of x (B, L), for nll_in_order, in which
    the first `known` positions come before all others: (B, L), on the CPU."""
    z = x.clone()
    z[:, known:] = mask_id
    return prompt_first(random_order(z, mask_id), x.shape[1])


def exact(model, x):
    """Negative log-likelihood of each text of x (B, L) under an AR model, nats per token
    (B,)."""
    return in_float64(nll(model, x)).mean(1)


# ---- the last word of a passage

def passages(text, least=20):
    """The paragraphs of a text that have at least so many words."""
    paragraphs = re.split(r"\n\s*\n", text)
    long_enough = [part for part in paragraphs if len(WORD.findall(part)) >= least]
    if not long_enough:
        raise UserError(f"the text has no passage of {least} words between empty lines; "
                        "use another")
    return long_enough


def make_tasks(texts, tokenizer, context, cut=False):
    """[(ids of a passage up to its last word, ids of that word)]: what follows the word is
    dropped, nothing tells that the text ends there. Raises UserError where a passage is
    longer than the context, or, with cut, keeps its end."""
    tasks = []
    for i, text in enumerate(texts, 1):
        *_, last = WORD.finditer(text)
        begin = last.start()
        if text[:begin].endswith(" "):   # a word's token begins with its space
            begin -= 1
        before = tokenizer.encode(text[:begin])
        word = tokenizer.encode(text[begin:last.end()])
        # tokens beyond the context
        over = len(before) + len(word) - context
        if over > 0:
            if not cut or len(word) >= context:
                raise UserError(f"passage {i} has {len(before) + len(word)} tokens, more "
                                f"than the model's context of {context}; give shorter ones "
                                "or another model")
            before = before[over:]
        tasks.append((before, word))
    return tasks


def batches(tasks, size):
    """Tasks of equal lengths together: [(numbers of the tasks, x (B, L), tokens of the
    word)]."""
    groups = {}
    for i, (before, word) in enumerate(tasks):
        groups.setdefault((len(before), len(word)), []).append(i)
    for (_, w), numbers in sorted(groups.items()):
        for i in range(0, len(numbers), size):
            part = numbers[i:i + size]
            yield part, torch.tensor([tasks[j][0] + tasks[j][1] for j in part]), w


def rank_of(model, x, w):
    """When tokens were revealed, for a model that asks, such that the last w come last: (B,
    L), or None for others."""
    if model.config.attention != "reveal":
        return None
    rank = torch.rand(x.shape, device=x.device)
    rank[:, x.shape[1] - w:] += 1
    return rank


@torch.no_grad()
def complete(model, x, w, mask_id, protocol):
    """The last w tokens of x (B, L), hidden and filled in with the likeliest ones, (B, w):
    "one_pass", all at once; "confident", one at a time, the most certain first; "left",
    from left to right."""
    B, L = x.shape
    begin = L - w
    z = x.clone()
    z[:, begin:] = mask_id
    # the last w positions of all texts
    rows = torch.arange(B, device=x.device)
    at = rows[:, None], torch.arange(begin, L, device=x.device).expand(B, w)
    rank = rank_of(model, x, w)
    for i in range(w):
        logits = model.head(model.hidden(z, at, rank))               # (B, w, V)
        best, ids = logits.log_softmax(-1).max(-1)                   # (B, w) both
        if protocol == "one_pass":
            return ids
        if protocol == "left":
            chosen = torch.full_like(rows, i)                        # (B,)
        else:
            known = z[:, begin:] != mask_id
            chosen = best.masked_fill(known, -torch.inf).argmax(1)
        z[rows, begin + chosen] = ids[rows, chosen]
        if rank is not None:             # it was revealed after all others
            rank[rows, begin + chosen] = 2.0 + i
    return z[:, begin:]


def word_nats(model, x, w, mask_id):
    """-log p of the last w tokens of x (B, L) given the others, (B,): by all w! orders in
    which they may be revealed one at a time, up to LONGEST tokens; beyond, the bound."""
    begin = x.shape[1] - w
    if w > LONGEST:
        return any_order(model, x, mask_id, DRAWS, begin) * w
    # {tokens revealed so far, in order: what each of the others costs then, (B, w)}
    rank, nats = rank_of(model, x, w), {}
    for k in range(w):
        for known in itertools.permutations(range(w), k):
            places = [begin + i for i in known]
            masks = [j for j in range(begin, x.shape[1]) if j not in places]
            z = x.clone()
            z[:, masks] = mask_id
            if rank is not None:
                rank[:, places] = 2.0 + torch.arange(k, device=x.device)
            nats[known] = token_nats(model, z, x, rank)[:, begin:]
    # the cost of a whole order is the sum along it; p is the mean of all orders'
    orders = []
    for path in itertools.permutations(range(w)):
        orders.append(sum(nats[path[:k]][:, path[k]] for k in range(w)))         # (B,)
    return math.log(len(orders)) - torch.logsumexp(-torch.stack(orders), 0)


@torch.no_grad()
def answer(model, x, w):
    """What there is to know about a batch of tasks: {name: (B,)}, w tokens of x (B, L)
    being the word: whether it is completed rightly, and its nats. AR models answer from
    left to right only."""
    begin = x.shape[1] - w
    word = x[:, begin:]                                              # (B, w)
    if model.config.causal:
        h = model.hidden(shifted(x, model.mask_id))[:, begin:]       # (B, w, C)
        log_p = model.head(h).log_softmax(-1)                        # (B, w, V)
        nats = -in_float64(log_p.gather(2, word[..., None]))[..., 0].sum(1)
        return {"left": (log_p.argmax(-1) == word).all(1), "nats": nats}
    answers = {}
    for protocol in ("one_pass", "confident", "left"):
        written = complete(model, x, w, model.mask_id, protocol)
        answers[protocol] = (written == word).all(1)
    answers["nats"] = word_nats(model, x, w, model.mask_id)
    return answers


def last_word(answers, tasks):
    """A row of results from answers [{name: (B,)}]: accuracies, and the perplexity of the
    word."""
    by_bound = sum(len(word) > LONGEST for _, word in tasks)
    row = {"tasks": len(tasks), "by_bound": by_bound}
    for name in ("one_pass", "confident", "left"):
        values = [answer[name] for answer in answers if name in answer]
        add_mean(row, name, NO_VALUE)
        if values:
            add_mean(row, name, mean_se(torch.cat(values)))
    mean, se = mean_se(torch.cat([answer["nats"] for answer in answers]))
    add_mean(row, "word_ppl", (exp(mean), exp(mean) * se))
    return row
