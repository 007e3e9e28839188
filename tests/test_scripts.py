"""The scripts as a user meets them: imports, flags, bad input, sample.py.

Nothing here is left to chance but what is drawn from fixed seeds: no test has a false alarm unless
its docstring says so.
"""
import contextlib
import dataclasses
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
import common
import distill
import sample
import train
from data import checkpoints, prompts, script
from data.dataset import make_tokenizer, write_data
from helpers import call, make_dataset, refused
from model import ModelConfig, Transformer
from test_evaluate import save
from tools import evaluate, score

pytestmark = pytest.mark.usefixtures("small_nano")

ROOT = Path(common.__file__).resolve().parent
SCRIPTS = sorted(p.relative_to(ROOT).as_posix() for p in [
    *ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("data/**/*.py")])
TWO_WORDS = dict(kind="words", items=["a", "b"])
TINY = ["--device", "cpu", "--batch", "4", "--warmup", "1"]


@pytest.fixture(scope="module")
def made(small_nano, tmp_path_factory):
    """A folder with a dataset ("data") and, in "out", ar.pt and teacher.pt after two steps."""
    top = tmp_path_factory.mktemp("made")
    make_dataset(top / "data")
    for objective in ("ar", "mdlm"):
        call(train, "--dataset", top / "data", "--out", top / "out", "--objective", objective,
             "--steps", 2, *TINY)
    return top


# ---- imports, flags

def test_every_file_imports_silently():
    """No output, no warning, the random generator untouched and no file written."""
    modules = [name.removesuffix(".py").replace("/", ".") for name in SCRIPTS]
    before = sorted(ROOT.rglob("*.[!p]*"))
    code = ("import torch, importlib\nstate = torch.get_rng_state()\n"
            f"for name in {modules}: importlib.import_module(name)\n"
            "assert torch.equal(state, torch.get_rng_state())")
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(ROOT.rglob("*.[!p]*")) == before


CONFIGS = {"train": train.TrainConfig, "distill": distill.DistillConfig,
           "sample": sample.SampleConfig, "bench": bench.BenchConfig,
           "evaluate": evaluate.EvaluateConfig, "score": score.ScoreConfig}


