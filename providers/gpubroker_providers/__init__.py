"""The providers that ship with gpubroker, one file each; the core finds them by entry point alone."""
