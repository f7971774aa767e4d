"""What data.py promises, in the order of that file:

- Files: nothing incomplete ever bears the final name, and no archive writes outside its folder.
- Tasks: words survive the trip to a string and back; splits are the same on every call and never overlap.
- Substitution tables: neighbours are near, frequent and in order.
- Tokens: one per word whatever the text; no text becomes a special token; candidate 0 is the word itself; only the
  last text has candidates; the premise is kept.
- Batches: every class equally often, each example at most once.
- Bad input of every kind gives one line that says where and what.
"""

import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import random
import tarfile
import threading
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import nltk
import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import BertTokenizer, RobertaTokenizer

import data

SHARED = Path(__file__).parents[2] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are not here")


def words_available():
    try:
        data.prepare_nltk(SHARED if SHARED.is_dir() else None)
        return True
    except data.InputError:
        return False


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def punkt():
    """Real tokenization where NLTK's data can be had, else the test is skipped."""
    if not words_available():
        pytest.skip("punkt_tab is not installed")


@pytest.fixture
def plain_words(monkeypatch):
    """Splitting at white space in place of NLTK, for tests that are not about words."""
    monkeypatch.setattr(data, "prepare_nltk", lambda *args, **kwargs: None)
    monkeypatch.setattr(nltk, "word_tokenize", lambda text: text.split())


# -------------------------------------------------------------------------------------------------- files


BODY = bytes(random.Random(0).randbytes(300_000))


