"""README's picture: who is seen when, how fast each writes, what is underlined."""
import dataclasses
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

from common import ROOT
from helpers import call, refused
from test_lesson import save
from tools import race
from tools.animate import Trace
from tools.race import Writer

SVG = "{http://www.w3.org/2000/svg}"
WEIGHTS = ROOT / "weights"
STEPS = Trace("student", ["one", " sunny", " day", " ."], [2, 1, 2, 1], [0.0, 0.5, 1.0], 2)
EXACT = Trace("teacher", ["tom", " ran", " ."], [3, 1, 3], [0.0, 0.3, 0.6, 0.9], "exact",
              [["", " ran", " ."], ["anna", " ran", " ."], ["tom", " ran", " ."]])


def drawn(*writers):
    """The elements of the picture of some writers, and its style."""
    top = ElementTree.fromstring(race.picture(list(writers)))
    return top, "".join(style.text for style in top.iter(f"{SVG}style"))


def classes(element):
    return element.get("class", "").split()


# ---- when something is seen

def test_a_place_shows_a_mask_then_guesses_then_the_word():
    """Frame by frame, what stays the same as one; without guesses a mask and the word. Exact."""
    assert race.looks(STEPS, 0) == [("mask", "", 0, 2), ("word", "one", 2, None)]
    assert race.looks(EXACT, 0) == [("mask", "", 0, 2), ("guess", "anna", 2, 3),
                                    ("word", "tom", 3, None)]
    assert race.looks(EXACT, 1) == [("mask", "", 0, 1), ("word", "ran", 1, None)]
    assert race.looks(EXACT, 2) == [("mask", "", 0, 1), ("guess", ".", 1, 3),
                                    ("word", ".", 3, None)]


def test_moments_are_shares_of_the_cycle():
    """One class for each; what is there from the beginning is not hidden first. Exact."""
    moves = {}
    half = race.CYCLE / 2
    whens = (0, half), (half,), (0, half), (half, race.CYCLE)
    names = [race.seen(moves, *when) for when in whens]
    assert names == ["t0", "t1", "t0", "t2"]
    rules = race.keyframes(moves).splitlines()
    assert rules[0] == "@keyframes t0{0.00%{opacity:1}50.00%{opacity:0}}.t0{animation-name:t0}"
    assert rules[1] == "@keyframes t1{0%{opacity:0}50.00%{opacity:1}}.t1{animation-name:t1}"
    assert rules[2].startswith("@keyframes t2{0%{opacity:0}50.00%{opacity:1}100.00%{opacity:0}}")


@pytest.mark.parametrize("speed", [1.0, 2.0])
def test_who_is_twice_as_fast_is_done_in_half_the_time(speed):
    """Words, verdict and underline appear when their call is over, in equal shares of RUN / speed.
    Exact, to the style's two digits."""
    top, style = drawn(Writer(STEPS, [("the name is tom, not sunny", [1])], speed))
    at = {name: float(share) for share, name in re.findall(
        r"0%\{opacity:0\}([\d.]+)%\{opacity:1\}\}\.(t\d+)", style)}
    end = 100 * race.RUN / speed / race.CYCLE
    seen = {}
    for element in top.iter():
        for name in classes(element):
            if name in at:
                seen[element.text or element.get("class").split()[0]] = at[name]
    expected = {"one": end, "day": end, "sunny": end / 2, ".": end / 2, "fault": end}
    assert seen.keys() - expected.keys() == {race.verdict(Writer(STEPS, [("", [1])], speed))[0]}
    for name, share in expected.items():
        assert seen[name] == pytest.approx(share, abs=0.005)
    assert f"{end:.2f}%{{transform:scaleX(1)}}" in style


# ---- what is drawn

def test_faults_are_underlined_and_counted():
    """Each word at fault once, where it stands, with the number of reasons; none where there are
    none. Exact."""
    two = Writer(STEPS, [("a", [1]), ("b", [1, 2]), ("no ending", [])], 2.0)
    top, _ = drawn(two, Writer(STEPS, [], 1.0))
    lines = [path.get("d") for path in top.iter(f"{SVG}path")]
    begin, cell = race.MARGIN, race.CELL
    assert [line.split()[0] for line in lines] == [f"M{begin + 4 * cell}", f"M{begin + 10 * cell}"]
    assert [line.split("h")[1] for line in lines] == [f"{5 * cell}", f"{3 * cell}"]
    assert race.verdict(two) == ("2 calls, 2.0 × AR's speed, 3 contradictions", "bad")
    assert race.verdict(Writer(STEPS, [("a", [1])], 2.0))[0].endswith(", 1 contradiction")
    ar = Writer(dataclasses.replace(STEPS, steps=None), [], 1.0)
    assert race.verdict(ar) == ("2 calls, no contradiction", "good")


def test_text_is_no_markup_and_has_its_cells_in_any_font():
    """Signs of markup as text; a guess longer than the final word is squeezed into its room."""
    odd = Trace("x", ["<b>", " a&b"], [1, 1], [0.0, 1.0], 1)
    top, _ = drawn(Writer(odd, [], 1.0), Writer(EXACT, [], 1.0))
    texts = {text.text: text.get("textLength") for text in top.iter(f"{SVG}text")}
    assert texts["<b>"] == texts["a&b"] == texts["anna"] == texts["tom"] == str(3 * race.CELL)


# ---- the picture of README

