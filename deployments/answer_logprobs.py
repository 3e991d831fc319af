"""Log-probabilities as OpenAI's answers show them: of a chat, of a completion, of a prompt.

Plain functions of what the engine found (`TokenLogprobs`) and the tokenizer, which says how a
token is written. Nothing here knows of streams, choices or requests.
"""

from collections.abc import Mapping, Sequence

from deployments.schemas import (
    ChatLogprobs,
    CompletionLogprobs,
    ContentLogprob,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from deployments.tokenizer import ChatTokenizer
from workers.protocol import TokenLogprobs

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no word for."""


def chat_logprobs(
    texts: Sequence[str], found: Sequence[TokenLogprobs], num_top: int, tokenizer: ChatTokenizer
) -> ChatLogprobs:
    """Of a chat's tokens, shown as `texts`, each with the `num_top` likeliest in its place."""
    return ChatLogprobs(
        [
            ContentLogprob(
                text,
                _finite(one.logprob),
                list(tokenizer.token_bytes[one.token]),
                [
                    TopLogprob(
                        tokenizer.token_text(token),
                        _finite(logprob),
                        list(tokenizer.token_bytes[token]),
                    )
                    for token, logprob in _top(one, num_top)
                ],
            )
            for text, one in zip(texts, found, strict=True)
        ]
    )


def no_completion_logprobs(num_top: int) -> CompletionLogprobs:
    """Of no token yet: `add_completion_logprob` adds one after another."""
    return CompletionLogprobs([], [], [] if num_top > 0 else None, [])


def add_completion_logprob(
    logprobs: CompletionLogprobs,
    token: int,
    found: TokenLogprobs | None,
    *,
    offset: int,
    num_top: int,
    tokenizer: ChatTokenizer,
) -> int:
    """Add a token that starts at `offset` in the text; the offset of the next one."""
    logprobs.tokens.append(tokenizer.token_text(token))
    logprobs.token_logprobs.append(None if found is None else _finite(found.logprob))
    logprobs.text_offset.append(offset)
    if logprobs.top_logprobs is not None:
        shown = None if found is None else _top_by_text(found, num_top, tokenizer)
        logprobs.top_logprobs.append(shown)
    # NOTE: counts characters begun: bytes 10xxxxxx only go on with one.
    return offset + sum(byte & 0xC0 != 0x80 for byte in tokenizer.token_bytes[token])


def logprobs_of_prompt(
    num_prompt: int, found: Mapping[int, TokenLogprobs], tokenizer: ChatTokenizer
) -> PromptLogprobs:
    """Of each position of a prompt; the first has none, nothing comes before it."""
    return [
        _prompt_logprob(found.get(position) if position else None, tokenizer)
        for position in range(num_prompt)
    ]


def _prompt_logprob(
    found: TokenLogprobs | None, tokenizer: ChatTokenizer
) -> dict[str, PromptLogprob] | None:
    if found is None:
        return None
    shown = {
        str(token): PromptLogprob(_finite(logprob), rank, tokenizer.token_text(token))
        for rank, (token, logprob) in enumerate(
            zip(found.top_ids, found.top_logprobs, strict=False), start=1
        )
    }
    own = PromptLogprob(_finite(found.logprob), found.rank, tokenizer.token_text(found.token))
    return {str(found.token): own, **shown}


def _top(found: TokenLogprobs, num_top: int) -> list[tuple[int, float]]:
    pairs = zip(found.top_ids, found.top_logprobs, strict=False)
    return list(pairs)[:num_top]


def _top_by_text(found: TokenLogprobs, num_top: int, tokenizer: ChatTokenizer) -> dict[str, float]:
    """The likeliest and the chosen token; of two that read the same the likelier counts."""
    shown: dict[str, float] = {}
    for token, logprob in (*_top(found, num_top), (found.token, found.logprob)):
        shown.setdefault(tokenizer.token_text(token), _finite(logprob))
    return shown


def _finite(logprob: float) -> float:
    """JSON has no infinity, and NaN fails the comparison too."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
