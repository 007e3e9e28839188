"""AR decoding here beside that of packages which a user with a CPU might take instead: the
GPT-2 of `transformers` with its KV cache, and CTranslate2 in float32 and in int8.

    pip install transformers ctranslate2
    python -m tools.others --preset small --batch 1 8 32 --length 128 --json others.json

Random weights, as speed does not depend on them. Ours draws tokens in float64; the others
take the likeliest, which costs them less. Ours is compiled, and multiplies large matrices
by oneDNN where that is faster; transformers runs as it is installed. int8 rounds the
weights to 8 bits: it is another model, with a quarter of the bytes to read. Runs of all
alternate; shown are the median of their seconds, spread (the slowest less the fastest run,
as a share of the median), and how many times faster than ours they are, in the dtype that
suits ours best. roofline: see bench.py.
"""
import sys
import tempfile
from dataclasses import dataclass

import numpy as np
import torch

from bench import ar_engine
from data.files import write_json
from data.processes import start
from data.script import command, flag, package, parse_flags
from model import PRESETS, Transformer
from tools.bench_setup import default_dtypes, shape_of
from tools.fast_models import can_compile, forget_compiled, prepare
from tools.machine import describe, fill_times, header, limits, line, roofline, seconds

CPU = torch.device("cpu")
COLUMNS = (("engine", "<13"), ("dtype", "<9"), ("batch", ">5"), ("length", ">7"),
           ("seconds", ">8.3f"), ("spread", ">7.0%"), ("ms a token", ">11.1f"),
           ("vs ours", ">8.2f"), ("roofline", ">9.0%"))


@dataclass
class OthersConfig:
    """The flags of tools.others."""
    preset: str = flag("small", "size of all models", choices=list(PRESETS))
    engine: list[str] | None = flag(
        None, "beside ours [both]", choices=["transformers", "ctranslate2"])
    batch: list[int] | None = flag(None, "texts at a time [1 8 32]", low=1)
    length: int = flag(128, "tokens of a text", low=2)
    repeats: int = flag(3, "timed runs of each", low=1)
    threads: int | None = flag(None, "CPU threads [PyTorch's choice]", low=1)
    json: str | None = flag(None, "file for the rows")


# ---- the engines. Each makes a model of a shape (a ModelConfig), and returns a function
# engine(B) that returns a function without arguments, which writes B texts of L tokens and
# returns their ids

def ours(shape, L, dtype):
    """cache.generate as bench.py times it."""
    model = prepare(Transformer(shape), dtype, compiled=False, device=CPU)
    return lambda B: ar_engine(model, B, L, None, can_compile())


def transformers(shape, L, dtype):
    """Greedy decoding of the transformers package."""
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(
        n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
        vocab_size=shape.vocab, n_positions=shape.context + 1))
    model = model.to(getattr(torch, dtype)).eval()
    how = dict(max_new_tokens=L, min_new_tokens=L, do_sample=False, pad_token_id=0)

    def engine(B):
        prompt = torch.ones((B, 1), dtype=torch.long)    # it needs a token, not padding
        return lambda: model.generate(prompt, **how)[:, 1:]
    return engine


def ctranslate2(shape, L, dtype):
    """Greedy decoding of CTranslate2; dtype: "float32" or "int8"."""
    import ctranslate2
    # it loads the whole model at once, so the folder may go
    with tempfile.TemporaryDirectory() as folder:
        gpt2_spec(shape).save(folder)
        generator = ctranslate2.Generator(folder, device="cpu", compute_type=dtype,
                                          intra_threads=torch.get_num_threads())
    how = dict(max_length=L, min_length=L, sampling_topk=1, max_batch_size=0,
               include_prompt_in_result=False)

    def engine(B):
        def run():
            starts = [["0"] for _ in range(B)]
            results = generator.generate_batch(starts, **how)
            return torch.tensor([result.sequences_ids[0] for result in results])
        return run
    return engine


