"""Comparisons at equal diversity: tools.envelope on rows made by hand. Nothing here is left to
chance: no test has a false alarm."""
import json
import math

import pytest

from data.measures import VERSION
from helpers import ROOT, call, refused
from sample import Sampling
from tools import envelope, exact


def row(model, temperature, diversity, ppl, steps=8, **more):
    """A row of tools.exact; its choices are ten times its entropy of all texts."""
    return dict(model=model, steps=steps, temperature=temperature, gen_ppl=ppl, gen_ppl_se=0.0,
                pooled_entropy=diversity, pooled_entropy_se=0.0, choices=10 * diversity,
                choices_se=0.0, divergence="kld", dataset="stories", trained_with_seed=0,
                folder="f", length=50, ahead=8, max_calls=None, version=VERSION,
                key=f"{model} {steps} {temperature}") | more


def rows():
    """The data at 4 nats. The teacher: ppl 1 at 2 nats, e^2 at 4. Round 1: e^0.5 from 3 to 4 nats.
    Round 2: ppl 1 from 2 to 3 nats. AR: 2 at 4 nats, 1.9 at 3.9. The teacher in 32 steps has one
    temperature, so it makes no curve."""
    return [row("data", None, 4, 1.0, None),
            row("ar", 1.0, 4, 2.0, None), row("ar", 0.5, 3.9, 1.9, None),
            row("teacher", 1.0, 3, 3.0, 32),
            row("teacher", 0.5, 2, 1.0), row("teacher", 1.0, 4, math.exp(2)),
            row("round 1", 0.5, 3, math.exp(0.5)), row("round 1", 1.0, 4, math.exp(0.5)),
            row("round 2", 1.0, 2, 1.0), row("round 2", 1.5, 3, 1.0)]


@pytest.mark.parametrize("key, scale", [("pooled_entropy", 1), ("choices", 10)])
def test_of_several_rounds_the_best_counts_at_equal_diversity(key, scale):
    """Log-perplexity is linear between neighbours, so these values are exact: 1e-9."""
    methods = envelope.curves_of(rows())
    assert list(methods) == ["AR", "teacher, 8 steps", "kld, 8 steps"]
    ppl, _, model = envelope.best_at(methods["teacher, 8 steps"], key, 3 * scale)
    assert ppl == pytest.approx(math.e, abs=1e-9) and model == "teacher"
    for wanted, best, by in ((3.5, math.exp(0.5), "round 1"), (2.5, 1.0, "round 2"),
                             (3.0, 1.0, "round 2")):
        ppl, _, model = envelope.best_at(methods["kld, 8 steps"], key, wanted * scale)
        assert ppl == pytest.approx(best, abs=1e-9) and model == by
    assert envelope.best_at(methods["kld, 8 steps"], key, 4.5 * scale) == (None, None, None)


def test_exact_sampling_that_was_stopped_or_looks_less_far_is_not_compared():
    """Nor are rows of other numbers of steps."""
    exact = dict(steps="exact", model="teacher")
    assert envelope.method_of(row(**exact, temperature=1, diversity=4, ppl=2,
                               ahead=1000)) == "teacher, exact"
    for more in (dict(ahead=8), dict(ahead=1000, max_calls=2)):
        assert envelope.method_of(row(**exact, temperature=1, diversity=4, ppl=2,
                                   **more)) is None
    assert envelope.method_of(row("teacher", 1, 4, 2, steps=16)) is None


def test_the_table_has_a_line_for_each_way_and_the_round_in_brackets(tmp_path, capsys):
    """Six levels between the data's entropy, 4, and the least at temperature 1, 2: the third is
    4 - 2 * 3/7. A way that does not come to a level has a dash."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": rows()}))
    call(envelope, path)
    text = capsys.readouterr().out
    assert "stories, seed 0: perplexity\nat entropy of all texts" in text and "at choices" in text
    line = next(line for line in text.splitlines() if line.startswith("kld, 8 steps"))
    assert line.count("(1)") == 3 and line.count("(2)") == 3
    assert f"{4 - 2 * 3 / 7:.2f}" in text
    line = next(line for line in text.splitlines() if line.startswith("AR"))
    assert line.split()[1:] == ["-"] * 6


def test_several_files_are_one_and_a_row_that_both_have_counts_once(tmp_path, capsys):
    """The students of another divergence in a file of their own, with the same data and teacher."""
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps({"rows": rows()}))
    other = []
    for one in rows():
        if one["model"].startswith("round"):
            one = one | {"divergence": "tvd", "key": "tvd " + one["key"]}
        other.append(one)
    second.write_text(json.dumps({"rows": other}))
    call(envelope, first, second)
    text = capsys.readouterr().out
    assert text.count("kld, 8 steps") == text.count("tvd, 8 steps") == text.count("teacher, 8") > 0


def test_a_rows_key_names_only_what_is_not_the_default():
    """So that a setting that is added to Sampling makes no saved row stale; and the rows under
    results/ have such keys."""
    assert exact.changed(Sampling(8, temperature=0.5)) == {"steps": 8, "temperature": 0.5}
    for path in sorted((ROOT / "results").glob("exact*.json")):
        for one in json.loads(path.read_text()).get("rows", []):
            if "key" in one:             # not of tools.evaluate's files
                how = json.loads(one["key"])[5]
                assert exact.changed(Sampling(**how)) == how and how["length"] == one["length"]


def test_a_picture_is_drawn_of_each_measure(tmp_path):
    """A file that is a PNG."""
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "rows.json", tmp_path / "e.png"
    path.write_text(json.dumps({"rows": rows()}))
    call(envelope, path, "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [{"model": "a"}]}'])
def test_other_files_are_refused_in_one_sentence(tmp_path, capsys, content):
    """With status 2; so are rows of one temperature, without data, or without temperature 1."""
    path = tmp_path / "other.json"
    path.write_text(content)
    assert "other.json" in refused(capsys, envelope, path)
    cooled = [one for one in rows() if one["temperature"] != 1]
    for some in (rows()[:2], rows()[1:], cooled):
        path.write_text(json.dumps({"rows": some}))
        assert "heat" in refused(capsys, envelope, path)


def test_each_dataset_and_seed_is_compared_by_itself_without_shorter_texts(tmp_path, capsys):
    """A second seed has its own data; rows of 16 tokens beside those of 50 are left out."""
    other = [dict(one, trained_with_seed=1) for one in rows()]
    short = [dict(one, length=16, pooled_entropy=1.0) for one in rows()[1:]]
    groups = envelope.groups_of(rows() + other + short)
    assert list(groups) == [("stories", 0), ("stories", 1)]
    assert groups["stories", 0] == rows() and groups["stories", 1] == other
