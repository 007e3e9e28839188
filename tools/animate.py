"""How a text comes about: recorded, then played in a terminal, as a web page, or as a GIF.

    python -m tools.animate out/stories-nano/round7.pt --steps 8
    python -m tools.animate out/stories-nano --html text.html    # teacher beside the last student
    python -m tools.animate out/stories-nano --race              # and AR, by measured time

A trace knows for each position its text and the frame in which it opened, so a frame is the
difference to the one before, and 1,024 steps of 1,024 tokens are a few kilobytes. Frames are
network calls; their times were measured while the text was sampled.
"""
import bisect
import dataclasses
import json
import os
import shutil
import sys
import time
import unicodedata
from pathlib import Path

import torch

from common import command, flag, load_model, package, parse_flags, seed_all, start
from data.dataset import make_tokenizer
from data.files import UserError, write
from diffusion import categorical, sample, sharpen
from model import generate
from sample import DEFAULT_STEPS, known_tokens

PAGE = Path(__file__).with_name("animate.html")
BLOCK = "░"                              # a cell of a masked token
COLORS = (63, 69, 74, 79, 113, 149, 185, 221)    # of a terminal's 256, from blue to yellow
VIRIDIS = ("#414487", "#2a788e", "#22a884", "#7ad151", "#c9a800")            # the same on white
SECONDS = 6.0                            # that an animation takes in a terminal or a GIF


@dataclasses.dataclass
class AnimateConfig:
    checkpoint: str                          # the argument without --
    steps: int | None = flag(None, "diffusion steps [what the model was distilled for; a teacher "
                             "32; of a folder 8, in a race the teacher's 128]", low=1)
    prompt: str = flag("", "how the text begins")
    infill: str | None = flag(None, "a text with gaps, see sample.py")
    length: int | None = flag(None, "tokens of the text [the model's context]", low=1)
    temperature: float = flag(1.0, "see sample.py", low=0.01)
    top_p: float = flag(1.0, "see sample.py", low=0.01, high=1)
    terminal: bool = flag(False, "play it in the terminal, also with --html or --gif")
    html: str | None = flag(None, "write a web page, this file")
    gif: str | None = flag(None, "write a GIF, this file (needs matplotlib with pillow)")
    race: bool = flag(False, "of a folder: AR, teacher and last student by measured time")
    seed: int = flag(0, "seed of the samples")
    device: str = flag("auto", "where to run", choices=["auto", "cpu", "cuda"])


@dataclasses.dataclass
class Trace:
    title: str
    texts: list              # of each position, as they follow each other
    opened: list             # the frame in which each appears; 0: it was given
    seconds: list            # measured, at the end of each frame; frame 0 is the beginning
    steps: int | None        # that were asked for; None: autoregressive


def pieces(tokenizer, ids):
    """The text of each of ids, so that together they are the whole text: a character of several
    tokens belongs to the last of them."""
    texts, done = [], ""
    for i in range(len(ids)):
        text = tokenizer.decode(ids[:i + 1])
        whole = text.rstrip("\ufffd") if i + 1 < len(ids) else text
        texts.append(whole[len(done):])
        done = whole if len(whole) > len(done) else done
    return texts


def record(model, known, length, steps, draw, tokenizer, title):
    """Sample one text of `length` tokens that keeps the known ids (n,), mask_id in its gaps, and
    write down what happened: a Trace. An AR model takes its tokens from left to right."""
    frames, device = [], known.device
    began = time.perf_counter()

    def watch(ids):
        frames.append((ids.tolist(), time.perf_counter() - began))       # tolist waits for a GPU
    if model.config.causal:
        def drawn(logits):
            ids = draw(logits)
            watch(ids[0])
            return ids
        x = generate(model, known[None], length, drawn)[0].tolist()
        opened = [max(0, i - len(known) + 1) for i in range(length)]
    else:
        z = torch.full((1, length), model.mask_id, device=device)
        z[0, :len(known)] = known
        start = z[0].tolist()
        x = sample(model, z, steps, model.mask_id, draw, lambda z: watch(z[0]))[0].tolist()
        states = [start] + [ids for ids, _ in frames]                # when is it no longer a mask?
        opened = [next(f for f, ids in enumerate(states) if ids[i] != model.mask_id)
                  for i in range(length)]
    return Trace(title, pieces(tokenizer, x), opened, [0.0] + [at for _, at in frames],
                 None if model.config.causal else steps)


def status(trace, frame):
    """What a viewer should know about a frame, in a line."""
    n = len(trace.seconds) - 1
    what = f"token {frame} of {n}" if trace.steps is None else f"call {frame} of {n}"
    asked = "" if trace.steps is None else f", {trace.steps} steps"
    return f"{trace.title}{asked}: {what}, {trace.seconds[frame] * 1000:.1f} ms"


