"""Sections of data, rollouts, servers, weight sync and rewards."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from .section import NonNegative, PathText, Positive, RequiredPath, Seconds, Section, Text


class DataConfig(Section):
    path: PathText = ""
    """A .jsonl, .json, .csv or .parquet file, a ``save_to_disk`` folder, or a Hugging Face hub name, with the
    name of a subset if the data set has subsets (``openai/gsm8k:main``). ``reasoning_gym:NAME?ARGUMENTS``
    generates problems (docs/data.md). A folder of text games has a game per row (docs/agents.md)."""
    files: tuple[RequiredPath, ...] = ()
    """Several files to read one after another, instead of ``path``. Wildcards are not expanded."""
    split: Text = "train"
    prompt_column: Text = "problem"
    """Column with the prompt: text, or a list of chat messages. ``a.b`` is field ``b`` of the objects in
    column ``a``."""
    answer_column: Text = "answer"
    """Column with the answer, text or a number, which the reward receives as text; e.g.
    ``reward_model.ground_truth``."""
    image_column: str = ""
    """Column with the images of each problem, for a vision-language model: one image or a list. An image is
    the bytes of a file, a path relative to the data set's folder, or an image of the ``datasets`` library.
    ``<image>`` in the prompt's text, or an image part of a message, marks the place of each image."""
    min_pixels: Positive | None = None
    """Minimum pixels of an image; the processor enlarges smaller ones. None means the processor's value."""
    max_pixels: Positive | None = None
    """Maximum pixels of an image, which bounds its tokens; the processor shrinks larger ones. None means the
    processor's value."""
    template: str = ""
    """Format string around a text prompt, e.g. "{prompt}\\nAnswer in \\\\boxed{{}}."; applied before the chat
    template."""
    system_prompt: str = ""
    """System message put before the prompt; needs a chat template."""
    use_chat_template: bool | None = None
    """Whether to apply the tokenizer's chat template; None applies it if the tokenizer has one."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, e.g. ``enable_thinking = false``. ``chat_template`` names one of
    several templates."""
    special_tokens: Literal["text", "token"] = "text"
    """Meaning of a special token's text, such as ``<|im_end|>``, inside the data set. ``text`` encodes it
    like any other text, so that a problem cannot end its turn. ``token`` encodes it as the special token."""
    max_prompt_tokens: Positive = 1024
    """Maximum tokens in a prompt. Longer prompts are dropped, and their number is printed."""
    max_prompts: Positive | None = None
    """Number of problems to use, from the first, after the length filter and before the shuffle."""
    shuffle: bool = True
    allow_changed: bool = False
    """Whether a run may resume although its prompts, their order or their answers have changed. With another
    number of prompts it continues with the next epoch."""

    @model_validator(mode="after")
    def _files_or_path(self) -> DataConfig:
        if self.path and self.files:
            raise ValueError(f"path = {self.path!r} and files both name a data set: leave one out")
        if len(set(self.files)) < len(self.files):
            raise ValueError(f"files = {list(self.files)} names a file twice")
        return self


def _json(args: dict[str, Any]) -> dict[str, Any]:
    """Return ``args``, which travel to other processes, if JSON can hold them; TOML has dates as well."""
    try:
        json.dumps(args)
    except TypeError as error:
        raise ValueError(f"{error}: give a text instead") from None
    return args


