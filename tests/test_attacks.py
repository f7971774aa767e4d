"""What the attacks promise, on random small texts and victims (every case from a fixed seed):

- an attack changes only words that have synonyms, only into a synonym of the original word, never a premise;
- success means that the victim's own prediction on the returned text is wrong;
- PWWS and the genetic attack follow their pseudo-code, ties included, and ask for nothing more;
- a result depends on the seed and the example alone, and its queries are the texts really sent;
- any callable that gives class probabilities can be attacked, and one that gives anything else is refused;
- the language-model constraint keeps exactly the candidates within the threshold, from a file or a live model.
"""
import json
import zipfile
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel,
                          PreTrainedTokenizerFast)

import attacks
from attacks import CausalLM, Result, attack, genetic, lm_constraint, lm_windows, margin, pwws, read_lm_scores
from tests import golden

VOCABULARY = [f"w{k}" for k in range(40)]
small_genetic = partial(genetic, population=8, generations=6)
ATTACKS = pytest.mark.parametrize("method", [pwws, small_genetic], ids=["pwws", "genetic"])


class BagOfWords:
    """A linear model on word counts, softmax over C classes. Remembers every batch that it was asked."""

    def __init__(self, seed, C=2, scale=0.7):
        weights = np.random.default_rng(seed).normal(scale=scale, size=(len(VOCABULARY) + 1, C))
        self.weight = {word: row for word, row in zip(VOCABULARY + ["NULL"], weights)}
        self.zero, self.batches = np.zeros(C), []

    def __call__(self, texts):
        self.batches.append(list(texts))
        joined = [text if isinstance(text, str) else " ".join(text) for text in texts]
        z = np.array([sum((self.weight[w] for w in text.split()), self.zero) for text in joined])
        return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)

    @property
    def asked(self):
        return [text for batch in self.batches for text in batch]


def random_table(rng):
    """A synonym table in which about a third of the words have no synonyms."""
    return {w: [str(v) for v in rng.choice([v for v in VOCABULARY if v != w], rng.integers(1, 5), replace=False)]
            for w in VOCABULARY if rng.random() < 0.65}


def random_examples(rng, victim, N=12, longest=9):
    """N texts of random length with the victim's own prediction as their label."""
    texts = [" ".join(rng.choice(VOCABULARY, rng.integers(1, longest + 1))) for _ in range(N)]
    labels = victim(texts).argmax(axis=1)
    victim.batches.clear()
    return [(i, text, int(y)) for i, (text, y) in enumerate(zip(texts, labels))]


def random_case(seed, C=2):
    rng, victim = np.random.default_rng(seed), BagOfWords(seed, C)
    return victim, random_examples(rng, victim), random_table(rng)


def run(victim, examples, method, synonyms, **options):
    results = list(attack(victim, examples, method, synonyms, progress=False, **options))
    return sorted(results, key=lambda result: result.index)


def drive(steps, probabilities):
    """An attack without a scheduler -> (what it returns, [(texts, P) of each yield])."""
    rounds, P = [], None
    try:
        while True:
            texts = steps.send(P)
            P = np.array([probabilities(words) for words in texts])
            rounds.append((texts, P))
    except StopIteration as stop:
        return stop.value, rounds


# ----------------------------------------------------------------------------------------------------------
# Every attack


@ATTACKS
@pytest.mark.parametrize("seed", range(5))
def test_words_change_only_into_a_synonym_of_the_original_word(method, seed):
    victim, examples, table = random_case(seed, C=2 + seed % 2)
    changed = 0
    for result, (_, text, _) in zip(run(victim, examples, method, table), examples):
        before, after = text.split(), result.adversarial.split()
        assert result.original == text and len(before) == len(after)
        assert all(v == w or w in table.get(v, []) for v, w in zip(before, after))
        assert result.words_changed == sum(v != w for v, w in zip(before, after))
        changed += result.words_changed
    assert changed > 0


@ATTACKS
@pytest.mark.parametrize("C", [2, 3])
def test_success_means_that_the_victim_is_wrong_on_the_returned_text(method, C):
    verdicts = set()
    for seed in range(5):
        victim, examples, table = random_case(seed, C)
        for result in run(victim, examples, method, table):
            prediction = victim([result.adversarial])[0].argmax()
            assert result.prediction == prediction
            assert result.success == (prediction != result.label) and result.correct
            verdicts.add(result.success)
    assert verdicts == {True, False}


