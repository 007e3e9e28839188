"""What stories choose: counts and entropies of sentences and words, as a table, a file, a picture."""
import json
import random
import types

import pytest
import torch

from data import dataset, measures
from data.dataset import make_tokenizer
from data.stories import language
from helpers import call, refused
from test_lesson import STORIES, save
from tools import choices

TOKENIZER = make_tokenizer(STORIES)
DATA = types.SimpleNamespace(oracle="stories", tokenizer=TOKENIZER)


def ids(stories):
    return torch.tensor([TOKENIZER.encode(" ".join(story)) for story in stories])


def told(n, seed=0):
    rng = random.Random(seed)
    return [language.generate(rng) for _ in range(n)]


def test_all_choices_are_those_that_stories_make():
    """Of 500 stories: no choice and no value outside the list, and each of them made by one of them
    at least (the rarest, a beat's or word's 0.04, is missing from 500 with a chance of 1e-9)."""
    made = {}
    for story in told(500):
        for choice, value in language.choices(story).items():
            made.setdefault(choice, set()).add(value)
    everything = language.all_choices()
    assert made == {choice: set(values) for choice, values in everything.items()}
    assert len(everything) == 14 and len({language.title(choice) for choice in everything}) == 14


def test_a_row_has_counts_in_the_languages_order_and_the_entropy_of_each_choice():
    """Three stories by hand, of one opening, with heroes tom, lily and tom, and no animal. Exact."""
    text = "one sunny day {} went to the park . then a cat ran ."
    x = ids(text.format(name).split() for name in ("tom", "lily", "tom"))
    row = choices.choice_row("m", x, DATA)
    assert list(row["counts"]) == list(row["entropies"]) == list(language.all_choices())
    assert list(row["counts"]["NAME"]) == language.NAMES
    assert (row["counts"]["NAME"]["lily"], row["counts"]["NAME"]["tom"]) == (1, 2)
    assert list(row["counts"]["opening"].values()) == [3, 0, 0]
    assert row["entropies"]["ANIMAL"] is None and row["entropies"]["PLACE"] == pytest.approx(0)
    assert row["entropies"]["NAME"] == pytest.approx(row["choices"])
    assert row["samples"] == 3 and sum(row["counts"]["ANIMAL"].values()) == 0
    assert "tom 67%" in choices.as_text([row])


def test_the_sum_of_a_rows_entropies_is_what_the_table_of_distill_has():
    """data.measures.measure's "choices", of 60 stories: the same number; and the sum of the row's
    own entropies, but for the correction's part beyond 1/n where few texts made a choice: 0.01."""
    x = ids(told(60))
    data = types.SimpleNamespace(oracle="stories", tokenizer=TOKENIZER, texts=False, stride=None)
    row, other = choices.choice_row("m", x, data), measures.measure(x, None, data)
    assert sum(row["entropies"].values()) == pytest.approx(row["choices"], abs=0.01)
    assert (other["choices"], other["choices_se"]) == (row["choices"], row["choices_se"])
    line = [line for line in measures.table([other | {"model": "m", "steps": None}]).splitlines()
            if "choices" in line]
    assert line == [f"{'':10}{'choices':16}{row['choices']:9.1f}"]
    data.oracle = None                                   # others have none, and no line
    other = measures.measure(x, None, data)
    assert other["choices"] is None
    assert "choices" not in measures.table([other | {"model": "m", "steps": None}])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a small dataset of stories, and an untrained teacher and student of it."""
    stories = told(60)
    flat = [i for row in ids(stories).tolist() for i in row]
    dataset.write_data(tmp_path / "stories", flat[:40 * 50], flat[40 * 50:], stride=50,
                       oracle="stories", tokenizer=STORIES)
    for name in ("teacher", "round1"):
        save(tmp_path / f"{name}.pt", tmp_path / "stories", "mdlm" if name == "teacher" else "sdtt")
    return tmp_path


def test_the_command_shows_the_data_first_and_writes_all_counts(folder, capsys):
    """A row for each number of steps, as many texts as asked for, of the data what there is (20).
    Exact."""
    call(choices, folder / "teacher.pt", folder / "round1.pt", "--steps", 2, 4, "--samples", 24,
         "--json", folder / "choices.json")
    shown = capsys.readouterr().out
    assert "choice" in shown and "sentence: opening" in shown and "all choices" in shown
    rows = json.loads((folder / "choices.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["data", "teacher, 2 steps", "teacher, 4 steps",
                                              "round1, 2 steps", "round1, 4 steps"]
    assert [row["samples"] for row in rows] == [20] + [24] * 4
    assert sum(rows[0]["counts"]["NAME"].values()) == 20 and rows[0]["choices"] > 10


def test_the_picture_has_a_panel_for_each_choice(folder, capsys):
    """With matplotlib; also where a model makes no choice at all. Exact."""
    pytest.importorskip("matplotlib")
    call(choices, folder / "teacher.pt", "--steps", 2, "--samples", 3, "--plot", folder / "c.png")
    assert (folder / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "c.png is written" in capsys.readouterr().out


def test_what_it_needs_is_said(folder, capsys):
    """A dataset with an oracle, attention for exact sampling, a picture of a known format. Exact."""
    row = ids(told(1))[0].tolist()
    (folder / "plain").mkdir()
    dataset.write_data(folder / "plain", row * 3, row * 3, stride=50, tokenizer=STORIES)
    for other in (folder / "plain", folder / "text.txt"):
        (folder / "text.txt").write_text((" ".join(language.VOCABULARY) + " ") * 3)
        assert "of the dataset stories only" in refused(capsys, choices, folder / "teacher.pt",
                                                        "--dataset", other)
    assert "full attention" in refused(capsys, choices, folder / "teacher.pt", "--steps", "exact")
    assert "--plot x.gif" in refused(capsys, choices, folder / "teacher.pt", "--plot", "x.gif")
