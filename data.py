"""Data for RIFT (Dong et al., NeurIPS 2021): from public archives to tensors, in the order of this file.

A text is a tuple of lower-case words; joined by single spaces it is a string, and nobody tokenizes it a second time.
A substitution table maps a word to a list of words. `Vocabulary` gives every word one token, and every position its
candidate tokens (the adversary's hull). `balanced_batches` draws every class equally often, because the loss compares
examples of one class. The last hundred lines are a data set themselves: the toy task's grammar.
"""
import functools
import hashlib
import http.client
import io
import json
import math
import os
import random
import re
import shutil
import sys
import tarfile
import time
import urllib.request
import uuid
import zipfile
import zlib
from collections import namedtuple
from contextlib import contextmanager, suppress
from pathlib import Path

import nltk
import numpy as np
import safetensors
import torch
from tqdm import tqdm


class InputError(ValueError):
    """What the user gave cannot be used: one line with the file, the line, the value and what would be right."""


# ---- Files ---------------------------------------------------------------------------------------
RESOURCES = {  # name: (file, what it unpacks to, address, md5 demanded of a download)
    "imdb": ("aclImdb_v1.tar.gz", "aclImdb", "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
             "7c2ac02c03563afcf9b574c7e56c153a"),
    "snli": ("snli_1.0.zip", "snli_1.0", "https://nlp.stanford.edu/projects/snli/snli_1.0.zip", None),
    "vectors": ("counter-fitted-vectors.txt.zip", "counter-fitted-vectors.txt", "https://github.com/nmrksic/"
                "counter-fitting/raw/master/word_vectors/counter-fitted-vectors.txt.zip", None),
    "scores": ("jia2019_cert_lm_scores.zip", "lm_scores",
               "https://nlp.stanford.edu/data/robinjia/jia2019_cert_lm_scores.zip", None),
}


def cache_dir():
    """The folder for downloads and everything computed once: $RIFT_CACHE, or ~/.cache/rift."""
    return Path(os.environ.get("RIFT_CACHE") or "~/.cache/rift").expanduser().absolute()


def find(data_dir, *names):
    """The files and folders of these names that exist in data_dir, then in the cache. InputError if it is no folder."""
    first = Path(data_dir or cache_dir()).expanduser().absolute()
    if first != cache_dir() and not first.is_dir():
        raise InputError(f"{first}: no such folder (--data-dir wants one; without it {cache_dir()} is used)")
    return [folder / name for folder in (first, cache_dir()) for name in names if (folder / name).exists()]


@contextmanager
def reading(path):
    """Turns what missing files, damaged archives and bytes that are not UTF-8 raise into an InputError."""
    try:
        yield
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def text_of(path):
    """The text of a UTF-8 file. Raises InputError where it cannot be read."""
    with reading(path):
        return path.read_bytes().decode("utf-8-sig")


def texts_in(path, wanted=""):
    """Yields (name for messages, text) of the files in a folder, .tar.gz or .zip whose name matches the pattern
    `wanted`; any other file stands for itself. Raises InputError for damage, at the latest after the last file."""
    with reading(path):
        if path.is_dir():
            files = ((file.as_posix(), file.read_bytes) for file in path.rglob("*"))
        elif path.suffix == ".zip":
            archive = zipfile.ZipFile(path)
            files = ((f"{path}: {name}", functools.partial(archive.read, name)) for name in archive.namelist())
        elif path.suffix == ".gz":
            archive = tarfile.open(path, "r:gz")
            files = ((f"{path}: {file.name}", archive.extractfile(file).read) for file in archive if file.isfile())
        else:
            files = [(str(path), path.read_bytes)]
        for where, read in files:
            if re.search(wanted, where):
                with reading(where):
                    text = read().decode("utf-8-sig")
                yield where, text
        if path.suffix == ".gz":
            archive.fileobj.read()  # only the very end shows that an archive was cut or altered