@ATTACKS
@pytest.mark.parametrize("seed", range(3))
def test_queries_are_the_texts_sent_and_no_text_is_sent_twice(method, seed):
    victim, examples, table = random_case(seed)
    for example in examples:
        victim.batches.clear()
        result, = run(victim, [example], method, table, batch_size=3)
        assert result.queries == len(victim.asked) == len(set(victim.asked))
    victim.batches.clear()
    assert sum(result.queries for result in run(victim, examples, method, table)) == len(victim.asked)


@ATTACKS
def test_a_result_depends_on_the_seed_and_the_example_alone(method):
    victim, examples, table = random_case(3)
    reference = run(victim, examples, method, table, seed=5)
    for batch_size, in_flight in [(1, 1), (7, 3), (1000, 100)]:
        assert run(victim, examples, method, table, seed=5, batch_size=batch_size, in_flight=in_flight) == reference
    assert run(victim, examples[::-1], method, table, seed=5) == reference
    for example, result in zip(examples, reference):
        assert run(victim, [example], method, table, seed=5) == [result]


def test_another_seed_is_another_genetic_attack():
    victim, examples, table = random_case(3)
    a, b = (run(victim, examples, small_genetic, table, seed=seed) for seed in (0, 1))
    assert [r.queries for r in a] != [r.queries for r in b]


def test_every_example_has_a_random_stream_of_its_own():
    victim, examples, table = random_case(3)
    _, text, y = max(examples, key=lambda example: len(example[1]))
    assert len({r.queries for r in run(victim, [(i, text, y) for i in range(8)], small_genetic, table)}) > 1


@ATTACKS
def test_the_premise_of_a_pair_never_changes(method):
    rng, victim = np.random.default_rng(0), BagOfWords(0, C=3)
    table = {w: ["w0", "w1", "w2"] for w in VOCABULARY[3:]}  # the premise's words have synonyms too
    pairs = [tuple(" ".join(rng.choice(VOCABULARY, 5)) for _ in range(2)) for _ in range(10)]
    examples = [(i, pair, int(y)) for i, (pair, y) in enumerate(zip(pairs, victim(pairs).argmax(axis=1)))]
    results = run(victim, examples, method, table)
    assert all(result.adversarial[0] == pair[0] for result, pair in zip(results, pairs))
    assert any(result.adversarial[1] != pair[1] for result, pair in zip(results, pairs))
    assert all(type(text) is tuple and len(text) == 2 for text in victim.asked)


def test_a_misclassified_example_is_not_attacked():
    victim, examples, table = random_case(0)
    index, text, y = examples[0]
    victim.batches.clear()

    def never(words, y, synonyms, rng):
        raise AssertionError("attacked")
        yield

    assert run(victim, [(index, text, 1 - y)], never, table, name="a") == [
        Result(index, "a", 1 - y, text, text, False, y, 0, 1, False)]
    assert victim.asked == [text]


@ATTACKS
@pytest.mark.parametrize("text, words", [("", 0), ("w1", 1), ("w2", 1), ("w2 w2 w2", 3), (("w1 w1", ""), 0)])
def test_nothing_to_substitute_survives(method, text, words):
    victim = BagOfWords(0)
    y = int(victim([text])[0].argmax())
    seen = []
    result, = run(victim, [(0, text, y)], method, lambda index, words: seen.append(words) or [[] for _ in words])
    assert len(seen[0]) == words
    assert (result.success, result.correct, result.queries, result.adversarial) == (False, True, 1, text)


def test_a_third_attack_is_one_function():
    def first_synonym(words, y, synonyms, rng):
        for i, candidates in enumerate(synonyms):
            words = attacks.replace(words, i, candidates[0]) if candidates else words
        P = yield [words]
        assert P.shape == (1, 2)
        return words

    victim = BagOfWords(0)
    y = int(victim(["w1 w2"])[0].argmax())
    result, = run(victim, [(0, "w1 w2", y)], first_synonym, {"w1": ["w5", "w6"]})
    assert result.adversarial == "w5 w2" and result.attack == "first_synonym" and result.queries == 2


# ----------------------------------------------------------------------------------------------------------
# PWWS. Its hand-made victim: P(y) = 0.875 - the drops of the words at their positions, in binary fractions.


def additive(drops):
    def probabilities(words):
        p = 0.875 - sum(drops.get((i, w), 0) for i, w in enumerate(words))
        return [1 - p, p]
    return probabilities


