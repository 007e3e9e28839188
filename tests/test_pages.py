"""Every figure that README.md, results/README.md and results/exact.md print is computed here from
the files under results/, so that no page says a number that its file does not hold.

A statement is a piece of a page: its words as they stand there, its figures from the rows. The
functions below yield them, a function for each part of a page, in the page's order. Who edits a
sentence of a page edits it here, too: the test prints the text that it wants, and what stands
there. A figure without a statement fails as well, unless it is one of NO_FIGURES: settings, sizes
and names.

No test here has a false alarm: the rows are saved, nothing random is looked at.
"""
import functools
import json
import math
import re
from pathlib import Path

import pytest

import distill
from data import measures
from data.stories import language
from model import PRESETS, ModelConfig, Transformer
from sample import EXACT, Sampling
from tools import bench_setup, crossover, envelope, figures, precision, race
from tools import weights as small_weights
from tools.exact import ALL
from train import TrainConfig

ROOT = Path(distill.__file__).resolve().parent
SEEDS = 0, 1                             # of training


# ---- rows: where a figure comes from

@functools.cache
def load(name):
    """What a file under results/ holds; of .jsonl a list with an object for each line."""
    text = (ROOT / "results" / name).read_text()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def rows_of(name, part="rows"):
    """The rows of a file. part: which of its tables."""
    content = load(name)
    if isinstance(content, dict):
        return content[part]
    return content


def row(name, part="rows", **fields):
    """THE row of a file that has these fields: where none has them, or several, the test fails."""
    found = []
    for one in rows_of(name, part):
        if all(one.get(key) == value for key, value in fields.items()):
            found.append(one)
    if len(found) != 1:
        pytest.fail(f"results/{name}: {len(found)} rows have {fields}, not one")
    return found[0]


def sampled(model, steps=None, seed=0, file="exact.json", **more):
    """A row of tools.exact: at temperature 1, not stopped, 8 tokens ahead, if `more` says nothing
    else."""
    fields = dict(model=model, steps=steps, trained_with_seed=seed, temperature=1, ahead=8,
                  max_calls=None)
    if model == "data":
        fields["temperature"] = None
    return row(file, **(fields | more))


def both_sampled(model, steps=None, **more):
    """The rows of both seeds."""
    return [sampled(model, steps, seed, **more) for seed in SEEDS]


def timed(file, **fields):
    """How many times as fast as AR a row of bench.py is."""
    return row(file, **fields)["vs_ar"]


# ---- figures as the pages print them

def seeds(rows, key, form):
    """A value of each seed's row, "1.54/1.55"; what is the very same for both seeds, once."""
    values = [one[key] for one in rows]
    if values[0] == values[1]:
        values = values[:1]
    return "/".join(format(value, form) for value in values)


def percent(share, form=".0f"):
    """A share as "59 %"."""
    return f"{100 * share:{form}} %"


def valid(rows):
    """The share of valid stories of each seed, "59/56 %"."""
    shares = [{"valid": 100 * one["valid"]} for one in rows]
    return seeds(shares, "valid", ".0f") + " %"


def calls(rows):
    """Calls of the network, "7.5/7.4"; a whole number that both seeds have, without ".0"."""
    text = seeds(rows, "calls", ".1f")
    if "/" in text:
        return text
    return text.removesuffix(".0")


def with_error(one, key, form):
    """A value and its standard error."""
    return f"{one[key]:{form}} ± {one[key + '_se']:{form}}"


def listed(values, form=""):
    """"1, 8 and 32"."""
    *first, last = [format(value, form) for value in values]
    return ", ".join(first) + " and " + last


def agreed(values, form):
    """Values that are one figure when printed."""
    texts = {format(value, form) for value in values}
    assert len(texts) == 1, texts
    return texts.pop()


def cells(*values):
    """A row of a Markdown table."""
    return "| " + " | ".join(str(value) for value in values) + " |"


def updates(objective):
    """Optimizer steps of train.py on stories, unless --steps says otherwise."""
    return f"{TrainConfig(objective=objective).steps:,}"


def weights(preset):
    """Millions of weights of a model of stories."""
    sizes = PRESETS[preset] | dict(vocab=len(language.VOCABULARY), context=50, positions="both")
    model = Transformer(ModelConfig(**sizes))
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"


# ---- README.md

NANO = distill.DistillConfig(preset="nano")
LEFT_OUT = "entropy", "contradictions", "copies", "choices", "calls", "reads a token"
BATCHES = 1, 8, 32                       # of latency.json


def top():
    """The table below the picture: results/exact.json, first seed, and speeds for one text."""
    one_text = functools.partial(timed, race.TIMES, batch=1)
    few = functools.partial(one_text, engine="diffusion-kv", steps=8)
    exact, cool = sampled("teacher", EXACT), sampled("teacher", EXACT, temperature=0.3, ahead=ALL)
    for title, one, speed in (
            ("data", sampled("data"), None), ("AR", sampled("ar"), one_text(engine="ar")),
            ("teacher, one token at a time", sampled("teacher", 1024),
             one_text(engine="diffusion-kv", model="teacher", steps=1024)),
            ("teacher, 8 steps", sampled("teacher", 8), few(model="teacher")),
            ("student of round 7, 8 steps", sampled("round 7", 8), few(model="round7")),
            ("teacher, exact", exact, one_text(engine="diffusion-exact", model="teacher")),
            ("teacher, exact, temperature 0.3", cool, None)):
        cost = "", ""
        if title != "data":
            cost = calls([one, one]), "-"
        if speed:
            cost = cost[0], f"{speed:.1f}"
        yield cells(title, *cost, f"{one['gen_ppl']:.2f}", f"{one['pooled_entropy']:.2f}",
                    percent(one["valid"]))
    one, few = sampled("teacher", 1024), sampled("teacher", 8)
    yield (f"{percent(one['valid'])} of the teacher's, one token at a time (the rest are its own "
           f"errors), {percent(few['valid'])} in 8 steps.")
    samples = {one["samples"] for one in rows_of("exact.json")}
    yield f"Quality and diversity are of {agreed(samples, 'd')} stories (`results/exact.json`"
    # (49 calls for 50 tokens: nearly each has one of its own)
    tokens = round(row("latency.json", engine="ar", batch=1)["nfe"])
    assert one["calls"] > 0.95 * tokens
    yield f"One token at a time means {one['steps']:,} steps for {tokens} tokens,"


def quick_start():
    """The size of the dataset."""
    length = row("latency.json", engine="ar", batch=1)["length"]
    yield f"a dataset of {length}-word stories"


