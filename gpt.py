"""GPT-2: token ids in, scores for the next token out.

The model comes first, then the choice of the next token. If you want to understand
GPT-2, you can stop there. A faster dropout, what keeps the numbers right, text and
tokens, checkpoints, and what the scripts share come after that.

The shape of each tensor stands beside it:
    B  sequences in a batch        C  channels: numbers that describe a token (n_embd)
    T  tokens in each of them      H  attention heads, of D = C / H channels each
    V  tokens in the vocabulary    S  tokens that attention looks at: the T that are
                                      computed now, and those a KVCache already holds

Sources: "Language Models are Unsupervised Multitask Learners" (Radford et
al., 2019) and OpenAI's code, gpt-2/src/model.py. Two things are not in that
code: the smaller initial weights of c_proj, which the paper describes, and
dropout, which GPT (2018) used.
"""
import argparse
import contextlib
import functools
import glob
import math
import os
import pickle
import re
import shlex
import signal
import sys
import textwrap
import zipfile
from dataclasses import asdict, dataclass, replace

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT. The defaults are those of GPT-2 124M."""
    vocab_size: int = 50257  # 256 bytes, 50,000 merges of them, and <|endoftext|>
    block_size: int = 1024  # the longest sequence, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # the probability that training sets a number to 0


# ---- The model -----------------------------------------------------------------------


def causal_mask(q, S):
    """Returns the mask (T, S), which is added to the scores and hides the future.

    q (B, H, T, D) has the queries of the last T of S tokens. Where a query would look
    at a later token, the mask is -inf, and softmax turns that score into a weight of 0.
    Everywhere else it is 0 and changes nothing. With T = 2 queries and S = 5 tokens:

                        k0  k1  k2  k3  k4
                    q3   0   0   0   0 -inf
                    q4   0   0   0   0   0
    """
    T = q.shape[2]
    mask = q.new_full((T, S), -math.inf)
    return mask.triu(S - T + 1)  # keeps -inf where the key is later than the query


def attend(q, k, v, dropout_p=0.0):
    """Attention: softmax(q @ k.T / sqrt(D) + mask) @ v.

    Each token has a query (what it looks for), a key (what it can be found by) and a
    value (what it has to tell). A query and a key have a score: their product, which
    is large when both point the same way. Softmax takes exp of each score of a query
    and divides it by their sum, so it makes weights that are positive and sum to 1.
    The query gets the mean of all values with these weights.

    q (B, H, T, D) has the queries of the last T of the S tokens in k and v, (B, H, S,
    D). Without a KVCache these are all tokens, so T = S. Returns (B, H, T, D).
    """
    B, H, T, D = q.shape
    S = k.shape[2]
    if q.device.type == "cuda":
        # (If you read this for the first time, skip to the formula below.) An
        # NVIDIA GPU computes it with PyTorch's kernel, a program made for that
        # hardware, without storing the scores. The kernel's own mask assumes
        # that the first query belongs to the first token. With cached tokens it
        # belongs to token S - T, so then we pass causal_mask. If you change
        # causal_mask, write built_in = False, or training on a GPU will not see
        # your mask. All other devices take the formula, in training, evaluation
        # and generation. (On Macs, the kernel has returned wrong values.)
        built_in = T == S
        mask = None if built_in else causal_mask(q, S)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=built_in)
    if T == 1 and q.itemsize == 2:  # CPUs are slow at products of one row in 16 bits
        q, k, v = (x.float() for x in (q, k, v))
    # A score is a sum of D products. If they are independent, their variances add up,
    # so the score's standard deviation is sqrt(D) times that of one product. Without
    # the division scores would be large, softmax would put nearly all weight on one
    # key, and almost no gradient would get through.
    scores = (q / math.sqrt(D)) @ k.transpose(2, 3)  # (B, H, T, S)
    weights = (scores + causal_mask(q, S)).softmax(dim=-1)  # (B, H, T, S)
    return dropout(weights, dropout_p) @ v


def linear(n_in, n_out, std=0.02):
    """Returns an nn.Linear with weights from normal(0, std) and biases of 0.

    The standard deviation of 0.02 is that of OpenAI's model.py.
    """
    layer = nn.Linear(n_in, n_out)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class KVCache:
    """The keys and values of one layer, for the tokens that the model has read so far.

    While text is generated, each new token attends to all earlier ones. The mask lets
    no token see later ones, so the keys and values of earlier tokens do not change.
    They are kept and not computed again. Queries are not kept: a token's query is
    used once, when that token is read.
    """

    def __init__(self, model, batch_size):
        assert not model.training, "call model.eval() first, or dropout spoils the text"
        config = model.config
        D = config.n_embd // config.n_head
        shape = (2, batch_size, config.n_head, config.block_size, D)
        self.kv = model.wte.weight.new_zeros(shape)  # on its device, in its dtype
        self.length = 0  # how many tokens it holds

    def append(self, k, v):
        """Stores k and v, (B, H, T, D), of new tokens.

        Returns the keys and values of all tokens so far, (2, B, H, S, D).
        """
        start = self.length
        self.length += k.shape[2]
        self.kv[0, :, :, start : self.length] = k
        self.kv[1, :, :, start : self.length] = v
        return self.kv[:, :, :, : self.length]


def make_caches(model, batch_size):
    """Returns an empty KVCache for each layer of the model."""
    return [KVCache(model, batch_size) for _ in model.h]


class CausalSelfAttention(nn.Module):
    """Lets each token gather information from itself and the tokens before it.

    One head can weigh the past in only one way. H heads weigh it in H ways, and need
    no more multiplications than one head of C channels, because each of them has only
    D = C / H. OpenAI wrote linear layers as convolutions that are one token wide. The
    prefix c_ in c_attn, c_proj (projection) and c_fc (fully connected) is from there.
    """

    def __init__(self, config):
        super().__init__()
        C, H = config.n_embd, config.n_head
        assert C % H == 0, f"n_embd={C} is not a multiple of n_head={H}"
        self.n_head = H
        self.dropout_p = config.dropout
        self.c_attn = linear(C, 3 * C)  # makes q of all heads, then all k, then all v
        # Each head has found something in D channels of its own. c_proj mixes
        # them, so that each of the C channels of x can receive from all heads.
        # Block adds its result to x, and that of the MLP's c_proj too: 2 n_layer
        # results in all. If each had the variance v, their sum would have 2
        # n_layer times v. Weights that start sqrt(2 n_layer) times smaller bring
        # the sum back to v.
        self.c_proj = linear(C, C, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x, cache=None):
        """x (B, T, C) -> (B, T, C). cache is this layer's KVCache while generating."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D), so each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # each (B, H, S, D)
        y = attend(q, k, v, self.dropout_p if self.training else 0.0)  # (B, H, T, D)
        # The heads stand side by side again. (attend may have computed in float32 for
        # T = 1. c_proj needs the dtype of the other layers.)
        y = y.transpose(1, 2).reshape(B, T, C)
        return dropout(self.c_proj(y.to(qkv.dtype)), self.dropout_p, self.training)


