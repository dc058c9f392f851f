"""Trains a GPT-2 on a text, from nothing or from a checkpoint.

    python train.py --batch_size=2 --max_iters=150     the built-in story, on any machine
    python train.py --data=my.txt --out_dir=my         your own text
    python train.py --resume                           goes on where it stopped
    torchrun --nproc_per_node=4 train.py ...           one run on four GPUs
"""
# To be read after gpt.py. First come the functions, then the script, which runs top to bottom.
import argparse
import concurrent.futures
import copy
import csv
import ctypes
import datetime
import functools
import glob
import hashlib
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

from gpt import (DTYPES, END_OF_TEXT, GPT, GPTConfig, InputError, check_vocabulary,
                 choose_device, command_line, encode, get_tokenizer, load_checkpoint, number,
                 one_line, save_checkpoint)

STORY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "story.txt")
PIECE = 1 << 20  # characters of text, or tokens of a .bin, read at a time


# ---- Flags ---------------------------------------------------------------------------------------

def flags():
    """The command line's parser; flags that nanoGPT has too are named as there."""
    parser = command_line(__doc__)
    flag, on_off = parser.add_argument, argparse.BooleanOptionalAction
    flag("--data", type=os.path.abspath, default=STORY,
         help="a UTF-8 text file, a folder of .txt files, or a .bin of uint16 tokens")
    flag("--out_dir", default="out", help="where checkpoints, log and plot go")
    flag("--init_from", help="a checkpoint whose weights start a new run")
    flag("--resume", action="store_true", help="go on with the run in out_dir, with its flags")
    flag("--overwrite", action="store_true", help="replace the run in out_dir")
    flag("--eval_only", action="store_true",
         help="print the losses of the weights of --resume or --init_from, write nothing")
    flag("--max_iters", type=number(int, 0), default=150, help="steps, from the run's beginning")
    flag("--batch_size", type=number(int, 1), default=2, help="windows computed at once")
    flag("--gradient_accumulation_steps", type=number(int, 1), default=1, help="batches per step")
    flag("--block_size", type=number(int, 1), default=256, help="tokens per window")
    flag("--n_layer", type=number(int, 1), default=12, help="blocks")
    flag("--n_head", type=number(int, 1), default=12, help="attention heads per block")
    flag("--n_embd", type=number(int, 1), default=768, help="channels")
    flag("--dropout", type=number(float, 0, 1), default=0.1, help="share of activations dropped")
    flag("--bias", action=on_off, default=True, help="biases in linear layers and LayerNorms")
    flag("--learning_rate", type=number(float, 1e-12), default=4e-4, help="the highest rate")
    flag("--min_lr", type=number(float, 0), default=4e-5, help="the rate at the end")
    flag("--warmup_iters", type=number(int, 0), default=30, help="steps of rising rate")
    flag("--lr_decay_iters", type=number(int, 0),
         help="the step of min_lr, where longer runs stay; None: max_iters as first given")
    flag("--weight_decay", type=number(float, 0), default=0.1, help="AdamW's pull towards 0")
    # beta averages about 1 / (1 - beta) gradients: in 150 steps, 5 learn more than the usual 10.
    flag("--beta1", type=number(float, 0, 1), default=0.8, help="AdamW's memory of gradients")
    flag("--beta2", type=number(float, 0, 1), default=0.95, help="and of their squares")
    flag("--grad_clip", type=number(float, 0), default=1.0, help="gradients' length limit; 0: none")
    flag("--eval_interval", type=number(int, 1), default=30, help="steps between evaluations")
    flag("--eval_iters", type=number(int, 1), default=20,
         help="evaluate on as much of each split as this many steps read")
    flag("--log_interval", type=number(int, 1), default=10, help="steps between printed lines")
    flag("--start", default="Every effort moves you", help="the prompt of the samples")
    flag("--seed", type=number(int, 0, 2**63), default=1337, help="of weights, order, dropout")
    flag("--device", default="auto", help="cuda, mps or cpu; auto: the first that is there")
    flag("--dtype", default="auto", choices=DTYPES, help="of products; auto: what is fast here")
    flag("--compile", action=on_off, help="use torch.compile; None: on cuda")
    return parser


