"""`python -m node.engine DESCRIPTOR`: started by `client.py` with one end of a socket pair."""

import sys

from node.engine.process import end_process, main

end_process(main(int(sys.argv[1])))
