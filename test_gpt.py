"""The tests: `pytest test_gpt.py`. No network, no GPU; three minutes on two cores."""
import argparse
import csv
import dataclasses
import gc
import http.server
import io
import itertools
import json
import math
import os
import pathlib
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import safetensors.torch
import torch

import gpt
import load_gpt2
import train
from gpt import GPT, GPTConfig, InputError

HERE = os.path.dirname(os.path.abspath(__file__))
TF = pathlib.Path(HERE, "data", "tf")
STORY = pathlib.Path(train.STORY).read_text("utf-8")
README = pathlib.Path(HERE, "README.md").read_text("utf-8")
SMALL = ("--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=32", "--device=cpu",
         "--dtype=float32")
RUN = (*SMALL, "--eval_windows=7", "--log_interval=1", "--warmup_iters=3")
SIGNALS = [getattr(signal, name) for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal))]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
            "--no-python")
for number in SIGNALS:  # `pytest &` in a script ignores SIGINT, and nohup SIGHUP
    signal.signal(number, signal.default_int_handler)
posix = pytest.mark.skipif(os.name == "nt", reason="signals, links and modes differ there")

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

def start(script, *flags, before=(), **options):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([*before, sys.executable, os.path.join(HERE, script), *flags],
                            text=True, encoding="utf-8", **pipes | options)

def end(process, status=0, text=None):
    """Waits for it; returns what it printed on (standard output, error)."""
    out, err = process.communicate(text, timeout=300)
    assert process.returncode == status, (out, err)
    return out, err

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
        gc.collect()  # closes what the script had open
    assert code == status

def train_in(folder, flags, **status):
    """main of train.py with a folder for what it writes, as small as the other runs here."""
    base = () if re.search("--resume|--init_from", flags) else RUN
    main("train.py", *base, f"--out_dir={folder}", *shlex.split(flags), **status)

def refused(words, call, *arguments, **options):
    with pytest.raises(InputError, match=words) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)

def column(folder, name):
    with open(os.path.join(folder, "log.csv"), encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]

def load(path):
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else str(path)
    return gpt.load_checkpoint(path, verify=True)

def same(a, b):
    """Asserts that two nests of dicts, lists, tensors and numbers are equal to the last bit."""
    if isinstance(a, GPT):
        a, b = dict(a.state_dict()), dict(b.state_dict())
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

def same_run(a, b):
    for name in ("iter", "loss", "lr", "grad_norm"):
        assert column(a, name) == column(b, name), name
    assert column(a, "val_loss")[-1] == column(b, "val_loss")[-1]
    (model_a, state_a), (model_b, state_b) = load(a), load(b)
    same(model_a, model_b)
    same(state_a["optimizer"], state_b["optimizer"])

def tiny(seed=0, **changes):
    """A small GPT with every parameter random, biases and gains too, and large enough to matter;
    what it predicts depends on what it attends to more than on the last token."""
    sizes = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 3, "n_embd": 12} | changes
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**sizes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=1.5 if "attn" in name else 0.05 if name == "ln_f.bias" else 0.5)
    return model

# ---- The oracle: GPT-2 in numpy float64, from the paper and the layout of OpenAI's variables ----
def oracle(weights, n_head, tokens):
    """weights {OpenAI's name: float64 array}, tokens (T,) -> logits (T, V)."""
    def norm(x, name):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * weights[name + "/g"] + weights[name + "/b"]

    def project(x, name):
        return x @ weights[name + "/w"][0] + weights[name + "/b"]  # w is (1, in, out)

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
    """Our parameters under OpenAI's names and in their layout: w is (1, in, out)."""
    weights = {load_gpt2.openai_name(name): parameter.detach().numpy()
               for name, parameter in model.named_parameters()}
    return {name: w.T[None] if name.endswith("/w") else w for name, w in weights.items()}

def oracles(model, idx, targets):
    """idx and targets (B, T) -> logits (B, T, V) and loss."""
    weights = {name: value.astype(np.float64) for name, value in openai_weights(model).items()}
    logits = np.stack([oracle(weights, model.config.n_head, row) for row in idx.numpy()])
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits, -np.take_along_axis(log_probs, targets.numpy()[..., None], -1).mean()

# ---- The model ---------------------------------------------------------------------------------
@pytest.mark.parametrize("dropout", (0.0, 1e-9))  # drops none, yet takes another path on a CPU
def test_logits_and_loss_equal_the_oracles(dropout):
    model, (idx, targets) = tiny(dropout=dropout).train(), torch.randint(61, (2, 3, 16))
    logits, loss = oracles(model, idx, targets)
    np.testing.assert_allclose(model(idx).numpy(), logits, rtol=0, atol=1e-5)
    assert model(idx, targets).item() == pytest.approx(loss, abs=1e-5)

def test_gradients_equal_the_slopes_of_the_oracles_loss():
    model, (idx, targets) = tiny().double().requires_grad_(), torch.randint(61, (2, 2, 9))
    model(idx, targets).backward()
    for name, parameter in model.named_parameters():
        direction, losses = torch.randn_like(parameter), []
        for change in (1e-4, -2e-4, 1e-4):
            parameter.data += change * direction
            losses.append(oracles(model, idx, targets)[1])
        slope = (losses[0] - losses[1]) / 2e-4
        ours = (parameter.grad * direction).sum().item()
        assert ours == pytest.approx(slope, rel=1e-4, abs=1e-6), name

def test_size_initialisation_and_first_loss():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 124_439_808
    model, idx = GPT(GPTConfig(50257, 64, 2, 4, 128)), torch.randint(50257, (4, 64))
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            layer = name.split(".")[-2]
            expected = {"wpe": 0.01, "c_proj": 0.02 / math.sqrt(2 * 2)}.get(layer, 0.02)
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert (parameter == name.endswith("weight")).all(), name
    assert model(idx, idx.roll(1)).item() == pytest.approx(math.log(50257), abs=0.1)

def test_bfloat16_is_exact_where_logits_are_centered():
    """OpenAI's logits share an offset of about -100, where bfloat16 has steps of 0.5."""
    def error():
        half = gpt.with_weights(model.config, model.state_dict()).bfloat16()
        return abs(half(idx, targets).item() - loss)
    model, idx = tiny(vocab_size=500, n_embd=48), torch.randint(500, (64, 16))
    model.ln_f.bias.normal_(std=0.5)
    u = -100 * model.ln_f.bias / model.ln_f.bias.square().sum()
    model.wte.weight += u  # their sum stays
    model.wpe.weight -= u
    targets = torch.multinomial(model(idx).softmax(-1).flatten(0, 1), 1).view(64, 16)
    loss = model(idx, targets).item()
    assert error() > 0.005
    gpt.center_logits(model)
    assert model(idx, targets).item() == pytest.approx(loss, abs=1e-5)
    assert error() < 0.002

def test_dropout_has_the_right_share_and_mean_and_is_off_in_eval():
    y = gpt.dropout(torch.ones(400, 501), 0.1)
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=0.003)
    assert y.mean().item() == pytest.approx(1, abs=0.003)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.9], rel=1e-4)
    model, idx = tiny(dropout=0.5), torch.randint(61, (2, 16))
    assert not gpt.dropout(torch.ones(2**20), 1.0).any() and gpt.dropout(idx, 1.0, False) is idx
    assert torch.equal(model(idx), model(idx))
    assert not torch.equal(model.train()(idx), model(idx))

def test_sizes_shapes_and_modes_that_do_not_fit_are_asserted():
    model, (idx, targets) = tiny(), torch.randint(61, (2, 2, 16))
    for words, call, *arguments in (
            ("n_embd=12.*n_head=5", GPT, GPTConfig(61, 16, 2, 5, 12)),
            ("17 tokens exceed", model, torch.zeros(1, 17, dtype=torch.int64)),
            ("eval", gpt.KVCache, tiny().train(), 1),  # dropout would spoil the text
            ("17 tokens exceed", gpt.beam_search, model, idx[:1, :5], 13, 2),
            ("idx", generated, model, idx[0], 1), ("idx", generated, model, idx[:, :0], 1),
            # A loss over other positions than those of idx would be wrong without a word.
            ("targets", model, idx, targets[:, :8]), ("targets", model, idx, targets[:1]),
            ("targets", model, idx, targets[0]), ("targets", model, idx, targets[:, :0])):
        with pytest.raises(AssertionError, match=words):
            call(*arguments)

