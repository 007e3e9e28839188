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

from common import command, flag, package, parse_flags
from data.files import UserError, write
from sample import put

LOW = 0.1                            # nats of entropy below its measure that are marked


def names(paths):
    """{name: path} of files: the ends of their paths, without .pt, with as few folders
    before them as tell all of them apart. A file that is given twice is there once."""
    # the files, whatever links lead to them
    different = {}
    for path in map(Path, paths):
        different.setdefault(path.resolve(), path)
    paths = list(different.values())

    # the name alone, then with one folder before it, with two, ...
    parts = [(*path.absolute().parent.parts, path.stem) for path in paths]
    longest = max(map(len, parts))
    for n in range(1, longest + 1):
        ends = []
        for part in parts:
            begin = max(0, len(part) - n)
            ends.append("/".join(part[begin:]))
        if len(set(ends)) == len(ends):
            break
    return dict(zip(ends, paths))


# ---- pictures as files

FORMATS = "png", "pdf", "svg"


def check_picture(path):
    """Raises UserError where a picture of that name cannot be drawn: matplotlib is missing,
    or the name's ending is none of FORMATS. None is no picture."""
    if not path:
        return
    # scripts ask this before their work, at whose end the picture would fail
    if Path(path).suffix[1:].lower() not in FORMATS:
        raise UserError(f"--plot {path}: the ending says the format; take one of ."
                        + ", .".join(FORMATS))
    package("matplotlib")


def pyplot():
    """matplotlib's, drawing into files, whatever MPLBACKEND says (a notebook's names a
    package that is not there). Raises UserError where it is not installed."""
    # matplotlib reads the variable when it is imported; others find it as it was
    usual = os.environ.pop("MPLBACKEND", None)
    try:
        package("matplotlib").use("Agg")
        return package("matplotlib.pyplot")
    finally:
        if usual is not None:
            os.environ["MPLBACKEND"] = usual


def save_figure(fig, path):
    """A figure as a file in the format that its name says."""
    # matplotlib gets a file without a name here, so it has to be told the format
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
        # whatever it is, the numbers must not be lost with it
        except Exception as e:
            why = " ".join(str(e).split())[:200]
            print(f"no {path}: matplotlib failed ({type(e).__name__}: {why})",
                  file=sys.stderr)
            return False
    return attempt


# ---- tables as text

def cell(row, key, form):
    """A value of a row as text; where the format ends in "±" with its standard error, if
    the row has key_se. "" where there is no value."""
    if row.get(key) is None:
        return ""
    # "±" is ours, the rest is Python's format
    text = format(row[key], form.removesuffix("±"))
    if form.endswith("±"):
        error = row.get(key + "_se")
        if error is not None:
            text += f" ±{format(error, form.removesuffix('±'))}"
    return text


def rows_as_text(rows, columns):
    """Rows (dicts) under a header. columns: (title, key, format), such as ("entropy",
    "entropy", ".2f±"), see cell; one without any value is left out."""
    # the columns that have something to show
    used = []
    for title, key, form in columns:
        if any(row.get(key) is not None for row in rows):
            used.append((title, key, form))

    # all as text, the titles first
    body = [[title for title, _, _ in used]]
    for row in rows:
        body.append([cell(row, key, form) for _, key, form in used])

    # a column is as wide as its widest text; the first is of names, the others of numbers
    widths = [max(map(len, column)) for column in zip(*body)]
    lines = []
    for texts in body:
        aligned = []
        for i, (text, width) in enumerate(zip(texts, widths)):
            if i == 0:
                aligned.append(text.ljust(width))
            else:
                aligned.append(text.rjust(width))
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


# ---- evaluate.py's tables: columns are (title, key, format)

LIKELIHOOD = (
    ("model", "model", "s"), ("tokens", "tokens", ",d"), ("NELBO", "bound", ".4f±"),
    ("any order", "any_order", ".4f±"), ("exact", "nll", ".4f±"), ("ppl", "ppl", ".3f±"))
SAMPLES = (
    # how they are drawn
    ("model", "model", "s"), ("steps", "steps", "d"), ("nfe", "nfe", ".3g"),
    ("T", "temperature", ".2g"), ("bits", "precision", "d"), ("tokens", "tokens", ",d"),
    # how good and how different they are
    ("gen ppl", "gen_ppl", ".2f±"), ("per text", "text_ppl", ".2f±"),
    ("entropy", "entropy", ".3f±"), ("of all", "pooled_entropy", ".3f±"),
    # the oracle's verdict; and what mark says
    ("valid", "valid", ".0%±"), ("faults", "contradictions", ".2f±"),
    ("log p", "log_p", ".1f±"), ("too low", "low", "s"))
