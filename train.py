"""Trains a GPT-2 on a text, from nothing or from a checkpoint.

    python train.py --batch_size=2 --max_iters=150     the built-in story, in 4 GB of memory
    python train.py --data=my.txt --out_dir=my         your own text
    python train.py --resume                           continues from the last checkpoint
    torchrun --nproc_per_node=4 train.py ...           one run on four GPUs

The file is a script: it runs from its first line to its last, in nine parts. Read gpt.py
first. If you want the heart of training, look for "One more step" near the end.
"""
import argparse
import csv
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import math
import os
import sys
import time

import filelock
import numpy as np
import torch
import torch.distributed as dist

from gpt import (
    DATA_DIR, DTYPES, GPT, GPTConfig, InputError, atomic_write, catch_signals, center_logits,
    choose_device, command, encode, generate, get_tokenizer, load_checkpoint, number,
    raise_unless, read_text, reraise_as_input_error, save_checkpoint, show_progress,
    start_script, text_files, token_bytes, with_weights)

# torchrun starts this script several times, usually once for each GPU. It tells each
# process how many there are (WORLD_SIZE), which of them it is (RANK), and which it is
# on its own machine (LOCAL_RANK). Without torchrun there is one process, number 0, and
# whatever is said about processes may be skipped.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)
RANK, LOCAL_RANK = 0, 0
if WORLD_SIZE > 1:
    RANK, LOCAL_RANK = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
if RANK:
    sys.stdout = open(os.devnull, "w")  # process 0 prints for all


def gather(value):
    """Returns what all processes gave, a list, after each of them has called this."""
    if WORLD_SIZE == 1:
        return [value]
    values = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values


# ---- 1. Settings ---------------------------------------------------------------------


def real_path(path):
    """Returns a path in full, so that ./x.txt and x.txt are known to be the same file."""
    return os.path.realpath(os.path.expanduser(path))


parser = start_script(__doc__)
# What a flag may be. A count is an int of at least 1, steps may be 0 too, a rate is a
# float of at least 0, and a beta is a float from 0 to 0.9999.
count, steps = number(int, 1), number(int, 0)
rate, beta = number(float, 0), number(float, 0, 0.9999)

# files(...) adds a flag to this group, and sizes(...) and the others to theirs.
files = parser.add_argument_group("what to read and write").add_argument
files("--data", type=real_path, default=os.path.join(DATA_DIR, "story.txt"),
      help="a text, a folder of .txt files, or a .bin of uint16 ids (default: a story)")
files("--val_data", type=real_path,
      help="another text to validate on (default: the last tenth of --data)")
files("--out_dir", type=os.path.expanduser, default="out",
      help="where all results go (default: %(default)s)")
files("--resume", action="store_true", help="continue the run in out_dir with its flags")
files("--init_from", type=os.path.expanduser,
      help="a checkpoint whose weights a new run starts from")

sizes = parser.add_argument_group("model").add_argument
sizes("--vocab_size", type=number(int, 257, 50257), default=50257,
      help="tokens: 256 bytes, GPT-2's first merges, <|endoftext|> (default: %(default)s)")
sizes("--n_layer", type=count, default=12,
      help="transformer blocks (default: %(default)s)")
sizes("--n_head", type=count, default=12,
      help="attention heads in each block (default: %(default)s)")
sizes("--n_embd", type=count, default=768,
      help="channels of each token (default: %(default)s)")
sizes("--block_size", type=count, default=256,
      help="tokens in a window; a loaded model may allow fewer (default: %(default)s)")
sizes("--dropout", type=number(float, 0, 0.999), default=0.1,
      help="the probability that training sets a number to 0 (default: %(default)s)")

training = parser.add_argument_group("training").add_argument
training("--max_iters", type=steps, default=150,
         help="steps of the whole run (default: %(default)s)")
# A step may add up the gradients of several micro-batches, which needs less memory than
# one large batch.
training("--batch_size", type=count, default=2,
         help="windows in a micro-batch, computed together (default: %(default)s)")
training("--gradient_accumulation_steps", type=count, default=1,
         help="micro-batches of each process in a step (default: %(default)s)")