@pytest.mark.parametrize("name", CONFIGS)
def test_help_lists_every_flag_with_its_default(name):
    """-h ends with status 0 and shows each field of the script's dataclass."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as stop:
        script.parse_flags(CONFIGS[name], "about", ["-h"], **(
            {"checkpoint": "a file"} if name in ("sample", "evaluate", "score") else {}))
    shown = " ".join(text.getvalue().split())
    assert stop.value.code == 0
    for field in dataclasses.fields(CONFIGS[name]):
        assert not field.metadata or f"--{field.name}" in shown
        if field.metadata and field.default is not None:
            assert f"[{field.default}]" in shown


@pytest.mark.parametrize("argv, named", [
    (["--nonsense", "1"], "--nonsense"), (["--lr", "fast"], "--lr"), (["--batch", "0"], "--batch"),
    (["--batch", "2.5"], "--batch"), (["--preset", "huge"], "--preset"), (["--lr", "nan"], "--lr"),
    (["--divergence", "l2"], "--divergence"), (["--rounds", "-1"], "--rounds"),
    (["--dropout", "1.5"], "--dropout"), (["extra"], "extra"), (["--rounds"], "--rounds")])
def test_bad_flag_ends_with_usage_and_its_name(argv, named, capsys):
    """Unknown, ill-typed, out of range, without a value."""
    with pytest.raises(SystemExit) as stop:
        script.parse_flags(distill.DistillConfig, "", argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("usage:") and named in error.splitlines()[-1]


def test_defaults_and_given_flags_reach_the_config():
    """int | None, bool with --no-, and the default that depends on the preset."""
    c = script.parse_flags(distill.DistillConfig, "", [])
    assert c == distill.DistillConfig() and c.teacher_steps == 256
    assert [distill.DistillConfig(preset=p).teacher_steps for p in ("mini", "small")] == [256, 1024]
    c = script.parse_flags(distill.DistillConfig, "", ["--preset", "small", "--no-bf16",
                                                       "--reset_optimizer", "--context", "128"])
    assert (c.teacher_steps, c.bf16, c.reset_optimizer, c.context) == (1024, False, True, 128)


def test_an_argument_may_be_left_out_where_its_type_says_so():
    """str | None; of str and list[str] one is needed. Exact."""
    @dataclasses.dataclass
    class Optional:
        file: str | None

    assert script.parse_flags(Optional, "", [], file="") == Optional(None)
    assert script.parse_flags(Optional, "", ["a"], file="") == Optional("a")
    for kind in (str, list[str]):
        needed = dataclasses.make_dataclass("Needed", [("file", kind)])
        with pytest.raises(SystemExit) as stop:
            script.parse_flags(needed, "", [], file="")
        assert stop.value.code == 2


# ---- bad input

def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("argv, named", [
    (["--dataset", "nowhere"], "nowhere"),
    (["--rounds", "9"], "--rounds 9"),
    (["--rounds", "4", "--k", "8"], "--k 8"),
    (["--teacher", "{out}/ar.pt"], "ar.pt"),
    (["--judge", "{out}/teacher.pt"], "teacher.pt"),
    (["--teacher", "{out}/none.pt"], "none.pt"),
    (["--samples", "1"], "--samples 1"),
    (["--batch", "6", "--micro_batch", "4"], "--batch 6")])
def test_distill_refuses_what_it_cannot_do(made, tmp_path, capsys, argv, named):
    """One sentence with the name of what is wrong, before anything is trained or written."""
    argv = [a.format(out=made / "out") for a in argv]
    out = tmp_path / "out"
    if "--batch" in argv:                            # judge and teacher are there
        shutil.copytree(made / "out", out)
    before = snapshot(out)
    message = refused(capsys, distill, *TINY, "--dataset", made / "data", "--out", out, *argv)
    assert named in message
    assert {p: b for p, b in snapshot(out).items() if p.suffix == ".pt"} == {
        p: b for p, b in before.items() if p.suffix == ".pt"}


def test_without_samples_there_are_rounds_and_no_table(made, tmp_path, capsys):
    """No judge is trained or asked for, the rounds are those of a run with a table. Exact."""
    argv = [*TINY, "--dataset", made / "data", "--teacher", made / "out/teacher.pt", "--rounds", 1,
            "--teacher_steps", 4, "--steps_per_round", 2]
    call(distill, *argv, "--samples", 0, "--out", tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["round1.jsonl", "round1.pt"]
    call(distill, *argv, "--samples", 4, "--judge", made / "out/ar.pt", "--out", tmp_path / "b")
    one, two = (checkpoints.load_checkpoint(tmp_path / name / "round1.pt")["ema"] for name in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "b/results.json").exists()


def test_distill_says_first_which_files_it_uses_and_how_much_there_is_to_do(made, tmp_path, capsys):
    """Before anything runs: its first line names data, teacher, judge and results. No false alarm."""
    argv = [*TINY, "--dataset", made / "data", "--teacher", made / "out/teacher.pt", "--rounds", 2,
            "--teacher_steps", 4, "--steps_per_round", 1, "--samples", 0, "--out", tmp_path / "new"]
    capsys.readouterr()
    call(distill, *argv)
    files, work = capsys.readouterr().out.splitlines()[:2]
    for named in (made / "data", made / "out/teacher.pt", "no table", tmp_path / "new"):
        assert str(named) in files
    assert "2 rounds of 1 optimizer steps" in work and "from 4 sampling steps to 1" in work


def test_teacher_of_another_vocabulary_or_length_is_refused(made, tmp_path, capsys):
    """A dataset of 11 words, then one of longer texts, with the teacher of 10 words and 12."""
    teacher = ["--teacher", made / "out/teacher.pt", "--out", tmp_path / "out", *TINY]
    for folder, words, stride, named in (("more", 11, 12, "11"), ("longer", 10, 15, "15")):
        items = [f"w{i}" for i in range(words)]
        write_data(tmp_path / folder, [1] * 60, [1] * 60, stride=stride,
                   tokenizer=dict(kind="words", items=items))
        message = refused(capsys, distill, "--dataset", tmp_path / folder, *teacher)
        assert "teacher.pt" in message and named in message
    assert not (tmp_path / "out").exists()


def test_judge_shorter_than_the_teacher_is_refused(tmp_path, capsys):
    """Texts of 16 tokens cannot be judged by a model of 8."""
    write_data(tmp_path / "data", [1] * 200, [1] * 200, tokenizer=TWO_WORDS)
    flags = ["--dataset", tmp_path / "data", *TINY]
    call(train, *flags, "--out", tmp_path / "a", "--objective", "ar", "--context", 8, "--steps", 1)
    call(train, *flags, "--out", tmp_path / "a", "--context", 16, "--steps", 1)
    assert "judge" in refused(capsys, distill, *flags, "--out", tmp_path / "a")


def test_dataset_smaller_than_one_context_is_refused(tmp_path, capsys):
    """The sentence names the file and the two sizes."""
    write_data(tmp_path / "data", [1] * 40, [1] * 40, tokenizer=TWO_WORDS)
    message = refused(capsys, train, "--dataset", tmp_path / "data", "--out", tmp_path / "out")
    assert "train.bin has 40 tokens" in message and "64" in message
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written_is_refused(made, tmp_path, capsys):
    """--out below a file: whoever runs the test, that cannot be made."""
    (tmp_path / "file").write_text("kept")
    message = refused(capsys, train, *TINY, "--dataset", made / "data", "--out",
                      tmp_path / "file/out")
    assert str(tmp_path / "file/out") in message and (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("module", [train, distill])
def test_cuda_asked_for_and_absent_is_refused(module, capsys):
    """With the way out."""
    assert "--device cpu" in refused(capsys, module, "--device", "cuda")


# ---- sample.py

def text(capsys, made, name, *argv):
    """Lines of text that sample.py prints for a checkpoint."""
    capsys.readouterr()
    call(sample, made / "out" / name, "--device", "cpu", *argv)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["ar.pt", "teacher.pt"])
def test_samples_have_the_length_the_prompt_and_the_seed_asked_for(made, capsys, name):
    """The same seed gives the same text, another seed another one (10^9 texts or more)."""
    argv = ["--num_samples", 3, "--length", 11, "--prompt", "w3 w1"]
    lines = text(capsys, made, name, *argv)
    assert len(lines) == 3 and len(set(lines)) > 1
    assert all(len(line.split()) == 11 and line.startswith("w3 w1 ") for line in lines)
    assert text(capsys, made, name, *argv) == lines
    assert text(capsys, made, name, *argv, "--seed", 1) != lines


def test_infilling_keeps_the_words_and_fills_gaps_of_the_lengths_given(made, capsys):
    """Underscores counted, or a number between underscores, as many gaps as one likes."""
    for line in text(capsys, made, "teacher.pt", "--infill", "w1 __ w2 w3 _4_ w4 _"):
        words = line.split()
        assert len(words) == 2 + 4 + 1 + 4
        assert (words[0], words[3], words[4], words[9]) == ("w1", "w2", "w3", "w4")


CHARS = make_tokenizer(dict(kind="chars", items=sorted(set("file_name is\n."))))


@pytest.mark.parametrize("infill, expected", [
    ("file_name is __.\n", "file_name is __.\n"), ("_ is\n__ file", "? is\n?? file"),
    ("file_name _3_ _", "file_name ??? ?"), ("_is is_ _i_", "_is is_ _i_")])
def test_a_gap_stands_alone_and_all_else_is_kept(infill, expected):
    """Characters, "?" for a mask: underscores within a word are text, and line ends stay. Exact."""
    ids = prompts.parse_infill(infill, CHARS, 99)
    assert "".join("?" if i == 99 else CHARS.decode([i]) for i in ids) == expected


def test_only_the_space_before_a_gap_belongs_to_it():
    """Where tokens begin with a space: one space is the gap's, line ends and other spaces stay."""
    spec = dict(kind="bpe", pattern=r"\s?\S+|\s", items=[chr(i) for i in range(256)])
    ids = prompts.parse_infill("a _ b\n_ c  _", make_tokenizer(spec), 999)
    assert "".join("?" if i == 999 else chr(i) for i in ids) == "a? b\n? c ?"


