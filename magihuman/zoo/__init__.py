"""Model zoo: architectures and checkpoints by name, loading, conversion, verification, memory planning.

python -m magihuman.zoo list | inspect PATH | verify DIR [--strict] | convert SRC DST | plan MODEL

from magihuman import zoo
denoiser = zoo.load("scene/base").denoiser
"""

from magihuman.zoo.checkpoints import Loaded, arch, build, config_of, find, load, pack
from magihuman.zoo.names import arch_names, checkpoint_names

__all__ = ["Loaded", "arch", "arch_names", "build", "checkpoint_names", "config_of", "find", "load", "pack"]
