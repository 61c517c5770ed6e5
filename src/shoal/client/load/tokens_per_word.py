"""How many tokens a word has, for a tokenizer that only the server has."""

import asyncio

from shoal.client.http import ServerClient
from shoal.client.load.prompts import WORDS, WordPrompts
from shoal.errors import ShoalError

_CONCURRENCY = 8
_REPEATS = 8
_MIN_COST = 0.1  # the least tokens that a word counts for, so that every prompt has an end


async def words_by_tokenizer(client: ServerClient, model: str) -> WordPrompts | None:
    """Count the tokens of each word with the server's `/tokenize`. Return None if the server has no such endpoint."""

    async def count(text: str) -> int:
        async with gate:
            answer = await client.post_json("/tokenize", {"model": model, "prompt": text})
        return int(answer["count"])

    async def both(word: str) -> tuple[int, int]:
        return await count(word), await count(" ".join([word] * (1 + _REPEATS)))

    gate = asyncio.Semaphore(_CONCURRENCY)
    try:
        await count(WORDS[0])
        counts = await asyncio.gather(*map(both, WORDS))
    except (ShoalError, KeyError, TypeError, ValueError):
        return None
    costs = {word: max((many - once) / _REPEATS, _MIN_COST) for word, (once, many) in zip(WORDS, counts, strict=True)}
    return WordPrompts(costs, {word: once for word, (once, _) in zip(WORDS, counts, strict=True)})


def words_by_usage(once: int, twice: int) -> WordPrompts:
    """Return prompts of words that all have the same cost in tokens.

    `once` and `twice` are the tokens that the server counted in a prompt of all WORDS, and in one that has them twice.
    Their difference does not count tokens around a prompt, such as those of a chat template.
    """
    cost = max((twice - once) / len(WORDS), _MIN_COST)
    return WordPrompts(dict.fromkeys(WORDS, cost))
