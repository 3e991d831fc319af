"""Grammars as masks over ids: what may come next, what is refused, and how long that takes."""

import json
import os
import resource
import select
import signal
import threading
import time
from pathlib import Path

import pytest

from deployments.grammar import (
    GrammarFailed,
    GrammarRefused,
    State,
    Vocabulary,
    compile_grammar,
    everything,
    ids_of,
)
from deployments.grammar_check import DEADLINE_S, PATIENCE_S, Checker
from deployments.grammars import Grammars, Masks
from deployments.messages import MAX_GRAMMAR_CHARS, Grammar
from workers import bundled
from workers.protocol import mask_bytes

NO_END = frozenset()
DIGITS = Grammar("regex", "[0-9]+", "guided_regex")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def definitions(num):
    """A schema nested so many definitions deep."""
    schema = {str(number): {"$ref": f"#/{number + 1}"} for number in range(num)}
    schema |= {"$ref": "#/0", str(num): {"type": "string"}}
    return json.dumps(schema, separators=(",", ":"))


def rules(num):
    """A grammar of so many rules, each made of the next."""
    chain = "".join(f"r{number}: r{number + 1}\n" for number in range(num))
    return f'start: r0\n{chain}r{num}: "a"'


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.load(bundled.path(), 259, (258, 256))


@pytest.fixture(scope="module")
def checker():
    one = Checker()
    one.check(DIGITS)
    yield one
    one.close()


def matcher(vocabulary, kind, text):
    return compile_grammar(Grammar(kind, text), vocabulary)


def after(one, text):
    """The ids allowed after `text`, bytes as characters."""
    assert one.accept_all(list(text.encode()))
    return {chr(i) if i < 128 else i for i in ids_of(one.allowed(NO_END))}


# What may come next


def test_the_end_is_allowed_where_the_grammar_may_end(vocabulary):
    digits = matcher(vocabulary, "regex", "[0-9]+")
    assert after(digits, "") == set("0123456789")
    assert after(digits, "12") == {*"0123456789", 256, 258}


def test_ends_that_are_barred_are_left_out_unless_nothing_else_is_left(vocabulary):
    maybe = matcher(vocabulary, "regex", "(ab)?c?")
    assert set(ids_of(maybe.allowed({256}))) == {97, 99, 258}
    assert set(ids_of(maybe.allowed({256, 258}))) == {97, 99}
    assert maybe.accept_all(list(b"abc"))
    assert set(ids_of(maybe.allowed({256, 258}))) == {256, 258}


def test_a_text_that_cannot_go_on_is_complete_and_a_wrong_token_breaks(vocabulary):
    word = matcher(vocabulary, "regex", "yes|no")
    assert [word.accept(byte) for byte in b"yes"] == [State.OPEN, State.OPEN, State.COMPLETE]
    other = matcher(vocabulary, "regex", "yes|no")
    assert other.accept(ord("x")) is State.BROKEN
    with pytest.raises(GrammarFailed):
        other.allowed(NO_END)


def test_an_end_of_sequence_completes(vocabulary):
    digits = matcher(vocabulary, "regex", "[0-9]+")
    assert [digits.accept(token) for token in (49, 258)] == [State.OPEN, State.COMPLETE]


def test_a_copy_goes_its_own_way(vocabulary):
    first = matcher(vocabulary, "regex", "a[bc]d")
    first.accept(ord("a"))
    second = first.copy()
    first.accept(ord("b"))
    assert after(first, "") == {"d"}
    assert after(second, "") == {"b", "c"}


def test_documents_are_followed_through_strings_of_several_bytes_a_character(vocabulary):
    person = matcher(vocabulary, "json", json.dumps(PERSON))
    text = json.dumps({"name": "Zoë 日", "age": 41}, ensure_ascii=False)
    states = [person.accept(byte) for byte in text.encode()]
    assert set(states[:-1]) == {State.OPEN}
    assert states[-1] is State.COMPLETE


def test_white_space_in_documents_is_bounded(vocabulary):
    indented = json.dumps({"name": "x", "age": 1}, indent=2)
    assert matcher(vocabulary, "json", json.dumps(PERSON)).accept_all(list(indented.encode()))
    assert not matcher(vocabulary, "json", json.dumps(PERSON)).accept_all(list(b"{  "))


def test_special_tokens_and_ids_without_bytes_are_never_allowed():
    padded = Vocabulary.load(bundled.path(), 300, (258, 256))
    anything = matcher(padded, "regex", "(?s:.)+")
    allowed = set(ids_of(anything.allowed(NO_END)))
    assert allowed
    assert max(allowed) < 256
    anything.accept(ord("x"))
    assert set(ids_of(anything.allowed(NO_END))) - set(range(256)) == {256, 258}
    assert len(anything.allowed(NO_END)) == mask_bytes(300) == 40


