"""Converts OpenAI's GPT-2 weights, without TensorFlow, and exports a model to other tools.

    python load_gpt2.py 124M                      downloads (also 355M, 774M, 1558M) and converts
    python load_gpt2.py FOLDER                    converts OpenAI's or Hugging Face's files
    python load_gpt2.py --export out/ckpt.pt DIR  writes a folder for transformers and other tools

The first two write models/gpt2-124M.pt or models/FOLDER.pt, for sample.py and train.py --init_from.
TensorFlow's Saver wrote OpenAI's variables one after the other, sorted by name, without gaps. Their
names and shapes follow from hparams.json, and so does the size: 497,759,232 bytes for 124M.
"""
import glob
import http.client
import json
import os
import re
import shutil
import sys
import urllib.request
from dataclasses import asdict

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpt import (DATA_DIR, GPT, VOCAB_PATH, GPTConfig, explain, load_checkpoint, merges, require,
                 save_checkpoint, start_script, vocabulary, with_weights)

SIZES = ("124M", "355M", "774M", "1558M")
URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
HPARAMS = "hparams.json"
DATA = "model.ckpt.data-00000-of-00001"
EXPORT_DIR = os.path.join(DATA_DIR, "export")  # what is the same in every folder for other tools
# Our names of the sizes: Hugging Face's.
HUGGING_FACE = {"vocab_size": "vocab_size", "block_size": "n_positions", "n_layer": "n_layer",
                "n_head": "n_head", "n_embd": "n_embd"}

def openai_name(name):
    """Our name of a parameter -> OpenAI's: h.3.attn.c_attn.weight -> h3/attn/c_attn/w."""
    path = re.sub(r"^h\.", "h", name).replace(".", "/").replace("/bias", "/b")
    if path.startswith(("wte", "wpe")):
        return path.removesuffix("/weight")
    return path.replace("/weight", "/g" if "ln_" in path else "/w")

def transposed(name, weight):
    """Turns a linear layer's weight, [in, out] at OpenAI and Hugging Face, into ours, [out, in], or
    back. Without it the shapes do not fit, except attn/c_proj's, which is square: forgotten there
    alone, the model runs but writes nonsense."""
    return (weight.T if openai_name(name).endswith("/w") else weight).contiguous()

def read_json(path):
    """The content of a JSON file."""
    with explain(f"{path} is not JSON", OSError, ValueError), open(path, encoding="utf-8") as file:
        return json.load(file)

def config_from(path, **names):
    """A JSON file, and its names for the fields of GPTConfig -> GPTConfig, the file's content."""
    content = read_json(path)
    with explain(f"{path} does not have the sizes of a GPT-2", LookupError, TypeError):
        sizes = {field: content[name] for field, name in names.items()}
    fit = all(type(size) is int and size > 0 for size in sizes.values())
    require(fit and sizes["n_embd"] % sizes["n_head"] == 0, f"{path} has impossible sizes: {sizes}")
    return GPTConfig(**sizes), content

def read_openai(folder):
    """-> GPTConfig, {our name: tensor as stored}."""
    path = os.path.join(folder, HPARAMS)
    config, _ = config_from(path, vocab_size="n_vocab", block_size="n_ctx", n_layer="n_layer",
                            n_head="n_head", n_embd="n_embd")
    with torch.device("meta"):
        shapes = {name: transposed(name, p).shape for name, p in GPT(config).named_parameters()}
    path = os.path.join(folder, DATA)
    total = 4 * sum(shape.numel() for shape in shapes.values())
    have = os.path.getsize(path) if os.path.exists(path) else 0
    require(have == total, f"{path} has {have:,} bytes; a float32 model with the sizes in "
            f"{HPARAMS}, in one file, has {total:,}")
    weights = {}
    with open(path, "rb") as file:
        for name in sorted(shapes, key=openai_name):  # as text: h10 comes before h2
            array = np.fromfile(file, "<f4", shapes[name].numel())
            weights[name] = torch.from_numpy(array).view(shapes[name])
    return config, weights

def require_tokenizer(folder):
    """Refuses a folder whose tokenizer is not GPT-2's. There are others with as many tokens, and a
    model that was trained with one writes nonsense with GPT-2's."""
    for name in ("vocab.json", "tokenizer.json"):  # older tools wrote one, newer ones the other
        path = os.path.join(folder, name)
        if os.path.exists(path):
            found = read_json(path)
            with explain(f"{path} is not GPT-2's tokenizer", LookupError, TypeError, ValueError):
                ids = found["model"]["vocab"] if name == "tokenizer.json" else found
                require(ids == vocabulary(), "it has other tokens")

def read_hugging_face(folder):
    """Returns what read_openai returns."""
    path = os.path.join(folder, "config.json")
    config, content = config_from(path, **HUGGING_FACE)
    for name, allowed in {"model_type": ("gpt2",), "add_cross_attention": (False,),
                          "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                          "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,),
                          "scale_attn_by_inverse_layer_idx": (False,)}.items():
        value = content.get(name, allowed[0])  # what is absent is as in GPT-2
        require(value in allowed, f"{path}: {name} is {value!r}, and GPT-2's is {allowed[0]!r}")
    require_tokenizer(folder)
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "model*.safetensors")))
    require(files, f"{folder}: no model.safetensors; save_pretrained converts pytorch_model.bin")
    weights = {}
    for file in files:
        with explain(f"{file} could not be read: get it again", SafetensorError, OSError):
            weights |= load_file(file)
    # Older files hold the causal masks too.
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()
               if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    head = weights.pop("lm_head.weight", None)
    if head is not None:  # it is wte.weight again, or stands for it
        wte = weights.setdefault("wte.weight", head)
        require(torch.equal(head, wte), f"{folder}: lm_head.weight must equal wte.weight")
    return config, weights

