"""Trains a GPT-2 on a text, from nothing or from a checkpoint.

    python train.py --batch_size=2 --max_iters=150     the built-in story, on any machine
    python train.py --data=my.txt --out_dir=my         your own text
    python train.py --resume                           goes on where it stopped
    torchrun --nproc_per_node=4 train.py ...           one run on four GPUs

Read gpt.py first. Here come the functions, then the script, which runs from top to bottom.
"""
import argparse
import contextlib
import csv
import ctypes
import datetime
import functools
import glob
import hashlib
import itertools
import math
import os
import signal
import sys
import time

import filelock
import numpy as np
import torch
import torch.distributed as dist

from gpt import (DTYPES, END_OF_TEXT, GPT, GPTConfig, choose_device, command_line, decode_utf8,
                 encode, explain, generate, get_tokenizer, load_checkpoint, number, one_line,
                 require, save_checkpoint, whole_file)

STORY = os.path.join(os.path.dirname(os.path.realpath(__file__)), "data", "story.txt")
# torchrun tells each process how many there are, and its number among all and on its machine.
PROCESSES = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK", 0)) if PROCESSES > 1 else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0)) if PROCESSES > 1 else 0

def say(*words, stream="stdout", **options):
    """print, on process 0. A terminal or pipe that has gone away does not end the training."""
    if RANK == 0:
        try:
            print(*words, file=getattr(sys, stream), **options)
        except OSError:
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))

# ---- Flags ---------------------------------------------------------------------------------------
def flags():
    """The command line's parser. A flag that nanoGPT has too is named as there."""
    parser, path = command_line(__doc__), os.path.expanduser
    natural, positive, real = number(int, 0), number(int, 1), number(float, 0)
    on_off, unset = argparse.BooleanOptionalAction, argparse.SUPPRESS  # unset: absent from args
    files = parser.add_argument_group("what to read and write")
    files.add_argument("--data", type=path, default=STORY, help="text, folder of .txt, or .bin")
    files.add_argument("--out_dir", type=path, default="out", help="where all results go")
    flag = files.add_mutually_exclusive_group().add_argument
    flag("--resume", action="store_true", help="go on with the run in out_dir, with its flags")
    flag("--init_from", type=path, default=unset, help="a checkpoint whose weights start a new run")
    flag = parser.add_argument_group("model").add_argument
    flag("--n_layer", type=positive, default=12, help="blocks")
    flag("--n_head", type=positive, default=12, help="attention heads in a block")
    flag("--n_embd", type=positive, default=768, help="channels of a token")
    flag("--block_size", type=positive, default=256, help="tokens in a window")
    flag("--dropout", type=number(float, 0, 0.999), default=0.1, help="share of numbers dropped")
    flag("--bias", action=on_off, default=True, help="biases in linear layers and LayerNorms")
    flag = parser.add_argument_group("training").add_argument
    flag("--max_iters", type=natural, default=150, help="steps, from the run's beginning")
    flag("--batch_size", type=positive, default=2, help="windows computed at once")
    flag("--gradient_accumulation_steps", type=positive, default=1, help="batches in a step")
    flag("--learning_rate", type=number(float, 1e-12), default=4e-4, help="the highest rate")
    flag("--min_lr", type=real, default=unset, help="lowest rate (default: learning_rate / 10)")
    flag("--warmup_iters", type=natural, default=30, help="steps in which the rate rises")
    flag("--lr_decay_iters", type=natural, default=unset, help="decay ends at (default: max_iters)")
    flag("--weight_decay", type=real, default=0.1, help="how fast weights shrink")
    # AdamW averages about 1 / (1 - beta) gradients: 5 for 0.8, better in a short run than 0.9's 10.
    flag("--beta1", type=number(float, 0, 0.9999), default=0.8, help="AdamW's memory of gradients")
    flag("--beta2", type=number(float, 0, 0.9999), default=0.95, help="memory of gradients squared")
    flag("--grad_clip", type=real, default=1.0, help="the longest gradient; 0: of any length")
    flag("--seed", type=number(int, 0, 2**63 - 1), default=1337, help="decides all that is random")
    flag = parser.add_argument_group("evaluation").add_argument
    flag("--eval_interval", type=positive, default=30, help="steps between evaluations")
    flag("--eval_iters", type=positive, default=20, help="steps' worth of text to evaluate on")
    flag("--log_interval", type=positive, default=10, help="steps between printed lines")
    flag("--start", default="Every effort moves you", help="the prompt of the samples")
    flag = parser.add_argument_group("machine").add_argument
    flag("--device", default="auto", help="cuda, mps or cpu; auto: the first that is there")
    flag("--dtype", default="auto", choices=DTYPES, help="of matrix products; auto: what is fast")
    flag("--compile", action=on_off, default=unset, help="torch.compile (default: on cuda)")
    return parser

