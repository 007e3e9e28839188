"""What float32 does to a sampler of many steps: a law of 50,257 tokens, drawn in three ways.

    python -m tools.precision          # -> results/precision.json

The law is known (token i has probability 1 / (i H), as in natural text), so nothing but the draw is
at fault. Rare is a token of less than 6e-5: in the first of 1,024 steps it would open with less
than 6e-8, which noise of 24 bits cannot reach.
"""
import math
import types
from dataclasses import dataclass

import torch

from common import ROOT, command, flag, parse_flags, seed_all
from data.files import write_json
from diffusion import categorical, sample, sample_joint
from data.measures import mean_se, add_mean
from tools import figures

RARE = 6e-5
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
        row, pos = at
        return torch.zeros(len(row), 1)

    def head(self, h):
        return self.log_p.float().expand(len(h), -1)

    def __call__(self, z):
        return self.log_p.float().expand(*z.shape, -1)


def rows(c):
    """A row for the law itself, and one for each way to draw from it."""
    log_p = -(torch.arange(1, c.tokens + 1, dtype=torch.float64)).log()
    log_p -= log_p.logsumexp(0)
    p, rare = log_p.exp(), log_p < math.log(RARE)
    found = [{"draw": "the law", "rare": p[rare].sum().item(), "nats": -(p * log_p).sum().item()}]
    model, z = Law(log_p), torch.full((1, 16), c.tokens)
    for name, draw in (
            ("which opens, then which token in float64", lambda: sample(
                model, z, c.steps, c.tokens, categorical)),
            ("both at once in float64", lambda: sample_joint(model, z, c.steps, c.tokens)),
            ("both at once in float32", lambda: sample_joint(model, z, c.steps, c.tokens,
                                                             torch.float32))):
        x = []
        for i in range(-(-c.length // 16)):
            seed_all("precision", i)
            x.append(draw().flatten())
        x = torch.cat(x)
        found.append({"draw": name, "steps": c.steps, "tokens": len(x)})
        add_mean(found[-1], "rare", mean_se(rare[x].double()))
        add_mean(found[-1], "nats", mean_se(-log_p[x]))
    return found


def main():
    c = parse_flags(Config, __doc__)
    found = rows(c)
    write_json(ROOT / "results/precision.json", {"rows": found})
    print(figures.rows_as_text(found, COLUMNS))


if __name__ == "__main__":
    command(main)
