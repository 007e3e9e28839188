"""What results look like: tables as text, and pictures, which need matplotlib. A picture that
cannot be drawn is a notice: the numbers are there without it.

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
from data.measures import add_mean

LOW = 0.1                            # nats of entropy below its measure that are marked


def names(paths):
    """{name: path} of files: the ends of their paths, without .pt, with as few folders before them
    as tell all of them apart. A file that is given twice is there once."""
    different = {}
    for path in map(Path, paths):
        different.setdefault(path.resolve(), path)
    paths = list(different.values())
    parts = [(*path.absolute().parent.parts, path.stem) for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-n:]) for part in parts]
        if len(set(ends)) == len(ends):
            break
    return dict(zip(ends, paths))


FORMATS = "png", "pdf", "svg"


def check_picture(path):
    """Raises UserError where a picture of that name cannot be drawn: matplotlib is missing, or the
    name's ending is none of FORMATS."""
    if path and Path(path).suffix[1:].lower() not in FORMATS:
        raise UserError(f"--plot {path}: the ending says the format; take one of ."
                        + ", .".join(FORMATS))
    if path:
        package("matplotlib")


def pyplot():
    """matplotlib's, drawing into files, whatever MPLBACKEND says (a notebook's names a package
    that is not there). Raises UserError where it is not installed."""
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
    """Make of draw(rows, path) a function that tells whether it could draw: where matplotlib fails
    in a way of its own, it prints a notice. UserErrors are raised as they are."""
    @functools.wraps(draw)
    def attempt(rows, path):
        try:
            draw(rows, path)
            return True
        except UserError:
            raise
        except Exception as e:
            why = " ".join(str(e).split())[:200]
            print(f"no {path}: matplotlib failed ({type(e).__name__}: {why})", file=sys.stderr)
            return False
    return attempt


def rows_as_text(rows, columns):
    """Rows (dicts) under a header. columns: (title, key, format), such as ("entropy", "entropy",
    ".2f"); with a standard error beside it where the row has key_se and the format ends in "±"."""
    def cell(row, key, form):
        if row.get(key) is None:
            return ""
        text = format(row[key], form.removesuffix("±"))
        error = row.get(key + "_se") if form.endswith("±") else None
        return text if error is None else f"{text} ±{format(error, form[:-1])}"
    used = [c for c in columns if any(row.get(c[1]) is not None for row in rows)]
    body = [[title for title, _, _ in used]] + [[cell(row, *c[1:]) for c in used] for row in rows]
    widths = [max(map(len, column)) for column in zip(*body)]
    return "\n".join("  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w)
                               in enumerate(zip(line, widths))).rstrip() for line in body)


# ---- evaluate.py's tables

SAMPLES = (("model", "model", "s"), ("steps", "steps", "d"), ("nfe", "nfe", ".3g"),
           ("T", "temperature", ".2g"), ("bits", "precision", "d"), ("tokens", "tokens", ",d"),
           ("gen ppl", "gen_ppl", ".2f±"), ("per text", "text_ppl", ".2f±"),
           ("entropy", "entropy", ".3f±"), ("of all", "pooled_entropy", ".3f±"),
           ("valid", "valid", ".0%±"), ("faults", "contradictions", ".2f±"),
           ("log p", "log_p", ".1f±"), ("too low", "low", "s"))
DIVERSITY = (("model", "model", "s"), ("steps", "steps", "d"), ("T", "temperature", ".2g"),
             *((f"self-BLEU-{i}", f"self_bleu{i}", ".3f±") for i in (1, 2, 3, 4)),
             *((f"distinct-{i}", f"distinct{i}", ".3f±") for i in (1, 2, 3, 4)),
             ("8-grams seen", "seen", ".1%±"), ("repeats", "repetition", ".1%±"),
             ("copies", "copies", ".0%±"))
TABLES = {                           # part of the results: (its heading, its columns)
    "likelihood": ("likelihood in nats per token: NELBO, the any-order estimate of the same bound, "
                   "exact (AR); perplexity by the surest", (
                       ("model", "model", "s"), ("tokens", "tokens", ",d"),
                       ("NELBO", "bound", ".4f±"), ("any order", "any_order", ".4f±"),
                       ("exact", "nll", ".4f±"), ("ppl", "ppl", ".3f±"))),
    "samples": ("samples; too low: an entropy more than 0.1 under the data's or the teacher's, "
                "within a text or of all together", SAMPLES),
    "diversity": ("diversity of the same samples", DIVERSITY),
    "frontier": ("perplexity at the teacher's entropy (without one, the data's), within a text and "
                 "of all together; empty where the temperatures do not reach it", (
                     ("model", "model", "s"), ("steps", "steps", "d"),
                     ("entropy", "entropy", ".3f"), ("gen ppl", "at_entropy", ".2f±"),
                     ("of all", "pooled_entropy", ".3f"),
                     ("gen ppl", "at_pooled_entropy", ".2f±"))),
    **{name: (f"last words ({name}): accuracy in one pass, most certain first, left to right", (
        ("model", "model", "s"), ("tasks", "tasks", "d"), ("one pass", "one_pass", ".1%±"),
        ("certain", "confident", ".1%±"), ("left", "left", ".1%±"),
        ("word ppl", "word_ppl", ".2f±"), ("by bound", "by_bound", "d")))
        for name in ("lambada", "last_word")},
    "continuations": ("continuations of prompts", (
        ("model", "model", "s"), ("steps", "steps", "d"), ("texts", "texts", "d"),
        ("prompt", "prompt_tokens", "d"), ("gen ppl", "gen_ppl", ".2f±"),
        ("self-BLEU-4", "self_bleu4", ".3f±"), ("MAUVE", "mauve", ".3f±"))),
}


