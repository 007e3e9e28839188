"""The paper's experiments on two cores: divergences, rounds, sizes; and attention. (The
fourth, latency against AR, is bench.py's, with the checkpoints that these leave.)

    python -m tools.experiments divergences        # -> results/divergences.json

trains what is missing under out/experiments, several processes with a thread each, and
measures the students of all rounds. Interrupt it at any time: the same command goes on
where it was. Rows of other datasets and seeds stay in the file. Experiments share teachers,
judges and the plain path, "kld".
"""
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import torch

import distill
from common import ROOT, Processes
from data.checkpoints import fingerprint, load_model
from data.dataset import load_data
from data.files import UserError, to_json, write, write_json
from data.measures import VERSION, make_judge
from data.script import GOES_ON, command, flag, parse_flags
from diffusion import states_at, unmask_step
from model import PRESETS
from sample import Sampling
from tools import evaluate, figures, likelihood
from train import TrainConfig, train

# beside nano's width of 128: blocks as 1 : 2.6 : 5.3, as the paper's sizes
WIDTHS = {"w80": 80, "w184": 184}
for name, width in WIDTHS.items():
    PRESETS[name] = PRESETS["nano"] | {"width": width}
STEPS = {"stories": 150, "pydoc": 200}   # optimizer steps in a round
CPU = Processes(torch.device("cpu"))
RESULTS = ROOT / "results"


@dataclasses.dataclass
class ExperimentConfig:
    """The flags of tools.experiments."""
    experiment: str                      # the argument without --
    datasets: list[str] | None = flag(None, "[stories pydoc]", choices=list(STEPS))
    seeds: list[int] | None = flag(None, "of training [0 1]")
    jobs: int | None = flag(None, "processes at a time [one per core]", low=1)
    train_only: bool = flag(False, "train, and measure nothing yet")


