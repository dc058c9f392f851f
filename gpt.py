"""GPT-2, the whole model: tokens in, the probabilities of the next token out.

Shapes stand beside tensors in these letters: B batch, T tokens of a sequence (S with those the
cache already holds), C channels (n_embd), H heads, D = C / H channels of a head, V vocabulary.

Sources: the model is "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019)
and OpenAI's gpt-2/src/model.py, whose parameter names it keeps; attention is "Attention Is All You
Need" (Vaswani et al., 2017), section 3.2.
"""
import argparse
import codecs
import functools
import math
import os
import pickle
import re
import sys
import zipfile
from dataclasses import asdict, dataclass, fields

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F


class InputError(ValueError):
    """Something the user gave cannot work; the message says what was given and what to do."""


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT; the defaults are GPT-2 124M. Raises InputError for impossible ones."""

    vocab_size: int = 50257  # 256 bytes + 50,000 merges + <|endoftext|>
    block_size: int = 1024  # the longest sequence, in tokens: the context window
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
            raise InputError(f"n_embd={self.n_embd} does not divide into n_head={self.n_head} "
                             f"equal heads; change one of the two")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout}: at least 0 and below 1 is needed")


def dropout(x, p, training):
    """Zeroes each element of x with probability p while training, and scales up the others."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    # PyTorch draws a CPU's mask one number at a time. NumPy's SFC64 draws 64 bits at once, here
    # four 16-bit numbers: 3 times faster, and p is still met to 1 part in 65,536.
    generator = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))
    words = generator.integers(0, 2**64, x.numel() // 4 + 1, dtype=np.uint64)
    numbers = torch.from_numpy(words.view(np.int16))[: x.numel()].view(x.shape)  # -32768 to 32767
    cut = round(p * 65536)
    keep = torch.ge(numbers, cut - 32768, out=torch.empty_like(x))  # 0 or 1, in the dtype of x
    return x * keep.mul_(65536 / (65536 - cut))


class KVCache:
    """The keys and values of the tokens seen so far, so that each new token costs one small step.

    Queries are not kept: a token asks its question once, while its key and value are looked at
    by every later token. `length` tokens are stored; there is room for block_size.
    """

    def __init__(self, config, batch_size, device, dtype):
        shape = (config.n_layer, batch_size, config.n_head, config.block_size,
                 config.n_embd // config.n_head)
        self.k, self.v = torch.zeros((2, *shape), device=device, dtype=dtype)  # (layers,B,H,S,D)
        self.length = 0

    def append(self, layer, k, v):
        """Stores one layer's k and v of the new tokens, (B, H, T, D); returns all, (B, H, S, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def reorder(self, rows):
        """Row i goes on from what was row rows[i]: beams that die make room for the better ones."""
        self.k[:, :, :, : self.length] = self.k[:, rows, :, : self.length]
        self.v[:, :, :, : self.length] = self.v[:, rows, :, : self.length]


def attend(q, k, v, p):
    """Each of T queries takes the mean of the values up to its own place, weighted by fit.

    q (B, H, T, D); k, v (B, H, S, D), the queries being the last T of the S tokens -> (B, H, T, D).
    p is the probability with which a weight is dropped.
    """
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    # is_causal would line the first query up with the first key: wrong once the cache holds some.
    visible = None if T in (1, S) else q.new_ones(T, S, dtype=torch.bool).tril(S - T)  # (T, S)
    if p == 0 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, dropout_p=p, is_causal=1 < T == S)
    # The same written out, since on a CPU the line above is slow with dropout. A dot product of D
    # terms grows as sqrt(D): divided by it, softmax neither saturates nor loses its gradient.
    # Minus infinity before the softmax is a weight of exactly 0 after it: no token sees the future.
    future = q.new_full((T, S), -math.inf).triu(S - T + 1)
    scores = q @ k.transpose(2, 3) / math.sqrt(D) + future  # (B, H, T, S)
    return dropout(scores.softmax(dim=-1), p, True) @ v


class CausalSelfAttention(nn.Module):
    """Tokens exchange information. Several heads, since one softmax can look for one thing only."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v fused
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None, layer=0):
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D)
        y = attend(q, k, v, self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Each token by itself: out to 4C channels, a bend, and back."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        # GPT-2 was trained with the tanh form of GELU; the exact one gives other numbers.
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, layer=0):
        x = x + self.attn(self.ln_1(x), cache, layer)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))


