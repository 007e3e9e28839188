"""How a text comes about: recorded, then played in a terminal, as a web page, or as a GIF.

    python -m tools.animate                                      # the student in weights/
    python -m tools.animate --race                               # beside AR and teacher
    python -m tools.animate out/stories-nano/round7.pt --steps 8
    python -m tools.animate out/stories-nano --html text.html    # teacher and last student
    python -m tools.animate out/stories-nano --race              # and AR, by measured time
    python -m tools.animate out/stories-nano-reveal/teacher.pt --steps exact

A trace knows for each position its text and the frame in which it was revealed, so a frame
is the difference to the one before, and 1,024 steps of 1,024 tokens are a few kilobytes.
Frames are network calls; their times were measured while the text was sampled. Of exact
sampling it knows the guesses of each frame, too, which are shown faint: they may change.
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

from cache import generate
from common import seed_all
from data.checkpoints import load_checkpoint, load_model
from data.dataset import make_tokenizer
from data.files import UserError, write
from data.measures import in_steps
from data.processes import start
from data.prompts import known_tokens
from data.results import round_files
from data.script import command, device_flag, flag, package, parse_flags
from diffusion import categorical, sample, sharpen
from exact import sample_exact
from sample import DEFAULT_STEPS, EXACT, OUR_STEPS, OURS, check_exact, steps_or_exact

PAGE = Path(__file__).with_name("animate.html")
BLOCK = "░"                              # a cell of a masked token
# from the first frame to the last, blue to yellow: of a terminal's 256, and on white
COLORS = (63, 69, 74, 79, 113, 149, 185, 221)
VIRIDIS = ("#414487", "#2a788e", "#22a884", "#7ad151", "#c9a800")
SECONDS = 5.0                            # that an animation takes in a terminal or a GIF
RUNS = 5                                 # timed runs of each in a race, at most
LONGEST = 30.0                           # seconds after which none of them begins
# of a GIF, in inches: the width of a cell, the height of a line
CELL, LINE = 0.075, 0.2


@dataclasses.dataclass
class AnimateConfig:
    """The flags of tools.animate."""
    checkpoint: str | None               # the argument without --; None: weights/
    # the text
    steps: int | str | None = flag(
        None, "diffusion steps, or exact, see sample.py [what the model was distilled for; "
        "a teacher 32; of a folder, and of the student in weights/, 8; in a race the "
        "teacher's 128]", type=steps_or_exact)
    prompt: str = flag("", "how the text begins")
    infill: str | None = flag(None, "a text with gaps, see sample.py")
    length: int | None = flag(None, "tokens of the text [the model's context]", low=1)
    temperature: float = flag(1.0, "see sample.py", low=0.01)
    top_p: float = flag(1.0, "see sample.py", low=0.01, high=1)
    # how it is shown
    terminal: bool = flag(False, "play it in the terminal, also with --html or --gif")
    html: str | None = flag(None, "write a web page, this file")
    gif: str | None = flag(None, "write a GIF, this file (needs matplotlib with pillow)")
    race: bool = flag(
        False, "of a folder: AR, teacher and last student by measured time")
    seed: int = flag(0, "seed of the samples")
    device: str = device_flag()


@dataclasses.dataclass
class Trace:
    """How one text of L tokens came about. animate.html reads it under these names."""
    title: str
    texts: list              # (L,): of each position, as they follow each other
    opened: list             # (L,): the frame in which each is revealed; 0: it was given
    seconds: list            # measured, at the end of each frame; frame 0 is the beginning
    steps: int | str | None  # that were asked for, or EXACT; None: autoregressive
    # of exact sampling, for each frame from 1 on: the text (L,) of each position as it was
    # then, guesses among them
    guesses: list = dataclasses.field(default_factory=list)


# ---- recording

def pieces(tokenizer, ids):
    """The text of each of ids, so that together they are the whole text: a character of
    several tokens belongs to the last of them."""
    texts = []
    done = ""                            # what the texts so far give together
    for i in range(len(ids)):
        whole = tokenizer.decode(ids[:i + 1])
        # half a character waits for its other half, but at the end
        if i + 1 < len(ids):
            whole = whole.rstrip("\ufffd")
        texts.append(whole[len(done):])
        if len(whole) > len(done):
            done = whole
    return texts


def record(model, known, length, steps, law, tokenizer, title):
    """Sample one text of `length` tokens that keeps the known ids (n,), mask_id in its
    gaps, and write down what happened: a Trace. An AR model takes its tokens from left to
    right, unless steps is EXACT. law: logits (N, V) -> logits, see sample_exact."""
    if steps == EXACT:
        return record_exact(model, known, length, law, tokenizer, title)
    states, seconds = [], [0.0]
    began = time.perf_counter()

    def watch(ids):
        """Write down the ids after a network call, (L,) or a scalar, and when it was."""
        states.append(ids.tolist())      # waits for a GPU, so the time comes after it
        seconds.append(time.perf_counter() - began)

    def draw(logits):
        return categorical(law(logits))

    if model.config.causal:
        ids = record_ar(model, known, length, draw, watch)
        # one token a frame, after what was given
        opened = [max(0, i - len(known) + 1) for i in range(length)]
        steps = None
    else:
        begin = torch.full((length,), model.mask_id, device=known.device)    # (L,)
        begin[:len(known)] = known
        # sample shows a batch, here of one text: z (1, L)
        x = sample(model, begin[None], steps, model.mask_id, draw, lambda z: watch(z[0]))
        ids = x[0].tolist()
        opened = revealed_at([begin.tolist(), *states], model.mask_id)
    return Trace(title, pieces(tokenizer, ids), opened, seconds, steps)


def record_exact(model, known, length, law, tokenizer, title, ahead=None):
    """record with sample_exact, by default all of the text guessed ahead. A position that
    is not guessed yet has the guess ""."""
    begin = torch.full((1, length), model.mask_id, device=known.device)
    begin[0, :len(known)] = known
    states, final, seconds = [], [(begin != model.mask_id)[0].tolist()], [0.0]
    began = time.perf_counter()

    def watch(z, settled):
        """Write down the text (1, L) after a call, what of it is final, and the time."""
        states.append(z[0].tolist())
        final.append(settled[0].tolist())
        seconds.append(time.perf_counter() - began)

    x, _ = sample_exact(model, begin, model.mask_id, law, ahead, watch=watch)
    texts = pieces(tokenizer, x[0].tolist())
    guesses = [guess_pieces(tokenizer, ids, model.mask_id) for ids in states]
    # the first frame in which a position is final
    opened = [column.index(True) for column in zip(*final)]
    return Trace(title, texts, opened, seconds, EXACT, guesses)


def guess_pieces(tokenizer, ids, mask_id):
    """pieces of ids among which there may be mask_id: "" for each of these."""
    # any token in their place, as a mask has no text
    texts = pieces(tokenizer, [0 if i == mask_id else i for i in ids])
    for i, one in enumerate(ids):
        if one == mask_id:
            texts[i] = ""
    return texts


def record_ar(model, known, length, draw, watch):
    """The text of `length` tokens that an AR model writes, a list of ids; it begins with
    the known ids (n,). watch is called with the id of each new token, a scalar."""

    def watched(logits):
        """draw, with somebody who looks on: logits (1, V) -> ids (1,)."""
        ids = draw(logits)
        watch(ids[0])
        return ids

    return generate(model, known[None], length, watched)[0].tolist()


def revealed_at(states, mask_id):
    """The frame in which each position is no longer a mask, (L,). states: the ids (L,) at
    each frame, lists; in the last of them no mask is left."""
    frames = []
    for i in range(len(states[0])):
        frame = 0
        while states[frame][i] == mask_id:
            frame += 1
        frames.append(frame)
    return frames


def status(trace, frame):
    """What a viewer should know about a frame, in a line."""
    n = len(trace.seconds) - 1           # frames after the beginning
    when = f"{trace.seconds[frame] * 1000:.1f} ms"
    if trace.steps is None:
        return f"{trace.title}: token {frame} of {n}, {when}"
    return f"{trace.title}, {in_steps(trace.steps)}: call {frame} of {n}, {when}"


def shade(trace, i, colors):
    """The colour of position i, of a scale from the first frame to the last."""
    last = max(1, len(trace.seconds) - 2)
    return colors[(trace.opened[i] - 1) * (len(colors) - 1) // last]


# ---- the terminal

def clean(text):
    """Text that cannot steer a terminal: control characters but line ends become dots."""
    signs = []
    for sign in text:
        # C: Unicode's categories of control, format and unassigned characters
        if sign != "\n" and unicodedata.category(sign)[0] == "C":
            sign = "·"
        signs.append(sign)
    return "".join(signs)


def cells(text):
    """The cells that a text takes in a terminal: two for a wide character, such as a
    Chinese one."""
    wide = sum(unicodedata.east_asian_width(sign) in "WF" for sign in text)
    return len(text) + wide


def layout(texts, width):
    """Texts in lines of `width` cells: [[(character, position), ...], ...]. A line ends
    before a token that does not fit; a token wider than a line is broken."""
    lines = [[]]
    used = 0                             # cells of the last line
    for i, text in enumerate(texts):
        text = clean(text)
        # a token that fits into a line, but not into the rest of this one, begins the next
        first = text.split("\n")[0]
        beyond = used + cells(first) > width
        if used and beyond and cells(first.strip()) <= width:
            lines.append([])
            used = 0
            text = text.removeprefix(" ")
        # its characters, one by one
        for sign in text:
            if sign == "\n" or used + cells(sign) > width:
                lines.append([])
                used = 0
            if sign != "\n":
                lines[-1].append((sign, i))
                used += cells(sign)
    return lines


def paint(lines, trace, frame, color):
    """The lines as they are at a frame: blocks for what is masked, or its guess; and, with
    color, each token in the colour of the frame that revealed it, what was given in
    bold."""
    out = []
    for line in hidden(lines, trace, frame, BLOCK):
        text, style = "", ""
        for sign, i in line:
            # a new style, where it is another than the last sign's
            new = style_of(trace, i, frame)
            if color and new != style:
                text += f"\x1b[0;{new}m"
                style = new
            text += sign
        if style:
            text += "\x1b[0m"            # back to the terminal's own
        out.append(text)
    return out


def hidden(lines, trace, frame, block):
    """The lines [[(character, position), ...], ...] with what is not revealed at a frame
    replaced: by blocks, or by its guess, cut to the room that the final token takes. A
    space between tokens stays one."""
    guesses = trace.guesses[frame - 1] if trace.guesses and frame > 0 else None
    shown = {}                           # {position: its characters so far, without spaces}
    out = []
    for line in lines:
        out.append([])
        for sign, i in line:
            if trace.opened[i] > frame and sign != " ":
                k = shown.get(i, 0)
                shown[i] = k + 1
                room, sign = cells(sign), block * cells(sign)
                if guesses is not None:
                    guess = clean(guesses[i]).replace("\n", " ").strip()
                    sign = guess[k:k + 1]
                    # a wide character has no room in the place of a narrow one
                    if cells(sign) != room:
                        sign = "".ljust(room)
            out[-1].append((sign, i))
    return out


def style_of(trace, i, frame):
    """How a terminal shows position i at a frame, as the numbers of an escape sequence."""
    if trace.opened[i] > frame:
        return "2"                       # masked: faint
    if trace.opened[i] == 0:
        return "1"                       # given: bold
    return f"38;5;{shade(trace, i, COLORS)}"


def at_time(traces, share, race):
    """The frame of each trace when `share` of the show is over: all in step, or, in a race,
    where each was at that share of the slowest one's time."""
    if not race:
        return [round(share * (len(trace.seconds) - 1)) for trace in traces]
    now = share * max(trace.seconds[-1] for trace in traces)         # in seconds
    # the last frame that had ended by then
    return [bisect.bisect_right(trace.seconds, now) - 1 for trace in traces]


