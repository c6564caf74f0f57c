"""The commands of `pdl-kernels`, one file each. They need the extra `cli`."""

from pdl_kernels.commands import count, doctor, inspect, plot, weights
from pdl_kernels.commands.application import app

# In the order in which a newcomer needs them.
for command in (count.count, weights.weights, inspect.inspect, plot.plot, doctor.doctor):
    app.command()(command)

__all__ = ["app"]
