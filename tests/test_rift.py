"""The method, stated as properties (rift.py).

The adversary never leaves the convex hull of a text's substitutions, starts where it is told to, climbs, and touches
no parameter; padding changes nothing. L_info is log N for a constant score, compares texts of one class only, and
reaches the projections but not the teacher. KL has its two sides the right way round. Mixout is unbiased and gone in
evaluation. Everything holds for BERT and RoBERTa, two classes and three.
"""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rift
from tests.conftest import tiny_encoder
from tests.golden import method_case

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def example(encoder, B=4, L=7, K=3, seed=1):
    """A random batch: texts of 4 to L tokens, up to K candidates at about half of their positions."""
    g = torch.Generator().manual_seed(seed)
    pad = encoder.config.pad_token_id
    ids = torch.randint(2, 60, (B, L), generator=g)
    lengths = torch.randint(4, L + 1, (B,), generator=g)
    lengths[0] = L
    attention_mask = (torch.arange(L) < lengths[:, None]).long()
    ids = ids.masked_fill(attention_mask == 0, pad)
    subs = torch.randint(2, 60, (B, L, K), generator=g)
    subs[..., 0] = ids
    n = torch.randint(1, K + 1, (B, L), generator=g) * attention_mask
    n[:, 0] = 1                                                      # a special token has only itself
    subs_mask = torch.arange(K) < n.clamp_min(1)[..., None]
    subs = subs.masked_fill(~subs_mask, pad)
    return dict(input_ids=ids, attention_mask=attention_mask, subs=subs, subs_mask=subs_mask)


def head_for(encoder, C=2):
    torch.manual_seed(3)
    return rift.mlp(encoder.config.hidden_size, 256, C)


def start(batch, seed=2):
    return rift.noise(batch["subs"], 300, torch.Generator().manual_seed(seed))


def kl_at(encoder, head, batch, w):
    """KL(clean || mixture), summed over the batch, computed from the definition."""
    e, E, free = rift.hull(encoder, batch["input_ids"], batch["subs"], batch["subs_mask"])
    text = batch["input_ids"], batch["attention_mask"]
    p = torch.softmax(head(rift.features(encoder, *text)), -1)
    q = torch.softmax(head(rift.features(encoder, *text, e=rift.mix(e, E, free, w[free]))), -1)
    return (p * (p / q).log()).sum().item()


# ------------------------------------------------------------------------------------------------ the hull


def test_the_adversary_stays_in_the_hull(encoder):
    """Its weights lie on the simplex of the real candidates, also after steps as large as lr 1 makes them."""
    batch = example(encoder)
    w = rift.adversary(encoder, head_for(encoder), **batch, v=start(batch))
    assert (w >= 0).all() and torch.allclose(w.sum(-1), torch.ones(w.shape[:2]))
    assert (w[~batch["subs_mask"]] == 0).all()
    single = batch["subs_mask"].sum(-1) == 1
    assert (w[..., 0][single] == 1).all()


def test_the_mixture_is_of_embeddings_after_the_layer_norm(encoder):
    """Half of one candidate and half of another is the mean of the two outputs of the embedding layer."""
    batch = example(encoder)
    e, E, free = rift.hull(encoder, batch["input_ids"], batch["subs"], batch["subs_mask"])
    b, l = free.nonzero()[0].tolist()
    w = torch.zeros(batch["subs"].shape)
    w[..., 0] = 1
    w[b, l] = torch.tensor([0.5, 0.5, 0.0])
    mixture = rift.mix(e, E, free, w[free])
    pair = []
    for k in (0, 1):
        ids = batch["input_ids"].clone()
        ids[b, l] = batch["subs"][b, l, k]
        pair.append(encoder.embeddings(input_ids=ids, position_ids=rift.positions_of(encoder, ids.shape[1]))[b, l])
    assert torch.allclose(mixture[b, l], (pair[0] + pair[1]) / 2, atol=1e-6)
    assert torch.equal(mixture[~free], e[~free])                    # positions without candidates stay what they are