def screen(traces, frames, width, height, color):
    """All traces at their frames, one under the other, in at most `height` lines."""
    # each has a status line above it and an empty line below
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
    size = shutil.get_terminal_size()
    if not out.isatty():
        # a file has room for all lines
        for share in (0, 0.25, 0.5, 0.75, 1):
            frames = at_time(traces, share, race)
            print("\n".join(screen(traces, frames, 80, 10 ** 6, False)), file=out)
        return
    # whatever happens meanwhile, the cursor comes back
    out.write("\x1b[?25l")
    try:
        play_in_place(traces, race, out, size)
    finally:
        out.write("\x1b[?25h\x1b[0m")
        out.flush()


def play_in_place(traces, race, out, size):
    """Draw the frames over each other for SECONDS. size: the terminal's columns and
    lines."""
    width, height = size
    color = "NO_COLOR" not in os.environ
    drawn = 0                            # lines that are on the screen
    share, last = 0, None
    began = time.perf_counter()
    while share < 1:
        share = min(1, (time.perf_counter() - began) / SECONDS)
        frames = at_time(traces, share, race)
        if frames != last:
            lines = screen(traces, frames, width, height - 1, color)
            # back to the first line, clear what is below, then all at once
            text = "\x1b[J" + "\n".join(lines) + "\n"
            if drawn:
                text = f"\x1b[{drawn}F" + text
            out.write(text)
            out.flush()
            drawn, last = len(lines), frames
        time.sleep(0.02)


