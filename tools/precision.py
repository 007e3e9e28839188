"""What float32 does to a sampler of many steps: a law of 50,257 tokens, drawn in three
ways.

    python -m tools.precision          # -> results/precision.json

The law is known (token i has probability 1 / (i H), as in natural text), so nothing but the
draw is at fault. Rare is a token of less than 6e-5: in the first of 1,024 steps it would be
revealed with less than 6e-8, which noise of 24 bits cannot reach.
"""
import math
import types
from dataclasses import dataclass

import torch

from common import ROOT, command, flag, parse_flags, seed_all
from data.files import write_json
from diffusion import categorical, sample, sample_joint
from sample import mean_se, put
from tools import figures

RARE = 6e-5
LENGTH = 16                                  # positions of a text
COLUMNS = (("draw", "draw", "s"), ("steps", "steps", "d"), ("rare tokens", "rare", ".1%±"),
           ("-log p", "nats", ".3f±"))


@dataclass
class Config:
    tokens: int = flag(50_257, "different ones", low=2)
    length: int = flag(192, "positions that are drawn", low=2)
    steps: int = flag(1024, "of the sampler", low=1)


class Law:
    """A model that knows one law of tokens (V,) and nothing else, for diffusion.sample."""
    config = types.SimpleNamespace(attention="full", relative=False)

    def __init__(self, log_p):
        self.log_p = log_p

    def hidden(self, z, at=None, rank=None):
        row, _ = at
        # the N states at the places `at`: their values are nothing to the head
        return torch.zeros(len(row), 1)                              # (N, 1)

    def head(self, h):
        return self.log_p.float().expand(len(h), -1)                 # (N, V)

    def __call__(self, z):
        return self.log_p.float().expand(*z.shape, -1)               # (B, L, V)


def zipf(V):
    """The log-probabilities (V,) of the law, in float64."""
    log_p = -(torch.arange(1, V + 1, dtype=torch.float64)).log()
    return log_p - log_p.logsumexp(0)                                # minus log H


def tokens_of(draw, length):
    """`length` tokens (N,), or a few more: as many texts of draw() as that takes."""
    texts = []
    for i in range(math.ceil(length / LENGTH)):
        seed_all("precision", i)         # text i of every sampler begins with one seed
        texts.append(draw().flatten())
    return torch.cat(texts)


def rows(config):
    """A row for the law itself, and one for each way to draw from it."""
    # the law, and what is known of it without a draw
    log_p = zipf(config.tokens)                                      # (V,)
    p = log_p.exp()
    rare = log_p < math.log(RARE)
    found = [{"draw": "the law", "rare": p[rare].sum().item(),
              "nats": -(p * log_p).sum().item()}]

    # the three ways, from a text of masks; the mask's id is V
    model = Law(log_p)
    mask_id = config.tokens
    z = torch.full((1, LENGTH), mask_id)
    draws = {
        "which opens, then which token in float64":
            lambda: sample(model, z, config.steps, mask_id, categorical),
        "both at once in float64":
            lambda: sample_joint(model, z, config.steps, mask_id),
        "both at once in float32":
            lambda: sample_joint(model, z, config.steps, mask_id, torch.float32),
    }
    for name, draw in draws.items():
        x = tokens_of(draw, config.length)                           # (N,)
        row = {"draw": name, "steps": config.steps, "tokens": len(x)}
        put(row, "rare", mean_se(rare[x].double()))
        put(row, "nats", mean_se(-log_p[x]))
        found.append(row)
    return found


def main():
    config = parse_flags(Config, __doc__)
    found = rows(config)
    write_json(ROOT / "results/precision.json", {"rows": found})
    print(figures.rows_as_text(found, COLUMNS))


if __name__ == "__main__":
    command(main)
