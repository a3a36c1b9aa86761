"""Benchmark of inference and of training steps: `python -m inference.benchmark COMMAND`.

On a GPU for a quarter of an hour: `suite` and `train` measure everything in two processes (`runner` and `budget` run
their steps), `collect` turns their output into result files and tables. Single measurements: `measure`, `decode`,
`micro`, `ladder`. `networks`, `parts` and `request` make what is timed, `clock` times it, `errors` compares with the
reference; `records` are the result files in inference/results/latency, never changed once written; `tables`,
`gpu_tables` and `picture` show them.

Runs where only torch, triton, numpy, safetensors and einops are installed; `train` needs lightning too. Stages that
need more say what is missing.
"""
