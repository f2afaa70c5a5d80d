"""Print a plan as tables."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..checkpoint import checkpoint_size
from ..config import Config
from ..models.description import DTYPES, ModelDescription
from .checks import gib, number_of_servers
from .hardware import GPUS_PER_NODE, RESERVED, Hardware
from .model_size import Model
from .rank_plan import RankPlan
from .step_estimate import StepEstimate, StepTraffic


def headline(cfg: Config, description: ModelDescription, model: Model, world_size: int, machine: str) -> str:
    """Return one line about the model and the layout on ``machine``, "h100" or "CPUs"."""
    parallel = cfg.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VPP": parallel.virtual_pipeline_model_parallel_size or 1,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "ETP": parallel.expert_tensor_parallel_size,
        "DP": world_size // parallel.model_parallel_size,
    }
    layout = " ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"
    active = f", {model.active_parameters / 1e9:.2f} B of them active" if description.is_moe else ""
    return (
        f"[bold]{escape(cfg.model.path)}[/bold] ({description.whole.model_type}): "
        f"{model.parameters / 1e9:.2f} B parameters{active}; {world_size} ranks on {machine}: {layout}"
    )


def memory_table(plans: list[RankPlan], hardware: Hardware | None) -> Table:
    """Return the table of memory, one row per pipeline stage. All ranks of a stage need the same memory.

    Without hardware, the shares of its memory are left out.
    """
    table = Table("stage", "rank", title="Memory of a rank, GiB", title_justify="left")
    columns = (
        "weights",
        "gradients",
        "optimizer",
        "reference",
        "activations",
        "temporaries",
        "total",
    )
    for name in ("parameters", *columns, "in flight", *(["of memory"] if hardware else [])):
        table.add_column(name, justify="right")
    for plan in plans:
        table.add_row(
            str(plan.stage),
            str(plan.rank),
            f"{plan.parameters / 1e9:.3f} B",
            *(gib(getattr(plan, name)) for name in columns),
            str(plan.in_flight),
            *([f"{(plan.total + RESERVED) / hardware.memory:.0%}"] if hardware else []),
        )
    if hardware:
        table.caption = f"of memory: with {gib(RESERVED)} GiB reserved, of {gib(hardware.memory)} GiB"
    return table


def print_step(console: Console, cfg: Config, step: StepTraffic) -> None:
    """Print the tables of a step: its batch, the traffic of a rank, and the time of each phase if known."""
    console.print(batch_table(cfg, step))
    console.print(traffic_table(step))
    if isinstance(step, StepEstimate):
        console.print(time_table(step))


def batch_table(cfg: Config, step: StepTraffic) -> Table:
    """Return the table of the sequences, optimizer steps and rollout engine of a step."""
    table = Table(title="A step", title_justify="left", show_header=False)
    batch, rollout = step.batch, cfg.rollout
    sequences, updates = len(batch.lengths), batch.microbatches
    groups = f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt}"
    table.add_row("sequences", f"{sequences:,}", groups)
    table.add_row("tokens", f"{batch.tokens:,}", f"{batch.tokens / sequences:,.0f} per sequence (assumed)")
    if step.image_flops:
        kind = "frozen" if cfg.model.freeze_vision else "trained"
        tower = f"{kind} tower of {step.model.tower_parameters / 1e9:.2f} B"
        table.add_row("images", f"{sequences:,}", f"{step.image_flops / 1e12:.2f} TFLOP each in the {tower}")
    table.add_row("optimizer steps", str(len(updates)), f"{max(updates)} microbatches per rank in each")
    if rollout.engine == "embedded":
        about = f"{rollout.batch_size} responses at a time on each rank"
        table.add_row("embedded engine", f"{step.world_size} ranks", about)
    elif isinstance(step, StepEstimate):
        servers = step.servers
        about = f"{servers.gpus} GPUs each, {servers.cache_tokens:,} tokens in the cache"
        table.add_row("rollout servers", str(servers.count), about)
    else:
        table.add_row("rollout servers", str(number_of_servers(cfg)), "on CPUs")
    if cfg.checkpoint.async_save:  # each rank keeps what it writes, and the ranks write equal shares
        frozen = step.model.tower_parameters if cfg.model.freeze_vision else 0
        nbytes = checkpoint_size(step.model.parameters, DTYPES[cfg.model.dtype], frozen)
        nodes = -(-step.world_size // GPUS_PER_NODE)
        about = "in the host memory of each node until it is written"
        table.add_row("a save", f"{nbytes / nodes / 1e9:.1f} GB", about)
    return table


def traffic_table(step: StepTraffic) -> Table:
    """Return the table of the bytes that the busiest rank sends in a step."""
    title = "Sent by a rank in a step"
    table = Table("collective", "group", "ranks", "nodes", title=title, title_justify="left")
    table.add_column("GB", justify="right")
    for traffic in sorted(step.traffic(), key=lambda traffic: -traffic.sent):
        nodes = str(len({rank // GPUS_PER_NODE for rank in traffic.ranks}))
        ranks, sent = str(len(traffic.ranks)), f"{traffic.sent / 1e9:.2f}"
        table.add_row(traffic.operation, traffic.group, ranks, nodes, sent)
    if boundary := step.boundary():
        table.add_row("send and receive", "pp", str(len(step.plans)), "", f"{boundary / 1e9:.2f}")
    data = step.data_path
    table.add_row("data, over a node", "", "", "", f"{data.nbytes / 1e9:.2f}")
    sent = f"{step.synced / 1e9:.2f}"
    table.add_row("weight sync", "world", str(step.world_size), "", sent)
    return table


def time_table(estimate: StepEstimate) -> Table:
    """Return the table of the estimated seconds of each phase, the throughput and the MFU."""
    table = Table(title="Estimated time", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, seconds in estimate.seconds.items():
        table.add_row(name, f"{seconds:.1f} s")
    table.add_row("step", f"{estimate.step:.1f} s")
    throughput = estimate.batch.tokens / estimate.step / estimate.gpus
    table.add_row("tokens per second and GPU", f"{throughput:,.0f}")
    table.add_row("GPUs", str(estimate.gpus))
    table.add_row("MFU of training", f"{estimate.mfu:.2f}")
    return table