def two_means():
    """How it works: the mean and the geometric mean of two kinds of targets."""
    sure, often = 0.99, 0.6
    mean = often * sure + (1 - often) * (1 - sure)
    tom = sure ** often * (1 - sure) ** (1 - often)
    sam = (1 - sure) ** often * sure ** (1 - often)
    yield (f"A simpler case: {percent(often)} of the draws reveal *tom*, with the target *tom* "
           f"{percent(sure)}, *sam* {percent(1 - sure)}, and {percent(1 - often)} reveal *sam*, with "
           "the reverse.")
    yield f"teaches the mean, *tom* {percent(mean)}:"
    yield f"teaches the normalised geometric mean, *tom* {percent(tom / (tom + sam))} ("


def table_of_rounds():
    """How it works: dt and steps of each round, by distill.schedule."""
    here = distill.schedule(NANO.teacher_steps, NANO.rounds)
    paper = distill.schedule(1024, NANO.rounds)
    yield cells("round", *range(1, NANO.rounds + 1))
    yield cells("dt of the teacher's step, here (preset nano)", *[f"1/{n:g}" for n in here[:-1]])
    yield cells("steps the student is made for", *[f"{n:g}" for n in here[1:]])
    yield cells("the paper: dt", *[f"1/{n:g}" for n in paper[:-1]])


def quick_table():
    """The table that distill.py prints, without the lines and columns that the page leaves out."""
    shown = []
    for one in rows_of("stories-nano.json"):
        if (one["model"] in ("teacher", "round 7")
                and one["steps"] in (None, 4, 8, 32, 1024)):
            shown.append(one)
    lines = measures.table(shown).splitlines()
    return "\n".join(line for line in lines if line[10:26].strip() not in LEFT_OUT)


def what_it_shows():
    """Of the models at the top: results/exact.json, first seed."""
    student, teacher = sampled("round 7", 8), sampled("teacher", 1024)
    yield (f"in 8 its perplexity is {student['gen_ppl']:.2f}, the teacher's, one token at a time, "
           f"{teacher['gen_ppl']:.2f}.")
    before, after = teacher["pooled_entropy"], student["pooled_entropy"]
    yield (f"the entropy of all texts falls from {before:.2f} to {after:.2f}, as if from "
           f"{math.exp(before):.0f} equally frequent words to {math.exp(after):.0f}.")
    many, data = sampled("round 7", 32), sampled("data")
    assert many["gen_ppl"] < data["gen_ppl"]
    yield (f"in 32 steps it is {many['gen_ppl']:.2f}, below the data's own {data['gen_ppl']:.2f}, a "
           "warning")
    rounds = [sampled(f"round {r}", 8)["valid"] for r in (5, 7)]
    assert rounds[0] < rounds[1]
    yield "The first table has round 7, as in 8 steps more of its stories are valid than of round 5's."


def what_the_quick_start_prints():
    """results/stories-nano.json."""
    yield quick_table()
    yield f"the AR judge has {updates('ar')} updates, there {updates('mdlm')}, as many"


def speed():
    """Speed, and the KV cache: results/latency.json."""
    full, cached = students_in_time()
    yield (f"a student with full attention is {listed(full, '.1f')} times as fast as AR at batch "
           f"{listed(BATCHES)} on two cores (`results/latency.json`;")
    yield f"and is {listed(cached, '.1f')} times as fast as AR at these batches"


def students_in_time():
    """How many times as fast as AR students are in 8 steps, for each batch: with full attention,
    and with the cache."""
    full, cached = [], []
    for batch in BATCHES:
        full.append(timed("latency.json", model="full-0/round7", steps=8, batch=batch))
        cached.append(timed("latency.json", model="reveal-0/round7", steps=8, batch=batch))
    return full, cached


def exact_samples():
    """Exact samples in a few calls: results/exact.json, first seed."""
    exact, cool = sampled("teacher", EXACT), sampled("teacher", EXACT, temperature=0.3, ahead=ALL)
    stopped = sampled("teacher", EXACT, ahead=ALL, max_calls=4)
    yield (f"In 4 calls the student wins: {percent(sampled('round 7', 4)['valid'])} of its stories "
           f"are valid, {percent(stopped['valid'])} of exact sampling's, stopped there.")
    yield "at temperature 0.3 its texts are both more diverse and more often valid"
    student = sampled("round 7", 8)
    assert cool["gen_ppl"] < student["gen_ppl"] and cool["valid"] > student["valid"]
    assert cool["pooled_entropy"] > student["pooled_entropy"]
    yield f"for each token it computes {exact['reads']:.1f} positions (AR: one)"


# ---- results/README.md

def torch_version(file):
    """"2.13" of a file that bench.py made."""
    content = load(file)
    # (older files have one machine, newer ones one for each dtype)
    machine = content.get("machine") or content["machines"]["float32"]
    return machine["torch"].rsplit(".", 1)[0]


def how_to_read():
    """The heading, and how to read the numbers honestly."""
    yield f"two cores, torch {torch_version('latency.json')}, float32:"
    length = row("latency.json", engine="ar", batch=1)["length"]
    yield f"Models are nano ({weights('nano')} million weights), texts have {length} words."

    law = row("precision.json", draw="the law")["rare"]
    usual = row("precision.json", draw="both at once in float32")["rare"]
    ours = row("precision.json", draw="which opens, then which token in float64")
    ours = {"rare": 100 * ours["rare"], "rare_se": 100 * ours["rare_se"]}
    tokens = precision.PrecisionConfig().tokens
    yield (f"Of a law of {tokens:,} tokens the field's usual draw brings rare tokens in "
           f"{percent(usual, '.1f')} of the cases, where the law has {100 * law:.1f} and the exact "
           f"draw {with_error(ours, 'rare', '.1f')} (`results/precision.json`)")
    either = [row(file, "samples", model="teacher", steps=1024)["gen_ppl"]
              for file in ("exact-1024.json", "joint-1024.json")]
    yield (f"With the stories' {len(language.VOCABULARY)} words it changes nothing: perplexity "
           f"{agreed(either, '.2f')} at 1,024 steps either way")
    yield f"is more than {figures.LOW} nats below the data's"


VARIANTS = functools.partial(dict, model="round 7", file="exact-variants.json")
DIVERGENCES = functools.partial(dict, model="round 7", file="exact-divergences.json")
FINDINGS = {                             # rows of the table: (fields of a row, its model in
                                         # likelihood-SEED.json, what tools.envelope calls it)
    "teacher": (dict(model="teacher"), "reveal-{}/teacher", "teacher"),
    "KLD, round 7": (dict(model="round 7"), "reveal-{}/round7", "kld"),
    "MSE, round 7": (DIVERGENCES(divergence="mse"), "reveal-{}-mse/round7", "mse"),
    "TVD, round 7": (DIVERGENCES(divergence="tvd"), "reveal-{}-tvd/round7", "tvd"),
    "Jensen-Shannon, round 7": (DIVERGENCES(divergence="jsd"), "reveal-{}-jsd/round7", "jsd"),
    "forward KL, round 7": (DIVERGENCES(divergence="fkl"), "reveal-{}-fkl/round7", "fkl"),
    "KLD, raw weights handed over": (VARIANTS(variant="handover raw"), None, "kld, handover raw"),
    "KLD, optimizer reset": (VARIANTS(variant="reset_optimizer True"), None,
                             "kld, reset_optimizer True"),
    "KLD, 38 updates a round": (VARIANTS(variant="steps_per_round 38"), None,
                                "kld, steps_per_round 38"),
    "KLD, k = 4, round 3": (VARIANTS(model="round 3", variant="k 4, steps_per_round 300"), None,
                            "kld, k 4, steps_per_round 300"),
    "KLD, k = 8, round 2": (VARIANTS(model="round 2", variant="k 8, steps_per_round 450"), None,
                            "kld, k 8, steps_per_round 450"),
    "full attention: teacher": (VARIANTS(model="teacher", variant="full attention"),
                                "full-{}/teacher", "teacher, full attention"),
    "full attention: KLD, round 7": (VARIANTS(variant="full attention"), "full-{}/round7",
                                     "kld, full attention")}
