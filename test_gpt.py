"""The tests: `pytest test_gpt.py`. No network, no GPU; two to five minutes on two cores."""
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
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
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
    saved = sys.argv, sys.excepthook
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [script, *map(str, flags)]
    try:
        runpy.run_path(os.path.join(HERE, script), run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    finally:
        sys.argv, sys.excepthook = saved
        for number, handler in handlers.items():
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
    """A small GPT with every parameter random, biases and gains too, and large enough to matter;
    what it predicts depends on what it attends to more than on the last token."""
    sizes = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 3, "n_embd": 12} | changes
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=1.5 if "attn" in name else 0.5)
        model.ln_f.bias *= 0.1
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

    class Plain:  # leaves the tied weight's two gradients to autograd
        apply = staticmethod(lambda w, i: (torch.nn.functional.embedding(i, w), w))

    monkeypatch.setattr(gpt, "TiedEmbedding", Plain)
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
    a, b = (torch.Generator().manual_seed(1) for _ in range(2))
    ours = collect(model.generate(idx, 40, 1.0, generator=a))
    assert len(ours.unique()) > 10  # or the window would not matter
    window, expected = idx, []
    for _ in range(40):
        if window.shape[1] > 16:
            window = window[:, -8:]
        with torch.no_grad():
            token = gpt.next_token(model(window)[0][:, -1], 1.0, None, None, b)
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


def test_damaged_weights_are_noticed_however_tokens_are_chosen():
    model = tiny()
    idx = torch.tensor([[1, 3]])
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[0, 0] = math.nan
    for temperature in (0, 1):
        with pytest.raises(InputError, match="not finite"):
            next(model.generate(idx, 4, temperature))
    with pytest.raises(InputError, match="not finite"):
        gpt.beam_search(model, idx, 4, 2)


# ---- The tokenizer -----------------------------------------------------------------------------

