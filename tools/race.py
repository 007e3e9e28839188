"""README's picture: four writers of a story each, at their measured relative speeds, as an
animated SVG.

    python -m tools.race results/race.svg

AR, the teacher and the student in 8 steps, and the teacher drawn exactly: the models in
weights/. How much faster than AR each is, for one text at a time, was measured by bench.py
(results/bench-exact-avx2.json); here each call of a text takes the same share of its
time. What the stories' checker objects to is underlined at the end.

The picture needs no script, no font and no other file, so it moves on a page that shows it
as an image: every word has a CSS animation, which makes it visible in its time. Without
animations, or for who wants no motion, it shows the end.
"""
import dataclasses
import html
import json
from pathlib import Path

import torch

from common import ROOT, seed_all
from data.checkpoints import load_model
from data.dataset import make_tokenizer
from data.files import UserError, write
from data.results import round_files
from data.script import command, flag, parse_flags
from data.stories import language
from sample import DEFAULT_STEPS, EXACT, OUR_STEPS, OURS, Sampling
from tools.animate import Trace, layout, record, record_exact

# seconds: of the slowest writer, and of everything, before it begins again
RUN, CYCLE = 8.0, 13.0
# the picture in pixels: its width, a margin, a cell of a letter, a line, a heading
WIDTH, MARGIN, CELL, LINE, HEAD = 501, 12, 9, 21, 40
TIMES = "bench-exact-avx2.json"          # under results/
COLUMNS = (WIDTH - 2 * MARGIN) // CELL               # letters of a line
STYLE = """
svg { color-scheme: light dark;
  --card: #ffffff; --edge: #d0cfc9; --ink: #1d1d1b; --quiet: #66655f; --mask: #dfded8;
  --bar: #1f4e9c; --fault: #c4321c; --good: #1a7431 }
@media (prefers-color-scheme: dark) { svg {
  --card: #1c1c1a; --edge: #3b3a36; --ink: #ecebe5; --quiet: #aeada5; --mask: #3a3936;
  --bar: #8db8ff; --fault: #ff8f7a; --good: #7ddb95 } }
* { animation: CYCLEs step-end infinite }
@media (prefers-reduced-motion: reduce) { * { animation: none !important } }
text { font: 15px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  fill: var(--ink) }
.head, .state, .foot { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif }
.head { font-weight: 600 }
.state { text-anchor: end }
.foot { font-size: 13px; fill: var(--quiet) }
.good { fill: var(--good) }
.bad { fill: var(--fault) }
.card { fill: var(--card); stroke: var(--edge) }
.track, .mask { fill: var(--mask) }
.bar { fill: var(--bar); transform-box: fill-box; transform-origin: 0 0;
  animation-timing-function: linear }
.fault { stroke: var(--fault); stroke-width: 2 }
.guess { fill: var(--quiet) }
.guess, .mask { opacity: 0 }
"""


@dataclasses.dataclass
class RaceConfig:
    """The flags of tools.race."""
    picture: str                         # the argument without --
    folder: str | None = flag(
        None, "ar.pt, teacher.pt with attention reveal, and round files [weights/]")
    seed: int = flag(
        1, "of the texts; 1 is the first with which each writer's story is what most of "
        "its stories are, valid or not")


@dataclasses.dataclass
class Writer:
    """One of those who write: what happened, and how it is shown."""
    trace: Trace
    faults: list                 # see language.faults
    speed: float                 # as a multiple of AR's


# ---- who writes what, and how fast

def only(**fields):
    """The row of TIMES, for one text, that has these fields."""
    rows = json.loads((ROOT / "results" / TIMES).read_text())["rows"]
    fields["batch"] = 1
    for row in rows:
        if all(row.get(key) == value for key, value in fields.items()):
            return row
    raise UserError(f"results/{TIMES} has no row with {fields}; bench.py makes it")


def speeds():
    """How many times as fast as AR one text is written, by each of the four writers."""
    teacher = only(engine="diffusion-kv", model="teacher", steps=OUR_STEPS)
    student = only(engine="diffusion-kv", model=OURS.stem, steps=OUR_STEPS)
    exact = only(engine="diffusion-exact", model="teacher")
    return [1.0, teacher["vs_ar"], student["vs_ar"], exact["vs_ar"]]


