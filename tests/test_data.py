"""Datasets: tokenizers, the training of byte pairs, folders on the disk, batches, and the scripts.

Nothing here is a sample's number but the batches, from a fixed seed; everything else is exact, so
that a failure is never a false alarm unless a docstring says so. Everything is written to tmp_path,
and nothing asks the network.
"""
import collections
import http.client
import json
import os
import pickle
import pydoc_data.topics
import random
import re
import shutil
import threading
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken._educational
import torch

import common
import distill
import model
import train
from data import checkpoints, corpus, dataset, files, processes, script
from data.openwebtext import prepare as openwebtext
from data.endings import prepare as endings
from data.lambada import prepare as lambada
from data.pydoc import prepare as pydoc
from data.shakespeare_char import prepare as shakespeare
from data.stories import language
from data.stories import prepare as stories
from data.text import prepare as text
from helpers import NANO, begin, call, refused

ALONE = types.SimpleNamespace(rank=0, world=1, device="cpu")
GPT2_FILES = ["6d1cbeee0f20b3d9449abfede4726ed8212e3aee",        # tiktoken's names for GPT-2's
              "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"]        # merges and tokens
CACHE = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or "none")
needs_gpt2 = pytest.mark.skipif(
    not all((CACHE / name).exists() for name in GPT2_FILES),
    reason="GPT-2's tokenizer is not in the folder TIKTOKEN_CACHE_DIR")
DOCUMENTS = ["Once upon a time, there was a time.",
             "It isn't <end> yet!\n\n  He said:\t'17 apples'",
             "Ünïcödé, кот и кит, 猫が好き 🐈‍⬛ — nul \0", " ",
             "the cat sat on the mat " * 20]


def sentence(function, *args):
    """The one sentence with which a call is refused."""
    with pytest.raises(files.UserError) as error:
        function(*args)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


def load(folder):
    return dataset.load_data(str(folder), ALONE)


def everything(data):
    """All token ids, train then val."""
    return np.concatenate([data.train, data.val]).tolist()


def numbers(n):
    """A tokenizer's spec of n words "0", "1", ..., each its own id."""
    return dict(kind="words", items=[str(i) for i in range(n)])


# ---- byte pairs

def random_text(rng, alphabet, n):
    return "".join(rng.choice(alphabet) for _ in range(n))


