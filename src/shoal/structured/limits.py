"""What a grammar may cost. Whoever sends one pays for it alone: beyond this its process is ended."""

from dataclasses import dataclass

MIB = 1 << 20
MOST_CHARACTERS = 1 << 20  # of a grammar in llguidance's form


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    compile_cpu_s: int = 4  # processor time
    compile_s: float = 30.0  # time on the clock, while others have the processors
    answer_s: float = 30.0  # ... of one verdict
    memory_mib: int = 512  # beyond what the tokenizer takes
    compiling: int = 4  # grammars that are compiled at the same time
    idle: int = 16  # processes of compiled grammars that are kept for requests to come
    live: int = 64  # processes at most; more grammars wait


DEFAULT_LIMITS = GrammarLimits()