# Flags that --resume may change; any other change would make it another run.
FREE = ("data", "out_dir", "resume", "overwrite", "eval_only", "max_iters", "device", "compile",
        "eval_interval", "log_interval", "start", "batch_size", "gradient_accumulation_steps")


def starting_point(processes):
    """Reads the flags and the checkpoint they name -> args, GPT or None, training state or {}."""
    parser = flags()
    args = parser.parse_args()
    path, model, state = os.path.join(args.out_dir, "ckpt.pt"), None, {}
    if args.resume:
        source, hint = path, "; --init_from starts a new run from its weights"
        if not os.path.exists(path):
            raise InputError(f"--resume: there is no {path}; start a run without --resume, or name "
                             "the right --out_dir")
        model, state = load_checkpoint(path, verify=True)
        if not {"optimizer", "scaler", "step", "best_val_loss", "log_bytes", "args"} <= set(state):
            raise InputError(f"--resume: {path} has weights but no optimizer state; start a new "
                             f"run from it with --init_from={path} and another --out_dir")
        saved = state["args"] | {"out_dir": args.out_dir}
    elif args.init_from:
        source, hint = args.init_from, ""
        model, _ = load_checkpoint(args.init_from)
        saved = {k: getattr(model.config, k) for k in ("n_layer", "n_head", "n_embd", "bias")}
    if os.path.exists(path) and not (args.resume or args.overwrite or args.eval_only):
        steps = load_checkpoint(path)[1].get("step", 0)
        raise InputError(f"{args.out_dir} holds a run of {steps} steps: go on with --resume, "
                         "choose another --out_dir, or give --overwrite")
    if model:
        check_vocabulary(source, model)
        # What a namespace holds stands in for the defaults, and flags now given replace it.
        args = parser.parse_args(namespace=argparse.Namespace(**saved))
        if args.resume and args.dtype == "auto":
            args.dtype = saved["dtype"]  # as auto was resolved then
        for name, value in saved.items():
            if name not in FREE and getattr(args, name) != value:
                raise InputError(f"--{name}={getattr(args, name)}: {source} has {value}, and that "
                                 f"cannot change{hint}")
        if args.block_size > model.config.block_size:
            raise InputError(f"--block_size={args.block_size}: {source} has positions for "
                             f"{model.config.block_size} tokens")
    if args.lr_decay_iters is None:
        args.lr_decay_iters = args.max_iters
    if args.min_lr > args.learning_rate:
        raise InputError(f"--min_lr={args.min_lr} is above --learning_rate={args.learning_rate}")
    # Saved with the flags, as text_key will be, since a resumed run must have the same.
    windows = args.batch_size * args.gradient_accumulation_steps * processes
    if getattr(args, "windows_per_step", windows) != windows:
        raise InputError(
            f"--batch_size={args.batch_size} x --gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps} x {processes} processes is {windows} windows a "
            f"step, the run has {args.windows_per_step}: choose them so that the product stays")
    args.windows_per_step = windows
    return args, model, state


def prepare_folder(folder, n_parameters):
    """Makes the output folder, cleans up after an interrupted save, and checks for room."""
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # can it be written to?
    for name in ("ckpt.pt.tmp", "best.pt.tmp", "tokens-*.tmp"):
        for stray in glob.glob(os.path.join(glob.escape(folder), name)):
            os.remove(stray)
    # Bytes a parameter: ckpt.pt 12 (weights and AdamW's two averages) and as many while the next
    # one is written, best.pt 4.
    there = [os.path.join(folder, name) for name in ("ckpt.pt", "best.pt")]
    needed = 28 * n_parameters - sum(os.path.getsize(p) for p in there if os.path.exists(p))
    if (free := shutil.disk_usage(folder).free) < needed:
        raise InputError(f"--out_dir={folder}: checkpoints need {needed / 1e6:,.1f} MB, but "
                         f"{free / 1e6:,.1f} MB are free; make room or choose another")


# ---- Data ----------------------------------------------------------------------------------------

