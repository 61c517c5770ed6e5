"""Model folders with the names and fields of files on the hub, made from what transformers saves today."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Format = Literal["safetensors", "pickled", "legacy"]


@dataclass(frozen=True)
class Spelling:
    """The way in which a folder is written. Sizes of files are in tensors."""

    weights: Format = "pickled"
    dtype: torch.dtype = torch.float16
    old_config: bool = True
    prefix: str | None = None  # prefix of all tensor names but the head's; None: as transformers saves them
    shards: int = 1
    extras: bool = False  # with tensors that are not loaded any more: masks, frequencies
    tied_head: bool = False  # a tied head is in the file, too
    eos: tuple[int, ...] = (2,)


def respell(source: Path, target: Path, spelling: Spelling) -> Path:
    """Write the checkpoint that transformers saved in `source` into `target`, with another spelling."""
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    tensors = {name: tensor.to(spelling.dtype) for name, tensor in _load(source).items()}
    base = next(name.removesuffix(end) for name in tensors for end in _EMBEDDINGS if name.endswith(end))
    if spelling.tied_head and config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = next(t for n, t in tensors.items() if n.removeprefix(base) in _EMBEDDINGS)
    if spelling.extras:
        tensors |= _extras(config, tensors, base)
    if spelling.prefix is not None:
        tensors = {_renamed(name, base, spelling.prefix): tensor for name, tensor in tensors.items()}
    dtype = str(spelling.dtype).removeprefix("torch.")
    written = _old_config(config, dtype) if spelling.old_config else {**config, "dtype": dtype}
    (target / "config.json").write_text(json.dumps(written))
    generation = {"bos_token_id": 1, "eos_token_id": list(spelling.eos), "transformers_version": "4.30.0"}
    (target / "generation_config.json").write_text(json.dumps(generation))
    _write(tensors, target, spelling)
    return target


def rounded(source: Path, target: Path, dtype: torch.dtype) -> Path:
    """Write the checkpoint in float32 with weights rounded to `dtype`, which is what the respelled files mean."""
    target.mkdir(parents=True)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {name: tensor.to(dtype).float() for name, tensor in _load(source).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


def _load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _renamed(name: str, base: str, prefix: str) -> str:
    return prefix + name.removeprefix(base) if name.startswith(base) else name


def _extras(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: str) -> dict[str, Tensor]:
    """Return buffers that older versions of transformers saved with every layer's attention."""
    attention = {"gpt2": "h.{}.attn", "gpt_neox": "layers.{}.attention"}.get(
        config["model_type"], "layers.{}.self_attn"
    )
    found: dict[str, Tensor] = {}
    for i in range(config.get("num_hidden_layers") or config["n_layer"]):
        where = base + attention.format(i)
        found[f"{where}.rotary_emb.inv_freq"] = torch.ones(4)
        found[f"{where}.masked_bias"] = torch.tensor(-1e9)
        mask = torch.ones(16, 16, dtype=torch.uint8).tril().view(1, 1, 16, 16)
        if f"{where}.bias" not in tensors:
            found[f"{where}.bias"] = mask
    return found


def _old_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return config.json as transformers before 5 wrote it: `torch_dtype`, and `rope_parameters` as separate fields."""
    left_out = {"dtype", "rope_parameters", "layer_types", "_sliding_window_pattern", "use_bidirectional_attention"}
    old = {key: value for key, value in config.items() if key not in left_out}
    rope = dict(config.get("rope_parameters") or {})
    if config["model_type"] == "gemma3_text":
        full = config["layer_types"].index("full_attention")
        old |= {"sliding_window_pattern": full + 1, "rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
        rope = dict(rope["full_attention"])
    keys = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
    if config["model_type"] == "gpt_neox":
        keys = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    old |= {keys[key]: rope.pop(key) for key in list(rope) if key in keys}
    if rope.get("rope_type", "default") != "default":
        kind = rope.pop("rope_type")
        # The oldest name is "type"; llama3 always had "rope_type".
        old["rope_scaling"] = {"rope_type" if kind == "llama3" else "type": kind, **rope}
    elif rope:
        old["rope_scaling"] = None
    return {**old, "torch_dtype": dtype, "transformers_version": "4.30.0"}


def _write(tensors: dict[str, Tensor], folder: Path, spelling: Spelling) -> None:
    stem, suffix = ("model", "safetensors") if spelling.weights == "safetensors" else ("pytorch_model", "bin")
    if spelling.shards == 1:
        _save(tensors, folder / f"{stem}.{suffix}", spelling.weights)
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(spelling.shards):
        file = f"{stem}-{number + 1:05}-of-{spelling.shards:05}.{suffix}"
        mine = names[number :: spelling.shards]
        _save({name: tensors[name] for name in mine}, folder / file, spelling.weights)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _save(tensors: dict[str, Tensor], file: Path, form: Format) -> None:
    if form == "safetensors":
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=form == "pickled")