def test_tokenizer():
    assert gpt.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert gpt.encode("Hello, I am") == [15496, 11, 314, 716]
    assert gpt.encode("a<|endoftext|>b") == [64, 50256, 65]
    tokenizer = gpt.get_tokenizer()
    assert tokenizer.name == "gpt2" and tokenizer.n_vocab == 50257
    for text in ("naïve café 你好 🙂🙃 \u202e\u0301 \x00\x7f \t\r\n  \u3000x",
                 " " * 50 + "\n\n x", ""):
        assert tokenizer.decode(gpt.encode(text)) == text
    with open(gpt.VOCAB_PATH, "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest() == (
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")


# ---- Training ----------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of ten steps on the built-in text, as a user starts it, from another directory."""
    folder = tmp_path_factory.mktemp("run")
    out, _ = command("train.py", *SMALL, "--max_iters=10", "--eval_interval=5", "--eval_iters=3",
                     "--log_interval=1", "--warmup_iters=3", cwd=folder)
    return folder / "out", out


def test_train_and_sample_as_a_user_would(run):
    folder, out = run
    assert {"ckpt.pt", "best.pt", "log.csv", "loss.png"} <= set(os.listdir(folder))
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
    assert "10.8249" in out and out.count("sample: Every effort moves you") == 3
    rows = log_of(folder)
    assert list(rows[0]) == ["iter", "tokens", "loss", "train_loss", "val_loss", "lr", "grad_norm",
                             "tokens_per_s"]
    assert [int(row["iter"]) for row in rows] == list(range(11))
    assert [bool(row["val_loss"]) for row in rows] == [i % 5 == 0 for i in range(11)]
    assert float(rows[0]["train_loss"]) == pytest.approx(math.log(50257), abs=0.1)
    assert [int(row["tokens"]) for row in rows] == [64 * i for i in range(11)]
    _, state = gpt.load_checkpoint(str(folder / "ckpt.pt"))
    assert state.keys() == {"optimizer", "scaler", "step", "best_val_loss", "log_bytes", "args"}
    assert state["step"] == 10 and state["log_bytes"] == os.path.getsize(folder / "log.csv")
    best, state = gpt.load_checkpoint(str(folder / "best.pt"))
    assert state.keys() == {"step", "val_loss"}
    assert state["val_loss"] == min(float(row["val_loss"]) for row in rows if row["val_loss"])

    flags = ("--checkpoint", str(folder / "ckpt.pt"), "--max_new_tokens=40", "--device=cpu")
    out, err = command("sample.py", "--start", "Every effort moves you", *flags)
    again, _ = command("sample.py", "--start", "Every effort moves you", *flags)
    assert out == again and out.startswith("Every effort moves you") and len(out) > 100
    assert "step 10" in err and "tokens/s" in err
    out, _ = command("sample.py", "--num_samples=3", "--start=-", *flags, input="\ufeffIvy")
    assert out.startswith("Ivy") and out.count("-" * 80 + "\nIvy") == 2
    out, err = command("sample.py", "--start=" + "x " * 40, "--num_beams=2", "--no-stop",
                       *flags[:2], "--max_new_tokens=0")
    assert out.startswith("x x") and "last 32" in err


def test_resumed_is_the_same_run(run, tmp_path):
    whole, _ = run
    flags = (*SMALL, "--eval_iters=3", "--log_interval=1", "--warmup_iters=3", "--eval_interval=5",
             "--lr_decay_iters=10", f"--out_dir={tmp_path}")
    command("train.py", *flags, "--max_iters=5")
    with open(tmp_path / "log.csv", "a", encoding="utf-8") as file:
        file.write("6,384,1.0,,,1.0,1.0,1.0\n")  # of a step that no checkpoint remembers
    command("train.py", "--resume", f"--out_dir={tmp_path}", "--max_iters=10")
    assert same_run(whole, tmp_path)


def test_evaluation_does_not_change_the_run(run, tmp_path, capsys):
    whole, _ = run
    command("train.py", *SMALL, "--max_iters=10", "--eval_interval=1000", "--eval_iters=1",
            "--log_interval=1", "--warmup_iters=3", f"--out_dir={tmp_path}")
    assert same(*(gpt.load_checkpoint(str(folder / "ckpt.pt"))[0].state_dict()
                  for folder in (whole, tmp_path)))
    before = sorted(os.listdir(tmp_path))
    main("train.py", "--resume", "--eval_only", f"--out_dir={tmp_path}")
    assert sorted(os.listdir(tmp_path)) == before
    last = log_of(tmp_path)[-1]  # dropout is off: the same losses to the last digit
    assert (f"training loss {float(last['train_loss']):.4f}, validation loss "
            f"{float(last['val_loss']):.4f}") in capsys.readouterr().out


def test_weight_decay_and_clipping(run, tmp_path):
    model, state = gpt.load_checkpoint(str(run[0] / "ckpt.pt"))
    decayed, others = state["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)
    assert len(decayed["params"]) == 2 + 4 * 2 and len(others["params"]) == 2 + 8 * 2
    # gradients clipped far below Adam's eps move nothing
    main("train.py", *SMALL, "--max_iters=2", "--warmup_iters=0", "--weight_decay=0",
         "--grad_clip=1e-14", "--eval_iters=1", f"--out_dir={tmp_path}")
    rows = log_of(tmp_path)
    assert float(rows[0]["val_loss"]) == pytest.approx(float(rows[-1]["val_loss"]), abs=1e-4)
    assert float(rows[-1]["grad_norm"]) > 0.1  # as it was before


def test_accumulation_and_processes_do_not_change_the_loss(tmp_path):
    flags = (*SMALL, "--dropout=0", "--max_iters=4", "--log_interval=1", "--eval_iters=2")
    main("train.py", *flags, "--batch_size=8", f"--out_dir={tmp_path / 'a'}")
    main("train.py", *flags, "--batch_size=2", "--gradient_accumulation_steps=4",
         f"--out_dir={tmp_path / 'b'}")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                    f"--master_port={free_port()}", os.path.join(HERE, "train.py"), *flags,
                    "--batch_size=2", "--gradient_accumulation_steps=2",
                    f"--out_dir={tmp_path / 'c'}"], check=True, timeout=300)
    for column in ("loss", "grad_norm", "train_loss", "val_loss"):
        a, b, c = ([float(row[column] or 0) for row in log_of(tmp_path / name)] for name in "abc")
        assert a == pytest.approx(b, rel=1e-5) and a == pytest.approx(c, rel=1e-5), column
    # and a run of two processes goes on with one, if the product of the three stays
    with pytest.raises(InputError, match="4 windows.*has 8"):
        main("train.py", "--resume", f"--out_dir={tmp_path / 'c'}", "--max_iters=5")
    main("train.py", "--resume", f"--out_dir={tmp_path / 'c'}", "--max_iters=5", "--batch_size=8",
         "--gradient_accumulation_steps=1")
    main("train.py", "--resume", f"--out_dir={tmp_path / 'a'}", "--max_iters=5")
    a, c = (log_of(tmp_path / name)[-1]["loss"] for name in "ac")
    assert float(a) == pytest.approx(float(c), rel=1e-5)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Flags:
    """Stands for the arguments of train.py."""
    learning_rate, min_lr, seed, batch_size, windows_per_step = 1.0, 0.1, 5, 3, 6

    def __init__(self, **changes):
        self.__dict__.update(changes)