DIVERSITY = (
    ("model", "model", "s"), ("steps", "steps", "d"), ("T", "temperature", ".2g"),
    # by the length of n-grams
    ("self-BLEU-1", "self_bleu1", ".3f±"), ("self-BLEU-2", "self_bleu2", ".3f±"),
    ("self-BLEU-3", "self_bleu3", ".3f±"), ("self-BLEU-4", "self_bleu4", ".3f±"),
    ("distinct-1", "distinct1", ".3f±"), ("distinct-2", "distinct2", ".3f±"),
    ("distinct-3", "distinct3", ".3f±"), ("distinct-4", "distinct4", ".3f±"),
    # what is repeated: of the training text, within a text, as a whole
    ("8-grams seen", "seen", ".1%±"), ("repeats", "repetition", ".1%±"),
    ("copies", "copies", ".0%±"))
FRONTIER = (
    ("model", "model", "s"), ("steps", "steps", "d"), ("entropy", "entropy", ".3f"),
    ("gen ppl", "at_entropy", ".2f±"), ("of all", "pooled_entropy", ".3f"),
    ("gen ppl", "at_pooled_entropy", ".2f±"))
LAST_WORDS = (
    ("model", "model", "s"), ("tasks", "tasks", "d"), ("one pass", "one_pass", ".1%±"),
    ("certain", "confident", ".1%±"), ("left", "left", ".1%±"),
    ("word ppl", "word_ppl", ".2f±"), ("by bound", "by_bound", "d"))
CONTINUATIONS = (
    ("model", "model", "s"), ("steps", "steps", "d"), ("texts", "texts", "d"),
    ("prompt", "prompt_tokens", "d"), ("gen ppl", "gen_ppl", ".2f±"),
    ("self-BLEU-4", "self_bleu4", ".3f±"), ("MAUVE", "mauve", ".3f±"))

TABLES = {                           # part of the results: (its heading, its columns)
    "likelihood": (
        "likelihood in nats per token: NELBO, the any-order estimate of the same bound, "
        "exact (AR); perplexity by the surest", LIKELIHOOD),
    "samples": (
        "samples; too low: an entropy more than 0.1 under the data's or the teacher's, "
        "within a text or of all together", SAMPLES),
    "diversity": ("diversity of the same samples", DIVERSITY),
    "frontier": (
        "perplexity at the teacher's entropy (without one, the data's), within a text and "
        "of all together; empty where the temperatures do not reach it", FRONTIER),
    "lambada": (
        "last words (lambada): accuracy in one pass, most certain first, left to right",
        LAST_WORDS),
    "last_word": (
        "last words (last_word): accuracy in one pass, most certain first, left to right",
        LAST_WORDS),
    "continuations": ("continuations of prompts", CONTINUATIONS),
}


def show(results):
    """All of the results as text, a table for each part."""
    # the samples have two tables
    parts = []
    for part, rows in results.items():
        if part in TABLES:
            parts.append((part, rows))
        if part == "samples":
            parts.append(("diversity", rows))

    texts = []
    for part, rows in parts:
        if rows:
            title, columns = TABLES[part]
            texts.append(f"{title}\n{rows_as_text(rows, columns)}")
    return "\n\n".join(texts)


# ---- rows compared with each other

def mark(rows, teacher):
    """row["low"]: which of its entropies are more than LOW under the data's or the
    teacher's (of as many steps): "text", within a text, "all", of all together."""
    for row in rows:
        # what it is measured by
        usual = []
        for other in rows:
            if other["model"] == "data":
                usual.append(other)
            elif (other["model"] == teacher and other["temperature"] == 1
                    and other["steps"] == row["steps"]):
                usual.append(other)

        low = []
        for word, key in (("text", "entropy"), ("all", "pooled_entropy")):
            if any(row[key] < other[key] - LOW for other in usual):
                low.append(word)
        row["low"] = " ".join(low)


def at_entropy(points, key, wanted, wanted_se=0.0):
    """Perplexity (value, SE) where the line through a model's rows at several temperatures
    comes to an entropy (row[key]) of `wanted` nats: log-perplexity is interpolated, between
    the neighbours nearest to temperature 1. (None, None) where it never comes there."""
    # the neighbours that have it between them
    points = sorted(points, key=lambda row: row["temperature"])
    pairs = []
    for cold, warm in zip(points, points[1:]):
        low = min(cold[key], warm[key])
        high = max(cold[key], warm[key])
        if low <= wanted <= high and low != high:
            pairs.append((cold, warm))
    if not pairs:
        return None, None
    cold, warm = min(pairs, key=lambda pair: abs(
        pair[0]["temperature"] + pair[1]["temperature"] - 2))

    # interpolated: `share` of the way from the cold one to the warm one
    rise = warm[key] - cold[key]
    share = (wanted - cold[key]) / rise
    ratio = warm["gen_ppl"] / cold["gen_ppl"]
    slope = math.log(ratio) / rise
    value = cold["gen_ppl"] * ratio ** share

    # the errors of both ends, each of perplexity and of entropy, and that of `wanted`
    parts = []
    for weight, row in ((1 - share, cold), (share, warm)):
        error = math.hypot(row["gen_ppl_se"] / row["gen_ppl"], slope * row[key + "_se"])
        parts.append(weight * error)
    return value, value * math.hypot(*parts, slope * wanted_se)


