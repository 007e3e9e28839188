"""The animation: what is recorded, and how terminal, web page and GIF show it."""
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch

import common
import sample
from cache import generate
from data import checkpoints
from data.dataset import make_tokenizer
from diffusion import categorical
from exact import sample_exact
from diffusion import sample as diffusion_sample
from helpers import call, refused
from model import ModelConfig, Transformer
from tools import animate
from tools.animate import Trace

WORDS = make_tokenizer(dict(kind="words", items=[f"w{i}" for i in range(10)]))
STORY = Trace("a model", ["one", " sunny", " day", " ."], [0, 2, 1, 2], [0.0, 0.25, 1.0], 4)


def network(attention="full", vocab=10, context=12):
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab, context, 1, 2, 16, attention=attention)).eval()


# ---- what is recorded

def own_law(logits):
    return logits


@pytest.mark.parametrize("attention", ["reveal", "causal"])
def test_exact_sampling_is_recorded_with_its_guesses(attention):
    """Same seed, same text; a frame is a call; what is final keeps its text, before that a guess is
    shown, in faint letters cut to the final token's room, and with blocks before the first call.
    Exact."""
    model, known = network(attention), torch.tensor([3, 4])
    torch.manual_seed(1)
    trace = animate.record(model, known, 10, "exact", own_law, WORDS, "x")
    torch.manual_seed(1)
    z = torch.full((1, 10), 10)
    z[0, :2] = known
    x, calls = sample_exact(model, z, 10, own_law, ahead=None)
    assert "".join(trace.texts) == WORDS.decode(x[0].tolist())
    assert len(trace.guesses) == len(trace.seconds) - 1 == calls == max(trace.opened)
    assert trace.opened[:2] == [0, 0] and trace.guesses[-1] == trace.texts
    for frame, texts in enumerate(trace.guesses, 1):
        assert all(texts[i] == trace.texts[i] for i in range(10) if trace.opened[i] <= frame)
    whole = animate.record(model, x[0], 10, "exact", own_law, WORDS, "x")
    assert whole.texts == trace.texts and whole.opened == [0] * 10 and not whole.guesses
    lines = animate.layout(trace.texts, 80)
    assert animate.BLOCK in animate.paint(lines, trace, 0, False)[0]
    first = animate.paint(lines, trace, 1, False)[0]
    assert animate.BLOCK not in first and first.split() == "".join(trace.guesses[0]).split()
    assert animate.style_of(trace, trace.opened.index(max(trace.opened)), 1) == "2"


def test_with_few_guesses_ahead_the_rest_has_none():
    """After each call at most what is final and two places more have text, the others "". Exact."""
    torch.manual_seed(1)
    known = torch.tensor([3])
    trace = animate.record_exact(network("reveal"), known, 10, own_law, WORDS, "x", ahead=2)
    before = 1                           # final ones, before a call
    for frame, texts in enumerate(trace.guesses, 1):
        guessed = sum(text != "" for text in texts)
        final = sum(opened <= frame for opened in trace.opened)
        assert before < final <= guessed <= 2 * before + 2
        before = final
    assert guessed == 10 and trace.guesses[-1] == trace.texts


@pytest.mark.parametrize("attention", ["full", "reveal"])
def test_a_recorded_text_is_the_one_that_the_sampler_writes(attention):
    """Same seed, same text; the prompt was there in frame 0; what opened when is what the sampler's
    plan says, so frames are as many as network calls. Exact."""
    model, known = network(attention), torch.tensor([3, 10, 4])      # with a gap
    torch.manual_seed(1)
    trace = animate.record(model, known, 12, 4, own_law, WORDS, "x")
    torch.manual_seed(1)
    z = torch.full((1, 12), 10)
    z[0, :3] = known
    x = diffusion_sample(model, z, 4, 10)
    assert "".join(trace.texts) == WORDS.decode(x[0].tolist())
    assert [trace.opened[i] for i in (0, 2)] == [0, 0] and min(trace.opened[3:]) >= 1
    assert set(trace.opened[3:] + trace.opened[1:2]) == set(range(1, len(trace.seconds)))
    assert trace.seconds == sorted(trace.seconds) and trace.seconds[0] == 0 and trace.steps == 4


def test_an_ar_model_is_recorded_from_left_to_right():
    """A token a frame after the prompt; the text is generate's. Exact."""
    model, known = network("causal"), torch.tensor([3, 4])
    torch.manual_seed(1)
    trace = animate.record(model, known, 6, None, own_law, WORDS, "x")
    torch.manual_seed(1)
    x = generate(model, known[None], 6, categorical)[0].tolist()
    assert trace.opened == [0, 0, 1, 2, 3, 4] and len(trace.seconds) == 5
    assert "".join(trace.texts) == WORDS.decode(x) and trace.steps is None


