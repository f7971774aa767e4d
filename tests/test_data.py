"""What data.py promises, in the order of that file.

- Files: nothing incomplete ever has the final name, and no archive writes outside its folder.
- Words: a contraction is one however its apostrophe is written; its pieces have no substitutes.
- Tasks: splits are the same on every call and never overlap.
- Substitution tables: neighbours are near, frequent and in order; function words have no synonyms.
- Tokens: one per word whatever the text; a token is once among a position's candidates.
- Batches: every class equally often, each example at most once.
- Encoders: those of another architecture are refused. Command lines: what is wrong is one line.
"""
import errno
import hashlib
import http.client
import io
import json
import os
import random
import shutil
import tarfile
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.error import HTTPError

import nltk
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import data
import train
from tests.conftest import byte_level_bpe

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def nltk_data(tmp_path_factory):
    """Real tokenization and WordNet; the test is skipped where they cannot be had."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIFT_CACHE", str(tmp_path_factory.mktemp("nltk")))
        try:
            data.prepare_nltk(SHARED if SHARED.is_dir() else None, wordnet=True)
        except data.InputError:
            pytest.skip("punkt_tab and wordnet are not installed")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- Files ---------------------------------------------------------------------------------------

BODY = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


class Reply(io.BytesIO):
    """What a server sends of a body: all of it, or only so many bytes."""

    def __init__(self, body, sent=None):
        super().__init__(body[:sent])
        self.headers = Message()
        self.headers["Content-Length"] = str(len(body))

    def info(self):
        return self.headers


def answer(monkeypatch, *replies):
    """The next downloads get these replies; an exception is raised."""
    monkeypatch.setattr(torch.hub, "urlopen", Mock(side_effect=replies))


def zipped(files):
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return body.getvalue()


@pytest.mark.parametrize("body, sha256", [(BODY, SHA256), (zipped({"a": BODY}), None)])
def test_a_download_is_complete_also_after_a_broken_connection(
        tmp_path, monkeypatch, body, sha256):
    answer(monkeypatch, Reply(body, -1000), Reply(body))
    path = tmp_path / "new" / "file.bin"
    data.download("http://x", path, sha256)
    assert path.read_bytes() == body
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("reply, sha256, message", [
    (b"<!DOCTYPE html><p>sign in", None, "not a whole .zip"),
    (b"x", SHA256, f'invalid hash value .expected "{SHA256}", got "'),
    (HTTPError("http://x", 404, "not found", {}, None), SHA256, "Error 404"),
    (http.client.IncompleteRead(b"x"), None, "IncompleteRead")])
def test_a_failed_download_keeps_what_was_there_and_says_where_to_put_the_file(
        tmp_path, monkeypatch, reply, sha256, message):
    answer(monkeypatch, *(Reply(reply) if isinstance(reply, bytes) else reply for _ in range(2)))
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(data.InputError, match=f"{message}.* put it at {tmp_path}/a.bin"):
        data.download("http://x", tmp_path / "a.bin", sha256)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_what_is_missing_is_downloaded_into_the_cache_and_data_dir_is_not_written(
        tmp_path, cache, monkeypatch):
    """The archive comes first: a folder beside it may be unpacked only partly."""
    answer(monkeypatch, Reply(BODY))
    monkeypatch.setitem(data.RESOURCES, "imdb", (["file.bin", "folder"], "http://x", SHA256))
    mine = tmp_path / "mine"
    mine.mkdir()
    assert data.locate("imdb", mine) == cache / "file.bin"
    assert list(mine.iterdir()) == []
    for name in ("folder", "file.bin"):
        (mine / name).mkdir()
        assert data.locate("imdb", mine) == mine / name


def test_without_a_home_folder_one_line_names_the_variable(monkeypatch):
    monkeypatch.delenv("RIFT_CACHE")
    monkeypatch.setattr(Path, "expanduser", Mock(side_effect=RuntimeError("no home directory")))
    with pytest.raises(data.InputError, match="set the environment variable RIFT_CACHE"):
        data.find(None, "imdb")


def make_tar(path, name, kind=tarfile.REGTYPE, target=""):
    """An archive of a file d/good and another member."""
    with tarfile.open(path, "w:gz") as tar:
        for info in (tarfile.TarInfo("d/good"), tarfile.TarInfo(name)):
            info.mode = 0o666
            if info.name == name:
                info.type, info.linkname = kind, target
            tar.addfile(info)
    return path


@pytest.mark.parametrize("member", [
    ("../evil", tarfile.REGTYPE), ("/evil", tarfile.REGTYPE), ("evil", tarfile.FIFOTYPE),
    ("evil", tarfile.SYMTYPE, "/etc/passwd"), ("evil", tarfile.LNKTYPE, "../outside"),
])
def test_unpacking_never_leaves_its_folder(tmp_path, cache, member):
    with suppress(data.InputError):     # an absolute path loses its "/" instead
        data.unpack(make_tar(tmp_path / "a.tar.gz", *member))
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar.gz", "cache"}
    assert not Path("/evil").exists()
    assert {p.name for p in cache.glob("*/*")} == ({"d", "evil"} if member[0][0] == "/" else set())


def test_an_archive_is_unpacked_once_and_what_a_killed_process_left_is_removed(
        tmp_path, cache, monkeypatch):
    out = data.unpack(make_tar(tmp_path / "a.tar.gz", "other"))
    good = out / "d" / "good"
    good.write_text("mine")
    left = [cache / f".{name}.0123.tmp" for name in (out.name, "other")]
    for folder in left:
        folder.mkdir()
    assert data.unpack(tmp_path / "a.tar.gz") == out and good.read_text() == "mine"
    assert left[0].exists()             # perhaps another process unpacks at this moment
    later = time.time() + 4000
    monkeypatch.setattr(data.time, "time", lambda: later)
    data.unpack(tmp_path / "a.tar.gz")
    assert [folder.exists() for folder in left] == [False, True]
    assert data.unpack(make_tar(tmp_path / "a.tar.gz", "changed")) != out


@pytest.mark.parametrize("private, folder, file", [(False, 0o750, 0o640), (True, 0o700, 0o600)])
def test_a_shared_cache_can_be_read_by_others_but_nltk_data_only_by_its_user(
        tmp_path, private, folder, file):
    """The umask decides. NLTK refuses data that is another user's or that others can write."""
    old = os.umask(0o027)
    try:
        out = data.unpack(make_tar(tmp_path / "a.tar.gz", "other"), private)
    finally:
        os.umask(old)
    modes = [p.stat().st_mode & 0o777 for p in (out, out / "d", out / "d" / "good")]
    assert modes == [folder, folder, file] and out.name.endswith(f"-{os.getuid()}") == private


