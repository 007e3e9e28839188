"""Text from any checkpoint, a masked diffusion model or an autoregressive one.

    python sample.py             # watch the student in weights/ write a story in 8 steps
    python sample.py out/stories-nano/round7.pt --steps 8 --num_samples 4
    python sample.py out/stories-nano/round7.pt --steps 8 --prompt "one sunny day tom"
    python sample.py out/stories-nano/teacher.pt --infill "one sunny day _ went to the _ ."
    python sample.py out/stories-nano/ar.pt --prompt "one windy day"
    python sample.py weights/teacher.pt --steps exact

With a checkpoint give --steps: a student's default is what it was distilled for (round 7: 2
steps), too few for good stories. --temperature, --top_p and --order change the distribution
on purpose. Without arguments, in a terminal, this is an animation; python -m tools.animate
has others.
"""
import runpy
import sys
from dataclasses import dataclass

import torch

from cache import generate
from common import ROOT, seed_all
from data.checkpoints import load_model
from data.cost import CallsOfTexts, calls_as_text, cost_of, counted_calls
from data.dataset import make_tokenizer
from data.files import UserError
from data.orders import ORDERS, check_order, sample_confident
from data.processes import spread, start
from data.prompts import known_tokens, check_until_end, up_to_end
from data.script import EXACT, command, device_flag, flag, parse_flags, steps_or_exact
from diffusion import categorical, sample, sharpen
from exact import sample_exact

BATCH = 32                               # texts that are written at a time
DEFAULT_STEPS = 32               # of a teacher, which was not distilled for any number
# without a checkpoint: this student, in 8 steps. It was distilled for 2, in which few of
# its stories are valid
OURS = ROOT / "weights/round7.pt"
OUR_STEPS = 8


# ---- how texts are drawn, and the flags

@dataclass
class Sampling:
    """How texts are drawn from a model. The fields are flags of sample.py; distill.py's
    table and tools/ make a Sampling by themselves."""
    steps: int | str | None = flag(
        None, "diffusion steps [a student: what it was distilled for, or 8 if no "
        "checkpoint is given; a teacher: 32]; an autoregressive (AR) model takes one per "
        "token. exact: the distribution of one token at a time in few calls; not with "
        "full attention", type=steps_or_exact)
    seed: int = flag(0, "seed of the samples")
    temperature: float = flag(
        1.0, "below 1: likelier tokens more often; changes the distribution", low=0.01)
    top_p: float = flag(
        1.0, "draw only among the likeliest tokens that have this probability together; "
        "changes the distribution", low=0.01, high=1)
    order: str = flag(
        "random", "which masks a step reveals: any; or (confidence) those of which the "
        "model is surest, which changes the distribution and needs full attention",
        choices=ORDERS)
    length: int | None = flag(None, "tokens of the text [the model's context]", low=1)
    ahead: int = flag(
        8, "with exact: how many tokens a call guesses: this many plus the number of final "
        "ones (with 20 final, 28). More: fewer calls, each of more tokens", low=1)
    max_calls: int | None = flag(
        None, "with exact: stop after this many calls, with tokens that are not final; the "
        "texts are then approximate", low=1)

    # apart from `draw`, as exact sampling needs each guess's distribution, not a draw from
    # it: it keeps or redraws guesses by itself
    def adjust(self, logits):
        """Apply temperature and top_p: logits (N, V) -> (N, V)."""
        return sharpen(logits, self.temperature, self.top_p)

    def draw(self, logits):
        """One token from each row: logits (N, V) -> (N,)."""
        return categorical(self.adjust(logits))

    def write(self, model, known):
        """Draw texts that begin with known (B, P); for diffusion it may have mask_id in
        gaps. Returns the texts (B, L), and the network calls that each one needed (B,), or
        None: as many as the batch."""
        # known, then masks (sample_exact fills these for AR, too)
        z = with_masks_behind(model, known, self.length)             # (B, L)
        calls = None
        if self.steps == EXACT:
            # several tokens a call: diffusion in the order of reveal, or AR in its own
            # (exact.py says how)
            x, calls = sample_exact(model, z, model.mask_id, self.adjust, self.ahead,
                                    self.max_calls)
        elif model.config.causal:
            # AR: one token a call, with its KV cache
            x = generate(model, known, z.shape[1], self.draw)
        elif self.order == "confidence":
            # the surest tokens first: another distribution
            x = sample_confident(model, z, self.steps, model.mask_id, self.draw)
        else:
            # diffusion in steps, with a KV cache if the attention is "reveal". After each
            # step sample calls count(z), which adds a call to every text that has changed
            count = CallsOfTexts(z)
            x = sample(model, z, self.steps, model.mask_id, self.draw, watch=count)
            calls = count.calls.cpu()
        return x, calls                                              # (B, L), (B,) or None


