"""What exact sampling gives beside SDTT, at nano size: quality, diversity and cost of the
teacher and of each round in few steps, sampled exactly, cooled, and stopped early.

    python -m tools.exact out/stories-nano-reveal --json exact.json
    python -m tools.exact out/stories-nano-reveal --what heat --json exact.json
    python -m tools.exact out/pydoc-nano-reveal --lengths 16 32 64 --json growth.json

Each folder is one that distill.py made; exact samples need --attention reveal. Rows that
the file has already are kept, so a run that was stopped goes on. tools.envelope compares at
equal diversity.
"""
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

from data.checkpoints import fingerprint, load_model
from data.dataset import Data, load_data
from data.files import UserError, write_json
from data.measures import VERSION, in_steps, make_judge
from data.processes import Processes, start
from data.results import round_files, sample_row
from data.script import command, device_flag, flag, parse_flags
from distill import DistillConfig
from sample import EXACT, Sampling
from tools import figures
from tools.evaluate import with_oracle

STEPS = [4, 8, 16, 32]                   # of teacher and students
COOLED = [0.3, 0.5, 0.6, 0.7, 0.8, 0.9]  # temperatures of the exact teacher, and of AR
HEAT = [0.3, 0.5, 0.7, 0.85, 1.2, 1.5]   # of teacher and students in few steps
HEATED = {"heat": 8, "heat32": 32}       # in how many steps, by the name that --what takes
STOPS = [1, 2, 3, 4, 5, 6, 8]            # calls after which the exact teacher is stopped
ALL = 10 ** 6            # ahead, see exact.py: more than any text has


@dataclasses.dataclass
class ExactConfig:
    """The flags of tools.exact."""
    folders: list[str]                   # the arguments without --
    lengths: list[int] | None = flag(
        None, "only this: the calls of teacher and AR for texts of so many tokens", low=2)
    what: list[str] | None = flag(
        None, "groups of rows [steps exact]; steps: teacher and rounds in few steps; "
        "exact: all sampled exactly, AR and teacher cooled too, the teacher stopped early "
        "and in 1,024 steps; heat: teacher and rounds in 8 steps at other temperatures; "
        "heat32: in 32 steps", choices=["steps", "exact", *HEATED])
    judge: str | None = flag(
        None, "AR checkpoint that reads all texts [ar.pt of the first folder]")
    samples: int = flag(512, "texts for each row", low=2)
    seed: int = flag(0, "seed of the samples")
    json: str | None = flag(None, "file for the rows, and for those of an earlier run")
    plot: str | None = flag(None, "picture of quality against calls (needs matplotlib)")
    device: str = device_flag()


def settings(name, model, what):
    """How the texts of a model are drawn, for each of its rows: fields of a Sampling.
    what: see ExactConfig."""
    if model is None:                                    # the data
        return [dict(steps=None)]
    rows = []
    if name == "ar":
        rows.append(dict(steps=None))
        # AR can guess and check, too: the same law in fewer calls
        if "exact" in what:
            rows += [dict(steps=EXACT), dict(steps=EXACT, ahead=ALL)]
            rows += [dict(steps=None, temperature=T) for T in COOLED]
        return rows
    # a diffusion model
    if "steps" in what:
        rows += [dict(steps=steps) for steps in STEPS]
    full = model.config.attention == "full"
    # one token at a time; of full attention in any group, as it has no exact samples
    if name == "teacher" and ("exact" in what or full):
        rows.append(dict(steps=1024))
    if "exact" in what:
        rows += [dict(steps=EXACT), dict(steps=EXACT, ahead=ALL)]
    if "exact" in what and name == "teacher":
        rows += [dict(steps=EXACT, ahead=ALL, temperature=T) for T in COOLED]
        rows += [dict(steps=EXACT, ahead=ALL, max_calls=n) for n in STOPS]
    for group, steps in HEATED.items():
        if group in what:
            rows += [dict(steps=steps, temperature=T) for T in HEAT]
    return rows