def test_the_picture_is_what_its_command_makes_of_weights(tmp_path, capsys):
    """Byte by byte. A machine that rounds otherwise may draw another token, but hardly: the
    rounding of weights/ to half precision, thousands of times as large, changed one text of 40."""
    call(race, tmp_path / "race.svg")
    assert "race.svg is written" in capsys.readouterr().out
    assert (tmp_path / "race.svg").read_bytes() == (ROOT / "results/race.svg").read_bytes()


def test_the_picture_is_small_and_needs_nothing_else():
    """As an image on a page it has no scripts, fonts or other files; 500 kB at most. Exact."""
    text = (ROOT / "results/race.svg").read_text()
    assert len(text.encode()) < 500_000
    assert "<script" not in text and "@import" not in text and "@font-face" not in text
    assert not re.search(r"href|url\(|https?://(?!www\.w3\.org/2000/svg\")", text)
    assert "prefers-color-scheme: dark" in text and "prefers-reduced-motion" in text
    top = ElementTree.fromstring(text)
    heads = [text.text for text in top.iter(f"{SVG}text") if "head" in classes(text)]
    assert heads == ["AR", "teacher, 8 steps", "student, 8 steps", "teacher, exact"]


def test_seed_1_is_the_first_whose_stories_are_what_most_are():
    """Valid, or not, as more than half of the writer's stories in results/exact.json. Exact."""
    rows = json.loads((ROOT / "results/exact.json").read_text())["rows"]
    usual = []
    for model, steps in (("ar", None), ("teacher", 8), ("round 7", 8), ("teacher", "exact")):
        share, = [row["valid"] for row in rows if (row["model"], row["steps"]) == (model, steps)
                  and (row["trained_with_seed"], row["temperature"], row["ahead"]) == (0, 1, 8)
                  and row["max_calls"] is None]
        usual.append(share > 0.5)
    for seed in (0, 1):
        valid = [not writer.faults for writer in race.writers(WEIGHTS, seed)]
        assert (valid == usual) == (seed == 1)


def test_speeds_are_those_of_the_results(tmp_path, monkeypatch):
    """For one text, as bench.py has measured them; a row that is missing is named. Exact."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(race, "ROOT", tmp_path)
    ours = dict(engine="diffusion-exact", model="teacher", vs_ar=1.5)
    rows = [ours | {"batch": 8, "vs_ar": 9}, ours | {"batch": 1},
            {"engine": "ar", "batch": 1, "seconds": race.RUN / 123}]
    few = [dict(engine="diffusion-kv", model=model, steps=n, batch=1, vs_ar=n + more)
           for model, more in (("teacher", 0), ("round7", 0.5)) for n in (4, 8)]
    (tmp_path / "results" / race.TIMES).write_text(json.dumps({"rows": rows + few}))
    assert race.speeds() == [1.0, 8, 8.5, 1.5] and race.slowed() == 120
    (tmp_path / "results" / race.TIMES).write_text(json.dumps({"rows": rows + few[:1]}))
    with pytest.raises(race.UserError, match="diffusion-kv"):
        race.speeds()


def test_what_it_needs_is_said(tmp_path, capsys):
    """Students, a teacher with attention reveal, stories. Exact."""
    argv = [tmp_path / "race.svg", "--folder", tmp_path]
    assert "has no round file" in refused(capsys, race, *argv)
    for name, kind, attention in (("ar", "ar", "causal"), ("teacher", "mdlm", "full"),
                                  ("round1", "sdtt", "full")):
        save(tmp_path / f"{name}.pt", kind=kind, attention=attention)
    assert "has full attention" in refused(capsys, race, *argv)
    other = dict(kind="words", items=["a", "b"])
    save(tmp_path / "teacher.pt", kind="mdlm", attention="reveal")
    save(tmp_path / "ar.pt", kind="ar", attention="causal", tokenizer=other)
    assert "does not write stories" in refused(capsys, race, *argv)
    assert not (tmp_path / "race.svg").exists()


PROBE = """<script>
const visible = one => Number(getComputedStyle(one).opacity) > 0.5;
const words = [...document.querySelectorAll("svg text[textLength]")];
const report = [];
for (const time of TIMES) {
  for (const one of document.getAnimations()) { one.pause(); one.currentTime = 1000 * time; }
  report.push([words.filter(visible).map(one => one.textContent).join(" "),
               [...document.querySelectorAll("svg .mask")].filter(visible).length,
               [...document.querySelectorAll("svg .fault")].filter(visible).length]);
}
const box = document.querySelector("svg").getBoundingClientRect();
for (const one of words) {
  const word = one.getBoundingClientRect();
  if (word.left < box.left || word.right > box.right) report.push(one.textContent);
}
const out = document.createElement("pre");
out.id = "report";
out.textContent = JSON.stringify(report);
document.body.append(out);
</script>"""


def test_a_browser_shows_each_word_in_its_time(tmp_path):
    """In headless Chromium: of a student with 2 calls and an exact teacher with 3, just before and
    after each call and at the end, and no word is outside the picture. Skipped where Chromium is
    missing."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no Chromium")
    times = [0.1, race.RUN / 4 + 0.1, race.RUN / 2 + 0.1, race.RUN * 2 / 3 + 0.1, race.RUN + 0.1]
    svg = race.picture([Writer(STEPS, [("a", [1])], 2.0), Writer(EXACT, [], 1.0)])
    page = tmp_path / "page.html"
    page.write_text(svg + PROBE.replace("TIMES", json.dumps(times)))
    done = subprocess.run(
        [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
         f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{page}"],
        capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    assert json.loads(found[1]) == [
        ["", 7, 0], ["sunny .", 5, 0], ["one sunny day . ran .", 1, 1],
        ["one sunny day . anna ran .", 0, 1], ["one sunny day . tom ran .", 0, 1]]
