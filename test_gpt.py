"""The tests: `pytest test_gpt.py`. They need no network and no GPU, and take three minutes.

If you change the model, it is no longer GPT-2, and the tests that are marked `gpt2` will say
so: delete those that your change is meant to break. `pytest -m "not gpt2" test_gpt.py` runs
the others, which hold for any model: training, resuming, checkpoints, sampling, files.
"""
import argparse
import contextlib
import csv
import dataclasses
import gc
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import pickle
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

import matplotlib.figure
import numpy as np
import pytest
import regex
import safetensors.torch
import torch
import torch._dynamo

import gpt
import load_gpt2
from gpt import GPT, GPTConfig, InputError

HERE = os.path.dirname(os.path.abspath(__file__))
TF = pathlib.Path(HERE, "data", "tf")
STORY_PATH = pathlib.Path(HERE, "data", "story.txt")
STORY = STORY_PATH.read_text("utf-8")
README = pathlib.Path(HERE, "README.md").read_text("utf-8")
# A model that takes milliseconds, on the CPU and in float32 whatever the machine has.
SMALL = ("--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=32", "--device=cpu",
         "--dtype=float32")
RUN = (*SMALL, "--eval_windows=7", "--log_interval=1", "--warmup_iters=3",
       "--learning_rate=4e-4")
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
            "--standalone", "--no-python")
for number in SIGNALS:  # `pytest &` in a script ignores SIGINT, and nohup ignores SIGHUP
    signal.signal(number, signal.default_int_handler)

