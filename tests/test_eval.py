"""Evaluation: finished runs become victims, are attacked, compared and drawn (eval.py).

A run loads to the predictions it was trained to, and anything damaged or foreign in its folder is refused by name.
Every run of a comparison is attacked on the same texts; robust accuracy is what a recount of attacks.jsonl gives and
never exceeds clean accuracy; an evaluation that was interrupted anywhere ends like one that was not; the same command
twice gives the same files. Intervals are the textbook's. Bad input is one line and exit code 2. All of it on real runs
of tiny models, made by train.main: BERT on texts of two classes, RoBERTa on pairs of three.
"""
import json
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import attacks
import data
import eval
import train
from tests.conftest import TABLE, save_model, write_task

PREPARE_NLTK, LOAD_NEIGHBORS = data.prepare_nltk, data.load_neighbors
KEYS = ["index", "attack", "label", "original", "adversarial", "success", "prediction", "words_changed", "queries"]
GENETIC = ["--attacks", "pwws", "genetic", "--population", "6", "--generations", "3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{"texts": runs of BERT on texts of two classes, "pairs": of RoBERTa on pairs of three}: OUT folders of train.py."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIFT_CACHE", str(folder / "cache"))
        patch.setattr(data, "prepare_nltk", lambda *args, **kwargs: None)
        patch.setattr(data, "words_of", lambda text: text.lower().split())
        outs = {}
        for name, kind, labels, methods in (("texts", "bert", ("neg", "pos"), ("standard", "adv", "rift")),
                                            ("pairs", "roberta", ("no", "so", "yes"), ("standard", "rift"))):
            task = write_task(folder / name, labels, pair=name == "pairs")
            model, outs[name] = save_model(folder / kind, kind), folder / f"{name}-runs"
            train.main(["--task", str(task), "--model", str(model), "--neighbors", str(task / "neighbors.json"), "--out",
                        str(outs[name]), "--epochs", "3", "--batch-size", "9", "--max-len", "16", "--adv-steps", "3",
                        "--lr", "1e-2", "--device", "cpu", "--method", *methods])
    return outs


@pytest.fixture
def runs(finished, tmp_path, plain_words):
    """The finished runs in a folder of this test's own."""
    return {name: shutil.copytree(out, tmp_path / name) for name, out in finished.items()}


@pytest.fixture
def run(runs):
    return runs["texts"] / "rift"


def evaluate(*arguments):
    eval.main([*map(str, arguments), *([] if "--device" in arguments else ["--device", "cpu"])])


def refused(capsys, *arguments):
    """The one line on standard error with which eval.main refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate(*arguments)
    error = capsys.readouterr().err.strip()
    said = [line for line in error.splitlines() if not line.startswith("fetching ")]
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith("eval.py: error: "), error
    return error


def lines_of(folder, name="attacks.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def json_of(path):
    return json.loads(path.read_text())


def change(path, **changes):
    """Changes a run's config.json, in its settings and otherwise."""
    config = json_of(path / "config.json")
    for key, value in changes.items():
        (config["settings"] if key in config["settings"] else config)[key] = value
    (path / "config.json").write_text(json.dumps(config))


def texts_of(run, split="test"):
    return getattr(eval.open_task(json_of(run / "config.json")["settings"]), split)


# ------------------------------------------------------------------------------------------------ a run is a function


@pytest.mark.parametrize("kind, method", [("texts", "standard"), ("texts", "rift"), ("pairs", "rift")])
def test_a_run_loads_to_the_predictions_of_training(runs, kind, method):
    """Probabilities of the loaded run give the clean and the hull accuracy that training measured and wrote down."""
    run = runs[kind] / method
    metrics, examples, victim = json_of(run / "metrics.json"), texts_of(run), eval.load_run(run, "cpu")
    P = victim([data.to_text(x.words) for x in examples])
    assert P.shape == (len(examples), 2 if kind == "texts" else 3) and P.dtype == np.float32
    assert np.allclose(P.sum(1), 1, atol=1e-6)
    assert eval.accuracy(P.argmax(1), examples) == metrics["clean"]
    s = victim.config["settings"]
    predictions, _ = eval.hull_attack(victim, examples, steps=s["adv_steps"])
    assert eval.accuracy(predictions, examples) == metrics["hull"]


def test_batches_do_not_matter(runs):
    """A text has its probabilities whatever stands beside it, and the hull its noise whatever the batch size."""
    run = runs["pairs"] / "rift"
    examples = texts_of(run)
    texts = [data.to_text(x.words) for x in examples]
    small, large = eval.load_run(run, "cpu", batch_size=1), eval.load_run(run, "cpu", batch_size=64)
    assert np.allclose(small(texts), large(texts), atol=1e-5)
    assert eval.hull_attack(small, examples, steps=2)[1] == eval.hull_attack(large, examples, steps=2)[1]


def test_no_texts_have_no_rows(runs):
    assert eval.load_run(runs["pairs"] / "rift", "cpu")([]).shape == (0, 3)


@pytest.mark.parametrize("kind, texts, message", [
    ("texts", "a great film", "is one text, not a list of texts"),
    ("texts", [("a movie", "a film")], "what the model reads: single texts"),
    ("texts", ["a", 5], "5 is not what the model reads"),
    ("texts", [None], "None is not what the model reads"),
    ("pairs", "a great film", "is one text, not a list of texts"),
    ("pairs", ["a great film"], "what the model reads: pairs"),
    ("pairs", ("a movie", "a film"), "'a movie' is not what the model reads: pairs"),
    ("pairs", [("a", "b", "c")], "what the model reads: pairs"),
    ("pairs", [("a", 2)], "what the model reads: pairs"),
])
def test_what_is_no_list_of_texts_is_an_error(runs, kind, texts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        eval.load_run(runs[kind] / "rift", "cpu")(texts)


@pytest.mark.parametrize("kind", ["texts", "pairs"])
def test_texts_of_one_key_are_one_text_to_the_model(runs, kind):
    """Beyond the longest input nothing counts; any word that the model sees does, also where a premise ends."""
    victim = eval.load_run(runs[kind] / "rift", "cpu")
    text = (lambda words, premise="this movie": (premise, words)) if kind == "pairs" else (lambda words: words)
    long = " ".join(["good"] * 16)
    assert victim.key(text(long)) == victim.key(text(long + " bad"))
    assert np.array_equal(*victim([text(long), text(long + " bad")]))
    keys = [victim.key(text(words)) for words in ("good movie", "movie good", "good", "good movie good", "bad movie", "")]
    if kind == "pairs":
        keys += [victim.key(text("good movie", "this")), victim.key(text("", "this movie good movie"))]
    assert len(set(keys)) == len(keys)


# ------------------------------------------------------------------------------------------------ accuracies


@pytest.mark.parametrize("kind", ["texts", "pairs"])
def test_the_hull_gives_texts_of_candidates(runs, kind):
    """Its predictions are the victim's own on its texts; a word becomes one of its candidates; premises stay."""
    victim = eval.load_run(runs[kind] / "rift", "cpu")
    examples = texts_of(runs[kind] / "rift")
    predictions, texts = eval.hull_attack(victim, examples)
    assert np.array_equal(predictions, victim([data.to_text(words) for words in texts]).argmax(1))
    changes = 0
    for x, words in zip(examples, texts):
        *premise, old = victim.vocabulary.visible(x.words)
        assert list(words[:-1]) == premise and len(words[-1]) == len(old)
        for a, b in zip(old, words[-1]):
            assert b in victim.vocabulary.candidate_words(a)
            changes += a != b
    assert changes


@pytest.mark.parametrize("successes, n, low, high", [(8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1),
                                                     (50, 100, 0.4038, 0.5962), (1, 1, 0.2065, 1)])
def test_wilson(successes, n, low, high):
    assert eval.wilson(successes, n) == pytest.approx((low, high), abs=2e-4)


def test_paired_bootstrap():
    """Equal results differ by exactly nothing; the interval covers the truth about 95 times of 100, and pairing helps."""
    rng = np.random.default_rng(0)
    same = rng.random(50) < 0.5
    assert eval.paired_bootstrap(same, same) == (0, 0, 0)
    covered = 0
    for _ in range(200):
        b = rng.random(200) < 0.6
        a = b | (rng.random(200) < 0.25)                                        # truth: 0.4 * 0.25 = 0.1
        d, low, high = eval.paired_bootstrap(a, b, draws=500)
        assert low <= d <= high and d == pytest.approx(a.mean() - b.mean())
        covered += low <= 0.1 <= high
    assert 180 <= covered <= 200
    _, low, high = eval.paired_bootstrap(a, rng.permutation(b))
    _, paired_low, paired_high = eval.paired_bootstrap(a, b)
    assert high - low > paired_high - paired_low
    assert eval.paired_bootstrap(b, a)[0] == -eval.paired_bootstrap(a, b)[0]


# ------------------------------------------------------------------------------------------------ evaluations


@pytest.mark.parametrize("kind", ["texts", "pairs"])
def test_the_figures_are_a_recount_of_the_lines(runs, kind, capsys):
    """robust = clean - successes / N for every attack; a line is what the victim says of its texts."""
    run = runs[kind] / "standard"
    before = json_of(run / "metrics.json")
    evaluate(run, "--attacks", "pwws", "genetic", "hull", "--num-examples", 14, "--population", 6, "--generations", 3)
    summary, lines, metrics = json_of(run / "eval.json"), lines_of(run), json_of(run / "metrics.json")
    victim, examples = eval.load_run(run, "cpu"), texts_of(run)
    N = summary["num_examples"]
    assert N == 14 and set(summary) == {"clean", "pwws", "genetic", "hull", "num_examples", "settings"}
    attacked = {line["index"] for line in lines}
    assert summary["clean"] == len(attacked) / N
    for attack in ("pwws", "genetic", "hull"):
        mine = [line for line in lines if line["attack"] == attack]
        fooled = sum(line["success"] for line in mine)
        assert {line["index"] for line in mine} == attacked and len(mine) == len(attacked)
        assert summary[attack] == pytest.approx(summary["clean"] - fooled / N) and summary[attack] <= summary["clean"]
    if kind == "texts":                     # the three-class model is near chance: it need not fall to an attack
        assert any(line["success"] for line in lines) and not all(line["success"] for line in lines)
    for line in lines:
        assert list(line) == KEYS
        x = examples[line["index"]]
        assert line["label"] == x.y and data.from_text(line["original"]) == victim.vocabulary.visible(x.words)
        *premise, old = data.from_text(line["original"])
        *kept, new = data.from_text(line["adversarial"])
        assert premise == kept and len(old) == len(new)
        assert sum(a != b for a, b in zip(old, new)) == line["words_changed"]
        assert all(a == b or b in TABLE[a] for a, b in zip(old, new))
        prediction = victim([line["adversarial"]]).argmax()
        assert prediction == line["prediction"] and line["success"] == (prediction != line["label"])
    assert metrics == before | {"pwws": summary["pwws"], "genetic": summary["genetic"]}      # hull stays training's
    out = capsys.readouterr().out
    assert f"{summary['pwws']:.3f} [" in out and "genetic (6 x 3, lm none)" in out and "pwws (unknown word NULL)" in out


def test_twice_is_the_same(run, capsys):
    outputs, files = [], []
    for more in ([], [], ["--overwrite"], ["--overwrite", "--batch-size", 3]):
        evaluate(run, *GENETIC, "--num-examples", 9, *more)
        outputs.append(capsys.readouterr().out)
        files.append([(run / name).read_text() for name in ("attacks.jsonl", "eval.json", "metrics.json")])
    assert outputs.count(outputs[0]) == files.count(files[0]) == 4


def test_every_run_is_attacked_on_the_same_texts(runs, capsys):
    """The table has a row a run, and each later run its paired difference to the first."""
    folders = [runs["texts"] / method for method in ("standard", "adv", "rift")]
    evaluate(*folders, "--attacks", "pwws", "--num-examples", 10, "--seed", 3)
    settings = [json_of(folder / "eval.json")["settings"]["pwws"] for folder in folders]
    assert settings[0] == settings[1] == settings[2] and settings[0]["num_examples"] == 10
    out = capsys.readouterr().out
    table, differences = out.split(f"Each run minus {folders[0]}, on the same texts")
    assert [line.split()[:2] for line in table.splitlines() if line.startswith(str(folders[0].parent))] == [
        [str(folder), "10"] for folder in folders]
    robust = [json_of(folder / "eval.json")["pwws"] for folder in folders]
    for folder, accuracy in zip(folders[1:], robust[1:]):
        [row] = [line for line in differences.splitlines() if line.startswith(str(folder)) and "->" not in line]
        assert f"{accuracy - robust[0]:+.3f} [" in row
    order = {line["index"] for folder in folders for line in lines_of(folder)}
    assert len(order) <= 10
    evaluate(folders[0], "--attacks", "pwws", "--num-examples", 10, "--seed", 4, "--overwrite")
    assert json_of(folders[0] / "eval.json")["settings"]["pwws"]["seed"] == 4
    assert {line["index"] for line in lines_of(folders[0])} - order


def test_runs_of_two_tasks_share_a_table(runs, capsys):
    evaluate(runs["texts"] / "rift", runs["pairs"] / "rift", "--attacks", "pwws", "--num-examples", 5)
    out = capsys.readouterr().out
    assert "texts/rift" in out and "pairs/rift" in out and "minus" not in out and out.count("unknown word") == 1


@pytest.mark.parametrize("attack", [["pwws", "genetic"], ["hull"]])
def test_an_interrupted_evaluation_ends_like_one_that_was_not(run, attack, capsys):
    """Cut off after any byte of attacks.jsonl, and run again: the same table, the same files."""
    arguments = [run, "--attacks", *attack, "--population", 6, "--generations", 3, "--num-examples", 12]
    evaluate(*arguments)
    out = capsys.readouterr().out
    files = {name: (run / name).read_bytes() for name in ("attacks.jsonl", "eval.json", "metrics.json")}
    whole, rng = files["attacks.jsonl"], np.random.default_rng(0)
    first_end = whole.index(b"\n")
    for cut in [0, first_end, first_end + 1, len(whole) - 1, *rng.integers(1, len(whole), size=4)]:
        (run / "attacks.jsonl").write_bytes(whole[:cut])
        unfinished = json.loads(files["eval.json"])
        for name in attack:
            del unfinished[name]
        (run / "eval.json").write_text(json.dumps(unfinished))
        evaluate(*arguments)
        assert capsys.readouterr().out == out
        assert files == {name: (run / name).read_bytes() for name in files}, cut


def test_what_is_finished_is_not_attacked_again(run, monkeypatch, capsys):
    """Ctrl-C keeps the finished lines and says how to go on, without what would start anew; exit code 130."""
    real, asked = attacks.attack, []

    def interrupted(victim, examples, *args, **kwargs):
        asked.append([i for i, _, _ in examples])
        for n, result in enumerate(real(victim, examples, *args, **kwargs)):
            if len(asked) == 1 and n == 2:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(attacks, "attack", interrupted)
    with pytest.raises(SystemExit) as stop:
        evaluate(run, "--attacks", "pwws", "--overwrite")
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 130 and "Traceback" not in error
    assert error.splitlines()[-1].endswith(f"go on with: python eval.py {run} --attacks pwws --device cpu")
    finished = [line["index"] for line in lines_of(run)]
    assert len(finished) == 2
    evaluate(run, "--attacks", "pwws")
    assert set(asked[1]) == set(asked[0]) - set(finished)


@pytest.mark.parametrize("change_, message", [
    (["--seed", 1], "holds clean with seed 0, not 1"),
    (["--num-examples", 7], "num_examples 8, not 7"),
    (["--population", 7], "holds genetic with population 6, not 7"),
    (["--generations", 4], "holds genetic with generations 3, not 4"),
    (["--precision", "bf16"], "precision fp32, not bf16"),
    (["--neighbors", "other.json"], "holds pwws with neighbors"),
    (["--lm-constraint", "LM"], "holds genetic with lm_constraint none, not LM"),
])
def test_other_settings_are_refused(run, capsys, tmp_path, monkeypatch, change_, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps({"good": ["bad"]}))
    monkeypatch.setattr(attacks, "CausalLM", lambda *args: None)
    evaluate(run, *GENETIC, "--num-examples", 8)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert message in refused(capsys, run, *GENETIC, "--num-examples", 8, *change_)
    assert "--overwrite" in refused(capsys, run, *GENETIC, "--num-examples", 8, *change_)
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_an_attack_is_added_to_those_before(run):
    """pwws, then genetic on the same texts: as both at once. --overwrite forgets what is not attacked anew."""
    evaluate(run, "--attacks", "pwws", "--num-examples", 8)
    evaluate(run, "--attacks", "genetic", *GENETIC[3:], "--num-examples", 8)
    apart = [(run / name).read_text() for name in ("attacks.jsonl", "eval.json", "metrics.json")]
    evaluate(run, *GENETIC, "--num-examples", 8, "--overwrite")
    both = [(run / name).read_text() for name in ("attacks.jsonl", "eval.json", "metrics.json")]
    assert apart[0] == both[0] and json.loads(apart[1]) == json.loads(both[1]) and json.loads(apart[2]) == json.loads(both[2])
    evaluate(run, "--attacks", "pwws", "--num-examples", 6, "--overwrite")
    assert "genetic" not in json_of(run / "eval.json") and "genetic" not in json_of(run / "metrics.json")
    assert {line["attack"] for line in lines_of(run)} == {"pwws"}


def test_dev_has_files_of_its_own(run):
    before = (run / "metrics.json").read_bytes()
    evaluate(run, "--attacks", "pwws", "--split", "dev", "--num-examples", 5)
    assert before == (run / "metrics.json").read_bytes() and not (run / "eval.json").exists()
    assert json_of(run / "eval-dev.json")["settings"]["pwws"]["split"] == "dev"
    known = {data.to_text(x.words) for x in texts_of(run, "dev")}
    assert all(line["original"] in known for line in lines_of(run, "attacks-dev.jsonl"))


def test_a_run_that_is_never_right_is_not_attacked(run, capsys):
    """Clean and robust accuracy 0, nothing to count: no warning, no nan."""
    tensors, rest = eval.load_tensors(run / "model.safetensors")
    examples = texts_of(run)
    y = examples[int(np.random.default_rng(0).permutation(len(examples))[0])].y  # of the one text that is drawn
    for name in tensors:
        if name.startswith("head.2"):
            tensors[name].zero_()
    tensors["head.2.bias"][1 - y] = 1                                            # always the other class
    eval.save_tensors(run / "model.safetensors", tensors, rest)
    evaluate(run, "--attacks", "pwws", "hull", "--num-examples", 1)
    assert json_of(run / "eval.json")["clean"] == json_of(run / "eval.json")["pwws"] == 0 and lines_of(run) == []
    out = capsys.readouterr()
    assert "0.000 [0.000, " in out.out and "nan" not in out.out and "Warning" not in out.err


def test_fewer_texts_than_asked_for_is_said(run, capsys):
    evaluate(run, "--num-examples", 1000)
    assert "N is 16, not 1000" in capsys.readouterr().out and json_of(run / "eval.json")["num_examples"] == 16


def test_changes_are_marked():
    assert eval.marked("a good movie", "a great movie", False) == "a [good -> great] movie"
    assert eval.marked(["a film", "a good movie"], ("a film", "a great film"), False) == "a film | a [good -> great] [movie -> film]"
    colour = eval.marked("a good movie", "a great movie", True)
    assert "\033[" in colour and "->" not in colour and "good" in colour and "great" in colour


def test_successes_are_printed_with_their_changes(runs, capsys):
    """As many as --show of every run and attack, with the label that was and the one that is predicted now."""
    folders = [runs["texts"] / method for method in ("standard", "adv", "rift")]
    evaluate(*folders, "--attacks", "pwws", "hull", "--show", 1)
    out, fooled = " ".join(capsys.readouterr().out.split()), 0
    for folder in folders:
        for attack in ("pwws", "hull"):
            first = [line for line in lines_of(folder) if line["success"] and line["attack"] == attack][:1]
            for line in first:
                names = ("neg", "pos")
                assert (f"{folder}, {attack}: {names[line['label']]} -> {names[line['prediction']]} "
                        + eval.marked(line["original"], line["adversarial"], False)) in out
            fooled += len(first)
    assert fooled and out.count(" -> neg ") + out.count(" -> pos ") == fooled


# ------------------------------------------------------------------------------------------------ tables and constraints


def test_neighbors_replace_the_runs_own(run, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"movie": ["story"], "film": ["story"]}))
    evaluate(run, "--attacks", "pwws", "hull", "--neighbors", tmp_path / "other.json")
    for line in lines_of(run):
        for a, b in zip(line["original"].split(), line["adversarial"].split()):
            assert a == b or (a in ("movie", "film") and b == "story")


