"""GPT-2, the whole model: token ids in, the probabilities of the next token out.

Shapes stand beside the tensors in these letters: B batch, T tokens (S with those the cache already
holds), C channels (n_embd), H heads, D = C / H channels of a head, V vocabulary, N beams; n tokens
of a whole batch in a flat row, k tokens to choose from.

Sources: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) and OpenAI's
gpt-2/src/model.py, whose parameter names are kept; for attention, section 3.2 of "Attention Is All
You Need" (Vaswani et al., 2017).
"""
import argparse
import functools
import math
import os
import pickle
import re
import sys
import zipfile
from dataclasses import asdict, dataclass

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F


class InputError(ValueError):
    """What the user gave cannot work; the message says what it was and what to do."""


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT, by default GPT-2 124M's. Raises InputError for impossible ones."""

    vocab_size: int = 50257  # 256 bytes + 50,000 merges + <|endoftext|>
    block_size: int = 1024  # the window: the longest sequence, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r}: a whole number of at least 1 is needed")
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd={self.n_embd} cannot be split into n_head={self.n_head} "
                             "equal heads")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout}: at least 0 and below 1 is needed")


# ---- The model -----------------------------------------------------------------------------------

# dropout, TiedEmbedding, LinearCrossEntropy and empty_embedding stand below, under "Parts made
# fast"; until then read them as F.dropout, F.embedding, F.cross_entropy and nn.Embedding.

