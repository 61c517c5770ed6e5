"""What words cost in tokens, for a tokenizer that is known only by what the server says about it."""

import asyncio

from shoal.client.http import ServerClient
from shoal.client.load.prompts import WORDS, WordPrompts
from shoal.errors import ShoalError

_AT_ONCE = 8
_REPEATS = 8
_LEAST = 0.1  # tokens that a word counts for at least, so that a prompt has an end


async def words_by_tokenizer(client: ServerClient, model: str) -> WordPrompts | None:
    """Asks the server's `/tokenize` what each word costs; None if it has none that answers."""

    async def count(text: str) -> int:
        async with gate:
            answer = await client.post_json("/tokenize", {"model": model, "prompt": text})
        return int(answer["count"])

    async def both(word: str) -> tuple[int, int]:
        return await count(word), await count(" ".join([word] * (1 + _REPEATS)))

    gate = asyncio.Semaphore(_AT_ONCE)
    try:
        await count(WORDS[0])
        counts = await asyncio.gather(*map(both, WORDS))
    except (ShoalError, KeyError, TypeError, ValueError):
        return None
    costs = {word: max((many - once) / _REPEATS, _LEAST) for word, (once, many) in zip(WORDS, counts, strict=True)}
    return WordPrompts(costs, {word: once for word, (once, _) in zip(WORDS, counts, strict=True)})


def words_by_usage(once: int, twice: int) -> WordPrompts:
    """From the tokens that the server counted in a prompt of all WORDS, and in one that has them twice: what stands
    around a prompt, such as a chat's template, is in both."""
    cost = max((twice - once) / len(WORDS), _LEAST)
    return WordPrompts(dict.fromkeys(WORDS, cost))
