"""Trains a GPT-2 on a text, from scratch or from a checkpoint.

    python train.py --batch_size=2 --max_iters=150     the built-in story, on any machine
    python train.py --data=my.txt --out_dir=my         your own text
    python train.py --resume                           goes on where it stopped
    torchrun --nproc_per_node=4 train.py ...           the same run on four GPUs

Read it after gpt.py. The functions come first, the script after them runs from top to bottom.
"""
import argparse
import codecs
import concurrent.futures
import contextlib
import copy
import csv
import ctypes
import datetime
import functools
import glob
import hashlib
import io
import itertools
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist

from gpt import (GPT, GPTConfig, InputError, choose_device, command_line, encode, get_tokenizer,
                 load_checkpoint, save_checkpoint)

HERE = os.path.dirname(os.path.abspath(__file__))
PIECE = 1 << 20  # bytes of text in memory at a time


def read_text(path):
    """Yields the text of a UTF-8 file, or of a folder's .txt files, about a million bytes at once.

    Files of a folder come sorted by name with <|endoftext|> between them. Byte-order marks are
    dropped, line ends become \\n. InputError for no text, or with the place of a byte not UTF-8.
    """
    files = sorted(glob.glob(os.path.join(glob.escape(path), "*.txt"))) if os.path.isdir(path) else [path]
    if not files:
        raise InputError(f"--data={path}: the folder has no .txt file")
    for name in files:
        if name != files[0]:
            yield "<|endoftext|>"
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
        with open(name, "rb") as file:
            try:
                while piece := file.read(PIECE):
                    yield decoder.decode(piece)
                yield decoder.decode(b"", final=True)
            except UnicodeDecodeError as error:
                offset = file.tell() - len(error.object) + error.start
                raise InputError(f"{name}: byte {offset} (0x{error.object[error.start]:02x}) is not UTF-8; "
                                 "save the file as UTF-8") from error


def tokenize(path, folder, say):
    """The text at path as GPT-2 tokens: a read-only uint16 array mapped from a file in folder.

    50,257 ids fit 16 bits, so a token costs two bytes on disk. The file is named by the text's
    hash: it is made once, and a changed text never meets the tokens of an older one. Memory stays
    constant however long the text. Returns (tokens, characters, hash).
    """
    sha, characters = hashlib.sha256(), 0
    for piece in read_text(path):
        sha.update(piece.encode())
        characters += len(piece)
    if characters == 0:
        raise InputError(f"--data={path}: there is no text in it")
    key = sha.hexdigest()[:16]
    target = os.path.join(folder, f"tokens-{key}.bin")
    if not os.path.exists(target):
        encode = functools.partial(get_tokenizer().encode_to_numpy, allowed_special="all")
        temporary = f"{target}.{os.getpid()}.tmp"
        threads, done = os.cpu_count(), 0
        pieces = split_safely(read_text(path))
        with open(temporary, "wb") as file, concurrent.futures.ThreadPoolExecutor(threads) as pool:
            while group := list(itertools.islice(pieces, 4 * threads)):
                for ids in pool.map(encode, group):  # tiktoken lets the threads run at once
                    ids.astype(np.uint16).tofile(file)
                done += sum(map(len, group))
                if characters > 10_000_000:
                    say(f"\rtokenizing: {done / characters:.0%}", end="", flush=True)
        os.replace(temporary, target)
        say("\r" if characters > 10_000_000 else "", end="")
    return np.memmap(target, dtype=np.uint16, mode="r"), characters, key


