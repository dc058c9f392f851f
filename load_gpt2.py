"""Converts OpenAI's GPT-2 weights, without TensorFlow, and exports a model to other tools.

    python load_gpt2.py 124M                          downloads (also 355M, 774M, 1558M)
    python load_gpt2.py openai-community/gpt2-medium  downloads from Hugging Face's hub
    python load_gpt2.py FOLDER                        converts files of either kind
    python load_gpt2.py --export out/ckpt.pt FOLDER   writes a folder for other tools

The first three write a checkpoint, such as models/gpt2-124M.pt, for sample.py and for
train.py --init_from.

OpenAI's weights are in one file that TensorFlow's Saver wrote: float32 numbers, one
variable after the other, sorted by name, without gaps. Names and shapes follow from the
sizes in hparams.json, and so does the size of the file: 497,759,232 bytes for 124M. (The
tests make small files of this kind. The real ones have not been converted yet.)
"""
import http.client
import json
import math
import os
import re
import shutil
import sys
import urllib.request

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpt import (
    DATA_DIR, GPT, GPT2_ANSWER, GPTConfig, InputError, command, encode,
    known_answer, load_checkpoint, merges, raise_unless, reraise_as_input_error, same_answer,
    save_checkpoint, show_progress, start_script, vocabulary, with_weights)

SIZES = ("124M", "355M", "774M", "1558M")
OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
HUB_URL = "https://huggingface.co"
HPARAMS = "hparams.json"
DATA = "model.ckpt.data-00000-of-00001"
WEIGHTS = "model.safetensors"
EXPORT_PATH = os.path.join(DATA_DIR, "export.json")  # what all exported folders share
# {field of GPTConfig: its name in Hugging Face's config.json}
HUGGING_FACE = {"vocab_size": "vocab_size", "block_size": "n_positions", "n_layer": "n_layer",
                "n_head": "n_head", "n_embd": "n_embd"}
# {field of GPTConfig: its name in OpenAI's hparams.json}
OPENAI = HUGGING_FACE | {"vocab_size": "n_vocab", "block_size": "n_ctx"}
SENTENCE = "The old man opened the door, looked out at the rain, and decided to stay at home."


def openai_name(name):
    """Returns OpenAI's name of a parameter: h.3.attn.c_attn.weight -> h3/attn/c_attn/w."""
    path = re.sub(r"^h\.", "h", name).replace(".", "/").replace("/bias", "/b")
    if path.startswith(("wte", "wpe")):
        return path.removesuffix("/weight")
    return path.replace("/weight", "/g" if "ln_" in path else "/w")  # g as in gain


def transposed(name, weight):
    """Returns the weight of a linear layer transposed, and any other parameter as it is.

    OpenAI and Hugging Face store [in, out], and we, as PyTorch does, [out, in].
    A transposition that is forgotten gives an error about a shape, except for
    attn/c_proj. That matrix is square, so if it alone were forgotten, the model would
    load, run, and write nonsense.
    """
    return (weight.T if openai_name(name).endswith("/w") else weight).contiguous()


def read_json(path):
    """Returns the content of a JSON file."""
    with reraise_as_input_error(f"{path} is not JSON", OSError, ValueError):
        with open(path, encoding="utf-8") as file:
            return json.load(file)


def read_config(path, names):
    """Returns the GPTConfig that a JSON file describes, and all of the file's content.

    names says how the file calls each field: {field: name}.
    """
    content = read_json(path)
    with reraise_as_input_error(f"{path} does not have GPT-2's sizes", LookupError, TypeError):
        sizes = {field: content[name] for field, name in names.items()}
    return GPTConfig(**sizes), content


def read_openai(folder):
    """Returns the GPTConfig of OpenAI's files and {our name: tensor as it is stored}."""
    config, _ = read_config(os.path.join(folder, HPARAMS), OPENAI)
    with torch.device("meta"):  # tensors with shapes, but without numbers
        shapes = {name: transposed(name, parameter).shape
                  for name, parameter in GPT(config).named_parameters()}
    path = os.path.join(folder, DATA)
    expected = 4 * sum(shape.numel() for shape in shapes.values())
    found = os.path.getsize(path) if os.path.exists(path) else 0
    raise_unless(found == expected,
                 f"{path} has {found:,} bytes, but the sizes in {HPARAMS} make {expected:,}")
    weights = {}
    with open(path, "rb") as file:
        for name in sorted(shapes, key=openai_name):  # as text, so h10 comes before h2
            numbers = np.fromfile(file, "<f4", shapes[name].numel())  # float32
            weights[name] = torch.from_numpy(numbers).view(shapes[name])
    return config, weights


