"""What a grammar lets a request say: one matcher a request, one bit an id. llguidance lives here.

A `Matcher` reads a request's output token by token and says after each what may come next. It is
plain state: no thread, no socket, no clock. How long a grammar may take to compile is decided in
`deployments.grammar_check`, which thread computes masks in `deployments.grammars`, and what a
client may write in `deployments.schemas`.

    >>> digits = compile_grammar(Grammar("regex", "[0-9]+"), Vocabulary.of_bytes())
    >>> digits.accept(ord("7"))
    <State.OPEN: 'open'>
    >>> sorted(ids_of(digits.allowed(frozenset())))[:3]
    [48, 49, 50]

Where the grammar's text may end, the end-of-sequence ids are among the allowed; where nothing but
an end may follow, `accept` says `COMPLETE`. Special tokens, and ids that stand for no bytes, are
never allowed.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from enum import Enum
from pathlib import Path

import llguidance
from tokenizers import Tokenizer

from deployments.messages import Grammar
from deployments.tokenizer import TokenBytes
from workers.protocol import mask_bytes

LIMITS = llguidance.LLParserLimits(
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Bounds on work and memory that llguidance keeps by itself. They are not enough: a chain of a few
thousand definitions overflows its stack, and some masks take half a second within them."""

MAX_REASON_CHARS = 160

WHITE_SPACE = r"\n {0,40}| "
"""Between the parts of a document: nothing, a space, or a new line and an indentation. A model that
may write any amount of white space sometimes writes nothing else."""


class GrammarRefused(ValueError):
    """The grammar is wrong or too large; the text is a clause for the client."""


class GrammarFailed(RuntimeError):
    """A matcher that worked has failed; the text is for logs."""


class State(Enum):
    """What `accept` found."""

    OPEN = "open"
    """More may follow."""
    COMPLETE = "complete"
    """Nothing may follow."""
    BROKEN = "broken"
    """The token is not one that was allowed, or the matcher gave up."""


