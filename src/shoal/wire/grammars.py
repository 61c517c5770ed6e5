"""Messages between whoever has outputs that must obey a grammar, and the processes that follow them."""

import msgspec

from shoal.wire.base import Ids, Stop, Wire


class GrammarSource(Wire, frozen=True):
    """The first message to the process of one grammar: what it compiles, in llguidance's form."""

    text: str


class GrammarCompiled(Wire, frozen=True):
    """Its answer. `error`: why the grammar can't be used."""

    error: str = ""


class GrammarFollow(Wire, frozen=True):
    """A new output to follow. `output`: its tokens so far. The answer is a Verdict."""

    seq: int
    output: Ids = ()


class GrammarAsk(Wire, frozen=True):
    """An output has got `tokens`; `drafts` are guesses at what comes next. The answer is a Verdict."""

    seq: int
    tokens: Ids
    drafts: Ids = ()
    masked: bool = True  # False: no more tokens are wanted, only whether the output is complete


class GrammarForget(Wire, frozen=True):
    seq: int


class Verdict(Wire, frozen=True):
    """What a grammar says of an output: of the place behind its last token, then of the place behind each draft that
    may follow (`drafts`; an end-of-text token may be the last of them)."""

    seq: int
    behind: int = 0  # tokens of the output
    refused: str = ""  # why the output can't be followed at all; everything else is empty then
    lost: str = ""  # why it is not followed any more, through no fault of its grammar: it may be followed anew
    problem: str = ""  # why the output can't be brought to an end that the grammar accepts
    ended: tuple[bool, ...] = ()  # by place: nothing may follow but an end-of-text token
    drafts: Ids = ()
    masks: bytes = b""  # a row for each place, as in a StepMask; never an empty row
    cost_us: int = 0  # processor time


class GrammarKill(Wire, frozen=True):
    """To the host of the grammars' processes: ends one, whatever it does."""

    number: int


class GrammarEnded(Wire, frozen=True):
    """From the host: a process has ended, in words. `killed`: by somebody, not by what its grammar takes."""

    number: int
    how: str
    killed: bool = False


class GrammarHostReady(Wire, frozen=True):
    """From the host: it has read the tokenizer."""


class GrammarHostFailed(Wire, frozen=True):
    """From the host, which ends: the model's tokenizer is none that grammars can be compiled for."""

    error: str


ToGrammar = GrammarSource | GrammarFollow | GrammarAsk | GrammarForget

FromGrammar = GrammarCompiled | Verdict

ToGrammarHost = GrammarKill | Stop

FromGrammarHost = GrammarEnded | GrammarHostReady | GrammarHostFailed

to_grammar: msgspec.msgpack.Decoder[ToGrammar] = msgspec.msgpack.Decoder(ToGrammar)

from_grammar: msgspec.msgpack.Decoder[FromGrammar] = msgspec.msgpack.Decoder(FromGrammar)

to_grammar_host: msgspec.msgpack.Decoder[ToGrammarHost] = msgspec.msgpack.Decoder(ToGrammarHost)

from_grammar_host: msgspec.msgpack.Decoder[FromGrammarHost] = msgspec.msgpack.Decoder(FromGrammarHost)