def check_tokenizer(folder, vocab_size):
    """Raises InputError if the folder has a tokenizer that is not GPT-2's.

    A model that was trained with another one writes nonsense with ours.
    """
    for name in ("vocab.json", "tokenizer.json"):  # older tools wrote one, newer ones the other
        path = os.path.join(folder, name)
        if os.path.exists(path):
            ids = read_json(path)
            with reraise_as_input_error(f"{path} is not GPT-2's tokenizer", Exception):
                ids = ids["model"]["vocab"] if name == "tokenizer.json" else ids
                raise_unless(ids == vocabulary(vocab_size), "it has other tokens")


def weight_files(folder):
    """Returns the names of the weight files that transformers would read.

    This is model.safetensors if it is there, and otherwise the parts that the index
    file lists. A folder may hold other weights too, such as a backup.
    """
    index = os.path.join(folder, WEIGHTS + ".index.json")
    if (os.path.exists(os.path.join(folder, WEIGHTS))
            or not os.path.exists(index)):
        return [WEIGHTS]
    with reraise_as_input_error(f"{index} has no weight_map", LookupError, TypeError):
        return sorted(set(read_json(index)["weight_map"].values()))


def read_hugging_face(folder):
    """Returns the GPTConfig of Hugging Face's files and {our name: tensor as it is stored}."""
    path = os.path.join(folder, "config.json")
    config, content = read_config(path, HUGGING_FACE)
    for name, allowed in {"model_type": ("gpt2",),
                          "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                          "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,),
                          "scale_attn_by_inverse_layer_idx": (False,)}.items():
        value = content.get(name, allowed[0])  # what is not said is as in GPT-2
        raise_unless(value in allowed, f"{path}: {name} is {value!r}; GPT-2 has {allowed[0]!r}")
    check_tokenizer(folder, config.vocab_size)
    weights = {}
    for name in weight_files(folder):
        file = os.path.join(folder, name)
        raise_unless(os.path.exists(file),
                     f"{file} is missing; save_pretrained makes it from pytorch_model.bin")
        with reraise_as_input_error(f"{file} is damaged: get it again", SafetensorError, OSError):
            weights |= load_file(file)
    # Older files hold the causal masks too.
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()
               if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    head = weights.pop("lm_head.weight", None)  # the output layer, which in GPT-2 is wte
    if head is not None:
        wte = weights.setdefault("wte.weight", head)
        raise_unless(torch.equal(head, wte), f"{folder}: lm_head.weight must equal wte.weight")
    return config, weights


def load_gpt2(folder):
    """Returns a GPT, float32 on the CPU, from a folder of OpenAI's or Hugging Face's files.

    Raises InputError for what is missing, misshapen, of another size, or not GPT-2.
    It cannot see whether the numbers are right.
    """
    if os.path.exists(os.path.join(folder, HPARAMS)):
        config, weights = read_openai(folder)
    elif os.path.exists(os.path.join(folder, "config.json")):
        config, weights = read_hugging_face(folder)
    else:
        raise InputError(f"{folder} is neither a size ({', '.join(SIZES)}), nor OWNER/NAME, nor a "
                         "folder of weights")
    raise_unless(257 <= config.vocab_size <= 50257,
                 f"{folder}: {config.vocab_size} tokens are not GPT-2's vocabulary")
    for name in weights:  # one at a time, so there is never a second copy of all
        weights[name] = transposed(name, weights[name].float())
    with reraise_as_input_error(f"{folder} does not have the weights of GPT-2", RuntimeError):
        return with_weights(config, weights).eval()


def fetch(url, path):
    """Downloads url to path.part, from where an earlier try stopped, and then renames it."""
    part = path + ".part"
    with open(part, "ab") as file:
        # Ask for the last byte once more. If the file is complete already, a server
        # would answer a request for nothing with an error.
        done = max(0, file.tell() - 1)
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"})
        with urllib.request.urlopen(request, timeout=60) as response:
            if "html" in response.headers.get("Content-Type", ""):
                raise OSError("the answer is a web page")
            if response.status != 206:  # not the rest of the file, but all of it
                done = 0
            total = done + int(response.headers["Content-Length"])
            file.truncate(done)
            file.seek(done)
            while chunk := response.read(1 << 20):
                file.write(chunk)
                show_progress(f"{path}: {file.tell():,} of {total:,} bytes")
        if file.tell() != total:
            raise OSError(f"{file.tell()} of {total} bytes came; {part} has them")
    os.replace(part, path)