@pytest.mark.parametrize("call", [
    lambda folder: data.find(folder, "a"), lambda folder: data.load_task("imdb", folder),
    lambda folder: data.load_task(folder), lambda folder: data.find_neighbors("a.json", folder)])
def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, monkeypatch, call):
    """Root may read everything, so the system's answer is faked."""
    (tmp_path / "aclImdb").mkdir()
    stat = os.stat

    def refuse(path, *args, **kwargs):
        if "locked" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(data.InputError, match="locked.*: cannot be read .Permission denied"):
        call(tmp_path / "locked")


def test_writing_keeps_the_old_file_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    data.write_atomically(tmp_path / "sub" / "a", "é")
    monkeypatch.setattr(data.os, "replace", full)
    with pytest.raises(data.InputError, match="a: cannot be written .No space left"):
        data.write_atomically(tmp_path / "sub" / "a", b"new")
    assert [p.read_bytes() for p in (tmp_path / "sub").iterdir()] == ["é".encode()]
    with pytest.raises(data.InputError, match="cannot be written"):
        data.write_atomically(tmp_path / "sub" / "a" / "below a file", b"new")


def test_files_of_a_run_come_back_or_are_refused_in_one_line(tmp_path):
    path, w = tmp_path / "file", torch.arange(6.0).reshape(2, 3)
    tensors = {"w": w, "transposed": w.T, "again": w, "part": w[1:]}            # one memory
    data.write_json(path, {"é": [1, None]})
    assert data.read_json(path) == {"é": [1, None]}
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3')      # its writer was killed
    assert data.read_lines(path) == [{"a": 1}, {"a": 2}] and data.read_lines(tmp_path / "no") == []
    for bad in ('{"a": ', "[1]", "null", "[" * 100_000):
        path.write_text('{"a": 1}\n' + bad + '\n{"a": 3}\n')
        with pytest.raises(data.InputError, match=f"^{path}, line 2: {data.NOT_OURS}.*$"):
            data.read_lines(path)
    data.save_tensors(path, tensors, {"epoch": 3})
    loaded, about = data.load_tensors(path)
    assert loaded.keys() == tensors.keys() and about == {"epoch": 3}
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    whole = path.read_bytes()
    for read in (data.read_json, data.load_tensors):
        for content in (b"", b"[1]", whole[:-5], whole[:40]):
            path.write_bytes(content)
            with pytest.raises(data.InputError, match="file(: damaged|, line 1: not UTF-8)"):
                read(path)
        with pytest.raises(data.InputError, match="no: cannot be read .No such file"):
            read(tmp_path / "no")


def test_nltk_data_of_the_data_folder_comes_first_and_without_any_it_says_how_to_install(
        tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk.tokenize, "punkt_model_available", lambda: False)
    for folder in (tmp_path, data.cache_dir()):
        (folder / "nltk_data").mkdir(parents=True)
    # nothing comes, or a page that is no XML
    for download in (Mock(return_value=False), Mock(side_effect=SyntaxError)):
        monkeypatch.setattr(nltk, "download", download)
        with pytest.raises(data.InputError, match="not found.*python -m nltk.downloader punkt_tab"):
            data.prepare_nltk(tmp_path)
        assert download.called
    found = [x for x in nltk.data.path if x.endswith("nltk_data")]
    assert found == [str(x / "nltk_data") for x in (tmp_path, data.cache_dir())]


# ---- Words ---------------------------------------------------------------------------------------

ODD = ["", " ", "...", "😀 👩‍👩‍👧 مرحبا 你好 नमस्ते", "[SEP] [CLS] </s> <mask> <pad> [unk]",
       "a\tb\nc\r\n\x0bd\x85e\u2028f", "\x00\x01\x7f", "\ud800 \udfff", "İSTANBUL ŒUVRE ﬁ ΑΣ ΑΣ’s",
       "a" * 5000, "it's don't \"quoted\" ``", "<br /><br />"]