def test_a_model_without_an_end_ends_where_nothing_may_follow():
    endless = Vocabulary([bytes([byte]) for byte in range(256)], (), list)
    digits = matcher(endless, "regex", "[0-9]{2}")
    assert digits.accept(49) is State.OPEN
    assert set(ids_of(digits.allowed(NO_END))) == set(b"0123456789")
    assert digits.accept(49) is State.COMPLETE


def test_the_tokens_of_a_wordy_vocabulary_may_span_parts_of_a_grammar():
    spellings = [b"1", b"12", b"2,", b",", b"x", b"", b'"', b'{"a']
    wordy = Vocabulary(spellings, (5,), lambda text: [])
    pairs = matcher(wordy, "regex", "[0-9]+,[0-9]")
    assert set(ids_of(pairs.allowed(NO_END))) == {0, 1, 2}
    assert pairs.accept(2) is State.OPEN
    assert set(ids_of(pairs.allowed(NO_END))) == {0}


# What is refused, and when


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("regex", "[", "unclosed character class"),
        ("regex", "a(?=b)", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("json", "nonsense", "expected"),
        ("json", "[]", "Expecting object schema"),
        ("json", '{"type":"objekt"}', "Invalid type: objekt"),
        ("json", '{"allOf":[false]}', "Unsatisfiable"),
        ("json", '{"$ref":"file:///etc/passwd"}', "not present"),
        ("lark", 'start: "a', "lexer error"),
        ("lark", "start: other", "other"),
    ],
)
def test_a_wrong_grammar_is_refused_with_a_reason(checker, vocabulary, kind, text, reason):
    assert reason in checker.check(Grammar(kind, text))
    with pytest.raises(GrammarRefused, match=reason):
        matcher(vocabulary, kind, text)


@pytest.mark.parametrize(
    "text",
    ["(a+)+b", "(a|aa)+", "(x+x+)+y", "(.*.*.*)x", "(a*)*b", "([a-zA-Z]+)*1", "(.*a){20}"],
)
def test_expressions_that_harm_others_are_harmless(checker, text):
    assert checker.check(Grammar("regex", text)) is None  # 2 ms of the 500 that it has


ENDLESS = '{"allOf":[{"multipleOf":7919},{"multipleOf":7907},{"multipleOf":7901}]}'
"""Compiles for 22 s of CPU time and then has no more memory."""


def cpu_seconds():
    """Of the checking processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu_of(pid):
    """The seconds of a process that runs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        # What a process with 30 s says of them and how long that takes: far from DEADLINE_S, or
        # the same as at DEADLINE_S, so that no machine is quick enough to take one.
        ("regex", "(a?)" * 16000),  # too many expressions: 2.2 s
        ("regex", "a*" * 30000),  # no more memory: 6 s
        ("regex", "(" * 20000 + "a" + ")" * 20000),  # nested too deep: 0.01 s
        ("lark", "start: " + "(" * 30000 + '"a"' + ")" * 30000),  # nested too deep: 0.03 s
        ("lark", rules(4500)),  # no more stack: 0.02 s
        ("json", definitions(2500)),  # no more stack: 0.02 s
        ("json", '{"type":"array","items":' * 500 + "{}" + "}" * 500),  # nested too deep: 0 s
        ("json", ENDLESS),  # no more memory: 22 s
    ],
    ids=lambda value: value[:24],
)
def test_what_hangs_or_crashes_is_refused_in_time(checker, kind, text):
    assert len(text) <= MAX_GRAMMAR_CHARS
    checker.check(DIGITS)  # whatever came before, the process is there
    before = cpu_seconds()
    assert checker.check(Grammar(kind, text)) is not None
    assert cpu_seconds() - before < DEADLINE_S + 3.0  # it took less than 1 s to start, too
    assert checker.check(DIGITS) is None


def test_time_is_the_processs_own_and_its_end_is_the_grammars():
    one = Checker(0.05)
    assert one.check(DIGITS) is None
    before = cpu_seconds()
    assert one.check(Grammar("regex", "((a{100}){100}){100}")) == "it takes too long to compile"
    assert cpu_seconds() > before  # the process has ended
    assert one.check(Grammar("json", ENDLESS)) == "it takes too long to compile"
    assert one.check(DIGITS) is None
    one.close()


def test_many_grammars_have_their_time_each():
    one = Checker(0.05)
    assert one.check(DIGITS) is None
    process = one._process
    words = "|".join(f"word{number}" for number in range(500))
    enough = cpu_of(process.pid) + 0.25
    while cpu_of(process.pid) < enough:  # 2 ms each, together five times what one may have
        assert one.check(Grammar("regex", words)) is None
    assert one._process is process
    one.close()


def test_a_process_that_does_nothing_is_not_waited_for():
    one = Checker()
    assert one.check(DIGITS) is None
    one._patience_s = 0.2
    os.kill(one._process.pid, signal.SIGSTOP)
    assert one.check(DIGITS) == "it takes too long to compile"
    one._patience_s = PATIENCE_S
    assert one.check(DIGITS) is None
    one.close()


