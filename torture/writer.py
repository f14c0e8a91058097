"""Runs training.checkpoint_writer, and waits where it is to be hit; started by torture.child."""

from __future__ import annotations

import runpy

from torture.child import moment_of_environment, watch_files

if __name__ == "__main__":
    moment = moment_of_environment()
    if moment:
        watch_files(moment, "background saving")
    runpy.run_module("training.checkpoint_writer", run_name="__main__", alter_sys=True)
