"""Data for RIFT (Dong et al., NeurIPS 2021): from public archives to tensors, in the order of this file.

1. Files: find, download, unpack and write them.
2. Tasks: IMDB, SNLI or a folder of TSV files become `Example`s. A text is a tuple of lower-case words from here
   on; joined by single spaces it is a string, and nobody tokenizes it a second time.
3. Substitution tables: word -> list of words, from counter-fitted vectors, a JSON table or WordNet.
4. `Vocabulary`: one token per word, and the candidate tokens of every position (the adversary's hull).
5. `balanced_batches`: every class equally often in a batch, because the loss compares examples of one class.

Whatever is wrong with a file or a setting raises `InputError`, one line that says where and what would be right.
"""

import gzip
import hashlib
import http.client
import io
import json
import math
import os
import re
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import uuid
import warnings
import zipfile
import zlib
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

import nltk
import numpy as np
import torch
from tqdm import tqdm


class InputError(ValueError):
    """What the user gave cannot be used: one line with the file, the line, the value and what would be right."""


# ---------------------------------------------------------------------------------------------------------------
# 1. Files


class Resource(NamedTuple):
    file: str  # its name as published
    unpacked: str  # the folder or file it unpacks to
    url: str
    md5: str | None  # demanded of downloads only
    megabytes: int  # of the download, about


RESOURCES = {
    "imdb": Resource("aclImdb_v1.tar.gz", "aclImdb", "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
                     "7c2ac02c03563afcf9b574c7e56c153a", 80),
    "snli": Resource("snli_1.0.zip", "snli_1.0", "https://nlp.stanford.edu/projects/snli/snli_1.0.zip", None, 90),
    "vectors": Resource("counter-fitted-vectors.txt.zip", "counter-fitted-vectors.txt",
                        "https://github.com/nmrksic/counter-fitting/raw/master/word_vectors/"
                        "counter-fitted-vectors.txt.zip", None, 70),
    "neighbors": Resource("counterfitted_neighbors.json", "counterfitted_neighbors.json",
                          "https://raw.githubusercontent.com/robinjia/certified-word-sub/master/data/"
                          "counterfitted_neighbors.json", None, 2),
    "scores": Resource("jia2019_cert_lm_scores.zip", "lm_scores",
                       "https://nlp.stanford.edu/data/robinjia/jia2019_cert_lm_scores.zip", None, 500),
}


def cache_dir():
    """The folder for downloads and everything computed once: $RIFT_CACHE, or ~/.cache/rift."""
    return Path(os.environ.get("RIFT_CACHE") or "~/.cache/rift").expanduser().absolute()


def _folders(data_dir):
    """Where to look, in order. Raises InputError when data_dir is no folder."""
    if data_dir is None or Path(data_dir).expanduser().absolute() == cache_dir():
        return [cache_dir()]
    data_dir = Path(data_dir).expanduser()
    if not data_dir.is_dir():
        raise InputError(f"{data_dir}: no such folder (--data-dir wants one; without it {cache_dir()} is used)")
    return [data_dir, cache_dir()]


def _temporary(path):
    """A name beside path, so that os.replace stays on one disk, and of this process only."""
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


def _why(error):
    """An exception as part of one line."""
    text = " ".join(str(getattr(error, "strerror", None) or getattr(error, "reason", None) or error).split())
    return text or type(error).__name__


@contextmanager
def _reading(path, hint="it is damaged, cut short or another kind of file: get it anew"):
    """Turn the many exceptions of damaged archives and unreadable files into one InputError."""
    try:
        yield
    except (EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, NotImplementedError,
            RuntimeError) as error:
        raise InputError(f"{path}: cannot be read ({_why(error)}); {hint}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({_why(error)})") from None


