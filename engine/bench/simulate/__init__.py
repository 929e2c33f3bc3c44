"""A simulation of a server with many adapters: the real scheduler and host tier, with a device and a clock of numbers.

`run.simulate` gives one report. Time is virtual: the same options give the same report on any machine. No torch.
"""