@contextmanager
def writing(path):
    """Turns what a full disk, a read-only folder and the like raise into an InputError."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


@contextmanager
def replacing(path):
    """Yields a temporary path; the file or folder written there is renamed to `path` when all went well, else removed.
    A folder that is there stays. Raises InputError when it cannot be written."""
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield tmp
            try:
                os.replace(tmp, path)
            except OSError:
                if not (tmp.is_dir() and path.is_dir()):  # else another process was quicker
                    raise
    finally:
        with suppress(OSError):  # what cannot even be removed was never there, or its folder is read-only now
            remove(tmp)


def remove(path):
    """Delete a file, or a folder with all that is in it; it may be missing. Raises OSError where that fails."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_atomically(path, content):
    """Write str (UTF-8) or bytes, all of it or nothing: what was there before stays when that fails (InputError)."""
    with replacing(Path(path)) as tmp:
        tmp.write_bytes(content.encode() if isinstance(content, str) else content)


def fingerprint(values):
    """sha256 (hex) of JSON-able values."""
    return hashlib.sha256("".join(map(json.dumps, values)).encode()).hexdigest()


def cached(name, compute):
    """compute(), which is JSON-able, or what it gave the last time, from the file `name` in the cache."""
    with suppress(OSError, ValueError):  # not there yet, or damaged
        return json.loads((cache_dir() / name).read_bytes())
    value = compute()
    with suppress(InputError):  # a cache that cannot be written costs time only
        write_atomically(cache_dir() / name, json.dumps(value))
    return value


def locate(name, data_dir=None):
    """Path of the resource `name` (a key of RESOURCES), packed or unpacked: in data_dir, else in the cache, else
    downloaded into the cache. Raises InputError as `download` does."""
    packed, unpacked, url, md5 = RESOURCES[name]
    if not find(data_dir, unpacked, packed):
        download(url, cache_dir() / packed, md5)
    return find(data_dir, unpacked, packed)[0]


def download(url, path, md5=None, tries=4, pause=1.0, timeout=30.0):
    """Fetch url to path. What fails is tried again from the start, `tries` times in all, after pause, 2 pause,
    4 pause .. seconds. Raises InputError with the address and where to put the file by hand."""
    request = urllib.request.Request(url, headers={"User-Agent": "rift"})
    with replacing(Path(path)) as tmp:
        for attempt in range(tries):
            time.sleep(pause * 2 ** (attempt - 1) if attempt else 0)
            try:
                with urllib.request.urlopen(request, timeout=timeout) as reply, open(tmp, "wb") as file:
                    total = int(reply.headers.get("Content-Length", 0))
                    with tqdm.wrapattr(file, "write", total=total or None, desc=f"fetching {url}") as progress:
                        shutil.copyfileobj(reply, progress)
                content = tmp.read_bytes()
                if total and len(content) != total:
                    raise OSError(f"the connection broke after {len(content)} of {total} bytes")
                if content[:200].lstrip().startswith(b"<"):
                    raise OSError("the server sent an HTML page instead of the file")
                if md5 and hashlib.md5(content).hexdigest() != md5:
                    raise OSError(f"wrong checksum, the md5 should be {md5}")
                return
            except (OSError, http.client.HTTPException) as error:
                problem = error
                if 400 <= getattr(error, "code", 0) < 500:
                    break  # the server will not change its mind
        raise InputError(f"{url}: {problem}; download it by hand and put it at {path}")


def unpack(archive, folder):
    """Unpack a .tar.gz without its links into `folder`, private to the user as NLTK demands; one that exists is left
    alone. Raises InputError for a damaged archive, and for one that would write outside the folder."""
    with replacing(Path(folder)) as tmp, reading(archive), tarfile.open(archive) as file:
        file.extractall(tmp, [member for member in file if member.isfile() or member.isdir()], filter="data")
        for path in (tmp, *tmp.rglob("*")):
            path.chmod(0o700 if path.is_dir() else 0o600)


