"""A script as its user meets it: flags, made from a dataclass, and errors of one sentence.

Each script has a dataclass of flags, a main() that parses them, and at its end
`command(main)`, which turns what the user can mend into one sentence and status 2.
"""
import argparse
import dataclasses
import importlib
import shlex
import sys
import typing

import torch.distributed as dist

from data.files import Output, UserError, release


# ---- running a script

GOES_ON = "stopped; the same command goes on from the last checkpoint"


def command(main, stopped="stopped"):
    """Run a script's main. What the user can mend ends in one sentence on stderr and status
    2, Ctrl-C in the sentence `stopped` (GOES_ON where a script has checkpoints) and status
    130."""
    # a closed pipe or a full disk is no fault of the script: see Output
    streams = sys.stdout, sys.stderr                                 # given back at the end
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr, needed=False)
    try:
        main()
        sys.stdout.flush()               # a full disk may show itself only now
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except (UserError, FloatingPointError) as e:     # the latter: a sampler met NaN
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except Exception as e:
        why = compiler_trouble(e)
        if why is None:                  # a fault of this code: let Python show where
            raise
        print(f"error: {why}", file=sys.stderr)
        sys.exit(2)
    finally:
        # leave nothing behind: streams, locks on files, processes that wait for this one
        sys.stdout, sys.stderr = streams
        release()
        if dist.is_initialized():
            dist.destroy_process_group()


def compiler_trouble(error):
    """A sentence for an exception that torch.compile raised; None for all others."""
    # the exception, what caused it, what caused that, ...
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # raise ... from, or while handling
    modules = [type(e).__module__ for e in chain]
    if not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in modules):
        return None
    # the first cause says most, in its first line
    kind = type(chain[-1]).__name__
    text = str(chain[-1]).strip() or kind
    return (f"torch.compile failed ({kind}: {text.splitlines()[0][:200]}); mend the C++ "
            "compiler (CXX names it), or go without: --no-compile")


def package(name):
    """An optional package, imported. Raises UserError where it is not installed."""
    try:
        # imported where it is used: most scripts need none of them
        return importlib.import_module(name)
    except ImportError:
        # some are installed under another name
        called = {"mauve": "mauve-text", "PIL": "pillow"}.get(name, name.split(".")[0])
        raise UserError(f"this needs {called} (pip install {called})")


# ---- flags: a dataclass whose fields are made by flag() is a script's command line

def flag(default, help, choices=None, low=None, high=None, type=None):
    """A dataclass field that is also a flag; low and high are the least and largest value.
    type: text -> value, where the field's annotation does not say it."""
    metadata = dict(help=help, choices=choices, low=low, high=high, type=type)
    return dataclasses.field(default=default, metadata=metadata)


def device_flag():
    """The flag --device, which data.devices.find_device explains."""
    return flag("auto", "where to run: auto (a CUDA GPU, or else the CPU), cpu, cuda, or "
                        "any device of PyTorch, such as mps")


EXACT = "exact"                          # instead of a number of steps: see exact.py


def steps_or_exact(text):
    """What --steps means: a number of steps, or EXACT."""
    if text == EXACT:
        return text
    # no sign, no fraction
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1 on, or "
                                         f"{EXACT!r}")
    return int(text)


def value_type(hint):
    """Of a field's annotation: the type of one value, and whether the flag takes several:
    int | None -> int, False; list[int] | None -> int, True."""
    arguments = typing.get_args(hint)
    if type(None) in arguments:
        hint = arguments[0]                                          # int | None -> int
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False                                               # int, str, float, bool


def parse_flags(Config, description, argv=None, **positional):
    """argv (sys.argv unless given) -> a Config. positional: name=help of arguments without
    --; one whose type has None may be left out. Exits with usage and status 2 on an
    unknown, ill-typed or out-of-range flag."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(Config)                            # types of the fields
    # those made by flag(); arguments without -- are plain fields
    fields = [field for field in dataclasses.fields(Config) if field.metadata]

    # arguments without --
    for name, text in positional.items():
        _, several = value_type(hints[name])
        nargs = None
        if several:                                  # list[str]: one or more
            nargs = "+"
        elif type(None) in typing.get_args(hints[name]):         # str | None: one or none
            nargs = "?"
        parser.add_argument(name, help=text, nargs=nargs)
    # flags
    for field in fields:
        kind, several = value_type(hints[field.name])
        if kind is bool:                 # --name and --no-name
            how = dict(action=argparse.BooleanOptionalAction)
        else:
            how = dict(type=field.metadata["type"] or kind,
                       choices=field.metadata["choices"], nargs="+" if several else None)
        text = field.metadata["help"]
        if field.default is not None:    # a default of None is explained in the text
            text += f" [{field.default}]"            # -h shows every default
        # argparse fills in what stands after a %
        parser.add_argument(f"--{field.name}", default=field.default,
                            help=text.replace("%", "%%"), **how)

    args = parser.parse_args(argv)       # exits on what it does not know
    for field in fields:
        check_range(parser, field, getattr(args, field.name))
    return Config(**vars(args))


def check_range(parser, field, values):
    """End with usage and status 2 if one of a flag's values is out of its range."""
    low, high = field.metadata["low"], field.metadata["high"]        # None: no limit
    allowed = f"{low} or more"
    if high is not None:
        allowed = f"between {low} and {high}"
    if not isinstance(values, list):
        values = [values]                # one value is a list of one
    for value in values:
        if value is None:
            continue
        # `not >=` instead of `<`: NaN is never in range
        too_low = low is not None and not value >= low
        too_high = high is not None and not value <= high
        if too_low or too_high:
            parser.error(f"argument --{field.name}: {value} is not {allowed}")


def as_command(script, config):
    """The command line that gives this config, of a script all of whose flags have one
    value."""
    defaults = dataclasses.asdict(type(config)())
    words = ["python", script]
    for name, value in dataclasses.asdict(config).items():
        # defaults are left out, but for --objective, which says what is trained
        if value == defaults[name] and name != "objective":
            continue
        # a switch is on or off, any other flag has a value
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")   # argparse's two forms
        else:
            words += [f"--{name}", str(value)]       # shlex.join quotes what needs it
    return shlex.join(words)
