"""The log-likelihood of texts, or of continuations given a context, line by line.

    python -m tools.score out/stories-nano/ar.pt texts.jsonl --json scores.jsonl

Each line of texts.jsonl is {"text": ...} or {"context": ..., "continuation": ...}, and each
has a line of scores.jsonl: log_p in nats, its standard error se (null where log_p is
exact), the tokens that it is the sum of, and the method: "exact" (AR), "orders" (attention
reveal) or "bound" (full attention), see score.

A context is given: it is never masked, comes first in every order of reveal, and costs
nothing. A text of n tokens is read as the first n positions, and there are no others, as
with --length of sample.py: no end, no padding stands behind it.
"""
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from common import seed_all
from data.checkpoints import load_model
from data.dataset import make_tokenizer
from data.files import UserError, read_text, to_json, write
from data.measures import exp
from data.processes import spread, start
from data.script import command, flag, parse_flags
from exact import nll_in_order
from model import nll
from sample import BATCH
from tools import likelihood

PARTS = 8                                # calls of each repetition of the bound


@dataclass
class ScoreConfig:
    """The flags of tools.score."""
    checkpoint: str                      # the arguments without --
    file: str
    orders: int = flag(
        8, "attention reveal: random orders in which each text is read; full attention: "
        f"repetitions of the bound, each of {PARTS} calls at most. The error falls with "
        "the root of it; AR needs none", low=2)
    seed: int = flag(0, "seed of orders and masks")
    json: str | None = flag(None, "file for the scores, line by line [the screen]")
    device: str = flag("auto", "where to run", choices=["auto", "cpu", "cuda"])


# ---- the three estimates

def score(model, x, known, orders):
    """log p of the tokens after the first `known` of each text of x (B, L), given these, in
    nats: {"log_p": (B,), ...}, with an "se" (B,) unless it is exact.

    AR ("exact"): the conditionals of these tokens, added up.

    Attention reveal ("orders"): a text's probability is the mean, over random orders that
    begin with the context, of p(text | context, order), each of which one call gives
    exactly. log_p is the mean of log p(text | context, order) over so many orders: by
    Jensen's inequality on average at most the log-likelihood. log_p_mixture, the log of the
    mean of p(text | context, order), is a tighter bound, at most the log-likelihood on
    average, and equal to it in the limit of many orders.

    Full attention ("bound"): the mean of log p(text | context, order) over all orders, as
    for reveal, but estimated from random masks (likelihood.any_order, n masks in PARTS
    equal parts of 1, 2, ...). The repetitions are independent, which gives the error.

    The se is that of the mean over orders. How far this is from the log-likelihood of the
    mixture of orders, it does not say."""
    n = x.shape[1] - known                                           # tokens that count
    if model.config.causal:
        nats = nll(model, x)[:, known:]                              # (B, n)
        return {"log_p": -nats.double().sum(1)}

    draws = []                           # of log p, each (B,)
    for _ in range(orders):
        if model.config.attention == "reveal":
            order = likelihood.known_first(x, known, model.mask_id)  # (B, L)
            nats = nll_in_order(model, x, model.mask_id, order, known)
        else:
            # with fewer tokens than parts each number of masks comes once
            nats = n * likelihood.any_order(model, x, model.mask_id, min(PARTS, n), known)
        draws.append(-nats)
    draws = torch.stack(draws)                                       # (orders, B)
    found = {"log_p": draws.mean(0), "se": draws.std(0) / math.sqrt(orders)}
    if model.config.attention == "reveal":
        found["log_p_mixture"] = draws.logsumexp(0) - math.log(orders)
    return found


# ---- what is scored

def parse_lines(content, name):
    """The lines of a file as pairs (context, continuation), where the context of a whole
    text is empty. Raises UserError with the number of a bad line of `name`."""
    pairs = []
    # only a line feed ends a line of JSON: other signs, such as U+2028, may stand in a text
    for i, line in enumerate(content.rstrip().split("\n"), 1):
        try:
            pair = pair_of(json.loads(line))
        # the latter: brackets within brackets, by the thousand
        except (ValueError, RecursionError):
            pair = None
        if pair is None:
            raise UserError(f'{name}, line {i}: not a JSON object with a "text", or with a '
                            '"context" and a "continuation"; write one such object a line')
        pairs.append(pair)
    return pairs