def test_pwws_wordnet_uses_wordnet_whatever_the_runs_table(run, monkeypatch):
    wordnet = {word: ["quite"] for word in ("the", "a", "this")}
    monkeypatch.setattr(data, "load_neighbors", lambda source=None, *rest: wordnet if source == "wordnet" else
                        LOAD_NEIGHBORS(source, *rest))
    evaluate(run, "--attacks", "pwws-wordnet", "pwws")
    changed = {name: {a for line in lines_of(run) if line["attack"] == name for a, b in
                      zip(line["original"].split(), line["adversarial"].split()) if a != b} for name in ("pwws-wordnet", "pwws")}
    assert changed["pwws-wordnet"] and changed["pwws-wordnet"] <= wordnet.keys()
    assert changed["pwws"] and changed["pwws"] <= TABLE.keys()
    settings = json_of(run / "eval.json")["settings"]
    assert settings["pwws-wordnet"]["neighbors"] != settings["pwws"]["neighbors"]


def score_lines(examples, score):
    """A score file of some examples' last texts. score(word, candidate) -> log p."""
    rows = []
    for n, x in enumerate(examples):
        rows.append(f"{n}\t{' '.join(x.words[-1]).title()}")
        for i, word in enumerate(x.words[-1]):
            rows += [f"{n}\t{i}\t{other}\t{score(word, other)}" for other in [word, *TABLE.get(word, [])] if word in TABLE]
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("layout", ["zip", "folder"])
def test_scores_draw_the_texts_and_filter_the_synonyms(run, tmp_path, capsys, layout):
    """N are drawn from the texts that the score file knows, and it says how many; what it finds unlikely is not used."""
    folder, examples = tmp_path / "scores", texts_of(run)
    files = folder / "lm_scores"
    files.mkdir(parents=True)
    (files / "texts_all.txt").write_text(score_lines(examples[:11], lambda a, b: -3.0 if b in (a, "film", "great") else -9.5))
    (files / "snli_all.txt").write_text("0\tA man\n")                            # the archive has a file a task
    if layout == "zip":
        shutil.make_archive(folder / "jia2019_cert_lm_scores", "zip", folder, "lm_scores")
        shutil.rmtree(files)
    evaluate(run, *GENETIC, "--lm-constraint", "scores", "--data-dir", folder)
    out = capsys.readouterr().out
    assert "knows 11 of the 16 test texts" in out and "N is 11, not 300" in out and "lm scores" in out
    assert {line["index"] for line in lines_of(run)} <= set(range(11))
    changes = {b for line in lines_of(run) if line["attack"] == "genetic" for a, b in
               zip(line["original"].split(), line["adversarial"].split()) if a != b}
    assert changes <= {"film", "great"}
    assert "drawn_from score file " in refused(capsys, run, "--attacks", "pwws", "--num-examples", 11)


