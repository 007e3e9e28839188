"""What results look like: tables as text, and pictures, which need matplotlib. A picture
that cannot be drawn is a notice: the numbers are there without it.

    python -m tools.figures out/stories-nano         # distill.py's rounds as curves
"""
import functools
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from data.files import UserError, write
from data.measures import add_mean, in_steps, step_key
from data.script import command, flag, package, parse_flags
from data.stories import language
from sample import EXACT

LOW = 0.1                            # nats of entropy below its measure that are marked


def names(paths):
    """{name: path} of files: the ends of their paths, without .pt, with as few folders
    before them as tell all of them apart. A file that is given twice is there once."""
    different = {}
    for path in map(Path, paths):
        different.setdefault(path.resolve(), path)
    paths = list(different.values())
    parts = [(*path.absolute().parent.parts, path.stem) for path in paths]
    # the last part of each path, the last two, ...
    longest = max(len(part) for part in parts)
    for n in range(1, longest + 1):
        ends = ["/".join(part[max(0, len(part) - n):]) for part in parts]
        if len(set(ends)) == len(ends):
            break
    return dict(zip(ends, paths))


# ---- what all pictures share

FORMATS = "png", "pdf", "svg"


def check_picture(path):
    """Raises UserError where a picture of that name cannot be drawn: matplotlib is missing,
    or the name's ending is none of FORMATS."""
    if path and Path(path).suffix[1:].lower() not in FORMATS:
        raise UserError(f"--plot {path}: the ending says the format; take one of ."
                        + ", .".join(FORMATS))
    if path:
        package("matplotlib")


def pyplot():
    """matplotlib's, drawing into files, whatever MPLBACKEND says (a notebook's names a
    package that is not there). Raises UserError where it is not installed."""
    usual = os.environ.pop("MPLBACKEND", None)
    try:
        package("matplotlib").use("Agg")
        return package("matplotlib.pyplot")
    finally:
        if usual is not None:
            os.environ["MPLBACKEND"] = usual


def save_figure(fig, path):
    """A figure as a file in the format that its name says."""
    kind = Path(path).suffix[1:].lower()
    write(Path(path), lambda f: fig.savefig(f, format=kind, dpi=120))
    pyplot().close(fig)


def picture(draw):
    """Make of draw(rows, path) a function that tells whether it could draw: where
    matplotlib fails in a way of its own, it prints a notice. UserErrors are raised as they
    are."""
    @functools.wraps(draw)
    def attempt(rows, path):
        try:
            draw(rows, path)
            return True
        except UserError:
            raise
        except Exception as e:
            why = " ".join(str(e).split())[:200]
            print(f"no {path}: matplotlib failed ({type(e).__name__}: {why})",
                  file=sys.stderr)
            return False
    return attempt


# ---- tables

def rows_as_text(rows, columns):
    """Rows (dicts) under a header. columns: (title, key, format), such as ("entropy",
    "entropy", ".2f"); with a standard error beside the value where the format ends in "±"
    and the row has key_se. A column without any value is left out."""
    used = []
    for title, key, form in columns:
        if any(row.get(key) is not None for row in rows):
            used.append((title, key, form))
    lines = [[title for title, _, _ in used]]
    for row in rows:
        lines.append([cell(row, key, form) for _, key, form in used])
    widths = []
    for column in zip(*lines):
        widths.append(max(len(text) for text in column))

    # names to the left, numbers to the right
    text = ""
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        for value, width in zip(line[1:], widths[1:]):
            cells.append(value.rjust(width))
        text += "  ".join(cells).rstrip() + "\n"
    return text.removesuffix("\n")


def cell(row, key, form):
    """A value of a row as text, see rows_as_text."""
    if row.get(key) is None:
        return ""
    plain = form.removesuffix("±")
    text = format(row[key], plain)
    error = row.get(key + "_se")
    if form.endswith("±") and error is not None:
        text += f" ±{format(error, plain)}"
    return text


