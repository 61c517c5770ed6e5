"""Iteration-level scheduling (Orca; Yu et al., OSDI 2022): what runs in the next step.

There is no prefill phase and no decode phase. A step has a token budget; running requests take from it first, chunks
of waiting prompts get what is left. Plans are made before the tokens of earlier ones are known, so a request may be
scheduled once or twice past its end; what comes back for it then is dropped.

A pipeline of S stages works on S steps at a time. The first stage waits if a step needs a token that the last one has
not drawn yet, and any stage does if a step takes longer than the next. So

- a request whose token is drawn in step n is in step n + S at the earliest, unless the token is known before, or a step
  would be empty without it (then the stages have nothing else to do, and the plan is there when the token is);
- a step takes one in S of the requests that want single tokens (what is over goes to the first steps of each S): those
  that have waited longest, then the policy's first. Where the budget is too short even for those, the policy alone
  decides, as it does about blocks;
- new requests come in with prompts cut as `spread` says, and not more of them than their share of the draws.

Chunks of one prompt need nothing of each other that a stage does not have, and follow each other in consecutive steps.
With one stage all of this says nothing.
"""

import heapq
import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from shoal.engine.blocks import BlockPool
from shoal.engine.grammar_constraint import Constraint
from shoal.engine.prompt_chunking import PromptSpread
from shoal.engine.request import Request, RequestState, decode_tokens, encode_tokens, token_set
from shoal.engine.speculation import Guesser
from shoal.errors import EngineError, RequestError
from shoal.protocols import Grammars, Policy
from shoal.wire.base import Ids
from shoal.wire.engine import CacheReset, EngineRequest, Finish, RefusalKind, SeqUpdate
from shoal.wire.grammars import GrammarAsk, Verdict
from shoal.wire.ranks import NewSeq, PromptLogprobs, SeqOut, StepPlan, StepResult, TokenLogprobs, Work

_FEW_DEADLINES = 64
_LEAST_FORESIGHT_US = 1000
_STEPS_REMEMBERED = 8
# Tokens of the requests that are admitted in a step. To find them in the prefix cache and to tell ranks of them takes
# some 0.1 us each: hundreds of long prompts that are all cached would hold up everybody's next token.
_LOOKED_AT = 1 << 18


class PriorityPolicy:
    """The lower priority number first; among equals, who came first."""

    def rank(self, request: EngineRequest, arrival: int) -> tuple[int, ...]:
        return (request.priority, arrival)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    window: int | None = None  # tokens that any layer looks back on, itself included; None: all of them
    stages: int = 1  # of the pipeline, which works on as many steps at a time
    prompt_logprobs: int | None = None  # prompt tokens in a step that log-probabilities are told of; None: any number