def test_a_causal_language_model_filters_the_synonyms(run, tmp_path, monkeypatch):
    seen = []

    class Model:
        def __init__(self, name, device):
            assert name == "some/model"

        def __call__(self, windows):
            seen.extend(windows)
            return [-100.0 * window.count("film") for window in windows]

    monkeypatch.setattr(attacks, "CausalLM", Model)
    evaluate(run, *GENETIC, "--lm-constraint", "some/model")
    settings = json_of(run / "eval.json")["settings"]
    assert seen and settings["genetic"]["lm_constraint"] == "some/model" and "lm_constraint" not in settings["pwws"]
    assert not any(b == "film" != a for line in lines_of(run) if line["attack"] == "genetic"
                   for a, b in zip(line["original"].split(), line["adversarial"].split()))


def test_scores_are_the_default_of_the_papers_tasks(run, monkeypatch, capsys, tmp_path):
    """For imdb and snli the genetic attack wants the score file; without it the error names it and how to go without."""
    real = eval.open_task
    task = json_of(run / "config.json")["settings"]["task"]
    change(run, task="imdb")
    monkeypatch.setattr(eval, "open_task", lambda s, data_dir=None: real(s | {"task": task}, data_dir))

    def offline(url, path, *rest):
        raise data.InputError(f"{url}: offline, put it at {path}")

    monkeypatch.setattr(data, "download", offline)
    error = refused(capsys, run, "--attacks", "genetic")
    assert "jia2019_cert_lm_scores.zip" in error and "--lm-constraint none" in error
    evaluate(run, *GENETIC, "--lm-constraint", "none", "--num-examples", 4)
    evaluate(run, "--attacks", "pwws", "--num-examples", 4, "--overwrite")       # no language model in it


