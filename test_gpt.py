"""The tests: `pytest test_gpt.py`. No network, no GPU; about two minutes on two cores."""
import contextlib
import csv
import hashlib
import http.server
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import torch

import gpt
import load_gpt2
import train
from gpt import GPT, GPTConfig, InputError, KVCache

HERE = os.path.dirname(os.path.abspath(__file__))
SMALL = ("--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=32", "--device=cpu",
         "--dtype=float32")


# ---- Helpers -----------------------------------------------------------------------------------

def command(script, *flags, status=0, cwd=None, **options):
    """Runs a script as a user would; returns what it printed on (standard output, error)."""
    done = subprocess.run([sys.executable, os.path.join(HERE, script), *flags], cwd=cwd, text=True,
                          encoding="utf-8", capture_output=True, timeout=300, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def main(script, *flags):
    """Runs a script inside this process: no seconds of imports, and its errors are exceptions."""
    saved = sys.argv, sys.excepthook, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [script, *map(str, flags)]
    try:
        runpy.run_path(os.path.join(HERE, script), run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    finally:
        sys.argv, sys.excepthook = saved[:2]
        for number, handler in saved[2].items():
            signal.signal(number, handler)


def log_of(folder):
    with open(os.path.join(folder, "log.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def same(a, b):
    """Whether two nests of dicts, lists, tensors and plain values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_run(a, b):
    """Weights, optimizer state and log of two runs' folders are equal, but for the speed."""
    (model_a, state_a), (model_b, state_b) = (
        gpt.load_checkpoint(os.path.join(folder, "ckpt.pt")) for folder in (a, b))
    logs = [[{k: v for k, v in row.items() if k != "tokens_per_s"} for row in log_of(folder)]
            for folder in (a, b)]
    return (same(model_a.state_dict(), model_b.state_dict()) and logs[0] == logs[1]
            and same(state_a["optimizer"], state_b["optimizer"]))


def tiny(seed=0, **changes):
    """A small GPT with every parameter random, biases and gains too, and large enough to matter."""
    sizes = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 3, "n_embd": 12} | changes
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


# ---- The oracle: GPT-2 in numpy float64, from the paper and the layout of OpenAI's variables ----

def oracle(weights, n_head, tokens):
    """weights {OpenAI's name: float64 array}, tokens (T,) -> logits (T, V)."""
    def norm(x, name):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * weights[name + "/g"] + weights[name + "/b"]

    def project(x, name):
        return x @ weights[name + "/w"][0] + weights[name + "/b"]

    T = len(tokens)
    x = weights["wte"][tokens] + weights["wpe"][:T]
    size = x.shape[1] // n_head
    for layer in range(sum(name.endswith("/ln_1/g") for name in weights)):
        h = f"h{layer}"
        q, k, v = np.split(project(norm(x, h + "/ln_1"), h + "/attn/c_attn"), 3, axis=1)
        heads = []
        for i in range(n_head):
            part = slice(i * size, (i + 1) * size)
            scores = q[:, part] @ k[:, part].T / np.sqrt(size)
            scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
            e = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(e / e.sum(1, keepdims=True) @ v[:, part])
        x = x + project(np.concatenate(heads, axis=1), h + "/attn/c_proj")
        m = project(norm(x, h + "/ln_2"), h + "/mlp/c_fc")
        m = 0.5 * m * (1 + np.tanh(np.sqrt(2 / np.pi) * (m + 0.044715 * m**3)))
        x = x + project(m, h + "/mlp/c_proj")
    return norm(x, "ln_f") @ weights["wte"].T


def openai_weights(model):
    """Our parameters under OpenAI's names and in their layout, written out by hand."""
    weights = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().double().numpy()
        path, kind = name.rsplit(".", 1)
        path = re.sub(r"^h\.(\d+)", r"h\1", path).replace(".", "/")
        if path in ("wte", "wpe"):
            weights[path] = value
        elif "ln_" in path:
            weights[path + {"weight": "/g", "bias": "/b"}[kind]] = value
        else:
            weights[path + {"weight": "/w", "bias": "/b"}[kind]] = (
                value.T[None] if kind == "weight" else value)
    return weights


# ---- The model ---------------------------------------------------------------------------------

def test_logits_and_loss_equal_the_oracle():
    model = tiny()
    idx = torch.randint(61, (3, 16))
    targets = torch.randint(61, (3, 16))
    with torch.no_grad():
        logits, none = model(idx)
        _, loss = model(idx, targets)
    assert none is None and logits.shape == (3, 16, 61)
    expected = np.stack([oracle(openai_weights(model), 3, row.numpy()) for row in idx])
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=2e-4)
    shifted = np.exp(expected - expected.max(-1, keepdims=True))
    chosen = np.take_along_axis(shifted / shifted.sum(-1, keepdims=True),
                                targets.numpy()[..., None], -1)
    assert loss.item() == pytest.approx(-np.log(chosen).mean(), abs=1e-5)


@pytest.mark.parametrize("rows", (2048, 7))
def test_loss_and_gradients_equal_autograds(monkeypatch, rows):
    monkeypatch.setattr(gpt.LinearCrossEntropy, "ROWS", rows)
    model = tiny()
    idx, targets = torch.randint(61, (3, 16)), torch.randint(61, (3, 16))
    _, loss = model(idx, targets)
    (loss * 3).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits, _ = model(idx)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (expected * 3).backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad.to_dense(), rtol=1e-4, atol=1e-5)


def test_size_initialisation_and_first_loss():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 124_439_808
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=4, n_embd=128))
    std = {name: p.std().item() for name, p in model.named_parameters() if p.dim() >= 2}
    for name, value in std.items():
        expected = 0.02 / math.sqrt(2 * 2) if name.endswith("c_proj.weight") else 0.02
        assert value == pytest.approx(expected, rel=0.05), name
    idx = torch.randint(50257, (4, 64))
    assert model(idx, idx.roll(1))[1].item() == pytest.approx(math.log(50257), abs=0.1)


