"""What a run of distill.py says and finds: what it is going to do; rows of measures in
results.json, kept from run to run as long as they are true; a table; a few texts to look
at.
"""
import dataclasses
import json
import platform
import time
import typing

import torch

from data.checkpoints import fingerprint
from data.dataset import Data
from data.files import write, write_json
from data.measures import VERSION, in_steps, make_judge, measure, summary, table
from data.processes import Processes, from_first
from data.script import EXACT
from sample import Sampling, draw_samples


def announce(config, data, sampling_steps):
    """Say, before anything trains, which files are used and how much there is to do.
    sampling_steps: see schedule."""
    # given, or there from an earlier run, or made now
    teacher = config.teacher or config.folder / "teacher.pt"
    judge = "none, so no table"
    if config.samples:
        judge = config.judge or config.folder / "ar.pt"
    print(f"data: {data.folder}; teacher: {teacher}; judge: {judge}; results: "
          f"{config.folder}\n{config.rounds} rounds of {config.steps_per_round} optimizer "
          f"steps: from {sampling_steps[0]:g} sampling steps to {sampling_steps[-1]:g}",
          flush=True)


def announce_round(config, sampling_steps, r, seconds):
    """Say what round r (from 0) teaches. seconds: what the round before took."""
    text = (f"round {r + 1}: {config.k} steps of 1/{sampling_steps[r]:g} in one, for "
            f"{sampling_steps[r + 1]:g} steps")
    # the first round does not know yet how long one takes
    if r > 0:
        left = (config.rounds - r) * seconds
        text += f"; the rounds left take about {left:.0f} s"
    print(text)


def round_files(folder):
    """The checkpoints of the rounds in a folder of distill.py, in their order."""
    # round10.pt comes after round9.pt
    return sorted(folder.glob("round*.pt"), key=lambda path: (len(path.name), path.name))


@dataclasses.dataclass
class Exam:
    """What every model of a run is measured with, and where the rows go."""
    config: typing.Any           # the flags of distill.py
    procs: Processes             # which draw the texts together
    data: Data
    results: dict                # what results.json holds
    context: int                 # tokens of a text
    columns: list                # numbers of steps in the table; 8, which is shown on the
                                 # way, must be among them
    judge: typing.Callable | None = None     # see data.measures.make_judge
    judged_by: str = ""          # the judge's fingerprint
    same_tokens: bool = False    # whether it reads the data's tokens; it is then the AR
                                 # baseline, too

    @property
    def seconds(self):
        """What each part of the run took, a dict."""
        return self.results["seconds"]


def open_exam(config, procs, data, judge_pair, teacher_pair, columns):
    """The Exam of a run, with what results.json has from an earlier one. The pairs: a model
    and its checkpoint, of the judge (None, None) where nothing is measured."""
    judge, judge_file = judge_pair
    teacher, teacher_file = teacher_pair
    results = open_results(config)
    exam = Exam(config, procs, data, results, teacher.config.context, columns)
    exam.seconds["teacher"] = teacher_file["seconds"]
    if judge is None:
        return exam
    exam.seconds["ar"] = judge_file["seconds"]
    exam.judge = make_judge(judge, judge_file["tokenizer"], data.tokenizer)
    exam.judged_by = fingerprint(judge)
    exam.same_tokens = judge_file["tokenizer"] == data.tokenizer.spec
    # a judge with other tokens is given text, not ids
    results["judged"] = "tokens"
    if not exam.same_tokens:
        results["judged"] = "text, in the judge's own tokens"
    return exam


def open_results(config):
    """results.json of an earlier run, or a new one."""
    try:
        old = json.loads((config.folder / "results.json").read_bytes())
        # rows that are still true are kept, see fill_rows
        rows, models = old["rows"], old["models"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        rows, models = [], {}            # there is none, or it is not ours
    # what the numbers may depend on besides the flags
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "machine": platform.machine(), "threads": torch.get_num_threads()}
    return {"rows": rows, "models": models, "config": dataclasses.asdict(config),
            "seconds": {}, "versions": versions}