def test_pwws_takes_the_last_of_equal_candidates_and_the_first_of_equal_positions():
    synonyms = [["a1", "a2", "a3"], ["b1"], [], ["d1", "d2"]]
    drops = {(0, "a1"): 0.125, (0, "a2"): 0.125, (0, "a3"): 0, (1, "b1"): 0.125,
             (3, "d1"): -0.0625, (3, "d2"): -0.125}
    words, rounds = drive(pwws(("a", "b", "c", "d"), 1, synonyms), additive(drops))
    applied = [texts[0] for texts, _ in rounds[1:]]
    assert applied == [("a2", "b", "c", "d"), ("a2", "b1", "c", "d"), ("a2", "b1", "c", "d1")]
    assert words == applied[-1]  # it never won, and applied the harmful d1 too


def test_pwws_applies_the_less_harmful_of_two_harmful_substitutions_first():
    drops = {(0, "a1"): -0.125, (1, "b1"): -0.0625}
    words, rounds = drive(pwws(("a", "b"), 1, [["a1"], ["b1"]]), additive(drops))
    assert [texts[0] for texts, _ in rounds[1:]] == [("a", "b1"), ("a1", "b1")] and words == ("a1", "b1")


def test_pwws_weighs_a_drop_by_the_softmax_of_saliency():
    synonyms = [["a1"], ["b1"]]
    drops = {(0, "a1"): 0.1875, (1, "b1"): 0.125}
    for saliency_of_b, first in [(0, ("a1", "b")), (0.25, ("a1", "b")), (0.5, ("a", "b1"))]:
        # b goes first once exp(saliency) > 0.1875 / 0.125 = 1.5, that is for a saliency above 0.405
        _, rounds = drive(pwws(("a", "b"), 1, synonyms), additive(drops | {(1, "NULL"): saliency_of_b}))
        assert rounds[1][0] == [first]


def test_pwws_stops_as_soon_as_the_victim_is_fooled():
    drops = {(0, "a1"): 0.25, (1, "b1"): 0.1875, (2, "c1"): 0.125}
    words, rounds = drive(pwws(("a", "b", "c"), 1, [["a1"], ["b1"], ["c1"]]), additive(drops))
    assert words == ("a1", "b1", "c") and len(rounds) == 3  # 0.875 -> 0.625 -> 0.4375


def test_pwws_replaces_by_the_unknown_word_given():
    _, rounds = drive(pwws(("a", "b"), 1, [["a1"], []], unknown="?"), additive({}))
    assert rounds[0][0] == [("a", "b"), ("?", "b"), ("a", "?"), ("a1", "b")]


@pytest.mark.parametrize("seed", range(5))
def test_pwws_asks_for_the_original_n_saliencies_the_candidates_and_the_applied(seed):
    victim, examples, table = random_case(seed)
    for index, text, y in examples:
        words, synonyms = text.split(), [table.get(w, []) for w in text.split()]
        victim.batches.clear()
        result, = run(victim, [(index, text, y)], pwws, table)
        n, candidates = len(words), sum(map(len, synonyms))
        blanked = {" ".join(words[:i] + ["NULL"] + words[i + 1:]) for i in range(n)}
        assert result.queries <= 1 + n + candidates + result.words_changed
        if candidates:
            assert {text for text in victim.asked if "NULL" in text} == blanked and len(blanked) == n


# ----------------------------------------------------------------------------------------------------------
# The genetic attack


def test_margin_is_the_log_ratio_to_the_best_other_class():
    P = np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
    assert np.allclose(margin(P, 0)[:2], [np.log(0.5 / 0.3), np.log(0.2 / 0.5)])
    assert np.allclose(margin(P, 1)[:2], [np.log(0.3 / 0.5), np.log(0.3 / 0.5)])
    assert np.isfinite(margin(P, 0)).all() and margin(P, 2)[2] > 100
    p = np.linspace(0.01, 0.99, 50)
    assert (np.diff(margin(np.stack([1 - p, p], axis=1), 1)) > 0).all()  # two classes: ordered as P(y)


