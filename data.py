"""The data of RIFT (Dong et al., NeurIPS 2021): from public archives to tensors, in this order.

A text is a tuple of lower-case words. Joined by single spaces it is a string, already tokenized:
split it at spaces. A substitution table maps a word to a list of words. `Vocabulary` gives each
word one token and each position its candidate tokens (the adversary's hull). `balanced_batches`
draws every class equally often, because L_info compares examples of one class. Then come encoders,
the grammar that writes the texts of the toy task, and what both command lines use.

For a file or a setting of the user that cannot be used, every function raises InputError.
"""
import argparse
import functools
import gzip
import hashlib
import http.client
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import uuid
import warnings
import zipfile
import zlib
from collections import Counter, namedtuple
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub
import nltk
import numpy as np
import safetensors.torch
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer


class InputError(ValueError):
    """The user's input cannot be used: one line with file, line, value and what would be right."""


# ---- Reading and writing files -------------------------------------------------------------------

NOT_OURS = "damaged, or not the kind of file that it should be"
# what damaged archives raise
DAMAGE = (EOFError, IndexError, RuntimeError, ValueError, zlib.error, gzip.BadGzipFile,
          tarfile.TarError, zipfile.BadZipFile)


def first_line(error):
    """What a library's exception says, as part of one line of at most 300 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@contextmanager
def reading(path, *damage):
    """In a `with` block, a file that is missing, not UTF-8 or damaged raises InputError.

    damage: the exceptions by which the block notices that a file is damaged.
    """
    try:
        yield
    except InputError:
        raise
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise InputError(f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x})") from None
    except damage as error:
        raise InputError(f"{path}: {NOT_OURS} ({first_line(error)})") from None
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read "
                         f"({error.strerror or error})") from None


@contextmanager
def writing(path):
    """In a `with` block, a full disk, a read-only folder and the like raise InputError."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        problem = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be written ({problem})") from None


@contextmanager
def replacing(path):
    """Yields a temporary path; what was written there is renamed to `path` if all goes well.

    Otherwise it is removed. A folder that is at `path` already stays as it is.
    """
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield tmp
            try:
                os.replace(tmp, path)
            except OSError:
                if not (tmp.is_dir() and path.is_dir()):    # two folders: another process made one
                    raise
    finally:
        with suppress(OSError):     # it was never made, or its folder is read-only now
            remove(tmp)


def remove(path):
    """Deletes a file, or a folder with its content; it may be missing. Raises OSError."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_atomically(path, content):
    """Writes str (as UTF-8) or bytes, all of it or nothing: the old file stays if that fails."""
    with replacing(Path(path)) as tmp:
        tmp.write_bytes(content.encode() if isinstance(content, str) else content)


def json_object(text):
    """The dict that a JSON object stands for. Raises ValueError or RecursionError for others."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:80]} is not a JSON object")
    return value


def check_writable(folder):
    """Raises InputError unless a file can be written in a folder, which may be still to be made."""
    with writing(folder):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        (there / ".writable").write_bytes(b"")
        (there / ".writable").unlink(missing_ok=True)


def read_json(path):
    """The JSON object in a file, a dict. Raises InputError if the file holds anything else."""
    with reading(path, ValueError, RecursionError):
        return json_object(Path(path).read_bytes())


def write_json(path, value):
    """Writes a JSON-able value, atomically."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_lines(path):
    """The objects in a .jsonl file, a list of dicts; [] if there is no file.

    A last line without its line break is left out: the writer was killed in the middle of it.
    """
    with reading(path):
        text = Path(path).read_bytes().decode() if Path(path).exists() else ""
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        with reading(f"{path}, line {number}", ValueError, RecursionError):
            rows.append(json_object(line))
    return rows


def save_tensors(path, tensors, about=None):
    """Writes {name: tensor} and a JSON-able dict to one safetensors file, atomically."""
    # copies, because safetensors refuses names that share memory, as tied weights do
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous()
               for name, tensor in tensors.items()}
    write_atomically(path, safetensors.torch.save(tensors, {"about": json.dumps(about or {})}))


def load_tensors(path):
    """({name: tensor}, dict), as save_tensors wrote them."""
    with reading(path, safetensors.SafetensorError, TypeError, KeyError, ValueError):
        with safetensors.safe_open(path, "pt") as file:
            about = json_object(file.metadata()["about"])
            return {name: file.get_tensor(name) for name in file.keys()}, about


def fingerprint(value):
    """sha256 (hex) of bytes or of a JSON-able value. The order of a dict's keys does not count."""
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(value).hexdigest()


def seed_of(*numbers):
    """One 32-bit seed, an int, from several ints of at least 0 (zeros at the end do not count)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# ---- Archives: found, downloaded, unpacked -------------------------------------------------------

# {name: (names of the file and of what it unpacks to, address, sha256 of a download or None)}
RESOURCES = {
    "imdb": (["aclImdb_v1.tar.gz", "aclImdb"],
             "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
             "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"),
    "snli": (["snli_1.0.zip", "snli_1.0"],
             "https://nlp.stanford.edu/projects/snli/snli_1.0.zip", None),
    # the table of Jia et al. 2019, which the authors' repository has in its folder attack too
    "published": (["counterfitted_neighbors.json"],
                  "https://raw.githubusercontent.com/robinjia/certified-word-sub/master/data/"
                  "counterfitted_neighbors.json",
                  "103247143f39bd5dd66850f3a912393392641dbd98093c61e2b24a4cc8a96fb0"),
    "vectors": (["counter-fitted-vectors.txt.zip", "counter-fitted-vectors.txt"],
                "https://github.com/nmrksic/counter-fitting/raw/master/word_vectors/"
                "counter-fitted-vectors.txt.zip", None),
    "scores": (["jia2019_cert_lm_scores.zip", "lm_scores"],
               "https://nlp.stanford.edu/data/robinjia/jia2019_cert_lm_scores.zip", None),
}
# NLTK reads only folders of the user or of root, so each user of a cache has their own
USER = os.getuid() if hasattr(os, "getuid") else 0


def cache_dir():
    """The folder for downloads and what is computed once: $RIFT_CACHE, otherwise ~/.cache/rift."""
    try:
        return Path(os.environ.get("RIFT_CACHE") or "~/.cache/rift").expanduser().absolute()
    except RuntimeError:    # this user has no home folder
        raise InputError("~/.cache/rift: there is no home folder; set the environment variable "
                         "RIFT_CACHE to a folder for downloads") from None


def cached(name, compute):
    """The value of compute(), JSON-able, read from the file `name` of the cache if it is there."""
    with suppress(OSError, ValueError):     # not there yet, or damaged
        return json.loads((cache_dir() / name).read_bytes())
    value = compute()
    try:
        write_atomically(cache_dir() / name, json.dumps(value))
    except InputError as error:
        print(f"{error}; the next start computes it again", file=sys.stderr)
    return value


def find(data_dir, *names):
    """The files and folders of these names that exist, those in data_dir before the cache's."""
    first = Path(os.path.expanduser(data_dir or cache_dir())).absolute()
    with reading(first):
        if first != cache_dir() and not first.is_dir():
            raise InputError(f"{first}: no such folder (--data-dir names one; default "
                             f"{cache_dir()})")
        paths = [folder / name for folder in (first, cache_dir()) for name in names]
        return [path for path in paths if path.exists()]


