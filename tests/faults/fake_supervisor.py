"""A supervisor as a process of its own: `fake_supervisor.py TRIAL.json RECORD.json [MODULE]`; fake ranks, launcher as the trial says."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.launch.command import Agents
from bench.launch.parent import ForkParent
from bench.launch.supervise import run_trial
from bench.trial import load_trial

if __name__ == "__main__":
    here = (str(Path(__file__).parent),)
    trial, record = load_trial(Path(sys.argv[1])), Path(sys.argv[2])
    program = sys.argv[3] if len(sys.argv) > 3 else "fake_rank"
    with ForkParent(record.with_name("parent.log"), program=program, preload=(), search_path=here) as parent:
        print(run_trial(trial, record, parent=parent, agents=Agents(program=program, search_path=here)).outcome)