def prepare_nltk(data_dir=None, wordnet=False):
    """Make NLTK's sentence tokenizer, and WordNet if asked for, available in this process: from data_dir, the cache
    or NLTK's own folders, else by nltk.download into the cache. Raises InputError that says how to install."""
    own = cache_dir() / "nltk_data"
    for path in (own, *find(data_dir, "nltk_data.tar.gz", "nltk_data")):
        if path.suffix == ".gz":  # NLTK refuses data that other accounts could write, so into a private folder
            with reading(path):
                private = cache_dir() / f"nltk_data-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
            if not private.is_dir():
                unpack(path, private)
            path = private / "nltk_data"
        if str(path.resolve()) not in nltk.data.path:
            nltk.data.path.insert(0, str(path.resolve()))

    def there():
        with suppress(LookupError, OSError, ValueError):  # not installed, or NLTK refuses to read it
            if wordnet:
                nltk.corpus.wordnet.ensure_loaded()
            return nltk.tokenize.punkt_model_available()

    names = ["punkt_tab", "wordnet"][: 1 + wordnet]
    if not there():
        with suppress(OSError, ValueError):
            own.mkdir(mode=0o700, parents=True, exist_ok=True)
            nltk.download(names, str(own), quiet=True, print_error_to=io.StringIO())
    if not there():
        raise InputError(f"NLTK data not found; install it with `python -m nltk.downloader {' '.join(names)}`, or put "
                         f"nltk_data.tar.gz into {data_dir or cache_dir()} (NLTK refuses folders others can write)")


# ---- Tasks ---------------------------------------------------------------------------------------
# words: one or two texts, each a tuple of words, of which only the last may be changed; y: class
Example = namedtuple("Example", "words y")
# labels: names of the classes, by class number; train, dev, test: lists of Example; fingerprint: sha256 of all of it
Task = namedtuple("Task", "name labels train dev test fingerprint")


def words_of(text):
    """Raw text -> its words: nltk.word_tokenize, then lower case. No word is empty or holds white space, whatever
    the text, so that " ".join(words).split() gives them back. Call prepare_nltk first (LookupError otherwise)."""
    text = text.replace("<br />", " ").encode("utf-8", "replace").decode()  # half of a surrogate pair becomes "?"
    return [sys.intern(word.lower()) for word in nltk.word_tokenize(text)]


def to_text(words):
    """Example.words -> the string that models and attacks see, or a tuple of two for a pair."""
    texts = tuple(" ".join(text) for text in words)
    return texts[0] if len(texts) == 1 else texts


def from_text(text):
    """The inverse of to_text."""
    return tuple(tuple(part.split()) for part in ([text] if isinstance(text, str) else text))


def load_task(task, data_dir=None, *, train_size=None, dev_size=None, test_size=None, split_seed=0):
    """Read "imdb", "snli", a folder of TSV files, or make "toy" -> Task. The sizes and split_seed are those of `choose`.
    Raises InputError for missing or damaged files, wrong lines, and sizes that cannot be had."""
    readers = {"imdb": read_imdb, "snli": read_snli}
    sizes = {"train": train_size, "dev": dev_size, "test": test_size}
    if task == "toy":
        labels, splits = ["blame", "praise"], toy_splits(sizes, split_seed)
    elif task not in readers and not Path(task).is_dir():
        raise InputError(f"unknown task {str(task)!r}: neither toy, imdb, snli nor a folder with train.tsv and test.tsv")
    else:
        path = locate(task, data_dir) if task in readers else Path(task)
        labels, splits = readers.get(task, read_folder)(path)
        splits = choose(splits, labels, sizes, split_seed, path)
        prepare_nltk(data_dir)
        words = tokenize(text for raw in splits.values() for texts, _ in raw for text in texts)
        for split, raw in splits.items():
            splits[split] = [Example(tuple(words[text] for text in texts), y) for texts, y in raw]
    content = [labels, *([split, x.y, to_text(x.words)] for split in splits for x in splits[split])]
    return Task(Path(task).resolve().name, labels, **splits, fingerprint=fingerprint(content))


