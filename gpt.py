"""GPT-2: token ids in, the next token out. `attend` comes first and calls `dropout`, below it.

Each tensor's shape stands beside it: B sequences of T tokens, C channels a token (n_embd), H heads
of D = C / H channels each, V tokens in the vocabulary; S = T + the tokens already in a KVCache.
Sources: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), and OpenAI's
gpt-2/src/model.py. Only the paper scales weights by depth; dropout is from GPT (2018).
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
    dropout: float = 0.0  # the probability that a number becomes 0, while training

def causal_mask(q, S):
    """The mask (T, S) that is added to q @ k.T, where q (B, H, T, D) has the last T of S tokens:
    -inf, which softmax turns into a weight of 0, for each future token. With T = 2 and S = 5:
                        k0  k1  k2  k3  k4
                    q3   0   0   0   0 -inf
                    q4   0   0   0   0   0"""
    return q.new_full((q.shape[2], S), -math.inf).triu(S - q.shape[2] + 1)

def attend(q, k, v, dropout_p=0.0):
    """softmax(q @ k.T / sqrt(D) + mask) @ v: each query gets a weighted mean of the values, and a
    value weighs more the better its key fits the query. k and v are (B, H, S, D). q (B, H, T, D)
    has only the last T of the S tokens: all of them if there is no cache. Returns (B, H, T, D)."""
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    if dropout_p > 0 and q.device.type == "cpu":  # written out, because `dropout` is faster
        # A score sums up D products, so it spreads sqrt(D) times as wide as one of them. Undivided,
        # softmax can come to give nearly all weight to one key and hardly pass gradients.
        scores = (q / math.sqrt(D)) @ k.transpose(2, 3) + causal_mask(q, S)  # (B, H, T, S)
        weights = scores.softmax(dim=-1)  # (B, H, T, S), each row sums to 1
        return dropout(weights, dropout_p) @ v
    # PyTorch's kernel computes the same, and divides by sqrt(D) itself. Its is_causal lines query 0
    # up with key 0, which is right only for T = S. A single query sees all keys: it needs no mask.
    mask = None if T in (1, S) else causal_mask(q, S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p,
                                          is_causal=T == S)

def dropout(x, p, training=True):
    """F.dropout, faster on a CPU: while training, each element of x becomes 0 with probability p,
    and the others are scaled up. So the model cannot rely on any single one."""
    if not training or p in (0, 1) or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    # PyTorch draws a number for each element. Here 64 random bits serve four elements: 16 bits,
    # read as int16, are a number from -32768 to 32767. The lowest numbers drop their element.
    bits = torch.randint(-2**63, 2**63 - 1, (x.numel() // 4 + 1,))  # int64
    numbers = bits.view(torch.int16)[: x.numel()].view(x.shape)
    n_low = min(round(p * 65536), 65535)  # how many of the 65,536 numbers drop their element
    keep = torch.ge(numbers, n_low - 32768, out=torch.empty_like(x))  # 0 or 1, in the dtype of x
    return x * keep.mul_(65536 / (65536 - n_low))

def linear(n_in, n_out, std=0.02):
    """An nn.Linear with weights from normal(0, std), 0.02 as in OpenAI's model.py, and biases 0."""
    layer = nn.Linear(n_in, n_out)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer

