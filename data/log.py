"""The log of a training run: a line for the reader, and a line of JSON for programs."""
import json

from tqdm import tqdm

from data.files import UserError, reason, remedy, to_json, write


def write_log(procs, run, **entry):
    """One line for the reader, one line of JSON beside the checkpoint."""
    if procs.rank > 0:
        return
    # for the reader; tqdm.write keeps the bar whole
    tqdm.write(f"{run.path.stem}: step {run.step}, loss {entry['loss']:.4f}, validation "
               f"{entry['val_loss']:.4f}, {entry['tokens_per_s']:,.0f} tokens/s")
    # for programs, and for the learning curves
    path = run.path.with_suffix(".jsonl")
    try:
        with open(path, "a") as f:       # a stop leaves all earlier lines
            f.write(to_json({"step": run.step, **entry}) + "\n")
    except OSError as e:
        raise UserError(f"{path} cannot be written ({reason(e)}); {remedy(e)}")


def rewind_log(run):
    """Drop the lines after run.step (all of them if it is 0): a run may have been stopped
    after it wrote a line and before it wrote a checkpoint. For process 0 only."""
    path = run.path.with_suffix(".jsonl")
    lines = []
    if path.exists() and run.step:
        # the last part has no newline at its end: nothing, or a line that was cut off
        lines = path.read_text().split("\n")[:-1]
    kept = [line + "\n" for line in lines if json.loads(line)["step"] <= run.step]
    write(path, lambda f: f.write("".join(kept).encode()))