# (In nanoGPT, this flag counts the micro-batches of all processes.)
training("--learning_rate", type=number(float, 1e-12),
         help="the highest rate (default: 4e-4 x 768 / n_embd)")
training("--min_lr", type=rate, help="the last rate (default: learning_rate / 10)")
training("--warmup_iters", type=steps, default=30,
         help="steps in which the rate rises (default: %(default)s)")
training("--lr_decay_iters", type=steps,
         help="the step that reaches min_lr (default: max_iters)")
# Part 6 explains AdamW. Its averages are running ones: beta x average + (1 - beta) x new.
# (Usual for beta1 is 0.9, which averages over more steps than a short run can spare. On
# the story both did equally well: the best validation losses were 5.769 and 5.770.)
training("--weight_decay", type=rate, default=0.1,
         help="AdamW's weight decay (default: %(default)s)")
training("--beta1", type=beta, default=0.8,
         help="AdamW averages about 1 / (1 - beta1) gradients (default: %(default)s)")
training("--beta2", type=beta, default=0.95,
         help="and about 1 / (1 - beta2) squared gradients (default: %(default)s)")
training("--grad_clip", type=rate, default=1.0,
         help="the longest gradient that is not shortened; 0: any (default: %(default)s)")
training("--seed", type=number(int, 0, 2**63 - 1), default=1337,
         help="decides everything that is random (default: %(default)s)")

evaluation = parser.add_argument_group("evaluation").add_argument
evaluation("--eval_interval", type=count,
           help="steps between evaluations, which also save (default: max_iters / 5)")
evaluation("--eval_windows", type=count, default=40,
           help="windows of each of the two texts to evaluate on (default: %(default)s)")
evaluation("--log_interval", type=count, default=10,
           help="steps between printed rows (default: %(default)s)")
evaluation("--start", default="Every effort moves you",
           help="the prompt of the samples (default: %(default)s)")

machine = parser.add_argument_group("machine").add_argument
machine("--device", default="auto",
        help="cuda, mps or cpu (default: the first that is found)")
machine("--dtype", default="auto", choices=DTYPES,
        help="of matrix products; auto: bfloat16 or float16 where those are fast")
machine("--compile", action=argparse.BooleanOptionalAction,
        help="use torch.compile (default: on cuda, if triton is installed)")
args = parser.parse_args()

# ---- 2. The folder -------------------------------------------------------------------

ckpt_path = os.path.join(args.out_dir, "ckpt.pt")
best_path = os.path.join(args.out_dir, "best.pt")
plot_path = os.path.join(args.out_dir, "loss.png")
if RANK == 0:
    # Two runs in one folder would overwrite each other's files. This process holds the
    # lock as long as the variable `lock` exists, and the system drops it when the
    # process ends. is_singleton is for a notebook: a second %run of this script in the
    # same process gets the lock that the first one holds.
    with reraise_as_input_error(
            f"--out_dir={args.out_dir} is not writable, or another train.py uses it", OSError):
        os.makedirs(args.out_dir, exist_ok=True)
        lock = filelock.FileLock(os.path.join(args.out_dir, "lock"), timeout=0,
                                 is_singleton=True).acquire()
    raise_unless(args.resume or not os.path.exists(ckpt_path),
                 f"{ckpt_path} holds a run: give --resume, another --out_dir, or delete it")

# ---- 3. The model, and the last settings ---------------------------------------------

# The flags above say which checkpoint to load, if any. With --resume, all its saved flags
# now become the parser's defaults, and with --init_from only the model's sizes do. Then
# the command line is parsed again, so what was typed still wins.
state = {}  # what ckpt.pt says about a run that continues
if args.resume:
    model, state = load_checkpoint(ckpt_path, verify=RANK == 0)
    # A file of weights alone, such as best.pt, has no row of a log.
    raise_unless("row" in state, f"{ckpt_path} holds no run to resume; --init_from starts one")
    parser.set_defaults(**vars(model.config) | state["args"])
elif args.init_from:
    model, _ = load_checkpoint(args.init_from, verify=RANK == 0)
    block_size = min(args.block_size, model.config.block_size)
    parser.set_defaults(
        **vars(model.config) | {"block_size": block_size, "dropout": args.dropout})
args = parser.parse_args()
config = GPTConfig(**{name: getattr(args, name) for name in vars(GPTConfig())})