# ---- pages and pictures

def write_page(traces, path, race=False):
    """One HTML file that needs nothing else: animate.html with the traces in it."""
    data = {"race": race, "panels": [dataclasses.asdict(trace) for trace in traces]}
    text = json.dumps(data, separators=(",", ":"))
    text = text.replace("<", "\\u003c")                  # no tag can begin
    page = PAGE.read_text(encoding="utf-8").replace("/*DATA*/{}", text)
    write(Path(path), lambda f: f.write(page.encode()))


def write_gif(traces, path, race=False, width=64, fps=8):
    """The animation as a GIF, in lines of `width` cells, fps frames a second. Needs
    matplotlib with pillow; raises UserError without them."""
    # pillow is what matplotlib writes a GIF with
    package("PIL")
    package("matplotlib").use("Agg")     # no window
    plt = package("matplotlib.pyplot")
    animation = package("matplotlib.animation")

    # a picture with room for all lines of all traces
    boxes = [layout(trace.texts, width) for trace in traces]
    rows = sum(len(lines) + 2 for lines in boxes)
    fig = plt.figure(figsize=(width * CELL + 0.4, rows * LINE + 0.3))

    def draw(k):
        """Picture number k; those beyond SECONDS show the end, for a second."""
        fig.clear()
        frames = at_time(traces, min(1, k / (SECONDS * fps)), race)
        row = 1.0
        for trace, lines, frame in zip(traces, boxes, frames):
            draw_trace(fig, trace, lines, frame, row)
            row += len(lines) + 2        # a status line above, an empty line below
        return []

    # a file is written whole or not at all
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