class RolloutConfig(Section):
    engine: Literal["embedded", "sglang"] = "embedded"
    """``embedded`` runs transformers in the trainer's processes; ``sglang`` uses SGLang servers."""
    num_servers: Positive = 1
    """Number of SGLang servers to start, each with its own copy of the weights. They are divided among the
    trainer's nodes, or among the rollout nodes of a Slurm job."""
    server_urls: tuple[Text, ...] = ()
    """URLs of running SGLang servers to use instead, e.g. ["http://10.0.0.7:30000"]. Their keys are read from
    the environment variables SGLANG_API_KEY and SGLANG_ADMIN_API_KEY."""
    servers_file: PathText = ""
    """File with the addresses of running SGLang servers: servers.json of the job that starts them. The
    trainer waits up to sglang.start_timeout_s for it. The keys are in server_keys.json in the same folder."""
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    """``disaggregated`` servers have their own devices. ``colocated`` servers share the trainer's devices and
    release their memory during training."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Maximum number of steps generated ahead during training; 0 alternates generation and training."""
    routed_experts: bool = False
    """Record the experts of every token (MoE), for replay in training or for comparison with the policy."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Dtype of the embedded engine; None means ``model.dtype``. A different dtype simulates an engine with
    other kernels: log probabilities and experts differ from the policy's."""
    quantization: Literal["none", "fp8"] = "none"
    """``fp8`` rounds the linear weights of attention and MLPs to 8 bits in each weight sync, with one scale
    for each block of 128 x 128. Servers started by the run compute in FP8. The embedded engine computes with
    the rounded values."""
    router_noise: NonNegative = 0.0
    """Standard deviation of Gaussian noise that the embedded engine adds to the router logits (MoE) when it
    samples training responses. The noise makes the experts differ from the policy's."""
    prompts_per_step: Positive = 32
    samples_per_prompt: Positive = 8
    max_new_tokens: Positive = 1024
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability mass of the most likely tokens to sample from; 1 means all. Values below 1 bias training:
    the loss's ratio does not know that tokens were left out."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Number of most likely tokens to sample from; 0 means all. Other values bias training, like top_p."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a response, in addition to the end-of-sequence token. A special token's text is
    allowed. The token that completes a string is the last one; the reward gets the text before the string."""
    batch_size: Positive = 64
    """Number of responses that the embedded engine decodes together on a rank."""
    dynamic_sampling: Literal["off", "drop", "resample"] = "off"
    """Treatment of groups whose rewards, without the overlong penalty, are all equal (DAPO): ``off`` keeps
    them, ``drop`` drops them, and ``resample`` replaces them with groups of new prompts."""
    max_resample_rounds: Positive = 4
    """Maximum number of draws after the first one for ``resample``. After them the step continues with the
    groups it has."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """Number of tokens before max_new_tokens over which the reward falls linearly by overlong_penalty (DAPO's
    soft overlong punishment), at most max_new_tokens. 0 disables it. Episodes have max_episode_tokens in its
    place."""
    overlong_penalty: NonNegative = 1.0
    """Penalty of a response with max_new_tokens tokens; used if overlong_buffer is set."""
    environment: str = ""
    """Environment that answers the policy's turns: ``household``, ``textworld``, ``alfworld``, or
    ``module:Class``; empty samples one response to a prompt. With an environment, ``reward.name`` is
    ``environment`` unless it is set."""
    environment_args: Annotated[dict[str, Any], AfterValidator(_json)] = {}
    """Arguments of the environment's class. With ``tools``, arguments of the functions that the model does
    not see, e.g. ``file`` of the search tool."""
    tools: tuple[Text, ...] = ()
    """Functions that the policy may call, ``module:function``, with type hints and a docstring in Google's
    style. An episode ends with the first turn that calls none."""
    max_turns: Positive = 16
    """Maximum number of turns in an episode. ``max_new_tokens`` limits each turn."""
    max_episode_tokens: Positive | None = None
    """Maximum tokens of an episode after its prompt, sampled or not; None means 4 * max_new_tokens. Needs
    ``environment`` or ``tools``."""
    keep_thinking: bool = False
    """Accept a chat template that drops thinking from earlier turns, as those of Qwen3 and DeepSeek-R1 do. A
    turn's thinking stays in the context of later turns, as it was sampled. Otherwise such a template is
    refused."""
    environment_timeout_s: Seconds = 30.0
    """Time limit of one call of an environment, or of all calls of tools in a turn. A process that exceeds it
    is killed, and the group of its episode is not trained on."""
    exchange_folder: PathText = ""
    """Folder for the tokens of a step that a node trains, in a file without a name that the ranks of the node
    map; empty means /dev/shm. A node needs about 9 bytes of room for a token, and with recorded experts one
    more, or two above 256 experts, for each layer and expert of the token. A folder on a disk is slower."""
    save_path: PathText = ""
    """Folder to which the groups of every step are written; empty disables it."""
    replay_path: PathText = ""
    """Folder that an earlier run wrote with ``save_path``; train on its groups instead of generating."""

    @model_validator(mode="after")
    def _episodes_have_one_environment(self) -> RolloutConfig:
        if self.environment and self.tools:
            raise ValueError(
                f"environment = {self.environment!r} and tools = {list(self.tools)} both answer the policy's "
                "turns: leave one out"
            )
        if len(set(self.tools)) < len(self.tools):
            raise ValueError(f"tools = {list(self.tools)} names a function twice")
        for field in ("environment_args", "max_episode_tokens", "keep_thinking"):
            if (value := getattr(self, field)) and not self.has_episodes:
                raise ValueError(f"{field} = {value!r} needs environment or tools: set one of them")
        if self.max_episode_tokens and self.max_episode_tokens < self.max_new_tokens:
            raise ValueError(
                f"max_episode_tokens = {self.max_episode_tokens} is below max_new_tokens = "
                f"{self.max_new_tokens}, the limit of one turn: lower that or raise max_episode_tokens"
            )
        return self

    @property
    def has_episodes(self) -> bool:
        """Return whether responses are episodes of several turns."""
        return bool(self.environment or self.tools)

    @property
    def max_response_tokens(self) -> int:
        """Return the maximum tokens after a prompt: of a response, or of an episode with what it observes."""
        if self.has_episodes:
            return self.max_episode_tokens or 4 * self.max_new_tokens
        return self.max_new_tokens

    @property
    def response_limit(self) -> str:
        """Return the setting that ``max_response_tokens`` comes from."""
        return "rollout.max_episode_tokens" if self.has_episodes else "rollout.max_new_tokens"

    @model_validator(mode="after")
    def _overlong_buffer_within_the_response(self) -> RolloutConfig:
        if self.overlong_buffer > self.max_response_tokens:
            limit = "max_episode_tokens" if self.has_episodes else "max_new_tokens"
            raise ValueError(
                f"overlong_buffer = {self.overlong_buffer} is above {limit} = {self.max_response_tokens}: "
                "choose a smaller one"
            )
        return self

    @model_validator(mode="after")
    def _fields_fit_the_engine(self) -> RolloutConfig:
        if self.engine == "embedded":
            for field in ("server_urls", "servers_file", "max_staleness"):
                if value := getattr(self, field):
                    raise ValueError(f"{field} = {value!r} needs engine = 'sglang'")
            if self.placement == "colocated":
                raise ValueError("placement = 'colocated' needs engine = 'sglang'")
        elif self.dtype:
            raise ValueError(
                f"dtype = {self.dtype!r} needs engine = 'embedded': the servers' is sglang.args.dtype"
            )
        elif self.router_noise:
            raise ValueError(f"router_noise = {self.router_noise:g} needs engine = 'embedded': set it to 0")
        if self.server_urls and self.servers_file:
            raise ValueError(
                f"servers_file = {self.servers_file!r} and server_urls both name servers: leave one out"
            )
        if self.server_urls and self.quantization == "fp8":
            raise ValueError("quantization = 'fp8' needs servers started for it: leave server_urls out")
        if len(set(self.server_urls)) < len(self.server_urls):
            raise ValueError(f"server_urls = {list(self.server_urls)} names a server twice")
        if self.placement == "colocated" and self.max_staleness:
            raise ValueError(
                f"max_staleness = {self.max_staleness} needs placement = 'disaggregated': "
                "colocated servers do not generate while it trains"
            )
        return self


def _switches(args: dict[str, Any]) -> dict[str, Any]:
    """Return ``args`` with bools for "true" and "False", because no option of SGLang has such a text."""
    bools = {"true": True, "false": False}
    return {name: bools.get(str(value).lower(), value) for name, value in args.items()}


class SGLangConfig(Section):
    python: RequiredPath = ".venv-sglang/bin/python"
    """Python interpreter of the servers' own environment (``make sglang``)."""
    host: Text = "127.0.0.1"
    """Address that the servers bind. With the default, servers that other nodes must reach bind the node's
    address towards rank 0."""
    tensor_parallel_size: Positive = 1
    """Number of devices of one server."""
    args: Annotated[dict[str, Any], AfterValidator(_switches)] = {}
    """Additional options of sglang.launch_server, by its own names, e.g. ``mem_fraction_static = 0.8``."""
    max_concurrent_requests: Positive = 256
    """Maximum number of in-flight requests per server; additional requests wait in the client."""
    request_timeout_s: Seconds = 1200.0
    """Timeout of one request. After it the server returns the tokens that it has sampled, and a new request
    continues the response. Five consecutive requests of a response without a token end the run. The sum of
    this timeout and ``hang_timeout_s`` must be below ``supervision.hang_timeout_s``. If it is not, a hung
    server ends the run before it is detected."""
    start_timeout_s: Seconds = 600.0
    """Maximum time from the start of a server to its first answer."""
    health_interval_s: Seconds = 10.0
    """Interval between health checks of a server."""
    hang_timeout_s: Seconds = 120.0
    """A server that does not answer for this time is killed and restarted."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Maximum consecutive restarts per server; a successful weight sync resets the count. The run ends when
    every server has exceeded it."""