@pytest.mark.parametrize("C", [2, 3])
def test_the_genetic_attack_never_loses_its_best_text(C):
    victim = BagOfWords(1, C, scale=0.05)  # so flat that a class stays ahead: every generation is run
    words, synonyms = tuple(VOCABULARY[:6]), [VOCABULARY[6 * i:6 * i + 4] for i in range(1, 7)]
    y = 0
    victim.weight = {w: row + np.eye(C)[y] for w, row in victim.weight.items()}
    best = []
    for generations in range(6):
        steps = genetic(words, y, synonyms, np.random.default_rng(0), 6, generations)
        returned, rounds = drive(steps, lambda words: victim([" ".join(words)])[0])
        assert len(rounds) == 1 + generations
        best.append(margin(victim([" ".join(returned)]), y)[0])
        assert np.isclose(best[-1], min(margin(P, y).min() for _, P in rounds))
    assert (np.diff(best) <= 1e-12).all() and best[-1] < best[0]


@pytest.mark.parametrize("seed", range(10))
def test_the_best_text_survives_children_that_are_worse(seed):
    """Every text has a random probability, so a child of good parents is no better than chance: only a best member
    that is kept can be returned."""
    def probabilities(words):
        p = 0.6 + 0.3 * np.random.default_rng([ord(letter) for letter in "".join(words)]).random()
        return [1 - p, p]                                                # class 1 stays ahead: every generation is run

    words, synonyms = tuple("abcdef"), [[letter * 2, letter * 3] for letter in "abcdef"]
    returned, rounds = drive(genetic(words, 1, synonyms, np.random.default_rng(seed), 6, 8), probabilities)
    assert probabilities(returned)[1] == min(P[:, 1].min() for _, P in rounds)


def test_the_children_of_the_last_generation_are_checked():
    def probabilities(words):  # two changes fool it: a start has one, only a child can have two
        p = [0.7, 0.6, 0.1][(words[0] == "a1") + (words[1] == "b1")]
        return [1 - p, p]

    steps = genetic(("a", "b"), 1, [["a1"], ["b1"]], np.random.default_rng(0), population=60, generations=1)
    words, rounds = drive(steps, probabilities)
    assert words == ("a1", "b1") and len(rounds) == 2


def test_the_genetic_attack_stops_when_its_best_member_fools_the_model():
    steps = genetic(("a", "b"), 1, [["a1"], []], np.random.default_rng(0), population=4, generations=9)
    words, rounds = drive(steps, lambda words: [0.6, 0.4] if "a1" in words else [0.4, 0.6])
    assert words == ("a1", "b") and len(rounds) == 1
    assert rounds[0][0] == [("a", "b"), ("a1", "b")] * 4  # tried at a position: the original word, its synonyms


def test_a_mutation_keeps_the_first_of_equals_the_original_word():
    steps = genetic(("a", "b"), 1, [["a1"], ["b1"]], np.random.default_rng(0), population=5, generations=4)
    assert drive(steps, lambda words: [0.4, 0.6])[0] == ("a", "b")


def test_a_mutation_tries_the_original_word_and_its_synonyms_whatever_the_text_holds_there():
    def probabilities(words):  # one change helps, two together harm: children often hold a synonym already
        p = {(0, 0): 0.9, (1, 0): 0.7, (0, 1): 0.7, (1, 1): 0.8}[words[0] == "a1", words[1] == "b1"]
        return [1 - p, p]

    steps = genetic(("a", "b"), 1, [["a1"], ["b1"]], np.random.default_rng(0), population=10, generations=4)
    _, rounds = drive(steps, probabilities)
    for texts, _ in rounds:
        for first, second in zip(texts[::2], texts[1::2]):
            (v, w), = [(v, w) for v, w in zip(first, second) if v != w]
            assert (v, w) in [("a", "a1"), ("b", "b1")]
    assert len(rounds) == 5


def test_a_population_of_one_is_refused():
    victim, examples, table = random_case(0)
    with pytest.raises(ValueError, match="at least 2, not 1"):
        run(victim, examples, partial(genetic, population=1), table)


# ----------------------------------------------------------------------------------------------------------
# The scheduler and its victims


def test_batches_are_full_and_sorted_by_length():
    victim, examples, table = random_case(2)
    run(victim, examples, pwws, table, batch_size=10, in_flight=100)
    lengths = [len(text.split()) for text in victim.asked]
    sizes = [len(batch) for batch in victim.batches]
    assert sizes[:2] == [10, 2] and max(sizes) == 10  # the 12 originals come first
    assert lengths[:12] == sorted(lengths[:12])
    second = sum(1 for text in victim.asked[12:] if "NULL" in text)
    assert second == sum(len(text.split()) for _, text, _ in examples if any(table.get(w) for w in text.split()))