COMPARED_AT = 1, 3                       # which levels of diversity


def bounds(model):
    """The bound on -log p of both seeds' models, in nats a token."""
    rows = [row(f"likelihood-{seed}.json", "likelihood", model=model.format(seed))
            for seed in SEEDS]
    return seeds(rows, "any_order", ".2f")


def table_of_findings():
    """In 8 steps, and at equal diversity."""
    files = "exact-variants.json", "exact-divergences.json", "exact.json"
    samples = {one["samples"] for file in files for one in rows_of(file)}
    yield f"Two seeds, {agreed(samples, 'd')} stories a row"
    rounds = sorted({one["model"] for one in rows_of("exact-variants.json")
                     if one["variant"] == "full attention"} - {"teacher"})
    yield f"(full attention: {rounds[0][-1]} to {rounds[-1][-1]})"
    scored = {one["sequences"] for seed in SEEDS
              for one in rows_of(f"likelihood-{seed}.json", "likelihood")}
    yield f"nats a token of {agreed(scored, 'd')} validation stories"
    levels, found = at_equal_diversity("pooled_entropy")
    at = [levels[i] for i in COMPARED_AT]
    yield cells("stories, seed 0/1", "bound", "perplexity, 8 steps", "entropy of all", "valid",
                *[f"best at {agreed_or_both(pair)}" for pair in at])
    for title, (fields, likelihood, method) in FINDINGS.items():
        rows = both_sampled(steps=8, **fields)
        bound = bounds(likelihood) if likelihood else ""
        best = [best_of_both(found[method + ", 8 steps"][i]) for i in COMPARED_AT]
        yield cells(title, bound, seeds(rows, "gen_ppl", ".2f"),
                    seeds(rows, "pooled_entropy", ".2f"), valid(rows), *best)


def agreed_or_both(pair):
    """Two values as "3.78/3.79", or once if they are printed alike."""
    texts = [format(value, ".2f") for value in pair]
    return "/".join(dict.fromkeys(texts))


def quality(rows):
    """Perplexity at which entropy of all texts, of both seeds."""
    return f"{seeds(rows, 'gen_ppl', '.2f')} at {seeds(rows, 'pooled_entropy', '.2f')}"


def headline():
    """32 steps of the student against 1,024 of the teacher, and a smaller student against a larger
    teacher."""
    student, teacher = both_sampled("round 7", 32), both_sampled("teacher", 1024)
    cool = both_sampled("teacher", EXACT, temperature=0.3, ahead=ALL)
    for a, b, c in zip(student, teacher, cool):
        assert c["gen_ppl"] < a["gen_ppl"] < b["gen_ppl"]
        assert a["pooled_entropy"] < c["pooled_entropy"] < b["pooled_entropy"]
    yield f"**32 steps of the student beat {teacher[0]['steps']:,} of the teacher:"
    yield (f"Round 7 in 32 steps has {quality(student)} nats of all texts, the teacher, one token at "
           f"a time, {quality(teacher)}. Cooled to T = 0.3 that distribution has {quality(cool)}:")
    levels, found = at_equal_diversity("pooled_entropy")
    i = COMPARED_AT[1]
    errors = []
    for (a, a_se, _), (b, b_se, _) in zip(found["kld, 32 steps"][i], found["teacher, 32 steps"][i]):
        assert a < b < a + 2 * math.hypot(a_se, b_se)
        errors += [a_se, b_se]
    yield (f"In 32 steps KLD gains little at equal diversity: at {agreed_or_both(levels[i])} nats "
           f"its rounds have {best_of_both(found['kld, 32 steps'][i])}, the cooled teacher "
           f"{best_of_both(found['teacher, 32 steps'][i])} (± {max(errors):.2f}).")
    few, many = [both_sampled(name, steps, file="exact-pydoc.json")
                 for name, steps in (("round 7", 32), ("teacher", 1024))]
    for a, b in zip(few, many):
        assert a["gen_ppl"] > b["gen_ppl"] + 3 * math.hypot(a["gen_ppl_se"], b["gen_ppl_se"])
    yield (f"On docstrings refuted: {seeds(few, 'gen_ppl', '.0f')} against "
           f"{seeds(many, 'gen_ppl', '.0f')} (`results/exact-pydoc.json`).")

    mini = functools.partial(sampled, "teacher", file="exact-mini.json")
    one, cooled = mini(1024), mini(EXACT, ahead=ALL, temperature=0.3)
    assert student[0]["gen_ppl"] < one["gen_ppl"] and cooled["gen_ppl"] < student[0]["gen_ppl"]
    yield (f"the student of {weights('nano')} million weights in 32 steps "
           f"({student[0]['gen_ppl']:.2f} at {student[0]['pooled_entropy']:.2f}) against a teacher of "
           f"{weights('mini')} million, one token at a time ({one['gen_ppl']:.2f} at "
           f"{one['pooled_entropy']:.2f}), which cooled has {cooled['gen_ppl']:.2f} at "
           f"{cooled['pooled_entropy']:.2f}")


def at_level(method, i):
    """The best perplexities of a method in 8 steps, of both seeds, as numbers."""
    _, found = at_equal_diversity("pooled_entropy")
    return [value for value, _, _ in found[method + ", 8 steps"][i]]