def slowed():
    """How many times slower than it was measured the race is shown, to two digits."""
    times = RUN / only(engine="ar")["seconds"]
    return float(f"{times:.2g}")


def keep(logits):
    """The model's own distribution: logits (N, V) -> the same."""
    return logits


def story(path, title, steps, seed):
    """The Trace of one story by the checkpoint at path."""
    model, content = load_model(path)
    if content["tokenizer"] != dict(kind="words", items=language.VOCABULARY):
        raise UserError(f"{path} does not write stories, which the picture is about")
    tokenizer = make_tokenizer(content["tokenizer"])
    none = torch.zeros(0, dtype=torch.long)              # no prompt
    length = model.config.context
    # as tools.animate: the text that sample.py prints with --num_samples 1
    seed_all(seed, "samples", steps or DEFAULT_STEPS, 0)
    if steps == EXACT:
        # as many guesses ahead as were timed
        return record_exact(model, none, length, keep, tokenizer, title, Sampling().ahead)
    return record(model, none, length, steps, keep, tokenizer, title)


def writers(folder, seed):
    """The four Writers, by the models in a folder."""
    rounds = round_files(folder)
    if not rounds:
        raise UserError(f"{folder} has no round file; python distill.py makes them")
    teacher = folder / "teacher.pt"
    attention = load_model(teacher)[0].config.attention
    if attention != "reveal":
        raise UserError(f"{teacher} has {attention} attention; exact sampling needs a "
                        "folder of distill.py --attention reveal")
    runners = [(folder / "ar.pt", "AR", None),
               (teacher, f"teacher, {OUR_STEPS} steps", OUR_STEPS),
               (rounds[-1], f"student, {OUR_STEPS} steps", OUR_STEPS),
               (teacher, "teacher, exact", EXACT)]
    found = []
    for (path, title, steps), speed in zip(runners, speeds()):
        trace = story(path, title, steps, seed)
        faults = language.faults("".join(trace.texts).split())
        found.append(Writer(trace, faults, speed))
    return found


# ---- when something is seen

def seen(moves, begin, end=None):
    """The class of what is seen from `begin` to `end`, in seconds; None: until everything
    begins again. moves: {(begin, end): class}, of all there are."""
    return moves.setdefault((begin, end), f"t{len(moves)}")


def keyframes(moves):
    """The CSS of the classes in `moves`."""
    rules = []
    for (begin, end), name in moves.items():
        frames = f"{100 * begin / CYCLE:.2f}%{{opacity:1}}"
        if begin > 0:
            frames = "0%{opacity:0}" + frames
        if end is not None:
            frames += f"{100 * end / CYCLE:.2f}%{{opacity:0}}"
        rules.append(f"@keyframes {name}{{{frames}}}.{name}{{animation-name:{name}}}")
    return "\n".join(rules)


def looks(trace, i):
    """What stands at position i, one after the other: [(kind, text, first frame, frame
    after the last)], kind "mask", "guess" or "word"; the word stays (None)."""
    found = []
    for frame in range(trace.opened[i]):
        kind, text = "mask", ""
        if trace.guesses and frame > 0 and trace.guesses[frame - 1][i].strip():
            kind, text = "guess", trace.guesses[frame - 1][i].strip()
        # the same as before goes on
        if found and found[-1][:2] == (kind, text):
            found[-1] = (kind, text, found[-1][2], frame + 1)
        else:
            found.append((kind, text, frame, frame + 1))
    return found + [("word", trace.texts[i].strip(), trace.opened[i], None)]


# ---- the picture

def cells_of(trace):
    """Where each position's word stands: ([(line, column, letters)], number of lines)."""
    lines = layout(trace.texts, COLUMNS)
    where = {}
    for number, line in enumerate(lines):
        for column, (sign, i) in enumerate(line):
            if sign != " ":
                _, begin, letters = where.get(i, (number, column, 0))
                where[i] = number, begin, letters + 1
    return [where[i] for i in range(len(trace.texts))], len(lines)


