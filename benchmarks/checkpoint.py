"""Write a random checkpoint with a real model's sizes: `python benchmarks/checkpoint.py shape:qwen3-0.6b FOLDER`."""

import json
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

from shoal.launch.hub import locate
from shoal.models.manifest import make_manifest
from shoal.models.registry import read_spec, tensor_names

_SHARD_BYTES = 512 * 2**20


def make(shape: str, folder: Path) -> Path:
    """Write seeded normal weights in the shape's dtype, in several files, unless the folder has them already."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    source = locate(shape, weights=False)
    spec = read_spec(source)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text((source / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 22, generator=generator)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for param in make_manifest(spec, tensor_names(spec)):
        for piece in param.pieces:
            if any(piece.source in shard for shard in shards):  # a tied head
                continue
            size = torch.Size(piece.stored_shape).numel()
            if len(piece.stored_shape) == 1:
                tensor = torch.ones(piece.stored_shape)
            else:
                tensor = noise.repeat(-(-size // len(noise)))[:size].view(piece.stored_shape) * 0.02
            if sum(t.nbytes for t in shards[-1].values()) > _SHARD_BYTES:
                shards.append({})
            shards[-1][piece.source] = tensor.to(getattr(torch, spec.dtype))
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@click.command()
@click.argument("shape")
@click.argument("folder", type=click.Path(path_type=Path))
def main(shape: str, folder: Path) -> None:
    print(make(shape, folder))


if __name__ == "__main__":
    main()