def other_findings():
    """The rest of the list below the table: what is said in words is compared here."""
    mse, kld = both_sampled(steps=8, **DIVERGENCES(divergence="mse")), both_sampled("round 7", 8)
    for a, b in zip(mse, kld):
        assert a["pooled_entropy"] < b["pooled_entropy"]
    tvd = both_sampled(steps=8, **DIVERGENCES(divergence="tvd"))
    assert mse[0]["gen_ppl"] > kld[0]["gen_ppl"] and mse[1]["gen_ppl"] < kld[1]["gen_ppl"]
    yield (f"MSE has {quality(mse)} nats, KLD {quality(kld)}, TVD {seeds(tvd, 'gen_ppl', '.2f')}.")
    levels, _ = at_equal_diversity("pooled_entropy")     # see which_divergence: from the third
    yield f"but at equal diversity only from {agreed_or_both(levels[2])} nats down;"
    worse = []                           # in percent, by level and seed
    for i in COMPARED_AT:
        pairs = zip(at_level("kld", i), at_level("kld, full attention", i))
        worse.append([100 * (a / b - 1) for a, b in pairs])
    assert all(abs(one) < 2 for one, _ in worse)
    other = sorted(two for _, two in worse)
    yield (f"as good with one seed, {other[0]:.0f} to {other[1]:.0f} % worse with the other.")
    first = COMPARED_AT[0]
    for name in ("tvd", "jsd"):
        for a, b in zip(at_level(name, first), at_level("mse", first)):
            assert a < b

    taken = []                           # updates of k = 4 and 8
    step = distill.DistillConfig().steps_per_round
    for k, r in ((4, 3), (8, 2)):
        title = f"KLD, k = {k}, round {r}"
        fields, _, _ = FINDINGS[title]
        assert fields["model"] == f"round {r}"
        taken.append(r * int(fields["variant"].split()[-1]))
        last = distill.schedule(NANO.teacher_steps, r, k)[-1]
        assert last == distill.schedule(NANO.teacher_steps, 6)[-1] == 4
    assert taken == [6 * step] * 2
    yield "**k = 2 is better than 4 and 8: only than 8, at low diversity.**"
    yield f"students for 4 steps after {taken[0]} updates"
    yield "At equal diversity k = 4 is as good as k = 2, k = 8 only where diversity is high."
    yield f"(k = 2: {quality(both_sampled('round 6', 8))} nats in round 6)"
    short = int(FINDINGS["KLD, 38 updates a round"][0]["variant"].split()[-1])
    yield f"With {short} updates a round instead of {step}"
    # no variant is better or worse than KLD by more than KLD's seeds differ
    apart = []
    for i in COMPARED_AT:
        a, b = at_level("kld", i)
        apart.append(abs(math.log(a / b)))
        for variant in ("handover raw", "reset_optimizer True", "steps_per_round 38"):
            mean = math.log(math.prod(at_level(f"kld, {variant}", i)) / (a * b)) / 2
            assert abs(mean) < apart[-1], variant
    # k = 4 and 8, at less diversity: as good, and worse
    second = COMPARED_AT[1]
    (two, other), four, eight = [at_level(name, second) for name in (
        "kld", "kld, k 4, steps_per_round 300", "kld, k 8, steps_per_round 450")]
    assert abs(math.log(math.prod(four) / (two * other))) / 2 < apart[-1]
    assert eight[0] > two and eight[1] > other

    bound = {name: bounds(model) for name, (_, model, _) in FINDINGS.items() if model}
    yield (f"from {bound['teacher']} to {bound['KLD, round 7']} and {bound['MSE, round 7']} nats a "
           f"token; TVD, Jensen-Shannon and forward KL keep it "
           f"({bound['TVD, round 7']} to {bound['Jensen-Shannon, round 7']})")


def other_orders():
    """The surest tokens first: results/orders.json. In the order confidence 50 and 1,024 steps are
    the same, and in random order 50 are left out, too."""
    rows = {(one["order"], one["steps"]): one for one in rows_of("orders.json", "samples")}
    columns = [column for column in figures.SAMPLES if column[1] in (
        "model", "steps", "order", "gen_ppl", "entropy", "pooled_entropy", "choices", "valid")]
    left_out = ("random", 50), ("confidence", 1024)
    shown = [one for key, one in rows.items() if key not in left_out]
    yield figures.rows_as_text(shown, columns)
    yield f"under an AR judge of {updates('mdlm')} updates as well"
    yield "for which 50 steps are enough."
    sure, data = rows["confidence", 50], rows[None, None]
    cool = both_sampled("teacher", EXACT, temperature=0.3, ahead=ALL)
    assert all(one["choices"] > sure["choices"] + 5 for one in cool)
    yield (f"{percent(sure['valid'])} at 50 steps, with {sure['choices']:.1f} nats of choices "
           f"([exact.md](exact.md), T = 0.3: {valid(cool)} with {seeds(cool, 'choices', '.1f')}), "
           f"where the data have {data['choices']:.1f}.")


def table_of_speed():
    """Against AR, at nano size: results/latency.json."""
    spreads = [one["seconds_max"] / one["seconds_min"] for one in rows_of("latency.json")
               if one["engine"] == "ar" or one["steps"] == 8 and one["model"].endswith("round7")]
    assert 1.9 < max(spreads) < 2.1
    full, cached = students_in_time()
    yield cells("student, 8 steps", f"batch {BATCHES[0]}", *BATCHES[1:])
    yield cells("full attention", *[f"{x:.1f}" for x in full])
    yield cells("order of reveal, KV cache", *[f"{x:.1f}" for x in cached])


def speed_of_gpt2():
    """At GPT-2's size, and in training."""
    small, steps, kv = "bench-small.json", "bench-small-steps.json", "bench-kv.json"

    def seconds(file, engine, **more):
        return row(file, engine=engine, **more)["seconds"]

    def line(title, time, file):
        return cells(title, f"{time:.1f}", f"`results/{file}`")
    length = row(small, engine="ar")["length"]
    yield f"(preset small, V = {bench_setup.VOCAB:,}), random weights, {length:,} tokens, float32:"
    yield line("AR, one text", seconds(small, "ar", batch=1), small)
    yield line("diffusion, 32 steps", seconds(small, "diffusion", steps=32, batch=1), small)
    times = [seconds(steps, "diffusion", steps=n) for n in (16, 8)]
    yield cells(f"diffusion, 16 and 8 steps (AR {seconds(steps, 'ar'):.1f})", listed(times, ".1f"),
                f"`results/{steps}`")
    yield line("diffusion-naive, 32 steps", seconds(small, "diffusion-naive", steps=32, batch=1),
               small)
    yield line("AR, eight texts", seconds(kv, "ar", batch=8), kv)
    cached = {n: seconds(kv, "diffusion-kv", steps=n, batch=8) for n in (16, 32)}
    for n, time in cached.items():
        yield line(f"with the KV cache, eight texts, {n} steps", time, kv)
    less = {n: seconds(kv, "diffusion", steps=n, batch=8) / cached[n] for n in (16, 32)}
    yield (f"With the cache eight texts are written {less[16]:.1f} times as fast as with full "
           f"attention in 16 steps, and {less[32]:.1f} times in 32.")

    def faster(engine, dtype):
        """How many times as fast as another package's our AR is."""
        found = [row("others.json", engine=engine, dtype=dtype, batch=batch) for batch in (1, 8)]
        return listed([1 / one["vs ours"] for one in found], ".1f")
    tokens = agreed({one["length"] for one in rows_of("others.json")}, "d")
    bandwidth = row("others.json", engine="ours", batch=1)["roofline"]
    yield (f"For {tokens} tokens at batch {listed((1, 8))} our AR is "
           f"{faster('transformers', 'float32')} times as fast as the `transformers` package's GPT-2, "
           f"{faster('ctranslate2', 'float32')} times as CTranslate2, and "
           f"{faster('ctranslate2', 'int8')} times as its int8 (`results/others.json`, an AMD "
           f"CPU); one text takes {percent(bandwidth)} of the bandwidth.")

    def share(form, key):
        """Of what the papers' pseudo-code needs."""
        mine, plain = [row("bench-train.json", objective="sdtt", form=one)[key]
                       for one in (form, "plain")]
        return f"{mine / plain:.2f}"
    yield (f"an SDTT step takes {share('chunked', 'seconds')} of the time and "
           f"{share('chunked', 'peak_bytes')} of the memory of the papers' pseudo-code, "
           f"{share('recompute', 'seconds')} and {share('recompute', 'peak_bytes')} with "
           "`--recompute`")