gpt2 = pytest.mark.gpt2  # what holds for GPT-2 and this README, not for a changed model
posix = pytest.mark.skipif(os.name == "nt", reason="signals, links and modes differ there")


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same random numbers, whichever tests ran before."""
    torch.manual_seed(0)


# ---- Helpers -----------------------------------------------------------------------------


def start(script, *flags, before=(), **options):
    """Starts a script as a process of its own. `before` is put in front of the command."""
    command = [*before, sys.executable, os.path.join(HERE, script), *flags]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, text=True, encoding="utf-8", **pipes | options)


def end(process, status=0, text=None):
    """Waits for a process; returns what it printed on standard output and on error."""
    out, err = process.communicate(text, timeout=300)
    assert process.returncode == status, (out, err)
    return out, err


def main(script, *flags, status=0):
    """Runs a script inside this process and returns its global names.

    That saves seconds of imports. Errors are raised here, except the exit status of a
    script that ends itself, which is compared with `status`.
    """
    saved = sys.argv, sys.excepthook, sys.stdout, sys.stderr
    sys.argv = [os.path.join(HERE, script), *map(str, flags)]
    code, names = 0, {}
    try:
        names = runpy.run_path(os.path.join(HERE, script), run_name="__main__")
    except SystemExit as exit:
        code = exit.code or 0
    finally:
        sys.argv, sys.excepthook, sys.stdout, sys.stderr = saved
        gc.collect()  # closes what the script had open
    assert code == status
    return names


def train_in(folder, flags="", **status):
    """Runs train.py with small sizes and this out_dir; returns its global names.

    --resume and --init_from take the sizes from their checkpoint.
    """
    continues = "--resume" in flags or "--init_from" in flags
    base = () if continues else RUN
    return main("train.py", *base, f"--out_dir={folder}", *shlex.split(flags), **status)


def refused(words, call, *arguments, **options):
    """Asserts that a call raises an InputError of one line in which the regex is found."""
    with pytest.raises(InputError, match=words) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)


def column(folder, name):
    """Returns the numbers in a column of a run's log.csv, without the empty ones."""
    with open(os.path.join(folder, "log.csv"), encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def load(path):
    """Returns the model and the state of a checkpoint, or of a folder's ckpt.pt."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else str(path)
    return gpt.load_checkpoint(path, verify=True)


def same(a, b):
    """Asserts that nests of dicts, lists, tensors and numbers are equal to the last bit."""
    if isinstance(a, GPT):
        a, b = dict(a.state_dict()), dict(b.state_dict())
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def same_run(a, b):
    """Asserts that two folders hold the same run: its log, weights and averages."""
    for name in ("iter", "loss", "lr", "grad_norm"):
        assert column(a, name) == column(b, name), name
    assert column(a, "val_loss")[-1] == column(b, "val_loss")[-1]
    model_a, state_a = load(a)
    model_b, state_b = load(b)
    same(model_a, model_b)
    same(state_a["optimizer"], state_b["optimizer"])


def tiny(seed=0, **changes):
    """Returns a small GPT in which every parameter is random and large enough to matter.

    With usual initial weights the prediction would depend almost only on the last
    token, and a wrong attention would hardly show. Here it depends on the others too.
    """
    sizes = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 3, "n_embd": 12}
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**sizes | changes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        std = 0.5
        if "attn" in name:
            std = 1.5
        elif name == "ln_f.bias":
            std = 0.05
        parameter.normal_(std=std)
    return model


def generated(*arguments, seed=0, **options):
    """Returns all that generate yields, (B, n)."""
    generator = torch.Generator().manual_seed(seed)
    columns = list(gpt.generate(*arguments, generator=generator, **options))
    return torch.stack(columns, dim=1)


# ---- The oracle: GPT-2 in numpy float64, from the paper and OpenAI's variables -----------


def oracle(weights, n_head, tokens, mask=None):
    """weights {OpenAI's name: float64 array}, tokens (T,) -> logits (T, V).

    mask (T, T) says which keys each query sees; by default those up to its own.
    """
    def norm(x, name):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * weights[name + "/g"] + weights[name + "/b"]

    def project(x, name):
        return x @ weights[name + "/w"][0] + weights[name + "/b"]  # w is (1, in, out)

    T = len(tokens)
    mask = np.tri(T, dtype=bool) if mask is None else mask
    x = weights["wte"][tokens] + weights["wpe"][:T]
    size = x.shape[1] // n_head
    for layer in range(sum(name.endswith("/ln_1/g") for name in weights)):
        h = f"h{layer}"
        q, k, v = np.split(project(norm(x, h + "/ln_1"), h + "/attn/c_attn"), 3, axis=1)
        heads = []
        for i in range(n_head):
            part = slice(i * size, (i + 1) * size)
            scores = q[:, part] @ k[:, part].T / np.sqrt(size)
            scores = np.where(mask, scores, -np.inf)
            e = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(e / e.sum(1, keepdims=True) @ v[:, part])
        x = x + project(np.concatenate(heads, axis=1), h + "/attn/c_proj")
        m = project(norm(x, h + "/ln_2"), h + "/mlp/c_fc")
        m = 0.5 * m * (1 + np.tanh(np.sqrt(2 / np.pi) * (m + 0.044715 * m**3)))
        x = x + project(m, h + "/mlp/c_proj")
    return norm(x, "ln_f") @ weights["wte"].T


def openai_weights(model):
    """Returns our parameters under OpenAI's names and in their layout: w is (1, in, out)."""
    weights = {}
    for name, parameter in model.named_parameters():
        theirs = load_gpt2.openai_name(name)
        array = parameter.detach().numpy()
        weights[theirs] = array.T[None] if theirs.endswith("/w") else array
    return weights


def oracles(model, idx, targets, mask=None):
    """idx and targets (B, T) -> the oracle's logits (B, T, V) and loss."""
    weights = {name: w.astype(np.float64) for name, w in openai_weights(model).items()}
    n_head = model.config.n_head
    logits = np.stack([oracle(weights, n_head, row, mask) for row in idx.numpy()])
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits, -np.take_along_axis(log_probs, targets.numpy()[..., None], -1).mean()


# ---- A run that several tests look at ----------------------------------------------------


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Returns the folder of a run of ten steps on the built-in text, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    flags = (*RUN, "--max_iters=10", "--eval_interval=5")
    out, _ = end(start("train.py", *flags, cwd=folder))
    return folder / "out", out


@pytest.fixture
def sample(run, capsys):
    """Returns a function that runs sample.py on that run and returns what it printed."""
    def call(*flags):
        capsys.readouterr()
        main("sample.py", f"--checkpoint={run[0] / 'ckpt.pt'}", "--device=cpu", *flags)
        return capsys.readouterr()

    return call


# ---- The model -----------------------------------------------------------------------


def random_ids(B, T, V=61):
    """Returns random token ids (B, T)."""
    return torch.randint(V, (B, T))


def near(ours, expected, within=1e-5):
    """Asserts that numbers differ by no more than that."""
    ours = torch.as_tensor(ours).double()
    expected = torch.as_tensor(expected).double()
    torch.testing.assert_close(ours, expected, rtol=0, atol=within)


@gpt2
@pytest.mark.parametrize("dropout, training", [
    pytest.param(0.0, False, id="eval"),
    pytest.param(0.0, True, id="training"),
    # This takes the path of the fast dropout, which rounds such a p to 0.
    pytest.param(1e-9, True, id="training with hardly any dropout"),
])
def test_logits_and_loss_equal_the_oracles(dropout, training):
    model = tiny(dropout=dropout).train(training)
    idx = random_ids(3, 16)
    targets = random_ids(3, 16)
    logits, loss = oracles(model, idx, targets)
    near(model(idx), logits)
    near(model(idx, targets), loss)


@gpt2
def test_gradients_equal_the_slopes_of_the_oracles_loss():
    model = tiny().double().requires_grad_()
    idx = random_ids(2, 9)
    targets = random_ids(2, 9)
    model(idx, targets).backward()
    for name, parameter in model.named_parameters():
        # The slope of the loss along a direction d is (L(w + hd) - L(w - hd)) / 2h.
        direction = torch.randn_like(parameter)
        parameter.data += 1e-4 * direction
        above = oracles(model, idx, targets)[1]
        parameter.data -= 2e-4 * direction
        below = oracles(model, idx, targets)[1]
        parameter.data += 1e-4 * direction
        slope = (above - below) / 2e-4
        ours = (parameter.grad * direction).sum().item()
        assert ours == pytest.approx(slope, rel=1e-4, abs=1e-6), name


@gpt2
def test_gpt2_has_its_124_million_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


@gpt2
def test_initial_weights_are_gpt2s():
    config = GPTConfig(
        vocab_size=5000, block_size=64, n_layer=2, n_head=4, n_embd=128)
    model = GPT(config)
    deviations = {"wte": 0.02, "wpe": 0.01, "c_attn": 0.02, "c_fc": 0.02,
                  "c_proj": 0.02 / math.sqrt(4)}  # the root of 2 n_layer
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            layer = name.split(".")[-2]
            std = parameter.std().item()
            assert std == pytest.approx(deviations[layer], rel=0.05), name
        else:
            gain = name.endswith("weight")
            assert (parameter == float(gain)).all(), name


def test_an_untrained_model_guesses_blindly():
    config = GPTConfig(block_size=64, n_layer=2, n_head=4, n_embd=128)
    idx = random_ids(4, 64, V=50257)
    targets = random_ids(4, 64, V=50257)
    loss = GPT(config)(idx, targets).item()
    near(loss, math.log(50257), within=0.1)


def test_a_target_of_minus_100_is_left_out():
    model = tiny()
    idx = random_ids(1, 16)
    targets = random_ids(1, 16)
    expected = model(idx[:, :5], targets[:, :5])
    targets[:, 5:] = -100
    near(model(idx, targets), expected)


def test_the_loss_of_16_bit_logits_is_computed_in_32():
    model = tiny().bfloat16()
    idx = random_ids(3, 16)
    targets = random_ids(3, 16)
    logits = model(idx)
    assert logits.dtype == torch.bfloat16
    exact = torch.nn.functional.cross_entropy(logits.double().mT, targets)
    near(model(idx, targets), exact, within=1e-6)


@pytest.mark.parametrize("words, call", [
    pytest.param("n_embd=12 is not a multiple of n_head=5",
                 lambda model, idx: tiny(n_head=5),
                 id="heads that do not divide n_embd"),
    pytest.param("17 tokens exceed block_size",
                 lambda model, idx: model(random_ids(2, 17)),
                 id="a sequence that is too long"),
    pytest.param("17 tokens exceed block_size",
                 lambda model, idx: gpt.beam_search(model, random_ids(1, 5), 13, 2),
                 id="beams that become too long"),
    pytest.param("call model.eval()",
                 lambda model, idx: gpt.KVCache(tiny().train(), 1),
                 id="a cache of a model that is training"),
    pytest.param("targets need",
                 lambda model, idx: model(idx, idx, new_caches(model, B=2)),
                 id="targets with caches"),
])
def test_what_does_not_fit_is_asserted(words, call):
    with pytest.raises(AssertionError, match=words):
        call(tiny(), random_ids(2, 16))


@pytest.mark.parametrize("shape", [
    pytest.param((2, 8), id="fewer targets"),
    pytest.param((1, 16), id="fewer rows"),
    pytest.param((16,), id="one row"),
    pytest.param((2, 0), id="none"),
    pytest.param((16, 2), id="as many, but in columns"),
])
def test_targets_at_other_positions_than_the_inputs_are_asserted(shape):
    """A loss over them would be wrong without a word."""
    targets = torch.randint(61, shape)
    with pytest.raises(AssertionError, match="targets need"):
        tiny()(random_ids(2, 16), targets)


def new_caches(model, B):
    """Returns an empty cache for each layer."""
    return [gpt.KVCache(model, B) for _ in model.h]


def test_cached_logits_equal_uncached():
    model = tiny()
    idx = random_ids(3, 16)
    expected = model(idx)
    caches = new_caches(model, B=3)
    end = 0
    for part in idx.split((5, 1, 7, 3), dim=1):
        logits = model(part, caches=caches)
        end += part.shape[1]
        near(logits, expected[:, end - 1 : end])


# ---- Attention -----------------------------------------------------------------------

ATTEND = gpt.attend
MAIN_CAUSAL_MASK = gpt.causal_mask


def mask_of_window(size):
    """Returns another causal_mask: a token sees itself and the size - 1 before it."""
    def causal_mask(q, S):
        mask = MAIN_CAUSAL_MASK(q, S)
        T = len(mask)
        too_old = torch.ones(T, S).tril(S - T - size)
        return mask.masked_fill(too_old.bool(), -math.inf)

    return causal_mask


@gpt2
def test_causal_mask_is_that_of_its_docstring():
    two_queries = torch.zeros(1, 1, 2, 4)
    first, second = gpt.causal_mask(two_queries, 5).tolist()
    assert first == [0, 0, 0, 0, -math.inf]
    assert second == [0, 0, 0, 0, 0]


@pytest.fixture
def narrow(monkeypatch):
    """Gives gpt.py a window of 4 tokens.

    Returns a model, its inputs, its targets, and the oracle's logits and loss.
    """
    monkeypatch.setattr(gpt, "causal_mask", mask_of_window(4))
    model = tiny()
    idx = random_ids(3, 16)
    targets = random_ids(3, 16)
    not_later = np.tri(16, dtype=bool)
    too_old = np.tri(16, k=-4, dtype=bool)
    mask = not_later & ~too_old
    return model, idx, targets, *oracles(model, idx, targets, mask)


@gpt2
def test_training_takes_the_one_mask(narrow):
    model, idx, targets, _, loss = narrow
    model.train()
    near(model(idx, targets), loss)


@gpt2
def test_validation_takes_the_one_mask(narrow):
    model, idx, targets, _, loss = narrow
    near(model(idx, targets), loss)


@gpt2
def test_logits_take_the_one_mask(narrow):
    model, idx, _, logits, _ = narrow
    near(model(idx), logits)


@gpt2
def test_cached_generation_takes_the_one_mask(narrow):
    model, idx, _, expected, _ = narrow
    caches = new_caches(model, B=3)
    for i, token in enumerate(idx.T):
        logits = model(token[:, None], caches=caches)
        near(logits[:, 0], expected[:, i])


@gpt2
def test_a_window_of_4_tokens_is_another_computation(narrow, monkeypatch):
    """If it were not, the tests before could not fail."""
    model, idx, targets, _, loss = narrow
    monkeypatch.undo()
    assert abs(model(idx, targets) - loss) > 0.01


class SaysCuda(torch.Tensor):
    """A tensor in main memory that says it is on an NVIDIA GPU.

    attend then takes its branch for such a GPU and calls the kernel, which runs on the
    CPU.
    """

    device = torch.device("cuda")


class SaysMps(torch.Tensor):
    """A tensor in main memory that says it is on a Mac's GPU."""

    device = torch.device("mps")


@pytest.fixture
def kernel_calls(monkeypatch):
    """Returns a list that gets the options of each call of PyTorch's attention."""
    kernel = torch.nn.functional.scaled_dot_product_attention
    calls = []

    def noted(q, k, v, **options):
        calls.append(options)
        return kernel(q, k, v, **options | {"dropout_p": 0.0})

    monkeypatch.setattr(gpt.F, "scaled_dot_product_attention", noted)
    return calls


def queries_keys_values(T, S, kind=torch.Tensor):
    """Returns q of T tokens, k and v of S, as tensors of another class."""
    torch.manual_seed(0)
    q = torch.randn(2, 3, T, 4)
    k = torch.randn(2, 3, S, 4)
    v = torch.randn(2, 3, S, 4)
    return [tensor.as_subclass(kind) for tensor in (q, k, v)]


@pytest.mark.parametrize("kind", [torch.Tensor, SaysMps])
def test_only_an_nvidia_gpu_takes_the_kernel(kernel_calls, kind):
    gpt.attend(*queries_keys_values(5, 5, kind))
    assert not kernel_calls


def test_one_query_is_computed_in_float64_if_it_is_float64():
    q, k, v = (x.double() for x in queries_keys_values(1, 5))
    weights = (q @ k.transpose(2, 3) / 2).softmax(dim=-1)
    torch.testing.assert_close(gpt.attend(q, k, v), weights @ v, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("T, S", [
    pytest.param(5, 5, id="a whole sequence"),
    pytest.param(600, 600, id="a long one, as a window of attention would change it"),
    pytest.param(1, 5, id="one token behind a cache"),
    pytest.param(2, 5, id="two tokens behind a cache"),
    pytest.param(1, 1, id="the first token"),
])
def test_the_kernel_computes_the_same(kernel_calls, T, S):
    expected = gpt.attend(*queries_keys_values(T, S))
    ours = gpt.attend(*queries_keys_values(T, S, SaysCuda))
    assert len(kernel_calls) == 1
    torch.testing.assert_close(ours.as_subclass(torch.Tensor), expected)


@gpt2
def test_the_kernels_own_mask_is_taken_for_whole_sequences(kernel_calls):
    gpt.attend(*queries_keys_values(5, 5, SaysCuda))
    options = {"attn_mask": None, "dropout_p": 0.0, "is_causal": True}
    assert kernel_calls == [options]


def test_the_kernel_gets_our_mask_behind_a_cache(kernel_calls):
    q, k, v = queries_keys_values(2, 5, SaysCuda)
    gpt.attend(q, k, v)
    options = kernel_calls[0]
    assert options["is_causal"] is False
    assert torch.equal(options["attn_mask"], gpt.causal_mask(q, 5))


@pytest.mark.parametrize("T", [2, 5])
def test_the_kernel_gets_dropout(kernel_calls, T):
    gpt.attend(*queries_keys_values(T, 5, SaysCuda), 0.1)
    assert kernel_calls[0]["dropout_p"] == 0.1


# ---- Dropout -------------------------------------------------------------------------


@pytest.fixture
def ones():
    """Returns 200,400 ones of which dropout took a tenth."""
    return gpt.dropout(torch.ones(400, 501), 0.1)


def test_dropout_drops_its_share(ones):
    share = (ones == 0).float().mean()
    near(share, 0.1, within=0.003)


def test_dropout_keeps_the_mean(ones):
    near(ones.mean(), 1, within=0.003)


def test_what_dropout_keeps_is_scaled_alike(ones):
    near(ones.unique(), [0, 1 / 0.9], within=1e-4)


def test_numbers_are_dropped_independently(ones):
    """Four neighbours share one draw, so look at how those far and near correlate."""
    x = ones.flatten() - 1
    spectrum = torch.fft.fft(x).abs().square()
    correlations = torch.fft.ifft(spectrum).real / x.square().sum()
    assert correlations[1:].abs().max() < 0.05


def test_dropout_is_off_in_eval():
    idx = random_ids(3, 16)
    model = tiny(dropout=0.5)
    assert torch.equal(model(idx), tiny()(idx))


def test_dropout_is_on_in_training():
    idx = random_ids(3, 16)
    model = tiny(dropout=0.5).train()
    assert not torch.equal(model(idx), tiny()(idx))


@pytest.fixture
def dropped(monkeypatch):
    """Returns a list that gets the shape, p and training of each call of dropout."""
    calls = []

    def noted(x, p, training=True):
        calls.append((tuple(x.shape), p, training))
        return x

    monkeypatch.setattr(gpt, "dropout", noted)
    return calls


@gpt2
def test_dropout_stands_in_four_places(dropped):
    """After the embeddings; in each layer on the weights, attention and the MLP."""
    model = tiny(dropout=0.1).train()
    model(random_ids(2, 5))
    x = (2, 5, 12)
    weights = (2, 3, 5, 5)
    shapes = [x, weights, x, x, weights, x, x]
    assert dropped == [(shape, 0.1, True) for shape in shapes]


# ---- Known answers -------------------------------------------------------------------


def sine_model():
    """Returns the model of known_answer; its weights come from numpy."""
    model = tiny(block_size=512, n_head=12, n_embd=48).double()
    for i, parameter in enumerate(model.parameters()):
        squares = np.arange(parameter.numel(), dtype=np.float64) ** 2
        numbers = np.sin(squares + i).reshape(parameter.shape)
        parameter.data = torch.from_numpy(numbers)
    return model


@gpt2
def test_the_oracle_proves_gpt2s_answer():
    row = torch.arange(513)[None] * 7 % 61
    inputs = row[:, :-1]
    targets = row[:, 1:]
    loss = oracles(sine_model(), inputs, targets)[1]
    near(loss, gpt.GPT2_ANSWER, within=2e-6)


@gpt2
def test_the_code_gives_gpt2s_answer():
    assert gpt.same_answer(gpt.known_answer(GPTConfig()), gpt.GPT2_ANSWER)


def test_sizes_and_dropout_do_not_change_the_answer():
    other = GPTConfig(257, 16, 1, 1, 8, dropout=0.5)
    assert gpt.known_answer(other) == gpt.known_answer(GPTConfig())


def test_known_answer_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    gpt.known_answer(GPTConfig())
    assert torch.equal(torch.get_rng_state(), before)


@dataclasses.dataclass(frozen=True)
class ConfigWithAField(GPTConfig):
    """The config of a fork: it has one field more."""

    skipped: int = 0


def test_a_new_field_with_a_default_keeps_the_answer():
    assert gpt.known_answer(ConfigWithAField()) == gpt.known_answer(GPTConfig())


def test_a_new_field_that_is_used_changes_the_answer(monkeypatch):
    class Fork(gpt.GPT):
        def __init__(self, config):
            super().__init__(config)
            self.h = self.h[config.skipped :]

    monkeypatch.setattr(gpt, "GPT", Fork)
    whole = gpt.known_answer(ConfigWithAField())
    half = gpt.known_answer(ConfigWithAField(skipped=1))
    assert not gpt.same_answer(whole, half)


def gelu_without_tanh(x, approximate):
    """GELU without the approximation."""
    return x / 2 * torch.erfc(-x / math.sqrt(2))


def relu_squared(x, approximate):
    """The activation of Primer."""
    return x.relu().square()


class RMSNorm(torch.nn.LayerNorm):
    """A norm that does not take the mean away."""

    def forward(self, x):
        """Returns x of the same shape, scaled."""
        mean = x.square().mean(dim=-1, keepdim=True)
        return x / (mean + self.eps).sqrt() * self.weight + self.bias


class SmallEpsNorm(torch.nn.LayerNorm):
    """LayerNorm with a tenth of GPT-2's eps."""

    def __init__(self, size):
        super().__init__(size, eps=1e-6)


class ScaledEmbedding(torch.nn.Embedding):
    """Embeddings that are multiplied by the root of n_embd, as in the Transformer."""

    def forward(self, idx):
        """Returns the embeddings of ids."""
        return super().forward(idx) * math.sqrt(self.embedding_dim)


class NormalizedEmbedding(torch.nn.Embedding):
    """Embeddings that are normalized before they are used."""

    def forward(self, idx):
        """Returns the embeddings of ids."""
        x = super().forward(idx)
        return torch.nn.functional.normalize(x, dim=-1)


LINEAR = torch.nn.functional.linear


def capped_linear(x, weight, bias=None):
    """Caps the logits: the output layer alone calls F.linear without a bias."""
    y = LINEAR(x, weight, bias)
    return 15 * torch.tanh(y / 15) if bias is None else y


def rotary_attend(q, k, v, dropout_p=0.0):
    """Attention in which queries and keys are turned by an angle for each position."""
    steps = torch.arange(q.shape[2]).double()
    turn = torch.polar(torch.ones_like(steps), steps)[:, None]  # (T, 1)

    def turned(x):
        pairs = x.unflatten(-1, (-1, 2)).contiguous()
        pairs = torch.view_as_complex(pairs) * turn
        return torch.view_as_real(pairs).flatten(-2)

    return ATTEND(turned(q), turned(k), v, dropout_p)


def scaled_attend(q, k, v, dropout_p=0.0):
    """Attention whose scores are larger by a hundredth."""
    return ATTEND(1.01 * q, k, v, dropout_p)


def post_norm(block, x, cache=None):
    """The forward of a block that normalizes last, as in the first Transformer."""
    x = block.ln_1(x + block.attn(x, cache))
    return block.ln_2(x + block.mlp(x))


MODEL_CHANGES = [
    pytest.param("F.gelu", gelu_without_tanh, id="exact GELU"),
    pytest.param("F.gelu", relu_squared, id="ReLU squared"),
    pytest.param("causal_mask", mask_of_window(4), id="a window of 4"),
    pytest.param("causal_mask", mask_of_window(256), id="a window of 256"),
    pytest.param("nn.LayerNorm", RMSNorm, id="RMSNorm"),
    pytest.param("nn.LayerNorm", SmallEpsNorm, id="eps of 1e-6"),
    pytest.param("attend", rotary_attend, id="rotary positions"),
    pytest.param("nn.Embedding", ScaledEmbedding, id="scaled embeddings"),
    pytest.param("nn.Embedding", NormalizedEmbedding, id="normalized embeddings"),
    pytest.param("F.linear", capped_linear, id="capped logits"),
    pytest.param("attend", scaled_attend, id="scores scaled by 1.01"),
    pytest.param("Block.forward", post_norm, id="post-norm"),
]


@gpt2
@pytest.mark.parametrize("place, change", MODEL_CHANGES)
def test_a_change_of_the_computation_changes_the_answer(monkeypatch, place, change):
    monkeypatch.setattr(f"gpt.{place}", change)
    answer = gpt.known_answer(GPTConfig())
    assert math.isfinite(answer)
    assert not gpt.same_answer(answer, gpt.GPT2_ANSWER)


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """Returns the path of a checkpoint of a tiny model."""
    path = str(tmp_path / "x.pt")
    gpt.save_checkpoint(path, tiny(vocab_size=257))
    return path


def test_a_checkpoint_holds_the_answer_of_the_code_that_wrote_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpt, "attend", scaled_attend)
    path = str(tmp_path / "x.pt")
    gpt.save_checkpoint(path, tiny(vocab_size=257))
    answer = torch.load(path, weights_only=True)["known_answer"]
    assert answer == gpt.known_answer(GPTConfig())


def test_a_checkpoint_of_the_same_code_loads_without_a_warning(tiny_checkpoint, capsys):
    gpt.load_checkpoint(tiny_checkpoint)
    assert capsys.readouterr() == ("", "")


def test_a_checkpoint_of_other_code_loads_with_a_warning_of_one_line(
        tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "attend", scaled_attend)
    gpt.load_checkpoint(tiny_checkpoint)
    out, err = capsys.readouterr()
    assert re.fullmatch("warning: .*x.pt is from code that .* than gpt.py does\n", err)
    assert out == ""


@pytest.fixture
def nameless(tiny_checkpoint):
    """Returns the path of a checkpoint that holds no answer, as older ones do not."""
    state = torch.load(tiny_checkpoint, weights_only=True)
    del state["known_answer"]
    torch.save(state, tiny_checkpoint)
    return tiny_checkpoint


@gpt2
def test_a_checkpoint_without_an_answer_is_taken_to_be_gpt2s(nameless, capsys):
    _, state = gpt.load_checkpoint(nameless)
    assert state["known_answer"] == gpt.GPT2_ANSWER
    assert capsys.readouterr().err == ""


@gpt2
def test_other_code_warns_of_a_checkpoint_without_an_answer(
        nameless, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "attend", scaled_attend)
    gpt.load_checkpoint(nameless)
    assert capsys.readouterr().err.startswith("warning: ")


# ---- Logits around 0 -----------------------------------------------------------------


def far_below(model):
    """Moves the logits of a model to about -100, where OpenAI's are, and returns it."""
    model.ln_f.bias.normal_(std=0.5)
    bias = model.ln_f.bias
    offset = -100 * bias / bias.square().sum()
    model.wte.weight += offset  # the sum of both embeddings stays
    model.wpe.weight -= offset
    return model


def bfloat16_error(model, idx, targets):
    """Returns by how much the loss in bfloat16 differs from that in float32."""
    half = gpt.with_weights(model.config, model.state_dict()).bfloat16()
    error = half(idx, targets) - model(idx, targets)
    return abs(error.item())


@gpt2
def test_bfloat16_is_exact_where_logits_are_centered():
    model = far_below(tiny(vocab_size=500, n_embd=48))
    idx = random_ids(64, 16, V=500)
    probs = model(idx).flatten(0, 1).softmax(dim=-1)
    targets = torch.multinomial(probs, 1).view(64, 16)
    assert bfloat16_error(model, idx, targets) > 0.005
    gpt.center_logits(model)
    assert bfloat16_error(model, idx, targets) < 0.002


@gpt2
def test_centering_moves_logits_and_changes_no_loss():
    model = far_below(tiny())
    idx = random_ids(3, 16)
    loss = model(idx, idx)
    assert model(idx).mean() < -50
    assert gpt.center_logits(model) is True
    near(model(idx).mean(), 0, within=1e-3)
    near(model(idx, idx), loss, within=1e-4)


@pytest.mark.parametrize("place, change", [
    pytest.param("nn.Embedding", ScaledEmbedding, id="scaled embeddings"),
    pytest.param("nn.Embedding", NormalizedEmbedding, id="normalized embeddings"),
    pytest.param("F.linear", capped_linear, id="capped logits"),
])
def test_logits_are_left_alone_where_centering_would_change_the_loss(
        monkeypatch, capsys, place, change):
    monkeypatch.setattr(f"gpt.{place}", change)
    model = tiny()
    assert gpt.center_logits(model) is False
    same(model, tiny())
    assert "centering would change this model" in capsys.readouterr().err


# ---- Models with given weights -------------------------------------------------------


def test_with_weights_takes_the_tensors_without_copying_them():
    model = tiny()
    weights = model.state_dict()
    loaded = gpt.with_weights(model.config, weights)
    for name, parameter in loaded.named_parameters():
        assert parameter.data_ptr() == weights[name].data_ptr(), name


def test_with_weights_draws_no_random_numbers():
    model = tiny()
    before = torch.get_rng_state()
    gpt.with_weights(model.config, model.state_dict())
    assert torch.equal(torch.get_rng_state(), before)


def test_with_weights_needs_no_memory_for_what_it_replaces(monkeypatch):
    devices = []
    load_state_dict = gpt.GPT.load_state_dict

    def noted(model, *arguments, **options):
        devices.extend(parameter.device.type for parameter in model.parameters())
        return load_state_dict(model, *arguments, **options)

    monkeypatch.setattr(gpt.GPT, "load_state_dict", noted)
    model = tiny()
    gpt.with_weights(model.config, model.state_dict())
    assert devices == ["meta"] * len(list(model.parameters()))


@pytest.mark.parametrize("n_head", [
    pytest.param(3, id="it succeeded"),
    pytest.param(5, id="it failed"),
])
def test_models_have_memory_again_after_with_weights(n_head):
    model = tiny()
    with contextlib.suppress(AssertionError):
        config = dataclasses.replace(model.config, n_head=n_head)
        gpt.with_weights(config, model.state_dict())
    assert GPT(model.config).wte.weight.device.type == "cpu"


@pytest.mark.parametrize("words, changes", [
    pytest.param("Missing key.*wte", {"wte.weight": None}, id="missing"),
    pytest.param("Unexpected key.*x", {"x": torch.zeros(1)}, id="unknown"),
    pytest.param("size mismatch for wte.weight",
                 {"wte.weight": torch.zeros(61, 11)}, id="misshapen"),
])
def test_weights_that_do_not_fit_are_refused(words, changes):
    model = tiny()
    weights = model.state_dict() | changes
    present = {name: w for name, w in weights.items() if w is not None}
    with pytest.raises(RuntimeError, match="(?s)" + words):
        gpt.with_weights(model.config, present)


class BlockWithBuffers(gpt.Block):
    """A fork's block, with numbers that are not trained."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("slopes", torch.arange(3.0))
        self.register_buffer("angles", torch.arange(4.0), persistent=False)
        self.frozen = torch.nn.Parameter(torch.ones(5), requires_grad=False)


@pytest.fixture
def forked(monkeypatch, tmp_path):
    """Returns the first block of a fork's model that was saved and loaded."""
    monkeypatch.setattr(gpt, "Block", BlockWithBuffers)
    model = tiny(vocab_size=257)
    model.h[0].slopes += 7
    path = str(tmp_path / "x.pt")
    gpt.save_checkpoint(path, model)
    return gpt.load_checkpoint(path)[0].h[0]


def test_a_forks_buffer_is_loaded(forked):
    assert forked.slopes.tolist() == [7, 8, 9]


def test_a_forks_buffer_that_is_not_saved_keeps_its_numbers(forked):
    assert forked.angles.tolist() == [0, 1, 2, 3]


class TiedTwice(GPT):
    """A fork's GPT with an output layer of its own, which is tied as in nanoGPT."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight


def test_weights_that_a_fork_ties_are_one_parameter_when_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(gpt, "GPT", TiedTwice)
    model = TiedTwice(GPTConfig(257, 16, 2, 3, 12))
    path = str(tmp_path / "x.pt")
    gpt.save_checkpoint(path, model)
    loaded, _ = gpt.load_checkpoint(path)
    assert loaded.lm_head.weight is loaded.wte.weight
    same(loaded, model)


def test_what_a_fork_does_not_train_stays_so_when_loaded(forked):
    assert not forked.frozen.requires_grad
    assert forked.attn.c_attn.weight.requires_grad


# ---- The next token ------------------------------------------------------------------


def test_generation_past_the_window_equals_plain_recomputation():
    model = tiny()
    window = random_ids(2, 5)
    ours = generated(model, window, 40)
    assert len(ours.unique()) > 10  # with a few tokens the window would not matter
    generator = torch.Generator().manual_seed(0)
    for column in ours.T:
        if window.shape[1] > 16:
            window = window[:, -8:]
        probs, ids = gpt.candidates(model(window)[:, -1])
        place = torch.multinomial(probs, 1, generator=generator)
        token = ids.gather(1, place)
        assert torch.equal(column, token[:, 0])
        window = torch.cat((window, token), dim=1)


def test_generate_draws_from_its_generator_alone():
    model = tiny()
    prompt = random_ids(1, 1)
    before = torch.get_rng_state()
    generated(model, prompt, 20)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("length", [15, 16, 17, 50])
def test_the_last_16_tokens_of_a_prompt_count(length):
    model = tiny()
    prompt = random_ids(2, length)
    logits = model(prompt[:, -16:])[:, -1:]
    first = generated(model, prompt, 1, temperature=0)
    assert torch.equal(first, logits.argmax(dim=-1))


def test_generation_works_with_a_window_of_one_token():
    model = tiny(block_size=1)
    before = torch.tensor([[7]])
    for token in gpt.generate(model, before, 5, temperature=0):
        assert token == model(before).argmax()
        before = token[None]


def test_each_row_stops_on_its_own():
    model = tiny()
    idx = random_ids(4, 5)
    free = generated(model, idx, 30).tolist()
    stop = free[0][3]
    rows = generated(model, idx, 30, stop_token=stop)
    ends = set()
    for row, expected in zip(rows.tolist(), free, strict=True):
        end = expected.index(stop) if stop in expected else 30
        expected[end:] = [stop] * (30 - end)
        assert row == expected[: len(row)]
        ends.add(end)
    assert len(ends) > 1  # or one row would say nothing about the others
    assert rows.shape[1] == min(30, max(ends) + 1)


def test_generation_ends_when_all_rows_have_stopped():
    model = tiny()
    idx = random_ids(1, 5)
    free = generated(model, idx, 30, temperature=0)[0].tolist()
    stop = free[3]
    rows = generated(model, idx, 30, temperature=0, stop_token=stop)
    length = free.index(stop) + 1
    assert rows.tolist() == [free[:length]]


FILTERS = [
    pytest.param(1.0, None, None, id="nothing"),
    pytest.param(0.7, 0, 1.0, id="temperature below 1"),
    pytest.param(1.3, 5, None, id="temperature above 1 and top_k"),
    pytest.param(1.0, 500, None, id="top_k beyond the vocabulary"),
    pytest.param(1.0, None, 0.6, id="top_p"),
    pytest.param(0.8, 7, 0.5, id="temperature, top_k and top_p"),
    pytest.param(1.0, 1, None, id="top_k of 1"),
    pytest.param(1.0, None, 1e-9, id="the lowest top_p"),
    pytest.param(2.0, 4, 0.9, id="a high temperature, top_k and top_p"),
]


@pytest.mark.parametrize("temperature, top_k, top_p", FILTERS)
def test_candidates_equal_their_definition(temperature, top_k, top_p):
    logits = torch.randn(30) * 2
    p = np.exp(logits.double().numpy() / temperature)
    ids = np.argsort(-p)[: top_k or 30]
    if top_p:  # up to the one with which the sum reaches top_p
        sums = np.cumsum(p[ids]) / p[ids].sum()
        ids = ids[: 1 + np.count_nonzero(sums < top_p - 1e-12)]
    probs, places = gpt.candidates(logits[None], temperature, top_k, top_p)
    kept = probs[0] > 0
    assert places[0][kept].tolist() == ids.tolist()  # so the likeliest is the first
    expected = p[ids] / p[ids].sum()
    np.testing.assert_allclose(probs[0][kept], expected, rtol=1e-5)


@pytest.mark.parametrize("top_p, count", [
    pytest.param(0.25, 1, id="the first"),
    pytest.param(0.5, 2, id="the second"),
    pytest.param(0.51, 3, id="the third"),
    pytest.param(1, 4, id="the last"),
])
def test_top_p_ends_with_the_token_that_reaches_it(top_p, count):
    four_alike = torch.zeros(1, 4)
    probs, _ = gpt.candidates(four_alike, top_p=top_p)
    assert (probs > 0).sum() == count


def test_top_k_keeps_no_more_when_all_are_alike():
    probs, ids = gpt.candidates(torch.zeros(1, 20), top_k=4)
    assert probs.tolist() == [[0.25] * 4]
    assert len(set(ids[0].tolist())) == 4


@pytest.mark.parametrize("temperature", [0, 1e-320])
def test_a_temperature_of_0_takes_the_likeliest(temperature):
    logits = torch.randn(2, 30)
    probs, ids = gpt.candidates(logits, temperature)
    likeliest = logits.argmax(dim=-1, keepdim=True)
    assert torch.equal(ids, likeliest)
    assert torch.equal(probs, torch.ones(2, 1))


def test_candidates_of_16_bit_logits_are_computed_in_32():
    logits = torch.randn(2, 30).bfloat16()
    exact = logits.double().softmax(dim=-1)
    probs, ids = gpt.candidates(logits)
    near(probs, exact.gather(1, ids), within=1e-6)


@pytest.mark.parametrize("temperature, top_k, top_p", FILTERS)
def test_observe_gets_the_models_own_probabilities(temperature, top_k, top_p):
    model = tiny()
    idx = random_ids(2, 4)
    drawn = []

    def observe(probs, ids, token):
        text = torch.cat((idx, *drawn), dim=1)
        own = model(text)[:, -1].softmax(dim=-1)
        own, order = own.sort(descending=True)
        near(probs, own, within=1e-5)
        assert torch.equal(ids, order)
        drawn.append(token[:, None])

    columns = generated(model, idx, 5, temperature, top_k, top_p, observe=observe)
    assert torch.equal(columns, torch.cat(drawn, dim=1))


def best_of_all(model, prompt, stop):
    """Returns the likeliest continuation of up to four tokens of a vocabulary of four.

    It is found by trying all of them. prompt has two tokens.
    """
    ids = torch.cartesian_prod(*[torch.arange(4)] * 4)  # (256, 4)
    prompts = prompt.expand(256, -1)
    whole = torch.cat((prompts, ids), dim=1)
    log_probs = model(whole).log_softmax(dim=-1)
    found = log_probs[:, 1:-1].gather(2, ids[:, :, None])  # (256, 4, 1)
    sums = found.squeeze(2).cumsum(dim=1)  # of the first 1, 2, 3 and 4 tokens
    means = sums / torch.arange(1, 5)
    best = (-math.inf, [])
    for row, mean in zip(ids.tolist(), means.tolist()):
        length = 4
        if stop in row:
            length = row.index(stop) + 1
        found = (mean[length - 1], row[:length])
        best = max(best, found)
    return best[1]


@pytest.mark.parametrize("stop", [
    pytest.param(None, id="without a stop token"),
    pytest.param(2, id="with a stop token"),
])
def test_wide_beams_find_the_best_of_all_continuations(stop):
    """A bound or a length that is off by one shows on some of the 40 models."""
    prompt = torch.tensor([[1, 3]])
    for number in range(40):
        model = tiny(number, vocab_size=4, block_size=6)  # the six tokens just fit
        found = gpt.beam_search(model, prompt, 4, 64, stop_token=stop)
        assert found.tolist() == best_of_all(model, prompt, stop), number


def test_one_beam_is_greedy():
    model = tiny()
    prompt = torch.tensor([[1, 3]])
    greedy = generated(model, prompt, 9, temperature=0)[0]
    assert torch.equal(gpt.beam_search(model, prompt, 9, 1), greedy)


def test_beam_search_of_no_tokens_finds_none():
    found = gpt.beam_search(tiny(), random_ids(1, 1), 0, 2)
    assert found.shape == (0,)


# ---- The score of a text -------------------------------------------------------------


def score_of(model, ids):
    """Returns all that score yields, (len(ids) - 1,)."""
    parts = itertools.islice(gpt.score(model, ids), 99)  # or an error may last forever
    return torch.cat(list(parts))


def cost(model, ids):
    """Returns what the last id costs after those before it, in nats."""
    logits = model(ids[None, :-1])[0, -1]
    log_probs = logits.log_softmax(dim=-1)
    return -log_probs[ids[-1]].item()


@pytest.mark.parametrize("length", [2, 9, 16, 17, 40, 60])
def test_score_predicts_each_token_from_half_a_window_or_more(length):
    model = tiny()
    ids = random_ids(1, length)[0]
    expected = []
    for i in range(1, length):
        start = max(0, (i - 1) // 8 * 8 - 8)  # windows begin at the multiples of 8
        assert i - start >= min(i, 8)
        expected.append(cost(model, ids[start : i + 1]))
    near(score_of(model, ids), expected)


def test_score_works_with_a_window_of_one_token():
    model = tiny(block_size=1)
    ids = random_ids(1, 9)[0]
    expected = [cost(model, pair) for pair in ids.unfold(0, 2, 1)]
    near(score_of(model, ids), expected)


def test_the_score_of_a_16_bit_model_is_computed_in_32():
    model = tiny().bfloat16()
    ids = random_ids(1, 9)[0]
    logits = model(ids[None, :-1])[0].double()
    exact = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    near(score_of(model, ids), exact, within=1e-5)


def test_one_token_has_no_score():
    for losses in gpt.score(tiny(), torch.tensor([3])):
        raise AssertionError(losses)


# ---- Vocabularies --------------------------------------------------------------------

VOCAB_SIZES = [257, 258, 513, 1025, 4097, 50257]
VOCAB_BPE = pathlib.Path(HERE, "data", "vocab.bpe").read_text("utf-8")
MERGES = VOCAB_BPE.splitlines()[1:]  # the first line is a version
# The pattern of OpenAI's encoder.py, of which gpt.py has a faster spelling.
OPENAI_PATTERN = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
                  r"|\s+(?!\S)|\s+")
NASTY_TEXTS = [
    pytest.param("", id="no text"),
    pytest.param("naïve café 你好 🙂🙃", id="other scripts"),
    pytest.param("It's 1984, isn't it ?They're O'Really 'm", id="endings of words"),
    pytest.param("\u202e\u0301 \x00\x7f \x1c\ufeff\ufffd", id="control characters"),
    pytest.param("\t\r\n  \u3000x\n\n  \u00a0y \n", id="white space"),
    pytest.param(" " * 50 + "\n\n x" + "\n" * 9, id="long white space"),
    pytest.param("aaaaaaaaaaaaa" + "ab" * 30 + "!?" * 20, id="repetitions"),
    pytest.param("a<|endoftext|>b <|endoftext|>\n<|endoftext", id="ends of texts"),
    pytest.param(STORY[:3000], id="a story"),
]


def openai_spelling():
    """Returns {byte: character of vocab.bpe}, in the order of the ids 0 to 255."""
    hidden = [*range(33), *range(127, 161), 173]
    visible = set(range(256)).difference(hidden)
    spelling = {byte: chr(byte) for byte in sorted(visible)}
    for i, byte in enumerate(hidden):
        spelling[byte] = chr(256 + i)
    return spelling


def joined(parts, pair):
    """Returns the parts with each occurrence of a pair of neighbours joined."""
    result = []
    for part in parts:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return result


def plain_encode(text, vocab_size):
    """Returns the ids of a text, found as OpenAI's encoder.py finds them."""
    spelling = openai_spelling()
    lines = MERGES[: vocab_size - 257]
    merges = [tuple(line.split(" ")) for line in lines]
    rank = {pair: i for i, pair in enumerate(merges)}
    tokens = [*spelling.values(), *map("".join, merges)]
    id_of = {token: i for i, token in enumerate(tokens)}
    ids = []
    for piece in regex.findall(OPENAI_PATTERN, text):
        parts = [spelling[byte] for byte in piece.encode()]
        while pairs := list(itertools.pairwise(parts)):
            best = min(pairs, key=lambda pair: rank.get(pair, math.inf))
            if best not in rank:
                break
            parts = joined(parts, best)
        ids += [id_of[part] for part in parts]
    return ids


def plain_encode_all(texts, vocab_size):
    """Returns the ids of texts with an <|endoftext|> between them."""
    ids = plain_encode(texts[0], vocab_size)
    for text in texts[1:]:
        ids += [vocab_size - 1, *plain_encode(text, vocab_size)]
    return ids


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_a_text_gets_the_ids_of_openais_encoder(vocab_size, text):
    expected = plain_encode_all(text.split("<|endoftext|>"), vocab_size)
    assert gpt.encode(text, vocab_size) == expected


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_a_text_is_decoded_to_itself(vocab_size, text):
    ids = gpt.encode(text, vocab_size)
    assert gpt.get_tokenizer(vocab_size).decode(ids) == text


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_the_last_id_ends_a_text(vocab_size):
    end = vocab_size - 1
    assert gpt.encode("a<|endoftext|>b", vocab_size) == [64, end, 65]
    assert gpt.get_tokenizer(vocab_size).n_vocab == vocab_size


@pytest.mark.parametrize("text, ids", [
    ("Every effort moves you", [6109, 3626, 6100, 345]),
    ("<|endoftext|>", [50256]),
])
def test_ids_without_a_vocab_size_are_gpt2s(text, ids):
    assert gpt.encode(text) == ids
    assert gpt.get_tokenizer().decode(ids) == text


def test_the_tokenizer_is_called_gpt2():
    assert gpt.get_tokenizer().name == "gpt2"


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_bytes_of_tokens_equal_a_count_by_hand(vocab_size):
    counts = [1] * 256
    for line in MERGES[: vocab_size - 257]:
        counts.append(len(line) - 1)  # a character a byte, but for the space between
    assert gpt.token_bytes(vocab_size) == [*counts, 0]


def test_a_long_run_at_the_end_is_encoded():
    """tiktoken raises an error where a pattern may step back a million times."""
    text = "x" * 2**20 + "\n" * 2**20
    assert gpt.get_tokenizer().decode(gpt.encode(text)) == text


# ---- Texts in files ------------------------------------------------------------------


@pytest.mark.parametrize("data, text", [
    pytest.param(b"caf\xc3\xa9", "café", id="plain"),
    pytest.param(b"\xef\xbb\xbfa", "a", id="a byte-order mark"),
    pytest.param(b"a\n\xef\xbb\xbfb", "a\nb", id="a byte-order mark in the middle"),
    pytest.param(b"a\r\nb\r\n", "a\nb\n", id="line ends of Windows"),
    pytest.param(b"a\rb\r", "a\nb\n", id="line ends of old Macs"),
    pytest.param(b"a\r\r\n\nb", "a\n\n\nb", id="mixed line ends"),
])
def test_utf8_is_decoded(data, text):
    assert gpt.decode_utf8(data, "x.txt") == text


@pytest.mark.parametrize("data, words", [
    pytest.param(b"caf\xe9 x", "x.txt: byte 103 is not UTF-8", id="Latin 1"),
    pytest.param(b"caf\xc3", "x.txt: byte 103 is not UTF-8", id="half a character"),
    pytest.param(b"\xed\xa0\x80", "x.txt: byte 100 is not UTF-8", id="a surrogate"),
    pytest.param("I".encode("utf-16"), "x.txt: byte 100 is not UTF-8", id="UTF-16"),
    pytest.param("I".encode("utf-16-le"), "byte 101 is not UTF-8", id="UTF-16 without a mark"),
])
def test_other_encodings_are_refused_with_their_place(data, words):
    refused(words, gpt.decode_utf8, data, "x.txt", offset=100)


class ShortParts(io.BytesIO):
    """A file that is read in parts of 50 bytes, whatever size is asked for."""

    def readlines(self, _):
        """Returns the lines of the next part."""
        return super().readlines(50)


@pytest.fixture
def in_short_parts(monkeypatch):
    """Makes gpt.py read files in short parts."""
    def open_in_parts(path, mode):
        assert mode == "rb"
        return ShortParts(pathlib.Path(path).read_bytes())

    monkeypatch.setattr(gpt, "open", open_in_parts, raising=False)


WHITE_SPACE = [" ", "  ", "\n", "\n\n", "\n \n", "\t", "\u3000", "\u00a0", "\x1c"]
LINE_ENDS = ["\n", "\n", "\n", "\r\n", "\r"]
WORDS = ["a", " x", "It's", "1984", "é", "你好"]
OTHERS = ["...", "!?", "🙂", "<|endoftext|>", "\ufeff"]
PIECES = [*WHITE_SPACE, *LINE_ENDS, *WORDS, *OTHERS]


def random_text(rng):
    """Returns a text of 500 pieces."""
    return "".join(rng.choice(PIECES, 500))


def read_as(text):
    """Returns what is left of a text after it was read from a file."""
    text = text.replace("\ufeff", "")
    return text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("vocab_size", [257, 1025, 50257])
def test_ids_of_parts_equal_those_of_the_whole(tmp_path, in_short_parts, vocab_size):
    rng = np.random.default_rng(0)
    path = tmp_path / "x.txt"
    for _ in range(30):
        text = random_text(rng)
        path.write_bytes(text.encode())
        parts = list(gpt.read_text(str(path)))
        assert len(parts) > 5
        ids = [i for part in parts for i in gpt.encode(part, vocab_size)]
        assert ids == gpt.encode(read_as(text), vocab_size)


@pytest.mark.parametrize("vocab_size", [257, 1025, 50257])
def test_ids_of_a_folder_equal_those_of_its_texts_joined(
        tmp_path, in_short_parts, vocab_size):
    rng = np.random.default_rng(0)
    texts = [random_text(rng) for _ in range(4)]
    texts[1] = ""
    texts[2] += " \n"
    for name, text in zip("abcd", texts, strict=True):
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    parts = gpt.read_text(str(tmp_path))
    ids = [i for part in parts for i in gpt.encode(part, vocab_size)]
    whole = "<|endoftext|>".join(map(read_as, texts))
    assert ids == gpt.encode(whole, vocab_size)


def test_a_large_file_is_read_in_parts(tmp_path):
    """What is in memory at once stays small."""
    path = tmp_path / "x.txt"
    path.write_text("one two three\n" * 100_000)
    sizes = [len(part) for part in gpt.read_text(str(path))]
    assert sum(sizes) == path.stat().st_size
    assert max(sizes) < 2**19


def test_a_byte_that_is_no_text_is_found_in_a_later_part(tmp_path, in_short_parts):
    path = tmp_path / "x.txt"
    path.write_bytes(b"one two\n" * 50 + b"\xff")
    refused(r"x.txt: byte 400 is not UTF-8", list, gpt.read_text(str(path)))


@pytest.mark.parametrize("name", ["", "gone.txt"])
def test_what_is_no_text_cannot_be_read(tmp_path, name):
    path = str(tmp_path / name)
    words = re.escape(f"{path} cannot be read; give a text file, or a folder")
    refused(words, list, gpt.read_text(path))


def test_a_folder_stands_for_its_texts_in_order(tmp_path):
    folder = tmp_path / "a [1]*"
    folder.mkdir()
    for name in ("b.TXT", "c.md", "a.txt", "d.Txt"):
        (folder / name).touch()
    expected = [str(folder / name) for name in ("a.txt", "b.TXT", "d.Txt")]
    assert gpt.text_files(str(folder)) == expected


def test_a_file_stands_for_itself(tmp_path):
    path = tmp_path / "x.md"
    path.touch()
    assert gpt.text_files(str(path)) == [str(path)]


# ---- What the scripts share ----------------------------------------------------------


@pytest.mark.parametrize("kind, low, high, text, value", [
    pytest.param(int, 1, 9, "1", 1, id="the lowest"),
    pytest.param(int, 1, 9, "9", 9, id="the highest"),
    pytest.param(int, 0, 2**63, "9000000000000000001", 9000000000000000001,
                 id="a large seed"),
    pytest.param(float, 0, 1, "1e-3", 0.001, id="a float"),
])
def test_numbers_that_fit(kind, low, high, text, value):
    found = gpt.number(kind, low, high)(text)
    assert type(found) is kind
    assert found == value


@pytest.mark.parametrize("kind, low, high, text", [
    pytest.param(int, 1, 9, "0", id="too low"),
    pytest.param(int, 1, 9, "10", id="too high"),
    pytest.param(float, 0, 1, "nan", id="nan"),
    pytest.param(float, 0, sys.float_info.max, "inf", id="infinite"),
    pytest.param(float, -1, 1, "-inf", id="minus infinite"),
])
def test_numbers_that_do_not_fit(kind, low, high, text):
    words = re.escape(f"{text} is not between {low} and {high}")
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        gpt.number(kind, low, high)(text)


def test_numbers_have_no_end_unless_one_is_given():
    assert gpt.number(int, 0)(str(10**18)) == 10**18
    with pytest.raises(argparse.ArgumentTypeError):
        gpt.number(float, 0)("inf")


def test_argparse_names_the_kind_of_a_number(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=gpt.number(int, 0))
    with pytest.raises(SystemExit):
        parser.parse_args(["--n=x"])
    assert "invalid number value: 'x'" in capsys.readouterr().err


@pytest.mark.parametrize("started, flags, expected", [
    pytest.param("train.py", ["--resume"], "python sample.py --resume", id="plain"),
    pytest.param("a/train.py", ["--checkpoint=b/x-1.pt"],
                 "python a/sample.py --checkpoint=b/x-1.pt", id="a folder"),
    pytest.param("my dir/train.py", ["--out_dir=an out"],
                 'python "my dir/sample.py" "--out_dir=an out"', id="spaces"),
    pytest.param("train.py", ["--start", "Ivy & Co; x"],
                 'python sample.py --start "Ivy & Co; x"', id="a prompt"),
    pytest.param("train.py", ["--start", ""],
                 'python sample.py --start ""', id="an empty prompt"),
    pytest.param("train.py", ["--start", 'He said "$5"'],
                 """python sample.py --start 'He said "$5"'""", id="quotes and dollars"),
])
def test_a_command_can_be_pasted(monkeypatch, started, flags, expected):
    started = started.replace("/", os.sep)
    monkeypatch.setattr(sys, "argv", [started, "--other"])
    command = gpt.command("sample.py", *flags).replace(os.sep, "/")
    assert command == expected
    assert shlex.split(command)[2:] == flags


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        """Returns True."""
        return True


@pytest.mark.parametrize("stream, shown", [
    pytest.param(Terminal(), "50 bytes\r", id="a terminal"),
    pytest.param(io.StringIO(), "", id="a file"),
])
def test_progress_is_shown_on_terminals_alone(monkeypatch, stream, shown):
    monkeypatch.setattr(sys, "stderr", stream)
    gpt.show_progress("50 bytes")
    assert stream.getvalue() == shown


def test_progress_needs_no_stream(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    gpt.show_progress("50 bytes")


def send(number):
    """Sends this process a signal that has to be caught."""
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        pytest.fail("the signal was not caught")


def all_handlers():
    """Returns what this process does at each signal."""
    return [signal.getsignal(number) for number in SIGNALS]


@posix
@pytest.mark.parametrize("number", SIGNALS)
def test_signals_are_caught(number, capfd):
    with gpt.catch_signals() as caught:
        assert caught == []
        send(number)
        assert caught == [number]
    assert capfd.readouterr().err.startswith("saving the last whole step")


@posix
@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_is_not_caught(number):
    with gpt.catch_signals():
        send(number)
        with pytest.raises(KeyboardInterrupt):  # what all signals do in these tests
            signal.raise_signal(number)


@posix
@pytest.mark.parametrize("number", SIGNALS)
def test_the_old_handlers_are_back_after_a_signal(number):
    before = all_handlers()
    with gpt.catch_signals():
        send(number)
    assert all_handlers() == before


@posix
def test_the_old_handlers_are_back_after_an_error():
    before = all_handlers()
    with pytest.raises(ZeroDivisionError), gpt.catch_signals():
        raise ZeroDivisionError
    assert all_handlers() == before


@posix
def test_a_signal_that_is_ignored_stays_so():
    """nohup ignores SIGHUP, so that a run goes on without its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with gpt.catch_signals() as caught:
            send(signal.SIGHUP)
            assert caught == []
    finally:
        signal.signal(signal.SIGHUP, before)


def fail(error):
    """Raises an error inside reraise_as_input_error, which waits for OSErrors."""
    with gpt.reraise_as_input_error("reading failed", OSError):
        raise error


def test_an_error_keeps_its_whole_path():
    refused(r"^reading failed \(no vol\. 2/x\.pt\)$", fail, OSError("no vol. 2/x.pt"))


def test_an_error_of_many_lines_becomes_one():
    refused(r"^reading failed \(one two\)$", fail, OSError("one\n   two\n"))


def test_a_long_error_is_cut():
    with pytest.raises(InputError) as caught:
        fail(OSError("word " * 1000))
    assert len(str(caught.value)) < 400


def test_the_error_behind_an_error_is_told():
    """torch.save hides why it failed behind an error of its own."""
    def save():
        with gpt.reraise_as_input_error("saving failed", RuntimeError):
            try:
                raise OSError("no space left")
            finally:
                raise RuntimeError("enforce fail at inline_container.cc")

    refused("^saving failed .no space left.$", save)


def test_an_error_of_another_kind_is_left_alone():
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


def test_only_a_false_condition_is_raised():
    gpt.raise_unless(True, "all is well")
    refused("^nothing is well$", gpt.raise_unless, False, "nothing is well")


def test_a_users_mistake_is_shown_in_one_line(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["a folder/train.py", "--x"])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as caught:
        gpt.show_error(InputError, InputError("no x.txt"), None)
    assert caught.value.code == 2
    assert capfd.readouterr() == ("", "train.py: error: no x.txt\n")


def test_our_own_mistake_is_shown_with_its_traceback(capfd):
    try:
        raise ZeroDivisionError("division by zero")
    except ZeroDivisionError as error:
        gpt.show_error(type(error), error, error.__traceback__)
    err = capfd.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, BrokenPipeError])
def test_ctrl_c_and_a_closed_pipe_end_in_silence(monkeypatch, capfd, kind):
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as caught:
        gpt.show_error(kind, kind(), None)
    assert caught.value.code == 130
    assert capfd.readouterr() == ("", "")


# ---- Devices -------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Returns a function that says what a machine is able to. It has all devices."""
    def ones(size, device):
        return argparse.Namespace(device=torch.device(device))

    def has(able):
        monkeypatch.setattr(torch, "ones", ones)
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda **_: able == "bfloat16")

    return has


@pytest.mark.parametrize("device, able, dtype", [
    ("cpu", "amx_bf16", torch.bfloat16),
    ("cpu", "avx512_bf16", torch.bfloat16),
    ("cpu", "avx2", torch.float32),
    ("mps", "", torch.float32),
    ("cuda", "bfloat16", torch.bfloat16),
    ("cuda", "", torch.float16),
])
def test_which_dtype_auto_takes(machine, device, able, dtype):
    machine(able)
    assert gpt.choose_device(device, "auto") == (torch.device(device), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_dtype_that_is_named_is_taken(machine, dtype):
    machine("amx_bf16")
    expected = (torch.device("cpu"), getattr(torch, dtype))
    assert gpt.choose_device("cpu", dtype) == expected


@pytest.mark.parametrize("found, device", [
    pytest.param(True, "mps", id="an accelerator"),
    pytest.param(False, "cpu", id="none"),
])
def test_which_device_auto_takes(machine, monkeypatch, found, device):
    machine("")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert gpt.choose_device("auto", "auto")[0].type == device


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused(device):
    refused(f"--device={device} cannot be used", gpt.choose_device, device, "auto")


BYTES = "--vocab_size=257"  # the smallest vocabulary makes the smallest model
gc.freeze()  # what is imported stays, so collecting the rest takes no time


def write(path, text):
    """Writes a text as it is, with its own line ends; returns the path."""
    path.write_bytes(text.encode())
    return path


def random_checkpoint(path, vocab_size=1025, **changes):
    """Writes the checkpoint of a random model of 32 positions; returns its path."""
    sizes = {"vocab_size": vocab_size, "block_size": 32}
    gpt.save_checkpoint(str(path), tiny(**sizes | changes))
    return path


def losses_by_hand(model, rows):
    """Returns -ln(p) of the tokens of rows (B, T + 1) after the first, (B, T)."""
    log_probs = model(rows[:, :-1]).log_softmax(dim=-1)
    targets = rows[:, 1:, None]
    return -log_probs.gather(2, targets).squeeze(2).detach()


def evaluated(tokens):
    """Returns the windows that a run evaluates: 7 of 33 tokens, spread over all."""
    n = (len(tokens) - 1) // 32
    starts = [i * n // 7 * 32 for i in range(7)]
    return torch.tensor([tokens[start : start + 33] for start in starts])


def loss_by_hand(path, text):
    """Returns the mean loss of a checkpoint on the evaluated windows of a text."""
    model, _ = load(path)
    rows = evaluated(gpt.encode(text, model.config.vocab_size))
    return losses_by_hand(model, rows).mean().item()


def count_bytes(ids, vocab_size):
    """Returns how many bytes of text some ids stand for; <|endoftext|> is no text."""
    text = [i for i in ids if i != vocab_size - 1]
    return len(gpt.get_tokenizer(vocab_size).decode_bytes(text))


# ---- What a run prints, logs and leaves ----------------------------------------------


def test_a_run_leaves_six_files(run):
    names = {path.name for path in run[0].iterdir()}
    assert names == {"lock", "data.bin", "ckpt.pt", "best.pt", "log.csv", "loss.png"}


def test_the_log_has_a_row_for_each_step(run):
    lines = (run[0] / "log.csv").read_text("utf-8").splitlines()
    assert lines[0] == ("iter,tokens,loss,train_loss,val_loss,val_bits_per_byte,lr,"
                        "grad_norm,tokens_per_s")
    assert lines[1].startswith("0,0,,10.")  # before the first step no batch has a loss
    assert column(run[0], "iter") == list(range(11))
    assert column(run[0], "tokens") == list(range(0, 641, 64))  # two windows of 32 each


def test_the_log_has_three_evaluations_and_begins_at_a_blind_guess(run):
    losses = column(run[0], "val_loss")
    assert len(losses) == 3
    assert losses[0] == pytest.approx(math.log(50257), abs=0.1)


@pytest.mark.parametrize("name, part", (
    pytest.param("train_loss", slice(4886), id="the first nine tenths"),
    pytest.param("val_loss", slice(4886, None), id="the last tenth"),
))
def test_the_last_losses_are_those_of_the_saved_weights(run, name, part):
    model, _ = load(run[0])
    rows = evaluated(gpt.encode(STORY)[part])
    expected = losses_by_hand(model, rows).mean().item()
    assert column(run[0], name)[-1] == pytest.approx(expected, abs=1e-5)


def test_a_run_prints_its_sizes_its_evaluations_and_samples(run):
    folder, out = run
    loss = column(folder, "val_loss")[-1]
    bits = column(folder, "val_bits_per_byte")[-1]
    assert "4,886 tokens to train on, 543 to validate on\n" in out
    assert " parameters, cpu, torch.float32; a blind guess costs ln(vocab_size)" in out
    assert "= 10.8249 nats a token\n" in out
    assert (f"val_loss {loss:.5g} | val_bits_per_byte {bits:.5g} | "
            f"val_perplexity {math.exp(loss):.5g} | 0.0 min left\n") in out
    assert out.count("\nsample: Every effort moves you") == 3
    assert f"best.pt has the best val_loss, {loss:.4f}, of step 10\n" in out


def test_a_checkpoint_holds_the_run_and_no_folder(run):
    model, state = load(run[0])
    assert state.keys() == {
        "optimizer", "scaler", "step", "row", "best", "log", "args", "texts",
        "known_answer"}
    assert state["step"] == 10
    assert [row["iter"] for row in state["log"]] == list(range(11))
    assert not {"out_dir", "resume"} & state["args"].keys()  # or it could not be moved
    assert not model.training


def test_the_best_checkpoint_holds_weights_and_their_loss_alone(run):
    model, state = load(run[0] / "best.pt")
    assert state.keys() == {"step", "val_loss", "known_answer"}
    assert state["step"] == 10
    assert state["val_loss"] == column(run[0], "val_loss")[-1]
    same(model, load(run[0])[0])


@pytest.mark.parametrize("vocab_size", (257, 1025, 50257))
def test_bits_a_byte_are_those_of_the_evaluated_text(tmp_path, capsys, vocab_size):
    """In a text of many short ones <|endoftext|> costs bits, but it has no bytes."""
    words = STORY[:9000].split()
    text = "<|endoftext|>".join(words)
    path = write(tmp_path / "v.txt", text)
    out = tmp_path / "out"
    train_in(out, f"--val_data={path} --max_iters=0 --vocab_size={vocab_size}")
    rows = evaluated(gpt.encode(text, vocab_size))
    targets = rows[:, 1:].flatten().tolist()
    assert vocab_size - 1 in targets
    nats = losses_by_hand(load(out)[0], rows).sum().item()
    expected = nats / math.log(2) / count_bytes(targets, vocab_size)
    assert column(out, "val_bits_per_byte") == pytest.approx([expected])
    assert f" | val_bits_per_byte {expected:.5g} | " in capsys.readouterr().out


class FakeTerminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


def train_and_score(folder):
    """Runs both scripts that show progress, on the built-in text."""
    train_in(folder, f"{BYTES} --max_iters=0")
    main("sample.py", f"--checkpoint={folder}", "--device=cpu", f"--score={STORY_PATH}")


def test_a_file_gets_no_progress(tmp_path, capsys):
    train_and_score(tmp_path)
    out, err = capsys.readouterr()
    assert "\r" not in out + err


def test_a_terminal_gets_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", FakeTerminal())
    train_and_score(tmp_path)
    shown = sys.stderr.getvalue()
    assert "21,408 tokens\r" in shown
    assert "21,407 of 21,407 tokens\r" in shown


@pytest.fixture
def printed(tmp_path, capsys):
    """Returns the last two lines of a run in a folder with a space in its name."""
    train_in(tmp_path / "two words", f"{BYTES} --max_iters=0")
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert "two words" in lines[0] and "two words" in lines[1]
    return lines


def test_printed_commands_have_no_single_quotes(printed):
    """cmd.exe on Windows knows double quotes only."""
    assert "'" not in "".join(printed)


def test_the_last_line_of_a_run_can_be_pasted(printed, capsys):
    following, python, script, *flags = shlex.split(printed[1])
    assert (following, python) == ("next:", "python")
    assert script == os.path.join(HERE, "sample.py")
    main("sample.py", *flags, "--device=cpu", "--max_new_tokens=0")
    assert capsys.readouterr().out == "Every effort moves you\n"


def test_the_line_that_says_how_to_resume_can_be_pasted(printed, tmp_path):
    line = printed[0].removesuffix(" continues")
    python, script, *flags = shlex.split(line.replace("=N", "=1"))
    assert (python, script) == ("python", os.path.join(HERE, "train.py"))
    main("train.py", *flags)
    assert column(tmp_path / "two words", "iter") == [0, 1]


# ---- The texts of a run --------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    """Returns a folder with t.txt, v.txt, and `out`, a run of no steps on the two."""
    train_path = write(tmp_path / "t.txt", STORY[:9000])
    val_path = write(tmp_path / "v.txt", STORY[9000:12000])
    flags = f"--data={train_path} --val_data={val_path} {BYTES} --max_iters=0"
    train_in(tmp_path / "out", flags)
    return tmp_path


@pytest.mark.parametrize("name, text", (
    pytest.param("train_loss", STORY[:9000], id="trains on all of one"),
    pytest.param("val_loss", STORY[9000:12000], id="validates on all of the other"),
))
def test_a_run_with_two_texts(texts, name, text):
    expected = loss_by_hand(texts / "out", text)
    assert column(texts / "out", name)[-1] == pytest.approx(expected, abs=1e-5)


def test_a_run_continues_without_its_texts(texts):
    (texts / "t.txt").unlink()
    (texts / "v.txt").unlink()
    train_in(texts / "out", "--resume --max_iters=1")
    assert load(texts / "out")[1]["step"] == 1


def test_a_run_without_its_text_and_its_tokens_is_refused(texts):
    (texts / "t.txt").unlink()
    (texts / "out" / "data.bin").unlink()
    refused("t.txt cannot be read; give a", train_in, texts / "out", "--resume")


def test_another_text_in_the_place_of_a_text_is_refused(texts):
    os.replace(texts / "t.txt", texts / "v.txt")
    (texts / "out" / "val_data.bin").unlink()
    words = "v.txt is not this run's text"
    refused(words, train_in, texts / "out", "--resume")


def test_another_text_that_is_typed_is_said_and_taken(texts, capsys):
    path = write(texts / "new.txt", STORY[:5000])
    train_in(texts / "out", f"--resume --max_iters=1 --data={path}")
    said = capsys.readouterr().out
    assert re.search(r"from step 0 on: .*data \S+new.txt instead of \S+t.txt", said)
    tokens = np.fromfile(texts / "out" / "data.bin", np.uint16)
    assert tokens.tolist() == gpt.encode(STORY[:5000], 257)
    path.unlink()
    train_in(texts / "out", "--resume")  # its tokens are those of the run now


@pytest.mark.parametrize("seconds, text", (
    pytest.param(60, STORY[:9000], id="a later date"),
    pytest.param(-60, STORY[:9000], id="an earlier date"),
    pytest.param(0, "Something else.", id="another size"),
))
def test_an_edited_text_is_said_and_changes_nothing(texts, capsys, seconds, text):
    assert "has changed" not in capsys.readouterr().out
    date = (texts / "t.txt").stat().st_mtime + seconds
    path = write(texts / "t.txt", text)
    os.utime(path, (date, date))
    before = (texts / "out" / "data.bin").read_bytes()
    train_in(texts / "out", "--resume --max_iters=1")
    said = capsys.readouterr().out
    words = r"t.txt has changed; the run continues with the tokens in \S*data.bin\n"
    assert re.search(words, said)
    assert "v.txt has changed" not in said
    assert (texts / "out" / "data.bin").read_bytes() == before


def test_another_spelling_of_a_path_is_no_change(texts, monkeypatch, capsys):
    monkeypatch.chdir(texts)
    train_in(texts / "out", "--resume --data=./t.txt")
    assert "from step 0 on: the same flags\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags", (
    pytest.param("--data=a.txt --val_data=./a.txt", id="the text itself"),
    pytest.param("--data=. --val_data=b.txt", id="a file of its folder"),
    pytest.param("--data=b.txt --val_data=.", id="the folder it is in"),
    pytest.param("--data=a.txt --val_data=link.txt", id="a link", marks=posix),
    pytest.param("--data=a.txt --val_data=links", id="a folder of links", marks=posix),
))
def test_a_text_that_is_trained_on_does_not_validate(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name, STORY[:3000])
    if "link" in flags:
        os.mkdir("links")
        os.symlink("a.txt", "link.txt")
        os.symlink(tmp_path / "a.txt", "links/c.txt")
    words = "--val_data=.* is part of --data; validate on another text"
    refused(words, train_in, "out", f"{flags} {BYTES}")


def test_a_folder_is_the_text_of_its_files_in_order(tmp_path):
    write(tmp_path / "b.TXT", "two " * 349)
    write(tmp_path / "a.txt", "one " * 350)
    write(tmp_path / "c.md", "no text")
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "data.bin"
    path.write_bytes(b"\1" * 4000)  # of an earlier run: a new one does not trust it
    train_in(path.parent, f"--data={tmp_path} --max_iters=0")
    expected = gpt.encode("one " * 350 + "<|endoftext|>" + "two " * 349)
    assert np.fromfile(path, np.uint16).tolist() == expected


@pytest.fixture(scope="session")
def bytes_run(tmp_path_factory):
    """Returns the folder of a run of two steps whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    train_in(folder, f"{BYTES} --max_iters=2")
    return folder


@pytest.fixture
def copy(bytes_run, tmp_path):
    """Returns a copy of that folder, which a test may change."""
    return shutil.copytree(bytes_run, tmp_path / "copy")


@pytest.mark.parametrize("damage", (
    pytest.param(slice(0), id="empty"),
    pytest.param(slice(-2), id="a token less"),
    pytest.param(slice(-1), id="half a token less"),
    pytest.param(slice(2, None), id="without the first token"),
))
def test_damaged_tokens_are_refused_and_made_again(copy, damage):
    """They would give other windows, without a word."""
    path = copy / "data.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[damage])
    words = "its tokens in .*data.bin are damaged|data.bin holds no uint16 tokens"
    refused(words, train_in, copy, "--resume")
    path.unlink()
    train_in(copy, "--resume")
    assert path.read_bytes() == whole


def test_a_changed_token_is_refused(copy):
    tokens = np.memmap(copy / "data.bin", np.uint16, "r+")
    tokens[1000] += 1
    tokens.flush()
    refused("its tokens in .*data.bin are damaged", train_in, copy, "--resume")


# ---- Flags that may change, and flags that may not -----------------------------------


@pytest.mark.parametrize("flags, words", (
    pytest.param("", "copy.ckpt.pt holds a run: give --resume, another --out_dir, or",
                 id="a new run in its place"),
    pytest.param("--vocab_size=1025", "copy.ckpt.pt holds a run",
                 id="a new run with other tokens"),
    pytest.param("--resume --n_embd=32", "--n_embd=32 does not fit the weights: 16",
                 id="more channels"),
    pytest.param("--resume --vocab_size=1025", "--vocab_size=1025 does not fit .*: 257",
                 id="other tokens"),
))
def test_a_run_is_not_changed_by_accident(copy, flags, words):
    before = (copy / "ckpt.pt").read_bytes()
    refused(words, train_in, copy, f"{flags} --max_iters=3")
    assert (copy / "ckpt.pt").read_bytes() == before


def test_a_finished_run_stays_as_it_is(bytes_run, copy, capsys):
    train_in(copy, "--resume")
    assert "from step 2 on: the same flags\n" in capsys.readouterr().out
    same_run(bytes_run, copy)


CHANGES = {
    "max_iters": 3,
    "learning_rate": 0.0002,
    "min_lr": 1e-6,
    "warmup_iters": 1,
    "batch_size": 3,
    "block_size": 16,
    "dropout": 0.2,
    "seed": 7,
    "weight_decay": 0.5,
    "beta1": 0.6,
    "beta2": 0.7,
    "grad_clip": 0.5,
    "eval_windows": 3,
    "dtype": "bfloat16",
}
CHANGED = "--resume " + " ".join(f"--{name}={CHANGES[name]}" for name in CHANGES)


def test_every_other_flag_may_change_and_is_said(copy, capsys):
    before = load(copy)[1]["args"] | {"min_lr": "its default"}
    train_in(copy, CHANGED)
    said = re.search("from step 2 on: (.*)", capsys.readouterr().out)[1]
    expected = [f"{name} {CHANGES[name]} instead of {before[name]}" for name in CHANGES]
    assert sorted(said.split(", ")) == sorted(expected)
    after = load(copy)[1]["args"]
    assert after == after | CHANGES


def test_changed_flags_arrive(copy):
    names = train_in(copy, CHANGED)
    decayed, others = names["optimizer"].param_groups
    assert decayed["betas"] == others["betas"] == (0.6, 0.7)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0)
    assert names["model"].config.dropout == 0.2
    assert names["model"].config.block_size == 32  # the other positions stay
    assert names["get_lr"](0) == 0.0002
    assert names["get_lr"](3) == 1e-6
    assert names["dtype"] == torch.bfloat16
    starts = names["eval_starts"](names["val_tokens"])
    assert len(starts) == 3
    assert column(copy, "tokens") == [0, 64, 128, 128 + 3 * 16]


def test_what_is_not_typed_is_computed_anew_at_each_start(tmp_path):
    train_in(tmp_path, f"{BYTES} --max_iters=1 --dtype=auto")
    names = train_in(tmp_path, "--resume --max_iters=16 --learning_rate=0.003")
    assert names["min_lr"] == pytest.approx(0.0003)
    assert names["lr_decay_iters"] == 16
    assert names["eval_interval"] == 3
    saved = load(tmp_path)[1]["args"]
    assert saved["dtype"] == "auto"
    for name in ("min_lr", "lr_decay_iters", "eval_interval"):
        assert saved[name] is None


def test_a_run_of_no_steps_continues_as_if_it_had_been_one_run(tmp_path):
    """Its rates follow the longer decay; without one they would all be min_lr."""
    train_in(tmp_path / "a", f"{BYTES} --eval_interval=9 --max_iters=4")
    train_in(tmp_path / "b", f"{BYTES} --eval_interval=9 --max_iters=0")
    train_in(tmp_path / "b", "--resume --max_iters=4")
    rates = [4e-4 / 3, 8e-4 / 3, 4e-4, 4e-4]
    assert column(tmp_path / "b", "lr") == pytest.approx(rates)
    same_run(tmp_path / "a", tmp_path / "b")


# ---- Vocabularies --------------------------------------------------------------------


@pytest.fixture(scope="session", params=(257, 1025))
def vocabulary_run(request, tmp_path_factory):
    """Returns a vocabulary's size, and the folder of a run with it that was resumed."""
    folder = tmp_path_factory.mktemp("vocabulary")
    train_in(folder, f"--vocab_size={request.param} --max_iters=1")
    train_in(folder, "--resume --max_iters=2")
    return request.param, folder


def test_a_small_vocabulary_is_trained(vocabulary_run):
    vocab_size, folder = vocabulary_run
    assert load(folder)[0].config.vocab_size == vocab_size
    tokens = np.fromfile(folder / "data.bin", np.uint16).tolist()
    assert max(tokens) < vocab_size
    assert gpt.get_tokenizer(vocab_size).decode(tokens) == STORY
    first_loss = column(folder, "val_loss")[0]
    assert first_loss == pytest.approx(math.log(vocab_size), abs=0.1)


def test_a_small_vocabulary_is_written(vocabulary_run, capsys):
    vocab_size, folder = vocabulary_run
    names = main("sample.py", f"--checkpoint={folder}", "--device=cpu", "--start=Ivy",
                 "--max_new_tokens=9", "--no-stop")
    assert len(names["texts"][0]) == 9
    text = gpt.get_tokenizer(vocab_size).decode(names["texts"][0])
    assert capsys.readouterr().out == f"Ivy{text}\n"


def test_a_small_vocabulary_has_its_end_of_text(vocabulary_run, monkeypatch, capsys):
    vocab_size, folder = vocabulary_run

    def generate(*_, **__):
        return [torch.tensor([vocab_size - 1])]

    monkeypatch.setattr(gpt, "generate", generate)
    main("sample.py", f"--checkpoint={folder}", "--device=cpu", "--no-stop")
    assert capsys.readouterr().out == "<|endoftext|>\n"


def test_a_small_vocabulary_is_scored(vocabulary_run, capsys):
    vocab_size, folder = vocabulary_run
    train_and_validate = np.fromfile(folder / "data.bin", np.uint16).tolist()
    numbers, _ = scored(capsys, folder, STORY_PATH)
    n_bytes = count_bytes(train_and_validate[1:], vocab_size)
    assert numbers[:2] == [len(train_and_validate) - 1, n_bytes]
    assert numbers[2] == pytest.approx(math.log(vocab_size), abs=0.1)


@pytest.mark.parametrize("vocab_size", (256, 50258))
def test_a_checkpoint_with_a_vocabulary_out_of_range_is_refused(tmp_path, vocab_size):
    path = random_checkpoint(tmp_path / "x.pt", vocab_size)
    words = f"x.pt cannot be .*its vocab_size is {vocab_size}, not 257 to 50257"
    refused(words, load, path)


def test_a_bin_file_of_bytes_suits_a_vocabulary_of_bytes(tmp_path):
    """Without merges a text has no id of 256 and more."""
    tokens = np.array(gpt.encode(STORY, 257), np.uint16)
    tokens.tofile(tmp_path / "x.bin")
    out = tmp_path / "out"
    names = train_in(out, f"--data={tmp_path / 'x.bin'} {BYTES} --max_iters=0")
    parts = (names["train_tokens"], names["val_tokens"])
    assert np.concatenate(parts).tolist() == tokens.tolist()
    assert not (out / "data.bin").exists()  # a copy would only take space


# ---- Starting from a checkpoint ------------------------------------------------------


def tuned(folder, flags):
    """Starts a run in `out` from x.pt in this folder; returns its global names."""
    first = f"--init_from={folder / 'x.pt'} --device=cpu --eval_windows=7"
    intervals = "--eval_interval=9 --log_interval=1"
    return train_in(folder / "out", f"{first} {intervals} {flags}")


@pytest.fixture
def x_pt(tmp_path):
    """Returns the path of a checkpoint, x.pt."""
    return random_checkpoint(tmp_path / "x.pt")


@pytest.fixture
def foreign(tmp_path):
    """Writes x.pt as another program might, and returns its model.

    It has unknown keys, and a parameter in 16 bits.
    """
    model = tiny(vocab_size=1025, block_size=32, dropout=0.3)
    weights = model.state_dict()
    weights["ln_f.bias"] = model.ln_f.bias.bfloat16()
    model.ln_f.bias.copy_(model.ln_f.bias.bfloat16())
    others = {"step": 9, "scaler": {}, "args": {"seed": 3}, "best_val_loss": 9.5}
    torch.save(others | {"config": vars(model.config), "model": weights},
               tmp_path / "x.pt")
    return model


def test_fine_tuning_starts_from_the_weights_of_another_program(foreign, tmp_path):
    names = tuned(tmp_path, "--max_iters=0 --dtype=float32")
    model, state = load(tmp_path / "out")
    same(model, foreign)
    assert state["step"] == 0
    assert state["args"]["seed"] == 1337
    assert model.config == dataclasses.replace(foreign.config, dropout=0.1)
    assert names["T"] == 32  # as many as the model's positions


def test_fine_tuning_reads_256_tokens_where_the_model_has_more_positions(tmp_path):
    random_checkpoint(tmp_path / "x.pt", block_size=300)
    names = tuned(tmp_path, "--max_iters=0")
    assert names["T"] == 256
    assert names["model"].config.block_size == 300


def test_sampling_from_a_checkpoint_of_another_program(foreign, tmp_path):
    names = main("sample.py", f"--checkpoint={tmp_path / 'x.pt'}", "--start=Ivy",
                 "--temperature=0", "--max_new_tokens=5", *SMALL[-2:])
    idx = torch.tensor([gpt.encode("Ivy", 1025)])
    expected = generated(foreign, idx, 5, temperature=0)
    assert names["texts"] == expected.tolist()


def test_float32_leaves_the_weights_of_a_checkpoint_alone(x_pt, tmp_path, capsys):
    tuned(tmp_path, "--max_iters=0 --dtype=float32")
    assert "moved" not in capsys.readouterr().out
    same(load(tmp_path / "out")[0], load(x_pt)[0])


def test_16_bits_center_the_logits_of_a_checkpoint_and_say_so(x_pt, tmp_path, capsys):
    tuned(tmp_path, "--max_iters=0 --dtype=bfloat16")
    said = "x.pt: its logits are moved to around 0, for torch.bfloat16\n"
    assert said in capsys.readouterr().out
    expected, _ = load(x_pt)
    gpt.center_logits(expected)
    same(load(tmp_path / "out")[0], expected)


def test_16_bits_leave_a_run_that_continues_alone(x_pt, tmp_path, capsys):
    tuned(tmp_path, "--max_iters=0 --dtype=float32")
    train_in(tmp_path / "out", "--resume --dtype=bfloat16")
    assert "moved" not in capsys.readouterr().out
    same(load(tmp_path / "out")[0], load(x_pt)[0])


def positions_after(folder, flags):
    """Trains in windows of 16; returns x.pt's position embeddings, before and after."""
    names = tuned(folder, f"--block_size=16 --max_iters=3 --dtype=float32 {flags}")
    assert names["T"] == 16
    return [load(folder / name)[0].wpe.weight for name in ("x.pt", "out")]


def test_positions_that_no_window_has_stay_to_the_bit(x_pt, tmp_path):
    """They get no gradient, so AdamW does not move them, and they do not decay."""
    before, after = positions_after(tmp_path, "--weight_decay=0.5 --learning_rate=0.01")
    same(after[16:], before[16:])
    assert (after != before)[:16].all()


def test_a_run_with_shorter_windows_continues_with_them(x_pt, tmp_path):
    tuned(tmp_path, "--block_size=16 --max_iters=1")
    names = train_in(tmp_path / "out", "--resume --max_iters=2")
    assert names["T"] == 16
    assert column(tmp_path / "out", "tokens") == [0, 32, 64]


# ---- sample.py: the score of a text --------------------------------------------------


def scored(capsys, checkpoint, path, *flags):
    """Returns the five numbers that --score prints, and the name of the dtype."""
    capsys.readouterr()
    main("sample.py", f"--checkpoint={checkpoint}", f"--score={path}", "--device=cpu",
         *flags)
    out = capsys.readouterr().out.replace(",", "")
    numbers = re.findall(r" (\d[\d.]*)", out.removeprefix(f"{path}:"))
    return [float(number) for number in numbers], re.search(r"torch\.(\w+);", out)[1]


def score_by_hand(model, ids):
    """Returns the losses of ids[1:], from windows that begin at multiples of 8."""
    losses = []
    for i in range(1, len(ids)):
        start = max(0, (i - 1) // 8 * 8 - 8)
        rows = torch.tensor([ids[start : i + 1]])
        loss = losses_by_hand(model, rows)[0, -1]
        losses.append(loss.item())
    return losses


def test_score_prints_what_each_token_costs(tmp_path, capsys):
    checkpoint = random_checkpoint(tmp_path / "x.pt", block_size=16)
    ids = gpt.encode(STORY, 1025)[:60]
    path = write(tmp_path / "x.txt", gpt.get_tokenizer(1025).decode(ids))
    numbers, _ = scored(capsys, checkpoint, path)
    losses = score_by_hand(load(checkpoint)[0], ids)
    loss = np.mean(losses)
    n_bytes = count_bytes(ids[1:], 1025)
    bits = sum(losses) / math.log(2)
    expected = (59, n_bytes, loss, math.exp(loss), bits / n_bytes)
    assert numbers == pytest.approx(expected, rel=1e-4)


def test_score_of_a_folder_counts_the_bytes_of_its_texts(tmp_path, capsys):
    """Between its short texts stands <|endoftext|>, which is predicted, but no text."""
    checkpoint = random_checkpoint(tmp_path / "x.pt", block_size=16)
    days = [f"Day {i}" for i in range(10, 50)]
    for day in days:
        write(tmp_path / f"{day}.txt", day)
    numbers, _ = scored(capsys, checkpoint, tmp_path)
    ids = gpt.encode("<|endoftext|>".join(days), 1025)
    losses = score_by_hand(load(checkpoint)[0], ids)
    n_bytes = len("".join(days)) - count_bytes(ids[:1], 1025)
    assert numbers[:2] == [len(ids) - 1, n_bytes]
    bits = sum(losses) / math.log(2)
    assert numbers[4] == pytest.approx(bits / n_bytes, rel=1e-4)


def fast_in_bfloat16():
    """Stands in for what PyTorch says about this CPU."""
    return {"amx_bf16": True}


@pytest.mark.parametrize("flags, dtype", (
    pytest.param((), "float32", id="not typed"),
    pytest.param(("--dtype=auto",), "bfloat16", id="auto"),
    pytest.param(("--dtype=bfloat16",), "bfloat16", id="typed"),
))
def test_score_is_exact_unless_a_dtype_is_typed(
        x_pt, tmp_path, capsys, monkeypatch, flags, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", fast_in_bfloat16, raising=False)
    path = write(tmp_path / "x.txt", "A clock.")
    _, said = scored(capsys, x_pt, path, *flags)
    assert said == dtype


# ---- sample.py: writing --------------------------------------------------------------


def written(path, *flags):
    """Runs sample.py on a checkpoint in float32; returns its global names."""
    return main("sample.py", f"--checkpoint={path}", *SMALL[-2:], *flags)


def offset_checkpoint(path):
    """Writes a checkpoint in bfloat16 whose logits share an offset, as OpenAI's do."""
    model = tiny(vocab_size=257)
    model.wte.weight += 3.7
    model.wpe.weight -= 3.7
    gpt.save_checkpoint(str(path), model.bfloat16())
    return path


def test_16_bits_are_rounded_after_the_logits_are_centered(tmp_path):
    """A mean row that is computed in 16 bits would lose most of its digits."""
    path = offset_checkpoint(tmp_path / "x.pt")
    names = written(path, "--dtype=bfloat16", "--max_new_tokens=0")
    expected = load(path)[0].float()
    gpt.center_logits(expected)
    same(names["model"], expected.bfloat16())
    idx = torch.randint(257, (2, 16))
    same(names["model"](idx), expected(idx))


class BlockWithAngles(gpt.Block):
    """A fork's block, with a table of angles that 16 bits would spoil."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("angles", torch.arange(1000.0), persistent=False)


def test_a_forks_buffers_keep_their_32_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(gpt, "Block", BlockWithAngles)
    path = offset_checkpoint(tmp_path / "x.pt")
    model = written(path, "--dtype=bfloat16", "--max_new_tokens=0")["model"]
    assert model.wte.weight.dtype == torch.bfloat16
    same(model.h[0].angles, torch.arange(1000.0))


def test_float32_is_not_centered(tmp_path):
    path = offset_checkpoint(tmp_path / "x.pt")
    names = written(path, "--max_new_tokens=0")
    same(names["model"], load(path)[0].float())


def line_of_show(model, ids, token, n):
    """Returns what --show=n prints after these ids, where `token` was drawn."""
    logits = model(torch.tensor([ids]))[0, -1]
    probs = logits.softmax(dim=-1)
    words = [""]
    for place, i in enumerate(probs.argsort(descending=True).tolist()):
        text = gpt.get_tokenizer(1025).decode([i])
        if i == token:
            words.append(f"[{text!r} {probs[i]:.1%}]")
        elif place < n:
            words.append(f"{text!r} {probs[i]:.1%}")
    return "  ".join(words)


@pytest.mark.parametrize("flags", (
    pytest.param(("--top_k=9", "--top_p=0.9", "--temperature=2"), id="drawn"),
    pytest.param(("--temperature=0",), id="greedy"),
))
def test_show_prints_the_models_own_probabilities(x_pt, capsys, flags):
    names = written(x_pt, "--start=Ivy", "--show=2", "--num_samples=2",
                    "--max_new_tokens=9", *flags)
    lines = re.findall("^  .*", capsys.readouterr().err, re.MULTILINE)
    assert len(lines) == 9
    model, _ = load(x_pt)
    ids = gpt.encode("Ivy", 1025)
    for line, token in zip(lines, names["texts"][0]):
        assert line == line_of_show(model, ids, token, 2)
        ids.append(token)


def test_show_ends_with_the_first_text(bytes_run, monkeypatch, capsys):
    def generate(*_, observe, **__):
        probs = torch.full((2, 257), 1 / 257)
        ids = torch.arange(257).expand(2, 257)
        for token in (torch.tensor([256, 65]), torch.tensor([256, 66])):
            observe(probs, ids, token)
            yield token

    monkeypatch.setattr(gpt, "generate", generate)
    written(bytes_run, "--show=1", "--num_samples=2")
    lines = re.findall("^  .*", capsys.readouterr().err, re.MULTILINE)
    assert lines == ["  '!' 0.4%  ['<|endoftext|>' 0.4%]"]


@pytest.mark.parametrize("content, text, warnings", (
    pytest.param(b"\xef\xbb\xbfIvy\r\n", "Ivy", [], id="of an editor on Windows"),
    pytest.param(b"Ivy\n\n", "Ivy\n", ["white space"], id="with an empty line"),
    pytest.param(b"Ivy ", "Ivy ", ["white space"], id="with a space at its end"),
    pytest.param(b"x" + b" y" * 40, "x" + " y" * 40, ["last 32"], id="a long one"),
))
def test_a_prompt_that_is_a_file(
        sample, tmp_path, monkeypatch, content, text, warnings):
    """GPT-2's tokens begin with their space. The last line end of a file is dropped."""
    for variable in ("HOME", "USERPROFILE"):  # Windows has the second one
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "p.txt").write_bytes(content)
    out, err = sample("--start=FILE:~/p.txt", "--max_new_tokens=0")
    assert out == text + "\n"
    assert re.findall("white space|last 32", err) == warnings


def test_a_prompt_from_standard_input(sample, monkeypatch):
    """`echo` ends its text with a line end, which is dropped."""
    echoed = io.TextIOWrapper(io.BytesIO(b"Ivy\n"))
    monkeypatch.setattr(sys, "stdin", echoed)
    out, err = sample("--start=-", "--max_new_tokens=0")
    assert out == "Ivy\n"
    assert "white space" not in err


def test_several_samples_are_separated_by_a_line(sample):
    out, _ = sample("--start=Ivy", "--num_samples=3", "--max_new_tokens=0")
    assert out == "Ivy\n" + 2 * ("-" * 80 + "\nIvy\n")


def test_samples_differ_and_follow_from_the_seed(x_pt):
    flags = ("--num_samples=2", "--max_new_tokens=20", "--no-stop")
    texts = written(x_pt, "--seed=1", *flags)["texts"]
    again = written(x_pt, "--seed=1", *flags)["texts"]
    others = written(x_pt, "--seed=2", *flags)["texts"]
    assert texts == again
    assert texts[0] != texts[1]
    assert texts[0] != others[0]


def test_num_beams_writes_what_beam_search_finds(x_pt, capsys):
    flags = ("--num_beams=3", "--max_new_tokens=5", "--no-stop")
    written(x_pt, "--start=Ivy", *flags)
    idx = torch.tensor([gpt.encode("Ivy", 1025)])
    found = gpt.beam_search(load(x_pt)[0], idx, 5, 3)
    text = gpt.get_tokenizer(1025).decode(found.tolist())
    assert capsys.readouterr().out == f"Ivy{text}\n"


@pytest.fixture
def given(monkeypatch):
    """Returns a dict of what sample.py gives to generate, which writes nothing."""
    arguments = {}

    def generate(model, idx, n, generator, **options):
        arguments.update(options, rows=idx.tolist(), n=n)
        arguments["seed"] = generator.initial_seed()
        return []

    monkeypatch.setattr(gpt, "generate", generate)
    return arguments


def test_the_defaults_of_sample_arrive(sample, given):
    sample()
    assert given == {
        "rows": [[50256]],  # <|endoftext|> stands before each text
        "n": 200,
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 1,
        "stop_token": 50256,
        "seed": 1337,
        "observe": None,
    }


@pytest.mark.parametrize("flag, name, value", (
    pytest.param("--start=Ivy", "rows", [[40, 7670]], id="start"),
    pytest.param("--num_samples=2", "rows", [[50256], [50256]], id="num_samples"),
    pytest.param("--max_new_tokens=9", "n", 9, id="max_new_tokens"),
    pytest.param("--temperature=2", "temperature", 2, id="temperature"),
    pytest.param("--top_k=7", "top_k", 7, id="top_k"),
    pytest.param("--top_p=0.3", "top_p", 0.3, id="top_p"),
    pytest.param("--seed=5", "seed", 5, id="seed"),
    pytest.param("--no-stop", "stop_token", None, id="no-stop"),
))
def test_the_flags_of_sample_arrive(sample, given, flag, name, value):
    sample(flag)
    assert given[name] == value


@pytest.mark.parametrize("flags, stop_token", (
    pytest.param("", 50256, id="stop"),
    pytest.param("--no-stop", None, id="no-stop"),
))
def test_the_flags_of_beam_search_arrive(sample, monkeypatch, flags, stop_token):
    given = []

    def beam_search(model, idx, *arguments):
        given.extend(arguments)
        return idx[0, :0]

    monkeypatch.setattr(gpt, "beam_search", beam_search)
    sample("--num_beams=3", "--max_new_tokens=9", *flags.split())
    assert given == [9, 3, stop_token]


@pytest.mark.parametrize("flag, mark, n_tokens", (
    pytest.param("--stop", "", 9, id="stop"),
    pytest.param("--no-stop", "<|endoftext|>", 10, id="no-stop"),
))
def test_texts_are_streamed_in_whole_characters(
        sample, monkeypatch, capsys, flag, mark, n_tokens):
    first = gpt.encode(" a🙂<|endoftext|><|endoftext|>")
    second = gpt.encode(" x y z u<|endoftext|>")
    seen = []

    def generate(*_, **__):
        for tokens in zip(first, second, strict=True):
            yield torch.tensor(tokens)
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(gpt, "generate", generate)
    rest, err = sample("--num_samples=2", flag)
    # The smiley is made of two tokens. The second text comes after the first one.
    assert seen == [" a", "", "🙂", mark, mark]
    assert rest == f"\n{'-' * 80}\n x y z u{mark}\n"
    assert err.startswith(f"{n_tokens} tokens in ")


def test_a_folder_stands_for_its_last_checkpoint(bytes_run, capsys):
    written(bytes_run, "--max_new_tokens=0", "--start=Ivy")
    out, err = capsys.readouterr()
    assert out == "Ivy\n"
    assert re.match(r"\S*ckpt.pt: step 2, cpu, torch.float32\n", err)


# ---- Faults --------------------------------------------------------------------------


FILES = {
    "empty.txt": b"",
    "letter.txt": b"x",
    "short.txt": b"Only a few words here. " * 20,
    "latin.txt": b"caf\xe9 " * 9,
    "utf16.txt": "I".encode("utf-16"),
    "bare.txt": "I".encode("utf-16-le"),
    "nul.txt": b"\xef\xbb\xbf" + b"x\n" * 2**20 + b"\0",
    "empty.bin": b"",
    "odd.bin": b"abc",
    "high.bin": np.uint16([1, 2, 50257]).tobytes(),
    "x32.bin": np.uint32([464, 11, 50256, 7, 8]).tobytes(),
    "chars.bin": np.arange(65, dtype=np.uint16).tobytes(),
    "words.bin": np.uint16([464, 11, 262]).tobytes(),
    "page.pt": b"<html>",
}
TRAIN_FAULTS = {
    "no text": ("--data=empty.txt", "empty.txt: there is no text in it"),
    "a folder without texts": ("--data=empty", "empty cannot be read; give a text"),
    "a text that is gone": ("--data=gone.txt", "gone.txt cannot be read; give a text"),
    "Latin-1": ("--data=latin.txt", "latin.txt: byte 3 is not UTF-8 text; save it as UTF-8"),
    "UTF-16": ("--data=utf16.txt", "utf16.txt: byte 0 is not UTF-8"),
    "UTF-16 without its mark": ("--data=bare.txt", "bare.txt: byte 1 is not UTF-8"),
    "0 in a later part": ("--data=nul.txt", f"nul.txt: byte {2**21 + 3} is not UTF-8"),
    "no tokens": ("--data=empty.bin", "empty.bin holds no uint16 tokens"),
    "half a token": ("--data=odd.bin", "odd.bin holds no uint16 tokens"),
    "tokens of 32 bits": ("--data=x32.bin", "x32.bin holds .*its integers are wider"),
    "an id too high": ("--data=high.bin", "its ids are not those of the 50257 tokens"),
    "ids of characters": ("--data=chars.bin", "its ids are not those of the 50257 tokens"),
    "other ids": ("--data=words.bin --vocab_size=300", "its ids are not those of the 300 tokens"),
    "out_dir is a file": ("--out_dir=page.pt", "--out_dir=page.pt is not writable"),
    "nothing to resume": ("--resume", "ckpt.pt cannot be read as a checkpoint.*No such file"),
    "no checkpoint": ("--init_from=gone.pt", "gone.pt cannot be read as a checkpoint"),
    "a folder": ("--init_from=empty", "empty cannot be read as a checkpoint"),
    "a page of the web": ("--init_from=page.pt", "page.pt cannot be read as a check"),
    "no biases": ("--init_from=bias.pt", "bias.pt cannot be read .*'bias'"),
    "a vocabulary of 61": ("--init_from=vocab.pt", "its vocab_size is 61, not 257 to"),
    "other tokens": ("--init_from=x.pt --vocab_size=258", "=258 does .* weights: 257"),
    "another layer": ("--init_from=x.pt --n_layer=3", "--n_layer=3 does .* weights: 2"),
    "too long windows": ("--init_from=x.pt --block_size=33", "=33: the model has 32"),
    "wrong heads": ("--n_head=3", "--n_embd=16 is not a multiple of --n_head=3"),
    "no such GPU": ("--device=cuda:99", "--device=cuda:99 cannot be used"),
    "no such device": ("--device=gpu", "--device=gpu cannot be used"),
}
LATER_FAULTS = {
    "a text of one token": ("--data=letter.txt", "the 1 tokens to .* allow at most 0$"),
    "a short text": ("--data=short.txt", "--block_size=32: the 13 .* at most 12$"),
    "nothing to validate on": ("--val_data=gone.txt", "gone.txt cannot be read"),
}
SAMPLE_FAULTS = {
    "no checkpoint": ("--checkpoint=gone.pt", "gone.pt cannot be read as .*; train.py and"),
    "an empty folder": ("--checkpoint=empty", "empty.ckpt.pt cannot be read as .*; train.py and"),
    "a vocabulary of 61": ("--checkpoint=vocab.pt", "its vocab_size is 61"),
    "beams and samples": ("--num_beams=2 --top_p=0.5 --num_samples=2",
                        "--num_beams excludes --num_samples and --show"),
    "beams past the end": (f"--num_beams=2 --start={'x' * 32} --max_new_tokens=1",
                           "--num_beams: .* exceed the model's 32"),
    "a score of nothing": ("--score=empty.txt", "empty.txt: 0 token.s., but scoring"),
    "a score of a token": ("--score=letter.txt", "letter.txt: 1 token.s., but scoring"),
    "no text to score": ("--score=gone.txt", "gone.txt cannot be read"),
    "no texts to score": ("--score=empty", "empty cannot be read; .*of .txt files"),
    "no prompt": ("--start=FILE:gone.txt", "gone.txt cannot be read"),
    "no prompts": ("--start=FILE:empty", "empty cannot be read; .*of .txt files"),
    "a prompt in Latin-1": ("--start=FILE:latin.txt", "latin.txt: byte 3 is not UTF-8"),
}
FLAG_FAULTS = {
    "train.py, misspelt": ("train.py --batchsize=2", "arguments: --batchsize=2"),
    "sample.py, misspelt": ("sample.py --topk=2", "arguments: --topk=2"),
    "load_gpt2.py, misspelt": ("load_gpt2.py 124M --to=x", "arguments: --to=x"),
    "an infinite rate": ("train.py --learning_rate=inf", "inf is not between"),
    "a rate of nothing": ("train.py --learning_rate=0", "0 is not between"),
    "dropout of all": ("train.py --dropout=1", "1 is not between 0 and 0.999"),
    "too few tokens": ("train.py --vocab_size=256", "256 is not between 257 and 50257"),
    "too many tokens": ("train.py --vocab_size=50258", "50258 is not between 257"),
    "a word": ("train.py --seed=x", "--seed: invalid number value: 'x'"),
    "a negative temperature": ("sample.py --temperature=-1", "-1 is not between"),
    "a temperature of nan": ("sample.py --temperature=nan", "nan is not between"),
    "a negative top_k": ("sample.py --top_k=-1", "-1 is not between"),
    "a top_p of nothing": ("sample.py --top_p=0", "0 is not between"),
}


def cases(faults):
    """Returns the cases of a table {name: (flags, words)}, for parametrize."""
    return [pytest.param(*faults[name], id=name) for name in faults]


@pytest.fixture(scope="session")
def faulty_folder(tmp_path_factory):
    """Returns a folder of FILES, three checkpoints, and an empty folder."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "empty").mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    random_checkpoint(folder / "x.pt", 257)
    random_checkpoint(folder / "vocab.pt", 61)
    config = vars(GPTConfig()) | {"bias": False}
    torch.save({"config": config, "model": {}}, folder / "bias.pt")
    return folder


@pytest.fixture
def faulty(faulty_folder, monkeypatch):
    """Enters that folder, and sees afterwards that nothing was left in it."""
    before = sorted(faulty_folder.rglob("*"))
    monkeypatch.chdir(faulty_folder)
    yield
    assert sorted(faulty_folder.rglob("*")) == before


@pytest.mark.parametrize("flags, words", cases(TRAIN_FAULTS))
def test_a_fault_of_train_gets_a_line_and_leaves_a_lock(faulty, tmp_path, flags, words):
    refused(words, train_in, tmp_path / "out", flags)
    left = {path.name for path in tmp_path.glob("out/*")}
    assert left <= {"lock"}


@pytest.mark.parametrize("flags, words", cases(LATER_FAULTS))
def test_a_later_fault_leaves_the_tokens_too(faulty, tmp_path, flags, words):
    refused(words, train_in, tmp_path / "out", flags)
    left = {path.name for path in tmp_path.glob("out/*")}
    assert left == {"lock", "data.bin"}


@pytest.mark.parametrize("flags, words", cases(SAMPLE_FAULTS))
def test_a_fault_of_sample_gets_a_line(faulty, flags, words):
    refused(words, main, "sample.py", "--checkpoint=x.pt", *flags.split())


@pytest.mark.parametrize("line, words", cases(FLAG_FAULTS))
def test_a_flag_that_cannot_be_gets_a_line_and_a_hint(faulty, capsys, line, words):
    script, *flags = line.split()
    main(script, *flags, status=2)
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == f"usage: {script} [flags]; --help explains them"
    assert re.match(f"{script}: error: .*{words}", error)


def test_a_fault_in_a_process_is_one_line_on_standard_error(faulty_folder, tmp_path):
    path = faulty_folder / "empty.txt"
    out, err = end(start("train.py", f"--data={path}", cwd=tmp_path), status=2)
    assert out == ""
    words = "train.py: error: .*empty.txt: there is no text in it\n"
    assert re.fullmatch(words, err)


@pytest.mark.parametrize("script", ("train.py", "sample.py", "load_gpt2.py"))
def test_help_has_the_examples_of_the_docstring(capsys, script):
    main(script, "--help")
    out = capsys.readouterr().out
    docstring = pathlib.Path(HERE, script).read_text("utf-8").split('"""')[1]
    title, *lines = docstring.splitlines()
    assert title in out
    examples = [line for line in lines if line.startswith("    ")]
    assert len(examples) >= 3
    assert set(examples) <= set(out.splitlines())
    assert "None" not in out


# `main` collects garbage after each run. What is imported need not be searched for it.
gc.freeze()

# ---- Training: windows, batches, schedule --------------------------------------------

# Steps that move no weight.
STILL = "--learning_rate=1e-12 --weight_decay=0"
# With few tokens in the vocabulary, and evaluations at the start and at the end alone.
QUICK = ("--vocab_size=300", "--eval_interval=99")


def quick(folder, flags="", **status):
    """Runs train_in with QUICK and without drawing the picture, which takes longest."""
    continues = "--resume" in flags or "--init_from" in flags
    few = "" if continues else " ".join(QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", lambda *_: None)
        return train_in(folder, f"{few} {flags}", **status)


def write_ids(path, n):
    """Writes n token ids that the vocabulary of QUICK has; neighbours differ."""
    ids = np.arange(n) % 200 + 60
    ids.astype(np.uint16).tofile(path)


def functions(folder, n, flags=""):
    """Returns the names of a run on n tokens, of windows of 8 and without a step."""
    folder.mkdir(exist_ok=True)
    write_ids(folder / "text.bin", n)
    write_ids(folder / "other.bin", 9)
    texts = f"--data={folder / 'text.bin'} --val_data={folder / 'other.bin'}"
    return quick(folder, f"--max_iters=0 --block_size=8 {texts} {flags}")


@pytest.mark.parametrize("n, n_windows, n_offsets", [
    pytest.param(9, 1, 1, id="T + 1"),
    pytest.param(15, 1, 7, id="2 T - 1"),
    pytest.param(16, 1, 8, id="2 T"),
    pytest.param(17, 1, 8, id="2 T + 1"),
    pytest.param(23, 1, 8, id="3 T - 1"),
    pytest.param(24, 2, 8, id="3 T"),
    pytest.param(203, 24, 8, id="many T"),
])
def test_an_epochs_windows_lie_side_by_side(tmp_path, n, n_windows, n_offsets):
    """And each offset that leaves room for all of them is that of some epoch."""
    epoch_starts = functions(tmp_path, n)["epoch_starts"]
    offsets = set()
    for epoch in range(150):
        starts = sorted(epoch_starts(epoch).tolist())
        offset = starts[0]
        assert starts == [offset + 8 * i for i in range(n_windows)]
        assert starts[-1] + 8 < n  # where the last target stands
        offsets.add(offset)
    assert offsets == set(range(n_offsets))


def test_each_epoch_reads_its_windows_in_an_order_of_its_own(tmp_path):
    epoch_starts = functions(tmp_path, 203)["epoch_starts"]
    orders = set()
    for epoch in range(20):
        starts = epoch_starts(epoch)
        orders.add(tuple(starts - starts.min()))
    assert len(orders) == 20
    in_their_order = tuple(range(0, 192, 8))
    assert in_their_order not in orders


def test_windows_follow_from_seed_and_epoch(tmp_path):
    epochs = {}
    for name, seed in {"a": 5, "again": 5, "b": 6}.items():
        epoch_starts = functions(tmp_path / name, 203, f"--seed={seed}")["epoch_starts"]
        epochs[name] = [epoch_starts(epoch).tolist() for epoch in range(9)]
    assert epochs["a"] == epochs["again"]
    for of_a, of_b in zip(epochs["a"], epochs["b"]):
        assert of_a != of_b


def test_micro_batches_read_epoch_after_epoch(tmp_path):
    """Fifteen windows an epoch are no multiple of a batch of four."""
    flags = "--batch_size=4 --gradient_accumulation_steps=2"
    names = functions(tmp_path, 128, flags)
    read = []
    for step in range(6):
        for micro_step in range(2):
            read += names["train_starts"](step, micro_step)
    epochs = [names["epoch_starts"](epoch) for epoch in range(4)]
    assert read == np.concatenate(epochs).tolist()[:48]


def test_a_target_is_the_token_after_its_input(tmp_path):
    names = functions(tmp_path, 100)
    inputs, targets = names["get_batch"](names["train_tokens"], [3, 91])
    assert inputs[:, 0].tolist() == [63, 151]  # write_ids begins with 60
    for batch in (inputs, targets):
        assert batch.shape == (2, 8)
        assert (batch.diff() == 1).all()
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("n, n_evaluated, starts", [
    pytest.param(9, 40, [0], id="the shortest text"),
    pytest.param(96, 40, list(range(0, 88, 8)), id="one token short of a window more"),
    pytest.param(97, 40, list(range(0, 96, 8)), id="a text with all its windows"),
    pytest.param(97, 1, [0], id="one window"),
    pytest.param(97, 5, [0, 16, 32, 56, 72], id="windows spread over the text"),
])
def test_which_windows_are_evaluated(tmp_path, n, n_evaluated, starts):
    names = functions(tmp_path, n, f"--eval_windows={n_evaluated}")
    assert names["eval_starts"](names["train_tokens"]) == starts


def test_evaluations_read_the_same_windows_without_dropout(tmp_path):
    """The weights stay here, so the losses do too."""
    flags = "--max_iters=3 --eval_interval=1 --dropout=0.5 "
    quick(tmp_path, flags + STILL)
    for name in ("train_loss", "val_loss"):
        losses = column(tmp_path, name)
        assert losses == pytest.approx([losses[0]] * 4, abs=1e-6), name


@pytest.mark.parametrize("warmup, decay, expected", [
    pytest.param(0, 10, {0: 1, 5: 0.55}, id="no warm-up"),
    pytest.param(3, 13, {1: 2 / 3, 3: 1, 8: 0.55}, id="both"),
    pytest.param(10, 10, {0: 0.1, 9: 1}, id="warm-up alone"),
    pytest.param(20, 10, {0: 0.05, 9: 0.5}, id="a warm-up that is cut"),
    pytest.param(0, 0, {}, id="neither"),
    pytest.param(1, 1, {0: 1}, id="one step"),
])
def test_schedule(tmp_path, warmup, decay, expected):
    steps = f"--warmup_iters={warmup} --lr_decay_iters={decay}"
    names = functions(tmp_path, 99, f"{steps} --learning_rate=1 --min_lr=0.1")
    rates = [names["get_lr"](step) for step in range(30)]
    for step, rate in expected.items():
        assert rates[step] == pytest.approx(rate), step
    assert rates[decay:] == [0.1] * (30 - decay)  # a longer run stays there
    top = min(warmup, decay)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_the_rates_that_are_not_typed_follow_from_the_sizes(tmp_path):
    names = main("train.py", *SMALL, *QUICK, "--max_iters=0", f"--out_dir={tmp_path}")
    assert names["learning_rate"] == pytest.approx(4e-4 * 768 / 16)
    assert names["min_lr"] == pytest.approx(4e-5 * 768 / 16)


def test_a_longer_run_decays_until_its_new_end(tmp_path):
    flags = "--warmup_iters=0 --learning_rate=1e-3 --min_lr=0 "
    quick(tmp_path, flags + "--max_iters=2")
    quick(tmp_path, "--resume --max_iters=4")
    # Half of half a cosine until step 2, and from there the second half of one until 4.
    expected = [1e-3, 5e-4, 5e-4, 1.464466e-4]
    assert column(tmp_path, "lr") == pytest.approx(expected)


def test_a_typed_end_of_the_decay_stays_in_a_longer_run(tmp_path):
    flags = "--warmup_iters=0 --learning_rate=1e-3 --min_lr=0 "
    quick(tmp_path, flags + "--max_iters=1 --lr_decay_iters=2")
    quick(tmp_path, "--resume --max_iters=4")
    assert column(tmp_path, "lr") == pytest.approx([1e-3, 5e-4, 0, 0])


# ---- Training: gradients and the optimizer -------------------------------------------


@pytest.fixture
def scaler(monkeypatch):
    """Returns the options of the gradient scalers that train.py makes from now on.

    It makes them for float16. Here they work in float32 too, and with any first factor.
    """
    original = torch.amp.GradScaler
    options = {"enabled": True, "init_scale": 2.0**16}

    def make(*_, **__):
        return original("cpu", **options)

    monkeypatch.setattr(torch.amp, "GradScaler", make)
    return options


# Gradients far below AdamW's eps move nothing.
TINY_GRADIENTS = "--max_iters=4 --warmup_iters=0 --weight_decay=0 --grad_clip=1e-14 "


def test_gradients_are_unscaled_before_they_are_clipped(tmp_path, scaler):
    quick(tmp_path / "scaled", TINY_GRADIENTS)
    scaler["enabled"] = False
    quick(tmp_path / "plain", TINY_GRADIENTS)
    first, last = column(tmp_path / "plain", "val_loss")
    assert first == pytest.approx(last, abs=1e-4)
    for name in ("loss", "grad_norm", "val_loss"):
        plain = column(tmp_path / "plain", name)
        scaled = column(tmp_path / "scaled", name)
        assert scaled == pytest.approx(plain, rel=1e-4), name
        assert min(scaled) > 0.1, name


def test_float16_rounds_the_losses_a_little(tmp_path):
    losses = []
    for dtype in ("float16", "float32"):
        quick(tmp_path / dtype, TINY_GRADIENTS + f"--dtype={dtype}")
        losses.append(column(tmp_path / dtype, "val_loss")[0])
    half, full = losses
    assert 0 < abs(half - full) < 1e-3


def test_a_step_whose_gradients_overflow_is_left_out(tmp_path, scaler):
    scaler["init_scale"] = 2.0**127
    quick(tmp_path, "--max_iters=8")
    norms = column(tmp_path, "grad_norm")
    assert not math.isfinite(norms[0])
    assert math.isfinite(norms[-1])
    assert load(tmp_path)[1]["scaler"]["scale"] <= 2.0**125


def test_losses_on_another_text_are_not_compared_with_the_best(tmp_path):
    write_ids(tmp_path / "other.bin", 500)
    quick(tmp_path / "run", "--warmup_iters=0 --learning_rate=1 --max_iters=8")
    before = load(tmp_path / "run")[1]["best"]
    flags = f"--resume --val_data={tmp_path / 'other.bin'} --max_iters=9"
    quick(tmp_path / "run", flags)
    _, state = load(tmp_path / "run")
    assert before["step"] == 0
    assert before["val_loss"] < state["row"]["val_loss"]
    assert state["best"] == {"step": 9, "val_loss": state["row"]["val_loss"]}


def test_a_resumed_run_keeps_the_scale_and_the_best_loss(tmp_path, scaler, capsys):
    scaler["init_scale"] = 2.0**20
    quick(tmp_path, "--warmup_iters=0 --learning_rate=1 --max_iters=8")
    scaler["init_scale"] = 2.0**5
    capsys.readouterr()
    quick(tmp_path, "--resume --max_iters=9")
    assert re.search(r"best val_loss, \d+\.\d+, of step 0\n", capsys.readouterr().out)
    state = load(tmp_path)[1]
    assert state["scaler"]["scale"] == 2.0**20
    lowest = min(column(tmp_path, "val_loss"))
    assert state["best"] == {"step": 0, "val_loss": lowest}
    best = load(tmp_path / "best.pt")[1]
    assert (best["step"], best["val_loss"]) == (0, lowest)


@pytest.fixture
def alike(tmp_path):
    """Returns flags of a run whose windows are all alike and whose weights stay.

    So dropout alone makes the losses of two windows differ.
    """
    ids = np.tile(np.arange(1, 33) * 9, 20)
    ids.astype(np.uint16).tofile(tmp_path / "x.bin")
    return f"--data={tmp_path / 'x.bin'} --batch_size=1 --dropout=0.5 {STILL}"


def test_every_step_drops_other_numbers(tmp_path, alike):
    quick(tmp_path, f"{alike} --max_iters=4")
    losses = sorted(column(tmp_path, "loss"))
    assert min(np.diff(losses)) > 1e-5


def test_every_micro_batch_drops_other_numbers(tmp_path, alike):
    """Or else the mean of two micro-batches would be the loss of the first."""
    losses = []
    for count in (1, 2):
        flags = f"--max_iters=1 --gradient_accumulation_steps={count}"
        quick(tmp_path / str(count), f"{alike} {flags}")
        losses += column(tmp_path / str(count), "loss")
    assert abs(losses[0] - losses[1]) > 1e-5


def test_accumulation_does_not_change_the_run(tmp_path):
    flags = "--dropout=0 --max_iters=4 "
    quick(tmp_path / "a", flags + "--batch_size=8")
    quick(tmp_path / "b", flags + "--batch_size=2 --gradient_accumulation_steps=4")
    for name in ("loss", "grad_norm", "train_loss", "val_loss"):
        whole = column(tmp_path / "a", name)
        assert column(tmp_path / "b", name) == pytest.approx(whole, rel=1e-5), name


@pytest.mark.parametrize("grad_clip, clipped", [
    pytest.param(0, math.inf, id="not clipped"),
    pytest.param(0.5, 0.5, id="clipped"),
    pytest.param(99, math.inf, id="short enough"),
])
def test_the_averages_are_of_the_clipped_gradients(tmp_path, grad_clip, clipped):
    flags = f"--max_iters=1 --beta1=0.7 --beta2=0.9 --grad_clip={grad_clip}"
    quick(tmp_path, flags)
    length = column(tmp_path, "grad_norm")[0]
    assert length > 1  # what the log says is not clipped
    squares = 0
    averages_of_squares = 0
    for average in load(tmp_path)[1]["optimizer"]["state"].values():
        squares += average["exp_avg"].square().sum().item()
        averages_of_squares += average["exp_avg_sq"].sum().item()
    length = min(length, clipped)
    assert math.sqrt(squares) == pytest.approx(0.3 * length, rel=1e-3)
    assert averages_of_squares == pytest.approx(0.1 * length**2, rel=1e-3)


@gpt2
def test_matrices_and_the_embeddings_of_tokens_alone_decay(tmp_path):
    names = quick(tmp_path, "--max_iters=0 --weight_decay=0.3")
    decayed, others = names["optimizer"].param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0)
    model = names["model"]
    in_groups = decayed["params"] + others["params"]
    assert {id(p) for p in in_groups} == {id(p) for p in model.parameters()}
    assert len(in_groups) == len(list(model.parameters()))
    assert all(p.dim() > 1 for p in decayed["params"])
    positions, *rest = others["params"]
    assert positions is model.wpe.weight
    assert all(p.dim() == 1 for p in rest)


def rates_of(names):
    """Returns the learning rate of each group of a run's optimizer."""
    return [group["lr"] for group in names["optimizer"].param_groups]


class HalfRate(torch.optim.AdamW):
    """AdamW as a fork may set it up: its second group has half the rate."""

    def __init__(self, groups, **options):
        groups[1]["lr_scale"] = 0.5
        super().__init__(groups, **options)


class TwoOptimizers:
    """Hands all that train.py asks of an optimizer to two of them, as a fork may want."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def state_dict(self):
        return {"state": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, saved):
        """Takes the averages of a checkpoint, but no rates: those are today's flags."""
        for part, then in zip(self.parts, saved["state"]):
            part.load_state_dict(part.state_dict() | {"state": then["state"]})

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()


def test_two_optimizers_are_trained_with_and_resumed(tmp_path, monkeypatch):
    original = torch.optim.AdamW

    def make(groups, **options):
        matrices, others = groups
        sgd = torch.optim.SGD([{**matrices, "lr_scale": 3.0}], momentum=0.9)
        return TwoOptimizers(sgd, original([others], **options))

    monkeypatch.setattr(torch.optim, "AdamW", make)
    flags = "--eval_interval=2 --lr_decay_iters=4 --max_iters="
    names = quick(tmp_path / "once", flags + "4")
    assert [len(part.state) > 1 for part in names["optimizer"].parts] == [True, True]
    quick(tmp_path / "twice", flags + "2")
    quick(tmp_path / "twice", "--resume --max_iters=4")
    once, twice = (load(tmp_path / name) for name in ("once", "twice"))
    same(twice[0], once[0])
    same(twice[1]["optimizer"], once[1]["optimizer"])


def test_lr_scale_multiplies_the_rate_of_a_group(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", HalfRate)
    names = quick(tmp_path, "--max_iters=1 --warmup_iters=0")
    assert rates_of(names) == [4e-4, 2e-4]
    # The first step moves each weight by nearly its rate, and this bias began at 0.
    furthest = names["model"].ln_f.bias.abs().max().item()
    assert furthest == pytest.approx(2e-4, rel=1e-3)


def test_compile_changes_no_loss(tmp_path, monkeypatch):
    """Without its last part, which takes half a minute, but with all before that."""
    torch_compile = torch.compile
    graphs = torch._dynamo.utils.counters["stats"]

    def compile_fast(model):
        return torch_compile(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_fast)
    flags = "--max_iters=2 --dropout=0 --eval_windows=1 --n_layer=1 "
    torch._dynamo.reset()
    graphs.clear()
    quick(tmp_path / "eager", flags)
    assert not graphs["unique_graphs"]
    quick(tmp_path / "compiled", flags + "--compile")
    assert graphs["unique_graphs"] == 1
    for name in ("loss", "grad_norm", "val_loss"):
        eager = column(tmp_path / "eager", name)
        assert column(tmp_path / "compiled", name) == pytest.approx(eager, rel=1e-4)


class LoopBegins(Exception):
    """Raised in place of the loop, by a run whose GPU does not exist."""


@pytest.mark.parametrize("device, triton, flag, expected", [
    pytest.param("cuda", True, "", True, id="a GPU and triton"),
    pytest.param("cuda", False, "", False, id="a GPU without triton"),
    pytest.param("cpu", True, "", False, id="no GPU"),
    pytest.param("cuda", True, "--no-compile", False, id="not wanted"),
    pytest.param("cpu", False, "--compile", True, id="wanted"),
])
def test_when_the_model_is_compiled(
        tmp_path, monkeypatch, device, triton, flag, expected):
    find_spec = importlib.util.find_spec
    compiled = []

    def find_triton(name, package=None):
        if name != "triton":
            return find_spec(name, package)
        return "found" if triton else None

    def begin_loop():
        raise LoopBegins

    def choose_device(*_):
        return torch.device(device), torch.float32

    monkeypatch.setattr(importlib.util, "find_spec", find_triton)
    monkeypatch.setattr(gpt, "catch_signals", begin_loop)
    monkeypatch.setattr(gpt, "choose_device", choose_device)
    monkeypatch.setattr(GPT, "to", lambda model, _: model)
    monkeypatch.setattr(torch, "compile", compiled.append)
    with pytest.raises(LoopBegins):
        quick(tmp_path, flag)
    assert bool(compiled) == expected


# ---- Training: what resumes and what stops -------------------------------------------


def rows(folder):
    """Returns the rows of a run's log.csv, without the speed, which always differs."""
    text = (folder / "log.csv").read_text("utf-8")
    table = list(csv.DictReader(io.StringIO(text)))
    for row in table:
        del row["tokens_per_s"]
    return table


def test_resume_uses_typed_flags_of_adamw_and_keeps_its_averages(tmp_path, capsys):
    quick(tmp_path, "--max_iters=3")
    averages = load(tmp_path)[1]["optimizer"]["state"]
    capsys.readouterr()
    rates = "--learning_rate=0.001 --min_lr=0.001"
    others = "--weight_decay=0.3 --beta1=0.5 --beta2=0.6"
    names = quick(tmp_path, f"--resume --max_iters=3 {rates} {others}")
    said = ", ".join([
        "from step 3 on: learning_rate 0.001 instead of 0.0004",
        "min_lr 0.001 instead of its default",
        "weight_decay 0.3 instead of 0.1",
        "beta1 0.5 instead of 0.8",
        "beta2 0.6 instead of 0.95"])
    assert capsys.readouterr().out.startswith(said + "\n")
    same(names["optimizer"].state_dict()["state"], averages)
    groups = names["optimizer"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0]
    assert [group["betas"] for group in groups] == [(0.5, 0.6)] * 2


def test_a_rate_typed_with_resume_is_that_of_the_next_step(tmp_path):
    quick(tmp_path, "--max_iters=2 --warmup_iters=0")
    names = quick(tmp_path, "--resume --max_iters=3 --learning_rate=1 --min_lr=1")
    assert column(tmp_path, "lr") == pytest.approx([4e-4, 2.2e-4, 1])
    assert rates_of(names) == [1, 1]


def test_resume_says_that_nothing_was_changed(tmp_path, capsys):
    quick(tmp_path, "--max_iters=1")
    capsys.readouterr()
    quick(tmp_path, "--resume")
    assert capsys.readouterr().out.startswith("from step 1 on: the same flags\n")


def test_the_tokens_add_up_over_a_resume_with_another_batch_size(tmp_path, capsys):
    quick(tmp_path, "--max_iters=2")
    quick(tmp_path, "--resume --max_iters=4 --batch_size=3")
    said = "from step 2 on: max_iters 4 instead of 2, batch_size 3 instead of 2\n"
    assert said in capsys.readouterr().out
    assert column(tmp_path, "tokens") == [0, 64, 128, 128 + 96, 128 + 2 * 96]


def test_the_time_left_counts_all_time_since_the_start(tmp_path, monkeypatch, capsys):
    """By a clock of our own: each step takes a minute, and each save does too."""
    clock = itertools.count(0, 1e-6)
    minutes = []

    def now():
        return 60 * len(minutes) + next(clock)

    def minute(original):
        def call(*arguments, **options):
            minutes.append(1)
            return original(*arguments, **options)

        return call

    clip = torch.nn.utils.clip_grad_norm_
    save = gpt.save_checkpoint
    monkeypatch.setattr(time, "perf_counter", now)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", minute(clip))
    monkeypatch.setattr(gpt, "save_checkpoint", minute(save))
    quick(tmp_path, "--max_iters=4")  # with two saves before the first step
    left = re.compile(r"([\d.]+) min left")
    assert left.findall(capsys.readouterr().out) == ["9.0", "4.0", "1.7", "0.0"]
    quick(tmp_path, "--resume --max_iters=7")  # without a save before its end
    assert left.findall(capsys.readouterr().out) == ["2.0", "1.0", "0.0"]


INTERRUPTED = "--max_iters=4 --eval_interval=2 --gradient_accumulation_steps=3"


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """Returns the folder of a run that no signal has met."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    quick(folder, INTERRUPTED)
    return folder


def signal_at(monkeypatch, training, call, times=1):
    """Lets SIGINT arrive while a run computes the loss of a batch.

    It is the call-th of those to train on, or of those to evaluate.
    """
    original = GPT.forward
    calls = itertools.count(1)

    def forward(model, idx, targets=None, caches=None):
        # A text is generated without targets, and a known answer has other sizes.
        is_of_run = targets is not None and model.config.n_embd == 16
        if is_of_run and model.training == training:
            for _ in range(times if next(calls) == call else 0):
                signal.raise_signal(signal.SIGINT)
        return original(model, idx, targets, caches)

    monkeypatch.setattr(GPT, "forward", forward)


@pytest.mark.parametrize("flag, words", [
    pytest.param("--n_layer=3", "fit the weights: 2", id="a layer more"),
    pytest.param("--n_head=4", "fit the weights: 2", id="more heads"),
    pytest.param("--vocab_size=301", "fit the weights: 300", id="a token more"),
    pytest.param("--block_size=33", "the model has 32", id="a longer window"),
])
def test_resume_refuses_another_shape(uninterrupted, flag, words):
    message = f"^{flag}.*{words}"
    refused(message, quick, uninterrupted, f"--resume {flag}")


@posix
@pytest.mark.parametrize("training, call, step, logged", [
    pytest.param(True, 8, 2, [0, 1, 2], id="between two micro-batches of a step"),
    pytest.param(False, 3, 0, [], id="in the first evaluation"),
    pytest.param(False, 11, 2, [0, 1], id="evaluating the text to train on"),
    pytest.param(False, 14, 2, [0, 1], id="evaluating the text to validate on"),
])
def test_what_a_signal_cuts_is_given_up_and_made_by_the_resumed_run(
        tmp_path, monkeypatch, uninterrupted, training, call, step, logged):
    signal_at(monkeypatch, training, call)
    quick(tmp_path, INTERRUPTED, status=130)
    assert load(tmp_path)[1]["step"] == step
    assert column(tmp_path, "iter") == logged
    monkeypatch.undo()
    quick(tmp_path, "--resume")
    same_run(tmp_path, uninterrupted)
    assert rows(tmp_path) == rows(uninterrupted)


@posix
def test_the_resumed_run_makes_the_last_evaluation_if_a_signal_cut_it(
        tmp_path, monkeypatch, uninterrupted):
    """It makes no step, so its optimizer knows no rate, but all else is equal."""
    signal_at(monkeypatch, training=False, call=22)
    quick(tmp_path, INTERRUPTED, status=130)
    assert load(tmp_path)[1]["step"] == 4
    monkeypatch.undo()
    quick(tmp_path, "--resume")
    assert rows(tmp_path) == rows(uninterrupted)
    resumed, state = load(tmp_path)
    model, expected = load(uninterrupted)
    same(resumed, model)
    assert state["best"] == expected["best"]
    same(state["optimizer"]["state"], expected["optimizer"]["state"])


@posix
def test_a_signal_after_which_nothing_is_left_to_do_gives_nothing_up(
        tmp_path, monkeypatch, uninterrupted):
    signal_at(monkeypatch, training=False, call=24)  # the last batch of all
    quick(tmp_path, INTERRUPTED)
    same_run(tmp_path, uninterrupted)


@posix
def test_a_signal_before_the_first_new_step_keeps_the_new_flags(tmp_path, monkeypatch):
    quick(tmp_path, "--max_iters=1 --gradient_accumulation_steps=2")
    signal_at(monkeypatch, training=True, call=1)
    quick(tmp_path, "--resume --max_iters=3 --beta1=0.5", status=130)
    _, state = load(tmp_path)
    assert state["step"] == 1
    assert (state["args"]["max_iters"], state["args"]["beta1"]) == (3, 0.5)


@posix
def test_a_second_signal_ends_the_run_at_once(tmp_path, monkeypatch):
    signal_at(monkeypatch, training=True, call=2, times=2)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path, "--max_iters=3")
    assert load(tmp_path)[1]["step"] == 0  # the last that was saved


@posix
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_says_how_to_continue(tmp_path, monkeypatch, capfd, number):
    clip = torch.nn.utils.clip_grad_norm_
    steps = itertools.count(1)

    def clip_and_signal(*arguments):
        if next(steps) in (3, 4):
            signal.raise_signal(number)
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_signal)
    # The first signal finds the run between two rows of the log, the second at a row.
    endless = f"--log_interval=2 --max_iters={10**18}"
    for step, flags in ((3, endless), (4, "--resume")):
        quick(tmp_path, flags, status=128 + number)
        out, err = capfd.readouterr()
        assert err == "saving the last whole step; once more to end without\n"
        last = out.splitlines()[-1]
        stopped = f"stopped; {tmp_path / 'ckpt.pt'} has step {step}; python "
        assert last.startswith(stopped)
        assert last.endswith(f"train.py --resume --out_dir={tmp_path} continues")
        assert load(tmp_path)[1]["step"] == step
    quick(tmp_path, "--resume --max_iters=5")
    assert "\nnext: python " in capfd.readouterr().out
    assert column(tmp_path, "iter") == [0, 2, 4, 5]


@posix
@pytest.mark.parametrize("error, end_of_run", [
    pytest.param(None, contextlib.nullcontext(), id="by its end"),
    pytest.param(IndexError, pytest.raises(IndexError), id="by an error"),
])
def test_the_end_of_the_loop_puts_the_handlers_back(
        tmp_path, monkeypatch, error, end_of_run):
    before = all_handlers()
    clip = torch.nn.utils.clip_grad_norm_
    during = []

    def clip_or_fail(*arguments):
        during.extend(all_handlers())
        if error:
            raise error
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_fail)
    with end_of_run:
        quick(tmp_path, "--max_iters=1")
    assert all_handlers() == before
    assert during
    assert not set(during) & set(before)


@posix
def test_a_run_speaks_at_once_and_a_closed_pipe_ends_it_silently(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    out = tmp_path / "out"
    flags = (*RUN, *QUICK, "--max_iters=99999", "--log_interval=5")
    process = start("train.py", *flags, cwd=tmp_path, before=["nohup"])
    assert any(line.startswith("iter 10 ") for line in process.stdout)
    # If lines were kept back until there are 8 kB of them, the run would be further on.
    assert len(column(out, "iter")) < 50
    # The lock comes before all reading: a second --resume must not go back to what it
    # read before the first one ended.
    for flags in ("--resume --n_layer=3", "--max_iters=1 --data=gone.txt"):
        refused("another train.py", quick, out, flags)
    process.send_signal(signal.SIGHUP)  # it does nothing, because of nohup
    for _ in range(99):
        assert process.stdout.readline()
    process.stdout.close()  # as `head` does
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 130


@pytest.mark.parametrize("stream", [
    pytest.param(io.StringIO(), id="a notebook's stream"),
    pytest.param(None, id="no stream"),
])
def test_a_run_needs_no_place_for_its_picture_nor_for_its_lines(
        tmp_path, monkeypatch, stream):
    (tmp_path / "loss.png").mkdir()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    train_in(tmp_path, " ".join(QUICK) + " --max_iters=1 --dtype=bfloat16")
    model, state = load(tmp_path)
    assert state["step"] == 1
    assert model.wte.weight.dtype == torch.float32  # bfloat16 is for products alone
    if stream:
        warning = re.compile("^warning: .*loss.png.*; the run continues$", re.MULTILINE)
        assert len(warning.findall(stream.getvalue())) == 2


@posix
def test_killed_and_resumed_is_the_same_run_however_often_it_is_evaluated(tmp_path):
    """In several epochs, in bfloat16. KILLS=20 pytest -k killed is the long version."""
    kills = int(os.environ.get("KILLS", 1))
    (tmp_path / "x.txt").write_text(STORY[:1500], "utf-8")
    flags = (*RUN, f"--data={tmp_path / 'x.txt'}", f"--max_iters={20 + 20 * kills}",
             "--vocab_size=300", "--dtype=bfloat16")
    # In processes of their own, since what ran before may change the last bit of a sum.
    often = (*flags, "--eval_interval=9", f"--out_dir={tmp_path / 'killed'}")
    seldom = (*flags, "--eval_interval=1000", f"--out_dir={tmp_path / 'whole'}")
    whole = start("train.py", *seldom)
    for kill in range(kills):
        again = ["--resume"] if (tmp_path / "killed" / "ckpt.pt").exists() else []
        victim = start("train.py", *often, *again)
        for _ in range(20):
            victim.stdout.readline()
        number = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[kill % 3]
        victim.send_signal(number)
        victim.communicate()
        with open(tmp_path / "killed" / "log.csv", "ab") as file:
            file.write(b"7,44\xff")  # a line that was cut
    out, _ = end(start("train.py", *often, "--resume"))
    assert re.match("from step [1-9]", out)
    end(whole)
    same_run(tmp_path / "whole", tmp_path / "killed")


# ---- Training: several processes -----------------------------------------------------


def start_two(*flags, **each):
    """Starts the two processes of a run as torchrun does; returns them.

    `each` has pairs of values for flags, the first for the first process.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pair = []
    for rank in range(2):
        variables = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in variables.items()}
        own = [f"--{name}={values[rank]}" for name, values in each.items()]
        pair.append(start("train.py", *RUN, *QUICK, *flags, *own, env=env))
    return pair


TWO = "--lr_decay_iters=9 --gradient_accumulation_steps={} "


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """Returns the folder of a run of two processes, and the end of what each printed.

    SIGINT has ended it, which only the second process has got.
    """
    folder = tmp_path_factory.mktemp("two")
    flags = TWO.format(2).split()
    first, second = start_two(*flags, "--max_iters=9999", f"--out_dir={folder}")
    assert any(line.startswith("iter 4 ") for line in first.stdout)
    second.send_signal(signal.SIGINT)
    out, err = end(first, status=128 + signal.SIGTERM)
    assert err == ""
    assert end(second, status=128 + signal.SIGINT)[0] == ""
    return folder, out


@posix
def test_a_signal_to_one_process_stops_both(two_processes):
    folder, out = two_processes
    step = load(folder)[1]["step"]
    assert step >= 4
    last = out.splitlines()[-1]
    assert last.startswith(f"stopped; {folder / 'ckpt.pt'} has step {step}; ")


@posix
def test_processes_do_not_change_the_run(two_processes, tmp_path):
    """Not even what dropout draws, as micro-batches are counted over all of them."""
    folder, _ = two_processes
    step = load(folder)[1]["step"]
    quick(tmp_path, TWO.format(4) + f"--max_iters={step}")
    for name in ("iter", "tokens", "lr"):
        assert column(folder, name) == column(tmp_path, name), name
    for name in ("loss", "grad_norm"):
        two = column(folder, name)
        one = column(tmp_path, name)
        assert two[:5] == pytest.approx(one[:5], rel=1e-5), name
        assert two == pytest.approx(one, rel=1e-3), name  # sums are rounded otherwise
    for name in ("train_loss", "val_loss"):
        first = column(tmp_path, name)[0]
        assert column(folder, name)[0] == pytest.approx(first, rel=1e-6), name


@posix
def test_a_run_of_two_processes_is_continued_by_one(two_processes, tmp_path, capsys):
    shutil.copytree(two_processes[0], tmp_path, dirs_exist_ok=True)
    step = load(tmp_path)[1]["step"]
    quick(tmp_path, f"--resume --max_iters={step + 1}")
    said = capsys.readouterr().out.splitlines()[0]
    assert said.endswith("processes 1 instead of 2")
    tokens = column(tmp_path, "tokens")
    assert np.diff(tokens).tolist() == [256] * step + [128]


def test_an_error_before_the_processes_meet_waits_for_none(tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    refused("--n_head=3", quick, tmp_path, "--n_head=3")


def test_processes_that_read_different_tokens_say_so_in_one_line_each(tmp_path):
    texts = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path, n in zip(texts, (500, 501)):
        write_ids(path, n)
    for process in start_two(f"--out_dir={tmp_path / 'out'}", data=texts):
        _, err = end(process, status=2)
        assert re.fullmatch("train.py: error: the processes read different .*\n", err)


def test_when_two_processes_diverge_both_say_which_step_is_saved(tmp_path):
    flags = ("--max_iters=60", "--eval_interval=1", "--warmup_iters=0", "--grad_clip=0",
             "--learning_rate=1e36", f"--out_dir={tmp_path / 'out'}")
    said = [end(process, status=2)[1] for process in start_two(*flags)]
    step = load(tmp_path / "out")[1]["step"]
    assert f"still has step {step}; " in said[0]
    assert said[1] == said[0]


@posix
def test_one_ctrl_c_saves_the_run_of_two_processes(tmp_path):
    flags = (*RUN, *QUICK, "--max_iters=99999")
    process = start("train.py", *flags, before=TORCHRUN, cwd=tmp_path)
    assert any(line.startswith("iter 1 ") for line in process.stdout)
    process.send_signal(signal.SIGINT)  # torchrun hands it to both
    out, err = end(process, status=1)  # that of torchrun
    step = load(tmp_path / "out")[1]["step"]
    assert step > 0
    last = out.splitlines()[-1]
    assert last.startswith(f"stopped; out/ckpt.pt has step {step}; ")
    assert "saving the last whole step" in err


# ---- Training: forks -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RopeConfig(GPTConfig):
    """The sizes of a GPT, and a field that a fork has added."""
    rope: int = 0


class Fork(GPT):
    """A GPT with a parameter that a fork has added; it multiplies the loss."""

    def __init__(self, config):
        super().__init__(config)
        self.gain = torch.nn.Parameter(torch.ones(1))

    def forward(self, *arguments, **options):
        return super().forward(*arguments, **options) * self.gain


@pytest.fixture
def fork(monkeypatch):
    """Gives the scripts the model of a fork, and a flag --rope."""
    original = gpt.start_script

    def start_script(doc):
        parser = original(doc)
        parser.add_argument("--rope", type=int)
        return parser

    monkeypatch.setattr(gpt, "start_script", start_script)
    monkeypatch.setattr(gpt, "GPTConfig", RopeConfig)
    monkeypatch.setattr(gpt, "GPT", Fork)


def test_what_a_fork_adds_is_trained_resumed_and_kept(fork, tmp_path):
    quick(tmp_path / "a", "--rope=7 --max_iters=1 --warmup_iters=0")
    gain = load(tmp_path / "a")[0].gain.item()
    assert gain == pytest.approx(1 - 4e-4, abs=1e-6)
    quick(tmp_path / "b", f"--init_from={tmp_path / 'a' / 'ckpt.pt'} --max_iters=0")
    model, _ = load(tmp_path / "b")
    assert (model.config.rope, model.gain.item()) == (7, gain)
    quick(tmp_path / "a", "--resume --max_iters=2")
    model, _ = load(tmp_path / "a")
    assert model.config.rope == 7
    assert 0 < gain - model.gain.item() < 4e-4
    quick(tmp_path / "a", "--resume --rope=8 --max_iters=3")
    assert load(tmp_path / "a")[0].config.rope == 8


def test_a_forks_switch_may_be_another_when_fine_tuning(fork, tmp_path):
    quick(tmp_path / "a", "--rope=7 --max_iters=0")
    flags = f"--init_from={tmp_path / 'a' / 'ckpt.pt'} --rope=9 --max_iters=0"
    quick(tmp_path / "b", flags)
    assert load(tmp_path / "b")[0].config.rope == 9


def test_a_mistake_in_a_fork_is_no_damaged_checkpoint(tmp_path, monkeypatch):
    gpt.save_checkpoint(str(tmp_path / "ckpt.pt"), tiny(vocab_size=300))
    monkeypatch.setattr(gpt, "Block", None)
    with pytest.raises(TypeError):
        load(tmp_path)


# ---- Checkpoints ---------------------------------------------------------------------


@pytest.fixture
def small_file(tmp_path, monkeypatch):
    """Returns the path of a small checkpoint, x.pt in the current folder."""
    monkeypatch.chdir(tmp_path)
    gpt.save_checkpoint("x.pt", tiny(vocab_size=300), step=1)
    return pathlib.Path("x.pt")


def test_reading_a_new_file_makes_no_second_copy_of_its_tensors(small_file, monkeypatch):
    """Weights that are trained on a GPU would be loaded onto that GPU once more."""
    devices = []
    original = torch.load

    def load_and_note(*arguments, **options):
        state = original(*arguments, **options)
        devices.append(state["model"]["wte.weight"].device.type)
        return state

    monkeypatch.setattr(torch, "load", load_and_note)
    gpt.save_checkpoint("x.pt", tiny(vocab_size=300))
    assert devices == ["meta"]


NO_CHECKPOINT = "^x.pt cannot be read as a checkpoint; train.py and .*"


@pytest.mark.parametrize("content", [
    pytest.param(b"", id="empty"),
    pytest.param(b"<!DOCTYPE html>", id="a web page"),
    pytest.param(b"cos\nmkdir\n(S'executed'\ntR.", id="code that runs in a pickle"),
])
def test_files_that_are_no_checkpoints_are_refused(small_file, content):
    small_file.write_bytes(content)
    refused(NO_CHECKPOINT, load, small_file)
    refused(NO_CHECKPOINT, gpt.load_checkpoint, "x.pt")  # without verify
    assert os.listdir() == ["x.pt"]


def test_half_a_checkpoint_is_refused(small_file):
    content = small_file.read_bytes()
    small_file.write_bytes(content[: len(content) // 2])
    refused(NO_CHECKPOINT, load, small_file)
    refused(NO_CHECKPOINT, gpt.load_checkpoint, "x.pt")


def test_one_wrong_bit_of_a_weight_is_found(small_file):
    content = bytearray(small_file.read_bytes())
    weights = load(small_file)[0].wte.weight.detach().numpy().tobytes()
    content[content.index(weights) + 100] ^= 1
    small_file.write_bytes(content)
    refused(NO_CHECKPOINT + "wrong checksum", load, small_file)
    os.rename(small_file, "ckpt.pt")
    refused("wrong checksum", quick, ".", "--resume")


class Hostile:
    """What makes a folder when it is read from a pickle."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content, words", [
    pytest.param([1, 2], "", id="a list"),
    pytest.param({"weights": 1}, "config", id="without a config"),
    pytest.param({"config": {"n_embd": "x"}}, "vocab_size", id="without sizes"),
    pytest.param({"step": pathlib.Path("x")}, "no tensors, or code", id="a class"),
    pytest.param({"step": Hostile()}, "no tensors, or code", id="code that runs"),
])
def test_files_that_hold_something_else_are_refused(small_file, content, words):
    torch.save(content, small_file)
    refused(NO_CHECKPOINT + words, load, small_file)
    assert os.listdir() == ["x.pt"]


@pytest.mark.parametrize("part, changes, words", [
    pytest.param("config", {"bias": False}, "cannot be read .*bias", id="other fields"),
    pytest.param("config", {"vocab_size": 61}, "vocab_size is 61", id="few tokens"),
    pytest.param("config", {"vocab_size": 50258}, "50258, not 257", id="many tokens"),
    pytest.param("config", {"n_layer": 3}, "does not fit.*Missing", id="a layer more"),
    pytest.param("config", {"n_layer": 1}, "does not fit.*Unexp", id="a layer less"),
    pytest.param("model", {"wpe.weight": torch.ones(2)}, "size mismatch", id="a shape"),
    pytest.param("model", {"gain": torch.ones(1)}, "not fit.*gain", id="a name more"),
])
def test_checkpoints_that_do_not_fit_are_refused(small_file, part, changes, words):
    state = torch.load(small_file, weights_only=True)
    state[part].update(changes)
    torch.save(state, small_file)
    refused(f"^x.pt .*{words}", load, small_file)


def test_a_checkpoint_without_a_run_cannot_be_resumed(tmp_path):
    gpt.save_checkpoint(str(tmp_path / "ckpt.pt"), tiny(vocab_size=300), step=1)
    refused("holds no run to resume; --init_from", quick, tmp_path, "--resume")


@contextlib.contextmanager
def file_size_limit(size):
    """Lets no file become larger than that, as if the disk were full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [
    pytest.param(0, id="at the first byte"),
    pytest.param(100_000, id="in the weights, where PyTorch hides the cause"),
    pytest.param(300_000, id="at the end"),
])
def test_a_save_that_fails_leaves_the_old_file_and_no_other(small_file, size):
    before = small_file.read_bytes()
    model = tiny(1, vocab_size=3000, n_embd=24)
    message = "x.pt could not be written .*too large"
    with file_size_limit(size):
        refused(message, gpt.save_checkpoint, "x.pt", model)
    assert os.listdir() == ["x.pt"]
    assert small_file.read_bytes() == before


@posix
def test_a_save_replaces_a_file_that_is_in_use(small_file):
    """To write into a mapped file would change the weights of who has mapped it."""
    mapped, _ = gpt.load_checkpoint("x.pt")
    content = small_file.read_bytes()
    with open(small_file, "rb") as file:
        gpt.save_checkpoint("x.pt", tiny(1, vocab_size=300))
        same(mapped, tiny(vocab_size=300))
        assert file.read() == content
    same(load(small_file)[0], tiny(1, vocab_size=300))


def test_a_state_that_could_not_be_loaded_again_is_not_saved(small_file):
    before = small_file.read_bytes()
    with pytest.raises(pickle.UnpicklingError, match="numpy"):
        gpt.save_checkpoint("x.pt", tiny(1, vocab_size=300), val_loss=np.float64(1.5))
    assert os.listdir() == ["x.pt"]
    assert small_file.read_bytes() == before


# ---- Training: what goes wrong -------------------------------------------------------


def fail_to_save(monkeypatch, step, name="ckpt.pt"):
    """Lets the saves of this file at this step fail, as on a full disk."""
    original = gpt.save_checkpoint

    def save(path, model, **state):
        fails = state["step"] == step and os.path.basename(path) == name
        gpt.raise_unless(not fails, f"no space for {name}")
        original(path, model, **state)

    monkeypatch.setattr(gpt, "save_checkpoint", save)


SAVES = "--max_iters=4 --eval_interval=2"


@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt"])
def test_a_save_that_fails_in_the_middle_is_a_warning(
        tmp_path, monkeypatch, capsys, name):
    fail_to_save(monkeypatch, 2, name)
    quick(tmp_path, SAVES)
    lines = capsys.readouterr().out.splitlines()
    assert lines.count(f"warning: no space for {name}; the run continues") == 1
    assert load(tmp_path)[1]["step"] == 4
    assert column(tmp_path, "iter") == [0, 1, 2, 3, 4]


def test_after_a_save_that_failed_a_signal_saves_again(tmp_path, monkeypatch):
    fail_to_save(monkeypatch, step=2)
    signal_at(monkeypatch, training=True, call=3)
    quick(tmp_path, SAVES, status=130)
    assert load(tmp_path)[1]["step"] == 3


def test_a_first_save_that_fails_ends_the_run(tmp_path, monkeypatch):
    fail_to_save(monkeypatch, step=0)
    refused("no space for ckpt.pt", quick, tmp_path, SAVES)
    assert column(tmp_path, "iter") == [0]


def test_a_last_save_that_fails_is_an_error(tmp_path, monkeypatch):
    fail_to_save(monkeypatch, step=4)
    refused("no space for ckpt.pt", quick, tmp_path, SAVES)
    assert load(tmp_path)[1]["step"] == 2


def test_a_last_save_that_fails_after_a_resume_is_an_error(tmp_path, monkeypatch):
    quick(tmp_path, "--max_iters=3")
    fail_to_save(monkeypatch, step=4)
    refused("no space for ckpt.pt", quick, tmp_path, "--resume --max_iters=4")


def test_a_loss_whose_perplexity_is_no_float_is_printed(tmp_path):
    quick(tmp_path, "--max_iters=1 --warmup_iters=0 --learning_rate=1e4")
    assert column(tmp_path, "val_loss")[-1] > 1000


def stopped_at(error, folder):
    """Returns what a run that diverged says: at which step, which is saved, and why."""
    path = re.escape(str(folder / "ckpt.pt"))
    said = re.fullmatch(
        r"(\w+) is (?:inf|-inf|nan) at step (\d+); "
        rf"{path} still has step (\d+); a lower --learning_rate may help",
        str(error.value))
    assert said, error.value
    return int(said[2]), int(said[3]), said[1]


@pytest.mark.parametrize("enabled", [
    pytest.param(False, id="float32"),
    pytest.param(True, id="with the scaler of float16"),
])
def test_a_diverging_run_keeps_the_good_checkpoint(tmp_path, scaler, enabled):
    scaler["enabled"] = enabled
    flags = "--max_iters=60 --eval_interval=4 --warmup_iters=0 --grad_clip=0 "
    with pytest.raises(InputError) as error:
        quick(tmp_path, flags + "--learning_rate=1e36")
    step, saved, name = stopped_at(error, tmp_path)
    assert name in ("loss", "train_loss", "val_loss")
    model, state = load(tmp_path)
    assert state["step"] == saved < step
    assert math.isfinite(state["row"]["val_loss"])
    assert all(p.isfinite().all() for p in model.parameters())
    assert column(tmp_path, "iter") == list(range(step))


def test_without_a_scaler_a_gradient_that_is_not_finite_stops_the_run(
        tmp_path, monkeypatch):
    norms = iter([1.0, 1.0, math.inf])

    def clip(*_):
        return torch.tensor(next(norms))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    with pytest.raises(InputError) as error:
        quick(tmp_path, "--max_iters=5")
    assert stopped_at(error, tmp_path) == (3, 0, "grad_norm")


# ---- OpenAI's files ------------------------------------------------------------------


def write_openai(folder, model):
    """Writes a model as OpenAI's two files, which are made by their description."""
    folder.mkdir(parents=True)
    config, weights = model.config, openai_weights(model)
    sizes = {"n_vocab": config.vocab_size, "n_ctx": config.block_size,
             "n_layer": config.n_layer, "n_head": config.n_head,
             "n_embd": config.n_embd}
    (folder / "hparams.json").write_text(json.dumps(sizes))
    with open(folder / load_gpt2.DATA, "wb") as file:
        for name in sorted(weights):
            file.write(weights[name].tobytes())


@pytest.fixture(scope="session")
def tensorflows():
    """Returns what tf.train.load_checkpoint reads from the files in data/tf/one-shard.

    TensorFlow 2.21 wrote these: tf.compat.v1.train.Saver().save() of float32 variables
    with OpenAI's names and shapes, such as model/h0/attn/c_attn/w of [1, in, out], and
    numbers from normal(0, 0.3), or normal(1, 0.3) for gains.
    """
    with np.load(TF / "expected.npz") as file:
        return {name.removeprefix("model/"): file[name] for name in file}


@pytest.fixture(scope="session")
def from_tensorflow():
    """Returns a GPT of the files in data/tf/one-shard, with a vocabulary of 23."""
    config, weights = load_gpt2.read_openai(str(TF / "one-shard"))
    for name, weight in weights.items():
        weights[name] = load_gpt2.transposed(name, weight)
    return gpt.with_weights(config, weights).eval().requires_grad_(False)


@gpt2
def test_every_number_that_tensorflow_wrote_is_read(from_tensorflow, tensorflows):
    ours = openai_weights(from_tensorflow)
    assert ours.keys() == tensorflows.keys()
    for name, array in tensorflows.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@gpt2
def test_logits_of_tensorflows_file_are_the_oracles(from_tensorflow, tensorflows):
    tokens = torch.tensor([22, 0, 7, 7, 13, 1, 19])
    weights = {name: array.astype(np.float64) for name, array in tensorflows.items()}
    logits = from_tensorflow(tokens[None])[0]
    expected = oracle(weights, n_head=2, tokens=tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@gpt2
def test_openais_files_become_a_model(tmp_path):
    """Eleven layers, because h10 stands before h2 in the file."""
    model = tiny(vocab_size=257, n_layer=11)
    write_openai(tmp_path / "new", model)
    loaded = load_gpt2.load_gpt2(str(tmp_path / "new"))
    same(loaded, model)
    assert loaded.config == model.config
    assert not loaded.training


@gpt2
def test_a_vocabulary_that_is_not_gpt2s_is_refused():
    refused("one-shard: 23 tokens are not GPT-2", load_gpt2.load_gpt2,
            str(TF / "one-shard"))


@gpt2
@pytest.mark.parametrize("change, words", (
    pytest.param({"n_layer": 10}, "11,248 bytes.* 10,272", id="a layer less"),
    pytest.param({"n_vocab": 24}, "11,248 bytes.* 11,264", id="a token more"),
    pytest.param({"n_ctx": 6}, "11,248 bytes.* 11,232", id="a position less"),
))
def test_sizes_that_do_not_fit_openais_file_are_refused(tmp_path, change, words):
    shutil.copytree(TF / "one-shard", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "hparams.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(words, load_gpt2.load_gpt2, str(tmp_path))


@pytest.mark.parametrize("text, words", (
    pytest.param("null", "does not have GPT-2's sizes", id="nothing"),
    pytest.param("[]", "does not have GPT-2's sizes", id="a list"),
    pytest.param('{"n_vocab": 23}', "does not.* sizes .*n_ctx", id="a name is missing"),
    pytest.param('{"n_vocab":', "is not JSON", id="cut off"),
    pytest.param("caf\xe9", "is not JSON", id="no UTF-8"),
))
def test_damaged_sizes_of_openai_are_refused(tmp_path, text, words):
    shutil.copytree(TF / "one-shard", tmp_path, dirs_exist_ok=True)
    (tmp_path / "hparams.json").write_bytes(text.encode("latin-1"))
    refused("hparams.json " + words, load_gpt2.load_gpt2, str(tmp_path))


@gpt2
def test_a_file_of_openai_that_is_short_by_a_byte_is_refused(tmp_path):
    shutil.copytree(TF / "one-shard", tmp_path, dirs_exist_ok=True)
    path = tmp_path / load_gpt2.DATA
    path.write_bytes(path.read_bytes()[:-1])
    refused("11,247 bytes.* 11,248", load_gpt2.load_gpt2, str(tmp_path))


def test_a_missing_file_of_openai_is_named(tmp_path):
    shutil.copy(TF / "one-shard" / "hparams.json", tmp_path)
    refused("model.ckpt.data-00000-of-00001 has 0 bytes", load_gpt2.load_gpt2,
            str(tmp_path))


# ---- The exported folder -------------------------------------------------------------


VOCABULARIES = (257, 1025, 50257)  # no merge, some merges, and all of them
# Words, other scripts, white space, and <|endoftext|> inside a text.
MIXED = "Every effort moves you. naïve 你好 🙂\n\n  x<|endoftext|>It's 1984, isn't it ?"


@pytest.fixture(scope="session", params=VOCABULARIES)
def exported(request, tmp_path_factory):
    """Returns a model with a vocabulary of each size, and the folder of its export."""
    folder = tmp_path_factory.mktemp("exported")
    model = tiny(vocab_size=request.param, block_size=64, n_embd=24)
    gpt.save_checkpoint(str(folder / "x.pt"), model)
    main("load_gpt2.py", "--export", folder / "x.pt", folder / "new")
    return model, folder / "new"


@pytest.fixture
def theirs(exported):
    """Returns the exported model as transformers opens it."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel.from_pretrained(exported[1])
    return model.eval().requires_grad_(False)


def read(path):
    """Returns the content of a JSON file."""
    return json.loads(path.read_text("utf-8"))


@gpt2
def test_exported_sizes_and_names_are_what_other_tools_expect(exported):
    model, folder = exported
    config = read(folder / "config.json")
    V = model.config.vocab_size
    expected = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
                "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                "vocab_size": V, "n_ctx": 64, "n_positions": 64, "n_layer": 2,
                "n_head": 3, "n_embd": 24, "bos_token_id": V - 1, "eos_token_id": V - 1}
    assert config | expected == config
    assert read(folder / "generation_config.json") == {
        "bos_token_id": V - 1, "eos_token_id": V - 1, "pad_token_id": V - 1,
        "max_length": 64}


@gpt2
def test_exported_weights_have_the_names_of_the_hub(exported):
    """Those of openai-community/gpt2 have no "transformer." before them."""
    model, folder = exported
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # older transformers need it
        assert set(file.keys()) == set(model.state_dict())


@gpt2
def test_exported_vocabularies_are_the_first_merges(exported):
    model, folder = exported
    V = model.config.vocab_size
    pairs = pathlib.Path(HERE, "data", "vocab.bpe").read_text("utf-8").splitlines()
    pairs = pairs[1 : V - 256]
    assert (folder / "merges.txt").read_text("utf-8").splitlines()[1:] == pairs
    ids = read(folder / "vocab.json")
    assert sorted(ids.values()) == list(range(V))
    joined = [ids[pair.replace(" ", "")] for pair in pairs]
    assert joined == list(range(256, V - 1))
    assert ids["<|endoftext|>"] == V - 1


@gpt2
def test_the_exported_tokenizer_is_gpt2s(exported):
    """Its parts are those of openai-community/gpt2, with the ids of this vocabulary."""
    model, folder = exported
    content = read(folder / "tokenizer.json")
    bpe = content["model"]
    assert bpe["type"] == "BPE"
    assert bpe["vocab"] == read(folder / "vocab.json")
    assert bpe["merges"] == (folder / "merges.txt").read_text("utf-8").splitlines()[1:]
    for part in (content["pre_tokenizer"], content["decoder"]):
        assert part["type"] == "ByteLevel"
        assert part["add_prefix_space"] is False
    assert len(content["added_tokens"]) == 1
    special = content["added_tokens"][0]
    assert special["id"] == model.config.vocab_size - 1
    assert special["content"] == "<|endoftext|>"
    assert special["special"] is True


@gpt2
def test_exported_settings_of_the_tokenizer(exported):
    settings = read(exported[1] / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "GPT2Tokenizer"
    assert settings["model_max_length"] == 64
    assert settings["clean_up_tokenization_spaces"] is False  # "it ?" stays so
    assert settings["add_prefix_space"] is False


@gpt2
@pytest.mark.parametrize("exported", (50257,), indirect=True)
def test_all_merges_together_are_openais_file(exported):
    theirs = pathlib.Path(HERE, "data", "vocab.bpe").read_text("utf-8")
    assert (exported[1] / "merges.txt").read_text("utf-8") == theirs


@gpt2
def test_tokenizers_agrees_about_every_id(exported):
    tokenizers = pytest.importorskip("tokenizers")
    model, folder = exported
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = gpt.encode(MIXED, model.config.vocab_size)
    assert tokenizer.encode(MIXED).ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == MIXED


@gpt2
def test_tokenizers_agrees_about_the_two_older_files(exported):
    tokenizers = pytest.importorskip("tokenizers")
    model, folder = exported
    tokenizer = tokenizers.ByteLevelBPETokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"))
    assert tokenizer.encode(STORY).ids == gpt.encode(STORY, model.config.vocab_size)


@gpt2
def test_transformers_agrees_about_every_id(exported):
    transformers = pytest.importorskip("transformers")
    model, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = gpt.encode(MIXED, model.config.vocab_size)
    assert tokenizer(MIXED)["input_ids"] == ids
    assert tokenizer.decode(ids) == MIXED
    assert tokenizer.eos_token_id == model.config.vocab_size - 1
    assert tokenizer.model_max_length == 64


@gpt2
def test_transformers_computes_the_same_logits(exported, theirs):
    """In float64, where no rounding hides a small difference."""
    model = GPT(exported[0].config).eval()
    model.load_state_dict(exported[0].state_dict())
    idx = torch.randint(model.config.vocab_size, (2, 64))
    difference = model.double()(idx) - theirs.double()(idx).logits
    assert difference.abs().max() < 1e-10


@gpt2
def test_transformers_writes_the_same_greedy_tokens(exported, theirs):
    """Some texts of the smallest model end, and are filled up with <|endoftext|>."""
    model, _ = exported
    end_of_text = model.config.vocab_size - 1
    idx = torch.randint(end_of_text, (8, 20))
    ours = generated(model, idx, 30, temperature=0, stop_token=end_of_text)
    written = theirs.generate(idx, max_new_tokens=30, do_sample=False)
    assert written[:, 20:].tolist() == ours.tolist()
    assert ours.shape == (8, 30)
    assert ours.unique().numel() > 9  # a model that repeats one token proves nothing


@gpt2
def test_an_export_comes_back_equal_to_the_bit(exported):
    model, folder = exported
    loaded = load_gpt2.load_gpt2(str(folder))
    same(loaded, model)
    assert loaded.config == model.config


@gpt2
def test_what_transformers_saves_in_parts_comes_back(exported, theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model*.safetensors"))) > 1
    same(load_gpt2.load_gpt2(str(tmp_path)), exported[0])


# ---- What is not exported ------------------------------------------------------------


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Returns a model of 257 tokens, its checkpoint, and the folder of its export."""
    folder = tmp_path_factory.mktemp("small")
    model = tiny(vocab_size=257)
    gpt.save_checkpoint(str(folder / "x.pt"), model)
    load_gpt2.export(str(folder / "x.pt"), str(folder / "new"))
    return model, str(folder / "x.pt"), folder / "new"


def exact_gelu(x, approximate):
    """GELU without the approximation that GPT-2 has."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def narrow_mask(q, S):
    """A causal mask that also hides what is more than 100 tokens back, for T = S."""
    mask = q.new_full((S, S), -math.inf)
    return mask.triu(1) + mask.tril(-101)


CHANGED_CODE = pytest.mark.parametrize("module, name, change", (
    pytest.param(gpt.F, "gelu", exact_gelu, id="GELU"),
    pytest.param(gpt, "causal_mask", narrow_mask, id="mask"),
))


@gpt2
@CHANGED_CODE
def test_changed_code_is_not_exported(
        small, tmp_path, monkeypatch, module, name, change):
    monkeypatch.setattr(module, name, change)
    refused("x.pt does not compute what GPT-2 does", load_gpt2.export,
            small[1], str(tmp_path / "new"))
    assert os.listdir(tmp_path) == []


@gpt2
@CHANGED_CODE
def test_weights_from_changed_code_are_not_exported(tmp_path, module, name, change):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, change)
        gpt.save_checkpoint(str(tmp_path / "x.pt"), tiny(vocab_size=257))
    refused("x.pt does not compute what GPT-2 does", load_gpt2.export,
            str(tmp_path / "x.pt"), str(tmp_path / "new"))
    assert os.listdir(tmp_path) == ["x.pt"]


@gpt2
@CHANGED_CODE
def test_weights_of_gpt2_that_changed_code_converts_are_known_as_gpt2s(
        small, tmp_path, monkeypatch, capsys, module, name, change):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, name, change)
    main("load_gpt2.py", str(small[2]), "--out=x.pt")
    capsys.readouterr()
    load_gpt2.load_checkpoint("x.pt")
    assert "something other than gpt.py" in capsys.readouterr().err


@gpt2
def test_a_fork_that_only_adds_a_field_still_exports(small, tmp_path, monkeypatch):
    model, _, folder = small
    fork = dataclasses.make_dataclass(
        "Fork", [("rope", int, 0)], bases=(GPTConfig,), frozen=True)
    monkeypatch.setattr(gpt, "GPTConfig", fork)
    monkeypatch.setattr(model, "config", fork(**vars(model.config), rope=7))
    gpt.save_checkpoint(str(tmp_path / "x.pt"), model)
    load_gpt2.export(str(tmp_path / "x.pt"), str(tmp_path / "new"))
    for path in folder.iterdir():
        written = tmp_path / "new" / path.name
        assert written.read_bytes() == path.read_bytes(), path.name


@gpt2
@pytest.mark.parametrize("kept", (
    pytest.param("new/config.json", id="a folder with a file"),
    pytest.param("new", id="a file"),
))
def test_what_exists_is_not_exported_to_and_stays(small, tmp_path, kept):
    (tmp_path / kept).parent.mkdir(exist_ok=True)
    (tmp_path / kept).write_text("mine")
    refused("new cannot be made: name a new folder", load_gpt2.export, small[1],
            str(tmp_path / "new"))
    assert (tmp_path / kept).read_text() == "mine"


@gpt2
def test_a_folder_that_just_appeared_is_not_exported_to(small, tmp_path, monkeypatch):
    """Who looks first and makes it later would write into a folder of someone else."""
    def exists(path):
        return False

    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text("mine")
    monkeypatch.setattr(os.path, "exists", exists)
    refused("new cannot be made", load_gpt2.export, small[1], str(tmp_path / "new"))
    assert os.listdir(tmp_path / "new") == ["config.json"]
    assert (tmp_path / "new" / "config.json").read_text() == "mine"


@gpt2
def test_an_export_that_is_interrupted_leaves_nothing(small, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(load_gpt2, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_gpt2.export(small[1], str(tmp_path / "new"))
    assert os.listdir(tmp_path) == []


@gpt2
def test_an_export_of_a_damaged_checkpoint_leaves_nothing(small, tmp_path):
    data = bytearray(pathlib.Path(small[1]).read_bytes())
    data[len(data) // 2] ^= 1  # a single bit
    (tmp_path / "x.pt").write_bytes(data)
    refused("x.pt cannot be read.*checksum", load_gpt2.export, str(tmp_path / "x.pt"),
            str(tmp_path / "new"))
    assert os.listdir(tmp_path) == ["x.pt"]


@gpt2
@posix
@pytest.mark.parametrize("size", (
    pytest.param(1000, id="in the vocabulary"),
    pytest.param(20_000, id="in the weights"),
))
def test_an_export_to_a_full_disk_leaves_nothing(small, tmp_path, size):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        refused("new could not be written.*too large", load_gpt2.export, small[1],
                str(tmp_path / "new"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


# ---- Folders by Hugging Face ---------------------------------------------------------


@pytest.fixture
def folder(small, tmp_path):
    """Returns a copy of the small export, to change."""
    return pathlib.Path(shutil.copytree(small[2], tmp_path / "copy"))


def stored(folder):
    """Returns the tensors of model.safetensors as they are stored."""
    return safetensors.torch.load((folder / "model.safetensors").read_bytes())


def store(folder, weights, name="model.safetensors"):
    """Writes such a file anew. Older safetensors map what they read: it is removed."""
    (folder / name).unlink(missing_ok=True)
    safetensors.torch.save_file(weights, folder / name)


def changed(weights, change):
    """Returns {name: what change makes of the tensor}."""
    return {name: change(weight) for name, weight in weights.items()}


def reconfigure(folder, **changes):
    """Changes what config.json says."""
    content = read(folder / "config.json") | changes
    (folder / "config.json").write_text(json.dumps(content))


@gpt2
@pytest.mark.parametrize("name, value", (
    pytest.param("model_type", "gptj"),
    pytest.param("activation_function", "gelu"),
    pytest.param("layer_norm_epsilon", 1e-6),
    pytest.param("scale_attn_weights", False),
    pytest.param("scale_attn_by_inverse_layer_idx", True),

))
def test_a_model_that_computes_something_else_is_refused(folder, name, value):
    reconfigure(folder, **{name: value})
    refused(f"config.json: {name} is {value!r}; GPT-2 has", load_gpt2.load_gpt2,
            str(folder))


@gpt2
def test_both_names_of_gpt2s_gelu_are_taken(folder, small):
    reconfigure(folder, activation_function="gelu_pytorch_tanh")
    same(load_gpt2.load_gpt2(str(folder)), small[0])


@gpt2
def test_a_config_that_says_no_more_than_the_sizes_is_taken(folder, small):
    content = read(folder / "config.json")
    sizes = {name: content[name] for name in load_gpt2.HUGGING_FACE.values()}
    (folder / "config.json").write_text(json.dumps(sizes))
    same(load_gpt2.load_gpt2(str(folder)), small[0])


@gpt2
def test_a_size_that_is_missing_in_config_json_is_named(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 257}')
    refused("config.json does not have GPT-2's sizes .*n_positions",
            load_gpt2.load_gpt2, str(folder))


@gpt2
@pytest.mark.parametrize("size", (256, 50258))
def test_vocabularies_without_all_bytes_or_with_more_tokens_are_refused(folder, size):
    """A padded one, such as nanoGPT's of 50,304, would give ids that no text has."""
    for name in ("vocab.json", "tokenizer.json"):
        (folder / name).unlink()
    reconfigure(folder, vocab_size=size)
    store(folder, stored(folder) | {"wte.weight": torch.zeros(size, 12)})
    refused(f"{size} tokens are not GPT-2's vocabulary", load_gpt2.load_gpt2, str(folder))


@gpt2
@pytest.mark.parametrize("name", ("vocab.json", "tokenizer.json"))
def test_a_tokenizer_with_other_tokens_is_refused(folder, name):
    """Other models have as many tokens as GPT-2 too, such as GPT2-Spanish."""
    text = (folder / name).read_text("utf-8")
    (folder / name).write_text(text.replace('"A":', '"AA":'), "utf-8")
    refused(f"{name} is not GPT-2's tokenizer .*other tokens", load_gpt2.load_gpt2,
            str(folder))


@gpt2
def test_a_tokenizer_of_another_kind_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"model": null}')
    refused("tokenizer.json is not GPT-2's tokenizer", load_gpt2.load_gpt2, str(folder))


@gpt2
def test_a_folder_needs_no_tokenizer(folder, small):
    for name in ("vocab.json", "tokenizer.json", "merges.txt"):
        (folder / name).unlink()
    same(load_gpt2.load_gpt2(str(folder)), small[0])


@gpt2
def test_names_and_masks_of_older_files_are_taken(folder, small):
    weights = {"transformer." + name: w for name, w in stored(folder).items()}
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    weights["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    store(folder, weights)
    same(load_gpt2.load_gpt2(str(folder)), small[0])


@gpt2
def test_an_output_layer_alone_is_the_embedding_too(folder, small):
    weights = stored(folder)
    weights["lm_head.weight"] = weights.pop("wte.weight")
    store(folder, weights)
    same(load_gpt2.load_gpt2(str(folder)), small[0])


@gpt2
def test_an_output_layer_of_its_own_is_refused(folder):
    weights = stored(folder)
    weights["lm_head.weight"] = weights["wte.weight"] + 1
    store(folder, weights)
    refused("lm_head.weight must equal wte.weight", load_gpt2.load_gpt2, str(folder))


@gpt2
def test_an_output_layer_that_repeats_the_embedding_is_taken(folder, small):
    weights = stored(folder)
    weights["lm_head.weight"] = weights["wte.weight"].clone()
    store(folder, weights)
    same(load_gpt2.load_gpt2(str(folder)), small[0])


@gpt2
def test_sixteen_bits_become_thirty_two(folder, small):
    store(folder, changed(stored(folder), torch.Tensor.half))
    expected = changed(small[0].state_dict(), torch.Tensor.half)
    loaded = load_gpt2.load_gpt2(str(folder)).state_dict()
    same(dict(loaded), changed(expected, torch.Tensor.float))


@gpt2
def test_a_missing_tensor_is_named(folder):
    weights = stored(folder)
    del weights["wte.weight"]
    store(folder, weights)
    refused("does not have the weights of GPT-2.*Missing.*wte", load_gpt2.load_gpt2,
            str(folder))


@gpt2
def test_matrices_are_stored_as_input_by_output(folder, small):
    """Also the square one, attn/c_proj, which would fit without the transpose."""
    weights = {}
    for name, weight in stored(folder).items():
        theirs = load_gpt2.openai_name(name)
        array = weight.numpy().astype(np.float64)
        weights[theirs] = array[None] if theirs.endswith("/w") else array
    idx = torch.randint(257, (1, 16))
    logits = load_gpt2.load_gpt2(str(folder))(idx)[0].detach()
    expected = oracle(weights, n_head=3, tokens=idx[0])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@gpt2
def test_forgotten_transposes_are_refused(folder, small):
    store(folder, dict(small[0].state_dict()))  # as nn.Linear has them
    refused("does not have the weights of GPT-2.*size mismatch", load_gpt2.load_gpt2,
            str(folder))


# ---- Which of a folder's files are read ----------------------------------------------


def split(folder):
    """Splits model.safetensors into a.safetensors and b.safetensors, and an index."""
    weights = stored(folder)
    (folder / "model.safetensors").unlink()
    places = {name: "a.safetensors" if "h.0" in name else "b.safetensors"
              for name in weights}
    for file in set(places.values()):
        part = {name: w for name, w in weights.items() if places[name] == file}
        store(folder, part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_weights(folder, name):
    """Writes a file of weights that are all 0."""
    store(folder, changed(stored(folder), torch.zeros_like), name)


@gpt2
def test_a_stray_file_of_weights_is_not_read(folder, small):
    other_weights(folder, "model_old.safetensors")
    same(load_gpt2.load_gpt2(str(folder)), small[0])


@gpt2
def test_the_index_says_which_files_are_read(folder, small):
    for stray in ("0.safetensors", "model-00001-of-00002.safetensors", "z.safetensors"):
        other_weights(folder, stray)
    split(folder)
    same(load_gpt2.load_gpt2(str(folder)), small[0])


@gpt2
def test_a_file_that_is_whole_wins_over_an_index(folder, small):
    weights = stored(folder)
    split(folder)
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(b"no weights")
    store(folder, weights)
    same(load_gpt2.load_gpt2(str(folder)), small[0])


@gpt2
def test_a_missing_file_of_an_index_is_named(folder):
    split(folder)
    (folder / "b.safetensors").unlink()
    refused("copy.b.safetensors is missing", load_gpt2.load_gpt2, str(folder))


@gpt2
@pytest.mark.parametrize("text, words", (
    pytest.param("{}", "has no weight_map", id="without the map"),
    pytest.param("[]", "has no weight_map", id="a list"),
    pytest.param("{", "is not JSON", id="cut off"),
))
def test_a_damaged_index_is_refused(folder, text, words):
    split(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(f"model.safetensors.index.json {words}", load_gpt2.load_gpt2, str(folder))


@gpt2
def test_a_damaged_file_of_weights_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    refused("model.safetensors is damaged: get it again", load_gpt2.load_gpt2,
            str(folder))


@gpt2
def test_a_file_of_the_older_kind_alone_says_what_to_do(folder):
    os.replace(folder / "model.safetensors", folder / "pytorch_model.bin")
    refused("model.safetensors is missing; save_pretrained.*pytorch_model.bin",
            load_gpt2.load_gpt2, str(folder))


# ---- Converting ----------------------------------------------------------------------


@gpt2
@pytest.mark.parametrize("name", ("124M", "openai-community/gpt2", "a/b/124M"))
def test_a_folder_wins_over_the_same_name_elsewhere(small, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small[2], name)
    main("load_gpt2.py", name)
    assert os.listdir("models") == [os.path.basename(name) + ".pt"]
    path = os.path.join("models", os.path.basename(name) + ".pt")
    model, state = load(path)
    same(model, small[0])
    assert state["step"] == 0


@pytest.mark.parametrize("flags, words", (
    pytest.param("copy", "models.copy.pt exists: delete it", id="default name"),
    pytest.param("copy --out=x.pt", "x.pt exists: delete it", id="--out"),
    pytest.param("355M --out=x.pt", "x.pt exists: delete it", id="before a download"),
    pytest.param("o/n --out=x.pt", "x.pt exists: delete it", id="before the hub"),
    pytest.param("o/copy", "models.copy.pt exists: delete it", id="a name on the hub"),
))
def test_a_checkpoint_that_exists_is_not_replaced(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    os.mkdir("models")
    os.mkdir("copy")
    kept = [pathlib.Path("x.pt"), pathlib.Path("models", "copy.pt")]
    for path in kept:
        path.write_text("mine")
    refused(words, main, "load_gpt2.py", *flags.split())
    assert [path.read_text() for path in kept] == ["mine", "mine"]
    assert os.listdir("models") == ["copy.pt"]


@pytest.mark.parametrize("source", (
    pytest.param("gpt2", id="no slash"),
    pytest.param("a/b/c", id="two slashes"),
    pytest.param("a/", id="nothing behind the slash"),
    pytest.param("../a", id="a folder above that is missing"),
    pytest.param("./a", id="a folder here that is missing"),
    pytest.param("here/file", id="a file"),
))
def test_what_is_neither_a_folder_nor_a_name_on_the_hub_is_refused(
        tmp_path, monkeypatch, server, source):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    refused(f"{source} is neither a size .124M, .* nor OWNER/NAME, nor a folder",
            main, "load_gpt2.py", source)
    assert server.asked == []
    assert os.listdir() == ["here"]


@pytest.mark.parametrize("flags", (
    pytest.param("", id="nothing"),
    pytest.param("copy --export x.pt new", id="both"),
))
def test_one_of_a_source_and_an_export_is_needed(flags):
    refused("give a size, a name or a folder, or --export", main, "load_gpt2.py",
            *flags.split())


@gpt2
@pytest.mark.parametrize("sizes", (
    pytest.param({"vocab_size": 257, "block_size": 2}, id="cut to block_size + 1"),
    pytest.param({"vocab_size": 50257, "block_size": 64}, id="the whole sentence"),
))
def test_the_loss_of_an_english_sentence_is_printed(tmp_path, capsys, sizes):
    write_openai(tmp_path / "new", tiny(**sizes))
    main("load_gpt2.py", tmp_path / "new", f"--out={tmp_path / 'x.pt'}")
    model, _ = load(tmp_path / "x.pt")
    V = model.config.vocab_size
    ids = gpt.encode(load_gpt2.SENTENCE, V)
    ids = torch.tensor([ids[: model.config.block_size + 1]])
    loss = model(ids[:, :-1], ids[:, 1:])
    expected = (f"an English sentence costs {loss:.1f} nats a token; "
                f"a blind guess {math.log(V):.1f}\n")
    out = capsys.readouterr().out
    assert expected in out
    assert f"wrote {tmp_path / 'x.pt'}; try: python " in out


# ---- Downloads -----------------------------------------------------------------------


class Shelf(http.server.BaseHTTPRequestHandler):
    """Serves the files of server.folder in ranges, and fails as server.fault says.

    It sends each request on to a path under /store, as the hub does.
    """

    def do_GET(self):
        """Answers a request: with the file, or with the place where it is."""
        if not self.path.startswith("/store/"):
            self.server.asked.append((self.path, self.headers["Range"]))
            self.send_response(302)
            self.send_header("Location", "/store" + self.path)
            self.end_headers()
        elif self.server.fault == "missing":
            self.send_error(404)
        else:
            path = pathlib.Path(self.server.folder, os.path.basename(self.path))
            self.send_file(path.read_bytes())

    def send_file(self, data):
        """Sends the range that was asked for."""
        first = 0
        if self.server.fault != "no ranges":
            first = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        if first >= len(data):
            self.send_error(416)
            return
        self.send_response(200 if self.server.fault == "no ranges" else 206)
        page = self.server.fault == "page"
        self.send_header("Content-Type", "text/html" if page else "binary/octet-stream")
        self.send_header("Content-Length", len(data) - first)
        self.end_headers()
        end = len(data) // 2 if self.server.fault == "cut" else len(data)
        self.wfile.write(data[first:end])


@pytest.fixture
def server(monkeypatch):
    """Returns a server on this machine that stands in for all others."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shelf)
    server.folder, server.fault = TF / "one-shard", None
    server.asked = []
    options = {"poll_interval": 0.01}  # seconds that shutdown may wait
    threading.Thread(target=server.serve_forever, kwargs=options, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    urlopen = urllib.request.urlopen

    def open_here(request, **options):
        request.full_url = re.sub("https://[^/]+", address, request.full_url)
        return urlopen(request, **options)

    monkeypatch.setattr(urllib.request, "urlopen", open_here)
    yield server
    server.shutdown()
    server.server_close()


ONE_SHARD = ("hparams.json", load_gpt2.DATA)
HALF = (TF / "one-shard" / "hparams.json").stat().st_size // 2


def fetched(folder):
    """Downloads the two files of one-shard into a folder and compares their bytes."""
    load_gpt2.download("https://x.org/124M", ONE_SHARD, str(folder))
    assert set(os.listdir(folder)) == set(ONE_SHARD)
    for name in ONE_SHARD:
        assert (folder / name).read_bytes() == (TF / "one-shard" / name).read_bytes()


def test_files_are_downloaded_once(server, tmp_path):
    fetched(tmp_path / "new")
    assert server.asked == [(f"/124M/{name}", "bytes=0-") for name in ONE_SHARD]
    fetched(tmp_path / "new")
    assert len(server.asked) == 2


def test_a_download_that_was_cut_goes_on(server, tmp_path):
    server.fault = "cut"
    refused(f"hparams.json failed: try again.* into {tmp_path} by hand.*part has them",
            fetched, tmp_path)
    server.fault, server.asked = None, []
    fetched(tmp_path)
    assert server.asked[0] == ("/124M/hparams.json", f"bytes={HALF - 1}-")


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    (tmp_path / "hparams.json.part").write_bytes(b"an earlier try")
    server.fault = "no ranges"
    fetched(tmp_path)


def test_a_download_that_only_lacks_its_name_is_finished(server, tmp_path):
    """A server would refuse to send the nothing that is left, so it asks for a byte."""
    shutil.copy(TF / "one-shard" / load_gpt2.DATA, tmp_path / "whole")
    os.replace(tmp_path / "whole", tmp_path / (load_gpt2.DATA + ".part"))
    fetched(tmp_path)


def test_what_came_of_a_longer_file_is_named(server, tmp_path):
    """The server has another file by now, and refuses the range again and again."""
    part = tmp_path / "hparams.json.part"
    part.write_bytes(b"x" * 1000)
    refused(f"failed: try again, if need be without {part}, .*416", fetched, tmp_path)
    part.unlink()
    fetched(tmp_path)


@pytest.mark.parametrize("fault, words", (
    pytest.param("missing", "404", id="no such file"),
    pytest.param("page", "the answer is a web page", id="the login of a hotel"),
))
def test_a_server_without_the_file_is_no_download(server, tmp_path, fault, words):
    server.fault = fault
    refused(f"hparams.json failed: try again.*{words}", fetched, tmp_path)
    assert not (tmp_path / "hparams.json").exists()


def test_a_server_that_is_away_is_one_line(server, tmp_path):
    server.shutdown()
    server.server_close()
    refused("hparams.json failed: try again.*refused", fetched, tmp_path)


@gpt2
def test_a_size_is_downloaded_from_openai(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.folder = tmp_path / "theirs"
    model = tiny(vocab_size=257)
    write_openai(server.folder, model)
    main("load_gpt2.py", "355M")
    path = "/gpt-2/models/355M/"
    assert server.asked == [(path + name, "bytes=0-") for name in ONE_SHARD]
    same(load("models/gpt2-355M.pt")[0], model)
    assert set(os.listdir("models/355M")) == set(ONE_SHARD)


ON_THE_HUB = ("config.json", "vocab.json", "model.safetensors")
HUB_PATH = "/o-1/my.gpt_2/resolve/main/"


@pytest.fixture
def hub(server, small, tmp_path, monkeypatch):
    """Returns a server in place of the hub that has the small model as o-1/my.gpt_2."""
    monkeypatch.chdir(tmp_path)
    server.folder = small[2]
    return server


@gpt2
def test_a_name_on_the_hub_becomes_the_checkpoint_of_its_folder(hub, small):
    main("load_gpt2.py", "o-1/my.gpt_2")
    assert hub.asked == [(HUB_PATH + name, "bytes=0-") for name in ON_THE_HUB]
    main("load_gpt2.py", small[2], "--out=x.pt")
    ours = pathlib.Path("models", "my.gpt_2.pt").read_bytes()
    assert ours == pathlib.Path("x.pt").read_bytes()


@gpt2
def test_what_came_from_the_hub_is_not_asked_for_again(hub, small):
    kept = pathlib.Path("models", "o-1", "my.gpt_2")
    shutil.copytree(small[2], kept)
    (kept / "vocab.json").unlink()
    main("load_gpt2.py", "o-1/my.gpt_2")
    assert hub.asked == [(HUB_PATH + "vocab.json", "bytes=0-")]
    same(load("models/my.gpt_2.pt")[0], small[0])


@gpt2
def test_a_cut_download_from_the_hub_goes_on(hub, small):
    hub.fault = "cut"
    refused("huggingface.co/o-1/my.gpt_2/resolve/main/config.json failed", main,
            "load_gpt2.py", "o-1/my.gpt_2")
    assert not os.path.exists("models/my.gpt_2.pt")
    hub.fault, hub.asked = None, []
    half = (small[2] / "config.json").stat().st_size // 2
    main("load_gpt2.py", "o-1/my.gpt_2")
    assert hub.asked[0] == (HUB_PATH + "config.json", f"bytes={half - 1}-")
    same(load("models/my.gpt_2.pt")[0], small[0])

# ---- The README ----------------------------------------------------------------------

COMMANDS = re.findall("^(?:python|torchrun) .*",
                      "".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)),
                      flags=re.MULTILINE)


def run_command(line):
    """Runs a command of the README with a small model and few steps."""
    words = shlex.split(line)
    script = next(word for word in words if word.endswith(".py"))
    flags = words[words.index(script) + 1 :]
    if script == "sample.py":
        flags += ["--max_new_tokens=3"]
    elif "--resume" in flags:
        flags += ["--max_iters=3"]
    elif script == "train.py":
        small = SMALL[-3:] if "--init_from" in line else SMALL
        flags += [*small, "--max_iters=2", "--eval_windows=1"]
        for folder in re.findall(r"--out_dir=(\S+)", line):
            shutil.rmtree(folder, ignore_errors=True)  # two recipes write to out
    if words[0] == "torchrun":
        end(start(script, *flags, before=TORCHRUN))
    else:
        main(script, *flags)


@gpt2
def test_every_command_of_the_readme(tmp_path, monkeypatch):
    """In their order, in one folder. pip, pytest and curl are not commands of this test."""
    monkeypatch.chdir(tmp_path)
    for name in ("shakespeare.txt", "my.txt", "other.txt"):
        shutil.copy(STORY_PATH, name)
    shutil.unpack_archive(TF / "vocab.zip", "models/124M")  # instead of OpenAI's server
    assert len(COMMANDS) > 12
    for line in COMMANDS:
        try:
            run_command(line)
        except BaseException as error:
            raise AssertionError(f"the README's command failed: {line}") from error
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(block, {})


@gpt2
@pytest.mark.parametrize("row", re.findall(r"^\| (\w+\.py) \| (\d+)-(\d+) \| `([^`]+)`", README,
                                           flags=re.MULTILINE))
def test_line_ranges_of_the_readme(row):
    """The first line of a range holds what the table names, and the last is in the file."""
    name, first, last, words = row
    lines = pathlib.Path(HERE, name).read_text("utf-8").splitlines()
    assert words in lines[int(first) - 1]
    assert int(last) <= len(lines)
    assert int(last) == len(lines) or lines[int(last)].strip() == ""


def test_the_readme_has_line_ranges():
    assert len(re.findall(r"^\| \w+\.py \| \d+-\d+ \| `", README, flags=re.MULTILINE)) > 8