class MLP(nn.Module):
    """A multilayer perceptron, which transforms each token by itself.

    Attention only moves information between tokens. The MLP works with what a token
    has gathered. It has 4C channels inside, and two thirds of a block's parameters.
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.dropout_p = config.dropout
        self.c_fc = linear(C, 4 * C)
        self.c_proj = linear(4 * C, C, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        # GELU (Hendrycks and Gimpel, 2016) is a smooth max(x, 0). Without such a bend
        # between them, two linear layers can do no more than one. GPT-2 was trained
        # with the tanh approximation of GELU; the exact form would give other numbers.
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return dropout(self.c_proj(x), self.dropout_p, self.training)


class Block(nn.Module):
    """Attention, then the MLP. Each reads a normalized x and adds its result to x.

    Because results are added, gradients have a direct way back to every layer.
    LayerNorm shifts and scales the channels of each token to mean 0 and variance 1,
    then multiplies them by a learned gain (its weight) and adds a learned bias. So
    attention and MLP read numbers of the same scale in every layer, although x grows.
    """

    def __init__(self, config):
        super().__init__()
        # LayerNorm adds 1e-5 to the variance, as GPT-2 does, so it never divides by 0.
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Embeddings, n_layer blocks, and an output layer that is the token embedding again.

    An embedding is a table with a learned vector for each token, or for each position.
    The score of a query and a key does not depend on where two tokens stand. So each
    token's vector gets the vector of its position added.

    Using the table of tokens twice is called weight tying (Press and Wolf, 2017). It
    saves V x C parameters, and what a token means as input helps to predict it as
    output.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # (V, C), of tokens
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # (block_size, C)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)  # both numbers are from OpenAI's code
        nn.init.normal_(self.wpe.weight, std=0.01)

    def forward(self, idx, targets=None, caches=None):
        """Returns the logits (B, T, V): a score for each token that could come next.

        idx (B, T) int64 has token ids. With targets (B, T) int64, the tokens that
        really came next, it returns the loss instead: the mean of -ln(p), where p is
        the probability that the model gave to a target. The loss is a float32 scalar,
        and its unit is the nat, which is to ln what the bit is to log2.

        With caches, one KVCache for each layer, idx holds only the tokens that follow
        the cached ones, and the caches grow by them. Then only the last token gets
        logits, (B, 1, V), because generation needs no others.
        """
        T = idx.shape[1]
        past = 0 if caches is None else caches[0].length
        assert past + T <= self.config.block_size, f"{past + T} tokens exceed block_size"
        x = self.wte(idx) + self.wpe.weight[past : past + T]  # (B, T, C) + (T, C)
        x = dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            x = block(x, None if caches is None else caches[layer])  # (B, T, C)
        if caches is not None:
            x = x[:, -1:]  # (B, 1, C)
        logits = F.linear(self.ln_f(x), self.wte.weight)  # x @ wte.T: (B, T or 1, V)
        if targets is None:
            return logits
        assert caches is None and targets.shape == idx.shape, "targets need idx's shape"
        # cross_entropy computes the softmax, and -ln of it at the targets. train.py
        # computes the logits in 16 bits where that is faster, but the softmax adds up
        # thousands of exponentials, so it is always computed in 32 bits.
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


# ---- The next token ------------------------------------------------------------------


def candidates(logits, temperature=1.0, top_k=None, top_p=None):
    """Returns the tokens that may come next, the likeliest first.

    logits (B, V) -> their probabilities (B, k) float32 and their ids (B, k) int64.

    temperature divides the logits. Below 1 the likely tokens become likelier still, and
    above 1 all become more alike. 0 leaves only the likeliest one; always taking that
    one is called greedy. top_k keeps the k likeliest tokens; None and 0 keep all of
    them. top_p (Holtzman et al., 2020) keeps the likeliest of these until together they
    have the probability top_p, and gives 0 to the others; None and 1 keep all of them.
    """
    V = logits.shape[-1]
    k = 1 if temperature < 1e-6 else min(top_k or V, V)  # 1: greedy
    logits, ids = logits.float().topk(k)  # both (B, k)
    probs = (logits / max(temperature, 1e-6)).softmax(dim=-1)  # (B, k)
    if top_p is not None and top_p < 1:
        sum_of_likelier = probs.cumsum(dim=-1) - probs  # (B, k)
        probs = probs.masked_fill(sum_of_likelier >= top_p, 0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs, ids


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
             stop_token=None, generator=None, observe=None):
    """Yields the next token of each row, (B,) int64, up to max_new_tokens times.

    idx (B, T) int64 is the prompt, of which the last block_size tokens count.
    `candidates` explains temperature, top_k and top_p. A row that has drawn stop_token
    repeats it, and generation ends when all rows have. Random numbers come from
    generator, a torch.Generator on the CPU. observe, if given, is called before each
    yield as observe(probs, ids, token): the model's own probabilities of all tokens,
    likeliest first, the ids of these tokens, both (B, V), and the drawn token (B,).
    """
    window = idx[:, -model.config.block_size :]  # (B, T)
    caches = make_caches(model, len(idx))
    stopped = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)  # (B,)
    for _ in range(max_new_tokens):
        if window.shape[1] > model.config.block_size:
            # The model can see no more. Dropping the oldest token would move every
            # other one to another position. Positions are part of every key, so all
            # keys would have to be computed again, and for each new token. Dropping
            # half of the tokens at once makes that rare.
            window = window[:, -max(1, model.config.block_size // 2) :]
            caches = make_caches(model, len(idx))
        unseen = window[:, caches[0].length :]  # one, or all if the caches are empty
        logits = model(unseen, caches=caches)[:, -1]  # (B, V)
        probs, ids = candidates(logits, temperature, top_k, top_p)  # both (B, k)
        # Drawing on the CPU gives the same random numbers whatever the device.
        place = torch.multinomial(probs.cpu(), 1, generator=generator)  # (B, 1)
        token = ids.gather(1, place.to(ids.device))[:, 0]  # (B,), the id at each place
        if stop_token is not None:
            token = torch.where(stopped, stop_token, token)
            stopped = token == stop_token
        if observe is not None:
            observe(*candidates(logits), token)
        yield token
        if stopped.all():
            return
        window = torch.cat((window, token[:, None]), dim=1)


@torch.inference_mode()
def beam_search(model, idx, max_new_tokens, num_beams, stop_token=None):
    """Returns the best continuation of idx that it finds, (n,) int64.

    The best one has the highest mean log-probability of its tokens. idx (1, T) int64
    is the prompt. A beam is a continuation that may win. Each step extends every beam
    by every token. Of the results that end with stop_token, it puts the likeliest
    aside. Of the others, the N = num_beams likeliest are the next beams. At the end,
    the likeliest beam is compared with all that were put aside.
    """
    V = model.config.vocab_size
    caches = make_caches(model, num_beams)
    beams = idx.new_empty(num_beams, 0)  # (N, n) after n steps
    unseen = idx.expand(num_beams, -1)  # (N, T)
    scores = torch.full((num_beams,), -math.inf, device=idx.device)  # (N,), of the beams
    scores[0] = 0  # at first all beams are empty and equal, so only one may be extended
    found = []  # pairs of a mean log-probability and a continuation
    for n in range(1, max_new_tokens + 1):
        logits = model(unseen, caches=caches)[:, -1]  # (N, V)
        totals = scores[:, None] + logits.float().log_softmax(dim=-1)  # (N, V)
        if stop_token is not None:
            score, beam = totals[:, stop_token].max(dim=0)  # two scalars
            ended = torch.cat((beams[beam], idx.new_tensor([stop_token])))  # (n,)
            found.append((score / n, ended))
            totals[:, stop_token] = -math.inf  # what has ended is not extended
        # The index of beam b and token t in the flattened totals is b * V + t.
        scores, indices = totals.flatten().topk(num_beams)  # both (N,)
        parents = indices // V  # (N,): which old beam each new one extends
        unseen = indices[:, None] % V  # (N, 1), the tokens that extend them
        beams = torch.cat((beams[parents], unseen), dim=1)
        for cache in caches:  # a new beam continues with its parent's keys and values
            cache.kv[:, :, :, : cache.length] = cache.kv[:, parents, :, : cache.length]
    found.append((scores[0] / max(1, max_new_tokens), beams[0]))
    return max(found, key=lambda pair: pair[0])[1]


@torch.inference_mode()
def score(model, ids):
    """Yields the losses (n,) float32, in nats, of the tokens ids[1:], window by window.

    ids is (N,) int64, and may be longer than block_size. Windows overlap by half, so
    each token after the first window is predicted from at least block_size / 2 tokens.
    """
    T = model.config.block_size
    done = 0  # how many of the targets, ids[1:], have a loss
    while done < len(ids) - 1:
        start = max(0, done - T // 2)
        window = ids[start : start + T + 1]  # up to T inputs, and one target more
        logits = model(window[None, :-1])[0].float()  # (up to T, V)
        new = done - start  # where the targets without a loss begin
        yield F.cross_entropy(logits[new:], window[new + 1 :], reduction="none")
        done = start + len(window) - 1


# ---- Dropout, faster on a CPU --------------------------------------------------------


def dropout(x, p, training=True):
    """Dropout, as F.dropout does it. On a CPU it draws fewer random numbers.

    While training, each element of x becomes 0 with probability p, and the others are
    scaled up by 1 / (1 - p), so that their mean stays. The model therefore cannot rely
    on any single number. A training step of 124M on two CPU cores in bfloat16 takes 11
    percent less time with this function than with F.dropout. On a CPU it rounds p to a
    multiple of 1 / 65,536.
    """
    if p == 0 or not training or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    # PyTorch draws a random number for each element, which takes longer than all else
    # that happens to it. Here one draw of 64 random bits serves four elements.
    bits = torch.randint(-2**63, 2**63 - 1, (x.numel() // 4 + 1,))  # int64
    # The same memory, read as int16, has a number from -32,768 to 32,767 for each element.
    numbers = bits.view(torch.int16)[: x.numel()].view(x.shape)
    # An element is dropped if its number is one of the n_low lowest of the 65,536.
    n_low = min(round(p * 65536), 65535)
    # keep has 1 and 0 in the dtype of x, which multiply faster than True and False.
    keep = torch.ge(numbers, n_low - 32768, out=torch.empty_like(x))
    return x * keep * (65536 / (65536 - n_low))


# ---- What keeps the numbers right ----------------------------------------------------

GPT2_ANSWER = 12.355557  # what known_answer returns while the code computes GPT-2


@torch.no_grad()
def known_answer(config, centered=False):
    """Returns a number that changes when the computation of the model changes.

    It is the loss of a tiny GPT on a fixed row of ids. Its sizes are fixed and its
    weights follow from a formula; all other fields are those of config. Another
    activation, mask, norm, scale or order of operations gives another number, and
    weights that were trained before the change compute something else after it.
    Checkpoints store the number, so that such a change is noticed. Some changes leave
    the number as it is, and are not noticed: a window of attention of 512 tokens or
    more, what acts in training only (such as dropout), what acts on a GPU or with
    caches only, and what acts from the third layer on or at other sizes only. With
    centered, the logits are moved first, as center_logits does.
    """
    # n_head is 12 because 2, 3, 4 and 6 divide it: a fork whose heads share keys in
    # groups must be able to build this model too.
    config = replace(
        config, vocab_size=61, block_size=512, n_layer=2, n_head=12, n_embd=48)
    with torch.random.fork_rng(devices=[]):  # drawing weights must not change a run
        model = GPT(config).eval().double()
    for i, parameter in enumerate(model.parameters()):
        squares = torch.arange(parameter.numel(), dtype=torch.float64) ** 2
        parameter.copy_(torch.sin(squares + i).view_as(parameter))
    if centered:
        move_mean(model)
    ids = torch.arange(513)[None] * 7 % 61  # (1, T + 1)
    return model(ids[:, :-1], ids[:, 1:]).item()


def same_answer(a, b):
    """Returns whether two known answers are equal, but for the rounding of a machine.

    A loss is a float32 number, and near 12 these have steps of 1e-6. Two machines may
    differ by some of them. The smallest change that the tests make, an eps of 1e-6 in
    LayerNorm, moves the number by 6e-6.
    """
    return abs(a - b) < 4e-6


def move_mean(model):
    """Subtracts the mean row of wte from each of its rows, and adds it to each of wpe."""
    mean = model.wte.weight.mean(dim=0)  # (C,)
    model.wte.weight -= mean
    model.wpe.weight += mean


@torch.no_grad()
def center_logits(model):
    """Moves the logits of a model to around 0, for 16 bits. Returns whether it did.

    The logits of OpenAI's weights lie far below 0. There bfloat16 has steps of 0.25
    (below -32) or 0.5 (below -64), so likely tokens get equal logits. Subtracting the
    same row from all rows of wte changes all logits of a position by the same amount,
    which softmax ignores. What the blocks read, wte + wpe, stays the same, since that
    row is added to wpe. If the code has changed so that this is no longer true, the
    weights are left alone.
    """
    config = model.config
    if not (hasattr(model, "wpe") and same_answer(
            known_answer(config), known_answer(config, centered=True))):
        print("warning: centering would change this model; 16 bits may be inexact, float32 not",
              file=sys.stderr)
        return False
    move_mean(model)
    return True


def with_weights(config, weights):
    """Returns a GPT that takes over the tensors of a dict, {name: tensor}, uncopied.

    While the GPT is built, a hook puts each new parameter on the meta device, where
    tensors have a shape but no memory, so no time goes into random numbers. Buffers
    are made as usual. Raises RuntimeError if a name is missing or unknown, or if a
    tensor has another shape.
    """
    def to_meta(module, name, p):
        """PyTorch calls this for each new parameter, and uses what it returns instead."""
        return p if p.is_meta else nn.Parameter(p.to("meta"), p.requires_grad)

    hook = nn.modules.module.register_module_parameter_registration_hook(to_meta)
    try:
        model = GPT(config)
    finally:
        hook.remove()
    # A fork may tie two matrices: one parameter with two names. named_parameters gives
    # it twice. Both names must get the same new parameter, so the one that the first
    # name makes is kept, and the second name finds it.
    shared = {}  # {parameter on the meta device: the one that replaces it}
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in weights:
            weights[name] = shared.setdefault(p, nn.Parameter(weights[name], p.requires_grad))
    model.load_state_dict(weights, assign=True)
    return model


# ---- Errors --------------------------------------------------------------------------


class InputError(ValueError):
    """The user's mistake, reported in one line. Our own mistakes are asserts."""