# ------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize("vary, axes", [((), 2), (("alpha",), 1), (("alpha", "beta"), 2)])
def test_figures_are_drawn(runs, tmp_path, capsys, vary, axes):
    """Forgetting per epoch; with several alpha or beta, accuracy over alpha and the trade-off."""
    pytest.importorskip("matplotlib")
    folders = [runs["texts"] / method for method in ("standard", "adv", "rift")]
    evaluate(*folders, "--attacks", "pwws")
    for n in range(len(vary) and 3):
        for method in ("adv", "rift"):
            folders.append(shutil.copytree(runs["texts"] / method, runs["texts"] / f"{method}-{n}"))
            change(folders[-1], **{key: 0.1 * 2 ** n if method == "rift" or key == "beta" else 0.5 for key in vary}, seed=n)
            (folders[-1] / "metrics.json").write_text(json.dumps(json_of(folders[-1] / "metrics.json") | {"seed": n}))
    evaluate(*folders, "--plot", tmp_path / "figure.png")
    image = (tmp_path / "figure.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n" and 10_000 < len(image) < 1_000_000
    width, height = int.from_bytes(image[16:20], "big"), int.from_bytes(image[20:24], "big")
    assert width == 720 * axes and height == 570
    assert [path.name for path in tmp_path.glob("*.tmp*")] == []
    evaluate(*folders, "--plot", tmp_path / "figure.svg", "--plot-attack", "hull")
    drawing = (tmp_path / "figure.svg").read_text()
    assert drawing.count('<g id="axes_') == axes


def test_plot_can_follow_attacks(run, tmp_path):
    pytest.importorskip("matplotlib")
    evaluate(run, "--attacks", "pwws", "--plot", tmp_path / "figure")            # no extension: a PNG
    assert (tmp_path / "figure").read_bytes()[1:4] == b"PNG" and (run / "attacks.jsonl").exists()


def test_dev_figures_show_the_best_epoch_of_the_log(run, monkeypatch, tmp_path):
    """--split dev draws what the epoch was chosen by, never the test split's accuracy."""
    pytest.importorskip("matplotlib")
    drawn, mean_and_range = [], eval.mean_and_range
    monkeypatch.setattr(eval, "mean_and_range", lambda rows, by, name: drawn.extend(rows) or mean_and_range(rows, by, name))
    other = shutil.copytree(run, run.parent / "other")
    change(other, alpha=0.9)
    evaluate(run, other, "--split", "dev", "--plot", tmp_path / "figure.png")
    best = max(lines_of(run, "log.jsonl"), key=lambda line: line["dev_hull"])
    assert {(row["clean"], row["hull"]) for row in drawn if "clean" in row} == {(best["dev_clean"], best["dev_hull"])}


def test_without_matplotlib_it_is_one_line(run, monkeypatch, capsys, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install matplotlib" in refused(capsys, run, "--plot", tmp_path / "figure.png")


# ------------------------------------------------------------------------------------------------ bad input


BAD_FLAGS = [
    (["--attacks", "hotflip"], "invalid choice: 'hotflip'"),
    (["--attacks"], "--attacks: expected at least one argument"),
    (["--num-examples", "0"], "--num-examples: '0' has to be an integer of at least 1"),
    (["--num-examples", "1e3"], "--num-examples: '1e3' has to be an integer"),
    (["--population", "1"], "--population: '1' has to be an integer of at least 2"),
    (["--generations", "0"], "--generations: '0' has to be an integer of at least 1"),
    (["--batch-size", "-4"], "--batch-size: '-4' has to be an integer of at least 1"),
    (["--seed", "-1"], "--seed: '-1' has to be an integer of at least 0"),
    (["--show", "-1"], "--show: '-1' has to be an integer of at least 0"),
    (["--split", "train"], "invalid choice: 'train'"),
    (["--precision", "fp16"], "invalid choice: 'fp16'"),
    (["--device", "warp"], "--device warp"),
    (["--attacks", "genetic", "--lm-constraint", "scores", "--data-dir", "/nowhere"], "/nowhere: "),
    (["--neighbors", "/nowhere.json"], "/nowhere.json: "),
    (["--neighbors", "table.csv"], "table.csv: wanted"),
    (["--num", "3"], "unrecognized arguments: --num 3"),
    (["--attacks", "genetic", "--lm-constraint", "/nowhere"], "--lm-constraint /nowhere: is neither none, scores nor"),
    (["--plot", "figure.docx"], "figure.docx: Format 'docx' is not supported"),
    (["--plot", "figure.png", "--plot-attack", "genetic"], "has not been attacked: run eval.py"),
    (["--plot-attack", "hotflip"], "invalid choice: 'hotflip'"),
]


@pytest.mark.parametrize("extra, message", BAD_FLAGS, ids=[" ".join(extra) for extra, _ in BAD_FLAGS])
def test_bad_flags_are_one_line(run, capsys, tmp_path, monkeypatch, extra, message):
    if "--plot" in extra:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    error = refused(capsys, run, *extra)
    assert message in error
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def tensors_without(path, start):
    """Takes the tensors of one kind out of a safetensors file."""
    with safetensors.safe_open(path, "pt") as file:
        kept, metadata = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(start)}, file.metadata()
    path.write_bytes(safetensors.torch.save(kept, metadata))


def pickle_instead(run):
    (run / "encoder" / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, run / "encoder" / "pytorch_model.bin")


def of_more_classes(run):
    change(run, labels=["neg", "pos", "so-so"])


def narrow_head(run):
    tensors, rest = eval.load_tensors(run / "model.safetensors")
    tensors["head.0.weight"] = tensors["head.0.weight"][:, :8]
    eval.save_tensors(run / "model.safetensors", tensors, rest)


def not_a_number(run):
    tensors, rest = eval.load_tensors(run / "model.safetensors")
    tensors["head.2.bias"].fill_(torch.nan)
    eval.save_tensors(run / "model.safetensors", tensors, rest)


def cut(name, keep):
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:keep])


