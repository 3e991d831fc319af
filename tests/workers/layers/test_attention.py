"""What an attention back end is handed."""

import torch

from parallel.dp_attention import Activation
from parallel.layout import Layout
from parallel.plan import Rows
from parallel.thread_world import run_thread_world
from tests.workers.layers.tiny import build_on
from workers.batch import HeadAttention
from workers.layers.attention import SelfAttention
from workers.layers.rotary import RotaryTable
from workers.weights import Source


class Recorder(HeadAttention):
    """An attention that answers with the queries and remembers its arguments."""

    def attend(self, layer, q_THD, k_TGD, v_TGD, *, scale, sliding_window):
        self.shapes = [tuple(x.shape) for x in (q_THD, k_TGD, v_TGD)]
        self.settings = (layer, scale, sliding_window)
        return q_THD


def test_the_back_end_gets_this_ranks_heads_and_the_layers_settings():
    def body(rank, groups):
        build = build_on(groups)
        layer = SelfAttention(
            build, 3, qkv_bias=True, out_bias=True, qk_norm=True, sliding_window=16
        )
        sources = [source for source in layer.sources() if isinstance(source, Source)]
        for source in sources:
            for part in source.parts:
                part.into.fill_(0.1)
        rotary = RotaryTable(build.config.rope, 8, 64, build.device, build.dtype)
        recorder = Recorder()
        x = Activation(torch.ones(5, 32), Rows.TP_ATTN_FULL)
        out = layer.forward(x, rotary.at(torch.arange(5)), recorder, None)
        return recorder.shapes, recorder.settings, out

    for shapes, settings, out in run_thread_world(Layout(tp_size=4), body):
        assert shapes == [(5, 1, 8)] * 3
        assert settings == (3, 8**-0.5, 16)
        assert out.tensor.shape == (5, 32)
        assert out.owed.name == "attn_tp"
