"""Limits on the time and memory of one grammar. A grammar beyond them has its process ended; no other is affected."""

from dataclasses import dataclass

MIB = 1 << 20
MAX_CHARACTERS = 1 << 20  # length of a grammar in llguidance's form


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """Limits on each grammar process, and on how many there are."""

    compile_cpu_s: int = 4  # seconds of processor time to compile a grammar
    compile_s: float = 30.0  # wall-clock seconds to compile a grammar, since others may use the processors
    answer_s: float = 30.0  # wall-clock seconds for one verdict
    memory_mib: int = 512  # in addition to the tokenizer's memory
    compiling: int = 4  # grammars that are compiled at the same time
    idle: int = 16  # processes without outputs that are kept for later requests with the same grammar
    live: int = 64  # processes in total; further grammars wait


DEFAULT_LIMITS = GrammarLimits()
