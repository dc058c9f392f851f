"""GPT-2, the whole model: token ids in, the probabilities of the next token out.

Shapes stand beside the tensors in these letters: B batch, T tokens (S with those the cache already
holds), C channels (n_embd), H heads, D = C / H channels of a head, V vocabulary, n tokens of any
rows, N beams.

Sources: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) and OpenAI's
gpt-2/src/model.py, whose parameter names are kept; for attention, section 3.2 of "Attention Is All
You Need" (Vaswani et al., 2017).
"""
import argparse
import functools
import math
import os
import pickle
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

class KVCache:
    """Keys and values of the tokens seen so far, so that one more token costs one small step.

    Queries are not kept: a token asks once, while every later token looks at its key and value.
    """

    def __init__(self, config, batch_size, device, dtype):
        shape = (2, config.n_layer, batch_size, config.n_head, config.block_size,
                 config.n_embd // config.n_head)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype)  # (layers, B, H, S, D)
        self.length = 0  # tokens held; there is room for block_size

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


def attend(q, k, v, p):
    """Each query gets the mean of the values up to its own place, weighted by how well keys fit it.

    q (B, H, T, D); k and v (B, H, S, D), of which the last T are the queries' own tokens; p is the
    probability of dropping a weight. -> (B, H, T, D)
    """
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    if p > 0 and q.device.type == "cpu":  # where this takes half the time of the call below
        # A sum of D products spreads like sqrt(D). Undivided, softmax would soon put all weight on
        # one key, where its gradient is 0. Minus infinity is a weight of 0: no one sees the future.
        future = q.new_full((T, S), -math.inf).triu(S - T + 1)  # (T, S)
        scores = q @ k.transpose(2, 3) / math.sqrt(D) + future  # (B, H, T, S)
        return dropout(scores.softmax(dim=-1), p, True) @ v
    # is_causal lines the first query up with the first key: wrong if the cache held tokens. A
    # single query may see all keys.
    visible = q.new_ones(T, S, dtype=torch.bool).tril(S - T) if 1 < T < S else None  # (T, S)
    return F.scaled_dot_product_attention(q, k, v, visible, p, is_causal=T == S > 1)


class CausalSelfAttention(nn.Module):
    """Where tokens exchange information; several heads, as one softmax looks for one thing only."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        # q is what a token looks for, k what it can be found by, v what it then hands over.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None, layer=0):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D)
        y = attend(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Where each token is worked on by itself: out to 4C channels, a nonlinearity, and back."""

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
    """Attention, then MLP. Each adds to x what it makes of a normalised x: every token's channels
    at mean 0 and variance 1, times a learned gain plus a bias."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, layer=0):
        x = x + self.attn(self.ln_1(x), cache, layer)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Embeddings, n_layer blocks, and a head that is the token embedding once more.

    Sharing that table saves 38.6M numbers, 124.4M instead of 163.0M: what a token means and when to
    say it are much the same knowledge.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = empty_embedding(config.vocab_size, config.n_embd)  # what each token is
        self.wpe = empty_embedding(config.block_size, config.n_embd)  # where it stands
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        if self.wte.weight.is_meta:  # shapes alone: the numbers come from a file
            return
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                # x sums up 2 n_layer projections: each starts smaller, lest x grow with depth.
                shrink = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, idx, cache=None):
        """idx (B, T) int64 -> (B, T, C), from which the head makes logits; the cache grows by T."""
        past, T = cache.length if cache else 0, idx.shape[1]
        if past + T > self.config.block_size:
            raise InputError(f"a sequence of {past + T} tokens is longer than "
                             f"block_size={self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[past : past + T]  # (B, T, C)
        x = dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        if cache:
            cache.length += T
        return self.ln_f(x)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, V), a score of each token to come next, and None.

        With targets (B, T) int64: None and the mean loss in nats, ().

        Raises InputError for more than block_size tokens, those in the cache included.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return F.linear(x, self.wte.weight), None
        return None, LinearCrossEntropy.apply(
            x.flatten(0, 1), self.wte.weight, targets.flatten(), torch.is_grad_enabled())

    def next_logits(self, idx, cache):
        """idx (B, T) int64 -> the logits of the last position alone, (B, V); the cache grows."""
        return F.linear(self.hidden(idx, cache)[:, -1], self.wte.weight)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 stop_token=None, generator=None):
        """Yields the next token of each row, max_new_tokens times: idx (B, T) int64 -> (B,) int64.

        See `next_token` for temperature, top_k and top_p. A row that met stop_token goes on
        yielding it, and generation ends when all rows have. Only the last block_size tokens of idx
        count; whenever the window is full, it restarts from its most recent half. Draws happen on
        generator's device (mps has drawn impossible ids); by default that is a new one on the CPU
        with a random seed, never PyTorch's global one.
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
                if cache.length + unseen.shape[1] > block_size:  # cached keys know their places
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
    # four 16-bit numbers: a fifth of the time, and p is still met to 1 part in 65,536.
    generator = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))
    words = generator.integers(0, 2**64, x.numel() // 4 + 1, dtype=np.uint64)
    numbers = torch.from_numpy(words.view(np.int16))[: x.numel()].view(x.shape)  # -32768 to 32767
    cut = round(p * 65536)
    keep = torch.ge(numbers, cut - 32768, out=torch.empty_like(x))  # 0 or 1, in the dtype of x
    return x * keep.mul_(65536 / (65536 - cut))


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(x @ weight.T, targets), but without keeping the logits of all tokens.

    Cross-entropy is minus the log of the probability that the model gave to the right token: one of
    7.4541e-05 costs 9.5042 nats (a nat is the unit of ln). Among n equally likely tokens each costs
    ln n, so the exponential of the mean, perplexity, is that n: a mean of 10.79395 nats is to be as
    unsure as among 48,725 tokens.

    Logits are the largest tensor of all, 1.6 GB for 8 x 1,024 tokens, and so is their gradient.
    Here those of ROWS tokens exist at a time, and become their own gradient in place.
    """

    ROWS = 2048

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        """x (n, C), weight (V, C), targets (n,) int64 -> loss (), float32, in nats."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        w, dx, dw = weight.to(dtype), torch.empty_like(x), None
        loss = torch.zeros((), device=x.device)
        for start in range(0, len(x), LinearCrossEntropy.ROWS):
            rows = slice(start, start + LinearCrossEntropy.ROWS)
            xr, tr = x[rows].to(dtype), targets[rows, None]  # (rows, C), (rows, 1)
            logits = (xr @ w.T).float()  # (rows, V)
            logits -= logits.amax(dim=1, keepdim=True)  # so that exp cannot overflow
            chosen = logits.gather(1, tr)  # (rows, 1)
            total = logits.exp_().sum(dim=1, keepdim=True)  # (rows, 1)
            loss += (total.log() - chosen).sum()
            if with_gradients:
                logits /= total  # now the probabilities
                logits.scatter_add_(1, tr, torch.full_like(total, -1.0))  # and now the gradient
                dlogits = logits.to(dtype)  # (rows, V)
                dx[rows] = dlogits @ w
                part = dlogits.T @ xr  # (V, C)
                dw = part if dw is None else dw.float() + part  # summed in float32
        if with_gradients:
            ctx.save_for_backward(dx, dw)
        return loss / len(x)

    @staticmethod
    def backward(ctx, scale):
        dx, dw = ctx.saved_tensors
        scale = scale / len(dx)  # not earlier: float16 would lose what is so small
        return dx.mul_(scale), dw.float().mul_(scale), None, None


def empty_embedding(rows, columns):
    """nn.Embedding, but for its own random numbers: GPT draws them, or has them from a file. (To
    draw on the meta device would cost load_checkpoint seconds of PyTorch's imports.)"""
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

    temperature divides the logits: below 1 the likely tokens become likelier, above 1 less so, and
    0 always takes the likeliest (greedy). top_k leaves the k likeliest; None or 0 all. top_p leaves
    the fewest of those whose probabilities together reach p; None or 1 all.
    """
    if temperature < 1e-6:  # divided by less, all but the likeliest are impossible
        return logits.argmax(dim=-1)
    k = min(top_k or logits.shape[-1], logits.shape[-1])
    logits, ids = logits.float().topk(k)  # (B, k), the largest first; ties or not, exactly k
    probs = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)  # (B, k)
    if top_p is not None and top_p < 1:  # a token goes if those before it reach p already
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)
    if not probs.isfinite().all():
        raise InputError("the model's logits are not finite: its weights must be damaged; use an "
                         "earlier checkpoint, such as best.pt")
    # multinomial needs no sum of 1, and over k candidates costs far less than over V
    device = generator.device if generator else probs.device
    drawn = torch.multinomial(probs.to(device), 1, generator=generator)  # (B, 1)
    return ids.gather(1, drawn.to(ids.device))[:, 0]


@torch.inference_mode()
def beam_search(model, idx, max_new_tokens, num_beams, stop_token=None):
    """The continuation of idx (1, T) with the highest mean log-probability found -> (T_new,) int64.

    Where sampling draws, this keeps the num_beams likeliest sequences at every step. One that ends
    with stop_token is set aside; the best of those and of the living is the answer.
    """
    if idx.shape[1] + max_new_tokens > model.config.block_size or num_beams < 1:
        raise InputError(f"num_beams={num_beams}, {idx.shape[1]} + {max_new_tokens} tokens: beam "
                         "search needs a beam, and all tokens in one window, of "
                         f"{model.config.block_size}")
    cache = KVCache(model.config, num_beams, idx.device, model.wte.weight.dtype)
    unseen, beams = idx.expand(num_beams, -1), idx.new_empty(num_beams, 0)  # (N, T), (N, T_new)
    scores = torch.full((num_beams, 1), -math.inf, device=idx.device)  # (N, 1), log-probabilities
    scores[0] = 0  # the beams are still equal: all but the first count as impossible
    best, best_mean = beams[0], -math.inf
    for length in range(1, max_new_tokens + 1):
        logits = model.next_logits(unseen, cache)  # (N, V)
        totals = scores + logits.float().log_softmax(dim=-1)  # (N, V)
        if stop_token is not None:
            ended, row = totals[:, stop_token].max(dim=0)
            if ended / length > best_mean:
                best_mean = ended / length
                best = torch.cat((beams[row], idx.new_tensor([stop_token])))
            totals[:, stop_token] = -math.inf
        scores, places = totals.flatten().topk(num_beams)  # both (N,)
        rows, unseen = places // totals.shape[1], places[:, None] % totals.shape[1]  # (N,), (N, 1)
        cache.reorder(rows)
        scores, beams = scores[:, None], torch.cat((beams[rows], unseen), dim=1)
        if best_mean >= scores[0] / max_new_tokens:  # none of the living can get better than that
            return best
    return beams[0] if max_new_tokens and scores[0] / max_new_tokens > best_mean else best


# ---- Tokens --------------------------------------------------------------------------------------

VOCAB_PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "vocab.bpe")
END_OF_TEXT = 50256  # <|endoftext|>, which stood between the documents GPT-2 was trained on


def byte_spelling():
    """{byte: the character that stands for it in vocab.bpe}, in the order of the bytes' token ids.

    The file avoids what cannot be seen: 188 printable bytes stand for themselves and come first,
    the other 68 are spelled with the characters from 256 on, so that a space is chr(288).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@functools.lru_cache
def get_tokenizer():
    """GPT-2's byte-pair encoding as a tiktoken.Encoding, made from data/vocab.bpe: no download.

    The first 256 tokens are the single bytes. Each line of the file joins two tokens into a new
    one, the pair found most often first: a line's place is the new token's id, and text is encoded
    by joining, again and again, the pair with the lowest id.
    """
    byte_of = {character: bytes([byte]) for byte, character in byte_spelling().items()}
    ranks = {byte: i for i, byte in enumerate(byte_of.values())}
    with open(VOCAB_PATH, encoding="utf-8") as file:
        for line in file.read().splitlines()[1:]:  # the first line is a version
            ranks[b"".join(byte_of[c] for c in line if c != " ")] = len(ranks)
    # Nothing is joined across contractions, words, numbers, other signs (each with a space before
    # it) and white space. GPT-2's expression, in the form that tiktoken runs fastest.
    pieces = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
              r"|\s++$|\s+(?!\S)|\s")
    return tiktoken.Encoding("gpt2", pat_str=pieces, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": END_OF_TEXT}, explicit_n_vocab=50257)


def encode(text):
    """text -> list of token ids; <|endoftext|> in it is the one special token, 50256."""
    return get_tokenizer().encode(text, allowed_special="all")


# ---- Checkpoints ---------------------------------------------------------------------------------

def save_checkpoint(path, model, **training_state):
    """Writes config, weights and training_state (tensors and plain types) to path, or nothing.

    The file is whole at every moment: a temporary one beside it takes its place once it is on the
    disk. Raises InputError if it cannot be written; then the previous one is untouched.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper prefixes every name
    state = {"config": asdict(model.config), "model": model.state_dict(), **training_state}
    try:
        torch.save(state, path + ".tmp")  # a file object would get a copy of each tensor
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
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is {what_is(path)}, not a checkpoint; use another, such as "
                         "best.pt or an older run's")
    try:
        if verify and (broken := zipfile.ZipFile(path).testzip()):
            raise zipfile.BadZipFile(f"wrong checksum in {broken}")
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: it holds more than tensors and plain types, and "
                         "reading that could run code") from error
    except (RuntimeError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}); use another, such as "
                         "best.pt or an older run's") from error
    if (not isinstance(state, dict)
            or not all(isinstance(state.get(name), dict) for name in ("config", "model"))
            or state["config"].keys() != asdict(GPTConfig()).keys()):
        raise InputError(f"{path} is not a checkpoint of this project: no config and model in it")
    weights = {name.removeprefix("_orig_mod."): w for name, w in state.pop("model").items()}
    with torch.device("meta"):  # shapes alone: no memory, and no numbers drawn
        model = GPT(GPTConfig(**state.pop("config")))
    check_names(path, model, weights)
    model.load_state_dict(weights, assign=True)
    return model, state


def what_is(path):
    """For messages: in words, what a file that is not the right one seems to be."""
    if not os.path.isfile(path):
        return "a folder" if os.path.isdir(path) else "missing"
    with open(path, "rb") as file:
        head = file.read(99).lstrip()
    return ("empty" if not head else "a web page (a download's error message?)"
            if head.startswith(b"<") else
            "cut short" if head.startswith(b"PK") else "something else")


def check_vocabulary(path, model):
    """Raises InputError for a model of other tokens than GPT-2's, which no script can spell."""
    if model.config.vocab_size != 50257:
        raise InputError(f"{path} has a vocabulary of {model.config.vocab_size} tokens, where "
                         "GPT-2's tokenizer has 50257")


def check_names(path, model, weights):
    """Raises InputError with all that is missing, left over or of another shape in weights."""
    wanted, given = ({name: tuple(w.shape) for name, w in tensors.items()}
                     for tensors in (model.state_dict(), weights))
    wrong = [f"{name} is missing" for name in wanted.keys() - given.keys()]
    wrong += [f"{name} is left over" for name in given.keys() - wanted.keys()]
    wrong += [f"{name} is {given[name]}, not {wanted[name]}"
              for name in wanted.keys() & given.keys() if given[name] != wanted[name]]
    if wrong:
        raise InputError(f"{path}: weights that do not fit the config: {'; '.join(sorted(wrong))}")


# ---- What the scripts share ----------------------------------------------------------------------

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


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
        elif issubclass(kind, torch.OutOfMemoryError) or "can't allocate memory" in message:
            message = ("out of memory: lower --batch_size (and raise --gradient_accumulation_steps "
                       f"as much), --block_size or the model's size ({message.splitlines()[0]})")
        elif not issubclass(kind, (InputError, OSError)):
            return sys.__excepthook__(kind, error, trace)
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        sys.exit(status)

    parser.error, sys.excepthook = complain, show
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show becomes a question mark
        stream.reconfigure(errors="replace")
    return parser


def choose_device(device, dtype):
    """--device and --dtype -> (torch.device, torch.dtype). Raises InputError for what is not there.

    auto is cuda, then mps, then cpu; and bfloat16 where the hardware computes it: half the bytes of
    float32 with the same range, keeping 8 of its 24 bits. GPUs that lack it have float16, finer but
    without small numbers: gradients survive in it only if the loss is scaled up.
    """
    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind, _, number = device.partition(":")
    there = {"cpu": True, "mps": has_mps, "cuda":
             int(number or 0) < torch.cuda.device_count() if (number or "0").isdigit() else False}
    if not there.get(kind):
        raise InputError(f"--device={device}: not here; --device=auto takes the best there is")
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # an older PyTorch cannot tell, and gets float32
        able = getattr(torch.cpu, "get_capabilities", dict)()
        native = kind == "cpu" and (able.get("amx_bf16") or able.get("avx512_bf16"))
    if dtype == "auto":
        dtype = "bfloat16" if native else "float16" if kind == "cuda" else "float32"
    possible = {"float32": True, "bfloat16": native or kind != "cuda", "float16": kind == "cuda"}
    if not possible.get(dtype):
        raise InputError(f"--dtype={dtype}: {device} does not compute in it; --dtype=auto takes "
                         "the best it has")
    return torch.device(device), getattr(torch, dtype)
