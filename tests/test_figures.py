"""Tables as text, rows compared at equal entropy, and pictures."""
import json
import math

import pytest

from data import measures
from data.files import UserError, write_json
from helpers import call, refused
from tools import figures


def rows(oracle):
    value = {"valid": 0.5, "contradictions": 1.25, "copies": 0.01} if oracle else dict.fromkeys(
        ("valid", "contradictions", "copies"))
    base = {"gen_ppl": 12.345, "gen_ppl_se": 0.1, "entropy": 3.21, "entropy_se": 0.01,
            "pooled_entropy": 4.04, "pooled_entropy_se": 0.01, "samples": 8, **value}
    return [{"model": "data", "steps": None, **base},
            *[{"model": "teacher", "steps": steps, **base} for steps in (8, 4)],
            {"model": "round 1", "steps": 8, **base}]


def test_table_puts_every_number_under_its_steps():
    """Columns in order of steps after one for data and AR, an empty cell where nothing was
    measured, each line with its label; without an oracle no lines for its verdict. Exact."""
    lines = measures.table(rows(oracle=True)).splitlines()
    assert lines[0].split() == ["sampling", "steps", "-", "4", "8"]
    assert lines[1].split() == ["data", "perplexity", "12.35"]
    assert lines[2].split() == ["entropy", "3.21"]
    assert [line.split()[-1] for line in lines[3:7]] == ["4.04", "50%", "1.25", "1%"]
    assert lines[7].split() == ["teacher", "perplexity", "12.35", "12.35"]
    assert lines[13].split() == ["round", "1", "perplexity", "12.35"]
    assert len(lines[13]) == len(lines[7]) > len(lines[1])       # round 1 has 8 steps only
    lines = measures.table(rows(oracle=False)).splitlines()
    assert [line.split()[-2] for line in lines[1:4]] == ["perplexity", "entropy", "all"]
    assert len(lines) == 1 + 3 * 3