def compute_dtype(tensor):
    """The dtype in which products with `tensor` are computed: autocast's, or else its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class LinearCrossEntropy(torch.autograd.Function):
    """mean(-log softmax(x @ weight.T)[target]) and its gradients, in one pass over the logits.

    The logits of every token are the largest tensor of all: for 8 x 1,024 tokens 1.6 GB, once as
    values and once as gradient. Here ROWS tokens' logits exist at a time, and they turn into their
    own gradient, softmax - onehot, in place. (forward, arguments: x (N, C); weight (V, C);
    targets (N,) int64; grad: whether the gradients will be asked for -> () float32, nats.)
    """

    ROWS = 2048

    @staticmethod
    def forward(ctx, x, weight, targets, grad):
        dtype = compute_dtype(weight)
        w = weight.to(dtype)
        loss = torch.zeros((), device=x.device)
        dx, dw = torch.empty_like(x), None
        for start in range(0, len(x), LinearCrossEntropy.ROWS):
            rows = slice(start, start + LinearCrossEntropy.ROWS)
            xr, tr = x[rows].to(dtype), targets[rows, None]  # (rows, C), (rows, 1)
            logits = (xr @ w.T).float()  # (rows, V)
            logits -= logits.amax(dim=1, keepdim=True)  # or exp could overflow; softmax is the same
            chosen = logits.gather(1, tr)  # (rows, 1)
            total = logits.exp_().sum(dim=1, keepdim=True)  # (rows, 1)
            loss += (total.log() - chosen).sum()
            if grad:
                logits /= total  # now the probabilities
                logits.scatter_add_(1, tr, torch.full_like(total, -1.0))  # and now the gradient
                dlogits = logits.to(dtype)
                dx[rows] = dlogits @ w
                part = dlogits.T @ xr  # (V, C)
                dw = part if dw is None else dw.float() + part
        if grad:
            ctx.save_for_backward(dx, dw)
        ctx.n = len(x)
        return loss / len(x)

    @staticmethod
    def backward(ctx, scale):
        dx, dw = ctx.saved_tensors
        scale = scale / ctx.n  # divided only here: float16 would lose gradients divided earlier
        return dx.mul_(scale), dw.float().mul_(scale), None, None


def new_embedding(rows, columns):  # nn.Embedding(rows, columns), but for numbers drawn for nothing
    return nn.Embedding.from_pretrained(torch.empty(rows, columns), freeze=False)


class GPT(nn.Module):
    """The transformer: embeddings, n_layer blocks, and a head that is the token embedding again."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = new_embedding(config.vocab_size, config.n_embd)  # what each token is
        self.wpe = new_embedding(config.block_size, config.n_embd)  # where it stands
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        if self.wte.weight.is_meta:  # shapes alone, for load_checkpoint
            return
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                # Each block adds twice to the same stream: scaled so, the sum starts at size 1.
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, idx, cache=None):
        """idx (B, T) int64 -> (B, T, C), what the head turns into logits; the cache grows by T."""
        past, T = cache.length if cache else 0, idx.shape[1]
        if past + T > self.config.block_size:
            raise InputError(f"a sequence of {past + T} tokens is longer than "
                             f"block_size={self.config.block_size}")
        x = self.wte(idx)  # (B, T, C)
        x = x + self.wpe.weight[past : past + T]
        x = dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        if cache:
            cache.length += T
        return self.ln_f(x)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, V), None; with targets (B, T) int64 -> None, loss ()."""
        x = self.hidden(idx, cache)
        if targets is None:
            return F.linear(x, self.wte.weight), None
        return None, LinearCrossEntropy.apply(
            x.flatten(0, 1), self.wte.weight, targets.flatten(), torch.is_grad_enabled())

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 stop_token=None, generator=None):
        """Yields max_new_tokens times the next token of each row: idx (B, T) int64 -> (B,) int64.

        temperature, top_k and top_p are those of `next_token`. A row that met stop_token goes on
        yielding it; when all rows have, generation ends. Only the last block_size tokens of idx
        are read; when the window is full it starts anew from its most recent half. Draws come from
        generator, or else from a fresh one with a random seed, never from the global one.
        Raises InputError at the call for values that make no sense.
        """
        check_sampling(temperature, top_k, top_p)
        if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise InputError(f"max_new_tokens={max_new_tokens!r}: 0 or more is needed")
        if idx.dim() != 2 or 0 in idx.shape:
            raise InputError(f"the prompt has shape {tuple(idx.shape)}; (B, T) with at least "
                             "one row and one token is needed")
        if generator is None:  # on mps the draw is left to the CPU: it has given impossible ids
            generator = torch.Generator("cpu" if idx.device.type == "mps" else idx.device)
            generator.seed()
        return self._generate(idx, max_new_tokens, temperature, top_k, top_p, stop_token, generator)

    @torch.inference_mode()
    def _generate(self, idx, max_new_tokens, temperature, top_k, top_p, stop_token, generator):
        was_training = self.training
        self.eval()  # no dropout
        try:
            block_size = self.config.block_size
            cache = KVCache(self.config, len(idx), idx.device, self.wte.weight.dtype)
            window = unseen = idx[:, -block_size:]  # (B, T): all that counts, all not yet fed
            stopped = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
            for _ in range(max_new_tokens):
                if cache.length + unseen.shape[1] > block_size:  # full
                    cache.length = 0
                    window = unseen = window[:, -max(1, block_size // 2) :]
                logits = F.linear(self.hidden(unseen, cache)[:, -1], self.wte.weight)  # (B, V)
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


def check_sampling(temperature, top_k, top_p):
    """Raises InputError for a temperature, top_k or top_p that means nothing (NaN included)."""
    if not temperature >= 0:
        raise InputError(f"temperature={temperature}: 0 (greedy) or more is needed")
    if top_k is not None and not top_k >= 0:
        raise InputError(f"top_k={top_k}: 1 or more, or 0 for all tokens, is needed")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}: above 0 and at most 1 (off) is needed")


def next_token(logits, temperature, top_k, top_p, generator):
    """Draws a token from each row of logits (B, V) -> (B,) int64.

    temperature divides the logits: below 1 likely tokens gain, above 1 they lose, 0 takes the
    likeliest (greedy). top_k keeps the k likeliest tokens (None or 0: all). top_p then keeps the
    fewest of those left whose probabilities reach p together (None or 1: all).
    """
    if temperature < 1e-6:  # nothing but the largest would survive the division
        return logits.argmax(dim=-1)
    k = min(top_k or logits.shape[-1], logits.shape[-1])
    logits, ids = logits.float().topk(k)  # (B, k), largest first; exactly k, ties or not
    probs = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)
    if top_p is not None and top_p < 1:  # a token goes when those before it have reached p without it
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)
    # multinomial scales the sum to 1, and over k candidates costs far less than over V tokens
    drawn = torch.multinomial(probs.to(generator.device), 1, generator=generator)  # (B, 1)
    return ids.gather(1, drawn.to(ids.device))[:, 0]


@torch.inference_mode()
def beam_search(model, idx, max_new_tokens, num_beams, stop_token=None):
    """The continuation of idx (1, T) with the highest mean log-probability found -> (T_new,) int64.

    At each step the num_beams best sequences go on. One that reaches stop_token is set aside with
    its score, log-probability / length; at the end the best of those and of the living wins.
    """
    if idx.shape[1] + max_new_tokens > model.config.block_size or num_beams < 1:
        raise InputError(f"beam search over {idx.shape[1]} + {max_new_tokens} tokens with "
                         f"{num_beams} beams: block_size={model.config.block_size} and at least "
                         "1 beam bound it")
    cache = KVCache(model.config, num_beams, idx.device, model.wte.weight.dtype)
    unseen, beams = idx.expand(num_beams, -1), idx.new_empty(num_beams, 0)  # (N, T), (N, T_new)
    # All beams start equal: but for the first they count as impossible until they differ.
    scores = torch.full((num_beams, 1), -math.inf, device=idx.device)  # (N, 1)
    scores[0] = 0
    best, best_score = beams[0], -math.inf
    for length in range(1, max_new_tokens + 1):
        logits = F.linear(model.hidden(unseen, cache)[:, -1], model.wte.weight)  # (N, V)
        totals = scores + logits.float().log_softmax(dim=-1)  # (N, V)
        if stop_token is not None:
            score, row = totals[:, stop_token].max(dim=0)
            if score / length > best_score:
                best_score = score / length
                best = torch.cat((beams[row], idx.new_tensor([stop_token])))
            totals[:, stop_token] = -math.inf
        scores, flat = totals.flatten().topk(num_beams)  # (N,)
        rows, tokens = flat // totals.shape[1], flat % totals.shape[1]
        cache.reorder(rows)
        unseen, scores = tokens[:, None], scores[:, None]
        beams = torch.cat((beams[rows], unseen), dim=1)
        if best_score >= scores[0] / max_new_tokens:  # nothing alive can still overtake
            break
    return beams[0] if scores[0] / beams.shape[1] > best_score else best


VOCAB_PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "vocab.bpe")


def byte_spelling():
    """{byte: the character that stands for it in vocab.bpe}, in the order of the bytes' token ids.

    The file avoids what cannot be seen: 188 printable bytes come first and stand for themselves,
    the other 68 take the characters from 256 on, so that a space is chr(288).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@functools.lru_cache
