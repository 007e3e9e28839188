"""Where AR overtakes diffusion as the batch grows: ratios of times, and the crossing."""
import math

# what is compared with AR, and how it is called beside its model
COMPARED = {"ar-exact": ", sampled exactly", "diffusion": "", "diffusion-kv": "'s KV cache",
            "diffusion-exact": ", sampled exactly"}


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


def fill_vs_ar(rows):
    """Put into each row, as "vs_ar", how many times faster than AR it is at the same batch
    and length, where AR has the dtype that suits it best; None where AR was not measured,
    or the row did not fit."""
    ar_seconds = {}
    for row in rows:
        if row["engine"] == "ar" and "error" not in row:
            key = row["preset"], row["length"], row["batch"]
            ar_seconds[key] = min(row["seconds"], ar_seconds.get(key, math.inf))
    for row in rows:
        if "error" in row:
            continue
        key = row["preset"], row["length"], row["batch"]
        row["vs_ar"] = None
        if key in ar_seconds:
            row["vs_ar"] = ar_seconds[key] / row["seconds"]


def crossings(rows):
    """Where AR overtakes each of diffusion's engines and models, and what is to be known of
    the steps: sentences. rows: those of all batch sizes, in their order, which fill_vs_ar
    has seen."""
    # a curve over batch sizes for each engine, model and number of steps: {batch: ratio},
    # in the dtype that is faster there
    curves = {}
    for row in rows:
        if row.get("vs_ar") is None or row["engine"] not in COMPARED:
            continue
        name = row["model"] + COMPARED[row["engine"]]
        curve = row["preset"] or "trained", row["length"], name, row["steps"]
        points = curves.setdefault(curve, {})
        points[row["batch"]] = max(row["vs_ar"], points.get(row["batch"], 0.0))
    lines = []
    for (preset, length, name, steps), points in curves.items():
        words = overtakes(list(points.items()))
        line = f"{preset}, {length} tokens: AR {words} against {name}"
        if steps:
            line += f" at {steps} steps"
        lines.append(line)
    if any(row["steps"] and row["steps"] > row["length"] for row in rows):
        lines.append("more steps than tokens: a step that reveals nothing calls no network "
                     "(nfe), except in diffusion-naive")
    return lines