# What --resume may change. Another batch_size: dropout drops other numbers of the same windows.
MAY_CHANGE = ("data", "out_dir", "resume", "max_iters", "batch_size", "gradient_accumulation_steps",
              "eval_interval", "log_interval", "start", "device", "compile")

def starting_point():
    """Reads the flags and the checkpoint they name -> args, weights or {}, training state or {}."""
    parser = flags()
    args = parser.parse_args()
    path, weights, state, saved = os.path.join(args.out_dir, "ckpt.pt"), {}, {}, {}
    if args.resume:
        model, state = load_checkpoint(path, verify=True)
        require({"optimizer", "log", "args"} <= state.keys(),
                f"{path} has weights but no run: start a new one with --init_from")
        saved, weights = state["args"] | {"out_dir": args.out_dir}, model.state_dict()
    require(args.resume or not os.path.exists(path),
            f"{path} holds a run: give --resume, another --out_dir, or delete it")
    if "init_from" in args:
        path = args.init_from
        model, _ = load_checkpoint(path, verify=True)
        names = ("vocab_size", "n_layer", "n_head", "n_embd", "bias")
        saved, weights = {name: getattr(model.config, name) for name in names}, model.state_dict()
    parser.set_defaults(**saved)  # what is given on the command line replaces what was saved
    args = parser.parse_args()
    args.data = os.path.abspath(args.data)
    args.vocab_size = GPTConfig.vocab_size  # GPT-2's tokens are the only ones here
    args.windows_per_step = args.batch_size * args.gradient_accumulation_steps * PROCESSES
    vars(args).setdefault("min_lr", args.learning_rate / 10)
    vars(args).setdefault("lr_decay_iters", args.max_iters)
    if args.resume and args.dtype == "auto":
        args.dtype = saved["dtype"]  # a typed --dtype=auto means what it meant then
    changed = [f"{name}={getattr(args, name)} instead of {value}" for name, value in saved.items()
               if name not in MAY_CHANGE and getattr(args, name) != value]
    require(not changed, f"{path} cannot go on with {', '.join(changed)} (windows_per_step is "
            "batch_size x gradient_accumulation_steps x processes)")
    if weights:
        positions = weights["wpe.weight"]
        require(args.block_size <= len(positions),
                f"--block_size={args.block_size}: {path} has only {len(positions)} positions")
        weights["wpe.weight"] = positions[: args.block_size]  # a shorter window has the first ones
    return args, weights, state

# ---- Text to tokens ------------------------------------------------------------------------------
def read_text(files):
    """Yields the text of the files in parts. Encoded one by one, they give the ids of the whole: a
    part ends before white space, and no token has white space after a visible character."""
    rest = ""
    for name in files:
        if name != files[0]:
            # Windows may reach from one file into the next, and attention looks across. As in
            # GPT-2's own training, the model has to learn what this token means.
            rest += "<|endoftext|>"
        offset = 0
        with open(name, "rb") as file:
            while data := b"".join(file.readlines(2**20)):  # whole lines, a megabyte or more
                text = rest + decode_utf8(data, name, offset)
                part = text.rstrip()
                yield part
                rest = text[len(part) :]
                offset += len(data)
    yield rest