def test_pieces_are_the_text_also_where_a_character_has_several_tokens():
    """Bytes as tokens: a character comes with the last of its bytes; what is no character at the
    end is shown as such. Exact."""
    spec = dict(kind="bpe", pattern=r"\s|\S+", items=[bytes([i]).decode("latin-1")
                                                      for i in range(256)])
    tokenizer = make_tokenizer(spec)
    ids = list("aé漢b".encode())
    assert animate.pieces(tokenizer, ids) == ["a", "", "é", "", "", "漢", "b"]
    assert animate.pieces(tokenizer, ids[:2]) == ["a", "\ufffd"]
    assert animate.pieces(WORDS, [1, 2]) == ["w1", " w2"] and animate.pieces(WORDS, []) == []


# ---- the terminal

def plain(lines):
    return ["".join(c for c, _ in line) for line in lines]


def test_lines_end_before_a_token_that_does_not_fit():
    """Its space is dropped; a token wider than the terminal is broken; line ends are kept; a wide
    character has two cells. Exact."""
    assert plain(animate.layout(STORY.texts, 9)) == ["one sunny", "day ."]
    assert plain(animate.layout(["one", " sunny"], 3)) == ["one", " su", "nny"]
    assert plain(animate.layout(["a\nb", "c"], 9)) == ["a", "bc"]
    assert plain(animate.layout(["漢字", "x"], 4)) == ["漢字", "x"]
    assert plain(animate.layout(["ab"], 1)) == ["a", "b"] and plain(animate.layout([], 5)) == [""]


def test_text_cannot_steer_the_terminal():
    """Escape sequences, bells and carriage returns in a sample become dots. Exact."""
    assert animate.clean("a\x1b[2Jb\a\r\n\u200b") == "a·[2Jb··\n·"


def test_masks_are_blocks_and_tokens_have_the_colour_of_their_frame():
    """Without colour the text alone; with it what was given is bold, and the first and last frame
    have the ends of the scale. Exact."""
    lines = animate.layout(STORY.texts, 80)
    assert [animate.paint(lines, STORY, f, False)[0] for f in (0, 1, 2)] == [
        "one ░░░░░ ░░░ ░", "one ░░░░░ day ░", "one sunny day ."]
    last = animate.paint(lines, STORY, 2, True)[0]
    assert last == "\x1b[0;1mone\x1b[0;38;5;221m sunny\x1b[0;38;5;63m day\x1b[0;38;5;221m .\x1b[0m"
    first = animate.paint(lines, STORY, 1, True)[0]
    assert first.startswith("\x1b[0;1mone\x1b[0;2m ░░░░░")


def test_a_race_shows_where_each_was_at_one_time_and_steps_go_together_otherwise():
    """Frames of traces that took 1 and 4 seconds at half of the show. Exact."""
    slow = Trace("slow", ["a", "b"], [1, 2], [0.0, 1.5, 4.0], 2)
    assert animate.at_time([STORY, slow], 0.5, True) == [2, 1]
    assert animate.at_time([STORY, slow], 0.5, False) == [1, 1]
    assert animate.at_time([STORY, slow], 0, True) == [0, 0]
    assert animate.at_time([STORY, slow], 1, True) == [2, 2]


def test_elsewhere_than_in_a_terminal_the_frames_that_matter_are_printed():
    """Beginning, end and three between, without any escape sequence. Exact."""
    out = io.StringIO()
    animate.play([STORY], out=out)
    shown = out.getvalue()
    assert "\x1b" not in shown and shown.count("a model, 4 steps: call") == 5
    assert "call 0 of 2, 0.0 ms\none ░░░░░ ░░░ ░" in shown
    assert shown.rstrip().endswith("call 2 of 2, 1000.0 ms\none sunny day .")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("no_color", [False, True])
def test_in_a_terminal_frames_are_drawn_over_each_other(no_color, monkeypatch):
    """In place, the cursor back at the end, without colour where NO_COLOR is set, no line beyond
    the terminal's width or height. Exact."""
    monkeypatch.setattr(animate, "SECONDS", 0.2)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((20, 6)))
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    animate.play([Trace("x", ["word "] * 40, [1] * 40, [0.0, 1.0], 1)], out=out)
    shown = out.getvalue()
    assert shown.startswith("\x1b[?25l") and "\x1b[?25h" in shown[-20:]
    assert ("38;5;" in shown) != no_color
    frames = re.split(r"(?:\x1b\[\d+F)?\x1b\[J", shown)[1:]
    assert len(frames) == 2
    for frame in frames:
        lines = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", frame).splitlines()
        assert len(lines) <= 6 and max(map(len, lines)) <= 20 and "more lines" in frame


