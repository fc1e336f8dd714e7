"""gpubroker: poll prices -> store them -> plan a job -> launch a node -> supervise it until it is done."""

__version__ = "0.1.0"
