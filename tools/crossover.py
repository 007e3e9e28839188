"""Where AR overtakes diffusion as the batch grows: ratios of times, and the crossing."""
import math


def overtakes(points):
    """In words: at which batch AR overtakes, between two that were measured by a straight
    line in logarithms. points: [(batch, how many times faster than AR)]."""
    # r: how many times faster than AR diffusion is
    for (b0, r0), (b1, r1) in zip(points, points[1:]):
        if r0 >= 1 > r1:
            share = math.log(r0) / math.log(r0 / r1)     # of the way from b0 to b1
            return f"overtakes at a batch of about {b0 * (b1 / b0) ** share:.1f}"
    first_batch, first_ratio = points[0]                             # the smallest batch
    if first_ratio < 1:
        return f"is faster from batch {first_batch} on"
    return f"is slower up to batch {points[-1][0]}"


def against_ar(rows):
    """Fill in how many times faster than AR the rows are; say where AR overtakes, a line
    each."""
    # what did not fit has no time
    done = [row for row in rows if "error" not in row]
    # AR's time in each size
    ar_seconds = {}
    for row in done:
        if row["engine"] == "ar":
            ar_seconds[row["preset"], row["length"], row["batch"]] = row["seconds"]
    # a curve over batch sizes for each model and number of steps
    curves = {}
    for row in done:
        key = row["preset"], row["length"], row["batch"]
        row["vs_ar"] = None              # AR may not have been asked for
        if key not in ar_seconds:
            continue
        row["vs_ar"] = ar_seconds[key] / row["seconds"]
        if row["engine"] in ("ar-exact", "diffusion", "diffusion-kv", "diffusion-exact"):
            name = row["model"]
            if row["engine"] == "diffusion-kv":
                name += "'s KV cache"
            if row["engine"].endswith("-exact"):
                name += ", sampled exactly"
            curve = row["preset"] or "trained", row["length"], name, row["steps"]
            curves.setdefault(curve, []).append((row["batch"], row["vs_ar"]))
    lines = []
    for (preset, length, name, steps), points in curves.items():
        # points are in the order of batch sizes, as config.batch is
        line = f"{preset}, {length} tokens: AR {overtakes(points)} against {name}"
        if steps:
            line += f" at {steps} steps"
        lines.append(line)
    return lines
