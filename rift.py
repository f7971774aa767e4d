"""Robust Informative Fine-Tuning (RIFT): the method, in the paper's symbols.

Dong, Luu, Lin, Yan, Zhang, "How Should Pre-Trained Language Models Be Fine-Tuned Towards
Adversarial Robustness?", NeurIPS 2021 (arXiv 2112.11668). The convex hull of word substitutions is
ASCC's: Dong et al., "Towards Robustness Against Natural Language Word Substitutions", ICLR 2021.

    x        a text, y its label, C classes     S = F_s(.)  features, encoder being fine-tuned
    x^       the worst point near x             T = F_t(.)  features, frozen pre-trained encoder
    q(y|s)   the task head                      g_c, h_c    projections of S and T for class c

    I(S;Y,T) = I(S;Y) + I(S;T|Y): L_task bounds the first, L_info (S of x^, T of x) the second
    loss = L_task + alpha * L_info
    L_task = E[ -log q(y|S) + beta * KL( q(.|F_s(x)) || q(.|F_s(x^)) ) ]
    I(S;T|Y) >= log N - L_info

In training x^ is no text: each of its words is a mixture, by the weights w, of the embeddings of
its candidates. The adversary returns w, and RIFT.forward makes x^ from it.

In this file: token ids -> embeddings -> features; the hull and the adversary in it; the losses;
how much was forgotten; the model; the methods as sums of terms.

Shapes: B texts, L tokens, K candidates for each token (candidate 0 is the token itself), H hidden
units, P positions in the batch that have more than one candidate, N texts of one class. A mask of
candidates is True where there is one.
"""
import copy
import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ---- S = F_s(x): token ids -> embeddings -> features ---------------------------------------------


def position_ids(encoder, L):
    """Position ids (1, L) int64 of the L tokens of a text: from 0 in BERT, from 2 in RoBERTa.

    They are passed explicitly: hull() embeds candidates in one row that is no text, and RoBERTa
    would count positions from its token ids.
    """
    first = getattr(encoder.embeddings, "padding_idx", -1) + 1
    return torch.arange(first, first + L, device=encoder.device).unsqueeze(0)


def embed(encoder, input_ids, positions=None):
    """e(c, l): the output of the whole embedding layer (word + position + type, norm, dropout).

    input_ids: (B, L) int64; positions: (1, L) int64, by default those of a text of L tokens.
    Returns (B, L, H).
    """
    if positions is None:
        positions = position_ids(encoder, input_ids.shape[1])
    types = torch.zeros_like(input_ids)
    return encoder.embeddings(input_ids=input_ids, token_type_ids=types, position_ids=positions)


def features(encoder, e, attention_mask, pooling="pooler"):
    """F(x): the pooled output of a BERT or RoBERTa encoder, as a function of embeddings.

    encoder: a Hugging Face BertModel or RobertaModel; e: (B, L, H), from embed() or mix();
    attention_mask: (B, L) int64; pooling: "pooler" (the encoder's own, reads the first token) or
    "mean" over the text's tokens, special tokens included. Returns (B, H) float32, also where the
    layers compute in bf16. The layers are called one by one, so that for the pooler the last
    one computes only the first token. Raises ValueError for another pooling, for the pooler of an
    encoder without one, and for an encoder in training mode with gradient checkpointing on, which
    would not work here.
    """
    if pooling not in ("pooler", "mean"):
        raise ValueError(f"pooling is {pooling!r}: it has to be 'pooler' or 'mean'")
    if pooling == "pooler" and encoder.pooler is None:
        raise ValueError("pooling is 'pooler', but the encoder has none: load it with "
                         "add_pooling_layer=True, or take the pooling 'mean'")
    *layers, last = encoder.encoder.layer
    if encoder.training and getattr(last, "gradient_checkpointing", False):
        raise ValueError("gradient checkpointing is on: encoder.gradient_checkpointing_disable() "
                         "turns it off")
    e = e.to(last.output.dense.weight.dtype)                                    # (B, L, H)
    mask = torch.zeros_like(attention_mask, dtype=e.dtype)                      # (B, L)
    mask = mask.masked_fill(attention_mask == 0, torch.finfo(e.dtype).min)
    mask = mask[:, None, None]                          # (B, 1, 1, L), added to attention's scores
    for layer in layers:
        e = transformer_layer(layer, e, e, mask)
    if pooling == "pooler":
        return encoder.pooler(transformer_layer(last, e[:, :1], e, mask)).float()           # (B, H)
    e = transformer_layer(last, e, e, mask).float()
    m = attention_mask.unsqueeze(-1).float()                                    # (B, L, 1)
    return (e * m).sum(1) / m.sum(1)                                            # (B, H)