def show(results):
    """All of the results as text, a table for each part."""
    parts = [(part, *TABLES[part], rows) for part, rows in results.items() if part in TABLES]
    at = [part for part, *_ in parts].index("samples")
    parts.insert(at + 1, ("diversity", *TABLES["diversity"], results["samples"]))
    return "\n\n".join(f"{title}\n{rows_as_text(rows, columns)}"
                       for _, title, columns, rows in parts if rows)


# ---- rows compared with each other

def mark(rows, teacher):
    """row["low"]: which of its entropies are more than LOW under the data's or the teacher's (of as
    many steps): "text", within a text, "all", of all together."""
    for row in rows:
        usual = [r for r in rows if r["model"] == "data" or r["model"] == teacher
                 and r["temperature"] == 1 and r["steps"] == row["steps"]]
        row["low"] = " ".join(word for word, key in (("text", "entropy"), ("all", "pooled_entropy"))
                              if any(row[key] < r[key] - LOW for r in usual))


def at_entropy(points, key, wanted, wanted_se=0.0):
    """Perplexity (value, SE) where the line through a model's rows at several temperatures comes
    to an entropy (row[key]) of `wanted`: log-perplexity is interpolated, between the neighbours
    nearest to temperature 1. (None, None) where it never comes there."""
    points = sorted(points, key=lambda row: row["temperature"])
    pairs = [(a, b) for a, b in zip(points, points[1:])
             if min(a[key], b[key]) <= wanted <= max(a[key], b[key]) and a[key] != b[key]]
    if not pairs:
        return None, None
    a, b = min(pairs, key=lambda p: abs(p[0]["temperature"] + p[1]["temperature"] - 2))
    w = (wanted - a[key]) / (b[key] - a[key])
    slope = math.log(b["gen_ppl"] / a["gen_ppl"]) / (b[key] - a[key])
    value = a["gen_ppl"] * (b["gen_ppl"] / a["gen_ppl"]) ** w
    parts = [weight * math.hypot(row["gen_ppl_se"] / row["gen_ppl"], slope * row[key + "_se"])
             for weight, row in ((1 - w, a), (w, b))]
    return value, value * math.hypot(*parts, slope * wanted_se)


def frontier(rows, teacher):
    """For each model and number of steps its perplexity at the teacher's entropy at temperature 1
    and the most steps (without a teacher, the data's), within a text and of all together."""
    by_teacher = [r for r in rows if r["model"] == teacher and r["temperature"] == 1]
    usual = max(by_teacher, key=lambda r: r["steps"] or 0) if by_teacher else next(
        r for r in rows if r["model"] == "data")
    found = []
    for name, steps in dict.fromkeys((r["model"], r["steps"]) for r in rows):
        points = [r for r in rows if (r["model"], r["steps"]) == (name, steps)]
        if name != "data":
            row = {"model": name, "steps": steps, "entropy": usual["entropy"],
                   "pooled_entropy": usual["pooled_entropy"]}
            for key in ("entropy", "pooled_entropy"):
                add_mean(row, f"at_{key}", at_entropy(points, key, usual[key], usual[key + "_se"]))
            found.append(row)
    return found


# ---- pictures

