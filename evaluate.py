"""Quality of samples: what distill.py prints after each round.

Every number has a standard error beside it (NAME_se), and generative perplexity never stands
without entropy: a model that repeats itself pleases the judge. Token draws are in float64.
"""
import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common import seed_all, write
from data.dataset import make_tokenizer
from diffusion import categorical, sample
from model import generate, nll

BATCH = 32                           # sequences sampled at a time


def mean_se(values):
    """Mean of values (n,) and its standard error."""
    values = values.double()
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def make_judge(model, spec=None, tokenizer=None):
    """An AR model as a judge: f(x (n, L)) -> nats (n,), tokens (n,), what each text costs it and of
    how many of its tokens that is. spec: of the judge's tokenizer; where `tokenizer`, the texts',
    is another, they are decoded and encoded anew, and judged up to the judge's context."""
    same = tokenizer is None or spec == tokenizer.spec
    encode = None if same else make_tokenizer(spec).encode

    @torch.no_grad()
    def judge(x):
        rows = x.tolist() if same else [encode(tokenizer.decode(row))[:model.config.context]
                                        for row in x.tolist()]
        counts = torch.tensor([len(row) for row in rows], device=x.device)
        width = max(1, int(counts.max()))                # what stands beyond a text's end is
        y = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=x.device)
        within = torch.arange(width, device=x.device) < counts[:, None]      # not seen from it
        nats = [nll(model, part, model.mask_id) for part in y.split(BATCH)]
        return (torch.cat(nats) * within).sum(1).double(), counts
    return judge


def gen_ppl(judge, x):
    """Generative perplexity of x (n, L): exp of the judge's mean nats per token, and its SE."""
    nats, tokens = judge(x)
    mean = (nats.sum() / tokens.sum()).item()
    se = mean_se((nats - mean * tokens) / tokens.double().mean())[1]
    return math.exp(mean), math.exp(mean) * se


def entropy(x, vocab):
    """Entropy of each sequence's own token frequencies, x (n, L) -> mean in nats, and its SE.
    Below the data's it means repetition within a text."""
    counts = torch.zeros(len(x), vocab).scatter_add_(1, x, torch.ones(x.shape))
    return mean_se(torch.special.entr(counts / x.shape[1]).sum(1))


def pooled_entropy(x, vocab):
    """Entropy of the token frequencies of all of x (n, L) together, in nats, and its SE.
    Below the data's it means that the texts resemble each other, be each as rich as it may."""
    p = torch.bincount(x.flatten(), minlength=vocab) / x.numel()     # (V,)
    return mean_se(-p.log()[x].mean(1))      # the entropy is the mean of -log p over all tokens


def contradictions(x, data):
    """How many faults the dataset's oracle finds in each of x (n, L), (n,); None without one."""
    if data.oracle != "stories":
        return None
    from data.stories import language
    return torch.tensor([float(len(language.contradictions(data.tokenizer.decode(row).split())))
                         for row in x.tolist()])