class KVCache:
    """Keys and values of the tokens seen so far, so that one more token costs one small step.

    Queries are not kept: a token asks once, while every later token looks at its key and value.
    """

    def __init__(self, config, batch_size, device, dtype):
        shape = (2, config.n_layer, batch_size, config.n_head, config.block_size,
                 config.n_embd // config.n_head)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype)
        # each (n_layer, B, H, block_size, D)
        self.length = 0  # tokens held; GPT.hidden adds T after the last layer

    def append(self, layer, k, v):
        """Stores a layer's k and v of new tokens, (B, H, T, D), and returns all, (B, H, S, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def reorder(self, rows):
        """Row i becomes what row rows[i] was: beams that go on take the place of those that end."""
        for kept in (self.k, self.v):
            kept[:, :, :, : self.length] = kept[:, rows, :, : self.length]


def attend(q, k, v, dropout_p):
    """softmax(q @ k.T / sqrt(D) + mask) @ v: each query gets a mean of values, weighted by how well
    their keys fit it. (What a token looks for, what it is found by, and what it then hands over.)

    A sum of D products spreads sqrt(D) times as wide as one. Without the division softmax would
    give nearly all weight to one key and pass almost no gradient back. The mask adds minus infinity
    to the scores of keys after the query, a weight of exp(-inf) = 0: no token sees the future.

    q (B, H, T, D); k and v (B, H, S, D), of which the last T are the queries' own tokens; weights
    are dropped with probability dropout_p. -> (B, H, T, D)
    """
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    if dropout_p > 0 and q.device.type == "cpu":  # where this takes half the time of the call below
        mask = q.new_full((T, S), -math.inf).triu(S - T + 1)  # (T, S)
        weights = (q / math.sqrt(D) @ k.transpose(2, 3) + mask).softmax(dim=-1)  # (B, H, T, S)
        return dropout(weights, dropout_p, True) @ v
    # is_causal lines the first query up with the first key: wrong if the cache held tokens. Then
    # query t sees keys 0 to S - T + t, and a single query all of them.
    visible = q.new_ones(T, S, dtype=torch.bool).tril(S - T) if 1 < T < S else None  # (T, S)
    return F.scaled_dot_product_attention(q, k, v, visible, dropout_p, is_causal=T == S)


class CausalSelfAttention(nn.Module):
    """Where tokens exchange information. One softmax makes one weighting of the past; H heads, on
    D channels each, make H different ones at the same cost.

    c_ is OpenAI's for convolution: theirs were one token wide, which is a linear layer.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)  # mixes the heads

    def forward(self, x, cache=None, layer=0):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache:
            k, v = cache.append(layer, k, v)  # (B, H, S, D)
        y = attend(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Where each token is worked on by itself: out to 4C channels (as in the first Transformer), a
    nonlinearity, and back."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        # GPT-2 was trained with GELU's tanh form; the exact form would give other numbers.
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then MLP. Each reads a normalised x and adds its result to x itself. Normalised: a
    token's channels get mean 0 and variance 1, then a learned gain and bias."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)  # GPT-2's eps is PyTorch's, 1e-5
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, layer=0):
        x = x + self.attn(self.ln_1(x), cache, layer)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Embeddings, n_layer blocks, and an output layer that is the token embedding once more.

    Tying the two saves 38.6M numbers, 124.4M instead of 163.0M: what a token means and when to say
    it are much the same knowledge.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = empty_embedding(config.vocab_size, config.n_embd)  # (V, C): what each token is
        self.wpe = empty_embedding(config.block_size, config.n_embd)  # (block_size, C): its place
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))  # the hidden layers
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        if self.wte.weight.is_meta:  # shapes alone: the numbers come from a file
            return
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                # x sums up 2 n_layer projections, whose variances add up: each starts smaller by
                # the root of that number, lest x grow with depth.
                shrink = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=0.02 / shrink)  # 0.02 is GPT-2's
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, idx, cache=None):
        """idx (B, T) int64 -> x (B, T, C) and weight (V, C): x @ weight.T are the logits.

        weight is wte's, handed on so that both its uses share one gradient. The cache grows by T.
        """
        past, T = cache.length if cache else 0, idx.shape[1]
        if past + T > self.config.block_size:
            raise InputError(f"a sequence of {past + T} tokens is longer than "
                             f"block_size={self.config.block_size}")
        x, weight = TiedEmbedding.apply(self.wte.weight, idx)  # (B, T, C), (V, C)
        x = x + self.wpe.weight[past : past + T]  # (B, T, C) + (T, C)
        x = dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        if cache:
            cache.length += T
        return self.ln_f(x), weight  # x has grown by every block: back to one scale

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, V), a score of each token to come next, and None.

        With targets (B, T) int64: None and the mean cross-entropy, (), in nats (the unit of ln). A
        token's cross-entropy is minus the log of the probability that the model gave it: of
        7.4541e-05, for example, 9.5042 nats. Of m equally likely tokens each costs ln m, so the
        exponential of the mean, perplexity, says among how many the model is as unsure: 10.794 nats
        are as among 48,725.
        Raises InputError for more than block_size tokens, those in the cache included.
        """
        x, weight = self.hidden(idx, cache)
        if targets is None:
            return F.linear(x, weight), None
        return None, LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten())

    def next_logits(self, idx, cache):
        """idx (B, T) int64 -> the logits of the last position alone, (B, V); the cache grows."""
        x, weight = self.hidden(idx, cache)
        logits = F.linear(x[:, -1], weight)
        if not logits.amax().isfinite():
            raise InputError("the model's logits are not finite: if --dtype=float32 does not help, "
                             "its weights are damaged; use an earlier checkpoint, such as best.pt")
        return logits

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 stop_token=None, generator=None):
        """Yields the next token of each row, max_new_tokens times: idx (B, T) int64 -> (B,) int64.

        See `next_token` for temperature, top_k and top_p. A row that met stop_token goes on
        yielding it, and generation ends when all rows have. Only the last block_size tokens of idx
        count; whenever the window is full, it restarts from its most recent half. Draws happen on
        generator's device; by default that is a new one on the CPU (mps's multinomial has returned
        ids outside the vocabulary) with a random seed, never PyTorch's global one.
        Raises InputError at once for values that make no sense.
        """
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        if idx.dim() != 2 or 0 in idx.shape:
            raise InputError(f"a prompt of shape {tuple(idx.shape)}: (B, T) with T >= 1 is needed")
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        # Apart from here, since a function that yields runs nothing before its first token is due.
        return self._generate(idx, max_new_tokens, temperature, top_k, top_p, stop_token, generator)

    @torch.inference_mode()
    def _generate(self, idx, max_new_tokens, temperature, top_k, top_p, stop_token, generator):
        was_training, block_size = self.training, self.config.block_size
        self.eval()  # no dropout
        cache = KVCache(self.config, len(idx), idx.device, self.wte.weight.dtype)
        window = unseen = idx[:, -block_size:]  # (B, T): all that counts; what is not cached yet
        stopped = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        try:
            for _ in range(max_new_tokens):
                if cache.length + unseen.shape[1] > block_size:
                    # cached keys have their positions in them: a moved window is computed anew
                    cache.length, half = 0, max(1, block_size // 2)
                    window = unseen = window[:, -half:]
                logits = self.next_logits(unseen, cache)  # (B, V)
                token = next_token(logits, temperature, top_k, top_p, generator)  # (B,)
                if stop_token is not None:
                    token = torch.where(stopped, stop_token, token)
                    stopped |= token == stop_token
                yield token
                if stop_token is not None and stopped.all():
                    return
                unseen = token[:, None]
                window = torch.cat((window, unseen), dim=1)
        finally:
            self.train(was_training)


# ---- Parts made fast -----------------------------------------------------------------------------

def dropout(x, p, training):
    """While training, sets each element of x to 0 with probability p and scales up the others, so
    that the model cannot rely on any single one."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    # On a CPU PyTorch draws a mask number by number. NumPy draws 64 bits at a time, taken here as
    # four 16-bit numbers below or above a cut: a fifth of the time, and p is met to 1 in 65,536.
    seed = int(torch.randint(2**62, ()))  # so that torch.manual_seed decides here too
    generator = np.random.Generator(np.random.SFC64(seed))
    words = generator.integers(0, 2**64, x.numel() // 4 + 1, dtype=np.uint64)
    numbers = torch.from_numpy(words.view(np.int16))[: x.numel()].view(x.shape)  # -32768 to 32767
    cut = min(round(p * 65536), 65535)
    keep = torch.ge(numbers, cut - 32768, out=torch.empty_like(x))  # 0 or 1, in the dtype of x
    return x * keep.mul_(65536 / (65536 - cut))


class TiedEmbedding(torch.autograd.Function):
    """The rows of weight (V, C) for idx (B, T), (B, T, C), and weight again, for the output layer.

    Left to itself, autograd would make a second gradient for the rows, 154 MB of almost only zeros,
    and add the two: a fortieth of a float32 step on a CPU. Here the rows' is added into the output
    layer's, which is new and nobody else's.
    """

    @staticmethod
    def forward(ctx, weight, idx):
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx, dx, dweight):
        idx, = ctx.saved_tensors
        return dweight.index_add_(0, idx.flatten(), dx.flatten(0, 1)), None


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(x @ weight.T, targets), but without keeping the logits of all tokens.

    Logits are the largest tensor of all, 1.6 GB for 8 x 1,024 tokens, and so is their gradient.
    Here those of ROWS tokens exist at a time, and become their gradient in place.
    """

    ROWS = 2048

    @staticmethod
    def forward(ctx, x, weight, targets):
        """x (n, C), weight (V, C), targets (n,) int64 -> loss (), float32, in nats."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        w = weight.to(dtype)  # (V, C), cast once: by itself, autocast would do so for every product
        dx, dw = torch.empty_like(x), None  # gradients: (n, C), and (V, C) once there is a part
        loss = torch.zeros((), device=x.device)
        for start in range(0, len(x), LinearCrossEntropy.ROWS):
            rows = slice(start, start + LinearCrossEntropy.ROWS)
            xr, tr = x[rows].to(dtype), targets[rows, None]  # (rows, C), (rows, 1)
            log_probs = (xr @ w.T).float().log_softmax(dim=1)  # (rows, V)
            chosen = log_probs.gather(1, tr)  # (rows, 1)
            loss -= chosen.sum()
            if ctx.needs_input_grad[0]:  # not while evaluating
                # the gradient of logits: the probabilities, less 1 at the right token
                dlogits = log_probs.exp_().scatter_add_(1, tr, torch.full_like(chosen, -1.0))
                dlogits = dlogits.to(dtype)  # (rows, V)
                dx[rows] = dlogits @ w  # (rows, C)
                part = dlogits.T @ xr  # (V, C)
                dw = part if dw is None else dw.float() + part  # parts are summed in float32
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(dx, dw)
        return loss / len(x)

    @staticmethod
    def backward(ctx, scale):
        dx, dw = ctx.saved_tensors
        scale = scale / len(dx)  # not earlier: float16 would lose what is so small
        # in place, as this comes but once
        return dx.mul_(scale), dw.float().mul_(scale), None