def write(name, content):
    return lambda run: (run / name).write_bytes(content)


def other_width(run):
    config = json_of(run / "encoder" / "config.json") | {"hidden_size": 32}
    (run / "encoder" / "config.json").write_text(json.dumps(config))


def other_kind(run):
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=30, n_positions=16)).save_pretrained(run / "encoder")


DAMAGE = [
    ("no folder", shutil.rmtree, "config.json: No such file"),
    ("no config", lambda run: (run / "config.json").unlink(), "config.json: No such file"),
    ("config cut short", cut("config.json", 100), "config.json: is not JSON"),
    ("config is a list", write("config.json", b"[1, 2]"), "config.json: holds a list"),
    ("config is not text", write("config.json", b"\xff\xfe\x00"), "config.json: is not JSON"),
    ("config without settings", write("config.json", b"{}"), "config.json: has labels None"),
    ("a setting of another type", lambda run: change(run, max_len="long"), "config.json: has max_len 'long'"),
    ("labels are no list", lambda run: change(run, labels=3), "config.json: has labels 3"),
    ("too long for the encoder", lambda run: change(run, max_len=512), "max_len 512, the encoder positions for 34"),
    ("another method's config", lambda run: change(run, method="adv"), "config.json has method adv, metrics.json rift"),
    ("another task's classes", of_more_classes, "model.safetensors: g.2.0.bias is nothing there"),
    ("other data", lambda run: change(run, train_size=8), "was trained on other data than is found now"),
    ("the data is gone", lambda run: change(run, task="/nowhere"), "/nowhere"),
    ("unfinished", lambda run: (run / "metrics.json").unlink(), "is not finished (no metrics.json)"),
    ("metrics cut short", cut("metrics.json", 10), "metrics.json: is not JSON"),
    ("no table", lambda run: (run / "neighbors.json").unlink(), "neighbors.json: "),
    ("table cut short", cut("neighbors.json", 20), "neighbors.json: "),
    ("table of another kind", write("neighbors.json", b'{"good": "great"}'), "neighbors.json: "),
    ("no model", lambda run: (run / "model.safetensors").unlink(), "model.safetensors: not a readable checkpoint"),
    ("model cut short", cut("model.safetensors", -100), "model.safetensors: not a readable checkpoint"),
    ("model empty", write("model.safetensors", b""), "model.safetensors: not a readable checkpoint"),
    ("model is a pickle", lambda run: torch.save({"x": 1}, run / "model.safetensors"), "model.safetensors: not a readable"),
    ("model is not ours", lambda run: safetensors.torch.save_file({"x": torch.zeros(1)}, run / "model.safetensors"),
     "model.safetensors: not a readable checkpoint of this project"),
    ("no head", lambda run: tensors_without(run / "model.safetensors", "head."), "model.safetensors: head.0.bias is nothing"),
    ("narrow head", narrow_head, "model.safetensors: head.0.weight is (256, 8) there, the model needs (256, 16)"),
    ("not a number", not_a_number, "the victim returned a row"),
    ("no encoder", lambda run: shutil.rmtree(run / "encoder"), "encoder: no such folder"),
    ("encoder without weights", lambda run: (run / "encoder" / "model.safetensors").unlink(), "cannot be loaded"),
    ("encoder cut short", cut("encoder/model.safetensors", -64), "encoder: cannot be loaded"),
    ("encoder's config cut short", cut("encoder/config.json", 50), "encoder: cannot be loaded"),
    ("encoder is a pickle", pickle_instead, "encoder: cannot be loaded"),
    ("encoder lacks a layer", lambda run: tensors_without(run / "encoder/model.safetensors", "encoder.layer.1."),
     "encoder: 16 tensors are missing"),
    ("encoder lacks its pooler", lambda run: tensors_without(run / "encoder/model.safetensors", "pooler."),
     "encoder: 2 tensors are missing or of the wrong shape, pooler."),
    ("encoder of another width", other_width, "encoder: "),
    ("encoder of another kind", other_kind, "encoder: is a gpt2"),
    ("eval.json of another kind", write("eval.json", b'{"settings": {"pwws": 3}}'), "eval.json: has no settings"),
    ("eval.json cut short", write("eval.json", b'{"cle'), "eval.json: is not JSON"),
    ("lines without settings", write("attacks.jsonl", b"{}\n"), "attacks.jsonl: there is no eval.json"),
]