def variants(n):
    """{experiment: {variant: DistillConfig's fields}} with n optimizer steps in a round."""
    divergences = {"kld": {}}
    for kind in ("mse", "tvd", "fkl", "jsd"):
        divergences[kind] = dict(divergence=kind)
    rounds = {
        "kld": {}, "raw": dict(handover="raw"), "reset": dict(reset_optimizer=True),
        "grid": {},                      # see published_targets
        "k4": dict(k=4, rounds=3, steps_per_round=2 * n),
        "k8": dict(k=8, rounds=2, steps_per_round=3 * n),
        "quarter": dict(steps_per_round=n // 4)}
    # teacher None: a teacher of their own is trained
    sizes = {"kld": {}}
    for name in WIDTHS:
        sizes[name] = dict(preset=name, teacher_steps=256, teacher=None)
    attention = {"kld": {}, "reveal": dict(attention="reveal", teacher=None),
                 "adapted": dict(attention="reveal")}
    return {"divergences": divergences, "rounds": rounds, "sizes": sizes,
            "attention": attention}


# ---- training

def published_targets(teacher, z, t, dt, k, mask_id, rank=None):
    """distill.sdtt_targets with the time grid of the papers' public code: where step i of k
    should begin at t - i dt, it begins at w t + (1 - t) (t - k dt), with w from 1 down to
    0."""
    masked = z == mask_id                                            # (B, L), N of them
    target = None
    for w in torch.linspace(1, 0, k).tolist():
        settled = z == mask_id
        t_i = (w * t + (1 - t) * (t - k * dt)).clamp(1e-5, 1)        # (B,)
        s_i = (t_i - dt).clamp(min=0)
        after, _, _ = unmask_step(teacher, z, t_i, s_i, mask_id)
        h = states_at(teacher, z, settled)               # of all, as that code has it
        if target is None:
            target = h.new_empty(int(masked.sum()), h.shape[1])      # (N, C)
        target[settled[masked]] = h
        z = after
    return target


@contextlib.contextmanager
def grid(name):
    """The published time grid in place of the right one, for the variant "grid"."""
    right = distill.sdtt_targets
    if name == "grid":
        distill.sdtt_targets = torch.no_grad()(published_targets)
    yield
    distill.sdtt_targets = right


@contextlib.contextmanager
def quiet():
    """No bars: those of several processes would overwrite each other."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def folder(dataset, seed):
    """Where the checkpoints and measurements of a dataset and seed are."""
    return Path("out/experiments") / f"{dataset}-{seed}"


def train_all(experiment, dataset, seed):
    """Judge, teacher and all variants of an experiment on a dataset with a seed."""
    torch.set_num_threads(1)
    home = folder(dataset, seed)
    # what all variants share
    paths = {}
    with quiet():
        for objective in ("ar", "mdlm"):
            config = TrainConfig(objective=objective, dataset=dataset, seed=seed,
                                 out=str(home))
            paths[objective] = train(config, CPU)
    for name, fields in variants(STEPS[dataset])[experiment].items():
        print(f"{home}: {name}", flush=True)
        how = dict(dataset=dataset, seed=seed, samples=0, steps_per_round=STEPS[dataset],
                   teacher=str(paths["mdlm"]), out=str(home / name))
        with grid(name), quiet():
            distill.distill(distill.DistillConfig(**(how | fields)), CPU)


# ---- measuring

# numbers of steps at which a teacher, each round and the last round are measured
FIRST, EACH, LAST = [8, 32, 1024], [8, 32], [4, 8, 16, 32, 128]
HEAT = [0.3, 0.5, 0.7, 0.85, 1.2, 1.4, 1.7, 2.0]     # of teacher and last round, at 8 steps
SAMPLES, PIECES, TASKS = 256, 320, 400
# what results/ keeps of a row
KEPT = ("variant", "dataset", "seed", "round", "steps", "temperature", "samples", "nfe",
        "gen_ppl", "gen_ppl_se", "entropy", "entropy_se", "pooled_entropy",
        "pooled_entropy_se", "choices", "choices_se", "valid", "valid_se", "contradictions",
        "copies", "copies_expected", "sequences", "bound", "bound_se", "any_order",
        "any_order_se", "tasks", "one_pass", "confident", "left", "left_se", "word_ppl",
        "word_ppl_se")


def tasks_of(data, context):
    """Last words of the validation data: of its texts, or of its paragraphs."""
    ids = np.asarray(data.val)
    if data.texts:
        rows = ids.reshape(-1, data.stride)[:TASKS].tolist()
        texts = [data.tokenizer.decode(row) for row in rows]
        return likelihood.make_tasks(texts, data.tokenizer, context)
    text = data.tokenizer.decode(ids.tolist()).replace("<end>", "\n\n")
    texts = likelihood.passages(text)[:TASKS]
    return likelihood.make_tasks(texts, data.tokenizer, context, cut=True)


def known_rows(store, what):
    """The rows of the file `store`, but for those of other weights than `what` names,
    measured on other text, or otherwise than today."""
    if not store.exists():
        return []
    kept = []
    for row in json.loads(store.read_text()):
        same_text = row.get("text", what["text"]) == what["text"]
        same_text &= row.get("version") == what["version"]
        other_round = row["round"] != what["round"]
        if same_text and (other_round or row.get("weights") == what["weights"]):
            kept.append(row)
    return kept


def tidy(row):
    """A row with numbers of five digits, without what its dataset cannot say."""
    kept = {}
    for key, value in row.items():
        if isinstance(value, float):
            value = float(f"{value:.5g}")
        if value is not None or key in ("steps", "temperature"):
            kept[key] = value
    return kept


def measure(path, data, judge, store, what, steps, heat):
    """What is missing of a checkpoint's rows in the file `store`: its bound and last words
    (a row without steps), and samples at each of `steps`, and of `heat` at 8 steps. what:
    its names."""
    model, _ = load_model(path)
    what = what | {"weights": fingerprint(model), "text": data.fingerprint,
                   "version": VERSION}
    rows = known_rows(store, what)
    done = {(row["round"], row["steps"], row["temperature"]) for row in rows}
    wanted = [(None, None)]              # of likelihoods
    wanted += [(number, 1.0) for number in steps]
    wanted += [(8, temperature) for temperature in heat]
    for number, temperature in wanted:
        if (what["round"], number, temperature) in done:
            continue
        if number is None:
            L = data.context(model.config.context)
            pieces = data.pieces(PIECES, L)
            row = evaluate.likelihood_row("", model, pieces, CPU, draws=4)
            row |= evaluate.last_word_row("", model, tasks_of(data, L), CPU)
            row |= {"steps": None, "temperature": None}
        else:
            n = SAMPLES if temperature == 1 else SAMPLES // 2
            sampling = Sampling(number, temperature=temperature)
            row = evaluate.quality_row("", model, n, sampling, judge, data, CPU)
        rows.append(tidy(row | what))
        write_json(store, rows)


def rows_in(store, name):
    """The rows of a file, as a variant's."""
    return [{"variant": name, **row} for row in json.loads(store.read_text())]


def measure_all(experiment, dataset, seed):
    """Rows of an experiment on a dataset with a seed; all are judged by the first seed's
    AR."""
    torch.set_num_threads(1)
    home, data = folder(dataset, seed), load_data(dataset, CPU)
    judge_model, _ = load_model(folder(dataset, 0) / "ar.pt")
    judge = make_judge(judge_model)
    rows = []
    with quiet():
        for name in variants(1)[experiment]:
            # the teacher: the variant's own, or the one that it shares
            own = (home / name / "teacher.pt").exists()
            place = home / name if own else home
            what = {"dataset": dataset, "seed": seed}
            teacher_rows = place / "teacher.json"
            measure(place / "teacher.pt", data, judge, teacher_rows, what | {"round": 0},
                    FIRST, HEAT)
            # the students, the last of them at more numbers of steps
            round_rows = home / name / "rows.json"
            paths = sorted((home / name).glob("round*.pt"))
            for r, path in enumerate(paths, 1):
                steps, heat = EACH, []
                if path == paths[-1]:
                    steps, heat = LAST, HEAT
                measure(path, data, judge, round_rows, what | {"round": r}, steps, heat)
            if own or name == "kld":
                rows += rows_in(teacher_rows, name)
            rows += rows_in(round_rows, name)
            print(f"{home}: {name} measured", flush=True)
    return rows


def everywhere(f, experiment, config):
    """f(experiment, dataset, seed) for all datasets and seeds, in processes. Returns the
    results in order."""
    calls = []
    with concurrent.futures.ProcessPoolExecutor(
            config.jobs or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for dataset in config.datasets:
            for seed in config.seeds:
                calls.append(pool.submit(f, experiment, dataset, seed))
        return [call.result() for call in calls]


# ---- what is shown

def with_teachers(rows):
    """Rows with a copy of the shared teacher's for each variant that has none of its
    own."""
    everything = []
    keys = dict.fromkeys((row["dataset"], row["seed"], row["variant"]) for row in rows)
    for dataset, seed, name in keys:
        mine = [row for row in rows if row["dataset"] == dataset and row["seed"] == seed]
        run = [row for row in mine if row["variant"] == name]
        if not any(row["round"] == 0 for row in run):
            for row in mine:
                if row["variant"] == "kld" and row["round"] == 0:
                    everything.append(row | {"variant": name})
        everything += run
    return everything


COLUMNS = (("variant", "variant", "s"), ("round", "round", "d"),
           ("bound", "any_order", ".3f"), ("last word", "left", ".1%"),
           ("ppl, 8", "gen_ppl 8", ".2f"), ("all", "pooled_entropy 8", ".2f"),
           ("valid", "valid 8", ".0%"), ("ppl, 32", "gen_ppl 32", ".2f"),
           ("all", "pooled_entropy 32", ".2f"), ("valid", "valid 32", ".0%"),
           ("as teacher's", "at teacher", ".2f"), ("as kld's", "at kld", ".2f"))


def values_of(rows, r, goals):
    """What the table shows of round r of one variant and seed: {key: value}. goals: {key:
    pooled entropy} at which its perplexity with 8 steps is interpolated over
    temperatures."""
    values = {}
    of_round = [row for row in rows if row["round"] == r]
    for row in of_round:
        if row["steps"] is None:         # likelihoods
            values["any_order"] = row["any_order"]
            values["left"] = row["left"]
        elif row["temperature"] == 1:
            for key in ("gen_ppl", "pooled_entropy", "valid"):
                if key in row:
                    values[f"{key} {row['steps']}"] = row[key]
    points = [row for row in of_round if row["steps"] == 8]
    for key, entropy in goals.items():
        values[key], _ = figures.at_entropy(points, "pooled_entropy", entropy)
    return values


def last_rows(rows):
    """One row for each teacher and last student: {column's key: [a value for each seed]}.
    Equal entropy is that of all texts together: the teacher's with 1,024 steps ("at
    teacher"), or that of the last student of the variant kld with 8 ("at kld"), of the same
    seed."""
    table = {}
    for seed in sorted({row["seed"] for row in rows}):
        # rows of this seed by variant, and the number of its last round
        runs = {}
        for row in rows:
            if row["seed"] == seed:
                runs.setdefault(row["variant"], []).append(row)
        last = {}
        for name, run in runs.items():
            last[name] = max(row["round"] for row in run)
        goals = {"at teacher": plain_entropy(runs["kld"], 0, 1024),
                 "at kld": plain_entropy(runs["kld"], last["kld"], 8)}
        for name, run in runs.items():
            shown = [last[name]]
            if name == "kld" and "k4" in runs and last[name] == 7:
                shown.insert(0, 6)       # made for as many steps as k4's last
            if name == "kld" or teacher_rows(run) != teacher_rows(runs["kld"]):
                shown.insert(0, 0)       # a teacher of its own
            for r in shown:
                entry = table.setdefault((name, r), {"variant": name, "round": r})
                for key, value in values_of(run, r, goals).items():
                    entry.setdefault(key, []).append(value)
    return list(table.values())


def plain_entropy(run, r, steps):
    """The entropy of all texts of round r in so many steps at temperature 1."""
    for row in reversed(run):
        if (row["round"], row["steps"], row["temperature"]) == (r, steps, 1):
            return row["pooled_entropy"]
    raise KeyError((r, steps))


def teacher_rows(run):
    """The rows of a variant's teacher, without the variant's name."""
    return [row | {"variant": ""} for row in run if row["round"] == 0]


def as_cell(value, form):
    """A name, a number, or a list of a number for each seed, as text."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return str(value)
    return "/".join("-" if one is None else format(one, form) for one in value)


def summary(rows):
    """A table for each dataset: teachers (round 0) and last students, a value for each
    seed."""
    text = ""
    columns = [(title, key, "s") for title, key, _ in COLUMNS]
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        shown = []
        for entry in last_rows([row for row in rows if row["dataset"] == dataset]):
            cells = {key: as_cell(entry.get(key), form) for _, key, form in COLUMNS}
            shown.append(cells)
        text += f"\n{dataset}\n{figures.rows_as_text(shown, columns)}\n"
    return text


def save_rows(store, rows):
    """The rows as a JSON file, a line for each."""
    lines = []
    for row in rows:
        lines.append(to_json({key: row[key] for key in KEPT if key in row}))
    text = (f'{{"torch": "{torch.__version__}", "threads": 1, "rows": [\n'
            + ",\n".join(lines) + "\n]}\n")
    write(store, lambda f: f.write(text.encode()))


def main():
    config = parse_flags(ExperimentConfig, __doc__, experiment=", ".join(variants(1)))
    config.datasets = config.datasets or list(STEPS)
    config.seeds = config.seeds or [0, 1]
    for dataset in config.datasets:
        load_data(dataset, CPU)          # made here, once, if it is missing
    everywhere(train_all, config.experiment, config)
    if config.train_only:
        return

    # new rows replace those of the same dataset and seed
    store = RESULTS / f"{config.experiment}.json"
    rows = []
    if store.exists():
        for row in json.loads(store.read_text())["rows"]:
            if row["dataset"] not in config.datasets or row["seed"] not in config.seeds:
                rows.append(row)
    for new in everywhere(measure_all, config.experiment, config):
        rows += new
    save_rows(store, rows)

    rows = with_teachers(rows)
    print(summary(rows))
    with contextlib.suppress(UserError):     # where there is no matplotlib
        figures.draw_experiment(rows, RESULTS / f"{config.experiment}.png")


if __name__ == "__main__":
    command(main, stopped=GOES_ON)
