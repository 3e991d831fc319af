"""Which steps with prompts are worth a graph."""

import pytest

from deployments.presets import PRESETS, write_preset
from parallel.layout import Layout
from tests.workers.test_prefill_graphs import ChecksumModel, new_runner
from workers.architectures import read_model_config
from workers.prompt_buckets import rows_worth_capturing, weights_a_token


def config_of(preset, tmp_path):
    return read_model_config(write_preset(preset, tmp_path))


def test_weights_that_a_token_meets_are_those_of_the_projections(tmp_path):
    layer = 4096 * (32 + 2 * 8 + 32) * 128 + 3 * 4096 * 12288
    assert weights_a_token(config_of("8b", tmp_path)) == 36 * layer


def test_of_experts_those_that_are_chosen_count(tmp_path):
    layer = 2048 * (32 + 2 * 4 + 32) * 128 + 3 * 2048 * 8 * 768
    assert weights_a_token(config_of("30b-a3b", tmp_path)) == 48 * layer


@pytest.mark.parametrize("preset", PRESETS)
def test_more_gpus_or_fewer_weights_keep_the_host_waiting_for_more_rows(preset, tmp_path):
    config = config_of(preset, tmp_path)
    one, two = (rows_worth_capturing(config, Layout(tp_size=size)) for size in (1, 2))
    assert two // 2 in (one, one - 1, one + 1)
    replicas = Layout(tp_size=2, dp_size=2, enable_dp_attention=True)
    assert rows_worth_capturing(config, replicas) == one


def test_an_8b_is_worth_as_many_rows_as_were_measured(tmp_path):
    """25 ms launched against 15 replayed at 512 rows; at 2048 the GPU takes 48."""
    assert 512 < rows_worth_capturing(config_of("8b", tmp_path), Layout()) < 2048


def test_a_cpu_captures_what_is_asked_for_only():
    assert new_runner(ChecksumModel(), prefill_graph_max_tokens=None).prompt_buckets == ()
    assert new_runner(ChecksumModel(), prefill_graph_max_tokens=24).prompt_buckets == (16, 24)