def draw_trace(fig, trace, lines, frame, row):
    """A trace at a frame into a matplotlib figure, its status line in line number `row`."""
    put(fig, status(trace, frame), (0, row), "black")
    for line in hidden(lines, trace, frame, "\u2592"):   # a block that the font has
        row += 1
        for column, (sign, i) in enumerate(line):
            # what is masked or guessed is grey, what was given black
            if trace.opened[i] > frame:
                color = "#999999" if trace.guesses and frame > 0 else "#cccccc"
            elif trace.opened[i] == 0:
                color = "black"
            else:
                color = shade(trace, i, VIRIDIS)
            put(fig, sign, (column, row), color)


def put(fig, text, where, color):
    """Text into a matplotlib figure; where: its column and row, in cells from above."""
    column, row = where
    # matplotlib counts from below, in shares of the figure
    x = (0.2 + column * CELL) / fig.get_figwidth()
    y = 1 - row * LINE / fig.get_figheight()
    text = text.replace("$", r"\$")      # no formulas
    fig.text(x, y, text, family="monospace", fontsize=9, color=color)


# ---- what is shown

def racers(config):
    """The files that are shown side by side: [(path, title, steps or None)]. Raises
    UserError where one is missing."""
    path = Path(config.checkpoint)
    if not path.is_dir():
        if config.race:
            raise UserError(f"--race {path}: give the folder of ar.pt, teacher.pt and "
                            "round files")
        return [(path, path.stem, config.steps)]

    # a folder of distill.py: its teacher and its rounds
    needed = ["teacher.pt"]
    if config.race:
        needed.insert(0, "ar.pt")
    missing = [name for name in needed if not (path / name).exists()]
    rounds = round_files(path)
    if not rounds and not missing:
        missing = ["round file"]
    if missing:
        raise UserError(f"{path} has no {' or '.join(missing)}; python distill.py makes "
                        "them")

    # side by side they take the same steps, in a race each as many as it needs
    steps = config.steps or OUR_STEPS
    student = (rounds[-1], f"student ({rounds[-1].stem})", steps)
    if not config.race:
        return [(path / "teacher.pt", "teacher", steps), student]
    runners = [(path / "ar.pt", "AR with KV cache", None),
               (path / "teacher.pt", "teacher", 128), student]
    # a fourth one, where the teacher can
    attention = load_checkpoint(path / "teacher.pt")["model_config"]["attention"]
    if attention == "reveal":
        runners.append((path / "teacher.pt", "teacher", EXACT))
    return runners