def split_safely(pieces):
    """Regroups pieces of a text so that encoding them one by one gives the ids of the whole text.

    No GPT-2 token reaches from a sign into the white space after it, so there it may be cut.
    """
    text = ""
    for piece in pieces:
        text += piece
        last = re.search(r"[ \n]\S", text[::-1])  # reversed, the last such place is the first
        if last and len(text) >= PIECE:
            cut = len(text) - last.start() - 1
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def load_tokens(path, folder, say):
    """--data -> (tokens (n,) uint16, a description, a key that changes when the data does)."""
    if not os.path.exists(path):
        raise InputError(f"--data={path}: no such file or folder")
    if not path.endswith(".bin"):
        tokens, characters, key = tokenize(path, folder, say)
        return tokens, f"{path}: {characters:,} characters, {len(tokens):,} tokens", key
    size = os.path.getsize(path)
    if size == 0 or size % 2:
        raise InputError(f"--data={path}: {size} bytes cannot be uint16 tokens, two bytes each")
    tokens, sha = np.memmap(path, dtype=np.uint16, mode="r"), hashlib.sha256()
    for start in range(0, len(tokens), 1 << 24):
        part = tokens[start : start + (1 << 24)]
        if part.max() > 50256:
            where = start + int(np.argmax(part > 50256))
            raise InputError(f"--data={path}: token {where} is {tokens[where]}, but GPT-2's last "
                             "is 50256; was another tokenizer used?")
        sha.update(part)
    return tokens, f"{path}: {len(tokens):,} tokens", sha.hexdigest()[:16]


@functools.lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def shuffled(n_windows, seed, epoch):
    """The order in which an epoch reads its windows: a permutation of 0 .. n_windows - 1."""
    return np.random.default_rng((seed, epoch)).permutation(n_windows)