def raise_unless(condition, message):
    """Raises InputError(message) unless the condition is true."""
    if not condition:
        raise InputError(message)


@contextlib.contextmanager
def reraise_as_input_error(message, *kinds):
    """Raises errors of these kinds again, as InputError("message (its words)")."""
    try:
        yield
    except kinds as error:
        # torch.save hides the OSError that says why, say a full disk, behind its own.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise InputError(f"{message} ({textwrap.shorten(str(cause), 300)})") from error


# ---- Text and tokens -----------------------------------------------------------------

DATA_DIR = os.path.join(os.path.dirname(os.path.realpath(__file__)), "data")
# A text is first cut into pieces, and no token spans two of them. These are the pieces
# of GPT-2, spelled as in tiktoken. The ++ takes as many characters as there are and never
# gives one back to try another match, so a long run of characters costs no extra time.
PATTERN = (r"'(?:[sdmt]|ll|ve|re)"  # the ending of an English word, as in it's
           r"| ?\p{L}++| ?\p{N}++"  # a word or a number, with the space before it
           r"| ?[^\s\p{L}\p{N}]++"  # punctuation, with the space before it
           # White space at the end of the text is one piece. Before a word, all but the
           # last character of a run of white space are one piece. If the last one is a
           # space, it belongs to the word; otherwise it is a piece by itself.
           r"|\s++$|\s+(?!\S)|\s")