@picture
def draw_curve(rows, path):
    """distill.py's rows as a picture: generative perplexity and both entropies against steps, a line per model."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    names = list(dict.fromkeys(row["model"] for row in rows))
    columns = sorted({row["steps"] for row in rows if row["steps"]})
    for axis, key, label in zip(axes, ("gen_ppl", "entropy", "pooled_entropy"),
                                ("generative perplexity", "unigram entropy within a text (nats)",
                                 "entropy of all texts together (nats)")):
        for i, name in enumerate(names):
            points = [(row["steps"], row[key], row[key + "_se"]) for row in rows
                      if row["model"] == name]
            color = {"data": "black", "ar": "grey"}.get(name, plt.cm.viridis(i / len(names)))
            if points[0][0] is None:
                axis.axhline(points[0][1], color=color, linestyle="--", label=name)
            else:
                axis.errorbar(*zip(*[(s, y) for s, y, _ in points]), [e for _, _, e in points],
                              color=color, marker="o", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(columns, columns)
        axis.set_xlabel("sampling steps")
        axis.set_ylabel(label)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    axes[0].yaxis.set_major_formatter("{x:g}")
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    save_figure(fig, path)


@picture
def draw_latency(rows, path):
    """bench.py's rows as SDTT's figure: generative perplexity against latency, a point
    for each number of steps; AR is a cross of lines. The smallest batch; needs matplotlib."""
    plt = pyplot()
    fig, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    batch = min(row["batch"] for row in rows)
    rows = [row for row in rows if "gen_ppl" in row and row["batch"] == batch]
    for name in dict.fromkeys(row["model"] for row in rows):
        x, y, labels = zip(*[(r["seconds"], r["gen_ppl"], r["steps"]) for r in rows
                             if r["model"] == name])
        if labels[0] is None:
            axis.axhline(y[0], color="grey", linestyle="--", label="AR with KV cache")
            axis.axvline(x[0], color="grey", linestyle="--")
            continue
        axis.plot(x, y, "o-", label=name)
        for point in zip(labels, zip(x, y)):
            axis.annotate(*point, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axis.set(xscale="log", yscale="log", xlabel=f"seconds for {batch} x {rows[0]['length']} tokens",
             ylabel="generative perplexity (numbers: steps)")
    for one in (axis.xaxis, axis.yaxis):
        low, high = one.get_view_interval()
        one.set_ticks(log_ticks(low, high))
        one.set_ticks([], minor=True)
        one.set_major_formatter("{x:g}")
    axis.legend()
    save_figure(fig, path)


def log_ticks(low, high):
    """The values between low and high that have room for a label on a logarithmic axis: of each
    decade six where the axis is shorter than one, three up to 2.5 decades, else one."""
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
    """evaluate.py's rows as a picture: generative perplexity against entropy, within a text and of
    all texts together, a line over the temperatures for each model and number of steps."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, key, label in zip(axes, ("entropy", "pooled_entropy"),
                                ("unigram entropy within a text (nats)",
                                 "entropy of all texts together (nats)")):
        for name, steps in dict.fromkeys((row["model"], row["steps"]) for row in rows):
            points = sorted((row["temperature"], row[key], row["gen_ppl"]) for row in rows
                            if (row["model"], row["steps"]) == (name, steps))
            _, x, y = zip(*points)
            title = name if steps is None else f"{name}, {steps} steps"
            axis.plot(x, y, "k*" if name == "data" else "o-", markersize=8 if name == "data" else 4,
                      label=title)
        axis.set(yscale="log", xlabel=label, ylabel="generative perplexity")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    save_figure(fig, path)


@picture
def draw_experiment(rows, path):
    """The rows of results/experiments.py as a picture: a line of pictures for each dataset, in
    each a curve for each variant, the mean of its seeds, which are the points."""
    plt = pyplot()
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    fig, axes = plt.subplots(len(datasets), 4, figsize=(15, 3.6 * len(datasets)),
                             layout="constrained", squeeze=False)
    for line, dataset in zip(axes, datasets):
        mine = [row for row in rows if row["dataset"] == dataset]
        for axis, (label, key, steps) in zip(line, (
                ("bound (nats per token)", "any_order", None),
                ("perplexity, 8 steps", "gen_ppl", 8),
                ("entropy of all texts, 8 steps", "pooled_entropy", 8),
                ("perplexity, last round", "gen_ppl", "last"))):
            for i, name in enumerate(dict.fromkeys(row["variant"] for row in mine)):
                run = [row for row in mine if row["variant"] == name and row.get(key) is not None
                       and row["temperature"] in (None, 1)]
                last = max(row["round"] for row in run)
                x = "steps" if steps == "last" else "round"
                run = [row for row in run if (row["round"] == last if steps == "last" else
                                              row["steps"] == steps)]
                points = {}
                for row in run:
                    points.setdefault(row[x], []).append(row[key])
                means = {a: sum(values) / len(values) for a, values in sorted(points.items())}
                axis.plot(list(means), list(means.values()), color=f"C{i}", label=name)
                axis.plot([row[x] for row in run], [row[key] for row in run], ".", color=f"C{i}")
            axis.set(title=f"{dataset}: {label}", xlabel=(
                "sampling steps" if steps == "last" else "round (0: the teacher)"))
            if key == "gen_ppl":
                axis.set_yscale("log")
                axis.yaxis.set_minor_formatter("{x:g}")
                axis.yaxis.set_major_formatter("{x:g}")
            if steps == "last":
                axis.set_xscale("log", base=2)
                axis.set_xticks(sorted(points), sorted(points))
    axes[0][0].legend()
    save_figure(fig, path)


# ---- the command: distill.py's curve

@dataclass
class FiguresConfig:
    folder: str                              # the argument without --
    plot: str | None = flag(None, "the picture [curve.png in the folder]")


def main():
    c = parse_flags(FiguresConfig, __doc__, folder="of distill.py, with its results.json")
    path = Path(c.folder) / "results.json"
    target = c.plot or path.with_name("curve.png")
    check_picture(target)
    try:
        rows = json.loads(path.read_bytes())["rows"]
    except FileNotFoundError:
        raise UserError(f"{c.folder} has no results.json; python distill.py makes it")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} cannot be read ({type(e).__name__}); name a folder of distill.py")
    if draw_curve(rows, target):
        print(f"{target} is written")


if __name__ == "__main__":
    command(main)
