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

from common import ROOT, seed_all
from data.files import write_json
from data.measures import add_mean, mean_se
from data.script import command, flag, parse_flags
from diffusion import categorical, sample
from tools import figures
from tools.joint import sample_joint

RARE = 6e-5
COLUMNS = (("draw", "draw", "s"), ("steps", "steps", "d"), ("rare tokens", "rare", ".1%±"),
           ("-log p", "nats", ".3f±"))


@dataclass
class PrecisionConfig:
    """The flags of tools.precision."""
    tokens: int = flag(50_257, "different ones", low=2)
    length: int = flag(192, "positions that are drawn", low=2)
    steps: int = flag(1024, "of the sampler", low=1)


class Law:
    """A model that knows one law of tokens (V,) and nothing else, for diffusion.sample."""
    config = types.SimpleNamespace(attention="full", masks_alike=False)

    def __init__(self, log_p):
        self.log_p = log_p

    def hidden(self, z, at=None, rank=None):
        row, pos = at
        return torch.zeros(*pos.shape, 1)

    def head(self, h):
        return self.log_p.float().expand(len(h), -1)

    def __call__(self, z):
        return self.log_p.float().expand(*z.shape, -1)


def rows_of(config):
    """A row for the law itself, and one for each way to draw from it."""
    # token i has probability 1 / (i H)
    log_p = -torch.arange(1, config.tokens + 1, dtype=torch.float64).log()       # (V,)
    log_p -= log_p.logsumexp(0)
    p = log_p.exp()
    rare = log_p < math.log(RARE)
    rows = [{"draw": "the law", "rare": p[rare].sum().item(),
             "nats": -(p * log_p).sum().item()}]

    model, mask_id, steps = Law(log_p), config.tokens, config.steps
    z = torch.full((1, 16), mask_id)
    draws = {
        "which is revealed, then which token in float64":
            lambda: sample(model, z, steps, mask_id, categorical),
        "both at once in float64":
            lambda: sample_joint(model, z, steps, mask_id),
        "both at once in float32":
            lambda: sample_joint(model, z, steps, mask_id, torch.float32)}
    for name, draw in draws.items():
        # 16 positions at a time
        texts = []
        for i in range(math.ceil(config.length / 16)):
            seed_all("precision", i)
            texts.append(draw().flatten())
        x = torch.cat(texts)
        row = {"draw": name, "steps": steps, "tokens": len(x)}
        add_mean(row, "rare", mean_se(rare[x].double()))
        add_mean(row, "nats", mean_se(-log_p[x]))
        rows.append(row)
    return rows


def main():
    config = parse_flags(PrecisionConfig, __doc__)
    rows = rows_of(config)
    write_json(ROOT / "results/precision.json", {"rows": rows})
    print(figures.rows_as_text(rows, COLUMNS))


if __name__ == "__main__":
    command(main)
