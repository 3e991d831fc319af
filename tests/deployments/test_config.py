import pytest

from deployments.config import ServiceConfig, ServiceSettings, fields, help_texts
from workers.config import EngineConfig


def test_settings_may_be_strings_as_a_command_line_gives_them():
    config = ServiceConfig.from_args(
        {"tp_size": "2", "enable_prefix_caching": "false", "max_model_len": "128", "port": "9"}
    )
    assert config.engine.tp_size == 2
    assert config.engine.enable_prefix_caching is False
    assert config.engine.max_model_len == 128
    assert config.service.port == 9


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"tp_sise": 2}, "unknown setting `tp_sise`: did you mean `tp_size`?"),
        ({"tp_size": "two"}, r"tp_size='two' is not valid: Expected `int`, got `str`"),
        ({"dtype": "int4"}, r"dtype='int4' is not valid: Invalid enum value 'int4'"),
        ({"page_size": 24}, "page_size=24 must be a power of two from 1 to 256"),
        ({"port": 70000}, "port=70000 must be a port from 0 to 65535"),
        ({"tp_size": 0}, "tp_size=0 must be at least 1"),
        ({"max_queued_requests": 0}, "max_queued_requests=0 must be at least 1"),
        ({"max_restarts": -1}, "max_restarts=-1 must not be negative"),
        (
            {"prefill_delayer_max_delay_passes": -1},
            "prefill_delayer_max_delay_passes=-1 must not be negative",
        ),
        ({"prefill_decode_interval": -1}, "prefill_decode_interval=-1 must not be negative"),
        ({"kv_cache_gb": "nan"}, "kv_cache_gb=nan must be above 0"),
        ({"step_timeout_s": "inf"}, "step_timeout_s=inf must be above 0"),
        ({"seed": str(2**64)}, f"seed={2**64} must be a number of 64 bits"),
        ({"drain_s": "nan"}, "drain_s=nan must be 0 or a number above it"),
        (
            {"max_num_batched_tokens": 8, "max_num_seqs": 16},
            "max_num_batched_tokens=8 is below max_num_seqs=16",
        ),
        ({"tp_size": 3, "num_nodes": 2}, "3 ranks do not spread evenly over num_nodes=2"),
    ],
)
def test_a_bad_setting_says_what_to_change(args, sentence):
    with pytest.raises(ValueError, match=sentence.replace("?", r"\?")):
        ServiceConfig.from_args(args)


@pytest.mark.parametrize("kind", [EngineConfig, ServiceSettings])
def test_every_setting_has_a_help_text(kind):
    assert set(help_texts(kind)) == set(fields(kind))


def test_no_name_stands_in_both_parts():
    assert not set(fields(EngineConfig)) & set(fields(ServiceSettings))