def test_a_tiny_model_overfits_a_batch():
    torch.manual_seed(0)
    model = GPT(GPTConfig(61, 16, 2, 2, 32))
    idx, targets = torch.randint(61, (2, 4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        _, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_dropout_has_the_right_share_and_mean_and_is_off_in_eval():
    torch.manual_seed(0)
    x = torch.ones(400, 501)
    y = gpt.dropout(x, 0.1, True)
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=0.003)
    assert y.mean().item() == pytest.approx(1, abs=0.003)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.9], rel=1e-4)
    assert gpt.dropout(x, 0.1, False) is x
    model = tiny(dropout=0.5)
    idx = torch.randint(61, (2, 16))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_attention_written_out_equals_sdpa():
    q, k, v = torch.randn(3, 2, 3, 9, 4)
    for T in (9, 4, 1):  # fewer queries than keys, too
        fused = gpt.attend(q[:, :, -T:], k, v, 0.0)
        written_out = gpt.attend(q[:, :, -T:], k, v, 1e-9)  # drops none, yet takes the other path
        torch.testing.assert_close(written_out, fused)


@pytest.mark.parametrize("wrong", ({"n_head": 5}, {"n_layer": 0}, {"vocab_size": -1},
                                   {"dropout": 1.0}, {"dropout": math.nan}, {"block_size": 1.5}))
def test_impossible_sizes_name_their_numbers(wrong):
    with pytest.raises(ValueError, match=re.escape(str(next(iter(wrong.values()))))):
        GPTConfig(**wrong)