def pair_of(value):
    """(context, continuation) of a line's JSON value, or None where it is neither of the
    two forms. Other keys do not matter."""
    if not isinstance(value, dict):
        return None
    keys = value.keys() & {"text", "context", "continuation"}
    if keys == {"text"}:
        pair = "", value["text"]
    elif keys == {"context", "continuation"}:
        pair = value["context"], value["continuation"]
    else:
        return None
    if not all(isinstance(part, str) for part in pair):
        return None
    return pair


def encode_lines(pairs, tokenizer, context, name):
    """Pairs of texts -> pairs of lists of ids, each text encoded on its own. Raises
    UserError with the line of `name` that the model, of that context, cannot read."""
    tasks = []
    for i, (before, after) in enumerate(pairs, 1):
        line = f"{name}, line {i}"
        # where tokens begin with their space, one at the end is the next token's
        bare = before
        if tokenizer.spec["kind"] in ("bpe", "gpt2"):
            bare = before.rstrip(" ")
        space = before[len(bare):]
        try:
            known = tokenizer.encode(bare)
            ids = tokenizer.encode(space + after)
        except UserError as e:
            raise UserError(f"{line}: {e}")
        if not after or not ids:
            raise UserError(f"{line}: there is no text to score; give one of at least one "
                            "token")
        n = len(known) + len(ids)
        if n > context:
            raise UserError(f"{line} has {n} tokens, more than the model's context of "
                            f"{context}; shorten it")
        tasks.append((known, ids))
    return tasks


# ---- the command

def score_all(config, model, tasks, procs):
    """A row for each task (ids of a context, ids that are scored), in their order."""
    method = {"causal": "exact", "reveal": "orders", "full": "bound"}

    def batch(part):
        """The rows of tasks of one shape, which are read together."""
        numbers, x, n = part
        seed_all(config.seed, "score", numbers)
        x = x.to(procs.device)                                       # (B, L)
        found = score(model, x, x.shape[1] - n, config.orders)
        found = {key: values.tolist() for key, values in found.items()}
        rows = []
        for j in range(len(x)):
            row = {"log_p": None, "se": None, "tokens": n,
                   "method": method[model.config.attention]}
            for key, values in found.items():
                row[key] = values[j]
            rows.append(row)
        return rows

    parts = list(likelihood.batches(tasks, BATCH))
    rows = {}                            # number of a task: its row
    for (numbers, _, _), some in zip(parts, spread(parts, batch, procs, config.file)):
        rows.update(zip(numbers, some))
    return [rows[i] for i in range(len(tasks))]


def summary(rows, orders):
    """What all rows say together, in a line of text: sums, and exp of the mean nats."""
    tokens = sum(row["tokens"] for row in rows)
    total = sum(row["log_p"] for row in rows)
    value = f"{len(rows)} lines, {tokens} tokens: log p {total:.2f}"
    perplexity = f"nats, perplexity {exp(-total / tokens):.3f}"
    if rows[0]["method"] == "exact":
        return f"{value} {perplexity} (exact)"

    # lines have draws of their own, so variances add up
    se = math.sqrt(sum(row["se"] ** 2 for row in rows))
    bound = f"{value} ±{se:.2f} {perplexity} (a lower bound"
    if rows[0]["method"] == "bound":
        return f"{bound}, {orders} repetitions)"
    mixture = sum(row["log_p_mixture"] for row in rows)
    return f"{bound}, {orders} orders; of their mixture log p {mixture:.2f})"


def main():
    config = parse_flags(ScoreConfig, __doc__,
                         checkpoint="of train.py, distill.py or tools.convert",
                         file="of texts, a JSON object a line")
    if config.json and Path(config.json).resolve() == Path(config.file).resolve():
        raise UserError(f"--json {config.json} is the file of the texts; name another")
    procs = start(config.device)
    model, content = load_model(config.checkpoint, procs.device)
    pairs = parse_lines(read_text(config.file), config.file)
    tasks = encode_lines(pairs, make_tokenizer(content["tokenizer"]), model.config.context,
                         config.file)
    rows = score_all(config, model, tasks, procs)
    if procs.rank > 0:
        return

    lines = "".join(to_json(row) + "\n" for row in rows)
    said = summary(rows, config.orders)
    if config.json:
        write(Path(config.json), lambda f: f.write(lines.encode()))
        print(said)
    else:
        print(lines, end="")
        # apart from the scores, which may go into a file
        print(said, file=sys.stderr)


if __name__ == "__main__":
    command(main)