@dataclass(slots=True)
class Counters:
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_position: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Draft:
    """A plan in the making."""

    budget: int
    share: int  # tokens that prompts shall have of it
    told: float  # prompt tokens whose log-probabilities the step may still give
    work: dict[Request, Work] = field(default_factory=dict)
    new: list[NewSeq] = field(default_factory=list)
    draws: int = 0

    def add(self, request: Request, work: Work) -> None:
        self.work[request] = work
        self._count(request, work, 1)

    def take_back(self, request: Request) -> Work | None:
        work = self.work.pop(request, None)
        if work is not None:
            self._count(request, work, -1)
        return work

    def cut(self, request: Request, start: int, count: int) -> int:
        """Return how many of a request's `count` tokens from `start` on fit into the step.

        One may always be computed, whatever was told of prompts already: a request that had to wait for its turn would
        hold up those behind it.
        """
        count = min(count, self.budget)
        return int(max(self.told, 1)) if request.told(start, count) > max(self.told, 1) else count

    def _count(self, request: Request, work: Work, times: int) -> None:
        self.told -= times * request.told(work.start, work.count)
        self.budget -= times * work.count
        self.share -= times * _prompt_tokens(work)
        self.draws += times * work.sample


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        limits: SchedulerLimits,
        policy: Policy,
        clock: Callable[[], float],
        *,
        prefix_caching: bool = True,
        make_guesser: Callable[[], Guesser | None] = lambda: None,
        incarnation: int = 0,
        lockstep: bool = False,
        grammars: Grammars | None = None,
    ) -> None:
        """`lockstep`: all plans say that ranks of other replicas take part. `grammars`: follows outputs that must obey
        one; without it requests that bring a grammar are refused."""
        self.counters = Counters()
        self._prefix_caching = prefix_caching
        self._make_guesser = make_guesser
        self._incarnation = incarnation
        self._lockstep = lockstep
        self._grammars = grammars
        self._judged_later: set[Request] = set()  # running, and their verdicts are on their way
        self._forward_us = 0.0  # what ranks take for a step, of late
        self._pool = pool
        self._limits = limits
        self._spread = PromptSpread(limits.stages, limits.max_num_batched_tokens)
        self._policy = policy
        self._clock = clock
        self._requests: dict[int, Request] = {}
        self._waiting: list[tuple[tuple[int, ...], int, Request]] = []  # a heap; may hold requests that have ended
        self._running: list[Request] = []  # by the policy's rank
        self._deadlines: list[tuple[float, int]] = []
        self._released: list[int] = []  # ranks are to forget these
        self._flights: dict[int, tuple[Request, ...]] = {}
        self._next_step = 0
        self._arrivals = 0
        self._updates: list[SeqUpdate] = []

    # --- what clients ask for ------------------------------------------------------------------------------------

    def add(self, spec: EngineRequest) -> None:
        """Takes a request over. One with a grammar may wait for its turn when that is compiled.

        A request that was begun elsewhere goes on behind the output it has; one that has all of it ends at once.

        Raises:
            RequestError: it can never run. The frontend checks prompts before; this is the engine's own guard.
        """
        tokens = decode_tokens(spec.tokens)
        prompt_len = spec.prompt_len or len(tokens)
        if not 0 < prompt_len <= len(tokens):
            raise RequestError(f"request {spec.seq}: {prompt_len} of its {len(tokens)} tokens can't be the prompt")
        if prompt_len + spec.max_tokens > self._limits.max_model_len or spec.max_tokens < 1:
            raise RequestError(
                f"request {spec.seq}: {prompt_len} prompt tokens and {spec.max_tokens} to generate "
                f"do not fit into {self._limits.max_model_len}"
            )
        if spec.seq in self._requests:
            raise RequestError(f"request {spec.seq} exists already")
        if spec.grammar and self._grammars is None:
            raise RequestError("structured outputs need a tokenizer, which this model does not have")
        self._arrivals += 1
        rank = self._policy.rank(spec, self._arrivals)
        guesser = self._make_guesser()
        if guesser is not None:
            guesser.accept(tokens, ())
        constraint = Constraint() if spec.grammar else None
        stop_ids = token_set(spec.stop_ids)
        salt = self._salt(spec)
        request = Request(spec, self._arrivals, rank, tokens, prompt_len, salt, stop_ids, constraint, guesser)
        request.added = self._clock()
        finish = _finish_at(request) if request.generated else None
        if finish is not None:
            self._updates.append(SeqUpdate(spec.seq, (), finish=finish))
            return
        self._requests[spec.seq] = request
        if constraint is None:
            self._wait(request)
        else:
            request.state = RequestState.CHECKED
            self._follow(request)
        if spec.deadline is not None:
            heapq.heappush(self._deadlines, (spec.deadline, spec.seq))

    def _salt(self, spec: EngineRequest) -> str | None:
        """Who shares blocks with a request: everybody with its salt; without a prefix cache the others of its group."""
        if self._prefix_caching:
            return spec.cache_salt
        return f"group {spec.group}" if spec.group >= 0 else None

    @property
    def unfinished(self) -> list[int]:
        """The requests that have not ended."""
        return list(self._requests)

    def abort(self, seqs: Iterable[int], error: str = "") -> None:
        """Ends requests; those that have ended already, or never were, are passed over."""
        for seq in seqs:
            request = self._requests.get(seq)
            if request is not None:
                self._finish(request, Finish.ABORT, error=error)

    # --- steps ---------------------------------------------------------------------------------------------------

    def schedule(self, *, must: bool = False, rest: bool = False) -> StepPlan | None:
        """The next plan, None if there is nothing to do before more results are in; a plan without work then, if
        there `must` be one. `rest`: there is to be no work."""
        self._expire()
        self._foresee_verdicts()
        most = self._limits.prompt_logprobs
        draft = _Draft(
            self._limits.max_num_batched_tokens,
            self._spread.share(self._backlog),
            math.inf if most is None else most,
        )
        if rest:
            if not must:
                return None
        else:
            self._fill(draft)
            if not draft.work and not must and (self._flights or not self._released):
                return None
        plan = StepPlan(
            incarnation=self._incarnation,
            step=self._next_step,
            work=tuple(draft.work.values()),
            new=tuple(draft.new),
            released=tuple(self._released),
            lockstep=self._lockstep,
        )
        self._spread.took(sum(_prompt_tokens(work) for work in plan.work))
        self._flights[plan.step] = tuple(draft.work)
        self._released.clear()
        self._next_step += 1
        return plan

    def _fill(self, draft: _Draft) -> None:
        preempted = self._continue_running(draft, self._in_turn())
        if not preempted:
            self._admit_waiting(draft)
        if not draft.work:
            self._continue_running(draft, self._out_of_turn())

    def _backlog(self) -> int:
        """Tokens of prompts that could be computed now: of running requests, and of waiting ones as far as there are
        places and blocks for them. An estimate: part of them may be in the prefix cache."""
        running = sum(request.uncomputed for request in self._running if not request.decodes)
        places = self._limits.max_num_seqs - len(self._running)
        waiting = (request for *_, request in self._waiting if request.state is RequestState.WAITING)
        prompts = sum(len(request.tokens) for request in islice(waiting, places))  # the first are about the least
        return running + min(prompts, self._pool.num_free * self._pool.block_size)

    def _in_turn(self) -> set[Request]:
        """Who gets a single token in the next step."""
        if self._limits.stages == 1:  # whoever wants one; to look at all of them takes as long as to plan
            return set(self._running)
        return self._longest_waiting(lambda request: not request.pending or request.turn <= self._next_step)

    def _out_of_turn(self) -> set[Request]:
        """Who gets one if nobody else is to do: no more than one step behind a token that is not known."""
        return self._longest_waiting(lambda request: request.pending == 1 and request.turn > self._next_step)

    def _longest_waiting(self, may: Callable[[Request], bool]) -> set[Request]:
        decoding = [request for request in self._running if request.decodes]
        ready = [request for request in decoding if request.uncomputed and may(request)]
        stages = self._limits.stages
        if len(decoding) > stages * self._limits.max_num_batched_tokens:
            return set(ready)
        share = max((len(decoding) + stages - 1 - self._next_step % stages) // stages, 1)
        return set(sorted(ready, key=lambda request: request.turn)[:share])

    def _continue_running(self, draft: _Draft, turn: Container[Request]) -> bool:
        """Gives running requests their next tokens, single ones to those whose `turn` it is; True if one had to make
        room for another.

        Those that need a single token come first: a long prompt in chunks delays nobody's next token.
        """
        preempted = False
        for request in sorted(self._running, key=lambda running: running.uncomputed > 1):
            self._retire_blocks(request)
            wanted = self._wanted(request, draft, turn)
            if wanted == 0 or request.state is not RequestState.RUNNING:  # waits for results, or made room for another
                continue
            while request.state is RequestState.RUNNING and self._room(request) == 0:
                self._preempt(self._running[-1], draft)
                preempted = True
            if request.state is RequestState.RUNNING:
                count = min(wanted, self._room(request))
                self._give_work(request, count, draft, self._guesses(request, count, draft))
        # Only now: had the prefix cache been told before, a request taken back would have left promises in it.
        for request in draft.work:
            self._cache_blocks(request)
        return preempted

    def _wanted(self, request: Request, draft: _Draft, turn: Container[Request]) -> int:
        left = request.uncomputed
        if left > 1:
            left = self._spread.cut(left, draft.share)
        elif request not in turn:
            return 0
        return draft.cut(request, request.computed, left)

    def _room(self, request: Request) -> int:
        """Tokens that fit into its blocks and the free ones."""
        return (len(request.blocks) + self._pool.num_free) * self._pool.block_size - request.computed

    def _guesses(self, request: Request, count: int, draft: _Draft) -> Ids:
        """Guesses that are computed behind the last known token of a request: what budget and blocks allow.

        None behind a part of its prompt, or if only one more token is wanted.
        """
        if request.guesser is None or count != 1 or request.uncomputed != 1:
            return ()
        if request.constraint is not None and not request.constraint.drafts:
            return ()
        room = (len(request.blocks) + self._spare_blocks) * self._pool.block_size - request.computed
        most = min(draft.budget, room, request.spec.max_tokens - request.generated) - 1
        if most <= 0:
            return ()
        return request.guesser.guess(most) if request.constraint is None else request.constraint.drafts[:most]

    @property
    def _spare_blocks(self) -> int:
        """Free ones that guesses may take: nobody shall make room because of a guess."""
        return max(self._pool.num_free - len(self._running), 0)

    def _admit_waiting(self, draft: _Draft) -> None:
        places = self._limits.max_num_seqs - len(self._running)
        most_draws = -(-(len(self._running) + min(places, len(self._waiting))) // self._limits.stages)
        looked_at = 0
        while draft.budget > 0 and draft.draws < most_draws and len(self._running) < self._limits.max_num_seqs:
            request = self._next_waiting()
            if request is None or looked_at >= _LOOKED_AT:
                return
            looked_at += len(request.tokens)
            prefix = self._pool.find_prefix(request.tokens, request.salt) if request.may_reuse else []
            # Room for the whole prompt is asked for, though blocks are given chunk by chunk: a prompt that is
            # half in would else be the first to be preempted.
            wanted = -(-len(request.tokens) // self._pool.block_size) - len(prefix)
            if wanted > self._pool.num_free - self._pool.num_unused(prefix):
                return
            # Where all tokens are found, the last one is computed once more, for what follows it. No rank writes it.
            computed = min(len(prefix) * self._pool.block_size, len(request.tokens) - 1)
            left = len(request.tokens) - computed
            count = draft.cut(request, computed, self._spread.cut(left, draft.share) if left > 1 else left)
            if count == 0:
                return
            heapq.heappop(self._waiting)
            self._start(request, prefix, computed, draft)
            self._give_work(request, count, draft)
            self._cache_blocks(request)

    def _start(self, request: Request, prefix: list[int], computed: int, draft: _Draft) -> None:
        self._pool.take(prefix)
        request.state = RequestState.RUNNING
        request.blocks = prefix
        request.computed = computed
        request.blocks_cached = len(prefix)
        if self._prefix_caching:
            self.counters.prefix_queries += len(request.tokens)
            self.counters.prefix_hits += computed
        if request.epoch == 0:
            request.waited_s = self._clock() - request.added
            request.cached_tokens = min(computed, request.prompt_len)
            self.counters.prompt_tokens += request.prompt_len
        self._running.append(request)
        self._running.sort(key=lambda running: running.rank)
        draft.new.append(
            NewSeq(
                seq=request.spec.seq,
                epoch=request.epoch,
                tokens=encode_tokens(request.tokens),
                prompt_len=request.prompt_len,
                blocks=tuple(prefix),
                sampling=request.spec.sampling,
            )
        )
        self._retire_blocks(request)

    def _give_work(self, request: Request, count: int, draft: _Draft, guesses: Ids = ()) -> None:
        start = request.computed
        sample = start + count == request.length
        count += len(guesses)
        request.computed += count
        blocks = self._pool.allocate(self._blocks_wanted(request, sample))
        request.blocks += blocks
        request.pending += sample
        request.guessed = len(guesses)
        request.in_flight += 1
        if sample:
            request.turn = self._next_step + self._limits.stages
        masked = sample and request.constraint is not None
        draft.add(request, Work(request.spec.seq, start, count, sample, tuple(blocks), guesses, masked))

    def _blocks_wanted(self, request: Request, sample: bool) -> int:
        """Blocks for what is computed, and for a draft model's guesses if there are free ones."""
        size = self._pool.block_size
        needed = -(-request.computed // size) - len(request.blocks)
        if request.guesser is None or not sample:
            return needed
        end = min(request.computed + request.guesser.lookahead, self._limits.max_model_len)
        return max(needed, min(-(-end // size) - len(request.blocks), self._spare_blocks))

    def _retire_blocks(self, request: Request) -> None:
        """Gives blocks back that no layer will look at again. The last block that the prefix cache was told of stays:
        the next one is found through it."""
        if self._limits.window is None or request.state is not RequestState.RUNNING:
            return
        computed = request.computed - request.guessed  # guesses that prove wrong are computed again
        first_seen = max(computed - self._limits.window + 1, 0)
        retired = min(first_seen // self._pool.block_size, request.blocks_cached - 1)
        if retired > request.retired:
            self._pool.release(request.blocks[request.retired : retired])
            request.retired = retired

    def _preempt(self, request: Request, draft: _Draft) -> None:
        """Gives a request's blocks back; it will compute its tokens again, once those in flight are known."""
        taken_back = draft.take_back(request)
        if taken_back is not None:
            request.pending -= taken_back.sample
            request.in_flight -= 1
            request.guessed = 0
        self.counters.preemptions += 1
        request.preemptions += 1
        self._drop(request)
        request.computed = 0
        request.state = RequestState.DRAINING
        self._resume_if_drained(request)

    def reset_cache(self, *, running: bool) -> CacheReset:
        """Forgets what the prefix cache could find. `running`: requests that run give their blocks back, and compute
        their tokens again."""
        if running:
            self._preempt_all()
        return CacheReset(self._pool.forget_all(), self._pool.num_blocks - self._pool.num_free)

    def forget_cache(self) -> None:
        """The KV cache is gone, and with it all that ranks know of sequences. No step may be in flight.

        Raises:
            EngineError: one is.
        """
        if self._flights:
            raise EngineError(f"the KV cache can't be given up: {len(self._flights)} steps are in flight")
        self.reset_cache(running=True)
        self._released.clear()

    def _preempt_all(self) -> None:
        for request in list(self._running):
            self._preempt(request, _Draft(0, 0, 0))

    def _resume_if_drained(self, request: Request) -> None:
        judged = request.constraint is None or request.constraint.verdict is not None
        if request.state is RequestState.DRAINING and request.in_flight == 0 and judged:
            request.epoch += 1
            self._wait(request)

    # --- grammars ------------------------------------------------------------------------------------------------

    def judge(self, verdict: Verdict) -> None:
        """Takes in what a grammar says of an output."""
        request = self._requests.get(verdict.seq)
        if request is None or request.constraint is None:
            return
        constraint = request.constraint
        if verdict.lost and constraint.lost():
            self._follow(request)
            return
        if not (verdict.lost or verdict.refused) and verdict.behind != request.generated:
            return  # it was followed anew, and has got tokens since
        self._judged_later.discard(request)
        constraint.verdict, constraint.cost_us = verdict, verdict.cost_us
        finish, error = _finish_by(verdict, request)
        if finish is not None:
            self._finish(request, finish, error=error)
        elif request.state is RequestState.CHECKED:
            self._wait(request)
        else:
            self._resume_if_drained(request)

    def awaits_verdicts(self, plan: StepPlan) -> bool:
        """Are masks of the plan still unknown?"""
        return any(work.masked and self._unjudged(work.seq) is not None for work in plan.work)

    def masks(self, plan: StepPlan, row_bytes: int) -> bytes:
        """What may be drawn in the masked works of a plan, in their order.

        A request whose verdict has not come yet is set back: what is drawn for it counts for nothing.
        """
        found = []
        for work in plan.work:
            if not work.masked:
                continue
            places = 1 + len(work.drafts)
            late = self._unjudged(work.seq)
            request = self._requests.get(work.seq)
            if late is not None:
                self._set_back(late)
            if late is not None or request is None or request.constraint is None:  # it has ended, or draws for nothing
                found.append(b"\xff" * row_bytes * places)
            else:
                found.append(request.constraint.rows(places))
        return b"".join(found)

    def _unjudged(self, seq: int) -> Request | None:
        request = self._requests.get(seq)
        waits = request is not None and request.constraint is not None and request.constraint.verdict is None
        return request if waits else None

    def _foresee_verdicts(self) -> None:
        """Lets requests be planned whose verdicts will be there before the ranks have computed a step: nobody waits
        for those. What takes longer is planned when it is known, and holds nobody up."""
        left = max(self._forward_us, _LEAST_FORESIGHT_US)
        constraints = [(each.constraint, each.guesser is None) for each in self._judged_later if each.constraint]
        for constraint, plain in sorted(constraints, key=lambda each: each[0].cost_us):
            left -= constraint.cost_us
            constraint.foreseen = plain and left >= 0

    def _follow(self, request: Request) -> None:
        assert self._grammars is not None
        output = request.tokens[request.prompt_len :]
        self._grammars.follow(request.spec.seq, request.spec.grammar, tuple(output))

    def _ask(self, request: Request, taken: Sequence[int]) -> None:
        """Has the grammar look at what was drawn, and at guesses at what follows."""
        assert self._grammars is not None
        assert request.constraint is not None
        most = request.spec.max_tokens - request.generated - 1
        guesses = request.guesser.guess(most) if request.guesser is not None and most > 0 else ()
        request.constraint.verdict, request.constraint.foreseen = None, False
        self._judged_later.add(request)
        self._grammars.ask([GrammarAsk(request.spec.seq, tuple(taken), guesses, masked=not request.complete)])

    def _set_back(self, request: Request) -> None:
        """Has a request draw again what it draws in the plan that was made last."""
        assert request.constraint is not None
        request.constraint.cost_us = max(request.constraint.cost_us, 2 * int(self._forward_us) + _LEAST_FORESIGHT_US)
        self._drop(request)
        request.computed = request.pending = request.guessed = 0
        request.epoch += 1  # results in flight are of no use
        request.state = RequestState.DRAINING
        self._resume_if_drained(request)

    # --- results -------------------------------------------------------------------------------------------------

    def apply(self, result: StepResult) -> None:
        """Takes in what a step has brought. Steps come back in the order in which they were planned."""
        expected = next(iter(self._flights), None)
        if result.step != expected:  # going on would give tokens to the wrong places
            raise EngineError(f"the ranks answered step {result.step}, expected was {expected}")
        self._forward_us += (result.times.forward_us - self._forward_us) / _STEPS_REMEMBERED
        requests = self._flights.pop(result.step)
        for request in requests:
            request.in_flight -= 1
        for out in result.out:
            receiver = self._requests.get(out.seq)
            if receiver is not None and receiver.epoch == out.epoch:
                self._accept(receiver, out)
        for request in requests:
            self._resume_if_drained(request)

    def _accept(self, request: Request, out: SeqOut) -> None:
        if out.tokens:
            self._settle_guesses(request, len(out.tokens) - 1)
        if out.prompt_logprobs is not None:
            reported = out.prompt_logprobs.start + len(out.prompt_logprobs.entries) - 1
            request.prompt_reported = max(request.prompt_reported, reported)
        finish, error = None, ""
        constraint = request.constraint
        taken: list[int] = []
        for place, token in enumerate(out.tokens):
            error = constraint.objection(place, token) if constraint is not None else ""
            if error:
                finish = Finish.ABORT
                break
            taken.append(token)
            request.tokens.append(token)
            finish = _finish_at(request)
            guessed = place + 1 < len(out.tokens)  # only behind a right guess was anything else drawn
            if finish is None and guessed and constraint is not None and constraint.ends_behind(place + 1):
                finish = Finish.STOP
            if finish is not None:
                break
        if request.guesser is not None:
            request.guesser.accept(taken, out.drafts)
        self.counters.generated_tokens += len(taken)
        self._cache_blocks(request)
        logprobs = out.logprobs[: len(taken)]
        if finish is not None:
            self._finish(request, finish, taken, logprobs, error, out.prompt_logprobs)
        else:
            if constraint is not None and taken:
                self._ask(request, taken)
            self._updates.append(
                SeqUpdate(
                    seq=request.spec.seq,
                    tokens=tuple(taken),
                    logprobs=logprobs,
                    cached_tokens=request.cached_tokens,
                    prompt_logprobs=out.prompt_logprobs,
                    waited_us=self._waited(request),
                )
            )

    def _settle_guesses(self, request: Request, right: int) -> None:
        """What was asked for has come; behind the guesses that were right nothing is computed."""
        request.pending -= 1
        self.counters.drafts += request.guessed > 0
        self.counters.draft_tokens += request.guessed
        self.counters.accepted_tokens += right
        by_position = self.counters.accepted_by_position
        by_position += [0] * (right - len(by_position))
        for position in range(right):
            by_position[position] += 1
        if request.state is RequestState.RUNNING:
            request.computed -= request.guessed - right
        request.guessed = 0

    def take_updates(self) -> list[SeqUpdate]:
        updates, self._updates = self._updates, []
        return updates

    # --- books ---------------------------------------------------------------------------------------------------

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    @property
    def num_steps(self) -> int:
        """Planned so far."""
        return self._next_step

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._requests) - len(self._running)

    @property
    def idle(self) -> bool:
        """Nothing to do, nothing on its way."""
        return not self._requests and not self._flights and not self._released

    @property
    def has_updates(self) -> bool:
        return bool(self._updates)

    def audit(self) -> None:
        """Holds all books against each other.

        Raises:
            EngineError: a block, a request or a step was lost.
        """
        self._pool.audit(request.held for request in self._running)
        states = {RequestState.RUNNING: len(self._running), RequestState.FINISHED: 0}
        for state, count in states.items():
            found = sum(request.state is state for request in self._requests.values())
            if found != count:
                raise EngineError(f"scheduler out of balance: {found} requests {state.value}, {count} in its list")
        if not self._requests and self._pool.num_free != self._pool.num_blocks:
            raise EngineError(
                f"{self._pool.num_blocks - self._pool.num_free} KV blocks are held though there is no request"
            )

    def _wait(self, request: Request) -> None:
        request.state = RequestState.WAITING
        heapq.heappush(self._waiting, (request.rank, request.spec.seq, request))

    def _next_waiting(self) -> Request | None:
        while self._waiting and self._waiting[0][2].state is not RequestState.WAITING:
            heapq.heappop(self._waiting)
        return self._waiting[0][2] if self._waiting else None

    def _finish(
        self,
        request: Request,
        finish: Finish,
        tokens: Sequence[int] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        error: str = "",
        prompt_logprobs: PromptLogprobs | None = None,
    ) -> None:
        self._drop(request)
        if request.constraint is not None and self._grammars is not None:
            self._judged_later.discard(request)
            self._grammars.forget((request.spec.seq,))
        request.state = RequestState.FINISHED
        del self._requests[request.spec.seq]
        self._updates.append(
            SeqUpdate(
                request.spec.seq,
                tuple(tokens),
                logprobs,
                finish,
                request.cached_tokens,
                error,
                prompt_logprobs,
                RefusalKind.INVALID if error else RefusalKind.NONE,
                self._waited(request),
                request.preemptions,
            )
        )

    def _waited(self, request: Request) -> int:
        """With the first update of a request: microseconds that it waited for its first step; after it 0."""
        waited, request.waited_s = request.waited_s, 0.0
        return int(waited * 1e6)

    def _drop(self, request: Request) -> None:
        """Takes a request from the running ones, and has the ranks forget it."""
        if request.state is RequestState.RUNNING:
            self._running.remove(request)
            self._released.append(request.spec.seq)
            self._pool.release(request.held)
            request.blocks = []
            request.retired = 0
            request.blocks_cached = 0

    def _expire(self) -> None:
        if len(self._deadlines) > 2 * len(self._requests) + _FEW_DEADLINES:  # most are of requests that have ended
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._requests]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            _, seq = heapq.heappop(self._deadlines)
            self.abort([seq], error="the request's deadline has passed")

    def _cache_blocks(self, request: Request) -> None:
        """Makes blocks findable whose tokens are known and computed."""
        full = min(request.computed, len(request.tokens)) // self._pool.block_size
        if full > request.blocks_cached and request.blocks:
            self._pool.cache(request.blocks, request.blocks_cached, full, request.tokens, request.salt)
            request.blocks_cached = full


def _prompt_tokens(work: Work) -> int:
    """What a work takes of its step's share for prompts: nothing, if it is a single token and guesses."""
    return work.count if work.count - len(work.drafts) > 1 else 0


def _finish_at(request: Request) -> Finish | None:
    """Why an output ends with its last token, as far as that is known without its grammar."""
    if request.tokens[-1] in request.stop_ids:
        return Finish.STOP
    if request.constraint is not None:  # it may be complete with this token, which is no end for want of room
        return None
    return Finish.LENGTH if request.generated >= request.spec.max_tokens else None


def _finish_by(verdict: Verdict, request: Request) -> tuple[Finish | None, str]:
    """Why an output ends by its grammar, and the error if it is one."""
    if verdict.refused or verdict.lost:
        lost = f"structured_outputs: {verdict.lost}, again and again" if verdict.lost else ""
        return Finish.ABORT, verdict.refused or lost
    if verdict.problem and request.generated < request.spec.max_tokens:
        return Finish.ABORT, f"structured_outputs can't be obeyed: {verdict.problem}"
    if request.generated and verdict.ended[0]:
        return Finish.STOP, ""
    return (Finish.LENGTH if request.generated >= request.spec.max_tokens else None), ""