def read_text(path):
    """Yields the text of a UTF-8 file, or of a folder's .txt files by name, a piece at a time.

    Byte-order marks are dropped and line ends become \\n. InputError for a byte that is not UTF-8.
    """
    names = [path]
    if os.path.isdir(path):
        names = sorted(glob.glob(os.path.join(glob.escape(path), "*.txt")))
    if not names:
        raise InputError(f"--data={path}: no .txt file in this folder")
    names = [name for name in names if os.path.getsize(name)]
    for name in names:
        if name != names[0]:
            # Windows may reach over this border, and attention sees across it: as in GPT-2's own
            # training, the token itself has to teach that what comes before no longer counts.
            yield "<|endoftext|>"
        with open(name, encoding="utf-8-sig") as file:
            try:
                while piece := file.read(PIECE):
                    yield piece
            except UnicodeDecodeError as error:
                offset = file.buffer.tell() - len(error.object) + error.start
                raise InputError(f"{name}: byte {offset} ({error.object[error.start]:#x}) is not "
                                 "UTF-8; save the file as UTF-8") from error


def cut_safely(pieces):
    """Regroups a text's pieces into parts that give the whole text's ids when encoded one by one:
    they are cut between a visible sign and white space, where GPT-2's tokens are cut anyway."""
    text = ""
    for piece in pieces:
        text += piece
        if len(text) >= PIECE and (place := re.match(r"(?s).*\S(?=[ \n])", text)):  # the last one
            yield text[: place.end()]
            text = text[place.end() :]
    yield text


def tokenize(path, folder, say):
    """The text at path -> its tokens (n,) uint16, mapped from a file in folder; characters; a key.

    50,257 ids are less than 2^16: two bytes per token. The file is made once for a text, on all
    cores and in constant memory (if there are spaces in it), and named by the text's hash: a
    changed text never meets old tokens.
    """
    sha, characters = hashlib.sha256(), 0
    for piece in read_text(path):
        sha.update(piece.encode())
        characters += len(piece)
    if not characters:
        raise InputError(f"--data={path}: there is no text in it")
    key = sha.hexdigest()[:16]
    target = os.path.join(folder, f"tokens-{key}.bin")
    if not os.path.exists(target):
        os.makedirs(folder, exist_ok=True)
        to_ids = functools.partial(get_tokenizer().encode_to_numpy, allowed_special="all")
        parts, done, threads = cut_safely(read_text(path)), 0, os.cpu_count()
        temporary = f"{target}.{os.getpid()}.tmp"
        with open(temporary, "wb") as file, concurrent.futures.ThreadPoolExecutor(threads) as pool:
            while group := list(itertools.islice(parts, 4 * threads)):
                for ids in pool.map(to_ids, group):  # tiktoken lets threads run side by side
                    ids.astype(np.uint16).tofile(file)
                done += sum(map(len, group))
                say(f"\rtokenizing: {done / characters:.0%}", end="", flush=True)
        say()
        os.replace(temporary, target)
    return np.memmap(target, dtype=np.uint16, mode="r"), characters, key


def load_tokens(path, folder, say):
    """--data -> tokens (n,) uint16, a line about them, a key that changes when they do."""
    if not os.path.exists(path):
        raise InputError(f"--data={path}: no such file or folder")
    if not path.endswith(".bin"):
        tokens, characters, key = tokenize(path, folder, say)
        return tokens, f"{path}: {characters:,} characters, {len(tokens):,} tokens", key
    if (size := os.path.getsize(path)) == 0 or size % 2:
        raise InputError(f"--data={path}: {size} bytes are no uint16 tokens, of two bytes each")
    tokens, sha = np.memmap(path, dtype=np.uint16, mode="r"), hashlib.sha256()
    for start in range(0, len(tokens), PIECE):
        part = tokens[start : start + PIECE]
        if part.max() > END_OF_TEXT:
            raise InputError(f"--data={path}: token {start + part.argmax()} is {part.max()}, past "
                             f"the vocabulary's last, {END_OF_TEXT}: was another tokenizer used?")
        sha.update(part)
    return tokens, f"{path}: {len(tokens):,} tokens", sha.hexdigest()[:16]


@functools.lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def shuffled(n_windows, seed, epoch):
    """The order in which an epoch reads its windows, a permutation of range(n_windows)."""
    return np.random.default_rng((seed, epoch)).permutation(n_windows)