class WeightSyncConfig(Section):
    route: Literal["auto", "tensor", "distributed", "disk"] = "auto"
    """Transport of the weights to the servers: memory that both map (``tensor``), a broadcast over NCCL or
    gloo (``distributed``), or a folder that both see (``disk``). ``auto`` is ``tensor`` for colocated servers
    and ``distributed`` for the others."""
    bucket_bytes: Positive | None = None
    """Memory of two buckets of tensors, in bytes. One bucket is packed while the other is sent. None means
    4 GiB on a GPU and 512 MiB on a CPU."""
    in_flight: Literal["retract", "in_place", "abort"] = "retract"
    """Treatment of unfinished requests at a sync. With ``retract`` the server recomputes their KV cache with
    the new weights. With ``in_place`` they keep the old cache, which later requests do not use. With
    ``abort`` the server aborts them, and the client sends them again as longer prompts."""
    verify: bool = False
    """Overwrite the servers' weights with noise before each sync, and compare their checksums after it."""
    timeout_s: Seconds = 600.0
    """Timeout of one request of a sync."""
    folder: PathText = ""
    """Folder that the ``disk`` route writes to; each run uses a subfolder of its own, which only its user can
    read. Empty means weight_sync in ``run_dir``. The servers must see the folder under the same path, and run
    as the same user."""

    def route_to(self, placement: str) -> Literal["tensor", "distributed", "disk"]:
        """Return the route to servers of this placement."""
        if self.route != "auto":
            return self.route
        return "tensor" if placement == "colocated" else "distributed"


class RewardConfig(Section):
    name: Text = "math"
    """Reward: ``math``, ``arithmetic``, ``countdown``, ``reasoning_gym``, ``environment`` (the sum of what
    the steps of rollout.environment return), or ``module:function``, a callable (Prompt, response_text) ->
    float."""
    timeout_s: Seconds = 10.0
    """Time limit of ``math`` and ``reasoning_gym`` for one answer. A check over it, or over 512 MiB, scores 0
    and is counted."""
    workers: Positive = 2
    """Number of processes per rank in which these two check answers at the same time. One more waits as a
    spare."""
