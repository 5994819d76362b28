"""``python -m convviz_cuda.cli``: the command without its script."""

from . import main

main()
