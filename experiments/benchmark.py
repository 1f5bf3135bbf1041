"""What hmn_replay costs, measured beside what it is compared with.

    python experiments/benchmark.py matching
    python experiments/benchmark.py decode --json
    python experiments/benchmark.py time-to-accuracy --data cifar10.npz
    python experiments/benchmark.py replay --help

The sub-commands are modules of experiments/benchmarks/; --help lists them.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python looks beside the script; what is measured is this checkout, whatever is installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from experiments.benchmarks.command import main

    sys.exit(main())