@pytest.mark.parametrize("warmup, decay", ((0, 10), (3, 10), (10, 10), (20, 10), (0, 0), (1, 1)))
def test_schedule(warmup, decay):
    args = Flags(warmup_iters=warmup, lr_decay_iters=decay)
    rates = [train.learning_rate(step, args) for step in range(30)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    assert all(rate == pytest.approx(0.1) for rate in rates[max(warmup, decay):])
    if (warmup, decay) == (0, 10):
        assert rates[0] == 1 and rates[5] == pytest.approx(0.55)


def test_every_window_once_an_epoch_and_anew_in_the_next():
    order = [w for step in range(7) for micro in range(2)
             for w in train.windows_of(step, micro, Flags(), 14)]
    assert sorted(order[:14]) == sorted(order[14:28]) == list(range(14))
    assert order[:14] != order[14:28] and order[:14] != list(range(14))
    tokens = np.arange(100, dtype=np.uint16)
    inputs, targets = train.get_batch(tokens, [0, 3], 8, torch.device("cpu"))
    assert inputs.tolist() == [list(range(8)), list(range(24, 32))]
    assert targets.tolist() == [list(range(1, 9)), list(range(25, 33))]


def test_low_precision_training(tmp_path):
    main("train.py", *SMALL[:-1], "--dtype=bfloat16", "--max_iters=3", "--log_interval=1",
         f"--out_dir={tmp_path}")
    model, state = gpt.load_checkpoint(str(tmp_path / "ckpt.pt"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 10 < float(log_of(tmp_path)[-1]["loss"]) < 11


# ---- Text to tokens ----------------------------------------------------------------------------

def test_tokens_in_pieces_equal_tokens_of_the_whole(tmp_path, monkeypatch):
    rng = random.Random(0)
    parts = [" ", "  ", "\n", "\n\n", "\t", "\u3000", "\x1c", "\u00a0", "a", "It's", "1984", "...",
             "!?", "é", "你好", "🙂", "<|endoftext|>", " x", "\r\n"]
    monkeypatch.setattr(train, "PIECE", 50)
    for i in range(30):
        text = "".join(rng.choice(parts) for _ in range(500))
        path = tmp_path / f"{i}.txt"
        path.write_bytes(b"\xef\xbb\xbf" * (i % 2) + text.encode())
        tokens, characters, _ = train.tokenize(str(path), str(tmp_path), lambda *_, **__: None)
        text = text.replace("\r\n", "\n")
        assert characters == len(text)
        assert tokens.tolist() == gpt.encode(text)
    monkeypatch.undo()  # and a text without spaces does not take forever
    assert list(train.cut_safely(["x" * 2**21, "y"])) == ["x" * 2**21 + "y"]


def test_folders_and_bins(tmp_path):
    for name, text in (("b.txt", "two"), ("a.txt", "one"), ("c.md", "no")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    tokens, _, key = train.load_tokens(str(tmp_path), str(tmp_path), print)
    assert tokens.tolist() == gpt.encode("one<|endoftext|>two")
    (tmp_path / "a.txt").write_text("One", encoding="utf-8")
    tokens, _, other = train.load_tokens(str(tmp_path), str(tmp_path), print)
    assert tokens.tolist() == gpt.encode("One<|endoftext|>two") and key != other
    np.array([1, 2, 50256], dtype=np.uint16).tofile(tmp_path / "x.bin")
    assert train.load_tokens(str(tmp_path / "x.bin"), "", print)[0].tolist() == [1, 2, 50256]
    np.array([1, 2, 50257], dtype=np.uint16).tofile(tmp_path / "x.bin")
    with pytest.raises(InputError, match="token 2 is 50257"):
        train.load_tokens(str(tmp_path / "x.bin"), "", print)


# ---- Nothing lost ------------------------------------------------------------------------------

def start(*flags, cwd=None):
    return subprocess.Popen([sys.executable, os.path.join(HERE, "train.py"), *SMALL, *flags],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent differently there")
def test_a_signal_saves_and_says_how_to_go_on(tmp_path):
    ends = {signal.SIGINT: 130, signal.SIGTERM: 143}
    processes = {number: start("--max_iters=100000", "--log_interval=1",
                               f"--out_dir={tmp_path / str(int(number))}") for number in ends}
    for number, process in processes.items():
        while not process.stdout.readline().startswith("step 3/"):
            pass
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == ends[number] and "--resume" in out, out + err
        folder = tmp_path / str(int(number))
        _, state = gpt.load_checkpoint(str(folder / "ckpt.pt"), verify=True)
        assert state["step"] >= 3 and int(log_of(folder)[-1]["iter"]) == state["step"]


def killed_and_resumed(folder, kills, max_iters, seed):
    """Runs train.py to max_iters, killed at random moments and resumed; -> signals sent."""
    rng, flags, sent = random.Random(seed), ("--eval_interval=20", "--log_interval=1",
                                             "--eval_iters=2"), []
    for kill in range(kills + 1):
        begun = os.path.exists(os.path.join(folder, "ckpt.pt"))
        process = start(*(("--resume",) if begun else flags), f"--max_iters={max_iters}",
                        f"--out_dir={folder}")
        if kill < kills:
            for _ in range(4 if begun else 6):
                process.stdout.readline()
            time.sleep(rng.random())
            sent.append(rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
            process.send_signal(sent[-1])
        process.communicate(timeout=300)
    assert process.returncode == 0
    return sent


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_killed_and_resumed_is_the_same_run(tmp_path):
    kills = int(os.environ.get("KILLS", 2))  # KILLS=20 pytest -k killed for the long version
    steps = 60 if kills == 2 else 240
    killed_and_resumed(tmp_path / "b", kills, steps, seed=kills)
    # In a process of its own: what ran before in this one may change the last bit of a sum.
    command("train.py", *SMALL, "--eval_interval=20", "--log_interval=1", "--eval_iters=2",
            f"--max_iters={steps}", f"--out_dir={tmp_path / 'a'}")
    assert same_run(tmp_path / "a", tmp_path / "b")


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = str(tmp_path / "x.pt")
    gpt.save_checkpoint(path, tiny(1), step=1)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left"):
            patch.setattr(os, broken, full_disk)
            gpt.save_checkpoint(path, tiny(2), step=2)
    assert gpt.load_checkpoint(path)[1] == {"step": 1} and os.listdir(tmp_path) == ["x.pt"]
    model = torch.compile(tiny(3))
    gpt.save_checkpoint(path, model, step=3)
    assert not any("_orig_mod" in name for name in torch.load(path, weights_only=True)["model"])
    state = torch.load(path, weights_only=True)
    state["model"] = {"_orig_mod." + name: w for name, w in state["model"].items()}
    torch.save(state, path)
    assert same(gpt.load_checkpoint(path)[0].state_dict(), tiny(3).state_dict())


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_damaged_and_hostile_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gpt.save_checkpoint("good.pt", tiny(), step=1)
    with open("good.pt", "rb") as file:
        good = file.read()
    state = torch.load("good.pt", weights_only=True)
    torch.save(state | {"step": Evil()}, "evil.pt")
    torch.save({"weights": 1}, "other.pt")
    torch.save({"config": state["config"], "model": {"wte.weight": torch.zeros(2, 2)}}, "few.pt")
    flipped = bytearray(good)
    flipped[good.index(state["model"]["wte.weight"].numpy().tobytes()) + 100] ^= 1
    for name, content in {"empty.pt": b"", "half.pt": good[: len(good) // 2], "page.pt":
                          b"<!DOCTYPE html>", "text.pt": b"hello",
                          "pickle.pt": pickle.dumps(Evil()), "flipped.pt": bytes(flipped)}.items():
        with open(name, "wb") as file:
            file.write(content)
    torch.save(state | {"config": {"n_embd": "x"}}, "odd.pt")
    torch.save(state | {"model": [1, 2]}, "list.pt")
    torch.save([1, 2], "nothing.pt")
    for name, words in {"missing.pt": "missing", "empty.pt": "empty", "half.pt": "damaged",
                        "page.pt": "web page", "text.pt": "something else", "evil.pt": "refused",
                        "pickle.pt": "something else", "other.pt": "'config'",
                        "odd.pt": "n_embd='x'", "list.pt": "something else",
                        "nothing.pt": "something else", "flipped.pt": "wrong checksum",
                        "few.pt": r'Missing.*"wpe.weight".*mismatch for wte.weight'}.items():
        with pytest.raises(InputError, match=words) as caught:
            gpt.load_checkpoint(name, verify=True)
        assert name in str(caught.value) and "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
    assert not os.path.exists("executed")


def faults(folder):
    """(flags of train.py, what the message must say) for what users of such projects met."""
    for name, content in {"empty.txt": b"", "tiny.txt": b"one two", "odd.bin": b"abc",
                          "short.txt": b"Only a few words here. " * 20,
                          "latin.txt": b"caf\xe9 " * 9,
                          "page.pt": b"<html>", "medium.txt": b"one two three four " * 40}.items():
        (folder / name).write_bytes(content)
    gpt.save_checkpoint(str(folder / "vocab.pt"), tiny(), step=0)
    gpt.save_checkpoint(str(folder / "small.pt"), GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8,
                                                                block_size=16)), step=0)
    (folder / "weights").mkdir()
    shutil.copy(folder / "small.pt", folder / "weights" / "ckpt.pt")
    (folder / "nothing").mkdir()
    return (
        (["--data=empty.txt"], "no text"), (["--data=nowhere.txt"], "no such file or folder"),
        (["--data=nothing"], "no .txt"), (["--data=latin.txt"], r"byte 3 \(0xe9\)"),
        (["--data=odd.bin"], "3 bytes"),
        (["--data=short.txt"], r"108 .*13 .*--block_size=256.*--block_size=12$"),
        (["--data=tiny.txt"], "no block_size fits"),
        (["--data=medium.txt", "--block_size=64"], "17 in the validation split.*--block_size=16$"),
        (["--n_embd=10", "--n_head=3"], "n_embd=10.*n_head=3"),
        (["--batchsize=2"], "--batchsize"), (["--batch_size=0"], "at least 1"),
        (["--learning_rate=nan"], "nan"), (["--learning_rate=1e-5"], "min_lr=4e-05 is above"),
        (["--max_iters=-1"], "-1"), (["--dropout=1"], "below 1"),
        (["--device=cuda:99"], "cuda:99.*--device=auto"), (["--device=gpu"], "gpu"),
        (["--dtype=int8"], "int8"),
        (["--device=cpu", "--dtype=float16"], "float16"),
        (["--init_from=page.pt"], "web page"),
        (["--init_from=vocab.pt", "--block_size=16"], "61.*50257"),
        (["--init_from=small.pt", "--n_layer=2"], "n_layer=2.* has 1"),
        (["--init_from=small.pt", "--block_size=32"], "32.*16"),
        (["--resume", "--out_dir=weights"], "--init_from"), (["--resume"], "no out.ckpt.pt"),
        (["--out_dir=latin.txt/x"], "latin.txt.x"))


def test_faults_get_one_line_and_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, words in faults(tmp_path):
        defaults = [flag for flag in SMALL if flag.split("=")[0] not in " ".join(flags)]
        if any("init_from" in flag or "resume" in flag for flag in flags):
            defaults = []
        with pytest.raises((InputError, OSError), match=words) as caught:
            main("train.py", *(flags if "--block_size=12$" in words else [*defaults, *flags]))
        assert "\n" not in str(caught.value), flags
        assert not os.path.exists("out/ckpt.pt"), flags
    _, err = command("train.py", "--data=empty.txt", status=2, cwd=tmp_path)
    assert err.startswith("train.py: error: --data=") and err.count("\n") == 1
    _, err = command("sample.py", status=2, cwd=tmp_path)
    assert err.startswith("sample.py: error: ") and "load_gpt2.py" in err and err.count("\n") == 1


def test_a_run_is_not_overwritten_nor_changed_by_accident(run, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(run[0], folder)
    out = f"--out_dir={folder}"
    for flags, words in ((SMALL, "run of 10 steps.*--resume.*--overwrite"),
                         (["--resume", "--n_layer=3"], "n_layer=3.*has 2"),
                         (["--resume", f"--data={__file__}"], "not the text")):
        with pytest.raises(InputError, match=words):
            main("train.py", *flags, out, "--max_iters=12")
    main("train.py", "--resume", out)
    assert "nothing to do" in capsys.readouterr().out
    assert same_run(run[0], folder)
    (folder / "ckpt.pt.tmp").write_bytes(b"cut")
    main("train.py", "--resume", out, "--max_iters=11", "--dtype=auto")
    assert not (folder / "ckpt.pt.tmp").exists()
    main("train.py", *SMALL, out, "--max_iters=0", "--overwrite")
    assert [row["iter"] for row in log_of(folder)] == ["0"]


def test_a_run_gone_astray_but_finite_goes_on(tmp_path):
    main("train.py", *SMALL, "--max_iters=1", "--warmup_iters=0", "--grad_clip=0", "--eval_iters=1",
         "--learning_rate=1e4", f"--out_dir={tmp_path}")
    assert float(log_of(tmp_path)[-1]["val_loss"]) > 1000  # whose exponential is no float


def test_a_diverging_run_keeps_the_good_checkpoint(tmp_path):
    flags = (*SMALL, "--eval_interval=4", f"--out_dir={tmp_path}", "--warmup_iters=0",
             "--max_iters=60", "--grad_clip=0", "--learning_rate=1e36", "--eval_iters=1")
    _, err = command("train.py", *flags, status=1)
    assert "loss and gradient norm not finite" in err
    assert "learning rate" in err and "float32" in err and "Traceback" not in err
    model, state = gpt.load_checkpoint(str(tmp_path / "ckpt.pt"), verify=True)
    assert all(p.isfinite().all() for p in model.parameters())


def test_fine_tuning_starts_from_the_weights(run, tmp_path):
    main("train.py", f"--init_from={run[0] / 'best.pt'}", "--block_size=16", "--max_iters=0",
         "--eval_iters=1", f"--out_dir={tmp_path}", "--dropout=0.2", "--device=cpu")
    old, _ = gpt.load_checkpoint(str(run[0] / "best.pt"))
    new, _ = gpt.load_checkpoint(str(tmp_path / "ckpt.pt"))
    assert new.config.block_size == 16 and new.config.dropout == 0.2 and new.config.n_layer == 2
    expected = old.state_dict() | {"wpe.weight": old.wpe.weight[:16].detach()}
    assert same(dict(new.state_dict()), dict(expected))


# ---- OpenAI's and Hugging Face's weights -------------------------------------------------------

# data/tf holds what TensorFlow 2.21 wrote: tf.compat.v1.train.Saver().save() of float32 variables
# named as OpenAI's (model/h0/attn/c_attn/w of shape [1, in, out], ...), normal(0 or 1 for gains,
# 0.3), for n_vocab 23, n_ctx 7, n_embd 4, n_head 2, n_layer 11. three-shards: the same values
# without the model/ scope, on three devices with Saver(sharded=True), after AdamOptimizer.minimize
# made its slots. expected.npz: what tf.train.load_checkpoint() reads from one-shard.
TF = os.path.join(HERE, "data", "tf")


def tf_weights():
    with np.load(os.path.join(TF, "expected.npz")) as file:
        names, shapes, dtypes, values = (file[k] for k in ("names", "shapes", "dtypes", "values"))
    arrays, at = {}, 0
    for name, shape, dtype in zip(names, shapes, dtypes):
        shape = tuple(int(n) for n in re.findall(r"\d+", str(shape)))
        arrays[str(name)] = values[at : at + math.prod(shape)].astype(str(dtype)).reshape(shape)
        at += math.prod(shape)
    assert at == len(values)
    return arrays


@pytest.mark.parametrize("folder", ("one-shard", "three-shards"))
def test_a_checkpoint_by_tensorflow_itself(folder):
    expected = tf_weights()
    index = load_gpt2.read_index(os.path.join(TF, folder, "model.ckpt.index"))
    read = {name: load_gpt2.read_array(*entry[:2], *entry[2:]).numpy()
            for name, entry in index.items() if entry[0]}
    scope = "" if folder == "three-shards" else "model/"
    assert (set(read) == set(expected)) == (folder == "one-shard")
    for name, array in expected.items():
        ours = read[scope + name.removeprefix("model/")]
        assert ours.dtype == array.dtype and ours.shape == array.shape
        assert np.array_equal(ours, array), name
    model = load_gpt2.load_gpt2(os.path.join(TF, folder))
    weights = {name.removeprefix("model/"): array.astype(np.float64)
               for name, array in expected.items()}
    tokens = np.array([22, 0, 7, 7, 13, 1, 19])
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)[None])[0][0]
    np.testing.assert_allclose(logits, oracle(weights, 2, tokens), rtol=0, atol=1e-4)


def test_damaged_openai_files_are_refused(tmp_path):
    def broken(change, *words):
        folder = tmp_path / "x"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(os.path.join(TF, "one-shard"), folder)
        change(folder)
        with pytest.raises(InputError) as caught:
            load_gpt2.load_gpt2(str(folder))
        assert all(word in str(caught.value) for word in words), caught.value
        assert "\n" not in str(caught.value)

    data, index = "model.ckpt.data-00000-of-00001", "model.ckpt.index"
    hparams = {"n_vocab": 23, "n_ctx": 7, "n_embd": 4, "n_head": 2, "n_layer": 11}

    def rewrite(name, edit):
        return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))

    broken(rewrite(data, lambda b: b[:-1]), data, "11247")
    broken(lambda folder: (folder / data).unlink(), data, "missing")
    broken(lambda folder: (folder / index).unlink(), index)
    broken(rewrite(index, lambda b: b[:-1]), index, "not the index")
    broken(rewrite(index, lambda b: b"<html>"), index, "web page")
    broken(rewrite(index, lambda b: b""), index, "empty")
    broken(rewrite("hparams.json", lambda b: b"<Error>"), "hparams.json", "web page")
    broken(rewrite("hparams.json", lambda b: b"{}"), "hparams.json", "n_vocab")
    for changes, words in (({"n_layer": 10}, ("Unexpected", '"h10/mlp/c_fc/w"', "h10/ln_1/g")),
                           ({"n_layer": 12}, ("Missing", '"h.11.attn.c_attn.weight"', "h.11.ln_2")),
                           ({"n_vocab": 24}, ("wte.weight", "([23, 4])", "([24, 4])"))):
        broken(lambda folder, new=changes: (folder / "hparams.json").write_text(
            json.dumps(hparams | new)), *words)
    # a variable renamed: its name begins the block, so that the next ones share less with it
    broken(rewrite(index, lambda b: b.replace(b"model/h0/attn/c_attn/b", b"model/h0/attn/c_attn/g",
                                              1)),
           'Missing key(s) in state_dict: "h.0.attn.c_attn.bias"', '"h0/attn/c_attn/g"')
    with open(os.path.join(TF, "one-shard", index), "rb") as file:
        whole = file.read()
    entry = bytes([8, 1, 18, 4, 18, 2, 8, 12])  # float32, shape (12,): h*/attn/c_attn/b
    assert whole.count(entry) == 11
    broken(rewrite(index, lambda b: b.replace(entry, bytes([8, 2]) + entry[2:], 1)), "neither")
    broken(rewrite(index, lambda b: b.replace(entry, entry[:-1] + b"\x0d", 1)), "does not fit")
    header = bytes([0, 0, 6, 8, 1, 26, 2, 8, 1])  # the empty key: one shard, version 1
    assert whole.startswith(header)
    broken(rewrite(index, lambda b: bytes([0, 0, 6, 8, 1, 16, 1, 26, 0]) + b[9:]), "big-endian")
    for at in random.Random(0).sample(range(len(whole)), 100):  # never a traceback, whatever flips
        (tmp_path / "y").mkdir(exist_ok=True)
        shutil.copytree(os.path.join(TF, "one-shard"), tmp_path / "y", dirs_exist_ok=True)
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        (tmp_path / "y" / index).write_bytes(flipped)
        with contextlib.suppress(InputError):
            load_gpt2.load_gpt2(str(tmp_path / "y"))


def test_swapped_shapes_are_all_listed(tmp_path):
    shutil.copytree(os.path.join(TF, "one-shard"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.ckpt.index"
    data = path.read_bytes()  # [1, 4, 16] <-> [1, 16, 4]: c_fc and mlp.c_proj, of the same size
    a, b = (bytes([18, 2, 8, 1, 18, 2, 8, x, 18, 2, 8, y]) for x, y in ((4, 16), (16, 4)))
    path.write_bytes(data.replace(a, b"?" * 12).replace(b, a).replace(b"?" * 12, b))
    with pytest.raises(InputError) as caught:
        load_gpt2.load_gpt2(str(tmp_path))
    assert str(caught.value).count("size mismatch") == 22


def test_export_and_back(tmp_path):
    torch.manual_seed(0)
    for bias in (True, False):
        model = GPT(GPTConfig(50257, 32, 2, 2, 8, bias=bias))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        gpt.save_checkpoint(str(tmp_path / "x.pt"), model)
        folder = str(tmp_path / f"out-{bias}")
        main("load_gpt2.py", "--export", tmp_path / "x.pt", folder)
        back = load_gpt2.load_gpt2(folder)
        for name, parameter in model.state_dict().items():
            assert torch.equal(parameter, back.state_dict()[name])
        idx = torch.randint(50257, (1, 20))
        torch.testing.assert_close(model(idx)[0], back(idx)[0])
        alone = load_gpt2.load_gpt2(os.path.join(folder, "model.safetensors"))
        assert same(dict(alone.state_dict()), dict(back.state_dict()))
    config = os.path.join(folder, "config.json")
    with open(config, encoding="utf-8") as file:
        good = json.load(file)
    for change in ({"activation_function": "gelu"}, {"n_inner": 17}, {"layer_norm_epsilon": 1e-6},
                   {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}):
        with open(config, "w", encoding="utf-8") as file:
            json.dump(good | change, file)
        with pytest.raises(InputError, match=next(iter(change))):
            load_gpt2.load_gpt2(folder)
    with open(os.path.join(folder, "model.safetensors"), "r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match="model.safetensors"):
        load_gpt2.load_gpt2(folder)


def test_transformers_agrees(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50257, n_positions=64, n_embd=24, n_layer=3, n_head=4)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "a", max_shard_size="2MB")  # in shards
    theirs.save_pretrained(tmp_path / "b")
    idx = torch.randint(50257, (2, 20))
    for name in "ab":
        ours = load_gpt2.load_gpt2(str(tmp_path / name))
        with torch.no_grad():
            difference = (ours(idx)[0] - theirs(idx).logits).abs().max() / theirs(idx).logits.std()
        assert difference < 1e-5
    beams = theirs.generate(idx[:1], max_new_tokens=8, num_beams=4, do_sample=False,
                            eos_token_id=None, pad_token_id=0)
    assert gpt.beam_search(ours, idx[:1], 8, 4).tolist() == beams[0, 20:].tolist()

    gpt.save_checkpoint(str(tmp_path / "x.pt"), ours)
    main("load_gpt2.py", "--export", tmp_path / "x.pt", tmp_path / "c")
    back = transformers.GPT2LMHeadModel.from_pretrained(str(tmp_path / "c")).eval()
    assert torch.equal(back(idx).logits, theirs(idx).logits)
    greedy = back.generate(idx[:1], max_new_tokens=30, do_sample=False, eos_token_id=None,
                           pad_token_id=0)
    assert collect(ours.generate(idx[:1], 30, temperature=0))[0].tolist() == greedy[0, 20:].tolist()
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(str(tmp_path / "c"))
    for text in ("Every effort moves you", " naïve 你好 🙂\n\n  x<|endoftext|>It's 1984"):
        assert tokenizer(text)["input_ids"] == gpt.encode(text)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves FILES under /a and /b with ranges, and misbehaves as `faults` says."""
    files, faults, asked = {}, {}, []

    def do_GET(self):
        self.asked.append((self.path, self.headers.get("Range")))
        source, _, name = self.path[1:].split("/")
        fault, data = self.faults.get((source, name)), self.files[name]
        first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if fault == 404:
            return self.send_error(404)
        if first and first >= len(data):
            return self.send_error(416)
        self.send_response(206 if first else 200)
        self.send_header("Content-Type", "text/html" if fault == "page" else "application/binary")
        self.send_header("Content-Length", len(data) - first)
        self.end_headers()
        self.wfile.write(b"<html>" * 10 if fault == "page" else
                         data[first : len(data) // 2] if fault == "cut" else data[first:])

    def log_message(self, *_):
        pass


def test_download(tmp_path, monkeypatch):
    for name in load_gpt2.FILES:
        with open(os.path.join(TF, "one-shard", name), "rb") as file:
            Server.files[name] = file.read()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(load_gpt2, "SOURCES", (base + "/a", base + "/b"))
    hparams, index, data = load_gpt2.FILES

    def fetched(folder, **faults):
        Server.faults = faults.get("f", {})
        Server.asked.clear()
        load_gpt2.download("124M", str(folder))
        assert sorted(os.listdir(folder)) == sorted(load_gpt2.FILES)
        for name in load_gpt2.FILES:
            assert (folder / name).read_bytes() == Server.files[name]
        return list(Server.asked)

    asked = fetched(tmp_path / "1")
    assert [path for path, _ in asked] == [f"/a/124M/{name}" for name in load_gpt2.FILES]
    assert fetched(tmp_path / "1") == []  # nothing is asked for again
    half = len(Server.files[data]) // 2
    asked = fetched(tmp_path / "2", f={("a", data): "cut"})  # goes on at the second source
    assert asked[-1] == (f"/b/124M/{data}", f"bytes={half}-")
    asked = fetched(tmp_path / "3", f={("a", hparams): 404, ("a", index): "page"})
    assert len(asked) == 5
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / (data + ".part")).write_bytes(b"?" * 99999)  # more than there is
    fetched(tmp_path / "4")
    with pytest.raises(InputError, match="by hand") as caught:
        fetched(tmp_path / "5", f={("a", data): "cut", ("b", data): 404})
    assert data in str(caught.value) and str(tmp_path / "5") in str(caught.value)
    assert os.path.getsize(tmp_path / "5" / (data + ".part")) == half
    server.shutdown()
    with pytest.raises(InputError, match="by hand"):
        monkeypatch.setattr(load_gpt2, "SOURCES", (f"http://127.0.0.1:{free_port()}/a",) * 2)
        load_gpt2.download("124M", str(tmp_path / "6"))


@pytest.mark.skipif(not os.path.exists("models/124M/hparams.json")
                    or not os.path.exists("the-verdict.txt"), reason="needs the real 124M")
def test_the_books_losses_with_the_real_weights():
    with open("the-verdict.txt", encoding="utf-8") as file:
        text = file.read()
    model = load_gpt2.load_gpt2("models/124M").eval()
    cut, losses = int(0.9 * len(text)), []
    for part in (text[:cut], text[cut:]):
        ids = torch.tensor(gpt.encode(part))
        windows = ids[: (len(ids) - 1) // 256 * 256 + 1].unfold(0, 257, 256)
        with torch.no_grad():
            losses.append(model(windows[:, :-1], windows[:, 1:])[1].item())
    assert losses == pytest.approx([3.7547, 3.5596], abs=2e-4)


# ---- README.md ---------------------------------------------------------------------------------

def test_every_command_of_the_readme(tmp_path, monkeypatch):
    """In their order, in one folder, on small models; pip, pytest and curl are left out."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        blocks = re.findall(r"```sh\n(.*?)```", file.read(), flags=re.DOTALL)
    commands = [part.strip() for line in "".join(blocks).splitlines() for part in line.split("&&")]
    monkeypatch.chdir(tmp_path)
    for name in ("my.txt", "shakespeare.txt", "the-verdict.txt"):
        shutil.copy(os.path.join(HERE, "data", "story.txt"), name)
    with zipfile.ZipFile(os.path.join(TF, "vocab.zip")) as archive:  # OpenAI's server, but small
        for name in load_gpt2.FILES:
            Server.files[name] = archive.read(name)
    Server.faults = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urlopen = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: urlopen(
        urllib.request.Request(request.full_url.replace(
            load_gpt2.SOURCES[0], f"http://127.0.0.1:{server.server_port}/a"))))
    few = ("--max_iters=2", "--eval_iters=1", "--device=cpu")
    done = []
    for words in map(shlex.split, commands):
        if words[0] in ("pip", "pytest", "curl"):
            continue
        script, *flags = words[words.index("python") + 1 :] if "python" in words else words
        small = SMALL if "--init_from" not in " ".join(flags) else ()
        if "--resume" in flags:
            main(script, *flags, "--max_iters=3")
        elif script == "torchrun":
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--master_port",
                            str(free_port()), flags[0], os.path.join(HERE, flags[1]), *flags[2:],
                            *small, *few], check=True, timeout=300)
        elif script == "train.py":
            main(script, *flags, *small, "--block_size=32", *few)
        else:
            main(script, *flags, *(["--max_new_tokens=3"] if script == "sample.py" else []))
        done.append(script)
    assert set(done) == {"train.py", "sample.py", "load_gpt2.py", "torchrun"} and len(done) > 12
    server.shutdown()