def transformer_layer(layer, x, e, mask):
    """One layer's output for the tokens x (B, Q, H), which attend to all tokens e (B, L, H).

    layer: a Hugging Face BertLayer or RobertaLayer; mask: (B, 1, 1, L), added to the scores.
    Returns (B, Q, H).
    """
    attention = layer.attention.self
    heads = attention.num_attention_heads
    p = attention.dropout.p if layer.training else 0.0
    q, k, v = (linear(y).unflatten(-1, (heads, -1)).transpose(1, 2)     # (B, heads, Q or L, d)
               for linear, y in [(attention.query, x), (attention.key, e), (attention.value, e)])
    # torch's fused attention is the fastest, but on CPUs its gradient is slow
    if e.device.type == "cpu" and q.requires_grad:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                # (B, heads, Q, L)
        scores += mask
        attended = F.dropout(scores.softmax(-1), p) @ v                         # (B, heads, Q, d)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    attended = layer.attention.output(attended.transpose(1, 2).flatten(2), x)   # (B, Q, H)
    return layer.output(layer.intermediate(attended), attended)


@contextmanager
def dropout_off(*modules):
    """In a `with` block, every submodule is in eval mode; afterwards each has its old mode."""
    before = {m: m.training for module in modules for m in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for m, mode in before.items():
            m.training = mode


@contextmanager
def stand_in(module, tensors):
    """In a `with` block, the module computes with these tensors in place of its parameters.

    tensors: {parameter name: tensor}; gradients flow through them to what they were computed from.
    Used for weights in bf16, for weights without gradient, and for mixout. (A module keeps its
    parameters in its dict _parameters.)
    """
    owners = {name: module.get_submodule(name.rpartition(".")[0])._parameters for name in tensors}
    own = {name: owner[name.rpartition(".")[2]] for name, owner in owners.items()}
    try:
        for name, owner in owners.items():
            owner[name.rpartition(".")[2]] = tensors[name]
        yield
    finally:
        for name, owner in owners.items():
            owner[name.rpartition(".")[2]] = own[name]


def parameters_in(encoder, dtype):
    """{name: tensor} for stand_in(): the encoder's parameters, its layers and pooler in `dtype`.

    The embedding layer stays in float32: it is large, and a batch uses only a few of its rows.
    """
    return {name: p if name.startswith("embeddings.") else p.to(dtype)
            for name, p in encoder.named_parameters()}


# ---- The convex hull of a text's substitutions (ASCC), and the adversary in it -------------------


def hull(encoder, input_ids, subs, subs_mask):
    """The corners of the hull: the embedding e(c_lk, l) of every candidate, layer norm included.

    input_ids: (B, L) int64; subs: (B, L, K) int64 candidate ids; subs_mask: (B, L, K) bool.
    Returns e (B, L, H) of the text itself, E (P, K, H) of the candidates at the P positions that
    have more than one, and free (B, L) bool, which marks these positions. Elsewhere the hull is the
    single point e. e and E are float32.
    """
    L = input_ids.shape[1]
    e = embed(encoder, input_ids)                                               # (B, L, H)
    free = subs_mask.sum(-1) > 1                                                # (B, L)
    l = free.nonzero()[:, 1]                                                    # (P,)
    # Texts share candidates: each (candidate, position) pair of the batch, here one number, is
    # embedded once, and with dropout on has one mask. (The text's own e has another.)
    pairs = subs[free] * L + l.unsqueeze(-1)                                    # (P, K)
    pairs, where = torch.unique(pairs, return_inverse=True)                     # (M,), (P, K)
    positions = position_ids(encoder, L)[:, pairs % L]                          # (1, M)
    rows = embed(encoder, (pairs // L).unsqueeze(0), positions)[0]              # (M, H)
    # F.embedding, not rows[where]: with several threads, the gradient of indexing is summed in an
    # order that changes from run to run.
    return e.float(), F.embedding(where, rows.float()), free


def weights(v, subs_mask):
    """w_l = softmax_k(v_l * mask + 500 * (mask - 1)): a point of the simplex over real candidates.

    v: (.., K) float; subs_mask: (.., K) bool. Returns (.., K); rows sum to 1 (uniform where all
    candidates are masked).
    """
    m = subs_mask.to(v.dtype)
    return torch.softmax(v * m + 500 * (m - 1), dim=-1)


def mix(e, E, free, w):
    """e^_l = sum_k w_lk * e(c_lk, l): the embeddings, each free position at a point of its hull.

    e: (B, L, H); E: (P, K, H); free: (B, L) bool; w: (P, K), the rows w[free] of an adversary's w.
    Returns (B, L, H).
    """
    return e.index_put((free,), torch.einsum("pk,pkh->ph", w, E))


def entropy(w):
    """H(w_l) = - sum_k w_lk log w_lk, in nats. w: (.., K). Returns (..)."""
    return -(w * w.clamp_min(1e-30).log()).sum(-1)      # not 0 * log 0, which would be nan


def noise(shape, max_len, generator=None):
    """Where the adversary starts: v ~ N(0, 2 / (max_len * 10)).

    Kaiming's variance for the shape that the authors' code pads to, max_len (300 or 80) positions
    with 10 candidates. It stays that constant, so that padding less does not change the method.
    Returns a float32 tensor of the shape, drawn on the CPU: the same numbers on every device.
    """
    return torch.randn(shape, generator=generator) * math.sqrt(2 / (max_len * 10))


def adversary(encoder, head, input_ids, attention_mask, subs, subs_mask, v, y=None, *,
              pooling="pooler", steps=10, lr=1.0, weight_decay=2e-5, sparsity=15.0):
    """The mixing weights w of the worst point of the hull, x^ = mix(e, E, free, w[free]).

        max over v of   gain(x^(v)) - sparsity * sum_l H(w_l) / (300 * 128),   by Adam's ascent

    Without y, the self-supervised adversary of training: the gain is KL( q(.|F_s(x)) ||
    q(.|F_s(x^)) ), which compares with the model's own prediction. With y (B,) int64 it is
    -log q(y|F_s(x^)). Both are summed over the batch. The entropy term pushes w towards a single
    word; its divisor is the authors' constant, whatever the shape.
    head: a module, (B, H) -> (B, C) logits; v: (B, L, K), the start, see noise(); weight_decay: L2
    on v; the rest as in hull() and features(). Dropout is off and no parameter gets a gradient
    meanwhile.
    Returns w (B, L, K) float32, rows on the simplex, without a gradient.
    """
    # without gradients for them, torch keeps less of each forward pass
    constants = {name: p.detach() for name, p in encoder.named_parameters()}
    with dropout_off(encoder, head), stand_in(encoder, constants):
        def predict(e):
            return head(features(encoder, e, attention_mask, pooling))          # (B, C)

        with torch.no_grad():
            e, E, free = hull(encoder, input_ids, subs, subs_mask)
            clean = predict(e) if y is None else None
        # only the positions that have a choice are searched
        v_free = v[free].requires_grad_()                                       # (P, K)
        real = subs_mask[free]                                                  # (P, K)
        adam = torch.optim.Adam([v_free], lr=lr, weight_decay=weight_decay)
        for _ in range(steps if len(v_free) else 0):
            with torch.enable_grad():                   # also under the caller's no_grad
                w = weights(v_free, real)
                q = predict(mix(e, E, free, w))
                gain = (kl_divergence(clean, q) * len(q) if y is None else      # a mean * B: a sum
                        F.cross_entropy(q, y, reduction="sum"))
                value = gain - sparsity * entropy(w).sum() / (300 * 128)
                v_free.grad = torch.autograd.grad(-value, v_free)[0]
            adam.step()
        return weights(v.index_put((free,), v_free.detach()), subs_mask)


# ---- The losses ----------------------------------------------------------------------------------


def kl_divergence(clean, adversarial):
    """KL( q(.|F_s(x)) || q(.|F_s(x^)) ), mean over the batch, in nats; both sides get a gradient.

    clean, adversarial: logits (B, C). Returns a scalar. Log-softmaxes on both sides: with
    probabilities as targets the gradient is NaN once one of them underflows.
    """
    clean, adversarial = F.log_softmax(clean, -1), F.log_softmax(adversarial, -1)
    # torch's kl_div(log q, log p) is KL(p || q)
    return F.kl_div(adversarial, clean, reduction="batchmean", log_target=True)


def f_c(s, t, tau=0.2):
    """The score f_c(s_i, t_j) = cos(s_i, t_j) / tau of projected features s = g_c(S), t = h_c(T).

    s, t: (N, D). Returns (N, N). To try another score, replace this function.
    """
    return F.normalize(s, dim=-1) @ F.normalize(t, dim=-1).T / tau


def info_nce(s, t, tau=0.2):
    """The contrastive bound (van den Oord et al. 2018): I(S;T) >= log N - info_nce.

        info_nce = -(1/N) sum_j log( exp f_c(s_j, t_j) / sum_i exp f_c(s_i, t_j) )

    The competitors of t_j are the other s_i. s, t: (N, D), row j of both from one text. Returns a
    scalar in nats: log N for a constant score.
    """
    return -F.log_softmax(f_c(s, t, tau), dim=0).diagonal().mean()              # softmax over i


def L_info(S, T, y, g, h, tau=0.2):
    """The loss that holds on to what pre-training knew: I(S;T|Y) >= log N - L_info.

        L_info = mean over c of info_nce( g_c(S), h_c(T) ) over the N texts of class c in the batch

    S: (B, H), features of adversarial texts; T: (B, H), of the clean ones; y: (B,) int64; g, h: one
    projection for each class. The mean is over the classes in the batch. The marginal form, a bound
    on I(S;T), is the same with one pair of projections and every y equal to 0. Returns a scalar in
    nats. Raises ValueError for a label without projections.
    """
    if not 0 <= y.min() <= y.max() < min(len(g), len(h)):
        raise ValueError(f"y has labels {y.min().item()} to {y.max().item()}, but there are "
                         f"{len(g)} projections g and {len(h)} projections h")
    return torch.stack([info_nce(g[c](S[y == c]), h[c](T[y == c]), tau)
                        for c in y.unique().tolist()]).mean()


def gather(x):
    """The x (b, ..) of all processes, joined: (B, ..). Only this process's part has a gradient.

    Every process computes the same L_info, of all texts, but only its own texts have a gradient.
    train.average later divides the sum of the gradients by the number of processes, so here the
    gradient of x is multiplied by that number; its value stays. A single process gets x back.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    x = x + (len(parts) - 1) * (x - x.detach())         # the same value, a larger gradient
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def pretrained_distance(encoder, teacher):
    """||theta_s - theta_t||_2 = sqrt(1e-10 + sum (theta_s - theta_t)^2), over the whole encoder.

    The regulariser of adv-ptwd, and how far fine-tuning has moved the weights. Returns a scalar.
    """
    pairs = zip(encoder.parameters(), teacher.parameters())
    return torch.sqrt(1e-10 + sum((s - t).square().sum() for s, t in pairs))


def mixout(encoder, teacher, p):
    """Mixout (Lee et al. 2020) of the weights and biases of the encoder's linear layers.

        (m * theta_t + (1 - m) * theta_s - p * theta_t) / (1 - p),   m ~ Bernoulli(p) for each entry

    Returns {name: tensor} for stand_in(): the encoder itself is untouched, gradients reach theta_s.
    Raises ValueError unless 0 <= p < 1.
    """
    if not 0 <= p < 1:
        raise ValueError(f"mixout is {p}: a probability from 0 up to, but not including, 1")
    theta_t = dict(teacher.named_parameters())
    mixed = {}
    for path, module in encoder.named_modules():
        if isinstance(module, nn.Linear):
            for name, theta_s in module.named_parameters(path):
                m = torch.rand_like(theta_s) < p
                mixed[name] = (torch.where(m, theta_t[name], theta_s) - p * theta_t[name]) / (1 - p)
    return mixed


# ---- How much was forgotten: similarity of S and T on held-out texts -----------------------------


def debiased_cka(S, T):
    """Debiased linear CKA (Nguyen et al. 2021): how alike S and T arrange the same texts.

        CKA = HSIC_1(SS', TT') / sqrt( HSIC_1(SS', SS') * HSIC_1(TT', TT') )

    with the unbiased HSIC_1 of Song et al. (2012): 0 on average for features that have nothing to
    do with each other, where the plain estimate is far above 0: about H / (N + H) for independent
    normal features. S, T: (N, H), N >= 4.
    Returns a float: 1 for features equal up to rotation and scale, 0 if one is the same everywhere.
    Raises ValueError for fewer than 4 texts.
    """
    N = len(S)
    if N < 4:
        raise ValueError(f"debiased CKA needs at least 4 texts, not {N}")
    if any((X - X.mean(0)).norm() <= 1e-5 * X.norm() for X in (S, T)):
        return 0.0                                      # what is left of it is rounding
    S, T = S.cpu().double(), T.cpu().double()           # not every accelerator has float64
    S, T = S - S.mean(0), T - T.mean(0)                 # HSIC_1 stays the same

    def hsic(X, Y):
        """HSIC_1 of K = XX' and M = YY' without the factor 1 / (N (N - 3)), which cancels. Its
        definition sets their diagonals k and m to 0. As X and Y are centred, the rows of K and M
        sum to 0, then to -k and -m, so that K and M, (N, N), themselves are not needed."""
        k, m = X.square().sum(1), Y.square().sum(1)                             # (N,)
        return ((X.T @ Y).square().sum() - N / (N - 2) * (k @ m)
                + k.sum() * m.sum() / ((N - 1) * (N - 2)))

    return (hsic(S, T) / (hsic(S, S) * hsic(T, T)).clamp_min(1e-30).sqrt()).item()


def retained(S, T, y, S_dev, T_dev, y_dev):
    """How much of what T knows within classes can be read off S: a linear stand-in for I(S;T|Y).

        R^2 = 1 - sum ||T - T^||^2 / sum ||T - mean of T's class||^2   over the dev texts

    where T^ is predicted from S by a ridge regression. The class means, the regression and its
    ridge (chosen by leave-one-out) come from the training texts alone. S, T: (N, H), y: (N,) int64,
    of training texts; S_dev, T_dev, y_dev: of dev texts. Returns a float: 1 if all of T can be read
    off S linearly, 0 or below if nothing can.
    """
    # not every accelerator has float64
    S, T, y, S_dev, T_dev, y_dev = (X.cpu() for X in (S, T, y, S_dev, T_dev, y_dev))

    def within_classes(X, X_dev):
        X, X_dev = X.double(), X_dev.double()
        means = torch.stack([X[y == c].mean(0) for c in range(int(y.max()) + 1)])           # (C, H)
        return X - means[y], X_dev - means[y_dev]

    (S, S_dev), (T, T_dev) = within_classes(S, S_dev), within_classes(T, T_dev)
    U, d, Vt = torch.linalg.svd(S, full_matrices=False)                         # S = U diag(d) V'
    on_U = U.T @ T                                                              # (min(N, H), H)

    def left_out_error(ridge):
        """The squared error of predicting each text from the regression on all others (the class
        means stay those of all): its residual in the regression on all / (1 - its leverage)."""
        shrink = d.square() / (d.square() + ridge)                              # (min(N, H),)
        leverage = U.square() @ shrink                                          # (N,)
        residual = T - U @ (shrink[:, None] * on_U)                             # (N, H)
        return (residual / (1 - leverage)[:, None]).square().sum().item()

    scale = d.square().mean().item() + 1e-30
    ridge = min((scale * 10.0 ** k for k in range(-6, 4)), key=left_out_error)
    W = Vt.T @ ((d / (d.square() + ridge))[:, None] * on_U)                     # (H, H)
    return (1 - (T_dev - S_dev @ W).square().sum() / T_dev.square().sum().clamp_min(1e-30)).item()


# ---- The model -----------------------------------------------------------------------------------


def mlp(d_in, d_hidden, d_out):
    """Linear, ReLU, Linear: the shape of the task head and of the projections."""
    return nn.Sequential(nn.Linear(d_in, d_hidden), nn.ReLU(), nn.Linear(d_hidden, d_out))


@dataclass
class Outputs:
    """What the terms of the loss are made of, for one batch."""
    clean: torch.Tensor              # logits (B, C) of q(.|F_s(x))
    adversarial: torch.Tensor        # logits (B, C) of q(.|F_s(x^)); None without an adversary
    S_hat: torch.Tensor              # (B, H), features F_s(x^); None without an adversary
    T: torch.Tensor                  # (B, H), features F_t(x), or None
    y: torch.Tensor                  # (B,) int64
    model: nn.Module                 # the RIFT


class RIFT(nn.Module):
    """The fine-tuned F_s with its head q, the frozen teacher F_t, the projections g_c and h_c.

    encoder: a Hugging Face BERT or RoBERTa encoder; C: number of classes; pooling: see features();
    marginal: one pair of projections for all classes, for the bound on I(S;T); dtype: in which the
    encoder computes, float32 or bfloat16 (AdamW's weights stay in float32); p_mixout: the p of
    mixout(), which forward() uses in training mode, or None; tau: temperature of f_c. The teacher
    is a copy of the encoder: loading it a second time would give another random pooler where none
    was pre-trained (RoBERTa).
    """

    def __init__(self, encoder, C, pooling="pooler", marginal=False, dtype=torch.float32,
                 p_mixout=None, tau=0.2):
        super().__init__()
        H = encoder.config.hidden_size
        self.pooling, self.marginal, self.dtype, self.p_mixout = pooling, marginal, dtype, p_mixout
        self.encoder, self.tau = encoder, tau
        self.teacher = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.head = mlp(H, 256, C)
        self.g = nn.ModuleList(mlp(H, 512, 256) for _ in range(1 if marginal else C))
        self.h = nn.ModuleList(mlp(H, 512, 256) for _ in range(1 if marginal else C))

    def train(self, mode=True):
        """Sets the mode of the model; its teacher stays in eval mode. Returns the model."""
        super().train(mode)
        self.teacher.eval()
        return self

    def adversary(self, input_ids, attention_mask, subs, subs_mask, v, y=None, **search):
        """w (B, L, K) of x^: adversary() on this model, with neither mixout nor dropout.

        search: its steps, lr, weight_decay and sparsity.
        """
        with stand_in(self.encoder, parameters_in(self.encoder, self.dtype)):
            return adversary(self.encoder, self.head, input_ids, attention_mask, subs, subs_mask,
                             v, y, pooling=self.pooling, **search)

    def L_info(self, S, T, y):
        """L_info() of the model's projections; of a marginal model, the loss that bounds I(S;T)."""
        classes = torch.zeros_like(y) if self.marginal else y
        return L_info(S, T, classes, self.g, self.h, self.tau)

    def forward(self, input_ids, attention_mask, y, subs=None, subs_mask=None, w=None, T=None):
        """One pass on the clean text x and, with w, one on the adversarial x^ for all terms.

        input_ids, attention_mask: (B, L) int64; y: (B,) int64; subs, subs_mask: as in hull();
        w: (B, L, K), from adversary(); T: (B, H), the teacher's features of x. y and T are only
        handed on to the terms of the loss. Returns Outputs. The hull is computed again here: with
        dropout on, and with gradients for the embedding layer.
        """
        adversarial = S_hat = None
        theta = parameters_in(self.encoder, self.dtype)
        if self.training and self.p_mixout is not None:     # one mask for both passes below
            mixed = mixout(self.encoder, self.teacher, self.p_mixout)
            theta |= {name: p.to(self.dtype) for name, p in mixed.items()}
        with stand_in(self.encoder, theta):
            if w is None:
                e = embed(self.encoder, input_ids)                              # (B, L, H)
            else:
                e, E, free = hull(self.encoder, input_ids, subs, subs_mask)
                x_hat = mix(e, E, free, w[free])                                # (B, L, H)
                S_hat = features(self.encoder, x_hat, attention_mask, self.pooling)         # (B, H)
                adversarial = self.head(S_hat)                                  # (B, C)
            clean = self.head(features(self.encoder, e, attention_mask, self.pooling))
        return Outputs(clean, adversarial, S_hat, T, y, self)


# ---- The methods: each minimises a weighted sum of terms -----------------------------------------
# A term is a function of Outputs that returns a scalar.


def ce(o):
    """-log q(y|F_s(x)), the mean over the batch."""
    return F.cross_entropy(o.clean, o.y)


def kl(o):
    """KL( q(.|F_s(x)) || q(.|F_s(x^)) )."""
    return kl_divergence(o.clean, o.adversarial)


def info(o):
    """L_info over the texts of all processes."""
    return o.model.L_info(gather(o.S_hat), gather(o.T), gather(o.y))


def ptwd(o):
    """Pre-trained weight decay: ||theta_s - theta_t||_2."""
    return pretrained_distance(o.model.encoder, o.model.teacher)


# method: {term: its weight, a number or the name of a setting}. What is not listed is not computed.
# To add a method, write its new terms above and its line here. If it computes with other weights in
# training, as adv-mixout does, train.run has to tell the model so; if it has other parts, as
# rift-marginal has, eval.load_run too. With a term besides ce and ptwd a method is given x^, and
# its epoch is chosen by dev_hull, see `rule` in train.train.
METHODS = {
    "standard": {ce: 1},
    "adv": {ce: 1, kl: "beta"},                             # L_task
    "adv-ptwd": {ce: 1, kl: "beta", ptwd: "ptwd"},
    "adv-mixout": {ce: 1, kl: "beta"},                      # L_task, RIFT.forward with mixout()
    "rift-marginal": {ce: 1, kl: "beta", info: "alpha"},    # one pair of projections: I(S;T)
    "rift": {ce: 1, kl: "beta", info: "alpha"},             # L_task + alpha * L_info
}


def has_adversary(method):
    """True if the method needs x^: it has a term besides ce and ptwd."""
    return not METHODS[method].keys() <= {ce, ptwd}


def objective(o, method, weight):
    """The loss that a method minimises; for "rift": L_task + alpha * L_info.

    o: Outputs; weight: {name of a setting: number}, such as {"beta": 10, "alpha": 0.1}.
    Returns {"loss": the weighted sum, and each term's name: its value}, scalars.
    Raises ValueError for a name that is none of these settings.
    """
    terms, loss = {"loss": None}, 0         # it comes first in a line of the log
    for term, factor in METHODS[method].items():
        if isinstance(factor, str) and factor not in weight:
            raise ValueError(f"METHODS[{method!r}] weighs {term.__name__} with {factor!r}, "
                             f"no setting: wanted a number or one of {', '.join(weight)}")
        terms[term.__name__] = term(o)
        number = weight[factor] if isinstance(factor, str) else factor
        loss = loss + number * terms[term.__name__]
    terms["loss"] = loss
    return terms
