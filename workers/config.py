"""What an engine is told once, when it starts: one frozen, flat tree, checked where it is made.

The same names are command-line flags (`--tp-size 2`), arguments of `serve run
deployments.app:build_app tp_size=2`, keys of Serve's YAML `args:`, Helm values and keyword
arguments of `LLM`. This is also the one file that reads environment variables.

    >>> EngineConfig(tp_size=2).layout.world_size
    2
    >>> EngineConfig(page_size=24)
    Traceback (most recent call last):
    ...
    ValueError: page_size=24 must be a power of two from 1 to 256
"""

import math
import os
import random
import socket
from pathlib import Path
from typing import Literal

from msgspec import Struct

from parallel.layout import Layout
from parallel.plan import PlanSettings


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a driver and its workers agree on. The docstring under a field is its help text."""

    model: str = ""
    """Folder with config.json, tokenizer.json and safetensors files; empty: the bundled model."""
    tp_size: int = 1
    """Ranks a replica's weights are split over."""
    dp_size: int = 1
    """Data-parallel replicas, each with its own requests and pages."""
    enable_dp_attention: bool = False
    """Make the dp_size replicas parts of the tp_size ranks, with shared MLPs and experts."""
    ep_size: int = 1
    """Ranks that experts are spread over as wholes; tp_size / ep_size ranks split each."""
    moe_dp_size: int = 1
    """Copies of all experts, each for its share of the ranks (with moe_a2a_backend=torch)."""
    moe_dense_tp_size: int | None = None
    """Ranks a dense layer is split over: tp_size (also if unset), 1, or those of attn_tp."""
    moe_a2a_backend: Literal["none", "torch"] = "none"
    """How rows reach experts: none gathers all everywhere, torch sends each where it goes."""
    enable_dp_lm_head: bool = False
    """Split the head within each attention replica: more memory, no logits between replicas."""
    disable_attn_tp_gather: bool = False
    """Attention gathers rows itself, so none are padded to its ranks; for models that can."""
    attn_cp_size: int = 1
    """Parts a replica's rows are split into; the tp_size ranks are dp_size x this x attn_tp."""
    page_size: int = 16
    """Tokens in a page of the key-value cache."""
    max_num_seqs: int = 256
    """Requests of one replica that may run at once."""
    max_num_batched_tokens: int = 8192
    """Tokens one replica may compute in one step."""
    prefill_graph_max_tokens: int | None = None
    """CUDA graphs for steps with prompts of up to so many tokens; 0: none; unset: where quicker."""
    max_queued_requests: int = 4096
    """Requests that may wait for a slot; one more is answered 429."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; unset: the model's. V3.2 decodes score so many."""
    kv_cache_gb: float | None = None
    """Memory for keys and values on each rank, in GiB; unset takes what is free (CPU: 1 GiB)."""
    kv_cache_dtype: Literal["auto", "fp8_e4m3"] = "auto"
    """Type of stored keys and values; auto is the model's, fp8_e4m3 holds twice as many tokens."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory for weights, cache and workspaces together."""
    enable_prefix_caching: bool = True
    """Let requests share the pages of equal beginnings."""
    enable_symm_mem: bool = False
    """Keep what collectives read and write in memory that NCCL's symmetric kernels can use."""
    symm_mem_prealloc_gb: float = 4.0
    """Most that each rank may set aside for that, in GiB, out of its share of the GPU's memory."""
    symm_mem_strict: bool = False
    """End the step, instead of counting it, when a collective's memory is not symmetric."""
    all_reduce: Literal["auto", "nccl"] = "auto"
    """How GPUs sum rows: auto measures all ways at each start (see README), nccl takes NCCL's."""
    padding: Literal["auto", "rule", "max_len", "sum_len"] = "rule"
    """Rows of attention replicas: by the rule, by cost measured at each start, or always alike."""
    prefill_delayer_max_delay_passes: int = 0
    """Steps a prompt may wait for those that queue on other attention replicas; 0: it begins."""
    prefill_decode_interval: int = 0
    """Steps of decodes alone that follow a step full of prompts; after smaller ones, fewer."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; auto is the checkpoint's on a GPU and float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes GPUs where there are enough."""
    num_nodes: int = 1
    """Machines the ranks are spread over, evenly."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy makes random weights from config.json alone, to measure speed without a checkpoint."""
    seed: int = 0
    """Seeds dummy weights, and requests that bring no seed of their own."""
    overlap: bool = True
    """Send the next step's plan before this step's tokens are back."""
    step_timeout_s: float = 60.0
    """A step without all acks for so long is a hang: late ranks are named, all start again."""
    start_timeout_s: float = 1800.0
    """Longest time from starting the ranks to their being ready."""
    max_restarts: int = 5
    """Times the ranks may be lost within ten minutes before the engine gives up for good."""
    beat_ms: int = 250
    """Heartbeat period between workers, driver and ingress; eight missed beats are a death."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError(f"{name}={value} must be a number of 64 bits")
        if self.page_size not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            raise ValueError(f"page_size={self.page_size} must be a power of two from 1 to 256")
        for name in (
            *("max_num_seqs", "max_num_batched_tokens", "max_queued_requests"),
            *("num_nodes", "beat_ms"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in (
            *("max_restarts", "prefill_delayer_max_delay_passes", "prefill_decode_interval"),
            "prefill_graph_max_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(f"max_model_len={self.max_model_len} must be at least 2")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs="
                f"{self.max_num_seqs}: a step must have room for one token of every request; "
                f"raise the first to {self.max_num_seqs} or lower the second"
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} must be above 0, at most 1"
            )
        if self.symm_mem_strict and not self.enable_symm_mem:
            raise ValueError("symm_mem_strict needs enable_symm_mem: set that too")
        for name in ("kv_cache_gb", "symm_mem_prealloc_gb", "step_timeout_s", "start_timeout_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0")
        if self.layout.world_size % self.num_nodes:
            raise ValueError(
                f"{self.layout.world_size} ranks do not spread evenly over num_nodes="
                f"{self.num_nodes}: choose a number of nodes that divides them"
            )

    @property
    def layout(self) -> Layout:
        return Layout(
            tp_size=self.tp_size,
            dp_size=self.dp_size,
            enable_dp_attention=self.enable_dp_attention,
            attn_cp_size=self.attn_cp_size,
            ep_size=self.ep_size,
            moe_dp_size=self.moe_dp_size,
            moe_dense_tp_size=self.moe_dense_tp_size,
        )

    @property
    def plan_settings(self) -> PlanSettings:
        """What the collective plan depends on beside the layout."""
        return PlanSettings(
            enable_dp_lm_head=self.enable_dp_lm_head,
            moe_a2a_backend=self.moe_a2a_backend,
            disable_attn_tp_gather=self.disable_attn_tp_gather,
        )

    @property
    def ranks_per_node(self) -> int:
        return self.layout.world_size // self.num_nodes


class Failpoint(Struct, frozen=True):
    """A planted fault, for tests: at `step` of `epoch`, `rank` does what `action` says.

    With a `stage` it happens while the rank starts, before any step: at `join`, `register` (the
    arena, on each communicator), or what it reports (`weights`, `measure`, `graphs`).
    """

    action: Literal[
        "kill",
        "stop",
        "skip_collective",
        "corrupt_ids",
        "slow",
        "raise",
        "skip_step",
        "poison",
        "foreign_slot",
        "shifted_slot",
        "late_registration",
        "other_plan",
    ]
    rank: int
    step: int = 0
    epoch: int = 1
    stage: str = ""


class Environment(Struct, frozen=True, kw_only=True):
    """What Lockstep reads from environment variables, all of it."""

    cache_dir: Path
    """`LOCKSTEP_CACHE_DIR`: compiled kernels and tables; default ~/.cache/lockstep."""
    failpoints: str
    """`LOCKSTEP_FAILPOINTS`: a JSON list of `Failpoint`, read by workers; empty in production."""

    @classmethod
    def read(cls) -> "Environment":
        default = Path.home() / ".cache" / "lockstep"
        return cls(
            cache_dir=Path(os.environ.get("LOCKSTEP_CACHE_DIR", str(default))),
            failpoints=os.environ.get("LOCKSTEP_FAILPOINTS", ""),
        )


PASSED_ON = ("NCCL_", "TORCH_SYMM_MEM_", "TORCH_NCCL_", "NVSHMEM_", "GLOO_", "CUDA_")


def passed_on_environment() -> dict[str, str]:
    """Variables of the driver's process that its ranks on other nodes must see too."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    kept.pop("CUDA_VISIBLE_DEVICES", None)  # a rank's own, never its driver's
    return kept | {"PYTHONPATH": _python_path()}