def test_a_corner_of_the_hull_is_a_text(encoder):
    """All weight on candidates makes the features of the discrete text with those candidates."""
    batch = example(encoder)
    w = F.one_hot(batch["subs_mask"].sum(-1) - 1, batch["subs"].shape[-1]).float()        # the last candidate everywhere
    e, E, free = rift.hull(encoder, batch["input_ids"], batch["subs"], batch["subs_mask"])
    ids = rift.discrete(batch["subs"], w)
    mixture = rift.features(encoder, batch["input_ids"], batch["attention_mask"], e=rift.mix(e, E, free, w[free]))
    assert torch.allclose(mixture, rift.features(encoder, ids, batch["attention_mask"]), atol=1e-5)
    assert not torch.equal(ids, batch["input_ids"])


def test_features_are_the_encoders_own(encoder):
    """For padded texts too: our explicit positions are the ones that BERT and RoBERTa count themselves."""
    batch = example(encoder)
    text = batch["input_ids"], batch["attention_mask"]
    assert torch.allclose(rift.features(encoder, *text), encoder(*text).pooler_output, atol=1e-6)
    hidden, n = encoder(*text).last_hidden_state, batch["attention_mask"].sum(1)
    means = torch.stack([hidden[b, :n[b]].mean(0) for b in range(len(n))])
    assert torch.allclose(rift.features(encoder, *text, pooling="mean"), means, atol=1e-5)
    with pytest.raises(ValueError, match="pooling"):
        rift.features(encoder, *text, pooling="max")


def test_the_adversary_climbs(encoder):
    """Ten steps end at a larger KL than the start, and the start can be given."""
    batch, head = example(encoder), head_for(encoder)
    v = start(batch)
    w_0 = rift.adversary(encoder, head, **batch, v=v, steps=0)
    assert torch.allclose(w_0, rift.weights(v, batch["subs_mask"]))
    w = rift.adversary(encoder, head, **batch, v=v, sparsity=0.0)
    assert kl_at(encoder, head, batch, w) > 1.5 * kl_at(encoder, head, batch, w_0)
    assert torch.equal(w, rift.adversary(encoder, head, **batch, v=v, sparsity=0.0))


def test_the_training_adversary_knows_no_label_and_the_other_does(encoder):
    """With y the cross-entropy is climbed, so the two labels lead to different texts."""
    batch, head = example(encoder), head_for(encoder)
    v = start(batch)
    w = [rift.adversary(encoder, head, **batch, v=v, y=torch.full((4,), c), sparsity=0.0) for c in (0, 1)]
    assert not torch.allclose(w[0], w[1], atol=0.1)
    e, E, free = rift.hull(encoder, batch["input_ids"], batch["subs"], batch["subs_mask"])
    for c in (0, 1):
        p_0, p = [torch.softmax(head(rift.features(encoder, batch["input_ids"], batch["attention_mask"],
                                                   e=rift.mix(e, E, free, x[free]))), -1)[:, c].log().sum()
                  for x in (rift.weights(v, batch["subs_mask"]), w[c])]
        assert p < p_0                                                # the mixture has become less like class c


def test_sparsity_pushes_towards_single_words(encoder):
    batch, head = example(encoder), head_for(encoder)
    free = batch["subs_mask"].sum(-1) > 1
    H = [rift.entropy(rift.adversary(encoder, head, **batch, v=start(batch), sparsity=s)[free]).mean() for s in (0.0, 1e6)]
    assert H[1] < H[0] and H[1] < 0.05                                # nats; log 3 = 1.1 would be a uniform mixture