def test_too_long_a_sequence_is_a_value_error():
    with pytest.raises(ValueError, match="17.*16"):
        tiny()(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize("B", (1, 3))
@pytest.mark.parametrize("pieces", ((16,), (1,) * 16, (5, 1, 7, 3)))
def test_cached_logits_equal_uncached(B, pieces):
    model = tiny()
    idx = torch.randint(61, (B, 16))
    cache = KVCache(model.config, B, "cpu", torch.float32)
    with torch.no_grad():
        parts = [model(part, cache=cache)[0] for part in idx.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(idx)[0], rtol=1e-4, atol=1e-4)


# ---- Sampling ----------------------------------------------------------------------------------

def collect(tokens):
    return torch.stack(list(tokens), dim=1)


def test_generation_past_the_window_equals_plain_recomputation():
    model, idx = tiny(), torch.randint(61, (2, 5))
    ours = collect(model.generate(idx, 40, temperature=0))
    window, expected = idx, []
    for _ in range(40):
        if window.shape[1] > 16:
            window = window[:, -8:]
        with torch.no_grad():
            token = model(window)[0][:, -1].argmax(-1)
        expected.append(token)
        window = torch.cat((window, token[:, None]), dim=1)
    assert torch.equal(ours, torch.stack(expected, dim=1))
    for length in (15, 16, 17, 50):
        assert collect(model.generate(torch.randint(61, (2, length)), 3)).shape == (2, 3)


def test_seeds_modes_and_global_randomness():
    model, idx = tiny(dropout=0.3).train(), torch.randint(61, (2, 5))
    before = torch.get_rng_state()
    a, b = (collect(model.generate(idx, 20, generator=torch.Generator().manual_seed(1)))
            for _ in range(2))
    c, d = (collect(model.generate(idx, 20)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(c, d)
    assert torch.equal(before, torch.get_rng_state()) and model.training


def test_rows_stop_on_their_own():
    model, idx = tiny(), torch.randint(61, (4, 5))
    free = collect(model.generate(idx, 30, temperature=0))
    stop = free[0, 3].item()
    stopped = collect(model.generate(idx, 30, temperature=0, stop_token=stop))
    for row, expected in zip(stopped, free):
        ends = (expected == stop).nonzero()
        end = ends[0].item() if len(ends) else 30
        assert torch.equal(row[: end + 1], expected[: end + 1][: len(row)])
        assert (row[end:] == stop).all()
    alone = collect(model.generate(idx[:1], 30, temperature=0, stop_token=stop))
    assert alone.shape[1] == 1 + free[0].tolist().index(stop)


def brute_force(logits, temperature, top_k, top_p):
    """Probabilities by definition: sort, cut, renormalise, one row of float64 at a time."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")[: top_k or len(p)]
    kept = p[order] / p[order].sum()
    last = next((i for i, total in enumerate(np.cumsum(kept)) if total >= top_p - 1e-12), len(kept))
    kept = kept[: last + 1]
    return order[: last + 1], kept / kept.sum()


@pytest.mark.parametrize("temperature, top_k, top_p", (
    (1.0, None, None), (0.7, 0, 1.0), (1.3, 5, None), (1.0, 500, None), (1.0, None, 0.6),
    (0.8, 7, 0.5), (1.0, 1, None), (1.0, None, 1e-9), (2.0, 4, 0.9)))
def test_filters_against_brute_force(temperature, top_k, top_p):
    logits = torch.randn(30, generator=torch.Generator().manual_seed(3)) * 2
    ids, probs = brute_force(logits.double().numpy(), temperature, top_k, top_p or 1.0)
    generator = torch.Generator().manual_seed(0)
    drawn = gpt.next_token(logits.expand(20000, -1), temperature, top_k, top_p, generator)
    counts = np.bincount(drawn.numpy(), minlength=30)
    assert set(counts.nonzero()[0]) <= set(ids)
    error = np.abs(counts[ids] / 20000 - probs)
    assert (error < 5 * np.sqrt(probs * (1 - probs) / 20000) + 1e-9).all()


def test_top_k_keeps_exactly_k_on_ties_and_greedy_survives_extremes():
    generator = torch.Generator().manual_seed(0)
    drawn = gpt.next_token(torch.zeros(3000, 20), 1.0, 4, None, generator)
    assert len(drawn.unique()) == 4
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (0, 1e-30, 1e-320):
        assert gpt.next_token(logits, temperature, None, None, generator).item() == 1
    assert collect(tiny().generate(torch.zeros(1, 1, dtype=torch.int64), 2, 1e30)).shape == (1, 2)
    assert list(tiny().generate(torch.zeros(1, 1, dtype=torch.int64), 0)) == []


@pytest.mark.parametrize("wrong", (
    {"temperature": -1}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1},
    {"top_p": math.nan}, {"max_new_tokens": -1}))
def test_senseless_sampling_is_refused_at_the_call(wrong):
    with pytest.raises(ValueError, match=re.escape(str(next(iter(wrong.values()))))):
        tiny().generate(torch.zeros(1, 1, dtype=torch.int64), **{"max_new_tokens": 1} | wrong)


def test_beam_search():
    model = tiny(vocab_size=5)
    idx = torch.tensor([[1, 3]])

    def mean_log_probability(tokens):
        full = torch.cat((idx[0], torch.tensor(tokens)))[None]
        with torch.no_grad():
            log_probs = model(full)[0].log_softmax(-1)[0]
        return sum(log_probs[i + 1, t].item() for i, t in enumerate(tokens)) / len(tokens)

    greedy = collect(model.generate(idx, 4, temperature=0))[0]
    assert gpt.beam_search(model, idx, 4, 1).tolist() == greedy.tolist()
    best = max(itertools.product(range(5), repeat=4), key=mean_log_probability)
    assert gpt.beam_search(model, idx, 4, 5**3).tolist() == list(best)
    # with a stop token a sequence ends where it first appears
    ended = [s for n in range(1, 5) for s in itertools.product(range(5), repeat=n)
             if 2 not in s[:-1] and (n == 4 or s[-1] == 2)]
    best = max(ended, key=mean_log_probability)
    assert gpt.beam_search(model, idx, 4, 5**3, stop_token=2).tolist() == list(best)


# ---- The tokenizer -----------------------------------------------------------------------------

def test_tokenizer():
    assert gpt.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert gpt.encode("Hello, I am") == [15496, 11, 314, 716]
    assert gpt.encode("a<|endoftext|>b") == [64, 50256, 65]
    tokenizer = gpt.get_tokenizer()
    assert tokenizer.name == "gpt2" and tokenizer.n_vocab == 50257
    for text in ("naïve café 你好 🙂🙃 \u202e\u0301 \x00\x7f \t\r\n  \u3000x", " " * 50 + "\n\n x", ""):
        assert tokenizer.decode(gpt.encode(text)) == text
    with open(gpt.VOCAB_PATH, "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest() == (
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")