def get_tokenizer():
    """GPT-2's byte-pair encoding as a tiktoken.Encoding, from data/vocab.bpe: no download.

    Token ids 0 to 255 are the single bytes. Every line of vocab.bpe joins two tokens into a new
    one, the commonest pair first: that order is both the new id and the rank of the merge.
    """
    byte_of = {character: bytes([byte]) for byte, character in byte_spelling().items()}
    ranks = {byte: i for i, byte in enumerate(byte_of.values())}
    with open(VOCAB_PATH, encoding="utf-8") as file:
        for line in file.read().splitlines()[1:]:  # the first line is a version
            ranks[b"".join(byte_of[c] for c in line if c != " ")] = len(ranks)
    # Merges stay inside pieces: contractions, words, numbers, other signs (each with the space
    # before it), and runs of white space. The form is tiktoken's: GPT-2's own, but faster.
    pieces = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
              r"|\s++$|\s+(?!\S)|\s")
    return tiktoken.Encoding("gpt2", pat_str=pieces, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 50256}, explicit_n_vocab=50257)


def encode(text):
    """text -> list of token ids; <|endoftext|> in it is the one special token, 50256."""
    return get_tokenizer().encode(text, allowed_special="all")


def save_checkpoint(path, model, **training_state):
    """Writes config, weights and training_state (plain types and tensors) to `path`, or nothing.

    The file is whole at every moment: a temporary one beside it takes its place only when it is
    on the disk, so whoever is interrupted here keeps the previous one.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper would prefix every name
    state = {"config": asdict(model.config), "model": model.state_dict(), **training_state}
    try:
        with open(path + ".tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:  # RuntimeError is how torch.save reports a full disk
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise InputError(f"{path} could not be written ({error}); what was there before is "
                         "untouched: make room, or choose another folder") from error


def load_checkpoint(path, verify=False):
    """path -> (GPT on the CPU, its weights mapped from the file; dict of the training state).

    Runs nothing that the file holds. verify reads it all and compares the checksums. Raises
    InputError for what is missing, damaged, no checkpoint, or of another shape than it says.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        head = file.read(64).lstrip()
    if not zipfile.is_zipfile(path):
        what = ("empty" if os.path.getsize(path) == 0 else
                "a web page, not weights: probably a download's error message"
                if head.startswith(b"<") else
                "cut short or damaged" if head.startswith(b"PK") else
                "no checkpoint (refused unread: a bare pickle could run code)")
        raise InputError(f"{path} is {what}; use another, such as best.pt or an older run's")
    try:
        if verify and (broken := zipfile.ZipFile(path).testzip()):
            raise zipfile.BadZipFile(f"checksum of {broken}")
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: it holds more than tensors and plain types, and "
                         "opening that could run code") from error
    except (RuntimeError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}); use another, such as "
                         "best.pt or an older run's") from error
    if not isinstance(state, dict) or not {"config", "model"} <= state.keys():
        raise InputError(f"{path} is no checkpoint of this project: it lacks config and model")
    try:
        config = GPTConfig(**state.pop("config"))
    except TypeError as error:
        raise InputError(f"{path}: its config has unknown or missing names ({error})") from error
    with torch.device("meta"):  # shapes alone: no memory, and no random weights drawn for nothing
        model = GPT(config)
    weights = {name.removeprefix("_orig_mod."): w for name, w in state.pop("model").items()}
    problems = wrong_names(model, weights)
    if problems:
        raise InputError(f"{path} does not fit its own config: {problems}")
    model.load_state_dict(weights, assign=True)
    return model, state


