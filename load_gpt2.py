"""OpenAI's GPT-2 weights in, without TensorFlow, and a trained model out to other tools.

    python load_gpt2.py 124M                      downloads (also 355M, 774M, 1558M) and converts
    python load_gpt2.py FOLDER                    converts OpenAI's or Hugging Face's files
    python load_gpt2.py --export out/ckpt.pt DIR  writes a folder for transformers and other tools

The first two write models/gpt2-124M.pt or models/FOLDER.pt, for sample.py and train.py --init_from.

TensorFlow's Saver writes the variables into the data file one after the other, sorted by name,
without gaps. Names and shapes follow from hparams.json, so the index file beside it is not needed.
The size of the data file shows whether it was written so.
"""
import argparse
import glob
import http.client
import json
import math
import os
import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.request

import numpy as np
import torch

from gpt import (END_OF_TEXT, GPT, SPELLING, VOCAB_PATH, GPTConfig, InputError, command_line,
                 explain, get_tokenizer, load_checkpoint, require, save_checkpoint)

SIZES = {"124M": "124M", "355M": "355M", "774M": "774M", "1558M": "1558M", "gpt2": "124M",
         "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}
SOURCES = ("https://openaipublic.blob.core.windows.net/gpt-2/models",
           "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2")
HPARAMS, DATA = "hparams.json", "model.ckpt.data-00000-of-00001"

# ---- In ------------------------------------------------------------------------------------------
def openai_name(name):
    """Our name of a parameter -> OpenAI's: h.3.attn.c_attn.weight -> h3/attn/c_attn/w.

    OpenAI and Hugging Face hold w as [in, out], and nn.Linear as [out, in], so what ends in /w is
    transposed on the way in and out. Where that is forgotten the shapes do not fit, but attn/c_proj
    is square: forgotten there alone, the model runs, but writes nonsense.
    """
    path = re.sub(r"^h\.", "h", name).replace(".", "/").replace("/bias", "/b")
    if path.startswith(("wte", "wpe")):
        return path.removesuffix("/weight")
    return path.replace("/weight", "/g" if "ln_" in path else "/w")

def read_config(path, names, defaults):
    """A JSON file, its names for GPTConfig's first five fields -> GPTConfig, the whole content."""
    with explain(f"{path} is missing or not a JSON object", OSError, ValueError, TypeError):
        with open(path, encoding="utf-8") as file:
            content = defaults | json.load(file)
    sizes = [content.get(name) for name in names]
    for name, size in zip(names, sizes):
        require(isinstance(size, int) and size > 0, f"{path}: {name} is {size}, and not 1 or more")
    *_, n_head, n_embd = sizes
    require(n_embd % n_head == 0, f"{path}: n_embd is {n_embd}, no multiple of n_head, {n_head}")
    return GPTConfig(*sizes), content

def read_openai(folder):
    """-> GPTConfig, {our name: tensor as stored}."""
    config, _ = read_config(os.path.join(folder, HPARAMS),
                            ("n_vocab", "n_ctx", "n_layer", "n_head", "n_embd"), {})
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(config).named_parameters()}
    path, total = os.path.join(folder, DATA), 4 * sum(map(math.prod, shapes.values()))
    have = os.path.getsize(path) if os.path.exists(path) else 0
    require(have == total, f"{path} has {have:,} bytes; the float32 variables of a model as in "
            f"{HPARAMS}, all in one file and without others, have {total:,}")
    weights = {}
    with open(path, "rb") as file:
        for name in sorted(shapes, key=openai_name):  # as text: h10 comes before h2
            shape = shapes[name][::-1] if openai_name(name).endswith("/w") else shapes[name]
            array = np.fromfile(file, "<f4", math.prod(shape)).reshape(shape)
            weights[name] = torch.from_numpy(array)
    return config, weights

