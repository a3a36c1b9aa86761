"""Benchmark of inference and of training steps: `python -m inference.benchmark COMMAND`.

On a GPU for a quarter of an hour: `suite` and `training_steps` measure everything in two processes (`budget` runs their
steps), `collect` turns their output into result files and tables. Single measurements: `measure`, `video_decoders`,
`micro`, `ladder`. `bench_networks`, `components` and `request` make what is timed, `timers` times it; `result_files` are
the files in inference/results/latency, never changed once written; `result_tables` and `figure` show them; `roofline` computes.

Runs where only torch, triton, numpy, safetensors, einops and PyYAML are installed; `train` needs lightning too. Stages
that need more are reported as missing, with the reason.
"""
