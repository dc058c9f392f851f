"""GPT-2, the whole model: token ids in, token ids out.

The same forward pass in 30 lines of numpy: `oracle` in test_gpt.py.
Each tensor's shape stands beside it: B sequences of T tokens, C channels a token (n_embd), H heads
of D = C / H channels each, V tokens in the vocabulary; S = T + the tokens that a KVCache holds.

Sources: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), "Attention Is
All You Need" (Vaswani et al., 2017), and OpenAI's gpt-2/src/model.py for the parameters' names.
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT, by default those of GPT-2 124M."""

    vocab_size: int = 50257  # 256 bytes + 50,000 merges + <|endoftext|>
    block_size: int = 1024  # the longest sequence, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # the share of numbers set to 0 while training
    bias: bool = True  # in linear layers and LayerNorms

def attend(q, k, v, dropout_p=0.0):
    """softmax(q @ k.T / sqrt(D) + mask) @ v: every query gets a weighted mean of the values.
    The better a key fits the query, the more its value weighs. k and v are (B, H, S, D). q is
    (B, H, T, D), for the last T of the S tokens; without a cache T = S. Returns (B, H, T, D). Each
    weight is dropped with probability dropout_p."""
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    # Query t is token S - T + t. Later keys get -inf, and exp(-inf) = 0: no token sees the future.
    # triu keeps -inf from key S - T + t + 1 on and writes 0 before it.
    mask = q.new_full((T, S), -math.inf).triu(S - T + 1)  # (T, S)
    if dropout_p == 0 or q.device.type != "cpu":  # on a CPU, dropout is faster below
        causal = T == S  # is_causal makes this mask, but for T < S its query 0 would see only key 0
        return F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout_p, causal)
    # A score is a sum of D products and spreads sqrt(D) times as wide as one of them. Without the
    # division, softmax would give nearly all weight to one key and pass no gradient back.
    scores = (q / math.sqrt(D)) @ k.transpose(2, 3) + mask  # (B, H, T, S)
    weights = scores.softmax(dim=-1)  # (B, H, T, S), each row sums to 1
    return dropout(weights, dropout_p) @ v  # F.dropout, but faster on a CPU: see further down