def test_the_animation_as_tmux_shows_it(tmp_path):
    """80 columns: after the end the status line and the text stand there once, no block is left.
    Skipped where tmux is missing."""
    if not shutil.which("tmux"):
        pytest.skip("no tmux")
    code = ("from tools import animate; animate.SECONDS = 0.5\n"
            "animate.play([animate.Trace('a model', ['word '] * 40, [1 + i % 3 for i in range(40)],"
            " [0.0, 0.1, 0.2, 0.3], 3)])")
    path = f"import sys; sys.path.insert(0, {str(common.ROOT)!r})\n"
    (tmp_path / "run.py").write_text(path + code)
    tmux = ["tmux", "-L", f"nano{os.getpid()}", "-f", "/dev/null"]
    run = f"{sys.executable} {tmp_path}/run.py; touch {tmp_path}/done; sleep 60"
    subprocess.run([*tmux, "new-session", "-d", "-x", "80", "-y", "24", run], check=True)
    try:
        for _ in range(600):
            if (tmp_path / "done").exists():
                break
            animate.time.sleep(0.1)
        shown = subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True,
                               check=True).stdout
    finally:
        subprocess.run([*tmux, "kill-server"])
    assert shown.count("a model, 3 steps: call 3 of 3, 300.0 ms") == 1
    assert shown.count("word") == 40 and animate.BLOCK not in shown


# ---- pages and pictures

def test_the_page_holds_everything_and_text_is_no_markup(tmp_path):
    """A sample with markup is data in the page, and cannot end its script; no address of another
    file is in it. Exact."""
    text = "</script><script>alert(1)</script><b>&amp;"
    animate.write_page([Trace("x", [text], [1], [0.0, 1.0], 1)], tmp_path / "new" / "page.html")
    page = (tmp_path / "new" / "page.html").read_text()
    assert "alert(1)</script>" not in page and page.count("<script") == 2
    data = re.search(r'id="data">(.*?)</script>', page, re.S)[1]
    assert json.loads(data)["panels"][0]["texts"] == [text]
    assert not re.search(r"https?://|src=|@import|url\(", page)