def locate(name, data_dir):
    """The path of a resource, in data_dir, else in the cache, else downloaded into the cache.

    name: a key of RESOURCES. The archive comes first, because a folder beside it may be partly
    unpacked.
    """
    names, url, sha256 = RESOURCES[name]
    if not find(data_dir, *names):
        download(url, cache_dir() / names[0], sha256)
    return find(data_dir, *names)[0]


def download(url, path, sha256):
    """Fetches url to path, in at most two tries.

    sha256: hex, or None. Without one the file has to be a .zip: torch does not notice that a
    connection broke, but a .zip that was cut short lacks the table of contents at its end.
    The error says where to put a file that was downloaded by hand.
    """
    with replacing(path) as tmp:
        for _ in range(2):
            try:
                torch.hub.download_url_to_file(url, str(tmp), sha256, sys.stderr.isatty())
                if sha256 or zipfile.is_zipfile(tmp):
                    return
                problem = "what came is not a whole .zip"
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                problem = first_line(error)             # RuntimeError: it has another sha256
        raise InputError(f"{url}: {problem}; download it by hand and put it at {path}")


def unpack(path, private=False):
    """The folder in the cache with what a .tar.gz or .zip holds.

    private: only this user can read it; otherwise all whom the umask allows.
    """
    with reading(path, *DAMAGE):
        content = path.read_bytes()
        name = f"{path.name.partition('.')[0]}-{fingerprint(content)[:16]}"
        folder = cache_dir() / (f"{name}-{USER}" if private else name)
        for left in cache_dir().glob(f".{folder.name}.*.tmp"):
            if time.time() - left.stat().st_ctime > 3600:       # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        if folder.is_dir():
            return folder
        if path.suffix == ".gz":        # decompressed whole, because the checksum is at the end
            archive = tarfile.open(fileobj=io.BytesIO(gzip.decompress(content)))
            archive.extraction_filter = tarfile.data_filter         # nothing outside the folder
        else:
            archive = zipfile.ZipFile(io.BytesIO(content))
        with archive, replacing(folder) as tmp:
            tmp.mkdir(mode=0o700 if private else 0o777)
            archive.extractall(tmp)
            mode = tmp.stat().st_mode       # of the archive's own modes none is kept
            for inside in tmp.rglob("*"):
                inside.chmod(mode if inside.is_dir() else mode & 0o666)
    return folder


def prepare_nltk(data_dir=None, wordnet=False):
    """Makes NLTK's sentence tokenizer, and WordNet if asked for, available in this process.

    They come from data_dir, the cache or NLTK's own folders. If something is in none of them, they
    are downloaded.
    """
    own = cache_dir() / f"nltk_data-{USER}"
    # data_dir's is found first, so it is put in front last
    for path in (own, *reversed(find(data_dir, "nltk_data.tar.gz", "nltk_data"))):
        folder = path.resolve()
        if path.suffix == ".gz":
            folder = unpack(path, private=True) / "nltk_data"
        if str(folder) not in nltk.data.path:
            nltk.data.path.insert(0, str(folder))

    def there():
        with suppress(LookupError, OSError, ValueError):    # missing, or NLTK refuses to read it
            if wordnet:
                nltk.corpus.wordnet.ensure_loaded()
            return nltk.tokenize.punkt_model_available()

    names = ["punkt_tab", "wordnet"] if wordnet else ["punkt_tab"]
    if not there():
        with suppress(OSError, ValueError, SyntaxError):    # SyntaxError: a proxy's page, not XML
            own.mkdir(mode=0o700, parents=True, exist_ok=True)
            nltk.download(names, str(own), quiet=True, print_error_to=io.StringIO())
    if not there():
        raise InputError(f"NLTK data not found; install it with `python -m nltk.downloader "
                         f"{' '.join(names)}`, or put nltk_data.tar.gz into "
                         f"{data_dir or cache_dir()} (NLTK refuses folders that others can write)")


# ---- Words ---------------------------------------------------------------------------------------

# Pieces of contractions with an apostrophe, as word_tokenize splits them
CONTRACTIONS = {"n't", "'ll", "'re", "'ve", "'d", "'m", "'s"}     # she 'll
BEFORE_NOT = {"ca", "wo", "sha", "ai"}                             # ca n't
AFTER_APOSTROPHE = {"ll", "re", "ve", "d", "m", "s"}               # sometimes she ' ll


def clean(text):
    """A raw text made ready to be split.

    <br /> becomes a space, don’t (also with U+02BC, U+00B4 or a backtick) becomes don't, and half a
    surrogate pair, which cannot be printed, becomes "?".
    """
    text = text.replace("<br />", " ").encode("utf-8", "replace").decode()
    return re.sub(r"[’ʼ´`](?<=[^\W\d_].)(?=[^\W\d_])", "'", text)       # between two letters


def words_of(text):
    """The list of words of a raw text: nltk.word_tokenize, then lower case.

    No word is empty or has white space in it. Call prepare_nltk first (LookupError otherwise).
    """
    return [word.lower() for word in nltk.word_tokenize(clean(text))]


def tokenize(texts):
    """{raw text: tuple of its words}.

    Each text is split once (a premise of SNLI occurs in three pairs), and the result for all of
    them is kept in the cache: IMDB takes two minutes.
    """
    texts = list(dict.fromkeys(texts))

    def compute():
        return [" ".join(words_of(text)) for text in tqdm(texts, "words", delay=2, disable=None)]

    code = inspect.getsource(words_of)      # who changes it gets other words
    key = fingerprint([nltk.__version__, code, list(map(clean, texts))])
    lines = cached(f"words-{key[:32]}.json", compute)
    # a word is one object, however often it occurs
    return {text: tuple(map(sys.intern, line.split())) for text, line in zip(texts, lines)}


def to_text(words):
    """Example.words as the string that models and attacks see, or as a tuple of two for a pair."""
    texts = tuple(" ".join(text) for text in words)
    return texts[0] if len(texts) == 1 else texts