def byte_spelling():
    """Returns {character: byte}, in the order of the tokens 0 to 255.

    vocab.bpe spells each byte as one visible character, because a line of text cannot
    show a space or a line end. Printable bytes stand for themselves, and the other 68
    are spelled chr(256) to chr(323).
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return ({chr(b): b for b in printable}
            | {chr(256 + i): b for i, b in enumerate(others)})


def merges(vocab_size=GPTConfig.vocab_size):
    """Returns the first vocab_size - 257 merges: "left right", as vocab.bpe spells them.

    They were found by counting: each joins the two neighbouring tokens that were the
    most frequent pair in OpenAI's training text after all earlier merges had been
    made. So the first merges alone are a complete vocabulary too, of shorter tokens.
    """
    with open(os.path.join(DATA_DIR, "vocab.bpe"), encoding="utf-8") as file:
        return file.read().splitlines()[1 : vocab_size - 256]  # line 0 is a version


def vocabulary(vocab_size):
    """Returns {token as vocab.bpe spells it: id}.

    First come the 256 bytes, so that no text has an unknown token, then what each merge
    joins, then <|endoftext|>, which stood between the documents GPT-2 was trained on.
    """
    joined = [pair.replace(" ", "") for pair in merges(vocab_size)]
    tokens = [*byte_spelling(), *joined, "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


@functools.lru_cache
def get_tokenizer(vocab_size=GPTConfig.vocab_size):
    """Returns the byte-pair encoding with vocab_size tokens, a tiktoken.Encoding.

    257 tokens are the bytes and <|endoftext|>; 50,257 are GPT-2's. Encoding joins the
    pair of neighbours that makes the token with the lowest id, again and again, until
    none is left. A lower id means an earlier merge.
    """
    byte_of = byte_spelling()
    ranks = {bytes(byte_of[c] for c in token): i
             for token, i in vocabulary(vocab_size).items()}
    end_of_text = ranks.pop(b"<|endoftext|>")
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": end_of_text})


def encode(text, vocab_size=GPTConfig.vocab_size):
    """Returns the token ids of a text, a list. "<|endoftext|>" becomes the last id.

    tiktoken raises ValueError at about a million spaces in a row.
    """
    return get_tokenizer(vocab_size).encode(text, allowed_special="all")


def token_bytes(vocab_size):
    """Returns how many bytes of text each token stands for: V numbers, the last one 0.

    <|endoftext|> is no text. vocab.bpe spells each byte as one character.
    """
    return [len(token) for token in vocabulary(vocab_size)][:-1] + [0]


def decode_utf8(data, name, offset=0):
    """Returns the text of data, with \\n as line ends and without byte-order marks.

    data has the bytes of the file `name` from offset on. Raises InputError if they are not
    UTF-8. A byte of 0 is refused too: it is no text, and UTF-16 is full of them.
    """
    try:
        text = data.decode()
        place = offset + data.find(b"\0") if 0 in data else None
    except UnicodeDecodeError as error:
        place = offset + error.start
    raise_unless(place is None, f"{name}: byte {place} is not UTF-8 text; save it as UTF-8")
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")


def text_files(path):
    """Returns the .txt files in a folder, sorted by name, or [path] for a file."""
    return sorted(glob.glob(os.path.join(glob.escape(path), "*.[tT][xX][tT]"))) or [path]


def read_text(path):
    """Yields the text of a file, or of all .txt files in a folder, in parts.

    A part has whole lines, together 256 kB or a little more. The parts encode to the same
    ids as the whole, because they are cut just before white space (or <|endoftext|>). No
    piece of PATTERN has white space after a visible character, so a piece always ends
    there. Raises InputError.
    """
    rest = ""
    for i, name in enumerate(text_files(path)):
        if i:
            # As in GPT-2's training, it marks where a new text begins. It hides
            # nothing: attention can look at the text before it.
            rest += "<|endoftext|>"
        message = f"{name} cannot be read; give a text file, or a folder of .txt files"
        with reraise_as_input_error(message, OSError), open(name, "rb") as file:
            while lines := file.readlines(2**18):
                data = b"".join(lines)
                text = rest + decode_utf8(data, name, offset=file.tell() - len(data))
                part = text.rstrip()
                yield part
                rest = text[len(part) :]
    yield rest


# ---- Checkpoints ---------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path):
    """Opens path.tmp, which replaces path once it is complete.

    After an error, path is as it was before. Raises InputError if writing fails.
    """
    try:
        with reraise_as_input_error(f"{path} could not be written", OSError):
            with open(path + ".tmp", "wb") as file:
                yield file
                # Wait for the disk, or a power cut could leave an empty new file.
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + ".tmp", path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + ".tmp")


def save_checkpoint(path, model, **state):
    """Writes the model's config and weights, and state: tensors and plain Python values.

    Raises InputError if writing fails.
    """
    state = {"config": asdict(model.config), "model": model.state_dict(),
             "known_answer": known_answer(model.config)} | state
    with reraise_as_input_error(f"{path} could not be written", RuntimeError):
        with atomic_write(path) as file:
            torch.save(state, file)
            # Read it before it replaces the last one. weights_only refuses what is not a
            # plain type: a NumPy number, say, would make the file useless.
            file.flush()
            torch.load(file.name, weights_only=True, mmap=True, map_location="meta")


def load_checkpoint(path, verify=False):
    """Returns a GPT on the CPU in eval mode, and the dict of what else was saved.

    With verify the file is read as a whole and its checksums are compared.
    Without it the file is memory-mapped: its numbers are read when they are first
    used. While the model lives, the file may be replaced, but not be written into.
    Raises InputError if the file is damaged, is not a checkpoint, or does not fit GPT.
    Nothing that the file holds is executed.
    """
    message = f"{path} cannot be read as a checkpoint; train.py and load_gpt2.py make one"
    with reraise_as_input_error(message, Exception):
        if verify:
            raise_unless(zipfile.ZipFile(path).testzip() is None, "wrong checksum")
        mmap = not verify and os.name != "nt"  # Windows replaces no file that is mapped
        try:
            state = torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise InputError("it holds no tensors, or code that wants to run") from error
        config = state.pop("config")
        V = config["vocab_size"]
        raise_unless(257 <= V <= 50257, f"its vocab_size is {V}, not 257 to 50257")
        config = GPTConfig(**config)
    with reraise_as_input_error(f"{path} does not fit GPT", RuntimeError):
        model = with_weights(config, state.pop("model")).eval()
    if not same_answer(state.setdefault("known_answer", GPT2_ANSWER),
                       known_answer(config)):
        print(f"warning: {path} is from code that computes something other than gpt.py does",
              file=sys.stderr)
    return model, state


# ---- What the scripts share ----------------------------------------------------------


def show_error(kind, error, trace):
    """Reports an error: the user's mistakes in one line, Ctrl-C not at all."""
    # A broken pipe means that the program which read our output, say head, has ended.
    if issubclass(kind, (KeyboardInterrupt, BrokenPipeError)):
        os._exit(130)
    if not issubclass(kind, InputError):
        return sys.__excepthook__(kind, error, trace)
    script = os.path.basename(sys.argv[0])
    # torch.distributed may replace sys.stderr by a stream that loses this line.
    print(f"{script}: error: {error}", file=sys.__stderr__, flush=True)
    os._exit(2)  # at once, or PyTorch may abort one of several processes as it ends


