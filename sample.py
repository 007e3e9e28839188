"""Text from any checkpoint, a masked diffusion model or an autoregressive one.

    python sample.py             # watch the student in weights/ write a story in 8 steps
    python sample.py out/stories-nano/round7.pt --steps 8 --num_samples 4
    python sample.py out/stories-nano/round7.pt --prompt "one sunny day tom went to"
    python sample.py out/stories-nano/teacher.pt --infill "one sunny day _ went to the _ ."
    python sample.py out/stories-nano/ar.pt --prompt "one windy day"
    python sample.py out/stories-nano-reveal/teacher.pt --steps exact

A checkpoint is all that is needed. Tokens are drawn in float64: with float32 unlikely ones
would be too rare, as at a lower temperature. --temperature, --top_p and --order change the
distribution on purpose, and are off unless given. Without arguments, in a terminal, this is
an animation; python -m tools.animate has others, and a race.
"""
import argparse
import runpy
import sys
from dataclasses import dataclass

import torch

from common import ROOT, seed_all, spread, start
from data.checkpoints import load_model
from data.cost import Cost, calls_as_text, counted_calls
from data.dataset import make_tokenizer
from data.files import UserError
from data.orders import ORDERS, refuse_order, sample_confident
from data.prompts import known_tokens, refuse_until_end, up_to_end
from data.script import command, device_flag, flag, parse_flags
from diffusion import categorical, sample, sample_exact, sharpen
from model import generate

BATCH = 32                               # texts that are written at a time
DEFAULT_STEPS = 32               # of a teacher, which was not distilled for any number
DTYPES = {32: torch.float32, 64: torch.float64}          # bits: type of a token draw
OURS = ROOT / "weights/round7.pt"        # the student that comes with the code
# where it is not named; with 2, what it was distilled for, few of its stories are valid
OUR_STEPS = 8
EXACT = "exact"                  # instead of a number of steps: see diffusion.sample_exact


def steps_or_exact(text):
    """What --steps means: a number of steps, or EXACT."""
    if text == EXACT:
        return text
    # no sign, no fraction
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1 on, or "
                                         f"{EXACT!r}")
    return int(text)


@dataclass
class SampleConfig:
    """The flags of sample.py."""
    checkpoint: str | None                   # the argument without --; None: OURS
    # how the text is drawn
    steps: int | str | None = flag(
        None, "diffusion steps [what a student was distilled for; a teacher 32]; an "
        "autoregressive (AR) model takes one for each token. exact: the distribution of "
        "one token at a time in few calls, for AR and --attention reveal",
        type=steps_or_exact)
    ahead: int = flag(
        8, "with exact: each call asks for this many tokens, and one more for each that is "
        "final; a larger number: fewer calls, each of more tokens", low=1)
    max_calls: int | None = flag(
        None, "with exact: stop after this many calls, with tokens that are not final; the "
        "texts are then approximate", low=1)
    temperature: float = flag(
        1.0, "below 1: likelier tokens more often; changes the distribution", low=0.01)
    top_p: float = flag(
        1.0, "draw only among the likeliest tokens that have this probability together; "
        "changes the distribution", low=0.01, high=1)
    order: str = flag(
        "random", "which masks a step reveals: any; or (confidence) those of which the "
        "model is surest, which changes the distribution and needs full attention",
        choices=ORDERS)
    seed: int = flag(0, "seed of the samples")
    # what is given, and how much is wanted
    prompt: str = flag("", "how the text begins")
    infill: str | None = flag(
        None, 'a text with gaps: "___" has three tokens, "_20_" twenty; a gap is a word '
        "of its own, any other underscore is text")
    num_samples: int = flag(4, "how many texts", low=1)
    length: int | None = flag(None, "tokens of the text [the model's context]", low=1)
    until_end: bool = flag(
        False, "show each text up to its first end-of-text token, where the data have one")
    device: str = device_flag()


# ---- drawing texts

@dataclass
class Sampling:
    """How texts are drawn from a model. distill.py and tools/, which have other flags, make
    one, too."""
    # of diffusion, which needs it, or EXACT; AR takes one per token
    steps: int | str | None = None
    seed: int = 0
    temperature: float = 1.0     # 1: the model's own distribution
    top_p: float = 1.0           # 1: any token may be drawn
    precision: int = 64          # bits of a token draw; 32 shows what rounding does
    sampler: object = None       # f(model, z, sampling) in place of diffusion.sample
    order: str = "random"        # "confidence" is another law, see data/orders.py
    length: int | None = None    # tokens of a text; None: the model's context
    ahead: int = 8               # of EXACT, see diffusion.sample_exact
    max_calls: int | None = None         # likewise


def refuse_exact(steps, max_calls, model, path):
    """Raise UserError where the flags ask for exact sampling that is not possible. steps: a
    list, as tools.evaluate asks for several at once; path: the model's."""
    exact = EXACT in steps
    # one flag without the other
    if max_calls and not exact:
        raise UserError(f"--max_calls stops exact sampling early; give --steps {EXACT} too")
    # it needs a cache that stays exact, which attention causal and reveal have
    if exact and model.config.attention == "full":
        raise UserError(f"{path} has full attention, where all tokens see each other; "
                        "exact sampling needs the order of reveal: python distill.py "
                        f"--attention reveal --teacher {path} adapts it")


