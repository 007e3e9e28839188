"""What a model thinks of a text: a diffusion model's bound, an AR model's likelihood, and how both
complete a passage by its last word (LAMBADA, arXiv 1606.06031).

Models as in diffusion.py. Noise comes from torch's global generators; evaluate.py seeds them by the
number of the batch, so that all models meet the same masks.
"""
import itertools
import math
import re

import torch

from data.files import UserError
from data.lambada.prepare import WORD
from diffusion import ROWS, states_at
from model import cross_entropy, nll, shifted
from data.measures import exp, mean_se, add_mean

LONGEST = 5                  # tokens of a word whose orders are enumerated: 120
DRAWS = 16                   # maskings for the bound of a longer one


# ---- whole texts

@torch.no_grad()
def token_nats(model, z, x, rank=None):
    """-log p(x_i | z) at each mask of z, where z differs from x, and 0 elsewhere: (B, L)."""
    at = z != x
    h = states_at(model, z, at, rank)                                # (N, C)
    parts = zip(h.split(ROWS), x[at].split(ROWS))
    nats = [cross_entropy(model.head(a), b).double() for a, b in parts]
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    out[at] = torch.cat(nats) if nats else out.new_zeros(0)
    return out


def bound(model, x, mask_id, draws=1):
    """The NELBO of each text of x (B, L) in nats per token, (B,): the integral over t in (0, 1] of
    (1/t) sum over masks of -log p(x_i | z_t) (MDLM, eq. 10), by one u from each of `draws` equal
    parts of (0, 1], t = u^2 and dt / t = 2 du / u. (With t itself uniform the variance is infinite:
    a text of one mask at t near 0 has weight 1/t. Adding the opposite masking hardly helps.)"""
    B, L = x.shape
    total = torch.zeros(B, dtype=torch.float64, device=x.device)
    for i in range(draws):
        u = 1 - (i + torch.rand(B, 1, device=x.device)) / draws      # (B, 1) in (0, 1]
        z = torch.where(torch.rand(x.shape, device=x.device) < u ** 2, mask_id, x)
        total += token_nats(model, z, x).sum(1) * 2 / u[:, 0]
    return total / (draws * L)


def any_order(model, x, mask_id, draws=1, known=0):
    """The same bound without t: -log p(x) <= E_n (L / n) sum over n random masks of -log p(x_i|z),
    with n uniform in 1..L (arXiv 2110.02037), of the tokens after the first `known`; in nats per
    such token, (B,), by one n from each of `draws` equal parts."""
    B, L = len(x), x.shape[1] - known
    total = torch.zeros(B, dtype=torch.float64, device=x.device)
    for i in range(draws):
        n = 1 + ((i + torch.rand(B, 1, device=x.device)) * L / draws).long().clamp(max=L - 1)
        masked = torch.rand((B, L), device=x.device).argsort(1) < n
        z = torch.cat((x[:, :known], torch.where(masked, mask_id, x[:, known:])), 1)
        total += token_nats(model, z, x, rank_of(model, x, L)).sum(1) / n[:, 0]
    return total / draws


def exact(model, x, mask_id):
    """Negative log-likelihood of each text of x (B, L) under an AR model, nats per token (B,)."""
    return nll(model, x, mask_id).double().mean(1)


# ---- the last word of a passage

def passages(text, least=20):
    """The paragraphs of a text that have at least so many words."""
    found = [part for part in re.split(r"\n\s*\n", text) if len(WORD.findall(part)) >= least]
    if not found:
        raise UserError(f"the text has no passage of {least} words between empty lines; use "
                        "another")
    return found


def make_tasks(texts, tokenizer, context, cut=False):
    """[(ids of a passage up to its last word, ids of that word)]: what follows the word is dropped,
    nothing tells that the text ends there. Raises UserError where a passage is longer than the
    context, or, with cut, keeps its end."""
    tasks = []
    for i, text in enumerate(texts, 1):
        *_, last = WORD.finditer(text)
        begin = last.start() - (text[:last.start()].endswith(" "))
        before, word = tokenizer.encode(text[:begin]), tokenizer.encode(text[begin:last.end()])
        if len(before) + len(word) > context:
            if not cut or len(word) >= context:
                raise UserError(f"passage {i} has {len(before) + len(word)} tokens, more than the "
                                f"model's context of {context}; give shorter ones or another model")
            before = before[len(before) + len(word) - context:]
        tasks.append((before, word))
    return tasks