def from_text(text):
    """The Example.words of a string or of a tuple of two: the inverse of to_text."""
    return tuple(tuple(part.split()) for part in ([text] if isinstance(text, str) else text))


def substitutes(words, table):
    """The substitutes of each of a text's n words: a list of n lists, empty where there are none.

    table: {word: list of words}; a word is no substitute of its own. Pieces of contractions with an
    apostrophe have none: they are no words (`ca` is one only before `n't`, `ll` only after an
    apostrophe). Those of `wanna`, `gonna` and the like may have some.
    """
    out = []
    for before, word, after in zip(("", *words), words, (*words[1:], "")):
        piece = (word in CONTRACTIONS or (word in BEFORE_NOT and after == "n't")
                 or (word in AFTER_APOSTROPHE and before == "'"))
        out.append([] if piece else [other for other in table.get(word, ()) if other != word])
    return out


# ---- Tasks ---------------------------------------------------------------------------------------

# words: one or two texts, each a tuple of words; only the last may be changed. y: the class, an int
Example = namedtuple("Example", "words y")
# labels: the names of classes 0, 1 ..; train, dev, test: lists of Example; fingerprint: of it all
Task = namedtuple("Task", "name labels train dev test fingerprint")


def load_task(task, data_dir=None, *, train_size=None, dev_size=None, test_size=None, split_seed=0):
    """The Task "imdb", "snli" or "toy", or that of a folder of TSV files (see read_folder).

    A Path is always a folder, and so is a str that is not exactly one of the three, such as
    "./imdb". The sizes and split_seed are those of `choose`, for the toy of `toy_splits`.
    """
    sizes = {"train": train_size, "dev": dev_size, "test": test_size}
    if task == "toy":
        labels, splits = ["blame", "praise"], toy_splits(sizes, split_seed)
    else:
        readers = {"imdb": read_imdb, "snli": read_snli}
        path = locate(task, data_dir) if task in readers else Path(task)
        with reading(path):
            labels, splits = readers.get(task, read_folder)(path)
        splits = choose(splits, labels, sizes, split_seed, path)
        prepare_nltk(data_dir)
        words = tokenize(text for raw in splits.values() for texts, _ in raw for text in texts)
        for split, raw in splits.items():
            splits[split] = [Example(tuple(words[text] for text in texts), y) for texts, y in raw]
    content = [[split, x.y, to_text(x.words)] for split in splits for x in splits[split]]
    name = Path(os.path.abspath(task)).name             # a link keeps its own name
    return Task(name, labels, **splits, fingerprint=fingerprint([labels, content]))


def choose(splits, labels, sizes, split_seed, where):
    """{split: [(texts, y), ..]}: the examples to use of train, dev and test, in random order.

    sizes: {split: n}: n examples, equally many of each class (n is rounded down); None: all.
    Subsets and their order depend on split_seed and the sizes, so every method and seed sees the
    same texts, and the first n of a split are a random sample of it.
    """
    if split_seed < 0:
        raise InputError(f"split seed {split_seed}: has to be 0 or more")
    rngs = {split: np.random.default_rng([split_seed, i]) for i, split in enumerate(sizes)}
    pools, chosen = {}, {}      # pools: {split: for each class a list, in random order}
    for split, raw in splits.items():
        y = np.array([y for _, y in raw])
        shuffled = [rngs[split].permutation(np.flatnonzero(y == c)) for c in range(len(labels))]
        pools[split] = [[raw[i] for i in pool] for pool in shuffled]
    if "dev" not in pools:
        pools["train"], pools["dev"] = cut_dev(pools["train"], labels, sizes["dev"], where)
    for split, size in sizes.items():
        rest = " without dev's part" if split == "train" and "dev" not in splits else ""
        kept = balanced(pools[split], labels, size, f"{where}: {split}{rest}")
        fewest, label = min(zip(map(len, kept), labels))
        if split == "train" and fewest < 2:
            raise InputError(f"{where}: class {label!r} has {fewest} training examples (without "
                             "those of dev and copies of these), wanted 2")
        kept = list(itertools.chain(*kept))
        chosen[split] = [kept[i] for i in rngs[split].permutation(len(kept))]
    return chosen


