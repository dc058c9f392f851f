"""Writes text with a trained GPT-2, one token at a time, or scores a text.

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

from gpt import (
    DTYPES, beam_search, center_logits, choose_device, decode_utf8, encode, generate,
    get_tokenizer, load_checkpoint, number, raise_unless, read_text, score, show_progress,
    start_script, token_bytes)

# ---- Settings ------------------------------------------------------------------------

parser = start_script(__doc__)
flag = parser.add_argument
flag("--start", default="", help="the prompt: text, FILE:path, or - for standard input")
flag("--score", metavar="FILE", help="print what the tokens of this text cost, and stop")
flag("--checkpoint", default="out/ckpt.pt", type=os.path.expanduser,
     help="the weights to use; for a folder, its ckpt.pt (default: %(default)s)")
flag("--num_samples", type=number(int, 1), default=1,
     help="how many texts to write, computed as one batch (default: %(default)s)")
flag("--max_new_tokens", type=number(int, 0), default=200,
     help="tokens after the prompt (default: %(default)s)")
flag("--temperature", type=number(float, 0), default=0.8,
     help="lower is safer, 0 takes the likeliest token (default: %(default)s)")
flag("--top_k", type=number(int, 0), default=50,
     help="draw from the k likeliest tokens, 0: from all (default: %(default)s)")
flag("--top_p", type=number(float, 1e-6, 1), default=1.0,
     help="draw from the likeliest tokens that have this probability together "
          "(default: %(default)s)")
flag("--num_beams", type=number(int, 0), default=0,
     help="search for a likely text with N beams; temperature etc. have no effect")
flag("--seed", type=number(int, 0, 2**63 - 1), default=1337,
     help="on one machine, the same seed gives the same texts (default: %(default)s)")
flag("--show", type=number(int, 0), default=0,
     help="print the N likeliest tokens, with the model's own probabilities (before "
          "temperature, top_k and top_p), the drawn one in brackets (default: 0)")
flag("--stop", action=argparse.BooleanOptionalAction, default=True,
     help="end a text at <|endoftext|>")
flag("--device", default="auto",
     help="cuda, mps or cpu (default: the first that is found)")
flag("--dtype", choices=DTYPES,
     help="of the weights; auto: bfloat16 or float16 where those are fast; --score: float32")
args = parser.parse_args()
raise_unless(not args.num_beams or (args.num_samples == 1 and not args.show),
             "--num_beams excludes --num_samples and --show")

# ---- The model and the text ----------------------------------------------------------

path = args.checkpoint
if os.path.isdir(path):
    path = os.path.join(path, "ckpt.pt")
model, state = load_checkpoint(path)
device, dtype = choose_device(args.device, args.dtype or ("float32" if args.score else "auto"))
model.float()  # a file may hold 16 bits, but center_logits computes in 32
if dtype != torch.float32:
    center_logits(model)
model.to(device)
# Only parameters become 16 bits. GPT-2 has no buffers, but a fork may have one, such as a
# table of angles for its positions, which would lose too much.
for parameter in model.parameters():
    parameter.data = parameter.data.to(dtype)
print(f"{path}: step {state.get('step')}, {device}, {dtype}", file=sys.stderr)

if args.score:
    text = "".join(read_text(os.path.expanduser(args.score)))
elif args.start == "-":
    text = decode_utf8(sys.stdin.buffer.read(), "standard input").removesuffix("\n")
elif args.start.startswith("FILE:"):
    # An editor ends a file with a line end, but a prompt should end with a word.
    path = os.path.expanduser(args.start.removeprefix("FILE:"))
    text = "".join(read_text(path)).removesuffix("\n")
else:
    text = args.start
V = model.config.vocab_size
tokenizer = get_tokenizer(V)
ids = encode(text, V)

# ---- The score of a text -------------------------------------------------------------

if args.score:
    raise_unless(len(ids) > 1, f"{args.score}: {len(ids)} token(s), but scoring needs two")
    losses = []
    for part in score(model, torch.tensor(ids, device=device)):
        losses += part.tolist()
        show_progress(f"{len(losses):,} of {len(ids) - 1:,} tokens")
    # The first token is not predicted. <|endoftext|> is predicted, but is no text.
    bytes_of = token_bytes(V)
    n_bytes = sum(bytes_of[i] for i in ids[1:])
    loss = sum(losses) / len(losses)
    print(f"{args.score}: {len(losses):,} tokens, {n_bytes:,} bytes, {dtype}; loss {loss:.4f} "
          f"nats a token, perplexity {math.exp(min(loss, 700)):.2f}, "
          f"{sum(losses) / math.log(2) / max(1, n_bytes):.4f} bits a byte")
    sys.exit()

# ---- Writing -------------------------------------------------------------------------

if text[-1:].isspace():
    print("warning: the prompt ends in white space, but most next tokens bring their own",
          file=sys.stderr)
limit = model.config.block_size
if len(ids) > limit:
    print(f"warning: the prompt has {len(ids)} tokens, and the model reads the last {limit}; "
          f"after the first new token it keeps {limit // 2}", file=sys.stderr)
# In GPT-2's training <|endoftext|>, the last id, stood between the documents, and what
# follows it is the beginning of one. So it is the empty prompt.
idx = torch.tensor([ids or [V - 1]], device=device)  # (1, T)
idx = idx.expand(args.num_samples, -1)  # (B, T)
stop_token = V - 1 if args.stop else None
texts = [[] for _ in range(args.num_samples)]  # the token ids of each text


def show(probs, ids, token):
    """Prints the likeliest tokens of the first text, and in brackets the one that is drawn.

    generate calls it with one row for each text: probs and ids (B, V), token (B,).
    """
    if texts[0][-1:] == [stop_token]:
        return  # the first text has ended, and others have not
    words = []
    drawn = token[0].item()
    for i, p in zip(ids[0].tolist(), probs[0].tolist()):  # the likeliest first
        if i == drawn:
            words.append(f"[{tokenizer.decode([i])!r} {p:.1%}]")
        elif len(words) < args.show:
            words.append(f"{tokenizer.decode([i])!r} {p:.1%}")
    print("", *words, sep="  ", file=sys.stderr)


started = time.perf_counter()
if args.num_beams:
    raise_unless(len(ids) + args.max_new_tokens <= limit,
                 f"--num_beams: prompt and new tokens together exceed the model's {limit}")
    # beam_search returns (n,). As (n, 1) it is what generate yields: n columns of 1 text.
    columns = beam_search(
        model, idx, args.max_new_tokens, args.num_beams, stop_token)[:, None]
else:
    columns = generate(model, idx, args.max_new_tokens, temperature=args.temperature,
                       top_k=args.top_k, top_p=args.top_p, stop_token=stop_token,
                       generator=torch.Generator().manual_seed(args.seed),
                       observe=show if args.show else None)

# The first text appears while it is written. A token may be a part of a character, so
# the decoder holds bytes back until the character is whole.
decoder = codecs.getincrementaldecoder("utf-8")("replace")
print(text, end="", flush=True)
for column in columns:  # (B,), the next token of each text
    for i, token in enumerate(column.tolist()):
        if texts[i][-1:] != [stop_token]:
            texts[i].append(token)
            if i == 0 and token != stop_token:
                piece = tokenizer.decode_single_token_bytes(token)
                print(decoder.decode(piece), end="", flush=True)
print(decoder.decode(b"", final=True))
seconds = time.perf_counter() - started
n_tokens = sum(map(len, texts))
for ids in texts[1:]:
    print("-" * 80)
    print(text + tokenizer.decode([token for token in ids if token != stop_token]))
print(f"{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.1f} tokens/s",
      file=sys.stderr)
