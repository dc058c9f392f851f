"""Trains a GPT-2 on a text, from nothing or from a checkpoint.

    python train.py --batch_size=2 --max_iters=150     the built-in story, in 4 GB of memory
    python train.py --data=my.txt --out_dir=my         your own text
    python train.py --resume                           goes on from the last checkpoint
    torchrun --nproc_per_node=4 train.py ...           one run on four GPUs

Read gpt.py first, then this file from top to bottom.
"""
import argparse
import contextlib
import csv
import datetime
import functools
import glob
import hashlib
import math
import os
import shlex
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

from gpt import (DATA_DIR, DTYPES, END_OF_TEXT, GPT, GPTConfig, atomic_write, center_logits,
                 choose_device, decode_utf8, encode, explain, generate, get_tokenizer,
                 load_checkpoint, number, one_line, require, save_checkpoint, start_script,
                 with_weights)

STORY = os.path.join(DATA_DIR, "story.txt")
COLUMNS = ("iter", "tokens", "loss", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s")
# torchrun tells each process how many there are, and its number among all and on its machine.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0)) if WORLD_SIZE > 1 else 0

# ---- Flags ---------------------------------------------------------------------------------------
def make_parser():
    """Most flags are nanoGPT's; there, accumulation steps count those of all processes."""
    parser = start_script(__doc__)
    path = os.path.expanduser  # ~ is the home folder
    count = number(int, 1)
    flag = parser.add_argument_group("what to read and write").add_argument
    flag("--data", type=path, default=STORY, help="text, folder of .txt, or .bin")
    flag("--val_data", type=path, help="as --data (default: the last tenth of it)")
    flag("--out_dir", type=path, default="out", help="where all results go")
    flag("--resume", action="store_true", default=False, help="go on with the run in out_dir")
    flag("--init_from", type=path, help="a checkpoint whose weights start a new run")
    flag = parser.add_argument_group("model").add_argument
    flag("--n_layer", type=count, default=12, help="transformer blocks")
    flag("--n_head", type=count, default=12, help="attention heads in a block")
    flag("--n_embd", type=count, default=768, help="embedding dimension")
    flag("--block_size", type=count, default=256, help="context length, in tokens")
    flag("--dropout", type=number(float, 0, 0.999), default=0.1, help="dropout probability")
    flag = parser.add_argument_group("training").add_argument
    flag("--max_iters", type=number(int, 0), default=150, help="steps, from the run's beginning")
    flag("--batch_size", type=count, default=2, help="windows in a micro-batch")
    flag("--gradient_accumulation_steps", type=count, default=1, help="micro-batches per process")
    flag("--learning_rate", type=number(float, 1e-12), default=4e-4, help="the highest rate")
    flag("--min_lr", type=number(float, 0), help="default: learning_rate / 10")
    flag("--warmup_iters", type=number(int, 0), default=30, help="steps of linear warm-up")
    flag("--lr_decay_iters", type=number(int, 0), help="default: the first max_iters")
    flag("--weight_decay", type=number(float, 0), default=0.1, help="AdamW's weight decay")
    # AdamW averages about 1 / (1 - beta) gradients: 5 for 0.8, which suits a short run, 10 for 0.9.
    flag("--beta1", type=number(float, 0, 0.9999), default=0.8, help="AdamW's first beta")
    flag("--beta2", type=number(float, 0, 0.9999), default=0.95, help="AdamW's second beta")
    flag("--grad_clip", type=number(float, 0), default=1.0, help="gradient norm limit; 0: none")
    flag("--seed", type=number(int, 0, 2**63 - 1), default=1337, help="decides all that is random")
    flag = parser.add_argument_group("evaluation").add_argument
    flag("--eval_interval", type=count, default=30, help="steps between evaluations")
    flag("--eval_windows", type=count, default=40, help="windows of each split to evaluate on")
    flag("--log_interval", type=count, default=10, help="steps between printed lines")
    flag("--start", default="Every effort moves you", help="the prompt of the samples")
    flag = parser.add_argument_group("machine").add_argument
    flag("--device", default="auto", help="cuda, mps or cpu; auto: the first found")
    flag("--dtype", default="auto", choices=DTYPES, help="of matrix products; auto: the fastest")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on cuda")
    return parser

def print0(*words, **options):
    """print, on process 0. If the terminal or pipe has gone away, training goes on in silence."""
    if RANK == 0:
        try:
            print(*words, **options)
        except OSError:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")

# ---- Text to tokens ------------------------------------------------------------------------------
def read_text(files):
    """Yields the text of the files in parts that encode to the same ids as the whole: it is cut
    before white space only, and no token has white space after a visible character."""
    rest = ""
    for name in files:
        if name != files[0]:
            # As in GPT-2's training, it marks a new text. Attention can look across it.
            rest += "<|endoftext|>"
        with explain(f"{name} cannot be read; give --data=PATH", OSError), open(name, "rb") as file:
            while data := b"".join(file.readlines(2**18)):  # whole lines, 256 kB or more
                text = rest + decode_utf8(data, name, offset=file.tell() - len(data))
                part = text.rstrip()
                yield part
                rest = text[len(part) :]
    yield rest

def write_tokens(path, kept, expected_hash):
    """Encodes a text, or a folder of texts, into the file `kept`, as uint16 (up to 65,535)."""
    files = sorted(glob.glob(os.path.join(glob.escape(path), "*.[tT][xX][tT]"))) or [path]
    sha = hashlib.sha256()
    with atomic_write(kept) as file:
        for text in read_text(files):
            tokens = np.array(encode(text, path), dtype=np.uint16)
            sha.update(tokens)
            file.write(tokens)
            print0(f"{path}: {len(files)} file(s), {file.tell() // 2:,} tokens", end="\r")
        print0()
        require(file.tell() > 0, f"{path}: there is no text in it")
        require(expected_hash in (None, sha.hexdigest()), f"{path} is not the text of this run")

def load_tokens(flag, args, state):
    """--data or --val_data -> its tokens (n,) uint16, mapped from a file, and their hash. A text's
    tokens are kept in out_dir: a run goes on with them, whatever became of the text."""
    path = getattr(args, flag)
    is_bin = path.endswith(".bin")  # it has tokens already, as nanoGPT writes them
    bin_path = path if is_bin else os.path.join(args.out_dir, f"{flag}.bin")
    made = RANK > 0 or state.get("args", {}).get(flag) == path  # by process 0 or earlier
    if not is_bin and not (made and os.path.exists(bin_path)):
        write_tokens(path, bin_path, state.get(f"{flag}_hash"))
    with explain(f"{bin_path} cannot be read as GPT-2's tokens in uint16", OSError, ValueError):
        tokens = np.memmap(bin_path, dtype=np.uint16, mode="r")
        if is_bin:
            require(tokens[:3].tobytes() != b"\x93NUMPY", "it is a .npy file")
            require(tokens[1:99:2].any(), "its integers are wider")  # upper halves are 0
            largest = tokens.max()
            # Ids up to 255 are single bytes. A text of more than a few words has others.
            require(255 < largest <= END_OF_TEXT, f"its largest id is {largest}, not 256 to 50256")
    return tokens, hashlib.sha256(tokens).hexdigest()

# ---- Windows, schedule, step, evaluation ---------------------------------------------------------
def windows_in(tokens, args, purpose):
    """tokens (n,) -> a view of their windows (n_windows, block_size + 1). Says how many there are.
    Two neighbours share one token: the last of a window is a target only."""
    T = args.block_size
    n = len(tokens)
    require(n > T, f"--block_size={T}: {n} tokens to {purpose} allow at most {max(n - 1, 0)}")
    windows = np.lib.stride_tricks.sliding_window_view(tokens, T + 1)[::T]
    print0(f"{n:,} tokens to {purpose}: {len(windows):,} windows of {T}, of which "
           f"{min(len(windows), args.eval_windows)} are evaluated")
    return windows

@functools.lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def shuffled(n_windows, seed, epoch):
    """The order in which an epoch, one pass over the text, reads the windows."""
    return np.random.default_rng((seed, epoch)).permutation(n_windows)

def window_indices(step, micro_step, args, n_windows):
    """The indices of the batch_size windows of a micro-batch of a step. They follow from the
    arguments alone: a resumed run reads what it would have read. An epoch reads each window once,
    in an order of its own. Windows drawn independently would leave some out."""
    first = step * args.windows_per_step + micro_step * args.batch_size  # windows read before these
    return [shuffled(n_windows, args.seed, i // n_windows)[i % n_windows]
            for i in range(first, first + args.batch_size)]

def loss_on(windows, model, args):
    """The model's mean loss on windows (B, T + 1), a scalar. Matrix products are computed in
    args.dtype. Weights, gradients, the x between blocks, LayerNorm and the loss stay float32."""
    device = next(model.parameters()).device
    tokens = torch.from_numpy(windows.astype(np.int64)).to(device)  # (B, T + 1)
    with torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
        return model(tokens[:, :-1], tokens[:, 1:])  # a token's target is the token after it

def get_lr(step, args):
    """The rate of a step, counted from 0: a linear warm-up, since AdamW's averages rest on few
    gradients at first, then half a cosine down to min_lr, to settle into a minimum."""
    if step >= args.lr_decay_iters:
        return args.min_lr
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    progress = (step - args.warmup_iters) / (args.lr_decay_iters - args.warmup_iters)
    return args.min_lr + (args.learning_rate - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2

def train_step(step, model, windows, optimizer, scaler, args):
    """One step of AdamW -> the mean loss of this process's windows, and the gradient norm. float16
    has nothing between 0 and 6e-8, so the scaler multiplies the loss, and with it all gradients, by
    a large number, and divides the gradients by it before they are used."""
    for group in optimizer.param_groups:
        group["lr"] = get_lr(step, args)
    loss = 0.0
    for i in range(args.gradient_accumulation_steps):
        micro_step = i * WORLD_SIZE + RANK  # the micro-batch's number among all of the step
        # The seed of dropout, too, depends on seed, step and micro_step alone.
        seed = np.random.default_rng((args.seed, step, micro_step)).integers(2**63)
        torch.manual_seed(int(seed))
        if WORLD_SIZE > 1:  # average gradients over processes only after the last
            model.require_backward_grad_sync = i == args.gradient_accumulation_steps - 1
        batch = windows[window_indices(step, micro_step, args, len(windows))]  # (B, T + 1)
        # Each mean, divided by their number: the sum is then the mean of one large batch.
        micro_loss = loss_on(batch, model, args) / args.gradient_accumulation_steps
        scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    scaler.unscale_(optimizer)
    # Clip, so that one odd batch cannot throw the weights far. The norm is from before the clip.
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss.item(), grad_norm.item()

def sum_over_processes(*values):
    """Adds up each of the values, Python numbers, over all processes."""
    if WORLD_SIZE == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()

@torch.no_grad()
def evaluate(model, windows, args):
    """The mean loss, in nats a token, on eval_windows of the windows, spread evenly over the text.
    They are always the same, and no random number is drawn."""
    n = min(len(windows), args.eval_windows)
    indices = [i * len(windows) // n for i in range(n)][RANK::WORLD_SIZE]  # this process's share
    total = 0.0
    for start in range(0, len(indices), args.batch_size):
        batch = windows[indices[start : start + args.batch_size]]  # (B, T + 1)
        total += loss_on(batch, model, args).item() * len(batch)
    return sum_over_processes(total)[0] / n

# ---- The system, reports, the start --------------------------------------------------------------
def lock_folder(folder):
    """Only one run may write to a folder. The system drops the lock when this process ends."""
    import filelock
    os.makedirs(folder, exist_ok=True)
    lock = filelock.FileLock(os.path.join(folder, "lock"), timeout=0, is_singleton=True)
    with explain(f"--out_dir={folder}: another train.py is using it", filelock.Timeout):
        return lock.acquire()  # is_singleton: the second %run in a notebook has it already

def catch_signals():
    """-> a list that gets the signals which ask this process to end. The first ends the training
    after the step. The same signal again ends the process at once."""
    caught = []
    def finish(signum, _):
        caught.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        if RANK == 0:
            with contextlib.suppress(OSError):  # os.write, for the signal may interrupt a print
                os.write(2, b"finishing the step, then saving; once more ends it without saving\n")
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)  # Windows has no SIGHUP
        if signum and signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(signum, finish)
    return caught

def keep_freed_memory():
    """glibc gives large freed buffers back to the system, and the next step pays a page fault for
    each 4 kB of them. With these settings glibc keeps them."""
    import ctypes
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: large buffers come from the heap
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap keeps 2 GB

def peak_memory(device):
    """The most memory that this process has held, in GB: on cuda the GPU's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if os.name == "nt":
        return math.nan
    import resource  # Windows has none
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

def record(row, log_csv, tokens_left):
    """Writes a row of the log, then prints it, with the time left at this step's speed."""
    log_csv.writerow(row)
    line = [f"{name} {value:.6g}" for name, value in row.items() if name != "tokens"]
    if "val_loss" in row:
        line.append(f"val_perplexity {math.exp(min(row['val_loss'], 700)):.6g}")
    if "tokens_per_s" in row:
        line.append(f"{tokens_left / row['tokens_per_s'] / 60:.1f} min left")
    print0(" | ".join(line))

def stop_unless_finite(row, saved_at, scaler, args):
    """Ends the script with status 1 if a number of row is not finite. ckpt.pt stays as it was."""
    bad = [name for name, value in row.items() if not math.isfinite(value)]
    # When float16 overflows, the scaler skips the step and halves its factor. Below 1, give up.
    if not bad or (bad == ["grad_norm"] and scaler.is_enabled() and scaler.get_scale() >= 1):
        return
    cure = ""
    if saved_at >= 0:
        path = os.path.join(args.out_dir, "ckpt.pt")
        flags = (f"--init_from={path}", f"--data={args.data}", f"--val_data={args.val_data}",
                 f"--block_size={args.block_size}", f"--learning_rate={args.learning_rate / 4:.1e}",
                 "--out_dir=NEW")
        cure = f". {path} still has step {saved_at}: python train.py {shlex.join(flags)}"
    print0(f"train.py: error: {bad[0]} is {row[bad[0]]} at step {row['iter']} (learning rate "
           f"{row.get('lr', 0):.1e}, {args.dtype}){cure}", file=sys.__stderr__)
    sys.exit(1)

def show_sample(model, args):
    """Prints 40 tokens that the model writes after --start."""
    ids = encode(args.start) or [END_OF_TEXT]
    prompt = torch.tensor([ids], device=model.wte.weight.device)
    tokens = generate(model, prompt, 40, temperature=0.8, top_k=50,
                      generator=torch.Generator().manual_seed(args.seed))
    text = get_tokenizer().decode([token.item() for token in tokens])
    print0("sample: " + (args.start + text).replace("\n", " "))

def plot(log, tokens_per_step, path):
    """Draws the losses in log over steps and tokens seen, with perplexity, exp(loss), at right."""
    try:
        from matplotlib.figure import Figure
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, style in (("loss", "C7-"), ("train_loss", "C0o-"), ("val_loss", "C1o-")):
            rows = [row for row in log if name in row]
            axes.plot([row["iter"] for row in rows], [row[name] for row in rows], style, label=name)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        axes.twinx().set(yscale="log", ylim=np.exp(axes.get_ylim()), ylabel="perplexity")
        axes.twiny().set(xlim=np.multiply(axes.get_xlim(), tokens_per_step), xlabel="tokens seen")
        figure.savefig(path, dpi=110)
    except Exception as error:  # a picture is not worth a run
        print0(f"warning: no {path}: {one_line(error)}")

# --resume may change these, if windows_per_step stays. A new batch_size changes dropout.
MAY_CHANGE = ("data", "val_data", "resume", "max_iters", "lr_decay_iters", "batch_size",
              "gradient_accumulation_steps", "eval_interval", "eval_windows", "log_interval",
              "start", "device", "dtype", "compile")

def init_run(parser, args, ckpt_path):
    """-> args, with defaults from the checkpoint that they name, if any; the GPT to train; and the
    state of the run that goes on, or {}."""
    require(not (args.resume and "init_from" in args), "--resume excludes --init_from")
    source = ckpt_path if args.resume else vars(args).get("init_from")
    saved = {}  # {flag: value} that the checkpoint decides, unless the flag is typed
    if source:
        model, state = load_checkpoint(source, verify=True)
        saved = dict(vars(model.config))
    if args.resume:
        require("data_hash" in state, f"{source} holds no run to resume; --init_from starts one")
        saved |= state["args"] | {"out_dir": args.out_dir}  # it may have moved
    elif source:
        saved["block_size"] = min(saved["block_size"], args.block_size)
        del saved["dropout"]  # a new run has its own
    args = parser.parse_args(namespace=argparse.Namespace(**saved))  # typed flags win over saved
    vars(args).setdefault("val_data", "")
    vars(args).setdefault("min_lr", args.learning_rate / 10)
    vars(args).setdefault("lr_decay_iters", args.max_iters)
    args.windows_per_step = args.batch_size * args.gradient_accumulation_steps * WORLD_SIZE
    changed = [f"{name}={getattr(args, name)} instead of {value}" for name, value in saved.items()
               if name not in MAY_CHANGE and getattr(args, name) != value]
    cure = "start a new run for other flags; --init_from keeps the model's sizes"
    if any(change.startswith("windows_per_step") for change in changed):
        cure = "windows_per_step is batch_size x gradient_accumulation_steps x processes"
    require(not changed, f"{source} cannot go on with {', '.join(changed)}; {cure}")
    require(args.n_embd % args.n_head == 0, f"n_head={args.n_head} does not divide {args.n_embd}")
    require(args.min_lr <= args.learning_rate, f"--min_lr={args.min_lr} is above --learning_rate")
    config = GPTConfig(**{k: v for k, v in vars(args).items() if k in vars(GPTConfig())})
    if not source:
        torch.manual_seed(args.seed)
        model = GPT(config)
    elif not args.resume:
        whole = model.config.block_size
        weights = model.state_dict()
        weights["wpe.weight"] = weights["wpe.weight"][: args.block_size].clone()  # frees the rest
        model = with_weights(config, weights).float()
        center_logits(model)
        if args.block_size < whole:
            print0(f"the first {args.block_size} positions stay; --block_size={whole} keeps all")
    return args, model, (state if args.resume else {})

# ---- The script ----------------------------------------------------------------------------------
if __name__ == "__main__":
    parser = make_parser()
    args = parser.parse_args()
    ckpt_path, best_path, log_path, plot_path = (
        os.path.join(args.out_dir, name) for name in ("ckpt.pt", "best.pt", "log.csv", "loss.png"))
    require(not args.resume or os.path.exists(ckpt_path), f"--resume: {ckpt_path} is not there")
    if RANK == 0:
        lock = lock_folder(args.out_dir)  # held as long as the name lives
    require(args.resume or not os.path.exists(ckpt_path),
            f"{ckpt_path} holds a run: give --resume, another --out_dir, or delete it")
    args, model, state = init_run(parser, args, ckpt_path)

    if WORLD_SIZE > 1 and args.device in ("auto", "cuda") and torch.cuda.is_available():
        require(LOCAL_RANK < torch.cuda.device_count(), "--nproc_per_node exceeds the GPUs here")
        torch.cuda.set_device(LOCAL_RANK)  # the one that "cuda" means from here on
    device, dtype = choose_device(args.device, args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    keep_freed_memory()
    model.to(device)

    # Process 0 makes the tokens files. The others wait at the barrier.
    if WORLD_SIZE > 1:
        with explain("WORLD_SIZE is set, but not by torchrun: unset it", ValueError):
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                    timeout=datetime.timedelta(hours=12))  # to tokenize a long text
    if RANK > 0:
        dist.barrier()
    tokens, data_hash = load_tokens("data", args, state)
    train_tokens, val_tokens = np.split(tokens, [len(tokens) * 9 // 10])
    val_hash = ""
    if args.val_data:
        train_tokens = tokens
        val_tokens, val_hash = load_tokens("val_data", args, state)
    if WORLD_SIZE > 1 and RANK == 0:
        dist.barrier()
    require(not state or [state["data_hash"], state["val_data_hash"]] == [data_hash, val_hash],
            f"a text is not this run's, or a .bin in {args.out_dir} is damaged: delete it")
    val_windows = windows_in(val_tokens, args, "validate")  # first: usually the shorter one
    train_windows = windows_in(train_tokens, args, "train on")
    tokens_per_step = args.windows_per_step * args.block_size
    print0(f"{sum(p.numel() for p in model.parameters()):,} parameters, {device}, {args.dtype}, "
           f"{tokens_per_step:,} tokens a step")

    # AdamW (Loshchilov and Hutter, 2019) moves a weight by lr times its averaged gradient over the
    # root of its averaged squared gradient. It takes lr * weight_decay of each matrix and embedding
    # away, so that none grows without need. Biases and gains are left alone, as usual.
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.dim() >= 2]},
         {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}],
        betas=(args.beta1, args.beta2), weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if args.resume:
        optimizer.load_state_dict(state.pop("optimizer"))  # pop gives its memory back
        if state["scaler"]:  # it is empty if the run had another dtype
            scaler.load_state_dict(state["scaler"])
        print0(f"going on from step {state['step']}")
    # DDP averages gradients over processes. It and torch.compile train the weights of model itself.
    wrapped = torch.compile(model) if getattr(args, "compile", device.type == "cuda") else model
    if WORLD_SIZE > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(wrapped)

    step = state.get("step", 0)
    saved_at = state.get("step", -1)  # the step that ckpt.pt has, or -1
    best = state.get("best", {"step": 0, "val_loss": math.inf})
    log = state.get("log", [])  # rows up to the checkpoint; a resumed run repeats the later steps
    if RANK == 0:
        log_file = open(log_path, "w", encoding="utf-8", newline="", buffering=1)
        log_csv = csv.DictWriter(log_file, COLUMNS, lineterminator="\n")
        log_csv.writeheader()
        log_csv.writerows(log)
    if args.warmup_iters >= args.lr_decay_iters > step:
        print0("--warmup_iters reaches lr_decay_iters, where the rate drops to min_lr")
    print0(f"a blind guess costs a loss of {math.log(model.config.vocab_size):.4f}, ln(vocab_size)")

    caught = catch_signals()
    stop = False
    row = {"iter": 0, "tokens": 0}  # the last step's row of the log, made at the loop's end
    while True:
        # 1. After `step` steps: evaluate, log, save. For ckpt.pt's own step that is done.
        is_new = step > saved_at
        evaluating = is_new and (step % args.eval_interval == 0 or step == args.max_iters)
        model.eval()  # no dropout
        if evaluating:
            for name, windows in (("train_loss", train_windows), ("val_loss", val_windows)):
                row[name] = evaluate(model, windows, args)
        stop_unless_finite(row, saved_at, scaler, args)
        if RANK == 0:
            if evaluating or (is_new and step % args.log_interval == 0):
                log.append(row)
                record(row, log_csv, (args.max_iters - step) * tokens_per_step)
            if evaluating and row["val_loss"] < best["val_loss"]:
                # A model that learns a text by heart gets worse on others. best.pt is from before.
                best = {"step": step, "val_loss": row["val_loss"]}
                save_checkpoint(best_path, model, **best)
            if evaluating or stop:
                # AdamW's two averages for each weight make ckpt.pt three times as large.
                save_checkpoint(ckpt_path, model, optimizer=optimizer.state_dict(), log=log,
                                scaler=scaler.state_dict(), args=vars(args), data_hash=data_hash,
                                val_data_hash=val_hash, best=best, step=step,
                                val_loss=row.get("val_loss"))
                saved_at = step
            if evaluating:
                plot(log, tokens_per_step, plot_path)
                show_sample(model, args)
        if stop or step >= args.max_iters:
            break
        # 2. One more step.
        model.train()
        step_started = time.perf_counter()
        loss, grad_norm = train_step(step, wrapped, train_windows, optimizer, scaler, args)
        step += 1
        loss, signals = sum_over_processes(loss / WORLD_SIZE, len(caught))
        stop = signals > 0
        speed = tokens_per_step / (time.perf_counter() - step_started)
        row = {"iter": step, "tokens": step * tokens_per_step, "loss": loss,
               "lr": get_lr(step - 1, args), "grad_norm": grad_norm, "tokens_per_s": speed}

    if WORLD_SIZE > 1:
        dist.barrier()  # process 0 may still be saving, and a process that leaves early may crash
        dist.destroy_process_group()
    if stop and step < args.max_iters:
        print0(f"stopped and saved at step {step}; go on with --resume --out_dir={args.out_dir}")
        sys.exit(128 + (caught[0] if caught else signal.SIGTERM))  # the status that shells expect
    print0(f"{ckpt_path} has step {step}; --resume --max_iters=N --out_dir={args.out_dir} goes on")
    print0(f"{best_path} has the best val_loss, {best['val_loss']:.4f}, of step {best['step']}")
    print0(f"see {plot_path}; peak memory {peak_memory(device):.1f} GB")
    print0(f"next: python sample.py --checkpoint={ckpt_path} --start {shlex.quote(args.start)}")