# ---- the terminal

def clean(text):
    """Text that cannot steer a terminal: control characters but line ends become dots."""
    return "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else "·" for c in text)


def layout(texts, width):
    """Texts in lines of `width` cells: [[(character, position), ...], ...]. A line ends before a
    token that does not fit; a token wider than a line is broken."""
    lines, used = [[]], 0

    def cells(text):
        return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)
    for i, text in enumerate(map(clean, texts)):
        first = text.split("\n")[0]
        if used and used + cells(first) > width >= cells(first.strip()):
            lines, used, text = lines + [[]], 0, text.removeprefix(" ")
        for c in text:
            if c == "\n" or used + cells(c) > width:
                lines, used = lines + [[]], 0
            if c != "\n":
                lines[-1].append((c, i))
                used += cells(c)
    return lines


def paint(lines, trace, frame, color):
    """The lines as they are at a frame: blocks for what is masked, and, with color, each token in
    the colour of the frame that opened it, what was given in bold."""
    last, out = max(1, len(trace.seconds) - 2), []
    for line in lines:
        text, style = "", ""
        for c, i in line:
            masked = trace.opened[i] > frame
            new = "2" if masked else "1" if trace.opened[i] == 0 else "38;5;" + str(
                COLORS[(trace.opened[i] - 1) * (len(COLORS) - 1) // last])
            if color and new != style:
                text, style = f"{text}\x1b[0;{new}m", new
            wide = unicodedata.east_asian_width(c) in "WF"
            text += BLOCK * (1 + wide) if masked and c != " " else c
        out.append(text + "\x1b[0m" * bool(style))
    return out


def at_time(traces, share, race):
    """The frame of each trace when `share` of the show is over: all in step, or, in a race, where
    each was at that share of the slowest one's time."""
    if not race:
        return [round(share * (len(trace.seconds) - 1)) for trace in traces]
    now = share * max(trace.seconds[-1] for trace in traces)
    return [bisect.bisect_right(trace.seconds, now) - 1 for trace in traces]


def screen(traces, frames, width, height, color):
    """All traces at their frames, one under the other, in at most `height` lines."""
    room = max(1, height // len(traces) - 2)
    out = []
    for trace, frame in zip(traces, frames):
        lines = layout(trace.texts, width)
        shown = paint(lines[:room], trace, frame, color)
        if len(lines) > room:
            shown[-1] = f"… {len(lines) - room + 1} more lines"[:width]
        out += [status(trace, frame)[:width], *shown, ""]
    return out


def play(traces, race=False, out=None):
    """Show traces in a terminal, in place; elsewhere print the frames that matter."""
    out = out or sys.stdout
    width, height = shutil.get_terminal_size()
    if not out.isatty():
        for share in sorted({0, 0.25, 0.5, 0.75, 1}):
            print("\n".join(screen(traces, at_time(traces, share, race), 80, 10 ** 6, False)),
                  file=out)
        return
    color, drawn, last = "NO_COLOR" not in os.environ, 0, None
    began = time.perf_counter()
    out.write("\x1b[?25l")                                           # no cursor meanwhile
    try:
        while last is None or share < 1:
            share = min(1, (time.perf_counter() - began) / SECONDS)
            frames = at_time(traces, share, race)
            if frames != last:
                lines = screen(traces, frames, width, height - 1, color)
                out.write((f"\x1b[{drawn}F" if drawn else "") + "\x1b[J" + "\n".join(lines) + "\n")
                out.flush()
                drawn, last = len(lines), frames
            time.sleep(0.02)
    finally:
        out.write("\x1b[?25h\x1b[0m")
        out.flush()


# ---- pages and pictures

def write_page(traces, path, race=False):
    """One HTML file that needs nothing else: animate.html with the traces in it."""
    data = {"race": race, "panels": [dataclasses.asdict(trace) for trace in traces]}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")   # no tag can begin
    page = PAGE.read_text(encoding="utf-8").replace("/*DATA*/{}", text)
    write(Path(path), lambda f: f.write(page.encode()))


def write_gif(traces, path, race=False, width=64, fps=8):
    """The animation as a GIF; needs matplotlib with pillow. Raises UserError without them."""
    package("PIL")
    package("matplotlib").use("Agg")
    plt, animation = package("matplotlib.pyplot"), package("matplotlib.animation")
    boxes = [layout(trace.texts, width) for trace in traces]
    rows = sum(len(lines) + 2 for lines in boxes)
    fig = plt.figure(figsize=(width * 0.075 + 0.4, rows * 0.2 + 0.3))

    def draw(k):
        fig.clear()
        row = 1.0
        frames = at_time(traces, min(1, k / (SECONDS * fps)), race)
        for trace, lines, frame in zip(traces, boxes, frames):
            last = max(1, len(trace.seconds) - 2)
            put(status(trace, frame), 0, row, "black")
            for line in lines:
                row += 1
                for col, (c, i) in enumerate(line):
                    masked, when = trace.opened[i] > frame, trace.opened[i]
                    put("\u2592" if masked and c != " " else c, col, row, "#cccccc" if masked else
                        "black" if when == 0 else
                        VIRIDIS[(when - 1) * (len(VIRIDIS) - 1) // last])
            row += 2
        return []

    def put(text, col, row, color):
        fig.text((0.2 + col * 0.075) / fig.get_figwidth(), 1 - row * 0.2 / fig.get_figheight(),
                 text.replace("$", r"\$"), family="monospace", fontsize=9, color=color)
    movie = animation.FuncAnimation(fig, draw, frames=int(SECONDS * fps) + fps, blit=False)
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp.gif")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        movie.save(temporary, writer=animation.PillowWriter(fps=fps))
        temporary.replace(path)
    except OSError as e:
        raise UserError(f"{path} cannot be written ({e}); choose another file")
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(fig)


# ---- what is shown

def racers(c):
    """The files that are shown side by side: [(path, title, steps or None)]."""
    path = Path(c.checkpoint)
    if not path.is_dir():
        if c.race:
            raise UserError(f"--race {path}: give the folder of ar.pt, teacher.pt and round files")
        return [(path, path.stem, c.steps)]
    needed = ["teacher.pt"]
    if c.race:
        needed.insert(0, "ar.pt")
    rounds = sorted(path.glob("round*.pt"), key=lambda file: (len(file.name), file.name))
    missing = [name for name in needed if not (path / name).exists()]
    if not rounds:
        missing = missing or ["round file"]
    if missing:
        raise UserError(f"{path} has no {' or '.join(missing)}; python distill.py makes them")
    steps = c.steps or 8
    student = (rounds[-1], f"student ({rounds[-1].stem})", steps)
    if not c.race:
        return [(path / "teacher.pt", "teacher", steps), student]
    return [(path / "ar.pt", "AR with KV cache", None), (path / "teacher.pt", "teacher", 128),
            student]


RUNS, LONGEST = 5, 30.0                  # timed runs of each in a race, and seconds for all


def race(recorders):
    """The best of several runs of each, alternating: recorders are functions that run once and
    give a Trace. The first run of each is not timed."""
    for record in recorders:
        record()
    best = [record() for record in recorders]
    began = time.perf_counter()
    for _ in range(RUNS - 1):
        if time.perf_counter() - began > LONGEST:
            break
        for i, record in enumerate(recorders):
            trace = record()
            if trace.seconds[-1] < best[i].seconds[-1]:
                best[i] = trace
    return best


def busy():
    """A warning where others use the machine, else None (also where the system does not tell)."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5 * torch.get_num_threads():
        return f"warning: the machine is busy (load {load:.1f}); times may be several times too long"


def recorder(c, p, path, title, steps):
    """A function that samples the text of one checkpoint and gives its Trace."""
    model, content = load_model(path, p.device)
    tokenizer = make_tokenizer(content["tokenizer"])
    known = known_tokens(c, model, tokenizer).to(p.device)
    length = c.length or model.config.context
    steps = steps or content.get("sampling_steps") or DEFAULT_STEPS

    def draw(logits):
        return categorical(sharpen(logits, c.temperature, c.top_p))

    def run():
        seed_all(c.seed, "samples", steps, 0)            # the text that sample.py prints
        trace = record(model, known, length, steps, draw, tokenizer, title)
        if c.infill is not None:                         # the model wrote on after the template
            trace.texts, trace.opened = trace.texts[:len(known)], trace.opened[:len(known)]
        return trace
    return run


def main():
    c = parse_flags(AnimateConfig, __doc__, checkpoint="of train.py or distill.py, or a folder")
    p, warning = start(c.device), busy()
    recorders = [recorder(c, p, *one) for one in racers(c)]
    traces = race(recorders) if c.race else [run() for run in recorders]
    if c.html:
        write_page(traces, c.html, c.race)
    if c.gif:
        write_gif(traces, c.gif, c.race)
    if c.terminal or not (c.html or c.gif):
        play(traces, c.race)
    if c.race:
        for trace in traces:
            end = trace.seconds[-1]
            print(f"{trace.title}: {end * 1000:.1f} ms, {traces[0].seconds[-1] / end:.2f} times "
                  "AR's speed")
        print(f"each the best of at most {RUNS} runs in turn")
        if warning:
            print(warning)
    for path in (c.html, c.gif):
        if path:
            print(f"{path} is written")


if __name__ == "__main__":
    command(main)