def draw_batch(model, known, sampling):
    """Returns texts x (B, L) that begin with known (B, P), on its device, and the calls
    that each text took (B,), or None if all took part in every call. For diffusion known
    may have mask_id in its gaps."""
    length = sampling.length or model.config.context                 # L, prompt included
    dtype = DTYPES[sampling.precision]

    # a new flag that changes the distribution belongs in `adjust`, which all use (but a
    # sampler of one's own): exact sampling makes its draws itself
    def adjust(logits):
        """The model's distribution, sharpened as the flags say: logits (N, V) -> (N, V)."""
        return sharpen(logits, sampling.temperature, sampling.top_p)

    def draw(logits):
        """One token from each row: logits (N, V) -> (N,)."""
        return categorical(adjust(logits), dtype)

    # a mask wherever nothing is known; for an AR model, too, if it is sampled exactly
    z = torch.full((len(known), length), model.mask_id, device=known.device)     # (B, L)
    z[:, :known.shape[1]] = known
    if sampling.steps == EXACT:
        return sample_exact(model, z, model.mask_id, adjust, sampling.ahead,
                            sampling.max_calls)
    if model.config.causal:
        return generate(model, known, length, draw), None            # with its KV cache
    if sampling.sampler:
        return sampling.sampler(model, z, sampling), None            # such as tools.joint's
    if sampling.order == "confidence":
        return sample_confident(model, z, sampling.steps, model.mask_id, draw), None
    # a text without masks takes no part in later calls: of each text only the calls that
    # changed it count
    calls = torch.zeros(len(z), dtype=torch.long)                    # (B,)
    before = z                                                       # (B, L)

    def watch(now):
        """Count a call; `now` (B, L) is a copy of the texts after it."""
        nonlocal before
        calls.add_((now != before).any(1).cpu())
        before = now

    # sample itself uses a KV cache where the model's attention has one
    x = sample(model, z, sampling.steps, model.mask_id, draw, watch)
    return x, calls


def draw_samples(model, n, sampling, procs, prompts=None, title=None, costs=None):
    """n texts (n, L) on the CPU, drawn as `sampling` says. procs: the processes of this run
    (on a laptop one), which share the work; each returns all texts. With the same seed and
    steps all models of one context reveal positions in the same order, so that a teacher
    and its student can be compared.
    prompts: the texts' first tokens (n, P), for diffusion with mask_id in the gaps.
    title: of a progress bar. costs: a list that gets the Cost of each batch."""
    if prompts is None:
        prompts = torch.zeros((n, 0), dtype=torch.long)              # (n, P = 0)

    def batch(i):
        """Texts i to i + BATCH, and their Cost."""
        # a seed for each batch, and number of steps: the texts do not depend on how many
        # processes there are
        seed_all(sampling.seed, "samples", sampling.steps, i)
        known = prompts[i:i + BATCH].to(procs.device)                # (B, P)
        with counted_calls(model) as reads:      # for each call, how many positions
            x, calls = draw_batch(model, known, sampling)            # (B, L)
        if calls is None:                # every text took part in every call
            calls = torch.full((len(x),), len(reads))
        # nfe: calls of the network for the batch; calls: of each text
        return x.cpu(), Cost(nfe=len(reads), calls=calls.tolist(), reads=sum(reads))

    results = spread(range(0, n, BATCH), batch, procs, title)
    if costs is not None:
        costs.extend(cost for _, cost in results)
    return torch.cat([x for x, _ in results])                        # (n, L)


def main():
    # checkpoint: the help of that argument
    config = parse_flags(SampleConfig, __doc__,
                         checkpoint="of train.py, distill.py or tools.convert [the student "
                         "in weights/]")
    # nothing is asked for and somebody looks on: python -m tools.animate, which shows how
    # a text comes about
    if len(sys.argv) == 1 and sys.stdout.isatty():
        runpy.run_module("tools.animate", run_name="__main__", alter_sys=True)
        return
    if config.checkpoint is None:
        config.checkpoint = OURS
        config.steps = config.steps or OUR_STEPS

    procs = start(config.device)
    model, content = load_model(config.checkpoint, procs.device)     # averaged weights
    tokenizer = make_tokenizer(content["tokenizer"])

    refuse_exact([config.steps], config.max_calls, model, config.checkpoint)
    refuse_until_end(config, tokenizer)
    refuse_order(config.order, model, config.checkpoint)
    # every text begins with the same known tokens
    known = known_tokens(config, model, tokenizer)                   # (P,)
    prompts = known.expand(config.num_samples, -1)                   # (n, P)
    # --steps, or those for which a student was distilled, or (a teacher) DEFAULT_STEPS
    steps = config.steps or content.get("sampling_steps") or DEFAULT_STEPS
    # a new flag is in SampleConfig, in Sampling, here, and where draw_batch uses it
    sampling = Sampling(steps=steps, seed=config.seed, temperature=config.temperature,
                        top_p=config.top_p, order=config.order, length=config.length,
                        ahead=config.ahead, max_calls=config.max_calls)
    costs = []                                           # of each batch
    x = draw_samples(model, config.num_samples, sampling, procs, prompts, costs=costs)

    # the model filled its whole context; the text that had the gaps is wanted
    if config.infill is not None:
        x = x[:, :len(known)]                                        # (n, P)
    if procs.rank == 0:
        for row in x.tolist():
            if config.until_end:
                row = up_to_end(row, len(known), tokenizer.end)
            # one text a line, unless it has line ends of its own
            print(tokenizer.decode(row))
        # apart from the texts, which may go into a file
        if steps == EXACT:
            print(calls_as_text(costs, config.max_calls), file=sys.stderr)


if __name__ == "__main__":
    command(main)
