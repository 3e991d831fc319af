"""What a trace says of a request."""

from hypothesis import given
from hypothesis import strategies as st

from deployments.counting import Outcome
from deployments.generations import Course, GenerateSpec
from deployments.request_plan import Plan
from deployments.schemas import PromptTokensDetails, Usage
from deployments.spans import MAX_TRACED, Exchanged, Work, phases, request_span
from workers.protocol import Sampling, pack

MOMENTS = st.floats(-1e6, 1e6)


@given(
    times=st.lists(MOMENTS, min_size=2, max_size=2),
    accepted_at=MOMENTS,
    sent_at=MOMENTS,
    queue_s=st.floats(0, 1e6),
    first_token_at=MOMENTS,
    ended_at=MOMENTS,
)
def test_phases_follow_each_other_inside_the_request_whatever_the_clocks_said(
    times, accepted_at, sent_at, queue_s, first_token_at, ended_at
):
    start, end = sorted(times)
    course = Course(accepted_at, sent_at, queue_s, first_token_at, ended_at)
    queue, prefill, decode = phases(course, 0, start, end)
    moments = [queue.start, queue.end, prefill.start, prefill.end, decode.start, decode.end]
    assert moments == sorted(moments)
    assert queue.end == prefill.start
    assert prefill.end == decode.start
    assert start <= queue.start
    assert decode.end <= end


def test_phases_are_where_the_clocks_agree():
    course = Course(accepted_at=1, sent_at=2, queue_s=3, first_token_at=7, ended_at=11)
    found = [(span.name, span.start, span.end) for span in phases(course, 0, 0, 20)]
    assert found == [("queue", 1, 5), ("prefill", 5, 7), ("decode", 7, 11)]


def test_nothing_is_known_of_phases_before_a_first_token():
    assert phases(Course(accepted_at=1, sent_at=2, queue_s=3), 0, 0, 20) == ()


def exchanged(**changes):
    known = {
        "method": "POST",
        "route": "/v1/completions",
        "scheme": "http",
        "request_id": "req_1",
        "model": "m",
        "start": 0.0,
        "end": 10.0,
        "status": 200,
        "outcome": Outcome.FINISHED,
    }
    return Exchanged(**(known | changes))


def worked(*courses):
    spec = GenerateSpec(
        prompt=pack([1, 2]), max_tokens=5, stop_token_ids=(), sampling=Sampling(temperature=0.5)
    )
    plan = Plan(
        specs=(spec,) * len(courses),
        prompts=((1, 2),),
        texts=(),
        num_samples=len(courses),
        stops=("secret",),
        num_logprobs=-1,
        is_chat=False,
        echo=False,
        echo_only=False,
        show_prompt_logprobs=False,
        stream=True,
        include_usage=False,
    )
    usage = Usage(2, 5, 7, PromptTokensDetails(1))
    return Work(
        plan=plan, answer_id="cmpl-1", usage=usage, finish_reasons=["stop"], courses=courses
    )


def test_the_request_of_one_generation_has_its_latencies():
    course = Course(accepted_at=1, sent_at=2, queue_s=3, first_token_at=7, ended_at=9)
    told = request_span(exchanged(work=worked(course))).attributes
    assert told["gen_ai.latency.time_in_queue"] == 4
    assert told["gen_ai.latency.time_in_model_prefill"] == 2
    assert told["gen_ai.latency.time_in_model_decode"] == 2
    assert told["gen_ai.latency.time_to_first_token"] == 7
    assert told["gen_ai.latency.e2e"] == 10
    assert "secret" not in str(told)


def test_a_request_of_many_generations_has_spans_for_some():
    courses = [
        Course(accepted_at=1, sent_at=1, first_token_at=9 - n / 9, ended_at=9) for n in range(40)
    ]
    span = request_span(exchanged(work=worked(*courses)))
    assert len(span.children) == 3 * MAX_TRACED
    assert span.attributes["gen_ai.usage.num_sequences"] == 40
    assert span.attributes["gen_ai.latency.time_to_first_token"] == courses[-1].first_token_at
    assert "gen_ai.latency.time_in_queue" not in span.attributes


def test_only_what_the_service_did_wrong_is_an_error():
    ends = {
        (400, Outcome.REJECTED, "invalid"): "",
        (503, Outcome.REJECTED, "engine_unavailable"): "engine_unavailable",
        (200, Outcome.FAILED, "numerical_error"): "numerical_error",
        (200, Outcome.CANCELLED, ""): "",
        (200, Outcome.FINISHED, ""): "",
    }
    for (status, outcome, kind), error in ends.items():
        span = request_span(exchanged(status=status, outcome=outcome, error=kind))
        assert span.error == error
        assert span.attributes.get("error.type", "") == kind
        assert span.attributes["lockstep.outcome"] == outcome


def test_a_made_up_method_is_not_a_name():
    span = request_span(exchanged(method="SECRETS", status=405, outcome=Outcome.REJECTED))
    assert span.name == "HTTP /v1/completions"
    assert span.attributes["http.request.method"] == "_OTHER"