def download(url, names, folder):
    """Fetches the files url/name into folder, except those that are already there."""
    os.makedirs(folder, exist_ok=True)
    for name in names:
        path = os.path.join(folder, name)
        message = (f"{url}/{name} failed: try again, if need be without {path}.part, or put it "
                   f"into {folder} by hand")
        with reraise_as_input_error(message, OSError, http.client.HTTPException):
            if not os.path.exists(path):
                fetch(f"{url}/{name}", path)


def export(path, folder):
    """Writes the checkpoint at path as a new folder, in Hugging Face's format.

    If that fails, the folder is removed again. Raises InputError for a model that is
    not GPT-2, since other programs would run it as one.
    """
    with reraise_as_input_error(f"{folder} cannot be made: name a new folder", OSError):
        os.makedirs(folder)
    try:
        model, state = load_checkpoint(path, verify=True)
        config = model.config
        for answer in (state["known_answer"], known_answer(config)):
            raise_unless(same_answer(answer, GPT2_ANSWER),
                         f"{path} does not compute what GPT-2 does; others would run it as GPT-2")
        end_of_text = config.vocab_size - 1
        contents = read_json(EXPORT_PATH)  # {file name: its content}
        ids = dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_text)
        sizes = {theirs: getattr(config, ours) for ours, theirs in HUGGING_FACE.items()}
        contents["config.json"] |= sizes | ids | {"n_ctx": config.block_size}
        contents["generation_config.json"] |= ids | {
            "pad_token_id": end_of_text, "max_length": config.block_size}
        contents["tokenizer_config.json"]["model_max_length"] = config.block_size
        contents["vocab.json"] = vocabulary(config.vocab_size)
        contents["tokenizer.json"]["added_tokens"][0]["id"] = end_of_text
        contents["tokenizer.json"]["model"] |= {
            "vocab": contents["vocab.json"], "merges": merges(config.vocab_size)}
        tensors = {name: transposed(name, weight)
                   for name, weight in model.state_dict().items()}
        with reraise_as_input_error(f"{folder} could not be written", SafetensorError, OSError):
            files = {name: json.dumps(content, ensure_ascii=False)
                     for name, content in contents.items()}
            files["merges.txt"] = "\n".join(["#version: 0.2", *merges(config.vocab_size), ""])
            for name, text in files.items():
                with open(os.path.join(folder, name), "w", encoding="utf-8",
                          newline="\n") as file:
                    file.write(text)
            save_file(tensors, os.path.join(folder, WEIGHTS), metadata={"format": "pt"})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


if __name__ == "__main__":
    parser = start_script(__doc__)
    parser.add_argument("source", nargs="?", help="a size, a name on the hub, or a folder")
    parser.add_argument("--export", nargs=2, metavar=("CHECKPOINT", "FOLDER"),
                        help="write a checkpoint as a folder for other tools")
    parser.add_argument("--out", type=os.path.expanduser,
                        help="the checkpoint to write (default: models/NAME.pt)")
    args = parser.parse_args()
    raise_unless(bool(args.source) != bool(args.export),
                 "give a size, a name or a folder, or --export with a checkpoint and a folder")
    if args.export:
        export(*map(os.path.expanduser, args.export))
        print(f"wrote {args.export[1]}")
        sys.exit()
    # folder is where the files are or will be, and name is that of the checkpoint.
    folder = os.path.expanduser(args.source)
    name = os.path.basename(os.path.abspath(folder))
    url = ""  # from where to download, if the folder is not there
    is_new = not os.path.exists(folder)
    if is_new and folder in SIZES:
        url, names, name = f"{OPENAI_URL}/{name}", (HPARAMS, DATA), f"gpt2-{name}"
    elif is_new and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", folder):
        url, names = f"{HUB_URL}/{folder}/resolve/main", ("config.json", "vocab.json", WEIGHTS)
    out = args.out or os.path.join("models", f"{name}.pt")
    raise_unless(not os.path.exists(out), f"{out} exists: delete it, or name another --out")
    if url:
        folder = os.path.join("models", folder)
        download(url, names, folder)
    model = load_gpt2(folder)
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    # The weights are GPT-2's, whatever a fork computes with them.
    save_checkpoint(out, model, step=0, known_answer=GPT2_ANSWER)
    # Weights in a wrong order would fit, but would not know English.
    V = model.config.vocab_size
    ids = torch.tensor([encode(SENTENCE, V)[: model.config.block_size + 1]])
    loss = model(ids[:, :-1], ids[:, 1:]).item()
    print(f"an English sentence costs {loss:.1f} nats a token; a blind guess {math.log(V):.1f}")
    print(f"wrote {out}; try: " + command("sample.py", f"--checkpoint={out}"))