def race(recorders):
    """The best of several runs of each, alternating: recorders are functions that run once
    and give a Trace. The first run of each is not timed."""
    for run in recorders:
        run()
    # in turn, so that what slows the machine down for a while slows all of them
    best = [run() for run in recorders]
    began = time.perf_counter()
    for _ in range(RUNS - 1):
        if time.perf_counter() - began > LONGEST:
            break
        for i, run in enumerate(recorders):
            trace = run()
            if trace.seconds[-1] < best[i].seconds[-1]:
                best[i] = trace
    return best


def busy():
    """A warning where others use the machine, else None (also where the system does not
    tell)."""
    load = 0.0
    if hasattr(os, "getloadavg"):        # not on Windows
        load = os.getloadavg()[0]
    if load > 0.5 * torch.get_num_threads():
        return (f"warning: the machine is busy (load {load:.1f}); times may be several "
                "times too long")
    return None


def recorder(config, procs, path, title, steps):
    """A function that samples the text of one checkpoint and gives its Trace."""
    model, content = load_model(path, procs.device)
    tokenizer = make_tokenizer(content["tokenizer"])
    known = known_tokens(config, model, tokenizer).to(procs.device)  # (n,)
    length = config.length or model.config.context
    # what was asked for, or what a student was distilled for
    steps = steps or content.get("sampling_steps") or DEFAULT_STEPS
    check_exact([steps], None, model, path)

    def law(logits):
        return sharpen(logits, config.temperature, config.top_p)

    def run():
        # the text that sample.py prints (exact: with a large --ahead)
        seed_all(config.seed, "samples", steps, 0)
        trace = record(model, known, length, steps, law, tokenizer, title)
        # the model wrote on after a template, which nobody asked for
        if config.infill is not None:
            trace.texts = trace.texts[:len(known)]
            trace.opened = trace.opened[:len(known)]
            trace.guesses = [texts[:len(known)] for texts in trace.guesses]
        return trace
    return run


def print_times(traces, warning):
    """The times of a race, the first trace's being AR's; warning: what busy said."""
    for trace in traces:
        end = trace.seconds[-1]
        faster = traces[0].seconds[-1] / end
        title = trace.title
        if trace.steps == EXACT:
            title += ", exact"
        print(f"{title}: {end * 1000:.1f} ms, {faster:.2f} times AR's speed")
    print(f"each the best of at most {RUNS} runs in turn")
    if warning:
        print(warning)


def main():
    config = parse_flags(AnimateConfig, __doc__,
                         checkpoint="of train.py or distill.py, or a folder [weights/]")
    # the models that come with the code: the student, in a race all
    if config.checkpoint is None and config.race:
        config.checkpoint = OURS.parent
    elif config.checkpoint is None:
        config.checkpoint = OURS
        config.steps = config.steps or OUR_STEPS
    procs = start(config.device)
    warning = busy()                     # asked before this program is busy itself

    # record
    recorders = []
    for path, title, steps in racers(config):
        recorders.append(recorder(config, procs, path, title, steps))
    if config.race:
        traces = race(recorders)
    else:
        traces = [run() for run in recorders]

    # show: in the terminal unless a file was asked for
    if config.html:
        write_page(traces, config.html, config.race)
    if config.gif:
        write_gif(traces, config.gif, config.race)
    if config.terminal or not (config.html or config.gif):
        play(traces, config.race)
    if config.race:
        print_times(traces, warning)
    for path in (config.html, config.gif):
        if path:
            print(f"{path} is written")


if __name__ == "__main__":
    command(main)