def frontier(rows, teacher):
    """For each model and number of steps its perplexity at the teacher's entropy at
    temperature 1 and the most steps (without a teacher, the data's), within a text and of
    all together."""
    # the row whose entropies are the measure
    by_teacher = [r for r in rows if r["model"] == teacher and r["temperature"] == 1]
    if by_teacher:
        usual = max(by_teacher, key=lambda row: row["steps"] or 0)
    else:
        usual = next(row for row in rows if row["model"] == "data")

    found = []
    for name, steps in dict.fromkeys((row["model"], row["steps"]) for row in rows):
        if name == "data":
            continue
        # its rows at all temperatures
        points = [r for r in rows if r["model"] == name and r["steps"] == steps]
        row = {"model": name, "steps": steps, "entropy": usual["entropy"],
               "pooled_entropy": usual["pooled_entropy"]}
        for key in ("entropy", "pooled_entropy"):
            put(row, f"at_{key}", at_entropy(points, key, usual[key], usual[key + "_se"]))
        found.append(row)
    return found


# ---- pictures

def plain_numbers(axis):
    """A logarithmic y axis with labels such as 20, not 2 x 10^1."""
    axis.set_yscale("log")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")


@picture
def draw_curve(rows, path):
    """distill.py's rows as a picture: generative perplexity and both entropies against
    steps, a line per model."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    # models in the order of their rows, and the steps of any of them
    models = list(dict.fromkeys(row["model"] for row in rows))
    columns = sorted({row["steps"] for row in rows if row["steps"]})
    labels = {"gen_ppl": "generative perplexity",
              "entropy": "unigram entropy within a text (nats)",
              "pooled_entropy": "entropy of all texts together (nats)"}
    for axis, (key, label) in zip(axes, labels.items()):
        for i, name in enumerate(models):
            mine = [row for row in rows if row["model"] == name]
            # the rounds go from dark to light
            color = plt.cm.viridis(i / len(models))
            color = {"data": "black", "ar": "grey"}.get(name, color)
            # what has no steps is the same for any number of them
            if mine[0]["steps"] is None:
                axis.axhline(mine[0][key], color=color, linestyle="--", label=name)
                continue
            # the others are curves with error bars
            steps = [row["steps"] for row in mine]
            values = [row[key] for row in mine]
            errors = [row[key + "_se"] for row in mine]
            axis.errorbar(steps, values, errors, color=color, marker="o", markersize=3,
                          label=name)
        # each number of steps that was measured has its label
        axis.set_xscale("log", base=2)
        axis.set_xticks(columns, columns)
        axis.set_xlabel("sampling steps")
        axis.set_ylabel(label)
    # one legend beside the three
    plain_numbers(axes[0])
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8,
               loc="outside right center")
    save_figure(fig, path)


@picture
def draw_latency(rows, path):
    """bench.py's rows as SDTT's figure: generative perplexity against latency, a point for
    each number of steps; AR is a cross of lines. The smallest batch."""
    plt = pyplot()
    fig, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    # only what has been judged, at the smallest batch
    batch = min(row["batch"] for row in rows)
    rows = [row for row in rows if "gen_ppl" in row and row["batch"] == batch]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        # AR, which has no steps
        if mine[0]["steps"] is None:
            axis.axhline(mine[0]["gen_ppl"], color="grey", linestyle="--",
                         label="AR with KV cache")
            axis.axvline(mine[0]["seconds"], color="grey", linestyle="--")
            continue
        # a curve for each of the others
        x = [row["seconds"] for row in mine]
        axis.plot(x, [row["gen_ppl"] for row in mine], "o-", label=name)
        # the number of steps beside each point
        for row in mine:
            axis.annotate(row["steps"], (row["seconds"], row["gen_ppl"]), xytext=(4, 4),
                          textcoords="offset points", fontsize=8)
    axis.set(xscale="log", yscale="log",
             xlabel=f"seconds for {batch} x {rows[0]['length']} tokens",
             ylabel="generative perplexity (numbers: steps)")
    # few labels, so that they have room
    for one in (axis.xaxis, axis.yaxis):
        low, high = one.get_view_interval()
        one.set_ticks(log_ticks(low, high))
        one.set_ticks([], minor=True)
        one.set_major_formatter("{x:g}")
    axis.legend()
    save_figure(fig, path)


def log_ticks(low, high):
    """The values between low and high that have room for a label on a logarithmic axis: of
    each decade six where the axis is shorter than one, three up to 2.5 decades, else one.
    """
    decades = math.log10(high / low)
    if decades < 1:
        digits = (1, 1.5, 2, 3, 5, 7)
    elif decades < 2.5:
        digits = (1, 2, 5)
    else:
        digits = (1,)
    # of all whole decades, then what lies between
    ticks = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        ticks += [digit * 10.0 ** power for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


@picture
def draw_frontier(rows, path):
    """evaluate.py's rows as a picture: generative perplexity against entropy, within a text
    and of all texts together, a line over the temperatures for each model and number of
    steps."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    labels = {"entropy": "unigram entropy within a text (nats)",
              "pooled_entropy": "entropy of all texts together (nats)"}
    for axis, (key, label) in zip(axes, labels.items()):
        for name, steps in dict.fromkeys((row["model"], row["steps"]) for row in rows):
            # its points in the order of temperature
            points = []
            for row in rows:
                if row["model"] == name and row["steps"] == steps:
                    points.append((row["temperature"], row[key], row["gen_ppl"]))
            points.sort()
            x = [entropy for _, entropy, _ in points]
            y = [gen_ppl for _, _, gen_ppl in points]
            # the data is a star, a model a line
            title = name if steps is None else f"{name}, {steps} steps"
            if name == "data":
                axis.plot(x, y, "k*", markersize=8, label=title)
            else:
                axis.plot(x, y, "o-", markersize=4, label=title)
        # perplexity on a logarithmic axis, entropy, a logarithm itself, on a plain one
        plain_numbers(axis)
        axis.set(xlabel=label, ylabel="generative perplexity")
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8,
               loc="outside right center")
    save_figure(fig, path)


