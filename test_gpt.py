"""The tests: `pytest test_gpt.py`. No network, no GPU; two and a half minutes on two cores."""
import contextlib
import csv
import errno
import gc
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import struct
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
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]
posix = pytest.mark.skipif(os.name == "nt", reason="signals, modes and links differ there")


# ---- Helpers -----------------------------------------------------------------------------------

def command(script, *flags, status=0, **options):
    """Runs a script as a user would; returns what it printed on (standard output, error)."""
    done = subprocess.run([sys.executable, os.path.join(HERE, script), *flags], text=True,
                          encoding="utf-8", capture_output=True, timeout=300, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def main(script, *flags, status=0):
    """Runs a script inside this process: no seconds of imports, and its errors are exceptions."""
    saved = sys.argv, sys.excepthook, sys.stdout, sys.stderr
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    sys.argv, code = [script, *map(str, flags)], 0
    try:
        runpy.run_path(os.path.join(HERE, script), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv, sys.excepthook, sys.stdout, sys.stderr = saved
        for number, handler in handlers.items():
            signal.signal(number, handler)
        gc.collect()  # what the script held open and locked
    assert code == status


def start(*flags, before=(), **options):
    """train.py as a process of its own, at work."""
    script = os.path.join(HERE, "train.py")
    return subprocess.Popen([*before, sys.executable, script, *SMALL, *flags], text=True,
                            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options)


def wait_for(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited a minute")


def log_of(folder):
    with open(os.path.join(folder, "log.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def column(folder, name):
    return [float(row[name]) for row in log_of(folder) if row[name]]


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
        if model.ln_f.bias is not None:
            model.ln_f.bias *= 0.1
    return model.eval()


def caches(model, batch_size):
    return [KVCache(model, batch_size) for _ in model.h]


@contextlib.contextmanager
def no_file_above(size):
    """Files cannot grow beyond size bytes, as on a disk that is nearly full."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


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


def oracles_loss(model, idx, targets):
    """The mean cross-entropy of the oracle's logits, float64."""
    logits = np.stack([oracle(openai_weights(model), model.h[0].attn.n_head, row.numpy())
                       for row in idx])
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, targets.numpy()[..., None], -1).mean()


# ---- The model ---------------------------------------------------------------------------------

def test_logits_and_loss_equal_the_oracle():
    model = tiny()
    idx, targets = torch.randint(61, (2, 3, 16))
    with torch.no_grad():
        logits, loss = model(idx), model(idx, targets)
    assert logits.shape == (3, 16, 61) and loss.shape == ()
    expected = np.stack([oracle(openai_weights(model), 3, row.numpy()) for row in idx])
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=2e-4)
    assert loss.item() == pytest.approx(oracles_loss(model, idx, targets), abs=1e-5)


def test_gradients_equal_the_oracles_slopes():
    model = tiny().double()
    idx, targets = torch.randint(50, (2, 2, 9))  # tokens from 50 on are only in the output layer
    model(idx, targets).backward()
    rng = random.Random(0)
    places = [(name, tuple(rng.randrange(n) for n in parameter.shape))
              for name, parameter in model.named_parameters() for _ in range(2)]
    places += [("wte.weight", (token, 3)) for token in (idx[0, 0].item(), 55)]  # in and out; out
    for name, place in places:
        parameter, losses = model.get_parameter(name), []
        with torch.no_grad():
            for step in (1e-4, -2e-4):
                parameter[place] += step
                losses.append(oracles_loss(model, idx, targets))
            parameter[place] += 1e-4
        slope = (losses[0] - losses[1]) / 2e-4
        assert parameter.grad[place].item() == pytest.approx(slope, rel=1e-3, abs=1e-5), name


def test_size_initialisation_and_first_loss():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 124_439_808
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            expected = 0.02 / math.sqrt(2 * 2) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert (parameter == name.endswith("weight")).all(), name
    idx = torch.randint(50257, (4, 64))
    assert model(idx, idx.roll(1)).item() == pytest.approx(math.log(50257), abs=0.1)
    bare = GPT(GPTConfig(61, 16, 1, 1, 4, bias=False))
    assert not [name for name in bare.state_dict() if name.endswith("bias")]


def test_a_tiny_model_overfits_a_batch():
    torch.manual_seed(0)
    model = GPT(GPTConfig(61, 16, 2, 2, 32))
    idx, targets = torch.randint(61, (2, 4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(idx, targets)
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
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


def test_attention_written_out_equals_sdpa():
    q, k, v = torch.randn(3, 2, 3, 9, 4)
    for T in (9, 4, 1):  # fewer queries than keys, too
        fused = gpt.attend(q[:, :, -T:], k, v, 0.0)
        written_out = gpt.attend(q[:, :, -T:], k, v, 1e-9)  # drops none, yet takes the other path
        torch.testing.assert_close(written_out, fused)


def test_what_does_not_fit_the_model_is_an_input_error():
    model, idx = tiny(), torch.randint(61, (2, 16))
    with pytest.raises(InputError, match="17.*16"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(InputError, match="n_embd=12.*n_head=5"):
        GPT(GPTConfig(61, 16, 2, 5, 12))
    # A loss over other positions than those of idx would be wrong in silence.
    for targets in (idx[:, :8], idx[:1], idx[0], idx[:0], idx[:, :, None]):
        with pytest.raises(InputError, match="targets"):
            model(idx, targets)


def test_targets_of_minus_100_do_not_count():
    model, (idx, targets) = tiny(), torch.randint(61, (2, 1, 16))
    masked = torch.cat((targets[:, :5], torch.full((1, 11), -100)), dim=1)
    torch.testing.assert_close(model(idx, masked), model(idx[:, :5], targets[:, :5]))


@pytest.mark.parametrize("B", (1, 3))
@pytest.mark.parametrize("pieces", ((16,), (1,) * 16, (5, 1, 7, 3)))
def test_cached_logits_equal_uncached(B, pieces):
    model = tiny()
    idx = torch.randint(61, (B, 16))
    cache = caches(model, B)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in idx.split(pieces, dim=1)]
        last = [end - 1 for end in itertools.accumulate(pieces)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(idx)[:, last], rtol=1e-4,
                                   atol=1e-4)
        with pytest.raises(InputError, match="17.*16"):
            model(idx[:, :1], cache=cache)


# ---- Sampling ----------------------------------------------------------------------------------

def collect(tokens):
    return torch.stack(list(tokens), dim=1)


def test_generation_past_the_window_equals_plain_recomputation():
    model, idx = tiny(), torch.randint(61, (2, 5))
    a, b = (torch.Generator().manual_seed(1) for _ in range(2))
    ours = collect(gpt.generate(model, idx, 40, generator=a))
    assert len(ours.unique()) > 10  # or the window would not matter
    window, expected = idx, []
    for _ in range(40):
        if window.shape[1] > 16:
            window = window[:, -8:]
        with torch.no_grad():
            token = gpt.next_token(model(window)[:, -1], generator=b)
        expected.append(token)
        window = torch.cat((window, token[:, None]), dim=1)
    assert torch.equal(ours, torch.stack(expected, dim=1))
    for length in (15, 16, 17, 50):
        assert collect(gpt.generate(model, torch.randint(61, (2, length)), 3)).shape == (2, 3)
    assert collect(gpt.generate(tiny(block_size=1), idx, 3)).shape == (2, 3)
    for wrong in (idx[0], idx[:, :0]):
        with pytest.raises(AssertionError, match="idx"):
            next(gpt.generate(model, wrong, 1))


def test_seeds_modes_and_global_randomness():
    model, idx = tiny(dropout=0.3), torch.randint(61, (2, 5))
    before = torch.get_rng_state()
    a, b = (collect(gpt.generate(model, idx, 20, generator=torch.Generator().manual_seed(1)))
            for _ in range(2))
    c = collect(gpt.generate(model, idx, 20, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())
    for use in (gpt.beam_search, lambda *words: next(gpt.generate(*words[:3]))):
        use(model.eval(), idx[:1], 2, 2)
        with pytest.raises(AssertionError, match="model.eval"):  # or dropout spoils it in silence
            use(model.train(), idx[:1], 2, 2)


def test_rows_stop_on_their_own():
    model, idx = tiny(), torch.randint(61, (4, 5))
    free = collect(gpt.generate(model, idx, 30, temperature=0))
    stop = free[0, 3].item()
    stopped = collect(gpt.generate(model, idx, 30, temperature=0, stop_token=stop))
    for row, expected in zip(stopped, free):
        ends = (expected == stop).nonzero()
        end = ends[0].item() if len(ends) else 30
        assert torch.equal(row[: end + 1], expected[: end + 1][: len(row)])
        assert (row[end:] == stop).all()
    alone = collect(gpt.generate(model, idx[:1], 30, temperature=0, stop_token=stop))
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
    one = torch.zeros(1, 1, dtype=torch.int64)
    assert collect(gpt.generate(tiny(), one, 2, temperature=1e30)).shape == (1, 2)
    assert list(gpt.generate(tiny(), one, 0)) == []


def test_beam_search():
    model = tiny(vocab_size=5)
    idx = torch.tensor([[1, 3]])

    def mean_log_probability(tokens):
        full = torch.cat((idx[0], torch.tensor(tokens)))[None]
        with torch.no_grad():
            log_probs = model(full).log_softmax(-1)[0]
        return sum(log_probs[i + 1, t].item() for i, t in enumerate(tokens)) / len(tokens)

    greedy = collect(gpt.generate(model, idx, 4, temperature=0))[0]
    assert gpt.beam_search(model, idx, 4, 1).tolist() == greedy.tolist()
    best = max(itertools.product(range(5), repeat=4), key=mean_log_probability)
    assert gpt.beam_search(model, idx, 4, 5**3).tolist() == list(best)
    # with a stop token a sequence ends where it first appears
    ended = [s for n in range(1, 5) for s in itertools.product(range(5), repeat=n)
             if 2 not in s[:-1] and (n == 4 or s[-1] == 2)]
    best = max(ended, key=mean_log_probability)
    assert gpt.beam_search(model, idx, 4, 5**3, stop_token=2).tolist() == list(best)
    assert gpt.beam_search(model, idx, 0, 2).tolist() == []
    with pytest.raises(InputError, match="17.*16"):
        gpt.beam_search(model, torch.zeros(1, 17, dtype=torch.int64), 1, 2)


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

RUN = (*SMALL, "--eval_iters=3", "--log_interval=1", "--warmup_iters=3")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of ten steps on the built-in text, as a user starts it, from another directory."""
    folder = tmp_path_factory.mktemp("run")
    out, _ = command("train.py", *RUN, "--max_iters=10", "--eval_interval=5", cwd=folder)
    return folder / "out", out


def test_train_and_sample_as_a_user_would(run, capsys):
    folder, out = run
    assert {"ckpt.pt", "best.pt", "log.csv", "loss.png"} <= set(os.listdir(folder))
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
    assert "10.8249" in out and out.count("sample: Every effort moves you") == 3
    assert re.search(r"best.pt.* step 10.*\n.*python sample.py --checkpoint=", out)  # what now
    rows = log_of(folder)
    assert list(rows[0]) == ["iter", "tokens", "loss", "train_loss", "val_loss", "lr", "grad_norm",
                             "tokens_per_s"]
    assert [int(row["iter"]) for row in rows] == list(range(11))
    assert [bool(row["val_loss"]) for row in rows] == [i % 5 == 0 for i in range(11)]
    assert float(rows[0]["train_loss"]) == pytest.approx(math.log(50257), abs=0.1)
    assert [int(row["tokens"]) for row in rows] == [64 * i for i in range(11)]
    model, state = gpt.load_checkpoint(str(folder / "ckpt.pt"))
    assert state.keys() == {"optimizer", "scaler", "step", "best", "log", "args", "val_loss"}
    assert state["step"] == 10 and len(state["log"]) == 11 and not model.training
    best, state = gpt.load_checkpoint(str(folder / "best.pt"))
    assert state.keys() == {"step", "val_loss"}
    assert state["val_loss"] == min(column(folder, "val_loss"))

    flags = ("--checkpoint", str(folder / "ckpt.pt"), "--max_new_tokens=40", "--device=cpu")
    texts = []
    for seed in (1, 1, 2):
        main("sample.py", "--start=Every effort moves you", f"--seed={seed}", *flags)
        out, err = capsys.readouterr()
        texts.append(out)
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) > 100
    assert out.startswith("Every effort moves you") and err.count("\n") == 2
    assert "step 10, validation loss 10." in err and "tokens/s" in err
    main("sample.py", "--start=" + "x " * 40 + "y", "--no-stop", *flags)
    assert "last 32" in capsys.readouterr().err
    main("sample.py", "--start=x", "--num_beams=2", *flags[:2], "--max_new_tokens=0")
    assert capsys.readouterr().out == "x\n"


def test_a_prompt_that_ends_in_white_space_is_told_of(run, tmp_path, monkeypatch, capsys):
    """Typed, it is kept, with a warning. A file's or standard input's last newline is dropped."""
    flags = (f"--checkpoint={run[0] / 'ckpt.pt'}", "--max_new_tokens=0", "--device=cpu")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for content, warned, printed in ((b"\xef\xbb\xbfIvy\r\n", False, "Ivy\n"),
                                     (b"Ivy\n\n", True, "Ivy\n\n"), (b"Ivy ", True, "Ivy \n")):
        (tmp_path / "p.txt").write_bytes(content)
        main("sample.py", "--start=FILE:~/p.txt", *flags)
        out, err = capsys.readouterr()
        assert out == printed and ("white space" in err) == warned, content
    out, err = command("sample.py", "--start=-", "--num_samples=3", *flags, input="Ivy\n")
    assert out == "Ivy\n" + 2 * ("-" * 80 + "\nIvy\n") and "white space" not in err
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9")
    with pytest.raises(InputError, match=r"p.txt: byte 6 \(0xe9\)"):
        main("sample.py", f"--start=FILE:{tmp_path / 'p.txt'}", *flags)


@pytest.mark.parametrize("wrong", ("temperature=-1", "temperature=nan", "top_k=-1", "top_p=0",
                                   "top_p=1.1", "top_p=nan", "max_new_tokens=-1", "seed=x"))
def test_senseless_sampling_is_refused(wrong):
    name, value = wrong.split("=")
    with pytest.raises(InputError, match=f"{name}: .*{value}"):
        main("sample.py", f"--{wrong}")


def test_resumed_is_the_same_run(run, tmp_path):
    flags = (*RUN, "--eval_interval=5", "--lr_decay_iters=10", f"--out_dir={tmp_path}")
    command("train.py", *flags, "--max_iters=5")
    with open(tmp_path / "log.csv", "ab") as file:  # of a later step, and cut
        file.write(b"6,384,1.0,,,1.0,1.0,1.0\n7,44\xff")
    out, _ = command("train.py", "--resume", f"--out_dir={tmp_path}", "--max_iters=10")
    assert same_run(run[0], tmp_path) and "from step 5" in out


def test_evaluation_does_not_change_the_run(run, tmp_path):
    command("train.py", *RUN, "--max_iters=10", "--eval_interval=1000", "--eval_iters=1",
            f"--out_dir={tmp_path}")
    assert same(*(gpt.load_checkpoint(str(folder / "ckpt.pt"))[0].state_dict()
                  for folder in (run[0], tmp_path)))


def test_weight_decay_and_clipping(run, tmp_path):
    model, state = gpt.load_checkpoint(str(run[0] / "ckpt.pt"))
    decayed, others = state["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)
    assert len(decayed["params"]) == 2 + 4 * 2 and len(others["params"]) == 2 + 8 * 2
    # gradients clipped far below Adam's eps move nothing
    main("train.py", *RUN, "--max_iters=2", "--warmup_iters=0", "--weight_decay=0",
         "--grad_clip=1e-14", f"--out_dir={tmp_path}")
    losses = column(tmp_path, "val_loss")
    assert losses[0] == pytest.approx(losses[-1], abs=1e-4)
    assert column(tmp_path, "grad_norm")[-1] > 0.1  # as it was before


def test_a_scaled_loss_has_its_gradients_unscaled_before_they_are_clipped(tmp_path, monkeypatch):
    flags = (*RUN, "--max_iters=4")
    main("train.py", *flags, f"--out_dir={tmp_path / 'plain'}")
    scaler, scale = torch.amp.GradScaler, 2.0**16  # float16's, which would need a GPU
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda *_, **__: scaler("cpu", init_scale=scale, enabled=True))
    main("train.py", *flags, f"--out_dir={tmp_path / 'scaled'}")
    for name in ("loss", "grad_norm", "val_loss"):
        plain, scaled = (column(tmp_path / folder, name) for folder in ("plain", "scaled"))
        assert scaled == pytest.approx(plain, rel=1e-4), name
    scale = 2.0**127  # overflows at first: such steps are left out, and the run goes on
    main("train.py", *flags, "--max_iters=12", f"--out_dir={tmp_path / 'over'}")
    _, state = gpt.load_checkpoint(str(tmp_path / "over" / "ckpt.pt"))
    assert 1 < state["scaler"]["scale"] < scale and len(log_of(tmp_path / "over")) == 13
    assert math.isfinite(column(tmp_path / "over", "grad_norm")[-1])


def test_every_step_and_micro_batch_drops_other_numbers(tmp_path):
    np.tile(np.arange(1, 33), 20).astype(np.uint16).tofile(tmp_path / "x.bin")  # windows are alike
    losses = {}
    for count in (1, 2):  # and weights do not move
        main("train.py", *RUN, f"--data={tmp_path / 'x.bin'}", "--batch_size=1", "--dropout=0.5",
             f"--gradient_accumulation_steps={count}", "--learning_rate=1e-12", "--max_iters=4",
             "--weight_decay=0", f"--out_dir={tmp_path / str(count)}")
        losses[count] = sorted(column(tmp_path / str(count), "loss"))
        assert min(np.diff(losses[count])) > 1e-5
    assert abs(column(tmp_path / "1", "loss")[0] - column(tmp_path / "2", "loss")[0]) > 1e-5


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_processes(*flags, **options):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                             f"--master_port={free_port()}", os.path.join(HERE, "train.py"), *RUN,
                             *flags], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            **options)


def test_accumulation_and_processes_do_not_change_the_loss(tmp_path):
    flags = ("--dropout=0", "--max_iters=4", "--eval_iters=2")
    c = two_processes(*flags, "--batch_size=2", "--gradient_accumulation_steps=2",
                      f"--out_dir={tmp_path / 'c'}")
    main("train.py", *RUN, *flags, "--batch_size=8", f"--out_dir={tmp_path / 'a'}")
    main("train.py", *RUN, *flags, "--batch_size=2", "--gradient_accumulation_steps=4",
         f"--out_dir={tmp_path / 'b'}")
    output = c.communicate(timeout=300)[0]
    assert c.returncode == 0, output
    for name in ("loss", "grad_norm", "train_loss", "val_loss"):
        a, b, c = (column(tmp_path / folder, name) for folder in "abc")
        assert a == pytest.approx(b, rel=1e-5) and a == pytest.approx(c, rel=1e-5), name
    # and a run of two processes goes on with one, if the product of the three stays
    with pytest.raises(InputError, match="windows_per_step=4 .*8"):
        main("train.py", "--resume", f"--out_dir={tmp_path / 'c'}", "--max_iters=5")
    main("train.py", "--resume", f"--out_dir={tmp_path / 'c'}", "--max_iters=5", "--batch_size=8",
         "--gradient_accumulation_steps=1")
    main("train.py", "--resume", f"--out_dir={tmp_path / 'a'}", "--max_iters=5")
    a, c = (column(tmp_path / folder, "loss") for folder in "ac")
    assert len(a) == 5 and a == pytest.approx(c, rel=1e-5)


def test_several_processes_say_an_error_once(tmp_path):
    """PyTorch's own lines about processes that failed would hide it or say it twice."""
    (tmp_path / "short.txt").write_text("Only a few words here. " * 20)
    started = [two_processes("--n_head=3", cwd=tmp_path),  # before the processes know each other
               two_processes("--data=short.txt", cwd=tmp_path)]  # after that
    for process, words in zip(started, ("n_head=3", "short.txt")):
        output = process.communicate(timeout=120)[0]
        assert process.returncode != 0
        assert len(re.findall(f"train.py: error: .*{words}", output)) == 1, output


def test_stray_variables_of_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")  # without WORLD_SIZE it means nothing
    main("train.py", *RUN, "--max_iters=1", f"--out_dir={tmp_path / 'a'}")
    assert "sample: " in capsys.readouterr().out and (tmp_path / "a" / "ckpt.pt").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE.*torchrun"):
        main("train.py", *RUN, "--max_iters=1", f"--out_dir={tmp_path / 'b'}")


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
    main("train.py", *RUN, "--dtype=bfloat16", "--max_iters=3", f"--out_dir={tmp_path}")
    model, _ = gpt.load_checkpoint(str(tmp_path / "ckpt.pt"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 10 < column(tmp_path, "loss")[-1] < 11


def test_fine_tuning_starts_from_the_weights(run, tmp_path):
    main("train.py", f"--init_from={run[0] / 'best.pt'}", "--block_size=16", "--max_iters=0",
         "--eval_iters=1", f"--out_dir={tmp_path / 'a'}", "--dropout=0.2", "--device=cpu",
         "--learning_rate=1e-5")
    old, state = gpt.load_checkpoint(str(run[0] / "best.pt"))
    new, new_state = gpt.load_checkpoint(str(tmp_path / "a" / "ckpt.pt"))
    assert new.config.block_size == 16 and new.config.dropout == 0.2 and new.config.n_layer == 2
    expected = old.state_dict() | {"wpe.weight": old.wpe.weight[:16].detach()}
    assert same(dict(new.state_dict()), dict(expected))
    assert new_state["args"]["min_lr"] == pytest.approx(1e-6)  # follows the rate unless given
    # With the same windows and no step, it prints the losses that the weights had.
    main("train.py", f"--init_from={run[0] / 'best.pt'}", "--block_size=32", "--max_iters=0",
         "--eval_iters=3", f"--out_dir={tmp_path / 'b'}", "--device=cpu", "--dtype=float32")
    assert column(tmp_path / "b", "val_loss") == pytest.approx([state["val_loss"]], abs=1e-5)


def test_a_checkpoint_by_the_version_before(tmp_path, capsys):
    model, path = GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=8)), tmp_path / "ckpt.pt"
    torch.save({"config": {"vocab_size": 50257, "block_size": 32, "n_layer": 1, "n_head": 2,
                           "n_embd": 8, "dropout": 0.0, "bias": True},
                "model": model.state_dict(), "optimizer": {"state": {}, "param_groups": []},
                "scaler": {}, "step": 7, "best_val_loss": 9.5, "log_bytes": 1234,
                "args": {"n_layer": 1, "n_head": 2, "dtype": "float32"}}, path)
    loaded, state = gpt.load_checkpoint(str(path), verify=True)
    assert same(dict(loaded.state_dict()), dict(model.state_dict())) and state["step"] == 7
    main("sample.py", f"--checkpoint={path}", "--start=Ivy", "--max_new_tokens=3", "--device=cpu")
    assert capsys.readouterr().out.startswith("Ivy")
    main("train.py", f"--init_from={path}", "--max_iters=1", f"--out_dir={tmp_path / 'new'}",
         "--block_size=32", "--eval_iters=1", "--device=cpu")
    with pytest.raises(InputError, match="--init_from"):
        main("train.py", "--resume", f"--out_dir={tmp_path}")


# ---- Text to tokens ----------------------------------------------------------------------------

class Lines(io.BytesIO):
    """A file that is read in parts of some 50 bytes, not a million."""

    def readlines(self, _):
        return super().readlines(50)


def test_tokens_in_pieces_equal_tokens_of_the_whole(tmp_path, monkeypatch, capsys):
    rng = random.Random(0)
    parts = [" ", "  ", "\n", "\n\n", "\t", "\u3000", "\x1c", "\u00a0", "a", "It's", "1984", "...",
             "!?", "é", "你好", "🙂", "<|endoftext|>", " x", "\r\n", "\n", "\n", "\n \n"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "open", lambda name, _: Lines(pathlib.Path(name).read_bytes()),
                      raising=False)
        for i in range(30):
            text = "".join(rng.choice(parts) for _ in range(500))
            path = tmp_path / f"{i}.txt"
            path.write_bytes(b"\xef\xbb\xbf" * (i % 2) + text.encode())
            assert len(list(train.read_text([str(path)]))) > 5
            tokens, _ = train.load_tokens(str(path), str(tmp_path), 8)
            text = text.replace("\r\n", "\n")
            assert f"{len(text):,} characters in 1 file" in capsys.readouterr().out
            assert tokens.tolist() == gpt.encode(text)
    for text in ("x" * 2**24, "x" + "\n" * 2**23):  # one line; all white space
        path.write_text(text)
        assert "".join(train.read_text([str(path)])) == text


def test_folders_and_bins(tmp_path, capsys):
    for name, text in (("b.TXT", "two"), ("a.txt", "one"), ("c.md", "no")):
        (tmp_path / name).write_text(text)
    tokens, key = train.load_tokens(str(tmp_path), str(tmp_path / "out"), 0)
    assert tokens.tolist() == gpt.encode("one<|endoftext|>two")
    assert "in 2 file" in capsys.readouterr().out
    (tmp_path / "a.txt").write_text("One")
    tokens, other = train.load_tokens(str(tmp_path), str(tmp_path / "out"), 0)
    assert tokens.tolist() == gpt.encode("One<|endoftext|>two") and key != other

    def load(ids, dtype=np.uint16):
        np.array(ids, dtype=dtype).tofile(tmp_path / "x.bin")
        return train.load_tokens(str(tmp_path / "x.bin"), "", 0)[0]

    assert load([1, 7, 50256, 0]).tolist() == [1, 7, 50256, 0]
    with pytest.raises(InputError, match="token 2 is 50257"):
        load([1, 2, 50257])
    # Other integers would be read as tokens, most of them 0: a flattering loss.
    for dtype in (np.int64, np.uint64, np.uint32, np.int32):
        with pytest.raises(InputError, match="x.bin.*uint16"):
            load([464, 50256, 11, 0, 7], dtype)
    np.save(tmp_path / "y.npy", np.arange(1, 99, dtype=np.uint16))
    os.replace(tmp_path / "y.npy", tmp_path / "x.bin")
    with pytest.raises(InputError, match="x.bin.*npy"):
        train.load_tokens(str(tmp_path / "x.bin"), "", 0)


def test_what_is_no_text_is_refused_with_its_place(tmp_path):
    """UTF-16 and NULs decode without an error, and would train on every other character."""
    for content, place in (("Ivy".encode("utf-16-le"), r"byte 1 \(0x0\)"), (b"ab\0", "byte 2 "),
                           ("Ivy".encode("utf-16"), r"byte 0 \(0x"), (b"caf\xe9", r"3 \(0xe9\)"),
                           (b"\xef\xbb\xbf" + b"x\n" * 2**20 + b"\0", f"byte {3 + 2**21} ")):
        (tmp_path / "x.txt").write_bytes(content)
        with pytest.raises(InputError, match=f"x.txt: .*{place}"):
            train.load_tokens(str(tmp_path / "x.txt"), str(tmp_path / "out"), 0)
        assert not os.path.exists(tmp_path / "out") or os.listdir(tmp_path / "out") == []


def test_a_damaged_tokens_file_is_made_anew(tmp_path):
    """A short one has other windows, an empty one cannot be mapped."""
    def load():
        return train.load_tokens(train.STORY, str(tmp_path), 32)[0].tolist()

    expected = load()
    path, = tmp_path.glob("tokens-*.bin")
    whole = path.read_bytes()
    assert len(whole) == 2 * len(expected) and f"-{len(expected)}.bin" in path.name
    made = path.stat().st_ino
    assert load() == expected and path.stat().st_ino == made  # a whole one is kept
    for damaged in (b"", whole[:6000], whole[:-2], whole + b"\0\0"):
        path.write_bytes(damaged)
        assert load() == expected and path.read_bytes() == whole
        assert len(os.listdir(tmp_path)) == 1


def test_a_run_goes_on_without_its_text_or_says_how(tmp_path):
    text, out = tmp_path / "my.txt", tmp_path / "out"
    shutil.copy(train.STORY, text)
    main("train.py", *RUN, f"--data={text}", f"--out_dir={out}", "--max_iters=1")
    os.replace(text, tmp_path / "moved.txt")
    os.replace(out, tmp_path / "new")
    resume = ("--resume", f"--out_dir={tmp_path / 'new'}")
    main("train.py", *resume, "--max_iters=2")
    for path in (tmp_path / "new").glob("tokens-*"):
        path.unlink()
    with pytest.raises(InputError, match="my.txt.*--data="):
        main("train.py", *resume, "--max_iters=3")
    with pytest.raises(InputError, match="not the text"):
        main("train.py", *resume, "--max_iters=3", f"--data={__file__}")
    main("train.py", *resume, "--max_iters=3", f"--data={tmp_path / 'moved.txt'}")
    assert len(log_of(tmp_path / "new")) == 4


# ---- Nothing lost ------------------------------------------------------------------------------

@posix
def test_a_signal_saves_and_says_how_to_go_on(tmp_path):
    processes = {number: start("--max_iters=100000", "--log_interval=1",
                               f"--out_dir={tmp_path / str(int(number))}") for number in SIGNALS}
    for number, process in processes.items():
        while not process.stdout.readline().startswith("iter 3 "):
            pass
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number and "--resume" in out, out + err
        assert err.startswith("finishing the step")  # the answer, before the step is done
        folder = tmp_path / str(int(number))
        _, state = gpt.load_checkpoint(str(folder / "ckpt.pt"), verify=True)
        assert state["step"] >= 3 and int(log_of(folder)[-1]["iter"]) == state["step"]


@posix
def test_neither_a_closed_terminal_under_nohup_nor_a_closed_pipe_loses_the_run(tmp_path):
    process = start("--max_iters=100000", "--log_interval=1", f"--out_dir={tmp_path}",
                    before=("nohup",))
    process.stdout.readline()
    wait_for(lambda: os.path.exists(tmp_path / "ckpt.pt"))
    process.send_signal(signal.SIGHUP)
    seen = len(log_of(tmp_path))
    wait_for(lambda: len(log_of(tmp_path)) > seen + 5)  # it goes on
    process.stdout.close()  # as Ctrl-C also ends `tee`, before this process prints again
    process.stderr.close()
    seen = len(log_of(tmp_path))
    wait_for(lambda: len(log_of(tmp_path)) > seen + 5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert gpt.load_checkpoint(str(tmp_path / "ckpt.pt"))[1]["step"] >= seen + 5


def test_a_log_has_each_line_at_once_and_a_folder_takes_one_run(tmp_path):
    flags, log = (*SMALL, f"--out_dir={tmp_path / 'o'}", "--log_interval=1"), tmp_path / "log.txt"
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(log, "w") as file:
        first = start(*flags, "--max_iters=100000", stdout=file, stderr=file, env=environment)
    wait_for(lambda: "\niter 2 " in log.read_text())  # a buffer would be written after 8 kB
    shown = re.findall(r"\niter (\d+) ", log.read_text())
    assert len(log.read_text()) < 8000 and len(log_of(tmp_path / "o")) >= len(shown)
    before = gpt.load_checkpoint(str(tmp_path / "o" / "ckpt.pt"))[1]["step"]
    for more in ((), ("--resume",)):
        with pytest.raises(InputError):  # the first without --resume: there is a run
            main("train.py", *flags, *more, "--max_iters=100000")
    os.remove(tmp_path / "o" / "ckpt.pt")
    with pytest.raises(InputError, match="another train.py"):
        main("train.py", *flags, "--max_iters=1")
    assert first.poll() is None and before == 0
    first.kill()
    first.wait()
    main("train.py", *flags, "--max_iters=1")  # no lock is left behind


def test_a_signal_in_the_last_step_leaves_a_complete_run(tmp_path, monkeypatch, capsys):
    clip = torch.nn.utils.clip_grad_norm_

    def clip_and_signal(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_signal)
    main("train.py", *RUN, "--max_iters=1", f"--out_dir={tmp_path}")
    assert "next: python sample.py" in capsys.readouterr().out


class Bare:
    """The output of a notebook cell, as `%run train.py` finds it."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


class Gone(Bare):
    """A terminal that is closed."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("stream", (Bare(), None, Gone()))
def test_output_may_be_a_notebooks_or_nowhere(run, tmp_path, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    main("train.py", *RUN, "--max_iters=1", f"--out_dir={tmp_path}")
    assert gpt.load_checkpoint(str(tmp_path / "ckpt.pt"))[1]["step"] == 1
    if not isinstance(stream, Gone):
        main("sample.py", f"--checkpoint={run[0] / 'ckpt.pt'}", "--max_new_tokens=3", "--start=Ivy")
    if stream and not isinstance(stream, Gone):
        assert "iter 1 " in stream.text and "\nIvy" in stream.text


def test_a_picture_that_fails_is_a_warning(tmp_path, capsys):
    (tmp_path / "loss.png").mkdir()
    main("train.py", *RUN, "--max_iters=2", "--eval_interval=1", f"--out_dir={tmp_path}")
    warnings = re.findall("warning: .*loss.png.*", capsys.readouterr().err)
    assert len(warnings) == 3 and gpt.load_checkpoint(str(tmp_path / "ckpt.pt"))[1]["step"] == 2


def killed_and_resumed(folder, kills, max_iters, seed):
    """Runs train.py to max_iters, killed at random moments and resumed."""
    rng, flags = random.Random(seed), ("--eval_interval=20", "--log_interval=1", "--eval_iters=2")
    for kill in range(kills + 1):
        begun = os.path.exists(os.path.join(folder, "ckpt.pt"))
        process = start(*(("--resume",) if begun else flags), f"--max_iters={max_iters}",
                        f"--out_dir={folder}")
        if kill < kills:
            for _ in range(6):
                process.stdout.readline()
            time.sleep(rng.random())
            process.send_signal(rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
        process.communicate(timeout=300)
    assert process.returncode == 0


@posix
def test_killed_and_resumed_is_the_same_run(tmp_path):
    kills = int(os.environ.get("KILLS", 2))  # KILLS=20 pytest -k killed for the long version
    steps = 60 if kills == 2 else 240
    # Processes of their own: what ran before in this one may change the last bit of a sum.
    whole = start("--eval_interval=20", "--log_interval=1", "--eval_iters=2",
                  f"--max_iters={steps}", f"--out_dir={tmp_path / 'a'}")
    killed_and_resumed(tmp_path / "b", kills, steps, seed=kills)
    whole.communicate(timeout=300)
    assert same_run(tmp_path / "a", tmp_path / "b")


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = str(tmp_path / "x.pt")
    gpt.save_checkpoint(path, tiny(1), step=1)

    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, full_disk)
            with pytest.raises(InputError, match="x.pt .*No space left"):
                gpt.save_checkpoint(path, tiny(2), step=2)
    assert gpt.load_checkpoint(path)[1] == {"step": 1} and os.listdir(tmp_path) == ["x.pt"]
    model = torch.compile(tiny(3))
    gpt.save_checkpoint(path, model, step=3)
    assert not any("_orig_mod" in name for name in torch.load(path, weights_only=True)["model"])
    state = torch.load(path, weights_only=True)
    state["model"] = {"_orig_mod." + name: w for name, w in state["model"].items()}
    torch.save(state, path)
    assert same(gpt.load_checkpoint(path)[0].state_dict(), tiny(3).state_dict())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has this file")
@pytest.mark.parametrize("n_embd", (12, 600))  # smaller and larger than a file's buffer
def test_a_full_disk_is_named_with_the_file(tmp_path, n_embd):
    """torch.save alone would say "unexpected pos 64 vs 0"."""
    path = str(tmp_path / "x.pt")
    gpt.save_checkpoint(path, tiny(1), step=1)
    os.symlink("/dev/full", path + ".tmp")
    with pytest.raises(InputError, match="x.pt .*No space left on device") as caught:
        gpt.save_checkpoint(path, tiny(2, n_embd=n_embd), step=2)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["x.pt"]
    assert gpt.load_checkpoint(path, verify=True)[1] == {"step": 1}


def test_a_drive_that_refuses_fsync_gets_a_warning(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    path = str(tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="x.pt"):
        gpt.save_checkpoint(path, tiny(), step=1)
    assert gpt.load_checkpoint(path, verify=True)[1] == {"step": 1}


@posix
def test_saving_over_a_file_whose_weights_are_in_use(tmp_path):
    """They are mapped: a file written in place would change or end under them, a bus error."""
    path = str(tmp_path / "x.pt")
    gpt.save_checkpoint(path, tiny(1))
    with open(path, "rb") as old:
        before = old.read()
        gpt.save_checkpoint(path, tiny(2))
        old.seek(0)
        assert old.read() == before
    model, _ = gpt.load_checkpoint(path)
    gpt.save_checkpoint(path, model)
    assert same(dict(model.state_dict()), dict(tiny(2).state_dict()))
    assert same(dict(gpt.load_checkpoint(path, verify=True)[0].state_dict()),
                dict(model.state_dict()))


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
    for name, words in {"missing.pt": "No such file", "empty.pt": "", "half.pt": "",
                        "page.pt": "", "text.pt": "", "evil.pt": "could run code",
                        "pickle.pt": "", "other.pt": "config", "odd.pt": "", "list.pt": "",
                        "nothing.pt": "", "flipped.pt": "wrong checksum",
                        "few.pt": r'Missing.*"wpe.weight".*mismatch for wte.weight'}.items():
        with pytest.raises(InputError, match=f"^{name} .*{words}.*best.pt") as caught:
            gpt.load_checkpoint(name, verify=True)
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not os.path.exists("executed")


def faults(folder):
    """(flags of train.py, what the message must say) for what users of such projects met."""
    for name, content in {"empty.txt": b"", "tiny.txt": b"one two", "odd.bin": b"abc",
                          "none.bin": b"", "short.txt": b"Only a few words here. " * 20,
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
        (["--data=nothing"], "no text"), (["--data=latin.txt"], r"latin.txt: byte 3 \(0xe9\)"),
        (["--data=odd.bin"], "3 bytes"), (["--data=none.bin"], "0 bytes"),
        (["--data=short.txt"], r"108 .*13 .*--block_size=256.* 12$"),
        (["--data=tiny.txt"], "tiny.txt is too short"),
        (["--data=medium.txt", "--block_size=64"], "17 .*--block_size=64.* 16$"),
        (["--n_embd=10", "--n_head=3"], "n_embd=10.*n_head=3"),
        (["--batchsize=2"], "--batchsize"), (["--batch_size=0"], "--batch_size: 0: from 1"),
        (["--learning_rate=nan"], "--learning_rate: nan"), (["--max_iters=-1"], "-1"),
        (["--dropout=1"], "--dropout: 1: "), (["--n_layer=0"], "--n_layer: 0"),
        (["--device=cuda:99"], "cuda:99"), (["--device=gpu"], "gpu.*--device=auto"),
        (["--dtype=int8"], "int8"), (["--device=cpu", "--dtype=float16"], "float16"),
        (["--init_from=page.pt"], "page.pt"), (["--init_from=nowhere.pt"], "nowhere.pt"),
        (["--init_from=vocab.pt", "--block_size=16"], "50257.* 61"),
        (["--init_from=small.pt", "--n_layer=2"], "n_layer=2 .*1"),
        (["--init_from=small.pt", "--block_size=32"], "32.*16"),
        (["--resume", "--out_dir=weights"], "--init_from"), (["--resume"], "out.ckpt.pt"),
        (["--out_dir=latin.txt/x"], "latin.txt.x"), (["--out_dir=latin.txt"], "latin.txt"))


def test_faults_get_one_line_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, words in faults(tmp_path):
        defaults = [flag for flag in SMALL if flag.split("=")[0] not in " ".join(flags)]
        if any("init_from" in flag or "resume" in flag for flag in flags):
            defaults = []
        if "--block_size=256" in words:
            defaults.remove("--block_size=32")
        with pytest.raises((InputError, OSError)) as caught:
            main("train.py", *defaults, *flags)
        message = f"{getattr(caught.value, 'filename', None)}: {caught.value}"
        assert re.search(words, message) and "\n" not in message, (flags, message)
        assert not os.path.exists("out") or os.listdir("out") == [], flags
    for script, words in (("train.py", "--data="), ("sample.py", "--checkpoint=.*load_gpt2.py")):
        flags = ("--data=empty.txt", "--n_layer=1") if script == "train.py" else ()
        out, err = command(script, *flags, status=2, cwd=tmp_path)
        assert re.match(f"{script}: error: {words}", err) and err.count("\n") == 1


def test_a_run_is_not_overwritten_nor_changed_by_accident(run, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(run[0], folder)
    out = f"--out_dir={folder}"
    for flags, words in ((SMALL, "copy.*--resume.*--out_dir.*delete"),
                         (["--resume", "--n_layer=3", "--dropout=0.5"], "n_layer=3.*dropout=0.5"),
                         (["--resume", f"--data={__file__}"], "not the text")):
        with pytest.raises(InputError, match=words):
            main("train.py", *flags, out, "--max_iters=12")
    main("train.py", "--resume", out)
    assert re.search("nothing to do.*10.*--max_iters", capsys.readouterr().out)
    assert same_run(run[0], folder)
    (folder / "ckpt.pt.tmp").write_bytes(b"cut")
    main("train.py", "--resume", out, "--max_iters=11", "--dtype=auto")
    assert not (folder / "ckpt.pt.tmp").exists() and len(log_of(folder)) == 12


def test_a_run_gone_astray_but_finite_goes_on(tmp_path):
    main("train.py", *RUN, "--max_iters=1", "--warmup_iters=0", "--grad_clip=0",
         "--learning_rate=1e4", f"--out_dir={tmp_path}")
    assert column(tmp_path, "val_loss")[-1] > 1000  # whose exponential is no float


def test_a_diverging_run_keeps_the_good_checkpoint(tmp_path, capsys):
    main("train.py", *RUN, "--eval_interval=4", "--warmup_iters=0", "--max_iters=60",
         "--grad_clip=0", "--learning_rate=1e36", f"--out_dir={tmp_path}", status=1)
    model, state = gpt.load_checkpoint(str(tmp_path / "ckpt.pt"), verify=True)
    assert all(p.isfinite().all() for p in model.parameters())
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"not finite .*float32.*ckpt.pt has step {state['step']}", error)


def test_help_is_in_groups_and_clear_without_the_code(capsys):
    for script in ("train.py", "sample.py", "load_gpt2.py"):
        main(script, "--help")
        out = capsys.readouterr().out
        assert "None" not in out and "SUPPRESS" not in out and "{" not in out.split("usage")[0]
        if script == "train.py":
            for group in ("what to read and write", "model", "training", "evaluation", "machine"):
                assert f"\n{group}:\n" in out


@posix
def test_a_link_to_the_script_finds_the_data(tmp_path):
    os.symlink(os.path.join(HERE, "train.py"), tmp_path / "l.py")
    main(tmp_path / "l.py", *RUN, "--max_iters=0", f"--out_dir={tmp_path / 'o'}")
    assert len(log_of(tmp_path / "o")) == 1


# ---- OpenAI's and Hugging Face's weights --------------------------------------------------------

# data/tf/one-shard is what TensorFlow 2.21 wrote: tf.compat.v1.train.Saver().save() of float32
# variables named as OpenAI's, with 11 layers, since h10 sorts before h2. expected.npz holds what
# tf.train.load_checkpoint() reads from it. vocab.zip: a small one with GPT-2's vocabulary.
TF = pathlib.Path(HERE, "data", "tf")


def test_a_checkpoint_by_tensorflow_itself():
    model = load_gpt2.load_gpt2(str(TF / "one-shard"))
    with np.load(TF / "expected.npz") as file:
        expected = {name.removeprefix("model/"): array for name, array in file.items()}
    ours = openai_weights(model)
    assert ours.keys() == expected.keys() and len(ours) == 136
    for name, array in expected.items():
        assert np.array_equal(ours[name], array), name
    tokens = np.array([22, 0, 7, 7, 13, 1, 19])
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)[None])[0]
    weights = {name: array.astype(np.float64) for name, array in expected.items()}
    np.testing.assert_allclose(logits, oracle(weights, 2, tokens), rtol=0, atol=1e-4)


def test_openai_files_that_do_not_fit_are_refused(tmp_path):
    good = {"n_vocab": 23, "n_ctx": 7, "n_embd": 4, "n_head": 2, "n_layer": 11}
    with open(TF / "one-shard" / load_gpt2.DATA, "rb") as file:
        data = file.read()
    for hparams, content, words in (
            (good, data[:-1], f"{load_gpt2.DATA} has 11,247 bytes.*11,248"),
            (good, data + data, "22,496 bytes"), (good, None, f"{load_gpt2.DATA} has 0 bytes"),
            (good | {"n_layer": 10}, data, "11,248 bytes.*10,272"),
            (good | {"n_layer": 0}, data, "hparams.json: n_layer is 0"),
            (good | {"n_head": 3}, data, "hparams.json: n_embd is 4.*3"),
            (good | {"n_embd": None}, data, "hparams.json: n_embd is None"),
            ({}, data, "hparams.json: n_vocab"), ([1], data, "hparams.json.*JSON")):
        (tmp_path / "hparams.json").write_text(json.dumps(hparams))
        (tmp_path / load_gpt2.DATA).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / load_gpt2.DATA).write_bytes(content)
        with pytest.raises(InputError, match=words):
            load_gpt2.load_gpt2(str(tmp_path))
    (tmp_path / "hparams.json").write_text(json.dumps(good))
    (tmp_path / load_gpt2.DATA).unlink()
    for i in range(3):  # several shards: the one file is missing, and is named
        (tmp_path / f"model.ckpt.data-0000{i}-of-00003").write_bytes(data[i::3])
    with pytest.raises(InputError, match=f"{load_gpt2.DATA} has 0 bytes.*all in one file"):
        load_gpt2.load_gpt2(str(tmp_path))


def exported(folder, bias=True, **sizes):
    """A small model with GPT-2's vocabulary -> the model; it is exported to folder / "out"."""
    model = tiny(vocab_size=50257, block_size=32, n_head=2, n_embd=8, bias=bias, **sizes)
    gpt.save_checkpoint(str(folder / "x.pt"), model)
    main("load_gpt2.py", "--export", folder / "x.pt", folder / "out")
    return model


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


@pytest.mark.parametrize("bias", (True, False))
def test_an_exported_folder_has_what_clients_need_and_comes_back(tmp_path, bias):
    model, out = exported(tmp_path, bias), tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "merges.txt", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "vocab.json"}
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # the umask's, for all
    config = read_json(out / "config.json")
    assert config["n_ctx"] == config["n_positions"] == 32 and config["n_layer"] == 2
    assert read_json(out / "generation_config.json")["max_length"] == 32
    assert read_json(out / "tokenizer_config.json")["clean_up_tokenization_spaces"] is False
    with open(out / "model.safetensors", "rb") as file:  # its header is JSON
        names = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert {"wte.weight", "h.1.attn.c_attn.bias", "ln_f.bias"} <= names.keys()
    assert names["h.0.mlp.c_fc.weight"]["shape"] == [8, 32]
    tokenizer = read_json(out / "tokenizer.json")
    assert tokenizer["model"]["vocab"] == read_json(out / "vocab.json")
    assert tokenizer["model"]["vocab"]["\u0120effort"] == 3626
    assert len(tokenizer["model"]["vocab"]) == 50257 and len(tokenizer["model"]["merges"]) == 50000
    for source in (out, out / "model.safetensors"):
        back = load_gpt2.load_gpt2(str(source)).state_dict()
        for name, parameter in model.state_dict().items():
            assert torch.equal(parameter, back[name])
        assert all((back[name] == 0).all() for name in back.keys() - model.state_dict().keys())


@posix
def test_an_export_is_whole_or_not_at_all(tmp_path):
    exported(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    gpt.save_checkpoint(str(tmp_path / "y.pt"), tiny(1, vocab_size=50257, block_size=32))
    words = "out could not be written.*large"
    with no_file_above(1_000_000), pytest.raises(InputError, match=words):
        load_gpt2.export(str(tmp_path / "y.pt"), str(tmp_path / "out"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["out", "x.pt", "y.pt"]
    with pytest.raises(OSError, match="exists"):
        load_gpt2.export(str(tmp_path / "y.pt"), str(tmp_path / "x.pt"))


def test_hugging_face_files_that_are_not_gpt2_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    model = exported(tmp_path)
    out, path = str(tmp_path / "out"), tmp_path / "out" / "config.json"
    good = read_json(path)
    for change in ({"activation_function": "gelu"}, {"n_inner": 17}, {"layer_norm_epsilon": 1e-6},
                   {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False},
                   {"n_embd": None}, {"n_head": 5}, {"n_layer": 0}, {"n_positions": "x"}):
        path.write_text(json.dumps(good | change))
        with pytest.raises(InputError, match=f"config.json: .*{next(iter(change))}"):
            load_gpt2.load_gpt2(out)
    path.write_text(json.dumps(good))
    weights, file = load_file(tmp_path / "out" / "model.safetensors"), f"{out}/model.safetensors"
    save_file({f"transformer.{k}": w for k, w in weights.items()}, file)  # as save_pretrained does
    assert same(load_gpt2.load_gpt2(out).state_dict(), model.state_dict())
    save_file(weights | {"lm_head.weight": weights["wte.weight"] + 1}, file)
    with pytest.raises(InputError, match="lm_head.weight is not wte.weight"):
        load_gpt2.load_gpt2(out)
    save_file(weights | {"lm_head.weight": weights.pop("wte.weight")}, file)  # the tied one alone
    assert same(load_gpt2.load_gpt2(out).state_dict(), model.state_dict())
    save_file({k: w for k, w in weights.items() if k != "ln_f.bias"}, file)
    with pytest.raises(InputError, match='out: .*Missing.*"ln_f.bias"'):
        load_gpt2.load_gpt2(out)
    os.truncate(file, 1000)
    with pytest.raises(InputError, match="model.safetensors is not whole"):
        load_gpt2.load_gpt2(out)
    os.rename(file, tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(InputError, match="no model.safetensors.*save_pretrained"):
        load_gpt2.load_gpt2(out)


def test_converting_replaces_nothing_by_accident(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exported(tmp_path)
    for folder in ("a/gpt2", "b/gpt2", "gpt2"):
        shutil.copytree("out", folder)
    main("load_gpt2.py", "gpt2")  # a folder of this name is meant, not the size
    main("load_gpt2.py", "gpt2")
    assert "models/gpt2.pt" in capsys.readouterr().out
    with pytest.raises(InputError, match="models.gpt2.pt exists and was not made from b/gpt2"):
        main("load_gpt2.py", "b/gpt2")
    main("load_gpt2.py", "b/gpt2", "--out=models/b.pt")
    gpt.save_checkpoint("ckpt.pt", tiny(), step=5, optimizer={})  # a run's
    with pytest.raises(InputError, match="ckpt.pt exists"):
        main("load_gpt2.py", "b/gpt2", "--out=ckpt.pt")
    with pytest.raises(InputError, match="one-shard has 23 tokens that are not GPT-2's"):
        main("load_gpt2.py", TF / "one-shard")
    with pytest.raises(InputError, match="nowhere is neither a size"):
        main("load_gpt2.py", "nowhere")


ODD_TEXTS = ("Every effort moves you", "a ,b . c ! don 't", " " * 9 + "\n\n\t",
             " na\u00efve \u4f60\u597d \U0001f642\n\n  x<|endoftext|>It's 1984")


def test_tokenizers_agrees(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    exported(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in ODD_TEXTS:
        assert tokenizer.encode(text).ids == gpt.encode(text)
        assert tokenizer.decode(gpt.encode(text), skip_special_tokens=False) == text


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
            difference = (ours(idx) - theirs(idx).logits).abs().max() / theirs(idx).logits.std()
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
    tokens = collect(gpt.generate(ours, idx[:1], 30, temperature=0))[0]
    assert tokens.tolist() == greedy[0, 20:].tolist()
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "c"))
    assert pipeline("Every effort")[0]["generated_text"].startswith("Every effort")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "c"))
    for text in ODD_TEXTS:
        assert tokenizer(text)["input_ids"] == gpt.encode(text)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` under /a and /b with ranges, and misbehaves as `faults` says."""
    files, faults, asked = {}, {}, []

    def do_GET(self):
        self.asked.append((self.path, self.headers.get("Range")))
        source, _, name = self.path[1:].split("/")
        fault, data = self.faults.get((source, name)), self.files[name]
        first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if fault == 404 or (first and first >= len(data)):
            return self.send_error(fault or 416)
        self.send_response(206 if first else 200)
        self.send_header("Content-Type", "text/html" if fault == "page" else "application/binary")
        self.send_header("Content-Length", len(data) - first)
        self.end_headers()
        self.wfile.write(data[first : len(data) // 2] if fault == "cut" else data[first:])

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(archive):
    """Serves an archive's files; -> the address."""
    with zipfile.ZipFile(archive) as file:
        Server.files = {name: file.read(name) for name in (load_gpt2.HPARAMS, load_gpt2.DATA)}
    Server.faults = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_download(tmp_path, monkeypatch):
    hparams, data = load_gpt2.HPARAMS, load_gpt2.DATA

    def fetched(folder, **faults):
        Server.faults = faults.get("f", {})
        Server.asked.clear()
        load_gpt2.download("124M", str(folder))
        assert sorted(os.listdir(folder)) == sorted(Server.files)
        assert all((folder / name).read_bytes() == Server.files[name] for name in Server.files)
        return list(Server.asked)

    with serving(TF / "vocab.zip") as base:
        monkeypatch.setattr(load_gpt2, "SOURCES", (base + "/a", base + "/b"))
        half = len(Server.files[data]) // 2
        asked = fetched(tmp_path / "1")
        assert asked == [(f"/a/124M/{hparams}", None), (f"/a/124M/{data}", None)]
        assert fetched(tmp_path / "1") == []  # nothing is asked for again
        asked = fetched(tmp_path / "2", f={("a", data): "cut"})  # goes on at the second source
        assert asked[-1] == (f"/b/124M/{data}", f"bytes={half}-")
        assert len(fetched(tmp_path / "3", f={("a", hparams): 404, ("a", data): "page"})) == 4
        (tmp_path / "4").mkdir()
        (tmp_path / "4" / (data + ".part")).write_bytes(b"?" * 999999)  # more than there is
        fetched(tmp_path / "4")
        with pytest.raises(InputError, match=f"{data}.*by hand") as caught:
            fetched(tmp_path / "5", f={("a", data): "cut", ("b", data): 404})
        assert str(tmp_path / "5") in str(caught.value)
        assert os.path.getsize(tmp_path / "5" / (data + ".part")) == half
    monkeypatch.setattr(load_gpt2, "SOURCES", (f"http://127.0.0.1:{free_port()}/a",) * 2)
    with pytest.raises(InputError, match="by hand"):
        load_gpt2.download("124M", str(tmp_path / "6"))


@pytest.mark.skipif(not os.path.exists("models/124M/hparams.json")
                    or not os.path.exists("the-verdict.txt"), reason="needs the real 124M")
def test_the_books_losses_with_the_real_weights():
    with open("the-verdict.txt", encoding="utf-8") as file:
        text = file.read()
    model = load_gpt2.load_gpt2("models/124M")
    cut, losses = int(0.9 * len(text)), []
    for part in (text[:cut], text[cut:]):
        ids = torch.tensor(gpt.encode(part))
        windows = ids[: (len(ids) - 1) // 256 * 256 + 1].unfold(0, 257, 256)
        with torch.no_grad():
            losses.append(model(windows[:, :-1], windows[:, 1:]).item())
    assert losses == pytest.approx([3.7547, 3.5596], abs=2e-4)


# ---- README.md ---------------------------------------------------------------------------------

def test_every_command_of_the_readme(tmp_path, monkeypatch):
    """In their order, in one folder, on small models; pip, pytest and curl are left out."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        text = file.read()
    lines = "".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)).splitlines()
    commands = [part.strip() for line in lines for part in line.split("&&")]
    monkeypatch.chdir(tmp_path)
    for name in ("my.txt", "shakespeare.txt", "the-verdict.txt"):
        shutil.copy(os.path.join(HERE, "data", "story.txt"), name)
    few, done = ("--max_iters=2", "--eval_iters=1", "--device=cpu"), []
    urlopen = urllib.request.urlopen
    with serving(TF / "vocab.zip") as base:
        monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: urlopen(
            urllib.request.Request(request.full_url.replace(load_gpt2.SOURCES[0], base + "/a"))))
        for words in map(shlex.split, commands):
            if words[0] in ("pip", "pytest", "curl"):
                continue
            script, *flags = words[words.index("python") + 1 :] if "python" in words else words
            small = SMALL if "--init_from" not in " ".join(flags) else ()
            if "--resume" in flags:
                main(script, *flags, "--max_iters=3")
            elif script == "torchrun":
                both = two_processes(*flags[2:], *small, *few)
                assert "next:" in both.communicate(timeout=300)[0]
            elif script == "train.py":
                main(script, *flags, *small, "--block_size=32", *few)
            else:
                main(script, *flags, *(["--max_new_tokens=3"] if script == "sample.py" else []))
            done.append(script)
    assert set(done) == {"train.py", "sample.py", "load_gpt2.py", "torchrun"} and len(done) > 11
    code, = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(code, {})  # it reads the run that the first command made
