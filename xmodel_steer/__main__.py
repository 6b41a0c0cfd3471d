"""``python -m xmodel_steer``, which torchrun can start."""

from xmodel_steer.cli import main

if __name__ == "__main__":
    main()
