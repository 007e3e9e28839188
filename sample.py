"""Text from any checkpoint: a masked diffusion model or an autoregressive one.

    python sample.py out/stories-nano/round7.pt --steps 8 --num_samples 4
    python sample.py out/stories-nano/round7.pt --prompt "one sunny day tom went to the park ."
    python sample.py out/stories-nano/teacher.pt --infill "one sunny day _ went to the _ ."
    python sample.py out/stories-nano/ar.pt --prompt "one windy day"

    python sample.py out/stories-nano/round7.pt --animate --html text.html
    python sample.py out/stories-nano --race                 # AR, teacher and last student

The checkpoint is all that is needed. Token draws are exact, in float64; --temperature and --top_p
change the law that the model has learned, and are off unless given. Of a folder, --animate, --html
and --gif show the teacher beside the last student, --race AR too, each at its measured speed.
"""
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import animate
from common import UserError, command, flag, load_model, parse_flags, seed_all, start
from data.dataset import make_tokenizer
from diffusion import categorical, sample, sample_joint, sharpen
from model import generate

BATCH = 32                                   # texts at a time


@dataclass
class SampleConfig:
    checkpoint: str                          # the argument without --
    steps: int | None = flag(None, "diffusion steps [what the model was distilled for; a teacher "
                             "32; of a folder 8, in a race the teacher's 128]; AR takes one per "
                             "token", low=1)
    num_samples: int = flag(4, "how many texts", low=1)
    prompt: str = flag("", "how the text begins")
    infill: str | None = flag(None, 'a text with gaps: "___" has three tokens, "_20_" twenty; a gap '
                              "stands between spaces or ends, any other underscore is text")
    length: int | None = flag(None, "tokens of the text [the model's context]", low=1)
    temperature: float = flag(1.0, "below 1: likelier tokens more often; changes the law",
                              low=0.01)
    top_p: float = flag(1.0, "draw only among the likeliest tokens that have this probability "
                        "together; changes the law", low=0.01, high=1)
    animate: bool = flag(False, "show in the terminal how the first text comes about")
    html: str | None = flag(None, "the same as a web page, in this file")
    gif: str | None = flag(None, "the same as a GIF (needs matplotlib with pillow)")
    race: bool = flag(False, "of a folder: AR, teacher and last student by measured time")
    seed: int = flag(0, "seed of the samples")
    device: str = flag("auto", "where to run", choices=["auto", "cpu", "cuda"])


# ---- samples