def test_examples_are_read_as_they_are_needed():
    victim, read = BagOfWords(0), []

    def endless():
        for i in count():
            read.append(i)
            yield i, "w1 w2 w3", int(victim(["w1 w2 w3"])[0].argmax())

    results = attack(victim, endless(), pwws, {"w1": ["w4"]}, in_flight=4, progress=False)
    assert len(list(islice(results, 10))) == 10
    assert len(read) <= 10 + 4


def test_texts_that_the_model_sees_as_one_are_asked_once_and_are_equal():
    class Truncated(BagOfWords):  # sees two words, w0 and w1 as the same
        def key(self, text):
            return " ".join(text.replace("w0", "w1").split()[:2])

        def __call__(self, texts):
            return super().__call__([self.key(text) for text in texts])

    victim = Truncated(1)
    y = int(victim(["w2 w3 w4"])[0].argmax())
    victim.batches.clear()
    result, = run(victim, [(0, "w2 w3 w4", y)], pwws, {"w2": ["w0", "w1"], "w4": ["w5", "w6"]})
    assert result.queries == len(victim.asked) == len(set(victim.asked))
    assert {text for text in victim.asked if "NULL" not in text} == {"w2 w3", "w1 w3"}
    assert result.adversarial.split()[0] == "w1"  # exactly equal, so the last of equals


def test_the_synonyms_may_come_from_a_callable():
    victim, examples, table = random_case(1)
    by_position = lambda index, words: [table.get(w, []) for w in words]
    assert run(victim, examples, pwws, by_position) == run(victim, examples, pwws, table)
    with pytest.raises(ValueError, match="synonyms are for 1 positions"):
        run(victim, [e for e in examples if len(e[1].split()) > 1][:1], pwws, lambda index, words: [[]])


def test_progress_shows_robust_accuracy(capsys):
    victim, examples, table = random_case(0)
    results = list(attack(victim, examples, pwws, table, name="PWWS"))
    robust = np.mean([r.correct and not r.success for r in results])
    err = capsys.readouterr().err
    assert "PWWS" in err and "/12" in err and f"robust {robust:.1%}" in err


@pytest.mark.parametrize("output, message", [
    (lambda N: np.zeros(N), "shape"),
    (lambda N: np.ones((N, 1)), "shape"),
    (lambda N: np.full((N + 1, 2), 0.5), "shape"),
    (lambda N: np.full((N, 2), np.nan), "nan"),
    (lambda N: np.tile([np.inf, 0.5], (N, 1)), "inf"),
    (lambda N: np.tile([1.5, -0.5], (N, 1)), "softmax"),
    (lambda N: np.tile([2.0, 3.0], (N, 1)), "softmax"),
    (lambda N: np.full((N, 2), 0.51), "softmax"),
    (lambda N: ["positive"] * N, "no array of numbers"),
    (lambda N: [[0.5, 0.5]] * (N - 1) + [[1.0]], "no array of numbers"),
    (lambda N: None, "shape"),
])
def test_a_victim_without_a_probability_per_class_is_refused(output, message):
    with pytest.raises(ValueError, match=message) as error:
        run(lambda texts: output(len(texts)), [(0, "w1", 0), (1, "w2", 0)], pwws, {})
    assert "\n" not in str(error.value) and "(2, C)" in str(error.value)


def test_a_label_that_is_no_class_is_refused():
    with pytest.raises(ValueError, match="example 7 has label 2; the victim has classes 0 to 1"):
        run(BagOfWords(0), [(7, "w1", 2)], pwws, {})


@pytest.mark.parametrize("form", [lambda P: P.tolist(), lambda P: torch.tensor(P, requires_grad=True),
                                  lambda P: P.astype(np.float32), lambda P: torch.tensor(P).bfloat16()])
def test_probabilities_may_be_a_list_an_array_or_a_tensor(form):
    victim, examples, table = random_case(4)
    results = run(lambda texts: form(victim(texts)), examples[:3], pwws, table)
    assert len(results) == 3 and json.dumps([vars(result) for result in results])