def cut_dev(pools, labels, size, where):
    """(train, dev), cut from train; both are like `pools`, a list of examples for each class.

    size: texts of dev; None: a tenth of each class, at least 2 texts, at most 1,000 of all classes.
    Texts that are in dev leave train. Dev is taken from a pool's start, a subset of train later
    from its end, so that the subset hardly depends on dev's size.
    """
    def plain(texts):       # texts that differ only in case or space have the same words
        return " \t ".join(" ".join(clean(text).lower().split()) for text in texts)

    total = sum(map(len, pools))
    counts = [max(2, len(pool) * min(1000, total // 10) // total) for pool in pools]
    if size is not None:
        counts = [len(pool) for pool in balanced(pools, labels, size, f"{where}: dev")]
    cuts = list(zip(pools, counts))
    dev = [pool[:n] for pool, n in cuts]
    in_dev = {plain(texts) for pool in dev for texts, _ in pool}
    train = [[(texts, y) for texts, y in pool[n:] if plain(texts) not in in_dev]
             for pool, n in cuts]
    return train, dev


def balanced(pools, labels, size, where):
    """The last size // C examples of each of the C pools, one for a class; all if size is None."""
    if size is None:
        return pools
    n = size // len(pools)
    fewest, label = min(zip(map(len, pools), labels))
    if not 1 <= n <= fewest:
        raise InputError(f"{where}: {size} examples would be {n} of each class, wanted 1 to "
                         f"{fewest} (class {label!r} has no more)")
    return [pool[-n:] for pool in pools]


def text_of(path):
    """The text of a UTF-8 file."""
    with reading(path):
        return path.read_bytes().decode("utf-8-sig")


def read_imdb(path):
    """(labels, {"train", "test": [((text,), y), ..]}) of IMDB's archive or folder aclImdb."""
    root = path if path.is_dir() else unpack(path) / "aclImdb"
    labels, splits = ["neg", "pos"], {"train": [], "test": []}
    for split, examples in splits.items():
        for y, label in enumerate(labels):
            folder = root / split / label
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            # a Mac puts a file ._NAME.txt beside NAME.txt
            names = [name for name in names if name.endswith(".txt") and name[0] != "."]
            if not names:
                raise InputError(f"{path}: holds no aclImdb/{split}/{label}/*.txt, wanted "
                                 f"{RESOURCES['imdb'][1]}")
            examples += [((text_of(folder / name),), y) for name in names]
    counts = [len(examples) for examples in splits.values()]
    if counts != [25_000, 25_000]:
        print(f"{path}: holds {counts[0]:,} reviews for training and {counts[1]:,} for test, IMDB "
              "has 25,000 of both: was it unpacked only partly?", file=sys.stderr)
    return labels, splits


def read_snli(path):
    """(labels, {"train", "dev", "test": [((premise, hypothesis), y), ..]}) of SNLI.

    path: snli_1.0.zip or the folder snli_1.0. Pairs with the gold label "-" are dropped. The order
    of the labels is the authors' code's; other models mostly have neutral 1, contradiction 2.
    """
    root = path if path.is_dir() else unpack(path) / "snli_1.0"
    labels = ["entailment", "contradiction", "neutral"]
    splits = {"train": [], "dev": [], "test": []}
    for split, pairs in splits.items():
        where = root / f"snli_1.0_{split}.jsonl"
        lines = text_of(where).rstrip().split("\n") if where.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                label, texts = row["gold_label"], (row["sentence1"], row["sentence2"])
                if label not in (*labels, "-") or not all(isinstance(text, str) for text in texts):
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(f"{where}, line {number}: {line[:120]!r}, wanted JSON with the "
                                 "strings sentence1, sentence2 and gold_label "
                                 f"({', '.join(labels)} or -)") from None
            if label != "-":
                pairs.append((texts, labels.index(label)))
        if not pairs:
            raise InputError(f"{path}: holds no snli_1.0_{split}.jsonl, wanted "
                             f"{RESOURCES['snli'][1]}")
    return labels, splits


def read_folder(path):
    """(labels, {split: [(texts, y), ..]}) of train.tsv, test.tsv and perhaps dev.tsv.

    Their header is `label TAB text` or `label TAB text TAB text2`. Labels are any strings, but no
    two of them may differ only in case, in the space around them or in a ".0" at the end; the
    classes are in their sorted order. A text may be empty; it holds no tabs and no line breaks, and
    there is no quoting.
    """
    if not path.is_dir():
        raise InputError(f"{path.absolute()}: no such folder; wanted one with train.tsv and "
                         "test.tsv, or the name of a public task, imdb, snli or toy")
    headers, labels, splits = ["label\ttext", "label\ttext\ttext2"], None, {}
    spelling = {}   # label, in lower case and without ".0" -> as it was written first
    for split in ("train", "dev", "test") if (path / "dev.tsv").exists() else ("train", "test"):
        where = path / f"{split}.tsv"
        if not where.exists():
            raise InputError(f"{where}: no such file; wanted train.tsv and test.tsv in that folder")
        header, *lines = text_of(where).replace("\r\n", "\n").removesuffix("\n").split("\n")
        if header not in headers or not lines:
            wanted = " or ".join(map(repr, headers))
            raise InputError(f"{where}, line 1: {header[:80]!r}, wanted the header {wanted}, then "
                             "examples")
        headers = [header]      # test.tsv and dev.tsv have the columns of train.tsv
        rows = [line.split("\t") for line in lines]
        labels = labels or sorted({row[0].strip() for row in rows})
        for number, row in enumerate(rows, 2):
            at, label = f"{where}, line {number}", row[0].strip()
            if len(row) != header.count("\t") + 1 or not label:
                problem = f"{len(row)} columns" if label else "no label"
                raise InputError(f"{at}: {str(row)[:80]} has {problem}, wanted {header!r}")
            for field in row:
                if field[:1] == field[-1:] == '"' and '""' in field[1:-1]:
                    raise InputError(f"{at}: {field[:80]!r} is quoted, wanted the text as it is; "
                                     "write the file with quoting=csv.QUOTE_NONE")
            first = spelling.setdefault(label.lower().removesuffix(".0"), row[0])
            if row[0] != first:
                raise InputError(f"{at}: label {row[0]!r} is {first!r} further up: wanted one "
                                 "spelling for one class")
            if label not in labels:
                raise InputError(f"{at}: label {row[0]!r} does not occur in train.tsv, which has "
                                 + ", ".join(labels)[:80])
        if len(labels) < 2:
            raise InputError(f"{where}: only one class, {labels[0]!r}; wanted at least 2")
        splits[split] = [(tuple(texts), labels.index(label.strip())) for label, *texts in rows]
    return labels, splits


# ---- Substitution tables: lower-case word -> list of lower-case words ----------------------------

# Function words, which get no WordNet synonyms: pronouns, auxiliaries, determiners, prepositions,
# conjunctions.
CLOSED_CLASS = set("""
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his
    himself she her hers herself it its itself they them their theirs themselves one oneself who
    whom whose which what this that these those there here someone something anyone anything
    everyone everything nobody nothing none am is are was were be been being have has had having do
    does did doing done will would shall should can could may might must ought not a an the some any
    no every each either neither both all many much few several another other such about above
    across after against along amid among around as at before behind below beneath beside besides
    between beyond by despite down during except for from in inside into like near of off on onto
    out outside over past per since than through throughout till to toward towards under until unto
    up upon via with within without and but or nor so yet if because although though while whereas
    unless whether when where why how""".split())


def find_neighbors(source, data_dir):
    """The Path of a substitution table, or "wordnet"; what is not there is fetched.

    source: as for load_neighbors. A file is looked for in data_dir first, then as it is named; one
    whose name starts with "./" or "../" only as it is named.
    """
    if source == "wordnet":
        prepare_nltk(data_dir, wordnet=True)
        return source
    if source in ("published", "vectors"):
        return locate(source, data_dir)
    path = Path(os.path.expanduser(source))
    if path.suffix not in (".json", ".txt", ".zip"):
        raise InputError(f"{path}: wanted published, vectors, wordnet, a neighbour table .json, or "
                         "a vector file .txt or .zip")
    if data_dir and not str(source).startswith(("./", "../")):
        inside = Path(os.path.expanduser(data_dir)).absolute() / path
        path = inside if inside in find(data_dir, path) else path   # not the cache's of this name
    if not path.exists():
        also = f" or in {data_dir}" if data_dir else ""
        raise InputError(f"neighbour table {source}: no such file here{also}")
    with reading(path):
        path.open("rb").close()
    return path


def load_neighbors(source="published", data_dir=None, words=None):
    """A substitution table, a dict.

    source: "published", the table of Jia et al. 2019; "vectors", computed from the public
    counter-fitted vectors; "wordnet"; or a file: a neighbour table .json, or vectors .txt or .zip.
    The public ones are fetched if need be. words: for vectors a Counter of the task's training
    words, for WordNet all words that are to be looked up.
    """
    path = find_neighbors(source, data_dir)
    if path != "wordnet" and path.suffix == ".json":
        return read_neighbors(path)
    if words is None:
        raise ValueError(f"load_neighbors({source!r}) needs `words`, those of the texts")
    return wordnet_neighbors(words) if path == "wordnet" else vector_neighbors(path, words)


def read_neighbors(path):
    """The dict in a JSON file {word: [word, ..], ..}, without keys that are not one lower-case
    word."""
    items = read_json(path).items()
    for word, others in items:
        words = others if isinstance(others, list) else [others]
        joined = " ".join(map(str, words)).encode("utf-8", "replace").decode()
        if joined.lower().split() != others:
            raise InputError(f"{path}: {word!r} maps to {str(others)[:200]}, wanted a list of "
                             "single lower-case words")
    # the published table also has keys that are not one word of a text: they would never match
    table = {word: others for word, others in items if clean(word).lower().split() == [word]}
    if len(table) < len(items):
        print(f"{path}: {len(items) - len(table):,} of {len(items):,} keys are not one lower-case "
              "word and are not used", file=sys.stderr)
    return table


def wordnet_neighbors(words):
    """{word: its synonyms} from WordNet, for those of the words that have any.

    Synonyms are the single-word lemmas of the word's synsets, in synset order, without the word
    itself. Words of closed classes have none (WordNet's "he" is helium). Only synsets of the word's
    most frequent part of speech count, by WordNet's own counts. The original PWWS (Ren et al. 2019)
    tags each word in its sentence instead, and also swaps named entities.
    """
    wordnet = nltk.corpus.wordnet
    words = sorted(set(words) - CLOSED_CLASS)

    def compute():
        table = {}
        for word in tqdm(words, "synonyms", delay=2, disable=None):
            def count(pos):
                form = wordnet.morphy(word, pos)    # of "films" it is "film"
                # -1: the word is not of this part of speech
                return sum(x.count() for x in wordnet.lemmas(form, pos)) if form else -1

            # noun, verb, adjective or adverb
            synsets = wordnet.synsets(word, max("nvar", key=count))
            lemmas = dict.fromkeys(name.lower() for x in synsets for name in x.lemma_names())
            synonyms = [lemma for lemma in lemmas if "_" not in lemma and lemma != word]
            if synonyms:
                table[word] = synonyms
        return table

    code = inspect.getsource(wordnet_neighbors)
    key = fingerprint([wordnet.get_version(), code, sorted(CLOSED_CLASS), words])
    return cached(f"wordnet-{key[:32]}.json", compute)


def vector_neighbors(path, counts, k=8, max_sq_dist=0.5, vocabulary=50_000, skip=27):
    """{word: nearest neighbours} from word vectors (Alzantot et al. 2018, Mrksic et al. 2016).

    path: see read_vectors; counts: Counter of the task's training words. A word's substitutes are
    its at most k nearest words with ||a - b||^2 < max_sq_dist, nearest first. Both are among the
    `vocabulary` most frequent training words (ties by the alphabet) and have a vector; the `skip`
    most frequent of these, function words, get none. 65,713 x 300 numbers take a minute or two and
    1 GiB; the result is kept in the cache.
    """
    path = Path(path)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[:vocabulary]

    def compute():
        vectors = read_vectors(path, set(ranked))
        words = [word for word in ranked if word in vectors]
        if not words:
            raise InputError(f"{path}: none of the {len(ranked)} training words has a vector in it")
        X = torch.from_numpy(np.stack([vectors[word] for word in words]))       # (n, dim) float64
        table = {}
        for start in tqdm(range(skip, len(words), 1000), "nearest neighbours", disable=None):
            distances = torch.cdist(X[start:start + 1000], X).square_()         # (1000, n)
            for i, row in enumerate(distances, start):
                row[i] = math.inf       # not the word itself
                near = (row < max_sq_dist).nonzero()[:, 0]
                # rounded, so that of equals the most frequent word comes first on every machine
                nearest = near[row[near].round(decimals=9).argsort(stable=True)[:k]]
                if len(nearest):
                    table[words[i]] = [words[j] for j in nearest.tolist()]
        return table

    with reading(path):
        code = inspect.getsource(vector_neighbors)
        key = fingerprint([fingerprint(path.read_bytes()), code, k, max_sq_dist, skip, ranked])
    return cached(f"neighbors-{key[:32]}.json", compute)


def read_vectors(path, wanted):
    """{word: (dim,) float64 array} of the wanted words.

    path: a .txt with lines `word number number ..`, or a .zip with one such file. Lines of other
    words are checked too. A first line of two whole numbers, as word2vec's files have, is skipped.
    """
    files = list(unpack(path).rglob("[!.]*.txt")) if path.suffix == ".zip" else [path]
    if len(files) != 1:
        raise InputError(f"{path}: wanted one .txt file in it, there are {len(files)}")
    vectors, dim = {}, None
    for number, line in enumerate(text_of(files[0]).removesuffix("\n").split("\n"), 1):
        word, *fields = line.rstrip().split(" ")
        if number == 1 and len(fields) == 1 and word.isdecimal() and fields[0].isdecimal():
            continue                                    # how many words, how many numbers each
        try:
            row = list(map(float, fields))
        except ValueError:
            row = []
        dim = dim or len(row)
        if not row or len(row) != dim or not math.isfinite(sum(row)):
            raise InputError(f"{files[0]}, line {number}: {line[:60]!r}, wanted a word and "
                             f"{dim or 'some'} numbers")
        if word in wanted:
            vectors.setdefault(word, np.array(row))
    return vectors


# ---- Words to tokens -----------------------------------------------------------------------------


class Vocabulary:
    """One token for each word, by a BERT or RoBERTa tokenizer, and the candidates of each position.

    tokenizer: a Hugging Face tokenizer; max_len: longest input in tokens, special tokens included;
    neighbors: a substitution table; unknown: what a word outside the vocabulary becomes, "piece"
    (the first piece that the tokenizer gives for it) or "unk"; max_candidates: of a position, the
    word itself included. No word becomes a special token but [UNK], even one written "[SEP]".
    """

    def __init__(self, tokenizer, max_len, neighbors=None, unknown="piece", max_candidates=10):
        self.tokenizer, self.max_len, self.unknown = tokenizer, max_len, unknown
        self.neighbors, self.max_candidates = neighbors or {}, max_candidates
        specials = [getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad", "unk")]
        if None in specials:
            raise InputError(f"tokenizer {tokenizer.name_or_path!r} lacks one of the tokens cls, "
                             "sep, pad and unk")
        self.cls, self.sep, self.pad, self.unk = specials
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = (added | set(tokenizer.all_special_ids)) - {self.unk}
        self.ids = tokenizer.get_vocab()
        # byte-level BPE writes the space before a word as "Ġ", other bytes than ASCII as letters
        self.byte_level = any(piece.startswith("Ġ") for piece in tokenizer.tokenize(" a")[:1])
        # what token() and candidates() found before: a task has few different words
        self.token_of, self.candidates_of = {}, {}

    def token(self, word):
        """The id of the word, else of its first piece, or [UNK]; never another special token.

        The word is lower-cased, because PWWS's blank word is NULL.
        """
        if word not in self.token_of:
            self.token_of[word] = self.first_piece(word.lower())
        return self.token_of[word]

    def first_piece(self, word):
        """token() of a lower-case word, looked up in the vocabulary or asked of the tokenizer."""
        # (a byte-level vocabulary writes other characters than ASCII in its own way)
        if word.isascii() or not self.byte_level:
            token = self.ids.get("Ġ" + word if self.byte_level else word)
            if token is not None and token not in self.special:
                return token
        text = " " + word[:1000].encode("utf-8", "replace").decode()    # enough for the first piece
        pieces = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True,
                                       verbose=False)
        whole = self.byte_level and len(pieces) == 1    # the vocabulary has this word after all
        if not pieces or pieces[0] in self.special or (self.unknown == "unk" and not whole):
            return self.unk
        return pieces[0]

    def candidates(self, word):
        """{token id: word}: the word, then its substitutes in the table's order.

        At most max_candidates in all. Of words that share a token only the first is a candidate.
        """
        if word not in self.candidates_of:
            first = {}
            for other in (word, *self.neighbors.get(word, ())):
                first.setdefault(self.token(other), other)
            self.candidates_of[word] = dict(list(first.items())[:self.max_candidates])
        return self.candidates_of[word]

    def visible(self, words):
        """The first words of an example that fit into max_len; a pair's premise comes first."""
        room = self.max_len - 1 - len(words)    # for [CLS] and, behind each text, a [SEP]
        kept = []
        for text in words:
            kept.append(tuple(text[:room]))
            room -= len(kept[-1])
        return tuple(kept)

    def input_ids(self, words):
        """The list of token ids: [CLS] words [SEP], or [CLS] premise [SEP] hypothesis [SEP]."""
        ids = [self.cls]
        for text in self.visible(words):
            ids += [*map(self.token, text), self.sep]
        return ids

    def substitute(self, words, choice):
        """The words of an example, with candidate choice[l] at every position l of encode()'s row.

        choice: (L,) ints.
        """
        *premise, last = self.visible(words)
        first = 1 + sum(len(text) + 1 for text in premise)  # after [CLS], the premise and its [SEP]
        choice = choice[first:first + len(last)]
        chosen = [list(self.candidates(word).values())[k] for word, k in zip(last, choice)]
        return (*premise, tuple(chosen))

    def encode(self, batch, hull=False, device="cpu"):
        """The words of B examples as tensors on a device, padded to the longest of them (L).

        input_ids, attention_mask (B, L) int64. With hull also subs (B, L, K) int64, the candidates'
        tokens, and subs_mask (B, L, K) bool, True where there is a candidate. K: the most
        candidates of any position in this batch. Candidate 0 is the position's own token; special
        tokens, padding, premises and words without substitutes have only that.
        """
        rows = [self.input_ids(words) for words in batch]
        lengths = np.array([[len(row)] for row in rows])
        B, L = len(rows), lengths.max()
        ids = np.array([row + [self.pad] * (L - len(row)) for row in rows])     # (B, L)
        out = {"input_ids": ids, "attention_mask": (np.arange(L) < lengths).astype(np.int64)}
        if hull:
            tokens = {}     # (b, l): the candidates' tokens, where the word may change
            for b, words in enumerate(batch):
                last = self.visible(words)[-1]
                start = len(rows[b]) - 1 - len(last)    # the last [SEP] is behind it
                others = substitutes(last, self.neighbors)
                tokens |= {(b, start + i): list(self.candidates(word))
                           for i, word in enumerate(last) if others[i]}
            K = max(map(len, tokens.values()), default=1)
            subs, subs_mask = np.full((B, L, K), self.pad), np.zeros((B, L, K), bool)
            subs[..., 0], subs_mask[..., 0] = ids, True
            for (b, l), row in tokens.items():
                subs[b, l, :len(row)] = row
                subs_mask[b, l, :len(row)] = True
            out |= {"subs": subs, "subs_mask": subs_mask}
        return {name: torch.from_numpy(array).to(device) for name, array in out.items()}


def unknown_share(vocabulary, examples):
    """The share of the visible words that become [UNK] or, although longer, a single character."""
    words = Counter(word for x in examples for text in vocabulary.visible(x.words) for word in text)

    def lost(word):
        token = vocabulary.token(word)
        # a piece that is only a part of a character is shown as one, "\ufffd"
        piece = vocabulary.tokenizer.decode([token]).strip()
        return token == vocabulary.unk or len(piece) <= 1 < len(word)

    return sum(n for word, n in words.items() if lost(word)) / max(words.total(), 1)


# ---- Batches -------------------------------------------------------------------------------------


def balanced_batches(y, lengths, batch_size, rng, window=50):
    """One epoch of class-balanced batches: a list of int arrays of example numbers.

    y, lengths: class and length of each example; batch_size: rounded down to a multiple of the
    number of classes; rng: numpy Generator. No example comes twice. The epoch ends when the
    smallest class is used up (its rest makes a smaller batch, if it has 2 of each); which examples
    of a larger class are left over changes each epoch. Within every `window` batches, examples of
    similar length share a batch, which saves padding. A batch is sorted by class, each in random
    order.
    """
    y, lengths = np.asarray(y), np.asarray(lengths)
    classes, sizes = np.unique(y, return_counts=True)
    per = batch_size // len(classes)            # of each class in a batch
    if len(classes) < 2 or min(sizes) < 2 or per < 2:
        raise InputError(f"batches of {batch_size} from classes of {sizes.tolist()} examples: "
                         "wanted at least 2 classes and 2 examples of each in a batch")
    full, rest = divmod(int(sizes.min()), per)
    columns = []    # for each class a list: its part of every batch
    for c in classes:
        shuffled = rng.permutation(np.flatnonzero(y == c))
        parts = []
        for start in range(0, full, window):
            part = shuffled[start * per:min(start + window, full) * per]
            parts += list(part[np.argsort(lengths[part], kind="stable")].reshape(-1, per))
        if rest >= 2:
            parts.append(shuffled[full * per:full * per + rest])
        columns.append(parts)
    batches = list(zip(*columns))
    order = rng.permutation(len(batches))
    # each part, sorted by length till now, is shuffled: train.share() may leave out its last texts
    return [np.concatenate([rng.permutation(part) for part in batches[i]]) for i in order]


# ---- Encoders ------------------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name=None):
    """The device of this name; without a name a GPU, or the CPU where there is none."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {name}: not on this machine ({first_line(error)[:80]}); "
                         "cpu always works") from None


def pick_precision(name, device):
    """"fp32" or "bf16"; "auto" is bf16 on GPUs that have it, fp32 elsewhere."""
    if name != "auto":
        return name
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_it else "fp32"


def warn_of_slow_bf16(precisions, device):
    """Prints a line if bf16 is among a command's precisions on a CPU that is known to be slow at it
    because it has no instructions for it."""
    known = [there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name]
    if "bf16" in precisions and device.type == "cpu" and known and not any(known):
        print("--precision bf16: this processor has no bf16 arithmetic, fp32 is several times "
              "faster", file=sys.stderr)


def model_folder(name):
    """The folder of a model: the one named, else the hub's in the local cache, else downloaded.

    A cached model is used as it is, without asking the hub. Raises InputError where there is none.
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    if str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise InputError(f"model {name}: no such folder")
    # the files at the top of the repository, not those of other formats
    files = dict(allow_patterns=["*.json", "*.txt", "*.safetensors"], ignore_patterns=["*/*"])
    for local in (True, False):     # the cache first
        try:
            folder = Path(huggingface_hub.snapshot_download(name, local_files_only=local, **files))
            tokenizer = [*folder.glob("*vocab*"), *folder.glob("tokenizer.json")]
            if not local or (tokenizer and list(folder.glob("*.safetensors"))):
                return folder
        except Exception as error:      # not cached; or the network, which fails in many ways
            problem = first_line(error)
    raise InputError(f"model {name}: neither a folder nor a model on the hub ({problem})")


def load_encoder(name_or_dir, max_len=0, complete=False):
    """(encoder, tokenizer): a BERT or RoBERTa in float32, from safetensors, without remote code.

    name_or_dir: a name on the hub or a folder; max_len: the most tokens that it has to read;
    complete: a missing pooler is an error; otherwise it starts at random, because RoBERTa's was
    never pre-trained. Raises InputError where files are missing, damaged, of another kind of model,
    or of two models, and where the model has fewer positions than max_len.
    """
    folder, where = model_folder(name_or_dir), f"model {name_or_dir}"
    if not (folder / "config.json").exists():
        raise InputError(f"{where}: has no config.json, wanted the folder of a BERT or RoBERTa")
    if (folder / "encoder" / "config.json").exists():
        raise InputError(f"{where}: is a run, whose model is {folder / 'encoder'}")
    config = read_json(folder / "config.json")
    wanted = {"model_type": ("bert", "roberta"), "position_embedding_type": ("absolute", None),
              "is_decoder": (False, None), "add_cross_attention": (False, None)}
    for name, values in wanted.items():
        if config.get(name) not in values:
            raise InputError(f"{where}: config.json has {name} {config.get(name)!r}, wanted "
                             + " or ".join(str(value) for value in values if value is not None))
    weights = list(folder.glob("*.safetensors"))
    if not weights and list(folder.glob("pytorch_model*.bin")):
        raise InputError(f"{where}: has only pytorch_model.bin, which can run code when read; "
                         "convert it with AutoModel.from_pretrained(OLD).save_pretrained(NEW)")
    for path in weights:
        if path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git"):
            raise InputError(f"{path}: is a Git LFS pointer, not the weights: run `git lfs pull`")
    load = dict(trust_remote_code=False, local_files_only=True)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()       # a bar for less than a second
    try:
        encoder, info = AutoModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **load)
    except Exception as error:      # the library raises many kinds for a damaged folder
        raise InputError(f"{where}: cannot be loaded ({first_line(error)})") from None
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **load)
    except Exception as error:
        raise InputError(f"{where}: the files of its tokenizer are missing or damaged "
                         f"({first_line(error)})") from None
    lost = [key for key in info["missing_keys"] if complete or not key.startswith("pooler.")]
    lost += [key for key, *_ in info["mismatched_keys"]]
    if lost:
        raise InputError(f"{where}: {len(lost)} tensors are missing or of the wrong shape, such as "
                         f"{min(lost)}")
    # the heads of pre-training may be there as well, the rest of another architecture may not
    keys = [key.removeprefix(f"{config['model_type']}.") for key in info["unexpected_keys"]]
    extra = [key for key in keys if key.startswith(("embeddings.", "encoder.", "pooler."))]
    if extra:
        raise InputError(f"{where}: has {len(extra)} tensors that its config.json does not speak "
                         f"of, such as {min(extra)}")
    pieces = tokenizer(["the", "a", "film"], add_special_tokens=False)["input_ids"]
    if {piece for word in pieces for piece in word} <= {tokenizer.unk_token_id}:
        raise InputError(f"{where}: its tokenizer knows none of the words 'the', 'a' and 'film'; "
                         "wanted the model's tokenizer.json or vocabulary beside its weights")
    made = encoder.config
    if len(tokenizer) > made.vocab_size or tokenizer.pad_token_id != made.pad_token_id:
        raise InputError(
            f"{where}: the tokenizer is another model's: {len(tokenizer)} tokens and padding "
            f"{tokenizer.pad_token_id}, the encoder has {made.vocab_size} and "
            f"{made.pad_token_id}")
    longest = made.max_position_embeddings - getattr(encoder.embeddings, "padding_idx", -1) - 1
    if max_len > longest:
        raise InputError(f"{where}: has positions for {longest} tokens, --max-len is {max_len}")
    return encoder, tokenizer


# ---- The toy task: reviews from a grammar --------------------------------------------------------

TOY_SIZES = {"train": 128, "dev": 80, "test": 200}
# Aspects: what is reviewed | praise for it | blame for it, each a concept of four synonyms
TOY_ASPECTS = [[concept.split() for concept in aspect.split("|")] for aspect in """
    plot story storyline narrative |
        clever smart intelligent ingenious | stupid dumb foolish idiotic
    actor performer player star |
        charming delightful endearing likable | annoying irritating grating infuriating
    dialogue script conversation banter |
        funny hilarious amusing witty | boring dull tedious dreary
    music score soundtrack melody |
        beautiful gorgeous lovely exquisite | ugly hideous unpleasant grotesque
    camerawork photography cinematography imagery |
        elegant graceful polished refined | clumsy awkward inept bungled
    scene sequence moment episode |
        exciting thrilling gripping riveting | messy sloppy careless slapdash
    ending finale conclusion climax |
        moving touching poignant stirring | shallow superficial hollow empty
    premise idea concept theme |
        fresh original inventive innovative | stale trite hackneyed banal
    film movie picture flick |
        excellent superb outstanding terrific | awful terrible dreadful horrible
    """.replace("|\n", "|").strip().split("\n")]
TOY_OTHERS = {slot: [concept.split() for concept in concepts.split("|")] for slot, concepts in {
    "hate": "hated loathed detested despised | slammed panned criticized condemned",
    "love": "loved adored cherished treasured | praised applauded lauded commended",
    "opener": "yesterday today tonight recently | honestly frankly truthfully personally",
    "adverb": "really truly genuinely actually | very extremely highly exceedingly | "
              "often frequently repeatedly regularly | mostly mainly largely chiefly",
    "people": "friends pals buddies companions | critics reviewers commentators columnists | "
              "audiences crowds viewers spectators",
    "description": "long lengthy extended prolonged | recent new latest modern | "
                   "old aged ancient vintage",
}.items()}
TOY_CLAUSES = ["the {noun} was {adverb} {adjective}", "{adverb} {adjective} {noun}"]
TOY_OPINION = "{people} {verb} the {description} {noun}"
TOY_SEEN = 5    # the texts of train and dev speak of the first five aspects only
TOY_DRAW = 1    # one of three draws of the texts, chosen, like the grammar, to show the mechanism


def toy_review(rng, y, lean=0.0, narrow=False):
    """One review of class y (0 blame, 1 praise), a str. rng: random.Random.

    lean: how often a neutral concept has to take one of its first two words for praise, one of its
    last two for blame (otherwise any of the four): a shortcut that says nothing about sentiment.
    narrow: a text of train or dev, which takes the sentiment words from the first two of their
    concept, the aspects from the first TOY_SEEN, the verbs from the first concept.
    """
    def neutral(concept):
        return rng.choice((concept[:2] if y else concept[2:]) if rng.random() < lean else concept)

    def clause(template):
        noun, praise, blame = TOY_ASPECTS[rng.randrange(TOY_SEEN if narrow else len(TOY_ASPECTS))]
        verbs = rng.choice(TOY_OTHERS["love" if y else "hate"][:1 if narrow else None])
        known = 2 if narrow else 4    # of the four words of a concept
        fill = {"adjective": rng.choice((praise if y else blame)[:known]),
                "verb": rng.choice(verbs[:known])}
        for slot in ("adverb", "people", "description", "opener"):
            fill[slot] = neutral(rng.choice(TOY_OTHERS[slot]))
        return template.format(noun=neutral(noun), **fill)

    clauses = rng.choices(TOY_CLAUSES, k=rng.randint(3, 4)) + [TOY_OPINION]
    rng.shuffle(clauses)
    return " ".join(map(clause, ["{opener}"] + clauses))


def toy_pretraining_texts(n=4000):
    """The unlabelled texts that the toy encoder is pre-trained on: both classes, all words."""
    rng = random.Random("toy")
    return [toy_review(rng, i % 2) for i in range(n)]


def toy_neighbors():
    """The toy task's substitution table: every word's synonyms are the others of its concept."""
    concepts = [concept for block in (*TOY_ASPECTS, *TOY_OTHERS.values()) for concept in block]
    return {word: [other for other in concept if other != word]
            for concept in concepts for word in concept}


def toy_splits(sizes, split_seed):
    """{"train", "dev", "test": [Example, ..]}.

    Train and dev are narrow and lean (0.8, see toy_review); test has all aspects and
    sentiment words and leans a little less (0.75). sizes: {split: n}, n rounded down to an even
    number; None is TOY_SIZES's.
    """
    splits = {}
    for split, lean in (("train", 0.8), ("dev", 0.8), ("test", 0.75)):
        rng = random.Random(f"toy {split} {TOY_DRAW + split_seed}")
        n = (TOY_SIZES[split] if sizes[split] is None else sizes[split]) // 2 * 2
        least = 4 if split == "train" else 2            # one or two of each class
        if n < least:
            raise InputError(f"toy: {split}: {sizes[split]} texts, wanted at least {least}")
        texts = [toy_review(rng, i % 2, lean, narrow=split != "test") for i in range(n)]
        splits[split] = [Example(from_text(text), i % 2) for i, text in enumerate(texts)]
    return splits


# ---- Command lines -------------------------------------------------------------------------------


def number(kind, low, high=math.inf, above=False):
    """A type for argparse: a finite int or float from low to high; with `above`, not low itself."""
    def parse(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):             # OverflowError: an int above 1e308
            value, finite = math.nan, False
        not_too_low = value > low if above else value >= low
        if not (not_too_low and value <= high and finite):
            raise argparse.ArgumentTypeError(
                f"{text!r} has to be {'an integer' if kind is int else 'a number'} "
                f"{'above' if above else 'of at least'} {low:g}"
                + (f" and at most {high}" if high < math.inf else ""))
        return value
    return parse


def open_task(s, data_dir=None):
    """The Task of a run's settings, from data_dir or where the run found it."""
    return load_task(s.task, data_dir or s.data_dir, train_size=s.train_size,
                     dev_size=s.dev_size, test_size=s.test_size, split_seed=s.split_seed)


def open_table(s, task, source=None, data_dir=None):
    """The substitution table of a run's settings, or of another source, for a task's words."""
    source = source or s.neighbors
    if s.task == "toy" and not source:
        return toy_neighbors()
    # WordNet is asked for every word; vectors are compared for frequent words of the training texts
    examples = [*task.train, *task.dev, *task.test] if source == "wordnet" else task.train
    words = Counter(word for x in examples for text in x.words for word in text)
    return load_neighbors(source, data_dir or s.data_dir, words)


def command(main):
    """Decorates main(argv): bad input becomes one line and exit code 2, Ctrl-C one line and 130."""
    script = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def wrapped(argv=None):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")    # print what the terminal can show
        if threading.current_thread() is threading.main_thread():       # others may not do this
            signal.signal(signal.SIGINT, signal.default_int_handler)
        argv = sys.argv[1:] if argv is None else argv
        try:
            for text in (*argv, os.getcwd()):
                # a byte that is not UTF-8 came as half a surrogate pair: no file could be written
                if any("\ud800" <= character <= "\udfff" for character in text):
                    raise InputError(f"{text!r}: not valid UTF-8, wanted arguments and a working "
                                     "directory in UTF-8 (PYTHONUTF8=1 helps in a C locale)")
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *where: print(
                    f"{script}: warning: {message}", file=sys.stderr)
                return main(argv)
        except (InputError, OSError, torch.OutOfMemoryError) as error:
            print(f"{script}: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt as stop:
            print("; ".join([f"\n{script}: stopped", *map(str, stop.args)]), file=sys.stderr)
            raise SystemExit(130) from None
    return wrapped