class Server(http.server.BaseHTTPRequestHandler):
    """Serves BODY in the manner that the path names; /break sends half of it the first times."""

    served = Counter()

    def do_GET(self):
        manner = self.path.split("/")[1]
        Server.served[self.path] += 1
        first = Server.served[self.path] <= 2
        if manner == "missing":
            return self.send_error(404)
        if manner == "busy" and first:
            return self.send_error(503)
        body = {"html": b" <!DOCTYPE html><p>sign in", "wrong": b"x" * 1000}.get(manner, BODY)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + (10 if manner == "short" else 0)))
        self.end_headers()
        if manner == "alwaysbreak":
            body = body[:1000]
        elif manner == "break" and first:
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.served.clear()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("manner", ["fine", "break", "busy"])
def test_a_download_is_complete_also_after_a_broken_connection(server, tmp_path, manner):
    path = tmp_path / "new" / "file.bin"
    data.download(f"{server}/{manner}/x", path, hashlib.md5(BODY).hexdigest(), pause=0.01)
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("manner, name, md5, message", [
    ("html", "a.bin", None, "HTML page"),
    ("wrong", "a.bin", "0" * 32, "wrong checksum"),
    ("short", "a.bin", None, "the connection broke after 300000 of 300010 bytes"),
    ("alwaysbreak", "a.bin", None, "the connection broke after 1000 of 300000"),
    ("missing", "a.bin", None, "Error 404"),
])
def test_a_failed_download_leaves_nothing_and_says_where_to_put_the_file(server, tmp_path, manner, name, md5, message):
    with pytest.raises(data.InputError, match=message) as error:
        data.download(f"{server}/{manner}/x", tmp_path / name, md5, pause=0.01)
    assert server in str(error.value) and str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_keeps_what_was_there(server, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(data.InputError):
        data.download(f"{server}/html/x", tmp_path / "a.bin", pause=0.01)
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_an_unreachable_server_is_one_line(tmp_path):
    with pytest.raises(data.InputError, match="refused.*by hand"):
        data.download("http://127.0.0.1:9/x", tmp_path / "a.bin", tries=2, pause=0.01)


def test_two_processes_may_download_the_same_file_at_once(server, tmp_path):
    path = tmp_path / "file.bin"
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=data.download, args=(f"{server}/fine/x", path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    assert path.read_bytes() == BODY and len(list(tmp_path.iterdir())) == 1


def test_what_is_missing_is_downloaded_into_the_cache_and_data_dir_is_not_written(server, tmp_path, cache, monkeypatch):
    source = ("file.bin", "folder", f"{server}/fine/x", hashlib.md5(BODY).hexdigest())
    monkeypatch.setitem(data.RESOURCES, "imdb", source)
    mine = tmp_path / "mine"
    mine.mkdir()
    assert data.locate("imdb", mine) == cache / "file.bin"
    assert list(mine.iterdir()) == []
    (mine / "folder").mkdir()
    assert data.locate("imdb", mine) == mine / "folder"


def make_tar(path, *members):
    """members: (name, type, link target)"""
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode = kind, target, 0o666
            content = b"content" if kind == tarfile.REGTYPE else b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("member", [
    ("../evil", tarfile.REGTYPE, ""),
    ("a/../../evil", tarfile.REGTYPE, ""),
    ("/evil", tarfile.REGTYPE, ""),
])
def test_unpacking_never_leaves_its_folder(tmp_path, member):
    make_tar(tmp_path / "a.tar.gz", ("good", tarfile.REGTYPE, ""), member)
    with suppress(data.InputError):  # an absolute path may lose its "/" instead
        data.unpack(tmp_path / "a.tar.gz", tmp_path / "sub" / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar.gz", "sub"} and not Path("/evil").exists()
    assert [p.name for p in (tmp_path / "sub").iterdir()] in ([], ["out"])  # all of it or nothing


@pytest.mark.parametrize("member", [
    ("evil", tarfile.SYMTYPE, "../outside"),
    ("evil", tarfile.SYMTYPE, "/etc/passwd"),
    ("evil", tarfile.LNKTYPE, "../outside"),
    ("evil", tarfile.FIFOTYPE, ""),
    ("evil", tarfile.CHRTYPE, ""),
])
def test_links_and_devices_are_not_unpacked(tmp_path, member):
    make_tar(tmp_path / "a.tar.gz", ("good", tarfile.REGTYPE, ""), member)
    data.unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good"]


def test_a_damaged_archive_leaves_nothing(tmp_path):
    make_tar(tmp_path / "a.tar.gz", ("good", tarfile.REGTYPE, ""), ("../evil", tarfile.REGTYPE, ""))
    for content in ((tmp_path / "a.tar.gz").read_bytes(), (tmp_path / "a.tar.gz").read_bytes()[:60], b"<html>"):
        (tmp_path / "a.tar.gz").write_bytes(content)
        with pytest.raises(data.InputError, match="a.tar.gz: cannot be read"):
            data.unpack(tmp_path / "a.tar.gz", tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


def test_unpacked_files_are_private_and_a_second_unpacking_changes_nothing(tmp_path):
    make_tar(tmp_path / "a.tar.gz", ("d/good", tarfile.REGTYPE, ""))
    data.unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert [p.stat().st_mode & 0o777 for p in (tmp_path / "out", tmp_path / "out/d", tmp_path / "out/d/good")] == \
        [0o700, 0o700, 0o600]
    (tmp_path / "out/d/good").write_text("mine")
    data.unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert (tmp_path / "out/d/good").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_writing_keeps_the_old_file_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    data.write_atomically(tmp_path / "sub" / "a", "é")
    assert (tmp_path / "sub" / "a").read_bytes() == "é".encode()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.os, "replace", full)
    with pytest.raises(data.InputError, match="a: cannot be written .No space left"):
        data.write_atomically(tmp_path / "sub" / "a", b"new")
    assert [p.read_bytes() for p in (tmp_path / "sub").iterdir()] == ["é".encode()]
    with pytest.raises(data.InputError, match="cannot be written"):
        data.write_atomically(tmp_path / "sub" / "a" / "below a file", b"new")


# -------------------------------------------------------------------------------------------------- tasks


ODD = ["", " ", "one", "...", "?!,;", "😀 👩‍👩‍👧 مرحبا 你好 नमस्ते", "[SEP] [CLS] </s> <mask> <pad> [unk]",
       "a\tb\nc\r\n\x0bd\x85e\u2028f",
       "\x00\x01\x7f", "\ud800 \udfff", "İSTANBUL ŒUVRE ﬁ ΑΣ", "a" * 5000, "it's don't \"quoted\" ``", "<br /><br />"]


def test_words_come_back_from_their_string_whatever_the_text(punkt):
    rng = random.Random(0)
    odd = ODD + ["".join(chr(rng.choice([rng.randrange(0x20, 0x7F), rng.randrange(0x110000)])) for _ in range(60))
                 for _ in range(300)]
    for text in odd:
        words = (tuple(data.words_of(text)),)
        assert data.from_text(data.to_text(words)) == words
        assert all(word and word == word.lower() for word in words[0])
        json.dumps(words).encode("ascii"), data.to_text(words).encode("utf-8")
    pair = (("a", "man"), ())
    assert data.to_text(pair) == ("a man", "") and data.from_text(("a man", "")) == pair


def test_text_is_split_before_it_is_lower_cased_and_breaks_become_spaces(punkt):
    assert data.words_of("Good film.<br /><br />Don't") == ["good", "film", ".", "do", "n't"]
    assert len(data.words_of("word " * 100_000)) == 100_000


def write_tsv(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        header = ("label", "text", "text2")[: len(rows[0])]
        lines = "".join("\t".join(row) + "\n" for row in (header, *rows))
        (folder / f"{split}.tsv").write_text(lines, encoding="utf-8")
    return folder


def numbered(**counts):
    return [(label, f"{label} {i}") for label, n in counts.items() for i in range(n)]


def texts(examples):
    return [data.to_text(example.words) for example in examples]


@pytest.mark.parametrize("sizes", [{}, dict(dev_size=30), dict(train_size=60), dict(train_size=91, dev_size=50)])
def test_dev_is_taken_from_train_and_never_overlaps_with_it(tmp_path, plain_words, sizes):
    folder = write_tsv(tmp_path / "own", train=numbered(a=70, b=90, c=100), test=numbered(a=5, b=5, c=4))
    task = data.load_task(folder, **sizes)
    assert not set(texts(task.train)) & set(texts(task.dev))
    assert task.labels == ["a", "b", "c"] and task.name == "own"
    for split, size in ((task.train, sizes.get("train_size")), (task.dev, sizes.get("dev_size"))):
        if size:
            assert Counter(e.y for e in split) == dict.fromkeys(range(3), size // 3)
    if not sizes:
        assert Counter(e.y for e in task.dev) == {0: 7, 1: 9, 2: 10} and len(task.train) + len(task.dev) == 260
    assert all(data.to_text(e.words).startswith("abc"[e.y]) for e in task.train + task.dev + task.test)


def test_the_split_is_the_same_on_every_call_and_depends_on_its_seed_alone(tmp_path, plain_words):
    folder = write_tsv(tmp_path / "own", train=numbered(a=70, b=90), test=numbered(a=50, b=50))
    task = data.load_task(folder, train_size=40, test_size=20)
    assert task == data.load_task(folder, train_size=40, test_size=20)
    assert task.fingerprint != data.load_task(folder, train_size=40, test_size=20, split_seed=1).fingerprint
    assert texts(data.load_task(folder, train_size=40, dev_size=60).train) == texts(task.train)  # whatever the dev size
    assert set(texts(data.load_task(folder, train_size=60).train)) > set(texts(task.train))  # subsets are nested
    assert len({e.y for e in task.test[:8]}) == 2  # and their order is random


def test_a_given_dev_split_pairs_bom_and_crlf_are_read_as_they_are(tmp_path, plain_words):
    folder = tmp_path / "own"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        (folder / f"{split}.tsv").write_bytes(
            b"\xef\xbb\xbflabel\ttext\ttext2\r\n" + b"".join(f"{y}\tA {split}\tB  {y}\r\n".encode() for y in "1010")
            + b"0\t\t\r\n")
    task = data.load_task(folder)
    assert Counter(task.dev) == {data.Example((("a", "dev"), ("b", y)), int(y)): 2 for y in "01"} | {
        data.Example(((), ()), 0): 1}
    assert len(task.train) == 5


GOOD = "label\ttext\na\tx\na\ty\nb\tx\nb\ty\na\tz\nb\tz\n"


@pytest.mark.parametrize("split, content, message", [
    ("train", "", "train.tsv, line 1: '', wanted the header"),
    ("train", "label\ttext\n", "train.tsv, line 1: .*then examples"),
    ("train", "a\tx\nb\ty\n", r"train.tsv, line 1: 'a\\tx', wanted the header"),
    ("train", "label,text\na,x\n", "line 1: 'label,text', wanted the header"),
    ("train", GOOD + "a\n", r"train.tsv, line 8: \['a'\], wanted 'label\\ttext'"),
    ("train", GOOD + "a\tx\ty\n", r"train.tsv, line 8: \['a', 'x', 'y'\], wanted"),
    ("train", GOOD + "\n", r"train.tsv, line 8: \[''\], wanted"),
    ("train", GOOD + "\tx\n", "train.tsv, line 8: .*with a label"),
    ("train", GOOD + "c\tx\n", "class 'c' has 0 training examples"),
    ("train", "label\ttext\na\tx\na\ty\n", "train.tsv: only one class, 'a'"),
    ("train", b"label\ttext\na\tx\na\t\xff\n", "train.tsv, line 3: not UTF-8 .byte 0xff"),
    ("train", GOOD.encode("utf-16"), "train.tsv, line 1: not UTF-8"),
    ("train", "label\ttext\na\tx\na\ty\nb\tx\nb\ty\n", "class 'a' has 1 training examples"),
    ("test", "label\ttext\nc\tx\n", "test.tsv, line 2: label 'c' does not occur in train.tsv"),
    ("dev", GOOD + "c\tx\n", "dev.tsv, line 8: label 'c' does not occur"),
    ("test", "label\ttext\ttext2\na\tx\ty\n", r"test.tsv, line 1: .*text2', wanted the header 'label\\ttext',"),
    ("test", None, "test.tsv: cannot be read .No such file"),
    ("train", None, "train.tsv: cannot be read .No such file"),
])
def test_bad_tsv_files_are_refused_by_file_line_and_value(tmp_path, plain_words, split, content, message):
    for name, text in {"train": GOOD, "test": GOOD, split: content}.items():
        if text is not None:
            (tmp_path / f"{name}.tsv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(data.InputError, match=message) as error:
        data.load_task(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sizes, message", [
    (dict(train_size=1000), "train: 1000 examples are 500 of each class, wanted 1 to 9 .class 'a'"),
    (dict(test_size=9), "test: 9 examples are 4 of each class, wanted 1 to 3 .class 'a'"),
    (dict(dev_size=40), "dev: 40 examples are 20 of each class"),
    (dict(test_size=1), "test: 1 examples are 0 of each class, wanted 1 to"),
    (dict(dev_size=0), "dev: 0 examples are 0 of each class, wanted 1 to"),
    (dict(train_size=-4), "train: -4 examples are -2 of each class, wanted 1 to"),
    (dict(train_size=2), "has 1 training examples"),
    (dict(dev_size=20), "has 0 training examples"),
    (dict(split_seed=-1), "split seed -1"),
])
def test_sizes_that_cannot_be_had_are_refused(tmp_path, plain_words, sizes, message):
    folder = write_tsv(tmp_path / "own", train=numbered(a=10, b=15), test=numbered(a=3, b=9))
    with pytest.raises(data.InputError, match=message):
        data.load_task(folder, **sizes)


def test_unknown_tasks_and_folders_are_refused(tmp_path):
    with pytest.raises(data.InputError, match="unknown task 'imbd'"):
        data.load_task("imbd")
    with pytest.raises(data.InputError, match="no such folder"):
        data.load_task("imdb", tmp_path / "nowhere")


def imdb_archive(path, skip=None):
    with tarfile.open(path, "w:gz") as tar:
        for split in ("test", "train"):
            for label in ("pos", "neg"):
                for i in reversed(range(20)):
                    content = f"{split} {label} {i}".encode()
                    info = tarfile.TarInfo(f"aclImdb/{split}/{label}/{i}_1.txt")
                    info.size = len(content)
                    if (split, label) != skip:
                        tar.addfile(info, io.BytesIO(content))
        tar.addfile(tarfile.TarInfo("aclImdb/train/unsup/0_0.txt"))


def test_imdb_is_the_same_packed_and_unpacked(tmp_path, plain_words):
    imdb_archive(tmp_path / "aclImdb_v1.tar.gz")
    packed = data.load_task("imdb", tmp_path)
    assert packed.labels == ["neg", "pos"] and len(packed.train) == 36 and len(packed.dev) == 4
    assert all(e.words[0][1] == packed.labels[e.y] for e in packed.train + packed.test)
    data.unpack(tmp_path / "aclImdb_v1.tar.gz", tmp_path / "un")
    assert data.load_task("imdb", tmp_path / "un") == packed


def test_damaged_imdb_archives_are_refused_wherever_they_are_cut(tmp_path, plain_words):
    path = tmp_path / "aclImdb_v1.tar.gz"
    imdb_archive(path)
    whole = path.read_bytes()
    for n in [0, 5, 20, len(whole) // 2, len(whole) - 9, len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(data.InputError, match="aclImdb_v1.tar.gz: (cannot be read|holds no)"):
            data.load_task("imdb", tmp_path)
    for content in (b"<html>sign in</html>", gzip.compress(b"<html>" * 1000), whole[:300] + b"xxxx" + whole[304:]):
        path.write_bytes(content)
        with pytest.raises(data.InputError, match="aclImdb_v1.tar.gz: (cannot be read|holds no)"):
            data.load_task("imdb", tmp_path)
    imdb_archive(path, skip=("test", "neg"))
    with pytest.raises(data.InputError, match="holds no aclImdb/test/neg"):
        data.load_task("imdb", tmp_path)


def snli_archive(path, **extra):
    def row(label, premise, hypothesis):
        return json.dumps({"gold_label": label, "sentence1": premise, "sentence2": hypothesis})

    with zipfile.ZipFile(path, "w") as archive:
        for split in ("train", "dev", "test"):
            rows = [row(label, f"{split} P", f"H {label}") for label in ("neutral", "-", "contradiction", "entailment")]
            archive.writestr(f"snli_1.0/snli_1.0_{split}.jsonl", "\n".join(extra.get(split, rows * 2)))


def test_snli_labels_are_numbered_as_in_the_paper_and_undecided_pairs_dropped(tmp_path, plain_words):
    snli_archive(tmp_path / "snli_1.0.zip")
    task = data.load_task("snli", tmp_path)
    assert task.labels == ["entailment", "contradiction", "neutral"] and len(task.train) == 6
    assert all(e.words == ((s, "p"), ("h", task.labels[e.y])) for s in ("train", "dev") for e in getattr(task, s))
    zipfile.ZipFile(tmp_path / "snli_1.0.zip").extractall(tmp_path / "un")
    assert data.load_task("snli", tmp_path / "un") == task


@pytest.mark.parametrize("lines, message", [
    (["{}"], "snli_1.0_dev.jsonl, line 1: '{}', wanted JSON with the strings"),
    (["[]"], "line 1: .*wanted JSON"),
    (['{"gold_label": "-", "sentence1": "", "sentence2": ""}', "<html>"], "line 2: .*wanted JSON"),
    (['{"gold_label": "-", "sentence1": 3, "sentence2": ""}'], "line 1: .*wanted JSON"),
    (['{"gold_label": "neutrl", "sentence1": "", "sentence2": ""}'], "line 1: .*neutrl.*wanted.*neutral or -"),
])
def test_bad_snli_lines_are_refused(tmp_path, plain_words, lines, message):
    snli_archive(tmp_path / "snli_1.0.zip", dev=lines)
    with pytest.raises(data.InputError, match=message):
        data.load_task("snli", tmp_path)


def test_damaged_snli_archives_are_refused(tmp_path, plain_words):
    path = tmp_path / "snli_1.0.zip"
    snli_archive(path)
    whole = path.read_bytes()
    for content in (b"", b"<html>", whole[:-30], whole[:60] + b"xxxx" + whole[64:]):
        path.write_bytes(content)
        with pytest.raises(data.InputError, match="snli_1.0.zip.*: cannot be read"):
            data.load_task("snli", tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(data.InputError, match="holds no snli_1.0_train.jsonl"):
        data.load_task("snli", tmp_path)


def test_tokenized_words_are_cached_and_a_damaged_cache_is_computed_anew(cache, plain_words, monkeypatch):
    raw = [f"Text {i} \ud800 é" for i in range(600)]
    first = data.tokenize(raw)
    (file,) = cache.iterdir()
    monkeypatch.setattr(data, "words_of", None)  # not called again
    assert data.tokenize(raw) == first
    monkeypatch.undo()
    monkeypatch.setattr(nltk, "word_tokenize", lambda text: text.split())
    monkeypatch.setenv("RIFT_CACHE", str(cache))
    file.write_bytes(file.read_bytes()[:-100])
    assert data.tokenize(raw) == first


@shared
def test_the_real_archives_load(punkt):
    task = data.load_task("imdb", SHARED, train_size=20, dev_size=10, test_size=10)
    assert Counter(e.y for e in task.train) == {0: 10, 1: 10} and Counter(e.y for e in task.test) == {0: 5, 1: 5}
    task = data.load_task("snli", SHARED, train_size=30, dev_size=9, test_size=10)
    assert (len(task.train), len(task.dev), len(task.test)) == (30, 9, 9)
    assert all(len(e.words) == 2 for e in task.train)


def test_missing_nltk_data_says_how_to_install(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk.tokenize, "punkt_model_available", lambda: False)
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: False)
    with pytest.raises(data.InputError, match="not found.*python -m nltk.downloader punkt_tab"):
        data.prepare_nltk(tmp_path)
    (tmp_path / "nltk_data.tar.gz").write_bytes(b"<html>")
    with pytest.raises(data.InputError, match="nltk_data.tar.gz: cannot be read"):
        data.prepare_nltk(tmp_path)
    assert not list(cache.glob("nltk_data-*"))


# ---------------------------------------------------------------------------------------------- substitutions


@pytest.mark.parametrize("content, message", [
    ("", "wanted a JSON object"), ("[" * 100_000, "wanted a JSON object"), ("[]", "wanted a JSON object"),
    ('{"a": "b"}', "'a' maps to b, wanted a list"), ('{"a": [1]}', "'a' maps to .1., wanted"),
    ('{"a": ["b c"]}', "'a' maps to .'b c'., wanted"), ('{"a": ["B"]}', "'a' maps to .'B'., wanted"),
    ('{"a": [""]}', "'a' maps to"), ('{"a": ["\\u0085"]}', "'a' maps to"), (b"{\xff", "line 1: not UTF-8"),
])
def test_bad_neighbour_tables_are_refused(tmp_path, content, message):
    path = tmp_path / "table.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(data.InputError, match=message):
        data.load_neighbors(path)


def test_neighbour_tables_are_known_by_their_content(tmp_path):
    (tmp_path / "t.json").write_text('{"b": ["a"], "a": ["b", "c"], "two words": ["x"], "UNK": ["x"]}')
    table = data.load_neighbors(tmp_path / "t.json")
    assert table == {"b": ["a"], "a": ["b", "c"]}
    assert data.table_fingerprint(table) == data.table_fingerprint(dict(reversed(table.items())))
    assert data.table_fingerprint(table) != data.table_fingerprint({"b": ["a"], "a": ["c", "b"]})
    for bad, message in (("t.csv", "wanted `wordnet`"), ("none.json", "cannot be read .No such file")):
        with pytest.raises(data.InputError, match=message):
            data.load_neighbors(tmp_path / bad)


def test_vector_neighbours_are_near_frequent_and_in_order(tmp_path):
    rng = np.random.default_rng(0)
    X = np.round(rng.normal(size=(2500, 4)) * 0.7, 4)
    words = [f"w{i}" for i in range(2500)]
    counts = Counter({f"w{i}": 5000 - i for i in range(0, 2500, 2)}) + Counter({"no-vector": 9999})
    lines = "".join(f"{word} {' '.join(map(str, row))}\n" for word, row in zip(words, X))
    (tmp_path / "v.txt").write_text(lines)
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        archive.writestr("v.txt", lines)
    table = data.vector_neighbors(tmp_path / "v.txt", counts, k=5, max_sq_dist=0.1, vocabulary=1201, skip=10)
    kept = list(range(0, 2400, 2))  # 1,201 most frequent words, one of which has no vector
    for rank, i in enumerate(kept):
        d = ((X[kept] - X[i]) ** 2).sum(1).round(9)
        near = [f"w{kept[j]}" for j in np.argsort(d, kind="stable") if d[j] < 0.1 and kept[j] != i][:5]
        assert table.get(f"w{i}", []) == (near if rank >= 10 else [])
    again = data.load_neighbors(tmp_path / "v.zip", train_words=counts)  # the .zip, and the paper's numbers
    assert again == data.vector_neighbors(tmp_path / "v.txt", counts, 8, 0.5, 50_000, 27)


def test_equally_frequent_words_are_ranked_by_the_alphabet_and_the_cache_changes_nothing(tmp_path, cache):
    (tmp_path / "v.txt").write_text("b 0 0\na 0 0.1\nc 0 0.2\nd 0 0.3\n")
    counts = Counter(dict.fromkeys("dcba", 1))
    for _ in range(2):
        table = data.vector_neighbors(tmp_path / "v.txt", counts, skip=1, vocabulary=3)
        assert table == {"b": ["a", "c"], "c": ["a", "b"]}
    (file,) = cache.iterdir()
    file.write_text("{damaged")
    assert data.vector_neighbors(tmp_path / "v.txt", counts, skip=1, vocabulary=3) == table


@pytest.mark.parametrize("content, message", [
    ("a 1 2\nb 1\n", "v.txt, line 2: 'b 1', wanted a word and 2 numbers"),
    ("a 1 2\nb 1 2 3\n", "line 2: 'b 1 2 3', wanted a word and 2 numbers"),
    ("a 1 2\nb 1 x\n", "line 2: 'b 1 x', wanted"),
    ("a 1 2\nb 1 nan\n", "line 2: 'b 1 nan', wanted"),
    ("a 1 2\n\n", "line 2: '', wanted"),
    ("a\n", "line 1: 'a', wanted a word and some numbers"),
    (b"a 1 2\n\xff 1 2\n", "line 2: not UTF-8 .byte 0xff"),
    ("", "line 1: '', wanted a word and some numbers"),
    ("z 1 2\n", "none of the 1 training words"),
])
def test_bad_vector_files_are_refused_by_line(tmp_path, content, message):
    path = tmp_path / "v.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(data.InputError, match=message):
        data.load_neighbors(path, train_words=Counter("a"))


def test_bad_vector_archives_are_refused(tmp_path):
    (tmp_path / "v.zip").write_bytes(b"<html>")
    with pytest.raises(data.InputError, match="v.zip: cannot be read"):
        data.load_neighbors(tmp_path / "v.zip", train_words=Counter("a"))
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(data.InputError, match="wanted one .txt file in it, there are 0"):
        data.load_neighbors(tmp_path / "v.zip", train_words=Counter("a"))


@shared
def test_wordnet_synonyms_are_single_words_without_repeats():
    table = data.load_neighbors("wordnet", SHARED)
    assert table.get("film")[:3] == ["movie", "picture", "pic"]
    for word in ("film", "good", "run", "new"):
        assert len(set(table.get(word))) == len(table.get(word)) and word not in table.get(word)
        assert all("_" not in other and other == other.lower() for other in table.get(word))
    assert table.get("xyzzyx", ["mine"]) == ["mine"] and table.get("film") is table.get("film")
    assert len(data.table_fingerprint(table)) == 64


# ------------------------------------------------------------------------------------------------- tokens


NEIGHBORS = {"good": ["great", "fine", "goods", "good", "great"], "film": ["movie", "films", "cinematic"], "a": ["an"]}


def bert(tmp_path):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz[]<>/.,'", "##s", "##e", "good",
             "great", "fine", "film", "movie", "cinema", "##tic", "an", "the", "man", "sep"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocab)})


def roberta(tmp_path):
    corpus = ["a good film , a great movie , a fine café . the man is an actor </s> <mask>"] * 50
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(corpus, vocab_size=400, min_frequency=2,
                            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False)
    bpe.save_model(str(tmp_path))
    return RobertaTokenizer.from_pretrained(str(tmp_path))


@pytest.fixture(params=[bert, roberta])
def tokenizer(request, tmp_path):
    return request.param(tmp_path)


@pytest.mark.parametrize("unknown", ["piece", "unk"])
def test_one_token_per_word_and_none_is_special_whatever_the_text(tokenizer, unknown):
    vocabulary = data.Vocabulary(tokenizer, 50, NEIGHBORS, unknown)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    rng = random.Random(0)
    odd = ODD + tokenizer.all_special_tokens + [token.lower() for token in tokenizer.all_special_tokens]
    odd += ["".join(chr(rng.choice([rng.randrange(0x20, 0x7F), rng.randrange(0x110000)])) for _ in range(8))
            for _ in range(300)]
    for text in odd:
        for words in ((tuple(text.split()),), (tuple(text.split()), tuple(text.split()[:2])), ((text,),)):
            ids = vocabulary.input_ids(words)
            shown = vocabulary.visible(words)
            assert len(ids) == 1 + sum(len(text) + 1 for text in shown) <= 50
            inside = np.delete(ids, [0, 1 + len(shown[0]), len(ids) - 1])
            assert not set(inside.tolist()) & special
            assert ids[0] == tokenizer.cls_token_id and ids[-1] == ids[1 + len(shown[0])] == tokenizer.sep_token_id
            assert all(0 <= i < len(tokenizer) for i in ids)


def test_a_word_of_the_vocabulary_is_one_token_and_another_its_first_piece(tmp_path):
    tokenizer = bert(tmp_path)
    tokens = tokenizer.convert_ids_to_tokens
    piece, unk = data.Vocabulary(tokenizer, 9), data.Vocabulary(tokenizer, 9, unknown="unk")
    words = ["good", "films", "[sep]", "[SEP]", "😀", "cinematic", "é"]
    assert tokens([piece.token(w) for w in words]) == ["good", "film", "[", "[", "[UNK]", "cinema", "e"]
    assert tokens([unk.token(w) for w in words]) == ["good"] + ["[UNK]"] * 6


def test_a_word_of_byte_level_bpe_has_its_leading_space(tmp_path):
    tokenizer = roberta(tmp_path)
    tokens = tokenizer.convert_ids_to_tokens
    vocabulary = data.Vocabulary(tokenizer, 9)
    assert tokens([vocabulary.token(w) for w in ("good", "film")]) == ["Ġgood", "Ġfilm"]
    assert vocabulary.token("café") == tokenizer.encode(" café", add_special_tokens=False)[0]
    assert tokens(vocabulary.token("</s>")).startswith("Ġ")  # "<mask>" and "</s>" would be tokens otherwise
    # the vocabulary spells café "cafÃ©": a word that looks like that spelling is another word
    assert vocabulary.token("cafÃ©") == tokenizer.encode(" cafÃ©", add_special_tokens=False)[0]
    assert vocabulary.token("cafÃ©") != vocabulary.token("café") == tokenizer.get_vocab()["ĠcafÃ©"]
    assert tokens(vocabulary.input_ids((("good",), ("film",)))) == ["<s>", "Ġgood", "</s>", "Ġfilm", "</s>"]


def test_candidates_are_the_word_itself_then_the_table_without_equals(tmp_path):
    tokenizer = bert(tmp_path)
    vocabulary = data.Vocabulary(tokenizer, 9, NEIGHBORS)
    names = lambda ids: tokenizer.convert_ids_to_tokens(list(ids))
    assert names(vocabulary.candidates("good")) == ["good", "great", "fine", "great"]  # "goods" is the piece "good"
    assert names(vocabulary.candidates("film")) == ["film", "movie", "cinema"]
    assert names(vocabulary.candidates("man")) == ["man"]
    assert names(data.Vocabulary(tokenizer, 9, NEIGHBORS, max_candidates=2).candidates("good")) == ["good", "great"]
    assert names(data.Vocabulary(tokenizer, 9, NEIGHBORS, max_candidates=1).candidates("good")) == ["good"]


def test_encoding_holds_the_candidates_of_the_last_text_only(tokenizer):
    vocabulary = data.Vocabulary(tokenizer, 12, NEIGHBORS)
    batch = [(("a", "good", "man"),), (("a", "good", "man"), ("film", "good")), ((),), ((), ("the",)),
             (("the",) * 20,), (("good",) * 20, ("film",)), (("the",) * 5, ("film",) * 20)]
    out = vocabulary.encode(batch, hull=True)
    ids, subs, mask = out["input_ids"], out["subs"], out["subs_mask"]
    B, L = ids.shape
    assert (B, L) == (7, 12) and subs.shape == mask.shape == (7, 12, mask.sum(2).max())
    assert ids.dtype == subs.dtype == out["attention_mask"].dtype == torch.int64 and mask.dtype == torch.bool
    assert torch.equal(subs[..., 0], ids) and mask[..., 0].all()
    assert (subs[~mask] == tokenizer.pad_token_id).all()
    for b, words in enumerate(batch):
        expected = [[i] for i in vocabulary.input_ids(words)]
        last = vocabulary.visible(words)[-1]
        end = len(expected) - 1
        expected[end - len(last):end] = [list(vocabulary.candidates(word)) for word in last]
        expected += [[tokenizer.pad_token_id]] * (L - len(expected))
        assert [subs[b, l][mask[b, l]].tolist() for l in range(L)] == expected
        assert out["attention_mask"][b].tolist() == [1] * (end + 1) + [0] * (L - end - 1)
    plain = vocabulary.encode(batch)
    assert set(plain) == {"input_ids", "attention_mask"} and torch.equal(plain["input_ids"], ids)
    assert vocabulary.encode([((),)], hull=True)["subs"].shape == (1, 2, 1)


def test_thousands_of_words_keep_their_candidates(tmp_path):
    vocabulary = data.Vocabulary(bert(tmp_path), 5000, {f"w{i}": ["good"] * (i % 3) for i in range(4000)})
    out = vocabulary.encode([(tuple(f"w{i}" for i in range(4000)),)], hull=True)
    assert out["subs_mask"].sum(2)[0, 1:-1].tolist() == [1 + i % 3 for i in range(4000)]


def test_the_premise_is_kept_and_the_hypothesis_cut(tmp_path):
    visible = data.Vocabulary(bert(tmp_path), 10).visible
    assert visible((tuple("abcdefghijkl"),)) == (tuple("abcdefgh"),)
    assert visible((tuple("abcde"), tuple("fghijkl"))) == (tuple("abcde"), tuple("fg"))
    assert visible((tuple("abcdefghijkl"), tuple("mn"))) == (tuple("abcdefg"), ())
    assert data.Vocabulary(bert(tmp_path), 3).visible((tuple("ab"), tuple("cd"))) == (("a",)[:0], ())


@pytest.mark.parametrize("change, message", [
    (dict(max_len=2), "longest input 2"), (dict(unknown="skip"), "'skip'"), (dict(max_candidates=0), "0 candidates"),
])
def test_vocabulary_refuses_what_cannot_work(tmp_path, change, message):
    with pytest.raises(data.InputError, match=message):
        data.Vocabulary(**dict(tokenizer=bert(tmp_path), max_len=9) | change)


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("counts, batch_size", [((10, 10), 4), ((7, 31), 4), ((100, 40, 63), 9), ((500, 900), 8),
                                                ((3, 90), 32), ((2, 2, 2), 120), ((11, 11, 12), 13)])
def test_batches_hold_every_class_equally_often_and_no_example_twice(counts, batch_size):
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    lengths = rng.integers(1, 300, len(y))
    C, per = len(counts), batch_size // len(counts)
    batches = data.balanced_batches(y, lengths, batch_size, rng, window=5)
    for batch in batches:
        assert (y[batch] == np.repeat(np.arange(C), len(batch) // C)).all()
        assert 2 * C <= len(batch) <= per * C
    used = np.concatenate(batches)
    assert len(set(used.tolist())) == len(used)
    left = min(counts) - len(used) // C  # the smallest class is used up, but for a single example
    assert left == (1 if min(counts) % per == 1 else 0)
    assert sum(len(batch) < per * C for batch in batches) <= 1


def test_batches_are_drawn_anew_but_repeatable_and_of_like_length():
    y = np.repeat([0, 1], [300, 2000])
    lengths = np.random.default_rng(1).integers(1, 300, len(y))
    epoch = lambda seed: data.balanced_batches(y, lengths, 8, np.random.default_rng(seed))
    assert all((a == b).all() for a, b in zip(epoch(0), epoch(0), strict=True))
    surplus = [set(np.concatenate(epoch(seed)).tolist()) - set(range(300)) for seed in (0, 1)]
    assert len(surplus[0]) == 300 and len(surplus[0] & surplus[1]) < 100
    spread = lambda batches: np.mean([lengths[batch].max() - lengths[batch].min() for batch in batches])
    assert spread(epoch(0)) < 0.3 * spread([np.random.default_rng(2).permutation(300)[:8] for _ in range(50)])


@pytest.mark.parametrize("y, batch_size, message", [
    ([0, 0, 1], 4, r"classes of \[2, 1\] examples: wanted at least 2"), ([0, 0, 1, 1], 3, "batches of 3 from"),
    ([0, 0], 4, r"classes of \[2\]"), ([], 4, r"classes of \[\]"),
])
def test_batches_that_cannot_be_balanced_are_refused(y, batch_size, message):
    with pytest.raises(data.InputError, match=message):
        data.balanced_batches(y, [1] * len(y), batch_size, np.random.default_rng(0))