def _decode(data, where):
    """bytes -> str. Raises InputError with the line and the byte that is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{where}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None


def write_atomically(path, content):
    """Write str (UTF-8) or bytes under a temporary name in the same folder, then rename: all of it or nothing.

    Raises InputError when that fails (full disk, read-only folder); what was at `path` before stays.
    """
    path = Path(path)
    tmp = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({_why(error)})") from None
    finally:
        with suppress(OSError):
            tmp.unlink()


def locate(name, data_dir=None):
    """Path of the resource `name` (a key of RESOURCES), packed or unpacked: in data_dir, else in the cache, else
    downloaded into the cache. Raises InputError as `download` does."""
    resource = RESOURCES[name]
    for folder in _folders(data_dir):
        for path in (folder / resource.unpacked, folder / resource.file):
            if path.exists():
                return path
    path = cache_dir() / resource.file
    print(f"fetching {resource.url} (about {resource.megabytes} MB) into {cache_dir()}", file=sys.stderr)
    download(resource.url, path, resource.md5)
    return path


def download(url, path, md5=None, tries=4, pause=1.0, timeout=30.0):
    """Fetch url to path with a progress bar. A broken connection is taken up where it broke if the server can do
    that, else started anew, `tries` times in all, after pause, 2 pause, 4 pause .. seconds.

    The file gets its name only when it is complete: as long as announced, with the right md5, of the kind its
    name says, and no HTML page. Two processes may download the same file at once: each has a temporary name.
    Raises InputError with the address and where to put the file by hand.
    """
    path, problem, tag = Path(path), "", None
    tmp = _temporary(path)

    def refuse(problem):
        return InputError(f"{url}: {problem}; download it by hand and put it at {path}")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "w+b") as file, tqdm(desc=path.name, unit="B", unit_scale=True) as bar:
            for attempt in range(tries):
                time.sleep(pause * 2 ** (attempt - 1) if attempt else 0)
                have = file.seek(0, os.SEEK_END)
                headers = {"User-Agent": "rift", "Accept-Encoding": "identity"}
                if have:  # If-Range: a file that changed in between comes whole
                    headers |= {"Range": f"bytes={have}-"} | ({"If-Range": tag} if tag else {})
                try:
                    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as reply:
                        if not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                            have = file.seek(0)
                            file.truncate()
                        tag = reply.headers.get("ETag")
                        length = reply.headers.get("Content-Length")
                        total = None if length is None else have + int(length)
                        bar.total, bar.n = total, have
                        if reply.headers.get_content_type() == "text/html":
                            raise refuse("the server sent an HTML page instead of the file")
                        while chunk := reply.read(1 << 16):
                            have += len(chunk)
                            bar.update(len(chunk))
                            try:
                                file.write(chunk)
                            except OSError as error:  # not the network's fault: trying again does not help
                                raise InputError(f"{path}: cannot be written ({_why(error)})") from None
                    if total is None or have == total:
                        problem = ""
                        break
                    problem = f"the connection broke after {have} of {total} bytes"
                except urllib.error.HTTPError as error:
                    problem = f"the server answered {error.code} {error.reason}"
                    if error.code == 416:  # the part we have is longer than the file: start anew
                        file.truncate(0)
                    elif error.code < 500:
                        break
                except (OSError, http.client.HTTPException, ValueError) as error:
                    if isinstance(error, InputError):
                        raise
                    problem = f"the connection failed ({_why(error)})"
        if problem:
            raise refuse(problem)
        with open(tmp, "rb") as file:
            if re.match(rb"\s*<(!doctype\s+html|html)", file.read(200), re.IGNORECASE):
                raise refuse("the server sent an HTML page instead of the file")
            file.seek(0)
            found = hashlib.file_digest(file, "md5").hexdigest()
            if md5 and found != md5:
                raise refuse(f"wrong checksum (md5 {found}, should be {md5})")
        if path.suffix == ".zip" and not zipfile.is_zipfile(tmp):  # its directory stands at the end
            raise refuse("what came is not a complete zip archive")
        os.replace(tmp, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({_why(error)})") from None
    finally:
        with suppress(OSError):
            tmp.unlink()


@contextmanager
def _open_tar(path):
    """A .tar.gz, read to its very end when done, because only there a cut or altered archive shows."""
    with _reading(path), gzip.open(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        yield tar
        while file.read(1 << 20):
            pass


def unpack(archive, folder):
    """Unpack a .tar.gz or .zip into a temporary folder that becomes `folder` when complete: private to the user
    (0700, files 0600), as NLTK demands of its data. A `folder` that exists is left as it is.

    Raises InputError for a damaged archive, and for one with absolute paths, "..", links or devices: nothing is
    written outside the folder, nothing is left of what was unpacked.
    """
    archive, folder = Path(archive), Path(folder)
    tmp = _temporary(folder)

    def check(name, plain):
        parts = name.replace("\\", "/").split("/")
        if name[:1] in ("/", "\\") or ".." in parts or ":" in parts[0]:
            raise InputError(f"{archive}: refused, its member {name!r} would be written outside the folder")
        if not plain:
            raise InputError(f"{archive}: refused, its member {name!r} is a link or a device")

    try:
        tmp.mkdir(mode=0o700, parents=True)
        if archive.suffix == ".zip":
            with _reading(archive), zipfile.ZipFile(archive) as file:
                for member in file.infolist():
                    check(member.filename, not stat.S_ISLNK(member.external_attr >> 16))
                file.extractall(tmp)
        else:
            with _open_tar(archive) as file:
                for member in file.getmembers():
                    check(member.name, member.isfile() or member.isdir())
                file.extractall(tmp, filter="data")
        for path in tmp.rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
        try:
            os.rename(tmp, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was quicker
                raise
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({_why(error)})") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def prepare_nltk(data_dir=None, wordnet=False):
    """Make NLTK's sentence tokenizer (punkt_tab), and WordNet if asked for, available in this process: from
    data_dir, the cache, or NLTK's own folders, else by nltk.download into the cache.

    NLTK refuses data that other accounts could write, so a packed nltk_data.tar.gz is unpacked into a private
    folder of the cache. Raises InputError that says how to install.
    """
    for folder in reversed(_folders(data_dir)):
        roots = [folder / "nltk_data"]
        packed = folder / "nltk_data.tar.gz"
        if packed.is_file():
            with _reading(packed), open(packed, "rb") as file:
                private = cache_dir() / f"nltk_data-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
            if not private.is_dir():
                unpack(packed, private)
            roots.append(private / "nltk_data")
        roots = [str(root.resolve()) for root in roots if root.is_dir()]
        nltk.data.path[:0] = [root for root in roots if root not in nltk.data.path]

    def missing():
        with suppress(LookupError, OSError, ValueError):  # not there, or NLTK refuses to read it
            if nltk.tokenize.punkt_model_available():
                if wordnet:
                    nltk.corpus.wordnet.ensure_loaded()
                return []
        return ["punkt_tab", "wordnet"][: 1 + wordnet]

    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        if missing():
            target = cache_dir() / "nltk_data"
            with suppress(OSError, ValueError, zipfile.BadZipFile):
                target.mkdir(mode=0o700, parents=True, exist_ok=True)
                nltk.data.path[:0] = [str(target)] * (str(target) not in nltk.data.path)
                for name in missing():
                    nltk.download(name, download_dir=str(target), quiet=True)
        names = " ".join(missing())
    if names:
        raise InputError(f"NLTK data ({names}) not found, and downloading it failed; install it with `python -m "
                         f"nltk.downloader {names}`, or put nltk_data.tar.gz or nltk_data/ into "
                         f"{_folders(data_dir)[0]} (NLTK refuses a folder that other accounts can write)")


# ---------------------------------------------------------------------------------------------------------------
# 2. Tasks


class Example(NamedTuple):
    words: tuple  # of one or two texts, each a tuple of words; only the last text may be changed
    y: int  # class


class Task(NamedTuple):
    name: str
    labels: list  # names of the classes, by class number
    train: list  # of Example
    dev: list
    test: list
    fingerprint: str  # sha256 of all of it


def words_of(text):
    """Raw text -> its words: nltk.word_tokenize, then lower case. No word is empty or holds white space, whatever
    the text. Call prepare_nltk first (LookupError otherwise)."""
    text = text.replace("<br />", " ").encode("utf-8", "replace").decode()  # half of a surrogate pair becomes "?"
    # " ".join(words).split() has to give the same words: lower() and the tokenizer never add white space
    return [sys.intern(word.lower()) for word in nltk.word_tokenize(text)]


def to_text(words):
    """Example.words -> the string that models and attacks see, or a tuple of two for a pair."""
    texts = tuple(" ".join(text) for text in words)
    return texts[0] if len(texts) == 1 else texts


def from_text(text):
    """The inverse of to_text."""
    return tuple(tuple(part.split()) for part in ([text] if isinstance(text, str) else text))


def load_task(task, data_dir=None, *, train_size=None, dev_size=None, test_size=None, split_seed=0):
    """Read "imdb", "snli", or a folder with train.tsv, test.tsv and perhaps dev.tsv (header `label TAB text`, or
    `label TAB text TAB text2`; labels are any strings, classes in their sorted order).

    A size gives a class-balanced subset, rounded down to a multiple of the number of classes; None is everything.
    Without a dev split a tenth of every class of train, at most 1,000 in all, is set aside for it (dev_size: that
    many, class-balanced). Subsets and their order depend on split_seed alone, so every method and seed sees the
    same texts, the first n of a split are a random sample of it, and train never holds an example of dev.

    Returns a Task. Raises InputError for missing or damaged files, wrong lines, sizes that cannot be had, and for
    fewer than 2 training examples of a class (its examples are compared with each other).
    """
    if task == "imdb":
        path = locate("imdb", data_dir)
        labels, splits = read_imdb(path)
    elif task == "snli":
        path = locate("snli", data_dir)
        labels, splits = read_snli(path)
    elif Path(task).is_dir():
        path = Path(task)
        labels, splits = read_folder(path)
    else:
        raise InputError(f"unknown task {str(task)!r}: neither imdb, snli nor a folder with train.tsv and test.tsv")
    if split_seed < 0:
        raise InputError(f"split seed {split_seed}: has to be 0 or more")

    C = len(labels)
    rngs = {split: np.random.default_rng([split_seed, i]) for i, split in enumerate(("train", "dev", "test"))}
    pools = {}  # split -> for each class its examples' numbers in random order
    for split, raw in splits.items():
        y = np.array([label for _, label in raw])
        pools[split] = [rngs[split].permutation(np.flatnonzero(y == c)) for c in range(C)]

    def balanced(split, size, pools):
        if size is None:
            return pools
        n = size // C
        if n < 1:
            raise InputError(f"{path}: {size} examples of {split} are too few for {C} classes, at least {C} are needed")
        for label, pool in zip(labels, pools):
            if len(pool) < n:
                raise InputError(f"{path}: {size} examples of {split} need {n} of each class, "
                                 f"but class {label!r} has only {len(pool)}")
        return [pool[-n:] for pool in pools]  # from the end, see below

    if "dev" not in splits:
        splits["dev"] = splits["train"]
        if dev_size is None:
            total = len(splits["train"])
            n_dev = [max(1, len(pool) * min(1000, total // 10) // total) for pool in pools["train"]]
        else:
            n_dev = [len(pool) for pool in balanced("dev", dev_size, pools["train"])]
        # dev from the front and train from the end: the size of one leaves the other's examples as they are
        pools["dev"] = [pool[:n] for pool, n in zip(pools["train"], n_dev)]
        pools["train"] = [pool[n:] for pool, n in zip(pools["train"], n_dev)]
        dev_size = None
    chosen = {}
    for split, size in (("train", train_size), ("dev", dev_size), ("test", test_size)):
        pool = balanced(split, size, pools[split])
        if split == "train":
            for label, numbers in zip(labels, pool):
                if len(numbers) < 2:
                    raise InputError(f"{path}: class {label!r} has {len(numbers)} training examples after dev was "
                                     f"set aside and --train-size applied, at least 2 are needed")
        chosen[split] = [splits[split][i] for i in rngs[split].permutation(np.concatenate(pool))]

    prepare_nltk(data_dir)
    words = tokenize(text for raw in chosen.values() for texts, _ in raw for text in texts)
    done = {split: [Example(tuple(words[text] for text in texts), y) for texts, y in raw]
            for split, raw in chosen.items()}
    digest = hashlib.sha256(json.dumps(labels).encode())
    for split in ("train", "dev", "test"):
        for example in done[split]:
            digest.update(json.dumps([split, example.y, to_text(example.words)]).encode())
    name = task if task in ("imdb", "snli") else path.resolve().name
    return Task(name, labels, done["train"], done["dev"], done["test"], digest.hexdigest())


def tokenize(texts):
    """Raw texts -> {text: tuple of its words}, each text split once (a premise of SNLI stands in three pairs). That
    takes a second for 400 reviews, so many texts get a progress bar and a file in the cache."""
    texts = list(dict.fromkeys(texts))
    if len(texts) <= 500:
        return {text: tuple(words_of(text)) for text in texts}
    digest = hashlib.sha256(nltk.__version__.encode())
    for text in texts:
        digest.update(json.dumps(text).encode())
    path = cache_dir() / f"words-{digest.hexdigest()[:32]}.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if len(lines) == len(texts):
            return {text: tuple(map(sys.intern, line.split())) for text, line in zip(texts, lines)}
    except (OSError, ValueError, AttributeError):
        pass  # not there yet, or damaged: computed anew
    words = {text: tuple(words_of(text)) for text in tqdm(texts, desc="splitting texts into words", unit="text")}
    try:
        write_atomically(path, "".join(json.dumps(" ".join(words[text])) + "\n" for text in texts))
    except InputError as error:
        print(f"warning: {error}; the words will have to be computed again", file=sys.stderr)
    return words


def read_imdb(path):
    """aclImdb_v1.tar.gz or the folder aclImdb -> (labels, {"train", "test": [((text,), y), ..]}), neg = 0, pos = 1,
    in the order of the file names. Raises InputError for another layout, damage, or bytes that are not UTF-8."""
    wanted = re.compile(r"(?:.*/)?(train|test)/(neg|pos)/[^/]+\.txt")
    found = {}  # (split, class) -> [(name, text), ..]
    if path.is_dir():
        for file in path.glob("t*/*/*.txt"):
            if match := wanted.fullmatch(str(file)):
                with _reading(file):
                    found.setdefault(match.groups(), []).append((file.name, _decode(file.read_bytes(), file)))
    else:
        with _open_tar(path) as tar:
            for member in tar:
                match = wanted.fullmatch(member.name)
                if match and member.isfile():
                    text = _decode(tar.extractfile(member).read(), f"{path}: {member.name}")
                    found.setdefault(match.groups(), []).append((member.name.rpartition("/")[2], text))
    splits = {}
    for split in ("train", "test"):
        for y, label in enumerate(("neg", "pos")):
            if not found.get((split, label)):
                raise InputError(f"{path}: holds no aclImdb/{split}/{label}/*.txt, so it is not the IMDB data set "
                                 f"({RESOURCES['imdb'].url})")
            splits.setdefault(split, []).extend(((text,), y) for _, text in sorted(found[split, label]))
    return ["neg", "pos"], splits


def read_snli(path):
    """snli_1.0.zip or the folder snli_1.0 -> (labels, {"train", "dev", "test": [((premise, hypothesis), y), ..]}).
    Pairs with the gold label "-" are dropped. Raises InputError for another layout, damage, or a wrong line."""
    labels = ["entailment", "contradiction", "neutral"]
    splits = {}
    for split in ("train", "dev", "test"):
        name = f"snli_1.0_{split}.jsonl"
        with _reading(path):
            if path.is_dir():
                data = (path / name).read_bytes() if (path / name).is_file() else None
            else:
                with zipfile.ZipFile(path) as archive:
                    member = f"snli_1.0/{name}"
                    data = archive.read(member) if member in archive.namelist() else None
        if data is None:
            raise InputError(f"{path}: holds no {name}, so it is not the SNLI data set ({RESOURCES['snli'].url})")
        splits[split] = []
        for number, line in enumerate(_decode(data, f"{path}: {name}").split("\n"), 1):
            if not line.strip():
                continue
            where = f"{path}: {name}, line {number}"
            try:
                row = json.loads(line)
                label, texts = row["gold_label"], (row["sentence1"], row["sentence2"])
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(f"{where}: no JSON object with the strings gold_label, sentence1 and sentence2: "
                                 f"{line[:60]!r}") from None
            if label not in labels + ["-"]:
                raise InputError(f"{where}: gold_label {label!r} is none of {', '.join(labels)} and -")
            if label != "-":
                splits[split].append((texts, labels.index(label)))
    return labels, splits


def read_folder(path):
    """A folder with train.tsv, test.tsv and perhaps dev.tsv -> (labels, {split: [(texts, y), ..]}). No quoting: a
    text holds neither tabs nor line breaks; it may be empty. Raises InputError with file, line and value."""
    rows, headers = {}, {}
    for split in ("train", "dev", "test"):
        file = path / f"{split}.tsv"
        if split == "dev" and not file.exists():
            continue
        with _reading(file):
            lines = _decode(file.read_bytes(), file).split("\n")
        lines = [line.removesuffix("\r") for line in lines]
        if lines[-1] == "":
            lines.pop()
        if not lines:
            raise InputError(f"{file}: is empty; wanted the header label TAB text (TAB text2), then a line an example")
        headers[split] = header = lines[0].split("\t")
        if header not in (["label", "text"], ["label", "text", "text2"]):
            raise InputError(f"{file}, line 1: the header is {lines[0][:80]!r}, wanted label TAB text, or label TAB "
                             f"text TAB text2")
        if header != headers["train"]:
            raise InputError(f"{file}, line 1: {len(header)} columns, but train.tsv has {len(headers['train'])}")
        if len(lines) == 1:
            raise InputError(f"{file}: holds no examples, only a header")
        rows[split] = []
        for number, line in enumerate(lines[1:], 2):
            label, *texts = line.split("\t")
            if len(texts) + 1 != len(header):
                raise InputError(f"{file}, line {number}: {len(texts) + 1} columns instead of {len(header)}: "
                                 f"{line[:60]!r}")
            if not label.strip():
                raise InputError(f"{file}, line {number}: the label is empty")
            rows[split].append((number, label, tuple(texts)))

    labels = sorted({label for _, label, _ in rows["train"]})
    if len(labels) < 2:
        raise InputError(f"{path / 'train.tsv'}: only one class, {labels[0]!r}; at least 2 are needed")
    for label in labels:
        same = [number for number, other, _ in rows["train"] if other == label]
        if len(same) < 2:
            raise InputError(f"{path / 'train.tsv'}, line {same[0]}: class {label!r} has only this example, at least "
                             f"2 are needed")
    classes = {label: y for y, label in enumerate(labels)}
    for split in rows:
        for number, label, _ in rows[split]:
            if label not in classes:
                raise InputError(f"{path / split}.tsv, line {number}: label {label!r} does not occur in train.tsv")
    return labels, {split: [(texts, classes[label]) for _, label, texts in rows[split]] for split in rows}


# ---------------------------------------------------------------------------------------------------------------
# 3. Substitution tables: lower-case word -> list of lower-case words


def load_neighbors(source=None, data_dir=None, train_words=None):
    """A substitution table. source: "wordnet" (evaluated as words are asked for), a neighbour table .json, a
    counter-fitted vector file .txt or .zip, or None for the public vectors, fetched if need be. train_words: a
    Counter of the task's training words, for vectors only.

    Raises InputError for a missing file, another kind of file, or a table that does not map words to words.
    """
    if source == "wordnet":
        prepare_nltk(data_dir, wordnet=True)
        return WordNetSynonyms()
    path = Path(source).expanduser() if source is not None else locate("vectors", data_dir)
    if path.suffix not in (".json", ".txt", ".zip"):
        raise InputError(f"{path}: wanted `wordnet`, a neighbour table .json, or a vector file .txt or .zip")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return read_neighbors(path) if path.suffix == ".json" else vector_neighbors(path, train_words)


def read_neighbors(path):
    """A JSON object {word: [word, ..], ..} -> dict. Raises InputError with the word that is wrong."""
    with _reading(path):
        data = path.read_bytes()
    try:
        table = json.loads(_decode(data, path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({_why(error)})") from None
    if not isinstance(table, dict):
        raise InputError(f"{path}: wanted a JSON object that maps a word to a list of words")
    for word, others in table.items():
        if not isinstance(others, list):
            raise InputError(f"{path}: the value of {word!r} is not a list of words: {str(others)[:60]!r}")
        for other in others:
            if not isinstance(other, str) or other != other.lower() or other.split() != [other]:
                raise InputError(f"{path}: under {word!r}: {other!r} is not one lower-case word")
    # texts are lower-case and split at white space: other keys, of which the published table has some, never match
    return {word: others for word, others in table.items() if word.lower().split() == [word]}


class WordNetSynonyms:
    """A read-only table: the single-word lemmas of all synsets of a word, in synset order, lower-case, without
    repeats and without the word itself. Words without synonyms are not in it."""

    def __init__(self):
        self.memo = Memo(self.synonyms)

    @staticmethod
    def synonyms(word):
        lemmas = (lemma.lower() for synset in nltk.corpus.wordnet.synsets(word) for lemma in synset.lemma_names())
        return list(dict.fromkeys(lemma for lemma in lemmas if "_" not in lemma and lemma != word))

    def get(self, word, default=None):
        return self.memo[word] or default

    def __contains__(self, word):
        return bool(self.memo[word])

    def __getitem__(self, word):
        if not self.memo[word]:
            raise KeyError(word)
        return self.memo[word]


def table_fingerprint(table):
    """sha256 (hex) of a substitution table; WordNet is known by its version."""
    wordnet = isinstance(table, WordNetSynonyms)
    content = f"wordnet {nltk.corpus.wordnet.get_version()}" if wordnet else sorted(table.items())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def vector_neighbors(path, train_words, k=8, max_sq_dist=0.5, vocabulary=50_000, skip=27):
    """Nearest neighbours in a file of word vectors (Alzantot et al. 2018; vectors of Mrksic et al. 2016).

    path: .txt with a line `word number number ..` each, or its .zip. train_words: Counter of the task's training
    words. A word's substitutes are its at most k nearest words with ||a - b||^2 < max_sq_dist, nearest first. Both
    are among the `vocabulary` most frequent training words (ties by alphabet) and have a vector; of those the
    `skip` most frequent, function words, get no substitutes. Words without any are left out of the table.

    65,713 x 300 numbers take seconds to minutes and about 1 GiB; the result is kept in the cache.
    Raises InputError with the line of a short row or a non-number.
    """
    path = Path(path)
    ranked = sorted(train_words or (), key=lambda word: (-train_words[word], word))[:vocabulary]
    with _reading(path), open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps([k, max_sq_dist, skip, ranked]).encode())
    cache = cache_dir() / f"neighbors-{digest.hexdigest()[:32]}.json"
    if cache.is_file():
        try:
            return read_neighbors(cache)
        except InputError:
            pass  # damaged: computed anew

    vectors = read_vectors(path, set(ranked))
    words = [word for word in ranked if word in vectors]
    if not words:
        raise InputError(f"{path}: none of the {len(ranked)} training words has a vector in it")
    X = torch.from_numpy(np.stack([vectors[word] for word in words]))  # (n, dim) float32
    squares = X.square().sum(1)
    table = {}
    for start in tqdm(range(skip, len(words), 1000), desc="nearest neighbours", unit_scale=1000):
        A = X[start : start + 1000]
        distances = torch.addmm(squares[None], A, X.T, alpha=-2)  # (1000, n): ||b||^2 - 2 a.b orders as the distance
        distances[torch.arange(len(A)), torch.arange(start, start + len(A))] = math.inf  # not the word itself
        nearest = distances.topk(min(k + 8, len(words)), largest=False).indices.sort().values  # (1000, k + 8)
        # the few that matter once more without rounding, so that every machine finds the same
        exact = (A[:, None].double() - X[nearest].double()).square().sum(2)  # (1000, k + 8)
        exact[nearest == torch.arange(start, start + len(A))[:, None]] = math.inf
        order = exact.argsort(dim=1, stable=True)[:, :k]
        for word, ids, ds in zip(words[start:], nearest.gather(1, order).tolist(), exact.gather(1, order).tolist()):
            others = [words[i] for i, d in zip(ids, ds) if d < max_sq_dist]
            if others:
                table[word] = others
    try:
        write_atomically(cache, json.dumps(table))
    except InputError as error:
        print(f"warning: {error}; the neighbours will have to be computed again", file=sys.stderr)
    return table


def read_vectors(path, wanted):
    """Rows of a vector file (.txt, or .zip with one) for the wanted words -> {word: (dim,) float32 array}. Every
    row is checked. Raises InputError with the line."""
    vectors, dim = {}, None
    with _reading(path):
        if path.suffix == ".zip":
            archive = zipfile.ZipFile(path)
            members = [name for name in archive.namelist() if name.endswith(".txt") and not name.startswith("__MACOSX")]
            if len(members) != 1:
                raise InputError(f"{path}: wanted one .txt file in it, there are {len(members)}")
            file = archive.open(members[0])
        else:
            file = open(path, "rb")
        with file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                try:
                    word, *fields = line.decode().rstrip().split(" ")
                    row = list(map(float, fields))
                except UnicodeDecodeError as error:
                    raise InputError(f"{where}: not UTF-8 (byte 0x{line[error.start]:02x})") from None
                except ValueError as error:
                    raise InputError(f"{where}: not a number ({error})") from None
                dim = dim or len(row)
                if not row or len(row) != dim:
                    raise InputError(f"{where}: {len(row)} numbers after the word, wanted {dim or 'some'}")
                if not math.isfinite(sum(row)):
                    raise InputError(f"{where}: a number is not finite")
                if word in wanted and word not in vectors:
                    vectors[word] = np.array(row, dtype=np.float32)
    return vectors


# ---------------------------------------------------------------------------------------------------------------
# 4. Words to tokens


class Memo(dict):
    """A dictionary that computes what it lacks."""

    def __init__(self, function):
        self.function = function

    def __missing__(self, key):
        value = self[key] = self.function(key)
        return value


class Vocabulary:
    """Words to tokens of a BERT or RoBERTa tokenizer, exactly one per word, with the candidates of every position.

    tokenizer: a Hugging Face tokenizer. max_len: longest input in tokens, special tokens included. neighbors: a
    substitution table. unknown: what a word outside the vocabulary becomes, "piece" (the first piece the tokenizer
    gives for it) or "unk". max_candidates: of a position, the word itself included.
    No text becomes a special token, whatever is written in it, except [UNK] for what has no token at all.
    Raises InputError for a tokenizer without cls, sep, pad and unk tokens, and for a max_len without room for words.
    """

    def __init__(self, tokenizer, max_len, neighbors=None, unknown="piece", max_candidates=10):
        if unknown not in ("piece", "unk"):
            raise InputError(f"unknown words as {unknown!r}: wanted piece or unk")
        if max_len < 3:
            raise InputError(f"longest input {max_len}: wanted at least 3, two are special tokens")
        if max_candidates < 1:
            raise InputError(f"{max_candidates} candidates: wanted at least 1, the word itself")
        names = ("cls_token_id", "sep_token_id", "pad_token_id", "unk_token_id")
        self.cls, self.sep, self.pad, self.unk = (getattr(tokenizer, name) for name in names)
        if None in (self.cls, self.sep, self.pad, self.unk):
            raise InputError(f"tokenizer {tokenizer.name_or_path!r} lacks a cls, sep, pad or unk token: wanted one of "
                             f"a BERT or RoBERTa model")
        self.tokenizer, self.max_len, self.unknown, self.max_candidates = tokenizer, max_len, unknown, max_candidates
        self.neighbors = {} if neighbors is None else neighbors
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = (added | set(tokenizer.all_special_ids)) - {self.unk}
        self.ids = tokenizer.get_vocab()
        # byte-level BPE writes the space before a word as "Ġ", and has own letters for bytes that are not ASCII
        self.byte_level = any(piece.startswith("Ġ") for piece in tokenizer.tokenize(" a")[:1])
        self.tokens, self.sets = Memo(self._token), Memo(self._candidates)
        # for encode: a row per word with its candidates besides the word itself; row 0 is a word that has none
        self.rows = Memo(self._row)
        self.subs = np.full((1024, max_candidates - 1), self.pad, dtype=np.int64)
        self.counts = np.zeros(1024, dtype=np.int64)
        self.used = 1

    def token(self, word):
        """The id of the word, else of its first piece (or [UNK], see the class); never another special token."""
        return self.tokens[word]

    def candidates(self, word):
        """Token ids of candidate_words(word)."""
        return self.sets[word]

    def _token(self, word):
        if word.isascii() or not self.byte_level:
            token = self.ids.get("Ġ" + word if self.byte_level else word)
            if token is not None and token not in self.special:
                return token
        text = " " + word[:1000].encode("utf-8", "replace").decode()  # the first piece does not need more
        pieces = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        whole = self.byte_level and len(pieces) == 1  # the vocabulary's own spelling of a word beyond ASCII
        if not pieces or pieces[0] in self.special or (self.unknown == "unk" and not whole):
            return self.unk
        return pieces[0]

    def candidate_words(self, word):
        """The word, then its substitutes in the table's order as far as their token differs from its own, at most
        max_candidates in all."""
        others = [other for other in self.neighbors.get(word, ()) if self.tokens[other] != self.tokens[word]]
        return [word, *others][: self.max_candidates]

    def _candidates(self, word):
        return tuple(self.tokens[other] for other in self.candidate_words(word))

    def _row(self, word):
        others = self.sets[word][1:]
        if not others:
            return 0
        if self.used == len(self.subs):
            self.subs = np.concatenate([self.subs, np.full_like(self.subs, self.pad)])
            self.counts = np.concatenate([self.counts, np.zeros_like(self.counts)])
        row, self.used = self.used, self.used + 1
        self.subs[row, : len(others)] = others
        self.counts[row] = len(others)
        return row

    def visible(self, words):
        """The words that fit into max_len: the first ones; of a pair the premise, then what fits of the hypothesis."""
        room = self.max_len - 1 - len(words)  # [CLS], and a [SEP] after each text
        kept = []
        for text in words:
            kept.append(tuple(text[: max(room, 0)]))
            room -= len(text)
        return tuple(kept)

    def input_ids(self, words):
        """[CLS] words [SEP] or [CLS] premise [SEP] hypothesis [SEP] -> list of token ids, at most max_len."""
        ids = [self.cls]
        for text in self.visible(words):
            ids += [self.tokens[word] for word in text] + [self.sep]
        return ids

    def substitute(self, words, choice):
        """The words with candidate choice[l] at every position l of encode()'s row for them. choice: (L,) ints."""
        *premise, last = self.visible(words)
        first = 1 + sum(len(text) + 1 for text in premise)  # after [CLS], and the premise with its [SEP]
        chosen = (self.candidate_words(word)[k] if k else word for word, k in zip(last, choice[first:]))
        return (*premise, tuple(chosen))

    def encode(self, batch, hull=False):
        """Words of B examples -> tensors, padded to the longest of them (L).

        input_ids, attention_mask (B, L) int64. With hull also subs (B, L, K) int64 and subs_mask (B, L, K) bool,
        True where there is a candidate. K: the most candidates of any position in this batch. Candidate 0 is the
        position's own token; special tokens, padding, premises and words without substitutes have only that.
        """
        rows = [self.input_ids(words) for words in batch]
        B, L = len(rows), max(map(len, rows))
        ids = np.full((B, L), self.pad, dtype=np.int64)
        attention = np.zeros((B, L), dtype=np.int64)
        for b, row in enumerate(rows):
            ids[b, : len(row)] = row
            attention[b, : len(row)] = 1
        out = {"input_ids": ids, "attention_mask": attention}
        if hull:
            index = np.zeros((B, L), dtype=np.int64)  # which row of self.subs each position takes
            for b, words in enumerate(batch):
                last = self.visible(words)[-1]
                end = len(rows[b]) - 1  # the last [SEP]
                index[b, end - len(last) : end] = [self.rows[word] for word in last]
            counts = self.counts[index]  # (B, L)
            K = 1 + int(counts.max())
            out["subs"] = np.concatenate([ids[..., None], self.subs[index, : K - 1]], axis=2)
            out["subs_mask"] = np.arange(K) <= counts[..., None]
        return {name: torch.from_numpy(array) for name, array in out.items()}