RANK_SETTINGS = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
"""What torch reads in a rank. Its symmetric memory would build a multicast object at every
rendezvous, which fails, or hangs all ranks, where NVLink's multicast does not work; sums here do
without it."""


def rank_environment() -> dict[str, str]:
    """The environment of a process that is, or forks, ranks: what is set here already stays."""
    return RANK_SETTINGS | os.environ


def _python_path() -> str:
    """The folder of our packages before what the driver has: another `kernels` must not win."""
    ours = str(Path(__file__).resolve().parent.parent)
    rest = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.pathsep.join([ours, *(path for path in rest if path != ours)])


def count_local_gpus() -> int:
    """GPUs of this machine that this process may use, without waking CUDA."""
    devices = [name for name in os.listdir("/dev") if name.startswith("nvidia")]
    present = sum(name.removeprefix("nvidia").isdigit() for name in devices)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(
        present, len([each for each in visible.split(",") if each.strip() not in ("", "-1")])
    )


RAY_SETTINGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",  # for a client that is slow to send, not to be told
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # after 5 s Serve would kill a slow start
    # Every change of what Serve routes to is a new HAProxy; the old one ends its streams, and would
    # be killed after two minutes, whatever they still had to say.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
}
"""What Ray's processes must find in their environment from the start (see the README)."""


def set_ray_environment() -> None:
    """Set what Ray reads when it starts, unless the operator has chosen otherwise."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)


SERVE_PORTS = (
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
)
"""Serve's own: by default the same on every machine, and opened so that two clusters can share
them, whereupon one answers what the other is asked."""


def set_serve_ports() -> None:
    """Give a Serve that is started here ports that nobody listens on, unless the operator has.

    They are below those that the kernel gives to outgoing connections.
    """
    free = filter(is_free, random.sample(range(20_000, 30_000), 1000))
    for name in SERVE_PORTS:
        os.environ.setdefault(name, str(next(free)))


def is_free(port: int) -> bool:
    """Whether nobody listens on it, on any address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def ray_address() -> str:
    """`RAY_ADDRESS`: a cluster to join; empty starts one on this machine."""
    return os.environ.get("RAY_ADDRESS", "")