def fill_rows(exam, name, model, digest):
    """Measure what the results lack of one model (None: the data), and save them, row by
    row. digest: the model's fingerprint. Rows of an earlier run are kept only if they came
    from the same weights, judge and settings. All processes draw texts together; process 0
    keeps the rows. Without a judge nothing is measured."""
    if exam.judge is None:
        return
    config, results, procs = exam.config, exam.results, exam.procs
    # all that the rows of this model depend on; results["models"] says what those that are
    # there were made with
    key = (f"{digest} {exam.judged_by} {exam.data.fingerprint} {config.samples} "
           f"{config.seed} {VERSION}")
    if results["models"].get(name) != key:
        # they are of other weights, text or settings, or under another judge
        results["rows"] = [row for row in results["rows"] if row["model"] != name]
        results["models"][name] = key

    # data and AR have no number of steps; exact sampling needs the order of reveal
    diffusion = model is not None and not model.config.causal
    columns = exam.columns if diffusion else [None]
    if diffusion and model.config.attention == "reveal":
        columns = [*columns, EXACT]
    # without what an interrupted run has measured already; process 0's list holds for all,
    # which draw the texts together
    done = {row["steps"] for row in results["rows"] if row["model"] == name}
    missing = [steps for steps in columns if steps not in done]
    for steps in from_first(procs, missing):
        n = config.samples
        if steps not in (None, EXACT) and steps > 32:            # they take long
            n = max(2, config.samples // 2)
        sampling = Sampling(steps, config.seed, length=exam.context)
        # texts and measures; the texts themselves are not kept
        row, _ = sample_row(name, model, n, sampling, exam.judge, exam.data, procs)
        results["rows"].append(row)
        if procs.rank == 0:
            write_json(config.folder / "results.json", results)
    if procs.rank > 0:
        return

    # one line on the way: a diffusion model's row of 8 steps
    mine = [row for row in results["rows"] if row["model"] == name]
    shown = next(row for row in mine if row["steps"] in (None, 8))
    title = f"{name}, 8 steps" if diffusion else name
    print(f"{title}: {summary(shown)}", flush=True)


def sample_row(name, model, n, sampling, judge, data, procs):
    """One row of results, and the samples (n, L) that it is about: n texts of a model,
    drawn as `sampling` says, or of the validation data (model None), and what they are
    worth. judge: see data.measures.make_judge."""
    began = time.time()                                              # measuring counts, too
    costs = []                                   # of each batch, of all processes
    if model is None:
        # n different texts, or as many as there are
        x = data.pieces(n, sampling.length)                          # (n, L)
    else:
        title = name
        if sampling.steps:                       # AR has no number of steps
            title = f"{name}, {in_steps(sampling.steps, sampling.order)}"
        x = draw_samples(model, n, sampling, procs, title=title, costs=costs)

    # how the texts came about
    row = {"model": name, "steps": sampling.steps, "nfe": None, "calls": None,
           "reads": None, "temperature": sampling.temperature,
           # as public code draws, see tools/joint.py
           "precision": getattr(sampling, "precision", 64),
           "joint": getattr(sampling, "joint", False),
           "order": sampling.order, "seed": sampling.seed}
    # nfe: calls of the network for a batch (number of function evaluations), the mean;
    # calls: those that made something final in a text, the mean of texts; reads: positions
    # that the network read for each token
    if costs:
        row["nfe"] = sum(cost.nfe for cost in costs) / len(costs)
        row["calls"] = sum(sum(cost.calls) for cost in costs) / n
        row["reads"] = sum(cost.reads for cost in costs) / x.numel()
    if model is None:                            # data are not drawn here
        row["temperature"] = row["precision"] = None
    if model is None or model.config.causal:     # nor does AR choose an order
        row["order"] = None

    # what they are worth
    row |= measure(x.to(procs.device), judge, data)
    row["seconds"] = round(time.time() - began, 2)
    return row, x


def show_samples(exam, models):
    """Print three texts of each diffusion model in 8 and in 32 steps, and write them to
    samples.txt. models: {name: model}."""
    text, config = "", exam.config
    alone = Processes(exam.procs.device)         # the other processes have finished
    for steps in (8, 32):
        for name, model in models.items():
            text += f"\n{name}, {steps} steps:\n"
            # three texts (3, L)
            x = draw_samples(model, 3, Sampling(steps, config.seed), alone)
            for row in x.tolist():
                one = exam.data.tokenizer.decode(row).strip().replace("\n", "\n    ")
                # further lines of a text are indented
                text += f"  * {one}\n"
    write(config.folder / "samples.txt", lambda f: f.write(text.encode()))
    print(text)


def conclude(exam, models):
    """Put the rows in order, and write and print everything that there is to see; only
    process 0 of a run with a judge calls this. models: see show_samples."""
    config, results = exam.config, exam.results
    # rows of rounds that an earlier run had beyond this one's are dropped
    order = ["data", "ar", "teacher"] + [f"round {r + 1}" for r in range(config.rounds)]
    known = [row for row in results["rows"] if row["model"] in order]
    results["rows"] = sorted(known, key=lambda row: order.index(row["model"]))
    # rows of an earlier run count with the time that they took then
    exam.seconds["evaluation"] = round(sum(row["seconds"] for row in known), 1)
    write_json(config.folder / "results.json", results)
    print(f"\nperplexity under the judge (of {results['judged']}), entropies in nats: "
          "within a text, of all texts together, and of their choices (of stories only)")
    print(table(results["rows"]))
    show_samples(exam, models)
    print(f"{config.folder}: {sum(exam.seconds.values()):.0f} s in all; "
          f"python -m tools.figures {config.folder} draws the curves")