def kept_tokens(folder, key):
    """The tokens (n,) uint16 of the text with this key, if folder has all of them, else None."""
    for path in glob.glob(os.path.join(glob.escape(folder), f"tokens-{key}-*.bin")):
        n, odd = divmod(os.path.getsize(path), 2)
        if path.endswith(f"-{n}.bin") and not odd:
            return np.memmap(path, dtype=np.uint16, mode="r")

def load_tokens(path, folder, block_size, key=None):
    """--data -> its tokens (n,) uint16, mapped from a file; their key, a hash. The tokens of a text
    are written to folder once. A run that has a key can go on from there without its text."""
    if not os.path.exists(path):
        tokens = kept_tokens(folder, key)
        require(tokens is not None, f"--data={path} is not there; --data=NEW says where it is")
        return tokens, key
    if path.endswith(".bin"):
        return read_bin(path)
    files = [path]
    if os.path.isdir(path):
        files = sorted(glob.glob(os.path.join(glob.escape(path), "*.[tT][xX][tT]")))
    sha, characters = hashlib.sha256(), 0
    for text in read_text(files):
        sha.update(text.encode())
        characters += len(text)
    say(f"{path}: {characters:,} characters in {len(files)} file(s)")
    require(characters > 0, f"--data={path}: there is no text in it")
    key = sha.hexdigest()[:16]
    if kept_tokens(folder, key) is None:
        os.makedirs(folder, exist_ok=True)
        nameless = os.path.join(folder, f"tokens-{key}.{os.getpid()}")  # n is not known yet
        texts = read_text(files)
        with whole_file(nameless) as file:
            while group := list(itertools.islice(texts, 16)):  # tiktoken encodes 16 in parallel
                for ids in get_tokenizer().encode_batch(group, allowed_special="all"):
                    file.write(np.array(ids, dtype=np.uint16))  # two bytes hold 50,257 ids
                n = file.tell() // 2
                say(f"{n:,} tokens", end="\r")
            say()
            split(n, path, block_size)  # only to check: a text that is too short leaves no file
        os.replace(nameless, os.path.join(folder, f"tokens-{key}-{n}.bin"))
    return kept_tokens(folder, key), key

def read_bin(path):
    """A file of uint16 token ids, such as nanoGPT's. Returns what load_tokens returns."""
    with explain(f"--data={path} is not bare uint16 tokens of GPT-2", ValueError):
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        require(tokens.max() <= END_OF_TEXT, f"token {tokens.argmax()} is {tokens.max()}")
        require(tokens[:3].tobytes() != b"\x93NUMPY", "but a .npy file")
        require(tokens[1::2].any(), "but wider integers")  # whose upper halves are 0
    return tokens, hashlib.sha256(tokens).hexdigest()[:16]

def split(n, path, block_size):
    """n tokens -> the sizes of the training split, nine tenths, and of the validation split."""
    n_train, n_val = int(0.9 * n), n - int(0.9 * n)
    require(n_val > block_size, f"--data={path} is too short: with {n_val} tokens to validate, the "
            f"largest --block_size is {n_val - 1}")
    return n_train, n_val

# ---- Windows, schedule, evaluation, plot ---------------------------------------------------------
@functools.lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def shuffled(n_windows, seed, epoch):
    """The order in which an epoch, one pass over the text, reads the windows."""
    return np.random.default_rng((seed, epoch)).permutation(n_windows)

