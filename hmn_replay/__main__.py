"""``python -m hmn_replay`` is the command ``hmn-replay``."""

from hmn_replay.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