# what tools.evaluate shows: columns as rows_as_text takes them
LIKELIHOOD = (("model", "model", "s"), ("tokens", "tokens", ",d"),
              ("NELBO", "bound", ".4f±"), ("any order", "any_order", ".4f±"),
              ("8 orders", "mixture", ".4f±"),
              ("exact", "nll", ".4f±"), ("ppl", "ppl", ".3f±"))
SAMPLES = (("model", "model", "s"), ("steps", "steps", ""), ("order", "order", "s"),
           ("nfe", "nfe", ".3g"),
           ("calls", "calls", ".3g"), ("reads", "reads", ".3g"),
           ("T", "temperature", ".2g"), ("bits", "precision", "d"),
           ("tokens", "tokens", ",d"), ("gen ppl", "gen_ppl", ".2f±"),
           ("per text", "text_ppl", ".2f±"), ("entropy", "entropy", ".3f±"),
           ("of all", "pooled_entropy", ".3f±"), ("choices", "choices", ".1f±"),
           ("valid", "valid", ".0%±"), ("faults", "contradictions", ".2f±"),
           ("log p", "log_p", ".1f±"),
           ("too low", "low", "s"))
DIVERSITY = (("model", "model", "s"), ("steps", "steps", ""), ("order", "order", "s"),
             ("T", "temperature", ".2g"),
             ("self-BLEU-1", "self_bleu1", ".3f±"), ("self-BLEU-2", "self_bleu2", ".3f±"),
             ("self-BLEU-3", "self_bleu3", ".3f±"), ("self-BLEU-4", "self_bleu4", ".3f±"),
             ("distinct-1", "distinct1", ".3f±"), ("distinct-2", "distinct2", ".3f±"),
             ("distinct-3", "distinct3", ".3f±"), ("distinct-4", "distinct4", ".3f±"),
             ("8-grams seen", "seen", ".1%±"), ("repeats", "repetition", ".1%±"),
             ("copies", "copies", ".1%±"), ("expected", "copies_expected", ".1%±"))
FRONTIER = (("model", "model", "s"), ("steps", "steps", ""), ("order", "order", "s"),
            ("entropy", "entropy", ".3f"), ("gen ppl", "at_entropy", ".2f±"),
            ("of all", "pooled_entropy", ".3f"), ("gen ppl", "at_pooled_entropy", ".2f±"))
LAST_WORDS = (("model", "model", "s"), ("tasks", "tasks", "d"),
              ("one pass", "one_pass", ".1%±"), ("certain", "confident", ".1%±"),
              ("left", "left", ".1%±"), ("word ppl", "word_ppl", ".2f±"),
              ("by bound", "by_bound", "d"))
CONTINUATIONS = (("model", "model", "s"), ("steps", "steps", ""), ("order", "order", "s"),
                 ("texts", "texts", "d"), ("prompt", "prompt_tokens", "d"),
                 ("gen ppl", "gen_ppl", ".2f±"), ("self-BLEU-4", "self_bleu4", ".3f±"),
                 ("valid", "valid", ".0%±"), ("ended", "ended", ".0%±"),
                 ("MAUVE", "mauve", ".3f±"))
HEADINGS = {                             # part of the results: (its heading, its columns)
    "likelihood": ("likelihood in nats per token: NELBO, the any-order estimate of the "
                   "same bound, a mixture of 8 orders (attention reveal), exact (AR); "
                   "perplexity by the surest bound", LIKELIHOOD),
    "samples": ("samples; too low: an entropy more than 0.1 under the data's or the "
                "teacher's, within a text or of all together", SAMPLES),
    "diversity": ("diversity of the same samples; copies: training texts word for word; "
                  "expected: as many as there would be by chance", DIVERSITY),
    "frontier": ("perplexity at the teacher's entropy (without one, the data's), within a "
                 "text and of all together; empty where the temperatures do not reach it",
                 FRONTIER),
    "lambada": ("last words (lambada): accuracy in one pass, most certain first, left to "
                "right", LAST_WORDS),
    "last_word": ("last words (last_word): accuracy in one pass, most certain first, left "
                  "to right", LAST_WORDS),
    "continuations": ("continuations of prompts", CONTINUATIONS)}