def batches(tasks, size):
    """Tasks of equal lengths together: [(numbers of the tasks, x (B, L), tokens of the word)]."""
    groups = {}
    for i, (before, word) in enumerate(tasks):
        groups.setdefault((len(before), len(word)), []).append(i)
    for (_, w), numbers in sorted(groups.items()):
        for i in range(0, len(numbers), size):
            part = numbers[i:i + size]
            yield part, torch.tensor([tasks[j][0] + tasks[j][1] for j in part]), w


def rank_of(model, x, w):
    """When tokens were revealed, for a model that asks, such that the last w come last: (B, L), or
    None for others."""
    if model.config.attention != "reveal":
        return None
    rank = torch.rand(x.shape, device=x.device)
    rank[:, x.shape[1] - w:] += 1
    return rank


@torch.no_grad()
def complete(model, x, w, mask_id, protocol):
    """The last w tokens of x (B, L), hidden and filled in with the likeliest ones: "one_pass", all
    at once; "confident", one at a time, the most certain first; "left", from left to right."""
    z, rows = x.clone(), torch.arange(len(x), device=x.device)
    z[:, -w:] = mask_id
    at = rows.repeat_interleave(w), torch.arange(x.shape[1] - w, x.shape[1],
                                                 device=x.device).repeat(len(x))
    rank = rank_of(model, x, w)
    for i in range(1 if protocol == "one_pass" else w):
        log_p = model.head(model.hidden(z, at, rank)).log_softmax(-1).view(len(x), w, -1)
        best, ids = log_p.max(-1)                                    # (B, w)
        if protocol == "one_pass":
            return ids
        best = best.masked_fill(z[:, -w:] != mask_id, -torch.inf)
        chosen = best.argmax(1) if protocol == "confident" else torch.full_like(rows, i)
        place = x.shape[1] - w + chosen
        z[rows, place] = ids[rows, chosen]
        if rank is not None:
            rank[rows, place] = 2.0 + i
    return z[:, -w:]


def word_nats(model, x, w, mask_id):
    """-log p of the last w tokens of x (B, L) given the others, (B,): by all w! orders in which
    they may be revealed one at a time, up to LONGEST tokens; beyond, the bound."""
    if w > LONGEST:
        return any_order(model, x, mask_id, DRAWS, x.shape[1] - w) * w
    begin, rank, nats = x.shape[1] - w, rank_of(model, x, w), {}
    for k in range(w):
        for known in itertools.permutations(range(w), k):            # revealed so far, in order
            z, places = x.clone(), [begin + i for i in known]
            z[:, [j for j in range(begin, x.shape[1]) if j not in places]] = mask_id
            if rank is not None:
                rank[:, places] = 2.0 + torch.arange(k, device=x.device)
            nats[known] = token_nats(model, z, x, rank)[:, begin:]               # (B, w)
    each = [sum(nats[path[:k]][:, path[k]] for k in range(w))
            for path in itertools.permutations(range(w))]            # (B,) for each order
    return math.log(len(each)) - torch.logsumexp(-torch.stack(each), 0)


@torch.no_grad()
def answer(model, x, w):
    """What there is to know about a batch of tasks: {name: (B,)}, w tokens of x (B, L) being the
    word. AR models answer from left to right only."""
    if not model.config.causal:
        right = {name: (complete(model, x, w, model.mask_id, name) == x[:, -w:]).all(1)
                 for name in ("one_pass", "confident", "left")}
        return right | {"nats": word_nats(model, x, w, model.mask_id)}
    h = model.hidden(shifted(x, model.mask_id))[:, -w:]
    log_p = model.head(h).log_softmax(-1)                            # (B, w, V)
    return {"left": (log_p.argmax(-1) == x[:, -w:]).all(1),
            "nats": -log_p.double().gather(2, x[:, -w:, None])[..., 0].sum(1)}


def last_word(answers, tasks):
    """A row of results from answers [{name: (B,)}]: accuracies, and the perplexity of the word."""
    row = {"tasks": len(tasks), "by_bound": sum(len(word) > LONGEST for _, word in tasks)}
    for name in ("one_pass", "confident", "left"):
        values = [a[name] for a in answers if name in a]
        add_mean(row, name, mean_se(torch.cat(values)) if values else (None, None))
    mean, se = mean_se(torch.cat([a["nats"] for a in answers]))
    add_mean(row, "word_ppl", (exp(mean), exp(mean) * se))
    return row
