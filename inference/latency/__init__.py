"""How long a clip takes, stage by stage, really measured: `python -m inference.latency`.

`networks`, `parts` and `request` make what is timed; `clock` times it; `errors` says how far a faster network is from
the reference on the same inputs; `measure`, `micro`, `ladder`, `decoders` and `suite` are the commands. Their results
are JSON files in inference/results/latency, never changed once written (`records`); `tables` and `picture` show them.

Runs where only torch, triton, numpy, safetensors and einops are installed; stages that need more say what is missing.
"""