def load_gpt2(folder):
    """A folder of OpenAI's or Hugging Face's files -> GPT, float32, on the CPU. Raises InputError
    for what is missing, misshapen, of another size, or not GPT-2. Wrong numbers go unnoticed."""
    files = os.listdir(folder) if os.path.isdir(folder) else []
    require({HPARAMS, "config.json"} & set(files), f"{folder} is neither a size "
            f"({', '.join(SIZES)}), nor a folder with {HPARAMS} or config.json")
    config, weights = read_openai(folder) if HPARAMS in files else read_hugging_face(folder)
    for name in weights:  # one at a time: there is never a second copy of all
        weights[name] = transposed(name, weights[name].float())
    with explain(f"{folder} does not have the weights of GPT-2", RuntimeError):
        return with_weights(config, weights).eval()

def fetch(url, path):
    """Downloads url to path.part, from where an earlier try stopped, and renames it at the end."""
    with open(path + ".part", "ab") as file:
        have = max(0, file.tell() - 1)  # minus 1: servers refuse a range of no bytes
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
        with urllib.request.urlopen(request, timeout=60) as response:
            if "html" in response.headers.get("Content-Type", ""):
                raise OSError("the answer is a web page")
            if response.status != 206:  # some servers always send all
                have = 0
            total = have + int(response.headers.get("Content-Length", 0))
            file.truncate(have)
            file.seek(have)
            while chunk := response.read(1 << 20):
                file.write(chunk)
                print(f"{path}: {file.tell():,} of {total:,} bytes", end="\r", file=sys.stderr)
        if file.tell() != total:
            raise OSError(f"{file.tell()} of {total} bytes came; {path}.part has them")
    os.replace(path + ".part", path)

def download(size, folder):
    """Fetches OpenAI's files of that size into folder, except those already there."""
    os.makedirs(folder, exist_ok=True)
    for name in (HPARAMS, DATA):
        path = os.path.join(folder, name)
        message = f"{URL}/{size}/{name} failed: try again, or put it into {folder} by hand"
        with explain(message, OSError, http.client.HTTPException):
            if not os.path.exists(path):
                fetch(f"{URL}/{size}/{name}", path)

def export(path, folder):
    """Writes the checkpoint at path as a new folder, which is removed again if that fails. Raises
    InputError for a model that is not GPT-2, since other programs would run it as one."""
    require(not os.path.exists(folder), f"{folder} exists: name a new folder")
    model, _ = load_checkpoint(path, verify=True)
    config = model.config
    tensors = {name: transposed(name, weight) for name, weight in model.state_dict().items()}
    layers = ["ln_f"] + [f"h.{i}.{layer}" for i in range(config.n_layer) for layer in (
        "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")]
    known = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    known |= {"wte.weight", "wpe.weight", "dropout", *HUGGING_FACE}
    differs = sorted(known ^ (tensors.keys() | asdict(config).keys()))  # gpt.py was changed
    require(not differs, f"{path} is not GPT-2: {', '.join(differs)}")
    require(config.vocab_size == 50257, f"{path}: the export knows only GPT-2's tokenizer")

    contents = {name: read_json(os.path.join(EXPORT_DIR, name)) for name in os.listdir(EXPORT_DIR)
                if name.endswith(".json")}
    sizes = {theirs: getattr(config, ours) for ours, theirs in HUGGING_FACE.items()}
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    contents["config.json"] |= sizes | dropouts | {"n_ctx": config.block_size}
    contents["generation_config.json"]["max_length"] = config.block_size
    contents["tokenizer_config.json"]["model_max_length"] = config.block_size
    contents["vocab.json"] = vocabulary()
    contents["tokenizer.json"]["model"] |= {"vocab": contents["vocab.json"], "merges": merges()}
    try:
        with explain(f"{folder} could not be written", SafetensorError, OSError):
            os.makedirs(folder)
            for name, content in contents.items():
                with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                    json.dump(content, file, ensure_ascii=False)
            shutil.copyfile(VOCAB_PATH, os.path.join(folder, "merges.txt"))
            weights = os.path.join(folder, "model.safetensors")
            save_file(tensors, weights, metadata={"format": "pt"})
            shutil.copymode(os.path.join(folder, "config.json"), weights)  # safetensors' is 0600
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise

if __name__ == "__main__":
    parser = start_script(__doc__)
    parser.add_argument("source", nargs="?", help="a size or a folder")
    parser.add_argument("--export", nargs=2, metavar=("CHECKPOINT", "FOLDER"), help="the way back")
    parser.add_argument("--out", help="the checkpoint to write (default: models/NAME.pt)")
    args = parser.parse_args()
    if "export" in args:
        require(len(vars(args)) == 1, "--export takes a checkpoint and a folder alone")
        export(*map(os.path.expanduser, args.export))
        print(f"wrote {args.export[1]}")
        sys.exit()
    require("source" in args, "give a size, a folder, or --export; --help lists the flags")
    folder = os.path.expanduser(args.source)
    name = os.path.basename(os.path.abspath(folder))
    if args.source in SIZES and not os.path.exists(folder):
        folder = os.path.join("models", args.source)
        name = f"gpt2-{args.source}"
    out = os.path.expanduser(vars(args).get("out", os.path.join("models", f"{name}.pt")))
    require(not os.path.exists(out), f"{out} exists: delete it, or name another file with --out")
    if folder == os.path.join("models", args.source):
        download(args.source, folder)
    model = load_gpt2(folder)
    require(model.config.vocab_size == GPTConfig.vocab_size, f"{folder} has another vocabulary")
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    save_checkpoint(out, model, step=0)
    print(f"wrote {out}; try: python sample.py --checkpoint={out}")