def test_huge_alternations_are_taken(checker, vocabulary):
    words = "|".join(f"word{number}" for number in range(6000))
    assert checker.check(Grammar("regex", words)) is None  # 20 ms of the 500 that it has
    assert after(matcher(vocabulary, "regex", words), "word599") >= {"0", "9"}


# In threads


@pytest.fixture
def grammars():
    loads = []

    def load():
        loads.append(1)
        return Vocabulary.load(bundled.path(), 259, (258, 256))

    one = Grammars(load)
    yield one
    one.close()
    assert len(loads) <= 1


def results(grammars, num, timeout_s=60.0):
    """So many of what is opened and of what is masked."""
    opened, masks, deadline = [], [], time.monotonic() + timeout_s
    while len(opened) + len(masks) < num and time.monotonic() < deadline:
        select.select([grammars.wake], [], [], 0.1)
        more_opened, more_masks = grammars.results()
        opened += more_opened
        masks += more_masks
    return opened, masks


def test_a_grammar_is_compiled_once_and_each_gets_a_matcher_of_its_own(grammars):
    assert grammars.open("a", DIGITS) is None
    assert grammars.open("b", DIGITS) is None
    opened, _ = results(grammars, 2)
    assert [one.ticket for one in opened] == ["a", "b"]
    opened[0].matcher.accept(ord("1"))
    again = grammars.open("c", DIGITS)
    for one in (opened[1], again):
        assert after(one.matcher, "") == set("0123456789")


def test_a_bad_grammar_is_refused_with_its_ticket_and_the_next_is_taken(grammars):
    grammars.open("bad", Grammar("json", definitions(2500)))
    grammars.open("good", DIGITS)
    opened, _ = results(grammars, 2)
    found = {one.ticket: one for one in opened}
    assert found["bad"].matcher is None
    assert found["bad"].reason == "it is too complex"
    assert found["good"].matcher is not None


def test_opening_never_waits(grammars, monkeypatch):
    may_check = threading.Event()
    check = Checker.check

    def check_later(self, grammar):
        assert may_check.wait(60)
        return check(self, grammar)

    monkeypatch.setattr(Checker, "check", check_later)
    assert grammars.open("slow", DIGITS) is None
    assert grammars.results() == ([], [])
    may_check.set()
    assert results(grammars, 1)[0][0].matcher is not None


def test_a_grammar_that_takes_too_long_is_told_so(grammars):
    grammars.open("slow", Grammar("json", ENDLESS))
    assert results(grammars, 1)[0][0].reason == "it takes too long to compile"


def test_who_has_gone_is_told_nothing_and_the_grammar_is_kept(grammars):
    grammars.open("gone", DIGITS)
    grammars.forget_tickets()
    deadline = time.monotonic() + 60
    while grammars.open("new", DIGITS) is None and time.monotonic() < deadline:
        assert all(one.ticket == "new" for one in grammars.results()[0])
        time.sleep(0.01)
    assert grammars.open("newer", DIGITS).matcher is not None


def test_the_grammars_used_last_are_kept(grammars, monkeypatch):
    monkeypatch.setattr("deployments.grammars.MAX_CACHED_CHARS", 30)
    texts = [f"[0-9]{{{number}}}abcdef" for number in range(1, 5)]
    for text in texts:
        grammars.open(text, Grammar("regex", text))
        results(grammars, 1)
    assert grammars.open("x", Grammar("regex", texts[-1])) is not None
    assert grammars.open("x", Grammar("regex", texts[0])) is None
    results(grammars, 1)


def test_masks_of_many_rows_come_in_their_order(grammars, vocabulary):
    letters = [chr(ord("a") + number % 26) for number in range(30)]
    rows = [(matcher(vocabulary, "regex", letter), NO_END) for letter in letters]
    rows[7] = None
    grammars.ask(Masks("step", 259, rows))
    _, [masks] = results(grammars, 1)
    wanted = [[ord(letter)] for letter in letters]
    got = [list(ids_of(bits)) for bits in masks.bits]
    assert got[:7] + got[8:] == wanted[:7] + wanted[8:]
    assert masks.bits[7] == everything(259)
    assert (masks.ticket, masks.failed) == ("step", [])


def test_a_matcher_that_fails_is_named_and_bars_nothing(grammars, vocabulary):
    broken = matcher(vocabulary, "regex", "a")
    broken.accept(ord("b"))
    grammars.ask(Masks(1, 259, [(matcher(vocabulary, "regex", "a"), NO_END), (broken, NO_END)]))
    _, [masks] = results(grammars, 1)
    assert masks.failed == [1]
    assert masks.bits[1] == everything(259)
    assert list(ids_of(masks.bits[0])) == [97]


def test_a_mask_that_takes_too_long_fails_its_row(grammars, vocabulary, monkeypatch):
    monkeypatch.setattr("deployments.grammars.MAX_MASK_S", -1.0)
    grammars.ask(Masks(1, 259, [(matcher(vocabulary, "regex", "a"), NO_END)]))
    assert results(grammars, 1)[1][0].failed == [0]