def copies(x, data):
    """Which of x (n, L) are training texts word for word, (n,) bool; None where a text may begin
    anywhere."""
    if not data.texts or data.stride != x.shape[1]:
        return None
    samples = [row.astype(data.train.dtype).tobytes() for row in x.numpy()]
    rows = data.train[:len(data.train) // data.stride * data.stride].reshape(-1, data.stride)
    known = set(samples) & {row.tobytes() for row in rows}
    return torch.tensor([sample in known for sample in samples])


def measure(x, judge, data):
    """Everything about samples x (n, L): {"gen_ppl", "gen_ppl_se", "entropy", ..., "samples"}."""
    row, vocab = {"samples": len(x)}, data.tokenizer.vocab
    row["gen_ppl"], row["gen_ppl_se"] = gen_ppl(judge, x)
    x = x.cpu()
    row["entropy"], row["entropy_se"] = entropy(x, vocab)
    row["pooled_entropy"], row["pooled_entropy_se"] = pooled_entropy(x, vocab)
    faults = contradictions(x, data)
    for name, values in (("valid", None if faults is None else faults == 0),
                         ("contradictions", faults), ("copies", copies(x, data))):
        row[name], row[name + "_se"] = (None, None) if values is None else mean_se(values)
    return row


def draw_samples(model, n, steps, device, seed, title=None):
    """n sequences of the model's context (n, L): diffusion in `steps` steps, AR token by token.
    The same seed gives models of one shape the same order of reveal."""
    parts = range(0, n, BATCH)
    out = []
    for i in tqdm(parts, desc=title, disable=title is None, leave=False, ncols=90):
        seed_all(seed, "samples", steps, i)
        B = min(BATCH, n - i)
        if model.config.causal:
            prompt = torch.zeros((B, 0), dtype=torch.long, device=device)
            out.append(generate(model, prompt, model.config.context, categorical))
        else:
            z = torch.full((B, model.config.context), model.mask_id, device=device)
            out.append(sample(model, z, steps, model.mask_id))
    return torch.cat(out)


def evaluate(name, model, judge, data, steps, n, device, seed, context):
    """One row of results: n samples of a model (None: n texts of the validation data, of `context`
    tokens) measured."""
    began = time.time()
    if model is None:
        seed_all(seed, "data")
        x = data.batch("val", n, context, device)
    else:
        x = draw_samples(model, n, steps, device, seed, f"{name}, {steps} steps")
    return {"model": name, "steps": steps, **measure(x, judge, data),
            "seconds": round(time.time() - began, 2)}


def summary(row):
    """A row in one line of text."""
    text = f"{row['gen_ppl']:.2f} (±{row['gen_ppl_se']:.2f}) at entropy {row['entropy']:.2f}"
    if row["valid"] is not None:
        text += f", {row['valid']:.0%} valid, {row['contradictions']:.2f} contradictions"
    return text


LINES = (("gen_ppl", "entropy", "9.2f", "5.2f"), ("valid", "contradictions", "9.0%", "5.2f"),
         ("pooled_entropy", "copies", "9.2f", "5.0%"))   # of a model in the table


def table(rows):
    """Rows as text: for each model and number of steps generative perplexity and entropy; below,
    where there is an oracle, valid share and contradictions; below, pooled entropy and copies."""
    columns = sorted({row["steps"] for row in rows if row["steps"]})
    names = list(dict.fromkeys(row["model"] for row in rows))
    lines = [f"{'steps':10}" + "".join(f"{steps:>14}" for steps in columns)]
    for name in names:
        cells = {row["steps"]: row for row in rows if row["model"] == name}
        if None in cells:                                # data and AR have no number of steps
            cells = {columns[0]: cells[None]}
        for i, (left, right, *formats) in enumerate(LINES):
            line = name if i == 0 else ""
            for j, steps in enumerate(columns):
                values = [cells[steps][key] for key in (left, right)] if steps in cells else []
                cell = "".join(format(v, f) for v, f in zip(values, formats) if v is not None)
                line = f"{line:<{10 + 14 * j}}{cell}"
            lines += [line.rstrip()] if line.strip() else []
    return "\n".join(lines)


def draw_curve(rows, path):
    """Generative perplexity and both entropies against steps, a line per model, as a PNG file,
    where matplotlib is installed. Returns whether it was drawn."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    names = list(dict.fromkeys(row["model"] for row in rows))
    columns = sorted({row["steps"] for row in rows if row["steps"]})
    for axis, key, label in zip(axes, ("gen_ppl", "entropy", "pooled_entropy"),
                                ("generative perplexity", "unigram entropy within a text (nats)",
                                 "entropy of all texts together (nats)")):
        for i, name in enumerate(names):
            points = [(row["steps"], row[key], row[key + "_se"]) for row in rows
                      if row["model"] == name]
            color = {"data": "black", "ar": "grey"}.get(name, plt.cm.viridis(i / len(names)))
            if points[0][0] is None:
                axis.axhline(points[0][1], color=color, linestyle="--", label=name)
            else:
                axis.errorbar(*zip(*[(s, y) for s, y, _ in points]), [e for _, _, e in points],
                              color=color, marker="o", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(columns, columns)
        axis.set_xlabel("sampling steps")
        axis.set_ylabel(label)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    axes[0].yaxis.set_major_formatter("{x:g}")
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    write(path, lambda f: fig.savefig(f, format="png", dpi=120))
    plt.close(fig)
    return True


def draw_latency(rows, path):
    """bench.py's rows as SDTT's figure, a PNG file: generative perplexity against latency, a point
    for each number of steps; AR is a cross of lines. The smallest batch; needs matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    fig, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    batch = min(row["batch"] for row in rows)
    rows = [row for row in rows if "gen_ppl" in row and row["batch"] == batch]
    for name in dict.fromkeys(row["model"] for row in rows):
        x, y, labels = zip(*[(r["seconds"], r["gen_ppl"], r["steps"]) for r in rows
                             if r["model"] == name])
        if labels[0] is None:
            axis.axhline(y[0], color="grey", linestyle="--", label="AR with KV cache")
            axis.axvline(x[0], color="grey", linestyle="--")
            continue
        axis.plot(x, y, "o-", label=name)
        for point in zip(labels, zip(x, y)):
            axis.annotate(*point, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axis.set(xscale="log", yscale="log", xlabel=f"seconds for {batch} x {rows[0]['length']} tokens",
             ylabel="generative perplexity (numbers: steps)")
    axis.legend()
    write(Path(path), lambda f: fig.savefig(f, format="png", dpi=120))
    plt.close(fig)


def write_results(path, results):
    write(path, lambda f: f.write(json.dumps(results, indent=1).encode()))