@pytest.mark.parametrize("kind", ["bpe", "chars"])
def test_space_at_the_end_of_a_prompt_is_left_out_where_words_begin_with_theirs(capsys, kind):
    """And it is said, once; of characters it is one. Exact."""
    spec = dict(kind="chars", items=["a", " "])
    if kind == "bpe":
        spec = dict(kind="bpe", pattern=r"\s?\S+|\s", items=[chr(i) for i in range(256)])
    c = sample.SampleConfig(checkpoint="x.pt", prompt="a  ")
    model = Transformer(ModelConfig(257, 8, 1, 1, 2))
    for _ in range(2):
        n = len(prompts.known_tokens(c, model, make_tokenizer(spec)))
        assert n == (1 if kind == "bpe" else 3)
    assert capsys.readouterr().err.count("belongs to the token that follows") == (kind == "bpe")


def test_low_temperature_and_small_top_p_give_the_likeliest_words(made, capsys):
    """At top_p = 0.01 nothing is left to chance for an AR model: all samples are the greedy one."""
    assert len(set(text(capsys, made, "ar.pt", "--top_p", 0.01, "--num_samples", 5))) == 1
    assert len(set(text(capsys, made, "ar.pt", "--num_samples", 5))) > 1


@pytest.mark.parametrize("name, argv, named", [
    ("teacher.pt", ["--prompt", "w1 dragon"], "'dragon'"),
    ("teacher.pt", ["--prompt", "w1 " * 13], "--prompt has 13"),
    ("teacher.pt", ["--infill", "w1 _20_"], "--infill has 21"),
    ("teacher.pt", ["--length", 13], "--length 13"),
    ("teacher.pt", ["--prompt", "w1", "--infill", "_"], "--infill"),
    ("ar.pt", ["--infill", "w1 _"], "autoregressive"),
    ("teacher.pt", ["--steps", "exact"], "--attention reveal --teacher"),
    ("ar.pt", ["--max_calls", 3], "--steps exact"),
    ("absent.pt", [], "absent.pt"), ("../data/train.bin", [], "train.bin")])