def windows_of(step, micro, args, n_windows):
    """The windows of a step's micro-batch: a pure function of its arguments, so that nothing of
    the order needs saving, and a resumed run meets the windows it would have met."""
    first = step * args.windows_a_step + micro * args.batch_size  # so many were read before
    return [int(shuffled(n_windows, args.seed, i // n_windows)[i % n_windows])
            for i in range(first, first + args.batch_size)]


def dropout_seed(seed, step, micro):
    """What the generator is set to before a micro-batch: for the same reason a pure function."""
    return int(np.random.SeedSequence((seed, step, micro)).generate_state(1, np.uint64)[0])


def get_batch(tokens, windows, block_size, device):
    """-> inputs, targets, each (B, T) int64: T tokens give T predictions, each of the next one."""
    rows = [tokens[w * block_size : (w + 1) * block_size + 1] for w in windows]
    rows = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
    if device.type == "cuda":  # pinned, the copy runs while the GPU still computes
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


def learning_rate(step, args):
    """The rate of step `step` (from 0): a linear warm-up, then half a cosine down to min_lr.

    AdamW's averages know nothing at first, so the first steps are kept small; the last ones are
    small to settle. It is never 0, whatever the lengths.
    """
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    if step >= args.lr_decay_iters:
        return args.min_lr
    progress = (step - args.warmup_iters) / (args.lr_decay_iters - args.warmup_iters)
    return args.min_lr + (args.learning_rate - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def evaluate(model, splits, args, rank, processes, autocast):
    """Mean loss of each split in nats, over the same windows every time; dropout off.

    Nothing random is drawn, so training goes on as if there had been no evaluation.
    """
    device = model.wte.weight.device
    sums = torch.zeros(len(splits), dtype=torch.float64)
    model.eval()
    for i, (tokens, n_windows) in enumerate(splits):
        mine = range(n_windows)[rank::processes]
        for start in range(0, len(mine), args.batch_size):
            windows = mine[start : start + args.batch_size]
            with autocast():
                _, loss = model(*get_batch(tokens, windows, args.block_size, device))
            sums[i] += loss.item() * len(windows) / n_windows
    model.train()
    if processes > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    return sums.tolist()


def plot(log_path, png_path):
    """Draws loss and perplexity over steps, with the tokens seen on a second axis."""
    try:
        import matplotlib
    except ImportError:
        print("warning: no loss.png without matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")  # draws into a file, needs no screen
    import matplotlib.pyplot as plt

    with open(log_path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for panel, name in zip(panels, ("loss", "perplexity")):
        for column, label, style in (("loss", "each step", "C0-"), ("train_loss", "training", "C0o-"),
                                     ("val_loss", "validation", "C1o-")):
            points = [(int(row["iter"]), float(row[column])) for row in rows if row[column]]
            steps, values = zip(*points) if points else ((), ())
            values = values if name == "loss" else [math.exp(min(v, 100)) for v in values]
            panel.plot(steps, values, style, label=label, markersize=4,
                       alpha=0.3 if column == "loss" else 1)
        panel.set(xlabel="step", ylabel=name + (" (nats a token)" if name == "loss" else ""),
                  yscale="linear" if name == "loss" else "log")
        panel.grid(alpha=0.3)
        panel.legend()
        if last := int(rows[-1]["iter"]):
            per_step = int(rows[-1]["tokens"]) / last
            panel.secondary_xaxis("top", functions=(
                lambda step: step * per_step, lambda seen: seen / per_step)).set_xlabel("tokens seen")
    figure.savefig(png_path, dpi=110)
    plt.close(figure)


def number(kind, low, below=math.inf):
    """An argparse type: a number of that kind, at least low and below the bound (nan is neither)."""
    def parse(text):
        if not low <= (value := kind(text)) < below:
            bound = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"{text}: at least {low}{bound} is needed")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def flags():
    """The command line's parser. nanoGPT's names where it has one."""
    parser = command_line(__doc__)
    flag, on_off = parser.add_argument, argparse.BooleanOptionalAction
    flag("--data", type=os.path.abspath, default=os.path.join(HERE, "data", "story.txt"),
         help="a UTF-8 text file, a folder of .txt files, or a .bin of uint16 tokens")
    flag("--out_dir", default="out", help="where checkpoints, log and plot go")
    flag("--init_from", help="a checkpoint whose weights start a new run")
    flag("--resume", action="store_true", help="go on with the run in out_dir, with its flags")
    flag("--overwrite", action="store_true", help="replace the run in out_dir")
    flag("--eval_only", action="store_true", help="print the losses, write nothing")
    flag("--max_iters", type=number(int, 0), default=150, help="steps, from the run's beginning")
    flag("--batch_size", type=number(int, 1), default=2, help="windows computed at once")
    flag("--gradient_accumulation_steps", type=number(int, 1), default=1, help="batches a step")
    flag("--block_size", type=number(int, 1), default=256, help="tokens a window")
    flag("--n_layer", type=number(int, 1), default=12, help="blocks")
    flag("--n_head", type=number(int, 1), default=12, help="attention heads a block")
    flag("--n_embd", type=number(int, 1), default=768, help="channels")
    flag("--dropout", type=number(float, 0, 1), default=0.1, help="share of activations zeroed")
    flag("--bias", action=on_off, default=True, help="biases in linear layers and LayerNorms")
    flag("--learning_rate", type=number(float, 1e-12), default=4e-4, help="the highest rate")
    flag("--min_lr", type=number(float, 0), default=4e-5, help="the rate at the end")
    flag("--warmup_iters", type=number(int, 0), default=30, help="steps of rising rate")
    flag("--lr_decay_iters", type=number(int, 0), help="the step of min_lr; None: max_iters")
    flag("--weight_decay", type=number(float, 0), default=0.1, help="AdamW's pull towards 0")
    flag("--beta1", type=number(float, 0, 1), default=0.8, help="AdamW's memory of gradients")
    flag("--beta2", type=number(float, 0, 1), default=0.95, help="and of their squares")
    flag("--grad_clip", type=number(float, 0), default=1.0, help="longest gradient; 0: any")
    flag("--eval_interval", type=number(int, 1), default=30, help="steps between evaluations")
    flag("--eval_iters", type=number(int, 1), default=20, help="steps' worth of text evaluated")
    flag("--log_interval", type=number(int, 1), default=10, help="steps between printed lines")
    flag("--start", default="Every effort moves you", help="the prompt of the samples")
    flag("--seed", type=number(int, 0, 2**63), default=1337, help="of weights, order, dropout")
    flag("--device", default="auto", help="auto (the first there is of), cuda, mps, cpu")
    flag("--dtype", default="auto", help="auto, bfloat16, float16, float32")
    flag("--compile", action=on_off, help="use torch.compile; None: on cuda")
    return parser


# What may be given anew with --resume; any other change would make it another run.
FREE = ("data", "out_dir", "resume", "overwrite", "eval_only", "max_iters", "device", "compile",
        "eval_interval", "log_interval", "batch_size", "gradient_accumulation_steps")


def starting_point(processes):
    """Reads the flags and what they build on -> args, GPT or None, training state ({} if new)."""
    parser = flags()
    args = parser.parse_args()
    path = os.path.join(args.out_dir, "ckpt.pt")
    model, state = None, {}
    if args.resume:
        if not os.path.exists(path):
            raise InputError(f"--resume: there is no {path}; start a run without --resume, or "
                             "name the right --out_dir")
        model, state = load_checkpoint(path, verify=True)
        if "optimizer" not in state:
            raise InputError(f"--resume: {path} has weights but no optimizer state; start a new "
                             f"run from it: --init_from={path} and another --out_dir")
        saved = state["args"]
        saved["out_dir"] = args.out_dir
        args = parser.parse_args(namespace=argparse.Namespace(**saved))  # the flags given on top
        for name, value in vars(args).items():
            if name not in FREE and value != saved.get(name, value):
                raise InputError(f"--{name}={value}: the run in {args.out_dir} has {saved[name]}; "
                                 "changing it would make another run (--init_from starts one)")
    elif args.init_from:
        model, _ = load_checkpoint(args.init_from)
        shape = {name: getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd", "bias")}
        args = parser.parse_args(namespace=argparse.Namespace(**shape))
        for name, value in shape.items():
            if getattr(args, name) != value:
                raise InputError(f"--{name}={getattr(args, name)}: {args.init_from} has {value}")
        if args.block_size > model.config.block_size:
            raise InputError(f"--block_size={args.block_size}: {args.init_from} has positions "
                             f"for {model.config.block_size} tokens")
    elif os.path.exists(path) and not (args.overwrite or args.eval_only):
        steps = load_checkpoint(path)[1].get("step", 0)
        raise InputError(f"{args.out_dir} holds a run of {steps} steps: go on with --resume, "
                         "choose another --out_dir, or give --overwrite")
    if model and model.config.vocab_size != 50257:
        raise InputError(f"the checkpoint's vocabulary has {model.config.vocab_size} tokens, "
                         "GPT-2's tokenizer 50257")
    if args.lr_decay_iters is None:
        args.lr_decay_iters = args.max_iters
    windows = args.batch_size * args.gradient_accumulation_steps * processes  # in a step
    if getattr(args, "windows_a_step", windows) != windows:
        raise InputError(
            f"--batch_size={args.batch_size} x --gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps} x {processes} processes make {windows} windows "
            f"a step; this run has {args.windows_a_step}: choose them so that the product stays")
    args.windows_a_step = windows
    return args, model, state


def prepare_folder(folder, n_parameters):
    """Makes the output folder, removes what an interrupted save left, and checks for room."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out_dir={folder} cannot be written to: {error.strerror}") from error
    for stray in glob.glob(os.path.join(glob.escape(folder), "*.tmp")):
        os.remove(stray)
    kept = [os.path.join(folder, name) for name in ("ckpt.pt", "best.pt")]
    # 12 bytes a parameter for weights and AdamW's two averages, 4 for best.pt, 12 for the new
    # ckpt.pt while the old one is still there.
    needed = 28 * n_parameters - sum(os.path.getsize(path) for path in kept if os.path.exists(path))
    if (free := shutil.disk_usage(folder).free) < needed:
        raise InputError(f"--out_dir={folder}: {needed / 1e9:.2f} GB are needed for checkpoints, "
                         f"{free / 1e9:.2f} GB are free")


# Dense bfloat16 products a second, from NVIDIA's data sheets, for model FLOPs utilisation (MFU):
# the share of the GPU's peak that goes into the model's own arithmetic.
PEAK_FLOPS = {"A100": 312e12, "H100 80GB HBM3": 989e12, "H200": 989e12, "L4": 121e12}


if __name__ == "__main__":
    # Under torchrun each process learns its number from the environment; alone there is one.
    rank, local_rank, processes = (int(os.environ.get(name, default)) for name, default in
                                   (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    args, start_model, state = starting_point(processes)
    say = print if rank == 0 else lambda *_, **__: None
    step, best_val_loss = state.get("step", 0), state.get("best_val_loss", math.inf)
    if args.resume and step >= args.max_iters and not args.eval_only:
        say(f"nothing to do: {args.out_dir} is at step {step} of --max_iters={args.max_iters}")
        sys.exit()
    ckpt_path, best_path, log_path, plot_path = (
        os.path.join(args.out_dir, name) for name in ("ckpt.pt", "best.pt", "log.csv", "loss.png"))

    # ---- Device ------------------------------------------------------------------------------
    device, dtype = choose_device(args.device, args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    if processes > 1:
        if device.type == "cuda":
            device, dtype = choose_device(f"cuda:{local_rank}", args.dtype)
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=12))  # a long text takes a while
    if device.type == "cuda":  # what stays float32 is multiplied as TF32: several times faster
        torch.set_float32_matmul_precision("high")
    libc = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    if hasattr(libc, "mallopt"):
        # glibc hands large freed buffers back to the system, and the next step gets them again a
        # page fault at a time. Kept instead: a step takes 0.8 of the time.
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    # Products in dtype; the weights, what is summed up over many steps, stay float32.
    autocast = functools.partial(torch.autocast, device.type, dtype, dtype != torch.float32)

    # ---- Model -------------------------------------------------------------------------------
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(50257, args.block_size, args.n_layer, args.n_head, args.n_embd,
                          args.dropout, args.bias))
    if start_model:
        weights = start_model.state_dict()
        weights["wpe.weight"] = weights["wpe.weight"][: args.block_size]
        model.load_state_dict(weights)
        start_model = weights = None  # unmapped: Windows replaces no file that is mapped
    model.to(device)
    parameters = list(model.parameters())
    n_parameters = sum(p.numel() for p in parameters)

    # ---- Data: the first 90% of the tokens to train on, the rest to validate -----------------
    scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True) if args.eval_only else None
    folder = scratch.name if scratch else args.out_dir
    if local_rank == 0:
        prepare_folder(folder, n_parameters)
        tokens, about, text_key = load_tokens(args.data, folder, say)
    if processes > 1:
        dist.barrier()
        if local_rank:
            tokens, about, text_key = load_tokens(args.data, args.out_dir, say)
    if getattr(args, "text_key", text_key) != text_key:
        raise InputError(f"--data={args.data} is not the text that the run in {args.out_dir} has "
                         "read so far; give the right one, or start a new run from its checkpoint")
    args.text_key = text_key
    cut = int(0.9 * len(tokens))
    splits = []
    for name, split in (("training", tokens[:cut]), ("validation", tokens[cut:])):
        n_windows = (len(split) - 1) // args.block_size
        if n_windows < 1:
            raise InputError(
                f"--data={args.data} is too short: {cut} tokens to train on and "
                f"{len(tokens) - cut} to validate; the {name} split needs --block_size="
                f"{args.block_size} + 1, the largest that fits is --block_size="
                f"{min(cut, len(tokens) - cut) - 1}")
        splits.append((split, n_windows))
    (train_tokens, n_windows), (_, n_val_windows) = splits
    tokens_a_step = args.windows_a_step * args.block_size

    # ---- Optimizer ---------------------------------------------------------------------------
    # Weight decay pulls matrices towards 0, so that none grows without need; a bias or a
    # LayerNorm's gain has too few numbers to overfit with, and its size means something.
    groups = [{"params": [p for p in parameters if p.dim() >= 2]},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.beta1, args.beta2),
                                  weight_decay=args.weight_decay, fused=True)
    # float16 has no numbers below 6e-8: the loss is scaled up so that its gradients are not lost.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    log_bytes = 0
    if state:
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        scaler.load_state_dict(state["scaler"])
        log_bytes, state = state["log_bytes"], None

    ddp = torch.nn.parallel.DistributedDataParallel(model) if processes > 1 else model
    trained = ddp  # what computes the training loss
    if args.compile or (args.compile is None and device.type == "cuda"):
        try:
            compiled = torch.compile(ddp)
            with autocast():
                compiled(*get_batch(train_tokens, [0] * args.batch_size, args.block_size,
                                    device))[1].backward()
            trained = compiled
        except Exception as error:  # a missing C++ compiler, an old GPU: whatever it stumbles over
            say(f"warning: going on without --compile: {str(error).splitlines()[0]}", file=sys.stderr)
        optimizer.zero_grad()

    say(about)
    say(f"training: {len(train_tokens):,} tokens in {n_windows:,} windows of {args.block_size}; "
        f"validation: {len(tokens) - cut:,} in {n_val_windows:,}")
    say(f"model: {n_parameters:,} parameters; {device}, {args.dtype}; {tokens_a_step:,} tokens a "
        f"step, {args.max_iters:,} steps")
    limit = args.eval_iters * args.windows_a_step
    evaluated = [(split, min(n, limit)) for split, n in splits]
    if args.eval_only:
        train_loss, val_loss = evaluate(model, evaluated, args, rank, processes, autocast)
        say(f"step {step}: training loss {train_loss:.4f} (perplexity {math.exp(train_loss):,.2f}), "
            f"validation loss {val_loss:.4f} ({math.exp(val_loss):,.2f})")
        sys.exit()

    # ---- Log ---------------------------------------------------------------------------------
    if rank == 0:
        log_file = open(log_path, "a", encoding="utf-8", newline="")
        # Rows from after the checkpoint go: their steps come again.
        log_file.truncate(min(log_bytes, os.path.getsize(log_path)))
        log = csv.DictWriter(log_file, ("iter", "tokens", "loss", "train_loss", "val_loss", "lr",
                                        "grad_norm", "tokens_per_s"), lineterminator="\n")
        if os.path.getsize(log_path) == 0:
            log.writeheader()

    # ---- Ctrl-C and SIGTERM: the step is finished and saved first; a second one ends at once --
    caught = []

    def remember(number, _):
        caught.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, remember)

    def stop_if_not_finite(what, *values):
        if not all(map(math.isfinite, values)):
            say(f"train.py: error: {what} {values} at step {step}, learning rate "
                f"{learning_rate(step, args):.2e}, {args.dtype}: stopped, the last good checkpoint "
                "is kept; a lower --learning_rate may help", file=sys.stderr)
            sys.exit(1)

    # ---- The loop ----------------------------------------------------------------------------
    # Floating-point operations a token: forward and backward, 6 a weight (but positions are only
    # looked up), and attention's products with up to block_size tokens.
    flops = (6 * (n_parameters - model.wpe.weight.numel())
             + 12 * args.n_layer * args.n_embd * args.block_size)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((value for name, value in PEAK_FLOPS.items() if name in gpu), None)
    accumulation = args.gradient_accumulation_steps
    just_resumed = args.resume  # what was due at this step was done before it was saved
    stop, loss, lr, grad_norm = False, None, None, None
    seconds, timed = 0.0, 0  # of the steps since the last row, and their number
    model.train()
    while True:
        # `step` steps are done. First comes what is due after so many, then the next one.
        evaluating = step % args.eval_interval == 0 or step == args.max_iters
        if not just_resumed and (evaluating or step % args.log_interval == 0):
            row = {"iter": step, "tokens": step * tokens_a_step}
            if timed:
                row |= {"loss": loss, "lr": lr, "grad_norm": grad_norm,
                        "tokens_per_s": round(timed * tokens_a_step / seconds, 1)}
                left = datetime.timedelta(seconds=round((args.max_iters - step) * seconds / timed))
                mfu = f" | MFU {row['tokens_per_s'] * flops / peak / processes:.1%}" if peak else ""
                say(f"step {step}/{args.max_iters} | epoch {step * args.windows_a_step / n_windows:.1f} | "
                    f"loss {loss:.4f} | lr {lr:.2e} | norm {grad_norm:.2f} | "
                    f"{row['tokens_per_s']:,.0f} tokens/s{mfu} | {left} left")
                seconds, timed = 0.0, 0
            if evaluating:
                row["train_loss"], row["val_loss"] = losses = evaluate(
                    model, evaluated, args, rank, processes, autocast)
                stop_if_not_finite("evaluated losses", *losses)
                say(f"evaluation: training loss {losses[0]:.4f} (perplexity "
                    f"{math.exp(losses[0]):,.2f}), validation loss {losses[1]:.4f} "
                    f"({math.exp(losses[1]):,.2f})")
                # Untrained, every token is as likely as any: -ln(1 / 50257) nats.
                if step == 0:
                    say(f"(a blind guess among all tokens costs ln(50257) = {math.log(50257):.4f})")
            if rank == 0:
                log.writerow(row)
        if rank == 0 and not just_resumed and (evaluating or stop):
            log_file.flush()
            os.fsync(log_file.fileno())
            if evaluating and losses[1] < best_val_loss:
                best_val_loss = losses[1]
                save_checkpoint(best_path, model, step=step, val_loss=best_val_loss)
            save_checkpoint(ckpt_path, model, optimizer=optimizer.state_dict(),
                            scaler=scaler.state_dict(), step=step, best_val_loss=best_val_loss,
                            log_bytes=os.path.getsize(log_path), args=vars(args))
        if rank == 0 and not just_resumed and evaluating:
            plot(log_path, plot_path)
            ids = torch.tensor([encode(args.start) or [50256]], device=device)
            generator = torch.Generator().manual_seed(args.seed)
            text = [int(t) for t in model.generate(ids, 40, 0.8, 50, generator=generator)]
            say("sample:", args.start + get_tokenizer().decode(text).replace("\n", " "))
        if stop or step == args.max_iters:
            break
        just_resumed = False

        started = time.perf_counter()
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=device)
        for i in range(accumulation):
            number = i * processes + rank  # of this micro-batch among all the step's
            windows = windows_of(step, number, args, n_windows)
            inputs, targets = get_batch(train_tokens, windows, args.block_size, device)
            torch.manual_seed(dropout_seed(args.seed, step, number))
            # Gradients add up over the micro-batches; processes exchange them once, at the last.
            ddp.require_backward_grad_sync = i == accumulation - 1
            with autocast():
                _, loss = trained(inputs, targets)
            loss = loss / accumulation  # so that the sum is the mean over all the step's tokens
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        report = torch.stack((total / processes, torch.full((), len(caught), device=device)))
        if processes > 1:
            dist.all_reduce(report)
        # The step's one wait for the GPU. Gradients are averages by now: all processes see this.
        loss, stop, grad_norm = torch.cat((report, norm[None])).tolist()
        # A norm too large for float16 is the scaler's to handle: it skips the step, scales less.
        overflow = scaler.is_enabled() and scaler.get_scale() > 1
        stop_if_not_finite("loss and gradient norm", loss, 0.0 if overflow else grad_norm)
        if 0 < args.grad_clip < grad_norm:  # made shorter, in the same direction
            torch.nn.utils.clip_grads_with_norm_(parameters, args.grad_clip, norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step, timed, seconds = step + 1, timed + 1, seconds + time.perf_counter() - started

    if processes > 1:
        dist.destroy_process_group()
    if stop:
        say(f"stopped at step {step} and saved; go on with: python train.py --resume "
            f"--out_dir={args.out_dir}")
        sys.exit(128 + (caught or [signal.SIGTERM])[0])
