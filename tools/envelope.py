"""Quality at equal diversity: what each way of writing texts reaches at any temperature,
and with any of its rounds, from the rows of tools.exact.

    python -m tools.envelope exact.json --plot envelope.png

A student that is sharper than its teacher has a lower perplexity and less diversity. A
teacher that is cooled has that, too. So perplexities are compared where diversity is equal:
for each way the rows at several temperatures are joined by lines, and of the lines of its
rounds the lowest counts.
"""
import json
from dataclasses import dataclass
from pathlib import Path

from data.files import UserError
from data.script import command, flag, parse_flags
from sample import EXACT
from tools import figures

# what diversity is measured by: the title, and the key of a row
MEASURES = {"entropy of all texts": "pooled_entropy", "choices": "choices"}
LEVELS = 6                               # of diversity, at which the table compares
POINTS = 60                              # of a curve in the picture


@dataclass
class EnvelopeConfig:
    """The flags of tools.envelope."""
    rows: str                            # the argument without --
    plot: str | None = flag(None, "picture of the lines (needs matplotlib)")


def read_rows(path):
    """The rows of a file of tools.exact. Raises UserError where it is none."""
    try:
        rows = json.loads(Path(path).read_bytes())["rows"]
        return [row for row in rows if row["length"] and row["folder"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} does not hold rows of tools.exact; name a file that its "
                        "--json made")


def way_of(row):
    """What a row is compared as: (way, line). Of the lines of a way, those of its rounds,
    the best counts. (None, None) for rows that no temperature is tried for."""
    whole = row["steps"] == EXACT and row["ahead"] >= row["length"]
    if row["model"] == "ar" and row["steps"] is None:
        return "AR", "ar"
    if row["model"] == "teacher" and whole and not row["max_calls"]:
        return "teacher, exact", "teacher"
    if row["steps"] == 8:
        if row["model"] == "teacher":
            return "teacher, 8 steps", "teacher"
        return f"{row['divergence']}, 8 steps", row["model"]
    return None, None


def ways_of(rows):
    """{way: {line: its rows}} of one dataset and one seed."""
    ways = {}
    for row in rows:
        way, line = way_of(row)
        if way:
            ways.setdefault(way, {}).setdefault(line, []).append(row)
    return ways


def best_at(lines, key, wanted):
    """Of a way's lines {line: rows} the lowest perplexity where the diversity row[key] is
    `wanted`: (perplexity, its standard error, the line), or (None, None, None) where none
    comes there."""
    best = None, None, None
    for line, rows in lines.items():
        value, se = figures.at_entropy(rows, key, wanted)
        if value is not None and (best[0] is None or value < best[0]):
            best = value, se, line
    return best


def levels(rows, key, n):
    """n values of diversity to compare at, evenly from the data's down to the least of any
    row with temperature 1, without these two, which a line may just miss."""
    top = next(row[key] for row in rows if row["model"] == "data")
    low = min(row[key] for row in rows if row["temperature"] == 1)
    step = (top - low) / (n + 1)
    return [top - step * (i + 1) for i in range(n)]


def table(rows, key):
    """Perplexity at equal diversity, as text: a line for each way, a column for each level,
    and in brackets the round. rows: of one dataset and seed."""
    columns = levels(rows, key, LEVELS)
    title = "at " + next(name for name, k in MEASURES.items() if k == key)
    text = f"{title:24}" + "".join(f"{level:>16.2f}" for level in columns)
    for way, lines in ways_of(rows).items():
        cells = ""
        for level in columns:
            value, se, line = best_at(lines, key, level)
            cell = "-"
            if value is not None:
                cell = f"{value:.2f} ±{se:.2f}"
                if line.startswith("round"):
                    cell += f" ({line.removeprefix('round ')})"
            cells += f"{cell:>16}"
        text += f"\n{way:24}{cells}"
    return text


def curves(rows, key):
    """The lowest perplexity of each way against diversity: {way: (diversity, perplexity)},
    two lists."""
    found = {}
    for way, lines in ways_of(rows).items():
        points = []
        for level in levels(rows, key, POINTS):
            value, _, _ = best_at(lines, key, level)
            if value is not None:
                points.append((level, value))
        if points:
            found[way] = tuple(zip(*points))
    return found


def groups_of(rows):
    """{(dataset, seed of training): its rows}, with at least one way to compare."""
    groups = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["trained_with_seed"]), []).append(row)
    return {name: some for name, some in groups.items() if ways_of(some)}


def measures_of(rows):
    """The keys of MEASURES that the rows have values of: only stories have choices."""
    return [key for key in MEASURES.values() if all(row.get(key) is not None
                                                    for row in rows)]


def main():
    config = parse_flags(EnvelopeConfig, __doc__, rows="file that tools.exact --json made")
    figures.check_picture(config.plot)
    groups = groups_of(read_rows(config.rows))
    if not groups:
        raise UserError(f"{config.rows} has nothing at several temperatures; make it with "
                        "tools.exact --what exact heat")
    for (dataset, seed), rows in groups.items():
        for key in measures_of(rows):
            print(f"\n{dataset}, seed {seed}, perplexity {table(rows, key)}")
    if config.plot:
        panels = []
        for (dataset, seed), rows in groups.items():
            for name, key in MEASURES.items():
                if key in measures_of(rows):
                    title = f"{dataset}, seed {seed}"
                    panels.append((title, name, curves(rows, key)))
        figures.draw_envelope(panels, config.plot)


if __name__ == "__main__":
    command(main)
