"""Convert a checkpoint without a tokenizer by llama.cpp's own converter: `python to_gguf.py SOURCE FOLDER FILE`.

The converter asks for a tokenizer, and knows tokenizers by their hash. So it gets one of single bytes, and is told that
it is that of Qwen2. The other ids of the vocabulary are filled with made-up tokens by the converter.
"""

import importlib
import json
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers


def main(source: Path, folder: Path, out: Path) -> None:
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    base = importlib.import_module("conversion.base")
    for kind in vars(base).values():
        if isinstance(kind, type) and "get_vocab_base_pre" in vars(kind):
            kind.get_vocab_base_pre = lambda self, tokenizer: "qwen2"  # type: ignore[attr-defined]
    converter = importlib.import_module("convert_hf_to_gguf")
    with tempfile.TemporaryDirectory() as name:
        complete = Path(name)
        for file in folder.iterdir():
            (complete / file.name).symlink_to(file.resolve())
        _write_tokenizer(complete)
        sys.argv = ["convert", str(complete), "--outfile", str(out), "--outtype", "bf16"]
        converter.main()


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "ab", "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