def wrong_names(model, weights):
    """What is missing, left over or of another shape in weights, in words; empty if nothing is."""
    wanted = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    given = {name: tuple(w.shape) for name, w in weights.items()}
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is left over" for name in given if name not in wanted]
    problems += [f"{name} has shape {given[name]}, not {shape}" for name, shape in wanted.items()
                 if given.get(name, shape) != shape]
    return "; ".join(problems)


def command_line(description):
    """The argument parser of a script. From here on, what a user can put right ends the script
    with one line on standard error and status 2; a bug still shows its traceback."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def complain(message):
        raise InputError(f"{message} (--help lists every flag)")

    def show(kind, error, trace):
        message = str(error)
        if kind is KeyboardInterrupt:
            print(f"{parser.prog}: interrupted", file=sys.stderr)
            sys.exit(130)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in message:
            message = ("out of memory: lower --batch_size (with a higher "
                       "--gradient_accumulation_steps the run stays the same), --block_size or "
                       f"the model's size [{message.splitlines()[0]}]")
        elif not isinstance(error, (InputError, OSError)):
            return sys.__excepthook__(kind, error, trace)
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    parser.error = complain
    sys.excepthook = show
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows a ? instead
        stream.reconfigure(errors="replace")
    return parser


def choose_device(device, dtype):
    """Names as given, or "auto" -> (torch.device, torch.dtype); InputError for what is not there.

    The best device is cuda, then mps, then cpu. The best dtype is bfloat16 where the hardware
    computes it natively: half the bytes of float32 and the same range, with 8 bits of precision
    where float32 has 24. Older GPUs have float16 instead: finer, but small gradients vanish in it
    unless the loss is scaled up first.
    """
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    kind = device.split(":")[0]
    if kind not in ("cuda", "mps", "cpu"):
        raise InputError(f"--device={device}: auto, cpu, cuda, cuda:N or mps is needed")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device=mps: this machine or this PyTorch has no mps; try --device=auto")
    if kind == "cuda":
        count, number = torch.cuda.device_count(), device.partition(":")[2] or "0"
        if not number.isdigit() or int(number) >= count:
            raise InputError(f"--device={device}: PyTorch sees {count} CUDA devices here; "
                             "try --device=auto")
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # PyTorch before 2.9 cannot tell, and gets float32
        able = getattr(torch.cpu, "get_capabilities", dict)()
        native = kind == "cpu" and (able.get("amx_bf16") or able.get("avx512_bf16"))
    if dtype == "auto":
        dtype = "bfloat16" if native else "float16" if kind == "cuda" else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype={dtype}: auto, float32, bfloat16 or float16 is needed")
    if (dtype == "bfloat16" and kind == "cuda" and not native) or (
            dtype == "float16" and kind != "cuda"):
        raise InputError(f"--dtype={dtype}: {device} here does not compute it; try --dtype=auto")
    return torch.device(device), getattr(torch, dtype)

