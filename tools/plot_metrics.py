"""Run ``megatron-gmpo plot_metrics``; see megatron_gmpo/commands/plot_metrics.py."""

from megatron_gmpo.commands import run

if __name__ == "__main__":
    run("plot_metrics")