def muon():
    """The last line of each log of training."""
    steps = TrainConfig(objective="mdlm").steps
    losses = {}
    for name in ("muon-4e-3", "adamw-5e-4", "adamw-1e-3", "adamw-2e-3", "adamw-4e-3"):
        losses[name] = row(f"{name}.jsonl", step=steps)["val_loss"]
    muon = losses.pop("muon-4e-3")
    best = min(losses, key=losses.get)
    yield (f"validation loss {muon:.3f} after {steps:,} steps, AdamW {losses[best]:.3f} at the "
           f"best of four rates (`results/muon-4e-3.jsonl`, `results/{best}.jsonl`)")


# ---- results/exact.md

def stories():
    """Stories: results/exact.json, both seeds."""
    yield f"torch {torch_version('bench-exact.json')}, float32, but for time and likelihood"
    samples = {one["samples"] for one in rows_of("exact.json")}
    yield f"`results/exact.json` has {agreed(samples, 'd')} stories a row, two seeds"
    yield f"Here that model has as many updates as the teacher, {updates('mdlm')}."
    yield f"the default for {Sampling().ahead} tokens"
    yield f"({len(language.BEATS)} sentences, {len(language.WORDS)} words)"
    yield f"which moves no logit by {small_weights.LIMIT:.2f}."

    whole = dict(steps=EXACT, ahead=ALL)
    for title, fields in (
            ("data", dict(model="data")),
            ("teacher, one token at a time", dict(model="teacher", steps=1024)),
            ("teacher, exact", dict(model="teacher", steps=EXACT)),
            ("teacher, exact, all ahead", dict(model="teacher", **whole)),
            ("the same at T = 0.5", dict(model="teacher", temperature=0.5, **whole)),
            ("the same at T = 0.3", dict(model="teacher", temperature=0.3, **whole)),
            ("stopped after 4 calls, T = 1", dict(model="teacher", max_calls=4, **whole)),
            ("teacher, 8 steps", dict(model="teacher", steps=8)),
            ("round 5, 8 steps", dict(model="round 5", steps=8)),
            ("round 6, 8 steps", dict(model="round 6", steps=8)),
            ("round 7, 8 steps", dict(model="round 7", steps=8)),
            ("round 7, 4 steps", dict(model="round 7", steps=4)),
            ("round 7, 32 steps", dict(model="round 7", steps=32)),
            ("round 7, exact, all ahead", dict(model="round 7", **whole)),
            ("AR", dict(model="ar")),
            ("AR, exact, all ahead", dict(model="ar", **whole)),
            ("AR, T = 0.5", dict(model="ar", temperature=0.5))):
        rows = both_sampled(**fields)
        cost = "", ""                    # of the data none
        if title != "data":
            cost = calls(rows), seeds(rows, "reads", ".1f")
        yield cells(title, *cost, seeds(rows, "gen_ppl", ".2f"),
                    seeds(rows, "pooled_entropy", ".2f"), valid(rows),
                    seeds(rows, "choices", ".1f"))


SHOWN = 5                                # levels of diversity
# files of one set of teachers and judges
SAME_TEACHERS = ("exact.json", "exact-divergences.json", "exact-variants.json",
                 "exact-heat32.json")


METHODS = {                              # of the table: how tools.envelope calls them
    "teacher, 8 steps": "teacher, 8 steps", "KLD, 8 steps": "kld, 8 steps",
    "TVD, 8 steps": "tvd, 8 steps", "MSE, 8 steps": "mse, 8 steps",
    "Jensen-Shannon, 8 steps": "jsd, 8 steps", "forward KL, 8 steps": "fkl, 8 steps",
    "teacher, exact, all ahead": "teacher, exact", "AR": "AR"}


@functools.cache
def at_equal_diversity(key):
    """(levels, {method, as tools.envelope calls it: [(perplexity, SE, model) of both seeds at each
    level]}), of all rows of stories; the levels are those of exact.json alone."""
    everything = {one["key"]: one for file in SAME_TEACHERS for one in rows_of(file)}
    alone = envelope.groups_of(rows_of("exact.json"))
    groups = envelope.groups_of(list(everything.values()))
    levels = list(zip(*[envelope.levels(alone["stories", seed], key, envelope.LEVELS)
                        for seed in SEEDS]))
    curves = [envelope.curves_of(groups["stories", seed]) for seed in SEEDS]
    found = {}
    for method in curves[0]:
        found[method] = [[envelope.best_at(of[method], key, level) for of, level in zip(curves, at)]
                         for at in levels]
    return levels, found


def equal_diversity():
    """At equal diversity: the table of tools.envelope, without its last level."""
    levels, found = at_equal_diversity("pooled_entropy")
    yield cells("seed 0/1, entropy of all texts", *[f"{a:.2f}/{b:.2f}" for a, b in levels[:SHOWN]])
    for title, method in METHODS.items():
        yield cells(title, *[best_of_both(best) for best in found[method][:SHOWN]])


def which_divergence():
    """What the tables say of the divergences: in words, so the comparisons are made here."""
    def pairs(mine, other, levels):
        """(value, SE) of two methods at some levels, for both seeds, where both have one."""
        for a_both, b_both in zip(found[METHODS[mine]][levels], found[METHODS[other]][levels]):
            for (a, a_se, _), (b, b_se, _) in zip(a_both, b_both):
                if a is not None and b is not None:
                    yield a, a_se, b, b_se
    for key in ("pooled_entropy", "choices"):
        _, found = at_equal_diversity(key)
        for name in ("TVD", "MSE", "Jensen-Shannon", "forward KL"):
            for kld, _, other, _ in pairs("KLD, 8 steps", f"{name}, 8 steps", slice(2, None)):
                assert kld < other, name
            for kld, se, other, other_se in pairs("KLD, 8 steps", f"{name}, 8 steps", slice(2)):
                assert kld - other < 2 * math.hypot(se, other_se), name
        for name in ("TVD", "Jensen-Shannon"):
            for other, _, teacher, _ in pairs(f"{name}, 8 steps", "teacher, 8 steps", slice(None)):
                assert other < teacher, name
        for a, a_se, b, b_se in pairs("forward KL, 8 steps", "teacher, 8 steps", slice(None)):
            assert abs(a - b) < 2 * math.hypot(a_se, b_se)
        for a, a_se, b, b_se in pairs("MSE, 8 steps", "teacher, 8 steps", slice(0, 2)):
            assert abs(a - b) < 2 * math.hypot(a_se, b_se)
    yield ("From the third level down it is the best of the five divergences, by both measures, and "
           "above none is better by two standard errors; next come Jensen-Shannon and TVD. Forward "
           "KL, and MSE where diversity is high, are within two standard errors of the cooled "
           "teacher.")