def start_script(doc):
    """Sets up errors and output, and returns an ArgumentParser with doc as its help."""
    sys.excepthook = show_error
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stream lacks it
        # A log gets each line at once, and a file gets UTF-8 on Windows too.
        sys.stdout.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    title, _, examples = doc.partition("\n")
    return argparse.ArgumentParser(
        description=title, epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [flags]; --help explains them")


@contextlib.contextmanager
def catch_signals():
    """Yields a list that gets each signal that asks this process to end, such as Ctrl-C.

    The second signal of a kind is not caught: it does what it always does. At the end
    of the with block everything is as before.
    """
    caught, before = [], {}

    def note(signum, _):
        caught.append(signum)
        signal.signal(signum, before[signum])
        with contextlib.suppress(OSError):  # a print may be interrupted
            os.write(2, b"saving the last whole step; once more to end without\n")

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)  # Windows has no SIGHUP
        if signum and signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP
            before[signum] = signal.signal(signum, note)
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def number(kind, low, high=sys.float_info.max):
    """Returns a type for argparse: an int or float from low to high, never nan."""
    def number(text):  # this name stands in argparse's "invalid number value"
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


def command(script, *flags):
    """Returns a command for a script beside this one, to be pasted into a shell.

    Plain words and double quotes suit all shells. A word with a quote or a dollar sign
    in it gets single quotes, which cmd.exe does not know.
    """
    def quote(word):
        if re.search(r'["$`!]', word):  # these mean something inside double quotes
            return shlex.quote(word)
        return word if re.fullmatch(r"[\w./:\\=-]+", word) else f'"{word}"'

    path = os.path.join(os.path.dirname(sys.argv[0]), script)
    return " ".join(["python", *map(quote, (path, *flags))])


def show_progress(text):
    """Shows a line on a terminal that the next one overwrites."""
    if sys.stderr and sys.stderr.isatty():
        print(text, end="\r", file=sys.stderr)


DTYPES = ("auto", "bfloat16", "float16", "float32")


def choose_device(device, dtype):
    """Returns a torch.device and a torch.dtype for the flags --device and --dtype.

    bfloat16 has the range of float32, but 8 bits of precision and not 24, which is
    enough for matrix products. auto takes it where the hardware computes in it: recent
    x86 CPUs and NVIDIA GPUs. An older NVIDIA GPU gets float16, everything else float32.
    """
    if device == "auto":
        found = torch.accelerator.is_available()  # cuda, mps or xpu
        device = torch.accelerator.current_accelerator() if found else "cpu"
    with reraise_as_input_error(f"--device={device} cannot be used", Exception):
        device = torch.ones(1, device=device).device
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # Older versions of PyTorch cannot say what the CPU is able to do.
        able = getattr(torch.cpu, "get_capabilities", dict)()
        native = able.get("amx_bf16") or able.get("avx512_bf16")
    if dtype == "auto":
        dtype = "float16" if device.type == "cuda" else "float32"
        if native:
            dtype = "bfloat16"
    return device, getattr(torch, dtype)
