"""One rank's engine: a model is loaded and measured, warmed up, and then takes steps.

What a start needs is here; a step is `workers.step`'s from its header to its tokens. First the
memory is measured that the largest step takes, which says how many pages there is room for. The
driver answers with what all ranks can have, and `allocate` makes the cache and runs all that a
request could meet, so that the first one finds everything compiled, loaded and captured.

Nothing here talks to the driver (that is `workers.worker`) or knows an architecture.
"""

import gc
from collections.abc import Callable

import torch

from parallel.groups import Groups
from parallel.layout import Layout
from parallel.padding import buckets_up_to, prompt_buckets_up_to
from parallel.padding_cost import PaddingCurves
from workers.architectures import folder_of, plan_of
from workers.cache import bytes_per_page, is_latent, pages_that_fit
from workers.cache_format import format_of
from workers.config import EngineConfig
from workers.expert_load import ExpertTally
from workers.models import Model, build_model, read_model_config
from workers.padding_times import exchanges_of, time_padding
from workers.prompt_buckets import rows_worth_capturing, why_not_captured
from workers.protocol import Admit, Body, Header, Mask, Sampling, pack
from workers.sampling import Sampler
from workers.step import PendingStep, StepResult, StepRunner
from workers.symmetric import open_arena, open_sums_of
from workers.transfers import Transfers
from workers.weights import dummy_weights, load_weights

GIB = 2**30
CPU_CACHE_GB = 1.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRAPH_BYTES = 8 * 2**20
"""What each graph takes for its nodes."""
WARM_UP_LENGTHS = (
    *(3, 20, 40, 60, 80, 100, 130, 160, 200, 250, 300, 350, 400, 450, 500, 600, 700, 800, 900),
    *(1000, 1200, 1400, 1700, 2000, 2500, 3000, 3500, 4000, 5000, 6000, 7000, 8000),
)
"""Prompts that a GPU reads before it is ready. Kernels are compiled for few and for many rows, and
cuBLAS loads another kernel for nearly each of these: while one is loaded the GPU stands still."""

ReportProgress = Callable[[str, int, int], None]
"""(stage, done, total)"""
MakeModel = Callable[[EngineConfig, Layout, int, Groups, torch.device, ReportProgress], Model]


def load_model(
    config: EngineConfig,
    layout: Layout,
    rank: int,
    groups: Groups,
    device: torch.device,
    progress: ReportProgress,
) -> Model:
    """This rank's part of the configured model, with its weights."""
    folder = folder_of(config)
    model_config = read_model_config(folder)
    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else model_config.dtype
    if config.enable_symm_mem:
        open_arena(config, model_config, plan_of(config), groups, device, DTYPES[name])
    open_sums_of(config, model_config, plan_of(config), groups, device, DTYPES[name])
    model = build_model(model_config, groups, device, DTYPES[name], config.plan_settings)
    if config.load_format == "dummy":
        dummy_weights(model, config.seed)
    else:
        load_weights(model, folder, progress)
    return model