def odd_texts(rng, n, length):
    """ODD, and n random texts of characters from all of Unicode."""
    def character():
        return chr(rng.choice([rng.randrange(0x20, 0x7F), rng.randrange(0x110000)]))
    return ODD + ["".join(character() for _ in range(length)) for _ in range(n)]


def test_words_come_back_from_their_string_whatever_the_text(nltk_data):
    for text in odd_texts(random.Random(0), 300, 60):
        words = (tuple(data.words_of(text)),)
        assert data.from_text(data.to_text(words)) == words
        assert all(word and word == word.lower() for word in words[0])
        data.to_text(words).encode("utf-8")
    pair = (("a", "man"), ())
    assert data.to_text(pair) == ("a man", "") and data.from_text(("a man", "")) == pair


def test_every_apostrophe_inside_a_word_gives_the_words_of_a_contraction(nltk_data):
    """Texts are split before they are lower-cased, and line breaks become spaces."""
    plain = "Good film.<br /><br />Don't say it's O'Neill"
    words = "good film . do n't say it 's o'neill".split()
    for mark in "'\u2019\u02bc\u00b4`":
        assert data.words_of(plain.replace("'", mark)) == words
        outside = f"{mark}twas the films{mark} end 5{mark}5"
        assert data.clean(outside) == outside  # a letter before and after, or it is no apostrophe
    # in lower case nothing tells that a sentence ends at "u.s."
    assert data.words_of("Made in the U.S. It was bad.") == "made in the u.s . it was bad .".split()


def test_pieces_of_contractions_are_not_substituted_but_words_of_that_spelling_are():
    table = dict.fromkeys(["ca", "wo", "ai", "n't", "'s", "s", "ll", "m", "do", "it"], ["x"])
    words = "i ca n't do it 's ca ' ll ll m wo n't ai".split()
    changeable = [word for word, others in zip(words, data.substitutes(words, table)) if others]
    assert changeable == ["do", "it", "ca", "ll", "m", "ai"]
    assert data.substitutes(("a", "b"), {"a": ["a", "c"], "b": ["b"]}) == [["c"], []]
    assert data.substitutes((), table) == []


def test_tokenized_words_are_cached_and_a_damaged_cache_is_computed_anew(
        cache, plain_words, monkeypatch, capsys):
    """So are they with another words_of. A cache that cannot be written is one line."""
    raw = [f"Text {i} \ud800 é" for i in range(600)]
    first = data.tokenize(raw)
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(data, "tqdm", None)       # not split again
        assert data.tokenize(raw) == first
    file.write_bytes(file.read_bytes()[:-100])
    assert data.tokenize(raw) == first
    with monkeypatch.context() as patch:
        patch.setattr(data, "words_of", lambda text: text.split())
        assert data.tokenize(["A b"]) == {"A b": ("A", "b")}
    monkeypatch.setattr(data.os, "replace", full)
    assert data.tokenize(["A b"]) == {"A b": ("a", "b")}
    (line,) = capsys.readouterr().err.splitlines()
    assert str(cache) in line and "No space left" in line