def test_a_predict_proba_method_is_attacked_as_it_is():
    class Pipeline:  # scikit-learn's shape: texts -> counts -> a logistic regression
        words, weights = {"good": 0, "bad": 1, "decent": 2}, np.array([2.0, -2.0, -0.5])

        def predict_proba(self, texts):
            X = np.array([[text.split().count(word) for word in self.words] for text in texts])
            p = 1 / (1 + np.exp(-X @ self.weights))
            return np.stack([1 - p, p], axis=1)

    result, = attack(Pipeline().predict_proba, [(0, "a good film", 1)], pwws, {"good": ["decent"]}, progress=False)
    assert result.success and result.adversarial == "a decent film" and result.prediction == 0


def word_tokenizer(folder, **special):
    """A tokenizer with one token a word, saved to the folder."""
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "<s>", *VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **special)
    fast.save_pretrained(folder)
    return fast


@ATTACKS
@pytest.mark.parametrize("pairs", [False, True])
def test_a_stock_transformers_classifier_is_attacked(tmp_path, method, pairs):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(tmp_path)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=1.0, num_labels=3)).eval()

    def victim(texts):
        columns = zip(*texts) if pairs else [texts]
        inputs = tokenizer(*map(list, columns), padding=True, return_tensors="pt")
        return model(**inputs).logits.softmax(dim=-1)

    rng = np.random.default_rng(0)
    text = lambda: " ".join(rng.choice(VOCABULARY, 6))
    texts = [(text(), text()) if pairs else text() for _ in range(4)]
    examples = [(i, t, int(victim([t]).argmax())) for i, t in enumerate(texts)]
    results = run(victim, examples, method, random_table(rng))
    assert len(results) == 4 and any(result.success for result in results)
    for result in results:
        assert (int(victim([result.adversarial]).argmax()) != result.label) == result.success


# ----------------------------------------------------------------------------------------------------------
# The language-model constraint


def test_a_window_has_radius_words_on_either_side():
    words = tuple("abcdefg")
    assert lm_windows(words, 3, ["X", "Y"], radius=2) == [tuple("bcdef"), tuple("bcXef"), tuple("bcYef")]
    assert lm_windows(words, 0, ["X"], radius=2) == [tuple("abc"), tuple("Xbc")]
    assert lm_windows(words, 6, [], radius=6) == [words]


def test_the_constraint_keeps_the_candidates_within_the_threshold():
    log_p_of = {"a": -10.0, "x": -15.0, "y": -15.1, "z": 0.0, "b": -3.0, "v": -np.inf}
    calls = []

    def log_p(windows):
        calls.append(windows)
        return [sum(log_p_of[w] for w in window) for window in windows]

    synonyms = [["x", "y", "z"], [], ["v", "z", "b"]]
    assert lm_constraint(("a", "b", "b"), synonyms, log_p) == [["x", "z"], [], ["z", "b"]]
    assert len(calls) == 1 and len(calls[0]) == 8
    assert lm_constraint(("a", "b", "b"), synonyms, log_p, threshold=1) == [["z"], [], ["z"]]
    assert lm_constraint(("a",), [[]], None) == [[]]
    assert lm_constraint((), [], None) == []


SCORES = "0\tA Good film .\n0\t1\tgood\t-10\n0\t1\tGreat\t-14.5\n0\t1\tfine\t-15.5\n0\t1\tnice\t-inf\n" \
         "1\tbad\n1\t0\tbad\t-inf\n1\t0\tawful\t-inf\n"


def test_published_scores_constrain_like_a_model(tmp_path):
    file = tmp_path / "scores.txt"
    file.write_text(SCORES)
    scores = read_lm_scores(file)
    assert scores["a good film ."] == {1: {"good": -10, "great": -14.5, "fine": -15.5, "nice": -np.inf}}
    constrain = attacks.scores_constraint
    synonyms = [["the"], ["fine", "great", "nice", "unheard"], [], []]
    assert constrain("a good film .".split(), synonyms, scores["a good film ."]) == [[], ["great"], [], []]
    assert constrain("a good film .".split(), synonyms, scores["a good film ."], -6)[1] == ["fine", "great"]
    assert constrain(["bad"], [["awful"]], scores["bad"]) == [[]]  # -inf against -inf
    assert read_lm_scores(file, sentences={"bad"}).keys() == {"bad"}


