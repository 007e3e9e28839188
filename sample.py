"""Text from any checkpoint, a masked diffusion model or an autoregressive one; and what texts are
worth: the few measures that distill.py's table and bench.py need.

    python sample.py out/stories-nano/round7.pt --steps 8 --num_samples 4
    python sample.py out/stories-nano/round7.pt --prompt "one sunny day tom went to the park ."
    python sample.py out/stories-nano/teacher.pt --infill "one sunny day _ went to the _ ."
    python sample.py out/stories-nano/ar.pt --prompt "one windy day"

The checkpoint is all that is needed. Token draws are exact, in float64; --temperature and --top_p
change the law that the model has learned, and are off unless given. How a text comes about, as an
animation or a race: python -m tools.animate.
"""
import math
import re
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import command, flag, load_model, parse_flags, seed_all, start
from data.dataset import copies, make_tokenizer, oracle, retokenise
from data.files import UserError
from diffusion import categorical, sample, sample_joint, sharpen
from model import generate, nll

BATCH = 32                               # texts at a time, written or judged
DEFAULT_STEPS = 32                       # of a teacher, which is made for no number of steps


@dataclass
class SampleConfig:
    checkpoint: str                          # the argument without --
    steps: int | None = flag(None, "diffusion steps [what the model was distilled for; a teacher "
                             "32]; AR takes one per token", low=1)
    num_samples: int = flag(4, "how many texts", low=1)
    prompt: str = flag("", "how the text begins")
    infill: str | None = flag(None, 'a text with gaps: "___" has three tokens, "_20_" twenty; a gap '
                              "stands between spaces or ends, any other underscore is text")
    length: int | None = flag(None, "tokens of the text [the model's context]", low=1)
    temperature: float = flag(1.0, "below 1: likelier tokens more often; changes the law",
                              low=0.01)
    top_p: float = flag(1.0, "draw only among the likeliest tokens that have this probability "
                        "together; changes the law", low=0.01, high=1)
    seed: int = flag(0, "seed of the samples")
    device: str = flag("auto", "where to run", choices=["auto", "cpu", "cuda"])


# ---- samples

