"""Two examples from a distilled folder: why many tokens at once go wrong, and what a round
teaches.

    python -m tools.lesson                       # the first, with the teacher in weights/
    python -m tools.lesson out/stories-nano
    python -m tools.lesson out/stories-nano-reveal

The words that a story's checker objects to are underlined. A teacher with attention reveal
can be drawn exactly, too: the same model, with the faults of its own only.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from common import seed_all
from data.checkpoints import load_model
from data.dataset import load_data, make_tokenizer
from data.files import UserError
from data.processes import Processes
from data.results import round_files
from data.script import command, flag, parse_flags
from data.stories import language
from diffusion import q_sample, unmask_step
from distill import DistillConfig, schedule
from sample import EXACT, OURS, Sampling, draw_samples

CPU = Processes(torch.device("cpu"))
STORIES = dict(kind="words", items=language.VOCABULARY)              # their tokenizer
TEXTS = 64                               # that are drawn, to show one of them
WIDTH = 84                               # of a line, without the margin


@dataclass
class LessonConfig:
    """The flags of tools.lesson."""
    folder: str | None                       # the argument without --; None: weights/
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

def lines_of(words):
    """Words in lines of at most WIDTH characters: lists of their positions."""
    lines, used = [[]], 0
    for i, word in enumerate(words):
        if lines[-1] and used + len(word) > WIDTH:
            lines.append([])
            used = 0
        lines[-1].append(i)
        used += len(word) + 1            # and a space
    return lines


def underlined(words, where, ansi):
    """A text (a list of words) as lines with a margin, the words at the positions `where`
    underlined: with ansi as a terminal does it, else by a line of ^ below."""
    out = []
    for line in lines_of(words):
        text, below = "   ", "   "
        for i in line:
            word, mark = words[i], " "
            if i in where:
                mark = "^"
            if i in where and ansi:
                word = f"\x1b[4;31m{word}\x1b[0m"        # underlined, red
            text += " " + word
            below += " " + mark * len(words[i])
        out.append(text)
        if not ansi and "^" in below:
            out.append(below.rstrip())
    return out


def draw_texts(model, tokenizer, steps, seed):
    """TEXTS texts in so many steps, or EXACT: [(words, faults as language.faults has
    them)]."""
    x = draw_samples(model, TEXTS, Sampling(steps, seed), CPU)       # (TEXTS, L)
    texts = []
    for row in x.tolist():
        words = tokenizer.decode(row).split()
        texts.append((words, language.faults(words)))
    return texts


def show(words, faults):
    """Print a text, its faults underlined, and the reasons."""
    where = set()
    for _, positions in faults:
        where.update(positions)
    ansi = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n".join(underlined(words, where, ansi)))
    for reason, _ in faults:
        print(f"    - {reason}")


def contradiction(model, tokenizer, steps, seed):
    """Print the text with the fewest faults, but at least one, of TEXTS in so many steps;
    and, where the model's attention allows it, the first without a fault of TEXTS that are
    drawn exactly."""
    texts = draw_texts(model, tokenizer, steps, seed)
    faulty = [text for text in texts if text[1]]
    print(f"The teacher in {steps} steps writes all tokens of a step without seeing the "
          f"others.\nValid: {TEXTS - len(faulty)} of {TEXTS} stories.", end=" ")
    if faulty:
        print("Of the others the one with the fewest faults:\n")
        show(*min(faulty, key=lambda text: len(text[1])))

    if model.config.attention != "reveal":
        return
    texts = draw_texts(model, tokenizer, EXACT, seed)
    right = [text for text in texts if not text[1]]
    print("\nThe same teacher, drawn exactly, as if one token at a time.\n"
          f"Valid: {len(right)} of {TEXTS} stories.", end=" ")
    if right:
        print("The first of them:\n")
        show(*right[0])


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
          f"{len(revealed[0])} of {int((z == mask_id).sum())} masks:\n\n"
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
                         folder="of distill.py, for the dataset stories [weights/]")
    folder = Path(config.folder or OURS.parent)
    first_teacher, about = load_model(folder / "teacher.pt")
    if about["tokenizer"] != STORIES:
        raise UserError(f"{folder} was not trained on stories, which the examples need")
    tokenizer = make_tokenizer(about["tokenizer"])
    rounds = round_files(folder)
    if len(rounds) < 2:
        contradiction(first_teacher, tokenizer, config.steps, config.seed)
        print(f"\nTo show what a round teaches {folder} has too few round files; python "
              "distill.py makes them")
        return

    # the last round's student, and the one before, which was its teacher
    teacher, _ = load_model(rounds[-2])
    student, content = load_model(rounds[-1])
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
