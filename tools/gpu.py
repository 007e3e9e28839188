"""Rented a GPU? One command checks and times everything there, within ten minutes:

    python -m tools.gpu --json results/gpu.json

First the checks of tests/test_cuda.py, a line for each: does the GPU compute what the CPU
computes? Then times (tools/gpu_times.py), each beside what was predicted on paper; at the
end all of them as a table. What --minutes leave no room for is left out, and said. The file
is written after each row. Without a GPU all runs in small on the CPU: a rehearsal.
"""
import gc
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch

from data.files import write_json
from data.processes import start
from data.script import command, flag, parse_flags
from tools import machine
from tools.gpu_times import pieces

CHECKS = Path(__file__).resolve().parents[1] / "tests/test_cuda.py"
REHEARSAL = ("no CUDA GPU here, so this is a rehearsal: the checks compare the CPU with "
             "itself, and tiny models are timed on the CPU, in a few steps, which predicts "
             "nothing")

# ---- ESTIMATED, NOT MEASURED: what an H200 was predicted to do, on paper, before this code
# had run on any GPU

ABOUT = "predictions are of an H200: estimated on paper, not measured"
# seconds for texts of 1,024 tokens at batch 1, 8, 32: {(what, preset, steps): ...}. (When
# they were made, diffusion drew from 32 rows at a time, now from 512)
BATCHES = 1, 8, 32
TEXTS = {("AR", "small", None): (0.49, 0.60, 0.84),
         ("AR", "xl", None): (1.36, 1.7, 3.0),
         ("full", "small", 16): (0.024, 0.12, 0.45),
         ("full", "small", 32): (0.048, 0.21, 0.77),
         ("full", "xl", 16): (0.11, 0.71, 2.8),
         ("full", "xl", 32): (0.22, 1.4, 5.5),
         ("cached", "small", 16): (0.027, 0.080, 0.29),
         ("cached", "xl", 16): (0.05, 0.20, 0.67)}
# all else: {(what, preset): ...}
OTHERS = {("reads", None): 4.8, ("copies", None): 4.8,           # these from its data sheet
          ("bfloat16 products", None): 989, ("float32 products", None): 67,
          ("TF32 products", None): 495,
          ("draw of 32", None): 1e-4, ("draw of 512", None): 1e-4,
          # 16 texts; blocks compiled, head in float32
          ("SDTT step", "small"): 0.122, ("SDTT trunk", "small"): 0.045,
          ("SDTT head", "small"): 0.049, ("SDTT step", "xl"): 0.60,
          ("SDTT memory", "xl"): 80,
          # as counted on simulated devices, see tests/pretend.py
          ("waits, full", "small"): 2 / 16, ("waits, cached", "small"): 2 / 16,
          ("waits, exact", "small"): 3.4, ("waits, AR", "small"): 0,
          ("waits, SDTT", "small"): 3, ("waits, bound", "small"): 1}


def predicted(row):
    """What was predicted of a row, or None."""
    what, preset = row["what"], row.get("preset")
    values = TEXTS.get((what, preset, row.get("steps")))
    if values and row["batch"] in BATCHES:
        return values[BATCHES.index(row["batch"])]
    return OTHERS.get((what, preset))


# ---- flags and report

COLUMNS = (("what", "<19"), ("preset", "<7"), ("batch", ">5"), ("steps", ">6"),
           ("unit", ">9"), ("predicted", ">11.3g"), ("measured", ">10.3g"),
           ("ratio", ">7.2f"))


@dataclass
class GPUConfig:
    """The flags of tools.gpu."""
    minutes: float = flag(10, "time to fill; what it leaves no room for is said", low=0)
    what: list[str] | None = flag(
        None, "part of the work [both]", choices=["checks", "timings"])
    device: str = flag("auto", "where to run", choices=["auto", "cpu", "cuda"])
    json: str | None = flag(None, "file for checks and rows")


@dataclass
class Report:
    """What was found, as the file has it."""
    machine: dict                # what it runs on
    about: str = ABOUT
    checks: list = field(default_factory=list)       # {"check": its name, "outcome": ...}
    rows: list = field(default_factory=list)
    left_out: list = field(default_factory=list)     # names, with the reason


def save(report, path):
    """Write the report as it is now, if a file is wanted."""
    if path:
        write_json(path, {"argv": sys.argv[1:], **vars(report)})


