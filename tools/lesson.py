"""Two examples from a distilled folder: why many tokens at once go wrong, and what a round
teaches.

    python -m tools.lesson out/stories-nano
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from common import Processes, seed_all
from data.checkpoints import load_model
from data.dataset import load_data, make_tokenizer
from data.files import UserError
from data.script import command, flag, parse_flags
from data.stories import language
from diffusion import q_sample, unmask_step
from distill import DistillConfig, schedule
from sample import Sampling, draw_samples

CPU = Processes(torch.device("cpu"))


@dataclass
class LessonConfig:
    """The flags of tools.lesson."""
    folder: str                              # the argument without --
    steps: int = flag(4, "of the teacher's text that goes wrong", low=1)
    seed: int = flag(7, "of text and noise")


def as_text(ids, tokenizer, mask_id):
    """Ids (L,) as text, masks as blocks."""
    words = ["░░░" if i == mask_id else tokenizer.decode([i]) for i in ids.tolist()]
    return " ".join(words)


def likeliest(logits, tokenizer, n=3):
    """The n likeliest tokens under logits (V,), with their probabilities."""
    p, ids = logits.softmax(-1).topk(n)                              # (n,) both
    words = [tokenizer.decode([i]) for i in ids.tolist()]
    return ", ".join(f"{word} {share:.0%}" for word, share in zip(words, p.tolist()))


# ---- first example: tokens that are revealed together do not see each other

def contradiction(model, tokenizer, steps, seed):
    """Print the text with the fewest faults, but at least one, of 64 in so many steps."""
    x = draw_samples(model, 64, Sampling(steps, seed), CPU)          # (64, L)
    faulty = []
    for row in x.tolist():
        words = tokenizer.decode(row).split()
        faults = language.contradictions(words)
        if faults:
            faulty.append((len(faults), words, faults))
    _, words, faults = min(faulty, key=lambda text: text[0])
    print(f"The teacher in {steps} steps writes all tokens of a step without seeing the "
          f"others:\n\n    {' '.join(words)}\n")
    for fault in faults:
        print(f"    - {fault}")


# ---- second example: what the teacher's second step knows, and what the student learns

@torch.no_grad()
def round_of(teacher, student, x, dt, tokenizer, seed):
    """Print a noisy x (1, L) before and after a step of the teacher, and for the two masks
    where its second step knows most more than its first what both predict, and what the
    student does, who sees only the beginning."""
    t, mask_id = torch.tensor([0.75]), teacher.mask_id
    seed_all("lesson", seed)
    z = q_sample(x, t, mask_id)
    z_s, revealed, _ = unmask_step(teacher, z, t, t - dt, mask_id)
    first, second, one = teacher(z)[0], teacher(z_s)[0], student(z)[0]       # (L, V)
    # what the second step has learned: KL(second || first) at what is still masked
    gain = second.softmax(-1) * (second.log_softmax(-1) - first.log_softmax(-1))
    gain = gain.sum(-1)                                              # (L,)
    gain[z_s[0] != mask_id] = -1
    positions = gain.topk(2).indices.sort().values

    print(f"\nA step of the teacher from t = {t.item():g} to {t.item() - dt:g} reveals "
          f"{int(revealed.sum())} of {int((z == mask_id).sum())} masks:\n\n"
          f"    z_t      {as_text(z[0], tokenizer, mask_id)}\n"
          f"    z_t-dt   {as_text(z_s[0], tokenizer, mask_id)}\n\n"
          "What is still masked, it would now predict otherwise. That is what the student "
          "learns to say at once, from z_t:\n")
    for i in positions.tolist():
        word = tokenizer.decode([x[0, i].item()])
        print(f"    position {i}, where the text has {word!r}\n"
              f"        teacher, first step    {likeliest(first[i], tokenizer)}\n"
              f"        teacher, second step   {likeliest(second[i], tokenizer)}\n"
              f"        student, one step      {likeliest(one[i], tokenizer)}")


def main():
    config = parse_flags(LessonConfig, __doc__,
                         folder="of distill.py, for the dataset stories")
    folder = Path(config.folder)
    # the last round's student, and the one before, which was its teacher
    rounds = sorted(folder.glob("round*.pt"), key=lambda path: (len(path.name), path.name))
    if len(rounds) < 2:
        raise UserError(f"{folder} has fewer than two round files; python distill.py makes "
                        "them")
    teacher, _ = load_model(rounds[-2])
    student, content = load_model(rounds[-1])
    first_teacher, about = load_model(folder / "teacher.pt")
    tokenizer = make_tokenizer(about["tokenizer"])
    made_with = DistillConfig(**content["config"])
    data = load_data(made_with.dataset, CPU)
    if data.oracle != "stories":
        raise UserError(f"{folder} was trained on {made_with.dataset}; the examples need "
                        "stories")

    contradiction(first_teacher, tokenizer, config.steps, config.seed)
    steps_before = schedule(made_with.teacher_steps, content["round"], made_with.k)[-2]
    x = data.pieces(1 + config.seed, data.stride)[-1:]               # (1, L)
    round_of(teacher, student, x, 1 / steps_before, tokenizer, config.seed)


if __name__ == "__main__":
    command(main)