def test_a_long_animation_is_small(tmp_path):
    """1,024 tokens in 1,024 steps: under 3 MB (it was 60 kB). Exact."""
    n = 1024
    trace = Trace("x", [" token"] * n, list(range(1, n + 1)), [i / 7 for i in range(n + 1)], n)
    animate.write_page([trace] * 3, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3e6


PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("load", () => {
  const spans = [...document.querySelectorAll(".text span")];
  const seen = () => spans.map(span => span.className || "open").join(" ");
  const states = () => [...document.querySelectorAll(".state")].map(one => one.textContent).join();
  const report = {width: [document.documentElement.scrollWidth, innerWidth]};
  const play = document.getElementById("play"), seek = document.getElementById("seek");
  const to = value => { seek.value = value; seek.dispatchEvent(new Event("input")); };
  to(0); report.start = seen();
  to(500); report.half = [seen(), states()];
  to(1000); report.end = seen();
  to(500); report.back = seen();
  report.paused = play.textContent;
  to(0); play.click(); report.playing = play.textContent;
  setTimeout(() => {
    play.click();
    report.stopped = [play.textContent, Number(seek.value)];
    const color = getComputedStyle(document.body);
    report.colors = [color.color, color.backgroundColor];
    report.text = document.querySelector(".text").textContent;
    report.errors = errors;
    const out = document.createElement("pre");
    out.id = "report";
    out.textContent = JSON.stringify(report);
    document.body.append(out);
  }, 3000);
});
</script>"""


def luminance(color):
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(p * w for p, w in zip(parts, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("size, dark", [("1280,800", False), ("500,844", True)])
def test_the_page_plays_scrubs_and_pauses_in_a_browser(tmp_path, size, dark):
    """In headless Chromium, at the widths of a desk and of a phone (500 is the least that it
    opens), in both themes: no error, nothing wider than the window, each frame as the trace says,
    also backwards, text of a contrast of 7 or more. Skipped where Chromium is missing."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no Chromium")
    page = tmp_path / "page.html"
    text = Trace("<i>markup", ["one", " <b>sunny</b>", " day", " ."], [0, 2, 1, 2],
                 [0.0, 0.25, 1.0], 4)
    slow = Trace("AR", [" w"] * 100, list(range(1, 101)), [i / 50 for i in range(101)], None)
    animate.write_page([text, slow], page)
    page.write_text(page.read_text().replace("<main>", PROBE + "<main>"))
    done = subprocess.run(
        [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={size}",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=20000",
         f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{page}#0"],
        capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    report = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    first = [report[key].split()[:4] for key in ("start", "end", "back")]
    assert first == [["given"] + ["masked"] * 3, ["given"] + ["open"] * 3,
                     ["given", "masked", "open", "masked"]]
    half, states = report["half"]
    assert half.split()[:4] == first[2] and half.split()[4:] == ["open"] * 50 + ["masked"] * 50
    assert states == "network call 1 of 2, 250.0 ms,token 50 of 100, 1000.0 ms"
    assert report["errors"] == [] and report["width"][0] <= report["width"][1]
    assert (report["paused"], report["playing"]) == ("Play", "Pause")
    assert report["stopped"][0] in ("Play", "Again")
    assert report["text"] == "one <b>sunny</b> day ."
    light, back = sorted(map(luminance, report["colors"]), reverse=True)
    assert (light + 0.05) / (back + 0.05) >= 7
    assert (luminance(report["colors"][1]) < 0.2) == dark


def test_a_gif_has_frames(tmp_path, monkeypatch):
    """With matplotlib and pillow; skipped without."""
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(animate, "SECONDS", 1.0)
    animate.write_gif([STORY], tmp_path / "a.gif", fps=3)
    with image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames >= 3
    assert sorted(os.listdir(tmp_path)) == ["a.gif"]


# ---- the command

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    top = tmp_path_factory.mktemp("animate")
    for name, kind, attention in (("ar", "ar", "causal"), ("teacher", "mdlm", "full"),
                                  ("round1", "sdtt", "full"), ("round10", "sdtt", "full")):
        model = network(attention)
        checkpoints.save_checkpoint(
            top / f"{name}.pt", kind=kind, model_config=model.config.__dict__,
            model=model.state_dict(), ema=model.state_dict(), optimizer=[], step=1, steps=1,
            seconds=1.0, config={}, tokenizer=WORDS.spec)
    return top


def test_animate_shows_one_checkpoint_and_ar_from_left_to_right(made, capsys):
    """The text is the one that sample.py prints for the seed. Exact."""
    call(sample, made / "teacher.pt", "--num_samples", 1, "--steps", 4, "--seed", 3)
    text = capsys.readouterr().out
    call(animate, made / "teacher.pt", "--steps", 4, "--seed", 3)
    assert capsys.readouterr().out.strip().endswith(text.strip())
    call(animate, made / "ar.pt", "--prompt", "w1 w2")
    shown = capsys.readouterr().out
    assert "token 5 of 10" in shown and "w1 w2 ░░" in shown


def test_without_an_argument_the_models_in_weights_are_shown(capsys):
    """The student in 8 steps, the text that sample.py prints for it; in a race all of them, the
    teacher's exact samples as well. Exact."""
    call(sample, "--num_samples", 1)
    text = capsys.readouterr().out
    call(animate)
    shown = capsys.readouterr().out
    assert "round7, 8 steps: call 8 of 8" in shown
    assert " ".join(shown.split()).endswith(text.strip())
    call(animate, "--race")
    shown = capsys.readouterr().out
    assert shown.count("times AR's speed") == 4 and "student (round7), 8 steps: call 8" in shown
    assert "teacher, exact: call" in shown and "░" in shown


def test_a_folder_shows_teacher_and_last_student_and_a_race_ar_too(made, capsys, tmp_path):
    """Side by side at one number of steps; the race by measured times, with their ratio. Exact."""
    call(animate, made, "--html", tmp_path / "page.html", "--infill", "w1 _ w2")
    assert "page.html is written" in capsys.readouterr().out
    data = re.search(r'id="data">(.*?)</script>', (tmp_path / "page.html").read_text(), re.S)[1]
    panels = json.loads(data)["panels"]
    assert [(p["title"], p["steps"]) for p in panels] == [("teacher", 8), ("student (round10)", 8)]
    assert all(len(p["texts"]) == 3 and p["opened"][0] == 0 for p in panels)
    call(animate, made, "--race")
    shown = capsys.readouterr().out
    assert "teacher, 128 steps: call" in shown and "AR with KV cache: token" in shown
    assert len(re.findall(r"(?m)^[\w() ]+: [\d.]+ ms, [\d.]+ times AR's speed$", shown)) == 3


def test_a_guess_takes_the_room_of_the_final_token_also_where_a_line_begins():
    """Letter for letter, cut or filled up with spaces; a wide character has no narrow place."""
    trace = Trace("x", ["one", " tom", " ab"], [0, 1, 1], [0.0, 0.1, 0.2], "exact",
                  [["one", " sam", " abc"]])
    trace.opened[1] = trace.opened[2] = 2
    for width in (80, 4):                # in a line, and a line each
        shown = animate.paint(animate.layout(trace.texts, width), trace, 1, False)
        assert "\n".join(shown).split() == ["one", "sam", "ab"]
    trace.guesses = [["one", " \u4f60\u597d", " a"]]
    shown = animate.paint(animate.layout(trace.texts, 80), trace, 1, False)[0]
    assert animate.cells(shown) == animate.cells("".join(trace.texts)) and shown.split() == ["one", "a"]


def test_a_race_has_a_fourth_runner_where_the_teacher_can_sample_exactly(made, capsys, tmp_path):
    """And one checkpoint is shown exactly where it can, else refused. Exact."""
    for name in ("ar", "round1"):
        shutil.copy(made / f"{name}.pt", tmp_path)
    model = network("reveal")
    checkpoints.save_checkpoint(
        tmp_path / "teacher.pt", kind="mdlm", model_config=model.config.__dict__,
        model=model.state_dict(), ema=model.state_dict(), optimizer=[], step=1, steps=1,
        seconds=1.0, config={}, tokenizer=WORDS.spec)
    call(animate, tmp_path, "--race", "--html", tmp_path / "race.html", "--terminal")
    shown = capsys.readouterr().out
    assert "teacher, exact: call" in shown and shown.count("times AR's speed") == 4
    data = re.search(r'id="data">(.*?)</script>', (tmp_path / "race.html").read_text(), re.S)[1]
    assert [len(p["guesses"]) > 0 for p in json.loads(data)["panels"]] == [False] * 3 + [True]
    call(animate, tmp_path / "teacher.pt", "--steps", "exact", "--infill", "w1 _ w2")
    assert "teacher, exact: call" in capsys.readouterr().out
    assert "full attention" in refused(capsys, animate, made / "teacher.pt", "--steps", "exact")


@pytest.mark.parametrize("files, argv, words", [
    (["teacher", "round1"], ["--race"], "has no ar.pt; python distill.py makes them"),
    (["ar", "teacher"], ["--race"], "has no round file"),
    ([], [], "has no teacher.pt"),
])
def test_a_folder_without_the_files_is_refused(made, tmp_path, capsys, files, argv, words):
    """One sentence, nothing written. Exact."""
    for name in files:
        shutil.copy(made / f"{name}.pt", tmp_path)
    assert words in refused(capsys, animate, tmp_path, *argv)


def test_what_cannot_be_is_refused(made, tmp_path, capsys, monkeypatch):
    """A race of one file, a page where a file is in the way, a GIF without pillow. Exact."""
    assert "give the folder" in refused(capsys, animate, made / "ar.pt", "--race")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, animate, made / "ar.pt", "--html",
                                          tmp_path / "file" / "page.html")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "needs pillow" in refused(capsys, animate, made / "ar.pt", "--gif", tmp_path / "a.gif")


def test_a_race_takes_the_best_of_several_runs_in_turn():
    """Times as a busy machine gives them; the first run of each counts for nothing. Exact."""
    times = {"a": [1, 9, 5, 7, 6, 8], "b": [0, 4, 3, 9, 2, 9]}
    order = []

    def record(name):
        order.append(name)
        return types.SimpleNamespace(seconds=[0, times[name].pop(0)])
    best = animate.race([lambda: record("a"), lambda: record("b")])
    assert [trace.seconds[-1] for trace in best] == [5, 2]
    assert order == ["a", "b"] * 6


@pytest.mark.parametrize("load, warned", [(0.1, False), (50.0, True)])
def test_a_busy_machine_is_told(monkeypatch, load, warned):
    """By the system's load. Exact."""
    monkeypatch.setattr(animate.os, "getloadavg", lambda: (load, load, load))
    assert bool(animate.busy()) == warned
    monkeypatch.delattr(animate.os, "getloadavg")
    assert animate.busy() is None