def of_lengths(name, lengths):
    """settings with --lengths: teacher and AR, sampled exactly, of each length."""
    rows = []
    # to ask an AR model for all slots saves no calls, as its first guesses are poor
    ahead = {"ar": [8], "teacher": [8, ALL]}
    for n in lengths:
        rows += [dict(steps=EXACT, ahead=k, length=n) for k in ahead.get(name, [])]
    return rows


def changed(sampling):
    """{field: value} of what is not Sampling's default. (A field that did not exist when a
    row was measured has its default there.)"""
    usual = dataclasses.asdict(Sampling())
    found = {}
    for name, value in sorted(dataclasses.asdict(sampling).items()):
        if value != usual[name]:
            found[name] = value
    return found


@dataclasses.dataclass
class Folder:
    """What distill.py left in a folder."""
    name: str
    models: dict                 # {"data": None, "ar": ..., "teacher": ..., "round 1": ...}
    data: Data
    dataset: str
    seed: int                    # of its training
    divergence: str | None       # of its rounds
    variants: dict               # {model's name: see variant_of}


# the flags of distill.py that a variant is named by
VARIED = "preset", "k", "steps_per_round", "handover", "reset_optimizer"


def variant_of(model, content):
    """What makes a model another than distill.py --attention reveal would make it, such as
    "full attention, k 4"; "" if nothing does. content: of its checkpoint."""
    found = []
    if model.config.attention == "full":
        found.append("full attention")
    config = content["config"]
    usual = dataclasses.asdict(DistillConfig(dataset=config["dataset"]))
    for name in VARIED:
        # (a teacher has fewer flags, and so have older checkpoints)
        if config.get(name, usual[name]) != usual[name]:
            found.append(f"{name} {config[name]}")
    return ", ".join(found)


def open_folder(path, procs):
    """The Folder at a path. It may have rounds alone, where --teacher named another's, or a
    teacher alone. Raises UserError where it has neither."""
    models, variants = {"data": None}, {"data": ""}
    rounds = round_files(path)
    for name, kind in (("ar", "ar"), ("teacher", "mdlm")):
        file = path / f"{name}.pt"
        # without rounds a teacher is needed: if it is missing, load_model says so
        needed = name == "teacher" and not rounds
        if needed or file.exists():
            models[name], content = load_model(file, procs.device, (kind,))
            variants[name] = variant_of(models[name], content)
    divergence = None
    for file in rounds:
        model, content = load_model(file, procs.device, ("sdtt",))
        name = f"round {content['round']}"
        models[name] = model
        variants[name] = variant_of(model, content)
        divergence = content["config"]["divergence"]     # of all rounds the same
    # the last one says what all are of
    data = load_data(content["config"]["dataset"], procs)
    if content.get("data") not in (None, data.fingerprint):      # older ones do not say
        raise UserError(f"{path} was trained on other text than {data.folder} holds now")
    seed = content["config"]["seed"]
    return Folder(path.name, models, data, data.folder.name, seed, divergence, variants)


def measure_folder(config, folder, judge_file, procs, rows, save):
    """Measure what rows lack of a folder's models; each new row is appended, then save()
    called. judge_file: the judge and its checkpoint's content."""
    last = list(folder.models.values())[-1]
    what = config.what or ["steps", "exact"]
    if last.config.attention == "full" and (config.lengths or "exact" in what):
        raise UserError(f"the models in {folder.name} have full attention, so they cannot "
                        "be sampled exactly; use --what steps without --lengths, or a "
                        "folder of distill.py --attention reveal")
    judge_model, content = judge_file
    same = content["tokenizer"] == folder.data.tokenizer.spec
    length = last.config.context         # of all models the same
    if same and judge_model.config.context < length:
        raise UserError(f"the judge reads {judge_model.config.context} tokens, the texts "
                        f"of {folder.name} have more; give another --judge")
    judge = make_judge(judge_model, content["tokenizer"], folder.data.tokenizer)
    judged_by = fingerprint(judge_model)
    alone = Processes(procs.device)
    if config.lengths and max(config.lengths) > length:
        raise UserError(f"--lengths {max(config.lengths)} is beyond the context of "
                        f"{folder.name}, {length} tokens")
    for name, model in folder.models.items():
        if config.lengths:
            wanted = of_lengths(name, config.lengths)
        else:
            wanted = settings(name, model, what)
        for how in wanted:
            sampling = Sampling(**(dict(seed=config.seed, length=length) | how))
            # what tells this row from all others. Folders of one seed may share a teacher,
            # of which there is then one row
            digest = "data" if model is None else fingerprint(model)
            key = [digest, folder.seed, folder.data.fingerprint, judged_by, config.samples,
                   changed(sampling)]
            key = json.dumps(key)
            if any(row["key"] == key for row in rows):
                continue
            # the oracle judges whole texts only: without it at any other length
            data, _ = with_oracle(folder.data, sampling.length)
            row, _ = sample_row(name, model, config.samples, sampling, judge, data, alone)
            row |= dict(key=key, version=VERSION, folder=folder.name,
                        dataset=folder.dataset, trained_with_seed=folder.seed,
                        ahead=sampling.ahead, max_calls=sampling.max_calls,
                        length=sampling.length)
            if name.startswith("round"):
                row["divergence"] = folder.divergence
            if folder.variants[name]:
                row["variant"] = folder.variants[name]
            rows.append(rounded(row))
            save()
            print(line(row), flush=True)