class KVCache:
    """One layer's keys and values of the tokens so far, so that only those of new tokens have to be
    computed. Queries are not kept: a token asks once, but all later tokens look at its key."""
    def __init__(self, model, batch_size):
        assert not model.training, "call model.eval() first, or dropout spoils the text"
        config = model.config
        shape = (2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.kv = model.wte.weight.new_zeros(shape)  # (2, B, H, block_size, D)
        self.length = 0  # how many tokens it holds

    def append(self, k, v):
        """Stores k, v (B, H, T, D) of new tokens. Returns those of all tokens, (2, B, H, S, D)."""
        start = self.length
        self.length += k.shape[2]
        self.kv[0, :, :, start : self.length] = k
        self.kv[1, :, :, start : self.length] = v
        return self.kv[:, :, :, : self.length]

class CausalSelfAttention(nn.Module):
    """Each token gathers information from itself and the tokens before it.
    One softmax weighs the past in one way. H heads of D channels weigh it in H ways with as many
    products. OpenAI wrote its linear layers as convolutions that are one token wide, hence c_."""
    def __init__(self, config):
        super().__init__()
        C, H = config.n_embd, config.n_head
        assert C % H == 0, f"n_embd={C} is no multiple of n_head={H}"
        self.n_head = H
        self.dropout_p = config.dropout
        self.c_attn = linear(C, 3 * C)  # q of all heads, then k, then v
        # The MLP has a c_proj too. All 2 n_layer results add up in x, and so do their variances.
        # As in the paper, each starts sqrt(2 n_layer) times smaller, so the sum keeps its size.
        self.c_proj = linear(C, C, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:  # this layer's KVCache, only while generating
            k, v = cache.append(k, v)  # (B, H, S, D)
        y = attend(q, k, v, self.dropout_p if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return dropout(self.c_proj(y), self.dropout_p, self.training)  # (B, T, C)

class MLP(nn.Module):
    """Each token is transformed by itself: to 4C channels, through GELU, and back to C."""
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.dropout_p = config.dropout
        self.c_fc = linear(C, 4 * C)
        self.c_proj = linear(4 * C, C, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x):
        # GELU (Hendrycks and Gimpel, 2016) is a smooth max(x, 0). Without it, two layers equal one.
        # GPT-2 was trained with its tanh approximation; the exact form gives other numbers.
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return dropout(self.c_proj(x), self.dropout_p, self.training)  # (B, T, C)

class Block(nn.Module):
    """Attention, then MLP. Each reads a normalized x and adds its result to x.
    The sums give gradients a direct way back to every layer. LayerNorm brings each token's channels
    to mean 0 and variance 1, then applies a learned gain and bias."""
    def __init__(self, config):
        super().__init__()
        # LayerNorm adds eps to the variance and never divides by 0. PyTorch's 1e-5 is GPT-2's too.
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)

class GPT(nn.Module):
    """Embeddings, n_layer blocks, and an output layer that is the token embedding again (weight
    tying, Press and Wolf, 2017): reading a token and predicting it take much the same knowledge."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # (V, C), of tokens
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # (block_size, C), of positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)  # both numbers are from OpenAI's model.py
        nn.init.normal_(self.wpe.weight, std=0.01)

    def forward(self, idx, targets=None, caches=None):
        """idx (B, T) int64 -> logits (B, T, V): a score for each token that could come next.
        With targets (B, T) int64 it returns the loss instead, a scalar in nats: the mean of -ln(p),
        where p is the probability that the model gave to a target. Targets of -100 do not count.
        With caches, one KVCache a layer, idx holds the tokens that follow the cached ones, and the
        caches grow by these. Only the last token gets logits, (B, 1, V)."""
        T = idx.shape[1]
        past = 0 if caches is None else caches[0].length
        assert past + T <= self.config.block_size, f"{past + T} tokens exceed block_size"
        x = self.wte(idx) + self.wpe.weight[past : past + T]  # (B, T, C) + (T, C)
        x = dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            x = block(x, None if caches is None else caches[layer])  # (B, T, C)
        if caches is not None:
            x = x[:, -1:]  # (B, 1, C)
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T, V), or (B, 1, V)
        if targets is None:
            return logits
        assert caches is None and targets.shape == idx.shape, "targets need idx's shape, no caches"
        # Under autocast the logits have 16 bits. The loss is computed, and returned, in 32.
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

def candidates(logits, temperature=1.0, top_k=None, top_p=None):
    """The tokens that may come next: logits (B, V) -> their probabilities (B, k), likeliest first,
    and their ids (B, k) int64.
    temperature divides the logits: below 1 the likely tokens become likelier, above 1 all become
    more alike, and 0 always takes the likeliest token (greedy), as top_k=1 does. top_k keeps the k
    likeliest tokens; None and 0 keep all. Of these, top_p > 0 keeps just enough of the likeliest to
    add up to top_p (Holtzman et al., 2020); None and 1 keep all."""
    V = logits.shape[-1]
    k = 1 if temperature < 1e-6 else min(top_k or V, V)  # greedy: nothing can be divided by 0
    logits, ids = logits.float().topk(k)  # both (B, k)
    probs = (logits / max(temperature, 1e-6)).softmax(dim=-1)  # (B, k)
    if top_p is not None and top_p < 1:
        sum_before = probs.cumsum(dim=-1) - probs  # (B, k), of all likelier tokens
        probs = probs.masked_fill(sum_before >= top_p, 0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs, ids

@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None,
             generator=None, observe=None):
    """Yields the next token of each row, max_new_tokens times: idx (B, T) int64 -> (B,) int64.
    `candidates` explains temperature, top_k and top_p. Only the last block_size tokens of idx
    count. A row that met stop_token repeats it; once all rows have, generation ends. observe, if
    given, is called as observe(probs, ids, token) with the candidates and the token drawn."""
    assert idx.dim() == 2 and idx.shape[1] > 0, f"idx {tuple(idx.shape)} is not (B, T), T >= 1"
    window = idx[:, -model.config.block_size :]  # (B, T)
    caches = [KVCache(model, len(idx)) for _ in model.h]
    stopped = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        if window.shape[1] > model.config.block_size:
            # Sliding by one token would change every token's position, and so every key. So the
            # window drops half of its tokens at once, and the others get new keys.
            window = window[:, -max(1, model.config.block_size // 2) :]
            caches = [KVCache(model, len(idx)) for _ in model.h]
        unseen = window[:, caches[0].length :]  # one token, or all if the caches are empty
        logits = model(unseen, caches=caches)[:, -1]  # (B, V)
        probs, ids = candidates(logits, temperature, top_k, top_p)  # both (B, k)
        # The CPU draws, so the device does not change the random numbers.
        choice = torch.multinomial(probs.cpu(), 1, generator=generator)  # (B, 1), from 0 to k - 1
        token = ids.gather(1, choice.to(ids.device))[:, 0]  # (B,)
        if stop_token is not None:
            token = torch.where(stopped, stop_token, token)
            stopped = token == stop_token
        if observe is not None:
            observe(probs, ids, token)
        yield token
        if stopped.all():
            return
        window = torch.cat((window, token[:, None]), dim=1)

@torch.inference_mode()
def beam_search(model, idx, max_new_tokens, num_beams, stop_token=None):
    """idx (1, T) int64 -> the likeliest continuation that is found, by the mean log-probability of
    its tokens, (n,) int64. After n steps there are N = num_beams beams of n tokens: the likeliest
    that follow from those before. The likeliest one that ends with stop_token is put aside."""
    V = model.config.vocab_size
    caches = [KVCache(model, num_beams) for _ in model.h]
    beams = idx.new_empty(num_beams, 0)  # (N, n)
    unseen = idx.expand(num_beams, -1)  # (N, T)
    scores = torch.full((num_beams,), -math.inf, device=idx.device)  # (N,), log-probabilities
    scores[0] = 0  # all beams are equal at first, so only one may have successors
    found = []  # (mean log-probability, sequence)
    for n in range(1, max_new_tokens + 1):
        log_probs = model(unseen, caches=caches)[:, -1].float().log_softmax(dim=-1)  # (N, V)
        totals = scores[:, None] + log_probs  # (N, V)
        if stop_token is not None:  # it counts, even if N unfinished sequences are likelier
            score, best = totals[:, stop_token].max(dim=0)  # two scalars
            found.append((score / n, torch.cat((beams[best], idx.new_tensor([stop_token])))))
            totals[:, stop_token] = -math.inf
        scores, flat_ids = totals.flatten().topk(num_beams)  # both (N,), the highest score first
        parents = flat_ids // V  # (N,), the beams that go on: some twice, some never
        unseen = flat_ids[:, None] % V  # (N, 1), their new tokens
        beams = torch.cat((beams[parents], unseen), dim=1)
        for cache in caches:
            cache.kv[:, :, :, : cache.length] = cache.kv[:, parents, :, : cache.length]
    found.append((scores[0] / max(1, max_new_tokens), beams[0]))
    return max(found, key=lambda pair: pair[0])[1]

@torch.no_grad()
def center_logits(model):
    """Moves the logits to around 0. OpenAI's lie far below, where bfloat16 has steps of 0.25 (from
    -32) and 0.5 (from -64), so likely tokens tie. wte's mean row moves to wpe: the blocks read the
    same wte + wpe. All logits of a position lose the same number, which softmax ignores."""
    mean = model.wte.weight.mean(dim=0)  # (C,)
    model.wte.weight -= mean
    model.wpe.weight += mean

# ---- Around the model, which needs none of these imports -----------------------------------------
import argparse
import contextlib
import functools
import os
import sys
import time
import traceback
import zipfile

import tiktoken

class InputError(ValueError):
    """The user's mistake, told in one line. Our own mistakes are asserts."""

def require(condition, message):
    if not condition:
        raise InputError(message)

def one_line(error):
    """An error's message in one line, without the trace that C++ errors carry."""
    return " ".join(str(error).partition("\nException raised from")[0].split())

@contextlib.contextmanager
def explain(message, *kinds):
    """These kinds of errors in a with block become InputError("message (their first sentence)")."""
    try:
        yield
    except kinds as error:
        # torch.save's own error hides the OSError behind it, which says why.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise InputError(f"{message} ({one_line(cause).partition('. ')[0]})") from error

# ---- Text and tokens -----------------------------------------------------------------------------
DATA_DIR = os.path.join(os.path.dirname(os.path.realpath(__file__)), "data")
VOCAB_PATH = os.path.join(DATA_DIR, "vocab.bpe")
END_OF_TEXT = 50256  # <|endoftext|>, which stood between the documents GPT-2 was trained on
# A text is first cut into pieces, and no token spans two. ++ is a + that gives nothing back.
PATTERN = (r"'(?:[sdmt]|ll|ve|re)"  # the ending of an English word, as in it's
           r"| ?\p{L}++| ?\p{N}++"  # a word or a number, with the space before it
           r"| ?[^\s\p{L}\p{N}]++"  # punctuation
           r"|\s++$|\s+(?!\S)|\s")  # white space; \s+ gives its last one back to a word

def byte_spelling():
    """-> {character of vocab.bpe: the byte it stands for}, in the order of the tokens 0 to 255: the
    printable bytes stand for themselves, the other 68 are spelled chr(256) to chr(323)."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

def merges():
    """The lines of vocab.bpe that join two tokens: all but the first."""
    with open(VOCAB_PATH, encoding="utf-8") as file:
        return file.read().splitlines()[1:]

def vocabulary():
    """-> {token as vocab.bpe spells it: id}: the bytes, then what vocab.bpe's lines join, such as
    the two bytes of "é", then <|endoftext|>. Every byte is a token, so there is no unknown one."""
    joined = [pair.replace(" ", "") for pair in merges()]
    return {token: i for i, token in enumerate([*byte_spelling(), *joined, "<|endoftext|>"])}

@functools.lru_cache
def get_tokenizer():
    """GPT-2's byte-pair encoding, a tiktoken.Encoding. It encodes a text by joining the pair that
    makes the lowest id, again and again."""
    byte_of = byte_spelling()
    ranks = {bytes(byte_of[c] for c in token): i for token, i in vocabulary().items()}
    del ranks[b"<|endoftext|>"]  # only as a special token
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": END_OF_TEXT}, explicit_n_vocab=50257)

def encode(text, name="the text"):
    """text -> list of token ids. <|endoftext|> becomes 50256; OpenAI's encoder splits it up."""
    with explain(f"{name} cannot be encoded; has it a million spaces in a row?", ValueError):
        return get_tokenizer().encode(text, allowed_special="all")

def decode_utf8(data, name, offset=0):
    """The bytes at offset in a file -> text, with \\n as line ends and no byte-order marks."""
    nul = data.find(b"\0")
    require(nul < 0, f"{name}: byte {offset + nul} is NUL, as in UTF-16; save the file as UTF-8")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        place = f"byte {offset + error.start} ({data[error.start]:#x})"
        raise InputError(f"{name}: {place} is not UTF-8; save the file as UTF-8") from error
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")

# ---- Checkpoints ---------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic_write(path):
    """Opens path.tmp, which replaces path once it is complete. After an error path is as before."""
    try:
        with explain(f"{path} could not be written", OSError):
            with open(path + ".tmp", "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the new name without content
            os.replace(path + ".tmp", path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + ".tmp")

def save_checkpoint(path, model, **state):
    """Writes config, weights and state (tensors and plain types), or raises InputError."""
    with explain(f"{path} could not be written", RuntimeError), atomic_write(path) as file:
        torch.save({"config": asdict(model.config), "model": model.state_dict(), **state}, file)

def with_weights(config, weights):
    """-> a GPT that holds these tensors, {name: tensor}, without drawing random ones first."""
    with torch.device("meta"):  # shapes alone
        model = GPT(config)
    model.load_state_dict(weights, assign=True)  # each exactly once, and in its shape
    return model

def load_checkpoint(path, verify=False):
    """path -> GPT on the CPU, in eval mode; dict of the training state. No code in it is run.
    verify compares checksums. Without verify the weights stay in the file until they are used: do
    not write into it. atomic_write may replace it, as a mapped file lives on (not on Windows)."""
    with explain(f"{path} cannot be read as a checkpoint; try another file", Exception):
        require(not verify or zipfile.ZipFile(path).testzip() is None, "wrong checksum")
        state = torch.load(path, weights_only=True, mmap=not verify, map_location="cpu")
        config = state.pop("config")
        require(config.pop("bias", True), "it has no biases, but GPT-2 has")  # a fork's switch
        require(config.get("vocab_size") == GPTConfig.vocab_size, "its vocabulary is not GPT-2's")
        # torch.compile puts _orig_mod. before each name, and some programs save them so.
        weights = {k.removeprefix("_orig_mod."): w for k, w in state.pop("model").items()}
        config = GPTConfig(**config)
    with explain(f"{path} does not fit GPT", RuntimeError):
        return with_weights(config, weights).eval(), state

# ---- What the scripts share ----------------------------------------------------------------------
def show_error(kind, error, trace):
    """sys.excepthook: one line for what the user can put right, silence for Ctrl-C."""
    message = one_line(error) or kind.__name__
    shared = int(os.environ.get("WORLD_SIZE") or 1) > 1  # the run has several processes
    if shared and os.environ.get("LOCAL_RANK") != "0":
        time.sleep(5)  # process 0 usually reports the same error; torchrun then ends the rest
    if kind in (BrokenPipeError, KeyboardInterrupt) or (shared and "closed by peer" in message):
        os._exit(130)  # the reader of a pipe left, or it was Ctrl-C, or another process left
    compiler = kind.__module__.startswith("torch._")  # torch._dynamo and torch._inductor
    expected = issubclass(kind, (InputError, OSError, MemoryError, torch.OutOfMemoryError))
    if not (expected or compiler or "allocate memory" in message):
        return sys.__excepthook__(kind, error, trace)
    if not issubclass(kind, InputError):  # whoever changes the code needs the place
        place = traceback.extract_tb(trace)[-1]
        message += f" ({os.path.basename(place.filename)}:{place.lineno})"
    message += "; --no-compile goes without torch.compile" if compiler else ""
    # sys.stderr may be a wrapper of torch.distributed, whose text is lost on sys.exit.
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.__stderr__, flush=True)
    sys.exit(2)

def start_script(doc):
    """Sets up errors and output. -> an ArgumentParser; a flag without a default may be absent."""
    sys.excepthook = show_error
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stream lacks it
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a log gets lines at once
    return argparse.ArgumentParser(description=doc.partition("\n")[0], usage=argparse.SUPPRESS,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                   argument_default=argparse.SUPPRESS, allow_abbrev=False)

def number(kind, low, high=math.inf):
    """A type for argparse: an int or float from low to high, so never nan or infinite."""
    def check(text):
        if not low <= kind(text) <= min(high, sys.float_info.max):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    check.__name__ = kind.__name__  # argparse says "invalid int value"
    return check

DTYPES = ("auto", "bfloat16", "float16", "float32")

def choose_device(device, dtype):
    """--device and --dtype -> torch.device, torch.dtype. auto is bfloat16 where x86 or an NVIDIA
    GPU has it (float32's range, 8 bits of precision, not 24), else float16 on cuda, or float32."""
    if device == "auto":
        found = torch.accelerator.is_available()  # cuda, mps or xpu
        device = torch.accelerator.current_accelerator() if found else "cpu"
    with explain(f"--device={device} cannot be used", Exception):
        device = torch.ones(1, device=device).device
    native = False  # whether the hardware computes in bfloat16
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # PyTorch 2.6 lacks it
        able = torch.cpu.get_capabilities()
        native = able.get("amx_bf16") or able.get("avx512_bf16")
    if dtype == "auto":
        dtype = "bfloat16" if native else "float16" if device.type == "cuda" else "float32"
    return device, getattr(torch, dtype)