def test_the_score_file_may_be_a_zip_of_one_text(tmp_path):
    for members, good in [(["s.txt", "README"], True), (["a.txt", "b.txt"], False), (["README"], False)]:
        with zipfile.ZipFile(tmp_path / "scores.zip", "w") as archive:
            for member in members:
                archive.writestr(member, SCORES)
        if good:
            assert read_lm_scores(tmp_path / "scores.zip").keys() == {"a good film .", "bad"}
        else:
            with pytest.raises(ValueError, match="scores.zip.*one is right"):
                read_lm_scores(tmp_path / "scores.zip")


@pytest.mark.parametrize("line", [b"0\t1\tgood", b"0\t1\tgood\tmany", b"0\tone\tgood\t-1", b"0\t4\tgood\t-1",
                                  b"garbage", b"0\t-1\tgood\t-1", b"3\t1\tgood\t-1", b"0\t1\tgo\xff\t-1",
                                  b"0\t1\tgood\t-1\t-2"])
def test_a_line_of_the_wrong_shape_is_named(tmp_path, line):
    file = tmp_path / "scores.txt"
    file.write_bytes(b"0\ta good film .\n0\t1\tgood\t-10\n" + line + b"\n")
    with pytest.raises(ValueError, match="scores.txt, line 3: .*should be 'index TAB sentence'") as error:
        read_lm_scores(file)
    assert "\n" not in str(error.value)


def test_scores_before_the_first_sentence_are_refused(tmp_path):
    (tmp_path / "scores.txt").write_text("0\t1\tgood\t-10\n")
    with pytest.raises(ValueError, match="line 1"):
        read_lm_scores(tmp_path / "scores.txt")


@pytest.mark.parametrize("special", [{"bos_token": "<s>"}, {"eos_token": "<s>"}, {}], ids=["bos", "eos", "none"])
def test_a_causal_model_sums_the_log_probabilities_of_the_tokens(tmp_path, special):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(tmp_path, **special)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32,
                                       initializer_range=0.5, bos_token_id=2, eos_token_id=2)).eval()
    model.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    windows = [tuple(rng.choice(VOCABULARY, n)) for n in [3, 13, 1, 7, 7, 2]] + [()]

    expected = []
    for window in windows:  # one token after the other, nothing padded
        ids = [2] * bool(special) + [VOCABULARY.index(w) + 3 for w in window]
        total = 0.0
        for t in range(1, len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:t]])).logits[0, -1]
            total += logits.log_softmax(dim=-1)[ids[t]].item()
        expected.append(total)
    assert len(set(expected)) > 4
    for batch_size in (1, 3, 64):
        log_p = CausalLM(tmp_path, batch_size=batch_size)
        assert log_p.model.dtype == torch.float32
        assert np.allclose(log_p(windows), expected, atol=1e-4)
    words, synonyms = windows[1], [["w1", "w2"]] * 13
    kept = lm_constraint(words, synonyms, log_p, threshold=0.0)
    for i in range(13):
        score = log_p(lm_windows(words, i, ["w1", "w2"]))
        assert kept[i] == [w for w, s in zip(["w1", "w2"], score[1:]) if s >= score[0]]


# ----------------------------------------------------------------------------------------------------------
# The authors' own code


GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "pwws_a.json"


@pytest.mark.skipif(not GOLDEN.exists(), reason="the recorded cases are not here")
def test_the_attacks_return_what_the_authors_code_returns():
    recorded = json.loads(GOLDEN.read_text())["cases"]
    for case, ours in zip(recorded, golden.attack_cases(GOLDEN)["cases"], strict=True):
        assert {key: ours[key] for key in ("adv", "success", "genetic_robust")} == {
            key: case[key] for key in ("adv", "success", "genetic_robust")}
        assert ours["queries"] <= case["queries"]


def test_the_golden_command_prints_one_json_object(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "golden").mkdir()
    (tmp_path / "data" / "counterfitted_neighbors.json").write_text(json.dumps({"good": ["fine", "great"]}))
    case = tmp_path / "golden" / "case.json"
    case.write_text(json.dumps({"scale": 1.0, "bias": 5.0, "cases": [{"text": "a good film", "y": 1}]}))
    golden.main([str(case)])
    printed, = json.loads(capsys.readouterr().out)["cases"]
    assert printed["adv"] in ("a fine film", "a great film") and not printed["success"]
    assert printed["genetic_robust"] and printed["queries"] == 1 + 3 + 2


def test_a_masked_model_is_no_causal_model(model_folder):
    """BERT and RoBERTa would load, with a head of random weights."""
    with pytest.raises(ValueError, match="masked language model"):
        attacks.CausalLM(model_folder)