def show(results):
    """All results of tools.evaluate as text, a table for each part."""
    tables = []
    for part, rows in results.items():
        if part not in HEADINGS or not rows:
            continue
        title, columns = HEADINGS[part]
        tables.append(f"{title}\n{rows_as_text(rows, columns)}")
        if part == "samples":            # the same rows have two tables
            title, columns = HEADINGS["diversity"]
            tables.append(f"{title}\n{rows_as_text(rows, columns)}")
    return "\n\n".join(tables)


# ---- rows compared with each other

def own_order(row):
    """Whether a row has the model's own law: no order of reveal, or the random one, which
    rows of older versions do not name."""
    return row.get("order") in (None, "random")


def setting(row):
    """What rows have in common that differ in temperature alone: (model, steps, order)."""
    return row["model"], row["steps"], row.get("order")


def mark(rows, teacher):
    """row["low"]: which of its entropies are more than LOW under the data's or the
    teacher's (of as many steps, in its own order): "text", within a text, "all", of all
    together."""
    for row in rows:
        # what it is compared with
        others = []
        for other in rows:
            same = other["model"] == teacher and other["steps"] == row["steps"]
            plain = other["temperature"] == 1 and own_order(other)
            if other["model"] == "data" or same and plain:
                others.append(other)
        low = []
        for word, key in (("text", "entropy"), ("all", "pooled_entropy")):
            if any(row[key] < other[key] - LOW for other in others):
                low.append(word)
        row["low"] = " ".join(low)


def at_entropy(points, key, wanted, wanted_se=0.0):
    """Perplexity (value, SE) where the line through a model's rows at several temperatures
    comes to an entropy (row[key]) of `wanted`: log-perplexity is interpolated, between the
    neighbours nearest to temperature 1. (None, None) where it never comes there."""
    points = sorted(points, key=lambda row: row["temperature"])
    around = []                          # pairs of neighbours with `wanted` between them
    for a, b in zip(points, points[1:]):
        low, high = min(a[key], b[key]), max(a[key], b[key])
        if low <= wanted <= high and low < high:
            around.append((a, b))
    if not around:
        return None, None

    def from_one(pair):
        """How far from 1 the mean of a pair's temperatures is, times two."""
        a, b = pair
        return abs(a["temperature"] + b["temperature"] - 2)

    a, b = min(around, key=from_one)
    share = (wanted - a[key]) / (b[key] - a[key])        # of the way from a to b
    slope = math.log(b["gen_ppl"] / a["gen_ppl"]) / (b[key] - a[key])
    value = a["gen_ppl"] * (b["gen_ppl"] / a["gen_ppl"]) ** share
    # relative errors, to first order: of both ends, and of `wanted`
    errors = [slope * wanted_se]
    for weight, row in ((1 - share, a), (share, b)):
        of_row = math.hypot(row["gen_ppl_se"] / row["gen_ppl"], slope * row[key + "_se"])
        errors.append(weight * of_row)
    return value, value * math.hypot(*errors)


def frontier(rows, teacher):
    """For each model, number of steps and order its perplexity at the teacher's entropy at
    temperature 1 and the most steps, in its own order (without that, the data's), within a
    text and of all together."""
    # the row whose entropies all are compared at
    by_teacher = []
    for row in rows:
        if row["model"] == teacher and row["temperature"] == 1 and own_order(row):
            by_teacher.append(row)
    if by_teacher:
        goal = max(by_teacher, key=lambda row: step_key(row["steps"]))
    else:
        goal = next(row for row in rows if row["model"] == "data")
    table = []
    for name, steps, order in dict.fromkeys(map(setting, rows)):
        if name == "data":
            continue
        points = [row for row in rows if setting(row) == (name, steps, order)]
        entry = {"model": name, "steps": steps, "order": order}
        for key in ("entropy", "pooled_entropy"):
            entry[key] = goal[key]
        for key in ("entropy", "pooled_entropy"):
            value = at_entropy(points, key, goal[key], goal[key + "_se"])
            add_mean(entry, f"at_{key}", value)
        table.append(entry)
    return table


