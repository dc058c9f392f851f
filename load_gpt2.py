"""OpenAI's GPT-2 weights in, without TensorFlow, and a trained model out to other tools.

    python load_gpt2.py 124M                      downloads (also 355M, 774M, 1558M) and converts
    python load_gpt2.py FOLDER                    converts OpenAI's or Hugging Face's files
    python load_gpt2.py --export out/ckpt.pt DIR  writes a folder that transformers opens

The first two write a checkpoint, models/gpt2-124M.pt or models/FOLDER.pt, for sample.py and for
train.py --init_from. The format of OpenAI's files is TensorFlow's, described in its sources
tensorflow/core/lib/io/table_format.txt and tensorflow/core/protobuf/tensor_bundle.proto.
"""
import http.client
import json
import math
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import torch

from gpt import (END_OF_TEXT, GPT, VOCAB_PATH, GPTConfig, InputError, byte_spelling,
                 check_vocabulary, command_line, get_tokenizer, load_checkpoint, one_line,
                 save_checkpoint, what_is)

SIZES = {"124M": "124M", "355M": "355M", "774M": "774M", "1558M": "1558M", "gpt2": "124M",
         "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}
SOURCES = ("https://openaipublic.blob.core.windows.net/gpt-2/models",
           "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2")
FILES = ("hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001")


# ---- One table of names --------------------------------------------------------------------------

def table_of_names(n_layer):
    """[(our name, OpenAI's, whether they store it as [in, out])]; Hugging Face's name is ours.

    OpenAI computes x @ w with w [in, out] and Hugging Face kept that, while nn.Linear holds
    [out, in]: four matrices a layer are transposed. For the square attn.c_proj no shape would tell.
    """
    modules = [f"h.{i}.{name}" for i in range(n_layer) for name in
               ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")]
    names = [("wte.weight", "wte", False), ("wpe.weight", "wpe", False)]
    for module in [*modules, "ln_f"]:
        path = re.sub(r"^h\.", "h", module).replace(".", "/")  # h.3.attn.c_proj -> h3/attn/c_proj
        is_norm = "ln_" in module
        names += [(f"{module}.weight", path + ("/g" if is_norm else "/w"), not is_norm),
                  (f"{module}.bias", path + "/b", False)]
    return names


# ---- OpenAI's files: from bytes to arrays --------------------------------------------------------

def read_varint(data, at):
    """A whole number, 7 bits a byte, lowest first; a set top bit says that more follow.

    -> the number, the position after it
    """
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def read_block(data, offset, size):
    """Yields the (key, value) pairs of one block of the table, both bytes.

    An entry is: how many bytes its key shares with the key before, how many it adds, the value's
    length, the added bytes, the value. Restart points follow, 4 bytes each, and their number.
    """
    if data[offset + size] != 0:  # the byte after a block names its compression
        raise ValueError("a block is compressed, which OpenAI's are not")
    restarts = int.from_bytes(data[offset + size - 4 : offset + size], "little")
    at, end, key = offset, offset + size - 4 * (restarts + 1), b""
    while at < end:
        shared, at = read_varint(data, at)
        added, at = read_varint(data, at)
        length, at = read_varint(data, at)
        key = key[:shared] + data[at : at + added]
        yield key, data[at + added : at + added + length]
        at += added + length


def read_message(data):
    """Yields the (field number, value) pairs of a protocol buffer: values int or bytes.

    A number, field * 8 + type, stands before each value: type 0 is a varint, 1 takes 8 bytes, 5
    takes 4, and 2 begins with its length.
    """
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        if tag & 7 == 0:
            value, at = read_varint(data, at)
        else:
            length, at = read_varint(data, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value, at = data[at : at + length], at + length
        yield tag >> 3, value


def read_index(path):
    """model.ckpt.index -> {variable: (dtype, shape, data file, offset in it, bytes)}.

    Sizes are checked, checksums are not. Raises InputError for anything but such a table.
    """
    data = b""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            data = file.read()
    if data[-8:] != (0xDB4775248B80FB57).to_bytes(8, "little"):
        raise InputError(f"{path} is {what_is(path)}, not the index of a TensorFlow checkpoint: "
                         "get it again")
    try:
        footer, at = data[-48:], 0  # offset and size of a block not used here, and of the index
        for _ in range(2):
            _, at = read_varint(footer, at)
        offset, at = read_varint(footer, at)
        entries = []
        for _, handle in read_block(data, offset, read_varint(footer, at)[0]):
            offset, at = read_varint(handle, 0)
            entries += read_block(data, offset, read_varint(handle, at)[0])
        # Fields of the header: 1 number of shards, 2 endianness; of an entry: 1 dtype (1 is
        # float32, 19 float16), 2 shape (whose field 2, once for each dimension, holds the size in
        # its field 1), 3 shard, 4 offset, 5 size. What is 0 is left out.
        header = dict(read_message(dict(entries)[b""]))
        if header.get(2):
            raise ValueError("it was written by a big-endian machine")
        variables = {}
        for key, value in entries:
            if key == b"":
                continue
            entry = dict(read_message(value))
            shape = tuple(dict(read_message(size)).get(1, 0)
                          for number, size in read_message(entry.get(2, b"")) if number == 2)
            dtype = {1: np.float32, 19: np.float16}.get(entry.get(1))
            shard = f"data-{entry.get(3, 0):05d}-of-{header.get(1, 0):05d}"
            data_path = path.removesuffix("index") + shard
            if dtype and entry.get(5, 0) != math.prod(shape) * np.dtype(dtype).itemsize:
                raise ValueError(f"the size of {key.decode()} does not fit its shape {shape}")
            variables[key.decode()] = dtype, shape, data_path, entry.get(4, 0), entry.get(5, 0)
    except (IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} is damaged ({error}): get it again") from error
    return variables


def read_json(path):
    """A JSON file's content, an object. Raises InputError for anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is {what_is(path)}, not the JSON file: get it again") from error


def read_openai(folder):
    """-> GPTConfig, {our name: tensor as stored}."""
    path = os.path.join(folder, "hparams.json")
    hparams = read_json(path)
    try:
        config = GPTConfig(hparams["n_vocab"], hparams["n_ctx"], hparams["n_layer"],
                           hparams["n_head"], hparams["n_embd"])
    except KeyError as error:
        raise InputError(f"{path} lacks {error}: get the file again") from error
    path = os.path.join(folder, "model.ckpt.index")
    ours = {openai: our for our, openai, _ in table_of_names(config.n_layer)}
    weights = {}
    for name, (dtype, shape, *place) in read_index(path).items():
        name = name.removeprefix("model/")
        if name not in ours and not re.fullmatch(r"h\d+/.*/[gbw]|ln_f/[gbw]|w[tp]e", name):
            continue  # Adam's averages and global_step; a layer too many stays, to be refused
        if dtype is None:
            raise InputError(f"{path}: {name} is neither float32 nor float16")
        shape = shape[1:] if len(shape) == 3 else shape  # w is kept as [1, in, out]
        weights[ours.get(name, name)] = read_array(dtype, shape, *place)
    return config, weights


def read_array(dtype, shape, path, offset, size):
    """One variable as a tensor: little-endian numbers, row by row, from offset on."""
    have = os.path.getsize(path) if os.path.isfile(path) else 0
    if have < offset + size:
        raise InputError(f"{path} is {what_is(path)}: {have} bytes, of {offset + size} or more; "
                         "get it again")
    array = np.fromfile(path, np.dtype(dtype).newbyteorder("<"), size // np.dtype(dtype).itemsize,
                        offset=offset)
    return torch.from_numpy(array.reshape(shape))


# ---- Hugging Face's files ------------------------------------------------------------------------

def read_hugging_face(path):
    """A folder, or one .safetensors file in one -> as read_openai."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = path if os.path.isdir(path) else os.path.dirname(path)
    index = os.path.join(path, "model.safetensors.index.json")
    if not os.path.isdir(path):
        files = [path]
    elif os.path.exists(index):
        names = read_json(index).get("weight_map", {}).values()
        files = [os.path.join(folder, name) for name in sorted(set(names))]
    else:
        files = [os.path.join(folder, "model.safetensors")]
    weights = {}
    for file in files:
        try:
            weights |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is {what_is(file)} ({error}): get it again") from error
    # The output layer is wte again, and older files hold attention's masks.
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()
               if not name.endswith(("lm_head.weight", ".attn.bias", ".attn.masked_bias"))}

    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise InputError(f"{path} is missing: it says how many heads the weights were trained with")
    hf = read_json(path)
    n_embd = hf.get("n_embd", 768)
    for name, allowed in {"model_type": ("gpt2",), "n_inner": (None, 4 * n_embd),
                          "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                          "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,),
                          "scale_attn_by_inverse_layer_idx": (False,),
                          "add_cross_attention": (False,), "tie_word_embeddings": (True,)}.items():
        if hf.get(name, allowed[0]) not in allowed:
            raise InputError(f"{path}: {name} is {hf[name]!r}, which is not GPT-2's "
                             f"{allowed[-1]!r}; these weights would give other numbers here")
    return GPTConfig(hf.get("vocab_size", 50257), hf.get("n_positions", 1024),
                     hf.get("n_layer", 12), hf.get("n_head", 12), n_embd), weights


# ---- In ------------------------------------------------------------------------------------------

def load_gpt2(path):
    """A folder of OpenAI's or Hugging Face's files, or a .safetensors file -> GPT, float32, CPU.

    Memory stays near the weights' own size. Raises InputError, naming the file, for what is
    missing, damaged, of another shape, or not GPT-2.
    """
    if os.path.exists(os.path.join(path, "hparams.json")):
        config, weights = read_openai(path)
    elif os.path.exists(os.path.join(path, "config.json")) or path.endswith(".safetensors"):
        config, weights = read_hugging_face(path)
    else:
        raise InputError(f"{path} is neither one of {', '.join(SIZES)}, nor a folder with OpenAI's "
                         "hparams.json or Hugging Face's config.json, nor a .safetensors file")
    for our, _, transposed in table_of_names(config.n_layer):
        if our in weights:  # one at a time, so that there is never a second copy of all
            weight = weights[our].float()
            weights[our] = (weight.transpose(0, -1) if transposed else weight).contiguous()
    with torch.device("meta"):
        model = GPT(config)
    try:
        model.load_state_dict(weights, assign=True)  # each exactly once, and in its shape
    except RuntimeError as error:
        raise InputError(f"{path}: {one_line(error)}") from error
    return model


def download(size, folder):
    """Fetches OpenAI's files of that size into folder, but for those that are there."""
    os.makedirs(folder, exist_ok=True)
    for name in FILES:
        target, failures = os.path.join(folder, name), []
        if os.path.exists(target):
            continue
        for source in SOURCES:
            try:
                fetch(f"{source}/{size}/{name}", target)
                break
            except (OSError, http.client.HTTPException, InputError) as error:
                failures.append(f"{source}/{size}/{name} ({error})")
        else:
            raise InputError(f"{name} could be fetched neither from {' nor '.join(failures)}; run "
                             f"this again, or put {', '.join(FILES)} into {folder} by hand")


def fetch(url, target):
    """Downloads into target.part, going on where an earlier try stopped, and renames it."""
    part = target + ".part"
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is no more than what we have, so that was wrong: start anew
            os.remove(part)
        raise
    with response:
        length, kind = (response.headers.get(f"Content-{name}") for name in ("Length", "Type"))
        if not length or "html" in (kind or ""):
            raise InputError("the answer is a web page, or without a length")
        if response.status != 206:  # a server that cannot go on sends all
            have = 0
        total, started, had = have + int(length), time.time(), have
        with open(part, "ab" if have else "wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                have += len(chunk)
                speed = (have - had) / (time.time() - started + 1e-9)
                print(f"\r{os.path.basename(target)}: {have / 1e6:,.1f} of {total / 1e6:,.1f} MB, "
                      f"{speed / 1e6:.1f} MB/s, {(total - have) / speed:.0f} s left   ",
                      end="", file=sys.stderr)
    print(file=sys.stderr)
    if have != total:
        raise OSError(f"{have} of {total} bytes came")
    os.replace(part, target)


# ---- Out -----------------------------------------------------------------------------------------

def export(path, folder):
    """Writes the checkpoint at path as a folder that transformers, vLLM or llama.cpp open."""
    from safetensors.torch import save_file

    model, _ = load_checkpoint(path)
    config = model.config
    check_vocabulary(path, model)
    weights, tensors = model.state_dict(), {}
    for our, _, transposed in table_of_names(config.n_layer):
        if our in weights:
            weight = weights.pop(our)
        else:  # bias=False: theirs always has one, of as many numbers as the weight has outputs
            weight = torch.zeros(tensors["transformer." + our.replace("bias", "weight")].shape[-1])
        tensors["transformer." + our] = (weight.T if transposed else weight).contiguous()
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    special = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
              "unk_token": "<|endoftext|>"}
    tokenizer, spelling = get_tokenizer(), byte_spelling()
    vocabulary = {"".join(spelling[b] for b in tokenizer.decode_single_token_bytes(i)): i
                  for i in range(END_OF_TEXT)} | {"<|endoftext|>": END_OF_TEXT}
    for name, content in {
        "config.json": {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
            "vocab_size": config.vocab_size, "n_positions": config.block_size,
            "n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head,
            "resid_pdrop": config.dropout, "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout, "torch_dtype": "float32", **special},
        "generation_config.json": special,
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False,
                                  "model_max_length": config.block_size, **tokens},
        "vocab.json": vocabulary,
    }.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=None if name == "vocab.json" else 2)
    shutil.copyfile(VOCAB_PATH, os.path.join(folder, "merges.txt"))


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("what", help="a size, a folder or a .safetensors file; with --export a "
                        "checkpoint")
    parser.add_argument("folder", nargs="?", help="with --export: where to write")
    parser.add_argument("--export", action="store_true", help="write for other tools")
    parser.add_argument("--out", help="the checkpoint to write (models/gpt2-SIZE.pt, "
                        "models/FOLDER.pt)")
    args = parser.parse_args()
    if args.export != bool(args.folder) or (args.export and args.out):
        parser.error("--export needs a checkpoint and a folder, and anything else one argument, "
                     "which alone may have --out")
    if args.export:
        export(args.what, args.folder)
        print(f"wrote {args.folder}")
        sys.exit()
    path = args.what
    if args.what in SIZES:
        size = SIZES[args.what]
        path, name = os.path.join("models", size), f"gpt2-{size}"
        download(size, path)
    else:
        name = os.path.basename(os.path.abspath(path)).removesuffix(".safetensors")
    out = args.out or os.path.join("models", f"{name}.pt")
    model = load_gpt2(path)
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    save_checkpoint(out, model, step=0)
    print(f"wrote {out}; try: python sample.py --checkpoint={out}")
