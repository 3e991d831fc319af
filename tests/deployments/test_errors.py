import pytest

from deployments import errors


def every_error() -> list[errors.ServiceError]:
    return [
        errors.ServiceError("secret"),
        errors.RequestError("n=9 is over the limit of 8", param="n"),
        errors.Unauthorized(),
        errors.NotFound("no such route"),
        errors.MethodNotAllowed("POST"),
        errors.RequestTimeout(),
        errors.TooLarge(4),
        errors.UnsupportedMediaType(),
        errors.Overloaded("secret"),
        errors.EngineUnavailable("secret"),
        errors.ClusterError("secret"),
        errors.ClusterTooSmall(4, 2, "GPU"),
    ]


def test_each_error_has_its_status():
    statuses = [error.status for error in every_error()]
    assert statuses == [500, 400, 401, 404, 405, 408, 413, 415, 429, 503, 503, 503]


@pytest.mark.parametrize("error", every_error(), ids=lambda e: type(e).__name__)
def test_the_body_has_openais_shape(error):
    body = error.body()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"].endswith((".", "8", "route"))


@pytest.mark.parametrize("error", every_error(), ids=lambda e: type(e).__name__)
def test_our_own_faults_are_not_quoted_to_clients(error):
    assert "secret" not in str(error.body())
    assert "GPU" not in str(error.body())


def test_an_operator_is_told_what_is_missing():
    error = errors.ClusterTooSmall(4, 2, "GPU")
    assert str(error) == "needs 4 GPUs on one node; the largest node has 2 free"
    assert str(errors.ClusterTooSmall(1, 0, "GPU")) == (
        "needs 1 GPU on one node; the largest node has 0 free"
    )


def test_who_may_try_again_is_told_when():
    assert [error.retry_after_s for error in every_error()] == [
        *(None for _ in range(8)),
        1,
        5,
        30,
        30,
    ]
