"""Which sentences and words a model chooses for its stories, beside those of the data.

    python -m tools.choices out/stories-nano/teacher.pt out/stories-nano/round7.pt --steps 8
    python -m tools.choices out/stories-nano/round7.pt --steps 8 --plot choices.png

A story has seven sentences, each of one of a few patterns, and up to seven words of its
own: who is the hero, which thing it is about, its colour. The entropy of all texts together
does not show which of these a model has given up; here each has its own entropy, and in the
picture its own bars. The oracle finds the sentences, also in stories that contradict
themselves.
"""
import dataclasses
import sys

from data.dataset import choices, make_tokenizer
from data.files import UserError, write_json
from data.measures import add_mean, choice_entropy, in_steps, tally
from data.processes import start
from data.script import command, device_flag, flag, parse_flags
from data.stories import language
from sample import Sampling, check_exact, draw_samples, steps_or_exact
from tools import figures
from tools.evaluate import open_data, open_models


@dataclasses.dataclass
class ChoicesConfig:
    """The flags of tools.choices."""
    checkpoint: list[str]                # the arguments without --
    steps: list[int | str] | None = flag(
        None, "diffusion steps [8], or exact: see sample.py", type=steps_or_exact)
    samples: int = flag(1024, "texts of each model, and of the data at most", low=2)
    temperature: float = flag(1.0, "divides the logits", low=0.01)
    seed: int = flag(0, "seed of the samples")
    dataset: str | None = flag(
        None, "folder of a dataset [the first checkpoint's]")
    plot: str | None = flag(None, "picture of all shares (needs matplotlib)")
    json: str | None = flag(None, "file for all counts")
    device: str = device_flag()


def choice_row(name, x, data):
    """What texts x (n, L) chose: {"model", "samples", "choices", "choices_se", "entropies":
    {choice: nats}, "counts": {choice: {value: texts}}}. Values are in the language's order,
    those that no text chose among them; a choice that no text made has the entropy None."""
    chosen = choices(x, data)
    counts = tally(chosen)
    row = {"model": name, "samples": len(x), "entropies": {}, "counts": {}}
    add_mean(row, "choices", choice_entropy(chosen))
    for choice, values in language.all_choices().items():
        # only texts that made this choice: not every story has an animal
        made = [{choice: text[choice]} for text in chosen if choice in text]
        row["entropies"][choice] = None
        if made:
            row["entropies"][choice], _ = choice_entropy(made)
        of_choice = counts.get(choice, {})
        row["counts"][choice] = {value: of_choice.get(value, 0) for value in values}
    return row


def favourite(counts):
    """The most frequent word of {word: number of texts} and its share, or nothing where
    there is no text."""
    total = sum(counts.values())
    if not total:
        return ""
    word = max(counts, key=counts.get)
    return f"{word} {counts[word] / total:.0%}"


def as_text(rows):
    """Rows of choice_row as a table: a line for each choice, with its entropy for each
    model, and of words the likeliest; then the sum."""
    lines = []
    for choice in language.all_choices():
        line = {"choice": language.title(choice)}
        for row in rows:
            entropy = row["entropies"][choice]
            line[row["model"]] = "" if entropy is None else f"{entropy:.2f}"
            if choice in language.WORDS:             # a sentence would be too long
                likeliest = favourite(row["counts"][choice])
                line[row["model"]] = f"{likeliest}  {line[row['model']]}"
        lines.append(line)
    # corrected over all texts at once, so not quite the sum of the lines above
    total = {"choice": "all choices"}
    for row in rows:
        total[row["model"]] = f"{row['choices']:.2f} ±{row['choices_se']:.2f}"
    columns = [("choice", "choice", "s")]
    columns += [(row["model"], row["model"], "s") for row in rows]
    return figures.rows_as_text([*lines, total], columns)


def measure_all(config, models, data, procs):
    """The rows of the data and of every model at every number of steps."""
    length = data.stride                 # tokens of a story
    # no story of the data twice
    available = len(data.val) // length
    rows = [choice_row("data", data.pieces(min(config.samples, available), length), data)]
    for name, model in models.items():
        columns = config.steps
        if model.config.causal:          # AR has no number of steps
            columns = [None]
        for steps in columns:
            title = name
            if steps:
                title = f"{name}, {in_steps(steps)}"
            sampling = Sampling(steps, config.seed, config.temperature, length=length)
            x = draw_samples(model, config.samples, sampling, procs, title=title)
            rows.append(choice_row(title, x, data))
    return rows


def main():
    config = parse_flags(ChoicesConfig, __doc__,
                         checkpoint="of train.py or distill.py, for the dataset stories")
    figures.check_picture(config.plot)
    config.steps = config.steps or [8]
    procs = start(config.device)
    opened = open_models(config, procs)
    _, content = next(iter(opened.values()))
    data = open_data(config, content, make_tokenizer(content["tokenizer"]), procs)
    if data.oracle != "stories":
        raise UserError("what texts choose is known of the dataset stories only; "
                        f"{data.folder} is another")
    models = {}
    paths = figures.names(config.checkpoint)         # {short name: path}
    for name, (model, _) in opened.items():
        check_exact(config.steps, None, model, paths[name])
        if model.config.context < data.stride:
            raise UserError(f"{paths[name]} writes at most {model.config.context} tokens, "
                            f"a story has {data.stride}")
        models[name] = model

    rows = measure_all(config, models, data, procs)
    if procs.rank > 0:
        return
    print(f"entropies in nats, of {rows[-1]['samples']} texts a model; of words also the "
          f"likeliest\n\n{as_text(rows)}")
    if config.json:
        write_json(config.json, {"argv": sys.argv[1:], "data": data.folder.name,
                                 "steps": config.steps, "seed": config.seed,
                                 "temperature": config.temperature, "rows": rows})
    if config.plot and figures.draw_choices(rows, config.plot):
        print(f"\n{config.plot} is written")


if __name__ == "__main__":
    command(main)
