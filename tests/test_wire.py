"""Messages are equal after they were encoded and decoded, and stay small."""

import builtins
import typing
from functools import partial
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.activity import PARTS, Activity, ActivityState
from shoal.config.option_forms import SpeculativeConfig
from shoal.devices.hardware import Hardware
from shoal.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput, Logprob, RequestOutput
from shoal.wire.base import Stop, Wire, encode
from shoal.wire.calls import CallError, ToFollower, to_follower
from shoal.wire.credentials import Credentials, TlsFiles, credentials_decoder
from shoal.wire.engine import (
    EngineRequest,
    FromEngine,
    ResetOutcome,
    SeqUpdate,
    StatsQuery,
    ToEngine,
    from_engine,
    reset_outcome_decoder,
    to_engine,
)
from shoal.wire.fleet import (
    FleetStatus,
    Operation,
    ReplicaStatus,
    ResponseNames,
    StoredTurn,
    StoredTurns,
    StoreResponse,
    ToApi,
    fleet_status_decoder,
    operation_decoder,
    response_names_decoder,
    store_response_decoder,
    stored_turns_decoder,
    to_api,
)
from shoal.wire.grammars import (
    FromGrammar,
    FromGrammarHost,
    ToGrammar,
    ToGrammarHost,
    from_grammar,
    from_grammar_host,
    to_grammar,
    to_grammar_host,
)
from shoal.wire.hosts import (
    HeadlessSetup,
    HostFacts,
    HostReport,
    ToSupervisor,
    headless_setup_decoder,
    host_report_decoder,
    to_supervisor,
)
from shoal.wire.lockstep import LockstepJoin, LockstepState, lockstep_join, lockstep_state
from shoal.wire.nodes import (
    FromNode,
    LeaderToNode,
    NodeToLeader,
    RankEnvironment,
    ToNode,
    from_node,
    leader_to_node,
    node_to_leader,
    to_node,
)
from shoal.wire.plan import (
    Layout,
    ModelFiles,
    ModelPlan,
    NodePlan,
    RankPlan,
    ReplicaPlace,
    ServedModel,
    ShardPlan,
    Timeouts,
)
from shoal.wire.ranks import (
    Capacity,
    FromForkServer,
    FromRank,
    LoadInfo,
    NewSeq,
    PromptLogprobs,
    RankStats,
    Sampling,
    SamplingPenalties,
    SeqOut,
    StepMask,
    StepPlan,
    StepTimes,
    ToForkServer,
    TokenLogprobs,
    ToRankProcess,
    Work,
    decode_capacity,
    decode_load_info,
    decode_rank_stats,
    from_fork_server,
    from_rank,
    to_fork_server,
    to_rank,
)
from shoal.wire.rendezvous import FromRendezvous, Hello, ToRendezvous, from_rendezvous, hello_decoder, to_rendezvous
from shoal.wire.request_refusal import RequestRefusal
from shoal.wire.tokens import decode_tokens, encode_tokens, num_tokens
from shoal.wire.topology import HostPair, PairAddress
from shoal.wire.trace import ClockOffset, TraceSummary, TrackEvents, trace_summary_decoder, track_events_decoder
from shoal.wire.traffic import Traffic
from support.fakes import steady

INTEGERS = st.integers(-(2**63), 2**64 - 1)
FLOATS = st.floats(allow_nan=False)
LOGPROBS = st.dictionaries(
    st.integers(0, 9), st.builds(Logprob, FLOATS, st.integers(1, 9), st.text(max_size=3), st.binary(max_size=3))
)
COMPLETIONS = st.builds(
    CompletionOutput,
    *(INTEGERS, st.text(max_size=5), st.lists(INTEGERS, max_size=3).map(tuple), st.sampled_from(["stop", None])),
    cumulative_logprob=FLOATS | st.none(),
    logprobs=st.lists(LOGPROBS, max_size=2) | st.none(),
    stop_reason=INTEGERS | st.text(max_size=3) | st.none(),
)
PLAIN = {
    int: INTEGERS,
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: st.text(max_size=8),
    bytes: st.binary(max_size=8),
    type(None): st.none(),
    Activity: st.builds(Activity, st.sampled_from(ActivityState), st.integers(0, 2), st.just(PARTS) | st.just(())),
    SpeculativeConfig: st.builds(SpeculativeConfig, st.sampled_from(["ngram", "draft_model"]), st.integers(1, 64)),
    PairAddress: st.builds(PairAddress, address=st.text(max_size=8), port=INTEGERS, token=st.text(max_size=8)),
    HostPair: st.builds(HostPair, source=INTEGERS, target=INTEGERS, latency_us=FLOATS | st.none()),
    Hardware: st.builds(
        Hardware,
        num_devices=INTEGERS,
        cores=st.lists(INTEGERS, max_size=3).map(tuple),
        host_memory=INTEGERS,
        host_memory_available=INTEGERS,
        device_memory=INTEGERS | st.none(),
        visible=st.just(("3", "GPU-ab")),
    ),
    RequestOutput: st.builds(
        RequestOutput,
        *(st.text(max_size=3), st.text(max_size=5) | st.none(), st.lists(INTEGERS, max_size=3).map(tuple)),
        st.lists(COMPLETIONS, max_size=2).map(tuple),
        prompt_logprobs=st.lists(LOGPROBS | st.none(), max_size=2) | st.none(),
    ),
    BeamSearchOutput: st.builds(
        BeamSearchOutput,
        st.lists(st.builds(BeamSearchSequence, st.just((1, 2)), st.text(max_size=3), FLOATS, st.just("stop"))).map(
            tuple
        ),
    ),
    Any: st.none() | st.booleans() | INTEGERS | st.text(max_size=5) | st.floats(allow_nan=False),
}