@dataclass
class SampleConfig(Sampling):
    """The flags of sample.py."""
    checkpoint: str | None = None            # the argument without --; None: OURS
    # what is given, and how much is wanted
    prompt: str = flag("", "how the text begins")
    infill: str | None = flag(
        None, 'a text with gaps: "___" has three tokens, "_20_" twenty; a gap is a word '
        "of its own, any other underscore is text")
    num_samples: int = flag(4, "how many texts", low=1)
    until_end: bool = flag(
        False, "show each text up to its first end-of-text token, where the data have one")
    device: str = device_flag()


# ---- drawing texts

def with_masks_behind(model, known, length):
    """Texts (B, L) that begin with known (B, P), and have masks behind it. length: L; None:
    the model's context."""
    length = length or model.config.context
    z = torch.full((len(known), length), model.mask_id, device=known.device)
    z[:, :known.shape[1]] = known                                    # the first P
    return z


def check_exact(steps, max_calls, model, path):
    """Raise UserError if flags of exact sampling cannot be met. steps: a list, since
    tools.evaluate has several; path: of the model, for the message."""
    exact = EXACT in steps
    # no other sampler can stop early
    if max_calls and not exact:
        raise UserError(f"--max_calls stops exact sampling early; give --steps {EXACT} too")
    # with full attention no cache is exact
    if exact and model.config.attention == "full":
        raise UserError(f"{path} has full attention, where all tokens see each other; "
                        "exact sampling needs the order of reveal: python distill.py "
                        f"--attention reveal --teacher {path} adapts it")


def draw_samples(model, n, sampling, procs, prompts=None, title=None, costs=None):
    """n texts (n, L) on the CPU, drawn as `sampling` says. procs: the processes of this run
    (on a laptop one), which share the work; every one returns all n. With the same seed,
    steps, length and prompt any diffusion model reveals the same positions in each step,
    as `sample` draws its plan before any token: so a teacher and its student can be
    compared.
    prompts: the texts' first tokens (n, P), for diffusion with mask_id in the gaps.
    title: of a progress bar. costs: a list that gets the Cost of each batch."""
    if prompts is None:
        prompts = torch.zeros((n, 0), dtype=torch.long)              # (n, P = 0)

    def batch(i):
        """Texts i to i + BATCH, and their Cost."""
        # the seed depends on the batch and on the steps, not on the process. So the lines
        # of a table, one for each number of steps, are independent
        seed_all(sampling.seed, "samples", sampling.steps, i)
        known = prompts[i:i + BATCH].to(procs.device)                # (B, P)
        # sizes: an entry for each network call, the number of positions that it computed
        with counted_calls(model) as sizes:
            x, calls = sampling.write(model, known)                  # (B, L); (B,) or None
        return x.cpu(), cost_of(sizes, calls, len(x))

    # [(texts, Cost)] of all batches, in their order, on every process
    results = spread(range(0, n, BATCH), batch, procs, title)
    if costs is not None:
        costs.extend(cost for _, cost in results)
    return torch.cat([x for x, _ in results])                        # (n, L)


def main():
    # checkpoint=: the help text of the argument without --
    config = parse_flags(SampleConfig, __doc__,
                         checkpoint="of train.py, distill.py or tools.convert [the student "
                         "in weights/]")
    # without arguments, in a terminal: as if called by python -m tools.animate, which has
    # flags of its own
    if len(sys.argv) == 1 and sys.stdout.isatty():
        runpy.run_module("tools.animate", run_name="__main__", alter_sys=True)
        return
    if config.checkpoint is None:
        config.checkpoint = OURS
        config.steps = config.steps or OUR_STEPS

    procs = start(config.device)
    model, content = load_model(config.checkpoint, procs.device)     # averaged weights
    tokenizer = make_tokenizer(content["tokenizer"])

    check_exact([config.steps], config.max_calls, model, config.checkpoint)
    check_until_end(config, tokenizer)
    check_order(config.order, model, config.checkpoint)
    # every text begins with the same known tokens
    known = known_tokens(config, model, tokenizer)                   # (P,)
    prompts = known.expand(config.num_samples, -1)                   # (n, P)
    # --steps, or those for which a student was distilled, or (a teacher) DEFAULT_STEPS. AR
    # takes no steps, but the number is part of its seed, see draw_samples
    config.steps = config.steps or content.get("sampling_steps") or DEFAULT_STEPS
    costs = []                                           # of each batch
    x = draw_samples(model, config.num_samples, config, procs, prompts, costs=costs)

    # the model wrote whole texts, as in training; drop what follows the text with the gaps
    if config.infill is not None:
        x = x[:, :len(known)]                                        # (n, P)
    if procs.rank == 0:
        for row in x.tolist():
            if config.until_end:
                row = up_to_end(row, len(known), tokenizer.end)
            # one text a line, unless it has line ends of its own
            print(tokenizer.decode(row))
        # apart from the texts, which may go into a file
        if config.steps == EXACT:
            print(calls_as_text(costs, config.max_calls), file=sys.stderr)


if __name__ == "__main__":
    command(main)