class ModelRunner:
    """The model, its cache and its sampler on one rank."""

    def __init__(
        self,
        config: EngineConfig,
        layout: Layout,
        rank: int,
        groups: Groups,
        device: torch.device,
        progress: ReportProgress,
        make_model: MakeModel = load_model,
        use_kernels: bool | None = None,
    ) -> None:
        """`use_kernels` is for tests: Triton's interpreter can run on a CPU what a GPU runs."""
        self._config, self._groups, self._device = config, groups, device
        self._use_kernels = device.type == "cuda" if use_kernels is None else use_kernels
        self._report = progress
        self._memory: dict[str, int] = {}
        self._transfers = Transfers(device)
        self._num_replicas = layout.num_replicas
        self._row_multiple = plan_of(config).row_multiple
        self.buckets = (
            buckets_up_to(config.max_num_seqs, self._row_multiple) if self._use_kernels else ()
        )
        """Rows of a replica for which a decode is captured."""
        self.prompt_buckets: tuple[int, ...] = ()
        """Rows of a replica for which a step with prompts is captured."""
        self.captured = b""
        """Digests of the graphs' collectives; empty where nothing is captured."""
        with torch.inference_mode():
            self._model = make_model(config, layout, rank, groups, device, progress)
        if self._use_kernels and config.prefill_graph_max_tokens != 0:
            self.prompt_buckets = self._choose_prompt_buckets(layout, tells=rank == 0)
        self._cache_format = format_of(config.kv_cache_dtype, self._model, device)
        if rank == 0 and self._cache_format.lacks_scales:
            print(
                "kv_cache_dtype=fp8_e4m3: the checkpoint has no k_scale and v_scale, so keys and "
                "values are stored as they are, up to 448",
                flush=True,
            )
        self._expert_tally = ExpertTally(self._model, config, groups, self._transfers.fetch)
        self.padding_curves: PaddingCurves | None = None
        if config.padding == "auto" and exchanges_of(plan_of(config)):
            with torch.inference_mode():
                self.padding_curves = time_padding(config, plan_of(config), self._model, groups)
        self.vocab_size = self._model.vocab_size
        self.stop_token_ids = self._model.stop_token_ids
        self.max_model_len = _limit_of(config, self._model)
        progress("measure", 0, 1)
        self.max_pages = self._count_pages()
        self._fit_max_model_len()
        progress("measure", 1, 1)

    def allocate(self, num_pages: int) -> None:
        """Make the cache and run a request through it, so that the first step finds all warm."""
        if not 0 < num_pages <= self.max_pages:
            raise ValueError(f"num_pages={num_pages} must be from 1 to max_pages={self.max_pages}")
        self._steps = steps = self._new_steps(num_pages)
        page_size = self._config.page_size
        steps.run(_reading([_dummy_admit(0, 1, page_size)]))
        if self.max_model_len > 1 and page_size > 1:
            steps.run(Body())
        steps.cache.clear([0])
        steps.forget()
        if self._device.type == "cuda":
            most = min(
                self._config.max_num_batched_tokens, self.max_model_len, num_pages * page_size
            )
            for length in WARM_UP_LENGTHS:
                if length <= most:
                    steps.run(_reading([_dummy_admit(0, length, page_size)]))
                    steps.forget()
        if self.buckets:
            self.captured = steps.capture(lambda done, total: self._report("graphs", done, total))
        if self._device.type == "cuda":
            from kernels.launch import tell_of_compilations

            print(self._memory_table(num_pages), flush=True)
            tell_of_compilations(_complain_of_compilation)

    def _choose_prompt_buckets(self, layout: Layout, *, tells: bool) -> tuple[int, ...]:
        """None where the forward pass of a step with prompts cannot be captured."""
        config, most = self._config, self._config.prefill_graph_max_tokens
        why = why_not_captured(
            attn_cp_size=config.attn_cp_size, is_latent=is_latent(self._model.cache_shapes)
        )
        if why:
            if tells and most is not None:
                said = f"prefill_graph_max_tokens: steps with prompts have no graphs, {why}"
                print(said, flush=True)
            return ()
        if most is None:
            if self._device.type != "cuda":
                return ()
            most = rows_worth_capturing(read_model_config(folder_of(config)), layout)
        most = min(most, config.max_num_batched_tokens)
        return prompt_buckets_up_to(most, self._row_multiple)

    def launch(self, header: Header, body: Body, replica: int) -> PendingStep:
        """Queue a step. A body that this rank cannot obey is a `ProtocolError`."""
        return self._steps.launch(header, body, replica)

    def mask(self, pending: PendingStep, mask: Mask) -> None:
        """Sample the rows of a step whose body announced this mask."""
        self._steps.mask(pending, mask)

    def is_done(self, pending: PendingStep) -> bool:
        """Whether `finish` would return without waiting."""
        return self._steps.is_done(pending)

    def finish(self, pending: PendingStep) -> StepResult:
        """Wait for a step's tokens."""
        return self._steps.finish(pending)

    def _new_steps(self, num_pages: int) -> StepRunner:
        return StepRunner(
            self._model,
            self._config,
            self._groups,
            self._transfers,
            self._expert_tally,
            self._cache_format,
            num_replicas=self._num_replicas,
            row_multiple=self._row_multiple,
            max_model_len=self.max_model_len,
            num_pages=num_pages,
            buckets=self.buckets,
            prompt_buckets=self.prompt_buckets,
            use_kernels=self._use_kernels,
        )

    def _page_bytes(self) -> int:
        return bytes_per_page(
            self._model.num_layers,
            self._model.cache_shapes,
            page_size=self._config.page_size,
            dtype=self._cache_format.dtype,
        )

    def _count_pages(self) -> int:
        """Pages there is memory for, as far as requests could ever fill them."""
        cache_gb = self._config.kv_cache_gb
        if cache_gb is None and self._device.type == "cpu":
            cache_gb = CPU_CACHE_GB
        num_bytes = self._measure_free_bytes() if cache_gb is None else int(cache_gb * GIB)
        most = self._config.max_num_seqs * self._num_pages_for(self.max_model_len)
        return pages_that_fit(num_bytes, self._page_bytes(), most=most)

    def _fit_max_model_len(self) -> None:
        """A limit that was asked for must fit into the cache; the model's own is lowered."""
        room = self.max_pages * self._config.page_size
        if self.max_model_len <= room:
            return
        if self._config.max_model_len is not None or room < 2:
            raise ValueError(
                f"max_model_len={self.max_model_len} needs "
                f"{self._num_pages_for(self.max_model_len)} pages of {self._page_bytes()} bytes "
                f"and the cache holds {self.max_pages}: raise kv_cache_gb or lower max_model_len"
            )
        self.max_model_len = room

    def _num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.page_size)

    def _measure_free_bytes(self) -> int:
        """What the largest step leaves of this rank's share of the GPU."""
        num_seqs = self._config.max_num_seqs
        length = min(self._config.max_num_batched_tokens // num_seqs, self.max_model_len)
        steps = self._new_steps(self._num_pages_for(length))
        admits = [_dummy_admit(slot, length, self._config.page_size) for slot in range(num_seqs)]
        torch.cuda.reset_peak_memory_stats(self._device)
        steps.run(_reading(admits))
        peak = torch.cuda.max_memory_allocated(self._device) - steps.cache.num_bytes
        graph_bytes = self._measure_graphs(steps)
        unmeasured = steps.unmeasured_bytes
        del steps
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        others = total - free - torch.cuda.memory_reserved(self._device)
        counts = Sampler.penalty_bytes(num_seqs, self.vocab_size)
        self._memory = {
            "other": others,
            "weights": torch.cuda.memory_allocated(self._device),
            "largest step": peak - torch.cuda.memory_allocated(self._device) + unmeasured,
            "graphs": graph_bytes,
            "penalty counts": counts,
        }
        usable = int(total * self._config.gpu_memory_utilization)
        return usable - sum(self._memory.values()) - self._page_bytes()

    def _measure_graphs(self, steps: StepRunner) -> int:
        """What graphs take: the largest are measured, the others live in their memory, but for what
        they say that they keep."""
        if not self.buckets:
            return 0
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        before, _ = torch.cuda.mem_get_info(self._device)
        kinds = steps.capture_largest()
        after, _ = torch.cuda.mem_get_info(self._device)
        num_graphs = sum(len(kind.buckets) for kind in kinds)
        kept = sum(kind.bytes_of_others for kind in kinds)
        return max(0, before - after) + GRAPH_BYTES * num_graphs + kept

    def _memory_table(self, num_pages: int) -> str:
        """Where this rank's memory goes, in GiB: measured, except for the cache."""
        rows = {**self._memory, "cache": num_pages * self._page_bytes()}
        free, total = torch.cuda.mem_get_info(self._device)
        rows |= {"free": free, "total": total}
        lines = [f"{name:16s}{size / GIB:9.2f} GiB" for name, size in rows.items()]
        num_tokens = num_pages * self._config.page_size
        return "\n".join([f"memory, {num_pages} pages for {num_tokens} tokens:", *lines])


def _complain_of_compilation(kernel: str, seconds: float) -> None:
    print(
        f"the kernel {kernel} was compiled after ready and a step waited {seconds:.2f} s for it; "
        "please report it with the model and the settings",
        flush=True,
    )


def _limit_of(config: EngineConfig, model: Model) -> int:
    """The longest sequence that is asked for, which the model must be able to read."""
    if config.max_model_len is None:
        return model.max_position_embeddings
    if config.max_model_len > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len={config.max_model_len} is more than the "
            f"{model.max_position_embeddings} positions of this model: lower it"
        )
    return config.max_model_len


def _dummy_admit(slot: int, length: int, page_size: int) -> Admit:
    """A request to warm up with: it goes through all of sampling, on the first pages."""
    return Admit(
        slot,
        pack([0] * length),
        length,
        0,
        pack(range(-(-length // page_size))),
        Sampling(top_p=0.9, num_logprobs=0),
    )


def _reading(admits: list[Admit]) -> Body:
    """A body that lets requests in and reads all of their prompts."""
    return Body(
        admits=tuple(admits),
        chunk_slots=pack([admit.slot for admit in admits]),
        chunk_lengths=pack([admit.num_prompt for admit in admits]),
    )