# ---- the two parts

def run_checks(report, device, limit, chosen="test"):
    """Run tests/test_cuda.py for at most `limit` seconds; a line and an entry of the report
    for each check. In a process of its own: a check that breaks the state of the GPU breaks
    it for that process only. chosen: of which checks, as pytest's -k has it."""
    mine = "on_gpu" if device.type == "cuda" else "on_cpu"
    argv = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider",
            str(CHECKS), "-k", f"{mine} and ({chosen})"]
    process = subprocess.Popen(argv, cwd=CHECKS.parents[1], text=True,
                               env=os.environ | {"PYTHONUNBUFFERED": "1"},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    timer = threading.Timer(limit, process.kill)
    timer.start()
    try:
        failures = []                    # what pytest says of them, at its end
        for text in process.stdout:
            found = re.match(r"\S+::test_(\w+)\[(.+?)\] (PASSED|FAILED|ERROR|SKIPPED)",
                             text)
            if found:
                name, case, outcome = found.groups()
                case = case.removeprefix(mine).removeprefix("-")
                if case:
                    name += f" ({case})"
                name = name.replace("_", " ")
                report.checks.append({"check": name, "outcome": outcome.lower()})
                print(f"{outcome.lower():<9}{name}", flush=True)
            elif failures or re.match("=+ (FAILURES|ERRORS) =+", text):
                failures.append(text)
    finally:
        timer.cancel()
        process.kill()                   # after Ctrl-C; otherwise it has ended
    print("".join(failures), end="")
    # 0: all passed, 1: some failed; anything else: it did not come to its end
    status = process.wait()
    if status not in (0, 1) or not report.checks:
        report.left_out.append(f"checks after these {len(report.checks)} (pytest ended "
                               f"with status {status})")


def run_timings(report, device, ends, path):
    """Run the pieces, as long as there is time before `ends` (of perf_counter), with a line
    and a row of the report for each number."""
    print(f"\n{machine.header(COLUMNS)}", flush=True)
    for piece in pieces(device, report.machine):
        left = ends - perf_counter()
        if left < piece.needs:
            report.left_out.append(f"{piece.name} (may need {piece.needs} s)")
            continue
        # nothing of the piece before stays in memory
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            for row in piece.rows():
                # another device's predictions say nothing about a CPU
                if device.type == "cuda":
                    row["predicted"] = predicted(row)
                    if row["predicted"] and row["measured"] is not None:
                        row["ratio"] = row["measured"] / row["predicted"]
                report.rows.append(row)
                save(report, path)
                print(machine.line(row, COLUMNS), flush=True)
        except RuntimeError as e:        # out of memory, or the compiler's: go on
            reason = str(e).strip().split("\n")[0][:100]
            report.left_out.append(f"{piece.name} ({type(e).__name__}: {reason})")


def main():
    config = parse_flags(GPUConfig, __doc__)
    began = perf_counter()
    budget = 60 * config.minutes                                     # seconds
    device = start(config.device).device
    on_gpu = device.type == "cuda"
    if not on_gpu:
        print(REHEARSAL)
    found = machine.limits(device, torch.bfloat16 if on_gpu else torch.float32)
    print(machine.describe(found))
    if on_gpu:
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                  "gpus": torch.cuda.device_count()}
        print(f"CUDA {found['cuda']}, cuDNN {found['cudnn']}, GPUs: {found['gpus']}; "
              f"{ABOUT}", flush=True)

    report = Report(found)
    parts = config.what or ["checks", "timings"]
    if "checks" in parts:
        # with timings to follow, about two fifths of the time
        share = 0.4 if "timings" in parts else 1.0
        run_checks(report, device, share * budget)
        save(report, config.json)
    if "timings" in parts:
        run_timings(report, device, began + budget, config.json)
        print(f"\n{machine.header(COLUMNS)}")
        print("\n".join(machine.line(row, COLUMNS) for row in report.rows))
    save(report, config.json)

    # what was not done, and what failed
    for name in report.left_out:
        print(f"left out: {name}")
    failed = sum(one["outcome"] in ("failed", "error") for one in report.checks)
    print(f"{len(report.checks)} checks, {failed} failed; {len(report.rows)} numbers; "
          f"{len(report.left_out)} left out; {perf_counter() - began:.0f} s")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    command(main)
