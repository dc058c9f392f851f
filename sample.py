"""Writes text with a trained GPT-2, a token at a time, or scores a text.

    python sample.py --start "Every effort moves you"
    python sample.py --checkpoint=models/gpt2-124M.pt --start FILE:prompt.txt --top_p=0.9
    python sample.py --checkpoint=out/best.pt --score=my.txt
"""
import argparse
import codecs
import math
import os
import sys
import time

import torch
import torch.nn.functional as F

from gpt import (DTYPES, END_OF_TEXT, beam_search, center_logits, choose_device, decode_utf8,
                 encode, generate, get_tokenizer, load_checkpoint, number, require, start_script)

@torch.inference_mode()
def score(model, ids):
    """The mean loss, in nats, of all of ids (n + 1,) int64 but the first. Windows overlap by half,
    so each token after the first window is predicted from at least half a window before it."""
    T = model.config.block_size
    n = len(ids) - 1
    done = 0  # how many tokens are scored
    total = 0.0
    while done < n:
        start = max(0, done - T // 2)
        end = min(start + T, n)
        logits = model(ids[None, start:end])[0, done - start :].float()  # (end - done, V)
        total += F.cross_entropy(logits, ids[done + 1 : end + 1], reduction="sum").item()
        done = end
        print(f"{done:,} of {n:,} tokens", end="\r", file=sys.stderr)
    print(file=sys.stderr)
    return total / n

parser = start_script(__doc__)
flag = parser.add_argument
flag("--start", default="", help="the prompt: text, FILE:path, or - for standard input")
flag("--score", metavar="FILE",
     help="print a text's loss; bits a byte are comparable across tokenizers")
flag("--checkpoint", default="out/ckpt.pt", type=os.path.expanduser, help="whose weights to use")
flag("--num_samples", type=number(int, 1), default=1, help="texts, computed as one batch")
flag("--max_new_tokens", type=number(int, 0), default=200, help="tokens after the prompt")
flag("--temperature", type=number(float, 0), default=0.8, help="low: safer; 0: greedy")
flag("--top_k", type=number(int, 0), default=50, help="only the k likeliest tokens; 0: all")
flag("--top_p", type=number(float, 1e-6, 1), default=1.0, help="the likeliest that reach p; 1: all")
flag("--num_beams", type=number(int, 0), default=0, help="width of beam search; 0: sampling")
flag("--seed", type=number(int, 0, 2**63 - 1), default=1337, help="one seed gives the same texts")
flag("--show", type=number(int, 0), default=0, help="the N likeliest tokens at each place; 0: off")
flag("--stop", action=argparse.BooleanOptionalAction, default=True, help="end at <|endoftext|>")
flag("--device", default="auto", help="cuda, mps or cpu; auto: the first found")
flag("--dtype", default="auto", choices=DTYPES, help="of the weights; auto: the fastest here")
args = parser.parse_args()

sampling = ("temperature", "top_k", "top_p", "seed", "num_samples", "show")
given = [name for name in sampling if getattr(args, name) != parser.get_default(name)]
require(not (args.num_beams and given), f"--num_beams does not go with --{' --'.join(given)}")
require(os.path.exists(args.checkpoint), f"no {args.checkpoint}: run train.py or load_gpt2.py")
source = f"FILE:{args.score}" if "score" in args else args.start
text = source
if source == "-" or source.startswith("FILE:"):
    path = os.path.expanduser(source.removeprefix("FILE:"))
    with open(0 if path == "-" else path, "rb") as file:  # 0 is standard input
        text = decode_utf8(file.read(), path)
    if "score" not in args:  # editors end a file with \n, and a prompt should end in a word
        text = text.removesuffix("\n")
ids = encode(text)

# Training needs float32 weights, because it adds up many small steps. Here 16 bits mostly do.
device, dtype = choose_device(args.device, args.dtype)
model, state = load_checkpoint(args.checkpoint)
center_logits(model)
model.to(device, dtype)
require(all(weight.isfinite().all() for weight in model.parameters()),
        f"{args.checkpoint} has weights that are not finite in {dtype}")
known = f"validation loss {state['val_loss']:.4f}, " if state.get("val_loss") else ""
print(f"{args.checkpoint}: step {state.get('step')}, {known}{device}, {dtype}", file=sys.stderr)

if "score" in args:
    require(len(ids) > 1, f"--score={args.score}: {len(ids)} token(s), and two are needed")
    loss = score(model, torch.tensor(ids, device=device))
    n_bytes = len(text.encode())
    bits = loss * len(ids) / n_bytes / math.log(2)  # the first counts as the mean
    print(f"{args.score}: {len(ids):,} tokens, {n_bytes:,} bytes; loss {loss:.4f} nats a token, "
          f"perplexity {math.exp(min(loss, 700)):.2f}, {bits:.4f} bits a byte")
    sys.exit()

if text[-1:].isspace():  # GPT-2's words bring their own space; after one more, few tokens fit
    print("warning: the prompt ends in white space, and the text may derail", file=sys.stderr)
limit = model.config.block_size
if len(ids) > limit:
    print(f"warning: of the prompt's {len(ids)} tokens, the last {limit} are used", file=sys.stderr)
# In GPT-2's training <|endoftext|> stood before a document, so it replaces an empty prompt.
idx = torch.tensor([ids or [END_OF_TEXT]], device=device).expand(args.num_samples, -1)  # (B, T)
stop_token = END_OF_TEXT if args.stop else None
tokenizer = get_tokenizer()
texts = [[] for _ in range(args.num_samples)]  # the token ids of each text

def show(probs, ids, token):
    """Prints the candidates of the first text. Each argument has one row per text."""
    line = []
    drawn = token[0].item()
    for i, p in zip(ids[0].tolist(), probs[0].tolist()):
        if (len(line) < args.show and p > 0) or i == drawn:
            word = f"{tokenizer.decode([i])!r} {p:.1%}"
            line.append(f"[{word}]" if i == drawn else word)
    if texts[0][-1:] != [stop_token]:  # the text has not ended
        print("", *line, sep="  ", file=sys.stderr)

started = time.perf_counter()
if args.num_beams:
    require(len(ids) + args.max_new_tokens <= limit, f"--num_beams cannot go past {limit} tokens")
    tokens = beam_search(model, idx, args.max_new_tokens, args.num_beams, stop_token)[:, None]
else:
    tokens = generate(model, idx, args.max_new_tokens, temperature=args.temperature,
                      top_k=args.top_k, top_p=args.top_p, stop_token=stop_token,
                      generator=torch.Generator().manual_seed(args.seed),
                      observe=show if args.show else None)

# The first text appears as it is written. The decoder waits for the whole of a character.
decoder = codecs.getincrementaldecoder("utf-8")("replace")
print(text, end="", flush=True)
for column in tokens:  # (B,), one token of each text
    for i, token in enumerate(column.tolist()):
        if texts[i][-1:] != [stop_token]:  # the text has not ended
            texts[i].append(token)
            if i == 0 and token != stop_token:
                piece = tokenizer.decode_single_token_bytes(token)
                print(decoder.decode(piece), end="", flush=True)
print(decoder.decode(b"", final=True))
seconds = time.perf_counter() - started
count = sum(map(len, texts))
for ids in texts[1:]:
    print("-" * 80)
    print(text + tokenizer.decode([token for token in ids if token != stop_token]))
print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)