# ---- pictures

ENTROPIES = (("entropy", "unigram entropy within a text (nats)"),
             ("pooled_entropy", "entropy of all texts together (nats)"))


def plain_numbers(axis):
    """Numbers such as 20, not 2 x 10^1, on a logarithmic axis."""
    axis.set_minor_formatter("{x:g}")
    axis.set_major_formatter("{x:g}")


@picture
def draw_curve(rows, path):
    """distill.py's rows as a picture: generative perplexity and both entropies against
    steps, a line per model."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    # exact samples take no number of steps: they are in the table only
    rows = [row for row in rows if row["steps"] != EXACT]
    columns = sorted({row["steps"] for row in rows if row["steps"]})
    of_axes = (("gen_ppl", "generative perplexity"), *ENTROPIES)
    for axis, (key, label) in zip(axes, of_axes):
        draw_models(axis, rows, key)
        axis.set_xscale("log", base=2)
        axis.set_xticks(columns, columns)
        axis.set_xlabel("sampling steps")
        axis.set_ylabel(label)
    axes[0].set_yscale("log")
    plain_numbers(axes[0].yaxis)
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    save_figure(fig, path)


def draw_models(axis, rows, key):
    """One value of all models against steps; a level line for those that take none."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    for i, name in enumerate(models):
        mine = [row for row in rows if row["model"] == name]
        color = pyplot().cm.viridis(i / len(models))
        color = {"data": "black", "ar": "grey"}.get(name, color)
        if mine[0]["steps"] is None:
            axis.axhline(mine[0][key], color=color, linestyle="--", label=name)
            continue
        steps = [row["steps"] for row in mine]
        values = [row[key] for row in mine]
        errors = [row[key + "_se"] for row in mine]
        axis.errorbar(steps, values, errors, color=color, marker="o", markersize=3,
                      label=name)


def is_of(row):
    """Which curve of draw_latency a row belongs to: its model, and whether it is exact."""
    return row["model"], row["engine"].endswith("-exact")


@picture
def draw_latency(rows, path):
    """bench.py's rows as SDTT's figure: generative perplexity against latency, a point for
    each number of steps; AR is a cross of lines, what is sampled exactly a single point.
    The smallest batch, each engine in the dtype that suits it best; needs matplotlib."""
    plt = pyplot()
    fig, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    batch = min(row["batch"] for row in rows)
    rows = [row for row in rows if "gen_ppl" in row and row["batch"] == batch]
    fastest = {}
    for row in rows:
        key = row["engine"], row["model"], row["length"], row["steps"]
        if key not in fastest or row["seconds"] < fastest[key]["seconds"]:
            fastest[key] = row
    rows = list(fastest.values())
    for name, exact in dict.fromkeys(map(is_of, rows)):
        mine = [row for row in rows if is_of(row) == (name, exact)]
        x = [row["seconds"] for row in mine]
        y = [row["gen_ppl"] for row in mine]
        if exact:
            axis.plot(x, y, "s", label=f"{name}, exact")
            continue
        if mine[0]["steps"] is None:
            axis.axhline(y[0], color="grey", linestyle="--", label="AR with KV cache")
            axis.axvline(x[0], color="grey", linestyle="--")
            continue
        axis.plot(x, y, "o-", label=name)
        # the number of steps beside each point
        for row, point in zip(mine, zip(x, y)):
            axis.annotate(row["steps"], point, xytext=(4, 4), textcoords="offset points",
                          fontsize=8)
    axis.set(xscale="log", yscale="log",
             xlabel=f"seconds for {batch} x {rows[0]['length']} tokens",
             ylabel="generative perplexity (numbers: steps)")
    few_ticks(axis.xaxis)
    few_ticks(axis.yaxis)
    axis.legend()
    save_figure(fig, path)


