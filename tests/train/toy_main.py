"""train/main.py with the methods of toy_methods/, as if their files lay in tpp/methods/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import toy_methods

from tpp import methods
from tpp.common.errors import run_command
from tpp.common.registry import classes_in
from tpp.methods.base import Method
from train.main import main

if __name__ == "__main__":
    found = classes_in("toy_methods", toy_methods.__path__, Method, "name")
    methods.available_methods().update(found)
    run_command(main)