def windows_of(step, micro, args, n_windows):
    """The numbers of the batch_size windows in a micro-batch, a pure function of seed, step and
    micro: there is no state to save, and a resumed run reads what it would have read."""
    first = step * args.windows_per_step + micro * args.batch_size  # windows read before these
    return [int(shuffled(n_windows, args.seed, i // n_windows)[i % n_windows])
            for i in range(first, first + args.batch_size)]

def get_batch(tokens, windows, block_size, device):
    """-> inputs and targets, both (B, T) int64. A token's target is the token after it, so a window
    trains T predictions at once: place t sees tokens 0 to t."""
    rows = np.stack([tokens[w * block_size : (w + 1) * block_size + 1] for w in windows])
    rows = torch.from_numpy(rows.astype(np.int64)).to(device)  # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]

def learning_rate(step, args):
    """The rate of a step, counted from 0: a linear warm-up, since AdamW's averages rest on few
    gradients at first, then half a cosine down to min_lr, to settle into a minimum."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    if step >= args.lr_decay_iters:
        return args.min_lr
    progress = (step - args.warmup_iters) / (args.lr_decay_iters - args.warmup_iters)
    return args.min_lr + (args.learning_rate - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2

def sum_over_processes(*values):
    """Adds up each of the values, Python numbers, over all processes."""
    if PROCESSES == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()

@torch.no_grad()
def evaluate(model, tokens, args, autocast):
    """The mean loss, in nats, on the first windows of tokens, as many as eval_iters steps read. It
    draws no random number: the run is the same however often it is evaluated."""
    n_windows = min((len(tokens) - 1) // args.block_size, args.eval_iters * args.windows_per_step)
    mine, total = range(n_windows)[RANK::PROCESSES], 0.0  # this process's share
    for start in range(0, len(mine), args.batch_size):
        windows = mine[start : start + args.batch_size]
        with autocast:
            loss = model(*get_batch(tokens, windows, args.block_size, model.wte.weight.device))
        total += loss.item() * len(windows)
    return sum_over_processes(total)[0] / n_windows

def plot(log, tokens_per_step, path):
    """Draws the losses in log over steps, with perplexity on the right and tokens seen above."""
    try:
        from matplotlib.figure import Figure
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for column, style in (("loss", "C7-"), ("train_loss", "C0o-"), ("val_loss", "C1o-")):
            rows = [row for row in log if column in row]
            axes.plot([row["iter"] for row in rows], [row[column] for row in rows], style,
                      label=column)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        right, top = axes.twinx(), axes.twiny()
        right.set(yscale="log", ylim=np.exp(axes.get_ylim()), ylabel="perplexity = exp(loss)")
        top.set(xlim=np.multiply(axes.get_xlim(), tokens_per_step), xlabel="tokens seen")
        figure.savefig(path, dpi=110)
    except Exception as error:  # a picture is not worth a run
        say(f"warning: no {path}: {one_line(error)}", stream="stderr")

# ---- The script ----------------------------------------------------------------------------------
COLUMNS = ("iter", "tokens", "loss", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s")

if __name__ == "__main__":
    args, weights, state = starting_point()
    step = first = state.get("step", 0)
    saved_at = state.get("step", -1)  # the step that ckpt.pt has, or -1
    needed = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    require(PROCESSES == 1 or needed <= os.environ.keys(),
            "WORLD_SIZE is set without torchrun's other variables: use torchrun")

    # Device. Matrix products are computed in dtype. Weights, gradients, the x between blocks,
    # LayerNorm and the loss stay float32.
    if PROCESSES > 1 and args.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)  # the one that "cuda" means from here on
    device, dtype = choose_device(args.device, args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc gives large freed buffers back to the system. The next step takes them again and
        # pays a page fault for each 4 kB. With these settings glibc keeps them.
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD

    torch.manual_seed(args.seed)  # for the weights that are drawn here
    model = GPT(GPTConfig(block_size=args.block_size, n_layer=args.n_layer, n_head=args.n_head,
                          n_embd=args.n_embd, dropout=args.dropout, bias=args.bias))
    if weights:
        model.load_state_dict(weights)
        weights.clear()  # gives their memory back
    model.to(device)
    parameters = list(model.parameters())

    # Data. The first process of each machine makes the tokens file, and the others find it.
    if PROCESSES > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=12))  # to tokenize a long text
    if LOCAL_RANK > 0:
        dist.barrier()
    tokens, key = load_tokens(args.data, args.out_dir, args.block_size, state.get("key"))
    if PROCESSES > 1 and LOCAL_RANK == 0:
        dist.barrier()
    require(key == state.get("key", key), f"--data={args.data} is not the text of this run")
    n_train, n_val = split(len(tokens), args.data, args.block_size)
    n_windows = (n_train - 1) // args.block_size
    tokens_per_step = args.windows_per_step * args.block_size
    say(f"{n_train:,} tokens to train on, {n_windows:,} windows of {args.block_size}; {n_val:,} to "
        f"validate\n{sum(p.numel() for p in parameters):,} parameters, {device}, {args.dtype}, "
        f"{tokens_per_step:,} tokens a step")

    # Optimizer. AdamW moves a weight by lr times its averaged gradient, divided by the root of its
    # averaged squared gradient. It shrinks matrices and embeddings by lr * weight_decay, so that
    # none grows without need. Biases and gains are too few to overfit, and a gain should not be 0.
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() >= 2]},
         {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}],
        betas=(args.beta1, args.beta2), weight_decay=args.weight_decay, fused=True)
    # float16 has nothing between 0 and 6e-8. The scaler multiplies the loss, and so all gradients,
    # by a large number, and divides the gradients by it before they are used.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if args.resume:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        say(f"going on from step {step}")
    # DDP averages gradients over processes. It and torch.compile share the model's own weights.
    trained = torch.compile(model) if getattr(args, "compile", device.type == "cuda") else model
    if PROCESSES > 1:
        trained = torch.nn.parallel.DistributedDataParallel(trained)

    ckpt_path, best_path, log_path, plot_path = (
        os.path.join(args.out_dir, name) for name in ("ckpt.pt", "best.pt", "log.csv", "loss.png"))
    best = state.get("best", {"step": 0, "val_loss": math.inf})
    log = state.get("log", [])  # rows up to the checkpoint; a resumed run repeats the later steps
    if RANK == 0:
        os.makedirs(args.out_dir, exist_ok=True)
        lock = filelock.FileLock(os.path.join(args.out_dir, "lock"), is_singleton=True)
        with explain(f"--out_dir={args.out_dir}: another train.py is using it", filelock.Timeout):
            lock.acquire(timeout=0)  # the system drops it when this process ends, however it ends
        log_csv = csv.DictWriter(open(log_path, "w", encoding="utf-8", newline="", buffering=1),
                                 COLUMNS, lineterminator="\n")
        with explain(f"{log_path} could not be written", OSError):
            log_csv.writeheader()
            log_csv.writerows(log)

    def record(row):
        log.append(row)
        with explain(f"{log_path} could not be written", OSError):
            log_csv.writerow(row)  # before it is shown
        line = [f"{name} {value:.6g}" for name, value in row.items() if name != "tokens"]
        if step > first:
            left = (time.perf_counter() - begun) * (args.max_iters - step) / (step - first)
            line.append(f"{datetime.timedelta(seconds=int(left))} left")
        say(" | ".join(line))

    def save(row):
        # A model that learns a text by heart gets worse on others. best.pt is from before that.
        if row.get("val_loss", math.inf) < best["val_loss"]:
            best.update(step=step, val_loss=row["val_loss"])
            save_checkpoint(best_path, model, **best)
        save_checkpoint(ckpt_path, model, optimizer=optimizer.state_dict(), log=log, best=best,
                        scaler=scaler.state_dict(), args=vars(args), key=key, step=step,
                        val_loss=row.get("val_loss"))

    def sample():
        prompt = torch.tensor([encode(args.start) or [END_OF_TEXT]], device=device)
        tokens = generate(model, prompt, 40, temperature=0.8, top_k=50,
                          generator=torch.Generator().manual_seed(args.seed))
        text = get_tokenizer().decode([token.item() for token in tokens])
        say("sample: " + (args.start + text).replace("\n", " "))

    def stop_unless_finite(*values):
        if not all(map(math.isfinite, values)):
            say(f"train.py: error: not finite at step {step}: {values}, learning rate "
                f"{learning_rate(step, args):.2e}, {args.dtype}; {ckpt_path} has step {saved_at} "
                "(-1: none) for --init_from with a lower --learning_rate", stream="stderr")
            sys.exit(1)

    caught = []  # signals: the first ends the training after the step, the second at once

    def finish(signum, _):
        caught.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # not by print, which the signal may have interrupted
            os.write(2, b"finishing the step, then saving; once more ends it without saving\n")

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, signal.SIGTERM)  # Windows has no SIGHUP
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(signum, finish)

    say(f"a blind guess costs a loss of ln({args.vocab_size}) = {math.log(args.vocab_size):.4f}")
    row, stop = {"iter": 0, "tokens": 0}, False  # the row of a new run's step 0
    begun = time.perf_counter()
    while True:
        # `step` steps are done. Evaluate, record, save and sample if that is due and the checkpoint
        # that was loaded has not got it already. Then train for one more step.
        model.eval()  # no dropout
        evaluating = step > saved_at and (step % args.eval_interval == 0 or step == args.max_iters)
        if evaluating:
            row["train_loss"] = evaluate(model, tokens[:n_train], args, autocast)
            row["val_loss"] = evaluate(model, tokens[n_train:], args, autocast)
            stop_unless_finite(row["train_loss"], row["val_loss"])
        if RANK == 0 and (evaluating or (step > saved_at and step % args.log_interval == 0)):
            record(row)
        if RANK == 0 and (evaluating or stop):
            save(row)
            saved_at = step
        if RANK == 0 and evaluating:
            plot(log, tokens_per_step, plot_path)
            sample()
        if stop or step >= args.max_iters:
            break

        model.train()
        started = time.perf_counter()
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = 0.0
        for i in range(args.gradient_accumulation_steps):
            micro = i * PROCESSES + RANK  # the micro-batch's number among all of the step
            windows = windows_of(step, micro, args, n_windows)
            inputs, targets = get_batch(tokens, windows, args.block_size, device)
            # Dropout, too, depends on seed, step and micro alone.
            seed = np.random.default_rng((args.seed, step, micro)).integers(2**63)
            torch.manual_seed(int(seed))
            # Gradients of micro-batches add up. With the last of them, DDP (if any) exchanges them.
            trained.require_backward_grad_sync = i == args.gradient_accumulation_steps - 1
            with autocast:
                micro_loss = trained(inputs, targets)
            # Means, divided by their number, add up to the mean of one large batch.
            micro_loss = micro_loss / args.gradient_accumulation_steps
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        scaler.unscale_(optimizer)
        # One odd batch must not throw the weights far: a gradient longer than grad_clip is cut to
        # that length. The norm is its length before.
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)
        loss, stop = sum_over_processes(loss.item() / PROCESSES, len(caught))  # 0 signals: go on
        # When float16 overflows, the scaler skips the step and halves its factor. At 1 it is over.
        may_overflow = scaler.is_enabled() and scaler.get_scale() > 1
        stop_unless_finite(loss, 0.0 if may_overflow else norm.item())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step += 1
        speed = tokens_per_step / (time.perf_counter() - started)
        row = {"iter": step, "tokens": step * tokens_per_step, "loss": loss, "lr": lr,
               "grad_norm": norm.item(), "tokens_per_s": speed}

    if PROCESSES > 1:
        dist.barrier()  # process 0 may still be saving, and one that leaves before it may crash
        dist.destroy_process_group()
    if stop and step < args.max_iters:
        say(f"stopped and saved at step {step}; go on with --resume --out_dir={args.out_dir}")
        sys.exit(128 + (caught or [signal.SIGTERM])[0])  # as shells do; another process may have it
    say(f"{ckpt_path} has step {step} (--resume --max_iters=N goes on), {best_path} has step "
        f"{best['step']} with the lowest validation loss, {best['val_loss']:.4f}; see {plot_path}\n"
        f"next: python sample.py --checkpoint={best_path} --start \"{args.start}\"")
