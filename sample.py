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

from gpt import (END_OF_TEXT, InputError, beam_search, check_sampling, check_vocabulary,
                 choose_device, command_line, encode, get_tokenizer, load_checkpoint)

parser = command_line(__doc__)
flag = parser.add_argument
flag("--start", default="", help="the prompt: text, FILE:path, or - for standard input")
flag("--checkpoint", default="out/ckpt.pt", help="a file written by train.py or load_gpt2.py")
flag("--num_samples", type=int, default=1, help="texts, computed as one batch")
flag("--max_new_tokens", type=int, default=200, help="tokens after the prompt")
flag("--temperature", type=float, default=0.8, help="below 1 safer, above 1 wilder, 0 greedy")
flag("--top_k", type=int, default=50, help="only the k likeliest tokens; 0: all")
flag("--top_p", type=float, default=1.0, help="only the likeliest that reach p together; 1: all")
flag("--num_beams", type=int, default=0, help="beam search of that width instead of sampling")
flag("--seed", type=int, default=1337, help="the same seed gives the same text")
flag("--stop", action=argparse.BooleanOptionalAction, default=True, help="end at <|endoftext|>")
flag("--device", default="auto", help="auto (the first there is of), cuda, mps, cpu")
flag("--dtype", default="auto", help="auto, bfloat16, float16, float32")
args = parser.parse_args()

check_sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
if args.num_samples < 1 or (args.num_beams and args.num_samples > 1) or args.num_beams < 0:
    raise InputError(f"--num_samples={args.num_samples} --num_beams={args.num_beams}: at least 1 "
                     "sample is needed, and beam search gives exactly 1")
prompt = args.start
if prompt == "-" or prompt.startswith("FILE:"):
    with sys.stdin.buffer if prompt == "-" else open(prompt.removeprefix("FILE:"), "rb") as file:
        data = file.read()
    try:
        prompt = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"--start={args.start}: byte {error.start} is not UTF-8") from error

if not os.path.exists(args.checkpoint):
    raise InputError(f"--checkpoint={args.checkpoint}: no such file; train one (python train.py) "
                     "or fetch OpenAI's (python load_gpt2.py 124M)")
device, dtype = choose_device(args.device, args.dtype)
model, state = load_checkpoint(args.checkpoint)
check_vocabulary(args.checkpoint, model)
model.to(device, dtype).eval()
loss = state.get("val_loss", state.get("best_val_loss"))
print(f"{args.checkpoint}: step {state.get('step', 0)}"
      + (f", validation loss {loss:.4f}" if loss is not None else "") + f"; {device}, {dtype}",
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
    generator = torch.Generator().manual_seed(args.seed % 2**63)
    tokens = model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                            stop_token, generator)

# A character may be split over several tokens: the decoder waits until it is whole.
decoder = codecs.getincrementaldecoder("utf-8")("replace")
rows = [[] for _ in range(args.num_samples)]  # of token ids
print(prompt, end="", flush=True)
for token in tokens:  # (B,); the first row appears as it comes, the others whole, after it
    for row, id in zip(rows, token.tolist()):
        row.append(id)
    if rows[0][-1] != stop_token:
        print(decoder.decode(tokenizer.decode_single_token_bytes(rows[0][-1])), end="", flush=True)
print()
seconds, count = time.perf_counter() - start, sum(map(len, rows))
for row in rows[1:]:
    row = row[: row.index(stop_token)] if stop_token in row else row
    decoder.reset()
    print("-" * 80, prompt + decoder.decode(tokenizer.decode_bytes(row)), sep="\n")
print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)