if args.resume or args.init_from:
    for name in ("vocab_size", "n_layer", "n_head", "n_embd"):
        value = getattr(model.config, name)
        raise_unless(getattr(args, name) == value,
                     f"--{name}={getattr(args, name)} does not fit the weights: {value}")
    # args.block_size is the window of this run, and config.block_size the number of the
    # model's positions. A window may be shorter. The other positions stay.
    raise_unless(args.block_size <= model.config.block_size,
                 f"--block_size={args.block_size}: the model has {model.config.block_size}")
    config = dataclasses.replace(config, block_size=model.config.block_size)
    # Build the model once more with this run's settings, since dropout, say, may be
    # another, and give it the loaded tensors as float32.
    model = with_weights(config, model.float().state_dict())
else:
    raise_unless(args.n_embd % args.n_head == 0,
                 f"--n_embd={args.n_embd} is not a multiple of --n_head={args.n_head}")
    torch.manual_seed(args.seed)
    model = GPT(config)

# The defaults of these four follow from other flags, so they are computed at each start
# and not saved. As a rule of thumb, the best rate falls with the width as 1 / n_embd.
learning_rate = args.learning_rate or 4e-4 * 768 / config.n_embd
min_lr = learning_rate / 10 if args.min_lr is None else args.min_lr
lr_decay_iters = args.max_iters if args.lr_decay_iters is None else args.lr_decay_iters
eval_interval = args.eval_interval or max(1, args.max_iters // 5)

# ckpt.pt keeps the flags of the run, and --resume says which of them are different now.
settings = {name: value for name, value in vars(args).items()
            if name not in ("resume", "out_dir")}
settings["processes"] = WORLD_SIZE
if args.resume:
    changes = [f"{name} {settings[name]} instead of {old}".replace("None", "its default")
               for name, old in state["args"].items() if settings.get(name) != old]
    print(f"from step {state['step']} on:", ", ".join(changes) or "the same flags")

# ---- 4. The machine ------------------------------------------------------------------

if args.device != "cpu" and torch.cuda.is_available():
    torch.cuda.set_device(LOCAL_RANK)  # the GPU that "cuda" means from here on
device, dtype = choose_device(args.device, args.dtype)
if args.init_from and not state and dtype != torch.float32 and center_logits(model):
    print(f"{args.init_from}: its logits are moved to around 0, for {dtype}")
model.to(device)
if sys.platform == "linux":
    # glibc, Linux's C library, returns large buffers to the system as soon as they are
    # free. The next step gets them back page by page, and the system clears each page
    # first. On two CPU cores that makes a step of 124M take 1.6 times as long. With
    # these settings glibc keeps up to 2 GB for the next step.
    import ctypes
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffers beside the heap
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the free end of the heap
if WORLD_SIZE > 1:
    # The others wait while process 0 tokenizes a text, which may take hours.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=datetime.timedelta(hours=12))


# ---- 5. The text ---------------------------------------------------------------------

T, V = args.block_size, config.vocab_size  # tokens in a window, and in the vocabulary
texts = {}  # for ckpt.pt: {path: the hash of its tokens, and its files' sizes and dates}


def write_tokens(path, bin_path):
    """Encodes the text at path into bin_path as uint16, two bytes a token."""
    with atomic_write(bin_path) as file:
        for text in read_text(path):
            ids = encode(text, V)
            file.write(np.array(ids, dtype=np.uint16))
            show_progress(f"{file.tell() // 2:,} tokens")
        raise_unless(file.tell() > 0, f"{path}: there is no text in it")


def load_tokens(flag):
    """Returns the tokens (n,) uint16 of --data or --val_data, mapped from a file.

    A text's tokens are kept in out_dir. The run continues with them, whatever becomes
    of the text. A .bin file, such as nanoGPT writes, has tokens already.
    """
    path = getattr(args, flag)
    bin_path = path if path.endswith(".bin") else os.path.join(args.out_dir, f"{flag}.bin")
    # Encode the text if ckpt.pt does not know it, or if the file of its tokens is gone.
    # Otherwise the run keeps these tokens. If the text was edited since, say so. If it
    # was deleted, nothing is missing.
    known = state["texts"].get(path) if state else None
    there = filter(os.path.exists, text_files(path))
    stat = [[os.path.getsize(name), os.path.getmtime(name)] for name in there]
    if RANK == 0 and path != bin_path:
        if not known or not os.path.exists(bin_path):
            write_tokens(path, bin_path)
        elif stat and stat != known["stat"]:
            print(f"{path} has changed; the run continues with the tokens in {bin_path}")
    gather(None)  # the others wait here until process 0 has made the file
    with reraise_as_input_error(f"{bin_path} holds no uint16 tokens", OSError, ValueError):
        tokens = np.memmap(bin_path, dtype=np.uint16, mode="r")
        # A file of 32-bit integers, read as uint16, has a 0 at every second place. In
        # a file of our tokens the largest id is below V. It is at least 256 too, since
        # a real text has some merged token, unless the vocabulary has few merges.
        # Otherwise the file is from another tokenizer, such as one of characters.
        raise_unless(len(tokens) < 9 or tokens[1:99:2].any(), "its integers are wider")
        raise_unless(path != bin_path or (256 if V > 512 else 0) <= tokens.max() < V,
                     f"its ids are not those of the {V} tokens of --vocab_size")
    digest = hashlib.sha256(tokens).hexdigest()
    raise_unless(not known or digest == known["hash"],
                 f"{path} is not this run's text, or its tokens in {bin_path} are damaged")
    raise_unless(len(set(gather(digest))) == 1,
                 "the processes read different tokens; share --out_dir, or one .bin as --data")
    texts[path] = known or {"hash": digest, "stat": stat}
    return tokens


# The text itself, and the part of it that is for validation.
train_tokens = load_tokens("data")
if args.val_data:
    val_tokens = load_tokens("val_data")
    trained_on = set(map(os.path.realpath, text_files(args.data)))
    raise_unless(trained_on.isdisjoint(map(os.path.realpath, text_files(args.val_data))),
                 f"--val_data={args.val_data} is part of --data; validate on another text")
else:
    train_tokens, val_tokens = np.split(train_tokens, [len(train_tokens) * 9 // 10])
for part, purpose in ((val_tokens, "validate on"), (train_tokens, "train on")):
    raise_unless(len(part) > T, f"--block_size={T}: the {len(part)} tokens to {purpose} "
                 f"allow at most {max(len(part) - 1, 0)}")
print(f"{len(train_tokens):,} tokens to train on, {len(val_tokens):,} to validate on")

# ---- 6. The optimizer ----------------------------------------------------------------

# AdamW (Loshchilov and Hutter, 2019) keeps two averages for each weight: of its
# gradients and of their squares. A step moves the weight by the first divided by the
# root of the second, times the learning rate, so all weights move about equally far.
# Weight decay makes each matrix, and the table of tokens, smaller at each step, by the
# fraction learning rate x weight_decay. A weight then stays large only if many batches
# keep pulling on it. What helps with one sentence alone tends to fade again, so the
# model learns less by heart. Biases and gains are few and need no decay. The vectors of
# positions get none either: where windows are shorter than the model's block_size, some
# positions have no gradient, and would fade away. If a group has an entry "lr_scale",
# the loop multiplies its rate by it.
decayed = {name: p for name, p in model.named_parameters()
           if p.dim() >= 2 and name != "wpe.weight"}
others = [p for name, p in model.named_parameters() if name not in decayed]
optimizer = torch.optim.AdamW(
    [{"params": decayed.values()}, {"params": others, "weight_decay": 0.0}],
    betas=(args.beta1, args.beta2), weight_decay=args.weight_decay, fused=True)
# While backward runs, the slopes of float16 numbers are float16 too, and those below 6e-8
# would become 0. The scaler multiplies the loss by a large number, which makes them all
# larger, and divides the gradients by it before they are used.
scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
# autocast computes matrix products in dtype, and their results (q, k, v, the attention
# weights, GELU, the logits) stay in it until something else is computed from them. The
# weights of the model, their gradients, x, LayerNorm and the loss stay in float32.
autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
if args.resume:
    # Only AdamW's averages are taken from the checkpoint. Rates and betas come from the
    # flags of this run. (The checkpoint knows a parameter by its place in the groups, 0,
    # 1, 2 and so on. If you change the groups above, start a new run with --init_from.)
    optimizer.load_state_dict(
        optimizer.state_dict() | {"state": state.pop("optimizer")["state"]})
    if state["scaler"]:  # it is empty if the run was not in float16
        scaler.load_state_dict(state["scaler"])
if args.compile is None:
    args.compile = device.type == "cuda" and importlib.util.find_spec("triton")
# torch.compile and DDP (DistributedDataParallel) wrap the model and train its weights.
# DDP averages the gradients over the processes.
wrapped = torch.compile(model) if args.compile else model
if WORLD_SIZE > 1:
    wrapped = torch.nn.parallel.DistributedDataParallel(wrapped)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {device}, {dtype}; a blind "
      f"guess costs ln(vocab_size) = {math.log(V):.4f} nats a token")

# ---- 7. Schedule, batch, evaluation --------------------------------------------------


def get_lr(step):
    """Returns the learning rate of a step, counted from 0.

    It rises in a straight line, since AdamW's averages rest on few gradients at first.
    Then it falls along half a cosine to min_lr, so that the weights settle.
    """
    if step >= lr_decay_iters:
        return min_lr
    if step < args.warmup_iters:
        return learning_rate * (step + 1) / args.warmup_iters
    progress = (step - args.warmup_iters) / (lr_decay_iters - args.warmup_iters)
    return min_lr + (learning_rate - min_lr) * (1 + math.cos(math.pi * progress)) / 2


@functools.lru_cache(maxsize=3)  # epoch 0, for their number, and two that a batch touches
def epoch_starts(epoch):
    """Returns where the windows of an epoch begin, in the order in which they are read.

    An epoch is a pass over the text, in windows of T tokens that lie side by side. Each
    epoch shifts them by an offset of its own. Otherwise a token would have the same
    position, and see the same tokens before it, in every epoch. (In 16 epochs of
    Shakespeare, the offset lowered the validation loss from 1.522 to 1.505 nats a
    character.) To make room for an offset from 0 to T - 1, an epoch gives up about one
    window. For example, 100 tokens and T = 10 make 9 windows. They need 91 tokens, so
    the offset is 0 to 9.
    """
    rng = np.random.default_rng((args.seed, epoch))
    n_windows = max(1, len(train_tokens) // T - 1)
    spare = len(train_tokens) - 1 - n_windows * T  # tokens that no window needs
    offset = rng.integers(min(spare + 1, T))
    return offset + rng.permutation(n_windows) * T


def train_starts(step, micro_step):
    """Returns where the batch_size windows of a micro-batch of a step begin.

    They follow from the flags, the text and these two numbers, so a resumed run reads
    what it would have read. (Another version of NumPy may draw other numbers, so keep
    the one that a run began with.)
    """
    micro_batches = args.gradient_accumulation_steps * WORLD_SIZE  # in a step
    first = (step * micro_batches + micro_step) * args.batch_size
    n_windows = len(epoch_starts(0))
    return [epoch_starts(i // n_windows)[i % n_windows]
            for i in range(first, first + args.batch_size)]


def eval_starts(tokens):
    """Returns where the evaluated windows begin: always the same, spread over the tokens."""
    n_windows = (len(tokens) - 1) // T
    n = min(n_windows, args.eval_windows)
    return [i * n_windows // n * T for i in range(n)]


def get_batch(tokens, starts):
    """Returns inputs and targets, (B, T) int64 each: a target is the token after its input."""
    windows = np.stack([tokens[start : start + T + 1] for start in starts])  # (B, T + 1)
    windows = torch.from_numpy(windows.astype(np.int64)).to(device)
    return windows[:, :-1], windows[:, 1:]


class Interrupted(Exception):
    """A signal asked the run to stop."""


def stop_if_asked():
    """Raises Interrupted in all processes at once, if one of them has caught a signal.

    `caught` is the list of signals that the loop below collects.
    """
    if any(gather(len(caught))):
        raise Interrupted


@torch.no_grad()
def evaluate(tokens):
    """Returns the mean loss in nats a token, without dropout, on the evaluated windows.

    No random number is drawn, so evaluating more or less often does not change a run.
    """
    model.eval()
    starts = eval_starts(tokens)
    B = args.batch_size
    total = 0.0
    for first in range(0, len(starts), B * WORLD_SIZE):
        stop_if_asked()
        mine = starts[first + RANK * B :][:B]  # of this process
        if mine:
            inputs, targets = get_batch(tokens, mine)
            with autocast:
                total += model(inputs, targets).item() * len(mine)
    return sum(gather(total)) / len(starts)


# A loss in nats a token cannot be compared between vocabularies, because a longer
# token says more. Bits a byte can be: they count what each byte of the text costs.
bytes_of = np.array(token_bytes(V))  # (V,)
targets = [val_tokens[start + 1 : start + T + 1] for start in eval_starts(val_tokens)]
bytes_per_token = bytes_of[np.stack(targets)].mean().item()

# ---- 8. The loop ---------------------------------------------------------------------

# Two functions and what the loop keeps come first. The loop itself evaluates, prints
# and saves when it is time, and then takes one more step.


def save_run():
    """Writes ckpt.pt, from which --resume continues.

    AdamW's two averages for each weight make it three times as large as the weights.
    """
    if RANK == 0:
        save_checkpoint(ckpt_path, model, step=step, row=row, log=log, best=best,
                        args=settings, texts=texts, optimizer=optimizer.state_dict(),
                        scaler=scaler.state_dict())


def plot():
    """Draws the losses over the steps."""
    from matplotlib.figure import Figure
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for name in ("loss", "train_loss", "val_loss"):
        rows = [row for row in log if name in row]
        axes.plot([row["iter"] for row in rows],
                  [row[name] for row in rows], ".-", label=name)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    figure.savefig(plot_path)


step = state.get("step", 0)
saved_at = state.get("step", -1)  # the step that ckpt.pt holds
row = state.get("row", {"iter": 0, "tokens": 0})  # what the log says about the last step
log = state.get("log", [])  # the rows up to the checkpoint; later ones are made again
best = {"step": 0, "val_loss": math.inf}
if state and state["texts"] == texts:  # losses on other texts cannot be compared
    best = state["best"]
columns = ("iter", "tokens", "loss", "train_loss", "val_loss", "val_bits_per_byte", "lr",
           "grad_norm", "tokens_per_s")
log_csv = csv.DictWriter(
    open(os.path.join(args.out_dir, "log.csv") if RANK == 0 else os.devnull, "w",
         encoding="utf-8", newline="", buffering=1), columns, lineterminator="\n")
log_csv.writeheader()
log_csv.writerows(log)
tokenizer = get_tokenizer(V)
prompt = encode(args.start, V) or [V - 1]
first_step, started = step, time.perf_counter()
interrupted = False
with catch_signals() as caught:
    try:
        while True:
            # Here `step` steps are done. Evaluate and save, if it is time. After
            # --resume, the row of this step may be in the log already. Then it is not
            # new, and is neither evaluated nor printed once more.
            is_new = not log or log[-1]["iter"] < step
            is_last = step >= args.max_iters
            evaluating = is_new and (is_last or step % eval_interval == 0)
            if evaluating:
                row["train_loss"], row["val_loss"] = map(evaluate, (train_tokens, val_tokens))
                row["val_bits_per_byte"] = row["val_loss"] / math.log(2) / bytes_per_token

            # Stop if a number is infinite or nan. In float16 a gradient alone may be
            # infinite now and then: the scaler skips such a step and lowers its factor.
            bad = [name for name, value in row.items() if not math.isfinite(value)]
            if bad and not (scaler.is_enabled() and bad == ["grad_norm"]):
                raise InputError(f"{bad[0]} is {row[bad[0]]} at step {step}; {ckpt_path} still has "
                                 f"step {saved_at}; a lower --learning_rate may help")

            if evaluating or (is_new and step % args.log_interval == 0):
                log.append(row)
                log_csv.writerow(row)
                line = [f"iter {step}"]
                line += [f"{name} {value:.5g}" for name, value in row.items()
                         if name not in ("iter", "tokens")]
                if evaluating:
                    line.append(f"val_perplexity {math.exp(min(row['val_loss'], 700)):.5g}")
                if step > first_step:
                    seconds = (time.perf_counter() - started) / (step - first_step)
                    line.append(f"{seconds * (args.max_iters - step) / 60:.1f} min left")
                print(" | ".join(line))

            if evaluating and RANK == 0:
                try:
                    if row["val_loss"] < best["val_loss"]:
                        # A model that learns its text by heart gets worse on other
                        # texts. best.pt keeps the weights from before that.
                        save_checkpoint(best_path, model, step=step, val_loss=row["val_loss"])
                        best = {"step": step, "val_loss": row["val_loss"]}
                    save_run()
                    saved_at = step
                    plot()
                except Exception as error:
                    # Such as a full disk. That is a warning, because the next
                    # evaluation saves again. It is an error if there is no next
                    # one, or if nothing could be saved at all.
                    if saved_at < step and (is_last or saved_at < 0):
                        raise
                    print(f"warning: {error}; the run continues")
                ids = generate(model, torch.tensor([prompt], device=device), 40, temperature=0.8,
                               top_k=50, generator=torch.Generator().manual_seed(args.seed))
                text = args.start + tokenizer.decode([token.item() for token in ids])
                print("sample: " + text.replace("\n", " "))
            elif evaluating:
                saved_at = step  # process 0 has saved, and any process may report it
            if is_last:
                break

            # One more step.
            model.train()  # with dropout
            step_started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = get_lr(step) * group.get("lr_scale", 1)
            loss = 0.0
            for i in range(args.gradient_accumulation_steps):
                stop_if_asked()
                micro_step = i * WORLD_SIZE + RANK  # counted over all processes
                # Dropout, too, depends on the flags and these numbers alone.
                seed = np.random.default_rng((args.seed, step, micro_step)).integers(2**63)
                torch.manual_seed(int(seed))
                # Let DDP average the gradients only after the last micro-batch. A
                # model without DDP does not look at this.
                wrapped.require_backward_grad_sync = (
                    i == args.gradient_accumulation_steps - 1)
                inputs, targets = get_batch(train_tokens, train_starts(step, micro_step))
                with autocast:
                    micro_loss = wrapped(inputs, targets) / args.gradient_accumulation_steps
                # backward computes how fast micro_loss changes with each weight, and
                # adds that slope to the weight's .grad. All micro_losses of a step sum
                # to its mean loss, so in the end .grad has the slope of the mean. (The
                # scaler changes nothing unless dtype is float16.)
                scaler.scale(micro_loss).backward()
                loss += micro_loss.detach()
            scaler.unscale_(optimizer)
            # Shorten a long gradient: one odd batch must not throw the weights far off.
            grad_norm = torch.nn.utils.clip_grad_norm_(
                model.parameters(), args.grad_clip or math.inf)
            scaler.step(optimizer)  # AdamW moves the weights against the gradient
            scaler.update()
            optimizer.zero_grad()
            step += 1
            n_tokens = args.batch_size * args.gradient_accumulation_steps * WORLD_SIZE * T
            row = {"iter": step, "tokens": row["tokens"] + n_tokens,
                   "loss": sum(gather(loss.item())) / WORLD_SIZE, "lr": get_lr(step - 1),
                   "grad_norm": grad_norm.item(),
                   "tokens_per_s": n_tokens / (time.perf_counter() - step_started)}
    except Interrupted:
        # Half a step or half an evaluation is given up. The last whole step is saved,
        # even if it was saved before, because the flags may be new.
        interrupted = True
        save_run()

# ---- 9. What next --------------------------------------------------------------------

if WORLD_SIZE > 1:
    dist.barrier()  # process 0 may still be saving, and fails if the others are gone
    dist.destroy_process_group()
resume = command("train.py", "--resume", f"--out_dir={args.out_dir}")
if interrupted:
    print(f"stopped; {ckpt_path} has step {step}; {resume} continues")
    # The status that shells expect: 128 and the signal. If another process caught it,
    # take 15, which is SIGTERM.
    sys.exit(128 + (caught or [15])[0])

print(f"""{ckpt_path} has step {step}
{best_path} has the best val_loss, {best['val_loss']:.4f}, of step {best['step']}
{plot_path} shows the losses
{resume} --max_iters=N continues
next: {command("sample.py", f"--checkpoint={ckpt_path}", "--start", args.start)}""")