def rounded(row):
    """A row with numbers of seven digits: more mean nothing, and make a large file."""
    for key, value in row.items():
        if isinstance(value, float):
            row[key] = float(f"{value:.7g}")
    return row


def line(row):
    """A row as a line of text."""
    title = row["model"]
    if row["steps"]:
        title += ", " + in_steps(row["steps"])
    if row["steps"] == EXACT and row["ahead"] == ALL:
        title += ", all ahead"
    if row["temperature"] not in (None, 1.0):
        title += f", T = {row['temperature']:g}"
    if row["max_calls"]:
        title += f", stopped after {row['max_calls']}"
    text = f"{row['folder']}, {row['length']} tokens: {title:42}"
    if row["calls"] is not None:
        text += f" {row['calls']:5.1f} calls {row['reads']:5.1f} reads"
    text += f" {row['gen_ppl']:7.2f}"
    if row["gen_ppl_se"] is not None:    # of a single text there is none
        text += f" ±{row['gen_ppl_se']:.2f}"
    text += f", entropy {row['entropy']:.2f}, of all {row['pooled_entropy']:.3f}"
    if row["valid"] is not None:
        text += f", {row['valid']:4.0%} valid, choices {row['choices']:.1f}"
    return text


def read_rows(path):
    """The rows of a file that --json made, but for those that were measured otherwise than
    today. Raises UserError if it is another program's."""
    try:
        rows = json.loads(Path(path).read_bytes())["rows"]
        ours = all("key" in row for row in rows)
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{path} does not hold rows of tools.exact; name another file")
    return [row for row in rows if row.get("version") == VERSION]


def main():
    config = parse_flags(ExactConfig, __doc__, folders="that distill.py made")
    if config.plot and config.lengths:
        raise UserError("--plot is of quality, which --lengths leaves out; give only one")
    figures.check_picture(config.plot)
    procs = start(config.device)
    rows = []
    if config.json and Path(config.json).exists():
        rows = read_rows(config.json)                    # what an earlier run has measured

    saved, saved_at = len(rows), -math.inf               # how many rows the file has

    def save(at_last=False):
        """Write the rows, if they are wanted and there are new ones; unless at_last once in
        a second at most, as to write hundreds may take longer than to measure the next."""
        nonlocal saved, saved_at
        due = at_last or time.monotonic() - saved_at > 1
        if config.json and due and len(rows) > saved:
            write_json(config.json, {"argv": sys.argv[1:], "rows": rows})
            saved, saved_at = len(rows), time.monotonic()

    judge_path = config.judge or Path(config.folders[0]) / "ar.pt"
    judge_file = load_model(judge_path, procs.device, ("ar",))
    try:
        for path in config.folders:
            folder = open_folder(Path(path), procs)
            measure_folder(config, folder, judge_file, procs, rows, save)
    finally:
        save(at_last=True)               # after Ctrl-C, too
    if config.plot:
        figures.draw_exact(rows, config.plot)


if __name__ == "__main__":
    command(main)