def read_hugging_face(path):
    """path, a folder or a .safetensors file in one -> what read_openai returns."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder, files = os.path.dirname(path), [path]
    if os.path.isdir(path):
        folder = path
        files = sorted(glob.glob(os.path.join(glob.escape(path), "model*.safetensors")))
    require(files, f"{path} has no model.safetensors; transformers makes one of pytorch_model.bin: "
            "GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(NEW)")
    weights = {}
    for file in files:
        with explain(f"{file} could not be read: get it again", SafetensorError, OSError):
            weights |= load_file(file)
    # Older files hold attention's masks too.
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()
               if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    head = weights.pop("lm_head.weight", None)
    if head is not None:  # wte.weight again, or, in some files, instead of it
        wte = weights.setdefault("wte.weight", head)
        require(torch.equal(head, wte), f"{path}: lm_head.weight is not wte.weight, as in GPT-2")

    path = os.path.join(folder, "config.json")
    config, content = read_config(
        path, ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"),
        {"n_positions": 1024, **vars(GPTConfig())})  # what transformers takes for what is left out
    for name, allowed in {"activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                          "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,),
                          "scale_attn_by_inverse_layer_idx": (False,)}.items():
        value = content.get(name, allowed[0])
        require(value in allowed, f"{path}: {name} is {value!r}, and GPT-2's is {allowed[-1]!r}")
    return config, weights

def load_gpt2(path):
    """A folder of OpenAI's or Hugging Face's files, or a .safetensors file -> GPT, float32, CPU.
    Raises InputError, naming the file, for what is missing, damaged, misshapen, or not GPT-2."""
    if os.path.exists(os.path.join(path, HPARAMS)):
        config, weights = read_openai(path)
    elif os.path.exists(os.path.join(path, "config.json")) or path.endswith(".safetensors"):
        config, weights = read_hugging_face(path)
    else:
        raise InputError(f"{path} is neither a size ({', '.join(SIZES)}), nor a folder with "
                         f"{HPARAMS} or config.json, nor a .safetensors file")
    for name, weight in weights.items():  # one at a time: there is never a second copy of all
        weight = weight.float()
        weights[name] = (weight.T if openai_name(name).endswith("/w") else weight).contiguous()
    with torch.device("meta"):
        model = GPT(config)
    with explain(path, RuntimeError):
        model.load_state_dict(weights, assign=True)  # each exactly once, and in its shape
    return model.eval()

def download(size, folder):
    """Fetches OpenAI's files of that size into folder, but for those that are there."""
    os.makedirs(folder, exist_ok=True)
    for name in (HPARAMS, DATA):
        target, failures = os.path.join(folder, name), []
        for url in [f"{source}/{size}/{name}" for source in SOURCES]:
            if not os.path.exists(target):
                try:
                    fetch(url, target)
                except (OSError, http.client.HTTPException) as error:
                    failures.append(f"{url} ({error})")
        require(os.path.exists(target), f"{name} came neither from {' nor from '.join(failures)}; "
                f"try again, or put {HPARAMS} and {DATA} into {folder} by hand")

def fetch(url, target):
    """Downloads into target.part, from where an earlier try stopped, and renames it at the end."""
    part = target + ".part"
    have = max(0, os.path.getsize(part) - 1) if os.path.exists(part) else 0  # never all
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # part is longer than the file, so it is not a part of it
            os.remove(part)
        raise
    with response:
        length = response.headers.get("Content-Length")
        if not length or "html" in response.headers.get("Content-Type", ""):
            raise OSError("the answer is a web page or has no length")
        if response.status != 206:  # a server that cannot go on sends all
            have = 0
        total = have + int(length)
        with open(part, "ab") as file:
            file.truncate(have)
            while chunk := response.read(1 << 20):
                file.write(chunk)
                have += len(chunk)
                print(f"{target}: {have / 1e6:,.1f} of {total / 1e6:,.1f} MB", end="\r",
                      file=sys.stderr)
    print(file=sys.stderr)
    if have != total:
        raise OSError(f"{have} of {total} bytes came")
    os.replace(part, target)