def test_cached_logits_equal_uncached():
    model, idx, pieces = tiny(), torch.randint(61, (3, 16)), (5, 1, 7, 3)
    caches = [gpt.KVCache(model, 3) for _ in model.h]
    parts = torch.cat([model(part, caches=caches) for part in idx.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(parts, model(idx)[:, [4, 5, 12, 15]], rtol=1e-4, atol=1e-4)

def generated(*arguments, seed=0, **options):
    """All that generate yields, (B, n)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(list(gpt.generate(*arguments, generator=generator, **options)), dim=1)

def test_generation_past_the_window_equals_plain_recomputation():
    model, idx, before = tiny(), torch.randint(61, (2, 5)), torch.get_rng_state()
    ours, generator = generated(model, idx, 40), torch.Generator().manual_seed(0)
    assert len(ours.unique()) > 10  # or the window would not matter
    assert torch.equal(before, torch.get_rng_state())  # it draws from its generator alone
    window, expected = idx, []
    for _ in range(40):
        if window.shape[1] > 16:
            window = window[:, -8:]
        probs, ids = gpt.candidates(model(window)[:, -1])
        choice = torch.multinomial(probs, 1, generator=generator)
        expected.append(ids.gather(1, choice)[:, 0])
        window = torch.cat((window, expected[-1][:, None]), dim=1)
    assert torch.equal(ours, torch.stack(expected, dim=1))
    for length in (15, 16, 17, 50):
        prompt = torch.randint(61, (2, length))
        assert torch.equal(generated(model, prompt, 3), generated(model, prompt[:, -16:], 3))

def test_rows_stop_on_their_own():
    model, idx = tiny(), torch.randint(61, (4, 5))
    free = generated(model, idx, 30, temperature=0)
    stop = free[0, 3].item()
    stopped = generated(model, idx, 30, temperature=0, stop_token=stop)
    for row, expected in zip(stopped.tolist(), free.tolist()):
        end = expected.index(stop) if stop in expected else 30
        assert row == (expected[:end] + [stop] * 30)[: len(row)]
    alone = generated(model, idx[:1], 30, temperature=0, stop_token=stop)
    assert alone.shape[1] == 1 + free[0].tolist().index(stop)

@pytest.mark.parametrize("temperature, top_k, top_p", (
    (1.0, None, None), (0.7, 0, 1.0), (1.3, 5, None), (1.0, 500, None), (1.0, None, 0.6),
    (0.8, 7, 0.5), (1.0, 1, None), (1.0, None, 1e-9), (2.0, 4, 0.9)))
def test_filters_against_probabilities_by_definition(temperature, top_k, top_p):
    logits = torch.randn(30) * 2
    p = (logits.double() / temperature).exp().numpy()
    ids = np.argsort(-p)[: top_k or 30]  # sort, cut
    sums = np.cumsum(p[ids]) / p[ids].sum()
    ids = ids[: 1 + np.count_nonzero(sums < (top_p or 1) - 1e-12)]  # up to the one that reaches p
    probs = p[ids] / p[ids].sum()
    ours, places = gpt.candidates(logits[None], temperature, top_k, top_p)
    assert ours.sum().item() == pytest.approx(1) and (ours.diff() <= 0).all()  # likeliest first
    kept = ours[0] > 0
    assert places[0][kept].tolist() == ids.tolist()
    np.testing.assert_allclose(ours[0][kept], probs, rtol=1e-5)
    assert gpt.candidates(torch.zeros(1, 20), top_k=4)[0].shape == (1, 4)  # not more on ties
    for greedy in (0, 1e-320):
        assert gpt.candidates(logits[None], greedy)[1].tolist() == [[logits.argmax().item()]]

def test_one_beam_is_greedy_and_wide_beams_find_the_best_of_all_sequences():
    """A bound or a length that is off by one shows on some of the 40 models."""
    ids, idx = torch.cartesian_prod(*[torch.arange(4)] * 4), torch.tensor([[1, 3]])  # ids (256, 4)
    whole = torch.cat((idx.expand(256, -1), ids), dim=1)
    for seed, stop in itertools.product(range(40), (None, 2)):
        model = tiny(seed, vocab_size=4, block_size=6)  # the six tokens just fit
        log_probs = model(whole)[:, 1:-1].log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]
        means = log_probs.cumsum(1) / torch.arange(1, 5)  # (256, 4), of the first 1, 2, 3, 4 tokens
        ends = [row.index(stop) + 1 if stop in row else 4 for row in ids.tolist()]
        best = means[torch.arange(256), torch.tensor(ends) - 1].argmax()
        found = gpt.beam_search(model, idx, 4, 64, stop_token=stop)
        assert found.tolist() == ids[best, : ends[best]].tolist(), (seed, stop)
    greedy = generated(model, idx, 4, temperature=0)[0]
    assert torch.equal(gpt.beam_search(model, idx, 4, 1), greedy)

def test_tokenizer():
    assert gpt.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert gpt.encode("a<|endoftext|>b") == [64, 50256, 65]
    tokenizer = gpt.get_tokenizer()
    assert tokenizer.name == "gpt2" and tokenizer.n_vocab == 50257
    for text in ("naïve café 你好 🙂🙃 \u202e\u0301 \x00\x7f \t\r\n  \u3000x", " " * 50 + "\n\n x"):
        assert tokenizer.decode(gpt.encode(text)) == text

# ---- Training ----------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a run of ten steps on the built-in text, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    out, _ = end(start("train.py", *RUN, "--max_iters=10", "--eval_interval=5", cwd=folder))
    return folder / "out", out

@pytest.fixture
def sample(run, capsys):
    """Runs sample.py on the run's model; returns what it printed on (standard output, error)."""
    def call(*flags):
        capsys.readouterr()
        main("sample.py", f"--checkpoint={run[0] / 'ckpt.pt'}", "--device=cpu", *flags)
        return capsys.readouterr()
    return call

def losses_are_the_oracles(folder, *splits):
    """Of 7 windows of 32 tokens, spread over each split; the last one is a batch of its own."""
    for name, tokens in zip(("train_loss", "val_loss"), splits):
        count = (len(tokens) - 1) // 32
        rows = torch.tensor([tokens[32 * (i * count // 7) :][:33] for i in range(7)])
        expected = oracles(load(folder)[0], rows[:, :-1], rows[:, 1:])[1]
        assert column(folder, name)[-1] == pytest.approx(expected, abs=2e-6), name

def test_what_a_run_prints_and_logs_and_leaves(run):
    folder, out = run
    assert {path.name for path in folder.iterdir()} == {
        "lock", "data.bin", "ckpt.pt", "best.pt", "log.csv", "loss.png"}
    assert "10.8249" in out and out.count("sample: Every effort moves you") == 3
    assert (folder / "log.csv").read_text().startswith(
        "iter,tokens,loss,train_loss,val_loss,lr,grad_norm,tokens_per_s\n0,0,,10.")
    assert column(folder, "tokens") == list(range(0, 641, 64))  # after each of the ten steps
    losses = column(folder, "val_loss")
    assert len(losses) == 3 and losses[0] == pytest.approx(math.log(50257), abs=0.1)
    assert f"val_loss {losses[2]:.6g} | val_perplexity {math.exp(losses[2]):.6g}" in out
    tokens = gpt.encode(STORY)
    losses_are_the_oracles(folder, tokens[:4886], tokens[4886:])  # nine tenths, one tenth
    shown = re.search("```\n(data/story.*?)```", README, re.DOTALL)[1]
    shown, out = (re.sub(r"b?float\d+|\d[\d.,e+-]*", "N", text) for text in (shown, out))
    assert all(line.startswith("sample") or line in out for line in shown.splitlines())

def test_a_run_with_two_texts_goes_on_without_them_or_says_how(tmp_path):
    splits, out = (STORY[:9000], STORY[9000:12000]), tmp_path / "out"
    for name, split in zip("tv", splits):
        (tmp_path / name).write_text(split, "utf-8", newline="")
    train_in(out, f"--data={tmp_path / 't'} --val_data={tmp_path / 'v'} --max_iters=1")
    losses_are_the_oracles(out, *map(gpt.encode, splits))
    os.replace(tmp_path / "t", tmp_path / "v")
    train_in(out, "--resume --max_iters=2")  # the tokens are kept
    (out / "data.bin").unlink()
    refused("t cannot be read; give --data=", train_in, out, "--resume")
    train_in(out, f"--resume --max_iters=3 --data={tmp_path / 'v'}")
    (out / "val_data.bin").unlink()
    refused("v is not the text of this run", train_in, out, "--resume")

def test_what_a_checkpoint_holds(run):
    model, state = load(run[0])
    assert state.keys() == {"optimizer", "scaler", "step", "best", "log", "args", "data_hash",
                            "val_data_hash", "val_loss"}
    assert state["step"] == 10 and len(state["log"]) == 11 and not model.training
    decayed, others = state["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)
    assert len(decayed["params"]) == 2 + 4 * 2 and len(others["params"]) == 2 + 8 * 2
    assert load(run[0] / "best.pt")[1] == {"step": 10, "val_loss": column(run[0], "val_loss")[2]}

@pytest.mark.parametrize("words", (2, 17, 60))
def test_score_predicts_each_token_from_half_a_window_or_more(sample, tmp_path, words):
    model, path = tiny(vocab_size=50257), tmp_path / "x.txt"
    gpt.save_checkpoint(str(tmp_path / "x.pt"), model)
    path.write_text(gpt.get_tokenizer().decode([*range(1000, 1000 + words)]), "utf-8")
    ids = torch.tensor([gpt.encode(path.read_text("utf-8"))])
    n, n_bytes = ids.shape[1], path.stat().st_size
    losses = []
    for i in range(1, n):
        start = max(0, (i - 1) // 8 * 8 - 8)  # windows of 16 tokens begin at each multiple of 8
        losses.append(-model(ids[:, start:i])[0, -1].log_softmax(-1)[ids[0, i]].item())
    loss = np.mean(losses)
    out, _ = sample(f"--score={path}", f"--checkpoint={tmp_path / 'x.pt'}", "--dtype=float32")
    said = re.findall(r" ([\d.]+)", out.replace(",", ""))
    expected = n, n_bytes, loss, math.exp(loss), loss * n / n_bytes / math.log(2)
    assert [float(value) for value in said] == pytest.approx(expected, rel=1e-4)

def test_show_prints_what_is_drawn_from(sample, run):
    out, err = sample("--start=Ivy", "--show=2", "--top_k=9", "--top_p=0.9", "--temperature=0.5",
                      "--num_samples=2", "--max_new_tokens=9", "--dtype=float32", "--seed=5")
    assert out.startswith("Ivy") and "step 10, validation loss 10." in err
    model, idx, seen = load(run[0])[0], torch.tensor([gpt.encode("Ivy")] * 2), []
    generated(model, idx, 9, 0.5, 9, 0.9, seed=5, observe=lambda *now: seen.append(now))
    expected = gpt.candidates(model(idx)[:, -1], 0.5, 9, 0.9)
    torch.testing.assert_close(seen[0][:2], expected)
    for line, (probs, ids, token) in zip(re.findall("^  .*", err, re.M), seen, strict=True):
        expected = ""
        for i, (p, id) in enumerate(zip(probs[0].tolist(), ids[0].tolist())):
            word = f"{gpt.get_tokenizer().decode([id])!r} {p:.1%}"
            expected += f"  [{word}]" if id == token[0] else f"  {word}" if i < 2 else ""
        assert line == expected

def test_prompts_that_are_files_or_long_or_end_in_white_space(sample, run, tmp_path, monkeypatch):
    """GPT-2's tokens begin with their space. The last newline of a file or of `echo` is dropped."""
    for variable in ("HOME", "USERPROFILE"):  # Windows has the second one
        monkeypatch.setenv(variable, str(tmp_path))
    flags = ("--start=FILE:~/p.txt", "--max_new_tokens=0")
    for content, warned in ((b"\xef\xbb\xbfIvy\r\n", []), (b"Ivy\n\n", ["white space"]),
                            (b"Ivy ", ["white space"]), (b"x " * 40 + b"y", ["last 32"])):
        (tmp_path / "p.txt").write_bytes(content)
        out, err = sample(*flags)
        assert out == content.decode("utf-8-sig").replace("\r", "").removesuffix("\n") + "\n"
        assert re.findall("white space|last 32", err) == warned, content
    assert sample("--start=x", "--num_beams=2", "--max_new_tokens=0").out == "x\n"
    out, err = end(start("sample.py", "--start=-", "--num_samples=3", "--max_new_tokens=0",
                         f"--checkpoint={run[0] / 'ckpt.pt'}"), text="Ivy\n")
    assert out == "Ivy\n" + 2 * ("-" * 80 + "\nIvy\n") and "white space" not in err
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9")
    refused(r"p.txt: byte 6 \(0xe9\)", sample, *flags)

@pytest.fixture
def scaler(monkeypatch):
    """A stand-in for the GradScaler of float16, which may start with another factor."""
    original, options = torch.amp.GradScaler, {"enabled": True, "init_scale": 2.0**16}
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: original("cpu", **options))
    return options

def test_gradients_are_unscaled_before_they_are_clipped(tmp_path, scaler):
    flags = "--max_iters=4 --warmup_iters=0 --weight_decay=0 --grad_clip=1e-14"
    train_in(tmp_path / "scaled", flags)
    train_in(tmp_path / "half", flags + " --dtype=float16")
    scaler["enabled"] = False
    train_in(tmp_path / "plain", flags)
    losses, half = (column(tmp_path / folder, "val_loss") for folder in ("plain", "half"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # far below Adam's eps they move nothing
    assert 0 < abs(half[1] - losses[1]) < 1e-3
    for name in ("loss", "grad_norm", "val_loss"):
        plain, scaled = (column(tmp_path / folder, name) for folder in ("plain", "scaled"))
        assert scaled == pytest.approx(plain, rel=1e-4) and min(scaled) > 0.1, name

def test_an_overflow_is_left_out_and_a_resume_keeps_scale_and_best(tmp_path, scaler, capsys):
    scaler["init_scale"] = 2.0**127
    train_in(tmp_path, "--warmup_iters=0 --learning_rate=1 --lr_decay_iters=99 --max_iters=8")
    norms, scale = column(tmp_path, "grad_norm"), load(tmp_path)[1]["scaler"]["scale"]
    assert not math.isfinite(norms[0]) and math.isfinite(norms[-1])
    train_in(tmp_path, "--resume --max_iters=9")
    assert "of step 0\n" in capsys.readouterr().out  # the best one
    state, best = load(tmp_path)[1], load(tmp_path / "best.pt")[1]
    assert state["scaler"]["scale"] <= scale <= 2.0**125
    assert state["best"] == best == {"step": 0, "val_loss": min(column(tmp_path, "val_loss"))}

def test_every_step_and_micro_batch_drops_other_numbers(tmp_path):
    alike = np.tile(np.arange(1, 33) * 9, 20).astype(np.uint16)  # all windows are
    alike.tofile(tmp_path / "x.bin")
    flags = (f"--data={tmp_path / 'x.bin'} --batch_size=1 --dropout=0.5 --max_iters=4 "
             "--learning_rate=1e-12 --weight_decay=0 --gradient_accumulation_steps=")
    for count in "12":
        train_in(tmp_path / count, flags + count)  # weights do not move
        assert min(np.diff(sorted(column(tmp_path / count, "loss")))) > 1e-5
    assert abs(column(tmp_path / "1", "loss")[0] - column(tmp_path / "2", "loss")[0]) > 1e-5

def test_accumulation_and_processes_do_not_change_the_run(tmp_path):
    flags, folders = "--dropout=0 --max_iters=4 ", [tmp_path / name for name in "abc"]
    two = start("train.py", *RUN, *flags.split(), "--gradient_accumulation_steps=2",
                f"--out_dir={folders[2]}", before=TORCHRUN)
    train_in(folders[0], flags + "--batch_size=8")
    train_in(folders[1], flags + "--batch_size=2 --gradient_accumulation_steps=4")
    end(two)
    for name in ("loss", "grad_norm", "train_loss", "val_loss"):
        a, b, c = (column(folder, name) for folder in folders)
        assert a == pytest.approx(b, rel=1e-5) and a == pytest.approx(c, rel=1e-5), name
    # and a run of two processes goes on with one, if the product of the three stays
    refused("windows_per_step=4 .*8", train_in, folders[2], "--resume --max_iters=5")
    train_in(folders[2], "--resume --max_iters=5 --batch_size=4")
    train_in(folders[0], "--resume --max_iters=5")
    assert column(folders[0], "loss") == pytest.approx(column(folders[2], "loss"), rel=1e-5)

def test_processes_that_meet_the_same_error_say_it_once(tmp_path):
    """torch.distributed would lose what is raised, or each process would say it."""
    (tmp_path / "short.txt").write_text("Only a few words here. " * 20)
    faults = {"--n_head=3": "n_head=3", "--data=short.txt": "13 tok"}  # before they meet, and after
    runs = [start("train.py", *RUN, flag, f"--out_dir={tmp_path / flag}", before=TORCHRUN,
                  cwd=tmp_path) for flag in faults]
    for run, words in zip(runs, faults.values()):
        _, err = end(run, status=1)
        assert len(re.findall(f"train.py: error: .*{words}", err)) == 1, err

def test_torchruns_variables_that_do_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")  # without WORLD_SIZE it means nothing
    train_in(tmp_path / "a", "--max_iters=1")
    assert "sample: " in capsys.readouterr().out and load(tmp_path / "a")[1]["step"] == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("WORLD_SIZE.*torchrun", train_in, tmp_path / "b", "--max_iters=1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused("--nproc_per_node exceeds the GPUs", train_in, tmp_path / "b", "--device=auto")

@posix
def test_one_ctrl_c_saves_the_run_of_two_processes(tmp_path):
    process = start("train.py", *RUN, "--max_iters=99999", before=TORCHRUN, cwd=tmp_path)
    assert any(line.startswith("iter 1 ") for line in process.stdout)
    process.send_signal(signal.SIGINT)  # torchrun hands it to both
    out, err = end(process, status=1)  # that of torchrun
    step = load(tmp_path / "out")[1]["step"]
    assert out.splitlines()[-1].startswith(f"stopped and saved at step {step}; go on with --resume")
    assert step > 0 and err.count("finishing the step") == 1

@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compile_is_for_who_asks_and_changes_no_loss(tmp_path, capfd):
    dynamo = torch._dynamo
    for flag in ("", "--no-compile", "--compile"):
        assert not dynamo.utils.counters["stats"]["unique_graphs"]
        train_in(tmp_path / flag, f"{flag} --max_iters=2 --dropout=0 --eval_windows=1 --n_layer=1")
    assert dynamo.utils.counters["stats"]["unique_graphs"]
    eager, compiled = (column(tmp_path / flag, "loss") for flag in ("--no-compile", "--compile"))
    assert compiled == pytest.approx(eager, rel=1e-4)
    with pytest.raises(RuntimeError) as caught:
        raise dynamo.exc.TorchDynamoException("no compiler\nmore")
    with pytest.raises(SystemExit):
        gpt.show_error(caught.type, caught.value, caught.tb)
    assert re.search("error: no compiler more.*; --no-compile", capfd.readouterr().err)

def test_what_a_fork_adds_is_trained_resumed_kept_and_not_exported(tmp_path, monkeypatch):
    def start_script(doc, original=gpt.start_script):
        parser = original(doc)
        parser.add_argument("--rope", type=int)
        return parser
    monkeypatch.setattr(gpt, "start_script", start_script)
    monkeypatch.setattr(gpt, "GPTConfig", dataclasses.make_dataclass(
        "Fork", [("rope", int, 0)], bases=(GPTConfig,), frozen=True))
    for name, flags in (("a", "--rope=7 --max_iters=1"), ("a", "--resume --max_iters=2"),
                        ("b", f"--init_from={tmp_path / 'a' / 'ckpt.pt'} --max_iters=0")):
        train_in(tmp_path / name, flags)
        model, _ = load(tmp_path / name)
        assert model.config.rope == 7
    model.h[1].gate = torch.nn.Linear(2, 2)
    monkeypatch.setattr(load_gpt2, "load_checkpoint", lambda *_, **__: (model, {}))
    del model.wpe
    refused("x.pt is not GPT-2: h.1.gate.bias, h.1.gate.weight, rope, wpe.weight$",
            load_gpt2.export, "x.pt", str(tmp_path / "c"))
    monkeypatch.setattr(gpt, "Block", None)  # a mistake in a fork is no damaged checkpoint
    with pytest.raises(TypeError):
        load(tmp_path / "a")

ARGS = argparse.Namespace(learning_rate=1.0, min_lr=0.1, seed=5, batch_size=3, windows_per_step=6)

@pytest.mark.parametrize("warmup, decay", ((0, 10), (3, 10), (10, 10), (20, 10), (0, 0), (1, 1)))
def test_schedule(warmup, decay):
    args = argparse.Namespace(**vars(ARGS), warmup_iters=warmup, lr_decay_iters=decay)
    rates = [train.get_lr(step, args) for step in range(30)]
    assert all(0 < rate <= 1 for rate in rates)
    climb = [(i + 1) / warmup for i in range(min(warmup, decay))]
    assert rates[: len(climb)] == pytest.approx(climb)
    assert rates[decay:] == [0.1] * (30 - decay)  # a run that goes on stays there
    assert decay - warmup != 10 or (rates[0] == 1 and rates[5] == pytest.approx(0.55))

def test_a_warm_up_that_is_not_shorter_than_the_run(tmp_path, capsys):
    train_in(tmp_path, "--max_iters=2")
    assert "--warmup_iters reaches lr_decay_iters" in capsys.readouterr().out
    train_in(tmp_path, "--resume --max_iters=6")
    assert column(tmp_path, "lr")[2:] == pytest.approx([4e-5] * 4)
    assert "--warmup" not in capsys.readouterr().out

def test_every_window_once_an_epoch_and_anew_in_the_next_or_for_another_seed():
    order = [w for step in range(7) for micro in range(2)
             for w in train.window_indices(step, micro, ARGS, 14)]
    assert sorted(order[:14]) == sorted(order[14:28]) == list(range(14))
    assert order[:14] != order[14:28] and order[:14] != list(range(14))
    other = argparse.Namespace(**vars(ARGS) | {"seed": 6})
    assert train.window_indices(0, 0, ARGS, 99) != train.window_indices(0, 0, other, 99)
    args = argparse.Namespace(block_size=8, eval_windows=1)
    for n, count in ((97, 12), (96, 11), (9, 1)):
        windows = train.windows_in(np.arange(n), args, "train on")
        assert windows.tolist() == [list(range(8 * i, 8 * i + 9)) for i in range(count)]

def test_fine_tuning_and_sampling_from_a_checkpoint_by_another_program(run, tmp_path, capsys):
    """It has unknown keys, a compiled model's names, and 16-bit weights."""
    path = tmp_path / "ckpt.pt"
    old, state = load(run[0] / "best.pt")
    weights = {"_orig_mod." + name: weight for name, weight in old.state_dict().items()}
    weights["_orig_mod.ln_f.bias"] = old.ln_f.bias.data.bfloat16()
    old.ln_f.bias.data = old.ln_f.bias.data.bfloat16().float()
    torch.save({"config": vars(old.config), "model": weights, "scaler": {}, "step": 9,
                "optimizer": {"state": {}, "param_groups": []}, "args": {"dtype": "float32"},
                "best_val_loss": 9.5, "log_bytes": 1234}, path)
    gpt.center_logits(old)
    for block_size in (32, 16):
        out = tmp_path / str(block_size)
        train_in(out, f"--init_from={path} --max_iters=0 --block_size={block_size} --dropout=0.2 "
                 "--learning_rate=1e-5 --eval_windows=7 --device=cpu --dtype=float32")
        new, new_state = load(out)
        assert new.config == GPTConfig(50257, block_size, 2, 2, 16, 0.2)
        old.wpe.weight = torch.nn.Parameter(old.wpe.weight[:block_size])
        same(new, old)
    assert capsys.readouterr().out.count("first 16 positions stay; --block_size=32 keeps all") == 1
    assert column(tmp_path / "32", "val_loss") == pytest.approx([state["val_loss"]], abs=1e-5)
    assert new_state["args"]["min_lr"] == pytest.approx(1e-6)  # follows the rate unless given
    refused("--init_from", train_in, tmp_path, "--resume")
    main("sample.py", f"--checkpoint={path}", "--start=Ivy", "--max_new_tokens=3")
    assert capsys.readouterr().out.startswith("Ivy")

class Lines(io.BytesIO):
    def readlines(self, _):
        return super().readlines(50)  # in parts of 50 bytes, not a million

def test_tokens_in_parts_equal_tokens_of_the_whole(tmp_path, monkeypatch):
    rng, path, bom = np.random.default_rng(0), tmp_path / "x.txt", "\ufeff"
    parts = [" ", "  ", "\n", "\n\n", "\t", "\u3000", "\x1c", "\u00a0", "a", "It's", "1984", "...",
             bom, "!?", "é", "你好", "🙂", "<|endoftext|>", " x", "\r\n", "\n", "\n", "\n \n"]
    args = argparse.Namespace(data=str(path), out_dir=str(tmp_path))
    monkeypatch.setattr(train, "open", lambda *_: Lines(path.read_bytes()), raising=False)
    for _ in range(30):
        text = "".join(rng.choice(parts, 500))
        path.write_bytes(text.encode())
        assert len(list(train.read_text([str(path)]))) > 5
        tokens, _ = train.load_tokens("data", args, {})
        assert tokens.tolist() == gpt.encode(text.replace("\r\n", "\n").replace(bom, ""))
    monkeypatch.undo()
    path.write_bytes(b"x" * 2**24 + b"\n" * 899_999)  # where older versions of tiktoken hang
    assert len(train.load_tokens("data", args, {})[0]) > 1000

def test_folders_and_damaged_tokens_files(tmp_path, capsys):
    """A cut or changed tokens file would give other windows, without a word."""
    for name, text in (("b.TXT", "two " * 349), ("a.txt", "one " * 350), ("c.md", "no")):
        (tmp_path / name).write_text(text)
    path = tmp_path / "out" / "data.bin"
    path.parent.mkdir()
    path.write_bytes(b"\1" * 4000)  # by an earlier run: a new one does not trust it
    train_in(path.parent, f"--data={tmp_path} --max_iters=0")
    whole = path.read_bytes()
    expected = gpt.encode("one " * 350 + "<|endoftext|>" + "two " * 349)
    assert np.frombuffer(whole, np.uint16).tolist() == expected
    assert "2 file" in capsys.readouterr().out
    for damaged in (b"", whole[:-2], whole[:-1], whole + b"\0", whole[:-2] + b"\0\0"):
        path.write_bytes(damaged)
        refused("cannot be read|damaged: delete", train_in, tmp_path / "out", "--resume")
    path.unlink()
    train_in(tmp_path / "out", "--resume")
    assert path.read_bytes() == whole

@posix
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capfd, number):
    clip, steps = torch.nn.utils.clip_grad_norm_, itertools.count(1)
    def clip_and_signal(*arguments):
        if next(steps) in (3, 4, 5):
            signal.raise_signal(number)
        return clip(*arguments)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_signal)
    for step, flags in ((3, f"--log_interval=2 --max_iters={10**18}"), (4, "--resume")):
        train_in(tmp_path, flags, status=128 + number)
        out, err = capfd.readouterr()
        assert "--resume" in out.splitlines()[-1] and err.startswith("finishing the step")
        assert load(tmp_path)[1]["step"] == step  # between two lines of the log, then at one
    train_in(tmp_path, "--resume --max_iters=5")  # the signal in the last step: it is complete
    assert "next: python sample.py" in capfd.readouterr().out
    assert column(tmp_path, "iter") == [0, 2, 4, 5]

@posix
def test_a_run_speaks_at_once_and_goes_on_alone_without_terminal_or_pipe(tmp_path, monkeypatch):
    def goes_on():
        seen, started = len(column(out, "iter")), time.time()
        while len(column(out, "iter")) < seen + 6:
            assert time.time() < started + 60
            time.sleep(0.05)
        return seen
    out = tmp_path / "out"
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    process = start("train.py", *RUN, "--max_iters=99999", cwd=tmp_path, before=["nohup"])
    assert any(line.startswith("iter 2 ") for line in process.stdout)
    assert len(column(out, "iter")) < 50  # a buffer would wait for 8 kB
    # The lock comes before all reading: a second --resume must not go back to what it read early.
    for flags in ("--resume --n_layer=3", "--max_iters=1 --data=gone.txt"):
        refused("another train.py", train_in, out, flags)
    process.send_signal(signal.SIGHUP)  # ignored, because of nohup
    goes_on()
    process.stdout.close()  # as when Ctrl-C ends the `tee` behind the pipe first
    process.stderr.close()
    seen = goes_on()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and load(out)[1]["step"] > seen

@pytest.mark.parametrize("stream", (io.StringIO(), None))  # a notebook's, none
def test_a_run_needs_no_place_for_its_output_nor_for_its_picture(tmp_path, monkeypatch, stream):
    (tmp_path / "loss.png").mkdir()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    train_in(tmp_path, "--max_iters=1 --dtype=bfloat16")
    main("sample.py", f"--checkpoint={tmp_path / 'ckpt.pt'}", "--max_new_tokens=3", "--start=Ivy")
    model, state = load(tmp_path)
    assert (state["step"], model.wte.weight.dtype) == (1, torch.float32)  # bfloat16 for products
    if stream:
        assert len(re.findall("warning: .*loss.png|\nIvy", stream.getvalue())) == 3

@posix
def test_killed_and_resumed_is_the_same_run_however_often_it_is_evaluated(tmp_path):
    """In two epochs of 44 windows, in bfloat16. KILLS=20 pytest -k killed is the long version."""
    kills, a, b = int(os.environ.get("KILLS", 2)), tmp_path / "a", tmp_path / "b"
    (tmp_path / "x.txt").write_text(STORY[:3800], "utf-8")
    flags = (*RUN, f"--data={tmp_path / 'x.txt'}", f"--max_iters={20 + 20 * kills}",
             "--dtype=bfloat16")
    # Processes of their own: what ran before in this one may change the last bit of a sum.
    whole = start("train.py", *flags, "--eval_interval=1000", f"--out_dir={a}")
    for kill in range(kills):
        again = ["--resume"] if (b / "ckpt.pt").exists() else []
        process = start("train.py", *flags, "--eval_interval=9", f"--out_dir={b}", *again)
        for _ in range(20):
            process.stdout.readline()
        process.send_signal((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[kill % 3])
        process.communicate()
        with open(b / "log.csv", "ab") as file:
            file.write(b"7,44\xff")  # a line that was cut
    out, _ = end(start("train.py", "--resume", f"--out_dir={b}"))
    assert re.search("from step [1-9]", out) and end(whole)
    same_run(a, b)

def test_damaged_and_hostile_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = pathlib.Path("x.pt")
    gpt.save_checkpoint("x.pt", tiny(vocab_size=50257), step=1)
    good, state = path.read_bytes(), torch.load("x.pt", weights_only=True)
    flipped = bytearray(good)
    flipped[good.index(state["model"]["wte.weight"].numpy().tobytes()) + 100] ^= 1
    for content, words in (
            (b"", ""), (good[: len(good) // 2], ""), (b"<!DOCTYPE html>", ""), ([1, 2], ""),
            (b"cos\nmkdir\n(S'executed'\ntR.", ""), (bytes(flipped), "wrong checksum"),
            (state | {"step": path}, "Weights only"), ({"weights": 1}, "config"),
            (state | {"config": state["config"] | {"bias": False}}, "no biases"),
            (state | {"config": {"n_embd": "x"}}, ""), (state | {"model": [1, 2]}, ""),
            (state | {"model": {"wte.weight": torch.zeros(2, 2)}}, 'Missing.*"wpe.weight"')):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        refused(f"^x.pt (cannot be read as a checkpoint|does not fit).*{words}", load, "x.pt")
    assert not os.path.exists("executed")

FILES = {
    "empty.txt": b"", "empty.bin": b"", "odd.bin": b"abc", "latin.txt": b"caf\xe9 " * 9,
    "short.txt": b"Only a few words here. " * 20, "page.pt": b"<html>",
    "utf16.txt": "I".encode("utf-16"), "bare.txt": "I".encode("utf-16-le"),
    "nul.txt": b"\xef\xbb\xbf" + b"x\n" * 2**20 + b"\0", "high.bin": b"\1\0\2\0\x51\xc4",
    "x32.bin": np.array([464, 11, 50256, 7], np.uint32).tobytes(),  # every second token is 0
    "chars.bin": np.arange(65, dtype=np.uint16).tobytes(), "word.txt": b"Hi",
    "white.txt": b"x" + b" " * 10**6 + b"y", "npy.bin": b"\x93NUMPY\x01\x00" + b"12" * 99}
FAULTS = {  # what users of such projects met: by script, flags and what the message must say
    "train.py": (
        ("--data=empty.txt", "no text"), ("--data=w", "w cannot"), ("--min_lr=1", "=1.0 is above"),
        ("--data=x.txt", "x.txt.*--data=P"), ("--data=latin.txt", r"latin.txt: byte 3 \(0xe9\)"),
        ("--data=bare.txt", "byte 1 is NUL"), ("--data=utf16.txt", "byte 3 is NUL"),
        ("--data=nul.txt", f"nul.txt: byte {2**21 + 3} is NUL"), ("--data=x32.bin", "wider"),
        ("--data=word.txt", "1 tokens to val.* 0$"), ("--init_from=bias.pt", "no biases"),
        ("--data=white.txt", "white.txt cannot be"), ("--data=npy.bin", "npy file"),
        ("--data=chars.bin", "largest id is 64, not 256"), ("--out_dir=latin.txt", "latin.txt"),
        ("--data=short.txt", "--block_size=32.* 13 .* 12$"), ("--data=odd.bin", "bin .*multiple"),
        ("--data=empty.bin", "bin .*empty"), ("--data=high.bin", "largest id is 50257"),
        ("--batchsize=2", "--batchsize"), ("--learning_rate=inf", "inf"), ("--resume", "out.ckpt"),
        ("--dropout=1", "t: 1 is not"), ("--device=cuda:99", "cuda:99"), ("--device=gpu", "gpu c"),
        ("--init_from=page.pt", "page.pt"), ("--init_from=vocab.pt --block_size=16", "vocabulary"),
        ("--init_from=small.pt --block_size=16 --n_layer=2", "n_layer=2 .*1"),
        ("--init_from=small.pt --block_size=32", "32.*16")),
    "sample.py --checkpoint=small.pt": (
        ("--num_beams=2 --top_p=0.5 --num_samples=2", "beams does not go with --top_p --num_sam"),
        (f"--num_beams=2 --start='{17 * ' x'}'", "past 16 "), ("--score=gone.txt", "gone.txt"),
        ("--score=word.txt", "1 token.* two are needed"), ("--temperature=-1", "-1"),
        ("--start=FILE:white.txt", "cannot be encoded"), ("--temperature=nan", "nan"),
        ("--checkpoint=gone.pt", "gone.pt.*load_gpt2.py"), ("--checkpoint=vocab.pt", "vocabulary"),
        ("--checkpoint=nan.pt", "not finite"), ("--top_k=-1", "-1"), ("--top_p=0", "0")),
    "load_gpt2.py": (("w", "w is neither"), ("", "--export"), ("--export small.pt w", "w exists"),
                     ("--export vocab.pt new", "vocabulary"), ("--export x y --out=z", "alone"))}

def test_faults_get_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        pathlib.Path(name).write_bytes(content)
    os.mkdir("w")
    small = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    gpt.save_checkpoint("vocab.pt", tiny(), step=0)
    gpt.save_checkpoint("small.pt", small, step=0)
    torch.save({"config": vars(small.config) | {"bias": False}, "model": {}}, "bias.pt")
    small.ln_f.bias.data[0] = math.nan
    gpt.save_checkpoint("nan.pt", small, step=0)
    faults = [(script, *fault) for script in FAULTS for fault in FAULTS[script]]
    for script, flags, words in faults:
        capsys.readouterr()
        try:
            if script == "train.py":
                train_in("out", flags, status=2)
            else:
                main(*shlex.split(f"{script} {flags}"), status=2)
            message = capsys.readouterr().err.removesuffix("\n")  # argparse has said it
        except (InputError, OSError) as error:
            message = f"{getattr(error, 'filename', None)}: {error}"
        assert re.search(words, message) and "\n" not in message, (flags, message)
        left = set(os.listdir("out") if os.path.exists("out") else ())
        assert left <= ({"lock", "data.bin"} if "allow at" in message else {"lock"}), flags
        shutil.rmtree("out", ignore_errors=True)
    for script in ("sample.py", "load_gpt2.py", "train.py"):
        main(script, "--help")
    out = capsys.readouterr().out
    assert "None" not in out and not re.search("exit\n +--", out[out.index("Trains a"):])  # grouped
    assert "one seed gives the same texts" in " ".join(out.split())
    _, err = end(start("train.py", "--data=empty.txt", *SMALL), status=2)
    assert re.fullmatch("train.py: error: .*empty.txt: there is no text in it\n", err)

def test_a_run_is_not_overwritten_nor_changed_by_accident(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    for flags, words in (("", "copy.*--resume.*--out_dir.*delete"),
                         (f"--resume --init_from={copy}", "--resume excludes --init_from"),
                         ("--resume --n_layer=3 --dropout=0.5", "n_layer=3.*2.*dropout=0.5"),
                         (f"--resume --data={__file__}", "not the text")):
        refused(words, train_in, copy, flags + " --max_iters=12")
    train_in(copy, "--resume")
    assert re.search("step 10; --resume --max_iters=N --out_dir=", capsys.readouterr().out)
    same_run(run[0], copy)
    train_in(copy, "--resume --max_iters=11 --dtype=auto")
    assert column(copy, "iter") == list(range(12))

def test_a_diverging_run_keeps_the_good_checkpoint(tmp_path, capfd):
    flags = "--warmup_iters=0 --grad_clip=0 --eval_interval=4 --max_iters="
    train_in(tmp_path / "a", flags + "1 --learning_rate=1e4")  # astray, but finite
    assert column(tmp_path / "a", "val_loss")[-1] > 1000  # whose exponential is no float
    train_in(tmp_path / "b", flags + "60 --learning_rate=1e36", status=1)
    model, state = load(tmp_path / "b")
    assert all(p.isfinite().all() for p in model.parameters())
    error = capfd.readouterr().err.splitlines()[-1]
    said = re.search(r"is (?:nan|inf) at step \d+ \(learning rate .*, float32\)\. (\S+ckpt.pt) "
                     r"still has step (\d+): python train.py (.*)", error)
    assert said[1] == str(tmp_path / "b" / "ckpt.pt") and int(said[2]) == state["step"]
    main("train.py", *said[3].replace("NEW", str(tmp_path / "c")).split(), "--max_iters=0")
    assert load(tmp_path / "c")[1]["step"] == 0

def test_dropout_stands_in_four_places(monkeypatch):
    calls, model = [], tiny(dropout=0.1).train()
    monkeypatch.setattr(gpt, "dropout", lambda x, p, training=True: (
        calls.append((tuple(x.shape), p, training)) or x))
    model(torch.zeros(2, 5, dtype=torch.int64))
    x, weights = (2, 5, 12), (2, 3, 5, 5)  # the embeddings; in each layer attention twice, MLP
    assert calls == [(shape, 0.1, True) for shape in (x, *2 * (weights, x, x))]
    monkeypatch.setattr(gpt.F, "scaled_dot_product_attention", lambda *_, **options: options)
    assert gpt.attend(*torch.zeros(3, 1, 1, 5, 4, device="meta"), 0.1)["dropout_p"] == 0.1  # a GPU

def test_which_dtype_auto_takes(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: able == "bfloat16")
    monkeypatch.setattr(torch, "ones", lambda _, device: argparse.Namespace(
        device=torch.device(device)))  # there is a GPU of each kind
    for device, able, dtype in (
            ("cpu", "amx_bf16", torch.bfloat16), ("cpu", "avx512_bf16", torch.bfloat16),
            ("cpu", "avx2", torch.float32), ("mps", "", torch.float32),
            ("cuda", "bfloat16", torch.bfloat16), ("cuda", "", torch.float16)):
        assert gpt.choose_device(device, "auto") == (torch.device(device), dtype), able

def test_the_flags_of_sample_arrive(sample, monkeypatch):
    monkeypatch.setattr(gpt, "center_logits", lambda _: given.update(centered=True))
    monkeypatch.setattr(gpt, "generate", lambda model, idx, n, **options: (
        given.update(options, seed=options["generator"].initial_seed()) or torch.zeros(0)))
    monkeypatch.setattr(gpt, "beam_search", lambda model, idx, n, num_beams, stop_token: (
        given.update(num_beams=num_beams, stop_token=stop_token) or torch.zeros(0)))
    for flags, expected in (
            ("", {"temperature": 0.8, "top_k": 50, "top_p": 1, "stop_token": 50256, "seed": 1337}),
            ("--top_k=7 --top_p=0.3 --no-stop", {"top_k": 7, "top_p": 0.3, "stop_token": None}),
            ("--num_beams=3", {"num_beams": 3, "stop_token": 50256})):
        given = {}
        sample("--max_new_tokens=9", *flags.split())
        assert given | expected | {"centered": True} == given, flags

def test_texts_are_streamed_in_whole_characters(sample, monkeypatch, capsys):
    rows = [gpt.encode(text + "<|endoftext|>") for text in (" a🙂<|endoftext|>", " x y z u")]
    def generate(model, idx, *_, **__):
        for column in zip(*rows[: len(idx)]):
            yield torch.tensor(column)
            shown.append(capsys.readouterr().out)
    monkeypatch.setattr(gpt, "generate", generate)
    for flag, end in (("--stop", ""), ("--no-stop", "<|endoftext|>")):
        shown = []
        assert sample("--num_samples=2", flag).out == f"\n{'-' * 80}\n x y z u{end}\n"
        assert shown == [" a", "", "🙂", end, end]  # of the smiley's two tokens

def test_the_flags_of_adamw_arrive(tmp_path):
    train_in(tmp_path, "--max_iters=1 --beta1=0.7 --beta2=0.9 --grad_clip=0")
    norm, optimizer = column(tmp_path, "grad_norm")[0], load(tmp_path)[1]["optimizer"]
    assert {group["betas"] for group in optimizer["param_groups"]} == {(0.7, 0.9)}
    averages = torch.cat([part["exp_avg"].flatten() for part in optimizer["state"].values()])
    assert norm > 1 and averages.norm().item() == pytest.approx(0.3 * norm, rel=1e-3)  # not clipped

# ---- OpenAI's and Hugging Face's weights -------------------------------------------------------
def test_a_checkpoint_by_tensorflow_itself():
    """data/tf/one-shard holds what TensorFlow 2.21 wrote: tf.compat.v1.train.Saver().save() of
    float32 variables named as OpenAI's (model/h0/attn/c_attn/w of shape [1, in, out], ...),
    normal(0 or 1 for gains, 0.3). expected.npz has what tf.train.load_checkpoint() reads."""
    model = load_gpt2.load_gpt2(str(TF / "one-shard"))
    with np.load(TF / "expected.npz") as file:
        expected = {name.removeprefix("model/"): file[name].astype(np.float64) for name in file}
    ours = openai_weights(model)
    assert ours.keys() == expected.keys()
    assert all(np.array_equal(ours[name], array) for name, array in expected.items())
    tokens = torch.tensor([22, 0, 7, 7, 13, 1, 19])
    logits = model(tokens[None])[0].detach()
    np.testing.assert_allclose(logits, oracle(expected, 2, tokens), rtol=0, atol=1e-5)

@pytest.mark.parametrize("change, words", (
    ({"n_layer": 10}, "11,248 .*10,27"), ({"n_vocab": 24}, "11,248 .*11,264"),
    ({"n_embd": None}, "json .*n_embd': None"), ({"n_layer": 0}, "json .*n_layer': 0"),
    ({"n_head": 3}, "json .*n_head': 3"), (None, "hparams.json"), ([], "hparams.json"),
    ("short", "11,247 .*11,248"), ("gone", "model.ckpt.data-00000-of-00001 .* 0 bytes")))
def test_damaged_openai_files_are_refused(tmp_path, change, words):
    shutil.copytree(TF / "one-shard", tmp_path, dirs_exist_ok=True)
    hparams, data = tmp_path / "hparams.json", tmp_path / load_gpt2.DATA
    if change == "gone":
        data.unlink()
    elif change == "short":
        data.write_bytes(data.read_bytes()[:-1])
    else:
        hparams.write_text(json.dumps(change and json.loads(hparams.read_text()) | change))
    refused(words, load_gpt2.load_gpt2, str(tmp_path))

@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """-> a model, and the folder that it was exported to."""
    folder = tmp_path_factory.mktemp("exported")
    model = tiny(vocab_size=50257, block_size=32, n_embd=24)
    gpt.save_checkpoint(str(folder / "x.pt"), model)
    mask = os.umask(0o027)
    main("load_gpt2.py", "--export", folder / "x.pt", folder / "gpt2")
    os.umask(mask)
    return folder / "gpt2", model

def test_the_exported_files(exported):
    """What transformers, mlx-lm, llama.cpp, transformers.js and tokenizers each need."""
    folder, model = exported
    config, generation, tokens, of_tokens, words = (
        json.loads((folder / f"{name}.json").read_text("utf-8")) for name in
        ("config", "generation_config", "tokenizer", "tokenizer_config", "vocab"))
    assert config == config | {
        "model_type": "gpt2", "activation_function": "gelu_new", "vocab_size": 50257, "n_ctx": 32,
        "n_positions": 32, "n_layer": 2, "n_head": 3, "n_embd": 24}
    assert generation["max_length"] == 32 and generation["pad_token_id"] == 50256
    assert of_tokens["clean_up_tokenization_spaces"] is False
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(model.state_dict())  # no "transformer.", as on the hub
    assert sorted(words.values()) == list(range(50257)) and words["Ġeffort"] == 3626
    merges = (folder / "merges.txt").read_text("utf-8")
    assert merges == pathlib.Path(load_gpt2.VOCAB_PATH).read_text("utf-8")
    bpe, (special,) = tokens["model"], tokens["added_tokens"]
    assert (bpe["type"], bpe["vocab"], bpe["merges"]) == ("BPE", words, merges.splitlines()[1:])
    for part in (tokens["pre_tokenizer"], tokens["decoder"]):
        assert (part["type"], part["add_prefix_space"]) == ("ByteLevel", False)
    assert (special["id"], special["content"], special["special"]) == (50256, "<|endoftext|>", True)
    assert os.name == "nt" or {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}

def test_hugging_face_folders_that_are_taken_or_refused(exported, tmp_path):
    folder, model = exported
    same(load_gpt2.load_gpt2(str(folder)), model)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config, path = tmp_path / "config.json", tmp_path / "model.safetensors"
    good, weights = json.loads(config.read_text()), safetensors.torch.load_file(path)
    def read(changed=None, **changes):
        config.write_text(json.dumps(good | changes))
        path.unlink(missing_ok=True)  # older safetensors map the file that was read before
        safetensors.torch.save_file(changed or weights, path)
        return load_gpt2.load_gpt2(str(tmp_path))
    for name, value in {"activation_function": "gelu", "layer_norm_epsilon": 1e-6, "n_layer": 0,
                        "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
                        "model_type": "gptj", "add_cross_attention": True}.items():
        refused(f"config.json.*{name}.*{value}", read, **{name: value})
    for name in ("vocab.json", "tokenizer.json"):  # GPT2-Spanish has 50,257 too
        text = (tmp_path / name).read_text("utf-8")
        (tmp_path / name).write_text(text.replace("he", "eh"), "utf-8")
        refused(f"{name} is not GPT-2's tokenizer", read)
        (tmp_path / name).write_text(text, "utf-8")
    wte = weights.pop("wte.weight")
    refused("lm_head", read, weights | {"wte.weight": wte, "lm_head.weight": wte + 1})
    same(read({"transformer." + name: w for name, w in weights.items()} | {"lm_head.weight": wte}),
         read(weights | {"wte.weight": wte, "h.0.attn.bias": torch.ones(1, 1, 9, 9)}))
    refused("Missing.*wte", read)
    path.write_bytes(b"x" * 1000)
    refused("model.safetensors", load_gpt2.load_gpt2, str(tmp_path))
    os.replace(path, tmp_path / "pytorch_model.bin")
    refused("save_pretrained.*pytorch_model.bin", load_gpt2.load_gpt2, str(tmp_path))

def test_a_save_or_export_is_whole_or_not_at_all(tmp_path):
    resource = pytest.importorskip("resource")
    path = str(tmp_path / "x.pt")
    first, second = (tiny(seed, vocab_size=50257, n_embd=24) for seed in (1, 2))
    gpt.save_checkpoint(path, first)
    mapped, _ = gpt.load_checkpoint(path)
    with open(path, "rb") as file:
        gpt.save_checkpoint(path, second)
        assert len(file.read()) == os.path.getsize(path)  # not cut: that is a bus error
    same(mapped, first)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (10**5, 4 * 10**6):  # no more fits: in the middle of vocab.json, of the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            refused("new.*too large", load_gpt2.export, path, str(tmp_path / "new"))
            refused("x.pt .*too large", gpt.save_checkpoint, path, first)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.listdir(tmp_path) == ["x.pt"]
    same(load(path)[0], second)

def test_converting_takes_the_folder_meant_and_replaces_nothing(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("124M", "other/124M"):
        shutil.copytree(exported[0], name)
    main("load_gpt2.py", "124M")  # the folder, and no download
    main("load_gpt2.py", "other/124M", "--out=new/x.pt")
    for flags, words in (("124M", "models.124M.pt exists"), (TF / "one-shard", "other vocab"),
                         ("355M --out=new/x.pt", "new/x.pt exists"),
                         ("124M/model.safetensors", "nor a folder"), ("gpt2", "nor a folder")):
        refused(words, main, "load_gpt2.py", *str(flags).split())
    assert os.listdir("models") == ["124M.pt"]
    same(load("models/124M.pt")[0], load("new/x.pt")[0])

def test_transformers_and_tokenizers_agree(exported, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    folder, model = exported
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Every effort moves you. naïve 你好 🙂\n\n  x<|endoftext|>It's 1984, isn't it ?"
    ids = gpt.encode(text)
    assert theirs.encode(text).ids == ids and theirs.decode(ids, skip_special_tokens=False) == text
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(folder).decode(ids) == text
    idx = torch.randint(50257, (2, 20))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        assert (model(idx) - theirs(idx).logits).abs().max() < 1e-5 * theirs(idx).logits.std()
    theirs.save_pretrained(tmp_path, max_shard_size="2MB")  # in several files
    assert len(list(tmp_path.glob("model*.safetensors"))) > 1
    same(load_gpt2.load_gpt2(str(tmp_path)), model)

class Server(http.server.BaseHTTPRequestHandler):
    """Serves one-shard with ranges, and misbehaves as `fault` says."""
    def do_GET(self):
        self.asked.append((self.path, self.headers["Range"]))
        data = (TF / "one-shard" / os.path.basename(self.path)).read_bytes()
        if self.fault == "missing":
            return self.send_error(404)
        first = 0 if self.fault == "no ranges" else int(self.headers["Range"][6:-1])
        self.send_response(206 if first else 200)
        self.send_header("Content-Type", "text/html" if self.fault == "page" else "application/x")
        self.send_header("Content-Length", len(data) - first)
        self.end_headers()
        self.wfile.write(data[first : len(data) // 2 if self.fault == "cut" else None])

def test_download(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(load_gpt2, "URL", f"http://127.0.0.1:{server.server_port}/x")
    hparams, data = names = ["hparams.json", load_gpt2.DATA]
    files = {name: (TF / "one-shard" / name).read_bytes() for name in names}
    def fetched(folder, fault=None):
        """-> what the server was asked for."""
        Server.fault, Server.asked = fault, []
        load_gpt2.download("124M", str(tmp_path / folder))
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == files
        return Server.asked
    both = [(f"/x/124M/{name}", "bytes=0-") for name in names]
    assert fetched("1") == both and fetched("1") == []  # nothing is asked for again
    refused(f"{hparams} failed.*{tmp_path / '2'} by hand.*part has", fetched, "2", "cut")
    half = len(files[hparams]) // 2
    assert fetched("2") == [(f"/x/124M/{hparams}", f"bytes={half - 1}-"), both[1]]  # it goes on
    refused("part has", fetched, "3", "cut")
    fetched("3", "no ranges")  # some servers always send all
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / (data + ".part")).write_bytes(files[data])  # all had come
    fetched("4")
    for fault, words in (("missing", "404"), ("page", "web page")):
        refused(f"hparams.json failed.*{words}", fetched, "5", fault)
    server.shutdown()
    server.server_close()
    refused("hparams.json failed.*refused", fetched, "6")

def test_every_command_of_the_readme(tmp_path, monkeypatch, capsys):
    """In their order, in one folder, on small models; not pip, pytest, curl, the GPU recipe."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"curl -o (\S+)", README) + ["my.txt", "other.txt"]:
        shutil.copy(train.STORY, name)
    shutil.unpack_archive(TF / "vocab.zip", "models/124M")  # in place of OpenAI's server
    blocks = "".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
    commands = re.findall("(?:python|torchrun) .*", blocks)
    assert len(commands) > 10
    for line in commands:
        words = shlex.split(line)
        script, *flags = words[words.index("train.py") if "train.py" in words else 1 :]
        if script == "sample.py":
            flags += ["--max_new_tokens=3"]
        elif "--resume" in flags:
            flags += ["--max_iters=3"]
        elif script == "train.py":
            small = SMALL[-3:] if "--init_from" in line else SMALL
            flags += [*small, "--max_iters=2", "--eval_windows=1"]
            for folder in re.findall(r"--out_dir=(\S+)", line):
                shutil.rmtree(folder, ignore_errors=True)  # several recipes write to it
        if words[0] == "torchrun":
            end(start(script, *flags, before=TORCHRUN))
        else:
            main(script, *flags)
    capsys.readouterr()
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(block, {})
    for line in capsys.readouterr().out.splitlines()[:3]:  # ids, pieces and shapes
        assert line in README
    code = "".join(pathlib.Path(part.__file__).read_text("utf-8") for part in (gpt, train))
    for name in re.findall(r"`(\w+)", README[README.index("| X | Y |") :].split("\n\n")[0]):
        assert re.search(rf"\b{name}\b", code), name