def best_of_both(best):
    """A cell of that table, from (perplexity, SE, model) of both seeds."""
    (a, _, model), (b, _, other) = best
    if a is None and b is None:
        return "-"
    if a is None or b is None:
        return "/".join("-" if value is None else f"{value:.2f}" for value in (a, b))
    text = f"{a:.2f}/{b:.2f}"
    if model.startswith("round"):
        text += f" ({model.removeprefix('round ')}/{other.removeprefix('round ')})"
    return text


def share(row, choice, value):
    """How many of the stories that make a choice choose a value, in percent."""
    counts = row["counts"][choice]
    return percent(counts[value] / sum(counts.values()))


def given_up():
    """What the student has given up: results/choices.json."""
    chosen = functools.partial(row, "choices.json")
    data, teacher = chosen(model="data"), chosen(model="teacher, 8 steps")
    student, exact = chosen(model="round7, 8 steps"), chosen(model="round7, exact")
    samples = {one["samples"] for one in rows_of("choices.json")}
    yield f"(`results/choices.json`, {agreed(samples, ',')} stories each, first seed)"

    def nats(choice):
        return [f"{one['entropies'][choice]:.2f}" for one in (student, data)]
    yield "of the opening {} of the data's {} nats,".format(*nats("opening"))
    yield "of the help {} of {},".format(*nats("help"))
    yield "of the feeling most, {} of {}.".format(*nats("feeling"))
    most = max(language.BEATS, key=lambda beat: student["entropies"][beat])
    assert most == "feeling"
    yield (f"The hero is lily in {share(student, 'NAME', 'lily')} of the stories instead of "
           f"{share(data, 'NAME', 'lily')}, the thing a ball in {share(student, 'THING', 'ball')} "
           f"instead of {share(data, 'THING', 'ball')}.")
    yield "colour {} of {} nats,".format(*nats("COLOUR"))
    yield "place {} of {},".format(*nats("PLACE"))
    yield "weather {} of {}.".format(*nats("WEATHER"))
    # those that the story of the likeliest patterns names once
    story = " ".join(max(student["counts"][beat], key=student["counts"][beat].get)
                     for beat in language.BEATS).split()
    once = {slot for slot in language.WORDS if story.count(slot) == 1}
    assert once == {"COLOUR", "PLACE", "WEATHER"}
    yield (f"(opening {exact['entropies']['opening']:.2f}, lily {share(exact, 'NAME', 'lily')}): "
           "it is its distribution, not the steps.")
    yield f"(choices {teacher['choices']:.1f} nats, the data {data['choices']:.1f})"


def law_is_kept():
    """How far exact samples are from samples of one token at a time: both seeds, 8 ahead and all
    ahead, each measure, in standard errors of the difference."""
    apart = []
    for seed in SEEDS:
        one = sampled("teacher", 1024, seed)
        for ahead in (8, ALL):
            exact = sampled("teacher", EXACT, seed, ahead=ahead)
            for key in ("gen_ppl", "entropy", "pooled_entropy", "valid", "choices"):
                error = math.hypot(one[key + "_se"], exact[key + "_se"])
                apart.append(abs(one[key] - exact[key]) / error)
    yield (f"all {len(apart)} comparisons of exact sampling with one token at a time (perplexity, "
           "both entropies, valid, choices) are within "
           f"{math.ceil(10 * max(apart)) / 10} standard errors.")


IN_WORDS = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}


def what_follows():
    """What follows for stories: results/exact.json."""
    whole = dict(steps=EXACT, ahead=ALL)
    cool, student = sampled("teacher", temperature=0.3, **whole), sampled("round 7", 32)
    yield (f"In about {cool['calls']:.0f} calls the exact teacher at T = 0.3 has "
           f"{cool['gen_ppl']:.2f} at {cool['pooled_entropy']:.2f} nats and "
           f"{percent(cool['valid'])} valid; the headline's student, 32 steps of round 7, "
           f"{student['gen_ppl']:.2f} at {student['pooled_entropy']:.2f} and "
           f"{percent(student['valid'])}.")
    yield f"Exact sampling reads {IN_WORDS[round(cool['reads'] / student['reads'])]} as much:"

    # with as many calls the student can be drawn exactly
    fewest = sampled("round 7", **whole)["calls"]
    yield f"**What SDTT is for**: fewer than {fewest:.0f} calls."
    in_four = both_sampled("round 7", 4)
    stopped = both_sampled("teacher", max_calls=4, **whole)
    yield (f"In 4, round 7 has {seeds(in_four, 'gen_ppl', '.2f')} where the exact teacher, stopped "
           f"there, has {seeds(stopped, 'gen_ppl', '.2f')},")

    ar, teacher = both_sampled("ar"), both_sampled("teacher", 1024)
    good = [100 * one["valid"] for one in ar]
    less = [100 * one["valid"] for one in teacher]
    yield f"{listed(good, '.0f')} % valid where the teacher has {listed(less, '.0f')} %,"
    fewer = both_sampled("ar", **whole)
    mean = sum(one["calls"] for one in fewer) / len(fewer)
    yield f"takes it from {calls(ar)} to {mean:.0f} calls."


def exact_in_time():
    """What follows for time: results/bench-exact.json."""
    batches = 1, 2, 4, 8, 32
    times, against_one, ar = [], [], []
    for batch in batches:
        exact = row("bench-exact.json", engine="diffusion-exact", model="teacher", batch=batch)
        one = row("bench-exact.json", engine="diffusion-kv", model="teacher", batch=batch)
        times.append(exact["vs_ar"])
        against_one.append(one["seconds"] / exact["seconds"])
        ar.append(timed("bench-exact.json", engine="ar-exact", batch=batch))
    level = crossover.overtakes(list(zip(batches, times))).split()[-1]
    yield (f"(`results/bench-exact.json`, two cores, {Sampling().ahead} slots ahead): at batch "
           f"{listed(batches)} the exact teacher is {listed(times, '.1f')} times as fast as AR "
           f"(level at {float(level):.0f} texts), and {listed(against_one, '.1f')} times as fast "
           f"as one token at a time; exact AR is {max(ar):.1f} to {min(ar):.1f} times as fast as "
           "AR.")


