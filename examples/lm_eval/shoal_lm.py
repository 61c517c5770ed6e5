"""`LLM` as a model of lm-eval with the name shoal. This program takes the arguments of lm-eval's command:

    python shoal_lm.py run --model shoal --model_args tensor_parallel_size=2 --include_path tasks --tasks demo_choices

`--model_args` are the options of `LLM`, and `model`, `add_bos_token`, `max_gen_toks`, `seed` and `max_length` with the
same meaning as for lm-eval's local-completions.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from shoal import LLM, SamplingParams
from shoal.errors import CheckpointError
from shoal.launch.open_model import open_model
from shoal.params import Message, Prompt
from shoal.text.chat_template import ChatTemplate

_Scored = tuple[Any, list[int], list[int]]  # (label, context, continuation), in tokens


@register_model("shoal")
class ShoalLM(TemplateLM):  # type: ignore[misc] # lm-eval is not among the packages that are checked
    def __init__(
        self,
        model: str | None = None,
        *,
        add_bos_token: bool = False,
        max_gen_toks: int = 256,
        max_length: int | None = None,
        seed: int = 1234,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
        **options: Any,
    ) -> None:
        """Start the engine.

        lm-eval's `batch_size`, `max_batch_size` and `device` have no effect, since the engine makes batches itself.

        Args:
            add_bos_token: add the special tokens that the tokenizer puts around a text.

        Raises:
            UserError, EngineError: the engine can't start (see `LLM`).
            CheckpointError: the model has no tokenizer.
        """
        super().__init__()
        opened = open_model(model, options)
        if opened.tokenizer is None:
            raise CheckpointError(f"{opened.name} has no tokenizer, and lm-eval sends texts")
        self._llm = LLM(opened)
        self._tokenizer = opened.tokenizer
        self._template = ChatTemplate.open(Path(opened.served.folder))
        self._eos = opened.generation.eos
        self._add_bos_token = add_bos_token
        self._max_gen_toks = max_gen_toks
        self._max_length = (max_length or self._llm.stats().max_model_len) - 1  # room for one generated token
        self._seed = seed

    @property
    def eot_token_id(self) -> int:
        return self._eos[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return (self._tokenizer.encode("") or [self.eot_token_id])[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._tokenizer.encode(string, add_special_tokens=bool(add_special_tokens) or self._add_bos_token)

    @property
    def tokenizer_name(self) -> str:
        return self._llm.options.model or "bundled"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the name under which lm-eval caches answers. Lm-eval can't choose another template."""
        return self.tokenizer_name if chat_template else ""

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        if self._template is None:
            raise CheckpointError(f"{self.tokenizer_name} has no chat template")
        return self._template.render(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts: list[Prompt] = []
        params: list[SamplingParams] = []
        for context, asked in (request.args for request in requests):
            params.append(self._params(asked))
            tokens = self.tok_encode(context)
            prompts.append({"prompt_token_ids": tokens[-(self._max_length - (params[-1].max_tokens or 0)) :]})
        outputs = self._llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        return [output.outputs[0].text for output in outputs]

    def _params(self, asked: Mapping[str, Any]) -> SamplingParams:
        """Return the sampling parameters for a task's generation_kwargs."""
        others = dict(asked)
        others.pop("do_sample", None)
        until = others.pop("until", [])
        length = others.pop("max_gen_toks", self._max_gen_toks)
        return SamplingParams(
            **{
                "temperature": 0.0,
                "max_tokens": length,
                "stop": [until] if isinstance(until, str) else list(until),
                "seed": self._seed,
                **others,
            }
        )

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[_Scored] = []
        for number, (text,) in enumerate(request.args for request in requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length - 1,
                context_len=1,
            )
            windows += [(number, *make_disjoint_window(window)) for window in cut]
        found = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for (number, _, _), (score, _) in zip(windows, scores, strict=True):
            found[number] += score
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[_Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-probability, is it greedy) of each continuation.

        The log-probability is that of the continuation after its context. It is greedy if greedy decoding gives it.
        """
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        prompts = [(context + continuation)[-self._max_length :] for _, context, continuation in requests]
        outputs = self._llm.generate(
            [{"prompt_token_ids": each} for each in prompts], params, use_tqdm=not disable_tqdm
        )
        scores = []
        for request, prompt, output in zip(requests, prompts, outputs, strict=True):
            count = min(len(request[2]), len(prompt) - 1)  # a prompt's first token has no log-probability
            places = zip(prompt[-count:], (output.prompt_logprobs or ())[-count:], strict=True) if count else ()
            known = [(at[token].logprob, at) for token, at in places if at is not None]
            greedy = all(logprob == max(other.logprob for other in at.values()) for logprob, at in known)
            scores.append((sum(logprob for logprob, _ in known), greedy))
        return scores


if __name__ == "__main__":
    cli_evaluate()