def curves_of(rows):
    """The four lines of draw_exact, {title: rows in the order of calls}, of one folder's
    rows: teacher and last student in few steps, the exact teacher, stopped early and whole,
    and AR, exact and one token at a time."""
    own = [row for row in rows if row["temperature"] == 1]
    rounds = [row["model"] for row in own if row["model"].startswith("round")]
    curves = {"teacher, in steps": [], "student, in steps": [], "teacher, exact": [],
              "AR, exact and as usual": []}
    for row in own:
        # of exact samples those with the whole text guessed in every call
        if row["steps"] == EXACT and row["ahead"] < row["length"]:
            continue
        if row["model"] == "ar":
            curves["AR, exact and as usual"].append(row)
        elif row["steps"] == EXACT:
            if row["model"] == "teacher":
                curves["teacher, exact"].append(row)
        elif row["model"] == "teacher":
            curves["teacher, in steps"].append(row)
        elif rounds and row["model"] == rounds[-1]:
            curves["student, in steps"].append(row)
    for some in curves.values():
        some.sort(key=lambda row: row["calls"])
    return {title: some for title, some in curves.items() if some}


@picture
def draw_exact(rows, path):
    """tools.exact's rows: perplexity against calls of the network, a panel for each folder
    with rows of the data; beside each point the entropy of all texts; the data's perplexity
    as a level line."""
    plt = pyplot()
    folders = dict.fromkeys(row["folder"] for row in rows if row["model"] == "data")
    fig, axes = plt.subplots(1, len(folders), figsize=(6.4 * len(folders), 4.6),
                             layout="constrained", squeeze=False)
    for axis, folder in zip(axes[0], folders):
        mine = [row for row in rows if row["folder"] == folder]
        data = next(row for row in mine if row["model"] == "data")
        axis.axhline(data["gen_ppl"], color="black", linestyle="--",
                     label=f"data ({data['pooled_entropy']:.2f})")
        # texts above the points of the first and the third line, below those of the others
        for (title, some), above in zip(curves_of(mine).items(), (6, -12, 6, -12)):
            x = [row["calls"] for row in some]
            y = [row["gen_ppl"] for row in some]
            axis.plot(x, y, "o-", markersize=4, label=title)
            color = axis.lines[-1].get_color()
            for row, point in zip(some, zip(x, y)):
                axis.annotate(f"{row['pooled_entropy']:.2f}", point, xytext=(3, above),
                              textcoords="offset points", fontsize=7, color=color)
        title = f"{data['dataset']}, seed {data['trained_with_seed']}"
        axis.set(xscale="log", yscale="log", title=title,
                 xlabel="calls of the network, the mean of texts",
                 ylabel="generative perplexity (numbers: entropy of all texts)")
        axis.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
        axis.set_xticks([], minor=True)
        few_ticks(axis.yaxis)
        axis.legend(fontsize=8)
    save_figure(fig, path)


