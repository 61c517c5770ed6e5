"""A tokenizer.model of SentencePiece, as older models on the hub have it, gives the ids of the library itself."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from shoal.text.detokenizer import OutputText
from shoal.text.tokenizer import Tokenizer, open_tokenizer

TEXTS = ["the quick dog", "two spaces ", "né 🐟 !", "shoal\nserves", "12 + 30 = 42"]


@pytest.fixture(scope="module")
def model() -> bytes:
    """Return a model that is trained on a few lines. Characters that these lines lack become byte tokens."""
    lines = [f"the quick brown fox jumps over the lazy dog {i}" for i in range(400)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, "shoal serves large language models"]),
        model_writer=written,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        pad_id=-1,
        hard_vocab_limit=False,
        normalization_rule_name="identity",  # as in Llama's tokenizer: texts are not normalized
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return written.getvalue()


@pytest.fixture(scope="module")
def tokenizer(model: bytes, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(model)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found = open_tokenizer(folder)
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_sentencepiece(model: bytes, tokenizer: Tokenizer, text: str) -> None:
    theirs: Any = sentencepiece.SentencePieceProcessor()
    theirs.LoadFromSerializedProto(model)
    assert tokenizer.encode(text) == [1, *theirs.encode(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_the_output_of_a_cut_text_is_the_end_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode("the fox " + text)
    for cut in range(2, len(ids)):
        output = OutputText(tokenizer, ids[:cut])
        output.append(ids[cut:])
        output.finish()
        assert "the fox " + text == tokenizer.decode(ids)
        assert tokenizer.decode(ids).endswith(output.text)
    assert json.loads(tokenizer.serialized())