# ---- Tasks ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("sizes", [{}, dict(dev_size=30), dict(train_size=91, dev_size=50)])
def test_dev_is_taken_from_train_and_never_overlaps_with_it(tmp_path, plain_words, sizes):
    """Texts that differ only in case or space are one text. A given dev split takes nothing.
    The three splits of the toy task are drawn apart."""
    rows = numbered(a=70, b=90, c=100)
    twice = rows + [(y, text.upper().replace(" ", "  ")) for y, text in rows]
    folder = write_tsv(tmp_path / "own", train=twice, test=rows)
    task = data.load_task(folder, **sizes)
    assert not set(texts(task.train)) & set(texts(task.dev))
    assert task.labels == ["a", "b", "c"] and task.name == "own"
    for split, size in ((task.train, sizes.get("train_size")), (task.dev, sizes.get("dev_size"))):
        if size:
            assert Counter(e.y for e in split) == dict.fromkeys(range(3), size // 3)
    if not sizes:
        assert Counter(e.y for e in task.dev) == {0: 14, 1: 18, 2: 20}
        assert set(texts(task.train)) | set(texts(task.dev)) == {text for _, text in rows}
    assert all(texts([e])[0].startswith("abc"[e.y]) for e in task.train + task.dev + task.test)
    assert len(data.load_task(write_tsv(folder, dev=rows)).train) == 520
    toy = data.load_task("toy")
    assert not set(texts(toy.train)) & set(texts(toy.dev))
    assert not set(texts(toy.train + toy.dev)) & set(texts(toy.test))


def test_the_split_is_the_same_on_every_call_and_depends_on_its_seed_alone(tmp_path, plain_words):
    folder = write_tsv(tmp_path / "own", train=numbered(a=70, b=90), test=numbered(a=50, b=50))
    sizes = dict(train_size=40, test_size=20)
    task = data.load_task(folder, **sizes)
    assert task == data.load_task(folder, **sizes)
    assert task.fingerprint != data.load_task(folder, **sizes, split_seed=1).fingerprint
    whatever_dev = data.load_task(folder, train_size=40, dev_size=60)
    assert texts(whatever_dev.train) == texts(task.train)
    assert set(texts(data.load_task(folder, train_size=60).train)) > set(texts(task.train))
    assert len({e.y for e in task.test[:8]}) == 2  # the order is random


@pytest.mark.parametrize("name", ["imdb", "snli", "toy"])
def test_a_path_is_a_folder_whatever_its_last_name(tmp_path, plain_words, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    paths = f"./{name}", f"{name}/", str(tmp_path / name), Path(name)
    for path in paths:
        with pytest.raises(data.InputError, match=f"^{tmp_path}/{name}: no such folder; wanted"):
            data.load_task(path)
    write_tsv(tmp_path / name, train=numbered(a=9, b=9), test=numbered(a=2, b=2))
    assert all(data.load_task(path).labels == ["a", "b"] for path in paths)


def test_the_published_table_is_the_default_and_only_a_download_needs_its_checksum(
        tmp_path, cache, monkeypatch, capsys):
    """The toy task has its own table. A table is made for the words of the training texts, of
    WordNet for those of all texts. Keys that no word of a text can be are left out."""
    answer(monkeypatch, Reply(b'{"a": ["b"]}'), Reply(b'{"a": ["b"]}'))
    with pytest.raises(data.InputError, match=f"hash .* {cache}/counterfitted_neighbors.json$"):
        data.load_neighbors()
    table = {"a": ["c"], "B": ["c"], "a b": ["c"]}
    data.write_json(tmp_path / "counterfitted_neighbors.json", table)
    assert data.load_neighbors(data_dir=tmp_path) == {"a": ["c"]}
    assert "neighbors.json: 2 of 3 keys are not one lower-case word" in capsys.readouterr().err
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    data.write_json(Path("counterfitted_neighbors.json"), {"a": ["d"]})
    for name, substitute in (("", "c"), ("./", "d")):       # in data_dir first, or only here
        table = data.load_neighbors(f"{name}counterfitted_neighbors.json", tmp_path)
        assert table == {"a": [substitute]}
    assert "film" in data.open_table(SimpleNamespace(task="toy", neighbors=None), None)
    task = SimpleNamespace(**{x: [data.Example(((x,),), 0)] for x in ("train", "dev", "test")})
    s = SimpleNamespace(task="own", neighbors="vectors", data_dir=None)
    monkeypatch.setattr(data, "load_neighbors", lambda source, folder, words: set(words))
    assert data.open_table(s, task) == {"train"}
    assert data.open_table(s, task, "wordnet") == {"train", "dev", "test"}


def test_a_given_dev_split_pairs_bom_crlf_and_spaces_around_labels_are_read(tmp_path, plain_words):
    """Quotation marks that belong to a text stay. Labels are strings, not numbers."""
    labels = ["1.1", "1.10"]
    for split in ("train", "dev", "test"):
        rows = [f' {labels[y]} \t"A" {split}\t"B  {y}"\r\n' for y in (1, 0, 1, 0)]
        rows += [" 1.1 \t\t\r\n"]
        content = "\ufefflabel\ttext\ttext2\r\n" + "".join(rows)
        (tmp_path / f"{split}.tsv").write_bytes(content.encode())
    task = data.load_task(tmp_path)
    expected = {data.Example((('"a"', "dev"), ('"b', f'{y}"')), int(y)): 2 for y in "01"}
    assert Counter(task.dev) == expected | {data.Example(((), ()), 0): 1}
    assert len(task.train) == 5 and task.labels == labels


@pytest.mark.parametrize("change, message", [
    (dict(train_size=1000),
     "train without dev's part: 1000 examples would be 500 of each class, wanted 1 to 8 .class"),
    (dict(test_size=1), "test: 1 examples would be 0 of each class, wanted 1 to"),
    (dict(train_size=2), "has 1 training examples"), (dict(split_seed=-1), "split seed -1"),
    (dict(task="toy", train_size=3), "toy: train: 3 texts, wanted at least 4"),
    (dict(task="toy", test_size=1), "toy: test: 1 texts, wanted at least 2"),
    (dict(task="toy", test_size=0), "toy: test: 0 texts, wanted at least 2"),
])
def test_sizes_that_cannot_be_had_are_refused(tmp_path, plain_words, change, message):
    folder = write_tsv(tmp_path / "own", train=numbered(a=10, b=15), test=numbered(a=3, b=9))
    with pytest.raises(data.InputError, match=message):
        data.load_task(**dict(task=folder) | change)


def imdb_archive(path):
    with tarfile.open(path, "w:gz") as tar:
        for part in ("train/neg", "train/pos", "test/neg", "test/pos"):
            split, label = part.split("/")
            for i in reversed(range(20)):
                for name in (f"{i}_1.txt", f"._{i}_1.txt"):  # the second as a Mac adds them
                    content = f"{split} {label} {i}".encode() if name[0] != "." else b"\xff"
                    info = tarfile.TarInfo(f"./aclImdb/{part}/{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        tar.addfile(tarfile.TarInfo("aclImdb/train/unsup/0_0.txt"))
    return path


def test_imdb_is_the_same_packed_and_as_a_folder(tmp_path, plain_words, capsys):
    archive = imdb_archive(tmp_path / "aclImdb_v1.tar.gz")
    packed = data.load_task("imdb", tmp_path)
    assert packed.labels == ["neg", "pos"] and len(packed.train) == 36 and len(packed.dev) == 4
    assert all(e.words[0][1] == packed.labels[e.y] for e in packed.train + packed.test)
    capsys.readouterr()
    assert data.load_task("imdb", data.unpack(archive)) == packed
    (line,) = capsys.readouterr().err.splitlines()  # both are only part of IMDB
    assert "holds 40 reviews for training and 40 for test, IMDB has 25,000" in line


def snli_archive(path):
    files = {"__MACOSX/snli_1.0/._snli_1.0_train.jsonl": b"\xff"}
    for split in ("train", "dev", "test"):
        rows = [dict(gold_label=label, sentence1=f"{split} P", sentence2=f"H {label}")
                for label in ("neutral", "-", "contradiction", "entailment")]
        files[f"snli_1.0/snli_1.0_{split}.jsonl"] = "\n".join(map(json.dumps, rows))
    path.write_bytes(zipped(files))
    return path


def test_snli_has_the_labels_of_the_paper_and_no_undecided_pairs(tmp_path):
    archive = snli_archive(tmp_path / "snli_1.0.zip")
    labels, splits = data.read_snli(archive)
    assert labels == ["entailment", "contradiction", "neutral"]
    for split, pairs in splits.items():
        assert sorted(y for _, y in pairs) == [0, 1, 2]
        assert all(texts == (f"{split} P", f"H {labels[y]}") for texts, y in pairs)
    assert data.read_snli(data.unpack(archive) / "snli_1.0") == (labels, splits)


@pytest.mark.parametrize("read, archive, name", [
    (data.read_imdb, imdb_archive, "a.tar.gz"), (data.read_snli, snli_archive, "a.zip")])
def test_damaged_archives_are_refused_wherever_they_are_cut(tmp_path, read, archive, name):
    path = archive(tmp_path / name)
    whole = path.read_bytes()
    cuts = [whole[5:], *(whole[:n] for n in (0, 5, len(whole) // 2, len(whole) - 1))]
    altered = whole[:60] + b"xxxx" + whole[64:]
    for content in (*cuts, b"<html>sign in</html>", altered):
        path.write_bytes(content)
        with pytest.raises(data.InputError, match=f"{name}: {data.NOT_OURS}"):
            read(path)


GOOD = "label\ttext\na\tp\na\tq\nb\tr\nb\ts\na\tt\nb\tu\n"
PAIR = '{"gold_label": "-", "sentence1": "", "sentence2": ""}\n'


@pytest.mark.parametrize("name, content, message", [
    ("train.tsv", "", "train.tsv, line 1: '', wanted the header"),
    ("train.tsv", GOOD + "a\n", r"train.tsv, line 8: \['a'\] has 1 columns, wanted 'label\\ttext'"),
    ("train.tsv", GOOD + " \tx\n", "line 8: .*has no label"),
    ("train.tsv", GOOD + "a\t\"He said \"\"great\"\" film\"\n", "line 8: .*is quoted.*QUOTE_NONE"),
    *[("train.tsv", GOOD + f"{label}\tx\n", f"line 8: label '{label}' is 'a' further up: want")
      for label in ("a ", "A")],
    ("train.tsv", "label\ttext\n1\tx\n0\ty\n1.0\tz\n", "line 4: label '1.0' is '1' further up"),
    ("train.tsv", "label\ttext\na\tx\na\ty\n", "train.tsv: only one class, 'a'"),
    ("train.tsv", b"label\ttext\na\tx\na\t\xff\n", "train.tsv, line 3: not UTF-8 .byte 0xff"),
    ("dev.tsv", GOOD + "c\tx\n", "dev.tsv, line 8: label 'c' does not occur in train.tsv"),
    ("test.tsv", "label\ttext\ttext2\na\tx\ty\n", "test.tsv, line 1: .*, wanted the header"),
    ("snli_1.0_train.jsonl", PAIR + "{}", "train.jsonl, line 2: '{}', wanted JSON with the str"),
    ("snli_1.0_train.jsonl", PAIR.replace("-", "neutrl"), "line 1: .*neutrl.*neutral or -"),
    ("t.json", "[" * 100_000, "t.json: damaged, or not the kind of"),
    ("t.json", '{"a": ["b c"]}', "t.json: 'a' maps to .'b c'., wanted a list of single lower-case"),
    *[("t.json", f'{{"a": {value}}}', "'a' maps to .*, wanted a list of single lower-case words")
      for value in ('"b"', "5", "[1]", '["B"]', '["\\ud800"]')],
    *[("v.txt", f"a 1 2\n{line}\n", f"v.txt, line 2: '{line}', wanted a word and 2 numbers")
      for line in ("b 1", "b 1 nan", "b 1 x")],
    ("v.txt", "z 1 2\n", "none of the 1 training words"),
])
def test_bad_files_are_refused_by_file_line_and_value(tmp_path, name, content, message):
    for file, text in {"train.tsv": GOOD, "test.tsv": GOOD, name: content}.items():
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(data.InputError, match=message):
        if name.endswith(".tsv"):
            data.read_folder(tmp_path)
        elif name.endswith(".jsonl"):
            data.read_snli(tmp_path)
        else:
            data.load_neighbors(tmp_path / name, words=Counter("a"))


def test_tables_are_looked_for_in_data_dir_first_and_checked_quickly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("t.json").write_text('{"b": ["a"], "two words": ["x"], "UNK": ["x"]}')
    data.write_atomically(data.cache_dir() / "t.json", "{}")    # beside the command comes first
    assert data.load_neighbors("t.json") == data.load_neighbors("t.json", "data") == {"b": ["a"]}
    Path("data/t.json").write_text('{"b": ["c"]}')
    assert data.load_neighbors("t.json", "data") == {"b": ["c"]}
    for bad, message in (("t.csv", "wanted published, vectors, wordnet, a n"),
                         ("none.json", "table none.json: no such file here")):
        with pytest.raises(data.InputError, match=message):
            data.find_neighbors(bad, "data")
    Path("v.txt").write_text("a 1 2\n")
    with pytest.raises(ValueError, match="load_neighbors.'v.txt'. needs `words`"):
        data.load_neighbors("v.txt")


def test_vector_neighbours_are_near_frequent_and_in_order(tmp_path):
    """Of equally near words the more frequent one is first, of equally frequent ones the alphabet
    decides. A second call finds the table in the cache."""
    rng = np.random.default_rng(0)
    vectors = {f"w{i}": np.round(rng.normal(size=4) * 0.7, 1) for i in range(2500)}
    counts = Counter({f"w{i}": 5000 - i // 5 for i in range(2498, -1, -2)} | {"no-vector": 9999})
    lines = "".join(f"{word} {' '.join(map(str, row))}\n" for word, row in vectors.items())
    (tmp_path / "v.txt").write_text(lines)
    files = {"v.txt": "2500 4\n" + lines, "__MACOSX/._v.txt": b"\xff"}
    (tmp_path / "v.zip").write_bytes(zipped(files))
    kept = sorted(counts, key=lambda word: (-counts[word], word))[1:1202]
    X = np.stack([vectors[word] for word in kept])
    table = data.vector_neighbors(tmp_path / "v.txt", counts, 5, 0.105, vocabulary=1202, skip=11)
    for i, word in enumerate(kept):
        d = ((X - X[i]) ** 2).sum(1).round(9)
        near = [kept[j] for j in np.argsort(d, kind="stable") if d[j] < 0.105 and j != i]
        assert table.get(word, []) == (near[:5] if i >= 11 else [])
    for _ in range(2):  # the .zip, which has word2vec's first line, and the paper's numbers
        again = data.load_neighbors(tmp_path / "v.zip", words=counts)
        assert again == data.vector_neighbors(tmp_path / "v.txt", counts, 8, 0.5, 50_000, 27)
    (tmp_path / "near.txt").write_text("a 0\nb 0.5\n")
    near = [data.vector_neighbors(tmp_path / "near.txt", Counter("ab"), max_sq_dist=d, skip=0)
            for d in (0.25, 0.26)]
    assert near == [{}, {"a": ["b"], "b": ["a"]}]


def test_wordnet_has_no_function_words_and_one_part_of_speech_a_word(nltk_data):
    words = ["film", "good", "run", "xyzzyx", "me", "i", "is", "he", "us", "who", "it"]
    table = data.load_neighbors("wordnet", words=words)
    assert set(table) == {"film", "good", "run"}
    assert table["film"] == ["movie", "picture", "pic", "flick", "cinema", "celluloid"]  # the noun
    assert "well" in table["good"] and "goodness" not in table["good"]  # the adjective
    for word, others in table.items():
        assert len(set(others)) == len(others) and word not in others
        assert all("_" not in other and other == other.lower() for other in others)


# ---- Tokens --------------------------------------------------------------------------------------

NEIGHBORS = {"good": ["great", "fine", "goods", "good", "great"], "a": ["an"], "n't": ["not"],
             "film": ["movie", "films", "cinematic", "cinema"], "ca": ["an"]}


def bert(folder):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz[]<>/.,'",
             "##s", "##e", "good", "great", "fine", "film", "movie", "cinema", "##tic", "an", "the",
             "man", "sep", "null", "ca", "n't", "not"]
    return train.bert_tokenizer(vocab)


def roberta(folder):
    return byte_level_bpe(folder, "a good film , a great movie , a fine café . the man is an actor "
                                  "</s> <mask>")


@pytest.fixture(params=[bert, roberta])
def tokenizer(request, tmp_path):
    return request.param(tmp_path)


@pytest.mark.parametrize("unknown", ["piece", "unk"])
def test_one_token_per_word_and_none_is_special_whatever_the_text(tokenizer, unknown):
    vocabulary = data.Vocabulary(tokenizer, 50, NEIGHBORS, unknown)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    odd = odd_texts(random.Random(0), 300, 8) + tokenizer.all_special_tokens
    for text in odd + [token.lower() for token in tokenizer.all_special_tokens]:
        split = tuple(text.split())
        for words in ((split,), (split, split[:2]), ((text,),)):
            ids, shown = vocabulary.input_ids(words), vocabulary.visible(words)
            assert len(ids) == 1 + sum(len(text) + 1 for text in shown) <= 50
            inside = np.delete(ids, [0, 1 + len(shown[0]), len(ids) - 1])
            assert not set(inside.tolist()) & special
            assert ids[0] == tokenizer.cls_token_id
            assert ids[-1] == ids[1 + len(shown[0])] == tokenizer.sep_token_id
            assert all(0 <= i < len(tokenizer) for i in ids)


def test_a_word_of_the_vocabulary_is_one_token_and_another_its_first_piece(tmp_path):
    """NULL, the blank word of PWWS, is the word null under both rules."""
    tokenizer = bert(tmp_path)
    tokens = tokenizer.convert_ids_to_tokens
    piece, unk = data.Vocabulary(tokenizer, 9), data.Vocabulary(tokenizer, 9, unknown="unk")
    words = ["NULL", "good", "films", "[sep]", "[SEP]", "😀", "cinematic", "é"]
    expected = ["null", "good", "film", "[", "[", "[UNK]", "cinema", "e"]
    assert tokens([piece.token(w) for w in words]) == expected
    assert tokens([unk.token(w) for w in words]) == ["null", "good"] + ["[UNK]"] * 6


def test_a_word_of_byte_level_bpe_has_its_leading_space(tmp_path):
    tokenizer = roberta(tmp_path)
    tokens = tokenizer.convert_ids_to_tokens
    vocabulary = data.Vocabulary(tokenizer, 9)
    assert tokens([vocabulary.token(w) for w in ("good", "film")]) == ["Ġgood", "Ġfilm"]
    assert tokens(vocabulary.token("</s>")) == "Ġ</"  # the letters, not the special token
    # the vocabulary spells café "cafÃ©": a word that looks like that spelling is another word
    assert vocabulary.token("cafã©") != vocabulary.token("café") == tokenizer.get_vocab()["ĠcafÃ©"]
    assert tokens(vocabulary.input_ids((("good",), ("film",)))) == \
        ["<s>", "Ġgood", "</s>", "Ġfilm", "</s>"]


def test_a_token_is_once_among_the_candidates_and_the_word_itself_first(tmp_path):
    tokenizer = bert(tmp_path)

    def names(word, **limit):
        vocabulary = data.Vocabulary(tokenizer, 9, NEIGHBORS, **limit)
        return tokenizer.convert_ids_to_tokens(list(vocabulary.candidates(word)))

    assert names("good") == ["good", "great", "fine"]  # "goods" is the piece "good"
    assert names("film") == ["film", "movie", "cinema"]  # "cinematic" is the first with "cinema"
    token = tokenizer.convert_tokens_to_ids("cinema")
    assert data.Vocabulary(tokenizer, 9, NEIGHBORS).candidates("film")[token] == "cinematic"
    assert names("man") == ["man"]
    assert names("film", unknown="unk") == ["film", "movie", "[UNK]", "cinema"]
    assert names("film", max_candidates=3) == ["film", "movie", "cinema"]  # counted afterwards
    assert names("good", max_candidates=1) == ["good"]


def test_encoding_holds_the_candidates_of_the_last_text_only(tokenizer):
    vocabulary = data.Vocabulary(tokenizer, 12, NEIGHBORS)
    batch = [(("a", "good", "man"),), (("a", "good", "man"), ("film", "good")), ((),),
             ((), ("the",)), (("the",) * 20,), (("good",) * 20, ("film",)),
             (("the",) * 5, ("film",) * 20)]
    out = vocabulary.encode(batch, hull=True)
    ids, subs, mask = out["input_ids"], out["subs"], out["subs_mask"]
    B, L = ids.shape
    assert (B, L) == (7, 12) and subs.shape == mask.shape == (7, 12, mask.sum(2).max())
    assert ids.dtype == subs.dtype == out["attention_mask"].dtype == torch.int64
    assert mask.dtype == torch.bool and mask[..., 0].all() and torch.equal(subs[..., 0], ids)
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


def test_the_hull_leaves_pieces_of_contractions_alone_and_choices_come_back_as_words(tmp_path):
    vocabulary = data.Vocabulary(bert(tmp_path), 12, NEIGHBORS)
    words = (("the", "film"), ("ca", "n't", "film", "ca"))
    mask = vocabulary.encode([words], hull=True)["subs_mask"][0]
    assert mask.sum(1).tolist() == [1, 1, 1, 1, 1, 1, 3, 2, 1]
    chosen = vocabulary.substitute(words, [0, 0, 0, 0, 0, 0, 1, 1, 0])
    assert chosen == (("the", "film"), ("ca", "n't", "movie", "an"))


def test_the_premise_is_kept_and_the_hypothesis_cut(tmp_path):
    visible = data.Vocabulary(bert(tmp_path), 10).visible
    assert visible((tuple("abcdefghijkl"),)) == (tuple("abcdefgh"),)
    assert visible((tuple("abcde"), tuple("fghijkl"))) == (tuple("abcde"), tuple("fg"))
    assert visible((tuple("abcdefghijkl"), tuple("mn"))) == (tuple("abcdefg"), ())
    assert data.Vocabulary(bert(tmp_path), 3).visible((tuple("ab"), tuple("cd"))) == ((), ())


@pytest.mark.parametrize("kind, text, unknown, share", [
    (bert, "a good film man", "piece", 0), (bert, "a good xs films", "piece", 1 / 4),
    (bert, "a good xs films", "unk", 2 / 4), (bert, "\u4f60\u597d \u4e16\u754c", "piece", 1),
    (roberta, "good film café \u4f60\u597d", "piece", 1 / 4)])
def test_the_share_of_words_that_the_tokenizer_does_not_know(tmp_path, kind, text, unknown, share):
    """They become [UNK] or, although longer, a single letter, of byte-level BPE a single byte.
    Words cut off do not count."""
    vocabulary, words = data.Vocabulary(kind(tmp_path), 6, unknown=unknown), tuple(text.split())
    examples = [data.Example(((words + ("zzz",) * 4)[:n],), 0) for n in (4, 8) for _ in range(3)]
    assert data.unknown_share(vocabulary, examples) == share
    assert data.unknown_share(vocabulary, []) == 0


# ---- Batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts, batch_size", [
    ((10, 10), 4), ((7, 31), 4), ((100, 40, 63), 9), ((3, 90), 32)])
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
    left = min(counts) - len(used) // C  # the smallest class is used up, except a single example
    assert left == (1 if min(counts) % per == 1 else 0)
    assert sum(len(batch) < per * C for batch in batches) <= 1


def test_batches_are_drawn_anew_but_repeatable_and_of_like_length():
    y = np.repeat([0, 1], [300, 2000])
    lengths = np.random.default_rng(1).integers(1, 300, len(y))

    def epoch(seed):
        return data.balanced_batches(y, lengths, 8, np.random.default_rng(seed))

    def spread(batches):
        return np.mean([lengths[batch].max() - lengths[batch].min() for batch in batches])

    assert all((a == b).all() for a, b in zip(epoch(0), epoch(0), strict=True))
    surplus = [set(np.concatenate(epoch(seed)).tolist()) - set(range(300)) for seed in (0, 1)]
    assert len(surplus[0]) == 300 and len(surplus[0] & surplus[1]) < 100
    assert spread(epoch(0)) < 0.3 * spread([np.random.default_rng(2).permutation(300)[:8]] * 50)


# ---- Encoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    (dict(position_embedding_type="relative_key"), "position_embedding_type 'relative_key', want"),
    (dict(is_decoder=True), "is_decoder True, wanted False"),
    (dict(add_cross_attention=True), "add_cross_attention True, wanted False"),
    (dict(num_hidden_layers=1), "16 tensors that its config.json does not speak of, such as .*r.1"),
])
def test_an_encoder_of_another_architecture_is_refused(tmp_path, model_folder, change, message):
    """What this project would compute of it is not what that model computes."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(data.InputError, match=f"^model {folder}: .*{message}[^\n]*$"):
        data.load_encoder(folder)


def test_heads_of_pre_training_may_be_there_and_no_bar_is_shown(tmp_path, model_folder, capfd):
    """The old buffer of position ids may be there too. The library's own setting stays."""
    folder, kind = shutil.copytree(model_folder, tmp_path / "model"), model_folder.name
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors = {f"{kind}.{name}": tensor for name, tensor in tensors.items()}
    tensors |= {"cls.predictions.bias": torch.zeros(3), "lm_head.bias": torch.zeros(3),
                f"{kind}.embeddings.position_ids": torch.arange(34)[None]}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    transformers.utils.logging.enable_progress_bar()
    encoder, there = (data.load_encoder(path)[0] for path in (folder, model_folder))
    assert transformers.utils.logging.is_progress_bar_enabled() and capfd.readouterr().err == ""
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), there.parameters()))