@picture
def draw_choices(rows, path):
    """tools.choices' rows: for each choice, a panel with the share of each value, a bar for
    each row, and above it the entropy of each, in the same order."""
    plt = pyplot()
    panels = rows[0]["counts"]
    height = 0.8 / len(rows)             # of a bar, where values are 1 apart
    fig, axes = plt.subplots(4, 4, figsize=(18, 13), layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, choice in zip(axes.flat, panels):
        values = list(panels[choice])
        for i, row in enumerate(rows):
            counts = row["counts"][choice]
            total = max(1, sum(counts.values()))
            places = [j + i * height for j in range(len(values))]
            color = "black" if row["model"] == "data" else f"C{i - 1}"
            axis.barh(places, [counts[value] / total for value in values], height,
                      color=color, label=row["model"])
        middle = (len(rows) - 1) / 2 * height
        axis.set_yticks([j + middle for j in range(len(values))], values, fontsize=8)
        axis.invert_yaxis()              # the first value is the highest
        entropies = []
        for row in rows:
            value = row["entropies"][choice]
            entropies.append("-" if value is None else f"{value:.2f}")
        title = language.title(choice)
        axis.set_title(f"{title}\n{', '.join(entropies)} nats", fontsize=10)
        axis.set_xlim(0, 1)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower right")
    save_figure(fig, path)


def few_ticks(axis):
    """Numbers such as 20 on a logarithmic axis, as many as there is room for."""
    low, high = axis.get_view_interval()
    axis.set_ticks(log_ticks(low, high))
    axis.set_ticks([], minor=True)
    axis.set_major_formatter("{x:g}")


def log_ticks(low, high):
    """The values between low and high that have room for a label on a logarithmic axis: of
    each decade six where the axis is shorter than one, three up to 2.5 decades, else
    one."""
    decades = math.log10(high / low)
    if decades < 1:
        digits = (1, 1.5, 2, 3, 5, 7)
    elif decades < 2.5:
        digits = (1, 2, 5)
    else:
        digits = (1,)
    ticks = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        ticks += [digit * 10.0 ** power for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


@picture
def draw_frontier(rows, path):
    """tools.evaluate's rows as a picture: generative perplexity against entropy, within a
    text and of all texts together, a line over the temperatures for each model, number of
    steps and order."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, (key, label) in zip(axes, ENTROPIES):
        for name, steps, order in dict.fromkeys(map(setting, rows)):
            mine = [row for row in rows if setting(row) == (name, steps, order)]
            mine.sort(key=lambda row: row["temperature"] or 1)
            x = [row[key] for row in mine]
            y = [row["gen_ppl"] for row in mine]
            title = name if steps is None else f"{name}, {in_steps(steps, order)}"
            if name == "data":
                axis.plot(x, y, "k*", markersize=8, label=title)
            else:
                axis.plot(x, y, "o-", markersize=4, label=title)
        axis.set(yscale="log", xlabel=label, ylabel="generative perplexity")
        plain_numbers(axis.yaxis)
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    save_figure(fig, path)


@picture
def draw_envelope(panels, path):
    """tools.envelope's curves: perplexity against a measure of diversity, a panel for each
    of (title, name of the measure, {way: (list of diversity, list of perplexity)})."""
    plt = pyplot()
    rows = (len(panels) + 1) // 2        # of two panels each
    fig, axes = plt.subplots(rows, 2, figsize=(11, 4.2 * rows), layout="constrained",
                             squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (title, measure, curves) in zip(axes.flat, panels):
        for way, (x, y) in curves.items():
            # sampling that loses nothing stands out from few steps
            wide = way == "AR" or way.endswith("exact")
            axis.plot(x, y, "--" if wide else "-", linewidth=2.2 if wide else 1.4,
                      label=way)
        axis.set(yscale="log", title=title, xlabel=f"{measure} (nats)",
                 ylabel="generative perplexity, the best at this diversity")
        plain_numbers(axis.yaxis)
        if curves:
            axis.legend(fontsize=8)
    save_figure(fig, path)


# ---- the command: distill.py's curve

@dataclass
class FiguresConfig:
    folder: str                              # the argument without --
    plot: str | None = flag(None, "the picture [curve.png in the folder]")


def main():
    config = parse_flags(FiguresConfig, __doc__, folder="of distill.py, with its "
                                                        "results.json")
    path = Path(config.folder) / "results.json"
    target = config.plot or path.with_name("curve.png")
    check_picture(target)
    try:
        rows = json.loads(path.read_bytes())["rows"]
    except FileNotFoundError:
        raise UserError(f"{config.folder} has no results.json; python distill.py makes it")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} cannot be read ({type(e).__name__}); name a folder of "
                        "distill.py")
    if draw_curve(rows, target):
        print(f"{target} is written")


if __name__ == "__main__":
    command(main)