# ---- Out -----------------------------------------------------------------------------------------
def export(path, folder):
    """Writes the checkpoint at path as a folder, whole or not at all, for transformers 5.24.0,
    tokenizers 0.23.3, CTranslate2 4.8.5, mlx-lm 0.32.2, llama.cpp and transformers.js 4.3.1."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    model, _ = load_checkpoint(path, verify=True)
    config, tensors = model.config, {}
    for name, weight in model.state_dict().items():
        tensors[name] = (weight.T if openai_name(name).endswith("/w") else weight).contiguous()
        if not config.bias and name.endswith(".weight") and "wte" not in name and "wpe" not in name:
            tensors[name.replace("weight", "bias")] = torch.zeros(len(weight))  # theirs has biases
    contents = {}  # data/export has what is the same for every model
    for template in glob.glob(os.path.join(os.path.dirname(VOCAB_PATH), "export", "*.json")):
        with open(template, encoding="utf-8") as file:
            contents[os.path.basename(template)] = json.load(file)
    T, p = config.block_size, config.dropout
    contents["config.json"] |= {
        "vocab_size": config.vocab_size, "n_positions": T, "n_ctx": T, "n_embd": config.n_embd,
        "n_layer": config.n_layer, "n_head": config.n_head, "resid_pdrop": p, "embd_pdrop": p,
        "attn_pdrop": p}
    contents["generation_config.json"]["max_length"] = T
    contents["tokenizer_config.json"]["model_max_length"] = T
    contents["vocab.json"] = {"<|endoftext|>": END_OF_TEXT}
    for i in range(END_OF_TEXT):
        token = get_tokenizer().decode_single_token_bytes(i)
        contents["vocab.json"]["".join(SPELLING[byte] for byte in token)] = i
    with open(VOCAB_PATH, encoding="utf-8") as file:
        merges = file.read().splitlines()[1:]
    contents["tokenizer.json"]["model"] |= {"vocab": contents["vocab.json"], "merges": merges}
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    explained = explain(f"{folder} could not be written", SafetensorError, OSError)
    with explained, tempfile.TemporaryDirectory(dir=parent) as scratch:
        for name, content in contents.items():
            with open(os.path.join(scratch, name), "w", encoding="utf-8") as file:
                json.dump(content, file, ensure_ascii=False)
        shutil.copyfile(VOCAB_PATH, os.path.join(scratch, "merges.txt"))
        weights = os.path.join(scratch, "model.safetensors")
        save_file(tensors, weights, metadata={"format": "pt"})
        shutil.copymode(os.path.join(scratch, "config.json"), weights)  # save_file: owner only
        os.makedirs(folder)  # a new one: nobody's files are replaced
        for name in os.listdir(scratch):
            os.replace(os.path.join(scratch, name), os.path.join(folder, name))

if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.formatter_class = argparse.HelpFormatter  # no defaults to show
    parser.add_argument("source", nargs="?", help="a size, a folder or a .safetensors file")
    parser.add_argument("--export", nargs=2, metavar=("CHECKPOINT", "FOLDER"), help="the way back")
    parser.add_argument("--out", type=os.path.expanduser,
                        help="the checkpoint to write (default: models/NAME.pt)")
    args = parser.parse_args()
    if bool(args.source) == bool(args.export) or (args.export and args.out):
        parser.error("either a source, perhaps with --out, or --export is needed")
    if args.export:
        export(*map(os.path.expanduser, args.export))
        print(f"wrote {args.export[1]}")
        sys.exit()
    path = os.path.expanduser(args.source)
    name = os.path.basename(os.path.abspath(path)).removesuffix(".safetensors")
    if path in SIZES and not os.path.exists(path):
        size = SIZES[path]
        name, path = f"gpt2-{size}", os.path.join("models", size)
        download(size, path)
    out, source = args.out or os.path.join("models", f"{name}.pt"), os.path.abspath(path)
    require(not os.path.exists(out) or load_checkpoint(out)[1].get("source") == source,
            f"{out} exists and was not made from {path}; --out names another file")
    model = load_gpt2(path)
    require(model.config.vocab_size == END_OF_TEXT + 1,
            f"{path} has {model.config.vocab_size} tokens that are not GPT-2's")
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    save_checkpoint(out, model, step=0, source=source)
    print(f"wrote {out}; try: python sample.py --checkpoint={out}")