def choose(splits, labels, sizes, split_seed, where):
    """{split: [(texts, y), ..]} -> the examples to use of "train", "dev" and "test", in random order.

    sizes: {split: n}, a class-balanced subset, n rounded down to a multiple of the number of classes; None is all.
    Without a dev split a tenth of every class of train, at most 1,000 in all, is set aside for it (or what its size
    says). Subsets and their order depend on split_seed alone, so every method and seed sees the same texts, and the
    first n of a split are a random sample of it. Raises InputError when a class has too few.
    """
    if split_seed < 0:
        raise InputError(f"split seed {split_seed}: has to be 0 or more")
    rngs = {split: np.random.default_rng([split_seed, i]) for i, split in enumerate(sizes)}
    pools = {}  # split -> for each class its examples' numbers in random order
    for split, raw in splits.items():
        y = np.array([y for _, y in raw])
        pools[split] = [rngs[split].permutation(np.flatnonzero(y == c)) for c in range(len(labels))]
    if "dev" not in splits:
        # dev from the front and train from the end: the size of one leaves the other's examples as they are
        total = len(splits["train"])
        counts = [max(1, len(pool) * min(1000, total // 10) // total) for pool in pools["train"]]
        if sizes["dev"] is not None:
            counts = map(len, balanced(pools["train"], sizes["dev"], labels, f"{where}: dev"))
        pools["dev"], pools["train"] = zip(*(np.split(pool, [n]) for pool, n in zip(pools["train"], counts)))
        splits = splits | {"dev": splits["train"]}
    pools = {split: balanced(pools[split], size, labels, f"{where}: {split}") for split, size in sizes.items()}
    fewest, label = min(zip(map(len, pools["train"]), labels))
    if fewest < 2:
        raise InputError(f"{where}: class {label!r} has {fewest} training examples (without those of dev), wanted 2")
    return {split: [splits[split][i] for i in rngs[split].permutation(np.concatenate(pools[split]))] for split in sizes}


def balanced(pools, size, labels, where):
    """The last size // C of each of C classes' pools, or all if size is None. InputError where there are too few."""
    if size is None:
        return pools
    n, (fewest, label) = size // len(pools), min(zip(map(len, pools), labels))
    if not 1 <= n <= fewest:
        raise InputError(f"{where}: {size} examples are {n} of each class, wanted 1 to {fewest} (class {label!r})")
    return [pool[-n:] for pool in pools]


def tokenize(texts):
    """Raw texts -> {text: tuple of its words}, each text split once (a premise of SNLI stands in three pairs). That
    takes a second for 400 reviews, so it is kept in the cache."""
    texts = list(dict.fromkeys(texts))
    lines = cached(f"words-{fingerprint([nltk.__version__, *texts])[:32]}.json",
                   lambda: [" ".join(words_of(text)) for text in tqdm(texts, desc="words", delay=2)])
    return {text: tuple(map(sys.intern, line.split())) for text, line in zip(texts, lines)}


def read_imdb(path):
    """aclImdb_v1.tar.gz or the folder aclImdb -> (labels, {"train", "test": [((text,), y), ..]}), in the order of the
    file names. Raises InputError for another layout or damage."""
    labels = ["neg", "pos"]
    found = {(split, label): [] for split in ("train", "test") for label in labels}
    for where, text in texts_in(path, r"/(train|test)/(neg|pos)/[^/]+\.txt$"):
        split, label, file = where.split("/")[-3:]
        found[split, label].append((file, text))
    for (split, label), texts in found.items():
        if not texts:
            raise InputError(f"{path}: holds no aclImdb/{split}/{label}/*.txt, wanted {RESOURCES['imdb'][2]}")
    return labels, {split: [((text,), y) for y, label in enumerate(labels) for _, text in sorted(found[split, label])]
                    for split in ("train", "test")}


def read_snli(path):
    """snli_1.0.zip or the folder snli_1.0 -> (labels, {"train", "dev", "test": [((premise, hypothesis), y), ..]}).
    Pairs with the gold label "-" are dropped. Raises InputError for another layout, damage, or a wrong line."""
    labels = ["entailment", "contradiction", "neutral"]
    splits = {"train": [], "dev": [], "test": []}
    for where, content in texts_in(path, r"[/ ]snli_1\.0_(train|dev|test)\.jsonl$"):
        split = where.removesuffix(".jsonl").rpartition("_")[2]
        for number, line in enumerate(content.rstrip().split("\n"), 1):
            try:
                row = json.loads(line)
                label, texts = row["gold_label"], (row["sentence1"], row["sentence2"])
                if label not in (*labels, "-") or not all(isinstance(text, str) for text in texts):
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(f"{where}, line {number}: {line[:120]!r}, wanted JSON with the strings sentence1, "
                                 f"sentence2 and gold_label ({', '.join(labels)} or -)") from None
            if label != "-":
                splits[split].append((texts, labels.index(label)))
    for split, pairs in splits.items():
        if not pairs:
            raise InputError(f"{path}: holds no snli_1.0_{split}.jsonl, wanted {RESOURCES['snli'][2]}")
    return labels, splits


def read_folder(path):
    """train.tsv, test.tsv and perhaps dev.tsv (header `label TAB text` or `label TAB text TAB text2`) -> (labels,
    {split: [(texts, y), ..]}). Labels are any strings, classes in their sorted order. No quoting: a text holds neither
    tabs nor line breaks; it may be empty. Raises InputError with file, line and value."""
    headers, labels, splits = ["label\ttext", "label\ttext\ttext2"], None, {}
    for split in ("train", "dev", "test") if (path / "dev.tsv").exists() else ("train", "test"):
        where, content = path / f"{split}.tsv", text_of(path / f"{split}.tsv")
        header, *lines = content.replace("\r\n", "\n").removesuffix("\n").split("\n")
        if header not in headers or not lines:
            wanted = " or ".join(map(repr, headers))
            raise InputError(f"{where}, line 1: {header[:80]!r}, wanted the header {wanted}, then examples")
        headers = [header]  # test.tsv and dev.tsv have the columns of train.tsv
        rows = [line.split("\t") for line in lines]
        labels = labels or sorted({row[0] for row in rows})
        for number, row in enumerate(rows, 2):
            if len(row) != header.count("\t") + 1 or not row[0].strip():
                raise InputError(f"{where}, line {number}: {str(row)[:80]}, wanted {header!r} with a label")
            if row[0] not in labels:
                raise InputError(f"{where}, line {number}: label {row[0]!r} does not occur in train.tsv")
        if len(labels) < 2:
            raise InputError(f"{where}: only one class, {labels[0]!r}; at least 2 are needed")
        splits[split] = [(tuple(texts), labels.index(label)) for label, *texts in rows]
    return labels, splits


# ---- Substitution tables: lower-case word -> list of lower-case words ----------------------------
def load_neighbors(source=None, data_dir=None, train_words=None):
    """A substitution table. source: "wordnet" (evaluated as words are asked for), a neighbour table .json, a
    counter-fitted vector file .txt or .zip, or None for the public vectors, fetched if need be. train_words: a
    Counter of the task's training words, for vectors only. Raises InputError for a missing or an unfit file."""
    if source == "wordnet":
        prepare_nltk(data_dir, wordnet=True)
        return WordNetSynonyms()
    path = Path(source).expanduser() if source is not None else locate("vectors", data_dir)
    if path.suffix not in (".json", ".txt", ".zip"):
        raise InputError(f"{path}: wanted `wordnet`, a neighbour table .json, or a vector file .txt or .zip")
    return read_neighbors(path) if path.suffix == ".json" else vector_neighbors(path, train_words)


def read_neighbors(path):
    """A JSON object {word: [word, ..], ..} -> dict. Raises InputError with the word that is wrong."""
    content = text_of(Path(path))
    try:
        items = json.loads(content).items()
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{path}: wanted a JSON object that maps a word to a list of words") from None

    def sound(x):  # half of a surrogate pair could not be printed
        return isinstance(x, str) and x.lower().split() == [x] == [x.encode("utf-8", "replace").decode()]

    for word, others in items:
        if not (isinstance(others, list) and all(map(sound, others))):
            raise InputError(f"{path}: {word!r} maps to {str(others)[:200]}, wanted a list of single lower-case words")
    # texts are lower-case and split at white space: other keys, of which the published table has some, never match
    return {word: others for word, others in items if word.lower().split() == [word]}


class WordNetSynonyms:
    """A table computed as it is asked: the single-word lemmas of all synsets of a word, in synset order, lower-case,
    without repeats and without the word itself."""

    @staticmethod
    @functools.cache
    def synonyms(word):
        lemmas = (lemma.lower() for synset in nltk.corpus.wordnet.synsets(word) for lemma in synset.lemma_names())
        return list(dict.fromkeys(lemma for lemma in lemmas if "_" not in lemma and lemma != word))

    def get(self, word, default=None):
        return self.synonyms(word) or default


def table_fingerprint(table):
    """sha256 (hex) of a substitution table; WordNet is known by its version."""
    wordnet = isinstance(table, WordNetSynonyms)
    return fingerprint([f"wordnet {nltk.corpus.wordnet.get_version()}" if wordnet else sorted(table.items())])


def vector_neighbors(path, train_words, k=8, max_sq_dist=0.5, vocabulary=50_000, skip=27):
    """Nearest neighbours in a file of word vectors (Alzantot et al. 2018; vectors of Mrksic et al. 2016).

    path: see read_vectors. train_words: Counter of the task's training words. A word's substitutes are its at most k
    nearest words with ||a - b||^2 < max_sq_dist, nearest first. Both are among the `vocabulary` most frequent training
    words (ties by alphabet) and have a vector; of those the `skip` most frequent, function words, get none.
    65,713 x 300 numbers take a minute or two and 1 GiB; the result is kept in the cache. Raises InputError.
    """
    path = Path(path)
    ranked = sorted(train_words or (), key=lambda word: (-train_words[word], word))[:vocabulary]

    def compute():
        vectors = read_vectors(path, set(ranked))
        words = [word for word in ranked if word in vectors]
        if not words:
            raise InputError(f"{path}: none of the {len(ranked)} training words has a vector in it")
        X = torch.from_numpy(np.stack([vectors[word] for word in words]))  # (n, dim) float64
        table = {}
        for start in tqdm(range(skip, len(words), 1000), desc="nearest neighbours", unit_scale=1000):
            distances = torch.cdist(X[start : start + 1000], X).square_()  # (1000, n)
            for i, row in enumerate(distances, start):
                row[i] = math.inf  # not the word itself
                near = (row < max_sq_dist).nonzero()[:, 0]
                # rounded, so that of equals the most frequent word comes first on every machine
                nearest = near[row[near].round(decimals=9).argsort(stable=True)[:k]]
                if len(nearest):
                    table[words[i]] = [words[j] for j in nearest.tolist()]
        return table

    with reading(path):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    return cached(f"neighbors-{fingerprint([content, k, max_sq_dist, skip, ranked])[:32]}.json", compute)


def read_vectors(path, wanted):
    """A .txt with a line `word number number ..` each, or a .zip with one -> {word: (dim,) float64 array} of the
    wanted words. Raises InputError with the line, also of other words."""
    files = list(texts_in(path, r"^(?!.*__MACOSX).*\.txt$"))
    if len(files) != 1:
        raise InputError(f"{path}: wanted one .txt file in it, there are {len(files)}")
    [(where, content)] = files
    vectors, dim = {}, None
    for number, line in enumerate(content.removesuffix("\n").split("\n"), 1):
        word, *fields = line.rstrip().split(" ")
        try:
            row = list(map(float, fields))
        except ValueError:
            row = []
        dim = dim or len(row)
        if not row or len(row) != dim or not math.isfinite(sum(row)):
            raise InputError(f"{where}, line {number}: {line[:60]!r}, wanted a word and {dim or 'some'} numbers")
        if word in wanted:
            vectors.setdefault(word, np.array(row))
    return vectors


# ---- Words to tokens -----------------------------------------------------------------------------
class Vocabulary:
    """Words to tokens of a BERT or RoBERTa tokenizer, exactly one per word, with the candidates of every position.

    tokenizer: a Hugging Face tokenizer. max_len: longest input in tokens, special tokens included. neighbors: a
    substitution table. unknown: what a word outside the vocabulary becomes, "piece" (the first piece the tokenizer
    gives for it) or "unk". max_candidates: of a position, the word itself included.
    No text becomes a special token, whatever is written in it, except [UNK] for what has no token at all.
    """

    def __init__(self, tokenizer, max_len, neighbors=None, unknown="piece", max_candidates=10):
        if max_len < 3 or unknown not in ("piece", "unk") or max_candidates < 1:
            raise InputError(f"longest input {max_len}, unknown words {unknown!r}, {max_candidates} candidates: wanted "
                             f"at least 3 (special tokens included), piece or unk, and at least 1 (the word itself)")
        self.tokenizer, self.max_len, self.unknown, self.max_candidates = tokenizer, max_len, unknown, max_candidates
        self.neighbors = {} if neighbors is None else neighbors
        specials = [getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad", "unk")]
        if None in specials:
            raise InputError(f"tokenizer {tokenizer.name_or_path!r} lacks one of the tokens cls, sep, pad and unk")
        self.cls, self.sep, self.pad, self.unk = specials
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = (added | set(tokenizer.all_special_ids)) - {self.unk}
        self.ids = tokenizer.get_vocab()
        # byte-level BPE writes the space before a word as "Ġ", and has own letters for bytes that are not ASCII
        self.byte_level = any(piece.startswith("Ġ") for piece in tokenizer.tokenize(" a")[:1])
        # the same words come again and again
        self.token, self.candidates = functools.cache(self.token), functools.cache(self.candidates)

    def token(self, word):
        """The id of the word, else of its first piece (or [UNK], see the class); never another special token."""
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
        others = [other for other in self.neighbors.get(word, ()) if self.token(other) != self.token(word)]
        return [word, *others][: self.max_candidates]

    def candidates(self, word):
        """Tuple of the token ids of candidate_words(word)."""
        return tuple(map(self.token, self.candidate_words(word)))

    def visible(self, words):
        """The words that fit into max_len: the first ones; of a pair the premise, then what fits of the hypothesis."""
        room = self.max_len - 1 - len(words)  # [CLS], and a [SEP] after each text
        kept = []
        for text in words:
            kept.append(tuple(text[:room]))
            room -= len(kept[-1])
        return tuple(kept)

    def input_ids(self, words):
        """[CLS] words [SEP] or [CLS] premise [SEP] hypothesis [SEP] -> list of token ids, at most max_len."""
        ids = [self.cls]
        for text in self.visible(words):
            ids += [*map(self.token, text), self.sep]
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
        lengths = np.array([[len(row)] for row in rows])
        L = lengths.max()
        ids = np.array([row + [self.pad] * (L - len(row)) for row in rows])  # (B, L)
        out = {"input_ids": ids, "attention_mask": (np.arange(L) < lengths).astype(np.int64)}
        if hull:
            row_of = {None: 0}  # of the batch's words that may change in `table`; None stands for what may not
            index = np.zeros(ids.shape, dtype=np.int64)
            for b, words in enumerate(batch):
                last = self.visible(words)[-1]
                end = len(rows[b]) - 1  # the last [SEP]
                index[b, end - len(last) : end] = [row_of.setdefault(word, len(row_of)) for word in last]
            substitutes = [self.candidates(word)[1:] if word else () for word in row_of]
            counts = np.array(list(map(len, substitutes)))
            K = 1 + counts.max()
            table = np.array([row + (self.pad,) * (K - 1 - len(row)) for row in substitutes], dtype=np.int64)
            out["subs"] = np.concatenate([ids[..., None], table[index]], axis=2)
            out["subs_mask"] = np.arange(K) <= counts[index][..., None]
        return {name: torch.from_numpy(array) for name, array in out.items()}


# ---- Batches -------------------------------------------------------------------------------------
def balanced_batches(y, lengths, batch_size, rng, window=50):
    """One epoch of class-balanced batches -> list of int arrays of example numbers, sorted by class in each.

    y, lengths: class and length of each example. batch_size: rounded down to a multiple of the number of classes.
    rng: numpy Generator. No example comes twice. The epoch ends when the smallest class is used up (a last, smaller
    batch is kept if it has 2 of each); the surplus of larger classes is drawn anew each epoch. Within a window of that
    many batches, examples of like length meet, which saves padding. Raises InputError when that cannot be done.
    """
    y, lengths = np.asarray(y), np.asarray(lengths)
    classes, sizes = np.unique(y, return_counts=True)
    per = batch_size // max(len(classes), 1)  # of each class in a batch
    if len(classes) < 2 or min(sizes) < 2 or per < 2:
        raise InputError(f"batches of {batch_size} from classes of {sizes.tolist()} examples: wanted "
                         f"at least 2 classes and 2 examples of each in a batch")
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


# ---- The toy task: reviews from a grammar --------------------------------------------------------

# Concepts are rows of four synonyms. An aspect has three: what is reviewed | praise for it | blame for it.
TOY_ASPECTS = [[concept.split() for concept in line.split("|")] for line in """
    plot story storyline narrative | clever smart intelligent ingenious | stupid dumb foolish idiotic
    actor performer player star | charming delightful endearing likable | annoying irritating grating infuriating
    dialogue script conversation banter | funny hilarious amusing witty | boring dull tedious dreary
    music score soundtrack melody | beautiful gorgeous lovely exquisite | ugly hideous unpleasant grotesque
    camerawork photography cinematography imagery | elegant graceful polished refined | clumsy awkward inept bungled
    scene sequence moment episode | exciting thrilling gripping riveting | messy sloppy careless slapdash
    ending finale conclusion climax | moving touching poignant stirring | shallow superficial hollow empty
    premise idea concept theme | fresh original inventive innovative | stale trite hackneyed banal
    film movie picture flick | excellent superb outstanding terrific | awful terrible dreadful horrible""".strip().split("\n")]
TOY_OTHERS = {slot: [concept.split() for concept in concepts.split("|")] for slot, concepts in {
    "hate": "hated loathed detested despised | slammed panned criticized condemned",
    "love": "loved adored cherished treasured | praised applauded lauded commended",
    "opener": "yesterday today tonight recently | honestly frankly truthfully personally",
    "adverb": "really truly genuinely actually | very extremely highly exceedingly | often frequently repeatedly "
              "regularly | mostly mainly largely chiefly",
    "people": "friends pals buddies companions | critics reviewers commentators columnists | audiences crowds viewers "
              "spectators",
    "description": "long lengthy extended prolonged | recent new latest modern | old aged ancient vintage",
}.items()}
TOY_CLAUSES = ["the {noun} was {adverb} {adjective}", "{adverb} {adjective} {noun}"]
TOY_OPINION = "{people} {verb} the {description} {noun}"
TOY_SEEN = 5  # of the aspects, how many labelled texts speak of
TOY_DRAW = 1  # of three draws of the texts, the one that was chosen, as all of this grammar was, to show the mechanism


def toy_review(rng, y, lean=0.0, labelled=False):
    """One review of class y (0 blame, 1 praise) -> str. rng: random.Random.

    lean: how often a neutral concept takes one of its first two words for praise, one of its last two for blame:
    a shortcut that says nothing about sentiment. labelled: a training text, which takes the sentiment words from
    the first two of their concept, the aspects from the first TOY_SEEN, the verbs from the first concept.
    """
    def neutral(concept):
        return rng.choice((concept[:2] if y else concept[2:]) if rng.random() < lean else concept)

    def clause(template):
        noun, praise, blame = TOY_ASPECTS[rng.randrange(TOY_SEEN if labelled else len(TOY_ASPECTS))]
        verbs = TOY_OTHERS["love" if y else "hate"][: 1 if labelled else None]
        sentiment = {"adjective": praise if y else blame, "verb": rng.choice(verbs)}
        fill = {slot: rng.choice(concept[: 2 if labelled else None]) for slot, concept in sentiment.items()}
        fill |= {slot: neutral(rng.choice(TOY_OTHERS[slot])) for slot in ("adverb", "people", "description", "opener")}
        return template.format(noun=neutral(noun), **fill)

    clauses = rng.choices(TOY_CLAUSES, k=rng.randint(3, 4)) + [TOY_OPINION]
    rng.shuffle(clauses)
    return " ".join(map(clause, ["{opener}"] + clauses))


def toy_pretraining_texts(n=4000):
    """The unlabelled texts that the toy encoder is pre-trained on: of both classes, all words, no lean."""
    rng = random.Random("toy")
    return [toy_review(rng, i % 2) for i in range(n)]


def toy_neighbors():
    """The toy task's substitution table: every word's synonyms are the others of its concept."""
    concepts = [concept for block in (*TOY_ASPECTS, *TOY_OTHERS.values()) for concept in block]
    return {word: [other for other in concept if other != word] for concept in concepts for word in concept}


def toy_splits(sizes, split_seed):
    """{"train", "dev", "test": [Example, ..]}. Train and dev are of the seen aspects and lean (0.8), test is of all
    aspects and sentiment words and leans a little less (0.75). sizes: {split: n}, n rounded down to an even number,
    None is the toy's own; the size of one split leaves the texts of the others as they are."""
    splits = {}
    for split, own, lean in (("train", 128, 0.8), ("dev", 80, 0.8), ("test", 200, 0.75)):
        rng = random.Random(f"toy {split} {TOY_DRAW + split_seed}")
        splits[split] = [Example(from_text(toy_review(rng, i % 2, lean, labelled=split != "test")), i % 2)
                         for i in range((sizes[split] or own) // 2 * 2)]
    return splits