def empty_embedding(rows, columns):
    """nn.Embedding left unfilled: GPT draws its numbers, or a file brings them. (Then it would draw
    on the meta device, which imports seconds' worth of PyTorch.)"""
    return nn.Embedding.from_pretrained(torch.empty(rows, columns), freeze=False)


# ---- Choosing tokens -----------------------------------------------------------------------------

def check_sampling(max_new_tokens, temperature, top_k, top_p):
    """Raises InputError for values that mean nothing, nan among them."""
    if not max_new_tokens >= 0:
        raise InputError(f"max_new_tokens={max_new_tokens}: 0 or more is needed")
    if not temperature >= 0:
        raise InputError(f"temperature={temperature}: 0 (greedy) or more is needed")
    if top_k is not None and not top_k >= 0:
        raise InputError(f"top_k={top_k}: 1 or more, or 0 for all tokens, is needed")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}: above 0 and at most 1 (all tokens) is needed")


def next_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draws one token from each row of logits: (B, V) -> (B,) int64.

    temperature divides the logits: below 1 the likely tokens become likelier, above 1 all become
    more alike, and 0 always takes the likeliest (greedy). top_k leaves the k likeliest; None or 0
    all. top_p leaves the fewest of those, from the likeliest on, whose probabilities together reach
    p; None or 1 all.
    """
    if temperature < 1e-6:  # the limit: nothing but the likeliest is possible
        return logits.argmax(dim=-1)
    k = min(top_k or logits.shape[-1], logits.shape[-1])
    logits, ids = logits.float().topk(k)  # (B, k), the largest first; ties or not, exactly k
    probs = (logits / temperature).softmax(dim=-1)  # (B, k)
    if top_p is not None and top_p < 1:  # a token goes if those before it reach p already
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)
    # multinomial needs no sum of 1, and over k candidates costs far less than over V
    device = generator.device if generator else probs.device
    drawn = torch.multinomial(probs.to(device), 1, generator=generator)  # (B, 1)
    return ids.gather(1, drawn.to(ids.device))[:, 0]


@torch.inference_mode()
def beam_search(model, idx, max_new_tokens, num_beams, stop_token=None):
    """idx (1, T) int64 -> (length,) int64: the continuation, of at most max_new_tokens, with the
    highest mean log-probability found. Leaves the model in eval mode.

    Where sampling draws, this keeps the num_beams likeliest sequences at every step. One that ends
    with stop_token is set aside; the best of those and of the living is the answer.
    """
    if idx.shape[1] + max_new_tokens > model.config.block_size:
        raise InputError(f"{idx.shape[1]} + {max_new_tokens} tokens: beam search needs them all in "
                         f"one window, of {model.config.block_size}")
    model.eval()  # no dropout
    cache = KVCache(model.config, num_beams, idx.device, model.wte.weight.dtype)
    unseen, beams = idx.expand(num_beams, -1), idx.new_empty(num_beams, 0)  # (N, T), (N, length)
    scores = torch.full((num_beams,), -math.inf, device=idx.device)  # (N,), log-probabilities
    scores[0] = 0  # the beams are still equal: all but the first count as impossible
    best, best_mean = beams[0], -math.inf
    for length in range(1, max_new_tokens + 1):
        logits = model.next_logits(unseen, cache)  # (N, V)
        totals = scores[:, None] + logits.float().log_softmax(dim=-1)  # (N, V)
        if stop_token is not None:
            score, row = totals[:, stop_token].max(dim=0)  # (), (): of the likeliest to end here
            if score / length > best_mean:
                best_mean = score / length
                best = torch.cat((beams[row], idx.new_tensor([stop_token])))
            totals[:, stop_token] = -math.inf
        scores, places = totals.flatten().topk(num_beams)  # both (N,)
        rows, unseen = places // totals.shape[1], places[:, None] % totals.shape[1]  # (N,), (N, 1)
        cache.reorder(rows)
        beams = torch.cat((beams[rows], unseen), dim=1)
        # A living beam's score only falls, and at most max_new_tokens share it: here none can win.
        if best_mean >= scores[0] / max_new_tokens:
            return best
    return beams[0]


# ---- Tokens --------------------------------------------------------------------------------------

VOCAB_PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "vocab.bpe")
END_OF_TEXT = 50256  # <|endoftext|>, which stood between the documents GPT-2 was trained on


def byte_spelling():
    """{byte: the character that stands for it in vocab.bpe}, in the order of the bytes' token ids.

    The file avoids what cannot be seen: 188 printable bytes stand for themselves and come first,
    the other 68 are spelled with the characters from 256 on: a space is chr(288), which is \u0120.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@functools.lru_cache
