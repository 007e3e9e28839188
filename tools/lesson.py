"""Two examples from a distilled folder: why many tokens at once go wrong, and what a round teaches.

    python -m tools.lesson out/stories-nano
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from common import Processes, command, flag, load_model, parse_flags, seed_all
from data.dataset import load_data, make_tokenizer
from data.files import UserError
from data.stories import language
from diffusion import q_sample, unmask_step
from distill import DistillConfig, schedule
from sample import Sampling, draw_samples

CPU = Processes(torch.device("cpu"))


@dataclass
class Config:
    folder: str                              # the argument without --
    steps: int = flag(4, "of the teacher's text that goes wrong", low=1)
    seed: int = flag(7, "of text and noise")


def shown(ids, tokenizer, mask_id):
    """Ids (L,) as text, masks as blocks."""
    return " ".join("░░░" if i == mask_id else tokenizer.decode([i]) for i in ids.tolist())


def likeliest(logits, tokenizer, n=3):
    """The n likeliest tokens under logits (V,), with their probabilities."""
    p, ids = logits.softmax(-1).topk(n)
    return ", ".join(f"{tokenizer.decode([i])} {q:.0%}" for i, q in zip(ids.tolist(), p.tolist()))


def contradiction(model, tokenizer, steps, seed):
    """The text with the fewest faults, but not without one, of 64 in so many steps."""
    texts = [tokenizer.decode(row).split() for row in
             draw_samples(model, 64, Sampling(steps, seed), CPU).tolist()]
    faults = [(len(language.contradictions(text)), i) for i, text in enumerate(texts)]
    _, i = min((n, i) for n, i in faults if n)
    print(f"The teacher in {steps} steps writes all tokens of a step without seeing the others:\n\n"
          f"    {' '.join(texts[i])}\n")
    for fault in language.contradictions(texts[i]):
        print(f"    - {fault}")


@torch.no_grad()
def round_of(teacher, student, x, dt, tokenizer, seed):
    """Two steps of the teacher from a noisy x (1, L), and at the two positions where the second
    knows most more than the first: what both say, and the student, who only saw the beginning."""
    t, mask_id = torch.tensor([0.75]), teacher.mask_id
    seed_all("lesson", seed)
    z = q_sample(x, t, mask_id)
    z_s, opened, _ = unmask_step(teacher, z, t, t - dt, mask_id)
    now, later, learned = teacher(z)[0], teacher(z_s)[0], student(z)[0]      # (L, V)
    gain = (later.softmax(-1) * (later.log_softmax(-1) - now.log_softmax(-1))).sum(-1)
    gain[z_s[0] != mask_id] = -1
    print(f"\nA step of the teacher from t = {t.item():g} to {t.item() - dt:g} opens "
          f"{int(opened.sum())} of {int((z == mask_id).sum())} masks:\n\n"
          f"    z_t      {shown(z[0], tokenizer, mask_id)}\n"
          f"    z_t-dt   {shown(z_s[0], tokenizer, mask_id)}\n\n"
          "What is still masked, it would now predict otherwise. That is what the student learns "
          "to say at once, from z_t:\n")
    for i in gain.topk(2).indices.sort().values.tolist():
        print(f"    position {i}, where the text has {tokenizer.decode([x[0, i].item()])!r}\n"
              f"        teacher, first step    {likeliest(now[i], tokenizer)}\n"
              f"        teacher, second step   {likeliest(later[i], tokenizer)}\n"
              f"        student, one step      {likeliest(learned[i], tokenizer)}")


def main():
    c = parse_flags(Config, __doc__, folder="of distill.py, for the dataset stories")
    rounds = sorted(Path(c.folder).glob("round*.pt"), key=lambda p: (len(p.name), p.name))
    if len(rounds) < 2:
        raise UserError(f"{c.folder} has fewer than two round files; python distill.py makes them")
    (teacher, _), (student, content) = (load_model(path) for path in rounds[-2:])
    first, about = load_model(Path(c.folder) / "teacher.pt")
    tokenizer, flags = make_tokenizer(about["tokenizer"]), DistillConfig(**content["config"])
    data = load_data(flags.dataset, CPU)
    if data.oracle != "stories":
        raise UserError(f"{c.folder} was trained on {flags.dataset}; the examples need stories")
    contradiction(first, tokenizer, c.steps, c.seed)
    dt = 1 / schedule(flags.teacher_steps, content["round"], flags.k)[-2]
    x = data.pieces(1 + c.seed, data.stride)[-1:]
    round_of(teacher, student, x, dt, tokenizer, c.seed)


if __name__ == "__main__":
    command(main)