def exact_in_time_today():
    """The same with today's sampler: results/bench-exact-avx2.json."""
    batches = 1, 8, 32

    def of(engine, model, steps):
        return [timed("bench-exact-avx2.json", engine=engine, model=model, steps=steps, batch=B)
                for B in batches]
    exact, one = of("diffusion-exact", "teacher", None), of("diffusion-kv", "teacher", 1024)
    ratios = [a / b for a, b in zip(exact, one)]
    yield (f"it is {listed(exact, '.1f')} times as fast as AR at batch {listed(batches)}, and "
           f"{listed(ratios, '.1f')} times as one token at a time;")
    yield f"round 7 in 8 steps {listed(of('diffusion-kv', 'round7', 8), '.1f')} times as fast as AR."
    compiled = [row("bench-exact-avx2.json", engine="diffusion-kv", model="round7", steps=8, batch=B)
                for B in batches]
    assert [one["reads"] > 2 for one in compiled] == [True, True, False]     # with gaps
    yield "at batch 1 and 8, are now compiled whole,"
    spread = max(one["seconds_max"] / one["seconds_min"] for one in rows_of("bench-exact-avx2.json"))
    yield f"the slowest run of a row took up to {spread:.1f} times as long as the fastest."


def likelihood():
    """What follows for the likelihood: results/likelihood-reveal.json."""
    teacher, student = [row("likelihood-reveal.json", "likelihood", model=name)
                        for name in ("teacher", "round7")]
    yield (f"The likelihood** of {teacher['sequences']} stories, read exactly in 8 orders "
           f"(`results/likelihood-reveal.json`): {with_error(teacher, 'any_order', '.4f')} nats a "
           f"token, {teacher['mixture']:.4f} as a mixture of the orders; round 7 "
           f"{with_error(student, 'any_order', '.4f')} and {student['mixture']:.4f}.")


def docstrings():
    """What follows for docstrings: results/exact-pydoc.json."""
    pydoc = functools.partial(both_sampled, file="exact-pydoc.json")
    whole = dict(ahead=ALL)
    one, exact, ahead = pydoc("teacher", 1024), pydoc("teacher", EXACT), pydoc("teacher", EXACT, **whole)

    def errors(rows):
        """Perplexity of each seed, with its error."""
        return " and ".join(with_error(row, "gen_ppl", ".0f") for row in rows)
    samples = {row["samples"] for row in rows_of("exact-pydoc.json")}
    yield f"(`results/exact-pydoc.json`, {agreed(samples, 'd')} texts, two seeds;"
    yield (f"one token at a time {errors(one)} in {seeds(one, 'calls', '.1f')} calls; exact "
           f"{errors(exact)} in {seeds(exact, 'calls', '.1f')} ({seeds(exact, 'reads', '.1f')} reads), "
           f"all ahead {errors(ahead)} in {seeds(ahead, 'calls', '.1f')}.")
    largest = 0.0
    for key in ("gen_ppl", "entropy", "pooled_entropy"):
        for other in (exact, ahead):
            for a, b in zip(one, other):
                error = math.hypot(a[key + "_se"], b[key + "_se"])
                largest = max(largest, abs(a[key] - b[key]) / error)
    yield f"are within {math.ceil(10 * largest) / 10:.1f} standard errors."
    yield (f"(data {pydoc('data')[0]['gen_ppl']:.0f}, AR {seeds(pydoc('ar'), 'gen_ppl', '.0f')}), and "
           f"SDTT does harm here: in 8 steps they have {errors(pydoc('teacher', 8))}, round 7 "
           f"{errors(pydoc('round 7', 8))}.")
    cool = pydoc("teacher", EXACT, temperature=0.8, **whole)
    yield (f"Cooled to T = 0.8 the exact teachers have {seeds(cool, 'gen_ppl', '.0f')} at "
           f"{seeds(cool, 'pooled_entropy', '.2f')} nats of all texts.")
    yield (f"AR, left to right, gains little: {seeds(pydoc('ar', EXACT, **whole), 'calls', '.0f')} calls "
           f"instead of {seeds(pydoc('ar'), 'calls', '.0f')}.")

    key, best, at = "pooled_entropy", {}, set()
    for (_, _), rows in envelope.groups_of(rows_of("exact-pydoc.json")).items():
        level = envelope.levels(rows, key, envelope.LEVELS)[0]
        at.add(f"{level:.2f}")
        curves = envelope.curves_of(rows)
        for method in ("teacher, 8 steps", "kld, 8 steps"):
            value, _, _ = envelope.best_at(curves[method], key, level)
            best.setdefault(method, []).append(f"{value:.0f}")
    teacher, student = (" and ".join(values) for values in best.values())
    yield (f"At equal diversity ({' or '.join(at)} nats of all texts) the cooled teachers have {teacher} "
           f"in 8 steps, KLD's best rounds {student}: here it gains nothing.")


def growth():
    """What follows for longer texts: results/exact-growth.json."""
    lengths = 8, 16, 32, 64
    needed = {}
    for name in ("teacher", "ar"):
        needed[name] = [sampled(name, EXACT, file="exact-growth.json", ahead=ALL, length=n)["calls"]
                        for n in lengths]
    first, *_, last = needed["teacher"]
    doublings = len(lengths) - 1
    yield (f"{listed(needed['teacher'], '.1f')} calls for {listed(lengths)} tokens, all ahead: "
           f"{(last - first) / doublings:.1f} more for each doubling; AR "
           f"{listed(needed['ar'], '.1f')}: it doubles.")
    better = last

    lengths = 32, 64, 128, 256, 512
    of = functools.partial(sampled, steps=EXACT, file="exact-growth-512.json")
    whole = [of("teacher", ahead=ALL, length=n) for n in lengths]
    needed = [one["calls"] for one in whole]
    yield (f"needs {listed(needed, '.1f')} calls for {listed(lengths)} tokens, "
           f"{(needed[-1] - needed[0]) / 4:.1f} more for each doubling, and reads "
           f"{whole[0]['reads']:.1f} to {whole[-1]['reads']:.1f} positions a token;")
    one = of("teacher", length=512)
    yield f"8 ahead {one['calls']:.1f} calls for 512 tokens, and {one['reads']:.1f}."
    ar = [of("ar", length=n)["calls"] for n in lengths]
    yield f"AR needs {listed(ar, '.1f')} calls: it doubles, too."
    yield f"({better:.1f} against {needed[1]:.1f} for 64)"
    yield "context of 512 tokens"