def spread(parts, f, p, title=None):
    """[f(part) for part in parts], dealt out to the processes p in turn; each gets all results.
    title: of a progress bar."""
    parts = list(parts)
    mine = []
    hidden = title is None or p.rank > 0
    for part in tqdm(parts[p.rank::p.world], desc=title, leave=False, ncols=90, disable=hidden):
        mine.append(f(part))
    everyone = [mine]
    if p.world > 1:
        everyone = [None] * p.world
        dist.all_gather_object(everyone, mine)
    # part i was process (i mod world)'s, as its (i div world)-th
    return [everyone[i % p.world][i // p.world] for i in range(len(parts))]


def draw_samples(model, n, steps, p, seed, title=None, temperature=1.0, top_p=1.0, precision=64,
                 joint=False, length=None, prompts=None, calls=None):
    """n texts (n, L) on the CPU: diffusion in `steps` steps, AR token by token. The same seed gives
    models of one shape the same order of reveal.
    prompts: their first tokens (n, P), for diffusion with mask_id in the gaps. joint: see
    diffusion.sample_joint; precision: bits of the draw, 32 or 64. calls: a list that gets the
    number of network calls of each batch. title: of a progress bar."""
    dtype = {32: torch.float32, 64: torch.float64}[precision]
    length = length or model.config.context
    if prompts is None:
        prompts = torch.zeros((n, 0), dtype=torch.long)

    def draw(logits):
        return categorical(sharpen(logits, temperature, top_p), dtype)

    def write(i):
        """Texts i to i + BATCH."""
        # a seed for each batch: the texts do not depend on how many processes there are
        seed_all(seed, "samples", steps, i)
        known = prompts[i:i + BATCH].to(p.device)                    # (B, P)
        if model.config.causal:
            return generate(model, known, length, draw).cpu()
        z = torch.full((len(known), length), model.mask_id, device=p.device)
        z[:, :known.shape[1]] = known
        if joint:
            return sample_joint(model, z, steps, model.mask_id, dtype, temperature).cpu()
        return sample(model, z, steps, model.mask_id, draw).cpu()

    def batch(i):
        """The same, and how often the network was called: each call embeds tokens once."""
        count = []
        hook = model.embed.register_forward_hook(lambda *_: count.append(1))
        x = write(i)
        hook.remove()
        return x, len(count)

    texts = []
    for x, count in spread(range(0, n, BATCH), batch, p, title):
        texts.append(x)
        if calls is not None:
            calls.append(count)
    return torch.cat(texts)


# ---- what samples are worth: pure functions of texts x (n, L), each value with its standard error

def mean_se(values):
    """Mean of values (n,), None where there are none, and its standard error, None of fewer than
    two."""
    values, n = values.double(), len(values)
    mean = values.mean().item() if n else None
    error = (values.std() / math.sqrt(n)).item() if n > 1 else None
    return mean, error


def exp(x):
    """e to the x, infinite where a float cannot hold it."""
    return math.exp(x) if x < 709 else math.inf


def make_judge(model, spec=None, tokenizer=None):
    """An AR model as a judge: f(x (n, L), skip=0) -> nats (n,), tokens (n,), what each text costs
    it but for its first `skip` tokens, and of how many of its tokens that is. spec: of the judge's
    tokenizer; where `tokenizer`, the texts', is another, they are read in the judge's tokens (see
    data.dataset.retokenise), and judged up to the judge's context."""
    same = tokenizer is None or spec == tokenizer.spec
    judges = None if same else make_tokenizer(spec)

    def read(row):
        if same:
            return row
        return retokenise(row, tokenizer, judges)[:model.config.context]

    @torch.no_grad()
    def judge(x, skip=0):
        rows = [read(row) for row in x.tolist()]
        begin = [len(read(row[:skip])) for row in x.tolist()]
        begin = torch.tensor(begin, device=x.device)                 # (n,)
        end = torch.tensor([len(row) for row in rows], device=x.device)
        # rows of one width: what stands beyond a text's end is not seen from within it
        width = max(1, int(end.max()))
        y = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=x.device)
        place = torch.arange(width, device=x.device)
        within = (place >= begin[:, None]) & (place < end[:, None])  # (n, width)
        nats = torch.cat([nll(model, part, model.mask_id) for part in y.split(BATCH)])
        return (nats * within).sum(1).double(), within.sum(1)
    return judge


def perplexity(nats, tokens):
    """exp of the mean nats per token of texts that cost nats (n,), and its standard error."""
    mean = (nats.sum() / tokens.sum()).item()
    error = mean_se((nats - mean * tokens) / tokens.double().mean())[1]
    return exp(mean), exp(mean) * error


def gen_ppl(judge, x):
    """Generative perplexity of x (n, L): exp of the judge's mean nats per token, and its SE."""
    return perplexity(*judge(x))


def entropy(x, vocab):
    """Entropy of each sequence's own token frequencies, x (n, L) -> mean in nats, and its SE.
    Below the data's it means repetition within a text."""
    counts = torch.zeros(len(x), vocab).scatter_add_(1, x, torch.ones(x.shape))
    return mean_se(torch.special.entr(counts / x.shape[1]).sum(1))


def pooled_entropy(x, vocab):
    """Entropy of the token frequencies of all of x (n, L) together, in nats, and its SE.
    Below the data's it means that the texts resemble each other, be each as rich as it may."""
    p = torch.bincount(x.flatten(), minlength=vocab) / x.numel()     # (V,)
    return mean_se(-p.log()[x].mean(1))      # the entropy is the mean of -log p over all tokens


def put(row, name, value):
    """row[name], row[name_se] = value: a mean with its standard error."""
    row[name], row[name + "_se"] = value


def measure(x, judge, data):
    """The measures that cost next to nothing: {"gen_ppl", "gen_ppl_se", "entropy", ...,
    "samples", "tokens"} of samples x (n, L). gen_ppl weighs tokens, text_ppl is the mean of the
    texts' own perplexities; judge None: neither."""
    row = {"samples": len(x), "tokens": x.numel()}
    vocab, none = data.tokenizer.vocab, (None, None)
    put(row, "gen_ppl", none)
    put(row, "text_ppl", none)
    if judge:
        nats, tokens = judge(x)
        put(row, "gen_ppl", perplexity(nats, tokens))
        put(row, "text_ppl", mean_se((nats / tokens.clamp(min=1)).exp()))
    x = x.cpu()
    put(row, "entropy", entropy(x, vocab))
    put(row, "pooled_entropy", pooled_entropy(x, vocab))

    # what only some datasets can say: whether a text is valid, or a copy
    judged, copied = oracle(x, data), copies(x, data)
    put(row, "valid", none)
    put(row, "contradictions", none)
    put(row, "copies", none if copied is None else mean_se(copied))
    put(row, "log_p", none)
    if judged:
        faults, log_p = judged
        put(row, "valid", mean_se(faults == 0))
        put(row, "contradictions", mean_se(faults))
        put(row, "log_p", mean_se(log_p[faults == 0]))
    return row


def sample_row(name, model, judge, data, steps, n, p, seed, context, **how):
    """One row of results, and the samples in it: n samples of a model (None: n texts of the
    validation data, of `context` tokens), measured. how: see draw_samples."""
    began, calls = time.time(), []
    if model is None:
        x = data.pieces(n, context)          # none twice, which self-BLEU would notice
    else:
        title = f"{name}, {steps} steps" if steps else name          # AR has no number of steps
        x = draw_samples(model, n, steps, p, seed, title, calls=calls, **how)
    row = {"model": name, "steps": steps, "nfe": sum(calls) / len(calls) if calls else None,
           "temperature": how.get("temperature", 1.0), "precision": how.get("precision", 64),
           "joint": how.get("joint", False), "seed": seed}
    row |= measure(x.to(p.device), judge, data)
    if model is None:
        row |= {"temperature": None, "precision": None}
    row["seconds"] = round(time.time() - began, 2)
    return row, x


# ---- what is given

GAP = re.compile(r"(?<!\S)(_+\d+_+|_+)(?!\S)")       # alone between white space or ends


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
    if c.infill is None:
        without_last_space(c, tokenizer)
        name, ids = "prompt", tokenizer.encode(c.prompt)
    else:
        name, ids = "infill", parse_infill(c.infill, tokenizer, model.mask_id)
    length = c.length or model.config.context
    if len(ids) > length:
        raise UserError(f"--{name} has {len(ids)} tokens, more than the text's {length}; shorten it")
    return torch.tensor(ids, dtype=torch.long)


def main():
    c = parse_flags(SampleConfig, __doc__, checkpoint="of train.py, distill.py or tools.convert")
    p = start(c.device)
    model, content = load_model(c.checkpoint, p.device)
    tokenizer = make_tokenizer(content["tokenizer"])
    known = known_tokens(c, model, tokenizer).expand(c.num_samples, -1)      # (n, P)
    steps = c.steps or content.get("sampling_steps") or DEFAULT_STEPS
    x = draw_samples(model, c.num_samples, steps, p, c.seed, temperature=c.temperature,
                     top_p=c.top_p, length=c.length, prompts=known)
    if c.infill is not None:                 # the model wrote on after the template
        x = x[:, :known.shape[1]]
    if p.rank == 0:
        for row in x.tolist():
            print(tokenizer.decode(row))


if __name__ == "__main__":
    command(main)