def test_sample_refuses_what_it_cannot_write(made, capsys, name, argv, named):
    """One sentence that names the flag, the word or the file."""
    assert named in refused(capsys, sample, made / "out" / name, "--device", "cpu", *argv)


def test_steps_are_a_number_or_exact(made, capsys):
    """Anything else ends with usage, the word and status 2."""
    for steps in ("all", "0", "-3", "2.5"):
        with pytest.raises(SystemExit) as stop:
            call(sample, made / "out/ar.pt", f"--steps={steps}")
        assert stop.value.code == 2 and repr(steps) in capsys.readouterr().err


def test_exact_samples_say_what_they_cost(made, capsys):
    """AR's, with a prompt: as many lines as without, the number of calls on stderr; stopped early it
    says that this is not exact. No chance involved."""
    argv = ["--device", "cpu", "--steps", "exact", "--prompt", "w1 w2", "--num_samples", 3]
    call(sample, made / "out/ar.pt", *argv)
    out, error = capsys.readouterr()
    assert out.count("\n") == 3 and all(line.startswith("w1 w2 w") for line in out.splitlines())
    assert "calls of the network" in error and "not exact" not in error
    call(sample, made / "out/ar.pt", *argv, "--max_calls", 1)
    assert "1 at most; a text that was cut off there is not exact" in capsys.readouterr().err