class Vocabulary:
    """The bytes of every id, as llguidance wants them."""

    def __init__(
        self,
        spellings: Sequence[bytes],
        eos_ids: Sequence[int],
        encode: Callable[[bytes], list[int]],
    ) -> None:
        """`spellings` has an entry for every id of the model, empty where there are no bytes."""
        self.size = len(spellings)
        self.eos_ids = tuple(eos_ids)
        # NOTE: llguidance needs an id that ends a text; a model without one gets one too many.
        spelt = [*spellings, *([] if eos_ids else [b""])]
        wrapped = llguidance.TokenizerWrapper(_Spelling(spelt, eos_ids or (self.size,), encode))
        self.tokenizer = llguidance.LLTokenizer(wrapped, eos_token=list(eos_ids or (self.size,)))

    @classmethod
    def load(cls, folder: Path, size: int, eos_ids: Sequence[int]) -> "Vocabulary":
        """That of a checkpoint's tokenizer.json, for a model with `size` ids."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise GrammarRefused("this model has no tokenizer.json, which a grammar needs")
        tokenizer = Tokenizer.from_file(str(path))
        token_bytes = TokenBytes(tokenizer)

        def encode(text: bytes) -> list[int]:
            return tokenizer.encode(text.decode(), add_special_tokens=False).ids

        ends = frozenset(eos_ids)
        spelt = [b"" if token in ends else token_bytes[token] for token in range(size)]
        return cls(spelt, eos_ids, encode)

    @classmethod
    def of_bytes(cls) -> "Vocabulary":
        """An id for each byte, and 256 for the end."""
        return cls([*(bytes([byte]) for byte in range(256)), b""], (256,), list)


class _Spelling:
    """What `llguidance.TokenizerWrapper` asks a tokenizer for."""

    def __init__(
        self,
        spellings: Sequence[bytes],
        eos_ids: Sequence[int],
        encode: Callable[[bytes], list[int]],
    ) -> None:
        self.tokens = list(spellings)
        self.eos_token_id = eos_ids[0]
        self.bos_token_id = None
        self.special_token_ids: list[int] = []
        self._encode = encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.encode() if isinstance(text, str) else text)


class Matcher:
    """Where one request is in its grammar."""

    def __init__(self, inner: llguidance.LLMatcher, vocabulary: Vocabulary) -> None:
        self._inner = inner
        self._vocabulary = vocabulary
        self._num_bytes = mask_bytes(vocabulary.size)

    def copy(self) -> "Matcher":
        """Another at the same place; costs less than compiling."""
        return Matcher(self._inner.deep_copy(), self._vocabulary)

    def accept(self, token: int) -> State:
        """Go on by a token."""
        if not self._inner.consume_token(token):
            return State.BROKEN
        return State.COMPLETE if self._inner.is_stopped() else State.OPEN

    def accept_all(self, tokens: Sequence[int]) -> bool:
        """Go on by tokens said before; false if they are not of this grammar."""
        return not tokens or self._inner.consume_tokens(list(tokens))

    def allowed(self, barred: Collection[int]) -> bytes:
        """A bit for each id that may come next, as `workers.protocol.Mask` has them.

        Of the ids that end a text those in `barred` are left out if anything else may come.
        Takes from microseconds to many milliseconds, without holding the interpreter.
        """
        bits = bytearray(self._inner.compute_bitmask()[: self._num_bytes])
        if self._inner.is_error():
            raise GrammarFailed(_first_line(self._inner.get_error()))
        bits.extend(bytes(self._num_bytes - len(bits)))
        ends = self._vocabulary.eos_ids or (self._vocabulary.size,)
        unwanted = ends if not self._vocabulary.eos_ids else [t for t in ends if t in barred]
        without = bytearray(bits)
        for token in unwanted:
            if token < 8 * len(without):
                without[token >> 3] &= 0xFF ^ (1 << (token & 7))
        chosen = without if any(without) else bits
        if not any(chosen):
            raise GrammarFailed("the grammar allows no id at all")
        return bytes(chosen)

    @property
    def says_nothing(self) -> bool:
        """No text but the empty one is allowed from here."""
        ends = set(self._vocabulary.eos_ids)
        return not set(ids_of(self.allowed(ends))) - ends


def everything(vocab_size: int) -> bytes:
    """The mask that allows all ids."""
    return b"\xff" * mask_bytes(vocab_size)


def ids_of(bits: bytes) -> Iterator[int]:
    """The ids whose bits are set."""
    for place, byte in enumerate(bits):
        if byte:
            yield from (8 * place + bit for bit in range(8) if byte >> bit & 1)


def compile_grammar(grammar: Grammar, vocabulary: Vocabulary) -> Matcher:
    """A matcher at the beginning of `grammar`, or `GrammarRefused`.

    NOTE: what comes from clients goes through `deployments.grammar_check` first: llguidance can
    overflow its stack, which ends the process.
    """
    inner = llguidance.LLMatcher(vocabulary.tokenizer, _source(grammar), log_level=0, limits=LIMITS)
    if inner.is_error():
        raise GrammarRefused(_first_line(inner.get_error()))
    matcher = Matcher(inner, vocabulary)
    try:
        if matcher.says_nothing:
            raise GrammarRefused("it allows only the empty text")
    except GrammarFailed as error:
        raise GrammarRefused(str(error)) from None
    return matcher


def _source(grammar: Grammar) -> str:
    try:
        match grammar.kind:
            case "json":
                return llguidance.LLMatcher.grammar_from_json_schema(
                    grammar.text, defaults={"whitespace_pattern": WHITE_SPACE}
                )
            case "regex":
                return llguidance.LLMatcher.grammar_from_regex(grammar.text)
            case "lark":
                return llguidance.LLMatcher.grammar_from_lark(grammar.text)
    except ValueError as error:
        raise GrammarRefused(_first_line(str(error))) from None


def _first_line(error: str) -> str:
    """What llguidance says, short and printable; of a crash in it, nothing."""
    lines = error.strip().splitlines() or [""]
    if lines[0].startswith("panic"):
        return "it cannot be compiled"
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    return "".join(c for c in line if c.isprintable())[:MAX_REASON_CHARS] or "it is not valid"