def gpt2_spec(shape):
    """CTranslate2's description of a GPT-2 of random weights."""
    from ctranslate2.specs import Activation, TransformerDecoderModelSpec
    C = shape.width
    rng = np.random.default_rng(0)

    def weights(*size):
        return rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)

    def fill_norm(norm):
        norm.gamma, norm.beta = np.ones(C, np.float32), np.zeros(C, np.float32)

    def fill_linear(linear, n_in, n_out):
        linear.weight, linear.bias = weights(n_out, n_in), np.zeros(n_out, np.float32)

    spec = TransformerDecoderModelSpec.from_config(
        shape.layers, shape.heads, pre_norm=True, activation=Activation.GELUTanh)
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights(shape.vocab, C)
    decoder.position_encodings.encodings = weights(shape.context + 1, C)
    for layer in decoder.layer:
        fill_norm(layer.self_attention.layer_norm)
        fill_linear(layer.self_attention.linear[0], C, 3 * C)        # queries, keys, values
        fill_linear(layer.self_attention.linear[1], C, C)
        fill_norm(layer.ffn.layer_norm)
        fill_linear(layer.ffn.linear_0, C, 4 * C)
        fill_linear(layer.ffn.linear_1, 4 * C, C)
    fill_norm(decoder.layer_norm)
    decoder.projection.weight = weights(shape.vocab, C)
    spec.register_vocabulary([str(i) for i in range(shape.vocab)])
    # any tokens: where a text would end is not looked at, see min_length
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    spec.optimize()
    return spec


# ---- the comparison

def engines_of(config):
    """[(name, dtype, engine)] of what the flags ask for."""
    shape = shape_of(config.preset, "causal", config.length)
    dtypes = default_dtypes(CPU)                         # bfloat16, too, where it gains
    wanted = [("ours", ours, dtypes), ("transformers", transformers, dtypes),
              ("ctranslate2", ctranslate2, ["float32", "int8"])]
    found = []
    for name, make, its_dtypes in wanted:
        if name != "ours" and name not in config.engine:
            continue
        for dtype in its_dtypes:
            found.append((name, dtype, make(shape, config.length, dtype)))
    return found


@torch.no_grad()
def compare(config, engines, B, machine):
    """The rows of one batch size. machine: see tools.machine.limits."""
    forget_compiled()
    shape = shape_of(config.preset, "causal", config.length)
    rows, runs, times = [], [], []
    for name, dtype, engine in engines:
        rows.append(dict(engine=name, dtype=dtype, preset=config.preset, batch=B,
                         length=config.length))
        runs.append(engine(B))
        runs[-1]()                                       # a warm-up, which compiles
        times.append([])
    for _ in range(config.repeats):
        for run, its_times in zip(runs, times):
            its_times.append(seconds(run, CPU))
    for row, its_times in zip(rows, times):
        fill_times(row, its_times)
        row["ms a token"] = 1000 * row["seconds"] / config.length
        row["roofline"] = None
        if row["dtype"] != "int8":       # how many bytes that reads is not known
            row["roofline"] = roofline(row | {"engine": "ar"}, shape, machine)
    best = min(row["seconds"] for row in rows if row["engine"] == "ours")
    for row in rows:
        row["vs ours"] = best / row["seconds"]
    return rows


def main():
    config = parse_flags(OthersConfig, __doc__)
    config.engine = config.engine or ["transformers", "ctranslate2"]
    config.batch = config.batch or [1, 8, 32]
    for name in config.engine:
        package(name)
    start("cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    machine = limits(CPU, torch.float32)
    print(describe(machine), flush=True)
    if not can_compile():
        print("no C++ compiler (g++), so ours is not compiled", flush=True)
    engines = engines_of(config)
    print(header(COLUMNS))
    rows = []
    for B in config.batch:
        new = compare(config, engines, B, machine)
        print("\n".join(line(row, COLUMNS) for row in new), flush=True)
        rows += new
        if config.json:
            write_json(config.json, dict(argv=sys.argv[1:], machine=machine, rows=rows))


if __name__ == "__main__":
    command(main)