def larger_model():
    """And the first seed's nano teacher: results/exact-mini.json, results/exact.json."""
    mini = functools.partial(sampled, "teacher", file="exact-mini.json")
    exact, whole, one = mini(EXACT), mini(EXACT, ahead=ALL), mini(1024)
    nano = sampled("teacher", EXACT, ahead=ALL)
    yield (f"**A larger model** (preset mini, {weights('mini')} million weights, as many updates; "
           f"`results/exact-mini.json`) has {percent(one['valid'])} valid one token at a time and "
           f"{percent(whole['valid'])} exact, all ahead, in {whole['calls']:.1f} calls, where nano "
           f"needs {nano['calls']:.1f}; 8 ahead in {exact['calls']:.1f}, reading "
           f"{exact['reads']:.1f} positions a token.")


# ---- the pages, and what they say

PAGES = {
    "README.md": [top, quick_start, two_means, table_of_rounds, what_it_shows, speed, exact_samples],
    "results/README.md": [how_to_read, what_the_quick_start_prints, table_of_findings, headline, other_findings,
                          other_orders, table_of_speed, speed_of_gpt2, muon],
    "results/exact.md": [stories, equal_diversity, which_divergence, given_up, law_is_kept, what_follows,
                         exact_in_time, exact_in_time_today, likelihood, docstrings, growth,
                         larger_model]}

NO_FIGURES = [                           # (what stands on a page, why it is no figure)
    (r"`[^`]*`", "names of files, flags and commands"),
    (r"\]\([^)]*\)", "the address of a link"),
    (r"\b\d{4}\.\d{5}\b", "a paper's number on arXiv"),
    (r"GPT-2|[Ff]loat(32|64)|AVX-512|AVX2|UTF-8|Python 3\.11|Jordan et al\., 2024", "names"),
    (r"\b1/t\b|\bt = [01]\b|\bto 0 in steps\b|min\(1, new/old\)", "formulas"),
    (r"(as|\|) 0/1\b", "how both seeds are given"),
    (r"above 1:", "where both are as fast"),
    (r"\b([Rr]ound|[Tt]emperature) \d\b", "a setting: which round, which temperature"),
    (r"\b(in|at) \d steps\b", "a setting: sampling steps"),
    (r"3,000 updates, the AR models 1,000", "settings: --steps, above"),
    (r"position 30, where .*? he 6%", "an example: tools.lesson prints it, no file has it"),
    (r"6 to 20 minutes|5 to 8 minutes", "how long it takes on the reader's own machine")]


def plain(text):
    """A text without line breaks, and one space between words."""
    return " ".join(text.split())


@functools.cache
def read(page):
    """A page as plain text, without its blocks of commands and the fences of others."""
    text = (ROOT / page).read_text()
    text = re.sub(r"```sh\n.*?```", "", text, flags=re.S)
    return plain(re.sub(r"```\w*\n", "", text))


def places(text, page):
    """Where a text stands on a page, as the set of its positions. Part of a figure is not the
    figure: 1.3 stands neither in 11.3 nor in 1.35."""
    positions = set()
    for found in re.finditer(r"(?<!\d)(?<!\d[.,])" + re.escape(text) + r"(?![.,]?\d)", page):
        positions.update(range(*found.span()))
    return positions


@functools.cache
def said(page):
    """The positions of all statements of a page."""
    positions = set()
    for part in PAGES[page]:
        for text in part():
            positions |= places(plain(text), read(page))
    return positions


def unsaid(page, pattern=r"\d[\d.,]*"):
    """What matches a pattern on a page and has a digit that no statement has: the positions of each
    such digit, in a list of sets."""
    text = read(page)
    open_ones = {i for i, letter in enumerate(text) if letter.isdigit()} - said(page)
    found = []
    for match in re.finditer(pattern, text):
        digits = open_ones.intersection(range(*match.span()))
        if digits:
            found.append(digits)
    return found


def instead(text, page):
    """What stands on a page with the words of a text and other figures."""
    figure = r"\d[\d.,]*(?<=\d)"
    words = [re.escape(part) for part in re.split(figure, text)]
    found = re.search(figure.join(words), page)
    if found is None:
        return "(other words)"
    return found[0]


# ---- the properties

PARTS = []
for page, parts in PAGES.items():
    PARTS += [(page, part) for part in parts]
NAMES = [f"{page}: {part.__name__}" for page, part in PARTS]


@pytest.mark.parametrize("page, part", PARTS, ids=NAMES)
def test_statements_stand_on_their_page(page, part):
    """With every figure as its file has it."""
    missing = ""
    for text in map(plain, part()):
        if not places(text, read(page)):
            missing += f"\n\nwanted: {text}\nis:     {instead(text, read(page))}"
    assert not missing, f"{page} does not say what the files under results/ hold{missing}"


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_has_a_statement(page):
    """Or is one of NO_FIGURES."""
    allowed = set()
    for pattern, _ in NO_FIGURES:
        for found in re.finditer(pattern, read(page)):
            allowed.update(range(*found.span()))
    around = ""
    for digits in unsaid(page):
        if digits - allowed:
            around += "\n" + read(page)[max(0, min(digits) - 40):max(digits) + 40]
    assert not around, f"no statement has these figures of {page}:{around}"


def test_table_is_what_distill_prints_of_the_saved_results():
    """Line by line, space by space."""
    assert f"```text\n{quick_table()}\n```" in (ROOT / "results/README.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda path: path.name)
def test_results_name_no_folder_of_one_machine(path):
    """Neither as the command's flags nor elsewhere."""
    assert not re.search(r'"(/|~|[A-Za-z]:\\\\)', path.read_text())


def test_table_in_bench_is_of_the_saved_rows():
    """That of its docstring: results/latency.json, one text."""
    shown = (ROOT / "bench.py").read_text()
    for engine, model, steps in (("ar", "reveal-0/ar", None), ("diffusion", "full-0/round7", 8),
                                 ("diffusion-kv", "reveal-0/round7", 8)):
        one = row("latency.json", engine=engine, model=model, steps=steps, batch=1)
        assert (f"    {engine:13} {model.split('/')[1]:9}{steps or '':>6}{1:6}{one['length']:7}"
                f"{one['seconds']:8.3f}{one['vs_ar']:6.2f}{one['roofline']:9.0%}{one['nfe']:4}"
                f"{one['reads']:6.1f}\n") in shown


def test_all_that_is_no_figure_is_needed():
    """Each of NO_FIGURES stands on some page, with a digit that no statement has."""
    for pattern, why in NO_FIGURES:
        found = [unsaid(page, pattern) for page in PAGES]
        assert any(found), f"{pattern} ({why}) is not needed any more"


def test_part_of_a_figure_is_not_the_figure():
    """Nor is a figure that a page rounds otherwise."""
    for page in ("it is 11.3", "it is 1.35", "it is 2,1.3", "it is 1.3,5", "it is 1.30"):
        assert not places("1.3", page)
    for page in ("it is 1.3.", "1.3, 5", "(1.3)", "1.3/1.4", "±1.3"):
        assert places("1.3", page)
    assert instead("has 1.35 in 8 steps", "it has 1.4 in 16 steps.") == "has 1.4 in 16 steps"