def get_tokenizer():
    """GPT-2's byte-pair encoding as a tiktoken.Encoding, made from data/vocab.bpe: no download.

    The first 256 tokens are the single bytes. Each line of the file joins two tokens into a new
    one, the pair found most often first, and these are the tokens from 256 on. Text is encoded by
    joining, again and again, the pair whose joint token has the lowest id.
    """
    byte_of = {character: bytes([byte]) for byte, character in byte_spelling().items()}
    ranks = {byte: i for i, byte in enumerate(byte_of.values())}
    with open(VOCAB_PATH, encoding="utf-8") as file:
        for line in file.read().splitlines()[1:]:  # the first line is a version
            ranks[b"".join(byte_of[c] for c in line if c != " ")] = len(ranks)
    # Before that, text is cut into contractions, words, numbers, runs of other signs (these three
    # with the space before them) and white space: no token reaches from one into the next. GPT-2's
    # expression, in the form that tiktoken runs fastest.
    pieces = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
              r"|\s++$|\s+(?!\S)|\s")
    return tiktoken.Encoding("gpt2", pat_str=pieces, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": END_OF_TEXT}, explicit_n_vocab=50257)


def encode(text):
    """text -> list of token ids; <|endoftext|> in it is the one special token, 50256."""
    return get_tokenizer().encode(text, allowed_special="all")


# ---- Checkpoints ---------------------------------------------------------------------------------

def save_checkpoint(path, model, **training_state):
    """Writes config, weights and training_state (tensors and plain types) to path, or leaves it.

    The file is whole at every moment: a temporary one beside it takes its place once it is on the
    disk. Raises InputError if it cannot be written; then the previous one is untouched.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper prefixes every name
    state = {"config": asdict(model.config), "model": model.state_dict(), **training_state}
    try:
        torch.save(state, path + ".tmp")  # given an open file, it would copy every tensor first
        with open(path + ".tmp", "r+b") as file:
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise InputError(f"{path} could not be written: {str(error).splitlines()[0]}; what was "
                         "there before is untouched") from error


def load_checkpoint(path, verify=False):
    """path -> (GPT with its weights mapped from the file, on the CPU; dict of the training state).

    Nothing in the file is ever executed. verify reads all of it and compares its checksums. Raises
    InputError for a file that is missing, damaged, not a checkpoint or at odds with its own config.
    """
    try:
        if verify and (broken := zipfile.ZipFile(path).testzip()):
            raise zipfile.BadZipFile(f"wrong checksum in {broken}")
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        with torch.device("meta"):  # shapes alone: no memory, and no numbers drawn
            model = GPT(GPTConfig(**state.pop("config")))
        weights = state.pop("model").items()
        model.load_state_dict({k.removeprefix("_orig_mod."): w for k, w in weights}, assign=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: it holds more than tensors and plain types, and "
                         "reading that could run code") from error
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, ValueError, TypeError, KeyError,
            AttributeError) as error:
        raise InputError(f"{path} is {what_is(path)} ({one_line(error)}); use another, such as "
                         "best.pt or an older run's") from error
    return model, state


def one_line(error):
    """An error's whole message in one line, but for the trace that C++ errors come with."""
    return " ".join(f"{error}".partition("\nException raised from")[0].split())


def what_is(path):
    """For messages: in words, what a file that is not the right one seems to be."""
    if not os.path.isfile(path):
        return "a folder" if os.path.isdir(path) else "missing"
    with open(path, "rb") as file:
        head = file.read(99).lstrip()
    if not head:
        return "empty"
    return "a web page (an error message?)" if head[:1] == b"<" else "damaged or something else"


def check_vocabulary(path, model):
    """Raises InputError for a model of other tokens than GPT-2's, which no script can spell."""
    if model.config.vocab_size != GPTConfig.vocab_size:
        raise InputError(f"{path} has a vocabulary of {model.config.vocab_size} tokens, where "
                         f"GPT-2's tokenizer has {GPTConfig.vocab_size}")


# ---- What the scripts share ----------------------------------------------------------------------

DTYPES = ("auto", "bfloat16", "float16", "float32")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """For --help: shows defaults, and leaves the description's lines as they are."""


def command_line(description):
    """A script's argument parser. From here on, what the user can put right ends the script with
    one line on standard error and status 2; a bug still shows its traceback."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=HelpFormatter)

    def complain(message):
        raise InputError(f"{message}; --help lists the flags")

    def show(kind, error, trace):
        message, status = str(error), 2
        if issubclass(kind, BrokenPipeError):  # who read the output has seen enough
            os._exit(141)
        if issubclass(kind, KeyboardInterrupt):
            message, status = "interrupted", 130
        elif (issubclass(kind, (torch.OutOfMemoryError, MemoryError))
              or re.search("out of memory|t allocate memory|tried to allocate", message)):
            message = ("out of memory: train.py needs less with a lower --batch_size (and as much "
                       "more --gradient_accumulation_steps), --block_size or model, sample.py with "
                       f"a lower --num_samples ({one_line(error)[:200]})")
        elif not issubclass(kind, (InputError, OSError)):
            return sys.__excepthook__(kind, error, trace)
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        sys.exit(status)

    parser.error, sys.excepthook = complain, show
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show becomes a question mark
        stream.reconfigure(errors="replace")
    return parser


def number(kind, low, below=math.inf):
    """A type for argparse: an int or float from low to below the bound, which nan never is."""
    def parse(text):
        if not low <= (value := kind(text)) < below:
            bound = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"{text}: at least {low}{bound} is needed")
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def choose_device(device, dtype):
    """--device and --dtype -> (torch.device, torch.dtype). Raises InputError for what is not there.

    auto is cuda, then mps, then cpu; and bfloat16 where the hardware computes it: half the bytes of
    float32 and the same range, with 8 bits of precision (two to three decimal digits) instead of
    24. GPUs that lack it have float16: 11 bits, but below 6e-8 all is 0, so small gradients vanish
    unless the loss is scaled up. Any CPU takes bfloat16, but slowly where it has to emulate it.
    """
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        kind = torch.zeros(1, device=device).device.type
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device={device} does not work here ({one_line(error)[:200]}); "
                         "--device=auto takes the best there is") from error
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # an older PyTorch cannot tell, and gets float32
        able = getattr(torch.cpu, "get_capabilities", dict)()  # or {}
        native = kind == "cpu" and (able.get("amx_bf16") or able.get("avx512_bf16"))
    if dtype == "auto":
        dtype = "bfloat16" if native else "float16" if kind == "cuda" else "float32"
    if ((dtype == "float16" and kind != "cuda")
            or (dtype == "bfloat16" and kind == "cuda" and not native)):
        raise InputError(f"--dtype={dtype}: {device} does not compute in it; a new run with "
                         "--dtype=auto takes the best it has")
    return torch.device(device), getattr(torch, dtype)