def draw_word(kind, text, room, name, place):
    """A word, a guess or a mask. room: letters that it may take; name: its class of time;
    place: (x, y) of its baseline."""
    x, y = place
    if kind == "mask":
        return (f'<rect class="mask {name}" x="{x}" y="{y - 12}" '
                f'width="{room * CELL - 1}" height="15" rx="3"/>')
    classes = name
    if kind == "guess":
        classes = f"guess {name}"
    # as wide in any font; a guess is squeezed where the final word is shorter
    width = min(room, len(text)) * CELL
    return (f'<text class="{classes}" x="{x}" y="{y}" textLength="{width}" '
            f'lengthAdjust="spacingAndGlyphs">{html.escape(text)}</text>')


def verdict(writer):
    """What is said of a writer at the end: (text, class)."""
    trace = writer.trace
    text = f"{len(trace.seconds) - 1} calls, "
    if trace.steps is not None:
        text += f"{writer.speed:.1f} × AR's speed, "
    if not writer.faults:
        return text + "no contradiction", "good"
    text += f"{len(writer.faults)} contradiction"
    if len(writer.faults) > 1:
        text += "s"
    return text, "bad"


def draw_panel(writer, top, moves):
    """A writer's part of the picture, from y = top on: its elements as lines of text, and
    its height."""
    trace = writer.trace
    calls = len(trace.seconds) - 1
    end = RUN / writer.speed

    def at(frame):
        """When a frame is over, in seconds: each call takes the same share. None: None."""
        if frame is None:
            return None
        return round(end * frame / calls, 3)

    # heading, verdict, bar
    text, kind = verdict(writer)
    over = seen(moves, at(calls))
    wide = WIDTH - 2 * MARGIN
    out = [f'<text class="head" x="{MARGIN}" y="{top + 18}">{trace.title}</text>',
           f'<text class="state {kind} {over}" x="{WIDTH - MARGIN}" y="{top + 18}">{text}'
           "</text>",
           f'<rect class="track" x="{MARGIN}" y="{top + 25}" width="{wide}" height="3"/>',
           f'<rect class="bar" style="animation-name:b{top}" x="{MARGIN}" y="{top + 25}" '
           f'width="{wide}" height="3"/>',
           f"<style>@keyframes b{top}{{0%{{transform:scaleX(0)}}"
           f"{100 * end / CYCLE:.2f}%{{transform:scaleX(1)}}}}</style>"]

    # the words, and what stood in their places
    where, lines = cells_of(trace)
    for i, (line, column, room) in enumerate(where):
        x, y = MARGIN + CELL * column, top + HEAD + LINE * line + 8
        for kind, text, begin, until in looks(trace, i):
            name = seen(moves, at(begin), at(until))
            out.append(draw_word(kind, text, room, name, (x, y)))

    # the faults, when all is written
    wrong = set()
    for _, positions in writer.faults:
        wrong.update(positions)
    for i in sorted(wrong):
        line, column, room = where[i]
        x, y = MARGIN + CELL * column, top + HEAD + LINE * line + 12
        out.append(f'<path class="fault {over}" d="M{x} {y}h{room * CELL}"/>')
    return out, HEAD + LINE * lines + 6


def picture(found):
    """The SVG of some Writers."""
    moves, body = {}, []
    top = 4
    for writer in found:
        lines, height = draw_panel(writer, top, moves)
        body += lines
        top += height
    body.append(f'<text class="foot" x="{MARGIN}" y="{top + 12}">one text at a time, as '
                f"measured, {slowed():.0f} times slower; grey: guesses</text>")
    height = top + 24
    style = STYLE.replace("CYCLE", f"{CYCLE:g}")
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}">',
        "<title>Four writers of a story each, at their measured speeds</title>",
        f"<style>{style}{keyframes(moves)}</style>",
        f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" '
        'rx="8"/>', *body, "</svg>\n"])


def main():
    config = parse_flags(RaceConfig, __doc__, picture="the SVG file to write")
    found = writers(Path(config.folder or OURS.parent), config.seed)
    path = Path(config.picture)
    text = picture(found)
    write(path, lambda f: f.write(text.encode()))
    for writer in found:
        said, _ = verdict(writer)
        print(f"{writer.trace.title}: {said}")
    print(f"{path} is written")


if __name__ == "__main__":
    command(main)
