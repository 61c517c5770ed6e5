"""Messages between a pool of grammar processes, their host, and the processes themselves."""

import msgspec

from shoal.wire.base import Ids, Stop, Wire
from shoal.wire.request_refusal import RequestRefusal


class GrammarSource(Wire, frozen=True):
    """The first message to the process of a grammar: the grammar to compile, in llguidance's form."""

    text: str


class GrammarCompiled(Wire, frozen=True):
    """The answer to `GrammarSource`. `refusal`: why the grammar cannot be used; None if it can."""

    refusal: RequestRefusal | None = None


class GrammarFollow(Wire, frozen=True):
    """A request to follow a new output. The answer is a Verdict."""

    seq: int
    output: Ids = ()  # its tokens so far


class GrammarAsk(Wire, frozen=True):
    """New tokens of an output, and drafts that may follow them. The answer is a Verdict."""

    seq: int
    tokens: Ids
    drafts: Ids = ()
    masked: bool = True  # False: no more tokens will be drawn, the verdict need only say whether the output is complete


class GrammarForget(Wire, frozen=True):
    """A request to stop following an output. There is no answer."""

    seq: int


class Verdict(Wire, frozen=True):
    """The tokens that a grammar allows next: after the last token of an output, then after each of `drafts`."""

    seq: int
    num_tokens: int = 0  # number of tokens that the output has
    refusal: RequestRefusal | None = None  # why the output can't be followed at all; all fields after it are empty then
    lost: str = ""  # why the output is no longer followed, through no fault of its grammar; it may be followed anew
    problem: str = ""  # why no continuation of the output can satisfy the grammar
    ended: tuple[bool, ...] = ()  # by position: only an end-of-text token may follow
    drafts: Ids = ()  # those of the drafts that may follow; an end-of-text token may be the last
    masks: bytes = b""  # a row for each position, as in a StepMask; no row is empty
    cost_us: int = 0  # processor time in microseconds


class GrammarKill(Wire, frozen=True):
    """A request to the grammar host to kill the process of a grammar."""

    number: int


class GrammarEnded(Wire, frozen=True):
    """A report from the grammar host that the process of a grammar has ended."""

    number: int
    how: str  # the reason, in words for the author of the grammar
    killed: bool = False  # somebody killed it; its grammar is not to blame


class GrammarHostReady(Wire, frozen=True):
    """A report from the grammar host that it has read the tokenizer."""


class GrammarHostFailed(Wire, frozen=True):
    """A report from the grammar host, which then ends: grammars can't be compiled for the model's tokenizer."""

    refusal: RequestRefusal


ToGrammar = GrammarSource | GrammarFollow | GrammarAsk | GrammarForget

FromGrammar = GrammarCompiled | Verdict

ToGrammarHost = GrammarKill | Stop

FromGrammarHost = GrammarEnded | GrammarHostReady | GrammarHostFailed

to_grammar: msgspec.msgpack.Decoder[ToGrammar] = msgspec.msgpack.Decoder(ToGrammar)

from_grammar: msgspec.msgpack.Decoder[FromGrammar] = msgspec.msgpack.Decoder(FromGrammar)

to_grammar_host: msgspec.msgpack.Decoder[ToGrammarHost] = msgspec.msgpack.Decoder(ToGrammarHost)

from_grammar_host: msgspec.msgpack.Decoder[FromGrammarHost] = msgspec.msgpack.Decoder(FromGrammarHost)