def spread(parts, f, p, title=None):
    """[f(part) for part in parts], dealt out to the processes in turn; each gets all results."""
    parts = list(parts)
    mine = [f(part) for part in tqdm(parts[p.rank::p.world], desc=title, leave=False, ncols=90,
                                     disable=title is None or p.rank > 0)]
    everyone = [mine]
    if p.world > 1:
        dist.all_gather_object(everyone := [None] * p.world, mine)
    return [everyone[i % p.world][i // p.world] for i in range(len(parts))]


def draw_samples(model, n, steps, p, seed, title=None, temperature=1.0, top_p=1.0, precision=64,
                 joint=False, length=None, prompts=None, calls=None):
    """n texts (n, L) on the CPU: diffusion in `steps` steps, AR token by token. The same seed gives
    models of one shape the same order of reveal. prompts: their first tokens (n, P), for diffusion
    with mask_id in the gaps. joint: see diffusion.sample_joint; precision: bits of the draw. calls:
    a list that gets the number of network calls of each batch."""
    dtype, L = {32: torch.float32, 64: torch.float64}[precision], length or model.config.context

    def draw(logits):
        return categorical(sharpen(logits, temperature, top_p), dtype)

    def write(i):
        seed_all(seed, "samples", steps, i)
        known = torch.zeros((min(BATCH, n - i), 0), dtype=torch.long)
        known = (known if prompts is None else prompts[i:i + BATCH]).to(p.device)
        if model.config.causal:
            return generate(model, known, L, draw).cpu()
        z = torch.full((len(known), L), model.mask_id, device=p.device)
        z[:, :known.shape[1]] = known
        return (sample_joint(model, z, steps, model.mask_id, dtype, temperature) if joint else
                sample(model, z, steps, model.mask_id, draw)).cpu()

    def batch(i):
        count = []
        hook = model.embed.register_forward_hook(lambda *_: count.append(1))
        x = write(i)
        hook.remove()
        return x, len(count)
    x, counts = zip(*spread(range(0, n, BATCH), batch, p, title))
    if calls is not None:
        calls += counts
    return torch.cat(x)


# ---- what is given, and what is shown

GAP = re.compile(r"(?<!\S)(_+\d+_+|_+)(?!\S)")      # alone between white space or ends


def parse_infill(text, tokenizer, mask_id):
    """"a ___ b _20_" -> ids with mask_id in the gaps: 3 for the first, 20 for the second. Any other
    underscore is text, as in file_name."""
    ids = []
    for i, part in enumerate(GAP.split(text)):
        if i % 2:                            # every second part is a gap
            number = part.strip("_")
            ids += [mask_id] * int(number or len(part))
        elif tokenizer.spec["kind"] == "chars":
            ids += tokenizer.encode(part)
        else:                                # the space before a gap belongs to the gap's token
            ids += tokenizer.encode(part.removesuffix(" "))
    return ids


def without_last_space(c, tokenizer):
    """Drop the spaces at the end of c.prompt where words have theirs before them (GPT-2's tokens
    and ours), and say so: a space by itself is hardly ever followed by a word."""
    if tokenizer.spec["kind"] in ("bpe", "gpt2") and c.prompt.endswith(" "):
        c.prompt = c.prompt.rstrip(" ")
        print("the space at the end of --prompt is left out: it belongs to the token that follows",
              file=sys.stderr)


def known_tokens(c, model, tokenizer):
    """The text that is given: ids (n,), mask_id in its gaps. Raises UserError if it cannot be."""
    if c.infill is not None and c.prompt:
        raise UserError("--prompt and --infill together; put the prompt at the start of --infill")
    if c.infill is not None and model.config.causal:
        raise UserError(f"{c.checkpoint} is autoregressive and cannot fill gaps; give --prompt, "
                        "or a diffusion checkpoint")
    if c.length and c.length > model.config.context:
        raise UserError(f"--length {c.length} is beyond the model's context of "
                        f"{model.config.context} tokens")
    without_last_space(c, tokenizer)
    ids = (tokenizer.encode(c.prompt) if c.infill is None else
           parse_infill(c.infill, tokenizer, model.mask_id))
    length = c.length or model.config.context
    if len(ids) > length:
        raise UserError(f"--{'prompt' if c.infill is None else 'infill'} has {len(ids)} tokens, "
                        f"more than the text's {length}; shorten it")
    return torch.tensor(ids, dtype=torch.long)


def racers(c):
    """The files that are shown side by side: [(path, title, steps or None)]."""
    path = Path(c.checkpoint)
    if not path.is_dir():
        if c.race:
            raise UserError(f"--race {path}: give the folder of ar.pt, teacher.pt and round files")
        return [(path, path.stem, c.steps)]
    rounds = sorted(path.glob("round*.pt"), key=lambda p: (len(p.name), p.name))
    missing = [name for name in ("ar.pt", "teacher.pt")[not c.race:] if not (path / name).exists()]
    if missing or not rounds:
        raise UserError(f"{path} has no {' or '.join(missing or ['round file'])}; "
                        "python distill.py makes them")
    found = [(path / "teacher.pt", "teacher", 128 if c.race else c.steps or 8),
             (rounds[-1], f"student ({rounds[-1].stem})", c.steps or 8)]
    return [(path / "ar.pt", "AR with KV cache", None)] * c.race + found


RUNS, LONGEST = 5, 30.0              # timed runs of each in a race, and seconds for all of them


def race(records):
    """The best of several runs of each, alternating: records are functions that run once and give
    a Trace. The first run of each is not timed."""
    best = [record() for record in records]
    best = [record() for record in records]
    began = time.perf_counter()
    for _ in range(RUNS - 1):
        if time.perf_counter() - began > LONGEST:
            break
        for i, record in enumerate(records):
            trace = record()
            if trace.seconds[-1] < best[i].seconds[-1]:
                best[i] = trace
    return best


def busy():
    """A warning where others use the machine, else None (also where the system does not tell)."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5 * torch.get_num_threads():
        return f"warning: the machine is busy (load {load:.1f}); times may be several times too long"


def show(c, p, draw):
    """Record what --animate, --html, --gif or --race ask for, and show it."""
    warning, records = busy(), []
    for path, title, steps in racers(c):
        model, content = load_model(path, p.device)
        tokenizer = make_tokenizer(content["tokenizer"])
        known = known_tokens(c, model, tokenizer).to(p.device)
        length = c.length or model.config.context
        steps = steps or content.get("sampling_steps") or 32

        def record(args=(model, known, length, steps, draw, tokenizer, title)):
            seed_all(c.seed, "samples", args[3], 0)
            return animate.record(*args)
        records.append(record)
    traces = race(records) if c.race else [record() for record in records]
    for trace in traces if c.infill is not None else []:         # the model wrote on after it
        trace.texts, trace.opened = trace.texts[:len(known)], trace.opened[:len(known)]
    if c.html:
        animate.write_page(traces, c.html, c.race)
    if c.gif:
        animate.write_gif(traces, c.gif, c.race)
    if c.animate or not (c.html or c.gif):
        animate.play(traces, c.race)
    if c.race:
        ar = traces[0].seconds[-1]
        for trace in traces:
            end = trace.seconds[-1]
            print(f"{trace.title}: {end * 1000:.1f} ms, {ar / end:.2f} times AR's speed")
        print(f"each the best of at most {RUNS} runs in turn")
        if warning:
            print(warning)
    for path in filter(None, (c.html, c.gif)):
        print(f"{path} is written")


def main():
    c = parse_flags(SampleConfig, __doc__, checkpoint="of train.py or distill.py")
    p = start(c.device)
    if c.animate or c.html or c.gif or c.race:
        return show(c, p, lambda logits: categorical(sharpen(logits, c.temperature, c.top_p)))
    model, content = load_model(c.checkpoint, p.device)
    tokenizer = make_tokenizer(content["tokenizer"])
    known = known_tokens(c, model, tokenizer).expand(c.num_samples, -1)      # (B, n)
    x = draw_samples(model, c.num_samples, c.steps or content.get("sampling_steps") or 32, p,
                     c.seed, None, c.temperature, c.top_p, length=c.length, prompts=known)
    if c.infill is not None:                 # the model wrote on after the template
        x = x[:, :known.shape[1]]
    for row in x.tolist() if p.rank == 0 else []:
        print(tokenizer.decode(row))


if __name__ == "__main__":
    command(main)