# what is drawn of an experiment: (title, key, steps); "last" is the last round at all steps
EXPERIMENT = (("bound (nats per token)", "any_order", None),
              ("perplexity, 8 steps", "gen_ppl", 8),
              ("entropy of all texts, 8 steps", "pooled_entropy", 8),
              ("perplexity, last round", "gen_ppl", "last"))


def variant_points(rows, key, steps):
    """The points of a variant, [(x, y)], one for each seed: x is the round, or with steps
    "last" the number of steps."""
    # what was measured, at temperature 1 or without one
    rows = [row for row in rows if row.get(key) is not None]
    rows = [row for row in rows if row["temperature"] in (None, 1)]
    last = max(row["round"] for row in rows)
    points = []
    for row in rows:
        # the last round at all numbers of steps, or all rounds at one
        if steps == "last" and row["round"] == last:
            points.append((row["steps"], row[key]))
        elif steps != "last" and row["steps"] == steps:
            points.append((row["round"], row[key]))
    return points


def draw_variants(axis, rows, title, key, steps):
    """One picture of draw_experiment: a curve for each variant of the rows."""
    for i, name in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        mine = [row for row in rows if row["variant"] == name]
        points = variant_points(mine, key, steps)
        # a line through the means of the seeds
        values = {}
        for place, value in points:
            values.setdefault(place, []).append(value)
        x = sorted(values)
        means = [sum(values[place]) / len(values[place]) for place in x]
        axis.plot(x, means, color=f"C{i}", label=name)
        # the seeds themselves, in the same colour
        places = [place for place, _ in points]
        axis.plot(places, [value for _, value in points], ".", color=f"C{i}")
    if key == "gen_ppl":
        plain_numbers(axis)
    axis.set(title=title, xlabel="round (0: the teacher)")
    # all variants are measured at the same numbers of steps
    if steps == "last":
        axis.set_xlabel("sampling steps")
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, x)


@picture
def draw_experiment(rows, path):
    """The rows of results/experiments.py as a picture: a line of pictures for each dataset,
    in each a curve for each variant, the mean of its seeds, which are the points."""
    plt = pyplot()
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    fig, axes = plt.subplots(len(datasets), 4, figsize=(15, 3.6 * len(datasets)),
                             layout="constrained", squeeze=False)
    for line, dataset in zip(axes, datasets):
        # four pictures of one dataset
        mine = [row for row in rows if row["dataset"] == dataset]
        for axis, (label, key, steps) in zip(line, EXPERIMENT):
            draw_variants(axis, mine, f"{dataset}: {label}", key, steps)
    axes[0][0].legend()
    save_figure(fig, path)


# ---- the command: distill.py's curve

@dataclass
class FiguresConfig:
    folder: str                              # the argument without --
    plot: str | None = flag(None, "the picture [curve.png in the folder]")


def main():
    config = parse_flags(FiguresConfig, __doc__,
                         folder="of distill.py, with its results.json")
    path = Path(config.folder) / "results.json"
    target = config.plot or path.with_name("curve.png")
    check_picture(target)
    # the rows that distill.py wrote
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