# ---------------------------------------------------------------------------------------------------------------
# 5. Batches


def balanced_batches(y, lengths, batch_size, rng, window=50):
    """One epoch of class-balanced batches -> list of int arrays of example numbers, sorted by class in each.

    y, lengths: class and length of each example. batch_size: rounded down to a multiple of the number of classes C.
    rng: numpy Generator. Every batch has the same number of each class and no example comes twice. The epoch ends
    when the smallest class is used up (a last, smaller batch is kept if it has 2 of each); the surplus of larger
    classes is drawn anew each epoch. Within a window of that many batches, examples of like length meet, which
    saves padding; who shares a window is chance.
    Raises InputError for fewer than 2 classes, or fewer than 2 examples of a class or of a class in a batch.
    """
    y, lengths = np.asarray(y), np.asarray(lengths)
    classes, sizes = np.unique(y, return_counts=True)
    per = batch_size // max(len(classes), 1)  # of each class in a batch
    if len(classes) < 2:
        raise InputError(f"the examples are of {len(classes)} class, at least 2 are needed")
    if sizes.min() < 2:
        raise InputError(f"class {classes[sizes.argmin()]} has only {sizes.min()} example, at least 2 are needed")
    if per < 2:
        raise InputError(f"batch size {batch_size}: at least {2 * len(classes)} are needed, 2 of each class")
    full, rest = divmod(int(sizes.min()), per)
    columns = []  # for each class its part of every batch
    for c in classes:
        shuffled = rng.permutation(np.flatnonzero(y == c))
        parts = []
        for start in range(0, full, window):
            part = shuffled[start * per : min(start + window, full) * per]
            parts += list(part[np.argsort(lengths[part], kind="stable")].reshape(-1, per))
        columns.append(parts + [shuffled[full * per : full * per + rest]] * (rest >= 2))
    batches = [np.concatenate(parts) for parts in zip(*columns)]
    return [batches[i] for i in rng.permutation(len(batches))]