def any_text(rng, n):
    """Characters from everywhere in Unicode but the surrogates, which no UTF-8 text has."""
    blocks = [(0, 128), (0, 0x3000), (0x3000, 0xd800), (0xe000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(n))


def english():
    return pydoc_data.topics.topics["if"] + pydoc_data.topics.topics["for"]


@pytest.fixture(scope="module")
def trained():
    """300 tokens of a byte-pair encoding trained on English, and its tokenizer."""
    tokens = corpus.train_bpe(english(), 300)
    spec = dict(kind="bpe", pattern=corpus.PATTERN, items=[t.decode("latin-1") for t in tokens])
    return tokens, dataset.make_tokenizer(json.loads(json.dumps(spec)))


def educational(text, size):
    """The tokens by tiktoken's own slow trainer, which counts all pairs anew for each merge."""
    return list(tiktoken._educational.bpe_train(text, size, corpus.PATTERN, visualise=None))


@pytest.mark.parametrize("words", [english(), "".join(DOCUMENTS), "aaaaaaa aaaa aaaaaaaaaaa baaaa",
                                   "xyxyxyx yxyxy xyx", "abc bcd cde def abc cde"])
def test_train_bpe_makes_the_tokens_of_tiktokens_own_trainer(words):
    """Also in order: among equal counts, both take the pair that comes first in the text. As far as
    there are pairs, at most 60. Exact, no false alarm."""
    size = min(len(corpus.train_bpe(words, 316)), 316)
    assert size > 258
    assert corpus.train_bpe(words, size) == educational(words, size)


def test_train_bpe_breaks_ties_as_tiktokens_own_trainer():
    """40 short random texts of few letters: nearly every merge is one of several equals. Exact, no
    false alarm."""
    rng = random.Random(0)
    for _ in range(40):
        words = random_text(rng, "aabc ", 60)
        size = len(corpus.train_bpe(words, 275))
        assert corpus.train_bpe(words, size) == educational(words, size), words


def test_train_bpe_stops_early_when_no_pair_is_left():
    """Each word is one token then. Exact, no false alarm."""
    single = [bytes([i]) for i in range(256)]
    assert corpus.train_bpe("ab ab", 1000) == single + [b"ab", b" ab"]
    assert corpus.train_bpe("", 1000) == corpus.train_bpe("a b", 256) == single
    assert corpus.train_bpe("x", 1000) == single


@pytest.mark.parametrize("size", [255, 1, 0, -1])
def test_train_bpe_refuses_fewer_tokens_than_bytes(size):
    """One sentence, with the size asked for. No false alarm."""
    assert str(size) in sentence(corpus.train_bpe, "some text", size)


def test_merge_takes_pairs_from_the_left():
    """Occurrences that overlap, and a pair whose bytes are there but not its tokens. Exact."""
    assert corpus.merge([b"a"] * 5, (b"a", b"a")) == [b"aa", b"aa", b"a"]
    assert corpus.merge([b"a", b"bc", b"ab", b"c"], (b"a", b"b")) == [b"a", b"bc", b"ab", b"c"]
    assert corpus.merge([b"ab", b"c", b"ab", b"c"], (b"ab", b"c")) == [b"abc", b"abc"]
    assert corpus.merge([b"a", b"bc"], (b"ab", b"c")) == [b"a", b"bc"]
    assert corpus.merge([b"a"], (b"a", b"b")) == [b"a"] and corpus.merge([], (b"a", b"b")) == []


def by_hand(pairs, word):
    """A word (bytes) cut into tokens by all merges in the order in which they were learned."""
    parts = [word[i:i + 1] for i in range(len(word))]
    for a, b in pairs:
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == (a, b):
                parts[i:i + 2] = [a + b]
            i += 1
    return parts


def test_tiktoken_runs_the_merges_in_the_order_learned(trained):
    """Against a slow application by hand, in which each token must be a merge of two earlier ones;
    English, and letters at random. Exact, no false alarm."""
    tokens, tokenizer = trained
    pairs = []
    for token in tokens[256:]:
        pairs.append(tuple(by_hand(pairs, token)))
        assert len(pairs[-1]) == 2
    assert len(set(tokens)) == len(tokens) == 300
    ids = {token: i for i, token in enumerate(tokens)}
    rng = random.Random(1)
    texts = [english()[:3000], any_text(rng, 300)]
    texts += [random_text(rng, "the inaofr\n", 300) for _ in range(5)]
    for words in texts:
        expected = [ids[token] for word in corpus.regex.findall(corpus.PATTERN, words)
                    for token in by_hand(pairs, word.encode())]
        assert tokenizer.encode(words) == expected
    assert max(tokenizer.encode(texts[0])) > 256             # the merges are used at all


def test_trained_bpe_gives_back_any_text(trained):
    """300 texts of characters from all of Unicode, and those that look like its own signs. Exact,
    no false alarm."""
    tokens, tokenizer = trained
    rng = random.Random(2)
    texts = [any_text(rng, rng.randrange(40)) for _ in range(300)] + DOCUMENTS + ["", "<end>"]
    for words in texts:
        ids = tokenizer.encode(words)
        assert tokenizer.decode(ids) == words and all(0 <= i < 300 for i in ids)
    assert tokenizer.vocab == 301 and tokenizer.decode([300]) == "<end>"


def test_trained_bpe_gives_back_any_bytes(trained):
    """300 random rows of bytes, most of them no UTF-8, and each byte alone. Exact."""
    tokens, _ = trained
    bpe = tiktoken.Encoding("test", pat_str=corpus.PATTERN, special_tokens={},
                            mergeable_ranks={token: i for i, token in enumerate(tokens)})
    rng = random.Random(3)
    for word in [bytes([i]) for i in range(256)] + [rng.randbytes(30) for _ in range(300)]:
        assert bpe.decode_bytes(bpe._encode_bytes(word)) == word


# ---- tokenizers

def test_encode_names_the_word_or_character_that_it_does_not_know():
    """And what the vocabulary is like. No false alarm."""
    words = dataset.make_tokenizer(dict(kind="words", items=["a", "cat", "sat"]))
    chars = dataset.make_tokenizer(dict(kind="chars", items=list("abc\n")))
    message = sentence(words.encode, "a dog sat")
    assert "'dog'" in message and "cat" in message and "words" in message
    message = sentence(chars.encode, "abxc")
    assert "'x'" in message and "chars" in message


def test_words_and_chars_give_back_what_they_encode():
    """Words any white space apart, characters all of them. Exact, no false alarm."""
    words = dataset.make_tokenizer(dict(kind="words", items=["a", "cat", "sat"]))
    assert words.encode(" a  cat\nsat ") == [0, 1, 2] and words.decode([0, 1, 2]) == "a cat sat"
    chars = dataset.make_tokenizer(dict(kind="chars", items=list("abc\n ")))
    assert chars.decode(chars.encode("ab \n c\n")) == "ab \n c\n"
    assert (words.vocab, chars.vocab) == (3, 5) and words.encode("") == chars.encode("") == []


@pytest.mark.parametrize("error", [ConnectionError("no\nnetwork"), ValueError("wrong hash")])
def test_missing_gpt2_tokenizer_is_refused_with_the_remedy(monkeypatch, error):
    """Whatever error tiktoken's download ends in. No false alarm."""
    def get_encoding(name):
        raise error
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    assert "TIKTOKEN_CACHE_DIR" in sentence(dataset.make_tokenizer, {"kind": "gpt2"})


# ---- from documents to a folder

@pytest.mark.parametrize("kind", ["bpe", pytest.param("gpt2", marks=needs_gpt2)])
def test_documents_come_back_from_the_folder_each_with_its_end(tmp_path, kind):
    """Split at the last id of the vocabulary, which stands for <end> and for nothing else; a text
    "<end>" is cut into other tokens. Exact, no false alarm."""
    corpus.write_corpus(tmp_path / "new" / "folder", DOCUMENTS, kind, 300)
    data = load(tmp_path / "new" / "folder")
    ids, end = everything(data), data.tokenizer.vocab - 1
    mark = {"bpe": "<end>", "gpt2": "<|endoftext|>"}[kind]
    assert data.tokenizer.decode(ids) == "".join(document + mark for document in DOCUMENTS)
    found, document = [], []
    for i in ids:
        if i == end:
            found.append(data.tokenizer.decode(document))
        document = [] if i == end else document + [i]
    assert found == DOCUMENTS and document == []
    assert data.tokenizer.vocab == {"bpe": 300, "gpt2": 50257}[kind]


def test_characters_come_back_from_the_folder(tmp_path):
    """Documents follow each other in lines; the vocabulary is the characters, sorted. Exact."""
    corpus.write_corpus(tmp_path, DOCUMENTS, "chars", 0)
    data = load(tmp_path)
    assert data.tokenizer.decode(everything(data)) == "\n".join(DOCUMENTS)
    assert data.tokenizer.spec["items"] == sorted(set("\n".join(DOCUMENTS)))


@pytest.mark.parametrize("kind", ["chars", "bpe", pytest.param("gpt2", marks=needs_gpt2)])
def test_last_tenth_is_validation_and_tokens_take_two_bytes(tmp_path, kind):
    """uint16 on the disk, as many as the data have; no temporary file is left. Exact."""
    corpus.write_corpus(tmp_path, DOCUMENTS, kind, 300)
    data = load(tmp_path)
    n = len(data.train) + len(data.val)
    assert len(data.train) == n * 9 // 10 and len(data.val) > 10
    assert data.train.dtype == data.val.dtype == np.uint16
    assert (tmp_path / "train.bin").stat().st_size == 2 * len(data.train)
    assert (tmp_path / "val.bin").stat().st_size == 2 * len(data.val)
    assert sorted(os.listdir(tmp_path)) == ["meta.json", "train.bin", "val.bin"]
    assert (data.stride, data.oracle) == (None, None)


def test_small_text_gives_a_smaller_vocabulary_than_asked(tmp_path):
    """Byte pairs that ran out: the ids still fit, and <end> is the last one. Exact."""
    corpus.write_corpus(tmp_path, ["ab ab ab ab ab ab"], "bpe", 1000)
    data = load(tmp_path)
    assert data.tokenizer.vocab == 256 + 2 + 1 and max(everything(data)) == 258
    assert data.tokenizer.decode(everything(data)) == "ab ab ab ab ab ab<end>"


@pytest.mark.parametrize("documents", [[], [""], [" \n", "\t"]])
@pytest.mark.parametrize("kind", ["chars", "bpe"])
def test_no_text_is_refused_and_nothing_written(tmp_path, documents, kind):
    """One sentence. No false alarm."""
    assert "no text" in sentence(corpus.write_corpus, tmp_path, documents, kind, 300)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("vocab, dtype", [(65536, np.uint16), (65537, np.uint32)])
def test_tokens_take_four_bytes_only_where_two_are_too_few(tmp_path, vocab, dtype):
    """The largest id comes back, on both sides of the limit. Exact, no false alarm."""
    ids = [0, 1, 65535, vocab - 1]
    dataset.write_data(tmp_path, ids, ids[::-1], tokenizer=numbers(vocab), stride=2, oracle="other")
    data = load(tmp_path)
    assert data.train.dtype == data.val.dtype == dtype
    assert data.train.tolist() == ids and data.val.tolist() == ids[::-1]
    assert (data.stride, data.oracle, data.tokenizer.vocab) == (2, "other", vocab)
    assert data.tokenizer.spec == numbers(vocab)
    assert (tmp_path / "val.bin").stat().st_size == 4 * np.dtype(dtype).itemsize


# ---- batches

def counted(folder, n_train=60, n_val=33, **meta):
    """Data whose tokens are their own places: train 0, 1, ..., val 100, 101, ..."""
    dataset.write_data(folder, list(range(n_train)), list(range(100, 100 + n_val)),
                       tokenizer=numbers(200), **meta)
    return load(folder)


@pytest.mark.parametrize("split, begin, n", [("train", 0, 60), ("val", 100, 33)])
@pytest.mark.parametrize("stride, context", [(None, 7), (None, 1), (None, 33), (5, 5), (7, 7)])
def test_batch_is_of_whole_pieces_that_begin_anywhere_or_at_rows(tmp_path, split, begin, n, stride,
                                                                context):
    """All rows lie in the split and begin at multiples of the stride; with an incomplete row at the
    end it is never used. 4,000 draws of at most 60 starts: all are drawn equally often, within 5 sd
    (another seed fails once in 10,000)."""
    data = counted(tmp_path, stride=stride)
    torch.manual_seed(0)
    x, keep = data.batch(split, 4000, context, torch.device("cpu"))
    assert keep is None
    assert x.shape == (4000, context) and x.dtype == torch.int64 and x.device.type == "cpu"
    assert torch.equal(x, x[:, :1] + torch.arange(context))
    count = collections.Counter(x[:, 0].tolist())
    starts = [begin + i for i in range(0, n - context + 1, stride or 1)]
    assert sorted(count) == starts
    p = 1 / len(starts)
    assert all(abs(k - 4000 * p) <= 5 * (4000 * p * (1 - p)) ** 0.5 for k in count.values())


def test_batch_is_drawn_by_torchs_global_generator_and_is_a_copy(tmp_path):
    """The same seed, the same batch; what a script does to it does not reach the data. Exact."""
    data = counted(tmp_path)
    def batch(seed):
        torch.manual_seed(seed)
        return data.batch("train", 50, 5, "cpu")[0]
    assert torch.equal(batch(1), batch(1)) and not torch.equal(batch(1), batch(2))
    batch(1).zero_()
    assert data.train.tolist() == load(tmp_path).train.tolist() == list(range(60))


def test_context_is_the_wanted_one_or_the_length_of_a_row(tmp_path):
    """As large as the smaller split, not larger. Exact, no false alarm."""
    assert counted(tmp_path).context(33) == 33
    assert counted(tmp_path, stride=5).context(4) == counted(tmp_path, stride=5).context(99) == 5


@pytest.mark.parametrize("sizes, split", [((60, 12), "val"), ((12, 60), "train"), ((12, 12), "")])
def test_context_longer_than_a_split_is_refused_by_the_file(tmp_path, sizes, split):
    """With its size, the context and the remedy, for rows as well. No false alarm."""
    data = counted(tmp_path, *sizes)
    message = sentence(data.context, 13)
    assert f"{split}.bin" in message and "12 " in message and "13" in message
    assert "--context" in message and str(tmp_path) in message
    assert f"{split}.bin" in sentence(counted(tmp_path, *sizes, stride=13).context, 4)


# ---- folders as nanoGPT lays them out

def nanogpt(folder, train, val, meta=None):
    """train.bin and val.bin as nanoGPT's prepare.py writes them, and meta.pkl from bytes."""
    folder.mkdir(exist_ok=True)
    np.array(train, dtype=np.uint16).tofile(folder / "train.bin")
    np.array(val, dtype=np.uint16).tofile(folder / "val.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(meta)
    return folder


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_characters_prepared_by_nanogpt_load(tmp_path, protocol):
    """meta.pkl with stoi, itos and vocab_size, of any pickle protocol. Exact, no false alarm."""
    chars = sorted(set("".join(DOCUMENTS)))
    stoi = {c: i for i, c in enumerate(chars)}
    meta = dict(vocab_size=len(chars), itos={i: c for c, i in stoi.items()}, stoi=stoi)
    ids = [[stoi[c] for c in document] for document in DOCUMENTS]
    data = load(nanogpt(tmp_path / "x", ids[0], ids[2], pickle.dumps(meta, protocol)))
    assert data.tokenizer.vocab == len(chars) and data.train.dtype == np.uint16
    assert data.tokenizer.decode(data.train.tolist()) == DOCUMENTS[0]
    assert data.tokenizer.decode(data.val.tolist()) == DOCUMENTS[2]
    assert data.tokenizer.encode(DOCUMENTS[1]) == ids[1]
    assert (data.stride, data.oracle) == (None, None)
    assert json.loads(json.dumps(data.tokenizer.spec)) == data.tokenizer.spec


@needs_gpt2
def test_gpt2_tokens_prepared_by_nanogpt_load(tmp_path):
    """No meta: GPT-2's tokens, 50256 between documents. Exact, no false alarm."""
    bpe = tiktoken.get_encoding("gpt2")
    ids = [bpe.encode_ordinary(document) + [bpe.eot_token] for document in DOCUMENTS]
    data = load(nanogpt(tmp_path / "x", ids[0], ids[2]))
    assert data.tokenizer.vocab == 50257
    assert data.tokenizer.decode(data.train.tolist()) == DOCUMENTS[0] + "<|endoftext|>"
    assert data.tokenizer.decode(data.val.tolist()) == DOCUMENTS[2] + "<|endoftext|>"


@needs_gpt2
def test_a_folder_prepared_by_nanogpt_trains_and_distils(tmp_path, monkeypatch):
    """GPT-2's tokens without meta, through both scripts; text comes out. With preset small, which
    validates with less text than nano, made tiny. No chance involved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model.PRESETS, "small", NANO)
    ids = tiktoken.get_encoding("gpt2").encode_ordinary("the cat sat on the mat, and so on. " * 30)
    nanogpt(tmp_path / "x", ids, ids)
    flags = ["--dataset", "x", "--preset", "small", "--batch", 2, "--context", 8]
    for objective in ("ar", "mdlm"):
        call(train, *flags, "--objective", objective, "--steps", 1)
    call(distill, *flags, "--rounds", 1, "--teacher_steps", 2, "--steps_per_round", 1,
         "--samples", 2)
    content = checkpoints.load_checkpoint("out/x-small/round1.pt")
    assert content["tokenizer"] == {"kind": "gpt2"} and content["model_config"]["vocab"] == 50257
    assert (tmp_path / "out/x-small/samples.txt").stat().st_size > 100


def bad_pickles(path):
    """Pickles that make the folder `path` when they are loaded without care, by name."""
    path = str(path).encode()
    return {
        "mkdir": b"cos\nmkdir\n(V" + path + b"\ntR.",
        "in a dict": b"}(Vitos\n}(I0\ncos\nmkdir\n(V" + path + b"\ntRuVvocab_size\nI1\nu.",
        "inst": b"(V" + path + b"\nios\nmkdir\n.",
        "obj": b"(cos\nmkdir\nV" + path + b"\no.",
        "protocol 4": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93V" + path + b"\n\x85R.",
        "eval": b"cbuiltins\neval\n(V__import__('os').mkdir('" + path + b"')\ntR."}


@pytest.mark.parametrize("kind", bad_pickles(""))
def test_meta_pkl_that_would_run_code_is_refused_and_does_not_run(tmp_path, kind):
    """The same bytes do run when pickle itself loads them. No false alarm."""
    pickle.loads(bad_pickles(tmp_path / "proof")[kind])
    assert (tmp_path / "proof").is_dir()
    folder = nanogpt(tmp_path / "x", [0] * 9, [0] * 9, bad_pickles(tmp_path / "harm")[kind])
    assert "meta.pkl" in sentence(load, folder)
    assert not (tmp_path / "harm").exists()


GOOD = pickle.dumps(dict(vocab_size=2, itos={0: "a", 1: "b"}, stoi={"a": 0, "b": 1}))
SPOILT = {"truncated": GOOD[:len(GOOD) // 2], "garbage": b"no pickle at all\n", "empty": b"",
          "without itos": pickle.dumps({"vocab_size": 2}), "list": pickle.dumps(["a", "b"]),
          "with a gap": pickle.dumps({"itos": {0: "a", 2: "b"}}), "persistent": b"Pabc\n.",
          "no text": b"\xff\xfe\0\1" * 9, "itos is None": pickle.dumps({"itos": None}),
          "None": pickle.dumps(None)}


@pytest.mark.parametrize("kind", SPOILT)
def test_spoilt_meta_pkl_is_refused_by_name(tmp_path, kind):
    """One sentence names the file, and not a Python error. No false alarm."""
    assert load(nanogpt(tmp_path / "good", [0, 1], [1], GOOD)).tokenizer.vocab == 2
    folder = nanogpt(tmp_path / "x", [0, 1], [1], SPOILT[kind])
    message = sentence(load, folder)
    assert "meta.pkl" in message and str(folder) in message


@pytest.mark.parametrize("content", [
    b'{"tokenizer": {"kind": "wor', b"no JSON at all\n", b"", b"[]", b"null", b'"text"',
    b"\xff\xfe", b'{"tokenizer": {}}',
    b'{"tokenizer": {"kind": "nonsense", "items": ["a"]}}',
    b'{"tokenizer": {"kind": "chars"}}', b'{"tokenizer": {"kind": "words", "items": null}}',
    b'{"tokenizer": {"kind": "bpe", "items": ["a"]}}', b'{"tokenizer": 3}',
    b'{"tokenizer": {"kind": "bpe", "items": ["\xd0\xb9"], "pattern": "."}}'])
def test_spoilt_meta_json_is_refused_by_name(tmp_path, content):
    """The same for the file that this project writes. No false alarm."""
    folder = nanogpt(tmp_path / "x", [0] * 9, [0] * 9)
    (folder / "meta.json").write_bytes(content)
    message = sentence(load, folder)
    assert "meta.json" in message and str(folder) in message


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize("content", [b"", b"\0\1\0", None])
def test_bin_that_is_empty_odd_or_missing_is_refused_by_its_folder(tmp_path, name, content):
    """uint16 cannot fill an odd number of bytes. No false alarm."""
    counted(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = sentence(load, tmp_path)
    assert str(tmp_path) in message and name in message


# ---- datasets by name

@pytest.fixture
def top(tmp_path, monkeypatch):
    """A copy of the project's prepare scripts with nothing prepared, as the root of everything."""
    for script in (common.ROOT / "data").glob("*/prepare.py"):
        (tmp_path / "data" / script.parent.name).mkdir(parents=True)
        shutil.copy(script, tmp_path / "data" / script.parent.name)
    monkeypatch.setattr(dataset, "ROOT", tmp_path)
    for module in (endings, lambada, openwebtext, pydoc, shakespeare, stories, text):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "data" / module.FOLDER.name)
    return tmp_path


def test_unknown_dataset_is_refused_with_the_known_ones(top):
    """Every folder under data/ with a script. No false alarm."""
    message = sentence(load, "nonsense")
    assert "nonsense" in message and "--dataset" in message
    for name in ("stories", "pydoc", "shakespeare_char", "text"):
        assert name in message


def test_dataset_without_val_bin_is_refused_with_the_command_that_makes_it(top):
    """For one that is made by hand. No false alarm."""
    assert "python data/shakespeare_char/prepare.py" in sentence(load, "shakespeare_char")


@pytest.mark.parametrize("name", ["shakespeare_char/", "{top}/data/shakespeare_char", "mine",
                                  "{top}/elsewhere"])
def test_command_that_a_refusal_names_exists(top, monkeypatch, name):
    """Also for a folder given as a path, and one that has no script. No false alarm."""
    (top / "elsewhere").mkdir()
    (top / "data" / "mine").mkdir()
    monkeypatch.chdir(top)
    message = sentence(load, name.format(top=top))
    assert "val.bin" in message
    for script in re.findall(r"\S*prepare\.py", message):
        assert (top / script).exists() and "//" not in script, message


def short_stories(monkeypatch):
    """Make the 32,000 stories repeat 100 real ones, to save seconds."""
    rng = random.Random(0)
    made = [language.generate(rng) for _ in range(100)]
    monkeypatch.setattr(stories, "generate", lambda rng: rng.choice(made))


def stopped(n, monkeypatch, function, *args):
    """Call a function that is interrupted when its n-th file (from 0) should take its place."""
    count = []

    def replace(a, b, replace=os.replace):
        count.append(1)
        if len(count) > n:
            raise KeyboardInterrupt
        replace(a, b)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        function(*args)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_built_in_dataset_is_made_when_first_asked_for_and_again_after_a_stop(top, monkeypatch, n):
    """Stopped at each of its three files. Its rows are stories for the oracle. No false alarm."""
    short_stories(monkeypatch)
    stopped(n, monkeypatch, load, "stories")
    assert not (top / "data" / "stories" / "val.bin").exists()
    data = load("stories")
    assert data.oracle == "stories" and data.tokenizer.spec["items"] == language.VOCABULARY
    assert len(data.train) == 30_000 * data.stride and len(data.val) == 2_000 * data.stride
    for split in (data.train, data.val):
        for row in split.reshape(-1, data.stride)[:50]:
            assert language.contradictions(data.tokenizer.decode(row.tolist()).split()) == []
    before = (top / "data" / "stories" / "train.bin").stat().st_mtime_ns
    load("stories")                                          # ready: not made again
    assert (top / "data" / "stories" / "train.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_stop_while_a_dataset_is_made_anew_never_leaves_a_mixture(tmp_path, monkeypatch, n):
    """New tokens over old ones: at each moment the folder is the old one, the new one, or is
    refused. No false alarm."""
    def make(ids):
        dataset.write_data(tmp_path, ids * 9, ids * 8, tokenizer=numbers(len(ids)))

    def found():
        data = load(tmp_path)
        return data.train.tolist(), data.val.tolist(), data.tokenizer.vocab
    old, new = [0, 1, 2], [4, 3, 2, 1, 0]
    make(old)
    if n < 3:
        stopped(n, monkeypatch, make, new)
    else:
        make(new)
    try:
        assert found() in [(ids * 9, ids * 8, len(ids)) for ids in ((old,) if n < 3 else (new,))]
    except files.UserError as e:
        assert n < 3 and "val.bin" in str(e)


def test_first_process_makes_the_dataset_while_the_others_wait(top, monkeypatch):
    """The first one has made it when it tells the others how it went; these read after that. No
    false alarm."""
    short_stories(monkeypatch)
    seen = []
    monkeypatch.setattr(processes.dist, "broadcast_object_list", lambda *_: seen.append(
        (top / "data" / "stories" / "val.bin").exists()))
    dataset.load_data("stories", types.SimpleNamespace(rank=0, world=2, device="cpu"))
    assert seen == [True]
    (top / "data" / "stories" / "val.bin").unlink()
    monkeypatch.setattr(processes.dist, "broadcast_object_list",
                        lambda *_, make=stories.main: make([]))
    monkeypatch.setattr(stories, "main", None)               # the others do not make it themselves
    dataset.load_data("stories", types.SimpleNamespace(rank=1, world=2, device="cpu"))


# ---- the scripts

@pytest.mark.parametrize("seed", [0, 1])
def test_stories_are_what_their_seed_generates(top, seed):
    """Training first, then validation, from one generator; the seed is 0 unless given. Exact."""
    call(stories, "--train", 40, "--val", 10, *["--seed", seed] * (seed > 0))
    data, rng = load("stories"), random.Random(seed)
    made = [word for _ in range(50) for word in language.generate(rng)]
    assert data.tokenizer.decode(everything(data)).split() == made
    assert len(data.train) == 40 * data.stride


@pytest.mark.parametrize("n", [1, 2, 6])
def test_endings_are_the_stories_with_their_first_sentences_as_a_prompt(top, n):
    """The same rows as stories has, each of them 7 sentences, of which n end where the prompt does.
    Exact."""
    flags = ["--train", 40, "--val", 10]
    call(stories, *flags)
    call(endings, *flags, "--sentences", n)
    data = load("endings")
    assert everything(data) == everything(load("stories")) and data.oracle == "stories"
    for split in ("train", "val"):
        for row, P in zip(getattr(data, split).reshape(-1, data.stride), data.prompts[split]):
            words = data.tokenizer.decode(row.tolist()).split()
            assert words[P - 1] == "." and words[:P].count(".") == n and words.count(".") == 7


def test_endings_are_made_when_first_asked_for(top, monkeypatch):
    """As stories are. No false alarm."""
    short_stories(monkeypatch)
    assert len(load("endings").prompts["val"]) == 2_000


LONG = "This docstring of {} is long enough to be kept.\n\nIt has a second part."


def source(folder, path, content):
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / path


def test_docstrings_are_found_in_modules_classes_and_functions(tmp_path):
    """Wherever they are defined, without their indentation, files by their paths; not the short
    ones, not other alphabets, not other strings. Exact, no false alarm."""
    def quoted(name, indent):
        return f'"""{LONG.format(name)}"""'.replace("\n", "\n" + indent)
    source(tmp_path, "b.py", "\n".join([
        quoted("b", ""), "class C:", f"    {quoted('C', '    ')}", "    def method(self):",
        f"        {quoted('method', '        ')}", "async def wait():",
        f"    {quoted('wait', '    ')}", "    def inner():", f"        {quoted('inner', ' ' * 8)}",
        "def short():", "    '''Too short.'''", "def other():",
        "    '''" + "Déjà vu. " * 9 + "'''",
        "text = '''" + "A string that is not a docstring. " * 3 + "'''"]))
    source(tmp_path, "a/z.py", quoted("a/z", ""))
    source(tmp_path, "a/notes.txt", quoted("notes", ""))
    found = list(pydoc.docstrings(tmp_path))
    names = [doc.split(" of ")[1].split(" is ")[0] for doc in found]
    assert names[:2] == ["a/z", "b"] and sorted(names[2:]) == ["C", "inner", "method", "wait"]
    assert found == [LONG.format(name) for name in names]


@pytest.mark.parametrize("content", [
    b"def broken(:\n", b"x = 1\0", b"# coding: nonsense\n", b"\xff\xfe", b"(" * 1000,
    b"a" + b".b" * 100_000, b"-" * 200_000 + b"1", "folder"])
def test_files_that_do_not_parse_are_skipped(tmp_path, content):
    """Wrong syntax, bytes, encoding or depth, and a folder named like a file; those around them are
    read. No false alarm."""
    for name in ("a", "c"):
        source(tmp_path, f"{name}.py", f'"""{LONG.format(name)}"""')
    if content == "folder":
        (tmp_path / "b.py").mkdir()
    else:
        source(tmp_path, "b.py", content)
    assert list(pydoc.docstrings(tmp_path)) == [LONG.format("a"), LONG.format("c")]


def test_test_folders_are_skipped(tmp_path):
    """At any depth, but not those above the folder itself. No false alarm."""
    inside = tmp_path / "test" / "lib"
    source(inside, "kept.py", f'"""{LONG.format("kept")}"""')
    for name in sorted(pydoc.SKIPPED | {"test", "tests", "site-packages"}):
        source(inside, f"{name}/a.py", f'"""{LONG.format("a")}"""')
        source(inside, f"package/{name}/deep/b.py", f'"""{LONG.format("b")}"""')
    assert list(pydoc.docstrings(inside)) == [LONG.format("kept")]


def test_pydoc_is_the_docstrings_and_topics_each_once(top, monkeypatch):
    """Those of installed packages only where asked for; the same folder each time. Exact."""
    topics = {str(i): f"Topic {i} of the language, with some words." for i in range(30)}
    monkeypatch.setattr(pydoc_data.topics, "topics", topics)
    monkeypatch.setattr(pydoc.sysconfig, "get_paths", lambda: {
        "stdlib": str(top / "lib"), "purelib": str(top / "packages")})
    for name in ("lib/a", "lib/b"):
        source(top, f"{name}.py", f'"""{LONG.format("the same")}"""')
    source(top, "packages/c.py", f'"""{LONG.format("a package")}"""')

    def made(*flags):
        call(pydoc, "--vocab_size", "280", *flags)
        data = load("pydoc")
        assert data.tokenizer.vocab == 280
        return data.tokenizer.decode(everything(data)).split("<end>")[:-1]
    standard = [*topics.values(), LONG.format("the same")]
    first = made()
    assert sorted(first) == sorted(standard) and first == made()
    assert sorted(made("--site_packages")) == sorted(standard + [LONG.format("a package")])


def test_shakespeare_from_a_local_file_loads_by_name(top):
    """Exact, no false alarm."""
    words = "First Citizen:\nBefore we proceed any further, hear me.\n\nAll:\nSpeak, spéak.\n"
    (top / "input.txt").write_bytes(words.encode())
    call(shakespeare, "--file", top / "input.txt")
    data = load("shakespeare_char")
    assert data.tokenizer.decode(everything(data)) == words
    assert data.tokenizer.spec == dict(kind="chars", items=sorted(set(words)))


def test_lambada_from_a_local_file_and_what_is_refused(top, capsys, monkeypatch):
    """A copy lands in its folder; a bad line, a missing file and no network are named, and nothing
    is written; as a dataset to train on it is refused. Exact."""
    target = top / "data" / "lambada" / "test.jsonl"
    (top / "bad.jsonl").write_text('{"text": "a b"}\n{}\n')
    (top / "good.jsonl").write_text('{"text": "a b"}\n{"text": "c d"}\n')
    assert "bad.jsonl, line 2" in refused(capsys, lambada, "--file", top / "bad.jsonl")
    assert "none.jsonl cannot be read" in refused(capsys, lambada, "--file", top / "none.jsonl")

    def no_network(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    message = refused(capsys, lambada)
    assert lambada.URL in message and "--file" in message and not target.exists()
    call(lambada, "--file", top / "good.jsonl")
    assert target.read_text() == (top / "good.jsonl").read_text()
    assert "2 passages" in capsys.readouterr().out
    assert "--lambada of tools.evaluate" in sentence(load, "lambada")


def test_shakespeare_that_cannot_be_read_is_refused(top, capsys, monkeypatch):
    """A missing file, a folder, one that is no UTF-8, an empty one, no network: nothing is written.
    No false alarm."""
    (top / "latin.txt").write_bytes("café".encode("latin-1"))
    (top / "empty.txt").write_bytes(b"")
    for name in ("missing.txt", "data", "latin.txt"):
        message = refused(capsys, shakespeare, "--file", top / name)
        assert str(top / name) in message and "--file" in message
    assert "no text" in refused(capsys, shakespeare, "--file", top / "empty.txt")

    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    message = refused(capsys, shakespeare)
    assert shakespeare.URL in message and "--file" in message
    assert os.listdir(top / "data" / "shakespeare_char") == ["prepare.py"]


def test_read_gives_a_file_or_all_files_below_a_folder_by_their_paths(tmp_path):
    """Whatever their endings. Exact, no false alarm."""
    for path, words in {"b.txt": "bé", "a/c.md": "c", "a/b/d": "d\n", "z": "z"}.items():
        source(tmp_path, path, words)
    def read(path):
        return list(text.read(path))
    assert read(tmp_path / "b.txt") == [("bé", True)] == read(str(tmp_path / "b.txt"))
    assert [part for part, ends in read(tmp_path) if ends] == ["d\n", "c", "bé", "z"]
    (tmp_path / "none").mkdir()
    assert read(tmp_path / "none") == []


def test_a_large_file_is_one_document_read_in_parts(tmp_path, monkeypatch):
    """Of 20 characters read at a time; the parts end between words, and are the file. Exact."""
    monkeypatch.setattr(text, "LARGE", 20)
    words = "".join(f"line {i}{'x' * (30 * (i == 7))}\r\n" for i in range(30)) + "no line end"
    found = list(text.read(source(tmp_path, "large.txt", words)))
    assert "".join(part for part, _ in found) == words.replace("\r\n", "\n")
    assert [ends for _, ends in found] == [False] * (len(found) - 1) + [True]
    assert len(found) > 8 and max(len(part) for part, _ in found) <= 80
    assert all(part[0].isspace() and not part[-1].isspace() for part, _ in found[1:])


@pytest.mark.parametrize("kind", ["chars", "bpe", pytest.param("gpt2", marks=needs_gpt2)])
@pytest.mark.parametrize("name", ["mine", "text", "elsewhere/deep", "{top}/elsewhere"])
def test_any_files_become_a_dataset_by_name_or_path(top, monkeypatch, kind, name):
    """Under data/ for a plain name, or where a path says. Exact, no false alarm."""
    monkeypatch.chdir(top)
    for i, document in enumerate(DOCUMENTS):
        source(top, f"files/{i}.txt", document)
    name = name.format(top=top)
    call(text, top / "files", "--name", name, "--tokenizer", kind, "--vocab_size", "300")
    data = load(name)
    end = "" if kind == "chars" else "<end>" if kind == "bpe" else "<|endoftext|>"
    expected = "\n".join(DOCUMENTS) if kind == "chars" else end.join(DOCUMENTS) + end
    assert data.tokenizer.decode(everything(data)) == expected
    assert data.folder == (Path(name) if "/" in name else top / "data" / name)


def test_text_that_cannot_be_read_is_refused_by_the_name_of_its_file(top, capsys):
    """Missing, no UTF-8, also one of many files, or nothing there: nothing is written. No false
    alarm."""
    source(top, "files/good.txt", "some text")
    source(top, "files/sub/bad.bin", b"\xff\xfe\0")
    (top / "none").mkdir()
    message = refused(capsys, text, top / "missing", "--name", "mine")
    assert str(top / "missing") in message and "no such file" in message
    for path in ("files/sub/bad.bin", "files"):
        message = refused(capsys, text, top / path, "--name", "mine")
        assert str(top / path) in message and "UTF-8" in message
        assert "bad.bin" in message                          # which of them
    assert "no text" in refused(capsys, text, top / "none", "--name", "mine")
    assert not (top / "data" / "mine").exists()


@pytest.mark.parametrize("name", ["stories", "pydoc", "shakespeare_char", "{top}/data/stories"])
def test_text_does_not_take_the_name_of_a_dataset_with_a_script(top, capsys, name):
    """Refused by the flag, and nothing is written over it. No false alarm."""
    source(top, "words.txt", "some text")
    name = name.format(top=top)
    message = refused(capsys, text, top / "words.txt", "--name", name)
    assert "--name" in message and name in message
    for folder in (top / "data").iterdir():
        assert os.listdir(folder) == ["prepare.py"]


# ---- corpora larger than memory, and the published chunks

def rows_of(data):
    return [data.train.reshape(-1, data.stride), data.val.reshape(-1, data.stride)]


@pytest.mark.parametrize("block", [1, 100, corpus.BLOCK])
@pytest.mark.parametrize("kind", ["bpe", pytest.param("gpt2", marks=needs_gpt2)])
def test_chunks_are_the_row_of_tokens_with_an_end_on_both_sides(tmp_path, monkeypatch, kind, block):
    """Rows of 16: <end>, 14 tokens of the row of both splits, <end>; less than a row is left out.
    Whatever the size of the blocks in which they are written. Exact."""
    documents = DOCUMENTS * 20
    corpus.write_corpus(tmp_path / "flat", documents, kind, 300)
    monkeypatch.setattr(corpus, "BLOCK", block)
    corpus.write_corpus(tmp_path / "rows", documents, kind, 300, chunk=16)
    flat, data = load(tmp_path / "flat"), load(tmp_path / "rows")
    assert (data.stride, data.texts) == (16, False) and data.context(1024) == 16
    for tokens, rows in zip((flat.train, flat.val), rows_of(data)):
        assert (rows[:, [0, -1]] == data.tokenizer.vocab - 1).all()
        assert len(rows) == len(tokens) // 14 > 5
        assert rows[:, 1:-1].flatten().tolist() == tokens[:len(rows) * 14].tolist()
    x, _ = data.batch("train", 50, 16, "cpu")
    assert (x[:, [0, -1]] == data.tokenizer.vocab - 1).all()


def test_chunks_of_characters_are_refused(tmp_path):
    """Which have no <end>. No false alarm."""
    assert "--chunk" in sentence(corpus.write_corpus, tmp_path, DOCUMENTS, "chars", 0, 16)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("kind", ["chars", "bpe", pytest.param("gpt2", marks=needs_gpt2)])
def test_a_corpus_is_never_held_whole(tmp_path, monkeypatch, kind):
    """A stream of documents, of which no more than a batch and its encoding is alive at a time; the
    folder is the same as from a list. Exact."""
    monkeypatch.setattr(corpus, "BLOCK", 2 ** 16)
    monkeypatch.setattr(corpus, "SAMPLE", 2 ** 16)
    alive, most = set(), [0]

    class Document(str):
        def __del__(self):
            alive.discard(id(self))

    def documents():
        for i in range(400):
            document = Document(f"page {i} " + "of a long book, and so on " * 100)
            alive.add(id(document))
            most[0] = max(most[0], len(alive))
            yield document
    corpus.write_corpus(tmp_path / "stream", documents, kind, 300)
    corpus.write_corpus(tmp_path / "list", [str(d) for d in documents()], kind, 300)
    assert most[0] < 100                                 # of 400
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "stream" / name).read_bytes() == (tmp_path / "list" / name).read_bytes()


@pytest.fixture
def web(tmp_path):
    """3,000 short documents as JSON lines in two files, in a folder that `datasets` reads."""
    pytest.importorskip("datasets")
    (tmp_path / "web").mkdir()
    pages = [f"page {i}: " + "lorem ipsum " * (i % 7) for i in range(3000)]
    for name, part in (("a", pages[:1000]), ("b", pages[1000:])):
        (tmp_path / "web" / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": page}) + "\n" for page in part))
    return tmp_path / "web", pages


@needs_gpt2
@pytest.mark.parametrize("chunk", [None, 32])
def test_openwebtext_goes_on_after_a_stop_as_if_nothing_had_been(top, web, monkeypatch, chunk):
    """Stopped while it encodes, and with a torn last write; the files are those of one run; the
    last documents are validation. Exact."""
    folder, pages = web
    flags = ["--source", folder, "--val_documents", 300] + (["--chunk", chunk] if chunk else [])
    target, seen = top / "data" / "openwebtext", []

    def stopped(spec, made=dataset.make_tokenizer(openwebtext.GPT2)):
        def encode(document):
            seen.append(document)
            if len(seen) == 1700:
                raise KeyboardInterrupt
            return made.encode(document)
        return dataset.Tokenizer(spec, made.vocab, encode, made.decode)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "make_tokenizer", stopped)
        with pytest.raises(SystemExit):
            call(openwebtext, *flags)
    assert not (target / "val.bin").exists()
    tokens = target / corpus.PARTS[0]
    done = (target / corpus.PARTS[1]).stat().st_size // 8
    assert 500 < done < 2000
    with open(tokens, "ab") as f:
        f.write(b"torn")
    call(openwebtext, *flags)
    assert sorted(os.listdir(target)) == ["meta.json", "prepare.py", "train.bin", "val.bin"]
    data = load("openwebtext")
    encoder, end = data.tokenizer, [50256]
    row = [[i for page in part for i in encoder.encode(page) + end]
           for part in (pages[:-300], pages[-300:])]
    if not chunk:
        assert [data.train.tolist(), data.val.tolist()] == row
    else:
        for part, rows in zip(row, rows_of(data)):
            assert rows[:, 1:-1].flatten().tolist() == part[:len(part) // 30 * 30]


@needs_gpt2
def test_openwebtext_refuses_what_cannot_be(top, web, capsys, monkeypatch, tmp_path):
    """Another column, no network, too many validation documents, another source than was begun,
    a missing package: one sentence, and no val.bin. No false alarm."""
    folder, _ = web
    flags = ["--source", folder, "--documents", 10]
    assert "--val_documents" in refused(capsys, openwebtext, *flags, "--val_documents", 10)
    other = refused(capsys, openwebtext, "--source", tmp_path / "elsewhere")
    assert "another --source" in other and corpus.PARTS[0] in other
    for name in corpus.PARTS:
        (top / "data" / "openwebtext" / name).unlink()

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no\nnetwork")
    with monkeypatch.context() as patch:
        patch.setattr("datasets.load_dataset", load_dataset)
        message = refused(capsys, openwebtext, "--source", "owner/none")
    assert "owner/none" in message and "connect" in message
    (folder / "a.jsonl").write_text('{"words": "x"}\n')
    (folder / "b.jsonl").unlink()
    assert "column 'text'" in refused(capsys, openwebtext, *flags)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert "pip install datasets" in refused(capsys, openwebtext, *flags)
    assert not (top / "data" / "openwebtext" / "val.bin").exists()


@needs_gpt2
def test_openwebtext_can_be_a_trial(top, web):
    """--documents: the first so many. Exact."""
    folder, pages = web
    call(openwebtext, "--source", folder, "--documents", 50, "--val_documents", 5)
    text = load("openwebtext").tokenizer.decode(everything(load("openwebtext")))
    assert text.split("<|endoftext|>") == pages[:50] + [""]


# ---- what is read, and what is believed

@pytest.mark.parametrize("kind", ["bpe", pytest.param("gpt2", marks=needs_gpt2)])
def test_a_document_has_the_same_tokens_in_any_number_of_parts(tmp_path, monkeypatch, kind):
    """Encoded whole, and cut between words after every 10 characters or more: words, numbers,
    signs, all kinds of white space. Exact."""
    rng = random.Random(0)
    marks = ["word", "It's", "12", "...", "!?", " ", "  ", "\n", "\n\n\n", "\t", "\x1c", "\u3000", "中文"]
    words = "".join(rng.choice(marks) for _ in range(3000))
    spec = {"kind": "gpt2"}
    if kind == "bpe":
        ranks = corpus.train_bpe(words, 300)
        spec = {"kind": "bpe", "pattern": corpus.PATTERN, "items": [t.decode("latin-1") for t in ranks]}
    encode = dataset.make_tokenizer(spec).encode
    parts = [part for part, _ in corpus.cut([(words, True)], 10)]
    assert "".join(parts) == words and len(parts) > 200
    assert [i for part in parts for i in encode(part)] == encode(words)


@needs_gpt2
@pytest.mark.parametrize("end", ["", "x y", "\n"])
def test_a_million_spaces_are_encoded_and_come_back(end):
    """At which tiktoken panics if a word follows; the tokens of what can be encoded whole are the
    same. Exact."""
    tokenizer = dataset.make_tokenizer({"kind": "gpt2"})
    words = "a" + " " * 1_000_000 + end
    assert tokenizer.decode(tokenizer.encode(words)) == words
    some = "a" + " " * (dataset.LONG + 50) + end + "\n" * (dataset.LONG + 3) + "z"
    assert tokenizer.encode(some) == tiktoken.get_encoding("gpt2").encode_ordinary(some)


@pytest.mark.parametrize("name", ["data/mine", "data", "data/mine/sub", "link"])
def test_a_folder_that_holds_what_is_written_is_no_source(top, capsys, name):
    """Nor one that lies in it, or a link to it; what was there stays. No false alarm."""
    source(top, "data/mine/input.txt", "some text for it")
    source(top, "data/mine/sub/more.txt", "more")
    (top / "link").symlink_to(top / "data/mine")
    call(text, top / "data/mine/input.txt", "--name", "mine", "--tokenizer", "chars")
    before = (top / "data/mine/train.bin").read_bytes()
    assert "would be read as text" in refused(capsys, text, top / name, "--name", "mine")
    assert (top / "data/mine/train.bin").read_bytes() == before


def test_a_file_beside_what_is_written_is_a_source_and_what_is_written_is_none(top, capsys):
    """As nanoGPT has input.txt beside its bins: prepared twice, the same. Exact."""
    argv = ["--name", "mine", "--tokenizer", "chars"]
    path = source(top, "data/mine/input.txt", "some text for it")
    for _ in range(2):
        call(text, path, *argv)
        data = load("mine")
        assert data.tokenizer.decode(everything(data)) == "some text for it"
    for name in ("train.bin", "val.bin", "meta.json"):
        assert "is written" in refused(capsys, text, path.with_name(name), *argv)


def bins(folder, ids, dtype=np.uint16, before=b"", **meta):
    """A folder as others make it."""
    folder.mkdir(exist_ok=True)
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes(before + np.asarray(ids, dtype).tobytes())
    if meta:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


HEADER = np.array([20240520, 1, 500] + [0] * 253, np.int32).tobytes()


@pytest.mark.parametrize("case, said", [
    ("stale", "id 9,.*12 tokens.*meta"), ("int64", "8 bytes; write them as uint16"),
    *[pytest.param(*one, marks=needs_gpt2) for one in (
        ("padded", "id 50,300.*50,257 tokens"), ("uint32", "4 bytes; write them as uint16"),
        ("header", "header of 1,024 bytes"), ("odd", "no whole number"),
        ("folder", "is a folder"))]])
def test_foreign_bins_are_refused_with_what_they_seem_to_be(tmp_path, case, said):
    """By the file's name. Random ids from a fixed seed: no false alarm."""
    rng = np.random.default_rng(0)
    gpt2, few = rng.integers(0, 10_000, 500), rng.integers(0, 12, 500)
    itos = {i: c for i, c in enumerate("abcdefghijkl")}
    gpt2[0], gpt2[1:] = 9_999, np.minimum(gpt2[1:], 9_998)
    if case == "stale":
        folder = bins(tmp_path, gpt2, itos=itos)
    elif case == "padded":
        folder = bins(tmp_path, np.append(gpt2, 50_300))
    elif case == "uint32":
        folder = bins(tmp_path, gpt2, np.uint32)
    elif case == "int64":
        folder = bins(tmp_path, few, np.int64, itos=itos)
    elif case == "header":
        folder = bins(tmp_path, gpt2, before=HEADER)
    else:
        folder = bins(tmp_path, gpt2, before=b"!")
    if case == "folder":
        (folder / "train.bin").unlink()
        (folder / "train.bin").mkdir()
    message = sentence(dataset.open_folder, folder)
    assert re.search(said, message) and "train.bin" in message
    assert "prepare it again" not in message


@pytest.mark.parametrize("ids", [[0] * 500, [1, 0] * 300, [0, 1] * 300, [0, 0, 0, 1] * 200])
def test_zeros_alone_are_no_reason_to_refuse_what_was_prepared_here(tmp_path, ids):
    """Rows of few characters, the first of which has the id 0: meta.json says how wide they are.
    Others' are refused only where every second number is 0. Exact."""
    dataset.write_data(tmp_path / "ours", ids, ids, tokenizer=dict(kind="chars", items=["a", "b"]))
    assert dataset.open_folder(tmp_path / "ours").train.tolist() == ids
    if ids[1::2] != [0] * len(ids[1::2]) or not any(ids):
        theirs = bins(tmp_path / "theirs", ids, itos={0: "a", 1: "b"})
        assert dataset.open_folder(theirs).train.tolist() == ids


def test_a_large_file_is_looked_at_in_blocks_from_its_first_to_its_last_token(tmp_path, monkeypatch):
    """An id too large at either end is found, and little is read. Exact."""
    monkeypatch.setattr(dataset, "BLOCK", 10)
    monkeypatch.setattr(dataset, "BLOCKS", 4)
    blocks = dataset.looked_at(np.arange(1000))
    assert [b[0] for b in blocks] == [0, 330, 660, 990] and {len(b) for b in blocks} == {10}
    for place in (0, 999):
        ids = np.ones(1000, int)
        ids[place] = 2
        folder = bins(tmp_path, ids, itos={0: "a", 1: "b"})
        assert "id 2" in sentence(dataset.open_folder, folder)


def test_fingerprint_is_of_the_tokens_and_their_meaning(tmp_path):
    """The same for the same in another folder; another for each thing that may differ. Exact."""
    def mark(folder, train=(0, 1) * 50, val=(1, 0) * 50, items=("a", "b"), **meta):
        dataset.write_data(tmp_path / folder, train, val,
                           tokenizer=dict(kind="chars", items=list(items)), **meta)
        return dataset.open_folder(tmp_path / folder).fingerprint
    marks = [mark("a"), mark("c", train=(0, 0) * 50), mark("d", val=(1, 1) * 50),
             mark("e", items="ba"), mark("f", stride=10), mark("g", stride=10, texts=False),
             mark("h", train=(0, 1) * 51, val=(1, 0) * 49)]
    assert len(set(marks)) == len(marks) and mark("b") == marks[0]
    assert re.fullmatch("[0-9a-f]{12}", marks[0])


@pytest.mark.parametrize("content, said", [
    (b"not json", "not whole JSON"), (b'{"vocab_size": 3}', "the keys vocab_size"),
    (b"[1]", "a list"), (b'{"tokenizer": {"kind": "unknown"}}', "known here"), (None, "itos")])
def test_meta_without_a_tokenizer_is_told_with_its_cause(tmp_path, content, said):
    """And no advice to prepare anew what others prepared. No false alarm."""
    folder = bins(tmp_path, [0, 1] * 50, stoi={"a": 0})
    if content:
        (folder / "meta.json").write_bytes(content)
    message = sentence(dataset.open_folder, folder)
    assert said in message and "again" not in message


def test_plain_name_is_a_folder_under_data_and_only_a_slash_makes_a_path(top, monkeypatch):
    """`my-data` and `v1.2` too. Exact."""
    monkeypatch.chdir(top)
    path = source(top, "x.txt", "some text")
    for name in ("my-data", "v1.2"):
        call(text, path, "--name", name, "--tokenizer", "chars")
        assert load(name).folder == top / "data" / name and not Path(name).exists()
    call(text, path, "--name", "./here", "--tokenizer", "chars")
    assert (top / "here/val.bin").exists()


@pytest.mark.parametrize("name", ["", ".", "..", ".git", "a/.."])
def test_what_is_no_name_for_a_dataset_is_refused(top, capsys, name):
    """Nothing is written. No false alarm."""
    path = source(top, "x.txt", "some text")
    assert "--name" in refused(capsys, text, path, "--name", name)


def test_separator_stands_between_documents(top, monkeypatch):
    """In one piece and in parts, whose ends fall into separators: each document once, without the
    line ends beside it, empty ones not at all. Without the flag it is text. Exact."""
    words = ["one\ntwo", "  three", "four " * 20 + "end", "five"]
    path = source(top, "x.txt", "<|end|>\n" + "\n<|end|>\n\n<|end|>".join(words) + "\n<|end|>\n")
    for large in (1, 7, 20, 2 ** 24):
        monkeypatch.setattr(text, "LARGE", large)
        whole, begun = [""], False
        for part, ends in text.read(path, "<|end|>"):
            whole[-1] += part
            if ends:
                whole.append("")
        assert whole == words + [""]
    call(text, path, "--name", "mine", "--separator", "<|end|>", "--vocab_size", "260")
    data = load("mine")
    assert data.tokenizer.decode(everything(data)) == "<end>".join(words) + "<end>"


def test_one_rule_for_text_in_all_prepare_scripts(top):
    """A byte order mark is dropped and line ends become LF, by text and by shakespeare_char."""
    path = top / "x.txt"
    path.write_bytes("\ufeffone\r\ntwo\rthree\nfour".encode())
    call(text, path, "--name", "mine", "--tokenizer", "chars")
    call(shakespeare, "--file", path)
    for name in ("mine", "shakespeare_char"):
        data = load(name)
        assert data.tokenizer.decode(everything(data)) == "one\ntwo\nthree\nfour"


def test_a_pipe_is_read_once(top):
    """`prepare.py <(cat file)`: three passes, one reading. No false alarm."""
    os.mkfifo(top / "pipe")
    writer = threading.Thread(target=(top / "pipe").write_text, args=("from a pipe",))
    writer.start()
    call(text, top / "pipe", "--name", "mine", "--tokenizer", "chars")
    writer.join()
    data = load("mine")
    assert data.tokenizer.decode(everything(data)) == "from a pipe"


def test_of_a_folder_hidden_things_and_links_to_folders_are_left_out_and_counted(top, capsys):
    """Links to files are read. Exact."""
    for path in ("files/a.txt", "files/.DS_Store", "files/.git/config", "other/b.txt"):
        source(top, path, path)
    (top / "files/folder").symlink_to(top / "other")
    (top / "files/link.txt").symlink_to(top / "other/b.txt")
    (top / "files/nothing.txt").symlink_to(top / "gone.txt")
    call(text, top / "files", "--name", "mine", "--tokenizer", "chars")
    assert "4 left out" in capsys.readouterr().out
    data = load("mine")
    assert data.tokenizer.decode(everything(data)) == "files/a.txt\nother/b.txt"


def test_folder_that_cannot_be_looked_into_is_refused(top, capsys, monkeypatch):
    """The system's reason and the folder's name (simulated: a superuser may look anywhere)."""
    source(top, "files/sub/a.txt", "text")

    def scandir(path, usual=os.scandir):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path)
    monkeypatch.setattr(os, "scandir", scandir)
    message = refused(capsys, text, top / "files", "--name", "mine")
    assert "files/sub" in message and "Permission denied" in message


@pytest.mark.parametrize("error, said", [
    (http.client.IncompleteRead(b"half"), "only in part"),
    (urllib.error.URLError("no network"), "no network"), (TimeoutError("timed out"), "TimeoutError")])
def test_download_that_fails_says_how(top, capsys, monkeypatch, error, said):
    """One sentence with the remedy. No false alarm."""
    def urlopen(*args, **kwargs):
        raise error
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    message = refused(capsys, shakespeare)
    assert said in message and "--file" in message


@pytest.mark.parametrize("chunk", [None, 64])
def test_empty_split_is_refused_with_what_is_needed_and_the_old_dataset_kept(top, capsys, chunk):
    """20 tokens, or one; nothing half-written, no folder of nothing. Exact."""
    few = source(top, "few.txt", "a" if chunk is None else "a b c d e f g h i j")
    argv = ["--name", "mine", "--vocab_size", "260"] + (["--chunk", chunk] if chunk else
                                                         ["--tokenizer", "chars"])
    message = refused(capsys, text, few, *argv)
    assert "would be empty" in message and ("620 tokens" if chunk else "10 tokens") in message
    assert not (top / "data/mine").exists()
    much = source(top, "much.txt", "some words " * 300)
    call(text, much, *argv)
    before = sorted((p.name, p.read_bytes()) for p in (top / "data/mine").iterdir())
    refused(capsys, text, few, *argv)
    assert sorted((p.name, p.read_bytes()) for p in (top / "data/mine").iterdir()) == before


def test_tokens_that_are_told_are_those_after_chunking(top, capsys):
    """And the rows. Exact."""
    call(text, source(top, "x.txt", "some words " * 300), "--name", "mine", "--vocab_size", "260",
         "--chunk", "16")
    data, out = load("mine"), capsys.readouterr().out
    assert f"{len(data.train):,} + {len(data.val):,} tokens" in out
    assert f"in {len(data.train) // 16:,} + {len(data.val) // 16:,} rows" in out


@needs_gpt2
def test_rows_of_openwebtext_without_a_text_are_left_out_and_counted(top, monkeypatch, capsys):
    """They count as rows, so that a stopped run goes on at the right one. Exact."""
    pytest.importorskip("datasets")
    folder = top / "rows"
    folder.mkdir()
    lines = [json.dumps({"text": t}) for t in ("one", None, "two", None, "three")]
    (folder / "x.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(openwebtext, "FOLDER", top / "data/openwebtext")
    call(openwebtext, "--source", folder, "--val_documents", "1")
    data = load("openwebtext")
    end = "<|endoftext|>"
    assert data.tokenizer.decode(everything(data)) == f"one{end}two{end}three{end}"
    assert "left out: 2" in capsys.readouterr().out


def load_in(folder):
    """Load stories, a fifth of them, in a fresh clone, whose root is the folder, and print their
    fingerprint."""
    common.ROOT = dataset.ROOT = folder
    stories.FOLDER = folder / "data/stories"
    stories.main = lambda argv: stories.write_stories(stories.FOLDER, stories.Config(train=6000))
    script.command(lambda: print(
        dataset.load_data("stories", processes.start("cpu")).fingerprint))


def test_runs_started_at_once_make_a_built_in_dataset_once(tmp_path):
    """Three processes in a fresh clone: one makes it, the others wait, all read the same, and
    nothing is left. Without the lock one died in 8 of 9 tries. No false alarm."""
    (tmp_path / "data/stories").mkdir(parents=True)
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    started = [begin(file, load_in, tmp_path) for file in files]
    for process in started:
        process.join(120)
    outputs = [file.read_text() for file in files]
    assert [process.exitcode for process in started] == [0] * 3, outputs
    assert "".join(outputs).count("stories of 50 words") == 1
    assert len({out.splitlines()[-1] for out in outputs}) == 1
    assert sorted(os.listdir(tmp_path / "data/stories")) == ["meta.json", "train.bin", "val.bin"]
