"""What a step frees is there for the next one."""

import json
import subprocess
import sys

import pytest

CODE = """
import json, resource
from finetune.host_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        len(b"x" * 2**26)  # 64 MB, freed before the next
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(json.dumps([faults(), keep_freed_memory(), faults(), faults()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_freed_blocks_are_not_asked_of_the_kernel_again():
    printed = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    before, able, first, after = json.loads(printed)
    assert able
    assert before > 8 * max(first, 1)  # each block anew, and then at most one for all of them
    assert after < before / 100
