"""Tiny encoders with random weights, BERT and RoBERTa alike, and tiny tasks.

What holds for them holds for the big ones.
"""
import json

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel, RobertaTokenizer

import data
import train

torch.set_num_threads(1)        # for models this small, more threads only wait for each other
SIZE = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, initializer_range=0.5)       # weights large enough to matter
BERT = SIZE | dict(max_position_embeddings=20)
ROBERTA = SIZE | dict(max_position_embeddings=22, type_vocab_size=1, pad_token_id=1)


def tiny_encoder(kind, **changes):
    """A "bert" or "roberta" of 16 hidden units, 60 tokens and at most 20 positions."""
    torch.manual_seed(0)
    if kind == "bert":
        return BertModel(BertConfig(**BERT | changes))
    return RobertaModel(RobertaConfig(**ROBERTA | changes))


@pytest.fixture(params=["bert", "roberta"])
def encoder(request):
    """Each test that asks for it runs twice: for BERT and for RoBERTa. Dropout is off."""
    return tiny_encoder(request.param).eval()


WORDS = """good great fine nice bad awful poor dull movie film picture plot story actor the a was is
and very really it this quite""".split()
TABLE = {"good": ["great", "fine", "nice"], "great": ["good", "nice"], "bad": ["awful", "poor"],
         "dull": ["poor", "bad"], "movie": ["film", "picture"], "plot": ["story"],
         "very": ["really", "quite"]}


def byte_level_bpe(folder, text):
    """RoBERTa's kind of tokenizer, which knows the words of a text; its files are in the folder."""
    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train_from_iterator([text] * 20, vocab_size=400, min_frequency=2, show_progress=False,
                            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    bpe.save_model(str(folder))
    return RobertaTokenizer.from_pretrained(folder)


def save_model(folder, kind):
    """A tiny encoder with a tokenizer that knows WORDS, as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "bert":
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        tokenizer = train.bert_tokenizer(tokens)
    else:
        tokenizer = byte_level_bpe(folder, " ".join(WORDS))
    encoder = tiny_encoder(kind, vocab_size=len(tokenizer), max_position_embeddings=34)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["bert", "roberta"])
def model_folder(request, tmp_path_factory):
    """A pre-trained model's folder, BERT or RoBERTa."""
    return save_model(tmp_path_factory.mktemp("model") / request.param, request.param)


def review(rng, positive):
    """A random review of 9 of WORDS."""
    sentiment = ["good", "great", "fine", "nice"] if positive else ["bad", "awful", "poor", "dull"]
    words = [rng.choice(["the", "a", "this"]), rng.choice(["movie", "film", "plot", "actor"]),
             "was", rng.choice(["very", "really", "quite"])]
    return " ".join([*words, *rng.choice(sentiment, 2), *rng.choice(WORDS[8:], 3)])


def write_task(folder, labels=("neg", "pos"), n=16, pair=False, dev=True):
    """Own data as TSV files: n texts a class in train, n / 2 in test and dev."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in [("train", n), ("test", n // 2), ("dev", n // 2)][:3 if dev else 2]:
        rows = ["label\ttext\ttext2" if pair else "label\ttext"]
        for _ in range(size):
            for c, label in enumerate(labels):
                premise = ["this movie is it"] if pair else []
                rows.append("\t".join([label, *premise, review(rng, c % 2)]))
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    (folder / "neighbors.json").write_text(json.dumps(TABLE))
    return folder


@pytest.fixture
def plain_words(monkeypatch):
    """Texts are split at spaces, so that no test needs NLTK's data."""
    monkeypatch.setattr(data, "prepare_nltk", lambda *args, **kwargs: None)
    monkeypatch.setattr(data, "words_of", lambda text: text.lower().split())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("RIFT_CACHE", str(tmp_path / "cache"))