def test_the_search_leaves_the_model_alone(encoder):
    """No parameter gets a gradient, dropout is off during the search, and the mode is what it was."""
    encoder.train()
    batch, head = example(encoder), head_for(encoder)
    v = start(batch)
    w = rift.adversary(encoder, head, **batch, v=v)
    assert all(p.grad is None for m in (encoder, head) for p in m.parameters()) and not w.requires_grad
    assert encoder.training and all(m.training for m in encoder.modules())
    assert torch.equal(w, rift.adversary(encoder, head, **batch, v=v))                   # no dropout, or it would differ
    assert torch.equal(w, rift.adversary(encoder.eval(), head, **batch, v=v))
    assert not encoder.training


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_gradient_of_the_hull_is_the_same_each_time(kind):
    """On two threads too: candidates that occur often add their gradients up in one order, so that a seed is one run."""
    encoder = tiny_encoder(kind, hidden_size=64).eval()
    batch = example(encoder, B=256, L=5, K=9)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = []
        for _ in range(20):                                          # in any order, 19 of 20 would differ from the first
            e, E, free = rift.hull(encoder, batch["input_ids"], batch["subs"], batch["subs_mask"])
            (E * torch.randn(E.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
            gradients.append(encoder.embeddings.word_embeddings.weight.grad)
            encoder.zero_grad()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_padding_changes_nothing(encoder):
    """Three more positions and two more candidates, all masked: the same adversary, the same features."""
    batch, head = example(encoder), head_for(encoder)
    v = start(batch)
    pad = encoder.config.pad_token_id
    wide = dict(input_ids=F.pad(batch["input_ids"], (0, 3), value=pad), attention_mask=F.pad(batch["attention_mask"], (0, 3)),
                subs=F.pad(batch["subs"], (0, 2, 0, 3), value=pad), subs_mask=F.pad(batch["subs_mask"], (0, 2, 0, 3)))
    wide["subs_mask"][:, 7:, 0] = True                               # a padding position has only itself
    w = rift.adversary(encoder, head, **batch, v=v)
    w_wide = rift.adversary(encoder, head, **wide, v=F.pad(v, (0, 2, 0, 3)))
    assert torch.allclose(w, w_wide[:, :7, :3], atol=1e-4)


def test_a_batch_without_candidates_has_no_adversary(encoder):
    batch = example(encoder)
    batch["subs"], batch["subs_mask"] = batch["subs"][..., :1], batch["subs_mask"][..., :1]
    w = rift.adversary(encoder, head_for(encoder), **batch, v=start(batch))
    assert torch.equal(w, torch.ones(4, 7, 1))
    terms = rift.RIFT(encoder, 2).eval()(**batch, y=torch.tensor([0, 0, 1, 1]), w=w)
    assert terms["kl"].item() == pytest.approx(0, abs=1e-6)


def test_the_noise_is_a_constant_of_the_task():
    """Standard deviation sqrt(2 / (longest input * 10)), however short the batch: 0.0258 for 300 tokens."""
    for max_len, L in ((300, 300), (300, 20), (80, 20)):
        v = rift.noise(torch.zeros(2000, L // 10, 10), max_len, torch.Generator().manual_seed(0))
        assert v.std().item() == pytest.approx(math.sqrt(2 / (max_len * 10)), rel=0.02)


def test_every_candidate_has_the_same_chance_at_first():
    """Without noise the start is the uniform mixture of the real candidates; the masked ones get exactly 0."""
    w = rift.weights(torch.zeros(1, 1, 4), torch.tensor([[[True, True, True, False]]]))
    assert torch.allclose(w, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))
    assert rift.entropy(w).item() == pytest.approx(math.log(3))


# ------------------------------------------------------------------------------------------------ the losses


def test_kl_is_from_clean_to_adversarial():
    """sum p log(p/q) with p the clean side, the mean over texts; KL(p||q) and KL(q||p) differ here: 0.28 and 0.35."""
    p, q = torch.tensor([[0.90, 0.10], [0.6, 0.4]]), torch.tensor([[0.5, 0.5], [0.3, 0.7]])
    right, wrong = ((a * (a / b).log()).sum(-1).mean() for a, b in ((p, q), (q, p)))
    assert abs(right - wrong) > 0.05
    assert torch.allclose(rift.kl_divergence(p.log() + 3, q.log() - 1), right)            # logits: shifts do not matter


def test_kl_teaches_both_sides():
    clean, adversarial = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    rift.kl_divergence(clean, adversarial).backward()
    assert clean.grad.abs().sum() > 0 and adversarial.grad.abs().sum() > 0


@pytest.mark.parametrize("N", [2, 5, 16])
def test_info_nce_is_log_n_for_a_constant_score(N):
    """All s equal: no score tells the right s_i from the others. The bound on the information is then 0."""
    s, t = torch.ones(N, 8), torch.randn(N, 8)
    assert rift.info_nce(s, t).item() == pytest.approx(math.log(N), abs=1e-5)


def test_info_nce_is_the_equation():
    """For each t_j the sum below the fraction runs over i, the s_i; the other axis gives another number."""
    torch.manual_seed(0)
    s, t, tau = torch.randn(5, 8), torch.randn(5, 8), 0.3
    f = [[F.cosine_similarity(s[i], t[j], 0).item() / tau for j in range(5)] for i in range(5)]
    right = -sum(math.log(math.exp(f[j][j]) / sum(math.exp(f[i][j]) for i in range(5))) for j in range(5)) / 5
    wrong = -sum(math.log(math.exp(f[j][j]) / sum(math.exp(f[j][i]) for i in range(5))) for j in range(5)) / 5
    assert abs(right - wrong) > 1e-3
    assert rift.info_nce(s, t, tau).item() == pytest.approx(right, abs=1e-5)


def test_info_nce_is_small_for_features_that_know_each_other():
    s = torch.eye(6)
    assert rift.info_nce(s, s, tau=0.05).item() < 1e-6 < math.log(6) < rift.info_nce(s, -s, tau=0.05).item()


def projections(C, H=16):
    torch.manual_seed(5)
    return [rift.mlp(H, 512, 256) for _ in range(C)], [rift.mlp(H, 512, 256) for _ in range(C)]


@pytest.mark.parametrize("C", [2, 3, 5])
def test_l_info_compares_texts_of_one_class(C):
    """It is the mean over classes of info_nce with that class's projections: other classes are no competitors."""
    g, h = projections(C)
    S, T, y = torch.randn(4 * C, 16), torch.randn(4 * C, 16), torch.arange(C).repeat(4)
    parts = [rift.info_nce(g[c](S[y == c]), h[c](T[y == c])) for c in range(C)]
    assert torch.allclose(rift.L_info(S, T, y, g, h), torch.stack(parts).mean(), atol=1e-5)
    T_other = torch.where((y == 0)[:, None], T, torch.randn_like(T))                      # everything but class 0 differs
    S_other = torch.where((y == 0)[:, None], S, torch.randn_like(S))
    other = rift.L_info(S_other, T_other, y, g, h) * C
    rest = sum(rift.info_nce(g[c](S_other[y == c]), h[c](T_other[y == c])) for c in range(1, C))
    assert torch.allclose(other - rest, parts[0], atol=1e-4)


def test_each_class_has_projections_of_its_own():
    """Swapping two classes' projections changes L_info, and each class moves its own only."""
    g, h = projections(2)
    S, T, y = torch.randn(8, 16), torch.randn(8, 16), torch.tensor([0] * 4 + [1] * 4)
    assert abs(rift.L_info(S, T, y, g, h) - rift.L_info(S, T, y, g[::-1], h[::-1])) > 1e-4
    rift.info_nce(g[0](S[:4]), h[0](T[:4])).backward()
    assert g[0][0].weight.grad is not None and g[1][0].weight.grad is None
    model = rift.RIFT(tiny_encoder("bert"), 3)
    assert len({p.data_ptr() for part in (model.g, model.h) for p in part.parameters()}) == 2 * 3 * 4
    marginal = rift.RIFT(tiny_encoder("bert"), 3, marginal=True)
    assert len(marginal.g) == len(marginal.h) == 1


def test_the_marginal_bound_takes_the_whole_batch():
    model = rift.RIFT(tiny_encoder("bert"), 2, marginal=True).eval()
    batch, y = example(model.encoder), torch.tensor([0, 0, 1, 1])
    T = rift.features(model.teacher, batch["input_ids"], batch["attention_mask"])
    w = rift.weights(start(batch), batch["subs_mask"])
    info = model(**batch, y=y, w=w, T=T)["info"]
    e, E, free = rift.hull(model.encoder, batch["input_ids"], batch["subs"], batch["subs_mask"])
    S = rift.features(model.encoder, batch["input_ids"], batch["attention_mask"], e=rift.mix(e, E, free, w[free]))
    assert torch.allclose(info, rift.info_nce(model.g[0](S), model.h[0](T)), atol=1e-5)


# ------------------------------------------------------------------------------------------------ the model


def test_the_teacher_is_frozen_and_never_drops_out(encoder):
    """Equal to the encoder at first (RoBERTa's random pooler too), always in eval mode, without gradients."""
    model = rift.RIFT(encoder, 2).train()
    assert model.encoder.training and not any(m.training for m in model.teacher.modules())
    assert all(torch.equal(s, t) for s, t in zip(model.encoder.parameters(), model.teacher.parameters()))
    batch, y = example(encoder), torch.tensor([0, 0, 1, 1])
    T = rift.features(model.teacher, batch["input_ids"], batch["attention_mask"])
    w = rift.adversary(model.encoder, model.head, **batch, v=start(batch))
    terms = model(**batch, y=y, w=w, T=T)
    sum(terms.values()).backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    for part in (model.encoder, model.head, model.g, model.h):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_only_the_terms_asked_for_are_computed():
    model = rift.RIFT(tiny_encoder("bert"), 2).eval()
    batch, y = example(model.encoder), torch.tensor([0, 0, 1, 1])
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    w = rift.weights(start(batch), batch["subs_mask"])
    T = torch.randn(4, 16)
    assert set(model(**text, y=y)) == {"ce"}
    assert set(model(**batch, y=y, w=w)) == {"ce", "kl"}
    assert set(model(**batch, y=y, w=w, T=T)) == {"ce", "kl", "info"}
    assert set(model(**batch, y=y, w=w, ptwd=True)) == {"ce", "kl", "ptwd"}


def test_distance_to_the_pretrained_weights():
    """1e-5 at first (the root of the 1e-10 that keeps its gradient finite), then the Euclidean distance."""
    model = rift.RIFT(tiny_encoder("bert"), 2)
    assert rift.pretrained_distance(model.encoder, model.teacher).item() == pytest.approx(1e-5)
    with torch.no_grad():
        model.encoder.embeddings.word_embeddings.weight[3, 4] += 3
        model.encoder.pooler.dense.bias[0] += 4
    assert rift.pretrained_distance(model.encoder, model.teacher).item() == pytest.approx(5)


def test_mixout_is_unbiased_and_reaches_linear_layers_only(encoder):
    """Over many draws its mean is theta_s; every entry is (theta_s - p theta_t)/(1-p) or theta_t; p = 0 is theta_s."""
    model = rift.RIFT(encoder, 2)
    with torch.no_grad():
        for p in model.encoder.parameters():
            p += 0.1 * torch.randn_like(p)
    name, p = "encoder.layer.0.attention.self.query.weight", 0.7
    theta_s, theta_t = (dict(m.named_parameters())[name].detach() for m in (model.encoder, model.teacher))
    torch.manual_seed(0)
    draws = torch.stack([rift.mixout(model.encoder, model.teacher, p)[name].detach() for _ in range(3000)])
    # one entry has standard deviation |theta_s - theta_t| sqrt(p / (1-p)): 4 standard errors of the mean
    error = 4.5 * (theta_s - theta_t).abs() * math.sqrt(p / (1 - p) / 3000) + 1e-5
    assert ((draws.mean(0) - theta_s).abs() < error).all()
    kept = torch.isclose(draws[0], (theta_s - p * theta_t) / (1 - p), atol=1e-5)
    assert (kept | torch.isclose(draws[0], theta_t, atol=1e-5)).all() and 0.15 < kept.float().mean() < 0.45
    mixed = rift.mixout(model.encoder, model.teacher, p)
    assert "pooler.dense.bias" in mixed and not any("embeddings" in key or "LayerNorm" in key for key in mixed)
    assert all(torch.allclose(value, dict(model.encoder.named_parameters())[key], atol=1e-6)
               for key, value in rift.mixout(model.encoder, model.teacher, 0.0).items())
    with pytest.raises(ValueError, match="mixout"):
        rift.mixout(model.encoder, model.teacher, 1.0)


def test_mixout_is_gone_in_evaluation_and_teaches_the_encoder():
    model = rift.RIFT(tiny_encoder("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), 2).train()
    with torch.no_grad():
        for p in model.encoder.parameters():
            p += 0.1 * torch.randn_like(p)
    before = {name: p.clone() for name, p in model.encoder.named_parameters()}
    batch, y = example(model.encoder), torch.tensor([0, 0, 1, 1])
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    plain = model(**text, y=y)["ce"].item()
    loss = model(**text, y=y, mixout_p=0.7)["ce"]
    assert abs(loss.item() - plain) > 1e-3                            # in training it acts
    loss.backward()
    assert model.encoder.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0
    assert model.eval()(**text, y=y, mixout_p=0.7)["ce"].item() == pytest.approx(plain, abs=1e-6)
    assert all(torch.equal(before[name], p) for name, p in model.encoder.named_parameters())


def test_autocast_rounds_the_encoder_but_not_the_losses():
    """In a bfloat16 region the losses come out in float32 and stay within 2% of those without it."""
    model = rift.RIFT(tiny_encoder("bert", initializer_range=0.1), 2).eval()
    batch, y = example(model.encoder), torch.tensor([0, 0, 1, 1])
    w, T = rift.weights(start(batch), batch["subs_mask"]), torch.randn(4, 16)
    exact = model(**batch, y=y, w=w, T=T)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch, y=y, w=w, T=T)
    for name in ("ce", "info"):
        assert rounded[name].dtype == torch.float32
        assert rounded[name].item() == pytest.approx(exact[name].item(), rel=0.02)
        assert rounded[name].item() != exact[name].item()             # the encoder was rounded


def test_linear_cka():
    """1 for a rotated and scaled copy, near 0 for unrelated features, and symmetric."""
    torch.manual_seed(0)
    S = torch.randn(400, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert rift.linear_cka(S, 3 * S @ rotation + 5) == pytest.approx(1, abs=1e-5)
    other = torch.randn(400, 8)
    assert rift.linear_cka(S, other) < 0.1
    assert rift.linear_cka(S, other) == pytest.approx(rift.linear_cka(other, S))


# ------------------------------------------------------------------------------------------------ recorded numbers


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the recorded numbers of the authors' code are not there")
@pytest.mark.parametrize("name", ["bert_y2_seed0", "bert_y3_seed1"])
def test_the_authors_numbers(name):
    """Adversary, logits, losses and gradient norms to 1e-3; the discrete text word for word."""
    ours = method_case(GOLDEN / name)
    for key, recorded in np.load(GOLDEN / name / "case.npz", allow_pickle=False).items():
        if key in ("w_adv", "logits_clean", "logits_adv"):
            assert np.abs(np.array(ours[key]) - recorded).max() < 1e-3
        elif key.startswith("loss_") or key == "params_l2":
            assert ours[key] == pytest.approx(float(recorded), rel=1e-3)
        elif key == "adv_ids_ce":
            assert ours[key] == recorded.tolist()
    norms = json.loads((GOLDEN / name / "grad_norms.json").read_text())
    assert ours["grad_norms"].keys() == norms.keys()
    for key, norm in norms.items():
        assert ours["grad_norms"][key] == pytest.approx(norm, rel=1e-3, abs=1e-6)
