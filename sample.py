"""Writes text with a trained GPT-2, a token at a time.

    python sample.py --start "Every effort moves you"
    python sample.py --checkpoint=models/gpt2-124M.pt --start FILE:prompt.txt --top_p=0.9
"""
import argparse
import codecs
import os
import sys
import time

import torch

from gpt import (DTYPES, END_OF_TEXT, InputError, beam_search, check_vocabulary, choose_device,
                 command_line, encode, get_tokenizer, load_checkpoint, number)

parser = command_line(__doc__)
flag = parser.add_argument
flag("--start", default="", help="the prompt: text, FILE:path, or - for standard input")
flag("--checkpoint", default="out/ckpt.pt",
     help="of train.py (out/best.pt, where the validation loss was lowest) or load_gpt2.py")
flag("--num_samples", type=number(int, 1), default=1, help="texts, computed as one batch")
flag("--max_new_tokens", type=number(int, 0), default=200, help="tokens after the prompt")
flag("--temperature", type=float, default=0.8, help="below 1 safer, above 1 wilder, 0 greedy")
flag("--top_k", type=int, default=50, help="only the k likeliest tokens; 0: all")
flag("--top_p", type=float, default=1.0, help="only the likeliest that reach p together; 1: all")
flag("--num_beams", type=number(int, 0), default=0,
     help="beam search of that width, without chance; 0: sampling")
flag("--seed", type=number(int, 0, 2**63), default=1337, help="the same seed gives the same text")
flag("--stop", action=argparse.BooleanOptionalAction, default=True, help="end at <|endoftext|>")
flag("--device", default="auto", help="cuda, mps or cpu; auto: the first that is there")
flag("--dtype", default="auto", choices=DTYPES, help="of weights; auto: what is fast here")
args = parser.parse_args()

if args.num_beams and args.num_samples > 1:
    raise InputError(f"--num_samples={args.num_samples}: beam search gives one text")
if not os.path.exists(args.checkpoint):
    raise InputError(f"--checkpoint={args.checkpoint}: no such file; train one (python train.py) "
                     "or fetch OpenAI's (python load_gpt2.py 124M)")
prompt = args.start
if prompt == "-" or prompt.startswith("FILE:"):
    try:
        path = 0 if prompt == "-" else prompt.removeprefix("FILE:")  # 0 is standard input
        with open(path, encoding="utf-8-sig") as file:
            prompt = file.read()
    except UnicodeDecodeError as error:
        raise InputError(f"--start={args.start}: byte {error.start} is not UTF-8") from error

# Training needs float32 weights, since it adds up many small steps; here bfloat16's are enough.
device, dtype = choose_device(args.device, args.dtype)
model, state = load_checkpoint(args.checkpoint)
check_vocabulary(args.checkpoint, model)
model.to(device, dtype)
lowest = state.get("val_loss", state.get("best_val_loss"))
print(f"{args.checkpoint}: step {state.get('step', 0)}, "
      + (f"lowest validation loss so far {lowest:.4f}, " if lowest else "") + f"{device}, {dtype}",
      file=sys.stderr)

tokenizer = get_tokenizer()
ids = encode(prompt) or [END_OF_TEXT]
block_size = model.config.block_size
if len(ids) > block_size:
    print(f"warning: the prompt has {len(ids)} tokens, of which the last {block_size} are used",
          file=sys.stderr)
idx = torch.tensor([ids[-block_size:]], device=device).expand(args.num_samples, -1)  # (B, T)
stop_token = END_OF_TEXT if args.stop else None

start = time.perf_counter()
if args.num_beams:
    tokens = beam_search(model, idx, args.max_new_tokens, args.num_beams, stop_token)[:, None]
else:
    generator = torch.Generator().manual_seed(args.seed)
    tokens = model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                            stop_token, generator)

# A character may be split over several tokens: the decoder waits until it is whole.
decoder = codecs.getincrementaldecoder("utf-8")("replace")
rows = [[] for _ in range(args.num_samples)]  # of token ids
print(prompt, end="", flush=True)
for token in tokens:  # (B,); the first row appears as it comes, the others whole, after it
    for row, new in zip(rows, token.tolist()):
        if row[-1:] != [stop_token]:  # a row that has ended goes on yielding it
            row.append(new)
            if row is rows[0] and new != stop_token:
                print(decoder.decode(tokenizer.decode_single_token_bytes(new)), end="", flush=True)
print(decoder.decode(b"", final=True))
seconds, count = time.perf_counter() - start, sum(map(len, rows))
for row in rows[1:]:
    print("-" * 80, prompt + tokenizer.decode([t for t in row if t != stop_token]), sep="\n")
print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)