def test_without_a_checkpoint_the_student_in_weights_writes_in_8_steps(capsys):
    """The same texts as with its path, also with other flags; in 8 steps, not in the 2 that it was
    made for. Exact."""
    two, few = ["--num_samples", 2], ["--steps", 2]
    for flags, same in ([], ["--steps", 8]), (two, [*two, "--steps", 8]), (few, few):
        call(sample, *flags)
        alone = capsys.readouterr().out
        call(sample, ROOT / "weights/round7.pt", *same)
        assert capsys.readouterr().out == alone and alone.count("lily") > 1


def test_a_terminal_shows_how_the_text_comes_about_where_nothing_is_asked_for(capsys, monkeypatch):
    """tools.animate does, which test_animate looks at; with any flag the text is printed. Exact."""
    ran = []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sample.runpy, "run_module", lambda name, **how: ran.append(name))
    call(sample)
    assert ran == ["tools.animate"] and not capsys.readouterr().out
    call(sample, "--num_samples", 1)
    assert ran == ["tools.animate"] and "lily" in capsys.readouterr().out


def test_a_checkpoint_alone_is_enough_to_sample(made, tmp_path, capsys):
    """Moved away from its dataset, it still has its tokenizer."""
    (tmp_path / "out").mkdir()
    shutil.copy(made / "out/teacher.pt", tmp_path / "out/teacher.pt")
    assert len(text(capsys, tmp_path, "teacher.pt", "--steps", 3)) == 4


@pytest.mark.parametrize("ids, P, shown", [
    ([1, 2, 9, 3, 9], 0, [1, 2]), ([1, 2, 3], 0, [1, 2, 3]), ([1, 2, 9, 3], 2, [1, 2]),
    ([1, 2, 3, 9, 4], 2, [1, 2, 3]), ([1, 9, 2, 9, 3], 2, [1, 9, 2]), ([1, 2], 2, [1, 2]),
    ([9, 9, 1, 2, 9, 3], 0, [1, 2]), ([9, 9], 0, []), ([], 0, [])])
def test_a_text_is_cut_at_the_first_end_after_its_prompt(ids, P, shown):
    """9 is the end. Without any the text stays whole; before all else it begins the text. Exact."""
    assert prompts.up_to_end(ids, P, 9) == shown


@pytest.mark.parametrize("kind", ["ar", "mdlm"])
def test_until_end_shows_the_same_texts_up_to_their_ends(tmp_path, capsys, kind):
    """Of a model that writes a to e and, in one of six places, <end>: with the same seed, with a
    prompt and without, what stands before the first <end> in the texts that are shown in full; some
    of 30 texts of 8 have none, and some have one."""
    spec = dict(kind="bpe", pattern=r"\S", items=[chr(i) for i in range(256)])
    attention = "causal" if kind == "ar" else "full"
    model = Transformer(ModelConfig(257, 8, 1, 1, 2, attention=attention))
    torch.nn.init.constant_(model.lm_head.bias, -50)
    model.lm_head.bias.data[[*b"abcde", 256]] = 0
    (tmp_path / "out").mkdir()
    save(tmp_path / "out/model.pt", kind, model, "data", spec)
    for prompt in ("", "abc"):
        argv = ["--num_samples", 30, "--prompt", prompt]
        whole = text(capsys, tmp_path, "model.pt", *argv)
        cut = text(capsys, tmp_path, "model.pt", *argv, "--until_end")
        begun = [re.sub("^(<end>)+", "", line) for line in whole]
        assert cut == [line.split("<end>")[0] for line in begun]
        assert 0 < sum("<end>" in line for line in begun) < 30
        assert all(line.startswith(prompt) for line in cut)


def test_until_end_is_refused_where_nothing_ends(made, capsys):
    """Tokens that are words have no end; a text with gaps has its own. Exact."""
    message = refused(capsys, sample, made / "out/ar.pt", "--until_end")
    assert "--until_end" in message and "ar.pt has no end-of-text token" in message
    message = refused(capsys, sample, made / "out/teacher.pt", "--infill", "w1 _", "--until_end")
    assert "--until_end and --infill" in message
