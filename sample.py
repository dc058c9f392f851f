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

from gpt import (DTYPES, END_OF_TEXT, beam_search, choose_device, command_line, decode_utf8,
                 encode, generate, get_tokenizer, load_checkpoint, number, require)

parser = command_line(__doc__)
flag = parser.add_argument
flag("--start", default="", help="the prompt: text, FILE:path, or - for standard input")
flag("--checkpoint", default="out/ckpt.pt", type=os.path.expanduser,
     help="a file that train.py or load_gpt2.py wrote")
flag("--num_samples", type=number(int, 1), default=1, help="texts, computed as one batch")
flag("--max_new_tokens", type=number(int, 0), default=200, help="tokens after the prompt")
flag("--temperature", type=number(float, 0), default=0.8, help="below 1 safer; 0: greedy")
flag("--top_k", type=number(int, 0), default=50, help="only the k likeliest tokens; 0: all")
flag("--top_p", type=number(float, 1e-6, 1), default=1.0,
     help="only the likeliest tokens that reach probability p together; 1: all")
flag("--num_beams", type=number(int, 0), default=0, help="width of beam search; 0: sampling")
flag("--seed", type=number(int, 0, 2**63 - 1), default=1337, help="same seed, same text")
flag("--stop", action=argparse.BooleanOptionalAction, default=True, help="end at <|endoftext|>")
flag("--device", default="auto", help="cuda, mps or cpu; auto: the first that is there")
flag("--dtype", default="auto", choices=DTYPES, help="of the weights; auto: what is fast here")
args = parser.parse_args()

require(args.num_beams == 0 or args.num_samples == 1, "--num_beams gives one text")
require(os.path.exists(args.checkpoint),
        f"{args.checkpoint} is not there: run train.py, or load_gpt2.py 124M, first")
prompt = args.start
if prompt == "-" or prompt.startswith("FILE:"):
    path = 0 if prompt == "-" else os.path.expanduser(prompt.removeprefix("FILE:"))
    with open(path, "rb") as file:  # 0 is standard input
        prompt = decode_utf8(file.read(), f"--start={args.start}").removesuffix("\n")
if prompt[-1:].isspace():  # GPT-2's words bring their own space: few fit after one more
    print("warning: the prompt ends in white space, and the text may derail", file=sys.stderr)

# Training needs float32 weights, because it adds up many small steps. Here bfloat16 is enough.
device, dtype = choose_device(args.device, args.dtype)
model, state = load_checkpoint(args.checkpoint)
require(model.config.vocab_size == END_OF_TEXT + 1,
        f"{args.checkpoint} has {model.config.vocab_size} tokens that are not GPT-2's")
model.to(device, dtype)
require(all(weight.isfinite().all() for weight in model.parameters()),
        f"{args.checkpoint} has weights that are not finite in {dtype}: take another")
loss = f"validation loss {state['val_loss']:.4f}, " if state.get("val_loss") else ""
print(f"{args.checkpoint}: step {state.get('step')}, {loss}{device}, {dtype}", file=sys.stderr)

tokenizer, block_size = get_tokenizer(), model.config.block_size
ids = encode(prompt) or [END_OF_TEXT]
if len(ids) > block_size and not args.num_beams:
    print(f"warning: the prompt has {len(ids)} tokens, of which the last {block_size} are used",
          file=sys.stderr)
idx = torch.tensor([ids], device=device).expand(args.num_samples, -1)  # (B, T)
stop_token = END_OF_TEXT if args.stop else None

start = time.perf_counter()
if args.num_beams:
    tokens = beam_search(model, idx, args.max_new_tokens, args.num_beams, stop_token)[:, None]
else:
    tokens = generate(model, idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                      stop_token, torch.Generator().manual_seed(args.seed))

rows = [[] for _ in range(args.num_samples)]  # the token ids of each text
# A character may be split over several tokens. The decoder waits until it is whole.
decoder = codecs.getincrementaldecoder("utf-8")("replace")
print(prompt, end="", flush=True)
for token in tokens:  # (B,)
    for row, new in zip(rows, token.tolist()):
        if stop_token not in row[-1:]:  # a text that has ended repeats stop_token
            row.append(new)
            if row is rows[0] and new != stop_token:  # the first text appears as it is written
                print(decoder.decode(tokenizer.decode_single_token_bytes(new)), end="", flush=True)
print(decoder.decode(b"", final=True))
seconds, count = time.perf_counter() - start, sum(map(len, rows))
for row in rows[1:]:
    print("-" * 80, prompt + tokenizer.decode([t for t in row if t != stop_token]), sep="\n")
print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)