def test_curve_is_a_png_and_its_absence_is_said(tmp_path, monkeypatch, capsys):
    """With matplotlib a picture; without it one sentence and no file. Exact."""
    import sys
    write_json(tmp_path / "results.json", {"rows": rows(True)})
    monkeypatch.setitem(sys.modules, "matplotlib", None)         # as if it were not installed
    assert "pip install matplotlib" in refused(capsys, figures, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    call(figures, tmp_path)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "curve.png is written" in capsys.readouterr().out


def test_results_are_plain_json(tmp_path):
    """What is written is what is read. Exact."""
    results = {"rows": [{"model": "a", "gen_ppl": 1.5, "valid": None}]}
    write_json(tmp_path / "results.json", results)
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_rows_as_text_aligns_numbers_and_leaves_out_empty_columns():
    """A standard error only where the row has one; a column without any value is not there. Exact.
    """
    rows = [{"model": "a", "steps": 8, "x": 1.25, "x_se": 0.5}, {"model": "bcd", "x": 10.0},
            {"model": "e", "steps": 16}]
    columns = [("model", "model", "s"), ("steps", "steps", "d"), ("X", "x", ".1f±"),
               ("Y", "y", ".1f±")]
    assert figures.rows_as_text(rows, columns).splitlines() == [
        "model  steps         X", "a          8  1.2 ±0.5", "bcd               10.0",
        "e         16"]


def sample_row(model, steps, T, gen_ppl, entropy, pooled=4.0):
    return {"model": model, "steps": steps, "temperature": T, "gen_ppl": gen_ppl, "gen_ppl_se": 0.0,
            "entropy": entropy, "entropy_se": 0.0, "pooled_entropy": pooled,
            "pooled_entropy_se": 0.0}


def test_rows_with_too_little_entropy_are_marked():
    """A model that repeats one sentence has the better perplexity, and the mark; a tenth of a nat
    is the border, under the data's or under the teacher's at as many steps. Exact."""
    rows = [sample_row("data", None, 1.0, 20.0, 3.5), sample_row("teacher", 8, 1.0, 30.0, 3.8),
            sample_row("teacher", 16, 1.0, 30.0, 3.5), sample_row("good", 8, 1.0, 22.0, 3.71),
            sample_row("repeats", 16, 1.0, 1.1, 1.0), sample_row("alike", 16, 1.0, 5.0, 3.5, 3.8),
            sample_row("low", 8, 1.0, 22.0, 3.69), sample_row("near", 16, 1.0, 5.0, 3.41, 3.91)]
    figures.mark(rows, "teacher")
    assert [row["low"] for row in rows] == ["", "", "", "", "text", "all", "text", ""]
    figures.mark(rows, None)                             # by the data alone
    assert [row["low"] for row in rows] == ["", "", "", "", "text", "all", "", ""]


def test_perplexity_at_equal_entropy_is_interpolated():
    """Half-way between two temperatures, in the logarithm; the pair nearest to temperature 1 where
    there are several; nothing out of reach. Exact."""
    rows = [sample_row("m", 8, T, ppl, h) for T, ppl, h in
            ((0.7, 4.0, 2.0), (0.9, 8.0, 3.0), (1.0, 16.0, 4.0), (1.1, 64.0, 3.0))]
    assert figures.at_entropy(rows, "entropy", 2.5)[0] == pytest.approx(math.sqrt(32))
    assert figures.at_entropy(rows, "entropy", 3.5)[0] == pytest.approx(math.sqrt(8 * 16))
    assert figures.at_entropy(rows, "entropy", 4.5) == (None, None)
    assert figures.at_entropy(rows[:1], "entropy", 2.0) == (None, None)


def test_error_at_equal_entropy_adds_those_of_both_ends_and_of_the_entropies():
    """By hand, half-way: log-perplexities 0 and 2 with errors 0.1 over entropies 1 and 2 with 0.2,
    wanted 1.5 with 0.3; slope 2. Exact."""
    rows = [sample_row("m", 8, 0.9, 1.0, 1.0) | {"gen_ppl_se": 0.1, "entropy_se": 0.2},
            sample_row("m", 8, 1.0, math.e ** 2, 2.0) | {"gen_ppl_se": 0.1 * math.e ** 2,
                                                         "entropy_se": 0.2}]
    value, se = figures.at_entropy(rows, "entropy", 1.5, 0.3)
    end = 0.5 ** 2 * (0.1 ** 2 + (2 * 0.2) ** 2)
    assert value == pytest.approx(math.e)
    assert se == pytest.approx(math.e * math.sqrt(2 * end + (2 * 0.3) ** 2))


def test_frontier_compares_at_the_teachers_entropy_at_most_steps():
    """The teacher itself comes out at its own perplexity; without a teacher the data's entropy is
    the measure. Exact."""
    rows = [sample_row("data", None, 1.0, 20.0, 2.2)]
    rows += [sample_row("teacher", steps, T, 10 * T * 32 / steps, 3 * T) for steps in (8, 32)
             for T in (0.9, 1.0, 1.1)]
    rows += [sample_row("student", 8, T, 5 * T, 2.8 * T) for T in (0.9, 1.0, 1.1)]
    found = {(r["model"], r["steps"]): r for r in figures.frontier(rows, "teacher")}
    assert found["teacher", 32]["at_entropy"] == pytest.approx(10)
    assert found["teacher", 32]["entropy"] == 3 and ("data", None) not in found
    assert 5 < found["student", 8]["at_entropy"] < 5.5
    assert figures.frontier(rows, None)[0]["entropy"] == 2.2


def test_pictures_of_frontier_and_latency_are_png_files(tmp_path):
    """With matplotlib. Exact."""
    pytest.importorskip("matplotlib")
    rows = [sample_row("data", None, 1.0, 20.0, 3.0)] + [
        sample_row("m", 8, T, 10 * T, 3 * T) for T in (0.9, 1.0)]
    figures.draw_frontier(rows, tmp_path / "frontier.png")
    rows = [{"model": name, "steps": steps, "batch": 1, "length": 8, "seconds": 1.0, "gen_ppl": 2.0,
             "engine": engine}
            for name, steps, engine in (("ar", None, "ar"), ("m", 8, "diffusion-kv"),
                                        ("m", 16, "diffusion-kv"), ("m", None, "diffusion-exact"),
                                        ("ar", None, "ar-exact"))]
    assert [figures.is_of(row) for row in rows[2:]] == [("m", False), ("m", True), ("ar", True)]
    figures.draw_latency(rows, tmp_path / "latency.png")
    for name in ("frontier", "latency"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_quality_against_calls_has_four_lines(tmp_path):
    """Teacher and last student in steps, the exact teacher with all ahead stopped and whole, AR one
    at a time and exact; cooled rows and other rounds are left out. A picture where there is matplotlib. Exact."""
    def row(model, steps, calls, T=1.0, ahead=8, max_calls=None):
        return sample_row(model, steps, T, 2.0 + 1 / calls, 3.0) | {
            "calls": calls, "ahead": ahead, "max_calls": max_calls, "folder": "f",
            "length": 50, "dataset": "stories", "trained_with_seed": 0}
    rows = [row("data", None, 1), row("ar", None, 50),
            row("ar", "exact", 12, ahead=10 ** 6), row("teacher", 32, 32), row("teacher", 8, 8),
            row("teacher", "exact", 7), row("teacher", "exact", 6, ahead=10 ** 6),
            row("teacher", "exact", 6, T=0.5, ahead=10 ** 6),
            row("teacher", "exact", 2, ahead=10 ** 6, max_calls=2), row("round 1", 8, 8),
            row("round 2", 8, 8), row("round 2", "exact", 5, ahead=10 ** 6)]
    found = {title: [one["calls"] for one in some] for title, some in figures.curves_of(rows).items()}
    assert found == {"teacher, in steps": [8, 32], "student, in steps": [8], "teacher, exact": [2, 6],
                     "AR, exact and as usual": [12, 50]}
    pytest.importorskip("matplotlib")
    figures.draw_exact(rows, tmp_path / "exact.png")
    assert (tmp_path / "exact.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("low, high", [(0.004, 0.009), (0.004, 0.03), (0.004, 1), (1.4, 3e4)])
def test_labels_of_a_logarithmic_axis_have_room(low, high):
    """Two neighbours are 7 % of the axis apart at least (4 inches wide: 0.28; 0.006 and 0.009 with
    four labels between them were 2 %), and there are two or more of them. Exact."""
    ticks = figures.log_ticks(low, high)
    assert len(ticks) >= 2 and low <= ticks[0] and ticks[-1] <= high
    gaps = [math.log(b / a) for a, b in zip(ticks, ticks[1:])]
    assert min(gaps) > 0.07 * math.log(high / low)


def test_names_tell_files_apart_by_as_few_folders_as_that_takes(tmp_path):
    """Same stem, same folder's name; a file given twice, also through a link, is there once."""
    (tmp_path / "a/kld").mkdir(parents=True)
    (tmp_path / "a/kld/round7.pt").touch()
    (tmp_path / "link.pt").symlink_to(tmp_path / "a/kld/round7.pt")

    def names(*paths):
        return list(figures.names([tmp_path / path for path in paths]))
    assert names("a/kld/round7.pt", "a/tvd/teacher.pt") == ["round7", "teacher"]
    assert names("a/kld/round7.pt", "a/tvd/round7.pt") == ["kld/round7", "tvd/round7"]
    assert names("a/kld/round7.pt", "b/kld/round7.pt") == ["a/kld/round7", "b/kld/round7"]
    assert names("round7.pt", "x/v1.5.pt") == ["round7", "v1.5"]
    assert names("a/kld/round7.pt", "x.pt", "a/kld/../kld/round7.pt", "link.pt") == ["round7", "x"]


def test_results_are_json_also_where_a_number_is_not_finite(tmp_path):
    """null stands for it."""
    write_json(tmp_path / "x.json", {"rows": [{"a": math.nan, "b": [math.inf, 1]}]})
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "rows": [{"a": None, "b": [None, 1]}]}


@pytest.mark.parametrize("name, begin", [("x.png", b"\x89PNG"), ("x.pdf", b"%PDF"),
                                         ("x.SVG", b"<?xml")])
def test_a_picture_has_the_format_of_its_name(tmp_path, monkeypatch, name, begin):
    """With matplotlib, also under a notebook's MPLBACKEND, which stays as it is. Exact."""
    pytest.importorskip("matplotlib")
    backend = "module://nowhere.backend_inline"
    monkeypatch.setenv("MPLBACKEND", backend)
    figures.check_picture(name)
    assert figures.draw_curve(rows(True), tmp_path / name) is True
    assert (tmp_path / name).read_bytes().startswith(begin)
    assert figures.os.environ["MPLBACKEND"] == backend


@pytest.mark.parametrize("name", ["x", "x.gif", "x.txt", "png"])
def test_a_picture_of_an_unknown_format_is_refused(name):
    """With the known ones. Exact."""
    with pytest.raises(UserError, match=f"--plot {name}.*.png, .pdf, .svg"):
        figures.check_picture(name)


def test_a_picture_that_fails_is_a_notice(tmp_path, monkeypatch, capsys):
    """Whatever goes wrong in matplotlib; nothing is half-written. A place that cannot be written
    stays an error of the user's."""
    pytest.importorskip("matplotlib")

    def fail(*args):
        raise RuntimeError("no font\nat all")
    monkeypatch.setattr(figures, "save_figure", fail)
    assert figures.draw_curve(rows(True), tmp_path / "curve.png") is False
    assert "matplotlib failed (RuntimeError: no font at all)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        figures.draw_curve(rows(True), tmp_path / "file" / "curve.png")