@pytest.mark.parametrize("name, capabilities, slow", [
    ("cpu", {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, True),
    ("cpu", {"avx512_bf16": False, "amx_bf16": True}, False), ("cpu", {"bf16": True}, False),
    ("cpu", {"architecture": "riscv"}, False), ("cuda", {"avx512_bf16": False}, False)])
def test_bf16_is_slow_on_a_cpu_without_instructions_for_it(
        monkeypatch, capsys, name, capabilities, slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    data.warn_of_slow_bf16(["fp32"], torch.device(name))
    data.warn_of_slow_bf16(["fp32", "bf16"], torch.device(name))
    assert capsys.readouterr().err.count("no bf16 arithmetic") == slow


# ---- Command lines -------------------------------------------------------------------------------


def test_a_command_may_run_in_any_thread():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(data.command(lambda argv: len(argv)), ["a", "b"]).result() == 2


@pytest.mark.parametrize("argv, folder", [
    (["--out", "runs/\udcff"], "/tmp"), ([], "/d\udcc3\udca9")])
def test_a_word_or_working_directory_that_is_not_utf_8_is_one_line(
        monkeypatch, capsys, argv, folder):
    monkeypatch.setattr(os, "getcwd", lambda: folder)
    with pytest.raises(SystemExit) as stop:
        data.command(lambda argv: pytest.fail("it has begun"))(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "not valid UTF-8" in line and "\\udc" in line
