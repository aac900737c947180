"""The systems we compare with: each driven by one small program that runs in the peer's own environment.

`run_*.py` import nothing of this project and no other file of it but `serve_lines.py`. `install.sh` makes the
environments, `process.py` starts the programs and asks them.
"""