class CausalSelfAttention(nn.Module):
    """Each token gathers information from itself and the tokens before it.
    One softmax weighs the past in one way. H heads of D channels weigh it in H ways at the same
    cost. OpenAI wrote its linear layers as convolutions that are one token wide, hence c_."""

    def __init__(self, config):
        super().__init__()
        C, H = config.n_embd, config.n_head
        require(C % H == 0, f"n_embd={C} is no multiple of n_head={H}")
        self.n_head, self.dropout = H, config.dropout
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        # Rotary positions, in models that have them, turn q and k here. GPT-2 has wpe, below.
        if cache:  # this layer's, only while generating: see KVCache
            k, v = cache.append(k, v)  # (B, H, S, D)
        y = attend(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return dropout(self.c_proj(y), self.dropout, self.training)  # (B, T, C)

class MLP(nn.Module):
    """Each token is transformed by itself: to 4C channels, through GELU, and back to C."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        # GELU is a smooth max(x, 0). Without it, two linear layers would do no more than one.
        # GPT-2 was trained with its tanh approximation; the exact form gives other numbers.
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, C)

class Block(nn.Module):
    """Attention, then MLP. Each reads a normalised x and adds its result to x.
    The sums give gradients a direct way back to every layer. LayerNorm brings each token's channels
    to mean 0 and variance 1, then applies a learned gain and bias."""

    def __init__(self, config):
        super().__init__()
        # LayerNorm adds eps to the variance and never divides by 0. PyTorch's 1e-5 is GPT-2's too.
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)

class GPT(nn.Module):
    """Embeddings, n_layer blocks, and an output layer that is the token embedding again: reading a
    token and predicting it take much the same knowledge. That saves 50257 * 768 parameters."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Token and position embeddings. from_pretrained takes these empty tables as they are, where
        # nn.Embedding(V, C) would draw numbers. The loop below draws them.
        V, C = config.vocab_size, config.n_embd
        self.wte = nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False)
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.block_size, C), freeze=False)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C, bias=config.bias)
        if self.wte.weight.is_meta:  # shapes without numbers, which load_checkpoint brings
            return
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                # x sums up 2 n_layer results of c_proj, whose variances add. Each starts smaller by
                # sqrt(2 n_layer), so that x does not grow with the depth.
                shrink = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=0.02 / shrink)  # 0.02 is GPT-2's
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)  # LayerNorm's gains are 1 already

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, V): a score for each token that could come next.
        With targets (B, T) int64 it returns the loss instead: the mean cross-entropy, a scalar, in
        nats. A token's cross-entropy is -ln(p), where p is the probability that the model gave to
        it. Targets of -100 do not count.
        With cache, one KVCache a layer, idx holds the tokens that follow the cached ones. The cache
        grows by them. Only the last of them gets logits, (B, 1, V), and there are no targets.
        Raises InputError for more than block_size tokens, and for targets of another shape."""
        T, limit = idx.shape[1], self.config.block_size
        past = cache[0].length if cache else 0
        require(past + T <= limit, f"{past + T} tokens do not fit block_size={limit}")
        x = self.wte(idx) + self.wpe.weight[past : past + T]  # (B, T, C) + (T, C)
        x = dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            x = block(x, cache[layer] if cache else None)  # (B, T, C)
        x = self.ln_f(x[:, -1:] if cache else x)  # (B, T, C), or (B, 1, C)
        logits = F.linear(x, self.wte.weight)  # (B, T, V), or (B, 1, V)
        if targets is None:
            return logits
        require(targets.shape == idx.shape, f"targets {targets.shape} do not fit idx {idx.shape}")
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

class KVCache:
    """One layer's keys and values of the tokens so far: one more token then costs one small step.
    Queries are not kept. A token asks once, but all later tokens look at its key and value."""

    def __init__(self, model, batch_size):
        assert not model.training, "call model.eval() first, or dropout spoils the text"
        config = model.config
        shape = (2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.kv = model.wte.weight.new_zeros(shape)  # (2, B, H, block_size, D)
        self.length = 0  # how many tokens it holds

    def append(self, k, v):
        """Stores k and v of new tokens, (B, H, T, D). Returns those of all tokens, (B, H, S, D)."""
        start, self.length = self.length, self.length + k.shape[2]
        self.kv[:, :, :, start : self.length] = torch.stack((k, v))
        return self.kv[:, :, :, : self.length]

def next_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draws one token a row, on the CPU for the same text everywhere: logits (B, V) -> (B,) int64.
    temperature divides the logits: below 1 the likely tokens become likelier, above 1 all become
    more alike, and 0 takes the likeliest token (greedy), as top_k=1 does. top_k keeps the k
    likeliest tokens; None and 0 keep all. Of these, top_p > 0 keeps the likeliest, including the
    one that brings the sum of their probabilities to p; None and 1 keep all."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    k = min(top_k or logits.shape[-1], logits.shape[-1])
    logits, ids = logits.float().topk(k)  # both (B, k), the largest logit first
    probs = (logits / temperature).softmax(dim=-1)  # (B, k)
    if top_p is not None and top_p < 1:
        sum_before = probs.cumsum(dim=-1) - probs  # (B, k), of all likelier tokens
        probs = probs.masked_fill(sum_before >= top_p, 0)  # multinomial rescales the rest
    choice = torch.multinomial(probs.cpu(), 1, generator=generator)  # (B, 1), from 0 to k - 1
    return ids.gather(1, choice.to(ids.device))[:, 0]

@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None,
             generator=None):
    """Yields the next token of each row, max_new_tokens times: idx (B, T) int64 -> (B,) int64.
    next_token explains temperature, top_k, top_p and generator. Only the last block_size tokens of
    idx count. A row repeats its stop_token; when all rows have met theirs, generation ends."""
    assert idx.dim() == 2 and idx.shape[1] > 0, f"idx {tuple(idx.shape)} is not (B, T), T >= 1"
    window = idx[:, -model.config.block_size :]  # (B, T)
    cache = [KVCache(model, len(idx)) for _ in model.h]
    stopped = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        if window.shape[1] > model.config.block_size:
            # Sliding by one token would change every token's position, and so every key. So the
            # window drops half of its tokens at once, and the others get new keys.
            window = window[:, -max(1, model.config.block_size // 2) :]
            cache = [KVCache(model, len(idx)) for _ in model.h]
        unseen = window[:, cache[0].length :]  # one token, or all if the cache is empty
        logits = model(unseen, cache=cache)[:, -1]  # (B, V)
        token = next_token(logits, temperature, top_k, top_p, generator)  # (B,)
        if stop_token is not None:
            token = torch.where(stopped, stop_token, token)
            stopped = token == stop_token
        yield token
        if stopped.all():
            return
        window = torch.cat((window, token[:, None]), dim=1)

# ---- Text and tokens (the model needs none of these imports) -------------------------------------
import argparse
import contextlib
import errno
import functools
import os
import sys
import time
import warnings
import zipfile

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

VOCAB_PATH = os.path.join(os.path.dirname(os.path.realpath(__file__)), "data", "vocab.bpe")
END_OF_TEXT = 50256  # <|endoftext|>, which stood between the documents GPT-2 was trained on
DTYPES = ("auto", "bfloat16", "float16", "float32")
# vocab.bpe writes each byte as one visible character: 188 bytes as themselves, the other 68 as
# chr(256) to chr(323). So a space is chr(288). SPELLING has them in the order of tokens 0 to 255.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted(set(range(256)) - set(VISIBLE))
SPELLING = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}

@functools.lru_cache
def get_tokenizer():
    """GPT-2's byte-pair encoding, a tiktoken.Encoding, from data/vocab.bpe. Each line of that file
    joins two tokens into a new one, with the next id. To encode a text, the pair that makes the
    lowest id is joined, again and again: so the two bytes of "é" become one token."""
    byte_of = {character: byte for byte, character in SPELLING.items()}
    ranks = {bytes([byte]): i for i, byte in enumerate(SPELLING)}
    with open(VOCAB_PATH, encoding="utf-8") as file:
        for line in file.read().splitlines()[1:]:  # the first line is a version
            ranks[bytes(byte_of[c] for c in line if c != " ")] = len(ranks)
    # The pattern cuts a text into words with the space before them, numbers, punctuation and space.
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": END_OF_TEXT}, explicit_n_vocab=50257)

def encode(text):
    """text -> list of token ids. <|endoftext|> in it becomes 50256, the one special token."""
    return get_tokenizer().encode(text, allowed_special="all")

def decode_utf8(data, name, offset=0):
    """Bytes that stand at offset in a file -> text with \\n at every line's end. Raises InputError,
    with the file's name, for a byte that is not UTF-8 or is NUL, as in UTF-16."""
    try:
        text = data.replace(b"\0", b"\xff").decode()  # \xff is never UTF-8: NUL fails as well
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: byte {offset + error.start} ({data[error.start]:#x}) is not "
                         "UTF-8 text; save the file as UTF-8") from error
    text = text.removeprefix("\ufeff" if offset == 0 else "")  # the byte-order mark
    return text.replace("\r\n", "\n").replace("\r", "\n")

# ---- Beam search ---------------------------------------------------------------------------------
@torch.inference_mode()
def beam_search(model, idx, max_new_tokens, num_beams, stop_token=None):
    """idx (1, T) int64 -> the continuation with the highest mean log-probability found, (n,) int64.
    Each step keeps the N = num_beams likeliest sequences of n new tokens, up to max_new_tokens. One
    that ends with stop_token is set aside, and wins if no mean is higher."""
    T, limit, V = idx.shape[1], model.config.block_size, model.config.vocab_size
    require(T + max_new_tokens <= limit, f"beam search: {T} + {max_new_tokens} tokens do not fit "
            f"block_size={limit}")
    cache = [KVCache(model, num_beams) for _ in model.h]
    unseen, beams = idx.expand(num_beams, -1), idx.new_empty(num_beams, 0)  # (N, T), (N, n)
    scores = torch.full((num_beams,), -math.inf, device=idx.device)  # (N,), log-probabilities <= 0
    scores[0] = 0  # all beams are equal at first, so only one may have successors
    best, best_mean = beams[0], -math.inf  # of those that have ended
    for n in range(1, max_new_tokens + 1):
        log_probs = model(unseen, cache=cache)[:, -1].float().log_softmax(dim=-1)  # (N, V)
        totals = scores[:, None] + log_probs  # (N, V)
        if stop_token is not None:
            score, row = totals[:, stop_token].max(dim=0)  # two scalars
            if score / n > best_mean:
                best_mean, best = score / n, torch.cat((beams[row], idx.new_tensor([stop_token])))
            totals[:, stop_token] = -math.inf
        scores, places = totals.flatten().topk(num_beams)  # both (N,)
        rows, unseen = places // V, places[:, None] % V  # (N,) the beams, (N, 1) their new tokens
        beams = torch.cat((beams[rows], unseen), dim=1)
        for layer in cache:  # one beam may have several successors, another none
            layer.kv[:, :, :, : layer.length] = layer.kv[:, rows, :, : layer.length]
        if best_mean >= scores[0] / max_new_tokens:  # scores only fall: none can end above this
            return best
    return beams[0]

# ---- Faster on a CPU -----------------------------------------------------------------------------
def dropout(x, p, training=True):
    """F.dropout: while training, each element of x becomes 0 with probability p and the others are
    scaled up, so that the model cannot rely on any single one."""
    if not training or p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    # PyTorch draws a number for each element. NumPy draws 64 bits, which serve four elements: 16
    # bits, read as int16, are a number from -32768 to 32767. The lowest numbers drop their element.
    seed = int(torch.randint(2**62, ()))  # torch.manual_seed decides here too
    generator, count = np.random.Generator(np.random.SFC64(seed)), x.numel() // 4 + 1
    words = generator.integers(0, 2**64, count, dtype=np.uint64)
    numbers = torch.from_numpy(words.view(np.int16))[: x.numel()].view(x.shape)
    dropped = min(round(p * 65536), 65535)  # of 65,536 possible numbers
    keep = torch.ge(numbers, dropped - 32768, out=torch.empty_like(x))  # 0 or 1, in the dtype of x
    return x * keep.mul_(65536 / (65536 - dropped))

# ---- Checkpoints ---------------------------------------------------------------------------------
@contextlib.contextmanager
def whole_file(path):
    """A file to write, which takes the place of path when it is whole and on the disk. If that
    fails, path stays as it was, and an InputError says why."""
    explained = explain(f"{path} could not be written", OSError, RuntimeError)
    try:
        with explained, open(path + ".tmp", "wb") as file:
            yield file
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno != errno.EINVAL:  # the answer of some network drives
                    raise
                warnings.warn(f"{path}: this drive does not confirm writes", stacklevel=2)
        os.replace(path + ".tmp", path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + ".tmp")

def save_checkpoint(path, model, **state):
    """Writes config, weights and state (tensors and plain types), or raises InputError."""
    with whole_file(path) as file:
        torch.save({"config": asdict(model.config), "model": model.state_dict(), **state}, file)

def load_checkpoint(path, verify=False):
    """path -> GPT on the CPU, in eval mode; dict of the training state. Runs no code of the file.
    Weights are mapped from it: only save_checkpoint, not torch.save, may replace it while they are
    in use. With verify, checksums are compared. Raises InputError for what is no checkpoint."""
    os.stat(path)  # a file that is not there is an OSError
    with explain(f"{path} is no whole checkpoint: try --init_from best.pt beside it", Exception):
        require(not verify or zipfile.ZipFile(path).testzip() is None, "wrong checksum")
        state = torch.load(path, weights_only=True, mmap=not verify, map_location="cpu")
        with torch.device("meta"):  # shapes alone: no memory, and no numbers drawn
            model = GPT(GPTConfig(**state.pop("config")))
        # A model that torch.compile has wrapped has _orig_mod. before each name.
        weights = {k.removeprefix("_orig_mod."): w for k, w in state.pop("model").items()}
        model.load_state_dict(weights, assign=True)
    return model.eval(), state

# ---- What the scripts share ----------------------------------------------------------------------
class InputError(ValueError):
    """What the user gave cannot work. The message says what it is and what to do."""

def require(condition, message):
    """Raises InputError unless the condition holds."""
    if not condition:
        raise InputError(message)

@contextlib.contextmanager
def explain(message, *kinds):
    """Errors of these kinds in a with block become InputError("message (their first sentence)")."""
    try:
        yield
    except kinds as error:
        # torch.save's own error hides the OSError behind it, which says why.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise InputError(f"{message} ({one_line(cause).partition('. ')[0]})") from error

def one_line(error):
    """An error's message in one line, without the trace that C++ errors carry."""
    return " ".join(str(error).partition("\nException raised from")[0].split())

def command_line(description):
    """A script's argument parser. From then on, an error that the user can put right ends the
    script with one line on standard error and status 2. Other errors show their traceback."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    stderr = sys.stderr  # when show runs, torch.distributed may have put another one there

    def complain(message):
        raise InputError(f"{message}; --help lists the flags")

    def show(kind, error, trace):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)  # rank 0 usually meets the same error and says it; torchrun then ends all
        message = one_line(error)
        if kind in (BrokenPipeError, KeyboardInterrupt) or "closed by peer" in message:
            os._exit(130)  # the reader left, Ctrl-C, or another process, which says why
        expected = issubclass(kind, (InputError, OSError, MemoryError, torch.OutOfMemoryError))
        compiler = kind.__module__.startswith("torch._")  # torch._dynamo and torch._inductor
        if not (expected or compiler or "allocate memory" in message):
            return sys.__excepthook__(kind, error, trace)
        print(f"{parser.prog}: error: {message}", file=stderr, flush=True)
        sys.exit(2)

    parser.error, sys.excepthook = complain, show
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            # A log file gets each line at once, and "?" for what cannot be shown.
            stream.reconfigure(errors="replace", line_buffering=True)
    return parser

def number(kind, low, high=math.inf):
    """A type for argparse: an int or float from low to high, so never nan."""
    def number(text):  # a name that argparse shows
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}: from {low} to {high} is needed")
        return kind(text)
    return number

def choose_device(device, dtype):
    """--device and --dtype -> torch.device, torch.dtype. Raises InputError for what is not there.
    auto takes bfloat16 where the hardware computes it: float32's range in half the bytes, but with
    8 bits of precision, not 24. Older GPUs have float16, with 11 bits and a small range."""
    if device == "auto":
        available = torch.accelerator.is_available()  # cuda or mps
        device = torch.accelerator.current_accelerator() if available else "cpu"
    with explain(f"--device={device} is not there", Exception):
        device = torch.ones(1, device=device).device
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # PyTorch 2.6 cannot tell, so it gets float32
        able = getattr(torch.cpu, "get_capabilities", dict)()
        native = able.get("amx_bf16") or able.get("avx512_bf16")
    if dtype == "auto":
        fast = {"bfloat16": native, "float16": device.type == "cuda", "float32": True}
        dtype = next(name for name in fast if fast[name])
    return device, getattr(torch, dtype)