def windows_of(step, micro, args, n_windows):
    """The numbers of the windows in a step's micro-batch, a pure function of seed, step and micro:
    there is nothing to save, and a resumed run reads what it would have read."""
    first = step * args.windows_per_step + micro * args.batch_size  # windows read before these
    return [int(shuffled(n_windows, args.seed, i // n_windows)[i % n_windows])
            for i in range(first, first + args.batch_size)]


def get_batch(tokens, windows, block_size, device):
    """-> inputs and targets, both (B, T) int64. T tokens give T predictions: place t sees only
    tokens 0 to t, so that the next one is a fair question at every place."""
    rows = np.stack([tokens[w * block_size : (w + 1) * block_size + 1] for w in windows])
    rows = torch.from_numpy(rows.astype(np.int64))  # (B, T + 1), the last of which is only a target
    if device.type == "cuda":  # from pinned memory the copy runs beside the GPU's work
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


# ---- Schedule, evaluation, plot ------------------------------------------------------------------

def learning_rate(step, args):
    """The rate of a step, counted from 0: a linear warm-up, then half a cosine down to min_lr.

    AdamW's averages rest on few gradients at first, hence small steps; at the end small steps
    settle into a minimum instead of jumping about it.
    """
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    if step >= args.lr_decay_iters:
        return args.min_lr
    progress = (step - args.warmup_iters) / (args.lr_decay_iters - args.warmup_iters)
    return args.min_lr + (args.learning_rate - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def evaluate(model, parts, args, rank, processes, autocast):
    """The mean loss of each part, (tokens, n_windows), of a split, in nats.

    Always a split's first windows, without dropout and so without drawing a random number: the run
    is the same however often it is evaluated.
    """
    device = model.wte.weight.device
    losses = torch.zeros(len(parts), dtype=torch.float64)
    model.eval()
    for i, (tokens, n_windows) in enumerate(parts):
        mine = range(n_windows)[rank::processes]  # this process's share
        for start in range(0, len(mine), args.batch_size):
            windows = mine[start : start + args.batch_size]
            with autocast():
                _, loss = model(*get_batch(tokens, windows, args.block_size, device))
            losses[i] += loss.item() * len(windows) / n_windows
    model.train()
    if processes > 1:
        losses = losses.to(device)
        dist.all_reduce(losses)
    return losses.tolist()


def perplexity(loss):
    """exp(loss): among how many equally likely tokens one would be as unsure."""
    return math.exp(min(loss, 700))  # where a run goes astray, exp would be past a float's range


def plot(log_path, png_path):
    """Draws loss and perplexity over steps and tokens from log.csv."""
    try:
        import matplotlib
    except ImportError:
        return print("warning: without matplotlib there is no loss.png", file=sys.stderr)
    matplotlib.use("Agg")  # needs no screen
    import matplotlib.pyplot as plt

    with open(log_path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for panel, scale in zip(panels, (float, perplexity)):
        for column, label, style in (("loss", "each step", "C7-"),
                                     ("train_loss", "training", "C0o-"),
                                     ("val_loss", "validation", "C1o-")):
            points = [(int(row["iter"]), float(row[column])) for row in rows if row[column]]
            panel.plot([step for step, _ in points], [scale(loss) for _, loss in points], style,
                       label=label, markersize=4, alpha=0.4 if column == "loss" else 1)
        panel.set(xlabel="step", ylabel="loss (nats per token)")
        if scale is perplexity:
            panel.set(yscale="log", ylabel="perplexity")
        panel.grid(alpha=0.3)
        panel.legend()
        if steps := int(rows[-1]["iter"]):
            tokens = int(rows[-1]["tokens"]) / steps  # a step
            there, back = (functools.partial(np.multiply, by) for by in (tokens, 1 / tokens))
            panel.secondary_xaxis("top", functions=(there, back)).set_xlabel("tokens seen")
    figure.savefig(png_path, dpi=110)
    plt.close(figure)


# Multiplications and additions per second in dense bfloat16, from NVIDIA's data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100 80GB HBM3": 989e12, "H200": 989e12, "L4": 121e12}


# ---- The script ----------------------------------------------------------------------------------

if __name__ == "__main__":
    # torchrun tells each process its number among all and on its machine; alone, there is one.
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 else lambda *_, **__: None
    args, start_model, state = starting_point(processes)
    step, best_val_loss = state.get("step", 0), state.get("best_val_loss", math.inf)
    if args.resume and step >= args.max_iters and not args.eval_only:
        say(f"nothing to do: {args.out_dir} is at step {step} of --max_iters={args.max_iters}")
        sys.exit()
    ckpt_path, best_path, log_path, plot_path = (
        os.path.join(args.out_dir, name) for name in ("ckpt.pt", "best.pt", "log.csv", "loss.png"))

    # Device. Products are computed in dtype; weights, and all that is summed up, stay float32.
    if processes > 1 and args.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local_rank)  # the one that "cuda" now means
    device, dtype = choose_device(args.device, args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    if processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=12))  # to tokenize a long text
    autocast = functools.partial(torch.autocast, device.type, dtype,
                                 enabled=dtype != torch.float32)
    if device.type == "cuda":  # TF32: float32 products of factors rounded to 11 bits of precision
        torch.set_float32_matmul_precision("high")
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc hands large freed buffers back to the system, and each step would fetch them again
        # by 130,000 page faults. Keeping those up to 32 MB, its limit, makes a float32 step of 124M
        # 1.1 times as fast.
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD

    # Data: the first 90% of the tokens to train on, the rest to validate.
    # (With --eval_only, which writes nothing into out_dir, each tokenizes for itself.)
    scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    if local_rank:  # on each machine the first process tokenizes, then the others find the file
        dist.barrier()
    tokens, about, text_key = load_tokens(
        args.data, scratch.name if args.eval_only else args.out_dir, say)
    if processes > 1 and not local_rank:
        dist.barrier()
    if getattr(args, "text_key", text_key) != text_key:
        raise InputError(f"--data={args.data} is not the text that the run in {args.out_dir} read "
                         "so far; --init_from starts a new run from its checkpoint")
    args.text_key = text_key
    cut = int(0.9 * len(tokens))
    splits, sizes = (tokens[:cut], tokens[cut:]), (cut, len(tokens) - cut)
    n_windows = [(size - 1) // args.block_size for size in sizes]
    if min(n_windows) < 1:
        largest = max(0, min(sizes) - 1)
        raise InputError(
            f"--data={args.data} is too short: {sizes[0]} tokens in the training split and "
            f"{sizes[1]} in the validation split, where --block_size={args.block_size} needs "
            f"{args.block_size + 1}; " + (f"the largest that fits is --block_size={largest}"
                                          if largest else "no block_size fits, give more text"))
    tokens_per_step = args.windows_per_step * args.block_size
    parts = [(split, min(n, args.eval_iters * args.windows_per_step))
             for split, n in zip(splits, n_windows)]  # to evaluate

    # Model.
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(block_size=args.block_size, n_layer=args.n_layer, n_head=args.n_head,
                          n_embd=args.n_embd, dropout=args.dropout, bias=args.bias))
    if start_model:
        weights = start_model.state_dict()
        weights["wpe.weight"] = weights["wpe.weight"][: args.block_size]  # the first positions
        model.load_state_dict(weights)
        start_model = weights = None  # unmapped, since Windows replaces no mapped file
    model.to(device)
    parameters = list(model.parameters())
    n_parameters = sum(p.numel() for p in parameters)

    say(about)
    for name, size, n in zip(("training", "validation"), sizes, n_windows):
        say(f"{name}: {size:,} tokens, {n:,} windows of {args.block_size}")
    say(f"{n_parameters:,} parameters, {device}, {args.dtype}, {tokens_per_step:,} tokens a step")
    if args.eval_only:
        losses = evaluate(model, parts, args, rank, processes, autocast)
        say(f"step {step}: training loss {losses[0]:.4f}, validation loss {losses[1]:.4f}")
        sys.exit()
    if rank == 0:
        prepare_folder(args.out_dir, n_parameters)

    # Optimizer. AdamW moves a weight by lr times its averaged gradient over the root of its
    # averaged squared gradient; the betas say how long the averages last. Apart from gradients, it
    # decays matrices and embeddings, by a share lr times weight_decay a step, so that none grows
    # without need. Biases and gains are too few to overfit, and a LayerNorm's gain pulled to 0
    # would switch its channel off.
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() >= 2]},
         {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}],
        lr=args.learning_rate, betas=(args.beta1, args.beta2), weight_decay=args.weight_decay,
        fused=True)
    # Below 6e-8 float16 is 0: its gradients are scaled up, lest they vanish, then down for AdamW.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if args.resume:
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # out of the mapped file
        scaler.load_state_dict(state["scaler"])
    log_bytes, state = state.get("log_bytes", 0), None  # unmapped

    # What trains is the model, wrapped in DDP, which averages gradients over processes, and then
    # compiled; both wrappers use the model's own weights.
    trained = torch.nn.parallel.DistributedDataParallel(model) if processes > 1 else model
    if args.compile or (args.compile is None and device.type == "cuda"):
        try:  # on a first batch, which trains nothing
            compiled = torch.compile(trained)
            first = get_batch(splits[0], [0] * args.batch_size, args.block_size, device)
            with autocast():
                compiled(*first)[1].backward()
            trained = compiled
        except Exception as error:  # no C++ compiler, too old a GPU, or whatever stops it
            say(f"warning: --compile fails here, going on without: {one_line(error)[:200]}",
                file=sys.stderr)
        optimizer.zero_grad()

    # Log: a new run begins it anew, and rows of steps after the checkpoint go: those come again.
    if rank == 0:
        log_file = open(log_path, "a", encoding="utf-8", newline="")
        log_file.truncate(min(log_bytes, os.path.getsize(log_path)))
        log = csv.DictWriter(log_file, ("iter", "tokens", "loss", "train_loss", "val_loss", "lr",
                                        "grad_norm", "tokens_per_s"), lineterminator="\n")
        if os.path.getsize(log_path) == 0:
            log.writeheader()

    # Ctrl-C and SIGTERM: the step is finished and all is saved; a second one ends at once.
    caught = []

    def remember(signum, _):
        caught.append(signum)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, remember)
    signal.signal(signal.SIGTERM, remember)

    def stop_unless_finite(what, *values):
        if not all(map(math.isfinite, values)):
            say(f"train.py: error: {what} not finite, {values}, at step {step}, learning rate "
                f"{learning_rate(step, args):.2e}, {args.dtype}: stopped, the last good checkpoint "
                "is kept; --init_from starts a new run from it, with a lower --learning_rate",
                file=sys.stderr)
            sys.exit(1)

    # MFU, model FLOPs utilisation: the share of the GPU's bfloat16 peak that the model's arithmetic
    # takes. A token costs each weight a multiplication and an addition forward and twice that
    # backward (but positions are only looked up), and attention's products come on top.
    flops_per_token = (6 * (n_parameters - model.wpe.weight.numel())
                       + 12 * args.n_layer * args.n_embd * args.block_size)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((PEAK_FLOPS[name] for name in PEAK_FLOPS if re.search(rf"\b{name}\b", gpu)), None)

    fresh = not args.resume  # what is due at the step of a checkpoint was done before it was saved
    stop, loss, lr, grad_norm = False, None, None, None  # of the last step
    seconds, timed = 0.0, 0  # what the steps since the last row took, and how many they are
    model.train()
    while True:
        # `step` steps are done. First whatever is due after so many, then the next one.
        evaluating = fresh and (step % args.eval_interval == 0 or step == args.max_iters)
        if evaluating or (fresh and step % args.log_interval == 0):
            row = {"iter": step, "tokens": step * tokens_per_step}
            if timed:
                speed = timed * tokens_per_step / seconds
                row |= {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_s": speed}
                left = datetime.timedelta(seconds=round((args.max_iters - step) * seconds / timed))
                mfu = f" | MFU {speed * flops_per_token / peak / processes:.1%}" if peak else ""
                say(f"step {step}/{args.max_iters} | epoch "
                    f"{step * args.windows_per_step / n_windows[0]:.1f} | loss {loss:.4f} | lr "
                    f"{lr:.2e} | norm {grad_norm:.2f} | {speed:,.0f} tokens/s{mfu} | {left} left")
                seconds, timed = 0.0, 0
            if evaluating:
                losses = evaluate(model, parts, args, rank, processes, autocast)
                stop_unless_finite("evaluated losses", *losses)
                row["train_loss"], row["val_loss"] = losses
                say(f"step {step}: training loss {losses[0]:.4f} (perplexity "
                    f"{perplexity(losses[0]):,.2f}), validation loss {losses[1]:.4f} (perplexity "
                    f"{perplexity(losses[1]):,.2f})")
                if step == 0:  # random weights prefer some tokens by chance: a little worse
                    say(f"(a blind guess costs ln(50257) = {math.log(50257):.4f})")
            if rank == 0:
                log.writerow(row)
        if rank == 0 and (evaluating or stop):
            log_file.flush()
            os.fsync(log_file.fileno())
            # On a small text the training loss goes on falling while the validation loss rises: the
            # model learns the text by heart. For new text best.pt is the one to use.
            if evaluating and losses[1] < best_val_loss:
                best_val_loss = losses[1]
                save_checkpoint(best_path, model, step=step, val_loss=best_val_loss)
            save_checkpoint(ckpt_path, model, optimizer=optimizer.state_dict(),
                            scaler=scaler.state_dict(), step=step, best_val_loss=best_val_loss,
                            log_bytes=os.path.getsize(log_path), args=vars(args))
        if rank == 0 and evaluating:
            plot(log_path, plot_path)
            prompt = torch.tensor([encode(args.start) or [END_OF_TEXT]], device=device)
            generator = torch.Generator().manual_seed(args.seed)
            sample = [token.item() for token in model.generate(
                prompt, 40, temperature=0.8, top_k=50, generator=generator)]
            say("sample: " + args.start + get_tokenizer().decode(sample).replace("\n", " "))
        if stop or step == args.max_iters:
            break
        fresh = True

        started = time.perf_counter()
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        report = torch.zeros(2, device=device)  # the mean loss, and whether anyone is to stop
        for i in range(args.gradient_accumulation_steps):
            micro = i * processes + rank  # its number among all of the step
            windows = windows_of(step, micro, args, n_windows[0])
            inputs, targets = get_batch(splits[0], windows, args.block_size, device)
            # What is dropped depends, like the windows, on seed, step and micro alone.
            seed, = np.random.SeedSequence((args.seed, step, micro)).generate_state(1, np.uint64)
            torch.manual_seed(int(seed))
            # Gradients of micro-batches add up here; DDP's processes exchange them with the last.
            trained.require_backward_grad_sync = i == args.gradient_accumulation_steps - 1
            with autocast():
                _, micro_loss = trained(inputs, targets)
            # Each is a mean: divided by their number, they add up to the mean of one large batch.
            micro_loss = micro_loss / args.gradient_accumulation_steps
            scaler.scale(micro_loss).backward()
            report[0] += micro_loss.detach() / processes
        report[1] += bool(caught)
        scaler.unscale_(optimizer)
        # One odd batch must not throw the weights far: longer gradients are cut to grad_clip, in
        # the same direction. The norm is the length before.
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)  # ()
        if processes > 1:
            dist.all_reduce(report)
        # The step's one wait for the GPU (but float16's scaler has its own). Gradients are averages
        # by now, so that all processes see the same.
        loss, stop, grad_norm = torch.cat((report, norm[None])).tolist()
        # An overflow in float16 is the scaler's business: it leaves the step out and scales less.
        may_overflow = scaler.is_enabled() and scaler.get_scale() > 1
        stop_unless_finite("loss and gradient norm", loss, 0.0 if may_overflow else grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step, timed, seconds = step + 1, timed + 1, seconds + time.perf_counter() - started

    if processes > 1:
        dist.destroy_process_group()
    if stop:
        say(f"stopped and saved at step {step}; go on with --resume --out_dir={args.out_dir}")
        sys.exit(128 + (caught or [signal.SIGTERM])[0])  # as shells do; another may have caught it
