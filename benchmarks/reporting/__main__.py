import sys

from benchmarks.reporting.report import main

if __name__ == "__main__":
    sys.exit(main())