@pytest.mark.parametrize("damage, message", [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_a_damaged_run_is_refused_by_name(run, capsys, damage, message):
    damage(run)
    error = refused(capsys, run, "--attacks", "pwws")
    assert message in error and (str(run) in error or "/nowhere" in error), error


LINES = [
    (b"not json\n{}\n", "attacks.jsonl, line 1"),
    (b'{"index": 1}\n{}\n', "attacks.jsonl, line 1"),
    (b"3\n\n", "attacks.jsonl, line 1"),
    (b"\xff\xff\n{}\n", "attacks.jsonl, line 1"),
]


@pytest.mark.parametrize("content, message", LINES)
def test_damaged_lines_are_refused_by_number(run, capsys, content, message):
    evaluate(run, "--attacks", "pwws", "--num-examples", 4)
    (run / "attacks.jsonl").write_bytes(content)
    error = refused(capsys, run, "--attacks", "pwws", "--num-examples", 4)
    assert message in error and "is not a JSON object with index" in error


SCORES = [
    ("0\tthis movie\n0\t0\tthis\n", "scores.txt, line 2"),
    ("0\t0\tthis\t-3\n", "scores.txt, line 1"),
    ("0\tthis movie\n0\t5\tthis\t-3\n", "scores.txt, line 2"),
    ("0\tthis movie\n0\t0\tthis\tlow\n", "scores.txt, line 2"),
    ("0\tsome other text\n", "the score file knows no test text"),
    (None, "holds 0 .txt files"),
]


@pytest.mark.parametrize("content, message", SCORES)
def test_bad_score_files_are_one_line(run, capsys, tmp_path, content, message):
    folder = tmp_path / "data" / "lm_scores"
    folder.mkdir(parents=True)
    if content:
        (folder / "scores.txt").write_text(content)
    error = refused(capsys, run, "--attacks", "genetic", "--lm-constraint", "scores", "--data-dir", tmp_path / "data")
    assert message in error and "--lm-constraint none" in error


def test_wordnet_that_is_not_installed_is_one_line(run, capsys, monkeypatch):
    monkeypatch.setattr(data, "prepare_nltk", lambda data_dir=None, wordnet=False: wordnet and PREPARE_NLTK(data_dir, True))
    monkeypatch.setattr(data.nltk.data, "path", [])
    monkeypatch.setattr(data.nltk, "download", lambda *args, **kwargs: False)
    not_there = mock.Mock(ensure_loaded=mock.Mock(side_effect=LookupError))      # another test may have loaded it
    monkeypatch.setattr(data.nltk.corpus, "wordnet", not_there)
    error = refused(capsys, run, "--attacks", "pwws", "pwws-wordnet")
    assert "wordnet" in error and "nltk.downloader" in error
    assert not (run / "attacks.jsonl").exists()                                  # found before anything is attacked


def test_a_full_disk_is_one_line(run, capsys, monkeypatch):
    """What was there before stays."""
    evaluate(run, "--attacks", "pwws", "--num-examples", 4)
    before = (run / "attacks.jsonl").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.os, "replace", full)
    assert "No space left on device" in refused(capsys, run, "--attacks", "pwws", "--num-examples", 4)
    assert before == (run / "attacks.jsonl").read_bytes()


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        eval.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "paper" in out and "(default: None)" not in out and Path(eval.__file__).name in out


def test_seeds_are_averaged_by_method():
    """0.5 and 1.0 are 0.75 on average with a standard deviation of 0.354; a single run has no spread."""
    def run(*correct):
        return {"robust": {"clean": np.array(correct), "pwws": np.array(correct)}}

    methods = {"adv": [run(True, False), run(True, True)], "rift": [run(False, True)]}
    assert eval.seeds_table(methods, ["pwws"]) == [
        ["method", "runs", "clean", "pwws"],
        ["adv", "2", "0.750 (sd 0.354)", "0.750 (sd 0.354)"],
        ["rift", "1", "0.500", "0.500"]]                                         # one run has no spread


def test_runs_are_averaged_over_seeds_only():
    """Runs of one method with another alpha stand apart, and the name says so; where data lie sets nothing apart."""
    def run(**settings):
        return {"run": settings}

    runs = [run(method="adv", alpha=0.1, seed=0, data_dir="a"), run(method="adv", alpha=0.1, seed=1, data_dir="b"),
            run(method="rift", alpha=0.1, seed=0, data_dir="a"), run(method="rift", alpha=0.5, seed=0, data_dir="a")]
    assert eval.by_settings(runs) == {"adv": runs[:2], "rift alpha 0.1": [runs[2]], "rift alpha 0.5": [runs[3]]}


def test_differences_of_methods_are_as_uncertain_as_runs_and_texts():
    """0.75 - 0.25 of two runs each is 0.5; runs that agree leave the texts' uncertainty, runs that differ widen it."""
    rng = np.random.default_rng(0)
    better, worse = rng.random(100) < 0.75, rng.random(100) < 0.25
    _, low, high = eval.paired_bootstrap([better, better], [worse, worse])
    assert (low, high) == pytest.approx(eval.paired_bootstrap(better, worse)[1:], abs=1e-9)
    d, wide_low, wide_high = eval.paired_bootstrap([better, worse], [worse, worse])
    assert d == pytest.approx((better.mean() - worse.mean()) / 2) and wide_high - wide_low > high - low

    def run(correct):
        return {"robust": {"clean": correct, "pwws": correct}}

    head, row = eval.differences_table([("adv - standard", [run(better)] * 2, [run(worse)] * 2)], ["pwws"])
    assert head == ["difference", "clean", "pwws"] and row[0] == "adv - standard"
    assert all(cell.startswith(f"{better.mean() - worse.mean():+.3f} [") for cell in row[1:])
