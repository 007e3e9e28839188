"""Quality at equal diversity: what each method of sampling reaches at any temperature, and
with any round of its student, from the rows of tools.exact.

    python -m tools.envelope exact.json --plot envelope.png
    python -m tools.envelope exact.json exact-divergences.json

A student that is sharper than its teacher has a lower perplexity and less diversity. A
teacher that is cooled has that, too. So perplexities are compared where diversity is equal:
the rows of a model at several temperatures make a curve, and of the curves of a method, one
for each round, the lowest counts.
"""
from dataclasses import dataclass

from data.files import UserError
from data.script import command, flag, parse_flags
from sample import EXACT
from tools import figures
from tools.exact import read_rows

# what diversity is measured by: {key of a row: its name}; only stories have choices
MEASURES = {"pooled_entropy": "entropy of all texts", "choices": "choices"}
LEVELS = 6                               # of diversity, at which the table compares
POINTS = 60                              # of a curve in the picture


@dataclass
class EnvelopeConfig:
    """The flags of tools.envelope."""
    files: list[str]                     # the arguments without --
    plot: str | None = flag(None, "picture of the curves (needs matplotlib)")


# ---- what is compared: methods, each with a curve over the temperatures for each model

def method_of(row):
    """What a row is compared as, such as "teacher, exact"; None for rows that are not
    compared: the data, other numbers of steps, what was stopped or looks less far ahead."""
    if row["model"] == "ar" and row["steps"] is None:
        return "AR"
    name = row["model"]
    if name.startswith("round"):
        name = row["divergence"]
    elif name != "teacher":
        return None
    if row.get("variant"):
        name += ", " + row["variant"]
    all_ahead = row["steps"] == EXACT and row["ahead"] >= row["length"]
    if row["model"] == "teacher" and all_ahead and not row["max_calls"]:
        return f"{name}, exact"
    if row["steps"] in (8, 32):
        return f"{name}, {row['steps']} steps"
    return None


def curves_of(rows):
    """{method: {model: its rows}}: of a divergence the models are its rounds. Raises
    UserError where a model has two rows of one temperature, measured in different ways."""
    curves = {}
    for row in rows:
        method = method_of(row)
        if method:
            curves.setdefault(method, {}).setdefault(row["model"], []).append(row)
    for method, models in curves.items():
        for model, some in models.items():
            if len({row["temperature"] for row in some}) < len(some):
                raise UserError(f"{method}, {model}: several rows of one temperature, of "
                                "different weights, judges, seeds or numbers of texts; "
                                "give a file with one kind")
    # what was drawn at one temperature only makes no curve
    drawn = {}
    for method, models in curves.items():
        if any(len(some) > 1 for some in models.values()):
            drawn[method] = models
    return drawn


def best_at(models, key, wanted):
    """Of {model: rows} the lowest perplexity where diversity, row[key], is `wanted`:
    (perplexity, its standard error, the model), or (None, None, None) where no curve comes
    there. Between two temperatures whose diversities enclose it, log-perplexity is
    interpolated."""
    best = None, None, None
    for model, rows in models.items():
        value, se = figures.at_entropy(rows, key, wanted)
        if value is not None and (best[0] is None or value < best[0]):
            best = value, se, model
    return best


def levels(rows, key, n):
    """n evenly spaced diversities between the data's and the lowest of any row at
    temperature 1. The ends are left out: a curve may just miss them."""
    top = next(row[key] for row in rows if row["model"] == "data")
    low = min(row[key] for row in rows if row["temperature"] == 1)
    step = (top - low) / (n + 1)
    return [top - step * (i + 1) for i in range(n)]


def rows_of(files):
    """The rows of several files of tools.exact, each once."""
    rows = {}
    for path in files:
        for row in read_rows(path):
            rows.setdefault(row["key"], row)
    return list(rows.values())


def groups_of(rows):
    """{(dataset, seed of training): its rows}, of those that can be compared: with a row of
    the data, one at temperature 1, and a curve. Texts shorter than the data's rows are left
    out."""
    groups = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["trained_with_seed"]), []).append(row)
    comparable = {}
    for name, group in groups.items():
        lengths = [row["length"] for row in group if row["model"] == "data"]
        if not lengths:
            continue
        group = [row for row in group if row["length"] == max(lengths)]
        # levels needs a row at temperature 1
        if curves_of(group) and any(row["temperature"] == 1 for row in group):
            comparable[name] = group
    return comparable


def measures_of(rows):
    """The keys of MEASURES that all rows have values of."""
    def complete(key):
        return all(row.get(key) is not None for row in rows)
    return [key for key in MEASURES if complete(key)]


# ---- a table and a picture

def table(rows, key):
    """Perplexity at equal diversity, as text: a line for each method, a column for each
    level, and in brackets the round. rows: of one dataset and seed."""
    columns = levels(rows, key, LEVELS)
    text = f"{'at ' + MEASURES[key]:24}" + "".join(f"{level:>16.2f}" for level in columns)
    for method, models in curves_of(rows).items():
        cells = ""
        for level in columns:
            value, se, model = best_at(models, key, level)
            cell = "-"
            if value is not None:
                cell = f"{value:.2f} ±{se:.2f}"
                if model.startswith("round"):
                    cell += f" ({model.removeprefix('round ')})"
            cells += f"{cell:>16}"
        text += f"\n{method:24}{cells}"
    return text


def points_of(rows, key):
    """The lowest perplexity of each method against diversity: {method: (diversities,
    perplexities)}."""
    found = {}
    for method, models in curves_of(rows).items():
        x, y = [], []
        for level in levels(rows, key, POINTS):
            value, _, _ = best_at(models, key, level)
            if value is not None:
                x.append(level)
                y.append(value)
        if x:
            found[method] = x, y
    return found


def main():
    config = parse_flags(EnvelopeConfig, __doc__, files="that tools.exact --json made")
    figures.check_picture(config.plot)
    groups = groups_of(rows_of(config.files))
    if not groups:
        raise UserError(f"{' '.join(config.files)}: no rows of data with texts at several "
                        "temperatures beside them; tools.exact --what steps exact heat "
                        "makes them")
    panels = []
    for (dataset, seed), rows in groups.items():
        for key in measures_of(rows):
            print(f"\n{dataset}, seed {seed}: perplexity\n{table(rows, key)}")
            panels.append((f"{dataset}, seed {seed}", MEASURES[key], points_of(rows, key)))
    if config.plot:
        figures.draw_envelope(panels, config.plot)


if __name__ == "__main__":
    command(main)
