from hmn_replay.condense import condense
from hmn_replay.storage import load