def values(hint: Any, inside: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Return a strategy for the values of a field of this type.

    `inside`: the messages around the field, which are not put into it again.
    """
    within = partial(values, inside=inside)
    match get_origin(hint), get_args(hint):
        case builtins.tuple, (item, end) if end is ...:
            return st.lists(within(item), max_size=0 if item in inside else 3).map(tuple)
        case builtins.tuple, items:
            return st.tuples(*map(within, items))
        case builtins.dict, (key, value):
            return st.dictionaries(within(key), within(value), max_size=3)
        case None, _ if issubclass(hint, Wire):
            fields = {} if hint in inside else get_type_hints(hint)
            whole = st.builds(hint, **{name: values(kind, (*inside, hint)) for name, kind in fields.items()})
            return st.nothing() if hint in inside else whole
    if get_origin(hint) in (None, typing.Literal):
        return PLAIN[hint] if hint in PLAIN else st.sampled_from(get_args(hint) or hint)
    return st.one_of(*map(within, get_args(hint)))


UNIONS = {
    "to_rank": ToRankProcess,
    "from_rank": FromRank,
    "to_fork_server": ToForkServer,
    "from_fork_server": FromForkServer,
    "to_follower": ToFollower,
    "to_node": ToNode,
    "from_node": FromNode,
    "leader_to_node": LeaderToNode,
    "node_to_leader": NodeToLeader,
    "to_engine": ToEngine,
    "from_engine": FromEngine,
    "to_api": ToApi,
    "to_supervisor": ToSupervisor,
    "to_rendezvous": ToRendezvous,
    "from_rendezvous": FromRendezvous,
    "to_grammar": ToGrammar,
    "from_grammar": FromGrammar,
    "to_grammar_host": ToGrammarHost,
    "from_grammar_host": FromGrammarHost,
}
DECODERS: dict[str, msgspec.msgpack.Decoder[Any]] = {
    "to_rank": to_rank,
    "from_rank": from_rank,
    "to_fork_server": to_fork_server,
    "from_fork_server": from_fork_server,
    "to_follower": to_follower,
    "to_node": to_node,
    "from_node": from_node,
    "leader_to_node": leader_to_node,
    "node_to_leader": node_to_leader,
    "to_engine": to_engine,
    "from_engine": from_engine,
    "to_api": to_api,
    "to_supervisor": to_supervisor,
    "to_rendezvous": to_rendezvous,
    "from_rendezvous": from_rendezvous,
    "to_grammar": to_grammar,
    "from_grammar": from_grammar,
    "to_grammar_host": to_grammar_host,
    "from_grammar_host": from_grammar_host,
}
MESSAGES = [(name, message) for name, union in UNIONS.items() for message in get_args(union)]
PAYLOADS = {
    LoadInfo: decode_load_info,
    Capacity: decode_capacity,
    RankStats: decode_rank_stats,
    Credentials: credentials_decoder.decode,
    Hello: hello_decoder.decode,
    HostReport: host_report_decoder.decode,
    HeadlessSetup: headless_setup_decoder.decode,
    FleetStatus: fleet_status_decoder.decode,
    StoreResponse: store_response_decoder.decode,
    StoredTurns: stored_turns_decoder.decode,
    ResponseNames: response_names_decoder.decode,
    Operation: operation_decoder.decode,
    ResetOutcome: reset_outcome_decoder.decode,
    TrackEvents: track_events_decoder.decode,
    TraceSummary: trace_summary_decoder.decode,
    LockstepJoin: lockstep_join.decode,
    LockstepState: lockstep_state.decode,
}


@pytest.mark.parametrize(("name", "message"), MESSAGES, ids=[f"{n}-{m.__name__}" for n, m in MESSAGES])
@settings(steady, max_examples=12)
@given(data=st.data())
def test_every_message_is_decoded_as_it_was_sent(name: str, message: type[Wire], data: st.DataObject) -> None:
    sent = data.draw(values(message))
    received = DECODERS[name].decode(encode(sent))
    assert type(received) is message
    assert received == sent


@pytest.mark.parametrize("message", PAYLOADS, ids=lambda message: message.__name__)
@settings(steady, max_examples=12)
@given(data=st.data())
def test_every_payload_is_decoded_as_it_was_sent(message: type[Wire], data: st.DataObject) -> None:
    sent = data.draw(values(message))
    assert PAYLOADS[message](encode(sent)) == sent


def test_every_message_is_covered() -> None:
    parts = {
        *(Sampling, SamplingPenalties, NewSeq, Work, TokenLogprobs, PromptLogprobs),
        *(CallError, SeqOut, StepTimes, SeqUpdate, Traffic, ClockOffset, ReplicaPlace),
        *(TlsFiles, ReplicaStatus, StoredTurn, ModelFiles, HostFacts, RequestRefusal),
        *(Layout, ShardPlan, ModelPlan, NodePlan, RankPlan, RankEnvironment, Timeouts, ServedModel),
    }
    covered = {message for _, message in MESSAGES} | set(PAYLOADS) | parts
    assert set(Wire.__subclasses__()) == covered


def test_a_message_for_another_kind_of_process_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        to_rank.decode(encode(StatsQuery()))
    with pytest.raises(msgspec.ValidationError):
        from_rank.decode(encode(StepPlan(0, 0, ())))


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x92\xa8StepPlan\x01", encode(Stop())[:-1]])
def test_malformed_data_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        to_rank.decode(data)


def test_a_plan_for_many_decoding_sequences_is_small() -> None:
    """Plans are deltas: a sequence that ranks know costs a few bytes, not its block table, tokens and parameters."""
    works = tuple(Work(10_000 + i, 1500 + i, 1, True, (5000 + i,) if i % 16 == 0 else ()) for i in range(32))
    plan = StepPlan(0, 100_000, works)
    assert len(encode(plan)) < 32 * 20
    assert to_rank.decode(encode(plan)) == plan


def test_a_prompt_costs_four_bytes_a_token() -> None:
    new = NewSeq(1, 0, encode_tokens(list(range(100_000, 101_000))), 1000, (), Sampling(seed=2**64 - 1))
    assert len(encode(new)) < 4000 + 80


def test_a_draft_costs_at_most_five_bytes() -> None:
    drafts = tuple(range(100_000, 100_005))
    with_drafts, without = (encode(Work(7, 1500, 6, True, (), given)) for given in (drafts, ()))
    assert len(with_drafts) - len(without) <= 5 * len(drafts)


def test_a_mask_costs_a_bit_a_token() -> None:
    words = -(-150_000 // 32)
    mask = StepMask(2**62, 100_000, bytes(32 * words * 4), words)
    assert len(encode(mask)) < 32 * 150_016 / 8 + 60
    assert to_rank.decode(encode(mask)) == mask


def test_a_plan_is_masked_if_any_work_is() -> None:
    plain, masked = Work(1, 0, 1, True), Work(2, 0, 1, True, masked=True)
    assert not StepPlan(0, 0, (plain, plain)).masked
    assert StepPlan(0, 0, (plain, masked)).masked
    assert not StepPlan(0, 0, ()).masked


@steady
@given(st.lists(st.integers(0, 2**31 - 1)))
def test_tokens_are_encoded_as_little_endian_int32(tokens: list[int]) -> None:
    data = encode_tokens(tokens)
    assert data == b"".join(token.to_bytes(4, "little") for token in tokens)
    assert decode_tokens(data) == tokens
    assert num_tokens(data) == len(tokens)


def test_a_request_knows_what_is_prompt_and_what_is_output() -> None:
    fresh = EngineRequest(1, encode_tokens([7, 8, 9]), 3, Sampling(seed=0), 5)
    assert (fresh.num_tokens, fresh.num_output_tokens) == (3, 0)
    begun = EngineRequest(1, encode_tokens([7, 8, 9, 1, 2]), 3, Sampling(seed=0), 5)
    assert (begun.num_tokens, begun.num_output_tokens) == (5, 2)
