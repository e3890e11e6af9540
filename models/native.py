"""Compile pooled_norm.cpp for this machine, which trains Conv4 on a CPU faster: python -m models.native"""

from engine.native import build
from engine.script import run_script

if __name__ == "__main__":
    run_script(lambda: print(f"library {build()}"))
