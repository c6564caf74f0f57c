"""The commands of `pdl-kernels`, registered in the order in which a newcomer needs them."""

from pdl_kernels.cli import count, doctor, inspect, plot, weights
from pdl_kernels.cli.application import app

for command in (count.count, weights.weights, inspect.inspect, plot.plot, doctor.doctor):
    app.command()(command)

__all__ = ["app"]
