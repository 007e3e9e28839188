"""The paper's experiments on two cores: divergences, rounds, sizes; and attention. (The fourth,
latency against AR, is bench.py's, with the checkpoints that these leave.)

    python -m tools.experiments divergences        # -> results/divergences.json

trains what is missing under out/experiments, several processes with a thread each, and measures the
students of all rounds. A stop costs nothing: the same command goes on where it was. Rows of other
datasets and seeds stay in the file. Experiments share teachers, judges and the plain path, "kld".
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
from common import (GOES_ON, ROOT, Processes, command, fingerprint, flag, load_model,
                    parse_flags)
from data.dataset import load_data
from data.files import UserError, to_json, write, write_json
from diffusion import states_at, unmask_step
from model import PRESETS
from data.measures import make_judge
from sample import Sampling
from tools import evaluate, figures, likelihood
from train import TrainConfig, train

WIDTHS = {"w80": 80, "w184": 184}        # beside nano's 128: blocks as 1 : 2.6 : 5.3, the paper's
PRESETS |= {name: PRESETS["nano"] | {"width": width} for name, width in WIDTHS.items()}
STEPS = {"stories": 150, "pydoc": 200}   # optimizer steps in a round
CPU = Processes(torch.device("cpu"))
RESULTS = ROOT / "results"


@dataclasses.dataclass
class Config:
    experiment: str                      # the argument without --
    datasets: list[str] | None = flag(None, "[stories pydoc]", choices=list(STEPS))
    seeds: list[int] | None = flag(None, "of training [0 1]")
    jobs: int | None = flag(None, "processes at a time [one per core]", low=1)
    train_only: bool = flag(False, "train, and measure nothing yet")


def variants(n):
    """{experiment: {variant: DistillConfig's fields}} with n optimizer steps in a round. Those of
    rounds have as many in all, but for "quarter"."""
    kld, fresh = {"kld": {}}, dict(teacher=None)         # fresh: trains a teacher of its own
    return {
        "divergences": kld | {kind: dict(divergence=kind) for kind in ("mse", "tvd", "fkl", "jsd")},
        "rounds": kld | {
            "raw": dict(handover="raw"), "reset": dict(reset_optimizer=True), "grid": {},
            "k4": dict(k=4, rounds=3, steps_per_round=2 * n),
            "k8": dict(k=8, rounds=2, steps_per_round=3 * n),
            "quarter": dict(steps_per_round=n // 4)},
        "sizes": kld | {name: dict(preset=name, teacher_steps=256) | fresh for name in WIDTHS},
        "attention": kld | {"reveal": dict(attention="reveal") | fresh,
                            "adapted": dict(attention="reveal")}}


# ---- training

def published_targets(teacher, z, t, dt, k, mask_id, rank=None):
    """distill.sdtt_targets with the time grid of the papers' public code: where step i of k should
    begin at t - i dt, it begins at w t + (1 - t) (t - k dt), with w from 1 down to 0."""
    masked = z == mask_id
    target = None
    for w in torch.linspace(1, 0, k).tolist():
        settled = z == mask_id
        t_i = (w * t + (1 - t) * (t - k * dt)).clamp(1e-5, 1)
        after = unmask_step(teacher, z, t_i, (t_i - dt).clamp(min=0), mask_id)[0]
        h = states_at(teacher, z, settled)               # of all, as that code has it
        if target is None:
            target = h.new_empty(int(masked.sum()), h.shape[1])
        target[settled[masked]] = h
        z = after
    return target


@contextlib.contextmanager
def grid(name):
    """The published time grid in place of the right one, for the variant "grid"."""
    right = distill.sdtt_targets
    distill.sdtt_targets = torch.no_grad()(published_targets) if name == "grid" else right
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
    with quiet():
        shared = {objective: train(TrainConfig(
            objective=objective, dataset=dataset, seed=seed, out=str(home)), CPU)
            for objective in ("ar", "mdlm")}
    for name, fields in variants(STEPS[dataset])[experiment].items():
        print(f"{home}: {name}", flush=True)
        with grid(name), quiet():
            distill.distill(distill.DistillConfig(**dict(
                dataset=dataset, seed=seed, samples=0, steps_per_round=STEPS[dataset],
                teacher=str(shared["mdlm"]), out=str(home / name)) | fields), CPU)


# ---- measuring

EACH, LAST, FIRST = [8, 32], [4, 8, 16, 32, 128], [8, 32, 1024]    # steps: rounds, last, teacher
HEAT = [0.3, 0.5, 0.7, 0.85, 1.2, 1.4, 1.7, 2.0]     # of the last round and the teacher, at 8 steps
SAMPLES, PIECES, TASKS = 256, 320, 400
KEPT = ("variant", "dataset", "seed", "round", "steps", "temperature", "samples", "nfe", "gen_ppl",
        "gen_ppl_se", "entropy", "entropy_se", "pooled_entropy", "pooled_entropy_se", "valid",
        "valid_se", "contradictions", "copies", "sequences", "bound", "bound_se", "any_order",
        "any_order_se", "tasks", "one_pass", "confident", "left", "left_se", "word_ppl",
        "word_ppl_se")       # of what is measured, in results/


def tasks_of(data, context):
    """Last words of the validation data: of its texts, or of its paragraphs."""
    if data.texts:
        rows = np.asarray(data.val).reshape(-1, data.stride)[:TASKS].tolist()
        return likelihood.make_tasks(map(data.tokenizer.decode, rows), data.tokenizer, context)
    text = data.tokenizer.decode(np.asarray(data.val).tolist()).replace("<end>", "\n\n")
    texts = likelihood.passages(text)[:TASKS]
    return likelihood.make_tasks(texts, data.tokenizer, context, cut=True)


def measure(path, data, judge, store, what, steps, heat):
    """What is missing of a checkpoint's rows in the file `store`: its bound and last words (a row
    without steps), and samples at each of `steps`, and of `heat` at 8 steps. what: its names. Rows
    of other weights, or measured on other text, are dropped."""
    model = load_model(path)[0]
    what = what | {"weights": fingerprint(model), "text": data.fingerprint}
    rows = json.loads(store.read_text()) if store.exists() else []
    rows = [row for row in rows if row.get("text", what["text"]) == what["text"]
            and (row["round"] != what["round"] or row.get("weights") == what["weights"])]
    done = {(row["round"], row["steps"], row["temperature"]) for row in rows}
    for s, T in [(None, None)] + [(s, 1.0) for s in steps] + [(8, T) for T in heat]:
        if (what["round"], s, T) in done:
            continue
        if s is None:
            L = data.context(model.config.context)
            pieces = data.pieces(PIECES, L)
            row = evaluate.likelihood_row("", model, pieces, CPU, draws=4)
            row |= evaluate.last_word_row("", model, tasks_of(data, L), CPU)
            row |= {"steps": None, "temperature": None}
        else:
            n = SAMPLES if T == 1 else SAMPLES // 2
            sampling = Sampling(s, temperature=T)
            row = evaluate.quality_row("", model, n, sampling, judge, data, CPU)
        rows.append({k: float(f"{v:.5g}") if isinstance(v, float) else v
                     for k, v in (row | what).items()        # without what this dataset has not
                     if v is not None or k in ("steps", "temperature")})
        write_json(store, rows)


def measure_all(experiment, dataset, seed):
    """Rows of an experiment on a dataset with a seed; all are judged by the first seed's AR."""
    torch.set_num_threads(1)
    home, data = folder(dataset, seed), load_data(dataset, CPU)
    judge = make_judge(load_model(folder(dataset, 0) / "ar.pt")[0])
    rows = []
    with quiet():
        for name in variants(1)[experiment]:
            own = (home / name / "teacher.pt").exists()
            place = home / name if own else home
            files = [(place / "teacher.pt", place / "teacher.json", 0, FIRST, HEAT)]
            paths = sorted((home / name).glob("round*.pt"))
            files += [(path, home / name / "rows.json", r, LAST if path == paths[-1] else EACH,
                       HEAT if path == paths[-1] else []) for r, path in enumerate(paths, 1)]
            for path, store, r, steps, heat in files:
                what = {"dataset": dataset, "seed": seed, "round": r}
                measure(path, data, judge, store, what, steps, heat)
            for store in [place / "teacher.json"] * (own or name == "kld") + [
                    home / name / "rows.json"]:
                rows += [{"variant": name, **row} for row in json.loads(store.read_text())]
            print(f"{home}: {name} measured", flush=True)
    return rows


def everywhere(f, experiment, c):
    """f(experiment, dataset, seed) for all of c's, in processes. Returns the results in order."""
    places = [(experiment, dataset, seed) for dataset in c.datasets for seed in c.seeds]
    with concurrent.futures.ProcessPoolExecutor(
            c.jobs or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(f, *zip(*places)))


# ---- what is shown

def with_teachers(rows):
    """Rows with a copy of the shared teacher's for each variant that has none of its own."""
    found = []
    for dataset, seed, name in dict.fromkeys((r["dataset"], r["seed"], r["variant"]) for r in rows):
        mine = [r for r in rows if (r["dataset"], r["seed"]) == (dataset, seed)]
        own = [r for r in mine if r["variant"] == name]
        if not any(r["round"] == 0 for r in own):
            own = [r | {"variant": name} for r in mine if r["variant"] == "kld" and not r["round"]
                   ] + own
        found += own
    return found


COLUMNS = (("variant", "variant", "s"), ("round", "round", "d"), ("bound", "any_order", ".3f"),
           ("last word", "left", ".1%"), ("ppl, 8", "gen_ppl 8", ".2f"),
           ("all", "pooled_entropy 8", ".2f"), ("valid", "valid 8", ".0%"),
           ("ppl, 32", "gen_ppl 32", ".2f"), ("all", "pooled_entropy 32", ".2f"),
           ("valid", "valid 32", ".0%"), ("as teacher's", "at teacher", ".2f"),
           ("as kld's", "at kld", ".2f"))


def values_of(rows, r, wanted):
    """What the table shows of round r of one variant and seed: {key: value}. wanted: {key: pooled
    entropy} at which its perplexity with 8 steps is interpolated over temperatures."""
    values = {}
    for row in (row for row in rows if row["round"] == r):
        if row["steps"] is None:
            values |= {key: row[key] for key in ("any_order", "left")}
        elif row["temperature"] == 1:
            values |= {f"{key} {row['steps']}": row[key] for key in (
                "gen_ppl", "pooled_entropy", "valid") if key in row}
    points = [row for row in rows if row["round"] == r and row["steps"] == 8]
    return values | {key: figures.at_entropy(points, "pooled_entropy", entropy)[0]
                     for key, entropy in wanted.items()}


def last_rows(rows):
    """One row for each teacher and last student: {column's key: [a value for each seed]}. Equal
    entropy is that of all texts together: the teacher's with 1,024 steps ("at teacher"), or that
    of the last student of the variant kld with 8 ("at kld"), of the same seed."""
    found = {}
    for seed in sorted({row["seed"] for row in rows}):
        mine = [row for row in rows if row["seed"] == seed]
        runs = {name: [row for row in mine if row["variant"] == name]
                for name in dict.fromkeys(row["variant"] for row in mine)}
        last = {name: max(row["round"] for row in run) for name, run in runs.items()}
        plain = {(row["round"], row["steps"]): row["pooled_entropy"] for row in runs["kld"]
                 if row["temperature"] == 1}
        wanted = {"at teacher": plain[0, 1024], "at kld": plain[last["kld"], 8]}
        teacher = {name: [{**row, "variant": ""} for row in run if row["round"] == 0]
                   for name, run in runs.items()}
        for name, run in runs.items():
            own = name == "kld" or teacher[name] != teacher["kld"]
            between = [6] * (name == "kld" and "k4" in runs and last[name] == 7)     # as k4's last
            for r in [0] * own + between + [last[name]]:
                entry = found.setdefault((name, r), {"variant": name, "round": r})
                for key, value in values_of(run, r, wanted).items():
                    entry.setdefault(key, []).append(value)
    return list(found.values())


def summary(rows):
    """A table for each dataset: teachers (round 0) and last students, a value for each seed."""
    text = ""
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        shown = []
        for entry in last_rows([row for row in rows if row["dataset"] == dataset]):
            shown.append({key: "/".join("-" if v is None else format(v, form) for v in value)
                          if isinstance(value := entry.get(key), list) else
                          "" if value is None else str(value) for _, key, form in COLUMNS})
        text += f"\n{dataset}\n" + figures.rows_as_text(
            shown, [(title, key, "s") for title, key, _ in COLUMNS]) + "\n"
    return text


def main():
    c = parse_flags(Config, __doc__, experiment=", ".join(variants(1)))
    c.datasets, c.seeds = c.datasets or list(STEPS), c.seeds or [0, 1]
    for dataset in c.datasets:
        load_data(dataset, CPU)
    everywhere(train_all, c.experiment, c)
    if not c.train_only:
        store = RESULTS / f"{c.experiment}.json"
        kept = json.loads(store.read_text())["rows"] if store.exists() else []
        rows = [row for row in kept if row["dataset"] not in c.datasets
                or row["seed"] not in c.seeds] + sum(everywhere(measure_all, c.experiment, c), [])
        lines = ",\n".join(to_json({k: row[k] for k in KEPT if k in row}) for row in rows)
        text = f'{{"torch": "{torch.__version__}", "threads": 1, "rows": [\n{lines}\n]}}\n'
        write(store, lambda f: f.write(text.encode()))
        rows = with_teachers(rows)
        print(summary(rows))
        with contextlib.suppress(UserError):             # where there is no matplotlib
            figures.draw_experiment(rows, RESULTS / f"{c.experiment}.png")


main.stopped = GOES_ON

if __name__ == "__main__":
    command(main)
